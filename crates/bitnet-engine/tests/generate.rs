//! Generated text: deterministic, stopped where it should be, never cut inside
//! a character.
#![allow(clippy::unwrap_used)]

mod common;

use bitnet_core::{ModelConfig, WeightQuantizer};
use bitnet_engine::{
    FinishReason, GenerateOptions, Generator, Model, Sampler, SamplerOptions, Session,
    SessionOptions, Tokenizer,
};
use common::{Dense, EOS, RandomModel, Weight};

/// A model that says one byte after another: its head answers the token with
/// the next one of `cycle`. All blocks are zero, so the residual stream is the
/// embedding: one direction for each token.
fn talker(cycle: &[u32]) -> RandomModel {
    let config = ModelConfig {
        hidden_size: 320,
        num_attention_heads: 4,
        num_hidden_layers: 1,
        tie_word_embeddings: false,
        weight_quantizer: WeightQuantizer::None,
        ..ModelConfig::tiny()
    };
    let mut m = RandomModel::new(&config, 1);
    let unit = |rows: &dyn Fn(usize) -> Option<usize>, like: &Dense| {
        let mut values = vec![0.0; 320 * 320];
        for row in 0..320 {
            if let Some(col) = rows(row) {
                values[row * 320 + col] = 1.0;
            }
        }
        Dense { values, dtype: like.dtype }
    };
    m.embedding = unit(&|row| Some(row), &m.embedding);
    let before = |row: usize| {
        let i = cycle.iter().position(|&t| t as usize == row)?;
        Some(cycle[(i + cycle.len() - 1) % cycle.len()] as usize)
    };
    let head = m.head.take().unwrap();
    m.head = Some(unit(&before, &head));
    for linear in &mut m.blocks[0].linears {
        if let Weight::Dense(w) = linear {
            w.values.fill(0.0);
        }
    }
    m
}

fn run(
    model: &Model,
    tokenizer: &Tokenizer,
    prompt: &[u32],
    options: &GenerateOptions,
) -> (Vec<String>, Vec<u32>, FinishReason) {
    let session_options = SessionOptions { threads: Some(1), ..Default::default() };
    let mut session = Session::new(model, &session_options).unwrap();
    let sampler = Sampler::new(SamplerOptions::default()).unwrap();
    let mut g = Generator::new(&mut session, tokenizer, sampler, prompt, options).unwrap();
    let pieces: Vec<String> = g.by_ref().map(Result::unwrap).collect();
    let (tokens, reason) = (g.tokens().to_vec(), g.finish_reason().unwrap());
    assert_eq!(g.stats().prefill_tokens, prompt.len());
    assert!(g.next().is_none());
    (pieces, tokens, reason)
}

fn options(max_tokens: usize, stop: &[&str]) -> GenerateOptions {
    let stop = stop.iter().map(|s| (*s).to_owned()).collect();
    GenerateOptions { max_tokens, stop, ..GenerateOptions::default() }
}

