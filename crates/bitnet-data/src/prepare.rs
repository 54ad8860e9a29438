//! A source into a prepared folder: scan, tokenizer, shards, manifest. The
//! manifest is written last, so that whatever stops it leaves a folder that is
//! plainly incomplete.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use bitnet_format::atomic::write_atomic;
use rayon::prelude::*;

use crate::dataset::{Dataset, Split};
use crate::error::DataError;
use crate::hash::{document_key, hex};
use crate::manifest::{
    MANIFEST_FILE, MANIFEST_VERSION, Manifest, Request, ShardInfo, SplitInfo, TOKENIZER_FILE,
    TokenizerInfo,
};
use crate::scan::{Limits, Plan, scan};
use crate::shard::ShardWriter;
use crate::source::{Document, Inputs, Source};
use crate::tokenizer::{END_OF_TEXT, Tokenizer, check_vocab_size};

/// Text gathered before the threads tokenise it. Large enough that they all
/// have work, small enough that memory stays flat.
const BATCH_BYTES: usize = 4 << 20;

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
    /// Replace what the folder holds.
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
            force: false,
        }
    }

    fn validate(&self) -> Result<(), DataError> {
        if self.tokenizer.is_none() {
            check_vocab_size(self.vocab_size)?;
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
}

/// Makes `options.output` a prepared folder. A folder that already holds the
/// answer to the same request on the same input is left as it is.
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
    let request = request(options, given.as_ref());
    if let Some(manifest) = existing(options, &request, &inputs)? {
        return Ok(Prepared { manifest, reused: true });
    }
    note_missing_packages(&inputs, progress);

    let limits = Limits {
        max_bytes: options.max_bytes,
        sample_bytes: if given.is_some() { 0 } else { options.tokenizer_bytes },
        validation_share: options.validation_share,
        seed: options.seed,
    };
    let mut plan = scan(&inputs, &limits, progress)?;
    if plan.keys.is_empty() {
        let what =
            format!("no text in {} files ({} documents, all empty)", inputs.files(), plan.empty);
        return Err(DataError::Empty { what });
    }
    let tokenizer = match given {
        Some(tokenizer) => tokenizer,
        None => train(&plan, options.vocab_size, progress)?,
    };
    plan.sample = Vec::new();
    let eos_id = eos_id(options, &tokenizer)?;

    clear(&options.output)?;
    write_atomic(options.output.join(TOKENIZER_FILE), |w| {
        w.write_all(tokenizer.to_json().as_bytes())
    })
    .map_err(DataError::Write)?;
    let corpus_hash = plan.corpus_hash();
    let (documents, bytes) = (plan.keys.len() as u64, plan.bytes);
    let (duplicates, empty, beyond_cap) = (plan.duplicates, plan.empty, plan.beyond_cap);
    let [train, validation] = write_shards(&inputs, plan, &tokenizer, eos_id, options, progress)?;
    let manifest = Manifest {
        version: MANIFEST_VERSION,
        program: concat!("bitnet-data ", env!("CARGO_PKG_VERSION")).into(),
        name: options.name.clone(),
        request,
        source_fingerprint: inputs.fingerprint(),
        files: inputs.files() as u64,
        packages: inputs.packages() as u64,
        packages_missing: inputs.missing_packages().len() as u64,
        documents,
        bytes,
        tokens: train.tokens + validation.tokens,
        duplicates,
        empty_documents: empty,
        beyond_cap,
        corpus_hash,
        tokenizer: TokenizerInfo {
            sha256: tokenizer.hash_hex(),
            vocab_size: tokenizer.vocab_size(),
            eos_id,
        },
        train,
        validation,
    };
    manifest.save(&options.output)?;
    Ok(Prepared { manifest, reused: false })
}

fn request(options: &PrepareOptions, given: Option<&Tokenizer>) -> Request {
    let trained = given.is_none();
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
fn first_difference(had: &Request, asked: &Request) -> String {
    let (had, asked) = (serde_json::to_value(had), serde_json::to_value(asked));
    let (Ok(serde_json::Value::Object(had)), Ok(serde_json::Value::Object(asked))) = (had, asked)
    else {
        return "unknown".into();
    };
    had.iter().find(|(key, value)| asked.get(*key) != Some(value)).map_or_else(
        || "unknown".into(),
        |(key, value)| {
            let asked = asked.get(key).map(ToString::to_string).unwrap_or_default();
            format!("{key} {value} there, {asked} asked for")
        },
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

/// Removes what an earlier, perhaps unfinished, run left: the manifest first.
fn clear(folder: &Path) -> Result<(), DataError> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(write_error(folder, e)),
    };
    let remove = |path: &Path| match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(write_error(path, e)),
        _ => Ok(()),
    };
    remove(&folder.join(MANIFEST_FILE))?;
    for entry in entries {
        let path = entry.map_err(|e| write_error(folder, e))?.path();
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or("");
        // An unfinished file is called `.NAME.tmp-…`.
        let final_name =
            name.strip_prefix('.').and_then(|n| Some(n.split_once(".tmp-")?.0)).unwrap_or(name);
        if is_ours(final_name) {
            remove(&path)?;
        }
    }
    Ok(())
}

