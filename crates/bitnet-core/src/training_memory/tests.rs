use super::*;
use crate::quantizer::ActivationRecipe;

/// Two micro-steps of two sequences of the tiny model.
fn small() -> TrainingShape {
    TrainingShape {
        model: ModelConfig::tiny(),
        micro_batch: 2,
        sequence: 32,
        micro_steps: 2,
        recompute: false,
        muon: false,
        byte_moments: false,
        blends: false,
        teacher: None,
    }
}

/// A teacher of other widths.
fn teacher(logits: bool, relations: bool, tied: bool) -> TeacherShape {
    let model = ModelConfig {
        hidden_size: 96,
        num_hidden_layers: 3,
        weight_quantizer: WeightQuantizer::None,
        tie_word_embeddings: tied,
        ..ModelConfig::tiny()
    };
    let relations = relations.then_some(RelationShape { heads: 2, layer: None });
    TeacherShape { model, logits, relations }
}

/// Every combination of what the walk distinguishes.
fn shapes() -> Vec<TrainingShape> {
    let mut all = Vec::new();
    let activations = [ActivationRecipe::Int8, ActivationRecipe::A48, ActivationRecipe::None];
    for (bits, activations) in (0..256).flat_map(|b| activations.map(|a| (b, a))) {
        let bit = |i: u32| bits >> i & 1 == 1;
        let mut run = small();
        run.model.recipe.activations = activations;
        run.model.tie_word_embeddings = bit(0);
        run.model.sub_norms = bit(1);
        if bit(2) {
            run.model.weight_quantizer = WeightQuantizer::None;
        }
        if bit(3) {
            run.model.embedding_dtype = Dtype::F32;
        }
        if activations == ActivationRecipe::A48 && bit(5) {
            run.model.recipe.o_proj_keep = 0.5;
        }
        run.recompute = bit(4);
        run.muon = bit(5);
        run.byte_moments = bit(0);
        // One micro-step or two.
        (run.micro_batch, run.micro_steps) = if bit(6) { (4, 1) } else { (2, 2) };
        run.blends = bit(7);
        if run.muon {
            // What a teacher adds does not depend on the optimizer.
            run.teacher = Some(teacher(bit(3), !run.recompute && bit(1), bit(0)));
        }
        all.push(run);
    }
    all
}

/// What is live and does not wait to be used again.
fn in_use(ledger: &Ledger) -> Parts {
    let mut parts = ledger.live;
    for (bytes, (of, count)) in &ledger.waiting {
        *of(&mut parts) -= bytes * *count as u64;
    }
    parts
}

#[test]
fn all_that_a_step_takes_is_freed() {
    for run in shapes() {
        let mut ledger = Ledger::default();
        Walk::new(&run).run(&mut ledger);
        let count = run.model.parameter_count();
        let state = optimizer_bytes(&count, run.muon, run.byte_moments);
        let teacher = run.teacher.as_ref().map_or(0, |t| t.model.parameter_count().total());
        let left = Parts {
            weights: 4 * count.total(),
            optimizer: state,
            teacher: 4 * teacher,
            ..Parts::default()
        };
        assert_eq!(in_use(&ledger), left, "{run:?}");
        assert!(ledger.peak.total() < 100 << 20, "{:?}", ledger.peak);
    }
}

#[test]
fn moments_as_bytes_take_a_quarter() {
    let count = ModelConfig::tiny().parameter_count();
    let large = count.embedding + count.head + count.linear;
    let floats = optimizer_bytes(&count, false, false);
    assert_eq!(floats, 8 * count.total());
    let bytes = optimizer_bytes(&count, false, true);
    assert_eq!(bytes, 2 * large + large / 64 * 8 + 8 * count.norms);
    assert!(bytes < floats * 28 / 100, "{bytes} of {floats}");
    assert_eq!(optimizer_bytes(&count, true, false), 8 * count.total() - 4 * count.linear);
    let muon = optimizer_bytes(&count, true, true);
    assert_eq!(muon, bytes - count.linear * 2 - count.linear / 64 * 8 + 4 * count.linear);
}

/// What is saved of a block, counted by hand: model tiny (D = 64, F = 160, H = 4,
/// K = 2, C = 16), 64 tokens.
#[test]
fn a_block_saves_what_its_operations_save() {
    let run = small();
    let walk = Walk::new(&run);
    let mut ledger = Ledger::default();
    walk.block_forward(&mut ledger, true);
    // f32 a token: q 64, k and v 32 each, the first sub-norm's input 64, what lies
    // between the halves 64, the block's output 64 (its input was there before).
    let floats = 64 + 2 * 32 + 64 + 64 + 64;
    // int8 a token: the inputs of four products, padded to 320.
    let integers = 4 * 320;
    // 2 bits a weight in rows of 64 bytes: 64 + 32 + 32 + 64 + 160 + 160 + 64 rows.
    let packed = 64 * 576;
    assert_eq!(ledger.live.total(), 64 * (4 * floats + integers) + packed);
    walk.block_backward(&mut ledger);
    // The gradients of 43 008 weights, and of the input instead of the output.
    assert_eq!(in_use(&ledger).gradients, 4 * 43_008);
    assert_eq!(in_use(&ledger).activations, 0);
    assert!(ledger.live.activations > 0, "buffers wait");
}

#[test]
fn recomputation_and_smaller_batches_need_less() {
    let mut run = small();
    run.model.num_hidden_layers = 8;
    (run.micro_batch, run.micro_steps) = (32, 4);
    let total = |run: &TrainingShape| tensors(run).0.total();
    let recompute = TrainingShape { recompute: true, ..run.clone() };
    assert!(2 * total(&recompute) < total(&run));
    let smaller = TrainingShape { micro_batch: 16, micro_steps: 8, ..run.clone() };
    assert!(total(&smaller) < total(&run));
}

/// What following a teacher adds, counted by hand: 64 tokens, V = 320, its D = 96.
#[test]
fn a_teacher_adds_its_weights_predictions_and_relations() {
    let mut run = small();
    run.teacher = Some(teacher(true, true, true));
    let walk = Walk::new(&run);
    let mut ledger = Ledger::default();
    walk.teacher_forward(&mut ledger);
    // The head as stored, the last hidden state, queries, keys and values (H·C = 96,
    // K·C = 48).
    let predictions = 4 * (320 * 96 + 64 * 96);
    assert_eq!(in_use(&ledger).teacher, predictions + 4 * 64 * (96 + 2 * 48));
    assert_eq!(in_use(&ledger).activations, 0);
    walk.relations(&mut ledger);
    // Two matrices for each of three relations: 2 sequences, 2 heads, 32 by 32.
    assert_eq!(in_use(&ledger).teacher, predictions + 3 * 2 * 4 * 2 * 2 * 32 * 32);
    walk.relations_backward(&mut ledger);
    walk.teacher_done(&mut ledger);
    // The gradients of the student's queries, keys and values.
    assert_eq!(in_use(&ledger).teacher, 4 * 64 * (64 + 2 * 32));
    let (with, _) = tensors(&run);
    let (without, _) = tensors(&small());
    assert!(with.teacher > 4 * walk.run.teacher.as_ref().unwrap().model.parameter_count().total());
    assert!(with.total() > without.total() + 4 * 100_000, "{with:?} {without:?}");
}
