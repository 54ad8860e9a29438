//! CPU kernels of ternary language models: slices in, slices out.
//!
//! A [`Kernels`] value is the proof that its instruction set is present on this
//! machine. Every path computes the same bits:
//!
//! * integer sums are exact, so the order of additions does not matter;
//! * float reductions keep [`LANES`](bitnet_core::ternary::LANES) partial sums in
//!   a fixed order, where multiply and add are fused is part of a definition (in
//!   products of dense rows, and in training's), and `exp` is our own, so a vector of any
//!   width gives the same result as the portable code.
//!
//! Training calls the same functions as inference: what was trained is what runs.
//! No threads, no I/O and no allocation on the hot path; `unsafe` lives in this
//! crate alone.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod allocator;
mod api;
mod attention;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod backward;
mod dense;
mod dense_blocks;
mod fixed_product;
mod float;
mod float_product;
mod int4_rows;
mod isa;
mod limits;
mod mat;
#[cfg(target_arch = "aarch64")]
mod neon;
mod optimizer;
mod panel;
mod portable;
mod product;
mod quantize;
mod rows;
mod simd;
mod ternary;

pub use allocator::LineAllocator;
pub use attention::{
    ATTEND_TILE, AttendQuery, KEY_BLOCK, KvElement, KvHead, KvHeadInt8Mut, attend_scores_len,
    key_blocks_len, store_key,
};
pub use dense::DenseRows;
pub use dense_blocks::{INT4_BYTES, INT8_BYTES, ROW_BLOCK};
pub use fixed_product::{Digits, FIXED_DEPTH, FIXED_MOST_COLS, Line, PackedActs};
pub use float_product::{MatRef, PACK_DEPTH, PackSource, PackedRef, Unit, packed_len};
pub use int4_rows::{INT4_MAX_COLS, Int4Rows};
pub use isa::{IsaError, Kernels, required_isas_missing};
pub use mat::MatMut;
pub use optimizer::{AdamW, MOMENT_BLOCK, MomentsMut};
pub use quantize::repack_row;
pub use ternary::{QuantizedTokens, TernaryRows, TokensRef};
