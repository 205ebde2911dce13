//! The writer's gate: who is inside a bracket, and may the next one come in. Its fast path is all that a write costs
//! while no backup runs: one addition and one load to enter, one subtraction and one load to leave.
//!
//! **The freeze.** Entering adds to a counter, then reads the state; freezing stores the state, then sums the counters.
//! Both are sequentially consistent, so one sees the other: either the entrant sees `FROZEN` and takes its count back,
//! or the sum has its count. **The sum** is over several counters, read one after the other, and a write may begin and
//! end on different threads. Still it is never too small: every write that passed the gate had been counted before the
//! state was stored, so the sum sees all their beginnings; an ending that it sees only takes away one of those; and a
//! count that is taken back is on the same counter as its addition. So a sum of zero means that nothing is in flight.
//!
//! **Wake-ups.** Leaving subtracts, then reads the state; if it is frozen the caller rings the freezer's bell. By the
//! same argument either the freezer's sum has the subtraction, or the bell rings after it.

use crate::sync::atomic::{AtomicI64, AtomicU32, Ordering};
use crate::sync::{Condvar, Mutex};
use std::time::Duration;

/// Number of counters. Threads are spread over them.
#[cfg(not(any(loom, shuttle)))]
pub const COUNTERS: usize = 32;
/// Number of counters. Few, since a model checker looks at all of them.
#[cfg(any(loom, shuttle))]
pub const COUNTERS: usize = 2;

/// Between an access and the next where both are sequentially consistent. loom takes such accesses for
/// acquire-release, which is weaker; its model gets the fence that stands for them.
#[inline]
fn in_one_order() {
    #[cfg(loom)]
    crate::sync::atomic::fence(Ordering::SeqCst);
}

/// What a write finds at the gate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Passage {
    /// No backup: write.
    Open,
    /// Counted, but ask the session before writing.
    Trapping,
    /// Not counted: wait for the thaw and enter again.
    Frozen,
}

const OPEN: u32 = 0;
const FROZEN: u32 = 1;
const TRAPPING: u32 = 2;

/// Two cache lines, since processors fetch them in pairs.
#[repr(align(128))]
#[derive(Debug)]
struct Counter(AtomicI64);

/// See the module.
#[derive(Debug)]
pub struct Gate {
    state: AtomicU32,
    counters: [Counter; COUNTERS],
    frozen: Mutex<()>,
    thawed: Condvar,
}

impl Default for Gate {
    fn default() -> Self {
        Self {
            state: AtomicU32::new(OPEN),
            counters: std::array::from_fn(|_| Counter(AtomicI64::new(0))),
            frozen: Mutex::new(()),
            thawed: Condvar::new(),
        }
    }
}

impl Gate {
    /// Enters with counter `mine`, any number. After [`Passage::Frozen`] the caller has to ring the freezer's bell, for
    /// its count was there for a moment.
    #[inline]
    pub fn enter(&self, mine: usize) -> Passage {
        let counter = &self.counters[mine % COUNTERS].0;
        counter.fetch_add(1, Ordering::SeqCst);
        in_one_order();
        match self.state.load(Ordering::SeqCst) {
            OPEN => Passage::Open,
            FROZEN => {
                counter.fetch_sub(1, Ordering::SeqCst);
                Passage::Frozen
            }
            _ => Passage::Trapping,
        }
    }

    /// Enters without asking: for writes that the freeze itself waits for.
    pub fn enter_frozen(&self, mine: usize) {
        self.counters[mine % COUNTERS].0.fetch_add(1, Ordering::SeqCst);
    }

    /// Leaves, from any thread. True: somebody freezes, ring the bell.
    #[inline]
    #[must_use]
    pub fn leave(&self, mine: usize) -> bool {
        // Also release: what this write did comes before the instant.
        self.counters[mine % COUNTERS].0.fetch_sub(1, Ordering::SeqCst);
        in_one_order();
        self.state.load(Ordering::SeqCst) == FROZEN
    }

    /// From now on nobody enters. Those inside are [`Gate::in_flight`].
    pub fn freeze(&self) {
        self.state.store(FROZEN, Ordering::SeqCst);
        in_one_order();
    }

    /// While frozen: writes inside, at least. Negative when a program ended more writes than it began.
    pub fn in_flight(&self) -> i64 {
        in_one_order();
        self.counters.iter().map(|counter| counter.0.load(Ordering::SeqCst)).sum()
    }

    /// Ends a freeze or a trap: who waits comes in, and nobody asks.
    pub fn open(&self) {
        self.set(OPEN);
    }

    /// Ends a freeze: who waits comes in and asks.
    pub fn trap(&self) {
        self.set(TRAPPING);
    }

    fn set(&self, state: u32) {
        // Under the lock, so that it does not fall between a waiter's look and its sleep.
        let guard = self.frozen.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        self.state.store(state, Ordering::SeqCst);
        drop(guard);
        self.thawed.notify_all();
    }

    /// What an entrant would find, without entering.
    #[inline]
    pub fn look(&self) -> Passage {
        match self.state.load(Ordering::SeqCst) {
            OPEN => Passage::Open,
            FROZEN => Passage::Frozen,
            _ => Passage::Trapping,
        }
    }

    /// Is it frozen?
    pub fn is_frozen(&self) -> bool {
        self.state.load(Ordering::SeqCst) == FROZEN
    }

    /// Waits for the end of a freeze, at most `timeout`. False: it is still frozen.
    pub fn wait_thaw(&self, timeout: Duration) -> bool {
        let guard = self.frozen.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if !self.is_frozen() {
            return true;
        }
        let waited = self.thawed.wait_timeout(guard, timeout).unwrap_or_else(|poisoned| poisoned.into_inner());
        drop(waited);
        !self.is_frozen()
    }
}

#[cfg(test)]
mod tests;
