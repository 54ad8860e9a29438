use super::*;

/// A faked `/sys/class/powercap`.
struct Tree(tempfile::TempDir);

impl Tree {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn root(&self) -> &Path {
        self.0.path()
    }

    fn zone(&self, zone: &str, name: &str, micro_joules: u64) -> &Self {
        let folder = self.root().join(zone);
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join("name"), format!("{name}\n")).unwrap();
        fs::write(folder.join("max_energy_range_uj"), "1000000000\n").unwrap();
        self.set(zone, micro_joules)
    }

    fn set(&self, zone: &str, micro_joules: u64) -> &Self {
        fs::write(self.root().join(zone).join("energy_uj"), format!("{micro_joules}\n")).unwrap();
        self
    }
}

fn used(tree: &Tree, change: impl FnOnce(&Tree)) -> Used {
    let meter = Meter::open(tree.root()).unwrap();
    let before = meter.read().unwrap();
    change(tree);
    meter.between(&before, &meter.read().unwrap())
}

#[test]
fn a_counter_that_wraps_goes_on() {
    let tree = Tree::new();
    tree.zone("intel-rapl:0", "package-0", 999_000_000);
    let used = used(&tree, |tree| {
        tree.set("intel-rapl:0", 3_000_000);
    });
    assert!((used.packages - 4.0).abs() < 1e-9, "{used:?}");
    assert_eq!(used.dram, None);
}

#[test]
fn packages_and_their_memory_add_up_and_nothing_counts_twice() {
    let tree = Tree::new();
    for (zone, name) in [
        ("intel-rapl", "control type"),
        ("intel-rapl:0", "package-0"),
        ("intel-rapl:1", "package-1"),
        ("intel-rapl:2", "psys"),
        ("intel-rapl-mmio:0", "package-0"),
        // Linked beside their package and inside its folder.
        ("intel-rapl:0:0", "core"),
        ("intel-rapl:0:1", "dram"),
        ("intel-rapl:0/intel-rapl:0:0", "core"),
        ("intel-rapl:0/intel-rapl:0:1", "dram"),
        // Inside its folder alone.
        ("intel-rapl:1/intel-rapl:1:0", "dram"),
    ] {
        tree.zone(zone, name, 0);
    }
    let meter = Meter::open(tree.root()).unwrap();
    assert_eq!(meter.domains(), ["package-0", "package-0/dram", "package-1", "package-1/dram"]);
    let used = used(&tree, |tree| {
        tree.set("intel-rapl:0", 5_000_000).set("intel-rapl:1", 7_000_000);
        tree.set("intel-rapl:2", 90_000_000).set("intel-rapl-mmio:0", 5_000_000);
        tree.set("intel-rapl:0:0", 4_000_000).set("intel-rapl:0/intel-rapl:0:0", 4_000_000);
        tree.set("intel-rapl:0:1", 500_000).set("intel-rapl:0/intel-rapl:0:1", 500_000);
        tree.set("intel-rapl:1/intel-rapl:1:0", 250_000);
    });
    assert!((used.packages - 12.0).abs() < 1e-9, "{used:?}");
    assert!((used.dram.unwrap() - 0.75).abs() < 1e-9, "{used:?}");
    assert!((used.joules() - 12.75).abs() < 1e-9);
}

#[test]
fn idle_power_is_subtracted() {
    let tree = Tree::new();
    tree.zone("intel-rapl:0", "package-0", 0);
    let recorder = Recorder::new(tree.root(), Duration::from_millis(1)).unwrap();
    assert_eq!(recorder.report().idle_watts, Some(0.0), "a counter that stands still");
    let recorder = Recorder { idle_watts: 10.0, ..recorder };
    let (seconds, joules) = recorder.measure(|| {
        let start = Instant::now();
        tree.set("intel-rapl:0", 50_000_000);
        start.elapsed().as_secs_f64()
    });
    let joules = joules.unwrap();
    // 50 J less 10 W over at least the time that the work saw.
    assert!(joules <= 50.0 - 10.0 * seconds && joules > 0.0, "{joules}");
}

#[test]
fn says_why_there_is_none() {
    let tree = Tree::new();
    let absent = Meter::open(&tree.root().join("none")).unwrap_err();
    assert!(absent.to_string().contains("no RAPL package counters"), "{absent}");
    // A control type without zones, and a platform counter alone.
    tree.zone("intel-rapl", "x", 0).zone("intel-rapl:0", "psys", 0);
    assert!(matches!(Meter::open(tree.root()), Err(Unavailable::Absent { .. })));
    tree.zone("intel-rapl:1", "package-0", 0);
    fs::write(tree.root().join("intel-rapl:1/energy_uj"), "many\n").unwrap();
    let error = Meter::open(tree.root()).unwrap_err().to_string();
    assert!(error.contains("intel-rapl:1/energy_uj: `many` is no number"), "{error}");
    fs::remove_file(tree.root().join("intel-rapl:1/energy_uj")).unwrap();
    assert!(matches!(Meter::open(tree.root()), Err(Unavailable::Unreadable { .. })));
    let report = EnergyReport::unavailable(&absent).to_string();
    assert!(report.starts_with("energy unavailable: "), "{report}");
}

/// The mode of a file does not stop root, so the error of the system stands for it.
#[test]
fn no_permission_is_told_from_other_errors() {
    let path = Path::new("/sys/class/powercap/intel-rapl:0/energy_uj");
    let error = unreadable(path, &io::ErrorKind::PermissionDenied.into());
    assert_eq!(error, Unavailable::Denied { path: path.to_path_buf() });
    assert!(error.to_string().contains("no permission"), "{error}");
}

/// Where the user is not root, a file that may not be read says so end to end.
#[cfg(unix)]
#[test]
fn a_counter_that_may_not_be_read_is_denied() {
    use std::os::unix::fs::PermissionsExt;

    let tree = Tree::new();
    tree.zone("intel-rapl:0", "package-0", 1);
    let counter = tree.root().join("intel-rapl:0/energy_uj");
    fs::set_permissions(&counter, fs::Permissions::from_mode(0o000)).unwrap();
    match (fs::read(&counter), Meter::open(tree.root())) {
        // Root reads everything.
        (Ok(_), opened) => assert!(opened.is_ok()),
        (Err(_), opened) => assert_eq!(opened.unwrap_err(), Unavailable::Denied { path: counter }),
    }
}

/// Counters that vanish while something is measured leave no number behind.
#[test]
fn a_counter_that_vanishes_gives_no_energy() {
    let tree = Tree::new();
    tree.zone("intel-rapl:0", "package-0", 0);
    let recorder = Recorder::new(tree.root(), Duration::from_millis(1)).unwrap();
    let (done, joules) = recorder.measure(|| {
        fs::remove_dir_all(tree.root().join("intel-rapl:0")).unwrap();
        true
    });
    assert!(done && joules.is_none());
}
