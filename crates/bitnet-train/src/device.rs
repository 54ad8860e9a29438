//! `--device`: which of the backends compiled in runs the training.

use std::panic::{self, AssertUnwindSafe};
use std::str::FromStr;

use burn::tensor::{Device, Tensor};

use crate::TrainError;

/// What `--device` names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeviceChoice {
    /// burn-flex, burn's CPU backend, with this project's fused operations.
    Cpu,
    /// burn-ndarray, the CPU backend that burn drops after 0.22.
    NdArray,
    /// A GPU through wgpu: the best one, or the n-th discrete one.
    Wgpu(Option<usize>),
    /// The n-th NVIDIA GPU.
    Cuda(usize),
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (kind, index) = match text.split_once(':') {
            Some((kind, "rank")) => (kind, Some(local_rank(|name| std::env::var(name).ok()))),
            Some((kind, index)) => {
                let index: usize =
                    index.parse().map_err(|_| format!("`{index}` is not a device's number"))?;
                (kind, Some(index))
            }
            None => (text, None),
        };
        match (kind, index) {
            ("cpu", None) => Ok(Self::Cpu),
            ("ndarray", None) => Ok(Self::NdArray),
            ("cpu" | "ndarray", Some(_)) => Err(format!("{kind} takes no number")),
            ("wgpu", index) => Ok(Self::Wgpu(index)),
            ("cuda", index) => Ok(Self::Cuda(index.unwrap_or(0))),
            _ => Err("expected cpu, ndarray, wgpu[:n|:rank] or cuda[:n|:rank]".to_owned()),
        }
    }
}

impl std::fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Cpu => write!(f, "cpu"),
            Self::NdArray => write!(f, "ndarray"),
            Self::Wgpu(None) => write!(f, "wgpu"),
            Self::Wgpu(Some(n)) => write!(f, "wgpu:{n}"),
            Self::Cuda(n) => write!(f, "cuda:{n}"),
        }
    }
}

impl DeviceChoice {
    /// Opens the device and computes 1 + 1 on it.
    ///
    /// # Errors
    /// A backend that is not compiled in, or a device whose driver refuses.
    pub fn open(self) -> Result<Device, TrainError> {
        let device = self.device()?;
        let sum = quietly(|| Tensor::<1>::ones([1], &device).add_scalar(1.0).into_scalar::<f32>());
        match sum {
            Ok(2.0) => Ok(device),
            Ok(x) => Err(self.lost(format!("it computes 1 + 1 = {x}"))),
            Err(reason) => Err(self.lost(reason)),
        }
    }

    /// Whether tensors lie in host memory, so that reading them costs nothing.
    #[must_use]
    pub fn is_host(self) -> bool {
        matches!(self, Self::Cpu | Self::NdArray)
    }

    fn device(self) -> Result<Device, TrainError> {
        match self {
            Self::Cpu => Ok(Device::flex()),
            #[cfg(feature = "ndarray")]
            #[expect(deprecated, reason = "offered for comparison while burn has it")]
            Self::NdArray => Ok(Device::ndarray()),
            #[cfg(feature = "wgpu")]
            Self::Wgpu(index) => {
                use burn::tensor::DeviceKind;
                Ok(Device::wgpu(index.map_or(DeviceKind::DefaultDevice, DeviceKind::DiscreteGpu)))
            }
            #[cfg(feature = "cuda")]
            Self::Cuda(index) => Ok(Device::cuda(index)),
            #[allow(unreachable_patterns, reason = "all features may be on")]
            other => {
                let name = other.to_string();
                let feature = name.split(':').next().unwrap_or_default();
                let reason = format!(
                    "not compiled in; build with: cargo build --release -p bitnet-train --features {feature}"
                );
                Err(TrainError::DeviceName { name, reason })
            }
        }
    }

    fn lost(self, reason: String) -> TrainError {
        TrainError::DeviceLost { name: self.to_string(), reason }
    }
}

/// The number of this process on its machine, as launchers say it: each rank of a
/// machine takes a GPU of its own. 0 where nothing was launched.
fn local_rank(variable: impl Fn(&str) -> Option<String>) -> usize {
    const NAMES: [&str; 3] = ["OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID", "MPI_LOCALRANKID"];
    NAMES.iter().find_map(|name| variable(name)?.parse().ok()).unwrap_or(0)
}

/// Runs what may panic (GPU backends do where there is no GPU) and returns the
/// panic's message as an error, without the report on standard error.
fn quietly<T>(f: impl FnOnce() -> T) -> Result<T, String> {
    let hook = panic::take_hook();
    panic::set_hook(Box::new(|_| {}));
    let result = panic::catch_unwind(AssertUnwindSafe(f));
    panic::set_hook(hook);
    result.map_err(|payload| {
        let text = (payload.downcast_ref::<String>().map(String::as_str))
            .or_else(|| payload.downcast_ref::<&str>().copied());
        text.unwrap_or("the driver gave no reason").lines().next().unwrap_or_default().to_owned()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        let good = [
            ("cpu", DeviceChoice::Cpu),
            ("ndarray", DeviceChoice::NdArray),
            ("wgpu", DeviceChoice::Wgpu(None)),
            ("wgpu:1", DeviceChoice::Wgpu(Some(1))),
            ("cuda:0", DeviceChoice::Cuda(0)),
        ];
        for (name, choice) in good {
            assert_eq!(name.parse::<DeviceChoice>().unwrap(), choice);
            assert_eq!(choice.to_string(), name);
        }
        assert_eq!("cuda".parse(), Ok(DeviceChoice::Cuda(0)));
        for name in ["", "gpu", "cpu:1", "ndarray:0", "cuda:x", "wgpu:-1", "CPU"] {
            assert!(name.parse::<DeviceChoice>().is_err(), "{name}");
        }
    }

    #[test]
    fn a_rank_takes_the_device_of_its_number() {
        let launched = |name: &str| (name == "SLURM_LOCALID").then(|| "3".to_owned());
        assert_eq!((local_rank(launched), local_rank(|_| None)), (3, 0));
        assert!("cpu:rank".parse::<DeviceChoice>().is_err());
    }

    #[test]
    fn the_cpu_opens() {
        assert_eq!(DeviceChoice::Cpu.open().unwrap(), Device::flex());
    }

    #[cfg(not(feature = "cuda"))]
    #[test]
    fn a_missing_backend_names_its_feature() {
        let error = DeviceChoice::Cuda(1).open().unwrap_err();
        assert_eq!(error.exit(), bitnet_core::Exit::Usage);
        let error = error.to_string();
        assert!(error.starts_with("--device cuda:1: not compiled in"), "{error}");
        assert!(error.ends_with("--features cuda"), "{error}");
    }

    #[test]
    fn a_panic_becomes_a_message() {
        assert_eq!(quietly(|| panic!("no adapter {}", 3)).unwrap_err(), "no adapter 3");
        assert_eq!(quietly(|| 7), Ok(7));
    }
}
