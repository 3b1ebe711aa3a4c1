//! `mode=smoke`: does the machine do what the guest builds on?

use guest_logic::args::Args;
use guest_logic::pattern;

use crate::clock::{from_ms, to_us};
use crate::cpu::{halt, read_msr, tsc, visit_ring0};
use crate::memory::{Pages, address_of};
use crate::serial::say;
use crate::{lapic, power, traps};

const MSR_APIC_BASE: u32 = 0x1b;
const MSR_APIC_ENABLED: u64 = 1 << 11;

/// Runs all checks, prints `PASS` or `FAIL` for each and for all, ends.
pub(crate) fn run(args: &Args<'_>, pages: &Pages) -> ! {
    let checks: [(&str, &dyn Fn() -> bool); 6] = [
        ("ring0-call", &ring0_call),
        ("undefined-instruction", &|| {
            traps::provoke_undefined_instruction() == Some(6)
        }),
        ("self-interrupt", &self_interrupt),
        ("timer-spin", &timer_while_spinning),
        ("timer-halt", &timer_while_halted),
        ("memory", &|| memory(pages)),
    ];
    let mut all = true;
    for (name, check) in checks {
        let start = tsc();
        let good = check();
        all &= good;
        say!("{} {name} {} us", verdict(good), to_us(tsc() - start));
    }
    say!("{} smoke", verdict(all));
    power::off(args)
}

const fn verdict(good: bool) -> &'static str {
    if good { "PASS" } else { "FAIL" }
}

fn ring0_call() -> bool {
    visit_ring0();
    read_msr(MSR_APIC_BASE) & MSR_APIC_ENABLED != 0
}

fn wait_ms(ms: u64) {
    let start = tsc();
    while tsc() - start < from_ms(ms) {
        core::hint::spin_loop();
    }
}

fn self_interrupt() -> bool {
    let before = traps::interrupts(traps::SELF);
    for _ in 0..10 {
        lapic::interrupt_self();
        wait_ms(1);
    }
    traps::interrupts(traps::SELF) - before == 10
}

/// A 1 ms timer over 100 ms. The bounds are wide: a busy host merges ticks.
fn timer_while_spinning() -> bool {
    let before = traps::interrupts(traps::TIMER);
    lapic::start_timer(1000);
    wait_ms(100);
    lapic::stop_timer();
    (10..=110).contains(&(traps::interrupts(traps::TIMER) - before))
}

fn timer_while_halted() -> bool {
    let start = tsc();
    lapic::start_timer(1000);
    (0..20).for_each(|_| halt());
    lapic::stop_timer();
    to_us(tsc() - start) >= 10_000
}

fn memory(pages: &Pages) -> bool {
    let mut next = 0;
    while next < pages.count() {
        let run = pages.run(next, 64);
        for page in run {
            pattern::fill(page, address_of(page), next);
            if !pattern::is_intact(page, address_of(page), next) {
                return false;
            }
        }
        next += run.len() as u64;
    }
    true
}
