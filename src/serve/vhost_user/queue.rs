//! A queue's life: requests are taken by the queue's own thread, done there or by a thread of the pool, and answered in any order.
//!
//! # Who does a request
//!
//! The queue's thread, as long as that costs less than waking somebody: no hand-over, no lock that is contended. It must not
//! wait, though, for then nobody takes what comes next. So the pool gets
//!
//! - what would wait for a backup just now: a write that is to be saved first, every write during a freeze;
//! - where requests have been slow of late, more than copying takes, each that has others beside it;
//! - long reads that have others beside them, while there are processors to copy them. (A file's writes exclude each other in the
//!   kernel: threads that wait for their turn cost more than they bring.)

use super::config;
use super::perform::{changes, perform};
use super::pool::Pool;
use super::request::{Malformed, Memory, Request};
use super::vring::{SharedMemory, Vring};
use crate::ground::range::ByteRange;
use crate::serve::disk::Disk;
use std::ops::Deref;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering::Relaxed, Ordering::SeqCst};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};
use vhost_user_backend::VringT;
use virtio_queue::{QueueOwnedT, QueueT};
use vm_memory::GuestAddressSpace;

/// What takes longer is worth waking somebody: that takes 30 to 60 microseconds by itself.
const SLOW_NS: u64 = 60_000;
/// Bytes that take longer than that to move, even from memory.
const LONG: u64 = 256 << 10;
/// A new duration counts as one of so many.
const MEMORY: u64 = 8;
/// And for no more than this: one that was preempted says nothing of the others.
const LONGEST_NS: u64 = 4 * SLOW_NS;
/// Answers that the guest is told of at once, where there is more to do and it is quick.
const BATCH: u32 = 8;
/// So many slow requests are given away after one that kept others waiting, even if they look alone.
const CROWD: u32 = 32;

/// The disk and what the guest agreed to, for all queues.
pub struct Service {
    pub disk: Arc<Disk>,
    /// The features that the guest wants.
    pub acknowledged: AtomicU64,
    /// The cache's mode; meant for guests that know of it.
    pub writeback: AtomicBool,
    lanes: Vec<Lane>,
    /// Somebody waits until nothing is in flight.
    settling: AtomicU32,
    stopping: AtomicBool,
    processors: u32,
}

/// What we know of a queue.
#[derive(Default)]
struct Lane {
    in_flight: Mutex<u32>,
    none: Condvar,
    /// Of late, in nanoseconds.
    duration: AtomicU64,
    crowd: AtomicU32,
}

/// A request that was taken from a queue.
pub struct Errand {
    lane: usize,
    vring: Vring,
    head: u16,
    request: Request,
    /// As it was when the request was taken.
    memory: Arc<Memory>,
}

/// What was at the head of a queue.
struct Taken {
    head: u16,
    request: Result<Request, Malformed>,
    /// There is more behind it.
    more: bool,
    size: u16,
    memory: Arc<Memory>,
}

impl Lane {
    fn lock(&self) -> MutexGuard<'_, u32> {
        self.in_flight.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_slow(&self) -> bool {
        self.duration.load(Relaxed) > SLOW_NS
    }

    /// Of a request that moved `length` bytes, a nanosecond for each of which is not waiting.
    fn learn(&self, duration: Duration, length: u64) {
        // Threads may overwrite each other's sample: it is an estimate.
        let new = (duration.as_nanos() as u64).saturating_sub(length).min(LONGEST_NS);
        let old = self.duration.load(Relaxed);
        self.duration.store((old * (MEMORY - 1) + new) / MEMORY, Relaxed);
    }

    /// Also as if there might soon be others.
    fn is_slow_among(&self, more: bool, others: bool) -> bool {
        if !self.is_slow() {
            return false;
        }
        let crowd = self.crowd.load(Relaxed);
        if !(more || others) && crowd > 0 {
            self.crowd.store(crowd - 1, Relaxed);
        }
        more || others || crowd > 0
    }
}

impl Service {
    /// Of `disk`, with so many queues.
    pub fn new(disk: Arc<Disk>, queues: u16) -> Self {
        Self {
            disk,
            acknowledged: AtomicU64::new(0),
            writeback: AtomicBool::new(true),
            lanes: (0..queues).map(|_| Lane::default()).collect(),
            settling: AtomicU32::new(0),
            stopping: AtomicBool::new(false),
            processors: std::thread::available_parallelism().map_or(1, |processors| processors.get() as u32),
        }
    }

    /// The frontend has gone, or may have without our knowing: what was in flight is to end first.
    pub fn is_leaving(&self) -> bool {
        self.stopping.load(SeqCst) || self.settling.load(SeqCst) > 0
    }

    /// Takes no more requests.
    pub fn stop(&self) {
        self.stopping.store(true, SeqCst);
    }

    /// Waits until nothing of a queue is in flight.
    pub fn settle(&self, lane: usize) {
        if let Some(lane) = self.lanes.get(lane) {
            self.settling.fetch_add(1, SeqCst);
            let none = lane.none.wait_while(lane.lock(), |in_flight| *in_flight > 0);
            drop(none.unwrap_or_else(PoisonError::into_inner));
            self.settling.fetch_sub(1, SeqCst);
        }
    }

