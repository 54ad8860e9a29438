//! The charts of a comparison as SVG text: a bar a model for each figure, and quality
//! against speed. Colours of paper, ink and grid are left to the page's style sheet,
//! which knows whether it is light or dark.

use std::fmt::Write;

use super::{Comparison, Metric, short};

/// The colours of the models, told apart on white and on black; after the last one comes
/// the first again.
pub(super) const COLORS: [&str; 8] =
    ["#2e7dd1", "#e06c20", "#2a9d5a", "#c43e8a", "#8a6dd4", "#b28a12", "#129baa", "#d94848"];

/// The colour of a model.
pub(super) fn color(model: usize) -> &'static str {
    COLORS[model % COLORS.len()]
}

const WIDTH: f64 = 420.0;
const ROW: f64 = 30.0;

/// Text that may stand in SVG.
fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// At most so many characters.
fn cut(text: &str, most: usize) -> String {
    match text.chars().count() > most {
        true => text.chars().take(most - 1).chain(['…']).collect(),
        false => text.to_owned(),
    }
}

/// A bar for each model that has the figure, with its value and its ratio to the first's.
pub(super) fn bars(comparison: &Comparison, metric: &Metric) -> String {
    const LEFT: f64 = 120.0;
    const RIGHT: f64 = 128.0;
    let most = metric.values.iter().flatten().copied().fold(0.0, f64::max).max(1e-30);
    let height = ROW * metric.values.len() as f64 + 4.0;
    let mut svg = open(height, &metric.name);
    for (i, (value, model)) in metric.values.iter().zip(&comparison.models).enumerate() {
        let y = ROW * i as f64;
        let _ = write!(
            svg,
            "<text x=\"{:.0}\" y=\"{:.0}\" text-anchor=\"end\" font-size=\"13\">{}</text>",
            LEFT - 8.0,
            y + 20.0,
            escaped(&cut(&model.label, 17))
        );
        let Some(value) = value else {
            let _ = write!(
                svg,
                "<text x=\"{LEFT:.0}\" y=\"{:.0}\" font-size=\"13\" class=\"soft\">–</text>",
                y + 20.0
            );
            continue;
        };
        let width = ((WIDTH - LEFT - RIGHT) * value / most).max(1.5);
        let best = Some(*value) == metric.best();
        let ratio = metric.ratio(i).map_or(String::new(), |r| {
            format!("<tspan class=\"soft\" font-weight=\"400\">  {}×</tspan>", short(r))
        });
        let _ = write!(
            svg,
            "<rect x=\"{LEFT:.0}\" y=\"{:.1}\" width=\"{width:.1}\" height=\"20\" rx=\"3\" \
             fill=\"{}\"/><text x=\"{:.1}\" y=\"{:.0}\" font-size=\"13\"{} xml:space=\"preserve\">\
             {}{ratio}</text>",
            y + 5.0,
            color(i),
            LEFT + width + 7.0,
            y + 20.0,
            if best { " font-weight=\"700\"" } else { "" },
            escaped(&(metric.text)(*value)),
        );
    }
    svg + "</svg>"
}

/// Quality against speed, the size of the file as the area of a circle; none where no
/// two models have both.
pub(super) fn trade(comparison: &Comparison) -> Option<String> {
    const HEIGHT: f64 = 330.0;
    const WIDE: f64 = 860.0;
    let (left, right, top, bottom) = (64.0, 150.0, 26.0, 46.0);
    let one = comparison.conditions.one_tokenizer;
    let name = if one { "perplexity" } else { "bits per byte" };
    let points = comparison.models.iter().enumerate().filter_map(|(i, m)| {
        let quality = m.quality?;
        let y = if one { quality.perplexity } else { quality.bits_per_byte? };
        (y > 0.0 && y.is_finite()).then_some((i, m.decode.median, y, m.file_bytes as f64))
    });
    let points: Vec<(usize, f64, f64, f64)> = points.collect();
    if points.len() < 2 {
        return None;
    }
    let x_most = points.iter().map(|p| p.1).fold(0.0, f64::max) * 1.08;
    let log = |y: f64| y.ln();
    let (low, high) = points
        .iter()
        .map(|p| log(p.2))
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(l, h), y| (l.min(y), h.max(y)));
    let room = ((high - low) * 0.15).max(0.01);
    let (low, high) = (low - room, high + room);
    let largest = points.iter().map(|p| p.3).fold(0.0, f64::max);
    let at_x = |x: f64| left + (WIDE - left - right) * x / x_most;
    // The better, lower perplexity is at the top.
    let at_y = |y: f64| top + (HEIGHT - top - bottom) * (log(y) - low) / (high - low);
    let mut svg = format!(
        "<svg viewBox=\"0 0 {WIDE} {HEIGHT}\" role=\"img\" aria-label=\"{name} against decode speed\">"
    );
    for i in 0..=4 {
        let y = (low + (high - low) * f64::from(i) / 4.0).exp();
        let _ = write!(
            svg,
            "<line x1=\"{left}\" x2=\"{:.0}\" y1=\"{:.1}\" y2=\"{:.1}\" class=\"grid\"/><text \
             x=\"{:.0}\" y=\"{:.1}\" text-anchor=\"end\" font-size=\"12\" class=\"soft\">{}</text>",
            WIDE - right,
            at_y(y),
            at_y(y),
            left - 8.0,
            at_y(y) + 4.0,
            short(y)
        );
        let x = x_most * f64::from(i) / 4.0;
        let _ = write!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.0}\" text-anchor=\"middle\" font-size=\"12\" \
             class=\"soft\">{}</text>",
            at_x(x),
            HEIGHT - bottom + 20.0,
            short(x)
        );
    }
    let _ = write!(
        svg,
        "<text x=\"{:.0}\" y=\"{:.0}\" text-anchor=\"middle\" font-size=\"13\">decode, tokens/s → \
         faster</text><text x=\"8\" y=\"14\" font-size=\"13\">↑ better: lower {name}</text>",
        left + (WIDE - left - right) / 2.0,
        HEIGHT - 6.0
    );
    // Labels of neighbours move down rather than lie on each other.
    let mut taken: Vec<(f64, f64)> = Vec::new();
    for (i, x, y, file) in points {
        let (x, y) = (at_x(x), at_y(y));
        let radius = 5.0 + 19.0 * (file / largest).sqrt();
        let mut at = y + 4.0;
        while taken.iter().any(|t| (t.0 - x).abs() < 130.0 && (t.1 - at).abs() < 15.0) {
            at += 15.0;
        }
        taken.push((x, at));
        let _ = write!(
            svg,
            "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{radius:.1}\" fill=\"{0}\" fill-opacity=\"0.55\" \
             stroke=\"{0}\" stroke-width=\"2\"/><text x=\"{1:.1}\" y=\"{at:.1}\" font-size=\"13\" \
             font-weight=\"600\">{2}</text>",
            color(i),
            x + radius + 6.0,
            escaped(&cut(&comparison.models[i].label, 22))
        );
    }
    Some(svg + "</svg>")
}

fn open(height: f64, name: &str) -> String {
    let name = escaped(name);
    format!("<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{name}\">")
}
