//! The documents of a source, read from several files at once and worked on by
//! all threads, in an order that depends on the files alone.
//!
//! File `i` belongs to lane `i mod 8`. A lane is one thread that reads,
//! decompresses and, where lines do not stand alone, takes apart one file after
//! the other, in blocks of some 256 KiB. The lanes' blocks are taken in turns;
//! lines of JSON are parsed, and every document is worked on, by rayon's threads.
//! Memory: 32 MiB read ahead, a batch of 16 MiB and what is made of it, however
//! large the input (but a document is held whole).

use std::sync::atomic::{AtomicU64, Ordering};

use rayon::prelude::*;

use super::jsonl::{LineReader, Lines};
use super::queue::Queue;
use super::{Document, Documents, Input, Inputs, Kind, TextSplit, cargo, parquet, text};
use crate::error::DataError;

/// Files read at once. Part of the order of documents, so it is no option.
const LANES: usize = 8;
/// A block ends with the line or document that reaches this. Also part of the
/// order.
const BLOCK_BYTES: u64 = 256 << 10;
/// Text gathered before the threads work on it.
const BATCH_BYTES: u64 = 16 << 20;

/// What a lane hands over.
enum Block {
    Lines(usize, Lines),
    Documents(Vec<Result<Document, DataError>>),
}

/// Stops the lanes when the taker returns, early or not.
struct Close<'a>(&'a Queue<Block>);

impl Drop for Close<'_> {
    fn drop(&mut self) {
        self.0.close();
    }
}

impl Inputs {
    /// Streams all documents, in the same order each time: `work` sees each on
    /// one of rayon's threads, `sink` gets what it made of them, a batch at a
    /// time and in order, with the bytes read from the disk since the last
    /// batch. An error in the input is an element behind which `sink` must not
    /// go on.
    ///
    /// # Errors
    /// What `sink` returns; it ends the stream.
    pub(crate) fn batches<T: Send>(
        &self,
        work: impl Fn(Document) -> T + Sync,
        mut sink: impl FnMut(Vec<Result<T, DataError>>, u64) -> Result<(), DataError>,
    ) -> Result<(), DataError> {
        let lanes = LANES.min(self.inputs.len());
        let (queue, read) = (Queue::new(lanes), AtomicU64::new(0));
        std::thread::scope(|scope| {
            let _close = Close(&queue);
            for lane in 0..lanes {
                let (queue, read) = (&queue, &read);
                scope.spawn(move || self.run_lane(lane, lanes, queue, read));
            }
            loop {
                let (mut blocks, mut bytes) = (Vec::new(), 0);
                while bytes < BATCH_BYTES
                    && let Some((block, size)) = queue.pop()
                {
                    blocks.push(block);
                    bytes += size;
                }
                if blocks.is_empty() {
                    return Ok(());
                }
                let batch = blocks
                    .into_par_iter()
                    .flat_map(|block| self.parse(block))
                    .map(|document| document.map(&work))
                    .collect();
                sink(batch, read.swap(0, Ordering::Relaxed))?;
            }
        })
    }

    /// All documents, in the same order each time; for sources
    /// that fit the memory, such as those of tests.
    ///
    /// # Errors
    /// The first error in the input.
    pub fn collect(&self) -> Result<Vec<Document>, DataError> {
        let mut all = Vec::new();
        self.batches(
            |document| document,
            |batch, _| {
                for document in batch {
                    all.push(document?);
                }
                Ok(())
            },
        )?;
        Ok(all)
    }

    fn parse(&self, block: Block) -> Vec<Result<Document, DataError>> {
        match block {
            Block::Lines(file, lines) => self.parse_lines(&self.inputs[file], &lines),
            Block::Documents(documents) => documents,
        }
    }

    fn run_lane(&self, lane: usize, lanes: usize, queue: &Queue<Block>, read: &AtomicU64) {
        'files: for file in (lane..self.inputs.len()).step_by(lanes) {
            let input = &self.inputs[file];
            let expected = self.expected_bytes(input);
            if !queue.reserve(lane, expected) {
                break;
            }
            let mut blocks = self.open(file, read);
            while let Some(block) = blocks.next_block() {
                let bytes = block.bytes();
                let failed = matches!(&block, Block::Documents(d) if d.iter().any(Result::is_err));
                queue.push(lane, block, bytes, expected);
                // Nobody goes on behind an error.
                if failed || !queue.reserve(lane, expected) {
                    break 'files;
                }
            }
            queue.release(expected);
        }
        queue.end(lane);
    }

    /// What a block of the file is expected to take.
    fn expected_bytes(&self, input: &Input) -> u64 {
        match input.kind {
            Kind::Package => input.size,
            Kind::Text if self.options.split == TextSplit::File => input.size,
            Kind::Text | Kind::Jsonl(_) | Kind::Parquet => BLOCK_BYTES,
        }
    }

    fn open<'a>(&'a self, file: usize, read: &'a AtomicU64) -> Blocks<'a> {
        let input = &self.inputs[file];
        let documents: Documents<'a> = match input.kind {
            Kind::Jsonl(compression) => {
                return match LineReader::open(input, compression, read) {
                    Ok(reader) => Blocks::Lines(file, reader),
                    Err(e) => Blocks::Documents(super::failed(e)),
                };
            }
            Kind::Package => match cargo::read(input) {
                Ok(document) => Box::new(document.into_iter().map(Ok)),
                Err(e) => super::failed(e),
            },
            Kind::Text => text::documents(input, &self.options.split),
            Kind::Parquet => parquet::documents(input, &self.options.column),
        };
        read.fetch_add(input.size, Ordering::Relaxed);
        Blocks::Documents(documents)
    }
}

