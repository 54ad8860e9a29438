//! A source into a prepared folder: scan, tokenizer, shards, manifest. The
//! manifest is written last, so that whatever stops it leaves a folder that is
//! plainly incomplete; the same command then goes on behind the last whole shard.

pub(crate) mod folder;
mod journal;
mod pack;
mod write;

use std::io::Write;
use std::path::PathBuf;

use bitnet_format::atomic::write_atomic;

pub(crate) use self::journal::shard_name;
use self::journal::{Identity, Journal};
use crate::chat::{self, ChatOptions};
use crate::dataset::{Dataset, Split};
use crate::error::DataError;
use crate::hash::{hex, sha256};
use crate::manifest::{
    ChatRequest, MANIFEST_FILE, MANIFEST_VERSION, Manifest, Request, TEMPLATE_FILE, TokenizerInfo,
};
use crate::part::{KEYS_FILE, Part, PartInfo};
use crate::scan::{Limits, Plan, scan};
use crate::source::{Inputs, Source};
use crate::tokenizer::{END_OF_TEXT, Tokenizer, check_vocab_size};

/// What to prepare, and where.
#[derive(Debug, Clone)]
pub struct PrepareOptions {
    /// Where the text comes from.
    pub source: Source,
    /// The folder to write.
    pub output: PathBuf,
    /// The corpus's name in the manifest.
    pub name: String,
    /// The vocabulary of the tokenizer to train, [`END_OF_TEXT`] included.
    pub vocab_size: u32,
    /// A `tokenizer.json` to use instead of training one.
    pub tokenizer: Option<PathBuf>,
    /// The token that ends a document, by name; by default the tokenizer's
    /// [`eos_id`](Tokenizer::eos_id).
    pub eos: Option<String>,
    /// Bytes of text to train the tokenizer on, at most.
    pub tokenizer_bytes: u64,
    /// Bytes of text, at most: a uniform sample of the documents.
    pub max_bytes: Option<u64>,
    /// The share of documents to hold out, 0 to 0.5.
    pub validation_share: f64,
    /// Decides which documents are held out.
    pub seed: u64,
    /// Tokens after which a new shard begins.
    pub shard_tokens: u64,
    /// Keep copies of a document. Memory then does not grow with the number of
    /// documents; otherwise some 36 bytes each are held.
    pub keep_duplicates: bool,
    /// Prepare one part of the corpus only; needs a given tokenizer.
    pub part: Option<Part>,
    /// How to render conversations; given with [`Source::Chat`], and only there.
    pub chat: Option<ChatOptions>,
    /// Replace what the folder holds, also what an interrupted run left.
    pub force: bool,
}

impl PrepareOptions {
    /// The defaults: vocabulary 4096 trained on at most 32 MiB, 1 % held out,
    /// everything read, shards of 2²⁶ tokens.
    #[must_use]
    pub fn new(source: Source, output: impl Into<PathBuf>) -> Self {
        Self {
            source,
            output: output.into(),
            name: "corpus".into(),
            vocab_size: 4096,
            tokenizer: None,
            eos: None,
            tokenizer_bytes: 32 << 20,
            max_bytes: None,
            validation_share: 0.01,
            seed: 0,
            shard_tokens: 1 << 26,
            keep_duplicates: false,
            part: None,
            chat: None,
            force: false,
        }
    }

