//! The integer product of packed rows and quantised tokens: what is common to
//! the two ways of doing it, and the choice between them.

use bitnet_core::Layout;

use crate::mat::MatMut;
use crate::simd::Simd;
use crate::ternary::{TernaryRows, TokensRef};
use crate::{panel, rows};

/// From this many tokens on, unpacking a panel of rows once pays.
const PANEL_TOKENS: usize = 16;

/// A layout as the kernels see it: 64-byte blocks of some planes of 64 codes.
pub(crate) trait Codec: Copy {
    /// Planes of 64 codes in a block.
    const PLANES: usize;
    /// A block, ready to give its planes.
    type Prepared<B: Copy>: Copy;

    /// Reads a block.
    fn prepare<S: Simd>(isa: S, block: S::Bytes) -> Self::Prepared<S::Bytes>;
    /// The codes of one plane.
    fn plane<S: Simd>(isa: S, block: Self::Prepared<S::Bytes>, p: usize) -> S::Bytes;
    /// The total of codes · activations of four rows and one token.
    ///
    /// # Shapes
    /// Each row is `[blocks]`; `acts` is `[blocks · PLANES]`.
    fn dot_rows<S: Simd>(isa: S, rows: [&[[u8; 64]]; 4], acts: &[[i8; 64]]) -> [i32; 4];
}

/// Layout P2: two bits a code.
#[derive(Clone, Copy)]
pub(crate) struct P2;

impl Codec for P2 {
    const PLANES: usize = 4;
    type Prepared<B: Copy> = B;

    #[inline(always)]
    fn prepare<S: Simd>(_isa: S, block: S::Bytes) -> S::Bytes {
        block
    }

    #[inline(always)]
    fn plane<S: Simd>(isa: S, block: S::Bytes, p: usize) -> S::Bytes {
        isa.plane(block, p)
    }

    #[inline(always)]
    fn dot_rows<S: Simd>(isa: S, rows: [&[[u8; 64]]; 4], acts: &[[i8; 64]]) -> [i32; 4] {
        rows::dot_quads(isa, rows, acts)
    }
}

/// `out[t, n] = finish(t, Σ_k code[n, k] · q[t, k])`.
#[inline(always)]
pub(crate) fn product<S: Simd, O: Copy>(
    isa: S,
    w: TernaryRows<'_>,
    x: TokensRef<'_>,
    out: MatMut<'_, O>,
    finish: impl Fn(usize, i32) -> O + Copy,
) {
    match w.layout {
        Layout::P2 => product_of::<S, P2, O>(isa, w, x, out, finish),
    }
}

#[inline(always)]
fn product_of<S: Simd, C: Codec, O: Copy>(
    isa: S,
    w: TernaryRows<'_>,
    x: TokensRef<'_>,
    out: MatMut<'_, O>,
    finish: impl Fn(usize, i32) -> O + Copy,
) {
    if x.len() >= PANEL_TOKENS {
        panel::product::<S, C, O>(isa, w, x, out, finish);
    } else {
        rows::product::<S, C, O>(isa, w, x, out, finish);
    }
}
