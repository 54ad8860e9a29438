//! The forward pass: against the formulas, and against itself however a
//! sequence is divided, on every instruction set and any number of threads.
#![allow(clippy::unwrap_used)]

mod common;

use bitnet_core::names::Linear;
use bitnet_core::{Layout, ModelConfig, WeightQuantizer, ternary};
use bitnet_engine::{KvType, LinearRef, Model, Session, SessionOptions, TracePoint};
use bitnet_kernels::Kernels;
use common::{Random, RandomModel, Weight, bits, max_difference, reference, variants};

fn session(model: &Model, options: SessionOptions) -> Session {
    let threads = options.threads.or(Some(1));
    Session::new(model, &SessionOptions { threads, ..options }).unwrap()
}

fn score(session: &mut Session, tokens: &[u32]) -> Vec<Vec<f32>> {
    let mut all = Vec::new();
    session
        .score(tokens, |t, logits| {
            assert_eq!(t, all.len());
            all.push(logits.to_vec());
        })
        .unwrap();
    all
}

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
fn logits_follow_the_formulas() {
    // A flipped rounding moves logits by per cent; with these seeds none of the
    // activations lies close enough to a half for f32 and f64 to disagree.
    for (i, (name, config)) in variants().into_iter().enumerate() {
        let random = RandomModel::new(&config, 100 + i as u64);
        let (model, _dir) = random.open();
        let read = model.config();
        assert_eq!((read, read.head_dim()), (&config, config.head_dim()), "{name}");
        let tokens = Random(i as u64).tokens(21, &config);
        let want = reference::run(&random, &tokens, &[]);
        let found = score(&mut session(&model, SessionOptions::default()), &tokens);
        for (t, (found, want)) in found.iter().zip(&want).enumerate() {
            let difference = max_difference(found, &want.logits);
            assert!(difference < 1e-4, "{name}, token {t}: {difference}");
        }
    }
}

#[test]
fn every_linear_layer_equals_the_definition() {
    for (name, config) in variants() {
        let random = RandomModel::new(&config, 5);
        let (model, _dir) = random.open();
        let mut s = session(&model, SessionOptions::default());
        let tokens = Random(1).tokens(9, &config);
        let mut seen = Vec::new();
        let mut check = |point: TracePoint<'_>| {
            let TracePoint::Linear { layer, linear, input, output, tokens } = point else {
                return;
            };
            seen.push((layer, linear));
            let [rows, cols] = linear.shape(&config);
            assert_eq!((input.len(), output.len()), (tokens * cols, tokens * rows), "{name}");
            let at = Linear::ALL.iter().position(|l| *l == linear).unwrap();
            let Weight::Ternary { trits, scale } = &random.blocks[layer].linears[at] else {
                return;
            };
            for (x, y) in input.chunks(cols).zip(output.chunks(rows)) {
                let mut q = vec![0; cols];
                let act_scale = ternary::quantize_activations(x, &mut q);
                let want: Vec<f32> = ternary::ternary_sums(trits, &q)
                    .into_iter()
                    .map(|sum| ternary::dequantize(sum, act_scale, *scale))
                    .collect();
                assert_eq!(bits(y), bits(&want), "{name}, block {layer}, {linear:?}");
            }
        };
        let traced = s.trace(&tokens, &mut check).unwrap().to_vec();
        let order: Vec<_> = (0..config.num_hidden_layers)
            .flat_map(|layer| Linear::ALL.map(|l| (layer, l)))
            .collect();
        assert_eq!(seen, order, "{name}");
        s.reset();
        assert_eq!(bits(s.prefill(&tokens).unwrap()), bits(&traced), "{name}");
    }
}

