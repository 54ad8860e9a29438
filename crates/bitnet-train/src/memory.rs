//! How much memory the process has used.

use std::fs;

/// The most memory that was resident at any time, in bytes; none where the
/// system does not say (it does on Linux).
#[must_use]
pub fn peak_rss_bytes() -> Option<u64> {
    status_bytes("VmHWM:")
}

/// The memory that is resident now, in bytes; none where the system does not say.
#[must_use]
pub fn rss_bytes() -> Option<u64> {
    status_bytes("VmRSS:")
}

fn status_bytes(key: &str) -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|l| l.strip_prefix(key))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn it_grows_with_what_is_held() {
        let before = peak_rss_bytes().unwrap();
        let held = vec![1u8; 64 << 20];
        let after = peak_rss_bytes().unwrap();
        assert!(held.iter().all(|&x| x == 1));
        assert!(after >= before && after >= 64 << 20, "{before} {after}");
        assert!(rss_bytes().unwrap() >= 64 << 20);
    }
}
