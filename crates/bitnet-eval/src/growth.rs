//! How speed changes with the size of a model: benches of several models as one
//! Markdown table and one picture, beside the limits measured in their runs.

use std::fs;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use bitnet_format::atomic::write_atomic;
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::{FontStyle, register_font};
use serde::Deserialize;

use crate::EvalError;

/// A model's figures in one setting.
#[derive(Debug, Clone, PartialEq)]
pub struct Point {
    /// File of the model.
    pub model: String,
    /// Layout of its weights.
    pub layout: String,
    /// Instruction set.
    pub isa: String,
    /// Threads.
    pub threads: usize,
    /// Weights of the ternary layers.
    pub weights: f64,
    /// Size of the file.
    pub file_bytes: u64,
    /// Decoding one by one.
    pub decode: Option<Speed>,
    /// One prompt.
    pub prefill: Option<Speed>,
    /// Speed of reading the file, 10^9 bytes a second.
    pub read_gb_per_second: Option<f64>,
    /// The most memory the process had used.
    pub peak_rss_bytes: Option<u64>,
}

/// A median, and what the machine's limit would allow.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Speed {
    /// Tokens a second.
    pub tokens_per_second: f64,
    /// Share of the limit: of read bandwidth in decode, of int8 peak in prefill.
    pub share: Option<f64>,
}

impl Speed {
    fn ceiling(self) -> Option<f64> {
        self.share.filter(|share| *share > 0.0).map(|share| self.tokens_per_second / share)
    }
}

/// What is read of a bench's JSON.
#[derive(Debug, Deserialize)]
struct Bench {
    models: Vec<Model>,
    results: Vec<Row>,
    limits: Limits,
}

#[derive(Debug, Deserialize)]
struct Model {
    model: String,
    file_bytes: u64,
}

#[derive(Debug, Deserialize)]
struct Row {
    model: String,
    layout: String,
    isa: String,
    threads: usize,
    test: String,
    tokens_per_second: f64,
    share_of_bandwidth: f64,
    share_of_int8_peak: Option<f64>,
    linear_bytes_per_token: u64,
    peak_rss_bytes: Option<u64>,
}

#[derive(Debug, Deserialize)]
struct Limits {
    read: Vec<Limit>,
}

#[derive(Debug, Deserialize)]
struct Limit {
    model: Option<String>,
    isa: String,
    threads: usize,
    gb_per_second: Option<f64>,
}

/// Reads what `bitnet-eval bench --json` wrote; the smallest model comes first.
///
/// # Errors
/// A file that cannot be read, is no such JSON, or has no decode test of a ternary
/// model.
pub fn read(paths: &[PathBuf]) -> Result<Vec<Point>, EvalError> {
    let mut points = Vec::new();
    for path in paths {
        let bytes =
            fs::read(path).map_err(|source| EvalError::Read { path: path.clone(), source })?;
        let bench: Bench = serde_json::from_slice(&bytes)
            .map_err(|e| EvalError::BenchFile { path: path.clone(), why: e.to_string() })?;
        let found = of_bench(&bench);
        if found.is_empty() {
            let why = "it has no `tg` test of a ternary model".to_owned();
            return Err(EvalError::BenchFile { path: path.clone(), why });
        }
        points.extend(found);
    }
    points.sort_by(|a, b| a.weights.total_cmp(&b.weights).then_with(|| a.layout.cmp(&b.layout)));
    Ok(points)
}

