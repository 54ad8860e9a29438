//! The transformer as burn modules: what is trained.
//!
//! The block is that of BitNet b1.58 2B4T (arXiv:2504.12285): RMSNorm, grouped-
//! query attention with rotary positions, a norm before each output projection
//! (SubLN), a gated feed-forward network, `BitLinear` everywhere but in embedding,
//! head and norms.

mod block;
mod transformer;

pub use block::{Attention, BitLinear, Block, FeedForward, RmsNorm, Rows};
pub use transformer::{LayerTrace, NamedTensor, Transformer};
