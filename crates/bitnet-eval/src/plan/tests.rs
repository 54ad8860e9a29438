use bitnet_core::{Layout, WeightQuantizer};

use super::*;

/// A machine with round numbers.
fn machine(threads: usize) -> Rates {
    let product = ProductRate { cached_gb_per_second: 100.0, panel_gmac_per_second: 500.0 };
    Rates {
        isa: "x",
        threads,
        read: vec![ReadRate { bytes: 0, gb_per_second: 20.0 }],
        int8_gop_per_second: 1600.0,
        linear: product,
        head: product,
        attention_gmac_per_second: 50.0,
        attention_panel_gmac_per_second: 80.0,
        norm_ns: 0.5,
        gate_ns: 1.0,
        norm_panel_ns: 0.25,
        gate_panel_ns: 0.5,
        float_peak_gflop_per_second: 200.0,
        input_gradient_gflop_per_second: 120.0,
        weight_gradient_gflop_per_second: 100.0,
        fixed_weight_gradient_gflop_per_second: 150.0,
    }
}

/// The shape of configs/2b4t.toml.
fn two_b() -> ModelConfig {
    ModelConfig {
        hidden_size: 2560,
        intermediate_size: 6912,
        num_hidden_layers: 30,
        num_attention_heads: 20,
        num_key_value_heads: 5,
        vocab_size: 128_256,
        max_position_embeddings: 4096,
        ..ModelConfig::tiny()
    }
}

fn options() -> PlanOptions {
    PlanOptions {
        form: None,
        kv: KvType::F32,
        context: None,
        sequences: 1,
        prompt: 512,
        generate: 32,
        train_tokens: None,
        flops: None,
        bandwidth: None,
        int8_peak: None,
        target_decode: None,
    }
}

fn subject(config: ModelConfig) -> Subject {
    Subject { name: "x".into(), config, file: None, training: None }
}

fn planned(subject: &Subject, options: &PlanOptions) -> Plan {
    let form = check(subject, options).unwrap();
    with_rates(subject, form, Kernels::detect(), machine(2), options)
}

/// The bytes of experiments/0003-sizes' file of 2B4T in layout p5, which are known.
#[test]
fn a_file_has_the_bytes_of_its_parts() {
    let files = FileBytes::of(&two_b(), Form::Ternary(Layout::P5));
    // q, o: 2560 rows of 8 blocks; k, v: 640; gate, up: 6912; down: 2560 rows of 22.
    let blocks = 2 * 2560 * 8 + 2 * 640 * 8 + 2 * 6912 * 8 + 2560 * 22;
    assert_eq!(files.linear, 30 * (blocks * 64 + 7 * 64));
    assert_eq!((files.embedding, files.head), (128_256 * 2560 * 2, 0));
    let error = files.total() as f64 / 1_080_092_224.0 - 1.0;
    assert!(error.abs() < 0.01, "{error}");
}

#[test]
fn a_token_reads_its_weights_and_computes_with_some_arithmetic_hidden() {
    let config = two_b();
    let linear = Form::Ternary(Layout::P2);
    let shape = Shape { config: &config, linear, kv_bytes: 4.0 };
    let time = shape.decode(&machine(1), 0.0);
    let block = 2560 * 640 * 2 + 640 * 640 * 2 + 6912 * 640 * 2 + 2560 * 1728;
    let bytes = f64::from(30 * block);
    let expected = bytes / 20e9 + 0.6 * bytes / 100e9;
    assert!((time.linear / expected - 1.0).abs() < 1e-12, "{time:?}");
    assert!((time.head / (656_670_720.0 * (1.0 / 20e9 + 0.25 / 100e9)) - 1.0).abs() < 1e-12);
    // 30 layers of 5 heads' keys and values, a microsecond each.
    assert!((time.attention / 300e-6 - 1.0).abs() < 1e-9 && time.threads == 0.0);
    // 4096 positions of 2 · 30 · 640 f32 are read, 2 · 30 · 2560 products each made.
    let full = shape.decode(&machine(1), 4096.0);
    let expected = 300e-6 + 4096.0 * (38_400.0 * 4.0 / 20e9 + 153_600.0 / 50e9);
    assert!((full.attention / expected - 1.0).abs() < 1e-12, "{full:?}");
    assert!(shape.decode(&machine(2), 0.0).threads > 0.0);
    let prefill = shape.prefill(&machine(2), 512);
    assert!(prefill.total() < time.total() / 4.0);
}

