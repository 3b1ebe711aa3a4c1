# From the PVH entry to ring 3, on the first CPU and on the others.
#
# Everything after this file runs in ring 3: on a KVM without hardware
# virtualisation ring 0 is emulated instruction by instruction, ring 3 runs
# natively. Code here is therefore short, and tables are laid out by the
# assembler instead of being computed.
#
# RFLAGS.IOPL does not give ring 3 its ports on every KVM; the all-clear I/O
# bitmap in the TSS does, everywhere.

.set CR4_PAE_SSE, 0x620           # PAE | OSFXSR | OSXMMEXCPT
.set CR0_LONG, 0x80050033         # PG | AM | WP | NE | ET | MP | PE
.set MSR_EFER, 0xc0000080
.set EFER_LME_SCE, 0x101
.set SEL_CODE32, 0x08
.set SEL_CODE64, 0x10
.set SEL_DATA, 0x18
.set SEL_USER_DATA, 0x2b
.set SEL_USER_CODE64, 0x33
.set SEL_TSS, 0x40
.set USER_RFLAGS, 0x202           # IF

# The entry's address, in the form a PVH loader looks for
# (XEN_ELFNOTE_PHYS32_ENTRY, type 18).
.section .note.Xen, "a", @note
.balign 4
.long 4, 8, 18
.asciz "Xen"
.quad pvh_start

# 32-bit protected mode, flat, paging off, %ebx = hvm_start_info.
.section .text.boot, "ax"
.code32
.global pvh_start
pvh_start:
  cli
  movl $stack0_top, %esp
  movl %ebx, start_info
  # Firmware may leave the PIT running: its vector would be 8, a double fault.
  movb $0xff, %al
  outb %al, $0x21
  outb %al, $0xa1
  movl $tss, %eax
  movw %ax, tss_descriptors+2
  shrl $16, %eax
  movb %al, tss_descriptors+4
  movb %ah, tss_descriptors+7
  movl $stack0_top, tss+4
  movw $0x68, tss+0x66            # offset of the I/O bitmap
  movb $0xff, tss+0x2068          # its closing byte
  call enter_long_tables
  lgdt gdt_pointer
  ljmp $SEL_CODE64, $start64

# Page tables, PAE, SSE, long mode: the same on every CPU.
enter_long_tables:
  movl $pml4, %eax
  movl %eax, %cr3
  movl $CR4_PAE_SSE, %eax
  movl %eax, %cr4
  movl $MSR_EFER, %ecx
  rdmsr
  orl $EFER_LME_SCE, %eax
  wrmsr
  movl $CR0_LONG, %eax
  movl %eax, %cr0
  ret

.code64
start64:
  call load_segments
  movl $SEL_TSS, %eax
  ltr %ax
  pushq $SEL_USER_DATA
  pushq $stack3_top-8             # as after a call: the ABI's alignment
  pushq $USER_RFLAGS
  pushq $SEL_USER_CODE64
  pushq $guest_main
  iretq

load_segments:
  xorl %eax, %eax
  movl %eax, %ds
  movl %eax, %es
  movl %eax, %fs
  movl %eax, %gs
  movl $SEL_DATA, %eax
  movl %eax, %ss
  lidt idt_pointer
  ret

# Another CPU in 32-bit protected mode, still without paging.
.code32
ap_start32:
  movl $SEL_DATA, %eax
  movl %eax, %ds
  movl %eax, %es
  movl %eax, %ss
  movl ap_boot, %esp
  call enter_long_tables
  ljmp $SEL_CODE64, $ap_start64
.code64
ap_start64:
  call load_segments
  movq ap_boot+16, %rax
  ltr %ax
  movq ap_boot+24, %rdi
  pushq $SEL_USER_DATA
  pushq ap_boot+8
  pushq $USER_RFLAGS
  pushq $SEL_USER_CODE64
  pushq $ap_main
  iretq

# Copied below 1 MiB; a start-up IPI enters it in real mode, CS = its page.
.data
.global ap_trampoline, ap_trampoline_end
ap_trampoline:
.code16
  cli
  movw %cs, %ax
  movw %ax, %ds
  lgdtl ap_gdt_pointer-ap_trampoline
  movl $0x11, %eax                # ET | PE
  movl %eax, %cr0
  ljmpl $SEL_CODE32, $ap_start32
ap_gdt_pointer:
  .word gdt_end-gdt-1
  .long gdt
ap_trampoline_end:
.code64

# What the next CPU to start shall take: ring-0 stack, ring-3 stack, TSS
# selector, its index. Filled by smp.rs.
.balign 16
.global ap_boot
ap_boot: .quad 0, 0, 0, 0

.balign 16
gdt:
  .quad 0
  .quad 0x00cf9b000000ffff        # 0x08 code, 32 bit: other CPUs' first step
  .quad 0x00af9b000000ffff        # 0x10 code, 64 bit
  .quad 0x00cf93000000ffff        # 0x18 data
  .quad 0x00cffb000000ffff        # 0x20 ring-3 code, 32 bit (unused)
  .quad 0x00cff3000000ffff        # 0x28 ring-3 data
  .quad 0x00affb000000ffff        # 0x30 ring-3 code, 64 bit
  .quad 0
.global tss_descriptors
tss_descriptors:
  .quad 0x0000890000002068        # 0x40 TSS of CPU 0, base filled in above
  .quad 0
  .fill 2*15, 8, 0                # 15 other CPUs, filled by smp.rs
gdt_end:
gdt_pointer:
  .word gdt_end-gdt-1
  .quad gdt
idt_pointer:
  .word 4095
  .quad idt
.balign 8
.global start_info
start_info: .quad 0

# Identity map, user-accessible, 2 MiB pages: 0-1 GiB and 3-4 GiB (devices).
# paging.rs adds what the memory map and the BARs need beyond them.
.section .paging, "aw"
.global pml4
.balign 4096
pml4:
  .quad pdpt+7
  .fill 511, 8, 0
pdpt:
  .quad pd_low+7, 0, 0, pd_devices+7
  .fill 508, 8, 0
pd_low:
.set i, 0
.rept 512
  .quad i*0x200000 + 0xe7
.set i, i+1
.endr
pd_devices:
.set i, 0
.rept 512
  .quad 0xc0000000 + i*0x200000 + 0xe7
.set i, i+1
.endr

.bss
.balign 4096
.global idt
idt: .skip 4096
tss: .skip 12288
stack0: .skip 8192
stack0_top:
.balign 16
stack3: .skip 131072
stack3_top:
.text
