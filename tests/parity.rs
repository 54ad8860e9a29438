//! What was trained is exactly what runs: the training forward pass and the packed
//! engine compare bit for bit on a trained model.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use bitnet_core::ModelConfig;
use bitnet_core::names::Linear;
use bitnet_data::{Dataset, Split};
use bitnet_engine::{LoadOptions, Model, Session, SessionOptions, TracePoint};
use bitnet_format::hf;
use bitnet_kernels::Kernels;
use bitnet_tests::{Trained, bin, json, make, ok, trained};
use bitnet_train::model::Transformer;
use burn::tensor::{Device, Int, Tensor, TensorData};

/// One linear layer's input and output in a pass over some tokens.
#[derive(Debug, Clone, PartialEq)]
struct Layer {
    layer: usize,
    linear: Linear,
    input: Vec<f32>,
    output: Vec<f32>,
}

/// The trained weights as burn modules.
fn transformer(model: &Trained, device: &Device) -> (ModelConfig, Transformer) {
    let checkpoint = hf::Checkpoint::open(&model.checkpoint).unwrap();
    let config = checkpoint.config().clone();
    let fresh = Transformer::new(&config, 0, device);
    let loaded = fresh.load_tensors(|name, _| checkpoint.read(name)).unwrap();
    (config, loaded)
}

fn engine(model: &Trained, kernels: Kernels, threads: usize) -> Session {
    let opened = Model::open(&model.model, &LoadOptions::default()).unwrap();
    let options = SessionOptions {
        kernels: Some(kernels),
        threads: Some(threads),
        ..SessionOptions::default()
    };
    Session::new(&opened, &options).unwrap()
}

/// The first tokens of the validation split.
fn validation_tokens(model: &Trained, count: usize) -> Vec<u32> {
    let data = Dataset::open(&model.data, Split::Validation).unwrap();
    let mut tokens = vec![0; count];
    data.read(0, &mut tokens).unwrap();
    tokens
}

fn as_tensor(tokens: &[u32], device: &Device) -> Tensor<2, Int> {
    let ids: Vec<i64> = tokens.iter().map(|&t| i64::from(t)).collect();
    Tensor::from_data(TensorData::new(ids, [1, tokens.len()]), device)
}

fn floats(tensor: Tensor<2>) -> Vec<f32> {
    tensor.into_data().try_into_vec::<f32>().unwrap()
}

/// Every linear layer of the training forward pass, and the logits `[T, V]`.
fn train_pass(model: &Transformer, tokens: Tensor<2, Int>) -> (Vec<Layer>, Vec<f32>) {
    let mut layers = Vec::new();
    let logits = model.forward_traced(tokens, &mut |layer, linear, x, y| {
        layers.push(Layer { layer, linear, input: floats(x), output: floats(y) });
    });
    (layers, floats(logits))
}

/// The same of the engine.
fn engine_pass(session: &mut Session, tokens: &[u32]) -> (Vec<Layer>, Vec<f32>) {
    let mut layers = Vec::new();
    session
        .trace(tokens, &mut |point| {
            if let TracePoint::Linear { layer, linear, input, output, .. } = point {
                let (input, output) = (input.to_vec(), output.to_vec());
                layers.push(Layer { layer, linear, input, output });
            }
        })
        .unwrap();
    session.reset();
    let mut logits = Vec::new();
    session.score(tokens, |_, row| logits.extend_from_slice(row)).unwrap();
    session.reset();
    (layers, logits)
}

fn assert_same_bits(what: &str, train: &[f32], engine: &[f32]) {
    assert_eq!(train.len(), engine.len(), "{what}");
    for (at, (a, b)) in train.iter().zip(engine).enumerate() {
        assert_eq!(a.to_bits(), b.to_bits(), "{what}, element {at}: {a} trained, {b} run");
    }
}

