//! The curves of a run, `loss.png` and `loss.svg`: training and validation loss
//! above, the learning rate below, over the steps.

use std::fmt::Display;
use std::fs;
use std::ops::Range;
use std::path::Path;
use std::sync::OnceLock;

use bitnet_format::atomic::write_atomic;
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::{FontStyle, register_font};

use crate::TrainError;
use crate::error::with_path;
use crate::metrics::Metric;

const SIZE: (u32, u32) = (1000, 720);
pub(crate) const FONT: &str = "sans-serif";
const RAW: RGBColor = RGBColor(178, 200, 226);
const TRAIN: RGBColor = RGBColor(31, 96, 168);
const VALIDATION: RGBColor = RGBColor(208, 82, 20);
const RATE: RGBColor = RGBColor(60, 128, 70);

pub(crate) type Points = Vec<(f64, f64)>;

/// Draws both files into `folder`; nothing where no step was logged.
///
/// # Errors
/// I/O errors with the path, or what the drawing library says.
pub fn draw(folder: &Path, name: &str, metrics: &[Metric]) -> Result<(), TrainError> {
    let curves = Curves::new(metrics);
    if curves.loss.is_empty() {
        return Ok(());
    }
    load_font();
    let png = folder.join("loss.png");
    // The encoder chooses its format by the name, and writes no file atomically.
    let temp = folder.join(format!(".loss.tmp-{}.png", std::process::id()));
    let drawn = curves.draw(name, BitMapBackend::new(&temp, SIZE).into_drawing_area());
    let moved = drawn.and_then(|()| fs::rename(&temp, &png).map_err(|e| e.to_string()));
    if let Err(what) = moved {
        let _ = fs::remove_file(&temp);
        return Err(TrainError::Plot { path: png, what });
    }
    let svg = folder.join("loss.svg");
    let mut text = String::new();
    curves
        .draw(name, SVGBackend::with_string(&mut text, SIZE).into_drawing_area())
        .map_err(|what| TrainError::Plot { path: svg.clone(), what })?;
    write_atomic(&svg, |w| std::io::Write::write_all(w, text.as_bytes()))
        .map_err(with_path(&svg))?;
    Ok(())
}

/// A font that is part of the program, so that plots look the same everywhere.
pub(crate) fn load_font() {
    static LOADED: OnceLock<()> = OnceLock::new();
    LOADED.get_or_init(|| {
        // It cannot fail: the bytes are a font, as the tests see.
        let _ = register_font(FONT, FontStyle::Normal, epaint_default_fonts::UBUNTU_LIGHT);
    });
}

struct Curves {
    loss: Points,
    smooth: Points,
    validation: Points,
    rate: Points,
}

impl Curves {
    fn new(metrics: &[Metric]) -> Self {
        let (mut loss, mut validation, mut rate) = (Points::new(), Points::new(), Points::new());
        for metric in metrics {
            let x = metric.step() as f64;
            match metric {
                Metric::Train(m) => {
                    loss.push((x, m.loss));
                    rate.push((x, m.lr));
                }
                Metric::Eval(m) => validation.push((x, m.val_loss)),
                Metric::Weights(_) => {}
            }
        }
        Self { smooth: smooth(&loss), loss, validation, rate }
    }

    fn draw<B: DrawingBackend>(
        &self,
        name: &str,
        area: DrawingArea<B, Shift>,
    ) -> Result<(), String> {
        area.fill(&WHITE).map_err(text)?;
        let steps = 0.0..self.loss.last().map_or(1.0, |p| p.0).max(1.0);
        let (top, bottom) = area.split_vertically(SIZE.1 * 2 / 3);
        self.draw_loss(name, &top, steps.clone()).map_err(text)?;
        self.draw_rate(&bottom, steps).map_err(text)?;
        area.present().map_err(text)
    }

