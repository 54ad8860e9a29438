//! The charts of a report as SVG text. Colours of paper, ink and grid are left to
//! the page's style sheet, which knows whether it is light or dark: see [`INK`].

use std::ops::Range;

use plotters::prelude::*;

use crate::plot::{FONT, Points, load_font};

/// The colours that `page.html` replaces by those of its theme.
const INK: RGBColor = RGBColor(1, 1, 1);
const GRID: RGBColor = RGBColor(2, 2, 2);

/// Points of a line, at most: more cannot be seen.
const POINTS: usize = 400;

const SIZE: (u32, u32) = (560, 330);

/// The colours of the runs, told apart on white and on black; after the last one
/// comes the first again.
pub(super) const COLORS: [RGBColor; 8] = [
    RGBColor(46, 125, 209),
    RGBColor(224, 108, 32),
    RGBColor(42, 157, 90),
    RGBColor(196, 62, 138),
    RGBColor(138, 109, 212),
    RGBColor(178, 138, 18),
    RGBColor(18, 155, 170),
    RGBColor(217, 72, 72),
];

/// How the numbers of an axis are written.
#[derive(Debug, Clone, Copy)]
pub(super) enum Unit {
    /// With as many digits as they need; large ones as `12k`, `3.4M`.
    Number,
    /// Small numbers as `1.0e-3`.
    Scientific,
    /// Shares as per cent.
    Percent,
    /// Bytes as MiB.
    Mebibytes,
    /// Seconds as seconds, minutes or hours.
    Seconds,
}

/// One line of a chart.
#[derive(Debug, Clone)]
pub(super) struct Line {
    /// The run it belongs to: its colour.
    pub(super) run: usize,
    /// Its points, in order of x.
    pub(super) points: Points,
    /// Whether its points are few and marked.
    pub(super) marked: bool,
}

