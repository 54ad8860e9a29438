//! `bitnet inspect --diff A B`: two models of any form, tensor by tensor.

use std::path::{Path, PathBuf};

use anyhow::Context;
use bitnet_core::names::Tensor;
use bitnet_core::{ExitError, ModelConfig};
use bitnet_format::model::{Linears, OpenOptions, Source, open};
use serde::Serialize;
use serde_json::{Map, Value};

use crate::table::{Table, thousands};

/// Floats that are compared at a time, where a tensor is not one piece.
const CHUNK: usize = 1 << 20;

/// What differs; its keys are stable.
#[derive(Debug, Serialize)]
pub(super) struct Diff {
    a: PathBuf,
    b: PathBuf,
    /// Whether nothing differs.
    pub(super) equal: bool,
    /// Keys of the configuration that differ.
    config: Vec<KeyDiff>,
    /// Tensors that A alone has.
    missing: Vec<String>,
    /// Tensors that B alone has.
    extra: Vec<String>,
    /// The tensors that both have.
    tensors: Vec<TensorDiff>,
}

#[derive(Debug, Serialize)]
struct KeyDiff {
    key: String,
    a: Value,
    b: Value,
}

/// How one tensor differs.
#[derive(Debug, Default, Serialize)]
struct TensorDiff {
    name: String,
    equal: bool,
    /// `ternary` (in both), or `float`: then `ternary · scale` is compared where
    /// one of the two is ternary.
    kind: &'static str,
    /// The shapes, where they differ; nothing else is compared then.
    shapes: Option<[Vec<usize>; 2]>,
    /// Values that differ: ternary ones, or floats by their bits.
    different: u64,
    /// All values.
    values: u64,
    /// Where the first of them is.
    first: Option<Vec<usize>>,
    /// The two scales of ternary tensors.
    scales: Option<[f32; 2]>,
    /// `|a - b| / |a|` of the scales.
    scale_relative_difference: Option<f64>,
    /// Largest `|a - b|` of floats.
    largest_difference: Option<f64>,
}

/// Compares the models at `a` and `b`; one tensor of each is in memory. `options`
/// apply to both.
///
/// # Errors
/// A model that cannot be read.
pub(super) fn diff(a: &Path, b: &Path, options: &OpenOptions) -> anyhow::Result<Diff> {
    let options = OpenOptions { without_text: true, ..options.clone() };
    let open = |path| open(path, &options).map_err(ExitError::bad_input);
    let (one, two) = (open(a)?, open(b)?);
    let (c1, c2) = (&one.facts().config, &two.facts().config);
    let config = config_diff(c1, c2)?;
    let (all1, all2) = (Tensor::all(c1), Tensor::all(c2));
    let only = |of: &[Tensor], other: &[Tensor]| {
        of.iter().filter(|t| !other.contains(t)).map(|t| t.hf()).collect::<Vec<_>>()
    };
    let (missing, extra) = (only(&all1, &all2), only(&all2, &all1));
    let mut tensors = Vec::new();
    for tensor in all1.iter().filter(|t| all2.contains(t)) {
        tensors.push(tensor_diff(*tensor, &*one, &*two).map_err(ExitError::bad_input)?);
    }
    let same_tensors = missing.is_empty() && extra.is_empty() && tensors.iter().all(|t| t.equal);
    let equal = config.is_empty() && same_tensors;
    Ok(Diff { a: a.into(), b: b.into(), equal, config, missing, extra, tensors })
}

/// The keys that differ; a head size that is spelt out is no difference.
fn config_diff(a: &ModelConfig, b: &ModelConfig) -> anyhow::Result<Vec<KeyDiff>> {
    let map = |c: &ModelConfig| -> anyhow::Result<Map<String, Value>> {
        let plain = ModelConfig { head_dim: Some(c.head_dim()), ..c.clone() };
        let value = serde_json::to_value(plain).context("the configuration as JSON")?;
        Ok(value.as_object().cloned().unwrap_or_default())
    };
    let (a, b) = (map(a)?, map(b)?);
    let get = |map: &Map<String, Value>, key: &str| map.get(key).cloned().unwrap_or_default();
    Ok(a.keys()
        .filter(|key| get(&a, key) != get(&b, key))
        .map(|key| KeyDiff { key: key.clone(), a: get(&a, key), b: get(&b, key) })
        .collect())
}

type Compared = Result<TensorDiff, bitnet_format::model::ModelError>;

