//! A shard of tokens: its header, its payload in pieces of several sizes, and the
//! check of all of it, with the checksum as it is and put right.
#![no_main]

use std::path::Path;
use std::sync::LazyLock;

use bitnet_data::ShardReader;
use bitnet_data::shard::HEADER_BYTES;
use bitnet_fuzz::{bounded, scratch};
use libfuzzer_sys::fuzz_target;
use sha2::{Digest, Sha256};
use tempfile::TempDir;

static FOLDER: LazyLock<TempDir> = LazyLock::new(scratch);

fuzz_target!(|bytes: &[u8]| {
    let path = FOLDER.path().join("train-00000.bin");
    std::fs::write(&path, bytes).expect("room for the input");
    bounded(bytes.len(), || read(&path));
    if bytes.len() >= HEADER_BYTES {
        let mut right = bytes.to_vec();
        right[64..96].copy_from_slice(&Sha256::digest(&bytes[HEADER_BYTES..]));
        std::fs::write(&path, right).expect("room for the input");
        bounded(bytes.len(), || read(&path));
    }
});

fn read(path: &Path) {
    let Ok(shard) = ShardReader::open(path) else { return };
    let (tokens, vocab) = (shard.header().tokens, shard.header().vocab_size);
    let sound = shard.verify().is_ok();
    for piece in [1, 7, 64] {
        let (mut ids, mut flags) = (vec![0; piece], vec![0; piece]);
        for start in (0..tokens).step_by(piece).take(1 << 10) {
            let n = piece.min((tokens - start) as usize);
            let read = shard.read(start, &mut ids[..n]);
            shard.read_flags(start, &mut flags[..n]).expect("a range that is there");
            assert!(read.is_ok() || !sound);
            assert!(read.is_err() || ids[..n].iter().all(|id| *id < vocab));
        }
    }
    for (start, n) in [(tokens, 1), (u64::MAX, 2), (tokens.saturating_sub(1), 2)] {
        let n: usize = n;
        assert!(shard.read(start, &mut vec![0; n]).is_err());
        assert!(shard.read_flags(start, &mut vec![0; n]).is_err());
    }
}
