//! How much memory the process uses and the system has; where the system does
//! not say, none (Linux does).

use std::fs;
use std::path::Path;

/// The most memory that was resident at any time, in bytes.
#[must_use]
pub fn peak_rss_bytes() -> Option<u64> {
    field("/proc/self/status", "VmHWM:")
}

/// The memory that is resident now, in bytes.
#[must_use]
pub fn rss_bytes() -> Option<u64> {
    field("/proc/self/status", "VmRSS:")
}

/// The memory that new allocations can have without swapping, in bytes: of the
/// system, or what is left of a container's or a job's limit if that is less.
#[must_use]
pub fn available_bytes() -> Option<u64> {
    let system = field("/proc/meminfo", "MemAvailable:")?;
    let group = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    // Version 2 has one line, `0::/path`.
    let path = group.lines().find_map(|l| l.strip_prefix("0::/")).unwrap_or("");
    let limit = control_group_bytes(Path::new("/sys/fs/cgroup"), Path::new(path));
    Some(limit.map_or(system, |limit| limit.min(system)))
}

/// What is left of the memory limits of a control group (version 2) and those it
/// lies in; none where there is no limit.
fn control_group_bytes(root: &Path, path: &Path) -> Option<u64> {
    let left = |group: &Path| {
        let number = |file: &str| -> Option<u64> {
            fs::read_to_string(root.join(group).join(file)).ok()?.trim().parse().ok()
        };
        // Without a limit it says `max`.
        let limit = number("memory.max")?;
        let used = number("memory.current")?;
        let stat = fs::read_to_string(root.join(group).join("memory.stat")).unwrap_or_default();
        // Cached files count as used, but give way.
        let cached = stat.lines().find_map(|l| l.strip_prefix("inactive_file "));
        let cached = cached.and_then(|n| n.trim().parse().ok()).unwrap_or(0);
        Some(limit.saturating_sub(used.saturating_sub(cached)))
    };
    path.ancestors().filter_map(left).min()
}

/// What the process holds however small its model is, in bytes: what it has
/// allocated so far, and its code, which becomes resident as it runs.
#[must_use]
pub fn program_bytes() -> Option<u64> {
    let allocated = field("/proc/self/status", "RssAnon:")?;
    let file = field("/proc/self/status", "RssFile:")?;
    Some(allocated + file.max(code_bytes().unwrap_or(0)))
}

/// The code that is mapped from the program's own file, in bytes.
fn code_bytes() -> Option<u64> {
    let program = fs::read_link("/proc/self/exe").ok()?;
    let maps = fs::read_to_string("/proc/self/maps").ok()?;
    let length = |line: &str| {
        // `start-end r-xp offset device inode path`
        let mut words = line.split_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let executable = words.next()? == "r-xp" && line.ends_with(program.to_str()?);
        let address = |text| u64::from_str_radix(text, 16).ok();
        executable.then_some(address(end)?.checked_sub(address(start)?)?)
    };
    Some(maps.lines().filter_map(length).sum())
}

/// A line `name   123 kB` of a file, in bytes.
fn field(path: &str, name: &str) -> Option<u64> {
    let text = fs::read_to_string(path).ok()?;
    let line = text.lines().find_map(|l| l.strip_prefix(name))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn the_tightest_control_group_counts() {
        let root = tempfile::tempdir().unwrap();
        let path = Path::new("job/step");
        let write = |group: &str, file: &str, text: &str| {
            fs::create_dir_all(root.path().join(group)).unwrap();
            fs::write(root.path().join(group).join(file), text).unwrap();
        };
        assert_eq!(control_group_bytes(root.path(), path), None);
        write("job/step", "memory.max", "max\n");
        write("job/step", "memory.current", "500\n");
        assert_eq!(control_group_bytes(root.path(), path), None);
        write("job", "memory.max", "1000\n");
        write("job", "memory.current", "600\n");
        assert_eq!(control_group_bytes(root.path(), path), Some(400));
        write("job", "memory.stat", "anon 500\ninactive_file 90\n");
        assert_eq!(control_group_bytes(root.path(), path), Some(490));
        write("job/step", "memory.max", "700\n");
        assert_eq!(control_group_bytes(root.path(), path), Some(200));
        write("job/step", "memory.max", "100\n");
        assert_eq!(control_group_bytes(root.path(), path), Some(0));
    }

    #[test]
    fn it_grows_with_what_is_held() {
        let before = peak_rss_bytes().unwrap();
        let held = vec![1u8; 64 << 20];
        let (now, after) = (rss_bytes().unwrap(), peak_rss_bytes().unwrap());
        assert!(held.iter().all(|&x| x == 1));
        assert!(after >= before && after >= 64 << 20, "{before} {after}");
        assert!(now >= 64 << 20 && now <= peak_rss_bytes().unwrap(), "{now}");
        assert!(available_bytes().unwrap() > 0);
        let code = code_bytes().unwrap();
        assert!(code > 100_000, "{code}");
        assert!(program_bytes().unwrap() >= held.len() as u64 + code);
    }
}