#[test]
fn a_sequence_may_be_divided_anyhow() {
    for (name, config) in variants() {
        for kv in KvType::ALL {
            let (model, _dir) = RandomModel::new(&config, 7).open();
            let tokens = Random(2).tokens(37, &config);
            let options = |chunk| SessionOptions { kv, chunk, ..SessionOptions::default() };
            let want = score(&mut session(&model, options(256)), &tokens);
            let mut one = session(&model, options(256));
            for (t, &token) in tokens.iter().enumerate() {
                let found = one.decode(token).unwrap();
                assert_eq!(bits(found), bits(&want[t]), "{name}, {kv:?}, decode {t}");
            }
            assert_eq!(one.tokens(), tokens);
            for chunk in [1, 3, 16, 17, 36] {
                let mut s = session(&model, options(chunk));
                assert_eq!(bits(s.prefill(&tokens).unwrap()), bits(&want[36]), "{name}, {chunk}");
                s.reset();
                assert_eq!(score(&mut s, &tokens), want, "{name}, {chunk}");
                assert_eq!(bits(s.logits()), bits(&want[36]));
            }
            // Go back, and on again another way.
            let mut s = session(&model, options(5));
            s.prefill(&tokens).unwrap();
            s.prefill(&[1, 2, 3]).unwrap();
            assert_eq!(s.prompt(&tokens[..30]).unwrap(), 1, "only the last is run again");
            assert_eq!(bits(s.logits()), bits(&want[29]), "{name}");
            s.prefill(&tokens[30..]).unwrap();
            assert_eq!(bits(s.logits()), bits(&want[36]), "{name}");
        }
    }
}

#[test]
fn every_instruction_set_gives_the_same_bits() {
    let kinds = variants().into_iter().chain([("large", large()), ("large", large())]);
    for (i, (name, config)) in kinds.enumerate() {
        let (model, _dir) = RandomModel::new(&config, 9).open();
        let tokens = Random(3).tokens(40, &config);
        let kv = KvType::ALL[i % 3];
        let run = |kernels| {
            let kernels = Some(kernels);
            let mut s = session(&model, SessionOptions { kernels, kv, ..Default::default() });
            let mut all = score(&mut s, &tokens);
            all.push(s.decode(tokens[0]).unwrap().to_vec());
            all.iter().map(|x| bits(x)).collect::<Vec<_>>()
        };
        let want = run(Kernels::by_name("portable").unwrap());
        for kernels in Kernels::all() {
            assert!(run(kernels) == want, "{name}: {} differs from portable", kernels.name());
        }
    }
}

#[test]
fn a_layout_that_is_read_badly_is_repacked_once() {
    let untied = ModelConfig { tie_word_embeddings: false, ..large() };
    let odd = variants().remove(4).1;
    for (threads, config) in [(3, untied), (1, odd)] {
        let random = RandomModel::new(&config, 19);
        let (p2, _dir) = random.open();
        let (p5, _dir) = random.open_in(Layout::P5);
        let tokens = Random(7).tokens(30, &config);
        let run = |model: &Model, kernels| {
            let (kernels, threads) = (Some(kernels), Some(threads));
            let mut s = session(model, SessionOptions { kernels, threads, ..Default::default() });
            bits(s.prefill(&tokens).unwrap())
        };
        let want = run(&p2, Kernels::by_name("portable").unwrap());
        assert_eq!(p2.repacked(), None);
        let mut copy = None;
        // The fastest first: one that reads the file in place makes no copy.
        for kernels in Kernels::all() {
            assert!(run(&p5, kernels) == want, "{}", kernels.name());
            let in_place = kernels.reads_well(Layout::P5);
            let of = |linear| match p5.linear_for(kernels, 0, linear) {
                LinearRef::Ternary(w) => w,
                LinearRef::Dense { .. } => panic!(),
            };
            let q = of(Linear::Q);
            assert_eq!(q.layout, if in_place { Layout::P5 } else { Layout::P2 });
            if !in_place {
                assert_eq!(q.bytes.as_ptr().align_offset(64), 0);
                let LinearRef::Ternary(w) = p2.linear(0, Linear::Down) else { panic!() };
                assert_eq!(of(Linear::Down).bytes, w.bytes);
                copy = copy.or(p5.repacked());
            }
            assert_eq!(p5.repacked(), copy, "made once, for {}", kernels.name());
        }
        let copy = copy.unwrap();
        let bytes = p2.parts().ternary - 4 * 7 * config.num_hidden_layers as u64;
        assert_eq!(p5.linear_bytes(Kernels::by_name("portable").unwrap()), copy.bytes);
        assert_eq!((copy.from, copy.to, copy.bytes), (Layout::P5, Layout::P2, bytes + 64));
    }
}

