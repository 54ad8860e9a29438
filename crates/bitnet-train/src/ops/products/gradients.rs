//! The products of the backward pass of linear layers: gradients of their one input and
//! of their weights, as floats, in fixed point or with int8; and such products alone, for
//! the head.

use bitnet_kernels::{
    Digits, FIXED_DEPTH, FIXED_MOST_COLS, Line, MatMut, MatRef, PackedActs, TernaryRows, TokensRef,
};
use rayon::prelude::*;

use super::{CHUNK, FLOAT_ROWS, Input, InputRef, LAYOUT, Packed, Packing, Weights, task_rows};
use crate::ops::cpu::kernels;
use crate::ops::linear::{Gradients, LinearRecipe};
use crate::ops::scratch::Scratch;
use crate::profile;

/// The way back through linear layers that read one input: from the gradient of
/// their outputs `[tokens, ΣN]` to that of the input `[tokens, K]`.
pub(in crate::ops) struct Backward<'a> {
    weights: &'a [&'a Weights],
    kind: BackwardKind,
    cols: usize,
    width: usize,
}

enum BackwardKind {
    /// The weights as right operands.
    Float(Vec<Packed>),
    /// The weights turned, `[K, ΣN]`, packed.
    Integer {
        turned: Scratch<u8>,
        /// The digits of a token's gradient; none: it is quantised to int8 (SwitchBack,
        /// arXiv:2304.13013).
        digits: Option<Digits>,
    },
}

impl<'a> Backward<'a> {
    pub(in crate::ops) fn new(weights: &'a [&'a Weights], recipe: LinearRecipe) -> Self {
        let (cols, width) = (weights[0].cols, weights.iter().map(|w| w.rows).sum());
        let Gradients { digits, int8_inputs } = recipe.gradients;
        let digits = digits.filter(|_| width <= FIXED_MOST_COLS);
        let kind = if (int8_inputs || digits.is_some()) && !recipe.is_float() {
            let digits = digits.filter(|_| !int8_inputs);
            BackwardKind::Integer { turned: turn(weights, width), digits }
        } else {
            let sources: Vec<Packing<'_>> = weights.iter().map(|w| w.packing()).collect();
            BackwardKind::Float(Packed::all(&sources))
        };
        Self { weights, kind, cols, width }
    }

    /// The gradient for some tokens. One thread.
    pub(in crate::ops) fn chunk(&self, grad: &[f32], out: &mut [f32]) {
        let tokens = out.len() / self.cols;
        match &self.kind {
            BackwardKind::Float(all) => {
                let mut first = 0;
                for (part, packed) in all.iter().enumerate() {
                    let own = MatRef::new(&grad[first..], tokens, packed.rows, self.width);
                    let to = MatMut::new(&mut *out, tokens, self.cols);
                    kernels().float_product(own, packed.view(), to, part > 0);
                    first += packed.rows;
                }
            }
            BackwardKind::Integer { turned, digits } => {
                self.chunk_integer(turned, *digits, grad, out);
            }
        }
    }

    /// The same with the gradient of every token as integers. The scales of the weights
    /// are multiplied in first, so that one scale serves all layers.
    fn chunk_integer(&self, turned: &[u8], digits: Option<Digits>, grad: &[f32], out: &mut [f32]) {
        let (tokens, width) = (out.len() / self.cols, self.width);
        let count = digits.map_or(1, Digits::count);
        let mut x = Input::any(tokens * count, width, true);
        let Input::Int8(all) = &mut x else { unreachable!("the input is int8") };
        let mut scaled = Scratch::any(width);
        for (t, grad) in grad.chunks_exact(width).enumerate() {
            let (mut from, mut to) = (grad, &mut scaled[..]);
            for w in self.weights {
                let (own, right) = from.split_at(w.rows);
                let (own_to, right_to) = to.split_at_mut(w.rows);
                kernels().scaled(own, w.ternary().weight_scale, own_to);
                (from, to) = (right, right_to);
            }
            let rows = t * count..(t + 1) * count;
            let q = &mut all.q[rows.start * all.stride..rows.end * all.stride];
            match digits {
                None => (all.scales[t], all.sums[t]) = kernels().quantize_gradient(&scaled, q),
                Some(digits) => {
                    let step = kernels().digits(digits, &scaled, q, &mut all.sums[rows.clone()]);
                    all.scales[rows].fill(step);
                }
            }
        }
        let rows = TernaryRows { layout: LAYOUT, cols: width, weight_scale: 1.0, bytes: turned };
        let out = MatMut::new(out, tokens, self.cols);
        match digits {
            None => kernels().ternary_matmul(rows, all.view(), out),
            Some(digits) => kernels().ternary_matmul_fixed(digits, rows, all.view(), out),
        }
    }
}

