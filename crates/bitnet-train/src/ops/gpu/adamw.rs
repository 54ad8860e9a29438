//! One step of AdamW, element by element.

use bitnet_kernels::AdamW;
use burn::backend::{BackendTensor, Cube, DispatchKindConversion, DispatchTensor};
use burn::tensor::Tensor;
use burn_cubecl::cubecl;
use burn_cubecl::tensor::CubeTensor;
use cubecl::prelude::*;

use super::{by_element, contiguous, count, empty, primitive};

/// The parameter and its two moments after a step along `g`; all flat, without autodiff.
pub(crate) fn step(
    constants: &AdamW,
    p: Tensor<1>,
    g: Tensor<1>,
    moments: [Tensor<1>; 2],
) -> [Tensor<1>; 3] {
    let [elements] = p.dims();
    let [p, g] = [p, g].map(|t| contiguous(primitive(t.into_dispatch())));
    let [m, v] = moments.map(|t| contiguous(primitive(t.into_dispatch())));
    let out: [CubeTensor; 3] = std::array::from_fn(|_| empty(&p, [elements]));
    let [new_p, new_m, new_v] = out.clone();
    let (cubes, dim) = by_element(&p, elements);
    adamw::launch(
        &p.client.clone(),
        cubes,
        dim,
        p.into_buffer_arg(),
        g.into_buffer_arg(),
        m.into_buffer_arg(),
        v.into_buffer_arg(),
        new_p.into_buffer_arg(),
        new_m.into_buffer_arg(),
        new_v.into_buffer_arg(),
        count(elements),
        constants.beta1,
        constants.beta2,
        constants.eps,
        constants.scale,
        constants.keep,
        constants.rate,
        constants.root,
    );
    out.map(|t| {
        let t: BackendTensor<Cube> = BackendTensor::Float(t);
        Tensor::from_dispatch(DispatchTensor::from_backend(t))
    })
}

#[cube(launch)]
fn adamw(
    p: &[f32],
    g: &[f32],
    m: &[f32],
    v: &[f32],
    new_p: &mut [f32],
    new_m: &mut [f32],
    new_v: &mut [f32],
    elements: u32,
    beta1: f32,
    beta2: f32,
    eps: f32,
    scale: f32,
    keep: f32,
    rate: f32,
    root: f32,
) {
    let mut at = ABSOLUTE_POS;
    while at < elements as usize {
        let gradient = g[at] * scale;
        let first = m[at] * beta1 + gradient * (1.0f32 - beta1);
        let second = v[at] * beta2 + gradient * gradient * (1.0f32 - beta2);
        new_m[at] = first;
        new_v[at] = second;
        new_p[at] = p[at] * keep - first * rate / (second.sqrt() * root + eps);
        at += CUBE_COUNT * CUBE_DIM as usize;
    }
}
