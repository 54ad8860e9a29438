//! `bitnet-data synthetic`: made-up text of any size, the same for the same seed
//! on every machine, to measure preparation on.
//!
//! Words are made of syllables and drawn from a vocabulary of 50 000 with
//! probability about 1/rank (Zipf's law); one in 32 is a number, so that not all
//! words come again. Documents have 20 to 2000 words, log-uniform. It has the
//! statistics of a text for a tokenizer, and no meaning.

use std::io::Write;
use std::path::PathBuf;

use anyhow::{Context, Result};
use bitnet_core::exit::{Exit, ExitError};
use bitnet_format::atomic::AtomicFile;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;

const WORDS: usize = 50_000;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// The file to write: .jsonl, .jsonl.zst or .jsonl.gz.
    output: PathBuf,
    /// Bytes of JSON lines, before compression; the last line may go beyond.
    #[arg(long, value_name = "SIZE", value_parser = crate::size)]
    bytes: u64,
    /// Another seed gives another text.
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let name = args.output.to_string_lossy().into_owned();
    let file = AtomicFile::create(&args.output)?;
    let (file, lines, bytes) = if name.ends_with(".jsonl.zst") {
        let mut encoder = zstd::Encoder::new(file, 3).context("zstd")?;
        let (lines, bytes) = write(args, &mut encoder)?;
        (encoder.finish()?, lines, bytes)
    } else if name.ends_with(".jsonl.gz") {
        let mut encoder = flate2::write::GzEncoder::new(file, flate2::Compression::fast());
        let (lines, bytes) = write(args, &mut encoder)?;
        (encoder.finish()?, lines, bytes)
    } else if name.ends_with(".jsonl") {
        let mut file = file;
        let (lines, bytes) = write(args, &mut file)?;
        (file, lines, bytes)
    } else {
        let e = anyhow::anyhow!("{name}: expected a name in .jsonl, .jsonl.zst or .jsonl.gz");
        return Err(ExitError::new(Exit::Usage, e).into());
    };
    file.commit()?;
    println!("{lines} documents, {bytes} bytes of JSON lines in {name}");
    Ok(())
}

/// Writes the lines; how many, and their bytes.
fn write(args: &Args, into: &mut impl Write) -> Result<(u64, u64)> {
    let mut rng = ChaCha8Rng::seed_from_u64(args.seed);
    let words: Vec<String> = (0..WORDS).map(|_| word(&mut rng)).collect();
    let (mut lines, mut bytes) = (0, 0);
    let mut line = String::new();
    while bytes < args.bytes {
        line.clear();
        line.push_str("{\"text\":\"");
        document(&mut rng, &words, &mut line);
        line.push_str("\"}\n");
        into.write_all(line.as_bytes())?;
        bytes += line.len() as u64;
        lines += 1;
    }
    Ok((lines, bytes))
}

/// One to four syllables.
fn word(rng: &mut ChaCha8Rng) -> String {
    const ONSETS: [&str; 20] = [
        "b", "br", "d", "f", "g", "gr", "h", "k", "l", "m", "n", "p", "pl", "r", "s", "st", "t",
        "tr", "v", "w",
    ];
    const REST: [&str; 16] = [
        "a", "e", "i", "o", "u", "an", "en", "in", "on", "ar", "er", "is", "al", "est", "ing", "ou",
    ];
    let syllables = 1 + rng.random_range(0..4usize);
    (0..syllables)
        .map(|_| {
            let onset = ONSETS[rng.random_range(0..ONSETS.len())];
            format!("{onset}{}", REST[rng.random_range(0..REST.len())])
        })
        .collect()
}

/// Sentences of 4 to 20 words, paragraphs of about six sentences; nothing in it
/// needs an escape but the line ends, which are written as `\n`.
fn document(rng: &mut ChaCha8Rng, words: &[String], into: &mut String) {
    let count = (20.0 * 100f64.powf(rng.random::<f64>())) as usize;
    let mut left = 0;
    for i in 0..count {
        let begins = left == 0;
        if begins {
            left = rng.random_range(4..=20usize);
        }
        if i > 0 {
            let paragraph = begins && rng.random_range(0..6u32) == 0;
            into.push_str(if paragraph { "\\n\\n" } else { " " });
        }
        if rng.random_range(0..32u32) == 0 {
            into.push_str(&rng.random_range(0..100_000u32).to_string());
        } else {
            // Log-uniform ranks: rank r with probability about 1/r.
            let rank = (words.len() as f64).powf(rng.random::<f64>()) as usize;
            let word = &words[rank.min(words.len()) - 1];
            if begins {
                // The words are ASCII.
                into.push_str(&word[..1].to_ascii_uppercase());
                into.push_str(&word[1..]);
            } else {
                into.push_str(word);
            }
        }
        left -= 1;
        if left == 0 || i + 1 == count {
            into.push('.');
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_json_and_the_same_for_a_seed() {
        let text = |seed| {
            let args = Args { output: "x.jsonl".into(), bytes: 50_000, seed };
            let mut bytes = Vec::new();
            let (lines, count) = write(&args, &mut bytes).unwrap();
            assert!(count >= 50_000 && bytes.len() as u64 == count && lines > 3);
            String::from_utf8(bytes).unwrap()
        };
        let first = text(1);
        assert_eq!(first, text(1));
        assert_ne!(first, text(2));
        for line in first.lines() {
            let value: serde_json::Value = serde_json::from_str(line).unwrap();
            assert!(value["text"].as_str().unwrap().split_whitespace().count() >= 20, "{line}");
        }
    }
}
