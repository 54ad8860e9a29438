//! The last check: the engine runs the finished file on the prompt of the
//! golden logits, with the f32 cache, and must reproduce what training computed.

use std::path::Path;

use bitnet_engine::{KvType, LoadOptions, Model, Session, SessionOptions};
use bitnet_format::model::Golden;

use crate::ExportError;

/// Largest difference of a logit. Training and engine run the same kernels in
/// the same order, so on the CPU it is zero; a GPU rounds floats its own way.
pub const GOLDEN_TOLERANCE: f32 = 1e-4;

/// The largest difference between the engine's logits and training's.
pub(crate) fn reproduce(path: &Path, golden: &Golden) -> Result<f32, ExportError> {
    let model = Model::open(path, &LoadOptions::default())?;
    // The file's prompt is what is run: it was written too.
    let stored = model.golden();
    if stored.is_none_or(|s| s.tokens != golden.tokens || s.logits != golden.logits) {
        return Err(ExportError::Differs {
            tensor: "bitnet-packed.golden".into(),
            at: Vec::new(),
            expected: format!("{} tokens", golden.tokens.len()),
            found: stored.map_or("none".into(), |s| format!("{} other tokens", s.tokens.len())),
        });
    }
    let options = SessionOptions {
        kv: KvType::F32,
        context: Some(golden.tokens.len()),
        ..SessionOptions::default()
    };
    let mut session = Session::new(&model, &options)?;
    check(&golden.logits, session.prefill(&golden.tokens)?)
}

/// The largest difference, where it is allowed and the largest logit is the
/// same token's.
fn check(expected: &[f32], found: &[f32]) -> Result<f32, ExportError> {
    let mut largest = 0.0f32;
    for (token, (&e, &f)) in expected.iter().zip(found).enumerate() {
        let difference = (e - f).abs();
        if difference.is_nan() || difference > GOLDEN_TOLERANCE {
            let (expected, found, tolerance) = (e, f, GOLDEN_TOLERANCE);
            return Err(ExportError::Golden { token, expected, found, difference, tolerance });
        }
        largest = largest.max(difference);
    }
    let (e, f) = (argmax(expected), argmax(found));
    if e != f {
        return Err(ExportError::GoldenArgmax {
            expected: e,
            expected_logit: expected[e],
            found: f,
            found_logit: found[f],
        });
    }
    Ok(largest)
}

/// The first of the largest.
fn argmax(logits: &[f32]) -> usize {
    let best = logits.iter().enumerate().reduce(|a, b| if b.1 > a.1 { b } else { a });
    best.map_or(0, |(i, _)| i)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn differences_are_named_with_their_position() {
        assert_eq!(check(&[1.0, 2.0, 0.5], &[1.0, 2.0, 0.5]).unwrap(), 0.0);
        assert!(check(&[1.0, 2.0], &[1.00005, 2.0]).unwrap() > 0.0);
        let cases = [
            ([1.0, 2.0, 0.5], [1.0, 2.0, 0.6], "at token 2 training has 0.5, the engine 0.6"),
            ([1.0, 2.0, 0.5], [f32::NAN, 2.0, 0.5], "at token 0 training has 1, the engine NaN"),
            (
                [2.0, 2.00001, 0.0],
                [2.00001, 2.0, 0.0],
                "largest is at token 1 (2.00001), the engine's at token 0",
            ),
        ];
        for (expected, found, text) in cases {
            let e = check(&expected, &found).unwrap_err().to_string();
            assert!(e.contains(text), "{e}");
        }
    }
}
