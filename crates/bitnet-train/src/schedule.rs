//! The learning rate and weight decay of each step: pure functions of the step.
//!
//! Ternary models train best with two lines: half-way the rate drops from a line
//! that starts at `lr` to a lower one that starts at `lr_stage2`, and weight decay
//! ends ("The Era of 1-bit LLMs: Training Tips, Code and FAQ", Table 2).

use serde::{Deserialize, Serialize};

use crate::TrainError;

/// The course of the learning rate after warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ScheduleKind {
    /// Two lines towards `lr_min`: the first as if from `lr`, from
    /// `stage2_at · steps` on the second, as if from `lr_stage2`.
    TwoStage,
    /// One line from `lr` to `lr_min`.
    Linear,
    /// `lr` throughout.
    Constant,
}

/// The `[schedule]` table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScheduleConfig {
    /// The course of the learning rate.
    pub kind: ScheduleKind,
    /// Steps of the whole run.
    pub steps: u64,
    /// Steps over which the rate rises from `lr / warmup_steps` to `lr`.
    pub warmup_steps: u64,
    /// The highest rate.
    pub lr: f64,
    /// Where the line of the second stage starts (two-stage only).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lr_stage2: Option<f64>,
    /// Where the lines end, one step after the last (not with constant).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lr_min: Option<f64>,
    /// Share of the steps after which the second stage begins (two-stage only).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stage2_at: Option<f64>,
    /// Decoupled weight decay, multiplied by the rate; of the first stage.
    pub weight_decay: f64,
    /// The same of the second stage (two-stage only).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weight_decay_stage2: Option<f64>,
}

/// What the optimizer is told for one step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rates {
    /// The learning rate.
    pub lr: f64,
    /// Decoupled weight decay; a step shrinks a matrix by `lr · weight_decay`.
    pub weight_decay: f64,
}

impl ScheduleConfig {
    /// The rates of the step that follows `step` complete ones.
    #[must_use]
    pub fn rates(&self, step: u64) -> Rates {
        let second = self.kind == ScheduleKind::TwoStage && step >= self.stage2_step();
        let peak = if second { self.lr_stage2.unwrap_or(self.lr) } else { self.lr };
        let weight_decay = if second {
            self.weight_decay_stage2.unwrap_or(self.weight_decay)
        } else {
            self.weight_decay
        };
        let lr = if step < self.warmup_steps {
            peak * (step + 1) as f64 / self.warmup_steps as f64
        } else if self.kind == ScheduleKind::Constant {
            peak
        } else {
            let end = self.lr_min.unwrap_or(0.0);
            // Past the last step (a run that is made longer than its schedule
            // never is, but the function is total) the rate stays at its end.
            let left = self.steps.saturating_sub(step) as f64;
            let line = self.steps.saturating_sub(self.warmup_steps).max(1) as f64;
            end + (peak - end) * left / line
        };
        Rates { lr, weight_decay }
    }

    /// Complete steps after which the second stage begins.
    #[must_use]
    pub fn stage2_step(&self) -> u64 {
        (self.steps as f64 * self.stage2_at.unwrap_or(1.0)).floor() as u64
    }

    /// Checks that the values go together. A warm-up longer than the run is
    /// allowed: `--steps 1` tries the first step of a long one.
    ///
    /// # Errors
    /// The first key whose value cannot be used.
    pub fn validate(&self) -> Result<(), TrainError> {
        if self.steps == 0 {
            return Err(TrainError::value("schedule.steps", 0, "must be at least 1"));
        }
        let two = self.kind == ScheduleKind::TwoStage;
        let line = self.kind != ScheduleKind::Constant;
        let keys = [
            ("schedule.lr", Some(self.lr), true, 0.0, 10.0),
            ("schedule.lr_stage2", self.lr_stage2, two, 0.0, 10.0),
            ("schedule.lr_min", self.lr_min, line, 0.0, 10.0),
            ("schedule.stage2_at", self.stage2_at, two, 0.0, 1.0),
            ("schedule.weight_decay", Some(self.weight_decay), true, 0.0, 10.0),
            ("schedule.weight_decay_stage2", self.weight_decay_stage2, two, 0.0, 10.0),
        ];
        for (key, value, needed, low, high) in keys {
            match (value, needed) {
                (None, true) => {
                    let reason = format!("is needed by schedule.kind = {}", self.kind_name());
                    return Err(TrainError::value(key, "(absent)", reason));
                }
                (Some(v), false) => {
                    let reason = format!("has no use with schedule.kind = {}", self.kind_name());
                    return Err(TrainError::value(key, v, reason));
                }
                (Some(v), true) if !(v >= low && v <= high) => {
                    let reason = format!("must be between {low} and {high}");
                    return Err(TrainError::value(key, v, reason));
                }
                _ => {}
            }
        }
        if self.lr_min.is_some_and(|end| end > self.lr) {
            let reason = format!("is greater than schedule.lr = {}", self.lr);
            return Err(TrainError::value("schedule.lr_min", self.lr_min.unwrap_or(0.0), reason));
        }
        Ok(())
    }