#[test]
fn slower_memory_and_slower_arithmetic_make_slower_tokens() {
    let config = two_b();
    let shape = Shape { config: &config, linear: Form::Ternary(Layout::P5), kv_bytes: 2.0 };
    let decode = |rates: &Rates| shape.decode(rates, 100.0).per_second();
    let prefill = |rates: &Rates| shape.prefill(rates, 512).per_second();
    let (base, slow) = (machine(2), machine(2).with_bandwidth(10.0));
    assert!(decode(&slow) < 0.65 * decode(&base));
    let weak = machine(2).with_int8_peak(800.0);
    assert!((prefill(&weak) / prefill(&base) - 0.5).abs() < 0.1);
}

#[test]
fn a_plan_answers_for_every_form() {
    let ternary = subject(two_b());
    let plan = planned(&ternary, &options());
    assert_eq!(plan.form.name(), "p5");
    assert_eq!(plan.files.iter().map(|f| f.form.name()).collect::<Vec<_>>(), ["p2", "p5"]);
    assert_eq!(plan.run.parts.kv_cache, KvType::F32.bytes(&two_b(), 4096));
    assert!(plan.run.bytes > plan.files[1].bytes && plan.training.is_none());
    let config = ModelConfig { weight_quantizer: WeightQuantizer::None, ..two_b() };
    let form = Form::from_name("int4");
    let twin = planned(&subject(config), &PlanOptions { form, ..options() });
    assert_eq!(twin.form.name(), "int4");
    assert_eq!(twin.files.len(), 4);
    let file = |name: &str| {
        let found = twin.files.iter().find(|f| f.form.name() == name);
        found.unwrap().parts.linear
    };
    assert_eq!((file("f32"), file("f16") * 32), (2 * file("f16"), file("int8") * 2 * 32 * 32 / 34));
    let four = PlanOptions { sequences: 4, context: Some(100), ..options() };
    let four = planned(&ternary, &four);
    assert_eq!(four.run.parts.kv_cache, 4 * KvType::F32.bytes(&two_b(), 100));
    let table = plan.table() + &twin.table();
    for line in table.lines() {
        assert!(line.chars().count() <= 100, "{line}");
    }
    for words in ["packed file", "p5*", "int4*", "memory of 1 sequence", "prefill 512", "behind"] {
        assert!(table.contains(words), "{words}: {table}");
    }
}

#[test]
fn training_is_planned_as_the_config_says() {
    let mut subject = subject(ModelConfig::tiny());
    let training = Training {
        batch_tokens: 512,
        sequence: 64,
        micro_batch: Some(2),
        recompute: false,
        muon: false,
        byte_moments: false,
        blends: false,
        digits: None,
        int8_backward: false,
        distills: false,
        tokens: 1_000_000,
    };
    subject.training = Some(training.clone());
    let small = PlanOptions { prompt: 64, ..options() };
    let t = planned(&subject, &small).training.unwrap();
    let count = ModelConfig::tiny().parameter_count();
    assert_eq!(t.checkpoint_weights_bytes, 4 * count.total());
    assert_eq!(t.checkpoint_optimizer_bytes, 8 * count.total());
    assert_eq!(t.memory.weights, 4 * count.total());
    // 6 for each weight of 43 008 · 2 and of the head, 6 · L · H·C · T for attention.
    let flop = 6.0 * (86_016.0 + 320.0 * 64.0) + 6.0 * 2.0 * 64.0 * 64.0;
    assert_eq!(t.flop_per_token, flop);
    let time = t.token_seconds.unwrap();
    assert!((t.seconds / (1e6 * time.total()) - 1.0).abs() < 1e-12 && !t.stated);
    assert!((t.flop_per_second * time.total() / flop - 1.0).abs() < 1e-12);
    let stated = PlanOptions { flops: Some(1e12), train_tokens: Some(10), ..small.clone() };
    let stated = planned(&subject, &stated).training.unwrap();
    assert!((stated.seconds / (10.0 * flop / 1e12) - 1.0).abs() < 1e-12 && stated.stated);
    // As many sequences as fit: all eight.
    subject.training = Some(Training { micro_batch: None, muon: true, distills: true, ..training });
    let auto = planned(&subject, &small);
    let t = auto.training.as_ref().unwrap();
    assert_eq!(t.micro_batch, 8);
    assert_eq!(t.checkpoint_optimizer_bytes, 8 * count.total() - 4 * count.linear);
    let table = auto.table();
    for words in [
        "training, 8 sequences at once",
        "weights' gradients",
        "assumed: on this CPU",
        "without the teacher",
    ] {
        assert!(table.contains(words), "{words}: {table}");
    }
    for line in table.lines() {
        assert!(line.chars().count() <= 100, "{line}");
    }
}