#[test]
fn the_number_of_threads_changes_nothing() {
    let twin = ModelConfig { weight_quantizer: WeightQuantizer::None, ..large() };
    let untied = ModelConfig { tie_word_embeddings: false, sub_norms: false, ..large() };
    for (config, kv) in [large(), twin, untied].into_iter().zip(KvType::ALL) {
        let (model, _dir) = RandomModel::new(&config, 11).open();
        assert!(model.bytes_per_token() > 1 << 20, "one token must enter the pool");
        let tokens = Random(4).tokens(50, &config);
        let run = |threads| {
            let threads = Some(threads);
            let mut s =
                session(&model, SessionOptions { threads, kv, chunk: 24, ..Default::default() });
            assert_eq!(Some(s.workers().threads()), threads);
            let mut all = score(&mut s, &tokens);
            for &token in &tokens[..5] {
                all.push(s.decode(token).unwrap().to_vec());
            }
            all.iter().map(|x| bits(x)).collect::<Vec<_>>()
        };
        let want = run(1);
        for threads in [2, 3, 5, 8] {
            assert!(run(threads) == want, "{threads} threads");
        }
    }
}

#[test]
fn a_narrow_cache_is_close() {
    let config = ModelConfig { weight_quantizer: WeightQuantizer::None, ..ModelConfig::tiny() };
    let (model, _dir) = RandomModel::new(&config, 13).open();
    let tokens = Random(5).tokens(60, &config);
    let run = |kv| {
        let mut s = session(&model, SessionOptions { kv, ..Default::default() });
        assert_eq!(s.kv(), kv);
        s.prefill(&tokens).unwrap().to_vec()
    };
    let (full, half) = (run(KvType::F32), run(KvType::F16));
    let difference = max_difference(&full, &half);
    // Eleven bits of keys and values against logits of about 5.
    assert!(difference > 0.0 && difference < 0.02, "{difference}");
    // Eight bits: eight times the error, and a scale of each vector's own.
    let difference = max_difference(&full, &run(KvType::Int8));
    assert!(difference > 0.0 && difference < 0.16, "{difference}");
    let bytes = |kv: KvType| kv.bytes(&config, 100);
    assert_eq!(bytes(KvType::F32), 2 * bytes(KvType::F16));
    assert_eq!(bytes(KvType::F16), 2 * 2 * 2 * (112 + 100) * 16);
    assert_eq!(bytes(KvType::Int8), 2 * 2 * (112 + 100) * (16 + 4));
}

#[test]
fn what_does_not_fit_is_refused_and_changes_nothing() {
    let config = ModelConfig::tiny();
    let (model, _dir) = RandomModel::new(&config, 15).open();
    let context = Some(10);
    let mut s = session(&model, SessionOptions { context, ..Default::default() });
    assert_eq!(s.context(), 10);
    let want = s.prefill(&[1, 2, 3]).unwrap().to_vec();
    for (tokens, message, code) in [
        (vec![4; 8], "8 tokens do not fit: 3 of the session's 10 positions are in use", 2),
        (vec![4, 320], "token 320 at position 4 is outside the vocabulary of 320", 3),
        (vec![], "the prompt is empty", 2),
    ] {
        let e = s.prefill(&tokens).unwrap_err();
        assert!(e.to_string().contains(message), "{e}");
        assert_eq!(e.exit().code(), code);
        assert!(s.score(&tokens, |_, _| panic!("nothing may run")).is_err());
    }
    assert_eq!((s.position(), bits(s.logits())), (3, bits(&want)));
    s.prefill(&[4; 7]).unwrap();
    assert!(s.decode(1).is_err());
    s.truncate(3);
    s.truncate(9);
    assert_eq!(s.tokens(), [1, 2, 3]);

    let d = SessionOptions::default;
    for (options, message) in [
        (SessionOptions { context: Some(0), ..d() }, "context = 0: must be in 1..=128"),
        (SessionOptions { context: Some(129), ..d() }, "context = 129"),
        (SessionOptions { threads: Some(0), ..d() }, "threads = 0"),
        (SessionOptions { chunk: 0, ..d() }, "chunk = 0"),
    ] {
        let e = Session::new(&model, &options).unwrap_err();
        assert!(e.to_string().starts_with(message), "{e}");
        assert_eq!(e.exit().code(), 2);
    }
}
