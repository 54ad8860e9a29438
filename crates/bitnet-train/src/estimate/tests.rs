use bitnet_core::quantizer::ActivationRecipe;

use super::*;
use crate::config::tests::small;

/// Every combination of what the walk distinguishes.
fn configs() -> Vec<TrainConfig> {
    let mut all = Vec::new();
    let activations = [ActivationRecipe::Int8, ActivationRecipe::A48, ActivationRecipe::None];
    for (bits, activations) in (0..128).flat_map(|b| activations.map(|a| (b, a))) {
        let bit = |i: u32| bits >> i & 1 == 1;
        let mut config = small(std::path::Path::new("x"));
        config.model.recipe.activations = activations;
        config.model.tie_word_embeddings = bit(0);
        config.model.sub_norms = bit(1);
        if bit(2) {
            config.model.weight_quantizer = WeightQuantizer::None;
        }
        if bit(3) {
            config.model.embedding_dtype = Dtype::F32;
        }
        config.batch.recompute = bit(4);
        if bit(5) {
            config.optimizer.kind = OptimizerKind::Muon;
        }
        // One micro-step or two.
        config.batch.micro_batch = if bit(6) { 4 } else { 2 };
        all.push(config);
    }
    all
}

#[test]
fn all_that_a_step_takes_is_freed() {
    for config in configs() {
        let mut ledger = Ledger::default();
        Walk::new(&config).run(&mut ledger);
        let count = config.model.parameter_count();
        let muon = config.optimizer.kind == OptimizerKind::Muon;
        let state = if muon { 2 * count.total() - count.linear } else { 2 * count.total() };
        let left = Parts { weights: 4 * count.total(), optimizer: 4 * state, ..Parts::default() };
        assert_eq!(ledger.live, left, "{:?} {:?}", config.model, config.batch);
        assert!(ledger.peak.total() < 100 << 20, "{:?}", ledger.peak);
    }
}

/// What is saved of a block, counted by hand: model tiny (D = 64, F = 160, H = 4,
/// K = 2, C = 16), 64 tokens.
#[test]
fn a_block_saves_what_its_operations_save() {
    let config = small(std::path::Path::new("x"));
    let walk = Walk::new(&config);
    let mut ledger = Ledger::default();
    walk.block_forward(&mut ledger, true);
    // f32 a token: q 64, k and v 32 each, both sub-norms' inputs 64 and 160, the
    // second norm's input 64, gate and up 160 each, the block's output 64 (its
    // input was there before), four inverse norms.
    let floats = 64 + 2 * 32 + 64 + 160 + 64 + 2 * 160 + 64 + 4;
    // int8 a token: inputs of 64 and 160 columns are padded to 320; a scale and
    // a sum beside each of the seven.
    let integers = 7 * (320 + 8);
    // 2 bits a weight in rows of 64 bytes: 64 + 32 + 32 + 64 + 160 + 160 + 64 rows.
    let packed = 64 * 576;
    assert_eq!(ledger.live.total(), 64 * (4 * floats + integers) + packed);
    walk.block_backward(&mut ledger);
    // The gradients of 43 008 weights, and of the input instead of the output.
    assert_eq!(ledger.live.gradients, 4 * 43_008);
    assert_eq!(ledger.live.activations, 4 * 64 * 64 - 4 * 64 * 64);
}

#[test]
fn recomputation_and_smaller_batches_need_less() {
    let mut config = small(std::path::Path::new("x"));
    config.model.num_hidden_layers = 8;
    config.batch.tokens = 4096;
    config.batch.micro_batch = 32;
    let total = |c: &TrainConfig| tensors(c).0.total();
    let mut recompute = config.clone();
    recompute.batch.recompute = true;
    assert!(2 * total(&recompute) < total(&config));
    let mut smaller = config.clone();
    smaller.batch.micro_batch = 16;
    assert!(total(&smaller) < total(&config));
}
