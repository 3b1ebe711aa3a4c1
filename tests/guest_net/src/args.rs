//! The command line: words, and options with a value each.

use std::collections::{BTreeMap, VecDeque};
use std::fmt::Display;
use std::str::FromStr;

use anyhow::{Context, bail};

/// What is left of the command line.
#[derive(Debug)]
pub(crate) struct Args {
    words: VecDeque<String>,
    options: BTreeMap<String, String>,
}

impl Args {
    /// Splits the command line into words and `--name value` pairs.
    pub(crate) fn parse(line: impl IntoIterator<Item = String>) -> anyhow::Result<Self> {
        let mut args = Self {
            words: VecDeque::new(),
            options: BTreeMap::new(),
        };
        let mut line = line.into_iter();
        while let Some(word) = line.next() {
            let Some(name) = word.strip_prefix("--") else {
                args.words.push_back(word);
                continue;
            };
            let value = line
                .next()
                .with_context(|| format!("--{name} needs a value"))?;
            if args.options.insert(name.to_owned(), value).is_some() {
                bail!("--{name} was given twice");
            }
        }
        Ok(args)
    }

    /// The next word, which is to say `what`.
    pub(crate) fn word(&mut self, what: &str) -> anyhow::Result<String> {
        self.words
            .pop_front()
            .with_context(|| format!("{what} is missing (see --help)"))
    }

    /// The value of an option.
    pub(crate) fn option<T>(&mut self, name: &str) -> anyhow::Result<Option<T>>
    where
        T: FromStr,
        T::Err: Display,
    {
        let Some(value) = self.options.remove(name) else {
            return Ok(None);
        };
        match value.parse() {
            Ok(value) => Ok(Some(value)),
            Err(error) => bail!("--{name} {value}: {error}"),
        }
    }

    /// The value of an option that must be there.
    pub(crate) fn required<T>(&mut self, name: &str) -> anyhow::Result<T>
    where
        T: FromStr,
        T::Err: Display,
    {
        self.option(name)?
            .with_context(|| format!("--{name} is missing (see --help)"))
    }

    /// Checks that nothing is left over.
    pub(crate) fn finish(self) -> anyhow::Result<()> {
        if let Some(name) = self.options.keys().next() {
            bail!("--{name} is no option of this command (see --help)");
        }
        if let Some(word) = self.words.front() {
            bail!("`{word}` is one word too many (see --help)");
        }
        Ok(())
    }
}