/// Compares a model's training forward with the engine's, on every instruction
/// set of the machine.
fn check(model: &Trained) {
    let tokens = validation_tokens(model, 100);
    for device in [Device::flex(), Device::flex().autodiff()] {
        let (config, train) = transformer(model, &device);
        let (layers, logits) = train_pass(&train, as_tensor(&tokens, &device));
        assert_eq!(layers.len(), 7 * config.num_hidden_layers);
        // Training itself runs each half of a block as one operation.
        let fused = train.forward(as_tensor(&tokens, &device));
        assert_same_bits("fused logits", &floats(fused.flatten(0, 1)), &logits);
        for kernels in Kernels::all() {
            let mut session = engine(model, kernels, 2);
            let (run_layers, run_logits) = engine_pass(&mut session, &tokens);
            for (trained, run) in layers.iter().zip(&run_layers) {
                let what = format!("{} block {} {:?}", kernels.name(), run.layer, run.linear);
                assert_eq!((trained.layer, trained.linear), (run.layer, run.linear));
                assert_same_bits(&format!("{what} input"), &trained.input, &run.input);
                assert_same_bits(&format!("{what} output"), &trained.output, &run.output);
            }
            if device.is_autodiff() {
                // With a gradient to follow, the head is burn's own matrix product.
                let worst = logits.iter().zip(&run_logits).map(|(a, b)| (a - b).abs());
                let worst = worst.fold(0.0f32, f32::max);
                assert!(worst <= 1e-4, "logits differ by {worst}");
            } else {
                assert_same_bits("logits", &logits, &run_logits);
            }
        }
    }
}

#[test]
fn every_linear_layer_has_the_same_bits() {
    check(trained());
}

#[test]
fn also_with_swiglu_an_untied_f32_head_and_no_sub_norms() {
    check(&make(&[
        "model.hidden_act=\"silu\"",
        "model.tie_word_embeddings=false",
        "model.embedding_dtype=\"f32\"",
        "model.sub_norms=false",
        "model.num_key_value_heads=4",
    ]));
}

#[test]
fn also_with_the_other_quantisers_that_can_be_packed() {
    check(&make(&["model.weight_quantizer=\"binary\""]));
    check(&make(&["model.recipe.weight_scale=\"absmedian\"", "quantization.float_until=0.5"]));
}

#[test]
fn greedy_text_of_256_tokens_is_identical() {
    let model = trained();
    let device = Device::flex();
    let (_, train) = transformer(model, &device);
    let mut tokens = validation_tokens(model, 16);
    let prompt = tokens.len();
    let argmax = |row: &[f32]| {
        let best = row.iter().enumerate().max_by(|(i, a), (j, b)| a.total_cmp(b).then(j.cmp(i)));
        best.unwrap().0 as u32
    };
    let mut session = engine(model, Kernels::detect(), 2);
    let mut next = argmax(session.prefill(&tokens).unwrap());
    for _ in 0..256 {
        tokens.push(next);
        next = argmax(session.decode(next).unwrap());
    }
    // Attention is causal: one pass over the whole text gives what training would
    // have chosen at each position.
    let logits = floats({
        let all = train.forward(as_tensor(&tokens, &device));
        let [_, time, vocab] = all.dims();
        all.reshape([time, vocab])
    });
    let vocab = logits.len() / tokens.len();
    for at in prompt..tokens.len() {
        let chosen = argmax(&logits[(at - 1) * vocab..at * vocab]);
        assert_eq!(chosen, tokens[at], "token {} of the greedy text", at - prompt);
    }
}

#[test]
fn the_validation_loss_is_that_of_training() {
    let model = trained();
    let out = tempfile::tempdir().unwrap();
    let path = out.path().join("perplexity.json");
    let tokens = (16 * 64).to_string();
    let _ = ok(bin("bitnet-eval")
        .arg("perplexity")
        .arg(&model.model)
        .arg("--data")
        .arg(&model.data)
        .args(["--context", "64", "--max-tokens", &tokens, "--json"])
        .arg(&path));
    let packed = json(&path)["nats"].as_f64().unwrap();
    let trained = model.summary["val_loss"].as_f64().unwrap();
    assert!((packed - trained).abs() < 1e-4, "{trained} in training, {packed} packed");
    assert!(trained < 512f64.ln() - 0.5, "the model learned: {trained}");
}
