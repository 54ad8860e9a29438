//! The quantisers that a model can be trained with, behind one small interface:
//! [`WeightScheme`] for weights, [`ActivationQuantizer`] for activations, in plain
//! scalar code.
//!
//! The default of both is BitNet b1.58, and its arithmetic is that of
//! [`crate::ternary`]. The others are recipes of the literature that researchers
//! compare with it; a [`Recipe`] names one. What the packed format can hold is
//! said by [`ModelConfig::packable`](crate::ModelConfig::packable).

use std::fmt;

use serde::de::{self, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::config::WeightQuantizer;
use crate::ternary::{
    self, EPSILON, LANES, absmax, absmean_scale, inv_weight_scale, lane_sum_f64, quantize_weight,
    row_abs_sum,
};

/// The statistic of the magnitudes that becomes the weight scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ScaleStatistic {
    /// The mean (BitNet b1.58).
    #[default]
    Absmean,
    /// The median, of an even number of weights the lower of the middle two
    /// ("The Era of 1-bit LLMs: Training Tips, Code and FAQ" names it as a
    /// variant).
    Absmedian,
}

/// The weights that share a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Granularity {
    /// All of a matrix: `"tensor"`.
    #[default]
    Tensor,
    /// Those of one output: `"row"`.
    Row,
    /// So many consecutive ones of a row: a number.
    Group(usize),
}

impl Granularity {
    /// How many weights share a scale in a matrix `[rows, cols]`.
    #[must_use]
    pub fn group(self, rows: usize, cols: usize) -> usize {
        match self {
            Self::Tensor => rows * cols,
            Self::Row => cols,
            Self::Group(n) => n,
        }
    }
}

impl Serialize for Granularity {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::Tensor => s.serialize_str("tensor"),
            Self::Row => s.serialize_str("row"),
            Self::Group(n) => s.serialize_u64(*n as u64),
        }
    }
}

impl<'de> Deserialize<'de> for Granularity {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        struct Text;
        impl Visitor<'_> for Text {
            type Value = Granularity;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("\"tensor\", \"row\" or the number of weights of a group")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Granularity, E> {
                match text {
                    "tensor" => Ok(Granularity::Tensor),
                    "row" => Ok(Granularity::Row),
                    _ => Err(E::invalid_value(de::Unexpected::Str(text), &self)),
                }
            }

            fn visit_i64<E: de::Error>(self, n: i64) -> Result<Granularity, E> {
                let group = usize::try_from(n).ok().filter(|n| *n > 0);
                let bad = || E::invalid_value(de::Unexpected::Signed(n), &self);
                group.map(Granularity::Group).ok_or_else(bad)
            }

            fn visit_u64<E: de::Error>(self, n: u64) -> Result<Granularity, E> {
                self.visit_i64(i64::try_from(n).unwrap_or(-1))
            }
        }
        d.deserialize_any(Text)
    }
}

/// How the inputs of a model's linear layers are quantised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ActivationRecipe {
    /// All by [`ActivationQuantizer::Int8`] (BitNet b1.58).
    #[default]
    Int8,
    /// All by [`ActivationQuantizer::Int4`] (BitNet v2, arXiv:2504.18415).
    Int4,
    /// Those of `o_proj` and `down_proj` as int8, all others by
    /// [`ActivationQuantizer::Int4Absmean`] (BitNet a4.8, arXiv:2411.04965; its
    /// sparsification is [`Recipe::o_proj_keep`]).
    #[serde(rename = "a4.8")]
    A48,
    /// Not at all (TriLM, arXiv:2407.12327).
    None,
}

/// How one token's activations are quantised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ActivationQuantizer {
    /// `s = 127 / max|x|`, `q = clamp(round(x · s), -128, 127)`.
    #[default]
    Int8,
    /// `s = 7 / max|x|`, `q = clamp(round(x · s), -8, 7)`.
    Int4,
    /// `s = √7 / mean|x|`, `q = clamp(round(x · s), -8, 7)` (arXiv:2411.04965).
    Int4Absmean,
    /// Left as they are.
    None,
}

