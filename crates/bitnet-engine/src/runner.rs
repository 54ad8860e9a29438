//! What runs passes for sessions of one sequence and of many: a model, threads,
//! an instruction set and the buffers, but no cache.

use bitnet_core::rope;
use bitnet_kernels::{INT4_MAX_COLS, Kernels};

use crate::cache::{Heads, KvCache, Place};
use crate::error::EngineError;
use crate::forward::{self, Buffers, Hook, Pass};
use crate::head::{HeadMode, Top};
use crate::model::Model;
use crate::parallel::Workers;
use crate::session::SessionOptions;

#[derive(Debug)]
pub(crate) struct Runner {
    pub(crate) model: Model,
    pub(crate) kernels: Kernels,
    pub(crate) workers: Workers,
    pub(crate) heads: Heads,
    pub(crate) chunk: usize,
    frequencies: Vec<f32>,
    pub(crate) buffers: Buffers,
    /// Where the tokens of the pass stand.
    places: Vec<Place>,
}

/// What a pass leaves besides keys and values.
pub(crate) enum Output<'a> {
    /// Nothing: more tokens follow.
    Nothing,
    /// The head's input of all tokens, in the buffers.
    Normed,
    /// That, and the logits `[V]` of the last token.
    Last(&'a mut [f32]),
    /// That, and the logits `[T, V]` of all tokens.
    All(&'a mut [f32]),
    /// That, and the best tokens after every one.
    Top(&'a mut Top, usize),
}

impl Runner {
    pub(crate) fn new(
        model: &Model,
        options: &SessionOptions,
        workers: Workers,
    ) -> Result<Self, EngineError> {
        let config = model.config();
        let most = config.max_position_embeddings;
        let context = options.context.unwrap_or(most);
        if context == 0 || context > most {
            let why = format!("must be in 1..={most}, the model's context");
            let value = context.to_string();
            return Err(EngineError::Option { option: "context", value, why });
        }
        if options.chunk == 0 {
            let (value, why) = ("0".to_owned(), "must be at least 1".to_owned());
            return Err(EngineError::Option { option: "chunk", value, why });
        }
        let kernels = match options.kernels {
            Some(kernels) => kernels,
            None => Kernels::from_env()?,
        };
        if options.head != HeadMode::Stored {
            if config.hidden_size > INT4_MAX_COLS {
                let (value, size) = (options.head.name().to_owned(), config.hidden_size);
                let why = format!("the hidden size {size} is above {INT4_MAX_COLS}; use stored");
                return Err(EngineError::Option { option: "head", value, why });
            }
            model.0.nested_head(&workers);
        }
        model.0.repack_for(kernels, &workers);
        Ok(Self {
            kernels,
            workers,
            heads: Heads::new(config, context),
            chunk: options.chunk.min(context),
            frequencies: rope::frequencies(config.head_dim(), config.rope_theta),
            buffers: Buffers::default(),
            places: Vec::new(),
            model: model.clone(),
        })
    }

    /// An empty cache for one sequence.
    pub(crate) fn cache(&self, options: &SessionOptions) -> Result<KvCache, EngineError> {
        KvCache::new(options.kv, self.model.config(), self.heads)
    }

    /// Whether `tokens` may follow the first `position` of a sequence.
    pub(crate) fn check(&self, position: usize, tokens: &[u32]) -> Result<(), EngineError> {
        if tokens.is_empty() {
            return Err(EngineError::Empty);
        }
        let context = self.heads.context;
        if tokens.len() > context - position {
            return Err(EngineError::Context { tokens: tokens.len(), position, context });
        }
        let vocab_size = self.model.config().vocab_size;
        match tokens.iter().position(|&t| t as usize >= vocab_size) {
            Some(i) => {
                let (token, position) = (tokens[i], position + i);
                Err(EngineError::Token { token, position, vocab_size })
            }
            None => Ok(()),
        }
    }

    /// Runs checked tokens at their places.
    pub(crate) fn pass(
        &mut self,
        caches: &mut [KvCache],
        places: impl Iterator<Item = Place>,
        tokens: &[u32],
        output: Output<'_>,
        hook: Option<Hook<'_>>,
    ) {
        self.places.clear();
        self.places.extend(places);
        let scores = self.heads.scores_len();
        let scores = scores * self.workers.scratch_parts(scores);
        let bytes = pass_bytes(&self.model) * tokens.len();
        let (model, kernels, heads) = (&*self.model.0, self.kernels, self.heads);
        let (frequencies, places) = (&self.frequencies[..], &self.places[..]);
        let buffers = &mut self.buffers;
        self.workers.run(bytes, |split| {
            let pass = Pass { model, kernels, split, heads, scores, frequencies, places, tokens };
            let normed = hook.is_some() || !matches!(output, Output::Nothing);
            pass.run(caches, buffers, normed, hook);
            let hidden = model.weights.config.hidden_size;
            let last = (tokens.len() - 1) * hidden;
            match output {
                Output::Nothing | Output::Normed => {}
                Output::Last(out) => {
                    forward::logits(kernels, split, model, &buffers.h[last..], out);
                }
                Output::All(out) => forward::logits(kernels, split, model, &buffers.h, out),
                Output::Top(top, k) => {
                    let hs = &buffers.h[..tokens.len() * hidden];
                    top.find(kernels, split, model, hs, k);
                }
            }
        });
    }
}

/// Bytes that a pass of one token reads, or as many as fit a number.
fn pass_bytes(model: &Model) -> usize {
    usize::try_from(model.bytes_per_token()).unwrap_or(usize::MAX)
}
