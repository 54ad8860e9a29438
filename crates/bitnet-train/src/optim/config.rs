//! The `[optimizer]` table.

use serde::{Deserialize, Serialize};

use crate::TrainError;
use crate::device::DeviceChoice;

/// Which optimizer updates the linear layers' matrices. Embedding, head and norms
/// are AdamW's in any case.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OptimizerKind {
    /// AdamW (arXiv:1711.05101).
    #[default]
    Adamw,
    /// Muon (Jordan et al. 2024; arXiv:2502.16982).
    Muon,
}

impl OptimizerKind {
    /// Its name in configs and checkpoints.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Adamw => "adamw",
            Self::Muon => "muon",
        }
    }
}

/// What AdamW's moments of matrices, embedding and head are kept as; those of the norms,
/// which are few, are f32.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MomentType {
    /// 4 bytes each.
    #[default]
    F32,
    /// A byte each and two scales for every 64, as
    /// [`bitnet_kernels::Kernels::adamw_bytes`] keeps them.
    Int8,
}

impl MomentType {
    /// Its name in configs and checkpoints.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Int8 => "int8",
        }
    }
}

/// The `[optimizer]` table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OptimizerConfig {
    /// What updates the matrices.
    #[serde(default)]
    pub kind: OptimizerKind,
    /// AdamW's decay of the first moment.
    pub beta1: f64,
    /// AdamW's decay of the second moment.
    pub beta2: f64,
    /// Added to the root of AdamW's second moment.
    pub eps: f64,
    /// What AdamW's moments are kept as. Only on the CPU as bytes.
    #[serde(default)]
    pub moments: MomentType,
    /// Decay of Muon's momentum (muon only).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub momentum: Option<f64>,
    /// The greatest norm of the whole gradient; a longer one is scaled down to
    /// it. 0 turns clipping off. It acts on every parameter, Muon's too: Muon
    /// makes every update equally long, so clipping only changes the weights of
    /// the steps in its momentum, and norms of 0.3 to 1 have been seen to spoil
    /// small ternary models. With muon, take 0.
    pub clip_norm: f64,
    /// What differs by kind of parameter.
    #[serde(default)]
    pub groups: GroupsConfig,
}

/// The `[optimizer.groups]` tables; one that is absent stands as in
/// [`GroupsConfig::default`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct GroupsConfig {
    /// What has one dimension: the norms' weights.
    pub norms: GroupConfig,
    /// Embedding and head.
    pub embeddings: GroupConfig,
    /// The matrices of the linear layers.
    pub matrices: GroupConfig,
}

/// One group of parameters.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GroupConfig {
    /// The schedule's learning rate is multiplied by it.
    pub lr_scale: f64,
    /// Whether the schedule's weight decay acts on it.
    pub weight_decay: bool,
}

impl Default for GroupsConfig {
    /// The schedule's rate for all, weight decay for all but the norms.
    fn default() -> Self {
        let decayed = GroupConfig { lr_scale: 1.0, weight_decay: true };
        let norms = GroupConfig { weight_decay: false, ..decayed };
        Self { norms, embeddings: decayed, matrices: decayed }
    }
}

/// A kind of parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Group {
    /// What has one dimension.
    Norms,
    /// Embedding and head.
    Embeddings,
    /// The linear layers.
    Matrices,
}

impl Group {
    /// The group of a parameter by its place in the model (a field of
    /// [`crate::model::Transformer`] first) and its dimensions.
    #[must_use]
    pub fn of(path: &str, dimensions: usize) -> Self {
        if dimensions < 2 {
            Self::Norms
        } else if path == "embedding" || path == "head" {
            Self::Embeddings
        } else {
            Self::Matrices
        }
    }
}

impl GroupsConfig {
    /// The settings of a group.
    #[must_use]
    pub fn get(&self, group: Group) -> GroupConfig {
        match group {
            Group::Norms => self.norms,
            Group::Embeddings => self.embeddings,
            Group::Matrices => self.matrices,
        }
    }
}

impl OptimizerConfig {
    /// Checks the table against the device.
    ///
    /// # Errors
    /// A key that this device cannot follow.
    pub fn check_device(&self, device: DeviceChoice) -> Result<(), TrainError> {
        if self.moments == MomentType::Int8 && device != DeviceChoice::Cpu {
            let reason = format!("is for --device cpu, not {device}");
            return Err(TrainError::value("optimizer.moments", "int8", reason));
        }
        Ok(())
    }

