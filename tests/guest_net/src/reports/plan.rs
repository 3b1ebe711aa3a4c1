//! Which settings change when.

use std::collections::VecDeque;
use std::str::FromStr;

use anyhow::{Context, bail};

/// A change of settings, as `ethtool` has it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) enum Step {
    /// `-K rxhash on|off`.
    Rxhash(bool),
    /// `-X hkey`, a key made of this number.
    Key(u64),
    /// `-X equal N`.
    Equal(u32),
    /// `-X weight …`.
    Weight(Vec<u32>),
    /// `-L combined N`.
    Pairs(u32),
    /// `-N rx-flow-hash KIND`: with ports or only addresses.
    Flow(String, bool),
}

impl FromStr for Step {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let words: Vec<&str> = text.split(':').collect();
        let number = |word: &str| {
            word.parse::<u32>()
                .with_context(|| format!("{word} is no number"))
        };
        match words[..] {
            ["rxhash", "on"] => Ok(Self::Rxhash(true)),
            ["rxhash", "off"] => Ok(Self::Rxhash(false)),
            ["hkey", seed] => Ok(Self::Key(number(seed)?.into())),
            ["equal", queues] => Ok(Self::Equal(number(queues)?)),
            ["weight", ref weights @ ..] => {
                let weights = weights.iter().map(|weight| number(weight));
                Ok(Self::Weight(weights.collect::<Result<_, _>>()?))
            }
            ["combined", pairs] => Ok(Self::Pairs(number(pairs)?)),
            ["flow", kind, "ports"] => Ok(Self::Flow(kind.to_owned(), true)),
            ["flow", kind, "addresses"] => Ok(Self::Flow(kind.to_owned(), false)),
            _ => bail!(
                "`{text}` is no step: rxhash:on, hkey:7, equal:2, weight:1:3, combined:2, flow:tcp4:ports"
            ),
        }
    }
}

/// Steps, each once so many frames have been seen: `1000=equal:2,2000=rxhash:off`.
#[derive(Debug, Default)]
pub(super) struct Plan(VecDeque<(u32, Step)>);

impl FromStr for Plan {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let steps = text.split(',').filter(|step| !step.is_empty());
        let steps = steps.map(|step| {
            let (at, what) = step.split_once('=').context("a step is COUNT=WHAT")?;
            Ok((at.parse::<u32>().context(at.to_owned())?, what.parse()?))
        });
        steps.collect::<anyhow::Result<_>>().map(Self)
    }
}

impl Plan {
    /// The next step, if `seen` frames are enough for it.
    pub(super) fn due(&mut self, seen: u32) -> Option<Step> {
        let (_, step) = self.0.pop_front_if(|(at, _)| *at <= seen)?;
        Some(step)
    }

    /// How many steps were not taken.
    pub(super) fn left(&self) -> usize {
        self.0.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_come_when_they_are_due() {
        let mut plan: Plan = "5=rxhash:off,5=weight:1:3,9=flow:udp6:addresses"
            .parse()
            .unwrap();
        assert_eq!(plan.due(4), None);
        assert_eq!(plan.due(6), Some(Step::Rxhash(false)));
        assert_eq!(plan.due(6), Some(Step::Weight(vec![1, 3])));
        assert_eq!((plan.due(8), plan.left()), (None, 1));
        assert_eq!(plan.due(9), Some(Step::Flow("udp6".to_owned(), false)));
        assert_eq!(plan.due(100), None);
        assert_eq!("".parse::<Plan>().unwrap().left(), 0);
        for wrong in [
            "5",
            "x=rxhash:on",
            "5=rxhash",
            "5=equal:x",
            "5=flow:tcp4",
            "5=hkey",
        ] {
            assert!(wrong.parse::<Plan>().is_err(), "{wrong}");
        }
    }
}
