//! Where the tokens to score come from, and the pieces that a model reads of them.

use std::path::Path;

use bitnet_data::shard::FLAG_LOSS;
use bitnet_data::{Dataset, Split};
use sha2::{Digest, Sha256};

use crate::perplexity::PerplexityOptions;
use crate::windows::{Mode, Window, Windows};
use crate::{EvalError, words};

/// Tokens that are read at a time where documents are looked for in shards.
const BLOCK: usize = 1 << 16;

/// Tokens to score, with random access.
#[derive(Debug)]
pub enum TokenSource {
    /// Tokens in memory; `text`: they are a whole text, scored to its end.
    Tokens {
        /// The tokens.
        tokens: Vec<u32>,
        /// Whether what is left behind the last whole window is scored too.
        text: bool,
    },
    /// Documents for [`Mode::Rolling`].
    Documents(Vec<TextDocument>),
    /// All shards of one split, as one sequence; of conversations packed into rows,
    /// only the tokens whose loss training takes are scored.
    Shards(Box<Dataset>),
}

/// A document and the size of its text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TextDocument {
    /// A token that is read and not scored, then those of the text.
    pub tokens: Vec<u32>,
    /// Words of the text, see [`words::count_words`].
    pub words: u64,
    /// Its bytes.
    pub bytes: u64,
}

impl TextDocument {
    /// A document of these tokens (the first of them read and not scored), whose
    /// words and bytes are those of `text`.
    #[must_use]
    pub fn new(tokens: Vec<u32>, text: &str) -> Self {
        Self { tokens, words: words::count_words(text), bytes: text.len() as u64 }
    }
}

/// What a model reads at once, and what of it is scored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Position in the sequence, or the document, of the first token.
    pub(crate) start: u64,
    pub(crate) tokens: Vec<u32>,
    /// The first token that is scored; behind the last where none is.
    pub(crate) first: usize,
    /// Which tokens count; all from `first` on where absent.
    pub(crate) counted: Option<Vec<bool>>,
    /// Words and bytes of the document it belongs to, where they are known.
    pub(crate) size: Option<(u64, u64)>,
    /// Whether the piece before it is of the same document.
    pub(crate) goes_on: bool,
}

impl TokenSource {
    /// How many tokens there are.
    #[must_use]
    pub fn len(&self) -> u64 {
        match self {
            Self::Tokens { tokens, .. } => tokens.len() as u64,
            Self::Documents(documents) => documents.iter().map(|d| d.tokens.len() as u64).sum(),
            Self::Shards(shards) => shards.tokens(),
        }
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether it is one whole text.
    #[must_use]
    pub fn is_text(&self) -> bool {
        matches!(self, Self::Tokens { text: true, .. })
    }

    /// Inputs in a row, where conversations were packed into rows: the only context
    /// they can be scored with.
    #[must_use]
    pub fn row_context(&self) -> Option<usize> {
        match self {
            Self::Shards(shards) => shards.row_tokens().map(|row| row - 1),
            _ => None,
        }
    }

    /// Puts tokens `start..start + len` into `out`.
    ///
    /// # Errors
    /// A range beyond the end, a shard that is damaged; documents, which are no
    /// sequence.
    pub fn read(&self, start: u64, len: usize, out: &mut Vec<u32>) -> Result<(), EvalError> {
        out.clear();
        match self {
            Self::Tokens { tokens, .. } => {
                let from = usize::try_from(start).unwrap_or(usize::MAX);
                let range = tokens.get(from..from.saturating_add(len)).ok_or_else(|| {
                    let n = tokens.len();
                    EvalError::Usage(format!("tokens {start} to {start} + {len} of {n}"))
                })?;
                out.extend_from_slice(range);
            }
            Self::Documents(_) => return Err(needs_rolling()),
            Self::Shards(shards) => {
                out.resize(len, 0);
                shards.read(start, out)?;
            }
        }
        Ok(())
    }

    /// What is read and scored in order.
    pub(crate) fn pieces(&self, options: &PerplexityOptions) -> Result<Pieces, EvalError> {
        let &PerplexityOptions { mode, context, stride, bos, .. } = options;
        let windows =
            |mode, context| Windows::new(mode, self.len(), context, stride, self.is_text());
        let walk = match (self, self.row_context()) {
            (_, Some(row)) if mode != Mode::Windows || context != row => {
                return Err(EvalError::Rows { mode: mode.name(), context, row });
            }
            // Rows share no token, as blocks do.
            (_, Some(row)) => Walk::Sequence(windows(Mode::Blocks, row + 1)?),
            (Self::Documents(documents), _) => {
                if mode != Mode::Rolling {
                    return Err(needs_rolling());
                }
                if documents.is_empty() {
                    let mode = mode.name();
                    return Err(EvalError::TooShort { tokens: 0, needed: 1, mode, context });
                }
                Walk::Documents { next: 0, current: None }
            }
            (Self::Shards(shards), _) if mode == Mode::Rolling => {
                let bos = bos.unwrap_or(shards.eos_id());
                Walk::ShardDocuments(ShardDocuments::new(bos, shards.eos_id()))
            }
            _ => Walk::Sequence(windows(mode, context)?),
        };
        Ok(Pieces { options: *options, walk, total: self.len() })
    }
}

fn needs_rolling() -> EvalError {
    EvalError::Usage("documents are scored in mode rolling".into())
}

/// The pieces of a source, in order; see [`TokenSource::pieces`].
#[derive(Debug)]
pub(crate) struct Pieces {
    options: PerplexityOptions,
    walk: Walk,
    /// Tokens of the source.
    total: u64,
}

#[derive(Debug)]
enum Walk {
    Sequence(Windows),
    Documents { next: usize, current: Option<Windows> },
    ShardDocuments(ShardDocuments),
}

impl Pieces {
    /// How many tokens will be scored, at most those of `goal` tokens and `most`
    /// windows; for a progress bar.
    pub(crate) fn expected(&self, goal: u64, most: u64) -> u64 {
        match &self.walk {
            Walk::Sequence(windows) if goal == u64::MAX && most == u64::MAX => {
                windows.total_scored()
            }
            Walk::Sequence(windows) => {
                let mut scored = 0;
                for (window, _) in windows.clone().zip(0..most) {
                    if scored >= goal {
                        break;
                    }
                    scored += window.scored() as u64;
                }
                scored
            }
            _ => self.total.min(goal).min(most.saturating_mul(self.options.context as u64)),
        }
    }

