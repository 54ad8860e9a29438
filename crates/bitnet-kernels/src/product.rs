//! The integer product of packed rows and quantised tokens: what is common to
//! the two ways of doing it, and the choice between them.

use bitnet_core::Layout;

use crate::mat::MatMut;
use crate::simd::{Simd, array};
use crate::ternary::{TernaryRows, TokensRef};
use crate::{panel, rows};

/// From this many tokens on, unpacking a panel of rows once pays.
pub(crate) const PANEL_TOKENS: usize = 16;

/// The same where many registers let a group of tokens share what is unpacked.
const WIDE_PANEL_TOKENS: usize = 25;

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
    /// Adds the products of a block's codes and `acts`, `[PLANES]`.
    fn add_block<S: Simd>(isa: S, quad: S::Quad, block: S::Bytes, acts: &[[i8; 64]]) -> S::Quad;
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
    fn add_block<S: Simd>(isa: S, quad: S::Quad, block: S::Bytes, acts: &[[i8; 64]]) -> S::Quad {
        isa.quad_dot(quad, block, array!(4, p => isa.load_acts(&acts[p])))
    }
}

/// Layout P5: five codes a byte, looked up as four in the form of P2 and one.
#[derive(Clone, Copy)]
pub(crate) struct P5;

impl Codec for P5 {
    const PLANES: usize = 5;
    type Prepared<B: Copy> = (B, B);

    #[inline(always)]
    fn prepare<S: Simd>(isa: S, block: S::Bytes) -> (S::Bytes, S::Bytes) {
        isa.p5_codes(block)
    }

    #[inline(always)]
    fn plane<S: Simd>(isa: S, (four, last): (S::Bytes, S::Bytes), p: usize) -> S::Bytes {
        if p < 4 { isa.plane(four, p) } else { last }
    }

    #[inline(always)]
    fn add_block<S: Simd>(isa: S, quad: S::Quad, block: S::Bytes, acts: &[[i8; 64]]) -> S::Quad {
        isa.quad_dot_p5(quad, block, array!(5, p => isa.load_acts(&acts[p])))
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
        Layout::P5 => product_of::<S, P5, O>(isa, w, x, out, finish),
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
    if x.len() >= if S::WIDE { WIDE_PANEL_TOKENS } else { PANEL_TOKENS } {
        panel::product::<S, C, O, 1, _>(
            isa,
            w,
            x,
            out,
            #[inline(always)]
            |t| {
                #[inline(always)]
                move |[sum]| finish(t, sum)
            },
        );
    } else {
        rows::product::<S, C, O>(isa, w, x, out, finish);
    }
}
