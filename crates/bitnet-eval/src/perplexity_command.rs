//! `bitnet-eval perplexity`: its options, its sources and its report.

use std::path::{Path, PathBuf};

use bitnet_core::exit::ExitError;
use bitnet_data::{FileOptions, Source, Split, TextSplit};
use bitnet_engine::{Model, Session, SessionOptions, Tokenizer, Workers};
use bitnet_eval::words::WikitextDetokenizer;
use bitnet_eval::{
    EngineModel, EvalError, Mode, Perplexity, PerplexityOptions, TextDocument, TokenSource,
    open_shards, perplexity, read_text, sha256_hex,
};
use clap::{Args, ValueEnum};

use crate::perplexity_report::{Mean, Several, SourceReport};
use crate::progress::Progress;
use crate::{RunArgs, SourceArgs, coded};

/// The tokens of a block in the BitNet papers.
const PAPERS: usize = 2048;
/// The tokens of a chunk in llama.cpp, by default.
const LLAMA_CPP: usize = 512;
/// What stands between the documents of a file that are scored as one text.
const BETWEEN: &str = "\n\n";

/// How likely a text is under a model: perplexity per token and word, bits per byte
///
/// On token shards the text is scored in the windows of training's evaluation, so
/// that the loss can be compared with training's validation loss; of conversations
/// only the tokens count that training learns from. Several sources are scored one by
/// one, and their arithmetic mean is what the BitNet papers call perplexity.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  bitnet-eval perplexity model.gguf --data data/corpus
  bitnet-eval perplexity model.gguf --data data/corpus --context 256 --windows 64
  bitnet-eval perplexity model.gguf --text book.txt --mode llama-cpp --context 512
  bitnet-eval perplexity model.gguf --text c4.jsonl --text wiki.txt --mode blocks
  bitnet-eval perplexity model.gguf --text wiki.test.raw --mode rolling \\
      --documents wikitext --detokenize wikitext
  bitnet-eval perplexity model.gguf --text book.txt --mode sliding --stride 128 --json -
  bitnet-eval perplexity hugging-face-folder --text book.txt --ptq ternary

