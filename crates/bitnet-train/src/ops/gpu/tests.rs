//! Every operation on whatever device wgpu finds, beside its plain version on the CPU.
//!
//! Both add f32 in another order, and a GPU's division, exponential and root may be a few
//! units in the last place off: the bounds are a few of those for values of order one.

use bitnet_core::{Activation, ternary};
use bitnet_kernels::AdamW;
use burn::tensor::{Device, Int, Tensor};

use crate::device::DeviceChoice;
use crate::ops::cpu::testing::{check_gradients_on, random, to_vec};
use crate::ops::products::testing::recipes;
use crate::ops::{self, AttentionShape, LinearRecipe, Objective, plain};

/// None where this was built with wgpu on a machine that has no driver.
fn device() -> Option<Device> {
    DeviceChoice::Wgpu(None).open().ok()
}

#[test]
fn rms_norm_on_wgpu_equals_the_plain_version() {
    let Some(device) = device() else { return };
    // The last has more rows than a launch has cubes.
    for [rows, cols] in [[70, 48], [3, 1000], [300, 1], [40_000, 3]] {
        check_gradients_on(
            &device,
            [random([rows, cols], 1.5, 1), random([1, cols], 1.0, 2)],
            |[x, w]| ops::rms_norm(x, w.reshape([cols]), 1e-5),
            |[x, w]| plain::rms_norm(x, w.reshape([cols]), 1e-5),
            1e-5,
        );
    }
}

#[test]
fn gated_on_wgpu_equals_the_plain_version() {
    let Some(device) = device() else { return };
    // The last has more elements than a launch has units.
    for (act, shape) in [
        (Activation::Relu2, [37, 90]),
        (Activation::Silu, [37, 90]),
        (Activation::Relu2, [2900, 3000]),
    ] {
        check_gradients_on(
            &device,
            [random(shape, 4.0, 1), random(shape, 2.0, 2)],
            |[g, u]| ops::gated(act, g, u),
            |[g, u]| plain::gated(act, g, u),
            2e-6,
        );
    }
}

#[test]
fn bit_linear_on_wgpu_equals_the_plain_version_and_the_definition() {
    let Some(device) = device() else { return };
    for [tokens, rows, cols] in [[70, 33, 96], [5, 64, 700], [1, 1, 1]] {
        let (x, w) = (random([tokens, cols], 3.0, 7), random([rows, cols], 0.05, 8));
        let recipe = recipes()[0];
        check_gradients_on(
            &device,
            [x.clone(), w.clone()],
            |[x, w]| ops::bit_linear(x, w, recipe),
            |[x, w]| plain::bit_linear(x, w, recipe),
            5e-6,
        );
        // One integer more or less would be 1/127 of the largest product.
        let (xs, ws) = (x.try_to_vec::<f32>().unwrap(), w.try_to_vec::<f32>().unwrap());
        let want: Vec<f32> =
            xs.chunks_exact(cols).flat_map(|x| ternary::bit_linear(&ws, x)).collect();
        let [x, w] = [x, w].map(|data| Tensor::<2>::from_data(data, &device));
        let got = to_vec(ops::bit_linear(x, w, recipe));
        for (got, want) in got.iter().zip(&want) {
            assert!((got - want).abs() <= 2e-6 * want.abs(), "{got} and {want}");
        }
    }
}

/// A zero row, and weights that are all zero, have the scale of the smallest magnitude.
#[test]
fn zeros_on_wgpu_stay_zeros() {
    let Some(device) = device() else { return };
    let (x, w) = (Tensor::<2>::zeros([3, 40], &device), Tensor::<2>::zeros([5, 40], &device));
    let out = to_vec(ops::bit_linear(x, w, recipes()[0]));
    assert!(out.iter().all(|&x| x == 0.0), "{out:?}");
}