    /// The next piece of `source`, which is the one that these are the pieces of.
    pub(crate) fn next(&mut self, source: &TokenSource) -> Result<Option<Piece>, EvalError> {
        let context = self.options.context;
        match (&mut self.walk, source) {
            (Walk::Documents { next, current }, TokenSource::Documents(documents)) => loop {
                if let Some(window) = current.as_mut().and_then(Iterator::next) {
                    let document = &documents[*next - 1];
                    let size = Some((document.words, document.bytes));
                    return Ok(Some(rolling(&document.tokens, window, size)));
                }
                let Some(document) = documents.get(*next) else { return Ok(None) };
                *next += 1;
                *current = windows_of(&document.tokens, context)?;
            },
            (Walk::ShardDocuments(walk), TokenSource::Shards(shards)) => loop {
                if let Some(window) = walk.current.as_mut().and_then(Iterator::next) {
                    return Ok(Some(rolling(&walk.document, window, None)));
                }
                if !walk.next_document(shards)? {
                    return Ok(None);
                }
                walk.current = windows_of(&walk.document, context)?;
            },
            (Walk::Sequence(windows), source) => {
                let Some(window) = windows.next() else { return Ok(None) };
                let mut tokens = Vec::new();
                source.read(window.start, window.len, &mut tokens)?;
                if let (Mode::LlamaCpp, Some(bos)) = (self.options.mode, self.options.bos) {
                    tokens[0] = bos;
                }
                let mut first = window.first;
                let counted = source.counted(window)?;
                if let Some(counted) = &counted {
                    let wanted = counted.iter().skip(first).position(|c| *c);
                    first = wanted.map_or(tokens.len(), |at| first + at);
                }
                let start = window.start;
                Ok(Some(Piece { start, tokens, first, counted, size: None, goes_on: false }))
            }
            _ => Err(needs_rolling()),
        }
    }
}

impl TokenSource {
    /// Which tokens of a window count, where the source says so.
    fn counted(&self, window: Window) -> Result<Option<Vec<bool>>, EvalError> {
        match self {
            Self::Shards(shards) if shards.row_tokens().is_some() => {
                let mut flags = vec![0; window.len];
                shards.read_flags(window.start, &mut flags)?;
                Ok(Some(flags.into_iter().map(|f| f & FLAG_LOSS != 0).collect()))
            }
            _ => Ok(None),
        }
    }
}

/// The rolling windows of a document; none where it has no token of its own.
fn windows_of(document: &[u32], context: usize) -> Result<Option<Windows>, EvalError> {
    let tokens = document.len() as u64;
    (tokens > 1).then(|| Windows::new(Mode::Rolling, tokens, context, 0, true)).transpose()
}

fn rolling(document: &[u32], window: Window, size: Option<(u64, u64)>) -> Piece {
    let from = window.start as usize;
    Piece {
        start: window.start,
        tokens: document[from..from + window.len].to_vec(),
        first: window.first,
        counted: None,
        size,
        // The first window alone scores the document's first token.
        goes_on: from + window.first > 1,
    }
}

/// Documents in shards: what lies between end tokens.
#[derive(Debug)]
struct ShardDocuments {
    bos: u32,
    eos: u32,
    /// Where in the split the next block begins.
    position: u64,
    block: Vec<u32>,
    /// Tokens of the block that were taken.
    taken: usize,
    document: Vec<u32>,
    current: Option<Windows>,
}

impl ShardDocuments {
    fn new(bos: u32, eos: u32) -> Self {
        let (block, document) = (Vec::new(), Vec::new());
        Self { bos, eos, position: 0, block, taken: 0, document, current: None }
    }

