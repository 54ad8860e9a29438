//! Streams of several corpora, and of one shared by several ranks.
#![allow(clippy::unwrap_used)]

use std::path::Path;
use std::sync::Arc;

use bitnet_data::{
    Batch, BatchStream, DataError, Dataset, FileOptions, MixtureSource, MixtureStream,
    PrepareOptions, Source, Split, StreamState, TokenStream, Tokenizer, prepare,
};

/// A corpus of some 150 · `size` tokens, all documents beginning with its letter.
fn corpus(dir: &Path, letter: char, size: usize) -> Arc<Dataset> {
    let tokenizer = dir.join("tokenizer.json");
    if !tokenizer.exists() {
        let trained = Tokenizer::train(&["some words".into()], 260).unwrap();
        std::fs::write(&tokenizer, trained.to_json()).unwrap();
    }
    let input = dir.join(format!("{letter}.txt"));
    let text: String = (0..10 * size).map(|i| format!("{letter}{i:05}{letter}\n\n")).collect();
    std::fs::write(&input, text).unwrap();
    let source = Source::Files(FileOptions {
        paths: vec![input],
        split: bitnet_data::TextSplit::BlankLine,
        ..FileOptions::default()
    });
    let mut o = PrepareOptions::new(source, dir.join(letter.to_string()));
    o.tokenizer = Some(tokenizer);
    o.validation_share = 0.0;
    prepare(&o, &mut ()).unwrap();
    Arc::new(Dataset::open(&o.output, Split::Train).unwrap())
}

fn source(name: &str, dataset: &Arc<Dataset>, weights: &[(u64, f64)]) -> MixtureSource {
    MixtureSource { name: name.into(), dataset: Arc::clone(dataset), weights: weights.to_vec() }
}

/// The letter of each row of a batch; none is in the end token's name.
fn letters(batch: &Batch, tokenizer: &Tokenizer) -> Vec<char> {
    let rows = batch.inputs.chunks(batch.context);
    rows.map(|row| tokenizer.decode(row).chars().find(|c| ('a'..='c').contains(c)).unwrap())
        .collect()
}

const CONTEXT: usize = 16;

#[test]
fn shares_are_exact_at_every_moment_and_change_at_a_step() {
    let dir = tempfile::tempdir().unwrap();
    let [a, b, c] = [('a', 8), ('b', 2), ('c', 5)].map(|(l, s)| corpus(dir.path(), l, s));
    let tokenizer = a.tokenizer().unwrap();
    let sources = [
        source("web", &a, &[(0, 7.0), (50, 1.0)]),
        source("code", &b, &[(0, 2.0), (50, 0.0)]),
        source("books", &c, &[(0, 1.0), (50, 3.0)]),
    ];
    let mut stream = MixtureStream::new(sources.to_vec(), CONTEXT, 3).unwrap();
    for (steps, weights) in [(0..50u64, [0.7, 0.2, 0.1]), (50..120, [0.25, 0.0, 0.75])] {
        let (mut counts, mut total) = ([0u32; 3], 0u32);
        for step in steps {
            let batch = stream.next_batch(step, 7).unwrap();
            assert_eq!((batch.batch, batch.inputs.len()), (7, 7 * CONTEXT));
            for letter in letters(&batch, &tokenizer) {
                counts[letter as usize - 'a' as usize] += 1;
                total += 1;
                for (count, weight) in counts.iter().zip(weights) {
                    let ahead = f64::from(*count) - weight * f64::from(total);
                    assert!(ahead < 1.0 + 1e-6 && ahead > -2.0 - 1e-6, "{counts:?} of {total}");
                }
            }
        }
        assert!(total >= 350);
    }
    // Each source goes through its own windows, every one once an epoch.
    let state = stream.state();
    let given: u64 = state.sources.iter().map(|s| s.given).sum();
    assert_eq!(given, 7 * 120);
    for s in &state.sources {
        assert_eq!(s.given, s.batches.epoch * s.batches.windows + s.batches.position);
    }
    assert!(state.sources[1].batches.epoch > 1);
}