fn of_bench(bench: &Bench) -> Vec<Point> {
    let mut points: Vec<Point> = Vec::new();
    for row in &bench.results {
        let per_byte = match row.layout.as_str() {
            "p2" => 4.0,
            "p5" => 5.0,
            _ => continue,
        };
        let decode = one_by_one(&row.test, "tg");
        if !decode && !one_by_one(&row.test, "pp") {
            continue;
        }
        let same = |p: &Point| (&p.model, &p.isa, p.threads) == (&row.model, &row.isa, row.threads);
        let at = points.iter().position(same).unwrap_or_else(|| {
            let file = bench.models.iter().find(|m| m.model == row.model);
            let read = bench.limits.read.iter().find(|l| {
                l.model.as_ref() == Some(&row.model)
                    && (&l.isa, l.threads) == (&row.isa, row.threads)
            });
            points.push(Point {
                model: row.model.clone(),
                layout: row.layout.clone(),
                isa: row.isa.clone(),
                threads: row.threads,
                weights: 0.0,
                file_bytes: file.map_or(0, |m| m.file_bytes),
                decode: None,
                prefill: None,
                read_gb_per_second: read.and_then(|l| l.gb_per_second),
                peak_rss_bytes: row.peak_rss_bytes,
            });
            points.len() - 1
        });
        let tokens_per_second = row.tokens_per_second;
        let point = &mut points[at];
        let weights = row.linear_bytes_per_token as f64 * per_byte;
        if decode {
            point.weights = weights;
            let share = Some(row.share_of_bandwidth);
            point.decode = Some(Speed { tokens_per_second, share });
        } else {
            point.prefill = Some(Speed { tokens_per_second, share: row.share_of_int8_peak });
        }
    }
    // A prompt reads the weights once a chunk: only decoding tells how many there are.
    points.retain(|p| p.decode.is_some());
    points
}

/// Whether a test is `tg<N>` or `pp<N>`, without a batch.
fn one_by_one(test: &str, kind: &str) -> bool {
    test.strip_prefix(kind).is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
}

/// A Markdown table, a row a point.
#[must_use]
pub fn table(points: &[Point]) -> String {
    let mut out = String::from(
        "| model | layout | isa | threads | ternary weights | file GB | decode tokens/s \
         | of read limit | read limit GB/s | prefill tokens/s | of int8 peak | peak memory GB |\n\
         |---|---|---|---|---|---|---|---|---|---|---|---|\n",
    );
    let share = |s: Option<f64>| s.map_or("-".to_owned(), |s| format!("{:.0} %", s * 100.0));
    for p in points {
        let speed = |s: Option<Speed>| s.map_or("-".to_owned(), |s| short(s.tokens_per_second));
        let gb = |bytes: u64| format!("{:.2}", bytes as f64 * 1e-9);
        let row = [
            Path::new(&p.model).file_stem().map_or(p.model.clone(), |s| s.to_string_lossy().into()),
            p.layout.clone(),
            p.isa.clone(),
            p.threads.to_string(),
            count(p.weights),
            gb(p.file_bytes),
            speed(p.decode),
            share(p.decode.and_then(|s| s.share)),
            p.read_gb_per_second.map_or("-".to_owned(), |x| format!("{x:.1}")),
            speed(p.prefill),
            share(p.prefill.and_then(|s| s.share)),
            p.peak_rss_bytes.map_or("-".to_owned(), gb),
        ];
        out.push_str(&format!("| {} |\n", row.join(" | ")));
    }
    out
}

/// Three digits.
fn short(x: f64) -> String {
    match x {
        x if x >= 100.0 => format!("{x:.0}"),
        x if x >= 10.0 => format!("{x:.1}"),
        x => format!("{x:.2}"),
    }
}

fn count(x: f64) -> String {
    match x {
        x if x >= 1e9 => format!("{}B", short(x * 1e-9)),
        x => format!("{}M", short(x * 1e-6)),
    }
}

const SIZE: (u32, u32) = (1000, 820);
const FONT: &str = "sans-serif";
const COLORS: [RGBColor; 4] =
    [RGBColor(31, 96, 168), RGBColor(208, 82, 20), RGBColor(60, 128, 70), RGBColor(120, 70, 150)];