    /// Reads the next document, the token before it included; whether there is one.
    fn next_document(&mut self, shards: &Dataset) -> Result<bool, EvalError> {
        self.document.clear();
        self.document.push(self.bos);
        loop {
            let rest = &self.block[self.taken..];
            if let Some(end) = rest.iter().position(|&t| t == self.eos) {
                self.document.extend_from_slice(&rest[..end]);
                self.taken += end + 1;
                return Ok(true);
            }
            self.document.extend_from_slice(rest);
            let left = shards.tokens() - self.position;
            if left == 0 {
                self.taken = self.block.len();
                return Ok(self.document.len() > 1);
            }
            let len = usize::try_from(left).unwrap_or(usize::MAX).min(BLOCK);
            self.block.resize(len, 0);
            shards.read(self.position, &mut self.block)?;
            self.position += len as u64;
            self.taken = 0;
        }
    }
}

/// Opens one split of a folder of token shards for a model whose tokenizer is
/// `tokenizer_json`.
///
/// # Errors
/// Missing or damaged shards, and shards made with another tokenizer: the same
/// numbers would stand for other text.
pub fn open_shards(
    folder: &Path,
    split: Split,
    tokenizer_json: &str,
) -> Result<TokenSource, EvalError> {
    let shards = Dataset::open(folder, split)?;
    let found = shards.tokenizer()?.hash_hex();
    let expected = sha256_hex(tokenizer_json.as_bytes());
    if found != expected {
        return Err(EvalError::Tokenizer { data: folder.into(), expected, found });
    }
    Ok(TokenSource::Shards(Box::new(shards)))
}

/// Reads a text file; returns it with its hash.
///
/// # Errors
/// A file that cannot be read, is empty or is not UTF-8.
pub fn read_text(path: &Path) -> Result<(String, String), EvalError> {
    let bytes =
        std::fs::read(path).map_err(|source| EvalError::Read { path: path.into(), source })?;
    let hash = sha256_hex(&bytes);
    let text = String::from_utf8(bytes)
        .map_err(|e| EvalError::NotText { path: path.into(), at: e.utf8_error().valid_up_to() })?;
    if text.is_empty() {
        return Err(EvalError::Empty { path: path.into() });
    }
    Ok((text, hash))
}

/// SHA-256 in hexadecimal.
#[must_use]
pub fn sha256_hex(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|b| format!("{b:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_ranges_and_refuses_those_beyond_the_end() {
        let source = TokenSource::Tokens { tokens: (0..10).collect(), text: true };
        let mut out = Vec::new();
        source.read(3, 4, &mut out).unwrap();
        assert_eq!(out, [3, 4, 5, 6]);
        assert!(source.read(8, 3, &mut out).is_err());
        assert!(source.read(u64::MAX, 3, &mut out).is_err());
        assert_eq!((source.len(), source.is_empty(), source.is_text()), (10, false, true));
    }

    fn options(mode: Mode, context: usize) -> PerplexityOptions {
        PerplexityOptions {
            mode,
            context,
            stride: 1,
            max_tokens: None,
            max_windows: None,
            bos: None,
        }
    }

    #[test]
    fn documents_are_cut_one_by_one() {
        let document = |tokens: &[u32], text| TextDocument::new(tokens.to_vec(), text);
        let source = TokenSource::Documents(vec![
            document(&[9, 1, 2, 3, 4, 5], "one two"),
            document(&[9], ""),
            document(&[9, 6], "three"),
        ]);
        let mut pieces = source.pieces(&options(Mode::Rolling, 3)).unwrap();
        let mut found = Vec::new();
        while let Some(p) = pieces.next(&source).unwrap() {
            found.push((p.tokens, p.first, p.goes_on, p.size.unwrap()));
        }
        let expected = [
            (vec![9, 1, 2, 3], 1, false, (2, 7)),
            (vec![2, 3, 4, 5], 2, true, (2, 7)),
            (vec![9, 6], 1, false, (1, 5)),
        ];
        assert_eq!(found, expected);
        for mode in [Mode::Windows, Mode::Blocks] {
            assert!(source.pieces(&options(mode, 3)).unwrap_err().to_string().contains("rolling"));
        }
        let none = TokenSource::Documents(Vec::new());
        assert_eq!(none.pieces(&options(Mode::Rolling, 3)).unwrap_err().exit().code(), 3);
    }

    #[test]
    fn text_errors_name_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.txt");
        let message = |path: &Path| {
            let error = read_text(path).unwrap_err();
            assert_eq!(error.exit().code(), 3);
            error.to_string()
        };
        assert!(message(&path).contains("t.txt: cannot be read"));
        std::fs::write(&path, "").unwrap();
        assert!(message(&path).contains("t.txt: empty"));
        std::fs::write(&path, b"ab\xff").unwrap();
        assert!(message(&path).contains("byte 2"));
        std::fs::write(&path, "abc").unwrap();
        let (text, hash) = read_text(&path).unwrap();
        assert_eq!(text, "abc");
        assert!(hash.starts_with("ba7816bf8f01cfea"), "FIPS 180-4's example");
    }
}
