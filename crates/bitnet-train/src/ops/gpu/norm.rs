//! RMSNorm, a cube a row.

use burn::backend::Cube;
use burn::backend::ops::FloatTensorOps;
use burn::tensor::Tensor;
use burn_cubecl::cubecl;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::reduce::{cube_sum, scratch_len};
use super::{GpuOp, apply, by_element, by_row, count, dims, empty};

/// Rows whose share in the weight's gradient one unit sums.
const GROUP: usize = 64;

/// As [`crate::ops::rms_norm`].
pub(in crate::ops) fn rms_norm(x: Tensor<2>, weight: Tensor<1>, eps: f32) -> Tensor<2> {
    let autodiff = x.device().is_autodiff();
    apply(RmsNorm { eps }, [x.into_dispatch(), weight.into_dispatch()], autodiff)
}

#[derive(Debug, Clone)]
struct RmsNorm {
    eps: f32,
}

#[cube(launch)]
fn forward(
    x: &[f32],
    weight: &[f32],
    out: &mut [f32],
    inv_rms: &mut [f32],
    rows: u32,
    cols: u32,
    eps: f32,
    #[comptime] units: u32,
) {
    let mut scratch = Shared::<[f32]>::new_slice(comptime!(scratch_len(units)));
    let mut row = CUBE_POS;
    while row < rows as usize {
        let first = row * cols as usize;
        let mut sum = 0.0f32;
        let mut i = UNIT_POS as usize;
        while i < cols as usize {
            let v = x[first + i];
            sum += v * v;
            i += units as usize;
        }
        let total = cube_sum(sum, &mut scratch, units);
        let inv = 1.0f32 / (total / f32::cast_from(cols) + eps).sqrt();
        let mut i = UNIT_POS as usize;
        while i < cols as usize {
            out[first + i] = x[first + i] * inv * weight[i];
            i += units as usize;
        }
        if UNIT_POS == 0 {
            inv_rms[row] = inv;
        }
        row += CUBE_COUNT;
    }
}

#[cube(launch)]
fn backward_input(
    x: &[f32],
    weight: &[f32],
    inv_rms: &[f32],
    grad: &[f32],
    dx: &mut [f32],
    rows: u32,
    cols: u32,
    #[comptime] units: u32,
) {
    let mut scratch = Shared::<[f32]>::new_slice(comptime!(scratch_len(units)));
    let mut row = CUBE_POS;
    while row < rows as usize {
        let first = row * cols as usize;
        let inv = inv_rms[row];
        let mut sum = 0.0f32;
        let mut i = UNIT_POS as usize;
        while i < cols as usize {
            sum += grad[first + i] * weight[i] * x[first + i];
            i += units as usize;
        }
        let dot = cube_sum(sum, &mut scratch, units);
        let factor = dot * inv * inv / f32::cast_from(cols);
        let mut i = UNIT_POS as usize;
        while i < cols as usize {
            dx[first + i] = inv * (grad[first + i] * weight[i] - x[first + i] * factor);
            i += units as usize;
        }
        row += CUBE_COUNT;
    }
}

/// `partial[g, i]`: the sum over the rows of group `g` of `grad · x · inv_rms`.
#[cube(launch)]
fn weight_partials(
    x: &[f32],
    inv_rms: &[f32],
    grad: &[f32],
    partial: &mut [f32],
    rows: u32,
    cols: u32,
    groups: u32,
    group: u32,
) {
    let mut at = ABSOLUTE_POS;
    while at < (groups * cols) as usize {
        let i = at % cols as usize;
        let first = at / cols as usize * group as usize;
        let mut sum = 0.0f32;
        let mut row = first;
        while row < first + group as usize && row < rows as usize {
            let here = row * cols as usize + i;
            sum += grad[here] * x[here] * inv_rms[row];
            row += 1;
        }
        partial[at] = sum;
        at += CUBE_COUNT * CUBE_DIM as usize;
    }
}

impl GpuOp<2> for RmsNorm {
    /// The input, the weight and `1 / rms` of every row.
    type Saved = [CubeTensor; 3];

    fn forward(
        &self,
        [x, weight]: [CubeTensor; 2],
        track: bool,
    ) -> (CubeTensor, Option<Self::Saved>) {
        let [rows, cols] = dims(&x);
        let (out, inv) = (empty(&x, [rows, cols]), empty(&x, [rows]));
        let (cubes, dim, units) = by_row(&x, rows, cols);
        forward::launch(
            &x.client,
            cubes,
            dim,
            x.clone().into_buffer_arg(),
            weight.clone().into_buffer_arg(),
            out.clone().into_buffer_arg(),
            inv.clone().into_buffer_arg(),
            count(rows),
            count(cols),
            self.eps,
            units,
        );
        (out, track.then_some([x, weight, inv]))
    }

    fn backward(
        &self,
        [x, weight, inv]: Self::Saved,
        grad: CubeTensor,
        wanted: [bool; 2],
    ) -> [Option<CubeTensor>; 2] {
        let [rows, cols] = dims(&x);
        let dx = wanted[0].then(|| {
            let dx = empty(&x, [rows, cols]);
            let (cubes, dim, units) = by_row(&x, rows, cols);
            backward_input::launch(
                &x.client,
                cubes,
                dim,
                x.clone().into_buffer_arg(),
                weight.into_buffer_arg(),
                inv.clone().into_buffer_arg(),
                grad.clone().into_buffer_arg(),
                dx.clone().into_buffer_arg(),
                count(rows),
                count(cols),
                units,
            );
            dx
        });
        let dweight = wanted[1].then(|| {
            let groups = rows.div_ceil(GROUP);
            let partial = empty(&x, [groups, cols]);
            let (cubes, dim) = by_element(&x, groups * cols);
            weight_partials::launch(
                &x.client,
                cubes,
                dim,
                x.clone().into_buffer_arg(),
                inv.into_buffer_arg(),
                grad.into_buffer_arg(),
                partial.clone().into_buffer_arg(),
                count(rows),
                count(cols),
                count(groups),
                count(GROUP),
            );
            Cube::float_sum_dim(partial, 0)
        });
        [dx, dweight]
    }
}
