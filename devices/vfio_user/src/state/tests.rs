//! The whole table, for each legal set of features, against tables written down by hand.

use super::*;

const NAMES: [(&str, DeviceState); 8] = [
    ("ST", DeviceState::Stop),
    ("RU", DeviceState::Running),
    ("PC", DeviceState::PreCopy),
    ("PP", DeviceState::PreCopyP2p),
    ("SC", DeviceState::StopCopy),
    ("RE", DeviceState::Resuming),
    ("RP", DeviceState::RunningP2p),
    ("--", DeviceState::Error),
];

fn named(name: &str) -> DeviceState {
    NAMES.iter().find(|entry| entry.0 == name).unwrap().1
}

/// First line: targets; then per line: the present state and the next hop for each target.
fn check_table(flags: MigrationFlags, table: &str) {
    let mut lines = table.trim().lines();
    let targets: Vec<_> = lines
        .next()
        .unwrap()
        .split_whitespace()
        .map(named)
        .collect();
    let mut seen = 0;
    for line in lines {
        let mut cells = line.split_whitespace().map(named);
        let from = cells.next().unwrap();
        for (to, expected) in targets.iter().zip(cells) {
            let next = next_hop(from, *to, flags);
            let got = next.unwrap_or(DeviceState::Error);
            assert_eq!(got, expected, "{from} to {to} with {flags:?}");
            seen += 1;
        }
    }
    assert_eq!(seen, targets.len() * targets.len());
    // Whatever the table does not name is refused, as is everything from and to ERROR.
    for from in DeviceState::ALL {
        for to in DeviceState::ALL {
            if !targets.contains(&from) || !targets.contains(&to) {
                assert!(next_hop(from, to, flags).is_err(), "{from} to {to}");
            }
        }
    }
}

#[test]
fn next_hops_with_every_feature() {
    check_table(
        MigrationFlags::all(),
        "   ST RU PC PP SC RE RP
         ST ST RP RP RP SC RE RP
         RU RP RU PC RP RP RP RP
         PC RU RU PC PP PP RU RU
         PP RP RP PC PP SC RP RP
         SC ST ST -- -- SC ST ST
         RE ST ST ST ST ST RE ST
         RP ST RU RU PP ST ST RP",
    );
}

#[test]
fn next_hops_without_peer_to_peer() {
    check_table(
        MigrationFlags::STOP_COPY | MigrationFlags::PRE_COPY,
        "   ST RU PC SC RE
         ST ST RU RU SC RE
         RU ST RU PC ST ST
         PC RU RU PC SC RU
         SC ST ST -- SC ST
         RE ST ST ST ST RE",
    );
}

#[test]
fn next_hops_without_pre_copy() {
    check_table(
        MigrationFlags::STOP_COPY | MigrationFlags::P2P,
        "   ST RU SC RE RP
         ST ST RP SC RE RP
         RU RP RU RP RP RP
         SC ST ST SC ST ST
         RE ST ST ST RE ST
         RP ST RU ST ST RP",
    );
}

#[test]
fn next_hops_with_stop_copy_only() {
    check_table(
        MigrationFlags::STOP_COPY,
        "   ST RU SC RE
         ST ST RU SC RE
         RU ST RU ST ST
         SC ST ST SC ST
         RE ST ST ST RE",
    );
}

#[test]
fn every_path_ends_and_never_reads_data_on_the_way() {
    for flags in MigrationFlags::LEGAL {
        for from in DeviceState::ALL {
            for to in DeviceState::ALL {
                let Ok(states) = path(from, to, flags) else {
                    continue;
                };
                assert_eq!(states.last().copied().unwrap_or(from), to);
                assert!(states.len() <= 5, "{from} to {to}: {states:?}");
                // A saving state is on the way only from one saving state to another.
                for between in states.split_last().map_or(&[][..], |(_, rest)| rest) {
                    assert!(
                        !between.is_saving() || (from.is_saving() && to.is_saving()),
                        "{from} to {to}: {states:?}"
                    );
                }
            }
        }
    }
}

#[test]
fn the_usual_ways() {
    use DeviceState as S;
    let all = MigrationFlags::all();
    assert_eq!(path(S::Running, S::PreCopy, all).unwrap(), [S::PreCopy]);
    assert_eq!(
        path(S::PreCopy, S::StopCopy, all).unwrap(),
        [S::PreCopyP2p, S::StopCopy]
    );
    assert_eq!(
        path(S::Running, S::Resuming, all).unwrap(),
        [S::RunningP2p, S::Stop, S::Resuming]
    );
    assert_eq!(
        path(S::Resuming, S::Running, all).unwrap(),
        [S::Stop, S::RunningP2p, S::Running]
    );
    assert_eq!(path(S::Stop, S::Stop, all).unwrap(), []);
    assert!(path(S::StopCopy, S::PreCopy, all).is_err());
    assert!(path(S::Running, S::Error, all).is_err());
}

#[test]
fn numbers_are_those_of_the_kernel() {
    for (number, state) in DeviceState::ALL.iter().enumerate() {
        let number = u32::try_from(number).unwrap();
        assert_eq!(state.number(), number);
        assert_eq!(DeviceState::from_number(number), Some(*state));
    }
    assert_eq!(DeviceState::from_number(8), None);
}

