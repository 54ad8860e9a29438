//! What memory a run will take, before it runs: the ledger of
//! [`bitnet_core::training_memory`] for a config.

use bitnet_core::training_memory::{self, TeacherShape, TrainingShape};

pub use bitnet_core::training_memory::Parts;

use crate::config::TrainConfig;
use crate::optim::{MomentType, OptimizerKind};

/// The peak of a run's own tensors: what is live when it is reached, and the
/// phase of the run in which that is. `teacher` is that of a config with `[distill]`.
#[must_use]
pub fn tensors(config: &TrainConfig, teacher: Option<&TeacherShape>) -> (Parts, &'static str) {
    let batch = &config.batch;
    training_memory::tensors(&TrainingShape {
        model: config.model.clone(),
        micro_batch: batch.micro_batch,
        sequence: batch.sequence,
        micro_steps: batch.micro_steps(),
        recompute: batch.recompute,
        muon: config.optimizer.kind == OptimizerKind::Muon,
        byte_moments: config.optimizer.moments == MomentType::Int8,
        blends: config.quantization.blend > 0.0,
        teacher: teacher.cloned(),
    })
}
