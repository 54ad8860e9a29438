//! Work shared between threads, timed without starting them.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Instant;

/// Runs `job` on `0..count`, whoever is free taking the next number, and returns
/// the seconds from when all threads stand ready until the last is done. Each
/// thread has a scratch value of its own.
pub(crate) fn share_out<T>(
    threads: usize,
    count: usize,
    scratch: impl Fn() -> T + Sync,
    job: impl Fn(usize, &mut T) + Sync,
) -> f64 {
    let [next, ready, done] = [const { AtomicUsize::new(0) }; 3];
    let go = AtomicBool::new(false);
    let work = |scratch: &mut T| loop {
        let i = next.fetch_add(1, Ordering::Relaxed);
        if i >= count {
            return;
        }
        job(i, scratch);
    };
    std::thread::scope(|s| {
        for _ in 1..threads {
            s.spawn(|| {
                let mut scratch = scratch();
                ready.fetch_add(1, Ordering::Release);
                wait(|| go.load(Ordering::Acquire));
                work(&mut scratch);
                done.fetch_add(1, Ordering::Release);
            });
        }
        let mut scratch = scratch();
        wait(|| ready.load(Ordering::Acquire) == threads - 1);
        let start = Instant::now();
        go.store(true, Ordering::Release);
        work(&mut scratch);
        wait(|| done.load(Ordering::Acquire) == threads - 1);
        start.elapsed().as_secs_f64()
    })
}

/// Spins, and gives way where there may be more threads than cores.
fn wait(until: impl Fn() -> bool) {
    let mut spins = 0u32;
    while !until() {
        spins += 1;
        if spins.is_multiple_of(1 << 10) {
            std::thread::yield_now();
        } else {
            std::hint::spin_loop();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_item_is_done_once() {
        for threads in [1, 2, 5] {
            let done = [const { AtomicUsize::new(0) }; 100];
            let seconds = share_out(
                threads,
                100,
                || 0usize,
                |i, mine| {
                    *mine += 1;
                    done[i].fetch_add(1, Ordering::Relaxed);
                },
            );
            assert!(seconds > 0.0);
            assert!(done.iter().all(|d| d.load(Ordering::Relaxed) == 1), "{threads}");
        }
    }
}
