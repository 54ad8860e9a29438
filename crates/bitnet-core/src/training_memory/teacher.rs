//! The ledger of distillation: the teacher's forward pass, what its predictions hold
//! until the loss has been differentiated, and the relations of its queries, keys and
//! values (bitnet-train's `distill` and `ops::head`).

use super::{ACTIVATIONS, F32, HEAD, Ledger, TEACHER, TrainingShape, Walk};
use crate::ModelConfig;

/// What of a teacher a run's memory depends on.
#[derive(Debug, Clone, PartialEq)]
pub struct TeacherShape {
    /// The teacher; it computes as its own configuration says.
    pub model: ModelConfig,
    /// Whether its predictions are followed.
    pub logits: bool,
    /// The relations that are followed, if any are.
    pub relations: Option<RelationShape>,
}

/// The relations that a run compares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RelationShape {
    /// The heads that queries, keys and values are split into.
    pub heads: usize,
    /// The block, counted from 0; none: the last of either model.
    pub layer: Option<usize>,
}

impl TeacherShape {
    /// A run of the teacher, of which its forward pass is walked.
    fn run(&self, student: &TrainingShape) -> TrainingShape {
        TrainingShape { model: self.model.clone(), blends: false, teacher: None, ..student.clone() }
    }
}

impl Walk<'_> {
    fn relation_shape(&self) -> Option<RelationShape> {
        self.run.teacher.as_ref()?.relations
    }

    /// The student's block whose operations are taken apart, to be compared.
    pub(super) fn watched(&self) -> Option<usize> {
        let relations = self.relation_shape()?;
        Some(relations.layer.unwrap_or(self.model.num_hidden_layers.saturating_sub(1)))
    }

    /// The teacher's pass over a micro-batch. Leaves its last hidden state and its head
    /// as stored, where predictions are followed, and queries, keys and values of one
    /// block, where relations are.
    pub(super) fn teacher_forward(&self, l: &mut Ledger) {
        let Some(teacher) = &self.run.teacher else { return };
        let run = teacher.run(self.run);
        let walk = Walk::new(&run);
        let hidden = walk.rows(walk.d);
        l.moment = "teacher";
        l.hold(TEACHER, walk.stored());
        if !walk.model.tie_word_embeddings {
            l.briefly(TEACHER, walk.stored());
        }
        l.hold(ACTIVATIONS, hidden);
        let last = walk.model.num_hidden_layers.saturating_sub(1);
        let watched = teacher.relations.map(|relations| relations.layer.unwrap_or(last));
        for layer in 0..walk.model.num_hidden_layers {
            if watched == Some(layer) {
                l.hold(TEACHER, walk.watched_rows());
                walk.separate_forward(l, false);
            } else {
                walk.block_forward(l, false);
            }
            // Its input.
            l.free(ACTIVATIONS, hidden);
        }
        l.hold(TEACHER, hidden);
        l.free(ACTIVATIONS, hidden);
        if !teacher.logits {
            l.free(TEACHER, hidden + walk.stored());
        }
    }

    /// Queries, keys and values, `[N, (H + 2K)·C]`.
    fn watched_rows(&self) -> u64 {
        self.rows(self.q + 2 * self.kv)
    }

    /// The teacher's logits beside the student's: its head packed as a right operand,
    /// and the logits of a round, at most.
    pub(super) fn teacher_logits(&self, l: &mut Ledger, round: u64) {
        let Some(teacher) = self.run.teacher.as_ref().filter(|t| t.logits) else { return };
        let width = teacher.model.hidden_size as u64;
        let packed = F32 * width * self.vocab.next_multiple_of(16);
        l.take(HEAD, packed);
        l.briefly(TEACHER, F32 * round * self.vocab);
        l.give(HEAD, packed);
    }

    /// The gradient of the loss is there: its predictions are not needed any more.
    pub(super) fn teacher_done(&self, l: &mut Ledger) {
        let Some(teacher) = self.run.teacher.as_ref().filter(|t| t.logits) else { return };
        let run = teacher.run(self.run);
        let walk = Walk::new(&run);
        l.free(TEACHER, walk.rows(walk.d) + walk.stored());
    }

    /// One matrix of relations, `[B, heads, T, T]`; none, none.
    fn relation(&self) -> u64 {
        let matrix = (self.run.sequence * self.run.sequence) as u64;
        let heads = self.relation_shape().map_or(0, |r| r.heads as u64);
        F32 * self.run.micro_batch as u64 * heads * matrix
    }

    /// The divergences of queries, keys and values. Each leaves the student's shifted
    /// scores and the teacher's probabilities to the backward pass.
    pub(super) fn relations(&self, l: &mut Ledger) {
        let one = self.relation();
        if one == 0 {
            return;
        }
        for _ in 0..3 {
            // The teacher's logarithms, the student's shifted scores and logarithms, the
            // teacher's probabilities and the differences.
            l.hold(TEACHER, 5 * one);
            l.free(TEACHER, 3 * one);
        }
        let Some(teacher) = &self.run.teacher else { return };
        let run = teacher.run(self.run);
        // The teacher's are gone, the student's are saved by the attention.
        l.free(TEACHER, Walk::new(&run).watched_rows());
    }

    /// The reverse of [`Self::relations`]; leaves the gradients of the student's
    /// queries, keys and values.
    pub(super) fn relations_backward(&self, l: &mut Ledger) {
        let one = self.relation();
        if one == 0 {
            return;
        }
        for _ in 0..3 {
            // The exponentials again, and the gradients of scores and of their sum.
            l.hold(TEACHER, 2 * one);
            l.free(TEACHER, 4 * one);
        }
        l.hold(TEACHER, self.watched_rows());
    }

    /// A block that was taken apart: the relations' gradients join those of its
    /// attention.
    pub(super) fn watched_backward(&self, l: &mut Ledger) {
        self.separate_backward(l);
        l.free(TEACHER, self.watched_rows());
    }
}
