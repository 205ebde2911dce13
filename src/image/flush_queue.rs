//! Flushes that are asked for while one runs share the next one.

use std::io;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// Who flushes, and who is served by it.
#[derive(Debug, Default)]
pub struct FlushQueue {
    turns: Mutex<Turns>,
    ended: Condvar,
}

/// Turns are counted from 1.
#[derive(Debug, Default)]
struct Turns {
    started: u64,
    /// The last one that went well.
    succeeded: u64,
    is_running: bool,
    waiting: usize,
}

impl FlushQueue {
    /// Calls `flush`, one caller at a time; or returns when another's that began after this call has gone well.
    pub fn join(&self, flush: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let mut turns = self.turns();
        let wanted = turns.started + 1;
        while turns.is_running {
            turns.waiting += 1;
            turns = self.ended.wait(turns).unwrap_or_else(PoisonError::into_inner);
            turns.waiting -= 1;
        }
        if turns.succeeded >= wanted {
            return Ok(());
        }
        turns.started += 1;
        turns.is_running = true;
        drop(turns);
        let mut turn = Turn { queue: self, went_well: false };
        let flushed = flush();
        turn.went_well = flushed.is_ok();
        flushed
    }

    /// How many wait for the end of one that runs.
    #[cfg(test)]
    pub fn waiting(&self) -> usize {
        self.turns().waiting
    }

    fn turns(&self) -> MutexGuard<'_, Turns> {
        self.turns.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Ends however the flush does.
struct Turn<'a> {
    queue: &'a FlushQueue,
    went_well: bool,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        let mut turns = self.queue.turns();
        turns.is_running = false;
        if self.went_well {
            turns.succeeded = turns.started;
        }
        self.queue.ended.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering::SeqCst};
    use std::sync::mpsc::channel;

    /// How many flushes happen when one runs, then eight are asked for, and what those get: the second one ends as `second`.
    fn flushes(second: fn() -> io::Result<()>) -> (u32, usize) {
        let queue = &FlushQueue::default();
        let count = &AtomicU32::new(0);
        let (begun, begins) = channel();
        let (go_on, goes_on) = channel();
        let first = move || {
            begun.send(()).expect("waited for");
            goes_on.recv().expect("sent below");
            count.fetch_add(1, SeqCst);
            Ok(())
        };
        let next = move || if count.fetch_add(1, SeqCst) == 1 { second() } else { Ok(()) };
        std::thread::scope(|scope| {
            scope.spawn(move || queue.join(first));
            begins.recv().expect("sent above");
            let late: Vec<_> = (0..8).map(|_| scope.spawn(move || queue.join(next))).collect();
            while queue.waiting() < 8 {
                std::thread::yield_now();
            }
            assert_eq!(count.load(SeqCst), 0);
            go_on.send(()).expect("waited for");
            let good = late.into_iter().filter_map(|thread| thread.join().expect("no panic").ok()).count();
            (count.load(SeqCst), good)
        })
    }

    #[test]
    fn those_who_come_during_a_flush_share_the_next_one() {
        assert_eq!(flushes(|| Ok(())), (2, 8));
    }

    #[test]
    fn a_flush_that_fails_serves_nobody_else() {
        assert_eq!(flushes(|| Err(io::ErrorKind::StorageFull.into())), (3, 7));
    }
}