impl Block {
    fn bytes(&self) -> u64 {
        match self {
            Self::Lines(_, lines) => lines.bytes.len() as u64,
            Self::Documents(documents) => {
                documents.iter().flatten().map(|d| d.text.len() as u64).sum()
            }
        }
    }
}

/// A file being read.
enum Blocks<'a> {
    Lines(usize, LineReader<'a>),
    Documents(Documents<'a>),
}

impl Blocks<'_> {
    fn next_block(&mut self) -> Option<Block> {
        match self {
            Self::Lines(file, reader) => match reader.next(BLOCK_BYTES) {
                Ok(lines) => Some(Block::Lines(*file, lines?)),
                Err(e) => Some(Block::Documents(vec![Err(e)])),
            },
            Self::Documents(documents) => {
                let (mut block, mut bytes) = (Vec::new(), 0);
                while bytes < BLOCK_BYTES
                    && let Some(document) = documents.next()
                {
                    bytes += document.as_ref().map_or(BLOCK_BYTES, |d| d.text.len() as u64);
                    block.push(document);
                }
                (!block.is_empty()).then_some(Block::Documents(block))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{FileOptions, Source};
    use super::*;
    use std::fs;
    use std::io::Write;

    fn inputs(paths: Vec<std::path::PathBuf>) -> Inputs {
        Source::Files(FileOptions { paths, ..FileOptions::default() }).open().unwrap()
    }

    /// Some 3 MB of lines.
    fn lines() -> String {
        (0..20_000).map(|i| format!("{{\"text\": \"{i} {}\"}}\n", "word ".repeat(i % 60))).collect()
    }

    fn zstd(bytes: &[u8]) -> Vec<u8> {
        zstd::encode_all(bytes, 1).unwrap()
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    #[test]
    fn compressed_lines_are_the_plain_ones() {
        let dir = tempfile::tempdir().unwrap();
        let text = lines();
        // Two frames or members, one behind the other, cut within a line.
        let (a, b) = text.as_bytes().split_at(text.len() / 2 + 3);
        for (name, bytes) in [
            ("a.jsonl", text.clone().into_bytes()),
            ("b.jsonl.zst", [zstd(a), zstd(b)].concat()),
            ("c.jsonl.gz", [gzip(a), gzip(b)].concat()),
        ] {
            fs::write(dir.path().join(name), bytes).unwrap();
        }
        let read = |name: &str| {
            let documents = inputs(vec![dir.path().join(name)]).collect().unwrap();
            assert!(documents[7].name.ends_with(&format!("{name}:8")), "{}", documents[7].name);
            documents.into_iter().map(|d| d.text).collect::<Vec<_>>()
        };
        let plain = read("a.jsonl");
        assert_eq!(plain.len(), 20_000);
        assert_eq!(plain[61], format!("61 {}", "word "));
        assert_eq!(read("b.jsonl.zst"), plain);
        assert_eq!(read("c.jsonl.gz"), plain);
        // A folder is searched for all of them.
        assert_eq!(inputs(vec![dir.path().into()]).files(), 3);
    }

    #[test]
    fn the_order_is_the_same_with_one_thread_and_with_many() {
        let dir = tempfile::tempdir().unwrap();
        let text = lines();
        for i in 0..11usize {
            let part = &text.as_bytes()[..text.len() * (i + 1) / 11];
            let end = part.iter().rposition(|&b| b == b'\n').unwrap() + 1;
            fs::write(dir.path().join(format!("{i:02}.jsonl.zst")), zstd(&part[..end])).unwrap();
        }
        let inputs = inputs(vec![dir.path().into()]);
        let [one, many] = [1, 5].map(|n| {
            let pool = rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap();
            pool.install(|| inputs.collect().unwrap())
        });
        assert_eq!(one, many);
        // Every file's own documents come in their order.
        let of_last: Vec<&Document> = one.iter().filter(|d| d.name.contains("10.jsonl")).collect();
        assert_eq!(of_last.len(), 20_000);
        let lines_of = |d: &Document| d.name.rsplit(':').next().unwrap().parse::<u64>().unwrap();
        assert!(of_last.iter().map(|d| lines_of(d)).eq(1..=20_000));
    }

    #[test]
    fn damaged_and_cut_files_are_refused_with_their_name() {
        let dir = tempfile::tempdir().unwrap();
        let text = lines();
        for (name, good) in
            [("a.jsonl.zst", zstd(text.as_bytes())), ("a.jsonl.gz", gzip(text.as_bytes()))]
        {
            let path = dir.path().join(name);
            for bad in [&good[..good.len() - 9], &good[..3], b"{\"text\": \"plain\"}\n"] {
                fs::write(&path, bad).unwrap();
                let e = inputs(vec![path.clone()]).collect().unwrap_err();
                assert!(matches!(e, DataError::Read { .. }), "{e}");
                assert!(e.to_string().contains(name), "{e}");
            }
        }
        // The first error in order is the one told, however many there are.
        for i in 0..9 {
            fs::write(dir.path().join(format!("{i}.jsonl")), "{\"text\": 1}\n").unwrap();
        }
        let e = inputs((0..9).map(|i| dir.path().join(format!("{i}.jsonl"))).collect());
        let e = e.collect().unwrap_err().to_string();
        assert!(e.contains("0.jsonl:1: field `text`: expected a string, found a number"), "{e}");
    }
}