#[test]
fn a_mixture_goes_on_exactly_and_later_weights_may_change() {
    let dir = tempfile::tempdir().unwrap();
    let [a, b] = [('a', 5), ('b', 3)].map(|(l, s)| corpus(dir.path(), l, s));
    let sources =
        |later: f64| vec![source("x", &a, &[(0, 0.6), (20, later)]), source("y", &b, &[(0, 0.4)])];
    let mut whole = MixtureStream::new(sources(0.1), CONTEXT, 5).unwrap();
    let mut state = whole.state();
    for step in 0..40 {
        let mut resumed = MixtureStream::from_state(sources(0.1), CONTEXT, &state).unwrap();
        assert_eq!(resumed.next_batch(step, 5).unwrap(), whole.next_batch(step, 5).unwrap());
        let json = serde_json::to_string(&TokenStream::from(resumed).state()).unwrap();
        let StreamState::Mixture(read) = serde_json::from_str(&json).unwrap() else {
            panic!("{json}")
        };
        state = read;
        assert_eq!(state, whole.state());
    }
    // Another weight from step 20 on changes nothing before.
    let mut first = MixtureStream::new(sources(0.1), CONTEXT, 5).unwrap();
    for step in 0..10 {
        first.next_batch(step, 5).unwrap();
    }
    let mut other = MixtureStream::from_state(sources(0.9), CONTEXT, &first.state()).unwrap();
    for step in 10..20 {
        assert_eq!(other.next_batch(step, 5).unwrap(), first.next_batch(step, 5).unwrap());
    }
    assert_ne!(other.next_batch(20, 50).unwrap(), first.next_batch(20, 50).unwrap());
    // Another seed is another order.
    let mut seeded = MixtureStream::new(sources(0.1), CONTEXT, 6).unwrap();
    let mut again = MixtureStream::new(sources(0.1), CONTEXT, 5).unwrap();
    assert_ne!(seeded.next_batch(0, 9).unwrap(), again.next_batch(0, 9).unwrap());

    // A source more begins at its first window; one less, or other data, is refused.
    let c = corpus(dir.path(), 'c', 3);
    let mut more = sources(0.1);
    more.push(source("z", &c, &[(0, 1.0)]));
    let mut grown = MixtureStream::from_state(more, CONTEXT, &state).unwrap();
    grown.next_batch(40, 10).unwrap();
    // Its share is 10 · 1.0 / (0.1 + 0.4 + 1.0) = 6.7.
    assert_eq!(grown.state().sources[2].given, 7);
    let less = vec![source("x", &a, &[(0, 1.0)])];
    let e = MixtureStream::from_state(less, CONTEXT, &state).unwrap_err().to_string();
    assert!(e.contains("the checkpoint has read `y`, which is missing"), "{e}");
    let swapped = vec![source("x", &a, &[(0, 1.0)]), source("y", &c, &[(0, 1.0)])];
    let e = MixtureStream::from_state(swapped, CONTEXT, &state).unwrap_err().to_string();
    assert!(e.contains("source `y`: the checkpoint has read the corpus"), "{e}");
}

#[test]
fn ranks_share_the_order_of_one_process() {
    let dir = tempfile::tempdir().unwrap();
    let [a, b] = [('a', 5), ('b', 3)].map(|(l, s)| corpus(dir.path(), l, s));
    let mixture = || {
        let sources = vec![source("x", &a, &[(0, 0.6), (3, 0.2)]), source("y", &b, &[(0, 0.4)])];
        TokenStream::from(MixtureStream::new(sources, CONTEXT, 5).unwrap())
    };
    let single = || TokenStream::from(BatchStream::new(Arc::clone(&a), CONTEXT, 5).unwrap());
    for make in [&mixture as &dyn Fn() -> TokenStream, &single] {
        for ranks in [1, 2, 3] {
            let mut one = make();
            let mut all: Vec<TokenStream> = (0..ranks).map(|_| make()).collect();
            // 60 windows a step pass the end of an epoch several times.
            for step in 0..6 {
                let whole = one.next_batch(step, 60).unwrap();
                let mut inputs = Vec::new();
                for (rank, stream) in all.iter_mut().enumerate() {
                    let share = stream.next_share(step, 60 / ranks, rank, ranks).unwrap();
                    inputs.extend(share.inputs);
                    assert_eq!(stream.state(), one.state());
                }
                assert_eq!(inputs, whole.inputs);
            }
        }
    }
    let e = single().next_share(0, 1, 2, 2).unwrap_err();
    assert!(matches!(e, DataError::Option { .. }), "{e}");
    // A long skip is as many short ones.
    let (mut long, mut short) = (single(), single());
    long.skip(0, 12_345);
    (0..12_345).for_each(|_| short.skip(0, 1));
    assert_eq!(long.state(), short.state());
    assert_eq!(long.next_batch(0, 3).unwrap(), short.next_batch(0, 3).unwrap());
    // The state of one corpus reads what was written before there were mixtures.
    let old = r#"{"epoch": 1, "position": 2, "seed": 3, "windows": 4}"#;
    assert!(matches!(serde_json::from_str(old).unwrap(), StreamState::Single(s) if s.windows == 4));
}

#[test]
fn weights_that_cannot_be_used_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let a = corpus(dir.path(), 'a', 3);
    for (sources, expected) in [
        (vec![], "no source is named"),
        (vec![source("x", &a, &[])], "source `x`: no weight at step 0"),
        (vec![source("x", &a, &[(5, 1.0)])], "source `x`: no weight at step 0"),
        (vec![source("x", &a, &[(0, 1.0), (0, 2.0)])], "do not ascend"),
        (vec![source("x", &a, &[(0, -1.0)])], "source `x`: weight -1 at step 0"),
        (vec![source("x", &a, &[(0, f64::NAN)])], "weight NaN at step 0"),
        (vec![source("x", &a, &[(0, 1.0), (9, 0.0)])], "from step 9 on the weights add up to 0"),
        (
            vec![source("x", &a, &[(0, 1.0)]), source("x", &a, &[(0, 1.0)])],
            "two sources are called `x`",
        ),
    ] {
        let e = MixtureStream::new(sources, CONTEXT, 0).unwrap_err().to_string();
        assert!(e.starts_with("mixture: ") && e.contains(expected), "{e}");
    }
    let other = tempfile::tempdir().unwrap();
    let trained = Tokenizer::train(&["other words".into()], 262).unwrap();
    std::fs::write(other.path().join("tokenizer.json"), trained.to_json()).unwrap();
    let b = corpus(other.path(), 'b', 3);
    let sources = vec![source("x", &a, &[(0, 1.0)]), source("y", &b, &[(0, 1.0)])];
    let e = MixtureStream::new(sources, CONTEXT, 0).unwrap_err().to_string();
    assert!(e.contains("has the tokenizer"), "{e}");
}
