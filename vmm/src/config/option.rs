//! The option strings of the command line: `key=value` pairs separated by commas.
//!
//! A value that holds a comma is put in double quotes (`socket="/tmp/a,b"`); a list is put in
//! square brackets (`fd=[3,4]`). A bare word (no `=`) is a key without a value; only the consoles
//! take those (`--serial tty`).

use std::path::PathBuf;

use super::error::ConfigError;

/// The longest option string that is looked at. Linux paths end at 4096 bytes; two of them and
/// some keys fit with room to spare.
const MAX_OPTION_BYTES: usize = 16 * 1024;

/// One parsed `key=value` pair; a bare word has no value.
type Pair = (String, Option<String>);

/// The pairs of one option string, taken out one by one, so that what is left over is unknown.
#[derive(Debug)]
pub(super) struct OptionString {
    option: &'static str,
    pairs: Vec<Pair>,
}

impl OptionString {
    /// Splits `text`, the argument of the command-line option `option`, and checks that each key is
    /// one of `allowed` and comes once.
    pub(super) fn parse(
        option: &'static str,
        allowed: &'static [&'static str],
        text: &str,
    ) -> Result<Self, ConfigError> {
        if text.len() > MAX_OPTION_BYTES {
            return Err(ConfigError::TooLong {
                option,
                limit: MAX_OPTION_BYTES,
            });
        }
        let mut pairs: Vec<Pair> = Vec::new();
        for part in split_outside(option, text)? {
            let (key, value) = match part.split_once('=') {
                Some((key, value)) => (key, Some(unquote(value).to_owned())),
                None => (part, None),
            };
            if !allowed.contains(&key) {
                return Err(ConfigError::UnknownKey {
                    option,
                    key: key.to_owned(),
                    allowed: allowed.join(", "),
                });
            }
            if pairs.iter().any(|(seen, _)| seen == key) {
                return Err(ConfigError::RepeatedKey {
                    option,
                    key: key.to_owned(),
                });
            }
            pairs.push((key.to_owned(), value));
        }
        Ok(Self { option, pairs })
    }

    /// Whether `key` stands there as a bare word.
    pub(super) fn flag(&self, key: &str) -> bool {
        self.pairs
            .iter()
            .any(|(seen, value)| seen == key && value.is_none())
    }

    /// How many keys there are.
    pub(super) fn len(&self) -> usize {
        self.pairs.len()
    }

    /// The text given for `key`, if any.
    pub(super) fn text(&self, key: &'static str) -> Result<Option<&str>, ConfigError> {
        match self.pairs.iter().find(|(seen, _)| seen == key) {
            None => Ok(None),
            Some((_, Some(value))) if !value.is_empty() => Ok(Some(value)),
            Some(_) => Err(ConfigError::MissingValue {
                option: self.option,
                key,
            }),
        }
    }

    /// The text given for `key`, which must be there.
    pub(super) fn required(&self, key: &'static str) -> Result<&str, ConfigError> {
        self.text(key)?.ok_or(ConfigError::MissingKey {
            option: self.option,
            key,
        })
    }

    /// The path given for `key`, if any.
    pub(super) fn path(&self, key: &'static str) -> Result<Option<PathBuf>, ConfigError> {
        Ok(self.text(key)?.map(PathBuf::from))
    }

    /// The decimal number given for `key`, if any.
    pub(super) fn number<T: std::str::FromStr>(
        &self,
        key: &'static str,
    ) -> Result<Option<T>, ConfigError> {
        self.parsed(key, "a decimal number in range", |text| text.parse().ok())
    }

    /// `on`/`true` or `off`/`false` given for `key`, if any.
    pub(super) fn toggle(&self, key: &'static str) -> Result<Option<bool>, ConfigError> {
        self.parsed(key, "on or off", |text| match text {
            "on" | "true" => Some(true),
            "off" | "false" => Some(false),
            _ => None,
        })
    }

    /// The size in bytes given for `key`, if any; see [`parse_size`].
    pub(super) fn size(&self, key: &'static str) -> Result<Option<u64>, ConfigError> {
        self.parsed(key, "a size such as 512M, 1G or 4096", parse_size)
    }

    /// The list given for `key`, if any: `[a,b]`, or one element alone.
    pub(super) fn list<T: std::str::FromStr>(
        &self,
        key: &'static str,
    ) -> Result<Option<Vec<T>>, ConfigError> {
        self.parsed(key, "a number or a list such as [3,4]", |text| {
            let inner = match text.strip_prefix('[') {
                Some(rest) => rest.strip_suffix(']')?,
                None => text,
            };
            inner
                .split(',')
                .map(|one| one.trim().parse().ok())
                .collect()
        })
    }

    /// What `parse` makes of the text given for `key`, if any; `expected` says what it takes.
    pub(super) fn parsed<T>(
        &self,
        key: &'static str,
        expected: &'static str,
        parse: impl FnOnce(&str) -> Option<T>,
    ) -> Result<Option<T>, ConfigError> {
        let Some(text) = self.text(key)? else {
            return Ok(None);
        };
        match parse(text) {
            Some(value) => Ok(Some(value)),
            None => Err(ConfigError::InvalidValue {
                option: self.option,
                key,
                value: text.to_owned(),
                expected,
            }),
        }
    }
}