    fn kind_name(&self) -> &'static str {
        match self.kind {
            ScheduleKind::TwoStage => "two-stage",
            ScheduleKind::Linear => "linear",
            ScheduleKind::Constant => "constant",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn two_stage() -> ScheduleConfig {
        ScheduleConfig {
            kind: ScheduleKind::TwoStage,
            steps: 10,
            warmup_steps: 2,
            lr: 8.0,
            lr_stage2: Some(4.0),
            lr_min: Some(0.0),
            stage2_at: Some(0.5),
            weight_decay: 0.1,
            weight_decay_stage2: Some(0.0),
        }
    }

    #[test]
    fn two_lines_step_by_step() {
        let schedule = two_stage();
        schedule.validate().unwrap();
        // Warm-up 4, 8; then 8 · left / 8 with left = 8, 7, 6; then 4 · left / 8.
        let lr = [4.0, 8.0, 8.0, 7.0, 6.0, 2.5, 2.0, 1.5, 1.0, 0.5];
        for (step, &lr) in lr.iter().enumerate() {
            let rates = schedule.rates(step as u64);
            let weight_decay = if step < 5 { 0.1 } else { 0.0 };
            assert_eq!(rates, Rates { lr, weight_decay }, "step {step}");
        }
        assert_eq!(schedule.rates(10).lr, 0.0);
    }

    #[test]
    fn one_line_and_constant() {
        let linear = ScheduleConfig {
            kind: ScheduleKind::Linear,
            lr_stage2: None,
            stage2_at: None,
            weight_decay_stage2: None,
            warmup_steps: 0,
            steps: 4,
            lr_min: Some(4.0),
            ..two_stage()
        };
        linear.validate().unwrap();
        let lr: Vec<f64> = (0..4).map(|s| linear.rates(s).lr).collect();
        assert_eq!(lr, [8.0, 7.0, 6.0, 5.0]);
        let constant = ScheduleConfig {
            kind: ScheduleKind::Constant,
            lr_min: None,
            warmup_steps: 2,
            ..linear
        };
        constant.validate().unwrap();
        let lr: Vec<f64> = (0..4).map(|s| constant.rates(s).lr).collect();
        assert_eq!(lr, [4.0, 8.0, 8.0, 8.0]);
        assert_eq!(constant.rates(3).weight_decay, 0.1);
    }

    #[test]
    fn a_warm_up_longer_than_the_run_is_cut_short() {
        let schedule = ScheduleConfig { steps: 1, warmup_steps: 375, ..two_stage() };
        schedule.validate().unwrap();
        // Step 0 is past half of one step, floor(0.5) = 0: the second stage.
        assert_eq!(schedule.rates(0).lr, 4.0 / 375.0);
    }

    #[test]
    fn errors_name_the_key() {
        let cases = [
            (ScheduleConfig { steps: 0, ..two_stage() }, "schedule.steps = 0"),
            (ScheduleConfig { lr: -1.0, ..two_stage() }, "schedule.lr = -1"),
            (ScheduleConfig { lr: f64::NAN, ..two_stage() }, "schedule.lr = NaN"),
            (ScheduleConfig { lr_stage2: None, ..two_stage() }, "schedule.lr_stage2 = (absent)"),
            (ScheduleConfig { lr_min: Some(9.0), ..two_stage() }, "schedule.lr_min = 9"),
            (ScheduleConfig { stage2_at: Some(1.5), ..two_stage() }, "schedule.stage2_at = 1.5"),
            (
                ScheduleConfig { kind: ScheduleKind::Linear, ..two_stage() },
                "schedule.lr_stage2 = 4: has no use",
            ),
            (
                ScheduleConfig { kind: ScheduleKind::Constant, lr_stage2: None, ..two_stage() },
                "schedule.lr_min = 0: has no use",
            ),
        ];
        for (schedule, message) in cases {
            let error = schedule.validate().unwrap_err().to_string();
            assert!(error.starts_with(message), "{error}");
        }
    }
}
