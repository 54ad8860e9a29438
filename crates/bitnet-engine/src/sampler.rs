//! From logits to a token: penalty, temperature, filters, one random number.
//!
//! The filters are those of Hugging Face's logits processors: repetition penalty,
//! temperature, top-k, top-p, min-p. Top-k comes before temperature here: the same
//! tokens, whichever of them a division would have made equal. The same options, seed
//! and logits give the same tokens on every machine.

use std::cmp::Ordering;

use bitnet_kernels::Kernels;
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::error::EngineError;
use crate::head::TokenLogit;

/// How tokens are chosen.
#[derive(Debug, Clone, PartialEq)]
pub struct SamplerOptions {
    /// Divides the logits; 0 always takes the most probable token.
    pub temperature: f32,
    /// Keeps this many of the most probable tokens; 0 keeps all.
    pub top_k: usize,
    /// Keeps the fewest tokens whose probabilities reach this sum; 1 keeps all.
    pub top_p: f32,
    /// Keeps tokens at least this many times as probable as the most probable
    /// one; 0 keeps all.
    pub min_p: f32,
    /// Makes tokens in the window less probable: positive logits are divided by
    /// it, negative ones multiplied (CTRL, arXiv:1909.05858); 1 is off.
    pub repetition_penalty: f32,
    /// How many of the last tokens the penalty looks at.
    pub repetition_window: usize,
    /// Seed of the random numbers.
    pub seed: u64,
}

/// Always the most probable token.
impl Default for SamplerOptions {
    fn default() -> Self {
        Self {
            temperature: 0.0,
            top_k: 0,
            top_p: 1.0,
            min_p: 0.0,
            repetition_penalty: 1.0,
            repetition_window: 64,
            seed: 0,
        }
    }
}

impl SamplerOptions {
    /// Checks every value.
    ///
    /// # Errors
    /// The first option that cannot be used, by name.
    pub fn validate(&self) -> Result<(), EngineError> {
        let fits = |ok: bool, option, value: f32, why: &str| {
            if ok {
                return Ok(());
            }
            Err(EngineError::Option { option, value: value.to_string(), why: why.to_owned() })
        };
        let Self { temperature, top_p, min_p, repetition_penalty, .. } = *self;
        let finite = temperature.is_finite() && temperature >= 0.0;
        fits(finite, "temperature", temperature, "must be 0 or more, and finite")?;
        fits(top_p > 0.0 && top_p <= 1.0, "top_p", top_p, "must be above 0 and at most 1")?;
        fits((0.0..=1.0).contains(&min_p), "min_p", min_p, "must be between 0 and 1")?;
        let positive = repetition_penalty.is_finite() && repetition_penalty > 0.0;
        fits(positive, "repetition_penalty", repetition_penalty, "must be above 0 and finite")
    }
}

/// A token and its logit, then its probability relative to the best one's.
type Candidate = (f32, u32);

/// Chooses tokens.
#[derive(Debug, Clone)]
pub struct Sampler {
    options: SamplerOptions,
    rng: ChaCha8Rng,
    kernels: Kernels,
    logits: Vec<f32>,
    candidates: Vec<Candidate>,
}

impl Sampler {
    /// A sampler at the beginning of its random numbers.
    ///
    /// # Errors
    /// See [`SamplerOptions::validate`].
    pub fn new(options: SamplerOptions) -> Result<Self, EngineError> {
        options.validate()?;
        Ok(Self {
            rng: ChaCha8Rng::seed_from_u64(options.seed),
            options,
            kernels: Kernels::detect(),
            logits: Vec::new(),
            candidates: Vec::new(),
        })
    }

    /// The options.
    #[must_use]
    pub fn options(&self) -> &SamplerOptions {
        &self.options
    }

    /// How many of the largest logits decide, whatever came before; none where all
    /// do, or where earlier tokens do.
    #[must_use]
    pub fn needs_top(&self) -> Option<usize> {
        let o = &self.options;
        match (o.repetition_penalty == 1.0, o.temperature == 0.0, o.top_k) {
            (true, true, _) => Some(1),
            (true, false, 1..) => Some(o.top_k),
            _ => None,
        }
    }

