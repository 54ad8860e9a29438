//! Distillation: a student that follows a teacher's predictions, and the relations
//! of its queries, keys and values in one layer (BitDistill, arXiv:2510.13998).

use std::path::{Path, PathBuf};

use bitnet_core::ModelConfig;
use bitnet_core::names::Linear;
use bitnet_core::training_memory::{RelationShape, TeacherShape};
use burn::tensor::{Device, Int, Tensor, activation};
use serde::{Deserialize, Serialize};

use crate::TrainError;
use crate::model::Transformer;
use crate::ops::{self, Objective, SoftTargets};
use crate::start;

/// The `[distill]` table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DistillConfig {
    /// The teacher: a run, a checkpoint or a Hugging Face folder of the same
    /// tokenizer.
    pub teacher: PathBuf,
    /// The weight of the cross-entropy with the text itself.
    #[serde(default = "one")]
    pub cross_entropy: f64,
    /// The weight λ of the divergence from the teacher's predictions.
    pub logits: f64,
    /// The temperature of both predictions.
    #[serde(default = "five")]
    pub temperature: f64,
    /// The weight γ of the divergence of the relations; 0 leaves them out.
    #[serde(default)]
    pub relations: f64,
    /// The block whose relations are compared, counted from 0 [default: the last
    /// of either model].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub relation_layer: Option<usize>,
    /// The heads that queries, keys and values are split into for it.
    #[serde(default = "one_head")]
    pub relation_heads: usize,
}

fn one() -> f64 {
    1.0
}
fn five() -> f64 {
    5.0
}
fn one_head() -> usize {
    1
}

impl DistillConfig {
    /// Checks the values.
    ///
    /// # Errors
    /// The first key whose value cannot be used.
    pub fn validate(&self, student: &ModelConfig) -> Result<(), TrainError> {
        for (key, value, low) in [
            ("distill.cross_entropy", self.cross_entropy, 0.0),
            ("distill.logits", self.logits, 0.0),
            ("distill.relations", self.relations, 0.0),
            ("distill.temperature", self.temperature, 1e-3),
        ] {
            if !(value >= low && value <= 1e9) {
                let reason = format!("must be between {low} and 1e9");
                return Err(TrainError::value(key, value, reason));
            }
        }
        if self.logits == 0.0 && self.relations == 0.0 {
            let reason = "is 0, and so is distill.relations: there is nothing to learn";
            return Err(TrainError::value("distill.logits", 0, reason));
        }
        self.check_relations("the student", student)
    }

    /// What of the teacher a run's memory depends on, read from its folder.
    ///
    /// # Errors
    /// As [`Teacher::open`].
    pub fn shape(&self, student: &ModelConfig) -> Result<TeacherShape, TrainError> {
        let model = start::read_config(&self.teacher)?;
        self.check_teacher(&model, student)?;
        let (heads, layer) = (self.relation_heads, self.relation_layer);
        let relations = (self.relations > 0.0).then_some(RelationShape { heads, layer });
        Ok(TeacherShape { model, logits: self.logits > 0.0, relations })
    }

    fn check_teacher(
        &self,
        teacher: &ModelConfig,
        student: &ModelConfig,
    ) -> Result<(), TrainError> {
        if teacher.vocab_size != student.vocab_size {
            let reason = format!(
                "its vocabulary has {} tokens, the student's {}",
                teacher.vocab_size, student.vocab_size
            );
            return Err(TrainError::value("distill.teacher", self.teacher.display(), reason));
        }
        self.check_relations("the teacher", teacher)
    }

    fn check_relations(&self, who: &str, model: &ModelConfig) -> Result<(), TrainError> {
        let (heads, kv) = (self.relation_heads, model.key_value_size());
        if heads == 0 || !kv.is_multiple_of(heads) || !model.query_size().is_multiple_of(heads) {
            let reason = format!(
                "does not divide the {} and {kv} columns of {who}'s queries and keys",
                model.query_size()
            );
            return Err(TrainError::value("distill.relation_heads", heads, reason));
        }
        let layers = model.num_hidden_layers;
        match self.relation_layer {
            Some(layer) if layer >= layers => {
                let reason = format!("{who} has {layers} blocks");
                Err(TrainError::value("distill.relation_layer", layer, reason))
            }
            _ => Ok(()),
        }
    }
}

/// What one forward pass learns from.
#[derive(Debug, Clone)]
pub struct Examples {
    /// Token ids `[B, T]`.
    pub tokens: Tensor<2, Int>,
    /// The token behind each `[B, T]`.
    pub targets: Tensor<2, Int>,
    /// The lengths of the documents that do not see each other, in order.
    pub documents: Option<std::sync::Arc<[usize]>>,
    /// The weight of every token's loss, `B · T`; none: the mean of all.
    pub weights: Option<Vec<f32>>,
}