/// What a chart shows.
#[derive(Debug, Clone)]
pub(super) struct Chart {
    pub(super) title: &'static str,
    pub(super) x: (&'static str, Unit),
    pub(super) y: (&'static str, Unit),
    pub(super) lines: Vec<Line>,
    /// Leave out what lies above the lines' values after this share of x, so that
    /// the first steps do not flatten the rest.
    pub(super) skip: f64,
}

impl Chart {
    /// The chart as an `<svg>` element; none where no line has a point.
    pub(super) fn draw(&self) -> Option<Result<String, String>> {
        let points = || self.lines.iter().flat_map(|l| &l.points);
        let right = points().map(|p| p.0).reduce(f64::max)?;
        load_font();
        let range = self.range(right);
        let mut text = String::new();
        let drawn = self.draw_to(&mut text, 0.0..right.max(1e-9), range);
        Some(drawn.map(|()| self.finish(&text)).map_err(|e| format!("{}: {e}", self.title)))
    }

    fn range(&self, right: f64) -> Range<f64> {
        let all = || self.lines.iter().flat_map(|l| &l.points);
        let late = || all().filter(|p| p.0 >= right * self.skip).map(|p| p.1);
        let high = late().fold(f64::NEG_INFINITY, f64::max);
        let low = late().fold(f64::INFINITY, f64::min);
        let room = ((high - low) * 0.06).max(high.abs() * 1e-3).max(1e-12);
        low - room..high + room
    }

    fn draw_to(
        &self,
        text: &mut String,
        x: Range<f64>,
        y: Range<f64>,
    ) -> Result<(), Box<dyn std::error::Error>> {
        let area = SVGBackend::with_string(text, SIZE).into_drawing_area();
        let mut chart = ChartBuilder::on(&area)
            .margin(8)
            .margin_right(16)
            .x_label_area_size(42)
            .y_label_area_size(66)
            .build_cartesian_2d(x.clone(), y.clone())?;
        let (spread_x, spread_y) = (x.end, y.end - y.start);
        chart
            .configure_mesh()
            .x_labels(6)
            .y_labels(6)
            .disable_x_mesh()
            .light_line_style(TRANSPARENT)
            .bold_line_style(GRID)
            .axis_style(GRID)
            .x_label_formatter(&|v| number(*v, spread_x, self.x.1))
            .y_label_formatter(&|v| number(*v, spread_y, self.y.1))
            .x_desc(self.x.0)
            .y_desc(self.y.0)
            .label_style((FONT, 14, &INK))
            .axis_desc_style((FONT, 14, &INK))
            .draw()?;
        for line in &self.lines {
            let color = COLORS[line.run % COLORS.len()];
            let seen = line.points.iter().filter(|p| p.1 <= y.end).copied().collect();
            let series = LineSeries::new(thin(seen), color.stroke_width(2));
            chart.draw_series(series.point_size(if line.marked { 3 } else { 0 }))?;
        }
        area.present()?;
        Ok(())
    }

    /// An element of a page, not a file: it takes the page's width, and a name for
    /// those who cannot see it.
    fn finish(&self, text: &str) -> String {
        let body = text.find('>').map_or("", |end| &text[end + 1..]);
        let (width, height) = SIZE;
        format!(
            "<svg viewBox=\"0 0 {width} {height}\" role=\"img\" aria-label=\"{}\">{body}",
            self.title
        )
    }
}

/// At most [`POINTS`] of the points, the first and the last among them.
fn thin(points: Points) -> Points {
    let last = points.len().saturating_sub(1);
    if last < POINTS {
        return points;
    }
    (0..POINTS).map(|i| points[i * last / (POINTS - 1)]).collect()
}

/// A number on an axis that spans `spread`.
fn number(value: f64, spread: f64, unit: Unit) -> String {
    // About five labels: as many digits as tell them apart.
    let digits = |spread: f64| (-(spread.max(1e-12) / 5.0).log10()).ceil().clamp(0.0, 6.0) as usize;
    match unit {
        Unit::Scientific => format!("{value:.1e}"),
        Unit::Percent => format!("{:.*} %", digits(spread * 100.0), value * 100.0),
        Unit::Mebibytes => format!("{:.0}", value / f64::from(1 << 20)),
        Unit::Seconds if spread < 180.0 => format!("{value:.0} s"),
        Unit::Seconds if spread < 3.0 * 3600.0 => format!("{:.1} m", value / 60.0),
        Unit::Seconds => format!("{:.1} h", value / 3600.0),
        Unit::Number => {
            let (scale, suffix) = match spread {
                s if s >= 3e9 => (1e9, "G"),
                s if s >= 3e6 => (1e6, "M"),
                s if s >= 3e4 => (1e3, "k"),
                _ => (1.0, ""),
            };
            format!("{:.*}{suffix}", digits(spread / scale), value / scale)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_have_the_digits_they_need() {
        for (value, spread, unit, text) in [
            (4.0, 3.0, Unit::Number, "4.0"),
            (4.125, 0.02, Unit::Number, "4.125"),
            (120.0, 200.0, Unit::Number, "120"),
            (1.5e6, 4e6, Unit::Number, "1.5M"),
            (0.305, 0.02, Unit::Percent, "30.5 %"),
            (1e-3, 1.0, Unit::Scientific, "1.0e-3"),
            (90.0, 100.0, Unit::Seconds, "90 s"),
            (5400.0, 20000.0, Unit::Seconds, "1.5 h"),
            (f64::from(5 << 20), 1e7, Unit::Mebibytes, "5"),
        ] {
            assert_eq!(number(value, spread, unit), text);
        }
    }

    #[test]
    fn thinning_keeps_both_ends() {
        let long: Points = (0..100_001).map(|i| (f64::from(i), 1.0)).collect();
        let few = thin(long);
        assert_eq!((few.len(), few[0].0, few[POINTS - 1].0), (POINTS, 0.0, 100_000.0));
    }

    #[test]
    fn a_chart_names_itself_and_loads_nothing() {
        let points = vec![(0.0, 9.0), (50.0, 2.0), (100.0, 1.0)];
        let lines = vec![Line { run: 1, points, marked: true }];
        let mut chart = Chart {
            title: "loss by step",
            x: ("step", Unit::Number),
            y: ("loss", Unit::Number),
            lines,
            skip: 0.05,
        };
        let svg = chart.draw().unwrap().unwrap();
        for part in ["aria-label=\"loss by step\"", "#E06C20", "</svg>", "step\n"] {
            assert!(svg.contains(part), "{part}: {svg}");
        }
        assert!(!svg.contains("http"));
        chart.lines[0].points.clear();
        assert!(chart.draw().is_none());
    }
}