#[test]
fn a_failed_arc_leaves_the_machine_where_it_got_to() {
    use DeviceState as S;
    let mut machine = Machine::new(MigrationFlags::all());
    let error = machine
        .transition(S::StopCopy, |arc| match arc {
            StateArc::RunningP2pToStop => Err(ArcFailure::Unchanged(Errno::BUSY)),
            _ => Ok(()),
        })
        .unwrap_err();
    assert_eq!(machine.state(), S::RunningP2p);
    assert_eq!(error.errno(), Errno::BUSY);
    machine.transition(S::Running, |_| Ok(())).unwrap();

    machine
        .transition(S::Stop, |_| Err(ArcFailure::Broken(Errno::IO)))
        .unwrap_err();
    assert_eq!(machine.state(), S::Error);
    let error = machine.transition(S::Running, |_| Ok(())).unwrap_err();
    assert_eq!(error.errno(), Errno::INVAL);
    machine.reset();
    assert_eq!(machine.state(), S::Running);
}

#[test]
fn error_cannot_be_asked_for() {
    let mut machine = Machine::new(MigrationFlags::all());
    assert!(machine.transition(DeviceState::Error, |_| Ok(())).is_err());
    assert_eq!(machine.state(), DeviceState::Running);
}

/// The uAPI's list of arcs; `+` begins a data session, `-` ends it, `=` goes on with it.
const ARCS_WITH_P2P: &str = "ST>RP ST>SC+ ST>RE+ RU>RP RU>PC+ RP>RU RP>ST RP>PP+ PC>RU- PC>PP= \
                             PP>RP- PP>PC= PP>SC= SC>ST- RE>ST-";
const ARCS_WITHOUT_P2P: &str = "ST>RU ST>SC+ ST>RE+ RU>ST RU>PC+ PC>RU- PC>SC= SC>ST- RE>ST-";

#[test]
fn the_arcs_are_those_of_the_uapi() {
    for flags in MigrationFlags::LEGAL {
        let list = match flags.contains(MigrationFlags::P2P) {
            true => ARCS_WITH_P2P,
            false => ARCS_WITHOUT_P2P,
        };
        let precopy = flags.contains(MigrationFlags::PRE_COPY);
        let mut expected = Vec::new();
        for word in list.split_whitespace() {
            let session = match word.as_bytes().get(5) {
                Some(b'+') => DataSession::Begins,
                Some(b'-') => DataSession::Ends,
                Some(b'=') => DataSession::GoesOn,
                _ => DataSession::Absent,
            };
            let ends = (named(&word[..2]), named(&word[3..5]));
            if precopy || !(word.contains("PC") || word.contains("PP")) {
                expected.push((ends, session));
            }
        }
        let mut found: Vec<_> = StateArc::ALL
            .into_iter()
            .filter(|arc| arc.exists_with(flags))
            .map(|arc| (arc.ends(), arc.session()))
            .collect();
        let key =
            |entry: &((DeviceState, DeviceState), _)| (entry.0.0.number(), entry.0.1.number());
        found.sort_by_key(key);
        expected.sort_by_key(key);
        assert_eq!(found, expected, "{flags:?}");
    }
    for flags in [0, 2, 4, 6].map(MigrationFlags::from_bits_retain) {
        let none = StateArc::ALL.into_iter().find(|arc| arc.exists_with(flags));
        assert_eq!(none, None, "{flags:?} are not legal");
    }
}

#[test]
fn the_table_leads_over_arcs_the_device_has_and_over_all_of_them() {
    for flags in MigrationFlags::LEGAL {
        let mut used = std::collections::HashSet::new();
        for from in DeviceState::ALL {
            for to in DeviceState::ALL {
                let mut at = from;
                for next in path(from, to, flags).unwrap_or_default() {
                    let arc = StateArc::between(at, next).unwrap();
                    assert!(arc.exists_with(flags), "{arc} with {flags:?}");
                    used.insert(arc);
                    at = next;
                }
            }
        }
        let all = StateArc::ALL.into_iter();
        let missing: Vec<_> = all
            .filter(|arc| arc.exists_with(flags) && !used.contains(arc))
            .collect();
        assert_eq!(missing, [], "{flags:?}");
    }
}

/// Whatever fails on whichever way, the machine is where the last good arc ended or broken, and a
/// reset mends it.
#[test]
fn every_fault_of_every_arc_is_accounted_for() {
    for flags in MigrationFlags::LEGAL {
        for from in DeviceState::ALL
            .into_iter()
            .filter(|state| *state != DeviceState::Error)
        {
            for to in DeviceState::ALL {
                let Ok(states) = path(from, to, flags) else {
                    continue;
                };
                for (number, failing) in states.iter().enumerate() {
                    for broken in [false, true] {
                        let mut machine = Machine { flags, state: from };
                        let mut steps = 0;
                        let failed = machine.transition(to, |_| {
                            steps += 1;
                            match (steps == number + 1, broken) {
                                (false, _) => Ok(()),
                                (true, false) => Err(ArcFailure::Unchanged(Errno::BUSY)),
                                (true, true) => Err(ArcFailure::Broken(Errno::BUSY)),
                            }
                        });
                        let before = number.checked_sub(1).map_or(from, |last| states[last]);
                        let at = if broken { DeviceState::Error } else { before };
                        let to = *failing;
                        let errno = Errno::BUSY;
                        assert_eq!(failed, Err(StateError::Arc { at, to, errno }));
                        assert_eq!(machine.state(), at);
                        machine.reset();
                        assert_eq!(machine.state(), DeviceState::Running);
                    }
                }
            }
        }
    }
}