/// A teacher, ready to be asked.
#[derive(Debug)]
pub struct Teacher {
    model: Transformer,
    config: DistillConfig,
    layer: usize,
    device: Device,
}

impl Teacher {
    /// Reads the teacher onto a device without autodiff.
    ///
    /// # Errors
    /// A model that cannot be read, of another vocabulary, or without the layer.
    pub fn open(
        config: &DistillConfig,
        student: &ModelConfig,
        device: &Device,
    ) -> Result<Self, TrainError> {
        let (model, found) = start::read_model(&config.teacher, device)?;
        config.check_teacher(&found, student)?;
        let layer = config.relation_layer.unwrap_or(found.num_hidden_layers - 1);
        Ok(Self { model, config: config.clone(), layer, device: device.clone() })
    }

    /// Where it was read from.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.config.teacher
    }

    /// The predictions for these examples, and queries, keys and values of its
    /// layer where the relations count.
    fn answer(&self, examples: &Examples) -> (SoftTargets, Vec<Tensor<2>>) {
        let data = examples.tokens.clone().into_data();
        let tokens = Tensor::<2, Int>::from_data(data, &self.device);
        let mut seen = Vec::new();
        let watch = self.config.relations > 0.0;
        let layer = self.layer;
        let documents = examples.documents.clone();
        let (hidden, weight) = self.model.hidden_traced(
            tokens,
            documents,
            |at| watch && at == layer,
            &mut |_, which, _, y| {
                if is_relation(which) {
                    seen.push(y);
                }
            },
        );
        let temperature = self.config.temperature as f32;
        (SoftTargets { hidden, weight, temperature, factor: self.config.logits as f32 }, seen)
    }
}

fn is_relation(which: Linear) -> bool {
    matches!(which, Linear::Q | Linear::K | Linear::V)
}

/// What the head is trained towards, and the teacher's queries, keys and values
/// where their relations count.
pub(crate) fn objective(
    model: &Transformer,
    examples: &Examples,
    teacher: Option<&Teacher>,
) -> (Objective, Vec<Tensor<2>>) {
    let recipe = model.recipe();
    let objective = Objective {
        weights: examples.weights.clone(),
        bf16: recipe.is_some_and(|r| r.bf16),
        int8_inputs: recipe.is_some_and(|r| r.is_integer() && r.gradients.int8_inputs),
        ..Objective::default()
    };
    let Some(teacher) = teacher else { return (objective, Vec::new()) };
    let (soft, seen) = teacher.answer(examples);
    let cross_entropy = teacher.config.cross_entropy as f32;
    let soft = (teacher.config.logits > 0.0).then_some(soft);
    (Objective { cross_entropy, teacher: soft, ..objective }, seen)
}

/// The loss of a model on examples: the cross-entropy, and what a teacher adds.
pub fn loss(model: &Transformer, examples: &Examples, teacher: Option<&Teacher>) -> Tensor<1> {
    let [batch, time] = examples.tokens.dims();
    let (objective, relations) = objective(model, examples, teacher);
    let last = model.blocks.len() - 1;
    let watched = teacher
        .filter(|_| !relations.is_empty())
        .map(|teacher| teacher.config.relation_layer.unwrap_or(last));
    let mut own = Vec::new();
    let (hidden, head) = model.hidden_traced(
        examples.tokens.clone(),
        examples.documents.clone(),
        |at| Some(at) == watched,
        &mut |_, which, _, y| {
            if is_relation(which) {
                own.push(y);
            }
        },
    );
    let targets = examples.targets.clone().reshape([batch * time]);
    let mut loss = ops::language_loss(hidden, head, targets, &objective);
    if let Some(teacher) = teacher {
        for (student, given) in own.into_iter().zip(relations) {
            let heads = teacher.config.relation_heads;
            let divergence = relation_loss(student, given, batch, heads);
            loss = loss + divergence.mul_scalar(teacher.config.relations as f32);
        }
    }
    loss
}