impl ActivationQuantizer {
    /// Quantises one token; returns `act_scale`, which multiplies the integers.
    ///
    /// # Panics
    /// If `q` is shorter than `x`, and for [`Self::None`], which has no integers.
    pub fn quantize(self, x: &[f32], q: &mut [i8]) -> f32 {
        let (scale, inv) = match self {
            Self::Int8 => return ternary::quantize_activations(x, q),
            Self::Int4 => {
                let max = absmax(x);
                (max / INT4_MAX, INT4_MAX / max)
            }
            Self::Int4Absmean => {
                let mean = mean_of(row_abs_sum(x), x.len());
                (mean / INT4_MAX.sqrt(), INT4_MAX.sqrt() / mean)
            }
            Self::None => unreachable!("activations that stay floats have no integers"),
        };
        for (q, &x) in q[..x.len()].iter_mut().zip(x) {
            *q = (x * inv).round_ties_even().clamp(-8.0, 7.0) as i8;
        }
        scale
    }
}

/// The largest magnitude of a 4-bit activation on the positive side.
pub const INT4_MAX: f32 = 7.0;

fn mean_of(sum: f64, count: usize) -> f32 {
    ((sum / count.max(1) as f64) as f32).max(EPSILON)
}

/// What a model's linear layers are trained with besides the quantiser of their
/// weights. The default is BitNet b1.58.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Recipe {
    /// The statistic that gives the weight scale.
    pub weight_scale: ScaleStatistic,
    /// The weights that share a scale.
    pub granularity: Granularity,
    /// The quantiser of activations.
    pub activations: ActivationRecipe,
    /// Whether the inputs of `o_proj` and `down_proj` are rotated by a Hadamard
    /// matrix before they are quantised (BitNet v2, arXiv:2504.18415).
    pub hadamard: bool,
    /// The share of `o_proj`'s inputs that is kept, by magnitude and token by token; the
    /// others become 0 before they are quantised ([`crate::top_k`]). 1 keeps all. BitNet
    /// a4.8 (arXiv:2411.04965) keeps half.
    #[serde(skip_serializing_if = "is_one")]
    pub o_proj_keep: f64,
    /// The same of `down_proj`'s inputs. BitNet a4.8 keeps all: the squared ReLU of the
    /// gate makes most of them 0 already.
    #[serde(skip_serializing_if = "is_one")]
    pub down_proj_keep: f64,
}

impl Default for Recipe {
    fn default() -> Self {
        Self {
            weight_scale: ScaleStatistic::default(),
            granularity: Granularity::default(),
            activations: ActivationRecipe::default(),
            hadamard: false,
            o_proj_keep: 1.0,
            down_proj_keep: 1.0,
        }
    }
}

impl Recipe {
    /// The shares of inputs that are kept, by key.
    #[must_use]
    pub fn keeps(&self) -> [(&'static str, f64); 2] {
        [("recipe.o_proj_keep", self.o_proj_keep), ("recipe.down_proj_keep", self.down_proj_keep)]
    }
}

fn is_one(share: &f64) -> bool {
    *share == 1.0
}

/// How a matrix of master weights becomes integers and scales.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WeightScheme {
    /// The integers.
    pub quantizer: WeightQuantizer,
    /// The statistic that gives a scale.
    pub statistic: ScaleStatistic,
    /// The weights that share a scale.
    pub granularity: Granularity,
}

impl WeightScheme {
    /// BitNet b1.58: ternary, absmean, one scale.
    pub const B158: Self = Self {
        quantizer: WeightQuantizer::Ternary,
        statistic: ScaleStatistic::Absmean,
        granularity: Granularity::Tensor,
    };
}

/// A quantised matrix `[rows, cols]`.
#[derive(Debug, Clone, PartialEq)]
pub struct QuantizedWeights {
    /// Values in {-1, 0, 1}, row-major.
    pub values: Vec<i8>,
    /// The scales of consecutive groups of `group` values; each multiplies its
    /// values.
    pub scales: Vec<f32>,
    /// How many values share a scale.
    pub group: usize,
}

impl QuantizedWeights {
    /// The real weights.
    #[must_use]
    pub fn dequantize(&self) -> Vec<f32> {
        let groups = self.values.chunks(self.group.max(1)).zip(&self.scales);
        groups.flat_map(|(values, &s)| values.iter().map(move |&v| f32::from(v) * s)).collect()
    }
}

impl WeightScheme {
    /// Quantises a matrix.
    ///
    /// # Shapes
    /// `weights` is `[rows, cols]`, row-major; groups divide `cols`.
    ///
    /// # Panics
    /// For [`WeightQuantizer::None`], which has no integers.
    #[must_use]
    pub fn quantize(&self, weights: &[f32], cols: usize) -> QuantizedWeights {
        let group = self.granularity.group(weights.len() / cols.max(1), cols).max(1);
        let mut values = vec![0i8; weights.len()];
        let parts = weights.chunks(group).zip(values.chunks_mut(group));
        let scales = parts.map(|(w, t)| self.quantize_group(w, cols, t)).collect();
        QuantizedWeights { values, scales, group }
    }

