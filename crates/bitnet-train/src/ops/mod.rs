//! The operations of a ternary transformer, each with a backward pass of its own.
//!
//! Every operation stands here twice. The *plain* version is made of burn's
//! tensor operations: it runs on every device, autodiff derives its gradient, and
//! it is the reference. The *fused* version runs on the CPU device through
//! [`bitnet_kernels`], the kernels that the inference engine uses, so that a
//! trained model and its packed file compute the same bits up to the head. Tests
//! compare the two.

mod attention;
mod attention_layer;
mod bf16;
mod bit_linear;
pub(crate) mod cpu;
mod embedding;
mod feed_forward;
mod gated;
#[cfg(any(feature = "wgpu", feature = "cuda"))]
pub(crate) mod gpu;
mod head;
mod linear;
mod mixed_linear;
mod norm;
pub(crate) mod products;
mod rms_norm;
mod rotation;
pub(crate) mod scratch;
mod top_k;

pub use attention::{AttentionShape, attention};
pub use attention_layer::{AttentionWeights, LayerRecipe, attention_layer};
pub use bit_linear::bit_linear;
pub use embedding::{embed, round_to};
pub use feed_forward::{FeedForwardWeights, feed_forward};
pub use gated::gated;
pub use head::{Objective, SoftTargets, cross_entropy, language_loss, logits};
pub use linear::{Gradients, LinearRecipe, linear, quantized_linear};
pub use rms_norm::rms_norm;
pub use scratch::release;

/// The plain versions: burn's tensor operations, on any device.
pub mod plain {
    pub use super::attention::plain as attention;
    pub use super::attention_layer::plain as attention_layer;
    pub use super::bit_linear::plain as bit_linear;
    pub use super::feed_forward::plain as feed_forward;
    pub use super::gated::plain as gated;
    pub use super::head::{
        plain_cross_entropy as cross_entropy, plain_language_loss as language_loss,
        plain_logits as logits,
    };
    pub use super::linear::plain as quantized_linear;
    pub use super::rms_norm::plain as rms_norm;
}
