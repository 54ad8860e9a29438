//! The learning rate and weight decay of each step: pure functions of the step.
//!
//! Ternary models train best with two lines: half-way the rate drops from a line
//! that starts at `lr` to a lower one that starts at `lr_stage2`, and weight decay
//! ends ("The Era of 1-bit LLMs: Training Tips, Code and FAQ", Table 2). BitNet
//! b1.58 2B4T does the same with two cosines (arXiv:2504.12285, section 3.1).
//!
//! Every course begins with a warm-up: step s of w has the rate `(s + 1) / w` of
//! the highest one, so the first step is taken and the w-th has all of it.

use std::f64::consts::PI;

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
    /// Half a cosine from `lr` to `lr_min` (arXiv:1608.03983, one period).
    Cosine,
    /// Warm-up, stable, decay (arXiv:2404.06395): `lr` until `decay_at · steps`,
    /// from there to `lr_min` in the form of `decay`.
    Wsd,
    /// A cosine from `lr` over the whole run, left at `stage2_at · steps` for a
    /// second one from `lr_stage2` that begins there; both end at `lr_min`.
    /// Weight decay is constant in each stage.
    TwoStageCosine,
}

/// How the rate of [`ScheduleKind::Wsd`] decays; u in 0..1 is the share of the
/// decay that is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Decay {
    /// `1 - u`.
    Linear,
    /// `1 - √u` (arXiv:2405.18392).
    #[serde(rename = "1-sqrt")]
    OneMinusSqrt,
}