    fn validate(&self) -> Result<(), DataError> {
        if self.tokenizer.is_none() {
            check_vocab_size(self.vocab_size)?;
        }
        if self.chat.is_some() != matches!(self.source, Source::Chat { .. }) {
            return Err(DataError::option(
                "--context",
                "belongs to `prepare chat`, which needs it",
            ));
        }
        if let Some(chat) = &self.chat {
            if self.tokenizer.is_none() {
                let what = "needs --tokenizer: that of the model to tune";
                return Err(DataError::option("chat", what));
            }
            if !(1..1 << 24).contains(&chat.context) {
                let what = format!("{} is outside 1 to {}", chat.context, (1 << 24) - 1);
                return Err(DataError::option("--context", what));
            }
        }
        if self.part.is_some() && self.tokenizer.is_none() {
            let what = "needs --tokenizer: all parts must have the same, and a part sees only \
                        its own documents";
            return Err(DataError::option("--part", what));
        }
        if self.keep_duplicates && self.max_bytes.is_some() {
            let what = "cannot be combined with --max-bytes, which takes a sample of different \
                        documents";
            return Err(DataError::option("--keep-duplicates", what));
        }
        if !(0.0..=0.5).contains(&self.validation_share) {
            let what = format!("{} is outside 0 to 0.5", self.validation_share);
            return Err(DataError::option("--validation-share", what));
        }
        for (option, value) in [
            ("--tokenizer-bytes", self.tokenizer_bytes),
            ("--max-bytes", self.max_bytes.unwrap_or(1)),
            ("--shard-tokens", self.shard_tokens),
        ] {
            if value == 0 {
                return Err(DataError::option(option, "0; needs at least 1"));
            }
        }
        Ok(())
    }
}

/// Hears how far [`prepare`] is, and may stop it.
pub trait Progress {
    /// A stage begins; `total` is in bytes, where it is known.
    fn stage(&mut self, _name: &str, _total: Option<u64>) {}
    /// So many bytes more are done.
    fn advance(&mut self, _bytes: u64) {}
    /// Something the user should know.
    fn note(&mut self, _text: &str) {}
    /// Whether to stop with [`DataError::Interrupted`]; asked often.
    fn interrupted(&self) -> bool {
        false
    }
}

/// Nobody listens.
impl Progress for () {}

/// What [`prepare`] did.
#[derive(Debug, Clone, PartialEq)]
pub struct Prepared {
    /// What the folder holds.
    pub manifest: Manifest,
    /// Whether it was there already and nothing was done.
    pub reused: bool,
    /// Shards taken over from a run that was interrupted.
    pub resumed_shards: usize,
}

/// Makes `options.output` a prepared folder. A folder that already holds the
/// answer to the same request on the same input is left as it is; one in which
/// that answer is unfinished is finished, and comes out byte for byte as if it had
/// never been interrupted.
///
/// # Errors
/// [`DataError::Option`] and [`DataError::Output`] for what cannot be asked
/// for, [`DataError::Write`] for what cannot be written, the other kinds for
/// the input.
pub fn prepare(
    options: &PrepareOptions,
    progress: &mut dyn Progress,
) -> Result<Prepared, DataError> {
    options.validate()?;
    let given = options.tokenizer.as_deref().map(Tokenizer::from_file).transpose()?;
    let inputs = options.source.open()?;
    let template = template(options, progress)?;
    let request = request(options, given.as_ref(), template.as_deref());
    if let Some(manifest) = existing(options, &request, &inputs)? {
        journal::remove(&options.output)?;
        return Ok(Prepared { manifest, reused: true, resumed_shards: 0 });
    }
    note_missing_packages(&inputs, progress);
    let mut plan = scan(&inputs, &limits(options), progress)?;
    if plan.input.count == 0 {
        let what =
            format!("no text in {} files ({} documents, all empty)", inputs.files(), plan.empty);
        return Err(DataError::Empty { what });
    }
    let sorted_keys = plan.sorted_keys();
    let identity = Identity {
        program: concat!("bitnet-data ", env!("CARGO_PKG_VERSION")).into(),
        name: options.name.clone(),
        request,
        source_fingerprint: inputs.fingerprint(),
        corpus_hash: plan.corpus_hash(&sorted_keys),
    };
    let found = (!options.force).then(|| Journal::load(&options.output, &identity)).flatten();
    let tokenizer = match (given, &found) {
        (Some(tokenizer), _) => tokenizer,
        (None, Some(found)) => found.tokenizer.clone(),
        (None, None) => train(&plan, options.vocab_size, progress)?,
    };
    plan.sample = Vec::new();
    let eos_id = eos_id(options, &tokenizer)?;
    let mut journal = Journal::start(&options.output, identity, found, &tokenizer, progress)?;
    let resumed_shards = journal.shards();
    write_beside(options, &plan, sorted_keys, template.as_deref())?;

    let (duplicates, empty, beyond_cap) = (plan.duplicates, plan.empty, plan.beyond_cap);
    let part = part_info(options, &plan);
    let encoder = write::Encoder::new(options, template.as_deref(), &tokenizer, eos_id)?;
    let written = write::shards(&inputs, plan, &encoder, options, &mut journal, progress)?;
    let write::Written { train, validation, chat } = written;
    let identity = journal.into_identity();
    let manifest = Manifest {
        version: MANIFEST_VERSION,
        program: identity.program,
        name: identity.name,
        request: identity.request,
        source_fingerprint: identity.source_fingerprint,
        files: inputs.files() as u64,
        packages: inputs.packages() as u64,
        packages_missing: inputs.missing_packages().len() as u64,
        documents: train.documents + validation.documents,
        bytes: train.bytes + validation.bytes,
        tokens: train.tokens + validation.tokens,
        duplicates,
        empty_documents: empty,
        beyond_cap,
        corpus_hash: identity.corpus_hash,
        tokenizer: TokenizerInfo {
            sha256: tokenizer.hash_hex(),
            vocab_size: tokenizer.vocab_size(),
            eos_id,
        },
        train,
        validation,
        part,
        chat,
    };
    manifest.save(&options.output)?;
    journal::remove(&options.output)?;
    Ok(Prepared { manifest, reused: false, resumed_shards })
}