/// Draws tokens a second against ternary weights, both on logarithmic axes, with
/// the ceilings of the limits; the name's ending chooses `.png` or `.svg`.
///
/// # Errors
/// Another ending, I/O errors, and what the drawing library says.
pub fn draw(points: &[Point], path: &Path) -> Result<(), EvalError> {
    // A font that is part of the program, so that plots look the same everywhere.
    static LOADED: OnceLock<()> = OnceLock::new();
    LOADED.get_or_init(|| {
        let _ = register_font(FONT, FontStyle::Normal, epaint_default_fonts::UBUNTU_LIGHT);
    });
    let failed = |why: String| EvalError::Plot { path: path.into(), why };
    match path.extension().and_then(|e| e.to_str()) {
        Some("svg") => {
            let mut text = String::new();
            let area = SVGBackend::with_string(&mut text, SIZE).into_drawing_area();
            draw_on(points, area).map_err(failed)?;
            write_atomic(path, |w| std::io::Write::write_all(w, text.as_bytes()))
                .map_err(|source| EvalError::Write { path: path.into(), source })
        }
        Some("png") => {
            // The encoder chooses its format by the name, and writes no file atomically.
            let temp = path.with_extension(format!("tmp-{}.png", std::process::id()));
            let drawn = draw_on(points, BitMapBackend::new(&temp, SIZE).into_drawing_area());
            let moved = drawn.and_then(|()| fs::rename(&temp, path).map_err(|e| e.to_string()));
            moved.map_err(|why| {
                let _ = fs::remove_file(&temp);
                failed(why)
            })
        }
        _ => {
            let message = format!("{}: the name must end in .png or .svg", path.display());
            Err(EvalError::Usage(message))
        }
    }
}

fn draw_on<B: DrawingBackend>(points: &[Point], area: DrawingArea<B, Shift>) -> Result<(), String>
where
    B::ErrorType: 'static,
{
    area.fill(&WHITE).map_err(text)?;
    let (top, bottom) = area.split_vertically(SIZE.1 / 2);
    chart(&top, "Decode, tokens/s (dashed: reading every byte at the read limit)", points, |p| {
        p.decode
    })?;
    chart(&bottom, "Prefill, tokens/s (dashed: every product at the int8 peak)", points, |p| {
        p.prefill
    })?;
    area.present().map_err(text)
}

fn text(e: impl std::fmt::Display) -> String {
    e.to_string()
}

/// A curve: its name, its measured points and their ceilings.
type Curve = (String, Vec<(f64, f64)>, Vec<(f64, f64)>);

fn curves(points: &[Point], speed: impl Fn(&Point) -> Option<Speed>) -> Vec<Curve> {
    let mut curves: Vec<Curve> = Vec::new();
    for p in points {
        let Some(s) = speed(p) else { continue };
        let name = format!("{}, {}, {} threads", p.layout, p.isa, p.threads);
        let at = curves.iter().position(|c| c.0 == name).unwrap_or_else(|| {
            curves.push((name, Vec::new(), Vec::new()));
            curves.len() - 1
        });
        curves[at].1.push((p.weights, s.tokens_per_second));
        curves[at].2.extend(s.ceiling().map(|y| (p.weights, y)));
    }
    curves
}

fn chart<B: DrawingBackend>(
    area: &DrawingArea<B, Shift>,
    title: &str,
    points: &[Point],
    speed: impl Fn(&Point) -> Option<Speed>,
) -> Result<(), String>
where
    B::ErrorType: 'static,
{
    let curves = curves(points, speed);
    if curves.is_empty() {
        return Ok(());
    }
    let all = || curves.iter().flat_map(|c| c.1.iter().chain(&c.2));
    let (x, y) = (range(all().map(|p| p.0)), range(all().map(|p| p.1)));
    let mut chart = ChartBuilder::on(area)
        .caption(title, (FONT, 20))
        .margin(12)
        .x_label_area_size(40)
        .y_label_area_size(64)
        .build_cartesian_2d(x.log_scale(), y.log_scale())
        .map_err(text)?;
    chart
        .configure_mesh()
        .x_desc("ternary weights")
        .x_label_formatter(&|x| count(*x))
        .y_label_formatter(&|y| short(*y))
        .label_style((FONT, 14))
        .light_line_style(WHITE)
        .draw()
        .map_err(text)?;
    for (i, (name, measured, ceiling)) in curves.iter().enumerate() {
        let color = COLORS[i % COLORS.len()];
        let dashes = DashedLineSeries::new(ceiling.iter().copied(), 6, 5, color.mix(0.6).into());
        chart.draw_series(dashes).map_err(text)?;
        chart
            .draw_series(LineSeries::new(measured.iter().copied(), color.stroke_width(2)))
            .map_err(text)?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2)));
        chart
            .draw_series(measured.iter().map(|&at| Circle::new(at, 4, color.filled())))
            .map_err(text)?;
    }
    chart
        .configure_series_labels()
        .label_font((FONT, 14))
        .background_style(WHITE.mix(0.8))
        .border_style(BLACK.mix(0.2))
        .position(SeriesLabelPosition::UpperRight)
        .draw()
        .map_err(text)
}

