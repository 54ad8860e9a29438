//! Sequences run together give the logits that each gives alone, and the best
//! tokens are the same in every head mode.
#![allow(clippy::unwrap_used)]

mod common;

use bitnet_core::ModelConfig;
use bitnet_engine::{
    BatchSession, GenerateOptions, Generator, HeadMode, KvType, Sampler, SamplerOptions, Session,
    SessionOptions,
};
use common::{Random, RandomModel, bits, variants};

/// A model whose single token is worth several threads.
fn large() -> ModelConfig {
    ModelConfig {
        hidden_size: 512,
        intermediate_size: 1400,
        num_hidden_layers: 1,
        num_attention_heads: 8,
        vocab_size: 900,
        ..ModelConfig::tiny()
    }
}

#[test]
fn every_sequence_is_as_if_alone() {
    for (name, config) in variants().into_iter().chain([("large", large())]) {
        for (kv, threads) in [(KvType::F32, 1), (KvType::F16, 3), (KvType::Int8, 2)] {
            let (model, _dir) = RandomModel::new(&config, 31).open();
            let threads = Some(threads);
            let options = SessionOptions { kv, threads, chunk: 7, ..SessionOptions::default() };
            // More sequences than a product takes row by row.
            let count = 19;
            let mut batch = BatchSession::new(&model, &options, count).unwrap();
            let mut alone: Vec<Session> =
                (0..count).map(|_| Session::new(&model, &options).unwrap()).collect();
            let mut random = Random(8);
            for (i, alone) in alone.iter_mut().enumerate() {
                // From none to two chunks and a half.
                let prompt = random.tokens(i, &config);
                if i > 0 {
                    let want = bits(alone.prefill(&prompt).unwrap());
                    assert_eq!(bits(batch.prefill(i, &prompt).unwrap()), want, "{name}, {i}");
                }
            }
            for take in [1, 2, 3, 8, 16, 19, 5, 4] {
                // Some of them, in no order.
                let steps: Vec<(usize, u32)> = (0..take)
                    .map(|i| ((i * 7 + take) % count, random.tokens(1, &config)[0]))
                    .collect();
                let logits = batch.decode(&steps).unwrap();
                assert_eq!(logits.len(), take * config.vocab_size);
                for (logits, &(i, token)) in logits.chunks(config.vocab_size).zip(&steps) {
                    let want = alone[i].decode(token).unwrap();
                    assert_eq!(bits(logits), bits(want), "{name}, {kv:?}, {take}, sequence {i}");
                }
            }
            // A sequence goes back, and its neighbours do not notice.
            batch.truncate(3, 2).unwrap();
            alone[3].truncate(2);
            let prompt = random.tokens(9, &config);
            let want = bits(alone[3].prefill(&prompt).unwrap());
            assert_eq!(bits(batch.prefill(3, &prompt).unwrap()), want, "{name}");
            for (i, alone) in alone.iter().enumerate() {
                assert_eq!(batch.tokens(i).unwrap(), alone.tokens());
            }
        }
    }
}