#[test]
fn a_training_token_takes_its_products() {
    let config = two_b();
    let training = Training {
        batch_tokens: 8192,
        sequence: 1024,
        micro_batch: Some(2),
        recompute: false,
        muon: false,
        byte_moments: false,
        blends: false,
        digits: None,
        int8_backward: false,
        distills: false,
        tokens: 1,
    };
    let time = |config: &ModelConfig, training: &Training| {
        let shape = Shape { config, linear: Form::Ternary(Layout::P2), kv_bytes: 4.0 };
        TrainingTime::of(&shape, training, 2, &machine(2))
    };
    let is = |found: f64, expected: f64| assert!((found / expected - 1.0).abs() < 1e-9, "{found}");
    // Whole blocks of 256: nothing is padded.
    let linear = config.parameter_count().linear as f64;
    let base = time(&config, &training);
    let gate_up = 30.0 * 2.0 * 2560.0 * 6912.0;
    let longer = 1.0 + 85.0 / 2560.0;
    is(base.forward, (linear + gate_up) / 500e9 * longer);
    is(base.input_gradients, 2.0 * linear / 120e9 * longer);
    is(base.weight_gradients, 2.0 * linear / 100e9 * longer);
    let head = 128_256.0 * 2560.0 * longer;
    is(base.head, 2.0 * head * (2.0 / 120e9 + 1.0 / 100e9) + 4.0 * 128_256.0 * 0.25e-9);
    let seen = 30.0 * 2560.0 * 1025.0;
    is(base.attention, seen / (80e9 * 0.45) + 2.5 * seen / (60e9 * 0.27));
    let all = config.parameter_count().total() as f64;
    let micro_step = (16.0 * linear + 12.0 * all) / 20e9 / 2048.0;
    is(base.step, micro_step + 32.0 * all / 20e9 / 8192.0);
    is(base.total(), base.parts().iter().map(|p| p.1).sum());

    let again = time(&config, &Training { recompute: true, ..training.clone() });
    is(again.forward, (2.0 * linear + gate_up) / 500e9 * longer);
    is(again.attention - base.attention, seen / (80e9 * 0.45));
    is(again.elementwise, base.elementwise * 1.25);
    let int8 = time(&config, &Training { int8_backward: true, ..training.clone() });
    is(int8.input_gradients, linear / 500e9 * longer);
    is(base.head - int8.head, head * (2.0 / 120e9 - 2.0 / 3.0 * 2.0 / 150e9));
    for digits in [2, 3] {
        let fixed = time(&config, &Training { digits: Some(digits), ..training.clone() });
        is(fixed.input_gradients, f64::from(digits) * linear / 500e9 * longer);
        is(fixed.weight_gradients, f64::from(digits) / 3.0 * 2.0 * linear / 150e9 * longer);
        is(fixed.head, base.head);
    }
    let bytes = time(&config, &Training { byte_moments: true, ..training.clone() });
    let norms = config.parameter_count().norms as f64;
    is(bytes.step, micro_step + (20.0 * all + 12.0 * norms) / 20e9 / 8192.0);
    let both = time(&config, &Training { muon: true, byte_moments: true, ..training.clone() });
    let spared = 12.0 * (all - norms - linear) / 20e9 / 8192.0;
    let muon = time(&config, &Training { muon: true, ..training.clone() });
    let square = |n: f64, k: f64| 5.0 * (2.0 * n * n * k + n * n * n);
    let of_layer =
        2.0 * square(2560.0, 2560.0) + 2.0 * square(640.0, 2560.0) + 3.0 * square(2560.0, 6912.0);
    is(muon.step - base.step, 30.0 * of_layer / 60e9 * longer / 8192.0);
    is(muon.step - both.step, spared);
    let twin = ModelConfig { weight_quantizer: WeightQuantizer::None, ..config.clone() };
    let float = time(&twin, &Training { int8_backward: true, digits: Some(3), ..training.clone() });
    is(float.forward, 2.0 * linear / 120e9 * longer);
    is(float.input_gradients, base.input_gradients);
    let one = Training { batch_tokens: 2048, ..training };
    is(time(&config, &one).step, 16.0 * linear / 20e9 / 2048.0 + 32.0 * all / 20e9 / 2048.0);
}

