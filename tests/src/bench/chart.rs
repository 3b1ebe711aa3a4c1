//! The migrations as bars: for each case one group, for each contender one bar.

use std::fmt::Write;

use super::migration::MigrationRow;
use super::stats::{Summary, figure};
use super::{Backing, Vmm};

const BAR: f64 = 15.0;
const GROUP_GAP: f64 = 26.0;
const LEFT: f64 = 64.0;
const PANEL: f64 = 220.0;
/// Room below a panel for the groups' names, and above it for its title.
const BELOW: f64 = 64.0;
const ABOVE: f64 = 42.0;
const LEGEND: f64 = 34.0;
const GRID_LINES: u32 = 4;

/// A panel: its title and which figure it shows.
type Panel = (&'static str, fn(&MigrationRow) -> Option<Summary>);

const PANELS: [Panel; 3] = [
    ("total time, ms", |row| row.total_ms),
    ("gap as the guest measured it, ms", |row| row.gap_ms),
    ("downtime as reported, ms", |row| row.downtime_ms),
];

fn colour(row: &MigrationRow) -> &'static str {
    match (row.contender.vmm, row.contender.backing) {
        (Vmm::Ferry, Backing::Memfd) => "#1b6ca8",
        (Vmm::Ferry, Backing::Anon) => "#5b9bd0",
        (Vmm::Ferry, Backing::Huge) => "#a3cbe8",
        (Vmm::Qemu, Backing::Memfd) => "#c2571a",
        (Vmm::Qemu, Backing::Anon) => "#e08a4f",
        (Vmm::Qemu, Backing::Huge) => "#f3c29f",
    }
}

/// A list index as a coordinate.
fn float(count: usize) -> f64 {
    f64::from(u32::try_from(count).unwrap_or(u32::MAX))
}

/// Rows of one case lie side by side.
fn groups(rows: &[MigrationRow]) -> Vec<&[MigrationRow]> {
    rows.chunk_by(|a, b| a.case == b.case).collect()
}

/// An SVG file.
pub(super) fn render(rows: &[MigrationRow]) -> String {
    let groups = groups(rows);
    let bars: f64 = float(rows.len()) * BAR;
    let width = LEFT + bars + float(groups.len()) * GROUP_GAP + 20.0;
    let width = width.max(640.0);
    let panel = ABOVE + PANEL + BELOW;
    let height = LEGEND + panel * float(PANELS.len());
    let mut out = String::new();
    // Writing to a String cannot fail.
    let _ = writeln!(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width:.0}\" height=\"{height:.0}\" \
         font-family=\"sans-serif\" font-size=\"11\">\n<rect width=\"100%\" height=\"100%\" \
         fill=\"white\"/>"
    );
    legend(&mut out, groups.first().copied().unwrap_or_default());
    for (at, (title, figure)) in PANELS.iter().enumerate() {
        let top = LEGEND + panel * float(at) + ABOVE;
        draw_panel(&mut out, &groups, (top, width), title, *figure);
    }
    out.push_str("</svg>\n");
    out
}

fn legend(out: &mut String, rows: &[MigrationRow]) {
    for (at, row) in rows.iter().enumerate() {
        let x = LEFT + float(at) * 100.0;
        let _ = writeln!(
            out,
            "<rect x=\"{x}\" y=\"12\" width=\"12\" height=\"12\" fill=\"{}\"/>\
             <text x=\"{}\" y=\"22\">{}</text>",
            colour(row),
            x + 16.0,
            row.contender.name()
        );
    }
}

fn draw_panel(
    out: &mut String,
    groups: &[&[MigrationRow]],
    (top, width): (f64, f64),
    title: &str,
    figure_of: fn(&MigrationRow) -> Option<Summary>,
) {
    let all = groups.iter().flat_map(|group| group.iter());
    let most = all
        .filter_map(|row| figure_of(row).map(|summary| summary.max))
        .fold(1.0, f64::max);
    let bottom = top + PANEL;
    let _ = writeln!(
        out,
        "<text x=\"{LEFT}\" y=\"{}\" font-size=\"14\" font-weight=\"bold\">{title}</text>",
        top - 12.0
    );
    for line in 0..=GRID_LINES {
        let share = f64::from(line) / f64::from(GRID_LINES);
        let y = bottom - share * PANEL;
        let _ = writeln!(
            out,
            "<line x1=\"{LEFT}\" x2=\"{width:.0}\" y1=\"{y:.1}\" y2=\"{y:.1}\" stroke=\"#ddd\"/>\
             <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
            LEFT - 6.0,
            y + 4.0,
            figure(share * most)
        );
    }
    let mut x = LEFT + GROUP_GAP / 2.0;
    for group in groups {
        let start = x;
        for row in *group {
            if let Some(summary) = figure_of(row) {
                draw_bar(out, (x, bottom), most, &summary, row);
            }
            x += BAR;
        }
        group_name(out, f64::midpoint(start, x), bottom, group);
        x += GROUP_GAP;
    }
}

/// A bar as high as the median, and a line from smallest to largest.
fn draw_bar(
    out: &mut String,
    (x, bottom): (f64, f64),
    most: f64,
    summary: &Summary,
    row: &MigrationRow,
) {
    let height = |value: f64| value / most * PANEL;
    let middle = x + BAR / 2.0;
    let _ = writeln!(
        out,
        "<rect x=\"{x:.1}\" y=\"{:.1}\" width=\"{}\" height=\"{:.1}\" fill=\"{}\">\
         <title>{}: {} ms</title></rect>\
         <line x1=\"{middle:.1}\" x2=\"{middle:.1}\" y1=\"{:.1}\" y2=\"{:.1}\" stroke=\"#333\"/>",
        bottom - height(summary.median),
        BAR - 2.0,
        height(summary.median),
        colour(row),
        row.contender.name(),
        summary.show(),
        bottom - height(summary.min),
        bottom - height(summary.max),
    );
}

fn group_name(out: &mut String, middle: f64, bottom: f64, group: &[MigrationRow]) {
    let Some(row) = group.first() else { return };
    let lines = [
        row.case.transport.to_owned(),
        format!("{} MiB/s", row.case.rate),
        format!("≤ {} ms", row.case.downtime_target_ms),
    ];
    for (at, line) in lines.iter().enumerate() {
        let _ = writeln!(
            out,
            "<text x=\"{middle:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{line}</text>",
            bottom + 16.0 + float(at) * 14.0
        );
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn nothing_measured_is_still_a_picture() {
        let svg = super::render(&[]);
        assert!(svg.starts_with("<svg") && svg.ends_with("</svg>\n"));
    }
}
