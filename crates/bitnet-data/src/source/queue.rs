//! The space between the threads that read files and the one that gathers what
//! they read: one queue a reader (a lane), and one bound on the bytes of all.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard};

/// Bytes that all lanes together read ahead, at most. A lane whose turn it is
/// may go beyond, or the one who waits for it would wait for ever.
const AHEAD_BYTES: u64 = 32 << 20;

/// Blocks from several lanes, taken in turns: one from each lane that has not
/// ended. The order depends on what the lanes hold, not on their speed.
pub(super) struct Queue<T> {
    state: Mutex<State<T>>,
    changed: Condvar,
}

struct State<T> {
    lanes: Vec<Lane<T>>,
    /// Bytes queued, and those that a lane is about to read.
    bytes: u64,
    /// The lane whose block is taken next.
    turn: usize,
    /// Nobody takes blocks any more.
    closed: bool,
}

struct Lane<T> {
    blocks: VecDeque<(T, u64)>,
    ended: bool,
}

impl<T> Queue<T> {
    pub(super) fn new(lanes: usize) -> Self {
        let lane = || Lane { blocks: VecDeque::new(), ended: false };
        let lanes = (0..lanes).map(|_| lane()).collect();
        Self {
            state: Mutex::new(State { lanes, bytes: 0, turn: 0, closed: false }),
            changed: Condvar::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        // No code that can panic runs under the lock.
        self.state.lock().unwrap_or_else(|e| e.into_inner())
    }

    fn wait<'a>(&self, state: MutexGuard<'a, State<T>>) -> MutexGuard<'a, State<T>> {
        self.changed.wait(state).unwrap_or_else(|e| e.into_inner())
    }

    /// Waits until `lane` may read `bytes` more; `false` where it should stop.
    pub(super) fn reserve(&self, lane: usize, bytes: u64) -> bool {
        let mut state = self.lock();
        loop {
            if state.closed {
                return false;
            }
            let its_turn = state.turn == lane && state.lanes[lane].blocks.is_empty();
            if its_turn || state.bytes == 0 || state.bytes + bytes <= AHEAD_BYTES {
                state.bytes += bytes;
                return true;
            }
            state = self.wait(state);
        }
    }

    /// Hands over a block of `bytes` for which `reserved` were reserved.
    pub(super) fn push(&self, lane: usize, block: T, bytes: u64, reserved: u64) {
        let mut state = self.lock();
        state.bytes = state.bytes - reserved + bytes;
        state.lanes[lane].blocks.push_back((block, bytes));
        self.changed.notify_all();
    }

    /// Gives back what was reserved and not needed.
    pub(super) fn release(&self, reserved: u64) {
        self.lock().bytes -= reserved;
        self.changed.notify_all();
    }

    /// No more blocks come from `lane`.
    pub(super) fn end(&self, lane: usize) {
        self.lock().lanes[lane].ended = true;
        self.changed.notify_all();
    }

    /// The next block and its bytes; `None` behind the last.
    pub(super) fn pop(&self) -> Option<(T, u64)> {
        let mut state = self.lock();
        let mut skipped = 0;
        while skipped < state.lanes.len() {
            let turn = state.turn;
            let next = (turn + 1) % state.lanes.len();
            if let Some((block, bytes)) = state.lanes[turn].blocks.pop_front() {
                state.bytes -= bytes;
                state.turn = next;
                self.changed.notify_all();
                return Some((block, bytes));
            }
            if state.lanes[turn].ended {
                state.turn = next;
                skipped += 1;
                self.changed.notify_all();
            } else {
                skipped = 0;
                state = self.wait(state);
            }
        }
        None
    }

    /// Tells the lanes to stop.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn blocks_come_in_turns_whatever_the_lanes_speed() {
        for slow in 0..3 {
            let queue = Queue::new(3);
            let taken = std::thread::scope(|scope| {
                for (lane, count) in [3u64, 1, 2].into_iter().enumerate() {
                    let queue = &queue;
                    scope.spawn(move || {
                        for block in 0..count {
                            if lane == slow {
                                std::thread::sleep(Duration::from_millis(5));
                            }
                            assert!(queue.reserve(lane, AHEAD_BYTES));
                            queue.push(lane, (lane, block), AHEAD_BYTES, AHEAD_BYTES);
                        }
                        queue.end(lane);
                    });
                }
                std::iter::from_fn(|| Some(queue.pop()?.0)).collect::<Vec<_>>()
            });
            assert_eq!(taken, [(0, 0), (1, 0), (2, 0), (0, 1), (2, 1), (0, 2)]);
            assert_eq!(queue.lock().bytes, 0);
        }
    }

    #[test]
    fn a_lane_waits_for_room_and_ends_when_closed() {
        let queue = Queue::new(2);
        assert!(queue.reserve(1, AHEAD_BYTES));
        queue.push(1, (), AHEAD_BYTES, AHEAD_BYTES);
        // Lane 0 is waited for: it may go on though the space is used up.
        assert!(queue.reserve(0, 1));
        queue.release(1);
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| queue.reserve(1, 1));
            queue.close();
            assert!(!waiting.join().unwrap());
        });
    }
}
