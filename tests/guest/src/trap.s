# Ring-0 entries: exceptions, interrupts, calls from ring 3.

# ---- Exceptions: one 16-byte stub per vector ----
.text
.balign 16
.global exception_stubs
exception_stubs:
.altmacro
.macro EXCEPTION n
  .balign 16
  .if (\n==8)||(\n>=10 && \n<=14)||(\n==17)||(\n==21)
  .else
  pushq $0                        # in place of an error code
  .endif
  pushq $\n
  jmp exception
.endm
.set i, 0
.rept 32
  EXCEPTION %i
.set i, i+1
.endr

# Stack: rdx, rax, vector, error, rip, cs, rflags, rsp, ss.
exception:
  pushq %rax
  pushq %rdx
  movq 32(%rsp), %rdx
  cmpq $6, 16(%rsp)
  jne 1f
  # `int 0x81` in ring 3 is #UD on a KVM without hardware virtualisation.
  cmpw $0x81cd, (%rdx)
  jne report
  addq $2, 32(%rsp)
  popq %rdx
  popq %rax
  addq $16, %rsp
  jmp ring0_call
1:
  cmpq $13, 16(%rsp)
  jne report
  # `hlt` in ring 3: wait for an interrupt here, then skip it.
  cmpb $0xf4, (%rdx)
  jne report
  incq 32(%rsp)
  popq %rdx
  popq %rax
  addq $16, %rsp
  sti
  hlt
  iretq
report:
  # Keep what happened and go on in ring 3 at `trap_resume`.
  movq 16(%rsp), %rax
  movq %rax, trap_vector
  movq 24(%rsp), %rax
  movq %rax, trap_error
  movq %rdx, trap_rip
  movq %cr2, %rax
  movq %rax, trap_cr2
  movq trap_resume, %rax
  movq %rax, 32(%rsp)
  popq %rdx
  popq %rax
  addq $16, %rsp
  iretq

# Where an unexpected exception resumes: in ring 3, on any stack.
.global trap_report_entry
trap_report_entry:
  andq $-16, %rsp
  call trap_report

# ---- Calls: %rax = function to run in ring 0 ----
.global ring0_call
ring0_call:
  callq *%rax
  iretq

.global ring0_read_msr, ring0_write_msr, ring0_nothing, ring0_shut_down
ring0_read_msr:                   # %rcx = MSR
  rdmsr
  shlq $32, %rdx
  movl %eax, %eax
  orq %rdx, %rax
  ret
ring0_write_msr:                  # %rcx = MSR, %rsi = value
  movl %esi, %eax
  movq %rsi, %rdx
  shrq $32, %rdx
  wrmsr
  ret
ring0_nothing:
  ret
ring0_shut_down:                  # no IDT, then an exception: triple fault
  lidt no_idt
  ud2
no_idt: .word 0
  .quad 0

# ---- Interrupts: 32-byte stubs for vectors 0x40-0x5f, counted ----
.balign 32
.global interrupt_stubs
interrupt_stubs:
.macro INTERRUPT n
  .balign 32
  incq interrupt_counts+8*\n
  pushq %rax
  movl $0xfee000b0, %eax          # local APIC, end of interrupt
  movl $0, (%rax)
  popq %rax
  iretq
.endm
.set i, 0
.rept 32
  INTERRUPT %i
.set i, i+1
.endr
.global spurious_stub
spurious_stub:
  iretq

.bss
.balign 8
.global trap_vector, trap_error, trap_rip, trap_cr2, trap_resume, interrupt_counts
trap_vector: .skip 8
trap_error: .skip 8
trap_rip: .skip 8
trap_cr2: .skip 8
trap_resume: .skip 8
interrupt_counts: .skip 256

# ---- What the compiler calls for copies; ring 3, no libc ----
.text
.global memcpy, memmove, memset, memcmp, bcmp
memmove:
  movq %rdi, %rax
  movq %rdx, %rcx
  cmpq %rsi, %rdi
  jbe 1f
  leaq (%rsi,%rdx), %r8
  cmpq %r8, %rdi
  jae 1f
  std
  leaq -1(%rdi,%rdx), %rdi
  leaq -1(%rsi,%rdx), %rsi
  rep movsb
  cld
  ret
memcpy:
  movq %rdi, %rax
  movq %rdx, %rcx
1:
  rep movsb
  ret
memset:
  movq %rdi, %r8
  movl %esi, %eax
  movq %rdx, %rcx
  rep stosb
  movq %r8, %rax
  ret
bcmp:
memcmp:
  xorl %ecx, %ecx
  xorl %eax, %eax
2:
  cmpq %rdx, %rcx
  je 3f
  movzbl (%rdi,%rcx), %eax
  movzbl (%rsi,%rcx), %r8d
  incq %rcx
  subl %r8d, %eax
  je 2b
3:
  ret
