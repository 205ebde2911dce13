//! Who carries out a request. A change may wait for a backup: it never takes the last threads that could answer a read.
//!
//! The threads that take requests carry out most themselves, since a hand-over costs a wake-up. So many of them may be in
//! changes at once; further changes are handed to threads of their own, made when needed, and ended when idle.

use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Threads for what was handed over.
const MOST_THREADS: usize = 64;
/// Bytes that wait to be written. Whoever brings more waits, and with him everybody at the latest when no thread is left:
/// memory has an end, and a wait for a backup has one too.
const MOST_BYTES: usize = 128 << 20;
/// An idle thread ends.
const IDLE: Duration = Duration::from_secs(2);

type Job = Box<dyn FnOnce() + Send>;

/// See the module.
pub struct Work {
    in_flight: AtomicUsize,
    closed: AtomicBool,
    /// Requests that change the disk, on threads that take requests.
    changing: AtomicUsize,
    most_changing: usize,
    queue: Mutex<Queue>,
    /// A job, for idle threads.
    more: Condvar,
    /// Room, or an end of what is in flight.
    less: Condvar,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<(usize, Job)>,
    bytes: usize,
    threads: usize,
    idle: usize,
}

/// A request in flight.
pub struct Turn(Arc<Work>);

/// A change on the thread that took it.
pub struct Place<'a>(&'a Work);

impl Drop for Turn {
    fn drop(&mut self) {
        if self.0.in_flight.fetch_sub(1, SeqCst) == 1 && self.0.is_closed() {
            // Under the lock, so that who is about to wait hears it.
            let _queue = self.0.queue();
            self.0.less.notify_all();
        }
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.changing.fetch_sub(1, SeqCst);
    }
}

impl Work {
    /// For requests that `threads` threads take; half of them are kept free of changes.
    pub fn new(threads: usize) -> Self {
        Self {
            in_flight: AtomicUsize::new(0),
            closed: AtomicBool::new(false),
            changing: AtomicUsize::new(0),
            most_changing: threads / 2,
            queue: Mutex::default(),
            more: Condvar::new(),
            less: Condvar::new(),
        }
    }

    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A request begins; `None`: no more.
    pub fn begin(self: &Arc<Self>) -> Option<Turn> {
        self.in_flight.fetch_add(1, SeqCst);
        let turn = Turn(self.clone());
        (!self.is_closed()).then_some(turn)
    }

    /// Is the end asked for?
    pub fn is_closed(&self) -> bool {
        self.closed.load(SeqCst)
    }

    /// No request begins any more. Waits until `deadline` for those in flight; true: there are none.
    pub fn close(&self, deadline: Instant) -> bool {
        self.closed.store(true, SeqCst);
        let mut queue = self.queue();
        while self.in_flight.load(SeqCst) > 0 {
            let rest = deadline.saturating_duration_since(Instant::now());
            if rest.is_zero() {
                return false;
            }
            queue = self.less.wait_timeout(queue, rest).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    /// A place for a change on this thread, if one is free.
    pub fn place(&self) -> Option<Place<'_>> {
        let before = self.changing.fetch_add(1, SeqCst);
        let place = Place(self);
        (before < self.most_changing).then_some(place)
    }

    /// Has `job`, which holds so many `bytes`, carried out by another thread. Blocks while too many bytes wait.
    pub fn hand_over(self: &Arc<Self>, bytes: usize, job: impl FnOnce() + Send + 'static) {
        let mut queue = self.queue();
        while queue.bytes > 0 && queue.bytes + bytes > MOST_BYTES {
            queue = self.less.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
        queue.bytes += bytes;
        queue.jobs.push_back((bytes, Box::new(job)));
        if queue.idle >= queue.jobs.len() || queue.threads == MOST_THREADS {
            self.more.notify_one();
            return;
        }
        queue.threads += 1;
        drop(queue);
        let work = self.clone();
        if thread::Builder::new().name("fuse-change".into()).spawn(move || work.run()).is_err() {
            // One of the others will do it; without any this one does.
            let mut queue = self.queue();
            queue.threads -= 1;
            if queue.threads == 0 {
                let _queue = self.do_one(queue);
            }
        }
    }

    fn run(&self) {
        let mut queue = self.queue();
        loop {
            if !queue.jobs.is_empty() {
                queue = self.do_one(queue);
                continue;
            }
            queue.idle += 1;
            let (after, wait) = self.more.wait_timeout(queue, IDLE).unwrap_or_else(PoisonError::into_inner);
            queue = after;
            queue.idle -= 1;
            if wait.timed_out() && queue.jobs.is_empty() {
                queue.threads -= 1;
                return;
            }
        }
    }

    fn do_one<'a>(&'a self, mut queue: MutexGuard<'a, Queue>) -> MutexGuard<'a, Queue> {
        let Some((bytes, job)) = queue.jobs.pop_front() else { return queue };
        drop(queue);
        job();
        let mut queue = self.queue();
        queue.bytes -= bytes;
        self.less.notify_all();
        queue
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    const BOUND: Duration = Duration::from_secs(20);

    #[test]
    fn changes_take_half_of_the_threads_at_most() {
        let work = Work::new(4);
        let (one, two) = (work.place().unwrap(), work.place().unwrap());
        assert!(work.place().is_none());
        drop(one);
        assert!(work.place().is_some());
        drop(two);
    }

    #[test]
    fn changes_that_wait_do_not_hold_those_that_come_later() {
        let work = Arc::new(Work::new(2));
        let (release, held) = channel::<()>();
        let held = Arc::new(Mutex::new(held));
        for _ in 0..MOST_THREADS - 1 {
            let held = held.clone();
            work.hand_over(1, move || assert!(held.lock().unwrap().recv().is_err()));
        }
        let (done, is_done) = channel();
        work.hand_over(1, move || done.send(()).unwrap());
        is_done.recv_timeout(BOUND).unwrap();
        drop(release);
    }

    #[test]
    fn the_end_waits_for_what_is_in_flight_and_lets_nobody_in() {
        let work = Arc::new(Work::new(2));
        let turn = work.begin().unwrap();
        assert!(!work.close(Instant::now()));
        assert!(work.begin().is_none());
        work.hand_over(0, move || drop(turn));
        assert!(work.close(Instant::now() + BOUND));
    }
}