    /// Checks that the values go together.
    ///
    /// # Errors
    /// The first key whose value cannot be used.
    pub fn validate(&self) -> Result<(), TrainError> {
        let groups = &self.groups;
        for (key, v, low, below) in [
            ("optimizer.beta1", self.beta1, 0.0, 1.0),
            ("optimizer.beta2", self.beta2, 0.0, 1.0),
            ("optimizer.eps", self.eps, f64::MIN_POSITIVE, 1.0),
            ("optimizer.clip_norm", self.clip_norm, 0.0, 1e9),
            ("optimizer.momentum", self.momentum.unwrap_or(0.0), 0.0, 1.0),
            ("optimizer.groups.norms.lr_scale", groups.norms.lr_scale, 0.0, 1e3),
            ("optimizer.groups.embeddings.lr_scale", groups.embeddings.lr_scale, 0.0, 1e3),
            ("optimizer.groups.matrices.lr_scale", groups.matrices.lr_scale, 0.0, 1e3),
        ] {
            TrainError::check_range(key, v, low, below)?;
        }
        match (self.kind, self.momentum) {
            (OptimizerKind::Muon, None) => {
                let reason = "is needed by optimizer.kind = muon; 0.95 is usual";
                Err(TrainError::value("optimizer.momentum", "(absent)", reason))
            }
            (OptimizerKind::Adamw, Some(v)) => {
                let reason = "has no use with optimizer.kind = adamw";
                Err(TrainError::value("optimizer.momentum", v, reason))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// AdamW with usual constants.
    pub(crate) fn adamw(clip_norm: f64) -> OptimizerConfig {
        OptimizerConfig {
            kind: OptimizerKind::Adamw,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            moments: MomentType::F32,
            momentum: None,
            clip_norm,
            groups: GroupsConfig::default(),
        }
    }

    /// Muon for the matrices.
    pub(crate) fn muon() -> OptimizerConfig {
        OptimizerConfig { kind: OptimizerKind::Muon, momentum: Some(0.95), ..adamw(0.0) }
    }

    #[test]
    fn absent_keys_mean_what_they_did_before_there_were_any() {
        let old = "beta1 = 0.9\nbeta2 = 0.95\neps = 1e-8\nclip_norm = 1.0\n";
        let config: OptimizerConfig = toml::from_str(old).unwrap();
        assert_eq!(config, adamw(1.0));
        let text = toml::to_string(&config).unwrap();
        assert!(text.contains("[groups.norms]\nlr_scale = 1.0\nweight_decay = false"), "{text}");
        assert_eq!(toml::from_str::<OptimizerConfig>(&text).unwrap(), config);
        let some = format!("{old}[groups.norms]\nlr_scale = 0.5\nweight_decay = true\n");
        let config: OptimizerConfig = toml::from_str(&some).unwrap();
        let norms = GroupConfig { lr_scale: 0.5, weight_decay: true };
        assert_eq!(config.groups, GroupsConfig { norms, ..GroupsConfig::default() });
        for (part, message) in [
            ("[groups.norms]\nlr_scale = 0.5\n", "missing field `weight_decay`"),
            ("[groups.norm]\n", "unknown field `norm`"),
            ("[groups.norms]\nlr = 1\n", "unknown field `lr`"),
        ] {
            let error = toml::from_str::<OptimizerConfig>(&format!("{old}{part}")).unwrap_err();
            assert!(error.message().contains(message), "{error}");
        }
    }

    #[test]
    fn errors_name_the_key() {
        let mut scaled = adamw(1.0);
        scaled.groups.embeddings.lr_scale = -1.0;
        for (config, message) in [
            (
                OptimizerConfig { kind: OptimizerKind::Muon, ..adamw(1.0) },
                "optimizer.momentum = (absent): is needed by optimizer.kind = muon",
            ),
            (
                OptimizerConfig { momentum: Some(0.9), ..adamw(1.0) },
                "optimizer.momentum = 0.9: has no use with optimizer.kind = adamw",
            ),
            (
                OptimizerConfig { momentum: Some(1.0), ..muon() },
                "optimizer.momentum = 1: must be at least 0 and less than 1",
            ),
            (scaled, "optimizer.groups.embeddings.lr_scale = -1: must be at least 0"),
        ] {
            let error = config.validate().unwrap_err().to_string();
            assert!(error.starts_with(message), "{error}");
        }
        adamw(1.0).validate().unwrap();
        muon().validate().unwrap();
        let bytes = OptimizerConfig { moments: MomentType::Int8, ..adamw(1.0) };
        bytes.check_device(DeviceChoice::Cpu).unwrap();
        adamw(1.0).check_device(DeviceChoice::Wgpu(None)).unwrap();
        let error = bytes.check_device(DeviceChoice::Wgpu(None)).unwrap_err().to_string();
        assert_eq!(error, "optimizer.moments = int8: is for --device cpu, not wgpu");
    }
}
