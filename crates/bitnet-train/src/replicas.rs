//! Several devices of one process that train one model: data parallel.
//!
//! The first device has the model, the optimizer and its state. A step gives every other
//! one a copy of the weights and deals the micro-steps out in turn, in the order of the
//! data; a thread for each device computes its gradients. They are added up on the first
//! one, device by device in the order of the list, and the update is made there.
//!
//! So a step is the same whichever device is ready first. With as many micro-steps as
//! devices the sums are those of one device, bit for bit where the devices compute
//! alike; with more, the same numbers are added in another order: device by device
//! instead of micro-step by micro-step.

use std::panic;
use std::thread;

use bitnet_core::ModelConfig;
use bitnet_data::Batch;
use burn::module::Module;
use burn::tensor::Device;

use crate::corpus::{self, Reduction};
use crate::distill::{DistillConfig, Teacher};
use crate::model::Transformer;
use crate::optim::GradientSum;
use crate::{TrainError, recompute};

/// The devices of a run, each with a teacher of its own where one is followed.
#[derive(Debug)]
pub(crate) struct Replicas {
    members: Vec<Member>,
}

#[derive(Debug)]
struct Member {
    /// With autodiff.
    device: Device,
    teacher: Option<Teacher>,
}

/// How the loss of a micro-batch is computed.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Objective {
    /// The token that ends a document, where documents do not see each other.
    pub(crate) end: Option<u32>,
    /// What the loss of a batch is.
    pub(crate) reduction: Reduction,
    /// Whether blocks are run again in the backward pass.
    pub(crate) recompute: bool,
}

impl Replicas {
    /// Those of devices with autodiff; reads the teacher onto each.
    ///
    /// # Errors
    /// As [`Teacher::open`].
    pub(crate) fn open(
        devices: Vec<Device>,
        distill: Option<&DistillConfig>,
        student: &ModelConfig,
    ) -> Result<Self, TrainError> {
        let member = |device: Device| {
            let plain = device.clone().without_autodiff();
            let teacher = distill.map(|d| Teacher::open(d, student, &plain)).transpose()?;
            Ok(Member { device, teacher })
        };
        Ok(Self { members: devices.into_iter().map(member).collect::<Result<_, TrainError>>()? })
    }

    /// How many there are.
    pub(crate) fn count(&self) -> usize {
        self.members.len()
    }

    /// The teacher, as the first device has it.
    pub(crate) fn teacher(&self) -> Option<&Teacher> {
        self.members.first()?.teacher.as_ref()
    }

    /// Begins a step of `model`, which is on the first device.
    pub(crate) fn begin<'s>(&'s self, model: &'s Transformer) -> Shares<'s> {
        let others = self.members.iter().skip(1);
        Shares {
            replicas: self,
            model,
            copies: others.map(|m| model.clone().fork(&m.device)).collect(),
            sums: self.members.iter().map(|_| GradientSum::default()).collect(),
        }
    }
}

/// What every device has added up in one step.
pub(crate) struct Shares<'s> {
    replicas: &'s Replicas,
    model: &'s Transformer,
    copies: Vec<Transformer>,
    sums: Vec<GradientSum>,
}

