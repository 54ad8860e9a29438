//! Run a packed model on the CPU: memory-mapped weights, int8 activations,
//! batched prefill, one-token decode, sampling and streamed text.
//!
//! ```no_run
//! use bitnet_engine::{
//!     GenerateOptions, Generator, LoadOptions, Model, Sampler, SamplerOptions, Session,
//!     SessionOptions,
//! };
//!
//! let model = Model::open("model.gguf".as_ref(), &LoadOptions::default())?;
//! let tokenizer = model.tokenizer()?;
//! let mut session = Session::new(&model, &SessionOptions::default())?;
//! let prompt = tokenizer.encode_prompt("Once upon a time")?;
//! let sampler = Sampler::new(SamplerOptions::default())?;
//! let options = GenerateOptions::default();
//! for piece in Generator::new(&mut session, &tokenizer, sampler, &prompt, &options)? {
//!     print!("{}", piece?);
//! }
//! # Ok::<(), bitnet_engine::EngineError>(())
//! ```
//!
//! The forward pass runs the same kernels in the same order as training's, so a
//! model's logits have the same bits here, whatever the instruction set, the
//! number of threads and the split of a prompt into chunks.
//!
//! A program that uses this crate is faster with [`LineAllocator`] as its global
//! allocator: buffers then begin with a cache line.

#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

#[cfg(target_endian = "big")]
compile_error!("packed models are little endian and are used in place");

mod batch;
mod cache;
mod error;
mod forward;
mod generate;
mod head;
mod load;
mod model;
mod open;
mod parallel;
mod runner;
mod sampler;
mod session;
mod stream;
mod tokenizer;

pub use batch::{BatchSession, Piece};
pub use bitnet_format::model::OpenOptions;
pub use bitnet_kernels::LineAllocator;
pub use cache::KvType;
pub use error::EngineError;
pub use forward::TracePoint;
pub use generate::{FinishReason, GenerateOptions, Generator, Stats};
pub use head::{HeadCounts, HeadMode, TokenLogit};
pub use model::{ARCHITECTURE, Golden, LinearRef, LoadOptions, Model, Parts, Repack};
pub use open::Packing;
pub use parallel::{Workers, physical_cores};
pub use sampler::{Sampler, SamplerOptions};
pub use session::{Session, SessionOptions};
pub use stream::{StopFilter, Utf8Stream};
pub use tokenizer::Tokenizer;
