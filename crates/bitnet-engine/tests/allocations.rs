//! Decoding allocates nothing once it runs: counted by the test's own allocator.
#![allow(clippy::unwrap_used)]

mod common;

use std::alloc::System;

use bitnet_core::ModelConfig;
use bitnet_engine::{BatchSession, HeadMode, KvType, Session, SessionOptions};
use common::{Random, RandomModel};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

/// The system's allocator, counting calls of all threads.
#[global_allocator]
static ALLOCATOR: &StatsAlloc<System> = &INSTRUMENTED_SYSTEM;

/// Allocations while `run` runs.
fn count(run: impl FnOnce()) -> usize {
    let region = Region::new(ALLOCATOR);
    run();
    let change = region.change();
    change.allocations + change.reallocations
}

/// Tokens that are counted.
const TOKENS: usize = 630;

/// What the counted tokens may allocate: entering a pool of threads takes a place
/// in its queue, which grows by a block every 63 places.
fn allowed(threads: usize) -> usize {
    if threads == 1 { 0 } else { TOKENS / 63 + 1 }
}

/// The allocations of the window with the fewest, of three: what decoding itself
/// allocates is in every one of them, a thread's first steal in one alone.
fn least(mut run: impl FnMut()) -> usize {
    (0..3).map(|_| count(&mut run)).min().unwrap()
}

// One test: others at the same time would be counted too.
#[test]
fn decoding_allocates_nothing() {
    assert!(count(|| drop(std::hint::black_box(vec![1u8; 100]))) == 1, "it counts");
    // A token is worth several threads, and a context beyond what is counted.
    let config = ModelConfig {
        hidden_size: 512,
        intermediate_size: 1400,
        num_hidden_layers: 1,
        num_attention_heads: 8,
        vocab_size: 900,
        max_position_embeddings: 2048,
        ..ModelConfig::tiny()
    };
    let (model, _dir) = RandomModel::new(&config, 51).open();
    assert!(model.bytes_per_token() > 1 << 20, "one token must enter the pool");
    let prompt = Random(4).tokens(40, &config);
    for threads in [1, 2, 8] {
        for (kv, head) in [
            (KvType::F32, HeadMode::Stored),
            (KvType::F16, HeadMode::Int8Exact),
            (KvType::Int8, HeadMode::Int4Exact),
        ] {
            let options =
                SessionOptions { kv, head, threads: Some(threads), ..SessionOptions::default() };
            let mut session = Session::new(&model, &options).unwrap();
            session.prefill(&prompt).unwrap();
            let mut decode = |i: usize| {
                session.decode(prompt[i % 40]).unwrap();
                session.decode_top(prompt[i % 39], 5).unwrap();
            };
            // A thread's first steal allocates, and it may come late.
            (0..20).for_each(&mut decode);
            let found = least(|| (0..TOKENS / 2).for_each(&mut decode));
            assert!(found <= allowed(threads), "{threads} threads, {kv:?}: {found} allocations");
        }
        let options = SessionOptions { threads: Some(threads), ..SessionOptions::default() };
        let mut batch = BatchSession::new(&model, &options, 3).unwrap();
        batch.prefill(1, &prompt).unwrap();
        let mut decode = |i: usize| {
            let token = prompt[i % 40];
            batch.decode(&[(0, token), (1, token), (2, token)]).unwrap();
        };
        (0..2).for_each(&mut decode);
        let found = least(|| (0..TOKENS).for_each(&mut decode));
        // A batch makes no room for tokens that may never come: each sequence's
        // list doubles now and then.
        let found = found.saturating_sub(3 * TOKENS.ilog2() as usize);
        assert!(found <= allowed(threads), "{threads} threads, batch: {found} allocations");
    }
}
