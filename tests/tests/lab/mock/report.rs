//! Which cases there are, and what comes of them.

use std::fs::OpenOptions;
use std::io::Write;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::Value;

/// How many migrations there are of each case.
pub(super) fn runs() -> Result<usize> {
    match std::env::var("FERRY_MOCK_RUNS") {
        Ok(text) => text.parse().context("FERRY_MOCK_RUNS"),
        Err(_) => Ok(1),
    }
}

/// Whether a case is wanted; `few` says whether it is one of the few that are by default.
pub(super) fn is_wanted(name: &str, few: bool) -> bool {
    match std::env::var("FERRY_MOCK_CASES").as_deref() {
        Err(_) | Ok("few") => few,
        Ok("all") => true,
        Ok(words) => words.split(';').any(|word| name.contains(word)),
    }
}

/// Appends a result to the file that was asked for, at once.
pub(super) fn record(result: &Value) -> Result<()> {
    let Some(path) = std::env::var_os("FERRY_MOCK_REPORT") else {
        return Ok(());
    };
    let mut file = OpenOptions::new().create(true).append(true).open(&path)?;
    writeln!(file, "{result}")?;
    Ok(())
}

/// The middle one and the longest.
pub(super) fn median_and_most(mut times: Vec<Duration>) -> (Duration, Duration) {
    times.sort_unstable();
    let at = |index: usize| times.get(index).copied().unwrap_or_default();
    (at(times.len() / 2), at(times.len().saturating_sub(1)))
}

/// Milliseconds, rounded.
pub(super) fn ms(time: Duration) -> String {
    format!("{:.0}", time.as_secs_f64() * 1e3)
}

/// A table as Markdown has it, its columns aligned.
pub(super) fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        let widest = cells.map(|cell| cell.chars().count()).max().unwrap_or(0);
        widest.max(head.get(column).map_or(0, |cell| cell.chars().count()))
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let line = |cells: Vec<String>| {
        let padded = cells.iter().zip(&widths);
        let padded: Vec<String> = padded.map(|(cell, w)| format!("{cell:w$}")).collect();
        format!("| {} |\n", padded.join(" | "))
    };
    let mut text = line(head.iter().map(ToString::to_string).collect());
    text += &line(widths.iter().map(|w| "-".repeat(*w)).collect());
    for row in rows {
        text += &line(row.clone());
    }
    text
}