    /// Quantises weights that share a scale, which it returns. `cols` is the
    /// length of a row: sums are taken row by row.
    ///
    /// # Panics
    /// If `values` is shorter than `weights`, and for [`WeightQuantizer::None`].
    pub fn quantize_group(&self, weights: &[f32], cols: usize, values: &mut [i8]) -> f32 {
        let scale = match self.statistic {
            ScaleStatistic::Absmean => absmean_scale(weights, cols),
            ScaleStatistic::Absmedian => absmedian_scale(weights),
        };
        match self.quantizer {
            WeightQuantizer::Ternary => {
                let inv = inv_weight_scale(scale);
                values.iter_mut().zip(weights).for_each(|(t, &w)| *t = quantize_weight(w, inv));
            }
            WeightQuantizer::Binary => {
                let mean = mean(weights, cols);
                values.iter_mut().zip(weights).for_each(|(t, &w)| *t = binary_value(w, mean));
            }
            WeightQuantizer::None => unreachable!("weights that stay floats have no integers"),
        }
        scale
    }
}

/// The binary value of a weight: the sign of `w - mean`, -1 for 0
/// (BitNet, arXiv:2310.11453, equation 2).
#[must_use]
#[inline(always)]
pub fn binary_value(w: f32, mean: f32) -> i8 {
    if w - mean > 0.0 { 1 } else { -1 }
}

/// The mean of weights, summed in f64, row by row, in the order of [`LANES`].
#[must_use]
pub fn mean(weights: &[f32], cols: usize) -> f32 {
    let total: f64 = weights.chunks(cols.max(1)).map(row_sum).sum();
    (total / weights.len().max(1) as f64) as f32
}

fn row_sum(row: &[f32]) -> f64 {
    let mut lanes = [0.0f64; LANES];
    for chunk in row.chunks(LANES) {
        for (lane, &x) in lanes.iter_mut().zip(chunk) {
            *lane += f64::from(x);
        }
    }
    lane_sum_f64(lanes)
}

/// The median of magnitudes, floored at [`EPSILON`]; of an even number of them the
/// lower of the middle two.
#[must_use]
pub fn absmedian_scale(weights: &[f32]) -> f32 {
    if weights.is_empty() {
        return EPSILON;
    }
    let mut magnitudes: Vec<f32> = weights.iter().map(|w| w.abs()).collect();
    let middle = (magnitudes.len() - 1) / 2;
    let (_, median, _) = magnitudes.select_nth_unstable_by(middle, f32::total_cmp);
    median.max(EPSILON)
}

/// The size of the Hadamard blocks of a row of `cols`: the largest power of two
/// that divides it.
#[must_use]
pub fn hadamard_block(cols: usize) -> usize {
    if cols == 0 { 1 } else { 1 << cols.trailing_zeros() }
}

