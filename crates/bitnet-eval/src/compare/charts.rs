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

const WIDTH: f64 = 440.0;
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
    const LEFT: f64 = 150.0;
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
            escaped(&cut(&model.label, 19))
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
        let best = metric.is_best(*value);
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
    for (y, label) in ticks(low.exp(), high.exp()) {
        let _ = write!(
            svg,
            "<line x1=\"{left}\" x2=\"{:.0}\" y1=\"{:.1}\" y2=\"{:.1}\" class=\"grid\"/><text \
             x=\"{:.0}\" y=\"{:.1}\" text-anchor=\"end\" font-size=\"12\" class=\"soft\">{}</text>",
            WIDE - right,
            at_y(y),
            at_y(y),
            left - 8.0,
            at_y(y) + 4.0,
            label
        );
    }
    let step = round_step(x_most / 5.0);
    for i in 0..=(x_most / step) as usize {
        let x = step * i as f64;
        let label = tick(x, step);
        let _ = write!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.0}\" text-anchor=\"middle\" font-size=\"12\" \
             class=\"soft\">{label}</text>",
            at_x(x),
            HEIGHT - bottom + 20.0,
        );
    }
    let _ = write!(
        svg,
        "<text x=\"{:.0}\" y=\"{:.0}\" text-anchor=\"middle\" font-size=\"13\">decode, tokens/s → \
         faster</text><text x=\"8\" y=\"14\" font-size=\"13\">↑ better: lower {name}</text>",
        left + (WIDE - left - right) / 2.0,
        HEIGHT - 6.0
    );
    let circles: Vec<Circle> = points
        .iter()
        .map(|&(_, x, y, file)| Circle {
            x: at_x(x),
            y: at_y(y),
            r: 5.0 + 19.0 * (file / largest).sqrt(),
        })
        .collect();
    for (point, circle) in points.iter().zip(&circles) {
        let Circle { x, y, r } = circle;
        let _ = write!(
            svg,
            "<circle cx=\"{x:.1}\" cy=\"{y:.1}\" r=\"{r:.1}\" fill=\"{0}\" \
             fill-opacity=\"0.55\" stroke=\"{0}\" stroke-width=\"2\"/>",
            color(point.0),
        );
    }
    let mut labels: Vec<Label> = Vec::new();
    for (point, circle) in points.iter().zip(&circles) {
        let text = cut(&comparison.models[point.0].label, 22);
        let label = circle.label(&text, (WIDE, HEIGHT), &circles, &labels);
        let _ = write!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" font-size=\"13\" font-weight=\"600\">{}</text>",
            label.x,
            label.y,
            escaped(&text)
        );
        labels.push(label);
    }
    Some(svg + "</svg>")
}

/// A model in the chart of quality against speed.
struct Circle {
    x: f64,
    y: f64,
    r: f64,
}

/// A name in it: where its line begins, and how long that is.
struct Label {
    x: f64,
    y: f64,
    width: f64,
}

/// Above and below its line, a name takes so much.
const ASCENT: f64 = 12.0;
const DESCENT: f64 = 4.0;

impl Circle {
    /// The name beside the circle, above or below it: where it lies on least.
    fn label(&self, text: &str, room: (f64, f64), circles: &[Self], labels: &[Label]) -> Label {
        let width = 7.6 * text.chars().count() as f64;
        let Self { x, y, r } = *self;
        let middle = x - width / 2.0;
        let places = [
            (x + r + 6.0, y + 4.0),
            (middle, y - r - 6.0),
            (middle, y + r + 15.0),
            (x - r - 6.0 - width, y + 4.0),
            (middle, y - r - 22.0),
            (middle, y + r + 31.0),
        ];
        let labelled = places.map(|(x, y)| Label { x, y, width });
        let outside = |l: &Label| {
            l.x < 0.0 || l.x + l.width > room.0 || l.y < ASCENT || l.y + DESCENT > room.1 - 40.0
        };
        let crowd = |l: &Label| {
            circles.iter().filter(|c| c.touches(l)).count()
                + labels.iter().filter(|other| other.touches(l)).count()
                + if outside(l) { 100 } else { 0 }
        };
        // Of equals the first.
        let best = labelled.into_iter().min_by_key(crowd);
        best.unwrap_or(Label { x, y, width })
    }