/// The gradient of the layers' one input, `[tokens, K]`, from that of their outputs
/// `[tokens, ΣN]`.
pub(in crate::ops) fn backward_input(
    grad: &[f32],
    weights: &[&Weights],
    recipe: LinearRecipe,
) -> Scratch<f32> {
    let _span = profile::span("input gradients");
    let back = Backward::new(weights, recipe);
    let (cols, width) = (back.cols, back.width);
    let mut out = Scratch::any(grad.len() / width * cols);
    out.par_chunks_mut(CHUNK * cols)
        .zip(grad.par_chunks(CHUNK * width))
        .with_max_len(1)
        .for_each(|(out, grad)| back.chunk(grad, out));
    out
}

/// The layers' weights side by side and turned, `[K, ΣN]`, packed.
fn turn(weights: &[&Weights], width: usize) -> Scratch<u8> {
    // The columns of one plane of a block become as many rows.
    const COLS: usize = 64;
    let (cols, row) = (weights[0].cols, LAYOUT.row_bytes(width));
    let mut out = Scratch::any(cols * row);
    out.par_chunks_mut(COLS * row).enumerate().for_each(|(task, out)| {
        out.fill(0);
        let (block, shift) = (task / 4, 2 * (task % 4));
        let all = weights.iter().flat_map(|w| {
            let bytes = w.ternary().bytes;
            bytes.chunks_exact(LAYOUT.row_bytes(cols))
        });
        for (n, bytes) in all.enumerate() {
            let at = n / 256 * 64 + n % 64;
            let codes = &bytes[block * COLS..][..COLS];
            for (row, code) in out.chunks_exact_mut(row).zip(codes) {
                row[at] |= (code >> shift & 3) << (2 * (n / 64 % 4));
            }
        }
    });
    out
}

/// Room for the gradients of layers' weights, `[N, K]` each.
pub(in crate::ops) fn gradients_of(weights: &[&Weights]) -> Vec<Vec<f32>> {
    weights.iter().map(|w| Scratch::any(w.rows * w.cols).into_vec()).collect()
}

/// The gradients of the layers' weights, `[N, K]` each.
pub(in crate::ops) fn backward_weights(
    grad: &[f32],
    x: &Input,
    weights: &[&Weights],
    recipe: LinearRecipe,
) -> Vec<Vec<f32>> {
    let mut out = gradients_of(weights);
    let cols = weights[0].cols;
    let x = x.tokens(cols, 0..x.len(cols));
    add_weight_gradients([WeightGradients { grad, x, weights, recipe, out: &mut out }], false);
    out
}

/// Some tokens' share in the gradients of layers that read one input.
pub(in crate::ops) struct WeightGradients<'a> {
    /// The gradient of their outputs, `[tokens, ΣN]`.
    pub(in crate::ops) grad: &'a [f32],
    /// Their input.
    pub(in crate::ops) x: InputRef<'a>,
    pub(in crate::ops) weights: &'a [&'a Weights],
    pub(in crate::ops) recipe: LinearRecipe,
    /// Where it goes, `[N, K]` each.
    pub(in crate::ops) out: &'a mut [Vec<f32>],
}