    /// Chooses a token from `logits` `[V]`, after the tokens of `history`.
    ///
    /// # Errors
    /// A logit that is NaN or infinite upwards, or none that is finite.
    pub fn sample(&mut self, logits: &[f32], history: &[u32]) -> Result<u32, EngineError> {
        check(logits)?;
        let o = &self.options;
        self.logits.clear();
        self.logits.extend_from_slice(logits);
        if o.repetition_penalty != 1.0 {
            let window = &history[history.len().saturating_sub(o.repetition_window)..];
            penalize(&mut self.logits, window, o.repetition_penalty);
        }
        if o.temperature == 0.0 {
            return Ok(argmax(&self.logits));
        }
        self.candidates.clear();
        self.candidates.extend(self.logits.iter().zip(0..).map(|(&x, id)| (x, id)));
        top_k(&mut self.candidates, o.top_k);
        Ok(self.draw())
    }

    /// The token that [`Sampler::sample`] chooses, from the
    /// [`needs_top`](Sampler::needs_top) largest logits alone, as
    /// [`crate::Session::decode_top`] finds them; 0 if there is none.
    pub fn sample_top(&mut self, top: &[TokenLogit]) -> u32 {
        if self.options.temperature == 0.0 || top.is_empty() {
            return top.first().map_or(0, |t| t.token);
        }
        self.candidates.clear();
        self.candidates.extend(top.iter().map(|t| (t.logit, t.token)));
        self.candidates.sort_unstable_by_key(|c| c.1);
        self.draw()
    }