    /// [`Service::settle`] for all queues; false: not by `deadline`.
    pub fn all_settle(&self, deadline: Instant) -> bool {
        self.lanes.iter().all(|lane| {
            let left = deadline.saturating_duration_since(Instant::now());
            let none = lane.none.wait_timeout_while(lane.lock(), left, |in_flight| *in_flight > 0);
            *none.unwrap_or_else(PoisonError::into_inner).0 == 0
        })
    }

    /// Takes what is in a queue, until there is nothing more. For the queue's own thread.
    pub fn drain(&self, lane: usize, vring: &Vring, memory: &SharedMemory, pool: &Pool<Errand>) {
        loop {
            if vring.disable_notification().is_err() {
                return;
            }
            let mut untold = 0;
            let is_closed = loop {
                match self.take(lane, vring, memory) {
                    Ok(Some(taken)) => self.dispatch(lane, vring, taken, pool, &mut untold),
                    Ok(None) => break false,
                    Err(Closed) => break true,
                }
            };
            tell_of(&mut untold, vring);
            if is_closed {
                return;
            }
            // True: something came before the guest was asked to ring again.
            if !vring.enable_notification().unwrap_or(false) {
                return;
            }
        }
    }

    fn take(&self, lane: usize, vring: &Vring, memory: &SharedMemory) -> Result<Option<Taken>, Closed> {
        let mut state = vring.get_mut();
        if self.stopping.load(SeqCst) || !state.is_enabled() {
            return Err(Closed);
        }
        let queue = state.get_queue_mut();
        if !queue.ready() {
            return Err(Closed);
        }
        let available = queue.avail_idx(memory.memory().deref(), SeqCst).map_err(|_| Closed)?;
        if available.0 == queue.next_avail() {
            return Ok(None);
        }
        // Not before: what is available may be in memory that the frontend added only just now.
        let memory = memory.memory().into_inner();
        // Also: its index makes no sense.
        let chain = queue.iter(memory.deref()).map_err(|_| Closed)?.next();
        let Some(chain) = chain else { return Ok(None) };
        let head = chain.head_index();
        let request = Request::parse(chain, &memory);
        let more = queue.avail_idx(memory.deref(), SeqCst).is_ok_and(|index| index.0 != queue.next_avail());
        // While the queue is locked: whoever stops it waits for this one too.
        *self.lanes[lane].lock() += 1;
        Ok(Some(Taken { head, request, more, size: queue.size(), memory }))
    }

    fn dispatch(&self, lane: usize, vring: &Vring, taken: Taken, pool: &Pool<Errand>, untold: &mut u32) {
        let Taken { head, request, more, size, memory } = taken;
        let Ok(request) = request else { return self.answer(lane, vring, head, 0, true) };
        let mine = &self.lanes[lane];
        let in_flight = *mine.lock();
        let changed = changes(&request, &memory);
        let waits = self.would_wait(&changed);
        let others = in_flight > 1;
        let is_shared =
            changed.is_empty() && request.length() >= LONG && (more || others) && in_flight <= self.processors;
        let mut errand = Errand { lane, vring: vring.clone(), head, request, memory };
        if waits || mine.is_slow() {
            tell_of(untold, vring);
        }
        // A guest that has more in flight than its queue holds reuses descriptors: it waits for itself.
        if (waits || is_shared || mine.is_slow_among(more, others)) && in_flight <= u32::from(size) {
            errand = match pool.give(errand) {
                Ok(()) => return,
                Err(errand) => errand,
            };
        }
        let tell = !more || waits || mine.is_slow() || *untold + 1 >= BATCH;
        self.run(errand, !waits, tell);
        *untold = if tell { 0 } else { *untold + 1 };
        if more && mine.is_slow() {
            mine.crowd.store(CROWD, Relaxed);
        }
    }

    fn would_wait(&self, changed: &[ByteRange]) -> bool {
        changed.iter().any(|range| self.disk.would_wait(*range))
    }

    /// Does a request and answers it.
    pub fn errand(&self, errand: Errand) {
        let waits = self.would_wait(&changes(&errand.request, &errand.memory));
        self.run(errand, !waits, true);
    }

    fn run(&self, errand: Errand, is_typical: bool, tell: bool) {
        let Errand { lane, vring, head, request, memory } = errand;
        let since = Instant::now();
        let through = config::writes_through(self.acknowledged.load(Relaxed), self.writeback.load(Relaxed));
        let status = perform(&self.disk, &request, &memory, through);
        if is_typical {
            self.lanes[lane].learn(since.elapsed(), request.length());
        }
        self.answer(lane, &vring, head, request.answer(&memory, status.byte()), tell);
    }

    /// `tell`: now, of this one and of those before it.
    fn answer(&self, lane: usize, vring: &Vring, head: u16, written: u32, tell: bool) {
        // It fails for a head that is in no table: whose else could it be?
        let _ = vring.add_used(head, written);
        if tell {
            tell_of(&mut 1, vring);
        }
        let lane = &self.lanes[lane];
        let mut in_flight = lane.lock();
        *in_flight -= 1;
        if *in_flight == 0 {
            lane.none.notify_all();
        }
    }
}

/// Rings at the guest's, if it wants to hear of what was used.
fn tell_of(untold: &mut u32, vring: &Vring) {
    if std::mem::take(untold) > 0 && vring.needs_notification().unwrap_or(true) {
        // Without an eventfd the guest looks by itself.
        let _ = vring.signal_used_queue();
    }
}

/// The queue is not to be used, or makes no sense.
struct Closed;
