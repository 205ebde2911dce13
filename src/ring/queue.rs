//! The ring: a table of slots and one word of bits. How a trapped write gets its answer from another process.
//!
//! A slot belongs to one waiting write at a time; which one is the writer process's own business, kept in its own
//! memory ([`Places`]). So each slot has one producer and one consumer, and its state only goes
//! `VACANT/GRANTED/REFUSED -> POSTED -> (ASLEEP) -> GRANTED | REFUSED | LEFT`. Bit i of `posted` says that slot i holds
//! an entry that nobody has taken; it is the doorbell, the queue and the futex of the backup in one word.
//!
//! **What is published by what.** Offset and length are plain stores before the `fetch_or` on `posted`; the
//! `fetch_and` that takes the bit acquires them, through other writers' and takers' read-modify-writes in between,
//! since those continue the release sequence. What the backup did for an entry, up to the read of the source, comes
//! before its swap of the state; the writer acquires that before it touches the disk.
//!
//! **Two pairs of store-then-load**, each with a sequentially consistent fence between the two on both sides:
//! 1. A post sets its bit, then reads `attentive`; a server clears `attentive`, then reads `posted`. One of them sees
//!    the other: either the poster wakes a server, or the server sees the bit and does not sleep.
//! 2. A post sets its state, then reads `over`; whoever ends the session sets `over`, then visits every slot. Either
//!    the write sees `over`, or its slot is found posted or answered: then it is woken if it sleeps.
//!
//! A sleep itself compares its word in the kernel under the lock that wakers take, so no wake-up falls between.
//! The peer is not trusted: garbage in any word costs that writer its session, never memory or a hang of the backup.

use super::layout::{Breach, MAGIC, SLOTS, VERSION, WRITE_COUNTERS, state};
use super::stall::{self, BUCKETS, Stalls};
use crate::ground::range::ByteRange;
use crate::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering, fence};
use crate::sync::{Condvar, Mutex};
use std::time::Duration;

/// A model checker looks at every word: it gets a small ring.
const MODEL: bool = cfg!(any(loom, shuttle));
const PLACES: usize = if MODEL { 2 } else { SLOTS };
const HISTOGRAM: usize = if MODEL { 1 } else { BUCKETS };
const COUNTERS: usize = if MODEL { 1 } else { WRITE_COUNTERS };
const UNUSED: usize = if MODEL { 0 } else { 216 };
const REST: usize = if MODEL { 0 } else { 256 };

/// A trapped write. `#[repr]`, field order and alignment are the protocol's.
#[repr(C, align(64))]
#[derive(Debug)]
pub struct Slot {
    pub(super) state: AtomicU32,
    pub(super) errno: AtomicU32,
    pub(super) offset: AtomicU64,
    pub(super) length: AtomicU64,
}

/// A word on a cache line of its own.
#[repr(C, align(64))]
#[derive(Debug)]
pub struct Line<T>(pub(super) T);

/// What writers count, for the backup to read.
#[repr(C, align(64))]
#[derive(Debug)]
pub struct Counts {
    pub(super) trapped: AtomicU64,
    pub(super) stall_max: AtomicU64,
}

/// The shared memory of one writer and one backup. docs/RING.md describes it byte by byte.
#[repr(C, align(64))]
#[derive(Debug)]
pub struct Region {
    pub(super) magic: AtomicU32,
    pub(super) version: AtomicU32,
    pub(super) posted: Line<AtomicU32>,
    pub(super) attentive: Line<AtomicU32>,
    pub(super) broken: Line<AtomicU32>,
    pub(super) counts: Counts,
    pub(super) writes: [Line<AtomicU64>; COUNTERS],
    pub(super) stalls: [AtomicU32; HISTOGRAM],
    _unused: [u64; UNUSED],
    pub(super) slots: [Slot; PLACES],
    _rest: [u64; REST],
}

/// How one wait sleeps, and for how long. The queue knows no clock.
pub trait Patience {
    /// Passes a moment awake; false when staying awake is no longer worth it.
    fn spin(&mut self) -> bool;

    /// Sleeps while `word` is `expected`. May return early. False when the time is up.
    fn sleep(&mut self, word: &AtomicU32, expected: u32) -> bool;