    /// One of the candidates, which stand in the order of their ids.
    fn draw(&mut self) -> u32 {
        let o = &self.options;
        // The largest becomes 0, so that no temperature takes it to infinity.
        let max = self.candidates.iter().fold(f32::NEG_INFINITY, |m, c| m.max(c.0));
        self.candidates.iter_mut().for_each(|c| c.0 = (c.0 - max) / o.temperature);
        to_probabilities(&mut self.candidates, &mut self.logits, self.kernels);
        top_p(&mut self.candidates, o.top_p);
        min_p(&mut self.candidates, o.min_p);
        // 53 random bits: a number in 0..1.
        let u = (self.rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64;
        draw(&self.candidates, u)
    }
}

/// The token of the largest logit; of equals, the one with the smallest id.
fn argmax(logits: &[f32]) -> u32 {
    let best = logits.iter().zip(0u32..).reduce(|a, b| if b.0 > a.0 { b } else { a });
    best.map_or(0, |(_, id)| id)
}

fn check(logits: &[f32]) -> Result<(), EngineError> {
    let bad = logits.iter().position(|x| x.is_nan() || *x == f32::INFINITY);
    let none = || logits.iter().all(|x| *x == f32::NEG_INFINITY).then_some(0);
    match bad.or_else(none) {
        Some(token) => {
            Err(EngineError::Logit { token, value: logits.get(token).copied().unwrap_or(f32::NAN) })
        }
        None => Ok(()),
    }
}

/// Each token of the window once.
fn penalize(logits: &mut [f32], window: &[u32], penalty: f32) {
    for (i, &token) in window.iter().enumerate() {
        if window[..i].contains(&token) {
            continue;
        }
        if let Some(x) = logits.get_mut(token as usize) {
            *x = if *x > 0.0 { *x / penalty } else { *x * penalty };
        }
    }
}

/// The larger first; of equals, the smaller id.
fn by_rank(a: &Candidate, b: &Candidate) -> Ordering {
    b.0.total_cmp(&a.0).then(a.1.cmp(&b.1))
}

fn top_k(candidates: &mut Vec<Candidate>, k: usize) {
    if k > 0 && k < candidates.len() {
        // The order of `decode_top`, to which -0 and 0 are equal.
        candidates.select_nth_unstable_by(k - 1, |a, b| {
            b.0.partial_cmp(&a.0).unwrap_or(Ordering::Equal).then(a.1.cmp(&b.1))
        });
        candidates.truncate(k);
        // The order behind a selection is the library's affair; the draw's is ours.
        candidates.sort_unstable_by_key(|c| c.1);
    }
}

/// Replaces logits by `e^(logit - max)`: probabilities up to a common factor.
fn to_probabilities(candidates: &mut [Candidate], buffer: &mut Vec<f32>, kernels: Kernels) {
    buffer.clear();
    buffer.extend(candidates.iter().map(|c| c.0));
    kernels.exp_sum(buffer);
    for (c, &p) in candidates.iter_mut().zip(&*buffer) {
        c.0 = p;
    }
}

/// Keeps the best until their sum reaches `p` of all, in the order of rank.
fn top_p(candidates: &mut Vec<Candidate>, p: f32) {
    if p >= 1.0 {
        return;
    }
    let total: f64 = candidates.iter().map(|c| f64::from(c.0)).sum();
    let target = total * f64::from(p);
    // The best few usually reach it: rank as many as needed, not all of V.
    let (mut sum, mut done, mut ranked) = (0.0, 0, 64);
    while done < candidates.len() {
        let end = ranked.min(candidates.len());
        if end < candidates.len() {
            candidates[done..].select_nth_unstable_by(end - done - 1, by_rank);
        }
        candidates[done..end].sort_unstable_by(by_rank);
        for i in done..end {
            sum += f64::from(candidates[i].0);
            if sum >= target {
                candidates.truncate(i + 1);
                return;
            }
        }
        (done, ranked) = (end, ranked * 8);
    }
}

fn min_p(candidates: &mut Vec<Candidate>, p: f32) {
    if p > 0.0 {
        let best = candidates.iter().map(|c| c.0).fold(0.0, f32::max);
        candidates.retain(|c| c.0 >= p * best);
    }
}

/// The candidate in whose share of the sum `u` (0 to 1) falls.
fn draw(candidates: &[Candidate], u: f64) -> u32 {
    let total: f64 = candidates.iter().map(|c| f64::from(c.0)).sum();
    let mut left = u * total;
    let mut last = 0;
    for &(p, id) in candidates.iter().filter(|c| c.0 > 0.0) {
        last = id;
        left -= f64::from(p);
        if left < 0.0 {
            break;
        }
    }
    last
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn logits() -> impl Strategy<Value = Vec<f32>> {
        // Few distinct values, so that ties happen; up to more than one rank step.
        proptest::collection::vec((-40i32..40).prop_map(|x| x as f32 * 0.25), 1..200)
    }

    fn probabilities(logits: &[f32]) -> Vec<Candidate> {
        let mut c: Vec<Candidate> = logits.iter().copied().zip(0..).collect();
        to_probabilities(&mut c, &mut Vec::new(), Kernels::detect());
        c
    }

    fn ranked(mut c: Vec<Candidate>) -> Vec<Candidate> {
        c.sort_by(by_rank);
        c
    }

    fn ids(c: &[Candidate]) -> Vec<u32> {
        let mut ids: Vec<u32> = c.iter().map(|c| c.1).collect();
        ids.sort_unstable();
        ids
    }

    proptest! {
        #[test]
        fn top_k_keeps_the_k_best(x in logits(), k in 0usize..250) {
            let mut c: Vec<Candidate> = x.iter().copied().zip(0..).collect();
            let all = ranked(c.clone());
            top_k(&mut c, k);
            let keep = if k == 0 { x.len() } else { k.min(x.len()) };
            prop_assert_eq!(ids(&c), ids(&all[..keep]));
        }

        #[test]
        fn top_p_keeps_the_smallest_sufficient_set(x in logits(), p in 0.01f32..1.0) {
            let mut c = probabilities(&x);
            let all = ranked(c.clone());
            let total: f64 = c.iter().map(|c| f64::from(c.0)).sum();
            top_p(&mut c, p);
            let (mut sum, mut keep) = (0.0, 0);
            while keep < all.len() && sum < total * f64::from(p) {
                sum += f64::from(all[keep].0);
                keep += 1;
            }
            prop_assert_eq!(ids(&c), ids(&all[..keep]));
            prop_assert!(!c.is_empty());
        }

        #[test]
        fn min_p_compares_with_the_best(x in logits(), p in 0.0f32..=1.0) {
            let mut c = probabilities(&x);
            let want: Vec<u32> = c.iter().filter(|c| c.0 >= p).map(|c| c.1).collect();
            min_p(&mut c, p);
            // The best one's relative probability is exactly 1.
            prop_assert_eq!(ids(&c), want);
            prop_assert!(!c.is_empty());
        }

        #[test]
        fn a_draw_falls_in_its_share(x in logits(), u in 0.0f64..1.0) {
            let c = probabilities(&x);
            let total: f64 = c.iter().map(|c| f64::from(c.0)).sum();
            let id = draw(&c, u);
            let before: f64 = c.iter().take_while(|c| c.1 != id).map(|c| f64::from(c.0)).sum();
            let own = f64::from(c[id as usize].0);
            prop_assert!(own > 0.0);
            prop_assert!(before <= u * total + 1e-9 && u * total <= before + own + 1e-9);
        }
    }

    #[test]
    fn temperature_zero_takes_the_first_of_the_best() {
        let mut s = Sampler::new(SamplerOptions::default()).unwrap();
        assert_eq!(s.sample(&[0.0, 2.0, 2.0, -1.0], &[]).unwrap(), 1);
        assert_eq!(s.sample(&[f32::NEG_INFINITY, -5.0], &[]).unwrap(), 1);
    }

    #[test]
    fn the_penalty_counts_a_token_once_and_only_in_the_window() {
        let mut x = [2.0, -2.0, 3.0, 1.0];
        penalize(&mut x, &[0, 1, 0, 99], 2.0);
        assert_eq!(x, [1.0, -4.0, 3.0, 1.0]);
        let options =
            SamplerOptions { repetition_penalty: 4.0, repetition_window: 2, ..Default::default() };
        let mut s = Sampler::new(options).unwrap();
        let logits = [2.0, 1.0, 0.5];
        assert_eq!(s.sample(&logits, &[0, 2, 2]).unwrap(), 0);
        assert_eq!(s.sample(&logits, &[2, 2, 0]).unwrap(), 1);
    }

    #[test]
    fn frequencies_follow_the_probabilities() {
        let options = SamplerOptions { temperature: 0.5, seed: 7, ..Default::default() };
        let mut s = Sampler::new(options).unwrap();
        let mut counts = [0u32; 3];
        let logits = [0.0, 0.5, -20.0];
        for _ in 0..20_000 {
            counts[s.sample(&logits, &[]).unwrap() as usize] += 1;
        }
        // At temperature 0.5 the second is e times as probable as the first.
        let share = f64::from(counts[1]) / 20_000.0;
        let want = std::f64::consts::E / (1.0 + std::f64::consts::E);
        assert!((share - want).abs() < 0.015, "{share} {want}");
        assert_eq!(counts[2], 0);
    }

    #[test]
    fn a_seed_fixes_the_tokens() {
        let run = |seed| {
            let options =
                SamplerOptions { temperature: 1.0, top_p: 0.9, seed, ..Default::default() };
            let mut s = Sampler::new(options).unwrap();
            let x: Vec<f32> = (0..500).map(|i| (i as f32 * 0.7).sin() * 3.0).collect();
            (0..50).map(|_| s.sample(&x, &[]).unwrap()).collect::<Vec<_>>()
        };
        assert_eq!(run(1), run(1));
        assert_ne!(run(1), run(2));
    }

    #[test]
    fn what_cannot_be_sampled_is_an_error() {
        for temperature in [0.0, 1.0] {
            let options = SamplerOptions { temperature, ..Default::default() };
            let mut s = Sampler::new(options).unwrap();
            let e = s.sample(&[0.0, f32::NAN], &[]).unwrap_err().to_string();
            assert!(e.contains("token 1 is NaN"), "{e}");
            assert!(s.sample(&[0.0, f32::INFINITY], &[]).is_err());
            assert!(s.sample(&[f32::NEG_INFINITY; 2], &[]).is_err());
            assert!(s.sample(&[], &[]).is_err());
        }
        let options = SamplerOptions { temperature: 1e-40, ..Default::default() };
        assert_eq!(Sampler::new(options).unwrap().sample(&[1.0, 3.0], &[]).unwrap(), 1);
    }

    #[test]
    fn options_are_checked_by_name() {
        let d = SamplerOptions::default;
        for (options, name) in [
            (SamplerOptions { temperature: -1.0, ..d() }, "temperature = -1"),
            (SamplerOptions { temperature: f32::NAN, ..d() }, "temperature = NaN"),
            (SamplerOptions { top_p: 0.0, ..d() }, "top_p = 0"),
            (SamplerOptions { top_p: 1.5, ..d() }, "top_p = 1.5"),
            (SamplerOptions { min_p: -0.1, ..d() }, "min_p = -0.1"),
            (SamplerOptions { repetition_penalty: 0.0, ..d() }, "repetition_penalty = 0"),
        ] {
            let e = Sampler::new(options).unwrap_err();
            assert!(e.to_string().starts_with(name), "{e}");
            assert_eq!(e.exit().code(), 2);
        }
    }
}