Modes:
  windows    non-overlapping windows, every prediction scored (training's evaluation);
             a text is scored to its end, shards in whole windows
  llama-cpp  llama-perplexity's: chunks of --context tokens, the second half of each
             scored; a tokenizer that puts a first token before a text puts it before
             each chunk, in the place of the token there
  blocks     the BitNet papers': non-overlapping blocks of 2048 tokens, 2047 scored in each
  sliding    windows --stride apart, each token scored once
  rolling    lm-evaluation-harness': document by document, each token scored once, after
             BOS or else EOS; words and bytes are those of the documents' text

A standard error takes windows (rolling: documents) as independent.

JSON keys: model, source, split, data_hash, mode, context, stride, kv, threads, isa,
tokens, windows, documents, nats, perplexity, word_perplexity, words, bits_per_byte, bytes,
nats_stderr, perplexity_stderr, word_perplexity_stderr, bits_per_byte_stderr (null for a
single window), nats_stderr_tokens (tokens taken as independent, as llama.cpp does),
tokens_per_second, seconds. Of several sources: `sources`, a list of these, and `mean`, the
arithmetic means of nats, perplexity, word_perplexity and bits_per_byte with the _stderr
of each.")]
pub(crate) struct PerplexityArgs {
    /// Packed model; or a Hugging Face, checkpoint or run folder, or a GGUF file of
    /// another tool, which is packed each time it is opened
    model: PathBuf,
    /// A folder of token shards that bitnet-data wrote; may be given several times
    #[arg(long, value_name = "DIR", required_unless_present = "text")]
    data: Vec<PathBuf>,
    /// Which split of --data
    #[arg(long, value_enum, default_value_t = SplitArg::Val, requires = "data")]
    split: SplitArg,
    /// A UTF-8 text file, .jsonl (also .gz, .zst) or .parquet; may be given several times
    #[arg(long, value_name = "FILE", conflicts_with = "data")]
    text: Vec<PathBuf>,
    /// The field or column of .jsonl and .parquet files that holds the text; other modes
    /// than rolling score their documents as one text, an empty line between them
    /// [default: text]
    #[arg(long, value_name = "NAME", requires = "text")]
    field: Option<String>,
    /// How a text file becomes documents in mode rolling: file, blank-line, wikitext,
    /// line:TEXT, bytes:N
    #[arg(long, value_name = "HOW", requires = "text")]
    documents: Option<TextSplit>,
    /// Score documents as lm-evaluation-harness' wikitext task does: WikiText's spaces
    /// are taken back, words and bytes are counted before
    #[arg(long, value_enum, requires = "text")]
    detokenize: Option<DetokenizeArg>,
    /// How the text is cut to fit the context
    #[arg(long, value_enum, default_value_t = ModeArg::Windows)]
    mode: ModeArg,
    /// Length of a window in tokens [default: the model's context; llama-cpp: at most 512,
    /// blocks: at most 2048]
    #[arg(long, value_name = "N")]
    context: Option<usize>,
    /// Distance of sliding windows in tokens [default: half of the context]
    #[arg(long, value_name = "N")]
    stride: Option<usize>,
    /// Stop after the window (rolling: document) that reaches N scored tokens, in each source
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    max_tokens: Option<u64>,
    /// Stop after N windows (training's eval.windows), in each source
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    windows: Option<u64>,
    #[command(flatten)]
    run: RunArgs,
    #[command(flatten)]
    source: SourceArgs,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum SplitArg {
    Val,
    Train,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum DetokenizeArg {
    Wikitext,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum ModeArg {
    Windows,
    LlamaCpp,
    Blocks,
    Sliding,
    Rolling,
}

impl ModeArg {
    fn mode(self) -> Mode {
        match self {
            Self::Windows => Mode::Windows,
            Self::LlamaCpp => Mode::LlamaCpp,
            Self::Blocks => Mode::Blocks,
            Self::Sliding => Mode::Sliding,
            Self::Rolling => Mode::Rolling,
        }
    }
}

impl PerplexityArgs {
    /// Scores and prints.
    pub(crate) fn run(&self) -> anyhow::Result<()> {
        let mode = self.mode.mode();
        self.check(mode)?;
        let model = Model::open(&self.model, &self.source.options()).map_err(coded)?;
        let tokenizer = model.tokenizer().map_err(coded)?;
        let settings = self.run.session(None);
        let workers = Workers::new(settings.threads.unwrap_or_else(bitnet_engine::physical_cores))
            .map_err(coded)?;
        let mut reports = Vec::new();
        let several = self.data.len() + self.text.len() > 1;
        for path in self.data.iter().chain(&self.text) {
            let report = self.score(path, mode, &model, &tokenizer, &settings, &workers)?;
            if several && self.run.json.as_deref() != Some("-") {
                self.run.show(&format!("{}\n", report.table()))?;
            }
            reports.push(report);
        }
        if let [report] = &reports[..] {
            return self.run.print(&report.table(), report);
        }
        let results: Vec<Perplexity> = reports.iter().map(|r| r.result).collect();
        let mean = Mean::of(&results);
        self.run.print(&mean.table(results.len()), &Several { sources: &reports, mean })
    }

    fn check(&self, mode: Mode) -> Result<(), ExitError> {
        let wrong = |option: &str, of: Mode| {
            let message = format!("{option} is for --mode {}, not {}", of.name(), mode.name());
            Err(coded(EvalError::Usage(message)))
        };
        if self.stride.is_some() && mode != Mode::Sliding {
            return wrong("--stride", Mode::Sliding);
        }
        if self.documents.is_some() && mode != Mode::Rolling {
            return wrong("--documents", Mode::Rolling);
        }
        if self.detokenize.is_some() && mode != Mode::Rolling {
            return wrong("--detokenize", Mode::Rolling);
        }
        if let Some(field) = &self.field
            && !self.text.iter().any(|path| has_rows(path))
        {
            let message = format!("--field {field}: no --text is .jsonl or .parquet");
            return Err(coded(EvalError::Usage(message)));
        }
        Ok(())
    }

    fn score<'a>(
        &'a self,
        path: &'a Path,
        mode: Mode,
        model: &Model,
        tokenizer: &Tokenizer,
        settings: &SessionOptions,
        workers: &Workers,
    ) -> anyhow::Result<SourceReport<'a>> {
        let input = self.open(path, mode, model, tokenizer).map_err(coded)?;
        let limit = model.config().max_position_embeddings;
        let context = self.context.unwrap_or_else(|| match (mode, input.tokens.row_context()) {
            (Mode::LlamaCpp, _) => limit.min(LLAMA_CPP),
            (Mode::Blocks, _) => limit.min(PAPERS),
            (Mode::Windows, Some(row)) => row,
            _ => limit,
        });
        if context > limit {
            return Err(coded(EvalError::LongContext { context, limit }).into());
        }
        let stride = self.stride.unwrap_or((context / 2).max(1));
        let session = Session::with_workers(model, settings, workers.clone()).map_err(coded)?;
        let (threads, isa, kv) =
            (session.workers().threads(), session.kernels().name(), session.kv().name());
        let options = PerplexityOptions {
            mode,
            context,
            stride,
            max_tokens: self.max_tokens,
            max_windows: self.windows,
            bos: first_token(mode, tokenizer).map_err(coded)?,
        };
        let mut progress = Progress::new("tokens");
        let result = perplexity(
            &mut EngineModel::new(session),
            &input.tokens,
            &options,
            tokenizer,
            &mut |done, total, nats| progress.show(done, total, &format!("{nats:.4} nats")),
        )
        .map_err(coded)?;
        progress.finish();
        Ok(SourceReport {
            model: &self.model,
            source: path,
            split: input.split,
            data_hash: input.hash,
            mode,
            context,
            stride: (mode == Mode::Sliding).then_some(stride),
            kv,
            threads,
            isa,
            result,
        })
    }

    fn open(
        &self,
        path: &Path,
        mode: Mode,
        model: &Model,
        tokenizer: &Tokenizer,
    ) -> Result<Input, EvalError> {
        if self.text.is_empty() {
            let split = match self.split {
                SplitArg::Val => Split::Validation,
                SplitArg::Train => Split::Train,
            };
            let tokens = open_shards(path, split, model.tokenizer_json())?;
            let hash = match &tokens {
                TokenSource::Shards(shards) => shards.manifest().corpus_hash.clone(),
                _ => String::new(),
            };
            return Ok(Input { split: Some(split.name()), hash, tokens });
        }
        let (texts, hash) = self.texts(path, mode)?;
        if mode == Mode::Rolling {
            let documents = self.documents(path, &texts, mode, tokenizer)?;
            return Ok(Input { split: None, hash, tokens: TokenSource::Documents(documents) });
        }
        // A first token, where there is one, lets that of the text be scored.
        let mut tokens: Vec<u32> = match mode {
            Mode::LlamaCpp => first_token(mode, tokenizer)?,
            _ => tokenizer.bos_id(),
        }
        .into_iter()
        .collect();
        tokens.extend(tokenizer.encode(&texts.join(BETWEEN))?);
        Ok(Input { split: None, hash, tokens: TokenSource::Tokens { tokens, text: true } })
    }

    /// The texts of a file and its hash: one, except of lines of JSON and parquet,
    /// and in mode rolling of a text that is taken apart.
    fn texts(&self, path: &Path, mode: Mode) -> Result<(Vec<String>, String), EvalError> {
        let rows = has_rows(path);
        if !rows && (mode != Mode::Rolling || self.documents.is_none()) {
            let (text, hash) = read_text(path)?;
            return Ok((vec![text], hash));
        }
        if rows && self.documents.is_some() {
            let name = path.display();
            let message = format!("--documents is for text files; {name} has documents already");
            return Err(EvalError::Usage(message));
        }
        let field = self.field.clone().unwrap_or_else(|| "text".to_owned());
        let source = Source::Files(FileOptions {
            paths: vec![path.to_path_buf()],
            split: self.documents.clone().unwrap_or_default(),
            field: field.clone(),
            column: field,
            ..FileOptions::default()
        });
        let texts = source.open()?.collect()?.into_iter().map(|d| d.text);
        let texts: Vec<String> = texts.filter(|text| !text.is_empty()).collect();
        if texts.is_empty() {
            return Err(EvalError::Empty { path: path.to_path_buf() });
        }
        let bytes = std::fs::read(path)
            .map_err(|source| EvalError::Read { path: path.to_path_buf(), source })?;
        Ok((texts, sha256_hex(&bytes)))
    }

    fn documents(
        &self,
        path: &Path,
        texts: &[String],
        mode: Mode,
        tokenizer: &Tokenizer,
    ) -> Result<Vec<TextDocument>, EvalError> {
        let Some(first) = first_token(mode, tokenizer)? else {
            let message = "mode rolling needs a token before each document, and the model's \
                           tokenizer names no BOS and no EOS";
            return Err(EvalError::Usage(format!("{}: {message}", path.display())));
        };
        let clean = self.detokenize.map(|DetokenizeArg::Wikitext| WikitextDetokenizer::new());
        let document = |text: &String| {
            // What the tokenizer puts around a text is scored, as the harness does.
            let scored = clean.as_ref().map_or_else(|| text.clone(), |clean| clean.apply(text));
            let tokens = tokenizer.encode_prompt(&scored)?;
            let tokens = std::iter::once(first).chain(tokens).collect();
            Ok(TextDocument::new(tokens, text))
        };
        texts.iter().map(document).collect()
    }
}

/// What is scored.
struct Input {
    split: Option<&'static str>,
    hash: String,
    tokens: TokenSource,
}

/// Whether a file's documents are rows with fields.
fn has_rows(path: &Path) -> bool {
    let name = path.to_string_lossy();
    [".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet"].iter().any(|ending| name.ends_with(ending))
}

/// The token that a mode puts where nothing stands before a text.
fn first_token(mode: Mode, tokenizer: &Tokenizer) -> Result<Option<u32>, EvalError> {
    Ok(match mode {
        // llama.cpp's add_bos: whether the tokenizer puts a token before a text.
        Mode::LlamaCpp => {
            let (plain, whole) = (tokenizer.encode("a")?, tokenizer.encode_prompt("a")?);
            whole.first().copied().filter(|first| plain.first() != Some(first))
        }
        Mode::Rolling => tokenizer.bos_id().or(tokenizer.eos_ids().first().copied()),
        _ => tokenizer.bos_id(),
    })
}
