//! The gated activation, element by element.

use bitnet_core::Activation;
use burn::tensor::Tensor;
use burn_cubecl::cubecl;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::{GpuOp, apply, by_element, count, dims, empty};

/// As [`crate::ops::gated`].
pub(in crate::ops) fn gated(act: Activation, gate: Tensor<2>, up: Tensor<2>) -> Tensor<2> {
    let autodiff = gate.device().is_autodiff();
    apply(Gated(act), [gate.into_dispatch(), up.into_dispatch()], autodiff)
}

#[derive(Debug, Clone)]
struct Gated(Activation);

impl Gated {
    fn is_silu(&self) -> bool {
        self.0 == Activation::Silu
    }
}

#[cube(launch)]
fn forward(gate: &[f32], up: &[f32], out: &mut [f32], elements: u32, #[comptime] silu: bool) {
    let mut at = ABSOLUTE_POS;
    while at < elements as usize {
        let g = gate[at];
        if comptime!(silu) {
            out[at] = g / (1.0f32 + (-g).exp()) * up[at];
        } else {
            let r = max(g, 0.0f32);
            out[at] = r * r * up[at];
        }
        at += CUBE_COUNT * CUBE_DIM as usize;
    }
}

#[cube(launch)]
fn backward(
    gate: &[f32],
    up: &[f32],
    grad: &[f32],
    dgate: &mut [f32],
    dup: &mut [f32],
    elements: u32,
    #[comptime] silu: bool,
) {
    let mut at = ABSOLUTE_POS;
    while at < elements as usize {
        let g = gate[at];
        let d = grad[at];
        if comptime!(silu) {
            let s = 1.0f32 / (1.0f32 + (-g).exp());
            dup[at] = d * g * s;
            dgate[at] = d * up[at] * s * (1.0f32 + g * (1.0f32 - s));
        } else {
            let r = max(g, 0.0f32);
            dup[at] = d * r * r;
            dgate[at] = d * up[at] * 2.0f32 * r;
        }
        at += CUBE_COUNT * CUBE_DIM as usize;
    }
}

impl GpuOp<2> for Gated {
    type Saved = [CubeTensor; 2];

    fn forward(
        &self,
        [gate, up]: [CubeTensor; 2],
        track: bool,
    ) -> (CubeTensor, Option<Self::Saved>) {
        let [rows, cols] = dims(&gate);
        let out = empty(&gate, [rows, cols]);
        let (cubes, dim) = by_element(&gate, rows * cols);
        forward::launch(
            &gate.client,
            cubes,
            dim,
            gate.clone().into_buffer_arg(),
            up.clone().into_buffer_arg(),
            out.clone().into_buffer_arg(),
            count(rows * cols),
            self.is_silu(),
        );
        (out, track.then_some([gate, up]))
    }

    fn backward(
        &self,
        [gate, up]: Self::Saved,
        grad: CubeTensor,
        wanted: [bool; 2],
    ) -> [Option<CubeTensor>; 2] {
        let [rows, cols] = dims(&gate);
        let (dgate, dup) = (empty(&gate, [rows, cols]), empty(&gate, [rows, cols]));
        let (cubes, dim) = by_element(&gate, rows * cols);
        backward::launch(
            &gate.client,
            cubes,
            dim,
            gate.clone().into_buffer_arg(),
            up.into_buffer_arg(),
            grad.into_buffer_arg(),
            dgate.clone().into_buffer_arg(),
            dup.clone().into_buffer_arg(),
            count(rows * cols),
            self.is_silu(),
        );
        [wanted[0].then_some(dgate), wanted[1].then_some(dup)]
    }
}