/// The machine of `experiments/0010-training-speed`: its peaks there, and the shares of
/// them that its kernels reach alone in these shapes (the best of runs by the clock of the
/// thread, beside other work). What was measured there must come out, within a fifth.
#[test]
fn recorded_training_speeds_are_predicted() {
    let rates = |[input, weight, int8, attention]: [f64; 4]| Rates {
        input_gradient_gflop_per_second: input * 355.0,
        weight_gradient_gflop_per_second: weight * 355.0,
        linear: ProductRate {
            cached_gb_per_second: 100.0,
            panel_gmac_per_second: int8 * 1425.0 / 2.0,
        },
        attention_panel_gmac_per_second: attention * 355.0 / 2.0,
        norm_panel_ns: 0.2,
        gate_panel_ns: 0.45,
        ..machine(2)
    };
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs");
    let config = |name: &str| load(folder.join(name).to_str().unwrap()).unwrap();
    for (name, sequence, shares, measured) in [
        ("bench.toml", 256, [0.79, 0.70, 0.65, 0.40], 4841.0),
        ("125m.toml", 512, [0.64, 0.64, 0.73, 0.38], 316.0),
    ] {
        let Subject { config, training, .. } = config(name);
        // Its gradients were floats.
        let training = Training { batch_tokens: 2048, sequence, digits: None, ..training.unwrap() };
        let shape = Shape { config: &config, linear: Form::Ternary(Layout::P2), kv_bytes: 4.0 };
        let time = TrainingTime::of(&shape, &training, 2048 / sequence, &rates(shares));
        let error = 1.0 / time.total() / measured - 1.0;
        assert!(error.abs() < 0.2, "{name}: {error}, {time:?}");
    }
}

#[test]
fn the_largest_model_keeps_the_target() {
    let options = PlanOptions { target_decode: Some(10.0), ..options() };
    let plan = planned(&subject(two_b()), &options);
    let largest = plan.largest.as_ref().unwrap();
    assert!(largest.tokens_per_second >= 10.0 && largest.parameters > 2_500_000_000);
    assert!(plan.table().contains("at 10.0 tokens/s or more"));
    let fast = PlanOptions { target_decode: Some(1e7), ..options };
    let table = planned(&subject(two_b()), &fast).table();
    assert!(table.contains("the smallest is too slow"), "{table}");
}

#[test]
fn numbers_that_are_none_are_refused() {
    let message = |change: fn(&mut PlanOptions)| {
        let mut options = options();
        change(&mut options);
        check(&subject(two_b()), &options).unwrap_err().to_string()
    };
    for (change, text) in [
        ((|o| o.context = Some(5000)) as fn(&mut PlanOptions), "--context 5000: 1 to the context"),
        (|o| o.prompt = 0, "--prompt 0: "),
        (|o| o.sequences = 0, "--batch 0: "),
        (|o| o.bandwidth = Some(-1.0), "--bandwidth -1: "),
        (|o| o.flops = Some(f64::NAN), "--flops NaN: "),
        (|o| o.target_decode = Some(0.0), "--target-decode 0: "),
        (
            |o| o.form = Form::from_name("int8"),
            "--form int8: linear layers of this model can be p2",
        ),
    ] {
        let found = message(change);
        assert!(found.starts_with(text), "{found}");
    }
}
