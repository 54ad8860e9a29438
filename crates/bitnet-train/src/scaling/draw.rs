//! The picture of a [`Scaling`]: losses with their laws above, the gap below.

use std::fs;
use std::ops::Range;
use std::path::Path;

use bitnet_format::atomic::write_atomic;
use plotters::coord::Shift;
use plotters::coord::combinators::LogCoord;
use plotters::coord::types::RangedCoordf64;
use plotters::prelude::*;

use super::{Gaps, Kind, SPECTRA, Scaling};
use crate::TrainError;
use crate::error::with_path;
use crate::plot::{FONT, load_font};

const SIZE: (u32, u32) = (1000, 900);
const COLORS: [RGBColor; 4] =
    [RGBColor(31, 96, 168), RGBColor(208, 82, 20), RGBColor(60, 128, 70), RGBColor(120, 70, 150)];
/// Points of a curve.
const POINTS: usize = 120;

/// Draws to a file; the name's ending chooses `.png` or `.svg`.
///
/// # Errors
/// Another ending, I/O errors, and what the drawing library says.
pub fn draw(scaling: &Scaling, path: &Path) -> Result<(), TrainError> {
    load_font();
    let failed = |what: String| TrainError::Plot { path: path.into(), what };
    match path.extension().and_then(|e| e.to_str()) {
        Some("svg") => {
            let mut text = String::new();
            let area = SVGBackend::with_string(&mut text, SIZE).into_drawing_area();
            draw_on(scaling, area).map_err(failed)?;
            write_atomic(path, |w| std::io::Write::write_all(w, text.as_bytes()))
                .map_err(with_path(path))?;
            Ok(())
        }
        Some("png") => {
            // The encoder chooses its format by the name, and writes no file atomically.
            let temp = path.with_extension(format!("tmp-{}.png", std::process::id()));
            let drawn = draw_on(scaling, BitMapBackend::new(&temp, SIZE).into_drawing_area());
            let moved = drawn.and_then(|()| fs::rename(&temp, path).map_err(|e| e.to_string()));
            moved.map_err(|what| {
                let _ = fs::remove_file(&temp);
                failed(what)
            })
        }
        _ => {
            let what = format!("{}: the name must end in .png or .svg", path.display());
            Err(TrainError::Scaling(what))
        }
    }
}

fn text(e: impl std::fmt::Display) -> String {
    e.to_string()
}

fn draw_on<B: DrawingBackend>(scaling: &Scaling, area: DrawingArea<B, Shift>) -> Result<(), String>
where
    B::ErrorType: 'static,
{
    area.fill(&WHITE).map_err(text)?;
    match &scaling.gaps {
        Some(gaps) if !gaps.sizes.is_empty() => {
            let (top, bottom) = area.split_vertically(SIZE.1 * 11 / 20);
            losses(scaling, &top)?;
            difference(gaps, &bottom)?;
        }
        _ => losses(scaling, &area)?,
    }
    area.present().map_err(text)
}

/// Sizes from the smallest to the largest, evenly in their logarithms.
fn course(range: &Range<f64>) -> impl Iterator<Item = f64> + Clone + use<> {
    let (low, high) = (range.start.ln(), range.end.ln());
    (0..=POINTS).map(move |i| (low + (high - low) * i as f64 / POINTS as f64).exp())
}

fn sizes(all: impl Iterator<Item = u64>) -> Range<f64> {
    let (low, high) = all.fold((u64::MAX, 1), |(l, h), n| (l.min(n), h.max(n)));
    low as f64 / 1.25..high as f64 * 1.25
}

/// What holds all values, with room.
fn padded(values: impl Iterator<Item = f64>) -> Range<f64> {
    let (low, high) =
        values.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
    let room = ((high - low) * 0.08).max(1e-3);
    low - room..high + room
}

fn losses<B: DrawingBackend>(scaling: &Scaling, area: &DrawingArea<B, Shift>) -> Result<(), String>
where
    B::ErrorType: 'static,
{
    let cells = || scaling.kinds.iter().flat_map(|k| &k.cells);
    let x = sizes(cells().map(|c| c.parameters));
    let y = padded(cells().flat_map(super::Cell::losses));
    let title = format!("Validation loss after {:.2}M tokens", scaling.tokens as f64 / 1e6);
    let mut chart = ChartBuilder::on(area)
        .caption(title, (FONT, 24))
        .margin(14)
        .x_label_area_size(42)
        .y_label_area_size(74)
        .build_cartesian_2d(x.clone().log_scale(), y)
        .map_err(text)?;
    mesh(&mut chart, "loss (nats per token)", |y| format!("{y:.2}"))?;
    for (kind, color) in scaling.kinds.iter().zip(COLORS.iter().cycle().copied()) {
        let label = format!("{} = {}", scaling.by, kind.name);
        if let Some(law) = &kind.law {
            let curve = course(&x).map(|n| (n, law.fit.at(n)));
            chart.draw_series(LineSeries::new(curve, color.stroke_width(2))).map_err(text)?;
        }
        chart
            .draw_series(points(kind, color))
            .map_err(text)?
            .label(label)
            .legend(move |(x, y)| Circle::new((x + 9, y), 4, color.filled()));
    }
    legend(&mut chart)
}