#[test]
fn a_wrong_step_is_refused_and_changes_nothing() {
    let (model, _dir) = RandomModel::new(&ModelConfig::tiny(), 3).open();
    let options = SessionOptions { context: Some(4), threads: Some(1), ..Default::default() };
    let mut batch = BatchSession::new(&model, &options, 2).unwrap();
    assert_eq!((batch.sequences(), batch.context(), batch.workers().threads()), (2, 4, 1));
    assert_eq!(batch.model().file(), model.file());
    batch.prefill(1, &[1, 2, 3]).unwrap();
    for (steps, message, code) in [
        (vec![], "no token", 2),
        (vec![(0, 1), (2, 1)], "sequence 2: the batch has 2", 2),
        (vec![(0, 1), (0, 2)], "sequence 0 is given two tokens", 2),
        (vec![(1, 1), (0, 320)], "token 320 at position 0", 3),
    ] {
        let e = batch.decode(&steps).unwrap_err();
        assert!(e.to_string().contains(message), "{e}");
        assert_eq!(e.exit().code(), code);
    }
    assert!(batch.prefill(2, &[1]).is_err() && batch.truncate(2, 0).is_err());
    assert!(batch.prefill(0, &[]).is_err() && batch.tokens(2).is_err());
    assert_eq!((batch.tokens(0).unwrap(), batch.tokens(1).unwrap()), (&[][..], &[1, 2, 3][..]));
    batch.decode(&[(1, 4)]).unwrap();
    let e = batch.decode(&[(0, 1), (1, 5)]).unwrap_err().to_string();
    assert!(e.contains("1 tokens do not fit: 4 of the session's 4"), "{e}");

    let e = BatchSession::new(&model, &options, 0).unwrap_err().to_string();
    assert!(e.starts_with("sequences = 0"), "{e}");
    let options = SessionOptions { head: HeadMode::Int8Exact, ..options };
    let e = BatchSession::new(&model, &options, 2).unwrap_err().to_string();
    assert!(e.starts_with("head = int8"), "{e}");
}

#[test]
fn the_best_tokens_are_those_of_all_logits() {
    for (name, config) in variants().into_iter().chain([("large", large())]) {
        let (model, _dir) = RandomModel::new(&config, 41).open();
        let session = |head, threads| {
            let options = SessionOptions { head, threads: Some(threads), ..Default::default() };
            Session::new(&model, &options).unwrap()
        };
        let mut full = session(HeadMode::Stored, 1);
        let mut sessions =
            [(1, HeadMode::Stored), (1, HeadMode::Int8Exact), (3, HeadMode::Int8Exact)]
                .map(|(threads, head)| session(head, threads));
        for (i, token) in Random(6).tokens(12, &config).into_iter().enumerate() {
            let logits = full.decode(token).unwrap();
            let mut ids: Vec<u32> = (0..config.vocab_size as u32).collect();
            ids.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]));
            let k = [1, 5, 40][i % 3];
            for s in &mut sessions {
                let top = s.decode_top(token, k).unwrap();
                let found: Vec<u32> = top.iter().map(|t| t.token).collect();
                assert_eq!(found, ids[..k], "{name}, {i}");
                for t in top {
                    assert_eq!(t.logit.to_bits(), logits[t.token as usize].to_bits(), "{name}");
                }
            }
        }
        assert!(sessions[1].decode_top(config.vocab_size as u32, 1).is_err());
        assert_eq!(sessions[1].position(), 12);
    }
}

#[test]
fn greedy_text_is_the_same_in_both_head_modes() {
    let config = ModelConfig { tie_word_embeddings: false, ..ModelConfig::tiny() };
    let (model, _dir) = RandomModel::new(&config, 77).open();
    let tokenizer = model.tokenizer().unwrap();
    for repetition_penalty in [1.0, 1.3] {
        let run = |head| {
            let options = SessionOptions { head, threads: Some(1), ..Default::default() };
            let mut session = Session::new(&model, &options).unwrap();
            assert_eq!(session.head(), head);
            let options = SamplerOptions { repetition_penalty, ..Default::default() };
            let sampler = Sampler::new(options).unwrap();
            let options =
                GenerateOptions { max_tokens: 40, ignore_eos: true, ..Default::default() };
            let mut g =
                Generator::new(&mut session, &tokenizer, sampler, &[5, 6], &options).unwrap();
            assert!(g.by_ref().all(|piece| piece.is_ok()));
            g.tokens().to_vec()
        };
        let want = run(HeadMode::Stored);
        assert_eq!(want.len(), 40);
        assert_eq!(run(HeadMode::Int8Exact), want);
    }
    for mode in [HeadMode::Stored, HeadMode::Int8Exact] {
        assert_eq!(HeadMode::from_name(mode.name()), Some(mode));
    }
    assert_eq!(HeadMode::from_name("int4"), None);
}