#[test]
fn attention_on_wgpu_equals_the_plain_version() {
    let Some(device) = device() else { return };
    for (heads, kv_heads, documents) in
        [(4, 4, None), (4, 2, None), (2, 1, Some([5, 15, 1, 9, 10].into()))]
    {
        let (batch, time, head_dim) = (2, 20, 8);
        let shape = AttentionShape {
            batch,
            time,
            heads,
            kv_heads,
            head_dim,
            rope_theta: 10_000.0,
            documents,
            bf16: false,
        };
        let of = |heads: usize, seed| random([batch * time, heads * head_dim], 1.5, seed);
        check_gradients_on(
            &device,
            [of(heads, 1), of(kv_heads, 2), of(kv_heads, 3)],
            |[q, k, v]| ops::attention(q, k, v, shape.clone()),
            |[q, k, v]| plain::attention(q, k, v, shape.clone()),
            1e-5,
        );
        // burn's own operations there, too.
        check_gradients_on(
            &device,
            [of(heads, 1), of(kv_heads, 2), of(kv_heads, 3)],
            |[q, k, v]| plain::attention(q, k, v, shape.clone()),
            |[q, k, v]| plain::attention(q, k, v, shape.clone()),
            1e-5,
        );
        // One sequence at a time.
        check_gradients_on(
            &device,
            [of(heads, 1), of(kv_heads, 2), of(kv_heads, 3)],
            |qkv| super::attention::in_rounds(qkv, shape.clone(), 1),
            |[q, k, v]| plain::attention(q, k, v, shape.clone()),
            1e-5,
        );
    }
}

#[test]
fn the_loss_on_wgpu_equals_that_of_the_cpu() {
    let Some(device) = device() else { return };
    // The second goes through rounds of tokens.
    for (tokens, vocab, cols) in [(150, 41, 24), (70, 300_000, 8)] {
        let targets: Vec<i64> = (0..tokens as i64).map(|i| i * 7 % vocab as i64).collect();
        let mask: Vec<f32> = (0..tokens).map(|i| (i % 3) as f32 * 0.5).collect();
        for objective in [
            Objective::default(),
            Objective { weights: Some(mask), cross_entropy: 0.7, ..Objective::default() },
        ] {
            type Loss = fn(Tensor<2>, Tensor<2>, Tensor<1, Int>, &Objective) -> Tensor<1>;
            let run = |f: Loss| {
                let (targets, objective) = (targets.clone(), objective.clone());
                move |[h, w]: [Tensor<2>; 2]| {
                    let targets = Tensor::<1, Int>::from_data(targets.as_slice(), &h.device());
                    f(h, w, targets, &objective).reshape([1, 1])
                }
            };
            check_gradients_on(
                &device,
                [random([tokens, cols], 2.0, 1), random([vocab, cols], 1.0, 2)],
                run(ops::language_loss),
                // On the CPU: its sums are in f64, the plain version's in f32.
                run(ops::language_loss),
                2e-5,
            );
        }
    }
}

#[test]
fn the_optimizer_on_wgpu_equals_the_kernel_of_the_cpu() {
    let Some(device) = device() else { return };
    let step = AdamW {
        beta1: 0.9,
        beta2: 0.95,
        eps: 1e-8,
        scale: 0.5,
        keep: 0.999,
        rate: 0.01,
        root: 1.3,
    };
    let n = 1000;
    let data = [1.0, 0.1, 0.01, 0.02].into_iter().zip(1..);
    let mut host: Vec<Vec<f32>> =
        data.map(|(scale, seed)| random([1, n], scale, seed).try_into_vec().unwrap()).collect();
    host[3].iter_mut().for_each(|v| *v = v.abs());
    let [p, g, m, v]: [Tensor<1>; 4] =
        std::array::from_fn(|i| Tensor::from_floats(host[i].as_slice(), &device));
    let got = super::adamw_step(&step, p, g, [m, v]).map(to_vec);
    let [p, g, m, v] = &mut host[..] else { unreachable!() };
    ops::cpu::kernels().adamw(&step, p, g, m, v);
    for (got, want) in got.iter().zip([p, m, v]) {
        for (got, want) in got.iter().zip(want.iter()) {
            assert!((got - want).abs() <= 1e-6 * want.abs().max(1e-2), "{got} and {want}");
        }
    }
}

/// What only the plain versions compute still runs there.
#[test]
fn other_recipes_on_wgpu_are_the_plain_versions() {
    let Some(device) = device() else { return };
    let [x, w] = [random([9, 48], 2.0, 1), random([5, 48], 0.05, 2)]
        .map(|data| Tensor::<2>::from_data(data, &device));
    let all = recipes();
    for recipe in [all[1], all[2], LinearRecipe { blend: 0.5, ..all[0] }] {
        let got = to_vec(ops::quantized_linear(x.clone(), w.clone(), recipe));
        let want = to_vec(plain::quantized_linear(x.clone(), w.clone(), recipe));
        assert_eq!(got, want, "{recipe:?}");
    }
}