/// Reads a size: decimal digits and an optional suffix `K`, `M`, `G` or `T` (powers of 1024).
/// `None` if it is something else or does not fit 64 bits.
pub fn parse_size(text: &str) -> Option<u64> {
    let last = text.chars().next_back()?;
    let shift = match last {
        'K' | 'k' => 10,
        'M' | 'm' => 20,
        'G' | 'g' => 30,
        'T' | 't' => 40,
        _ => 0,
    };
    let digits = if shift == 0 {
        text
    } else {
        text.get(..text.len().checked_sub(1)?)?
    };
    if !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    digits.parse::<u64>().ok()?.checked_mul(1u64 << shift)
}

/// Writes a size so that [`parse_size`] reads it back, with the largest suffix that is exact.
pub fn format_size(bytes: u64) -> String {
    for (suffix, shift) in [('T', 40), ('G', 30), ('M', 20), ('K', 10)] {
        let unit = 1u64 << shift;
        if bytes != 0 && bytes.is_multiple_of(unit) {
            return format!("{}{suffix}", bytes >> shift);
        }
    }
    bytes.to_string()
}

/// A value as it is written in an option string: quoted where a comma would cut it.
pub(super) fn quote(value: &str) -> String {
    if value.contains([',', '[', ']']) {
        format!("\"{value}\"")
    } else {
        value.to_owned()
    }
}

/// Splits at the commas that stand outside quotes and brackets.
fn split_outside<'a>(option: &'static str, text: &'a str) -> Result<Vec<&'a str>, ConfigError> {
    let mut parts = Vec::new();
    let (mut quoted, mut bracketed) = (false, false);
    let mut rest = text;
    let mut at = 0;
    for (index, character) in text.char_indices() {
        match character {
            '"' if !bracketed => quoted = !quoted,
            '[' if !quoted => bracketed = true,
            ']' if !quoted => bracketed = false,
            ',' if !quoted && !bracketed => {
                let (part, after) = rest.split_at(index.saturating_sub(at));
                parts.push(part);
                rest = after.strip_prefix(',').unwrap_or(after);
                at = index.saturating_add(1);
            }
            _ => {}
        }
    }
    if quoted || bracketed {
        return Err(ConfigError::Unbalanced {
            option,
            text: text.to_owned(),
        });
    }
    if !rest.is_empty() || !parts.is_empty() {
        parts.push(rest);
    }
    Ok(parts)
}

/// Takes off one pair of double quotes around the whole value.
fn unquote(value: &str) -> &str {
    value
        .strip_prefix('"')
        .and_then(|inner| inner.strip_suffix('"'))
        .unwrap_or(value)
}