fn points(kind: &Kind, color: RGBColor) -> impl Iterator<Item = Circle<(f64, f64), i32>> + '_ {
    kind.cells.iter().flat_map(move |cell| {
        let at = move |y: f64| (cell.parameters as f64, y);
        let seeds =
            cell.losses().into_iter().map(move |l| Circle::new(at(l), 2, color.mix(0.5).filled()));
        seeds.chain([Circle::new(at(cell.mean), 4, color.filled())])
    })
}

fn difference<B: DrawingBackend>(gaps: &Gaps, area: &DrawingArea<B, Shift>) -> Result<(), String>
where
    B::ErrorType: 'static,
{
    let x = sizes(gaps.sizes.iter().map(|g| g.parameters));
    let spectra = |n: f64| SPECTRA[0].at(n) - SPECTRA[1].at(n);
    let shown = gaps.sizes.iter().flat_map(|g| {
        let ends = g.interval.map_or([g.mean; 2], |i| [i.low, i.high]);
        ends.into_iter().chain([g.spectra, 0.0])
    });
    let title = format!("Loss of {} less that of {}", gaps.kind, gaps.baseline);
    let mut chart = ChartBuilder::on(area)
        .caption(title, (FONT, 24))
        .margin(14)
        .x_label_area_size(42)
        .y_label_area_size(74)
        .build_cartesian_2d(x.clone().log_scale(), padded(shown))
        .map_err(text)?;
    mesh(&mut chart, "gap (nats per token)", |y| format!("{y:+.2}"))?;
    let (measured, published) = (COLORS[0], COLORS[2]);
    let zero = [(x.start, 0.0), (x.end, 0.0)];
    chart.draw_series(LineSeries::new(zero, BLACK.mix(0.4))).map_err(text)?;
    let curve = course(&x).map(|n| (n, spectra(n)));
    chart
        .draw_series(DashedLineSeries::new(curve, 6, 5, published.stroke_width(2)))
        .map_err(text)?
        .label("Spectra's fits at 300B tokens, extrapolated from 99M down")
        .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], published.stroke_width(2)));
    if let Some((trend, _)) = &gaps.trend {
        let line = course(&x).map(|n| (n, trend.at(n)));
        chart.draw_series(LineSeries::new(line, measured.stroke_width(1))).map_err(text)?;
    }
    let bars = gaps.sizes.iter().filter_map(|g| {
        let interval = g.interval?;
        let x = g.parameters as f64;
        Some(PathElement::new([(x, interval.low), (x, interval.high)], measured.stroke_width(2)))
    });
    chart.draw_series(bars).map_err(text)?;
    let dots =
        gaps.sizes.iter().map(|g| Circle::new((g.parameters as f64, g.mean), 4, measured.filled()));
    chart
        .draw_series(dots)
        .map_err(text)?
        .label("measured, with 95 % by Student's t, and a line")
        .legend(move |(x, y)| Circle::new((x + 9, y), 4, measured.filled()));
    legend(&mut chart)
}

type Chart<'a, B> = ChartContext<'a, B, Cartesian2d<LogCoord<f64>, RangedCoordf64>>;

fn mesh<'a, B: DrawingBackend + 'a>(
    chart: &mut Chart<'a, B>,
    name: &str,
    label: impl Fn(&f64) -> String,
) -> Result<(), String>
where
    B::ErrorType: 'static,
{
    chart
        .configure_mesh()
        .x_desc("parameters")
        .y_desc(name)
        .x_label_formatter(&tick)
        .y_label_formatter(&label)
        .label_style((FONT, 16))
        .axis_desc_style((FONT, 18))
        .light_line_style(WHITE)
        .draw()
        .map_err(text)
}

/// The labels of 1, 2 and 5 of every decade; more would run into each other.
fn tick(parameters: &f64) -> String {
    let digit = (parameters / 10f64.powf(parameters.log10().floor())).round();
    let millions = (parameters / 1e4).round() / 100.0;
    if [1.0, 2.0, 5.0, 10.0].contains(&digit) { format!("{millions}M") } else { String::new() }
}

fn legend<'a, B: DrawingBackend + 'a>(chart: &mut Chart<'a, B>) -> Result<(), String>
where
    B::ErrorType: 'static,
{
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperRight)
        .label_font((FONT, 16))
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK.mix(0.3))
        .draw()
        .map_err(text)
}