#[test]
fn text_ends_for_every_reason() {
    // "a€b" and the end of the text, over and over: five bytes.
    let cycle: Vec<u32> = "a€b".bytes().map(u32::from).chain([EOS]).collect();
    let (model, _dir) = talker(&cycle).open();
    let tokenizer = model.tokenizer().unwrap();
    let a = tokenizer.encode("a").unwrap();
    let run = |o: &GenerateOptions| run(&model, &tokenizer, &a, o);

    let (pieces, tokens, reason) = run(&options(100, &[]));
    assert_eq!((pieces, reason), (vec!["€".to_owned(), "b".to_owned()], FinishReason::Eos));
    assert_eq!(tokens, cycle[1..5]);

    // The second byte of three: nothing whole yet, so its end is a replacement.
    let (pieces, tokens, reason) = run(&options(2, &[]));
    assert_eq!((pieces, tokens.len()), (vec!["\u{fffd}".to_owned()], 2));
    assert_eq!(reason, FinishReason::Length);
    assert_eq!(run(&options(0, &[])).0, Vec::<String>::new());

    let on = GenerateOptions { ignore_eos: true, ..options(15, &[]) };
    let (pieces, _, reason) = run(&on);
    assert_eq!((pieces.concat().as_str(), reason), ("€ba€ba€", FinishReason::Length));

    // A stop string over three tokens, and one that never comes.
    let on = GenerateOptions { ignore_eos: true, ..options(100, &["ba€", "bab"]) };
    let (pieces, tokens, reason) = run(&on);
    assert_eq!((pieces.concat().as_str(), reason), ("€", FinishReason::Stop));
    assert_eq!(tokens.len(), 9);
    let (pieces, _, reason) = run(&options(100, &["bx"]));
    assert_eq!((pieces.concat().as_str(), reason), ("€b", FinishReason::Eos));

    let on = GenerateOptions { ignore_eos: true, ..options(1000, &[]) };
    let (_, tokens, reason) = run(&on);
    // The 128 positions hold the prompt and all tokens but the last.
    assert_eq!((tokens.len(), reason), (128, FinishReason::Context));
}

#[test]
fn a_session_goes_on_from_what_it_holds() {
    let (model, _dir) = RandomModel::new(&ModelConfig::tiny(), 21).open();
    let tokenizer = model.tokenizer().unwrap();
    let session_options = SessionOptions { threads: Some(1), ..Default::default() };
    let generate = |session: &mut Session, prompt: &[u32], seed| {
        let sampler = Sampler::new(SamplerOptions {
            temperature: 0.8,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.01,
            repetition_penalty: 1.1,
            seed,
            ..SamplerOptions::default()
        })
        .unwrap();
        let o = GenerateOptions { ignore_eos: true, ..options(20, &[]) };
        let mut g = Generator::new(session, &tokenizer, sampler, prompt, &o).unwrap();
        g.by_ref().for_each(|piece| drop(piece.unwrap()));
        (g.tokens().to_vec(), g.stats())
    };
    let mut session = Session::new(&model, &session_options).unwrap();
    let prompt = tokenizer.encode("Hello").unwrap();
    let (first, stats) = generate(&mut session, &prompt, 1);
    assert_eq!((first.len(), stats.prefill_tokens, stats.decode_tokens), (20, 5, 19));
    assert!(stats.decode_tokens_per_second() > 0.0 && stats.prefill_tokens_per_second() > 0.0);

    // The next turn runs the last token and what is new, and says the same as a
    // session that runs everything.
    let turn: Vec<u32> = prompt.iter().chain(&first).copied().chain([1, 2]).collect();
    let (again, stats) = generate(&mut session, &turn, 2);
    assert_eq!(stats.prefill_tokens, 3);
    let mut fresh = Session::new(&model, &session_options).unwrap();
    assert_eq!(generate(&mut fresh, &turn, 2).0, again);
    fresh.reset();
    assert_ne!(generate(&mut fresh, &turn, 3).0, again);
}

#[test]
fn an_error_ends_the_text() {
    let mut m = talker(&[1, 2, 3]);
    // Infinite in f16: the third token's logit.
    m.head.as_mut().unwrap().values[3 * 320 + 2] = f32::INFINITY;
    let dir = tempfile::tempdir().unwrap();
    let model = Model::open(&m.file().write(&dir), &Default::default()).unwrap();
    let tokenizer = model.tokenizer().unwrap();
    let session_options = SessionOptions { threads: Some(1), ..Default::default() };
    let mut session = Session::new(&model, &session_options).unwrap();
    let sampler = Sampler::new(SamplerOptions::default()).unwrap();
    let mut g = Generator::new(&mut session, &tokenizer, sampler, &[2], &options(9, &[])).unwrap();
    let error = g.next().unwrap().unwrap_err();
    assert!(error.to_string().contains("the logit of token 3 is inf"), "{error}");
    assert!(g.next().is_none());
}
