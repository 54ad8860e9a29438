//! Reading back: every ternary value, scale and float of the finished output,
//! opened as a model like any other, against the source.

use bitnet_format::model::Source;
use bitnet_format::pack::{Form, Item, Plan, for_chunks, rounded};

use crate::format::Format;
use crate::{ExportError, Step};

/// Largest relative difference of a scale that is the mean of bf16 weights.
const BF16_SCALE_TOLERANCE: f32 = 1e-4;

/// What was found on the way.
#[derive(Debug, Default)]
pub(crate) struct Counts {
    /// Weights that are ternary in the output.
    pub(crate) ternary: u64,
    /// Those of them that are zero.
    pub(crate) zeros: u64,
}

/// Compares what was written with the source.
pub(crate) fn compare(
    source: &dyn Source,
    plan: &Plan,
    written: &dyn Source,
    format: Format,
    step: &mut Step<'_>,
) -> Result<Counts, ExportError> {
    let mut counts = Counts::default();
    for item in &plan.items {
        match item.form {
            Form::Ternary => {
                ternary_item(source, written, item, format, &mut counts)?;
                step.add(item.elements())?;
            }
            Form::Float(_) | Form::Rows(_) => {
                let mut found = Vec::new();
                for_chunks(source, item, |first, values| {
                    found.resize(values.len(), 0.0);
                    written
                        .floats(item.tensor, first / item.cols, &mut found)
                        .map_err(ExportError::ReadBack)?;
                    let expected = stored(item, values)?;
                    for (i, (e, f)) in expected.iter().zip(&found).enumerate() {
                        if e.to_bits() != f.to_bits() {
                            return Err(differs(item, first + i, e.to_string(), f.to_string()));
                        }
                    }
                    step.add(values.len())
                })?;
            }
        }
    }
    Ok(counts)
}

/// Values as they come back from the form in which they are stored.
fn stored(item: &Item, values: &[f32]) -> Result<Vec<f32>, ExportError> {
    match item.form {
        Form::Rows(ty) => ty
            .rounded(values)
            .map_err(|source| ExportError::Block { tensor: item.weight(), source }),
        Form::Float(dtype) => Ok(values.iter().map(|x| rounded(*x, dtype)).collect()),
        Form::Ternary => Ok(values.to_vec()),
    }
}

fn ternary_item(
    source: &dyn Source,
    written: &dyn Source,
    item: &Item,
    format: Format,
    counts: &mut Counts,
) -> Result<(), ExportError> {
    let found = written.ternary(item.tensor).map_err(ExportError::ReadBack)?;
    let expected = source.ternary(item.tensor)?;
    let (e, f) = (expected.scale, found.scale);
    let same = match format {
        // A tensor of zeros has no mean.
        Format::HfBf16 => {
            (e / f - 1.0).abs() <= BF16_SCALE_TOLERANCE || found.values.iter().all(|t| *t == 0)
        }
        _ => e.to_bits() == f.to_bits(),
    };
    if !same {
        let show = |x: f32| format!("weight_scale {x:e}");
        return Err(differs(item, 0, show(e), show(f)));
    }
    if let Some(at) = (0..item.elements()).find(|&i| expected.values[i] != found.values[i]) {
        let (e, f) = (expected.values[at].to_string(), found.values[at].to_string());
        return Err(differs(item, at, e, f));
    }
    counts.zeros += found.values.iter().filter(|t| **t == 0).count() as u64;
    counts.ternary += item.elements() as u64;
    Ok(())
}

fn differs(item: &Item, element: usize, expected: String, found: String) -> ExportError {
    let (tensor, at) = (item.weight(), item.position(element));
    ExportError::Differs { tensor, at, expected, found }
}