    /// Wakes one sleeper on `word`, in any process.
    fn wake(&self, word: &AtomicU32);
}

/// The end of a trapped write's wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Write.
    Granted,
    /// Do not write: fail with this errno.
    Refused(u32),
    /// No answer: the session is over, or the time is up. Mark the ring broken, then write.
    Left,
}

/// An answer came for a slot that no write waits in: the peer does not keep to the protocol.
#[derive(Debug, PartialEq, Eq)]
pub struct Unexpected;

impl Region {
    /// A ring of its own, in private memory.
    pub fn new() -> Self {
        Self {
            magic: AtomicU32::new(MAGIC),
            version: AtomicU32::new(VERSION),
            posted: Line(AtomicU32::new(0)),
            attentive: Line(AtomicU32::new(0)),
            broken: Line(AtomicU32::new(0)),
            counts: Counts { trapped: AtomicU64::new(0), stall_max: AtomicU64::new(0) },
            writes: std::array::from_fn(|_| Line(AtomicU64::new(0))),
            stalls: std::array::from_fn(|_| AtomicU32::new(0)),
            _unused: [0; UNUSED],
            slots: std::array::from_fn(|_| Slot {
                state: AtomicU32::new(state::VACANT),
                errno: AtomicU32::new(0),
                offset: AtomicU64::new(0),
                length: AtomicU64::new(0),
            }),
            _rest: [0; REST],
        }
    }

    /// Writes magic and version into fresh memory. The rest of it is zero as it should be.
    pub fn label(&self) {
        self.magic.store(MAGIC, Ordering::Relaxed);
        self.version.store(VERSION, Ordering::Release);
    }

    /// Has it this protocol's magic and version?
    pub fn is_labelled(&self) -> bool {
        self.version.load(Ordering::Acquire) == VERSION && self.magic.load(Ordering::Relaxed) == MAGIC
    }
}

impl Default for Region {
    fn default() -> Self {
        Self::new()
    }
}

/// The writer's end.
impl Region {
    /// Puts an entry into a slot that the caller has a place for, and rings.
    pub fn post(&self, slot: usize, range: ByteRange, patience: &impl Patience) {
        let entry = &self.slots[slot];
        entry.offset.store(range.offset, Ordering::Relaxed);
        entry.length.store(range.length, Ordering::Relaxed);
        entry.state.store(state::POSTED, Ordering::Relaxed);
        // Release: the three stores above. The fence: both pairs of the module.
        self.posted.0.fetch_or(1 << slot, Ordering::Release);
        fence(Ordering::SeqCst);
        if self.attentive.0.load(Ordering::Relaxed) == 0 {
            patience.wake(&self.posted.0);
        }
    }

    /// Waits for the answer to what was posted in `slot`. After `Left` the slot must not be used again.
    pub fn await_answer(&self, slot: usize, over: &AtomicBool, patience: &mut impl Patience) -> Answer {
        let entry = &self.slots[slot];
        loop {
            if let Some(answer) = self.answer_in(slot) {
                return answer;
            }
            // Pair 2 of the module; its fence is the one in `post`.
            if over.load(Ordering::Relaxed) {
                return self.leave(slot);
            }
            if patience.spin() {
                continue;
            }
            // It fails when an answer or the end has just come, and when this write has been asleep before.
            let _ = entry.state.compare_exchange(state::POSTED, state::ASLEEP, Ordering::Relaxed, Ordering::Relaxed);
            if !patience.sleep(&entry.state, state::ASLEEP) {
                return self.leave(slot);
            }
        }
    }

    fn answer_in(&self, slot: usize) -> Option<Answer> {
        let entry = &self.slots[slot];
        // Acquire: the backup has read the source before it stored the answer.
        match entry.state.load(Ordering::Acquire) {
            state::POSTED | state::ASLEEP => None,
            state::GRANTED => Some(Answer::Granted),
            state::REFUSED => Some(Answer::Refused(entry.errno.load(Ordering::Relaxed))),
            _ => Some(Answer::Left),
        }
    }

