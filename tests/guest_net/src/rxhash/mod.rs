//! The receive hash of each packet, as the interface's driver gave it to the kernel.
//!
//! There are several views of it, and not all are true. `TPACKET_V3`'s `tp_rxhash` comes from
//! `skb_get_hash()`, which computes a hash in software if the driver's one is of addresses only:
//! then it is not the device's. Classic BPF (`SKF_AD_RXHASH`) and eBPF (`__sk_buff.hash`) read
//! the raw field, which at a packet socket nobody has touched yet (unless RPS is on). A classic
//! filter can only compare it; so this is an eBPF socket filter that puts it, with the first bytes
//! of its packet, into a queue map. The packets themselves are not wanted, and the filter drops
//! them for this socket: what is seen of hash and packet cannot get out of step.

use std::time::{Duration, Instant};

use anyhow::Context;

use crate::Verdict;
use crate::args::Args;
use crate::flow::FiveTuple;
use crate::json::Line;
use crate::progress::Schedule;

mod bpf;
mod filter;
mod record;
mod xdp;

pub(crate) use filter::HashSocket;
pub(crate) use record::Record;
pub(crate) use xdp::HeaderProgram;

/// How many packets may come before we look.
const ROOM: u32 = 8192;

/// `rxhash`.
pub(crate) fn run(mut args: Args) -> anyhow::Result<Verdict> {
    let interface: String = args.required("iface")?;
    let count = args.option("count")?.unwrap_or(u64::MAX);
    let port = args.option::<u16>("port")?;
    let schedule = Schedule::new(args.option("seconds")?);
    args.finish()?;
    let socket = HashSocket::open(&interface, ROOM).with_context(|| interface.clone())?;
    Line::new("listening").text("iface", &interface).print()?;
    let mut printed = 0_u64;
    while printed < count && !schedule.is_over(Instant::now()) {
        let Some(record) = socket.next()? else {
            std::thread::sleep(Duration::from_millis(1));
            continue;
        };
        let flow = FiveTuple::parse(record.head());
        if let Some(flow) = flow.filter(|flow| port.is_none_or(|port| flow.has_port(port))) {
            line(&record, &flow).print()?;
            printed += 1;
        }
    }
    let missed = socket.missed()?;
    Line::new("done")
        .number("packets", printed)
        .number("missed", missed)
        .print()?;
    Ok(Verdict::Right)
}

fn line(record: &Record, flow: &FiveTuple) -> Line {
    let ports = flow
        .ports
        .map(|(source, destination)| (u64::from(source), u64::from(destination)));
    Line::new("packet")
        .number("hash", record.hash)
        .text("hash_hex", &format!("{:08x}", record.hash))
        .maybe("rx_queue", record.queue().map(u64::from))
        .number("version", flow.version())
        .text("source", &flow.source.to_string())
        .text("destination", &flow.destination.to_string())
        .number("protocol", flow.protocol)
        .maybe("source_port", ports.map(|(source, _)| source))
        .maybe(
            "destination_port",
            ports.map(|(_, destination)| destination),
        )
        .number("length", record.length)
        .hex("head", record.head())
}

#[cfg(test)]
mod tests;
