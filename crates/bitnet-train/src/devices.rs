//! The devices that `--device` names: one, or several of one kind that train together.

use std::fmt;
use std::str::FromStr;

use burn::tensor::Device;

use crate::TrainError;
use crate::device::DeviceChoice;

/// One device, or several that share the micro-steps of every step (`replicas.rs`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DeviceList {
    first: DeviceChoice,
    others: Vec<DeviceChoice>,
}

impl DeviceList {
    /// Devices in the order in which they add up their gradients. What a user names is
    /// checked by [`FromStr`]; a library may name a device twice, to try what several do.
    #[must_use]
    pub fn new(first: DeviceChoice, others: Vec<DeviceChoice>) -> Self {
        Self { first, others }
    }

    /// The one that holds the optimizer's state, evaluates and writes samples.
    #[must_use]
    pub fn first(&self) -> DeviceChoice {
        self.first
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        1 + self.others.len()
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = DeviceChoice> + '_ {
        std::iter::once(self.first).chain(self.others.iter().copied())
    }

    /// Opens every one.
    ///
    /// # Errors
    /// As [`DeviceChoice::open`].
    pub fn open(&self) -> Result<Vec<Device>, TrainError> {
        self.iter().map(DeviceChoice::open).collect()
    }

    /// Checks that each has a micro-step in every step.
    ///
    /// # Errors
    /// More devices than micro-steps.
    pub fn check(&self, micro_steps: usize) -> Result<(), TrainError> {
        if self.count() <= micro_steps {
            return Ok(());
        }
        let reason = format!(
            "these are {} devices, a step has {micro_steps} micro-batch(es) (batch.tokens / \
             (batch.sequence · batch.micro_batch)): not one for each",
            self.count()
        );
        Err(TrainError::DeviceName { name: self.to_string(), reason })
    }
}

impl From<DeviceChoice> for DeviceList {
    fn from(first: DeviceChoice) -> Self {
        Self { first, others: Vec::new() }
    }
}

impl FromStr for DeviceList {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let names: Vec<&str> = text.split(',').map(str::trim).collect();
        let all: Vec<DeviceChoice> =
            names.iter().map(|name| name.parse()).collect::<Result<_, String>>()?;
        let [first, others @ ..] = &all[..] else {
            return Err("no device is named".to_owned());
        };
        for (at, (device, name)) in all.iter().zip(&names).enumerate().skip(1) {
            let kind = |device: &DeviceChoice| std::mem::discriminant(device);
            if kind(device) != kind(first) {
                return Err(format!("{first} and {device} are of two kinds: a run has one"));
            }
            if first.is_host() {
                return Err(format!("{first} is one device, and --threads its threads"));
            }
            if let Some(name) = names.iter().find(|name| name.ends_with(":rank")) {
                return Err(format!("{name} is the one device of a rank, not one of a list"));
            }
            if names[0] == "wgpu" || *name == "wgpu" {
                return Err("wgpu is the best device: in a list each needs its number".to_owned());
            }
            if all[..at].contains(device) {
                return Err(format!("{device} is named twice"));
            }
        }
        Ok(Self { first: *first, others: others.to_vec() })
    }
}

impl fmt::Display for DeviceList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.first)?;
        self.others.iter().try_for_each(|device| write!(f, ",{device}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_read_and_written() {
        for text in ["cpu", "ndarray", "wgpu", "cuda:0", "cuda:0,cuda:1", "wgpu:2,wgpu:0,wgpu:1"] {
            let list: DeviceList = text.parse().unwrap();
            assert_eq!(list.to_string(), text);
            assert_eq!(list.count(), text.split(',').count());
        }
        let list: DeviceList = "cuda, cuda:1".parse().unwrap();
        assert_eq!(list.to_string(), "cuda:0,cuda:1");
        assert_eq!(list.iter().collect::<Vec<_>>(), [DeviceChoice::Cuda(0), DeviceChoice::Cuda(1)]);
        assert_eq!(DeviceList::from(DeviceChoice::Cpu), "cpu".parse().unwrap());
    }

    #[test]
    fn a_bad_list_says_what_is_wrong() {
        for (text, message) in [
            ("", "expected cpu, ndarray"),
            ("cuda:0,", "expected cpu, ndarray"),
            ("cuda:0,gpu", "expected cpu, ndarray"),
            ("cuda:0,wgpu:1", "cuda:0 and wgpu:1 are of two kinds"),
            ("cpu,cuda:0", "cpu and cuda:0 are of two kinds"),
            ("cpu,cpu", "cpu is one device, and --threads"),
            ("cuda:0,cuda:1,cuda", "cuda:0 is named twice"),
            ("wgpu:0,wgpu:1,wgpu:1", "wgpu:1 is named twice"),
            ("wgpu,wgpu:0", "wgpu is the best device"),
            ("wgpu:0,wgpu", "wgpu is the best device"),
            ("cuda:rank,cuda:1", "cuda:rank is the one device of a rank"),
        ] {
            let error = text.parse::<DeviceList>().unwrap_err();
            assert!(error.starts_with(message), "{text}: {error}");
        }
    }

    #[test]
    fn every_device_has_a_micro_step() {
        let two: DeviceList = "cuda:0,cuda:1".parse().unwrap();
        two.check(2).unwrap();
        two.check(3).unwrap();
        let error = two.check(1).unwrap_err();
        assert_eq!(error.exit(), bitnet_core::Exit::Usage);
        let text = error.to_string();
        assert!(text.starts_with("--device cuda:0,cuda:1: these are 2 devices, a step has 1 "));
    }
}
