//! The growth with the guest's size as a chart.

use std::error::Error;
use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;

use crate::fill::Fill;
use crate::measure::Row;
use crate::plan::{DEVICES, Results};
use crate::table::{float, mib};

/// Of the whole chart, in pixels.
const SIZE: (u32, u32) = (1500, 560);

/// What is promised to be measured: 12 ms for one sync of a guest of 1 TiB.
const BAR: (f64, f64) = (1024.0, 12.0);

/// A panel: its title, and which figure it shows.
type Panel = (&'static str, fn(&Row) -> f64);

const PANELS: [Panel; 3] = [
    ("sync, ms (x: 12 ms at 1 TiB)", |row| row.sync_ms.median),
    ("walk over all dirty runs, ms", |row| row.walk_ms.median),
    ("bitmaps, MiB", |row| mib(row.bitmap_bytes)),
];

fn colour(fill: Fill) -> RGBColor {
    match fill {
        Fill::Empty => RGBColor(0x88, 0x88, 0x88),
        Fill::OnePiece(_) => RGBColor(0x5b, 0x9b, 0xd0),
        Fill::Random(..100) => RGBColor(0xc2, 0x57, 0x1a),
        Fill::Random(_) | Fill::Each(_) => RGBColor(0x1b, 0x6c, 0xa8),
        Fill::Clustered(_) => RGBColor(0xe0, 0xa0, 0x4f),
        Fill::Full => RGBColor(0x3a, 0x7d, 0x34),
    }
}

/// Writes an SVG file.
pub(crate) fn draw(path: &Path, results: &Results) -> Result<(), Box<dyn Error>> {
    let root = SVGBackend::new(path, SIZE).into_drawing_area();
    root.fill(&WHITE)?;
    let title = format!("Dirty tracking by the guest's size, {DEVICES} devices, one core");
    let root = root.titled(&title, ("sans-serif", 20))?;
    let panels = root.split_evenly((1, PANELS.len()));
    for (area, (title, figure)) in panels.iter().zip(PANELS) {
        panel(area, title, &results.by_size, figure)?;
    }
    root.present()?;
    Ok(())
}

/// One figure of all rows, both axes logarithmic: what grows in proportion is a diagonal.
fn panel(
    area: &DrawingArea<SVGBackend<'_>, Shift>,
    title: &str,
    rows: &[Row],
    figure: fn(&Row) -> f64,
) -> Result<(), Box<dyn Error>> {
    let (mut least, mut most, mut largest) = (f64::MAX, f64::MIN_POSITIVE, 2.0f64);
    for row in rows {
        least = least.min(figure(row));
        most = most.max(figure(row));
        largest = largest.max(float(row.gib));
    }
    // At least a microsecond, for a logarithm; and room above for the legend.
    let scale = least.clamp(0.001, most)..most * 100.0;
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 15))
        .margin(12)
        .x_label_area_size(36)
        .y_label_area_size(60)
        .build_cartesian_2d((1.0..largest).log_scale(), scale.log_scale())?;
    chart
        .configure_mesh()
        .x_desc("guest, GiB")
        .x_label_formatter(&|gib| format!("{gib:.0}"))
        .max_light_lines(0)
        .draw()?;
    for rows in rows.chunk_by(|a, b| a.fill == b.fill) {
        let Some(fill) = rows.first().map(|row| row.fill) else {
            continue;
        };
        let style = colour(fill).stroke_width(2);
        let points = rows
            .iter()
            .map(|row| (float(row.gib), figure(row).max(0.001)));
        chart
            .draw_series(LineSeries::new(points, style).point_size(3))?
            .label(fill.name())
            .legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 16, y)], style));
    }
    if title.starts_with("sync") {
        chart.draw_series([Cross::new(BAR, 6, BLACK.stroke_width(2))])?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE)
        .draw()?;
    Ok(())
}
