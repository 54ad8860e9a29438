//! Energy from the counters of the processor (RAPL), as Linux shows them in folders
//! `intel-rapl:*` below `/sys/class/powercap` (AMD's have the same name).
//!
//! Packages are added up, and the memory (`dram`), which no package contains. What lies
//! inside a package (`core`, `uncore`) or around all (`psys`) would be counted twice and
//! is left out, and so are the `intel-rapl-mmio:*` views of the same counters. Counters
//! start again from 0 behind `max_energy_range_uj`; a measurement must be shorter than
//! one round, which is a quarter of an hour at 250 W at the least.
//!
//! Source: Documentation/power/powercap/powercap.rst of Linux.

use std::fmt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};
use std::{fs, io, thread};

use serde::Serialize;

/// Where Linux shows the counters.
pub const POWERCAP: &str = "/sys/class/powercap";

/// How long the idle machine is measured.
pub const IDLE: Duration = Duration::from_secs(2);

/// Why there is no energy to report.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Unavailable {
    /// No counters: most virtual machines, systems that are not Linux.
    #[error("{root}: no RAPL package counters (most virtual machines have none)")]
    Absent {
        /// Where they were looked for.
        root: PathBuf,
    },
    /// Counters that this user may not read: since Linux 5.10 only root may.
    #[error("{path}: no permission (`sudo chmod a+r` on it gives it until the next start)")]
    Denied {
        /// The counter.
        path: PathBuf,
    },
    /// A file that cannot be read, or holds something else than it should.
    #[error("{path}: {why}")]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
}

/// A counter.
#[derive(Debug, Clone)]
struct Domain {
    /// `package-0`, or `package-0/dram`.
    name: String,
    counter: PathBuf,
    /// Where it starts again from 0, in µJ.
    range: u64,
    /// Whether it is the memory's.
    dram: bool,
}

/// The counters of a machine.
#[derive(Debug, Clone)]
pub struct Meter {
    domains: Vec<Domain>,
}

/// The values of all counters at one time.
#[derive(Debug, Clone)]
pub struct Reading {
    micro_joules: Vec<u64>,
    at: Instant,
}

/// What was used between two readings.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Used {
    /// Energy of the packages, in J.
    pub packages: f64,
    /// Energy of the memory, in J; none where it has no counter.
    pub dram: Option<f64>,
    /// Seconds between the readings.
    pub seconds: f64,
}

impl Used {
    /// All of it, in J.
    #[must_use]
    pub fn joules(&self) -> f64 {
        self.packages + self.dram.unwrap_or(0.0)
    }

    /// The mean power, in W.
    #[must_use]
    pub fn watts(&self) -> f64 {
        self.joules() / self.seconds.max(1e-9)
    }
}

impl Meter {
    /// The counters below `root` ([`POWERCAP`]), read once.
    ///
    /// # Errors
    /// There are none, or they cannot be read.
    pub fn open(root: &Path) -> Result<Self, Unavailable> {
        let mut domains = Vec::new();
        for zone in zones(root, "intel-rapl")? {
            let name = text(&zone.join("name"))?;
            if name.starts_with("package") {
                domains.push(Domain::new(&zone, name.clone(), false)?);
                domains.extend(dram(root, &zone, &name)?);
            }
        }
        if domains.is_empty() {
            return Err(Unavailable::Absent { root: root.to_path_buf() });
        }
        let meter = Self { domains };
        meter.read()?;
        Ok(meter)
    }

    /// The names of the counters that are added up.
    #[must_use]
    pub fn domains(&self) -> Vec<String> {
        self.domains.iter().map(|d| d.name.clone()).collect()
    }

    /// All counters now.
    ///
    /// # Errors
    /// One that cannot be read any more.
    pub fn read(&self) -> Result<Reading, Unavailable> {
        let micro_joules =
            self.domains.iter().map(|d| number(&d.counter)).collect::<Result<_, _>>()?;
        Ok(Reading { micro_joules, at: Instant::now() })
    }

    /// What was used between two readings of this meter, less than a round of the
    /// counters apart.
    #[must_use]
    pub fn between(&self, before: &Reading, after: &Reading) -> Used {
        let mut used = Used {
            packages: 0.0,
            dram: None,
            seconds: after.at.duration_since(before.at).as_secs_f64(),
        };
        for ((domain, &before), &after) in
            self.domains.iter().zip(&before.micro_joules).zip(&after.micro_joules)
        {
            let micro = match after.checked_sub(before) {
                Some(micro) => micro,
                None => domain.range.saturating_sub(before).saturating_add(after),
            };
            let joules = micro as f64 * 1e-6;
            if domain.dram {
                *used.dram.get_or_insert(0.0) += joules;
            } else {
                used.packages += joules;
            }
        }
        used
    }

