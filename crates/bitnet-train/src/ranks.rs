//! Several processes that train one model: data parallel over MPI (feature `mpi`).
//!
//! Every rank holds the whole model and takes its share of each step's micro-steps,
//! in the global order of the data; the gradients are added up on one rank and
//! sent to all, so that every rank has the same bits. Rank 0 alone writes.

use crate::TrainError;

/// The processes of a run, seen from one of them.
pub struct Ranks {
    #[cfg(feature = "mpi")]
    universe: mpi::environment::Universe,
}

impl std::fmt::Debug for Ranks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "rank {} of {}", self.rank(), self.size())
    }
}

/// Variables in which launchers say how many processes they started.
#[cfg(not(feature = "mpi"))]
const LAUNCHERS: [&str; 3] = ["OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE"];

#[cfg(not(feature = "mpi"))]
impl Ranks {
    /// This process alone.
    ///
    /// # Errors
    /// A launcher that started several, which this build could not join.
    pub fn open() -> Result<Self, TrainError> {
        for name in LAUNCHERS {
            let count = std::env::var(name).ok().and_then(|v| v.parse::<usize>().ok());
            if let Some(count) = count.filter(|n| *n > 1) {
                return Err(TrainError::Ranks(format!(
                    "{count} processes were launched ({name}), and this program was built for \
                     one; build with: cargo build --release -p bitnet-train --features mpi"
                )));
            }
        }
        Ok(Self {})
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
            Ok(Self { universe: mpi::initialize().ok_or_else(failed)? })
        }

        /// This process's number.
        #[must_use]
        pub fn rank(&self) -> usize {
            usize::try_from(self.universe.world().rank()).unwrap_or(0)
        }

        /// How many there are.
        #[must_use]
        pub fn size(&self) -> usize {
            usize::try_from(self.universe.world().size()).unwrap_or(1)
        }

        /// Adds up the values of all ranks, element by element: on rank 0, and then
        /// sent to all.
        pub fn sum(&self, values: &mut [f32]) {
            /// Elements sent at once: MPI counts in 32 bits.
            const CHUNK: usize = 1 << 24;
            if self.size() == 1 {
                return;
            }
            let world = self.universe.world();
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
            if self.size() == 1 {
                return value;
            }
            let world = self.universe.world();
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
            self.universe.world().barrier();
        }

        /// Ends all ranks with an exit code.
        pub fn abort(&self, code: u8) -> ! {
            if self.size() == 1 {
                std::process::exit(code.into());
            }
            self.universe.world().abort(code.into())
        }
    }
}

impl Ranks {
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