fn limits(options: &PrepareOptions) -> Limits {
    Limits {
        max_bytes: options.max_bytes,
        sample_bytes: if options.tokenizer.is_some() { 0 } else { options.tokenizer_bytes },
        validation_share: options.validation_share,
        seed: options.seed,
        keep_duplicates: options.keep_duplicates,
        part: options.part,
    }
}

/// The files of a folder that are neither shards nor the tokenizer.
fn write_beside(
    options: &PrepareOptions,
    plan: &Plan,
    sorted_keys: Vec<u128>,
    template: Option<&str>,
) -> Result<(), DataError> {
    if let Some(template) = template {
        write_atomic(options.output.join(TEMPLATE_FILE), |w| w.write_all(template.as_bytes()))
            .map_err(DataError::Write)?;
    }
    if options.part.is_some() && plan.keeps_keys() {
        write_atomic(options.output.join(KEYS_FILE), |w| {
            sorted_keys.iter().try_for_each(|key| w.write_all(&key.to_be_bytes()))
        })
        .map_err(DataError::Write)?;
    }
    Ok(())
}

fn part_info(options: &PrepareOptions, plan: &Plan) -> Option<PartInfo> {
    options.part.map(|part| PartInfo {
        part,
        own_documents: plan.documents,
        input_documents: plan.input.count,
        input_hash: plan.input.hash(),
        own_sum: (!plan.keeps_keys()).then(|| plan.own.sum_hex()),
    })
}

/// The chat template's source; `None` for plain text.
fn template(
    options: &PrepareOptions,
    progress: &mut dyn Progress,
) -> Result<Option<String>, DataError> {
    let (Some(chat), Some(tokenizer)) = (&options.chat, &options.tokenizer) else {
        return Ok(None);
    };
    let (template, from) = chat::find_template(chat, tokenizer)?;
    progress.note(&format!("chat template: {from}"));
    Ok(Some(template))
}

fn request(options: &PrepareOptions, given: Option<&Tokenizer>, template: Option<&str>) -> Request {
    let trained = given.is_none();
    let chat = options.chat.as_ref().zip(template).map(|(chat, template)| ChatRequest {
        context: chat.context,
        template_sha256: hex(&sha256(template.as_bytes())),
    });
    Request {
        source: options.source.clone(),
        vocab_size: trained.then_some(options.vocab_size),
        given_tokenizer: given.map(Tokenizer::hash_hex),
        eos: options.eos.clone(),
        tokenizer_bytes: if trained { options.tokenizer_bytes } else { 0 },
        max_bytes: options.max_bytes,
        validation_share: options.validation_share,
        seed: options.seed,
        shard_tokens: options.shard_tokens,
        keep_duplicates: options.keep_duplicates,
        part: options.part,
        chat,
    }
}