    /// The power of the machine while this process sleeps.
    ///
    /// # Errors
    /// As [`Meter::read`].
    pub fn idle(&self, time: Duration) -> Result<Used, Unavailable> {
        let before = self.read()?;
        thread::sleep(time);
        Ok(self.between(&before, &self.read()?))
    }
}

impl Domain {
    fn new(zone: &Path, name: String, dram: bool) -> Result<Self, Unavailable> {
        let range = number(&zone.join("max_energy_range_uj"))?;
        Ok(Self { name, counter: zone.join("energy_uj"), range, dram })
    }
}

/// The counter of a package's memory, where it has one. Linux lists it beside the
/// package as well as inside its folder: it is one counter.
fn dram(root: &Path, package: &Path, name: &str) -> Result<Option<Domain>, Unavailable> {
    let Some(id) = package.file_name().and_then(|n| n.to_str()) else { return Ok(None) };
    for folder in [root, package] {
        for zone in zones(folder, id)? {
            if text(&zone.join("name"))? == "dram" {
                return Domain::new(&zone, format!("{name}/dram"), true).map(Some);
            }
        }
    }
    Ok(None)
}

/// The folders `parent:N` in `folder`, in order; none where there is no such folder.
fn zones(folder: &Path, parent: &str) -> Result<Vec<PathBuf>, Unavailable> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(unreadable(folder, &e)),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(|e| unreadable(folder, &e))?.path();
        let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
        let number = name.strip_prefix(parent).and_then(|n| n.strip_prefix(':'));
        if let Some(number) = number.and_then(|n| n.parse::<u32>().ok()) {
            found.push((number, path));
        }
    }
    found.sort();
    Ok(found.into_iter().map(|(_, path)| path).collect())
}

fn text(path: &Path) -> Result<String, Unavailable> {
    let text = fs::read_to_string(path).map_err(|e| unreadable(path, &e))?;
    Ok(text.trim().to_owned())
}

fn number(path: &Path) -> Result<u64, Unavailable> {
    let text = text(path)?;
    text.parse().map_err(|_| Unavailable::Unreadable {
        path: path.to_path_buf(),
        why: format!("`{text}` is no number of microjoules"),
    })
}

fn unreadable(path: &Path, error: &io::Error) -> Unavailable {
    let path = path.to_path_buf();
    match error.kind() {
        io::ErrorKind::PermissionDenied => Unavailable::Denied { path },
        _ => Unavailable::Unreadable { path, why: error.to_string() },
    }
}

/// A meter that knows what the idle machine uses.
#[derive(Debug, Clone)]
pub struct Recorder {
    meter: Meter,
    idle_watts: f64,
}

/// What a bench says of energy; the keys are stable.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct EnergyReport {
    /// Whether there are counters that can be read.
    pub available: bool,
    /// Why not.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// The counters that are added up.
    pub counters: Vec<String>,
    /// Power of the idle machine, which is subtracted.
    pub idle_watts: Option<f64>,
}

impl Recorder {
    /// Opens the counters below `root` and measures the idle machine for `time`.
    ///
    /// # Errors
    /// As [`Meter::open`].
    pub fn new(root: &Path, time: Duration) -> Result<Self, Unavailable> {
        let meter = Meter::open(root)?;
        let idle_watts = meter.idle(time)?.watts();
        Ok(Self { meter, idle_watts })
    }

    /// Runs `work`; its result, and the energy above that of the idle machine, in J:
    /// none where a counter could not be read.
    pub fn measure<T>(&self, work: impl FnOnce() -> T) -> (T, Option<f64>) {
        let before = self.meter.read();
        let result = work();
        let after = self.meter.read();
        let joules = before.and_then(|before| {
            let used = self.meter.between(&before, &after?);
            Ok(used.joules() - self.idle_watts * used.seconds)
        });
        (result, joules.ok())
    }

    /// What a report says of it.
    #[must_use]
    pub fn report(&self) -> EnergyReport {
        EnergyReport {
            available: true,
            reason: None,
            counters: self.meter.domains(),
            idle_watts: Some(self.idle_watts),
        }
    }
}

impl EnergyReport {
    /// There is no energy to report.
    #[must_use]
    pub fn unavailable(why: &Unavailable) -> Self {
        let reason = Some(why.to_string());
        Self { available: false, reason, counters: Vec::new(), idle_watts: None }
    }
}

impl fmt::Display for EnergyReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.reason, self.idle_watts) {
            (Some(reason), _) => write!(f, "energy unavailable: {reason}"),
            (None, idle) => write!(
                f,
                "energy of {}; {:.1} W of the idle machine subtracted",
                self.counters.join(", "),
                idle.unwrap_or(0.0)
            ),
        }
    }
}

#[cfg(test)]
mod tests;