    fn draw_loss<B: DrawingBackend>(
        &self,
        name: &str,
        area: &DrawingArea<B, Shift>,
        steps: Range<f64>,
    ) -> Result<(), DrawingAreaErrorKind<B::ErrorType>> {
        let range = padded(self.loss.iter().chain(&self.validation).map(|p| p.1));
        let mut chart = ChartBuilder::on(area)
            .caption(name, (FONT, 26))
            .margin(14)
            .x_label_area_size(34)
            .y_label_area_size(74)
            .build_cartesian_2d(steps, range)?;
        chart
            .configure_mesh()
            .x_labels(9)
            .y_labels(8)
            .light_line_style(WHITE)
            .x_label_formatter(&|x| format!("{x:.0}"))
            .y_label_formatter(&|y| format!("{y:.2}"))
            .y_desc("loss (nats per token)")
            .label_style((FONT, 17))
            .axis_desc_style((FONT, 19))
            .draw()?;
        chart.draw_series(LineSeries::new(self.loss.iter().copied(), RAW))?;
        chart
            .draw_series(LineSeries::new(self.smooth.iter().copied(), TRAIN.stroke_width(2)))?
            .label("training, smoothed")
            .legend(|p| key(p, TRAIN));
        chart
            .draw_series(
                LineSeries::new(self.validation.iter().copied(), VALIDATION.stroke_width(2))
                    .point_size(3),
            )?
            .label("validation")
            .legend(|p| key(p, VALIDATION));
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::UpperRight)
            .background_style(WHITE.mix(0.85))
            .border_style(BLACK.mix(0.3))
            .label_font((FONT, 18))
            .draw()
    }

    fn draw_rate<B: DrawingBackend>(
        &self,
        area: &DrawingArea<B, Shift>,
        steps: Range<f64>,
    ) -> Result<(), DrawingAreaErrorKind<B::ErrorType>> {
        let top = self.rate.iter().map(|p| p.1).fold(0.0, f64::max).max(1e-12) * 1.08;
        let mut chart = ChartBuilder::on(area)
            .margin(14)
            .x_label_area_size(48)
            .y_label_area_size(74)
            .build_cartesian_2d(steps, 0.0..top)?;
        chart
            .configure_mesh()
            .x_labels(9)
            .y_labels(4)
            .light_line_style(WHITE)
            .x_label_formatter(&|x| format!("{x:.0}"))
            .y_label_formatter(&|y| format!("{y:.1e}"))
            .x_desc("step")
            .y_desc("learning rate")
            .label_style((FONT, 17))
            .axis_desc_style((FONT, 19))
            .draw()?;
        chart.draw_series(LineSeries::new(self.rate.iter().copied(), RATE.stroke_width(2)))?;
        Ok(())
    }
}

fn key((x, y): (i32, i32), color: RGBColor) -> PathElement<(i32, i32)> {
    PathElement::new(vec![(x, y), (x + 22, y)], color.stroke_width(2))
}

fn text(error: impl Display) -> String {
    error.to_string()
}

/// An exponential mean over about a fiftieth of the run, free of the bias
/// towards its start.
pub(crate) fn smooth(points: &[(f64, f64)]) -> Points {
    let keep = 1.0 - 1.0 / (points.len() as f64 / 50.0).max(1.0);
    let (mut sum, mut weight) = (0.0, 0.0);
    let mean = points.iter().map(|&(x, y)| {
        sum = sum * keep + y * (1.0 - keep);
        weight = weight * keep + (1.0 - keep);
        (x, sum / weight)
    });
    mean.collect()
}

/// The range of the values with room above and below.
fn padded(values: impl Iterator<Item = f64>) -> Range<f64> {
    let (low, high) =
        values.fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), v| (l.min(v), h.max(v)));
    let room = ((high - low) * 0.05).max(1e-3);
    low - room..high + room
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::metrics::{EvalMetric, TrainMetric};

    fn metrics(steps: u64) -> Vec<Metric> {
        let mut all = Vec::new();
        for step in 1..=steps {
            let x = step as f64;
            let loss = 2.0 + 6.0 * (-x / 60.0).exp() + 0.2 * (x * 1.7).sin();
            let lr = 3e-3 * (1.0 - x / steps as f64);
            all.push(Metric::Train(TrainMetric {
                step,
                loss,
                lr,
                grad_norm: 1.0,
                tokens: 0,
                tokens_per_second: 1.0,
                seconds: x,
                data_seconds: 0.0,
                rss_bytes: None,
            }));
            if step.is_multiple_of(50) {
                let (val_loss, tokens, seconds) = (loss + 0.1, 1, x);
                all.push(Metric::Eval(EvalMetric { step, val_loss, tokens, seconds }));
            }
        }
        all
    }

    #[test]
    fn draws_both_files_with_their_labels() {
        let dir = tempfile::tempdir().unwrap();
        draw(dir.path(), "none", &[]).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
        for steps in [1, 400] {
            draw(dir.path(), "quickstart", &metrics(steps)).unwrap();
            let png = fs::read(dir.path().join("loss.png")).unwrap();
            assert_eq!(&png[..4], b"\x89PNG");
            let svg = fs::read_to_string(dir.path().join("loss.svg")).unwrap();
            for label in
                ["quickstart", "loss (nats per token)", "learning rate", "step", "validation"]
            {
                assert!(svg.contains(label), "{label}");
            }
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
        }
    }

    #[test]
    fn smoothing_keeps_a_constant() {
        let flat: Points = (0..500).map(|i| (f64::from(i), 3.0)).collect();
        assert!(smooth(&flat).iter().all(|p| (p.1 - 3.0).abs() < 1e-12));
    }
}
