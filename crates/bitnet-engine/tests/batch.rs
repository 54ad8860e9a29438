//! Sequences run together give the logits that each gives alone, and the best
//! tokens are the same in every head mode.
#![allow(clippy::unwrap_used)]

mod common;

use bitnet_core::ModelConfig;
use bitnet_engine::{
    BatchSession, GenerateOptions, Generator, HeadMode, KvType, Sampler, SamplerOptions, Session,
    SessionOptions, TokenLogit, TracePoint,
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
        let mut sessions: Vec<Session> = HeadMode::ALL
            .into_iter()
            .flat_map(|head| [1, 3].map(|threads| session(head, threads)))
            .collect();
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
        let mut hidden = Vec::new();
        full.trace(&[3], &mut |point| {
            if let TracePoint::Final { x } = point {
                hidden = x.to_vec();
            }
        })
        .unwrap();
        let want = sessions[0].decode_top(3, 2).unwrap().to_vec();
        for s in &mut sessions[1..] {
            assert!(s.decode_top(config.vocab_size as u32, 1).is_err());
            assert_eq!(s.position(), 12);
            // From the hidden state that the token would lead to.
            assert_eq!(s.top_of_hidden(&hidden, 2).unwrap(), want, "{name}");
            let e = s.top_of_hidden(&[1.0], 2).unwrap_err().to_string();
            assert!(e.starts_with("hidden state = 1 elements: the model's hidden size"), "{e}");
            let searches = if s.head() == HeadMode::Stored { 0 } else { 13 };
            assert_eq!(s.head_counts().searches, searches, "{name}");
        }
    }
}

#[test]
fn the_best_tokens_of_a_batch_are_those_of_each_alone() {
    let config = large();
    let (model, _dir) = RandomModel::new(&config, 43).open();
    for head in HeadMode::ALL {
        for threads in [1, 3] {
            let options = SessionOptions { head, threads: Some(threads), ..Default::default() };
            let mut batch = BatchSession::new(&model, &options, 11).unwrap();
            assert_eq!(batch.head(), head);
            let alone = SessionOptions { head: HeadMode::Stored, ..options };
            let mut alone: Vec<Session> =
                (0..11).map(|_| Session::new(&model, &alone).unwrap()).collect();
            let mut random = Random(9);
            for (take, k) in [(1, 1), (11, 1), (3, 40), (9, 2), (11, 1000)] {
                let steps: Vec<(usize, u32)> =
                    (0..take).map(|i| (i * 5 % 11, random.tokens(1, &config)[0])).collect();
                let want: Vec<TokenLogit> = steps
                    .iter()
                    .flat_map(|&(i, token)| alone[i].decode_top(token, k).unwrap().to_vec())
                    .collect();
                assert_eq!(batch.decode_top(&steps, k).unwrap(), want, "{head:?}, {take}, {k}");
            }
            // All logits are there to be had in every mode.
            let want = bits(alone[4].decode(7).unwrap());
            assert_eq!(bits(batch.decode(&[(4, 7)]).unwrap()), want);
            assert_eq!(batch.head_counts().searches, u64::from(head != HeadMode::Stored) * 35);
            assert!(batch.decode_top(&[(0, 1), (0, 2)], 1).is_err());
        }
    }
}

#[test]
fn text_is_the_same_in_every_head_mode() {
    let config = ModelConfig { tie_word_embeddings: false, ..ModelConfig::tiny() };
    let (model, _dir) = RandomModel::new(&config, 77).open();
    let tokenizer = model.tokenizer().unwrap();
    let greedy = SamplerOptions::default();
    let sampled = SamplerOptions { temperature: 0.9, seed: 5, ..greedy.clone() };
    for (sampling, by_scan) in [
        (greedy.clone(), true),
        (SamplerOptions { repetition_penalty: 1.3, ..greedy }, false),
        (SamplerOptions { top_k: 5, ..sampled.clone() }, true),
        (SamplerOptions { top_k: 40, top_p: 0.8, min_p: 0.01, ..sampled.clone() }, true),
        (SamplerOptions { top_k: 5, repetition_penalty: 1.3, ..sampled.clone() }, false),
        (SamplerOptions { top_k: 100_000, ..sampled.clone() }, true),
        (SamplerOptions { top_p: 0.8, ..sampled }, false),
    ] {
        let run = |head| {
            let options = SessionOptions { head, threads: Some(1), ..Default::default() };
            let mut session = Session::new(&model, &options).unwrap();
            assert_eq!(session.head(), head);
            let sampler = Sampler::new(sampling.clone()).unwrap();
            let options =
                GenerateOptions { max_tokens: 40, ignore_eos: true, ..Default::default() };
            let mut g =
                Generator::new(&mut session, &tokenizer, sampler, &[5, 6], &options).unwrap();
            assert!(g.by_ref().all(|piece| piece.is_ok()));
            let tokens = g.tokens().to_vec();
            (tokens, session.head_counts().searches)
        };
        let (want, searches) = run(HeadMode::Stored);
        assert_eq!((want.len(), searches), (40, 0));
        for head in [HeadMode::Int8Exact, HeadMode::Int4Exact] {
            // The first token comes from the logits of the prompt.
            assert_eq!(run(head), (want.clone(), if by_scan { 39 } else { 0 }), "{sampling:?}");
        }
    }
    for mode in HeadMode::ALL {
        assert_eq!(HeadMode::from_name(mode.name()), Some(mode));
    }
    assert_eq!(HeadMode::from_name("int5"), None);
}
