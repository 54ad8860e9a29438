//! The plan as text, at most 100 columns wide.

use std::fmt::Write;

use super::{Bound, Form, Largest, Plan, Predicted, TrainingPlan, TrainingTime, training_speed};

impl Plan {
    /// The plan for people.
    #[must_use]
    pub fn table(&self) -> String {
        let mut out = String::new();
        // Writing to a string cannot fail.
        let _ = self.write(&mut out);
        out
    }

    fn write(&self, out: &mut String) -> std::fmt::Result {
        let p = &self.parameters;
        writeln!(out, "{}: {} parameters", self.name, count(self.total_parameters))?;
        for (name, n) in [
            ("linear layers", p.linear),
            ("embedding", p.embedding),
            ("head", p.head),
            ("norms", p.norms),
        ] {
            writeln!(out, "  {name:14}  {:>10}", count(n))?;
        }
        writeln!(out, "\npacked file    total       linear      embedding   head        the rest")?;
        for file in &self.files {
            let rest = file.parts.norms + file.parts.metadata;
            let parts =
                [file.bytes, file.parts.linear, file.parts.embedding, file.parts.head, rest];
            let parts = parts.map(|b| format!("{:<10}", bytes(b))).join("  ");
            let mark = if file.form == self.form { "*" } else { "" };
            writeln!(out, "  {:11}  {}", format!("{}{mark}", file.form), parts.trim_end())?;
        }
        self.write_run(out)?;
        self.write_speed(out)?;
        if let Some(training) = &self.training {
            self.write_training(out, training)?;
        }
        if let Some(largest) = &self.largest {
            writeln!(out)?;
            self.write_largest(out, largest)?;
        }
        Ok(())
    }

    fn write_run(&self, out: &mut String) -> std::fmt::Result {
        let (run, parts) = (&self.run, &self.run.parts);
        let each = if run.sequences == 1 { "" } else { " each" };
        writeln!(
            out,
            "\nmemory of {} sequence{} of {} tokens{each}, {}: {}",
            run.sequences,
            if run.sequences == 1 { "" } else { "s" },
            run.context,
            self.form,
            bytes(run.bytes)
        )?;
        for (name, n) in [
            ("file", parts.file),
            ("keys, values", parts.kv_cache),
            ("buffers", parts.buffers),
            ("repacked", parts.repacked),
            ("program", parts.program),
        ] {
            if n > 0 {
                writeln!(out, "  {name:14}  {:>10}", bytes(n))?;
            }
        }
        match self.available_bytes {
            Some(n) => writeln!(out, "  {:14}  {:>10}", "(available)", bytes(n)),
            None => writeln!(out, "  {:14}  {:>10}", "(available)", "unknown"),
        }
    }

    fn write_speed(&self, out: &mut String) -> std::fmt::Result {
        let machine = &self.machine;
        let read = machine.read_at(self.decode_bytes());
        writeln!(
            out,
            "\nspeed with {} thread{}, {}: reads {read:.1} GB/s, int8 {:.0} GOP/s, \
             float {:.0} GFLOP/s",
            machine.threads,
            if machine.threads == 1 { "" } else { "s" },
            machine.isa,
            machine.int8_gop_per_second,
            machine.float_peak_gflop_per_second,
        )?;
        writeln!(
            out,
            "                  tokens/s   linear     head       attention  elementwise  threads"
        )?;
        let mut line = |name: String, predicted: &Predicted| {
            let s = &predicted.seconds;
            let parts = [s.linear, s.head, s.attention, s.elementwise, s.threads];
            let total = s.total();
            let share = |part: f64| format!("{:<9}", format!("{:.0} %", 100.0 * part / total));
            let parts = parts.map(share).join("  ");
            let speed = short(predicted.tokens_per_second);
            writeln!(out, "  {name:14}  {speed:>8}   {}", parts.trim_end())
        };
        line(format!("prefill {}", self.prefill.tokens), &self.prefill)?;
        line(format!("decode {}", self.decode.tokens), &self.decode)?;
        line(format!("behind {}", self.decode_full.tokens), &self.decode_full)
    }

    /// Bytes that a decoded token reads of the weights.
    fn decode_bytes(&self) -> f64 {
        let file = self.files.iter().find(|f| f.form == self.form);
        file.map_or(0.0, |f| {
            let head = if f.parts.head > 0 { f.parts.head } else { f.parts.embedding };
            (f.parts.linear + head) as f64
        })
    }

    fn write_training(&self, out: &mut String, t: &TrainingPlan) -> std::fmt::Result {
        writeln!(
            out,
            "\ntraining, {} at once: {} at the peak, in the {}",
            match t.micro_batch {
                1 => "1 sequence".to_owned(),
                n => format!("{n} sequences"),
            },
            bytes(t.memory_bytes),
            t.peak_in
        )?;
        let m = &t.memory;
        for (name, n) in [
            ("weights", m.weights),
            ("gradients", m.gradients),
            ("optimizer", m.optimizer),
            ("activations", m.activations),
            ("head, logits", m.head),
            ("checkpoint", m.checkpoint),
        ] {
            writeln!(out, "  {name:14}  {:>10}", bytes(n))?;
        }
        if t.distills {
            writeln!(out, "  without the teacher, which bitnet-train --dry-run counts")?;
        }
        writeln!(
            out,
            "  on disk         {:>10}  a checkpoint: {} of weights, {} of the optimizer",
            bytes(t.checkpoint_weights_bytes + t.checkpoint_optimizer_bytes),
            bytes(t.checkpoint_weights_bytes),
            bytes(t.checkpoint_optimizer_bytes),
        )?;
        let how = if t.stated { "stated" } else { "predicted" };
        writeln!(
            out,
            "  {} tokens at {} tokens/s: {} ({} a token, {:.3} TFLOP/s {how})",
            count(t.tokens),
            short(t.tokens_per_second),
            duration(t.seconds),
            flop(t.flop_per_token),
            t.flop_per_second * 1e-12,
        )?;
        match &t.token_seconds {
            Some(time) => self.write_training_time(out, time),
            None => Ok(()),
        }
    }