fn is_ours(name: &str) -> bool {
    let is_shard = |split: Split| {
        name.strip_prefix(split.name())
            .and_then(|n| n.strip_prefix('-')?.strip_suffix(".bin"))
            .is_some_and(|n| n.len() == 5 && n.bytes().all(|b| b.is_ascii_digit()))
    };
    name == TOKENIZER_FILE
        || name == MANIFEST_FILE
        || is_shard(Split::Train)
        || is_shard(Split::Validation)
}

fn write_error(path: &Path, e: io::Error) -> DataError {
    DataError::Write(io::Error::new(e.kind(), format!("{}: {e}", path.display())))
}

/// The second pass: every planned document, tokenised in parallel, written in
/// the order of the source.
fn write_shards(
    inputs: &Inputs,
    mut plan: Plan,
    tokenizer: &Tokenizer,
    eos_id: u32,
    options: &PrepareOptions,
    progress: &mut dyn Progress,
) -> Result<[SplitInfo; 2], DataError> {
    progress.stage("tokenising", Some(plan.bytes));
    let mut splits = [Split::Train, Split::Validation]
        .map(|split| SplitWriter::new(split, tokenizer, eos_id, options));
    let mut batch: Vec<(Document, bool)> = Vec::new();
    let mut batch_bytes = 0;
    for document in inputs.documents(|_| ()) {
        if progress.interrupted() {
            return Err(DataError::Interrupted);
        }
        let document = document?;
        let key = document_key(&document.text);
        // Each key once: later copies find it gone.
        if !plan.keys.remove(&key) {
            continue;
        }
        batch_bytes += document.text.len();
        let validation = plan.is_validation(key);
        batch.push((document, validation));
        if batch_bytes >= BATCH_BYTES {
            write_batch(&batch, tokenizer, &mut splits)?;
            progress.advance(batch_bytes as u64);
            batch.clear();
            batch_bytes = 0;
        }
    }
    write_batch(&batch, tokenizer, &mut splits)?;
    progress.advance(batch_bytes as u64);
    if !plan.keys.is_empty() {
        let what = format!(
            "{} documents changed or vanished while they were read; run it again",
            plan.keys.len()
        );
        return Err(DataError::Empty { what });
    }
    let [train, validation] = splits;
    Ok([train.finish()?, validation.finish()?])
}

fn write_batch(
    batch: &[(Document, bool)],
    tokenizer: &Tokenizer,
    splits: &mut [SplitWriter<'_>; 2],
) -> Result<(), DataError> {
    let encoded: Vec<Vec<u32>> = batch
        .par_iter()
        .map(|(document, _)| {
            tokenizer
                .encode(&document.text)
                .map_err(|e| DataError::Tokenizer(format!("{}: {e}", document.name)))
        })
        .collect::<Result<_, _>>()?;
    for ((document, validation), tokens) in batch.iter().zip(&encoded) {
        splits[usize::from(*validation)].push(document.text.len() as u64, tokens)?;
    }
    Ok(())
}

/// Writes the shards of one split, one after the other.
struct SplitWriter<'a> {
    split: Split,
    tokenizer: &'a Tokenizer,
    eos_id: u32,
    options: &'a PrepareOptions,
    shard: Option<ShardWriter>,
    info: SplitInfo,
}

impl<'a> SplitWriter<'a> {
    fn new(
        split: Split,
        tokenizer: &'a Tokenizer,
        eos_id: u32,
        options: &'a PrepareOptions,
    ) -> Self {
        Self { split, tokenizer, eos_id, options, shard: None, info: SplitInfo::default() }
    }

    fn push(&mut self, bytes: u64, tokens: &[u32]) -> Result<(), DataError> {
        let after = |shard: &ShardWriter| shard.tokens() + tokens.len() as u64 + 1;
        if self.shard.as_ref().is_some_and(|s| after(s) > self.options.shard_tokens) {
            self.finish_shard()?;
        }
        if self.shard.is_none() {
            self.shard = Some(ShardWriter::create(
                &self.options.output.join(self.file_name()),
                self.tokenizer.vocab_size(),
                self.eos_id,
                self.tokenizer.hash(),
            )?);
        }
        if let Some(shard) = &mut self.shard {
            shard.push_document(tokens)?;
        }
        self.info.documents += 1;
        self.info.bytes += bytes;
        self.info.tokens += tokens.len() as u64 + 1;
        Ok(())
    }

    fn file_name(&self) -> String {
        format!("{}-{:05}.bin", self.split.name(), self.info.shards.len())
    }

    fn finish_shard(&mut self) -> Result<(), DataError> {
        if let Some(shard) = self.shard.take() {
            let file = self.file_name();
            let header = shard.finish()?;
            self.info.shards.push(ShardInfo {
                file,
                documents: header.documents,
                tokens: header.tokens,
                sha256: hex(&header.payload_sha256),
            });
        }
        Ok(())
    }

    fn finish(mut self) -> Result<SplitInfo, DataError> {
        self.finish_shard()?;
        Ok(self.info)
    }
}
