//! How a wait on the ring sleeps: awake for a moment, then on a shared futex, until a deadline.

use super::queue::Patience;
use rustix::io::Errno;
use rustix::thread::futex::{self, Flags, Timespec};
use std::hint;
use std::sync::atomic::AtomicU32;
use std::time::{Duration, Instant};

/// Looks at the word between two looks at the clock, after each of which the processor is offered to others: whoever is
/// waited for may be queued for this one. A server that kept it for its whole time awake held up the writers that it had
/// just answered, by 0.2 ms where two processors were shared with a copy.
const TURNS: u32 = 16;

/// The patience of one wait.
#[derive(Clone, Copy, Debug)]
pub struct Futex {
    awake_until: Instant,
    deadline: Instant,
    turns: u32,
}

impl Futex {
    /// Stays awake for `awake`, gives up after `limit`.
    pub fn new(awake: Duration, limit: Duration) -> Self {
        let now = Instant::now();
        // A limit beyond all time is a year.
        let deadline = now.checked_add(limit).unwrap_or(now + Duration::from_secs(365 * 24 * 3600));
        Self { awake_until: now + awake, deadline, turns: 0 }
    }

    /// What is left until the deadline.
    pub fn remaining(&self) -> Duration {
        self.deadline.saturating_duration_since(Instant::now())
    }
}

/// One that only wakes.
pub const WAKER: Waker = Waker;

/// See [`WAKER`].
#[derive(Clone, Copy, Debug)]
pub struct Waker;

fn wake(word: &AtomicU32) {
    // Not private: the sleeper may be in the other process. It fails only for an address that is not mapped.
    let _ = futex::wake(word, Flags::empty(), 1);
}

impl Patience for Waker {
    fn spin(&mut self) -> bool {
        false
    }

    fn sleep(&mut self, _word: &AtomicU32, _expected: u32) -> bool {
        false
    }

    fn wake(&self, word: &AtomicU32) {
        wake(word);
    }
}

impl Patience for Futex {
    fn spin(&mut self) -> bool {
        self.turns += 1;
        if !self.turns.is_multiple_of(TURNS) {
            hint::spin_loop();
            return true;
        }
        if Instant::now() >= self.awake_until {
            self.turns = TURNS - 1;
            return false;
        }
        rustix::thread::sched_yield();
        true
    }

    fn sleep(&mut self, word: &AtomicU32, expected: u32) -> bool {
        let remaining = self.remaining();
        if remaining.is_zero() {
            return false;
        }
        let timeout = Timespec { tv_sec: remaining.as_secs() as i64, tv_nsec: remaining.subsec_nanos().into() };
        match futex::wait(word, Flags::empty(), expected, Some(&timeout)) {
            // Woken, or the word had changed, or a signal: look again.
            Ok(()) | Err(Errno::AGAIN | Errno::INTR) => true,
            // Time is up; or the kernel can't: then a wait without end would be worse.
            Err(_) => false,
        }
    }

    fn wake(&self, word: &AtomicU32) {
        wake(word);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wait_ends_at_its_deadline() {
        let word = AtomicU32::new(0);
        let mut futex = Futex::new(Duration::ZERO, Duration::from_millis(5));
        let begin = Instant::now();
        while futex.sleep(&word, 0) {}
        assert!(begin.elapsed() >= Duration::from_millis(5));
        assert!(!futex.sleep(&word, 0));
    }

    #[test]
    fn it_stays_awake_no_longer_than_asked() {
        let mut futex = Futex::new(Duration::ZERO, Duration::MAX);
        assert!((0..=TURNS).any(|_| !futex.spin()));
        let mut futex = Futex::new(Duration::from_secs(60), Duration::MAX);
        assert!((0..100 * TURNS).all(|_| futex.spin()));
    }

    #[test]
    fn a_changed_word_is_not_slept_on() {
        let mut futex = Futex::new(Duration::ZERO, Duration::from_secs(600));
        assert!(futex.sleep(&AtomicU32::new(1), 0));
    }
}
