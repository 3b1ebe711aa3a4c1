//! Changes of settings in the guest, as `guest_net reports --plan` takes them.

/// Steps, evenly over so many frames.
fn over(frames: u32, steps: &[String]) -> String {
    let every = frames / (u32::try_from(steps.len()).unwrap_or(0) + 1);
    let at = (1..).map(|step| every * step);
    let steps = at.zip(steps).map(|(at, step)| format!("{at}={step}"));
    steps.collect::<Vec<_>>().join(",")
}

/// All there are: hashes, key, types, numbers of pairs, and with RSS tables.
pub(crate) fn all(frames: u32, pairs: u8, rss: bool) -> String {
    let mut steps: Vec<String> = [
        "rxhash:off",
        "rxhash:on",
        "hkey:7",
        "flow:udp4:addresses",
        "flow:udp4:ports",
    ]
    .map(str::to_owned)
    .to_vec();
    if pairs > 1 {
        // Before the table is the user's own, drivers may make a new one.
        steps.extend(["combined:1".to_owned(), format!("combined:{pairs}")]);
        if rss {
            let shares: String = (1..=pairs).map(|share| format!(":{share}")).collect();
            steps.extend([
                format!("equal:{pairs}"),
                format!("weight{shares}"),
                "hkey:8".to_owned(),
            ]);
            // A table with more queues than there shall be is refused by the kernel.
            steps.extend(["equal:1", "combined:1"].map(str::to_owned));
            steps.extend([format!("combined:{pairs}"), format!("equal:{pairs}")]);
        }
    }
    over(frames, &steps)
}

/// Types of IPv6 only, and then one after the other all of them.
pub(crate) fn types(frames: u32) -> String {
    // Linux takes the first so that no other type is left.
    let steps = [
        "flow:ip6:addresses",
        "flow:tcp6:ports",
        "flow:udp6:ports",
        "flow:tcp4:ports",
        "flow:udp4:ports",
    ];
    over(frames, &steps.map(str::to_owned))
}
