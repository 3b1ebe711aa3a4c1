//! The checker that runs inside a Linux guest: what the guest sees of its network, its memory,
//! and a device's DMA.
//!
//! It is one static binary for an initramfs that has nothing else:
//!
//! ```text
//! RUSTFLAGS="-C target-feature=+crt-static" \
//!     cargo build --release -p guest-net --target x86_64-unknown-linux-gnu
//! ```
//!
//! A subcommand prints one JSON object per line: progress each second, and a last line with
//! `"event":"done"`. `SIGTERM` and `SIGINT` end it early, with that line. Its status is 0 if
//! nothing was wrong with the data, 1 if something was, 2 if it could not do its work.
//!
//! Gaps are measured with `CLOCK_MONOTONIC`: what the guest's own clock says about a pause.
use std::process::ExitCode;

mod args;
mod dirty;
mod ethtool;
mod flow;
mod json;
mod mock_dma;
mod pattern;
mod progress;
mod reports;
mod rxhash;
mod stop;
mod tcp;
mod udp;

use args::Args;

const USAGE: &str = "\
usage: guest_net COMMAND [OPTION...]

rxhash --iface IF [--count N] [--seconds S] [--port P]
    The receive hash of each IP packet that IF gets, as its driver gave it.
reports --iface IF --seed N --count N [--view skb|xdp] [--plan STEPS] [--seconds S]
    Whether each of the frames 0..count of test-packets has the hash, and comes by the queue, that it must,
    while settings change: 1000=rxhash:off,2000=rxhash:on,3000=hkey:7,4000=equal:2,5000=weight:1:3,
    6000=combined:1,7000=flow:tcp4:addresses.
ethtool-rxhash on|off|show --iface IF
    Turns the hash in received packets on or off; key and indirection table of IF.
tcp-send --to ADDR:PORT [--bytes N] [--seconds S] [--rate BYTES/S] [--wait S]
tcp-recv --listen ADDR:PORT
    A stream of known bytes: how many arrived, whether they are right, the longest gap.
udp-seq send --to ADDR:PORT [--count N] [--seconds S] [--rate PACKETS/S] [--size BYTES]
udp-seq recv --listen ADDR:PORT [--count N] [--seconds S] [--idle S]
    Numbered packets: how many were lost or came twice, the longest gap.
dirty --mib N [--rate MIB/S] [--seconds S]
    Writes memory with a known pattern, and checks that it stays.
mock-dma [--pages N] [--rate PAGES/S] [--record BYTES] [--step PAGES] [--devices N]
         [--peers true] [--pause MS] [--seconds S]
    Has the lab's mock DMA devices write pages and each other's mailboxes, and checks all of it: some
    with each pause, and everything, the devices at rest, on arrival from a migration.

All output is JSON, one object per line. Status: 0 right, 1 wrong data, 2 failed.
";

/// What a subcommand found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Verdict {
    /// All data was right.
    Right,
    /// Some was not.
    Wrong,
}

impl Verdict {
    const fn of(right: bool) -> Self {
        if right { Self::Right } else { Self::Wrong }
    }
}

fn run(mut args: Args) -> anyhow::Result<Verdict> {
    match args.word("COMMAND")?.as_str() {
        "rxhash" => rxhash::run(args),
        "reports" => reports::run(args),
        "ethtool-rxhash" => ethtool::run(args),
        "tcp-send" => tcp::send(args),
        "tcp-recv" => tcp::receive(args),
        "udp-seq" => match args.word("send or recv")?.as_str() {
            "send" => udp::send(args),
            "recv" => udp::receive(args),
            other => anyhow::bail!("udp-seq has no `{other}`: use send or recv"),
        },
        "dirty" => dirty::run(args),
        "mock-dma" => mock_dma::run(args),
        other => anyhow::bail!("there is no command `{other}`\n{USAGE}"),
    }
}

fn main() -> ExitCode {
    let words: Vec<String> = std::env::args().skip(1).collect();
    if words.is_empty() || words.iter().any(|word| word == "--help" || word == "-h") {
        print!("{USAGE}");
        return ExitCode::SUCCESS;
    }
    match stop::install().and_then(|()| run(Args::parse(words)?)) {
        Ok(Verdict::Right) => ExitCode::SUCCESS,
        Ok(Verdict::Wrong) => ExitCode::from(1),
        Err(error) => {
            eprintln!("guest_net: {error:#}");
            ExitCode::from(2)
        }
    }
}

#[cfg(test)]
mod tests;