/// The mean divergence of the self-relations `softmax(A Aᵀ / √C)` of a teacher's
/// and a student's queries, keys or values (arXiv:2510.13998, equation 8).
///
/// # Shapes
/// `student` is `[B·T, D]`, `teacher` `[B·T, D']`; both are split into `heads`.
fn relation_loss(student: Tensor<2>, teacher: Tensor<2>, batch: usize, heads: usize) -> Tensor<1> {
    let device = student.device();
    let teacher = if device.is_autodiff() { Tensor::from_inner(teacher) } else { teacher };
    let relation = |x: Tensor<2>| {
        let [rows, size] = x.dims();
        let c = size / heads;
        let x = x.reshape([batch, rows / batch, heads, c]).swap_dims(1, 2);
        let scores = x.clone().matmul(x.swap_dims(2, 3)) / (c as f32).sqrt();
        activation::log_softmax(scores, 3)
    };
    let (given, own) = (relation(teacher), relation(student));
    (given.clone().exp() * (given - own)).sum_dim(3).mean()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::Objective;
    use crate::stage::StageConfig;

    fn examples(device: &Device) -> Examples {
        let ids = |shift: i64| {
            let ids: Vec<i64> = (0..40).map(|i| (i + shift) * 37 % 320).collect();
            Tensor::from_data(burn::tensor::TensorData::new(ids, [2, 20]), device)
        };
        Examples { tokens: ids(0), targets: ids(1), documents: None, weights: None }
    }

    fn config(relations: f64) -> DistillConfig {
        let text = r#"{"teacher": "x", "logits": 2.0, "relation_heads": 2}"#;
        DistillConfig { relations, ..serde_json::from_str(text).unwrap() }
    }

    fn teacher(seed: u64, relations: f64) -> Teacher {
        let device = Device::flex();
        let model = Transformer::new(&ModelConfig::tiny(), seed, &device);
        Teacher { model, config: config(relations), layer: 1, device }
    }

    #[test]
    fn int8_gradients_reach_the_head_while_products_are_integers() {
        let device = Device::flex().autodiff();
        let config = ModelConfig::tiny();
        let mut model = Transformer::new(&config, 1, &device);
        let stages = StageConfig {
            float_until: 0.2,
            blend: 0.2,
            int8_backward: true,
            ..StageConfig::default()
        };
        let on = (0..=10).map(|step| {
            stages.at(step, 10).apply(&config, &mut model);
            objective(&model, &examples(&device), None).0.int8_inputs
        });
        // Floats, then blends, then integers, then the finished model.
        assert!(on.eq((0..=10).map(|step| (4..10).contains(&step))));
    }

    #[test]
    fn a_teacher_that_is_the_student_adds_nothing() {
        let device = Device::flex().autodiff();
        let model = Transformer::new(&ModelConfig::tiny(), 1, &device);
        let plain = loss(&model, &examples(&device), None).into_scalar::<f32>();
        let same = loss(&model, &examples(&device), Some(&teacher(1, 10.0))).into_scalar::<f32>();
        assert!((plain - same).abs() < 1e-5, "{plain} and {same}");
        let other = loss(&model, &examples(&device), Some(&teacher(2, 0.0))).into_scalar::<f32>();
        let more = loss(&model, &examples(&device), Some(&teacher(2, 10.0))).into_scalar::<f32>();
        assert!(plain < other && other < more, "{plain} {other} {more}");
    }

    #[test]
    fn the_relations_alone_draw_the_student_to_the_teacher() {
        let device = Device::flex().autodiff();
        let model = Transformer::new(&ModelConfig::tiny(), 1, &device);
        let mut teacher = teacher(2, 1.0);
        (teacher.config.logits, teacher.config.cross_entropy) = (0.0, 0.0);
        let examples = examples(&device);
        let before = loss(&model, &examples, Some(&teacher));
        let gradients = before.clone().backward();
        let before = before.into_scalar::<f32>();
        assert!(before > 0.0);
        // One small step against the gradient of the values' projection.
        let mut moved = model;
        let v = &mut moved.blocks[1].attention.v.weight;
        let grad = v.val().grad(&gradients).expect("the values take part");
        let norm = grad.clone().square().sum().sqrt().into_scalar::<f32>();
        assert!(norm > 0.0);
        let step = Tensor::from_inner(grad.mul_scalar(0.01 / norm));
        *v = v.clone().map(|w| (w - step).detach().require_grad());
        let after = loss(&moved, &examples, Some(&teacher)).into_scalar::<f32>();
        assert!(after < before, "{before} {after}");
    }

    #[test]
    fn values_are_checked() {
        let tiny = ModelConfig::tiny();
        config(1.0).validate(&tiny).unwrap();
        type Case = (fn(&mut DistillConfig), &'static str);
        let cases: [Case; 5] = [
            (|c| c.logits = 0.0, "distill.logits = 0: is 0, and so is"),
            (|c| c.temperature = 0.0, "distill.temperature = 0: "),
            (|c| c.relations = f64::NAN, "distill.relations = NaN: "),
            (|c| c.relation_heads = 3, "distill.relation_heads = 3: does not divide"),
            (|c| c.relation_layer = Some(2), "distill.relation_layer = 2: the student has 2"),
        ];
        for (spoil, message) in cases {
            let mut config = config(0.0);
            spoil(&mut config);
            let error = config.validate(&tiny).unwrap_err().to_string();
            assert!(error.starts_with(message), "{error}");
        }
        assert_eq!(Objective::default().cross_entropy, 1.0);
    }
}