impl Decay {
    fn name(self) -> &'static str {
        match self {
            Self::Linear => "linear",
            Self::OneMinusSqrt => "1-sqrt",
        }
    }

    fn left(self, done: f64) -> f64 {
        match self {
            Self::Linear => 1.0 - done,
            Self::OneMinusSqrt => 1.0 - done.sqrt(),
        }
    }
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
    /// Where the second stage starts (two stages only).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lr_stage2: Option<f64>,
    /// Where the course ends, one step after the last (not with constant).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lr_min: Option<f64>,
    /// Share of the steps after which the second stage begins (two stages only).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stage2_at: Option<f64>,
    /// Share of the steps after which the decay begins (wsd only).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decay_at: Option<f64>,
    /// The form of the decay: "linear" or "1-sqrt" (wsd only).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub decay: Option<Decay>,
    /// Decoupled weight decay, multiplied by the rate; of the first stage.
    pub weight_decay: f64,
    /// The same of the second stage (two stages only).
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
        let second = self.two_stages() && step >= self.stage2_step();
        let (peak, weight_decay) = if second {
            let decay = self.weight_decay_stage2.unwrap_or(self.weight_decay);
            (self.lr_stage2.unwrap_or(self.lr), decay)
        } else {
            (self.lr, self.weight_decay)
        };
        if step < self.warmup_steps {
            let lr = peak * (step + 1) as f64 / self.warmup_steps as f64;
            return Rates { lr, weight_decay };
        }
        let end = self.lr_min.unwrap_or(0.0);
        let cosine = |done: f64| 0.5 * (1.0 + (PI * done).cos());
        let left = match self.kind {
            ScheduleKind::Constant => return Rates { lr: peak, weight_decay },
            ScheduleKind::TwoStage | ScheduleKind::Linear => {
                self.steps_left(step) / self.steps_from(0)
            }
            ScheduleKind::Cosine => cosine(self.done(step, 0)),
            ScheduleKind::Wsd => {
                let decay = self.decay.unwrap_or(Decay::Linear);
                decay.left(self.done(step, self.decay_step()))
            }
            ScheduleKind::TwoStageCosine => {
                cosine(self.done(step, if second { self.stage2_step() } else { 0 }))
            }
        };
        Rates { lr: end + (peak - end) * left, weight_decay }
    }

    fn two_stages(&self) -> bool {
        matches!(self.kind, ScheduleKind::TwoStage | ScheduleKind::TwoStageCosine)
    }

    /// Past the last step (a run that is made longer than its schedule never is,
    /// but the function is total) nothing is left and the rate stays at its end.
    fn steps_left(&self, step: u64) -> f64 {
        self.steps.saturating_sub(step) as f64
    }

    /// Steps from `start`, or the end of the warm-up if that is later, to the end.
    fn steps_from(&self, start: u64) -> f64 {
        self.steps.saturating_sub(start.max(self.warmup_steps)).max(1) as f64
    }

    /// The share of [`Self::steps_from`] `start` that is done; 0 before it.
    fn done(&self, step: u64, start: u64) -> f64 {
        let from = step.saturating_sub(start.max(self.warmup_steps));
        (from as f64 / self.steps_from(start)).min(1.0)
    }

    /// Complete steps after which the second stage begins.
    #[must_use]
    pub fn stage2_step(&self) -> u64 {
        self.share(self.stage2_at)
    }

    /// Complete steps after which the decay begins.
    #[must_use]
    pub fn decay_step(&self) -> u64 {
        self.share(self.decay_at)
    }

    fn share(&self, at: Option<f64>) -> u64 {
        (self.steps as f64 * at.unwrap_or(1.0)).floor() as u64
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
        let two = self.two_stages();
        let falls = self.kind != ScheduleKind::Constant;
        let wsd = self.kind == ScheduleKind::Wsd;
        let keys = [
            ("schedule.lr", Some(self.lr), true, 0.0, 10.0),
            ("schedule.lr_stage2", self.lr_stage2, two, 0.0, 10.0),
            ("schedule.lr_min", self.lr_min, falls, 0.0, 10.0),
            ("schedule.stage2_at", self.stage2_at, two, 0.0, 1.0),
            ("schedule.decay_at", self.decay_at, wsd, 0.0, 1.0),
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
        match self.decay {
            None if wsd => {
                let reason = "is needed by schedule.kind = wsd: linear or 1-sqrt";
                return Err(TrainError::value("schedule.decay", "(absent)", reason));
            }
            Some(decay) if !wsd => {
                let reason = format!("has no use with schedule.kind = {}", self.kind_name());
                return Err(TrainError::value("schedule.decay", decay.name(), reason));
            }
            _ => {}
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
            ScheduleKind::Cosine => "cosine",
            ScheduleKind::Wsd => "wsd",
            ScheduleKind::TwoStageCosine => "two-stage-cosine",
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
            decay_at: None,
            decay: None,
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

    /// One stage that falls from 8 to 0 over 8 steps after 2 of warm-up.
    fn one_stage(kind: ScheduleKind) -> ScheduleConfig {
        ScheduleConfig {
            kind,
            lr_stage2: None,
            stage2_at: None,
            weight_decay_stage2: None,
            ..two_stage()
        }
    }

    fn course(schedule: &ScheduleConfig) -> Vec<f64> {
        schedule.validate().unwrap();
        (0..schedule.steps).map(|s| schedule.rates(s).lr).collect()
    }

    /// Cosines of multiples of π/4 and π/6 are within an ULP or two of the exact
    /// values; the rates are of order 10.
    fn assert_close(found: &[f64], exact: &[f64]) {
        assert_eq!(found.len(), exact.len());
        for (step, (a, b)) in found.iter().zip(exact).enumerate() {
            assert!((a - b).abs() < 1e-14, "step {step}: {a} and {b}");
        }
    }

    #[test]
    fn a_cosine_step_by_step() {
        let half = std::f64::consts::FRAC_1_SQRT_2;
        let schedule = ScheduleConfig { steps: 6, ..one_stage(ScheduleKind::Cosine) };
        // After warm-up 4, 8: 4 + 4 cos(k π/4), k = 0..3.
        let found = course(&schedule);
        assert_eq!(found[..3], [4.0, 8.0, 8.0]);
        assert_close(&found, &[4.0, 8.0, 8.0, 4.0 + 4.0 * half, 4.0, 4.0 - 4.0 * half]);
        assert_eq!(schedule.rates(6).lr, 0.0);
        assert_eq!(schedule.rates(60).lr, 0.0);
        // To lr_min = 2: 5 + 3 cos(k π/6); cos π/3 = 1/2.
        let low = ScheduleConfig { lr_min: Some(2.0), steps: 8, ..schedule };
        let root = 1.5 * 3f64.sqrt();
        assert_close(&course(&low), &[4.0, 8.0, 8.0, 5.0 + root, 6.5, 5.0, 3.5, 5.0 - root]);
        assert_eq!(low.rates(8).lr, 2.0);
        assert_eq!(low.rates(7).weight_decay, 0.1);
    }

    #[test]
    fn warm_up_stable_decay_step_by_step() {
        let schedule = ScheduleConfig {
            decay_at: Some(0.6),
            decay: Some(Decay::Linear),
            ..one_stage(ScheduleKind::Wsd)
        };
        assert_eq!(schedule.decay_step(), 6);
        assert_eq!(course(&schedule), [4.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0, 6.0, 4.0, 2.0]);
        assert_eq!(schedule.rates(10).lr, 0.0);
        // u = 0, 1/4, 1/2, 3/4, of which 1/4 has an exact root.
        let sqrt = ScheduleConfig { decay: Some(Decay::OneMinusSqrt), ..schedule.clone() };
        let found = course(&sqrt);
        assert_eq!(found[..8], [4.0, 8.0, 8.0, 8.0, 8.0, 8.0, 8.0, 4.0]);
        assert_close(&found[8..], &[8.0 - 8.0 * 0.5f64.sqrt(), 8.0 - 4.0 * 3f64.sqrt()]);
        // A decay that would begin within the warm-up begins at its end.
        let early = ScheduleConfig { decay_at: Some(0.1), ..schedule };
        assert_eq!(course(&early), [4.0, 8.0, 8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0]);
    }

    #[test]
    fn two_cosines_step_by_step() {
        let schedule = ScheduleConfig { kind: ScheduleKind::TwoStageCosine, ..two_stage() };
        let half = std::f64::consts::FRAC_1_SQRT_2;
        let found = course(&ScheduleConfig { stage2_at: Some(0.6), ..schedule.clone() });
        // 4 + 4 cos(k π/8), k = 0..3; then 2 + 2 cos(k π/4), k = 0..3.
        let eighth = |k: f64| 4.0 + 4.0 * (k * PI / 8.0).cos();
        assert_eq!(found[..3], [4.0, 8.0, 8.0]);
        assert_eq!(found[6], 4.0);
        let first = [4.0, 8.0, 8.0, eighth(1.0), 4.0 + 4.0 * half, eighth(3.0)];
        assert_close(&found[..6], &first);
        assert_close(&found[6..], &[4.0, 2.0 + 2.0 * half, 2.0, 2.0 - 2.0 * half]);
        for step in 0..10 {
            let expected = if step < 5 { 0.1 } else { 0.0 };
            assert_eq!(schedule.rates(step).weight_decay, expected, "step {step}");
        }
        assert_eq!(schedule.rates(10).lr, 0.0);
    }

    #[test]
    fn kinds_have_the_names_of_their_config() {
        for name in ["two-stage", "linear", "constant", "cosine", "wsd", "two-stage-cosine"] {
            let kind: ScheduleKind = serde_json::from_value(name.into()).unwrap();
            assert_eq!(one_stage(kind).kind_name(), name);
        }
        for name in ["linear", "1-sqrt"] {
            let decay: Decay = serde_json::from_value(name.into()).unwrap();
            assert_eq!(decay.name(), name);
        }
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
            (
                ScheduleConfig { decay_at: Some(0.8), ..two_stage() },
                "schedule.decay_at = 0.8: has no use with schedule.kind = two-stage",
            ),
            (
                ScheduleConfig { decay: Some(Decay::OneMinusSqrt), ..two_stage() },
                "schedule.decay = 1-sqrt: has no use with schedule.kind = two-stage",
            ),
            (one_stage(ScheduleKind::Wsd), "schedule.decay_at = (absent): is needed by"),
            (
                ScheduleConfig { decay_at: Some(0.8), ..one_stage(ScheduleKind::Wsd) },
                "schedule.decay = (absent): is needed by schedule.kind = wsd: linear or 1-sqrt",
            ),
            (
                ScheduleConfig {
                    decay_at: Some(2.0),
                    decay: Some(Decay::Linear),
                    ..one_stage(ScheduleKind::Wsd)
                },
                "schedule.decay_at = 2: must be between 0 and 1",
            ),
            (
                ScheduleConfig { stage2_at: Some(0.5), ..one_stage(ScheduleKind::Cosine) },
                "schedule.stage2_at = 0.5: has no use with schedule.kind = cosine",
            ),
            (one_stage(ScheduleKind::TwoStageCosine), "schedule.lr_stage2 = (absent)"),
        ];
        for (schedule, message) in cases {
            let error = schedule.validate().unwrap_err().to_string();
            assert!(error.starts_with(message), "{error}");
        }
    }
}
