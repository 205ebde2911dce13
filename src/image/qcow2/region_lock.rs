//! Who may move the clusters of a guest range: many that leave them where they are, or one that does not.

use std::ops::Range;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// What a holder does with the clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Reads or overwrites them where they are.
    Stay,
    /// Gives them another place.
    Move,
}

/// Locks on ranges of guest clusters, granted in the order in which they were asked for.
#[derive(Debug, Default)]
pub struct RegionLock {
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Queue {
    next_id: u64,
    /// How many wait: waking nobody would cost a system call all the same.
    waiting: usize,
    /// Those that hold and those that wait, the earliest first.
    entries: Vec<Entry>,
}

#[derive(Debug)]
struct Entry {
    id: u64,
    clusters: Range<u64>,
    mode: Mode,
}

/// Holds its range until it is dropped.
#[must_use = "dropped, it no longer holds"]
#[derive(Debug)]
pub struct Region<'a> {
    lock: &'a RegionLock,
    id: u64,
}

impl RegionLock {
    /// Waits until nobody who came before is in the way.
    pub fn hold(&self, clusters: Range<u64>, mode: Mode) -> Region<'_> {
        let mut queue = self.queue();
        let id = queue.next_id;
        queue.next_id += 1;
        queue.entries.push(Entry { id, clusters, mode });
        while queue.is_blocked(id) {
            queue.waiting += 1;
            queue = self.changed.wait(queue).unwrap_or_else(PoisonError::into_inner);
            queue.waiting -= 1;
        }
        Region { lock: self, id }
    }

    /// Those that hold and those that wait.
    #[cfg(test)]
    pub fn queued(&self) -> usize {
        self.queue().entries.len()
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Queue {
    /// Some earlier entry overlaps, and one of both moves clusters.
    fn is_blocked(&self, id: u64) -> bool {
        let at = self.entries.iter().position(|entry| entry.id == id).expect("it is in the queue until dropped");
        let own = &self.entries[at];
        self.entries[..at].iter().any(|other| {
            let overlap = other.clusters.start < own.clusters.end && own.clusters.start < other.clusters.end;
            overlap && (other.mode == Mode::Move || own.mode == Mode::Move)
        })
    }
}

impl Drop for Region<'_> {
    fn drop(&mut self) {
        let mut queue = self.lock.queue();
        queue.entries.retain(|entry| entry.id != self.id);
        let is_awaited = queue.waiting > 0;
        drop(queue);
        if is_awaited {
            self.lock.changed.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};

    fn is_blocked(lock: &RegionLock, clusters: Range<u64>, mode: Mode) -> bool {
        let mut queue = lock.queue();
        let id = queue.next_id;
        queue.entries.push(Entry { id, clusters, mode });
        let blocked = queue.is_blocked(id);
        queue.entries.pop();
        blocked
    }

    #[test]
    fn only_one_moves_a_cluster_and_nobody_uses_it_meanwhile() {
        let lock = RegionLock::default();
        let stay = lock.hold(2..5, Mode::Stay);
        assert!(!is_blocked(&lock, 4..6, Mode::Stay));
        assert!(is_blocked(&lock, 4..6, Mode::Move));
        assert!(!is_blocked(&lock, 5..6, Mode::Move));
        drop(stay);
        let _moves = lock.hold(4..6, Mode::Move);
        assert!(is_blocked(&lock, 5..9, Mode::Stay));
        assert!(is_blocked(&lock, 0..5, Mode::Move));
    }

    #[test]
    fn movers_of_one_cluster_take_turns() {
        let lock = RegionLock::default();
        let inside = AtomicU32::new(0);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        let _region = lock.hold(3..4, Mode::Move);
                        assert_eq!(inside.fetch_add(1, Ordering::SeqCst), 0);
                        inside.fetch_sub(1, Ordering::SeqCst);
                    }
                });
            }
        });
        assert!(lock.queue().entries.is_empty());
    }
}
