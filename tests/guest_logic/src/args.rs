//! The command line: words `key=value`, separated by blanks.

/// A command line. Words without `=` and unknown keys are ignored: loaders add
/// their own.
#[derive(Clone, Copy, Debug, Default)]
pub struct Args<'a>(&'a str);

impl<'a> Args<'a> {
    /// Wraps a command line.
    #[must_use]
    pub const fn new(line: &'a str) -> Self {
        Self(line)
    }

    /// The value of the last word `key=…`.
    #[must_use]
    pub fn text(&self, key: &str) -> Option<&'a str> {
        self.0
            .split_ascii_whitespace()
            .filter_map(|word| word.split_once('='))
            .rfind(|&(name, _)| name == key)
            .map(|(_, value)| value)
    }

    /// A decimal or `0x` number, or `default` when the key is absent or its
    /// value is no number.
    #[must_use]
    pub fn number(&self, key: &str, default: u64) -> u64 {
        let Some(text) = self.text(key) else {
            return default;
        };
        match text.strip_prefix("0x") {
            Some(digits) => u64::from_str_radix(digits, 16),
            None => text.parse(),
        }
        .unwrap_or(default)
    }

    /// True when `key` has a value other than 0.
    #[must_use]
    pub fn flag(&self, key: &str) -> bool {
        self.number(key, 0) != 0
    }

    /// A dotted IPv4 address.
    #[must_use]
    pub fn ipv4(&self, key: &str) -> Option<[u8; 4]> {
        let mut octets = [0; 4];
        let mut parts = self.text(key)?.split('.');
        for octet in &mut octets {
            *octet = parts.next()?.parse().ok()?;
        }
        parts.next().is_none().then_some(octets)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_word_wins_and_noise_is_ignored() {
        let args = Args::new("  quiet mode=smoke a=b=c mem=0x10\tmode=dirty rate=ten ");
        assert_eq!(args.text("mode"), Some("dirty"));
        assert_eq!(args.text("a"), Some("b=c"));
        assert_eq!(args.text("quiet"), None);
        assert_eq!(args.number("mem", 1), 16);
        assert_eq!(args.number("rate", 7), 7);
        assert_eq!(args.number("tick", 1000), 1000);
        assert!(args.flag("mem") && !args.flag("irq"));
    }

    #[test]
    fn addresses_are_parsed_strictly() {
        let args = Args::new("ip0=10.0.0.2 ip1=10.0.0 ip2=1.2.3.4.5 ip3=1.2.3.256");
        assert_eq!(args.ipv4("ip0"), Some([10, 0, 0, 2]));
        assert!(
            ["ip1", "ip2", "ip3", "ip4"]
                .iter()
                .all(|key| args.ipv4(key).is_none())
        );
    }
}
