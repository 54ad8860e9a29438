//! The cross-entropy over rounds of tokens, whose logits become their gradients in
//! place: those of a whole batch never exist.

use burn::backend::cubecl::dtype_to_storage_type;
use burn::backend::ops::FloatTensorOps;
use burn::backend::{Cube, DispatchKindConversion, DispatchTensor};
use burn::tensor::{Int, Slice, Tensor, TensorData};
use burn_cubecl::cubecl;
use burn_cubecl::kernel::into_contiguous;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::reduce::{cube_max, cube_sum, scratch_len};
use super::{GpuOp, apply, by_row, count, dims, empty, low, matmul, primitive};
use crate::ops::Objective;
use crate::ops::cpu::InnerMost;

/// Logits that exist at one time, at least of one token: 64 MiB.
const ROUND: usize = 1 << 24;

/// As [`crate::ops::language_loss`], without soft targets.
pub(in crate::ops) fn language_loss(
    hidden: Tensor<2>,
    weight: Tensor<2>,
    targets: Tensor<1, Int>,
    objective: &Objective,
) -> Tensor<1> {
    let device = hidden.device();
    let [tokens] = targets.dims();
    let weights = match &objective.weights {
        Some(weights) => weights.clone(),
        None => vec![1.0 / tokens as f32; tokens],
    };
    let weights = TensorData::new(weights, [tokens]);
    let weights = Tensor::<1>::from_data(weights, &device.clone().inner_most());
    let targets = if device.is_autodiff() { targets.inner() } else { targets };
    let targets =
        <DispatchTensor as DispatchKindConversion<Cube>>::try_into_backend(targets.into_dispatch());
    let targets = targets.unwrap_or_else(|e| panic!("operation of a GPU: {e}")).int();
    let op = LanguageLoss {
        targets: into_contiguous(targets),
        weights: primitive(weights.into_dispatch()),
        cross_entropy: objective.cross_entropy,
        bf16: objective.bf16,
    };
    apply(op, [hidden.into_dispatch(), weight.into_dispatch()], device.is_autodiff())
}

#[derive(Debug, Clone)]
struct LanguageLoss {
    targets: CubeTensor,
    weights: CubeTensor,
    cross_entropy: f32,
    bf16: bool,
}

/// `losses[first + row]`, and where `track` says so the gradient in place of the logits.
#[cube(launch)]
fn cross_entropy<I: Numeric>(
    logits: &mut [f32],
    targets: &[I],
    weights: &[f32],
    losses: &mut [f32],
    first: u32,
    rows: u32,
    vocab: u32,
    factor: f32,
    #[comptime] track: bool,
    #[comptime] units: u32,
    #[define(I)] _int: ElemType,
) {
    let mut scratch = Shared::<[f32]>::new_slice(comptime!(scratch_len(units)));
    let mut row = CUBE_POS;
    while row < rows as usize {
        let vocab = vocab as usize;
        let base = row * vocab;
        let token = first as usize + row;
        let target = u32::cast_from(targets[token]) as usize;
        let wanted = logits[base + target];
        let mut top = wanted;
        let mut i = UNIT_POS as usize;
        while i < vocab {
            top = max(top, logits[base + i]);
            i += units as usize;
        }
        let top = cube_max(top, &mut scratch, units);
        let mut sum = 0.0f32;
        let mut i = UNIT_POS as usize;
        while i < vocab {
            sum += (logits[base + i] - top).exp();
            i += units as usize;
        }
        let sum = cube_sum(sum, &mut scratch, units);
        let scale = weights[token] * factor;
        if UNIT_POS == 0 {
            losses[token] = scale * (top - wanted + sum.ln());
        }
        if comptime!(track) {
            let inv = scale / sum;
            let mut i = UNIT_POS as usize;
            while i < vocab {
                let mut d = (logits[base + i] - top).exp() * inv;
                if i == target {
                    d -= scale;
                }
                logits[base + i] = d;
                i += units as usize;
            }
        }
        row += CUBE_COUNT;
    }
}

impl GpuOp<2> for LanguageLoss {
    /// The gradients of both inputs.
    type Saved = [CubeTensor; 2];

    fn forward(
        &self,
        [hidden, weight]: [CubeTensor; 2],
        track: bool,
    ) -> (CubeTensor, Option<Self::Saved>) {
        let ([tokens, cols], [vocab, _]) = (dims(&hidden), dims(&weight));
        let round = (ROUND / vocab).max(1);
        let losses = empty(&hidden, [tokens]);
        let int = dtype_to_storage_type(self.targets.dtype);
        let weight = if self.bf16 { low(weight) } else { weight };
        let (mut dhidden, mut dweight) = (Vec::new(), None);
        for first in (0..tokens).step_by(round) {
            let rows = round.min(tokens - first);
            let slices = [Slice::from(first..first + rows), Slice::from(0..cols)];
            let hidden = into_contiguous(Cube::float_slice(hidden.clone(), &slices));
            let hidden = if self.bf16 { low(hidden) } else { hidden };
            let turned = Cube::float_transpose(weight.clone());
            let logits = into_contiguous(matmul(hidden.clone(), turned, self.bf16));
            let (cubes, dim, units) = by_row(&logits, rows, vocab);
            cross_entropy::launch(
                &logits.client,
                cubes,
                dim,
                logits.clone().into_buffer_arg(),
                self.targets.clone().into_buffer_arg(),
                self.weights.clone().into_buffer_arg(),
                losses.clone().into_buffer_arg(),
                count(first),
                count(rows),
                count(vocab),
                self.cross_entropy,
                track,
                units,
                int,
            );
            if track {
                let d = if self.bf16 { low(logits) } else { logits };
                dhidden.push(matmul(d.clone(), weight.clone(), self.bf16));
                let share = matmul(Cube::float_transpose(d), hidden, self.bf16);
                dweight = Some(match dweight.take() {
                    None => share,
                    Some(sum) => Cube::float_add(sum, share),
                });
            }
        }
        let saved = dweight.map(|dweight| [Cube::float_cat(dhidden, 0), dweight]);
        (Cube::float_sum(losses), saved)
    }

    fn backward(
        &self,
        saved: Self::Saved,
        grad: CubeTensor,
        wanted: [bool; 2],
    ) -> [Option<CubeTensor>; 2] {
        let grad = Cube::float_reshape(grad, [1, 1].into());
        let [hidden, weight] = saved;
        [
            wanted[0].then(|| Cube::float_mul(hidden, grad.clone())),
            wanted[1].then(|| Cube::float_mul(weight, grad)),
        ]
    }
}
