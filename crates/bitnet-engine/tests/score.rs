//! Pieces of several sequences scored together have the logits that each has alone, and
//! so has a sequence that was begun by copying another one's keys and values.
#![allow(clippy::unwrap_used)]

mod common;

use bitnet_core::ModelConfig;
use bitnet_engine::{BatchSession, KvType, Model, Piece, Session, SessionOptions};
use common::{Random, RandomModel, bits, variants};

/// The logits of every token of a sequence, alone.
fn alone(model: &Model, options: &SessionOptions, tokens: &[u32]) -> Vec<Vec<u32>> {
    let mut session = Session::new(model, options).unwrap();
    let mut all = Vec::new();
    session.score(tokens, |_, logits| all.push(bits(logits))).unwrap();
    all
}

/// What `score` gives: (piece, position, logits).
fn scored(batch: &mut BatchSession, pieces: &[Piece<'_>]) -> Vec<(usize, usize, Vec<u32>)> {
    let mut all = Vec::new();
    batch.score(pieces, |piece, at, logits| all.push((piece, at, bits(logits)))).unwrap();
    all
}

#[test]
fn pieces_together_are_as_if_alone() {
    for (name, config) in variants() {
        for (kv, threads, chunk) in
            [(KvType::F32, 1, 7), (KvType::F16, 3, 5), (KvType::Int8, 2, 256)]
        {
            let (model, _dir) = RandomModel::new(&config, 51).open();
            let threads = Some(threads);
            let options = SessionOptions { kv, threads, chunk, ..SessionOptions::default() };
            let mut batch = BatchSession::new(&model, &options, 9).unwrap();
            let mut random = Random(3);
            let lengths = [1, 12, 3, 30, 1, 7, 2, 19, 5];
            let texts = lengths.map(|n| random.tokens(2 * n, &config));
            // Two rounds: the second goes on where the first ended. Sequences in no order.
            for round in 0..2 {
                let halves: Vec<Piece<'_>> = (0..9)
                    .map(|i| {
                        let (sequence, n) = (i * 4 % 9, lengths[i * 4 % 9]);
                        let tokens = &texts[sequence][round * n..][..n];
                        // None wanted, all of them, or the last half.
                        Piece { sequence, tokens, first: [n, 0, n / 2][i % 3] }
                    })
                    .collect();
                let found = scored(&mut batch, &halves);
                let expected: Vec<_> = halves
                    .iter()
                    .enumerate()
                    .flat_map(|(i, piece)| {
                        let (first, n) = (piece.first, piece.tokens.len());
                        let until = &texts[piece.sequence][..(round + 1) * n];
                        let own = alone(&model, &options, until);
                        (first..n).map(move |at| (i, at, own[round * n + at].clone()))
                    })
                    .collect();
                assert!(found == expected, "{name}, {kv:?}, round {round}");
            }
            for (i, text) in texts.iter().enumerate() {
                assert_eq!(batch.tokens(i).unwrap(), text);
            }
        }
    }
}

#[test]
fn a_sequence_begun_by_a_copy_is_as_if_computed() {
    for (name, config) in variants() {
        for kv in KvType::ALL {
            let (model, _dir) = RandomModel::new(&config, 52).open();
            let options = SessionOptions { kv, threads: Some(1), ..SessionOptions::default() };
            let mut batch = BatchSession::new(&model, &options, 4).unwrap();
            let mut random = Random(4);
            let text = random.tokens(70, &config);
            let (other, end) = (random.tokens(40, &config), random.tokens(6, &config));
            batch.prefill(2, &text).unwrap();
            // Into an empty one, across others' tokens, and behind a common beginning that
            // ends inside a block of keys.
            batch.prefill(0, &other).unwrap();
            batch.prefill(3, &text[..21]).unwrap();
            batch.prefill(3, &other[..9]).unwrap();
            for (to, len, copied) in [(1, 37, 37), (0, 64, 64), (3, 50, 29), (2, 33, 0)] {
                let other_than_first = text[0] != other[0];
                assert!(other_than_first, "the texts part at once");
                assert_eq!(batch.share(2, to, len).unwrap(), copied, "{name}, {kv:?}, {to}");
                assert_eq!(batch.tokens(to).unwrap(), &text[..len]);
            }
            // What is behind a copy never shows, and the source may change afterwards.
            batch.truncate(2, 3).unwrap();
            batch.prefill(2, &other).unwrap();
            for (to, len) in [(1, 37), (0, 64), (3, 50)] {
                let found = scored(&mut batch, &[Piece { sequence: to, tokens: &end, first: 0 }]);
                let whole = [&text[..len], &end].concat();
                let own = alone(&model, &options, &whole).split_off(len);
                let found: Vec<_> = found.into_iter().map(|(_, _, logits)| logits).collect();
                assert!(found == own, "{name}, {kv:?}, {to}");
            }
            // From a higher to a lower number, of more than there is, and of nothing.
            assert_eq!(batch.share(3, 1, 1000).unwrap(), 56 - 37);
            assert_eq!(batch.tokens(1).unwrap(), batch.tokens(3).unwrap());
            assert_eq!((batch.share(3, 1, 0).unwrap(), batch.tokens(1).unwrap().len()), (0, 0));
        }
    }
}

#[test]
fn wrong_pieces_are_refused_and_change_nothing() {
    let (model, _dir) = RandomModel::new(&ModelConfig::tiny(), 3).open();
    let options = SessionOptions { context: Some(4), threads: Some(1), ..Default::default() };
    let mut batch = BatchSession::new(&model, &options, 2).unwrap();
    batch.prefill(1, &[1, 2, 3]).unwrap();
    let piece = |sequence, tokens| Piece { sequence, tokens, first: 0 };
    for (pieces, message) in [
        (vec![], "no token"),
        (vec![piece(0, &[][..])], "no token"),
        (vec![piece(0, &[1]), piece(2, &[1])], "sequence 2: the batch has 2"),
        (vec![piece(0, &[1]), piece(0, &[2])], "sequence 0 is given two"),
        (vec![piece(0, &[1, 320])], "token 320 at position 1"),
        (vec![piece(0, &[1]), piece(1, &[4, 5])], "2 tokens do not fit"),
    ] {
        let e = batch.score(&pieces, |_, _, _| panic!("nothing is scored")).unwrap_err();
        assert!(e.to_string().contains(message), "{e}");
    }
    assert!(batch.share(0, 2, 1).is_err() && batch.share(2, 0, 1).is_err());
    assert_eq!((batch.tokens(0).unwrap(), batch.tokens(1).unwrap()), (&[][..], &[1, 2, 3][..]));
}
