//! The precision of the float products of a run.

use burn::tensor::{Device, FloatDType};
use serde::{Deserialize, Serialize};

use crate::TrainError;
use crate::devices::DeviceList;

/// In what matrices of floats are multiplied. Master weights, norms, softmax, loss,
/// optimizer and the integers of the ternary products are f32 in either.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// f32.
    #[default]
    F32,
    /// bf16, on devices that compute in it: attention, head and all gradients.
    Bf16,
}

impl Precision {
    /// Whether it is the default.
    #[must_use]
    pub fn is_f32(&self) -> bool {
        *self == Self::F32
    }

    /// Checks that every device computes in it.
    ///
    /// # Errors
    /// bf16 on the CPU, and on a device whose driver does not offer its arithmetic.
    pub fn check(self, names: &DeviceList, devices: &[Device]) -> Result<(), TrainError> {
        if self.is_f32() {
            return Ok(());
        }
        let refuse = |reason: String| Err(TrainError::value("precision", "\"bf16\"", reason));
        for (name, device) in names.iter().zip(devices) {
            if name.is_host() {
                return refuse(format!("is for GPUs; --device {name} multiplies in f32"));
            }
            if !device.clone().without_autodiff().supports_dtype(FloatDType::BF16) {
                return refuse(format!("--device {name} has no bf16 arithmetic; use \"f32\""));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::DeviceChoice;

    #[test]
    fn the_cpu_is_refused() {
        let (names, devices) = (DeviceChoice::Cpu.into(), [Device::flex().autodiff()]);
        Precision::F32.check(&names, &devices).unwrap();
        let error = Precision::Bf16.check(&names, &devices).unwrap_err();
        assert_eq!(error.exit(), bitnet_core::Exit::Usage);
        let text = error.to_string();
        assert_eq!(text, "precision = \"bf16\": is for GPUs; --device cpu multiplies in f32");
    }

    /// On whatever device wgpu finds, the answer is a run or a reason.
    #[cfg(feature = "wgpu")]
    #[test]
    fn wgpu_computes_in_it_or_says_that_it_does_not() {
        let Ok(device) = DeviceChoice::Wgpu(None).open() else { return };
        let names = DeviceChoice::Wgpu(None).into();
        match Precision::Bf16.check(&names, &[device.clone().autodiff()]) {
            Ok(()) => {
                let x = burn::tensor::Tensor::<2>::ones([3, 3], &device).cast(FloatDType::BF16);
                let sum = x.clone().matmul(x).cast(FloatDType::F32).sum().into_scalar::<f32>();
                assert_eq!(sum, 27.0);
            }
            Err(error) => assert!(error.to_string().contains("no bf16 arithmetic"), "{error}"),
        }
    }
}