/// The range of positive numbers, with room at both ends.
fn range(values: impl Iterator<Item = f64>) -> Range<f64> {
    let (low, high) = values
        .filter(|x| *x > 0.0 && x.is_finite())
        .fold((f64::INFINITY, 0.0f64), |(low, high), x| (low.min(x), high.max(x)));
    if low > high { 0.5..2.0 } else { low / 1.5..high * 1.5 }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two models whose figures are easy to check by hand.
    fn bench(folder: &Path) -> PathBuf {
        let row = |model: &str, test: &str, linear: u64, rate: f64| {
            serde_json::json!({
                "model": model, "layout": "p5", "isa": "avx2", "threads": 2, "test": test,
                "tokens_per_second": rate, "share_of_bandwidth": 0.5,
                "share_of_int8_peak": 0.25, "linear_bytes_per_token": linear,
                "peak_rss_bytes": 3_000_000_000u64,
            })
        };
        let json = serde_json::json!({
            "models": [
                { "model": "big.gguf", "file_bytes": 2_000_000_000u64 },
                { "model": "small.gguf", "file_bytes": 200_000_000u64 },
            ],
            "results": [
                row("big.gguf", "tg32", 400_000_000, 20.0),
                row("big.gguf", "tg32x8", 50_000_000, 90.0),
                row("big.gguf", "pp512", 781_250, 140.0),
                row("small.gguf", "tg32", 20_000_000, 300.0),
                row("small.gguf", "ternary_only", 20_000_000, 400.0),
            ],
            "limits": { "read": [
                { "model": "big.gguf", "isa": "avx2", "threads": 2, "gb_per_second": 28.0 },
            ] },
        });
        let path = folder.join("bench.json");
        fs::write(&path, json.to_string()).unwrap();
        path
    }

    #[test]
    fn a_bench_becomes_a_table_from_small_to_big() {
        let folder = tempfile::tempdir().unwrap();
        let points = read(&[bench(folder.path())]).unwrap();
        assert_eq!(points.len(), 2);
        assert_eq!((points[0].weights, points[1].weights), (1e8, 2e9));
        assert_eq!(points[1].decode.unwrap().ceiling(), Some(40.0));
        assert_eq!(points[0].prefill, None);
        let lines: Vec<String> = table(&points).lines().map(str::to_owned).collect();
        assert!(lines[2].starts_with("| small | p5 | avx2 | 2 | 100M | 0.20 | 300 | 50 % | - |"));
        assert_eq!(
            lines[3],
            "| big | p5 | avx2 | 2 | 2.00B | 2.00 | 20.0 | 50 % | 28.0 | 140 | 25 % | 3.00 |"
        );
    }

    #[test]
    fn draws_both_kinds_and_leaves_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let points = read(&[bench(folder.path())]).unwrap();
        let (png, svg) = (folder.path().join("a.png"), folder.path().join("a.svg"));
        draw(&points, &png).unwrap();
        draw(&points, &svg).unwrap();
        assert!(fs::read(&png).unwrap().starts_with(b"\x89PNG"));
        let svg = fs::read_to_string(&svg).unwrap();
        assert!(svg.contains("ternary weights") && svg.matches("<circle").count() >= 3);
        assert!(draw(&points, &folder.path().join("a.gif")).is_err());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 3);
    }

    #[test]
    fn refuses_what_is_no_bench() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.json");
        assert!(read(std::slice::from_ref(&path)).unwrap_err().to_string().contains("x.json"));
        for text in ["", "{}", r#"{"models":[],"results":[],"limits":{"read":[]}}"#] {
            fs::write(&path, text).unwrap();
            let error = read(std::slice::from_ref(&path)).unwrap_err().to_string();
            assert!(error.contains("x.json"), "{error}");
        }
    }
}
