use super::*;
use proptest::prelude::*;
use std::fs;

fn write(path: &Path, vocab: u32, documents: &[Vec<u32>]) -> ShardHeader {
    let mut w = ShardWriter::create(path, vocab, 0, [7; 32]).unwrap();
    for d in documents {
        w.push_document(d).unwrap();
    }
    w.finish().unwrap()
}

#[test]
fn damaged_shards_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("train-00000.bin");
    write(&path, 300, &[vec![1, 2, 3], vec![299]]);
    let good = fs::read(&path).unwrap();
    assert_eq!(good.len(), HEADER_BYTES + 2 * 6);
    let edit = |at: usize, value: u8| {
        let mut b = good.clone();
        b[at] = value;
        b
    };
    for (content, expected) in [
        (vec![], "is not a token shard: expected the magic `BNSH`, found ``"),
        (b"GGUF1234".to_vec(), "expected the magic `BNSH`, found `GGUF`"),
        (good[..100].to_vec(), "truncated: 100 bytes, and the header alone is 128"),
        (good[..138].to_vec(), "6 tokens of 2 bytes need 140 bytes, the file has 138"),
        ([&good[..], &[0]].concat(), "need 140 bytes, the file has 141"),
        (edit(4, 9), "shard version 9; this program reads versions 1 and 2"),
        (edit(4, 2), "6 tokens in rows of 0"),
        (edit(8, 3), "3 bytes per token; expected 2 or 4"),
        (edit(55, 255), "more than 2⁶⁴ bytes, the file has 140"),
    ] {
        fs::write(&path, content).unwrap();
        let e = ShardReader::open(&path).unwrap_err().to_string();
        assert!(e.contains("train-00000.bin") && e.contains(expected), "{e}");
    }
    // What only reading the payload finds.
    fs::write(&path, edit(129, 200)).unwrap();
    let e = ShardReader::open(&path).unwrap().verify().unwrap_err().to_string();
    assert!(e.contains("damaged: the header says sha256"), "{e}");
    let mut out = [0; 6];
    let e = ShardReader::open(&path).unwrap().read(0, &mut out).unwrap_err().to_string();
    assert!(e.contains("token 51201 at position 0 is not below the vocabulary of 300"), "{e}");
    fs::write(&path, edit(12, 3)).unwrap();
    let e = ShardReader::open(&path).unwrap().verify().unwrap_err().to_string();
    assert!(e.contains("is not below the vocabulary of 259"), "{e}");
    let e = ShardReader::open(dir.path().join("none")).unwrap_err();
    assert!(matches!(e, DataError::Read { .. }));
}

#[test]
fn rows_keep_their_flags() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s.bin");
    for vocab in [300, 70_000] {
        let mut w = ShardWriter::create_rows(&path, vocab, 0, [7; 32], Some(3)).unwrap();
        w.push_row(&[1, 2, 3], &[2, 1, 1], 1).unwrap();
        w.push_row(&[4, 299, 0], &[2, 1, 2], 2).unwrap();
        w.finish().unwrap();
        let shard = ShardReader::open(&path).unwrap();
        shard.verify().unwrap();
        assert_eq!((shard.header().row_tokens, shard.header().documents), (Some(3), 3));
        let (mut tokens, mut flags) = ([0; 5], [0; 5]);
        shard.read(1, &mut tokens).unwrap();
        shard.read_flags(1, &mut flags).unwrap();
        assert_eq!((tokens, flags), ([2, 3, 4, 299, 0], [1, 1, 2, 1, 2]));
        assert!(shard.read(2, &mut tokens).is_err() && shard.read_flags(2, &mut flags).is_err());
        let mut bytes = fs::read(&path).unwrap();
        bytes.pop();
        fs::write(&path, bytes).unwrap();
        let e = ShardReader::open(&path).unwrap_err().to_string();
        assert!(e.contains("truncated or damaged: 6 tokens of"), "{e}");
    }
}

#[test]
fn ranges_beyond_the_shard_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s.bin");
    write(&path, 300, &[vec![1, 2, 3]]);
    let shard = ShardReader::open(&path).unwrap();
    let mut out = [0; 2];
    assert!(shard.read(2, &mut out).is_ok());
    assert!(shard.read(3, &mut out).is_err());
    assert!(shard.read(u64::MAX, &mut out).is_err());
}

#[test]
fn tokens_outside_the_vocabulary_are_not_written() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s.bin");
    let mut w = ShardWriter::create(&path, 300, 0, [0; 32]).unwrap();
    let e = w.push_document(&[299, 300]).unwrap_err().to_string();
    assert!(e.contains("token 300 is not below the vocabulary of 300"), "{e}");
    drop(w);
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

proptest! {
    #[test]
    fn what_was_written_is_read(
        documents in proptest::collection::vec(proptest::collection::vec(0u32..70_000, 0..40), 1..20),
        wide: bool,
    ) {
        let vocab = if wide { 70_000 } else { 65_536 };
        let documents: Vec<Vec<u32>> = documents
            .into_iter()
            .map(|d| d.into_iter().map(|t| t % vocab).collect())
            .collect();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s.bin");
        let header = write(&path, vocab, &documents);
        let shard = ShardReader::open(&path).unwrap();
        prop_assert_eq!(shard.header(), &header);
        prop_assert_eq!(header.token_bytes, if wide { 4 } else { 2 });
        prop_assert_eq!(header.documents, documents.len() as u64);
        shard.verify().unwrap();
        let expected: Vec<u32> = documents.iter().flat_map(|d| d.iter().copied().chain([0])).collect();
        let mut out = vec![0; expected.len()];
        shard.read(0, &mut out).unwrap();
        prop_assert_eq!(out, expected);
    }
}