/// Rotates a row, block by block, by the normalised Hadamard matrix in Sylvester's
/// order: symmetric and its own inverse.
pub fn hadamard(row: &mut [f32]) {
    let block = hadamard_block(row.len());
    let factor = 1.0 / (block as f32).sqrt();
    for x in row.chunks_exact_mut(block) {
        let mut half = 1;
        while half < block {
            for pair in x.chunks_exact_mut(2 * half) {
                let (low, high) = pair.split_at_mut(half);
                for (a, b) in low.iter_mut().zip(high) {
                    (*a, *b) = (*a + *b, *a - *b);
                }
            }
            half *= 2;
        }
        x.iter_mut().for_each(|x| *x *= factor);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scheme(
        quantizer: WeightQuantizer,
        statistic: ScaleStatistic,
        granularity: Granularity,
    ) -> WeightScheme {
        WeightScheme { quantizer, statistic, granularity }
    }

    #[test]
    fn the_default_is_the_one_definition() {
        let w: Vec<f32> = (0..60).map(|i| (i as f32 * 0.7).sin() * 0.05).collect();
        let q = WeightScheme::B158.quantize(&w, 20);
        let (values, scale) = ternary::quantize_weights(&w, 20);
        assert_eq!((q.values, q.scales, q.group), (values, vec![scale], 60));
    }

    #[test]
    fn rows_and_groups_have_scales_of_their_own() {
        let w = [1.0f32, -1.0, 0.25, 0.25, 8.0, 2.0, 2.0, 0.0];
        let ternary = WeightQuantizer::Ternary;
        let row = scheme(ternary, ScaleStatistic::Absmean, Granularity::Row).quantize(&w, 4);
        assert_eq!((row.scales, row.values), (vec![0.625, 3.0], vec![1, -1, 0, 0, 1, 1, 1, 0]));
        let group = scheme(ternary, ScaleStatistic::Absmean, Granularity::Group(2));
        let group = group.quantize(&w, 4);
        assert_eq!(group.scales, [1.0, 0.25, 5.0, 1.0]);
        assert_eq!(group.values, [1, -1, 1, 1, 1, 0, 1, 0]);
        assert_eq!(group.dequantize(), [1.0, -1.0, 0.25, 0.25, 5.0, 0.0, 1.0, 0.0]);
    }

    #[test]
    fn binary_is_the_sign_of_what_is_centred() {
        let w = [3.0f32, 1.0, 1.0, -1.0];
        let binary = scheme(WeightQuantizer::Binary, ScaleStatistic::Absmean, Granularity::Tensor);
        let q = binary.quantize(&w, 2);
        // The mean is 1: what is equal to it becomes -1.
        assert_eq!((q.values, q.scales), (vec![1, -1, -1, -1], vec![1.5]));
    }

    #[test]
    fn the_median_is_the_lower_of_the_middle_two() {
        assert_eq!(absmedian_scale(&[-4.0, 1.0, 3.0, -2.0]), 2.0);
        assert_eq!(absmedian_scale(&[5.0, -1.0, 2.0]), 2.0);
        assert_eq!(absmedian_scale(&[0.0; 3]), EPSILON);
        assert_eq!(absmedian_scale(&[]), EPSILON);
    }

    #[test]
    fn four_bits() {
        let x = [7.0f32, -7.0, 3.5, 0.4];
        let mut q = [0i8; 4];
        assert_eq!(ActivationQuantizer::Int4.quantize(&x, &mut q), 1.0);
        // 3.5 lies half-way and goes to the even 4.
        assert_eq!(q, [7, -7, 4, 0]);
        let mean = (7.0 + 7.0 + 3.5 + 0.4f32) / 4.0;
        let scale = ActivationQuantizer::Int4Absmean.quantize(&x, &mut q);
        assert!((scale - mean / 7f32.sqrt()).abs() < 1e-6, "{scale}");
        assert_eq!(q, [4, -4, 2, 0]);
        let scale = ActivationQuantizer::Int4Absmean.quantize(&[100.0, 0.0, 0.0, 0.0], &mut q);
        assert_eq!(q, [7, 0, 0, 0], "{scale}: clamped");
    }

    #[test]
    fn a_rotation_is_its_own_inverse_and_keeps_lengths() {
        for cols in [1, 7, 8, 48, 688] {
            let x: Vec<f32> = (0..cols).map(|i| (i as f32 * 1.3).cos()).collect();
            let mut y = x.clone();
            hadamard(&mut y);
            let norm = |v: &[f32]| v.iter().map(|v| v * v).sum::<f32>();
            assert!((norm(&x) - norm(&y)).abs() < 1e-3 * norm(&x));
            assert!(cols % 2 == 1 || x != y);
            hadamard(&mut y);
            assert!(x.iter().zip(&y).all(|(a, b)| (a - b).abs() < 1e-6), "{cols}");
        }
        let mut one = [1.0, 0.0, 0.0, 0.0];
        hadamard(&mut one);
        assert_eq!(one, [0.5; 4]);
    }

    #[test]
    fn recipes_are_plain_text() {
        let text = r#"{"weight_scale":"absmedian","granularity":64,"activations":"a4.8"}"#;
        let recipe: Recipe = serde_json::from_str(text).unwrap();
        assert_eq!(recipe.granularity, Granularity::Group(64));
        assert_eq!(recipe.activations, ActivationRecipe::A48);
        let back: Recipe = serde_json::from_str(&serde_json::to_string(&recipe).unwrap()).unwrap();
        assert_eq!(back, recipe);
        for bad in [r#"{"granularity":0}"#, r#"{"granularity":"col"}"#, r#"{"activation":"int8"}"#]
        {
            assert!(serde_json::from_str::<Recipe>(bad).is_err(), "{bad}");
        }
    }
}