/// The manifest of a folder that already answers the request; an error where it
/// answers another one. Training runs rest on prepared folders, so nothing is
/// replaced without `force`.
fn existing(
    options: &PrepareOptions,
    request: &Request,
    inputs: &Inputs,
) -> Result<Option<Manifest>, DataError> {
    if options.force || !options.output.join(MANIFEST_FILE).exists() {
        return Ok(None);
    }
    let differs = |what: String| DataError::Output {
        path: options.output.clone(),
        what: format!("{what}; choose another folder, or --force to prepare this one again"),
    };
    let manifest = Manifest::load(&options.output).map_err(|e| differs(e.to_string()))?;
    if manifest.name != options.name {
        let (a, b) = (&manifest.name, &options.name);
        return Err(differs(format!("holds the corpus `{a}`, not `{b}`")));
    }
    if manifest.request != *request {
        let what = first_difference(&manifest.request, request);
        return Err(differs(format!("was prepared with other options: {what}")));
    }
    if manifest.source_fingerprint != inputs.fingerprint() {
        return Err(differs("the input files have changed since it was prepared".into()));
    }
    for (split, info) in
        [(Split::Train, &manifest.train), (Split::Validation, &manifest.validation)]
    {
        if !info.shards.is_empty() {
            Dataset::open(&options.output, split).map_err(|e| differs(e.to_string()))?;
        }
    }
    Ok(Some(manifest))
}

/// The first key that two requests disagree on, with both values.
pub(crate) fn first_difference(had: &Request, asked: &Request) -> String {
    let (had, asked) = (serde_json::to_value(had), serde_json::to_value(asked));
    let (Ok(serde_json::Value::Object(had)), Ok(serde_json::Value::Object(asked))) = (had, asked)
    else {
        return "unknown".into();
    };
    // Keys that are left out mean what they meant before they existed.
    let text = |map: &serde_json::Map<String, serde_json::Value>, key: &str| {
        map.get(key).map_or_else(|| "none".to_owned(), ToString::to_string)
    };
    let mut keys = had.keys().chain(asked.keys());
    keys.find(|key| had.get(*key) != asked.get(*key)).map_or_else(
        || "unknown".into(),
        |key| format!("{key} {} there, {} asked for", text(&had, key), text(&asked, key)),
    )
}

fn note_missing_packages(inputs: &Inputs, progress: &mut dyn Progress) {
    let missing = inputs.missing_packages();
    if let Some(first) = missing.first() {
        progress.note(&format!(
            "{} of {} packages are here; {} are not ({first} …): `cargo fetch` brings them",
            inputs.packages(),
            inputs.packages() + missing.len(),
            missing.len(),
        ));
    }
}

fn train(
    plan: &Plan,
    vocab_size: u32,
    progress: &mut dyn Progress,
) -> Result<Tokenizer, DataError> {
    progress.stage("training the tokenizer", None);
    let tokenizer = Tokenizer::train(&plan.sample, vocab_size)?;
    if tokenizer.vocab_size() < vocab_size {
        progress.note(&format!(
            "the text has pairs for a vocabulary of {} only, {vocab_size} were asked for",
            tokenizer.vocab_size()
        ));
    }
    Ok(tokenizer)
}

fn eos_id(options: &PrepareOptions, tokenizer: &Tokenizer) -> Result<u32, DataError> {
    match &options.eos {
        Some(name) => tokenizer.token_id(name).ok_or_else(|| {
            DataError::option("--eos", format!("the tokenizer has no token `{name}`"))
        }),
        None => tokenizer.eos_id().ok_or_else(|| {
            let what = format!(
                "the tokenizer has none of the usual tokens that end a text ({END_OF_TEXT}, </s> …); name the one it has"
            );
            DataError::option("--eos", what)
        }),
    }
}
