//! The machine's limits: how fast a model's file is read, and the peak of an
//! instruction set's int8 product.

use std::hint::black_box;

use bitnet_kernels::Kernels;

use super::share::share_out;
use super::{Loaded, Setting, rounds};

/// Bytes that a thread reads before it takes the next piece.
const READ_BYTES: usize = 256 << 10;

/// Steps of the int8 probe that a thread does before it takes the next piece.
const PEAK_STEPS: usize = 2000;

/// What a probe measures.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Reading the file of a model, by its number, with the widest loads there
    /// are: GB/s.
    Read(usize),
    /// Multiply-adds of an instruction set, two operations each: GOP/s.
    Int8,
}

/// A limit at some number of threads.
#[derive(Debug)]
pub(super) struct Probe {
    pub(super) kind: Kind,
    pub(super) setting: Setting,
    /// 10^9 bytes or operations a second, round by round.
    pub(super) rates: Vec<f64>,
    /// Passes in a measurement, once known.
    passes: usize,
}

/// The limits of all settings, and those of one thread.
pub(super) fn probes(models: &[Loaded], settings: &[Setting]) -> Vec<Probe> {
    let mut probes: Vec<Probe> = Vec::new();
    let mut add = |kind, kernels, threads| {
        let setting = Setting { kernels, threads };
        if !probes.iter().any(|p| p.kind == kind && p.setting == setting) {
            probes.push(Probe { kind, setting, rates: Vec::new(), passes: 1 });
        }
    };
    for &Setting { kernels, threads } in settings {
        for threads in [threads, 1] {
            (0..models.len()).for_each(|i| add(Kind::Read(i), Kernels::detect(), threads));
            add(Kind::Int8, kernels, threads);
        }
    }
    probes
}

impl Probe {
    pub(super) fn name(&self) -> String {
        let what = match self.kind {
            Kind::Read(_) => "read",
            Kind::Int8 => "int8",
        };
        format!("{what} {} x{}", self.setting.kernels.name(), self.setting.threads)
    }

    pub(super) fn measure(&mut self, models: &[Loaded], counts: bool) {
        let (seconds, amount) = match self.kind {
            Kind::Read(model) => self.read(models[model].model.as_bytes()),
            Kind::Int8 => self.int8(),
        };
        if counts {
            self.rates.push(amount / seconds / 1e9);
        } else {
            self.passes = rounds(seconds / self.passes as f64);
        }
    }

    /// Reads all bytes some times; (seconds, bytes).
    fn read(&self, bytes: &[u8]) -> (f64, f64) {
        let Setting { kernels, threads } = self.setting;
        let pieces = bytes.len().div_ceil(READ_BYTES);
        let read = |i: usize, sum: &mut u32| {
            let at = i % pieces * READ_BYTES;
            let piece = &bytes[at..bytes.len().min(at + READ_BYTES)];
            *sum ^= black_box(kernels.read_probe(piece));
        };
        // Once untimed: a system that drops idle pages may have dropped these while
        // another model was measured.
        share_out(threads, pieces, || 0u32, read);
        let seconds = share_out(threads, pieces * self.passes, || 0u32, read);
        (seconds, bytes.len() as f64 * self.passes as f64)
    }

    /// (seconds, operations).
    fn int8(&self) -> (f64, f64) {
        let Setting { kernels, threads } = self.setting;
        let count = threads * 8 * self.passes;
        let steps = |_: usize, operations: &mut u64| {
            *operations += black_box(kernels.int8_peak_probe(PEAK_STEPS));
        };
        let seconds = share_out(threads, count, || 0u64, steps);
        let mut one = 0;
        steps(0, &mut one);
        (seconds, one as f64 * count as f64)
    }
}
