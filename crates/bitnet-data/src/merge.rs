//! Parts of a corpus, prepared on different machines, into one folder.

use std::fs::{self, File};
use std::io::{self, BufReader, Read, Write};
use std::path::{Path, PathBuf};

use bitnet_format::atomic::{AtomicFile, write_atomic};

use crate::dataset::{Dataset, Split};
use crate::error::DataError;
use crate::hash::{Multiset, hex, sha256};
use crate::manifest::{
    ChatInfo, MANIFEST_FILE, Manifest, Request, SplitInfo, TEMPLATE_FILE, TOKENIZER_FILE,
};
use crate::part::{KEYS_FILE, PartInfo};
use crate::prepare::folder::{clear, write_error};
use crate::prepare::{Progress, first_difference, shard_name};
use crate::scan::hash_of_keys;
use crate::source::Source;

/// Parts to merge, and where to.
#[derive(Debug, Clone)]
pub struct MergeOptions {
    /// The prepared folders of all parts, in any order.
    pub parts: Vec<PathBuf>,
    /// The folder to write.
    pub output: PathBuf,
    /// Replace what the folder holds.
    pub force: bool,
}

/// A part's folder, its manifest and what that says about the part.
struct Opened {
    folder: PathBuf,
    manifest: Manifest,
    info: PartInfo,
}

/// Makes `options.output` a prepared folder with the documents of all parts: the
/// same texts, corpus hash and numbers as one machine would have prepared, in the
/// order of the parts. Shards are linked where the file system allows it, copied
/// otherwise. The memory needed does not depend on the size of the corpus.
///
/// # Errors
/// [`DataError::File`] naming the parts that do not belong together, are missing,
/// incomplete or damaged; [`DataError::Output`] where the folder holds a corpus;
/// [`DataError::Write`].
pub fn merge(options: &MergeOptions, progress: &mut dyn Progress) -> Result<Manifest, DataError> {
    let mut parts = options.parts.iter().map(|p| open(p)).collect::<Result<Vec<_>, _>>()?;
    check_output(options)?;
    check_complete(&mut parts)?;
    for part in &parts[1..] {
        check_alike(&parts[0], part)?;
    }
    progress.stage("checking the parts", None);
    for part in &parts {
        for (split, info) in splits(&part.manifest) {
            if !info.shards.is_empty() {
                Dataset::open(&part.folder, split)?;
            }
        }
    }
    let corpus_hash = corpus_hash(&parts, progress)?;

    let output = &options.output;
    clear(output, &[])?;
    let tokenizer = tokenizer(&parts[0])?;
    write_atomic(output.join(TOKENIZER_FILE), |w| w.write_all(&tokenizer))
        .map_err(DataError::Write)?;
    if parts[0].manifest.chat.is_some() {
        let from = parts[0].folder.join(TEMPLATE_FILE);
        let template = fs::read(&from).map_err(DataError::read(&from))?;
        write_atomic(output.join(TEMPLATE_FILE), |w| w.write_all(&template))
            .map_err(DataError::Write)?;
    }
    let total = parts.iter().map(|p| p.manifest.tokens).sum();
    progress.stage("linking shards", Some(total));
    let train = gather(&parts, Split::Train, output, progress)?;
    let validation = gather(&parts, Split::Validation, output, progress)?;
    let manifest = whole(&parts, corpus_hash, train, validation);
    manifest.save(output)?;
    Ok(manifest)
}

fn open(folder: &Path) -> Result<Opened, DataError> {
    let manifest = Manifest::load(folder)?;
    let Some(info) = manifest.part.clone() else {
        let what = "is a whole corpus, not a part of one (prepare --part)";
        return Err(DataError::file(folder, what));
    };
    Ok(Opened { folder: folder.to_path_buf(), manifest, info })
}

fn check_output(options: &MergeOptions) -> Result<(), DataError> {
    let refuse =
        |what: &str| Err(DataError::Output { path: options.output.clone(), what: what.to_owned() });
    if let Ok(output) = options.output.canonicalize() {
        let same = |part: &PathBuf| part.canonicalize().is_ok_and(|p| p == output);
        if options.parts.iter().any(same) {
            return refuse("is one of the parts; choose another folder");
        }
    }
    if !options.force && options.output.join(MANIFEST_FILE).exists() {
        return refuse("holds a corpus; choose another folder, or --force to replace it");
    }
    Ok(())
}

