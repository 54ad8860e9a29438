//! The dashboard: what it knows of a run, and how it draws that into a frame of any
//! size.

use std::collections::VecDeque;
use std::time::Instant;

use ratatui::Frame;
use ratatui::layout::{Alignment, Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::symbols::Marker;
use ratatui::text::{Line, Span};
use ratatui::widgets::{
    Axis, Block, Cell, Chart, Dataset, Gauge, GraphType, Paragraph, Row, Table, Wrap,
};

use super::duration;
use crate::TrainConfig;
use crate::metrics::{Metric, Sample, TrainMetric, WeightMetric};
use crate::plot::{Points, smooth};

/// Lines of text that are kept.
const LINES: usize = 1000;

const TRAIN: Color = Color::Blue;
const VALIDATION: Color = Color::Yellow;
const MINUS: Color = Color::Magenta;
const PLUS: Color = Color::Cyan;
const FAINT: Color = Color::DarkGray;

/// All that is shown.
#[derive(Debug)]
pub(crate) struct Dashboard {
    title: String,
    steps: u64,
    /// The step at which this process began, and when that was.
    began: (u64, Instant),
    loss: Points,
    validation: Points,
    last: Option<TrainMetric>,
    weights: Option<WeightMetric>,
    sample: Option<Sample>,
    lines: VecDeque<String>,
}

impl Dashboard {
    /// Of a run of `steps` steps that stands at step `first`.
    pub(crate) fn new(config: &TrainConfig, steps: u64, first: u64) -> Self {
        let parameters = config.model.parameter_count().total() as f64 / 1e6;
        Self {
            title: format!("{}  {parameters:.2}M parameters", config.name),
            steps,
            began: (first, Instant::now()),
            loss: Points::new(),
            validation: Points::new(),
            last: None,
            weights: None,
            sample: None,
            lines: VecDeque::new(),
        }
    }

    /// Takes in what was measured.
    pub(crate) fn metric(&mut self, metric: &Metric) {
        match metric {
            Metric::Train(m) => {
                self.loss.push((m.step as f64, m.loss));
                self.last = Some(m.clone());
            }
            Metric::Eval(m) => self.validation.push((m.step as f64, m.val_loss)),
            Metric::Weights(m) => self.weights = Some(m.clone()),
        }
    }

    /// Takes in a sample.
    pub(crate) fn sample(&mut self, sample: &Sample) {
        self.sample = Some(sample.clone());
    }

    /// Takes in a line of text.
    pub(crate) fn line(&mut self, text: &str) {
        self.lines.extend(text.lines().map(str::to_owned));
        self.lines.drain(..self.lines.len().saturating_sub(LINES));
    }

    /// The lines that were taken in, to be left behind on the terminal.
    pub(crate) fn into_lines(self) -> impl Iterator<Item = String> {
        self.lines.into_iter()
    }

    /// Draws everything that there is room for.
    pub(crate) fn draw(&self, frame: &mut Frame<'_>) {
        let area = frame.area();
        let [head, body] =
            Layout::vertical([Constraint::Length(2), Constraint::Min(0)]).areas(area);
        self.draw_head(frame, head);
        if area.width < 60 || area.height < 20 {
            let [figures, log] =
                Layout::vertical([Constraint::Length(10), Constraint::Min(0)]).areas(body);
            self.draw_figures(frame, figures);
            self.draw_log(frame, log);
            return;
        }
        let [top, middle, bottom] =
            Layout::vertical([Constraint::Fill(5), Constraint::Fill(4), Constraint::Length(7)])
                .areas(body);
        let [curve, figures] =
            Layout::horizontal([Constraint::Min(0), Constraint::Length(28)]).areas(top);
        self.draw_loss(frame, curve);
        self.draw_figures(frame, figures);
        self.draw_weights(frame, middle);
        let [sample, log] =
            Layout::horizontal([Constraint::Fill(2), Constraint::Fill(3)]).areas(bottom);
        self.draw_sample(frame, sample);
        self.draw_log(frame, log);
    }

    fn step(&self) -> u64 {
        self.last.as_ref().map_or(self.began.0, |m| m.step)
    }

    fn draw_head(&self, frame: &mut Frame<'_>, area: Rect) {
        let [title, bar] =
            Layout::vertical([Constraint::Length(1), Constraint::Length(1)]).areas(area);
        let bold = Style::new().add_modifier(Modifier::BOLD);
        frame.render_widget(Line::styled(self.title.as_str(), bold), title);
        let keys = Line::styled("Ctrl-C: save and stop", FAINT).alignment(Alignment::Right);
        frame.render_widget(keys, title);
        let step = self.step();
        let text = format!("step {step}/{}  left {}", self.steps, self.left(step));
        let ratio = (step as f64 / self.steps.max(1) as f64).clamp(0.0, 1.0);
        frame.render_widget(Gauge::default().gauge_style(TRAIN).ratio(ratio).label(text), bar);
    }

    /// At the mean pace of this process; unknown before its first step.
    fn left(&self, step: u64) -> String {
        let (first, time) = self.began;
        match step.saturating_sub(first) {
            0 => "–".to_owned(),
            done => super::left(time, done, self.steps.saturating_sub(step)),
        }
    }

    fn draw_loss(&self, frame: &mut Frame<'_>, area: Rect) {
        let block = Block::bordered().title(" loss (nats per token) ").border_style(FAINT);
        let smoothed = smooth(&self.loss);
        let last = smoothed.last().map_or(1.0, |p| p.0);
        // The first steps, far above all others, would flatten the rest.
        let late = |p: &&(f64, f64)| p.0 >= last * 0.05;
        let all = || smoothed.iter().chain(&self.validation).filter(late).map(|p| p.1);
        let (low, high) = (all().fold(f64::INFINITY, f64::min), all().fold(0.0, f64::max));
        if !low.is_finite() {
            frame.render_widget(Paragraph::new("no step yet").block(block), area);
            return;
        }
        let room = ((high - low) * 0.05).max(1e-3);
        let (low, high) = (low - room, high + room);
        let within = |points: &Points| -> Points {
            points.iter().filter(|p| p.1 <= high).copied().collect()
        };
        let (train, validation) = (within(&smoothed), within(&self.validation));
        let set = |name, color, data| {
            let line = Dataset::default().graph_type(GraphType::Line).marker(Marker::Braille);
            line.name(name).style(color).data(data)
        };
        let sets = vec![set("training", TRAIN, &train), set("validation", VALIDATION, &validation)];
        let label = |x: f64| Span::raw(format!("{x:.2}"));
        let half = Constraint::Ratio(1, 2);
        let chart = Chart::new(sets)
            .block(block)
            .hidden_legend_constraints((half, half))
            .x_axis(
                Axis::default()
                    .style(FAINT)
                    .bounds([0.0, last.max(1.0)])
                    .labels(["0".to_owned(), format!("{last:.0}")]),
            )
            .y_axis(Axis::default().style(FAINT).bounds([low, high]).labels([
                label(low),
                label((low + high) / 2.0),
                label(high),
            ]));
        frame.render_widget(chart, area);
    }

    fn draw_figures(&self, frame: &mut Frame<'_>, area: Rect) {
        let m = self.last.as_ref();
        let of = |f: &dyn Fn(&TrainMetric) -> String| m.map_or_else(|| "–".to_owned(), f);
        let smoothed = smooth(&self.loss).last().map(|p| format!("{:.4}", p.1));
        let percent = |x: Option<f64>| x.map_or("–".into(), |x| format!("{:.2} %", x * 100.0));
        let weights = self.weights.as_ref();
        let rows = [
            ("loss", smoothed.unwrap_or_else(|| "–".into())),
            ("validation", self.validation.last().map_or("–".into(), |p| format!("{:.4}", p.1))),
            ("learning rate", of(&|m| format!("{:.2e}", m.lr))),
            ("gradient norm", of(&|m| format!("{:.3}", m.grad_norm))),
            ("tokens/s", of(&|m| format!("{:.0}", m.tokens_per_second))),
            ("waiting for data", of(&|m| format!("{:.1} ms", m.data_seconds * 1e3))),
            ("tokens", of(&|m| format!("{:.2}M", m.tokens as f64 / 1e6))),
            ("time", of(&|m| duration(m.seconds))),
            (
                "memory",
                of(&|m| {
                    let mib = |b: u64| format!("{:.0} MiB", b as f64 / f64::from(1 << 20));
                    m.rss_bytes.map_or("–".into(), mib)
                }),
            ),
            ("zero weights", percent(weights.map(|w| w.zero_share))),
            ("flip rate", percent(weights.and_then(|w| w.flip_rate))),
        ];
        let rows = rows.map(|(name, value)| {
            let value = Line::raw(value).alignment(Alignment::Right);
            Row::new([Cell::from(Span::styled(name, FAINT)), Cell::from(value)])
        });
        let table = Table::new(rows, [Constraint::Length(16), Constraint::Min(0)])
            .block(Block::bordered().title(" now ").border_style(FAINT));
        frame.render_widget(table, area);
    }

    fn draw_weights(&self, frame: &mut Frame<'_>, area: Rect) {
        let Some(w) = &self.weights else {
            let block = Block::bordered().title(" weights ").border_style(FAINT);
            frame.render_widget(Paragraph::new("not counted yet").block(block), area);
            return;
        };
        let title = match w.since {
            Some(since) => format!(" weights at step {}, flips since step {since} ", w.step),
            None => format!(" weights at step {} ", w.step),
        };
        // As many columns of layers as fit; each needs 50 cells.
        let columns = (area.width as usize / 50).clamp(1, 3);
        let rows = area.height.saturating_sub(3) as usize;
        let shown = w.layers.len().min(rows * columns);
        let more = w.layers.len() - shown;
        let title = if more > 0 { format!("{title}({more} more layers) ") } else { title };
        let block = Block::bordered().title(title).border_style(FAINT);
        let inner = block.inner(area);
        frame.render_widget(block, area);
        let areas = Layout::horizontal(vec![Constraint::Fill(1); columns]).split(inner);
        for (column, area) in areas.iter().enumerate() {
            let from = (column * rows).min(shown);
            let layers = &w.layers[from..(from + rows).min(shown)];
            if layers.is_empty() {
                continue;
            }
            let head = Row::new(["layer", "-1   0   +1", "zero", "flips"]).style(FAINT);
            let body = layers.iter().map(|l| {
                let cells = |n: u64| (l.share(n) * 12.0).round() as usize;
                let (minus, plus) = (cells(l.minus), cells(l.plus));
                let zero = 12usize.saturating_sub(minus + plus);
                let bar = Line::from(vec![
                    Span::styled("█".repeat(minus), MINUS),
                    Span::styled("░".repeat(zero), FAINT),
                    Span::styled("█".repeat(plus), PLUS),
                ]);
                let flips = l.flip_rate().map_or("–".into(), |x| format!("{:.2} %", x * 100.0));
                Row::new([
                    Cell::from(l.layer.trim_start_matches("model.layers.")),
                    Cell::from(bar),
                    Cell::from(format!("{:.1} %", l.share(l.zero) * 100.0)),
                    Cell::from(flips),
                ])
            });
            let widths = [20, 12, 7, 8].map(Constraint::Length);
            frame.render_widget(Table::new(body, widths).header(head), *area);
        }
    }

    fn draw_sample(&self, frame: &mut Frame<'_>, area: Rect) {
        let block = Block::bordered().border_style(FAINT);
        let (title, text) = match &self.sample {
            Some(s) => {
                let prompt = Span::styled(s.prompt.as_str(), Style::new().fg(VALIDATION));
                let text = s.text.replace('\n', "⏎ ");
                (format!(" sample at step {} ", s.step), Line::from(vec![prompt, Span::raw(text)]))
            }
            None => (" sample ".to_owned(), Line::raw("none yet")),
        };
        let paragraph = Paragraph::new(text).wrap(Wrap { trim: false }).block(block.title(title));
        frame.render_widget(paragraph, area);
    }

    fn draw_log(&self, frame: &mut Frame<'_>, area: Rect) {
        let rows = area.height.saturating_sub(2) as usize;
        let first = self.lines.len().saturating_sub(rows);
        let lines: Vec<Line<'_>> =
            self.lines.iter().skip(first).map(|l| l.as_str().into()).collect();
        let block = Block::bordered().title(" log ").border_style(FAINT);
        frame.render_widget(Paragraph::new(lines).block(block), area);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::tests::small;
    use crate::metrics::{EvalMetric, LayerWeights};
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    fn text(dashboard: &Dashboard, width: u16, height: u16) -> String {
        let mut terminal = Terminal::new(TestBackend::new(width, height)).unwrap();
        terminal.draw(|frame| dashboard.draw(frame)).unwrap();
        let buffer = terminal.backend().buffer().clone();
        let rows = buffer.content.chunks(width as usize);
        rows.map(|row| row.iter().map(|c| c.symbol()).collect::<String>() + "\n").collect()
    }

    fn full() -> Dashboard {
        let mut d = Dashboard::new(&small(std::path::Path::new("x")), 100, 0);
        for step in 1..=50 {
            d.metric(&Metric::Train(TrainMetric {
                step,
                loss: 3.25,
                lr: 4.5e-3,
                grad_norm: 0.625,
                tokens: step * 128_000,
                tokens_per_second: 4321.0,
                seconds: step as f64,
                data_seconds: 0.0125,
                rss_bytes: Some(777 << 20),
            }));
        }
        let (val_loss, tokens) = (3.5625, 1);
        d.metric(&Metric::Eval(EvalMetric { step: 50, val_loss, tokens, seconds: 50.0 }));
        let layer = |i: u64| LayerWeights {
            layer: format!("model.layers.{i}.mlp.up_proj"),
            weights: 1000,
            minus: 250 + i,
            zero: 500 - i,
            plus: 250,
            flips: Some(12 + i),
        };
        let layers = (0..4).map(layer).collect();
        d.metric(&Metric::Weights(WeightMetric::new((50, 1, 1.0), Some(25), layers)));
        d.sample(&Sample { step: 50, prompt: "the cat".into(), text: " sat\non a mat".into() });
        d.line("step 50: validation loss 3.5625 nats per token");
        d
    }

    /// With one space where there are several.
    fn one_spaced(text: &str) -> String {
        text.split_whitespace().collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn the_figures_are_on_the_screen() {
        let screen = text(&full(), 120, 36);
        for part in [
            "small 0.11M parameters",
            "step 50/100",
            "loss 3.2500",
            "validation 3.5625",
            "learning rate 4.50e-3",
            "gradient norm 0.625",
            "tokens/s 4321",
            "waiting for data 12.5 ms",
            "6.40M",
            "777 MiB",
            "flips since step 25",
            "0.mlp.up_proj",
            "███░░░░░░███",
            "50.0 %",
            "1.20 %",
            "sample at step 50",
            "the cat sat⏎ on a mat",
            "step 50: validation loss 3.5625",
            "training",
        ] {
            assert!(one_spaced(&screen).contains(part), "{part}:\n{screen}");
        }
    }

    #[test]
    fn any_size_and_any_state_can_be_drawn() {
        let empty = Dashboard::new(&small(std::path::Path::new("x")), 0, 0);
        let mut diverged = full();
        let Some(Metric::Train(last)) = diverged.last.clone().map(Metric::Train) else {
            panic!("it has a step")
        };
        diverged.metric(&Metric::Train(TrainMetric { loss: f64::MAX, step: 51, ..last }));
        for dashboard in [&empty, &full(), &diverged] {
            for (width, height) in [(1, 1), (20, 5), (59, 19), (60, 20), (80, 24), (300, 100)] {
                let _ = text(dashboard, width, height);
            }
        }
        assert!(text(&empty, 80, 24).contains("no step yet"));
        assert!(text(&full(), 80, 20).contains("(2 more layers)"), "{}", text(&full(), 80, 20));
        assert!(text(&full(), 50, 15).contains("3.5625"));
    }

    #[test]
    fn old_lines_are_dropped() {
        let mut d = full();
        for i in 0..2 * LINES {
            d.line(&format!("a {i}\nb {i}"));
        }
        let lines: Vec<String> = d.into_lines().collect();
        assert_eq!((lines.len(), lines[LINES - 1].as_str()), (LINES, "b 1999"));
    }
}
