//! Medians and spreads.

use serde::Serialize;

/// What several runs gave.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Summary {
    /// The middle one, or the mean of the two.
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
}

impl Summary {
    /// Of these figures; `None` if there are none.
    pub fn of(figures: impl IntoIterator<Item = f64>) -> Option<Self> {
        let mut sorted: Vec<f64> = figures.into_iter().collect();
        sorted.sort_by(f64::total_cmp);
        let (&min, &max) = (sorted.first()?, sorted.last()?);
        let middle = sorted.len() / 2;
        let upper = sorted.get(middle).copied()?;
        let median = if sorted.len().is_multiple_of(2) {
            let lower = middle.checked_sub(1).and_then(|at| sorted.get(at))?;
            f64::midpoint(*lower, upper)
        } else {
            upper
        };
        Some(Self { median, min, max })
    }

    /// Median and spread, `12.3 (11.0–14.0)`.
    pub fn show(&self) -> String {
        format!(
            "{} ({}–{})",
            figure(self.median),
            figure(self.min),
            figure(self.max)
        )
    }
}

/// A figure with as many digits as it is worth.
pub fn figure(value: f64) -> String {
    if value.abs() >= 100.0 {
        format!("{value:.0}")
    } else {
        format!("{value:.1}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_is_the_middle_and_the_spread_is_all() {
        assert_eq!(Summary::of([]), None);
        let odd = Summary::of([3.0, 1.0, 2.0]).unwrap();
        assert_eq!((odd.median, odd.min, odd.max), (2.0, 1.0, 3.0));
        let even = Summary::of([4.0, 1.0, 2.0, 3.0]).unwrap();
        assert_eq!((even.median, even.min, even.max), (2.5, 1.0, 4.0));
        assert_eq!(Summary::of([7.25]).unwrap().show(), "7.2 (7.2–7.2)");
        assert_eq!(figure(1234.5), "1234");
    }
}