    /// Goes without an answer, unless it has come in this very moment.
    fn leave(&self, slot: usize) -> Answer {
        let word = &self.slots[slot].state;
        for waiting in [state::POSTED, state::ASLEEP] {
            if word.compare_exchange(waiting, state::LEFT, Ordering::Relaxed, Ordering::Relaxed).is_ok() {
                return Answer::Left;
            }
        }
        self.answer_in(slot).unwrap_or(Answer::Left)
    }

    /// Ends the session for everybody who waits: each leaves, or takes the answer that has come. Each is woken in either
    /// case, for a backup may die between its answer and its wake-up. Those who post later see `over`.
    pub fn end(&self, over: &AtomicBool, patience: &impl Patience) {
        over.store(true, Ordering::Release);
        fence(Ordering::SeqCst);
        for slot in 0..PLACES {
            let _ = self.leave(slot);
            patience.wake(&self.slots[slot].state);
        }
    }

    /// Marks the instant as lost. Before any write that was not granted: a backup that reads what such a write wrote
    /// finds the mark when it looks before it publishes.
    pub fn mark_broken(&self, breach: Breach) {
        // The first reason stays.
        let _ = self.broken.0.compare_exchange(0, breach as u32, Ordering::Relaxed, Ordering::Relaxed);
        // The write that follows is a system call on other memory: nothing of it may overtake the mark.
        fence(Ordering::SeqCst);
    }

    /// Counts a write. `counter` is the caller's own, so that threads do not share a cache line.
    pub fn count_write(&self, counter: usize) {
        self.writes[counter % COUNTERS].0.fetch_add(1, Ordering::Relaxed);
    }

    /// Counts a write that waited.
    pub fn count_stall(&self, wait: Duration) {
        self.counts.trapped.fetch_add(1, Ordering::Relaxed);
        self.counts.stall_max.fetch_max(wait.as_nanos().min(u128::from(u64::MAX)) as u64, Ordering::Relaxed);
        self.stalls[stall::bucket(wait) % HISTOGRAM].fetch_add(1, Ordering::Relaxed);
    }
}

/// The backup's end.
impl Region {
    /// Takes an entry: the first at or after slot `from`, in a circle, so that no slot is passed over for ever.
    pub fn take(&self, from: usize) -> Option<usize> {
        loop {
            let posted = self.posted.0.load(Ordering::Relaxed);
            if posted == 0 {
                return None;
            }
            let from = from as u32 % u32::BITS;
            let slot = (posted.rotate_right(from).trailing_zeros() + from) % u32::BITS;
            if self.take_slot(slot as usize) {
                return Some(slot as usize);
            }
        }
    }

    /// Takes the entry in `slot`, if there is one that nobody has taken.
    pub fn take_slot(&self, slot: usize) -> bool {
        // Acquire: offset and length of whoever set this bit.
        self.posted.0.fetch_and(!(1 << slot), Ordering::Acquire) & 1 << slot != 0
    }

    /// Waits for an entry and takes it. `None` when the time is up or `over` is set; who sets it then calls
    /// [`Region::wake_servers`]. May run in several threads.
    pub fn next(&self, from: usize, over: &AtomicBool, patience: &mut impl Patience) -> Option<usize> {
        let mut in_time = true;
        loop {
            if over.load(Ordering::Relaxed) {
                return None;
            }
            if let Some(slot) = self.take(from) {
                // Those who posted while this thread was attentive woke nobody.
                if self.posted.0.load(Ordering::Relaxed) != 0 {
                    patience.wake(&self.posted.0);
                }
                return Some(slot);
            }
            if !in_time {
                return None;
            }
            self.watch(over, patience);
            if self.posted.0.load(Ordering::Relaxed) == 0 && !over.load(Ordering::Relaxed) {
                in_time = patience.sleep(&self.posted.0, 0);
            }
        }
    }

    /// Looks at `posted` for as long as patience spins, if no other thread does. The caller looks once more.
    fn watch(&self, over: &AtomicBool, patience: &mut impl Patience) {
        if self.attentive.0.compare_exchange(0, 1, Ordering::Relaxed, Ordering::Relaxed).is_err() {
            return;
        }
        while self.posted.0.load(Ordering::Relaxed) == 0 && !over.load(Ordering::Relaxed) && patience.spin() {}
        self.attentive.0.store(0, Ordering::Relaxed);
        // Before the caller's second look: pair 1 of the module.
        fence(Ordering::SeqCst);
    }