fn tensor_diff(tensor: Tensor, a: &dyn Source, b: &dyn Source) -> Compared {
    let [dims_a, dims_b] = [a, b].map(|s| tensor.dims(&s.facts().config));
    let [ternary_a, ternary_b] = [a, b].map(|s| is_ternary(tensor, s));
    let both = ternary_a && ternary_b;
    let mut found = TensorDiff {
        name: tensor.hf(),
        kind: if both { "ternary" } else { "float" },
        values: dims_a.iter().product::<usize>() as u64,
        ..TensorDiff::default()
    };
    if dims_a != dims_b {
        found.shapes = Some([dims_a, dims_b]);
        return Ok(found);
    }
    let [rows, cols] = tensor.shape(&a.facts().config);
    let mut first = None;
    if both {
        let (x, y) = (a.ternary(tensor)?, b.ternary(tensor)?);
        for (i, (x, y)) in x.values.iter().zip(&y.values).enumerate() {
            if x != y {
                found.different += 1;
                first = first.or(Some(i));
            }
        }
        let (s, t) = (f64::from(x.scale), f64::from(y.scale));
        found.scales = Some([x.scale, y.scale]);
        found.scale_relative_difference = Some((s - t).abs() / s);
        found.equal = found.different == 0 && x.scale.to_bits() == y.scale.to_bits();
    } else {
        // A ternary tensor is read whole: as much as its floats take.
        let at_once = if ternary_a || ternary_b { rows } else { (CHUNK / cols).clamp(1, rows) };
        let (mut x, mut y) = (vec![0.0; at_once * cols], vec![0.0; at_once * cols]);
        let mut largest = 0.0f64;
        for row in (0..rows).step_by(at_once) {
            let n = at_once.min(rows - row) * cols;
            floats(tensor, a, row, &mut x[..n])?;
            floats(tensor, b, row, &mut y[..n])?;
            for (i, (x, y)) in x[..n].iter().zip(&y[..n]).enumerate() {
                if x.to_bits() != y.to_bits() {
                    found.different += 1;
                    first = first.or(Some(row * cols + i));
                    largest = largest.max((f64::from(*x) - f64::from(*y)).abs());
                }
            }
        }
        found.largest_difference = Some(largest);
        found.equal = found.different == 0;
    }
    found.first = first.map(|i| if tensor.is_norm() { vec![i] } else { vec![i / cols, i % cols] });
    Ok(found)
}

/// Whether a tensor is used as ternary values.
fn is_ternary(tensor: Tensor, source: &dyn Source) -> bool {
    matches!(tensor, Tensor::Linear(..)) && source.facts().linears != Linears::Floats
}

/// Rows of a tensor as the numbers that they stand for.
fn floats(
    tensor: Tensor,
    source: &dyn Source,
    row: usize,
    out: &mut [f32],
) -> Result<(), bitnet_format::model::ModelError> {
    if !is_ternary(tensor, source) {
        return source.floats(tensor, row, out);
    }
    let trits = source.ternary(tensor)?;
    for (out, t) in out.iter_mut().zip(&trits.values) {
        *out = f32::from(*t) * trits.scale;
    }
    Ok(())
}

impl Diff {
    pub(super) fn render(&self) -> String {
        let mut t = Table::default();
        t.row("A", self.a.display().to_string()).row("B", self.b.display().to_string());
        for key in &self.config {
            t.row(format!("config {}", key.key), format!("{} and {}", key.a, key.b));
        }
        for (names, text) in [(&self.missing, "in A alone"), (&self.extra, "in B alone")] {
            for name in names {
                t.row(name, text);
            }
        }
        for tensor in self.tensors.iter().filter(|t| !t.equal) {
            t.row(&tensor.name, tensor.describe());
        }
        let same = self.tensors.iter().filter(|t| t.equal).count();
        let all = self.tensors.len();
        t.row("tensors", format!("{same} of {all} that both have are equal"));
        t.row("result", if self.equal { "equal" } else { "different" });
        t.render()
    }
}

impl TensorDiff {
    fn describe(&self) -> String {
        if let Some([a, b]) = &self.shapes {
            return format!("shapes {a:?} and {b:?}");
        }
        let mut parts = Vec::new();
        if let Some(first) = &self.first {
            let (n, all) = (thousands(self.different), thousands(self.values));
            let what = if self.kind == "ternary" { "trits" } else { "floats" };
            parts.push(format!("{n} of {all} {what} differ, the first at {first:?}"));
        }
        if let (Some([a, b]), Some(relative)) = (self.scales, self.scale_relative_difference)
            && a.to_bits() != b.to_bits()
        {
            parts.push(format!("scales {a:e} and {b:e} ({relative:.1e} relative)"));
        }
        if let Some(largest) = self.largest_difference {
            parts.push(format!("by at most {largest:e}"));
        }
        parts.join(", ")
    }
}