/// Puts the parts into their order; each must be there once.
fn check_complete(parts: &mut [Opened]) -> Result<(), DataError> {
    let Some(first) = parts.first() else {
        return Err(DataError::option("PART", "no folder of a part is named"));
    };
    let count = first.info.part.count();
    for part in parts.iter() {
        if part.info.part.count() != count {
            let what = format!(
                "is part {}, and {} is part {}: not of the same division",
                part.info.part,
                parts[0].folder.display(),
                parts[0].info.part
            );
            return Err(DataError::file(&part.folder, what));
        }
    }
    parts.sort_by_key(|p| p.info.part.index());
    for pair in parts.windows(2) {
        if pair[0].info.part == pair[1].info.part {
            let (other, part) = (pair[0].folder.display(), pair[0].info.part);
            return Err(DataError::file(&pair[1].folder, format!("is part {part}, as {other} is")));
        }
    }
    let missing: Vec<String> = (1..=count)
        .filter(|i| parts.iter().all(|p| p.info.part.index() != *i))
        .map(|i| format!("{i}/{count}"))
        .collect();
    if !missing.is_empty() {
        let what = format!("is part {}; not named: {}", parts[0].info.part, missing.join(", "));
        return Err(DataError::file(&parts[0].folder, what));
    }
    Ok(())
}

/// Two parts of one request on the same input.
fn check_alike(a: &Opened, b: &Opened) -> Result<(), DataError> {
    let other = a.folder.display();
    let differ = |what: String| Err(DataError::file(&b.folder, what));
    let (x, y) = (&a.manifest, &b.manifest);
    if x.tokenizer != y.tokenizer {
        return differ(format!(
            "has the tokenizer {}, {other} has {}",
            y.tokenizer.sha256, x.tokenizer.sha256
        ));
    }
    let (was, is) = (comparable(&x.request), comparable(&y.request));
    if was != is {
        let what = first_difference(&was, &is);
        return differ(format!("was prepared with other options than {other}: {what}"));
    }
    if (a.info.input_documents, &a.info.input_hash) != (b.info.input_documents, &b.info.input_hash)
    {
        return differ(format!(
            "was prepared from other texts than {other}: {} documents (hash {}) there, {} (hash {}) here",
            a.info.input_documents, a.info.input_hash, b.info.input_documents, b.info.input_hash
        ));
    }
    Ok(())
}

/// A request without what may differ between machines: the part, and where the
/// files lie (their content is compared by its hash).
fn comparable(request: &Request) -> Request {
    let mut request = request.clone();
    request.part = None;
    request.source = Source::Cargo { workspace: PathBuf::new() };
    request
}

/// The hash of the whole: over the merged keys, or the sum of the parts' sums.
fn corpus_hash(parts: &[Opened], progress: &dyn Progress) -> Result<String, DataError> {
    if parts[0].manifest.request.keep_duplicates {
        let mut whole = Multiset::default();
        for part in parts {
            let sum = part.info.own_sum.as_deref().unwrap_or("");
            let Some(own) = Multiset::from_hex(sum, part.info.own_documents) else {
                let path = part.folder.join(MANIFEST_FILE);
                let what = format!("part.own_sum: expected 64 hexadecimal digits, found `{sum}`");
                return Err(DataError::file(&path, what));
            };
            whole.merge(&own);
        }
        return Ok(whole.hash());
    }
    let mut keys = parts.iter().map(Keys::open).collect::<Result<Vec<_>, _>>()?;
    let mut failed = None;
    let hash = hash_of_keys(std::iter::from_fn(|| match next_key(&mut keys, progress) {
        Ok(key) => key,
        Err(e) => {
            failed = Some(e);
            None
        }
    }));
    failed.map_or(Ok(hash), Err)
}

/// The smallest key that is left; two parts must not hold the same.
fn next_key(keys: &mut [Keys], progress: &dyn Progress) -> Result<Option<u128>, DataError> {
    let Some(smallest) = keys.iter().filter_map(|k| k.next).min() else {
        return Ok(None);
    };
    if progress.interrupted() {
        return Err(DataError::Interrupted);
    }
    let mut holder: Option<PathBuf> = None;
    for keys in keys.iter_mut().filter(|k| k.next == Some(smallest)) {
        if let Some(other) = &holder {
            let other = other.display();
            let what = format!("overlaps {other}: both hold the document {smallest:032x}");
            return Err(DataError::file(&keys.path, what));
        }
        holder = Some(keys.path.clone());
        keys.advance()?;
    }
    Ok(Some(smallest))
}

/// The sorted keys of a part, read one at a time.
struct Keys {
    path: PathBuf,
    reader: BufReader<File>,
    left: u64,
    next: Option<u128>,
}

