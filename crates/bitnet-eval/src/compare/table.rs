//! The comparison as Markdown: a row a figure, a column a model.

use super::Comparison;

impl Comparison {
    /// The table, its conditions and a sentence for each model but the first.
    #[must_use]
    pub fn table(&self) -> String {
        let mut out = String::from("| |");
        for model in &self.models {
            out += &format!(" {} |", cell(&model.label));
        }
        out += &format!("\n|---|{}\n", "---|".repeat(self.models.len()));
        let forms: Vec<&str> = self.models.iter().map(|m| m.form.as_str()).collect();
        out += &format!("| linear weights | {} |\n", forms.join(" | "));
        for metric in self.metrics() {
            out += &format!("| {} |", cell(&metric.name));
            for (i, value) in metric.values.iter().enumerate() {
                let Some(value) = value else {
                    out += " - |";
                    continue;
                };
                let mut text = (metric.text)(*value);
                if metric.is_best(*value) {
                    text = format!("**{text}**");
                }
                if let Some(ratio) = metric.ratio(i) {
                    text += &format!(" ({}×)", super::short(ratio));
                }
                out += &format!(" {text} |");
            }
            out.push('\n');
        }
        out += &format!("\n{}.\n", self.conditions_text());
        if let Some(energy) = &self.energy {
            out += &format!("{}.\n", capitalised(&energy.to_string()));
        }
        out += &format!("{}\n", self.summary());
        for (i, model) in self.models.iter().enumerate().skip(1) {
            let first = &self.models[0].label;
            out += &format!("{} against {first}: {}.\n", model.label, self.sentence(i));
        }
        out
    }

    /// What was the same for all.
    pub(super) fn conditions_text(&self) -> String {
        let c = &self.conditions;
        let threads = if c.threads == 1 { "thread" } else { "threads" };
        let mut text = format!(
            "{}, {} {threads}, kv {}; a prompt of {} tokens, {} decoded one by one, medians of {} \
             rounds in turn; memory of a process of its own; in brackets: against the first",
            c.isa, c.threads, c.kv, c.prompt, c.generate, c.repeats
        );
        if let (Some(name), Some(mode), Some(tokens)) = (&c.text, &c.mode, c.tokens) {
            let context = c.context.map_or(String::new(), |n| format!(", context {n}"));
            text += &format!("; {tokens} tokens of {name}, mode {mode}{context}");
            if !c.one_tokenizer {
                text += " (tokenizers differ: only bits per byte compare)";
            }
        }
        text
    }
}

/// With a capital letter in front.
pub(super) fn capitalised(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or(String::new(), |c| c.to_uppercase().collect::<String>() + chars.as_str())
}

/// What a cell can hold.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('\n', " ")
}