/// The rows of a right operand: as floats, or int8 ones, each with its scale, that meet
/// gradients in fixed point.
pub(in crate::ops) enum Right<'a> {
    Float(Packed),
    Fixed { digits: Digits, lines: Scratch<Line>, tokens: TokensRef<'a>, cols: usize },
}

impl<'a> Right<'a> {
    /// Packs some operands, each with its columns and the digits of what int8 meets.
    pub(in crate::ops) fn all<const J: usize>(
        inputs: [(InputRef<'a>, usize, Option<Digits>); J],
    ) -> Vec<Self> {
        let fixed = |x: InputRef<'a>, digits: Option<Digits>| match x {
            InputRef::Int8(tokens) => digits.map(|digits| (tokens, digits)),
            InputRef::Float(_) => None,
        };
        let sources: Vec<Packing<'_>> = inputs
            .iter()
            .filter(|(x, _, digits)| fixed(*x, *digits).is_none())
            .map(|(x, cols, _)| x.packing(*cols))
            .collect();
        let mut floats = Packed::all(&sources).into_iter();
        let mut all: Vec<Self> = inputs
            .iter()
            .filter_map(|&(x, cols, digits)| match fixed(x, digits) {
                Some((tokens, digits)) => {
                    let lines = Scratch::any(kernels().packed_acts_len(tokens.len(), cols));
                    Some(Self::Fixed { digits, lines, tokens, cols })
                }
                None => floats.next().map(Self::Float),
            })
            .collect();
        /// Columns of a task: two panels.
        const COLS: usize = 64;
        let mut tasks = Vec::new();
        for right in &mut all {
            let Self::Fixed { lines, tokens, cols, .. } = right else { continue };
            let blocks = lines.chunks_mut(kernels().packed_acts_len(FIXED_DEPTH, *cols));
            for (i, block) in blocks.enumerate() {
                let end = tokens.len().min((i + 1) * FIXED_DEPTH);
                let tokens = tokens.tokens(i * FIXED_DEPTH, end);
                let parts = block.chunks_mut(kernels().packed_acts_len(tokens.len(), COLS));
                tasks.extend(parts.enumerate().map(|(part, out)| (tokens, part * COLS, out)));
            }
        }
        tasks.into_par_iter().for_each(|(tokens, col, out)| kernels().pack_acts(tokens, col, out));
        all
    }

    /// `out = grad · self`, or that added to `out`. One thread.
    fn product(&self, grad: MatRef<'_>, out: MatMut<'_, f32>, add: bool) {
        match self {
            Self::Float(packed) => kernels().float_product(grad, packed.view(), out, add),
            Self::Fixed { digits, lines, tokens, cols } => {
                let acts = PackedActs::new(lines, tokens.scales, *cols);
                kernels().fixed_product(*digits, grad, acts, out, add);
            }
        }
    }
}

/// `out = a · b`, or `out += a · b`, for contiguous `out` `[M, cols]`.
pub(in crate::ops) fn product(
    a: MatRef<'_>,
    b: &Right<'_>,
    cols: usize,
    out: &mut [f32],
    add: bool,
) {
    let own = task_rows(a.rows(), if a.is_transposed() { 12 } else { 8 });
    out.par_chunks_mut((own * cols).max(1)).enumerate().with_max_len(1).for_each(|(i, out)| {
        let rows = out.len() / cols;
        let a = a.slice_rows(i * own, i * own + rows);
        b.product(a, MatMut::new(out, rows, cols), add);
    });
}

/// Writes, or where `add` adds, what some tokens give to weights' gradients.
pub(in crate::ops) fn add_weight_gradients<const J: usize>(
    jobs: [WeightGradients<'_>; J],
    add: bool,
) {
    let _span = profile::span("weight gradients");
    let inputs =
        jobs.each_ref().map(|job| (job.x, job.weights[0].cols, job.recipe.gradients.digits));
    let rights = Right::all(inputs);
    let mut tasks = Vec::new();
    for (job, right) in jobs.into_iter().zip(&rights) {
        let cols = job.weights[0].cols;
        let width: usize = job.weights.iter().map(|w| w.rows).sum();
        let tokens = job.grad.len() / width;
        // Few rows in small tasks, so that no thread waits long for another.
        let rows = if width < 1024 { FLOAT_ROWS / 2 } else { FLOAT_ROWS };
        let mut first = 0;
        for (out, w) in job.out.iter_mut().zip(job.weights) {
            let own = MatRef::new(&job.grad[first.min(job.grad.len())..], tokens, w.rows, width);
            tasks.extend(out.chunks_mut(rows * cols).enumerate().map(|(i, out)| {
                let count = out.len() / cols;
                let own = own.t().slice_rows(i * rows, i * rows + count);
                (own, right, MatMut::new(out, count, cols))
            }));
            first += w.rows;
        }
    }
    tasks.into_par_iter().with_max_len(1).for_each(|(grad, right, out)| {
        right.product(grad, out, add);
    });
}

#[cfg(test)]
mod tests {
    use super::super::testing::recipes;
    use super::super::{WeightsKind, pack_weights};
    use super::*;
    use crate::ops::cpu::testing::random;

    /// Two layers that read one input.
    fn two_layers(rows: [usize; 2], cols: usize) -> Vec<Weights> {
        let masters = [0, 1].map(|i| {
            let data = random([rows[i], cols], 0.05 * (1 + i) as f32, 3 + i as u64);
            data.try_to_vec::<f32>().unwrap()
        });
        let scheme = recipes()[0].weights;
        let packed = masters.each_ref().map(|w| pack_weights(&[(w, cols, scheme)]));
        packed
            .into_iter()
            .zip(rows)
            .map(|(mut packed, rows)| {
                let (bytes, scale) = packed.pop().unwrap();
                Weights { rows, cols, kind: WeightsKind::Ternary { bytes, scale } }
            })
            .collect()
    }

    /// More outputs than fixed point can add up: floats take its place.
    #[test]
    fn the_widest_layers_have_gradients() {
        let layers = two_layers([FIXED_MOST_COLS, 1], 3);
        let grad = random([2, FIXED_MOST_COLS + 1], 1e-6, 9).try_to_vec::<f32>().unwrap();
        let gradients = Gradients { digits: Some(Digits::Three), int8_inputs: false };
        let recipe = LinearRecipe { gradients, ..recipes()[0] };
        let of = |weights: &[&Weights], recipe| {
            let width: usize = weights.iter().map(|w| w.rows).sum();
            backward_input(&grad[..2 * width], weights, recipe).into_vec()
        };
        let both = [&layers[0], &layers[1]];
        assert_eq!(of(&both, recipe), of(&both, recipes()[0]));
        assert_ne!(of(&both[..1], recipe), of(&both[..1], recipes()[0]));
    }

    /// Half a step, times the magnitudes that it meets, and what f32 rounds.
    #[test]
    fn gradients_in_fixed_point_are_within_half_a_step_of_the_exact_ones() {
        let (tokens, cols, rows) = (600, 300, [70, 33]);
        let weights = two_layers(rows, cols);
        let weights: Vec<&Weights> = weights.iter().collect();
        let width: usize = rows.iter().sum();
        let mut x = Input::any(tokens, cols, true);
        let activations = random([tokens, cols], 3.0, 4).try_to_vec::<f32>().unwrap();
        for part in &mut x.chunks_mut(cols, tokens) {
            part.fill(cols, |t, q, _| {
                kernels().quantize(&activations[t * cols..][..cols], q.unwrap())
            });
        }
        let grad = random([tokens, width], 1e-6, 9).try_to_vec::<f32>().unwrap();
        let Input::Int8(q) = &x else { unreachable!() };
        let value = |t: usize, k: usize| f64::from(q.q[t * q.stride + k]);
        let mut trits = Vec::new();
        for w in &weights {
            let mut own = vec![0i8; cols];
            for bytes in w.ternary().bytes.chunks_exact(LAYOUT.row_bytes(cols)) {
                LAYOUT.unpack_row(bytes, &mut own).unwrap();
                let scale = f64::from(w.ternary().weight_scale);
                trits.extend(own.iter().map(|&t| f64::from(t) * scale));
            }
        }
        for (digits, bits) in [(Digits::Two, 127.0 * 256.0), (Digits::Three, 127.0 * 65536.0)] {
            let gradients = Gradients { digits: Some(digits), int8_inputs: false };
            let recipe = LinearRecipe { gradients, ..recipes()[0] };
            let dweights = backward_weights(&grad, &x, &weights, recipe).concat();
            let scale = |t: usize| f64::from(q.scales[t]);
            let largest = (0..tokens).map(scale).fold(0.0, f64::max) * 1e-6;
            for (at, got) in dweights.iter().enumerate() {
                let (n, k) = (at / cols, at % cols);
                let term = |t: usize| f64::from(grad[t * width + n]) * scale(t) * value(t, k);
                let exact: f64 = (0..tokens).map(term).sum();
                let met: f64 = (0..tokens).map(|t| value(t, k).abs()).sum();
                let sizes: f64 = (0..tokens).map(|t| term(t).abs()).sum();
                let bound = 0.5 * largest / bits * met + 4.0 * 2f64.powi(-24) * sizes;
                let off = (f64::from(*got) - exact).abs();
                assert!(off <= bound, "{digits:?}: {got} and {exact}, bound {bound}");
            }
            let dx = backward_input(&grad, &weights, recipe);
            for (at, got) in dx.iter().enumerate() {
                let (t, k) = (at / cols, at % cols);
                let term = |n: usize| f64::from(grad[t * width + n]) * trits[n * cols + k];
                let exact: f64 = (0..width).map(term).sum();
                let met = (0..width).map(|n| trits[n * cols + k].abs()).sum::<f64>();
                let sizes: f64 = (0..width).map(|n| term(n).abs()).sum();
                // The step is that of gradients times scales: the larger layer's counts.
                let ratio = f64::from(weights[0].ternary().weight_scale)
                    / f64::from(weights[1].ternary().weight_scale);
                let bound =
                    0.5 * 1e-6 / bits * met * ratio.max(1.0 / ratio) + 4.0 * 2f64.powi(-24) * sizes;
                let off = (f64::from(*got) - exact).abs();
                assert!(off <= bound, "{digits:?}: {got} and {exact}, bound {bound}");
            }
        }
    }

    /// Within the rounding of the gradient to int8: half of 1/127 of its largest
    /// magnitude, times the magnitudes of the weights it meets.
    #[test]
    fn int8_gradients_of_inputs_are_near_the_exact_ones() {
        let (tokens, cols, rows) = (5, 300, [70, 33]);
        let exact = recipes()[0];
        let int8 =
            LinearRecipe { gradients: Gradients { digits: None, int8_inputs: true }, ..exact };
        let weights = two_layers(rows, cols);
        let weights: Vec<&Weights> = weights.iter().collect();
        // As small as gradients are, and one token without any.
        let mut grad = random([tokens, 103], 1e-6, 9).try_to_vec::<f32>().unwrap();
        grad[103..206].fill(0.0);
        let near = backward_input(&grad, &weights, int8);
        let right = backward_input(&grad, &weights, exact);
        assert!(near[cols..2 * cols].iter().all(|&x| x == 0.0));
        assert_ne!(near[..], right[..]);
        let scale = weights.iter().map(|w| w.ternary().weight_scale).fold(0.0, f32::max);
        let bound = 103.0 * 0.5 / 127.0 * 1e-6 * scale;
        for (near, right) in near.iter().zip(right.iter()) {
            assert!((near - right).abs() <= bound, "{near} and {right}, bound {bound}");
        }
        let size = right.iter().fold(0.0f32, |m, x| m.max(x.abs()));
        assert!(bound < 0.2 * size, "the bound {bound} says something of {size}");
    }
}