impl Shares<'_> {
    /// Adds the gradients of neighbouring micro-batches, one for each device at most, all
    /// at the same time. Their losses and how many tokens count, in the same order.
    ///
    /// # Errors
    /// A device that stopped computing.
    pub(crate) fn add(
        &mut self,
        batches: &[Batch],
        objective: Objective,
    ) -> Result<Vec<(f32, u64)>, TrainError> {
        debug_assert!(batches.len() <= self.sums.len());
        let models = std::iter::once(self.model).chain(&self.copies);
        let members = self.replicas.members.iter().zip(models).zip(&mut self.sums);
        let mut tasks = members.zip(batches).map(|(((member, model), sum), batch)| {
            let task = move || {
                let Objective { end, reduction, recompute } = objective;
                let (examples, tokens) = corpus::examples(batch, end, reduction, &member.device);
                let teacher = member.teacher.as_ref();
                let loss = recompute::gradients(model, &examples, teacher, recompute, sum);
                (loss, tokens)
            };
            (task, &member.device)
        });
        let Some((mut first, _)) = tasks.next() else { return Ok(Vec::new()) };
        // burn queues work by thread, and lets memory go that the queue of an ended thread
        // still means to use: such a thread waits for its queue.
        let others = tasks.map(|(mut task, device)| {
            move || {
                let value = task();
                device.sync().map_err(|error| TrainError::DeviceStopped(error.to_string()))?;
                Ok(value)
            }
        });
        thread::scope(|scope| {
            let others: Vec<_> = others.map(|task| scope.spawn(task)).collect();
            let mut all = vec![Ok(first())];
            let ended = others.into_iter().map(thread::ScopedJoinHandle::join);
            all.extend(ended.map(|r| r.unwrap_or_else(|broken| panic::resume_unwind(broken))));
            all.into_iter().collect()
        })
    }

    /// The sum of all devices, on the first one.
    pub(crate) fn finish(self) -> GradientSum {
        let mut sums = self.sums.into_iter();
        let mut all = sums.next().unwrap_or_default();
        if let Some(first) = self.replicas.members.first() {
            let device = first.device.clone().without_autodiff();
            sums.for_each(|sum| all.add_device(sum, &device));
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two sequences of twelve tokens.
    fn batch(at: u32) -> Batch {
        let token = |i: u32| (i * 37 + at * 101) % 320;
        Batch {
            inputs: (0..24).map(token).collect(),
            targets: (1..25).map(token).collect(),
            loss_mask: None,
            begins: None,
            batch: 2,
            context: 12,
        }
    }

    /// Losses and gradients of `batches` micro-steps on so many devices.
    fn sums(device: &Device, count: usize, batches: u32) -> (Vec<f32>, Vec<Vec<f32>>) {
        let device = device.clone().autodiff();
        let config = ModelConfig::tiny();
        let replicas = Replicas::open(vec![device.clone(); count], None, &config).unwrap();
        let model = Transformer::new(&config, 1, &device);
        let mut shares = replicas.begin(&model);
        let objective = Objective { end: None, reduction: Reduction::Mean, recompute: false };
        let batches: Vec<Batch> = (0..batches).map(batch).collect();
        let mut losses = Vec::new();
        for round in batches.chunks(count) {
            let values = shares.add(round, objective).unwrap();
            assert!(values.iter().all(|&(_, tokens)| tokens == 24));
            losses.extend(values.into_iter().map(|(loss, _)| loss));
        }
        let gradients = shares.finish().values();
        (losses, gradients.into_iter().map(|g| g.expect("every parameter has one")).collect())
    }

    /// `exact`: whether a product is the same whatever runs beside it.
    fn devices_add_up_to_one(device: &Device, exact: bool) {
        let (losses, one) = sums(device, 1, 4);
        assert_eq!(losses.len(), 4);
        for count in [2, 3, 4] {
            let (same, several) = sums(device, count, 4);
            assert_eq!(losses.len(), same.len());
            for (a, b) in losses.iter().zip(&same) {
                assert!(a == b || !exact && (a - b).abs() < 1e-5, "{count}: {a} and {b}");
            }
            for (at, (a, b)) in one.iter().zip(&several).enumerate() {
                let size = a.iter().fold(1e-6f32, |m, v| m.max(v.abs()));
                for (a, b) in a.iter().zip(b) {
                    // Four numbers in another order; the same order where each device has one.
                    let bound = if count == 4 && exact { 0.0 } else { 2e-6 * size };
                    assert!((a - b).abs() <= bound, "{count}, parameter {at}: {a} and {b}");
                }
            }
        }
    }

    #[test]
    fn copies_on_the_cpu_add_up_to_one() {
        devices_add_up_to_one(&Device::flex(), true);
    }

    /// On whatever device wgpu finds; `scripts/check-wgpu` runs it.
    #[cfg(feature = "wgpu")]
    #[test]
    fn copies_on_wgpu_add_up_to_one() {
        use crate::device::DeviceChoice;

        match DeviceChoice::Wgpu(None).open() {
            Ok(device) => devices_add_up_to_one(&device, false),
            // Built with wgpu on a machine that has no driver.
            Err(error) => assert!(matches!(error, TrainError::DeviceLost { .. }), "{error}"),
        }
    }
}