    /// Lets one sleeping server look at `over`; each wakes the next.
    pub fn wake_servers(&self, patience: &impl Patience) {
        for _ in 0..PLACES {
            patience.wake(&self.posted.0);
        }
    }

    /// The numbers in a slot that was taken, copied out. Not checked: `offset + length` may overflow.
    pub fn entry(&self, slot: usize) -> (u64, u64) {
        let entry = &self.slots[slot];
        (entry.offset.load(Ordering::Relaxed), entry.length.load(Ordering::Relaxed))
    }

    /// Answers a slot that was taken. [`Answer::Left`] is not an answer.
    pub fn answer(&self, slot: usize, answer: Answer, patience: &impl Patience) -> Result<(), Unexpected> {
        let entry = &self.slots[slot];
        let word = match answer {
            Answer::Granted | Answer::Left => state::GRANTED,
            Answer::Refused(errno) => {
                entry.errno.store(errno, Ordering::Relaxed);
                state::REFUSED
            }
        };
        // Release: the errno, and above all the read of the source. It never overwrites LEFT.
        let before = entry.state.fetch_update(Ordering::Release, Ordering::Relaxed, |now| {
            matches!(now, state::POSTED | state::ASLEEP).then_some(word)
        });
        match before {
            Ok(state::ASLEEP) => patience.wake(&entry.state),
            Ok(_) | Err(state::LEFT) => {}
            Err(_) => return Err(Unexpected),
        }
        Ok(())
    }

    /// Slots with an entry that nobody has taken, one bit each.
    pub fn posted(&self) -> u32 {
        self.posted.0.load(Ordering::Relaxed)
    }

    /// The mark of a writer that went on without a grant, or 0.
    pub fn broken(&self) -> u32 {
        // Reads of the disk before this look stay before it.
        fence(Ordering::SeqCst);
        self.broken.0.load(Ordering::Acquire)
    }

    /// Writes begun under the trap, and writes that waited.
    pub fn counted(&self) -> (u64, u64) {
        let writes = self.writes.iter().fold(0_u64, |sum, line| sum.saturating_add(line.0.load(Ordering::Relaxed)));
        (writes, self.counts.trapped.load(Ordering::Relaxed))
    }

    /// How long they waited.
    pub fn stalls(&self) -> Stalls {
        let mut stalls = Stalls::default();
        let max = Duration::from_nanos(self.counts.stall_max.load(Ordering::Relaxed));
        stalls.add(self.stalls.iter().map(|count| u64::from(count.load(Ordering::Relaxed))), max);
        stalls
    }
}

/// Which slots this process may post in. In its own memory, so that nobody else can spoil it.
#[derive(Debug)]
pub struct Places {
    vacant: Mutex<Vec<usize>>,
    returned: Condvar,
}

impl Default for Places {
    fn default() -> Self {
        Self { vacant: Mutex::new((0..PLACES).rev().collect()), returned: Condvar::new() }
    }
}

impl Places {
    /// A slot for one entry; `None` when none became vacant while `remaining` was more than nothing, or at the end.
    pub fn take(&self, remaining: impl Fn() -> Duration, over: &AtomicBool) -> Option<usize> {
        let mut vacant = self.vacant.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        loop {
            if over.load(Ordering::Acquire) {
                return None;
            }
            if let Some(slot) = vacant.pop() {
                return Some(slot);
            }
            let remaining = remaining();
            if remaining.is_zero() {
                return None;
            }
            vacant = match self.returned.wait_timeout(vacant, remaining) {
                Ok((vacant, _)) => vacant,
                Err(poisoned) => poisoned.into_inner().0,
            };
        }
    }

    /// Gives back a slot whose answer was [`Answer::Granted`] or [`Answer::Refused`].
    pub fn give_back(&self, slot: usize) {
        self.vacant.lock().unwrap_or_else(|poisoned| poisoned.into_inner()).push(slot);
        self.returned.notify_one();
    }

    /// Lets everybody who waits for a slot look at `over`.
    pub fn wake_all(&self) {
        drop(self.vacant.lock().unwrap_or_else(|poisoned| poisoned.into_inner()));
        self.returned.notify_all();
    }
}

#[cfg(test)]
mod tests;
