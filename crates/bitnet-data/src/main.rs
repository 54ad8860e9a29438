//! `bitnet-data`: prepares corpora and looks into prepared ones.
#![forbid(unsafe_code)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

mod report;
mod show;
mod synthetic;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Result;
use bitnet_core::exit::{self, Exit, ExitError};
use bitnet_data::dataset::{Dataset, Split};
use bitnet_data::{
    ChatOptions, DataError, FileOptions, Manifest, MergeOptions, Part, PrepareOptions, Source,
    TextSplit, merge, prepare,
};
use clap::{Args, Parser, Subcommand};

/// Text to token shards.
#[derive(Parser)]
#[command(
    version,
    about = "Prepare text for training: tokenizer, token shards, manifest",
    after_help = "Corpora to download: scripts/fetch-data and data/README.md.\n\
                  Exit codes: 0 done, 1 failed, 2 bad usage, 3 bad input, 130 interrupted."
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Read text, train or load a tokenizer, write shards.
    Prepare(Box<PrepareArgs>),
    /// Join the parts that `prepare --part` wrote into one prepared folder.
    Merge(MergeArgs),
    /// Write lines of JSON with made-up text, to measure on.
    Synthetic(synthetic::Args),
    /// Show what a prepared folder holds.
    Inspect(InspectArgs),
}

#[derive(Args)]
struct PrepareArgs {
    /// `cargo` for the sources and docs of the packages a workspace depends on,
    /// `chat` and .jsonl files of conversations ({"messages": [{"role", "content"}]}),
    /// or files and folders: text, .jsonl (.zst, .gz), .parquet. (A file called cargo: ./cargo)
    #[arg(required = true, value_name = "cargo|chat|PATH")]
    sources: Vec<PathBuf>,
    /// The folder to write.
    #[arg(short, long, value_name = "DIR")]
    output: PathBuf,
    /// The corpus's name [default: the source's]
    #[arg(long)]
    name: Option<String>,
    /// With `cargo`: the workspace whose Cargo.lock counts.
    #[arg(long, value_name = "DIR", default_value = ".")]
    workspace: PathBuf,
    /// Another ending of text files in folders; may be repeated.
    #[arg(long, value_name = "ENDING")]
    ext: Vec<String>,
    /// How a text file becomes documents: file, blank-line, wikitext, bytes:N,
    /// or line:TEXT for a line that lies between documents.
    #[arg(long, default_value = "file")]
    split: TextSplit,
    /// The field of a .jsonl line that holds the text.
    #[arg(long, default_value = "text")]
    field: String,
    /// The column of a .parquet file that holds the text.
    #[arg(long, default_value = "text")]
    column: String,
    /// The vocabulary of the tokenizer to train.
    #[arg(long, value_name = "N", default_value_t = 4096)]
    vocab_size: u32,
    /// Use this tokenizer.json instead of training one.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["vocab_size", "tokenizer_bytes"])]
    tokenizer: Option<PathBuf>,
    /// The token that ends a document, where the tokenizer's is not a usual one.
    #[arg(long, value_name = "TOKEN")]
    eos: Option<String>,
    /// Train the tokenizer on at most this much text (a uniform sample).
    #[arg(long, value_name = "SIZE", value_parser = size, default_value = "32MiB")]
    tokenizer_bytes: u64,
    /// Take at most this much text (a uniform sample of the documents).
    #[arg(long, value_name = "SIZE", value_parser = size)]
    max_bytes: Option<u64>,
    /// The share of documents to hold out for validation.
    #[arg(long, value_name = "SHARE", default_value_t = 0.01)]
    validation_share: f64,
    /// Decides which documents are held out.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Tokens after which a new shard begins.
    #[arg(long, value_name = "N", default_value_t = 1 << 26)]
    shard_tokens: u64,
    /// Keep copies of a document: memory does not grow with their number then
    /// (otherwise 36 bytes a document), and the corpus hash is a sum.
    #[arg(long)]
    keep_duplicates: bool,
    /// Prepare the i-th of n parts, for `merge`; every machine reads all of the
    /// input and tokenises its part. Needs --tokenizer.
    #[arg(long, value_name = "I/N")]
    part: Option<Part>,
    /// With `chat`: the inputs of a training window, into which conversations are
    /// packed whole.
    #[arg(long, value_name = "TOKENS")]
    context: Option<usize>,
    /// With `chat`: a Jinja chat template [default: the tokenizer's, or role names]
    #[arg(long, value_name = "FILE")]
    template: Option<PathBuf>,
    /// Prepare again what is already there.
    #[arg(long)]
    force: bool,
    /// Also write the result as one JSON object (`-`: to stdout, instead).
    #[arg(long, value_name = "FILE|-")]
    json: Option<PathBuf>,
}

