//! Several processes that train one model: data parallel over MPI (feature `mpi`).
//!
//! Every rank holds the whole model and takes its share of each step's micro-steps,
//! in the global order of the data; the gradients are added up on one rank and
//! sent to all, so that every rank has the same bits. Rank 0 alone writes.

use crate::TrainError;
use crate::devices::DeviceList;

/// The processes of a run, seen from one of them.
pub struct Ranks {
    #[cfg(feature = "mpi")]
    /// None: this process alone, whatever launched it.
    universe: Option<mpi::environment::Universe>,
}

impl std::fmt::Debug for Ranks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "rank {} of {}", self.rank(), self.size())
    }
}

/// Variables in which launchers say how many processes they started.
const LAUNCHERS: [&str; 3] = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"];

#[cfg(not(feature = "mpi"))]
impl Ranks {
    /// This process, the only one.
    ///
    /// # Errors
    /// A launcher that started several, which this build could not join.
    pub fn open() -> Result<Self, TrainError> {
        Self::alone(
            "this program was built for one process; build with: cargo build --release -p \
             bitnet-train --features mpi",
        )
    }

    fn single() -> Self {
        Self {}
    }

    /// This process's number.
    #[must_use]
    pub fn rank(&self) -> usize {
        0
    }

    /// How many there are.
    #[must_use]
    pub fn size(&self) -> usize {
        1
    }

    /// Adds up the values of all ranks, element by element.
    pub fn sum(&self, _values: &mut [f32]) {}

    /// Adds up one number of all ranks.
    #[must_use]
    pub fn sum_f64(&self, value: f64) -> f64 {
        value
    }

    /// Waits for all ranks.
    pub fn barrier(&self) {}

    /// Ends all ranks with an exit code.
    pub fn abort(&self, code: u8) -> ! {
        std::process::exit(code.into())
    }
}

#[cfg(feature = "mpi")]
mod over_mpi {
    use mpi::collective::SystemOperation;
    use mpi::topology::SimpleCommunicator;
    use mpi::traits::{Communicator, CommunicatorCollectives, Root};

    use super::Ranks;
    use crate::TrainError;

    impl Ranks {
        /// Joins the processes that the launcher started.
        ///
        /// # Errors
        /// An MPI that cannot be initialised.
        pub fn open() -> Result<Self, TrainError> {
            let failed = || TrainError::Ranks("MPI cannot be initialised".into());
            Ok(Self { universe: Some(mpi::initialize().ok_or_else(failed)?) })
        }

        pub(super) fn single() -> Self {
            Self { universe: None }
        }

        fn world(&self) -> Option<SimpleCommunicator> {
            self.universe.as_ref().map(mpi::environment::Universe::world)
        }

        /// This process's number.
        #[must_use]
        pub fn rank(&self) -> usize {
            self.world().and_then(|w| usize::try_from(w.rank()).ok()).unwrap_or(0)
        }

        /// How many there are.
        #[must_use]
        pub fn size(&self) -> usize {
            self.world().and_then(|w| usize::try_from(w.size()).ok()).unwrap_or(1)
        }

        /// Adds up the values of all ranks, element by element: on rank 0, and then
        /// sent to all.
        pub fn sum(&self, values: &mut [f32]) {
            /// Elements sent at once: MPI counts in 32 bits.
            const CHUNK: usize = 1 << 24;
            let Some(world) = self.world().filter(|w| w.size() > 1) else { return };
            let root = world.process_at_rank(0);
            for values in values.chunks_mut(CHUNK) {
                if world.rank() == 0 {
                    let mut total = vec![0.0f32; values.len()];
                    root.reduce_into_root(&*values, &mut total[..], SystemOperation::sum());
                    values.copy_from_slice(&total);
                } else {
                    root.reduce_into(&*values, SystemOperation::sum());
                }
                root.broadcast_into(values);
            }
        }

        /// Adds up one number of all ranks.
        #[must_use]
        pub fn sum_f64(&self, value: f64) -> f64 {
            let Some(world) = self.world().filter(|w| w.size() > 1) else { return value };
            let root = world.process_at_rank(0);
            let mut total = 0.0;
            if world.rank() == 0 {
                root.reduce_into_root(&value, &mut total, SystemOperation::sum());
            } else {
                root.reduce_into(&value, SystemOperation::sum());
            }
            root.broadcast_into(&mut total);
            total
        }

        /// Waits for all ranks.
        pub fn barrier(&self) {
            if let Some(world) = self.world() {
                world.barrier();
            }
        }

        /// Ends all ranks with an exit code.
        pub fn abort(&self, code: u8) -> ! {
            match self.world() {
                Some(world) => world.abort(code.into()),
                None => std::process::exit(code.into()),
            }
        }
    }
}

impl Ranks {
    /// This process alone, for what several could not share.
    ///
    /// # Errors
    /// A launcher that started several, with `why` they cannot be.
    pub fn alone(why: &str) -> Result<Self, TrainError> {
        for name in LAUNCHERS {
            let count = std::env::var(name).ok().and_then(|v| v.parse::<usize>().ok());
            if let Some(count) = count.filter(|n| *n > 1) {
                let what = format!("{count} processes were launched ({name}), and {why}");
                return Err(TrainError::Ranks(what));
            }
        }
        Ok(Self::single())
    }

    /// Whether this is the rank that writes.
    #[must_use]
    pub fn is_first(&self) -> bool {
        self.rank() == 0
    }

    /// Whether any rank says so.
    #[must_use]
    pub fn any(&self, here: bool) -> bool {
        self.sum_f64(f64::from(u8::from(here))) > 0.0
    }

    /// Checks that each of several ranks has one device.
    ///
    /// # Errors
    /// Several ranks with a list of devices.
    pub fn check_devices(&self, devices: &DeviceList) -> Result<(), TrainError> {
        if self.size() == 1 || devices.count() == 1 {
            return Ok(());
        }
        let what = format!(
            "--device {devices}: each of {} ranks has one device; cuda:rank or wgpu:rank is that \
             of its number",
            self.size()
        );
        Err(TrainError::Ranks(what))
    }

    /// Checks that the micro-steps of a step can be shared out evenly.
    ///
    /// # Errors
    /// A number of micro-steps that is no multiple of the number of ranks.
    pub fn check(&self, micro_steps: usize) -> Result<(), TrainError> {
        let ranks = self.size();
        if micro_steps.is_multiple_of(ranks) {
            return Ok(());
        }
        let reason = format!(
            "a step has {micro_steps} micro-steps (batch.tokens / (batch.sequence · \
             batch.micro_batch)), which {ranks} ranks cannot share evenly"
        );
        Err(TrainError::Ranks(reason))
    }
}

#[cfg(all(test, not(feature = "mpi")))]
mod tests {
    use super::*;

    #[test]
    fn one_process_is_all() {
        let ranks = Ranks::open().unwrap();
        assert_eq!((ranks.rank(), ranks.size(), ranks.is_first()), (0, 1, true));
        assert_eq!(ranks.sum_f64(1.5), 1.5);
        assert!(ranks.any(true) && !ranks.any(false));
        ranks.check(7).unwrap();
    }
}