impl Keys {
    fn open(part: &Opened) -> Result<Self, DataError> {
        let path = part.folder.join(KEYS_FILE);
        let file = File::open(&path).map_err(DataError::read(&path))?;
        let bytes = file.metadata().map_err(DataError::read(&path))?.len();
        let documents = part.info.own_documents;
        if documents.checked_mul(16) != Some(bytes) {
            let what = format!("{bytes} bytes; {documents} documents need 16 each");
            return Err(DataError::file(&path, what));
        }
        let reader = BufReader::with_capacity(1 << 16, file);
        let mut keys = Self { path, reader, left: documents, next: None };
        keys.advance()?;
        Ok(keys)
    }

    fn advance(&mut self) -> Result<(), DataError> {
        let last = self.next.take();
        if self.left > 0 {
            let mut bytes = [0; 16];
            self.reader.read_exact(&mut bytes).map_err(DataError::read(&self.path))?;
            let key = u128::from_be_bytes(bytes);
            if last.is_some_and(|last| last >= key) {
                let what = format!("damaged: key {key:032x} is not above the one before it");
                return Err(DataError::file(&self.path, what));
            }
            self.left -= 1;
            self.next = Some(key);
        }
        Ok(())
    }
}

/// The tokenizer of a part, as its manifest names it.
fn tokenizer(part: &Opened) -> Result<Vec<u8>, DataError> {
    let path = part.folder.join(TOKENIZER_FILE);
    let json = fs::read(&path).map_err(DataError::read(&path))?;
    let (found, expected) = (hex(&sha256(&json)), &part.manifest.tokenizer.sha256);
    if found != *expected {
        let what = format!("sha256: the manifest says {expected}, the file has {found}");
        return Err(DataError::file(&path, what));
    }
    Ok(json)
}

/// Links or copies the shards of one split into the output, numbered anew.
fn gather(
    parts: &[Opened],
    split: Split,
    output: &Path,
    progress: &mut dyn Progress,
) -> Result<SplitInfo, DataError> {
    let mut whole = SplitInfo::default();
    for part in parts {
        let info = split_of(&part.manifest, split);
        whole.documents += info.documents;
        whole.bytes += info.bytes;
        whole.tokens += info.tokens;
        for shard in &info.shards {
            if progress.interrupted() {
                return Err(DataError::Interrupted);
            }
            let mut shard = shard.clone();
            let from = part.folder.join(&shard.file);
            shard.file = shard_name(split, whole.shards.len());
            link_or_copy(&from, &output.join(&shard.file))?;
            progress.advance(shard.tokens);
            whole.shards.push(shard);
        }
    }
    Ok(whole)
}

/// A prepared shard is never changed in place, so that a link is as good as a
/// copy; another file system needs the copy.
fn link_or_copy(from: &Path, to: &Path) -> Result<(), DataError> {
    if fs::hard_link(from, to).is_ok() {
        return Ok(());
    }
    let mut source = File::open(from).map_err(DataError::read(from))?;
    let mut file = AtomicFile::create(to).map_err(DataError::Write)?;
    io::copy(&mut source, &mut file).map_err(|e| write_error(to, e))?;
    file.commit().map_err(DataError::Write)
}

fn split_of(manifest: &Manifest, split: Split) -> &SplitInfo {
    match split {
        Split::Train => &manifest.train,
        Split::Validation => &manifest.validation,
    }
}

fn splits(manifest: &Manifest) -> [(Split, &SplitInfo); 2] {
    [Split::Train, Split::Validation].map(|split| (split, split_of(manifest, split)))
}

fn whole(
    parts: &[Opened],
    corpus_hash: String,
    train: SplitInfo,
    validation: SplitInfo,
) -> Manifest {
    let sum = |of: fn(&Manifest) -> u64| parts.iter().map(|p| of(&p.manifest)).sum();
    let first = &parts[0].manifest;
    let fingerprints: Vec<&str> =
        parts.iter().map(|p| p.manifest.source_fingerprint.as_str()).collect();
    // The parts of one machine know the same files, those of several do not.
    let source_fingerprint = match fingerprints.iter().all(|f| *f == fingerprints[0]) {
        true => fingerprints[0].to_owned(),
        false => hex(&sha256(fingerprints.concat().as_bytes())),
    };
    let mut request = first.request.clone();
    request.part = None;
    Manifest {
        request,
        source_fingerprint,
        documents: sum(|m| m.documents),
        bytes: sum(|m| m.bytes),
        tokens: sum(|m| m.tokens),
        duplicates: sum(|m| m.duplicates),
        empty_documents: sum(|m| m.empty_documents),
        beyond_cap: sum(|m| m.beyond_cap),
        corpus_hash,
        train,
        validation,
        part: None,
        chat: parts.iter().filter_map(|p| p.manifest.chat.clone()).reduce(ChatInfo::add),
        ..first.clone()
    }
}