    /// Where a training token's time goes, and what that rests on.
    fn write_training_time(&self, out: &mut String, time: &TrainingTime) -> std::fmt::Result {
        let share =
            |part: (&str, f64)| format!("{} {:.0} %", part.0, 100.0 * part.1 / time.total());
        let parts = time.parts().map(share);
        let machine = &self.machine;
        writeln!(out, "    {}", parts[..4].join(", "))?;
        writeln!(out, "    {}", parts[4..].join(", "))?;
        writeln!(
            out,
            "  assumed: on this CPU alone; gradients of inputs at {:.0}, of weights at {:.0} GFLOP/s as \
             floats,\n  at {:.0} in fixed point, products with int8 at {:.0} GOP/s, as measured, and \
             {:.0} % longer in a\n  step; attention at {} of its kernel's rate forward and {} of the \
             first backward; elementwise\n  work {} times the forward pass's; no time for evaluation \
             and checkpoints",
            machine.input_gradient_gflop_per_second,
            machine.weight_gradient_gflop_per_second,
            machine.fixed_weight_gradient_gflop_per_second,
            2.0 * machine.linear.panel_gmac_per_second,
            100.0 * (time.longer - 1.0),
            training_speed::ATTENTION_FORWARD,
            training_speed::ATTENTION_BACKWARD,
            training_speed::ELEMENTWISE,
        )
    }

    fn write_largest(&self, out: &mut String, largest: &Largest) -> std::fmt::Result {
        let target = short(largest.target_tokens_per_second);
        let Some(model) = &largest.model else {
            let why = match largest.bound {
                Bound::Speed => "too slow",
                Bound::Memory => "too large for the memory",
                Bound::Shape => "impossible",
            };
            return writeln!(
                out,
                "at {target} tokens/s: no model of these proportions, the smallest is {why}"
            );
        };
        writeln!(
            out,
            "largest model of these proportions at {target} tokens/s or more: {} parameters",
            count(largest.parameters)
        )?;
        writeln!(
            out,
            "  hidden {}, ffn {}, {} layers, {} heads, {} key/value heads, vocabulary {}",
            model.hidden_size,
            model.intermediate_size,
            model.num_hidden_layers,
            model.num_attention_heads,
            model.num_key_value_heads,
            model.vocab_size,
        )?;
        let bound = match largest.bound {
            Bound::Speed => "a larger one is slower",
            Bound::Memory => "a larger one does not fit the memory",
            Bound::Shape => "no larger one can be made",
        };
        writeln!(
            out,
            "  decodes {} tokens/s in {} of memory as {}; {bound}",
            short(largest.tokens_per_second),
            bytes(largest.bytes),
            Form::name(self.form),
        )
    }
}

/// Three digits.
fn short(x: f64) -> String {
    match x {
        x if x >= 99.95 => format!("{x:.0}"),
        x if x >= 9.995 => format!("{x:.1}"),
        x => format!("{x:.2}"),
    }
}

fn count(n: u64) -> String {
    match n as f64 {
        x if x >= 1e12 => format!("{}T", short(x * 1e-12)),
        x if x >= 1e9 => format!("{}B", short(x * 1e-9)),
        x if x >= 1e6 => format!("{}M", short(x * 1e-6)),
        x if x >= 1e4 => format!("{}k", short(x * 1e-3)),
        _ => n.to_string(),
    }
}

fn bytes(n: u64) -> String {
    match n as f64 {
        x if x >= 1e12 => format!("{} TB", short(x * 1e-12)),
        x if x >= 1e9 => format!("{} GB", short(x * 1e-9)),
        x if x >= 1e6 => format!("{} MB", short(x * 1e-6)),
        x if x >= 1e3 => format!("{} kB", short(x * 1e-3)),
        _ => format!("{n} B"),
    }
}

fn flop(n: f64) -> String {
    match n {
        n if n >= 1e12 => format!("{} TFLOP", short(n * 1e-12)),
        n if n >= 1e9 => format!("{} GFLOP", short(n * 1e-9)),
        n => format!("{} MFLOP", short(n * 1e-6)),
    }
}

fn duration(seconds: f64) -> String {
    const DAY: f64 = 86_400.0;
    match seconds {
        s if s < 120.0 => format!("{} s", short(s)),
        s if s < 7200.0 => format!("{} minutes", short(s / 60.0)),
        s if s < 2.0 * DAY => format!("{} hours", short(s / 3600.0)),
        s if s < 1000.0 * DAY => format!("{} days", short(s / DAY)),
        s => format!("{} years", short(s / (365.25 * DAY))),
    }
}