    fn touches(&self, label: &Label) -> bool {
        let x = self.x.clamp(label.x, label.x + label.width);
        let y = self.y.clamp(label.y - ASCENT, label.y + DESCENT);
        (x - self.x).hypot(y - self.y) < self.r
    }
}

impl Label {
    fn touches(&self, other: &Self) -> bool {
        let apart = self.x > other.x + other.width || other.x > self.x + self.width;
        !apart && (self.y - other.y).abs() < ASCENT + DESCENT
    }
}

/// Round values between two others for an axis of logarithms, and how they are written.
fn ticks(first: f64, last: f64) -> Vec<(f64, String)> {
    if last < 5.0 * first {
        let step = round_step((last - first) / 5.0);
        let range = (first / step).ceil() as usize..=(last / step) as usize;
        return range.map(|i| step * i as f64).map(|x| (x, tick(x, step))).collect();
    }
    let powers = first.log10().floor() as i32..=last.log10().floor() as i32;
    let values = powers.flat_map(|e| [1.0, 2.0, 5.0].map(|n| n * 10f64.powi(e)));
    values.filter(|x| (first..=last).contains(x)).map(|x| (x, tick(x, x))).collect()
}

/// A value of an axis, in as many digits as its steps need.
fn tick(value: f64, step: f64) -> String {
    let digits = (-step.max(1e-12).log10().floor()).max(0.0) as usize;
    format!("{value:.digits$}")
}

/// 1, 2 or 5 times a power of ten, at least `x`.
fn round_step(x: f64) -> f64 {
    let power = 10f64.powf(x.max(1e-12).log10().floor());
    [1.0, 2.0, 5.0, 10.0].map(|n| n * power).into_iter().find(|s| *s >= x * 0.999).unwrap_or(x)
}

fn open(height: f64, name: &str) -> String {
    let name = escaped(name);
    format!("<svg viewBox=\"0 0 {WIDTH} {height}\" role=\"img\" aria-label=\"{name}\">")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_have_the_digits_of_their_steps() {
        let ticks = [(0.0, 500.0), (1500.0, 500.0), (2.4, 0.2), (2.05, 0.05), (3.0, 1.0)];
        assert_eq!(ticks.map(|(x, step)| tick(x, step)), ["0", "1500", "2.4", "2.05", "3"]);
        let labels =
            |first, last| super::ticks(first, last).into_iter().map(|t| t.1).collect::<Vec<_>>();
        assert_eq!(labels(138.0, 197.0), ["140", "160", "180"]);
        assert_eq!(labels(2.05, 2.45), ["2.1", "2.2", "2.3", "2.4"]);
        assert_eq!(labels(90.0, 3000.0), ["100", "200", "500", "1000", "2000"]);
    }

    #[test]
    fn steps_are_round() {
        for (x, step) in [(939.0, 1000.0), (0.11, 0.2), (3.0, 5.0), (1.0, 1.0), (51.0, 100.0)] {
            assert!((round_step(x) / step - 1.0).abs() < 1e-9, "{x}");
        }
    }

    #[test]
    fn names_keep_clear_of_circles_and_names() {
        let circles =
            [(100.0, 100.0), (130.0, 100.0), (400.0, 100.0)].map(|(x, y)| Circle { x, y, r: 20.0 });
        let mut labels = Vec::new();
        for circle in &circles {
            let label = circle.label("a model's name", (860.0, 330.0), &circles, &labels);
            assert!(circles.iter().all(|c| !c.touches(&label)));
            assert!(labels.iter().all(|l: &Label| !l.touches(&label)));
            labels.push(label);
        }
        assert!(labels[2].x > 420.0, "beside it where there is room");
    }
}
