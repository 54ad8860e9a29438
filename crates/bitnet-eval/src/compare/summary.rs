//! What a reader should remember: a sentence for all models, and one for each.

use super::{Comparison, Figures, Quality, short};

/// How much worse than the first a model may read to be called about as good.
const ABOUT_AS_GOOD: f64 = 0.05;

impl Comparison {
    /// The whole comparison in a sentence: the fastest model that reads about as well as
    /// the first, or that there is none; without a text the fastest one.
    pub(super) fn summary(&self) -> String {
        let first = &self.models[0];
        let others: Vec<usize> = (1..self.models.len()).collect();
        let speed = |i: &usize| self.models[*i].decode.median;
        let fastest =
            |of: &[usize]| of.iter().copied().max_by(|a, b| speed(a).total_cmp(&speed(b)));
        let story = |i: usize| {
            let m = &self.models[i];
            let speed = match times(m.decode.median, first.decode.median) {
                None => format!("as fast as {}", first.label),
                Some((x, true)) => format!("{x}× faster than {}", first.label),
                Some((x, false)) => format!("{x}× slower than {}", first.label),
            };
            let file = match times(m.file_bytes as f64, first.file_bytes as f64) {
                None => "a file of the same size".to_owned(),
                Some((x, true)) => format!("a file {x}× larger"),
                Some((x, false)) => format!("a file {x}× smaller"),
            };
            format!("{} decodes {speed}, from {file}", m.label)
        };
        let Some(fastest_of_all) = fastest(&others) else { return String::new() };
        let changes: Vec<(usize, f64)> =
            others.iter().filter_map(|&i| Some((i, self.change(&self.models[i])?))).collect();
        let Some((name, _)) = self.quality(first.quality) else {
            return format!("{}.", story(fastest_of_all));
        };
        let good: Vec<usize> =
            changes.iter().filter(|(_, c)| *c <= ABOUT_AS_GOOD).map(|(i, _)| *i).collect();
        let change = |i: usize| {
            let found = changes.iter().find(|(of, _)| *of == i);
            found.map_or(String::new(), |(_, c)| told(name, *c))
        };
        match fastest(&good) {
            Some(i) => format!("{}, at {}.", story(i), change(i)),
            None => format!(
                "No other model has {name} within {:.0} % of {}; the fastest, {}, has {}.",
                100.0 * ABOUT_AS_GOOD,
                first.label,
                self.models[fastest_of_all].label,
                change(fastest_of_all),
            ),
        }
    }

    /// What a reader should remember of a model beside the first.
    pub(super) fn sentence(&self, model: usize) -> String {
        let (first, m) = (&self.models[0], &self.models[model]);
        let speed = |own: f64, first: f64| against(own, first, "slower", "faster");
        let mut parts = vec![
            format!(
                "file {}",
                against(m.file_bytes as f64, first.file_bytes as f64, "smaller", "larger")
            ),
            format!("decodes {}", speed(m.decode.median, first.decode.median)),
            format!("prefills {}", speed(m.prefill.median, first.prefill.median)),
        ];
        if let (Some(a), Some(b)) = (first.joules_per_decode_token, m.joules_per_decode_token)
            && a > 0.0
            && b > 0.0
        {
            parts.push(format!("energy per token {}", against(b, a, "less", "more")));
        }
        if let (Some((name, _)), Some(change)) = (self.quality(m.quality), self.change(m)) {
            parts.push(told(name, change));
        }
        parts.join(", ")
    }

    /// The figure of quality that compares between these models.
    fn quality(&self, quality: Option<Quality>) -> Option<(&'static str, f64)> {
        match self.conditions.one_tokenizer {
            true => quality.map(|q| ("perplexity", q.perplexity)),
            false => Some(("bits per byte", quality?.bits_per_byte?)),
        }
    }

    /// How much higher, so worse, it is than the first's, as a share of that.
    fn change(&self, model: &Figures) -> Option<f64> {
        let (_, own) = self.quality(model.quality)?;
        let (_, first) = self.quality(self.models[0].quality)?;
        Some(own / first - 1.0)
    }
}

/// A change of a figure of quality, in words.
fn told(name: &str, change: f64) -> String {
    match change {
        c if c.abs() < 5e-4 => format!("the same {name}"),
        c if c < 0.0 => format!("{:.1} % lower {name}", -100.0 * c),
        c if c < 9.995 => format!("{:.1} % higher {name}", 100.0 * c),
        c => format!("{}× the {name}", short(c + 1.0)),
    }
}

/// How many times larger a value is than the first's, or smaller (`false`); none where
/// both are about the same.
fn times(value: f64, first: f64) -> Option<(String, bool)> {
    match value / first {
        r if (r - 1.0).abs() < 0.005 => None,
        r if r < 1.0 => Some((short(1.0 / r), false)),
        r => Some((short(r), true)),
    }
}

/// That in words.
fn against(value: f64, first: f64, less: &str, more: &str) -> String {
    match times(value, first) {
        None => "the same".to_owned(),
        Some((x, larger)) => format!("{x}× {}", if larger { more } else { less }),
    }
}