#[derive(Args)]
struct MergeArgs {
    /// The folder to write.
    output: PathBuf,
    /// The folders of all parts, in any order.
    #[arg(required = true, value_name = "PART")]
    parts: Vec<PathBuf>,
    /// Replace what the folder holds.
    #[arg(long)]
    force: bool,
    /// Also write the result as one JSON object (`-`: to stdout, instead).
    #[arg(long, value_name = "FILE|-")]
    json: Option<PathBuf>,
}

#[derive(Args)]
struct InspectArgs {
    /// A prepared folder.
    folder: PathBuf,
    /// Read every shard: checksums and every token.
    #[arg(long)]
    verify: bool,
    /// Also write the result as one JSON object (`-`: to stdout, instead).
    #[arg(long, value_name = "FILE|-")]
    json: Option<PathBuf>,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    tracing_subscriber::fmt()
        .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
        .with_writer(std::io::stderr)
        .init();
    let done = match cli.command {
        Command::Prepare(args) => run_prepare(*args),
        Command::Merge(args) => run_merge(args),
        Command::Synthetic(args) => synthetic::run(&args),
        Command::Inspect(args) => run_inspect(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e:#}");
            let exit = match e.downcast_ref::<DataError>() {
                Some(e) => e.exit(),
                None => exit::code_of(e.as_ref()),
            };
            ExitCode::from(exit.code())
        }
    }
}

fn run_prepare(args: PrepareArgs) -> Result<()> {
    let chat = chat(&args)?;
    let sources = &args.sources[usize::from(chat.is_some())..];
    let name = args.name.clone().unwrap_or_else(|| default_name(sources));
    let mut options = PrepareOptions::new(source(&args)?, args.output);
    options.name = name;
    options.vocab_size = args.vocab_size;
    options.tokenizer = args.tokenizer;
    options.eos = args.eos;
    options.tokenizer_bytes = args.tokenizer_bytes;
    options.max_bytes = args.max_bytes;
    options.validation_share = args.validation_share;
    options.seed = args.seed;
    options.shard_tokens = args.shard_tokens;
    options.keep_duplicates = args.keep_duplicates;
    options.part = args.part;
    options.chat = chat;
    options.force = args.force;

    let mut progress = show::Bar::new()?;
    let prepared = prepare(&options, &mut progress);
    progress.finish();
    let prepared = prepared?;
    if prepared.reused {
        eprintln!("{} is up to date; --force prepares it again", options.output.display());
    }
    let mut result = report::object(&prepared.manifest, &options.output)?;
    result.insert("reused".into(), prepared.reused.into());
    result.insert("resumed_shards".into(), prepared.resumed_shards.into());
    report::print(&prepared.manifest, &options.output, &result, args.json.as_deref())
}

fn run_merge(args: MergeArgs) -> Result<()> {
    let options = MergeOptions { parts: args.parts, output: args.output, force: args.force };
    let mut progress = show::Bar::new()?;
    let merged = merge(&options, &mut progress);
    progress.finish();
    let merged = merged?;
    let result = report::object(&merged, &options.output)?;
    report::print(&merged, &options.output, &result, args.json.as_deref())
}

/// What `chat` as the first source asks for; its options mean nothing elsewhere,
/// and those of text files mean nothing with it.
fn chat(args: &PrepareArgs) -> Result<Option<ChatOptions>> {
    let usage = |text: &str| Err(ExitError::usage(text.to_owned()).into());
    if args.sources[0].as_os_str() != "chat" {
        return match (&args.context, &args.template) {
            (None, None) => Ok(None),
            _ => usage("--context and --template belong to `prepare chat FILE…`"),
        };
    }
    if args.sources.len() == 1 {
        return usage("`chat` needs a .jsonl file of conversations behind it");
    }
    let of_text = !args.ext.is_empty()
        || args.split != TextSplit::File
        || args.field != "text"
        || args.column != "text";
    if of_text {
        return usage("--ext, --split, --field and --column do not belong to `prepare chat`");
    }
    let Some(context) = args.context else {
        return usage("`chat` needs --context: the sequence length to train with");
    };
    Ok(Some(ChatOptions { context, template: args.template.clone() }))
}

fn source(args: &PrepareArgs) -> Result<Source> {
    if args.sources[0].as_os_str() == "chat" {
        return Ok(Source::Chat { paths: args.sources[1..].to_vec() });
    }
    let is_cargo = |p: &PathBuf| p.as_os_str() == "cargo";
    if args.sources.iter().any(is_cargo) {
        if args.sources.len() > 1 {
            let e = anyhow::anyhow!("`cargo` is a source of its own: name it alone");
            return Err(ExitError::new(Exit::Usage, e).into());
        }
        return Ok(Source::Cargo { workspace: args.workspace.clone() });
    }
    Ok(Source::Files(FileOptions {
        paths: args.sources.clone(),
        extensions: args.ext.iter().map(|e| e.trim_start_matches('.').to_owned()).collect(),
        split: args.split.clone(),
        field: args.field.clone(),
        column: args.column.clone(),
    }))
}

/// The first source's name without its ending.
fn default_name(sources: &[PathBuf]) -> String {
    sources
        .first()
        .and_then(|p| p.file_stem())
        .map_or_else(|| "corpus".into(), |s| s.to_string_lossy().into_owned())
}

fn run_inspect(args: &InspectArgs) -> Result<()> {
    let manifest = Manifest::load(&args.folder)?;
    for (split, info) in
        [(Split::Train, &manifest.train), (Split::Validation, &manifest.validation)]
    {
        if info.shards.is_empty() {
            continue;
        }
        let dataset = Dataset::open(&args.folder, split)?;
        if args.verify {
            dataset.verify()?;
        }
    }
    let mut result = report::object(&manifest, &args.folder)?;
    result.insert("verified".into(), args.verify.into());
    report::print(&manifest, &args.folder, &result, args.json.as_deref())
}

/// Bytes: a number, or one with KB, MB, GB, KiB, MiB or GiB behind it.
pub(crate) fn size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit: u64 = match text[digits.len()..].to_ascii_lowercase().as_str() {
        "" | "b" => 1,
        "kb" => 1000,
        "mb" => 1_000_000,
        "gb" => 1_000_000_000,
        "k" | "kib" => 1 << 10,
        "m" | "mib" => 1 << 20,
        "g" | "gib" => 1 << 30,
        unit => return Err(format!("`{unit}` is no unit: KB, MB, GB, KiB, MiB, GiB")),
    };
    let number: u64 = digits.trim().parse().map_err(|e| format!("`{digits}`: {e}"))?;
    number.checked_mul(unit).ok_or_else(|| format!("{text}: more than 2⁶⁴ bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        use clap::CommandFactory;
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes() {
        for (text, bytes) in [
            ("7", 7),
            ("24MiB", 24 << 20),
            ("24mb", 24_000_000),
            ("3 GiB", 3 << 30),
            ("5k", 5 << 10),
        ] {
            assert_eq!(size(text), Ok(bytes), "{text}");
        }
        for bad in ["", "MiB", "1.5GiB", "-1", "1TBit", "99999999999GiB"] {
            assert!(size(bad).is_err(), "{bad}");
        }
    }
}
