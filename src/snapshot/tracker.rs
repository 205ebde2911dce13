//! [`CopyState`] behind a lock, with the waits: copiers wait for clusters, trapped writes wait for readers.
//!
//! | who | waits while | is woken by |
//! |---|---|---|
//! | [`Tracker::claim_next`] | everything left is in somebody's hands | `finish`, `shrink`, the end of a capture, `stop` |
//! | [`Tracker::before_write`] | a cluster that it touches is being read | `source_read`, `finish`, the end of a capture, `stop` |
//!
//! Nothing here does I/O, and no callback but [`FreeMap::free`] is called with the lock held. A change is made through
//! `Changing`, which wakes every waiter when it is dropped, by a panic too: no step can forget it.

use crate::ground::cluster::{ClusterSize, Clusters};
use crate::ground::range::ByteRange;
use crate::snapshot::copy_state::{self, CopyState, Holder, Next, Trap};
use crate::sync::{Condvar, Mutex, MutexGuard};
use std::ops::{Deref, DerefMut};
use std::sync::{Arc, LockResult};

/// Bytes: a trapped write is granted in steps of this (one cluster at least), so that a write or discard of the whole
/// disk is captured in small runs and never keeps the lock for long.
const STEP: u64 = 1 << 20;

/// Where the clusters that are free to overwrite are made known to writers: the bitmap that they share with us.
pub trait FreeMap: Send + Sync {
    /// `clusters` are free from now on. Told in the order in which they become free, under the tracker's lock, and
    /// maybe more than once. Must not block.
    fn free(&self, clusters: Clusters);
}

/// What a trapped write got.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Granted {
    /// Write: the instant's contents are safe, and no one reads the source there again.
    Write,
    /// Write: the instant was given up, and nothing protects it any more.
    Stopped,
}

/// See the module. Shared by copiers and preserving threads.
pub struct Tracker {
    shared: Mutex<Shared>,
    changed: Condvar,
    size: ClusterSize,
    disk: ByteRange,
}

struct Shared {
    state: CopyState,
    overlay_first: bool,
    stopped: bool,
    trapped: u64,
    free_maps: Vec<Arc<dyn FreeMap>>,
}

impl Tracker {
    /// Takes over `state`.
    pub fn new(state: CopyState) -> Self {
        let (size, disk) = (state.cluster_size(), ByteRange::new(0, state.length()));
        let shared = Shared { state, overlay_first: false, stopped: false, trapped: 0, free_maps: Vec::new() };
        Self { shared: Mutex::new(shared), changed: Condvar::new(), size, disk }
    }

    /// What is tracked and saved as one.
    pub fn cluster_size(&self) -> ClusterSize {
        self.size
    }

    /// The next run to copy: at most `limit` bytes, but at least one granule of the plan. Blocks while everything left
    /// is in somebody's hands. `None`: everything is on the target ([`Tracker::is_done`]), or it was stopped or lost.
    pub fn claim_next(&self, limit: u64) -> Option<Claim<'_>> {
        let mut shared = self.lock();
        loop {
            if shared.is_over() {
                return None;
            }
            let overlay_first = shared.overlay_first;
            match shared.state.claim_next(limit, overlay_first) {
                Next::Claim(claim) => return Some(Claim { tracker: self, claim: Some(claim) }),
                Next::Done => return None,
                Next::Wait => shared = self.wait(shared),
            }
        }
    }

    /// The next run that the overlay holds at least in part; at most `limit` bytes, but one granule of the plan at least. `None`:
    /// there is none now, or it was stopped or lost. Does not block.
    pub fn claim_saved(&self, limit: u64) -> Option<Claim<'_>> {
        let mut shared = self.lock();
        if shared.is_over() {
            return None;
        }
        let claim = shared.state.claim_saved(limit)?;
        Some(Claim { tracker: self, claim: Some(claim) })
    }

    /// From now on [`Tracker::claim_next`] takes what the overlay holds first, or again by position.
    pub fn set_overlay_first(&self, on: bool) {
        self.lock().overlay_first = on;
    }

    /// Gives the instant up and ends all waits, now and later: no more claims, and writers are let go.
    pub fn stop(&self) {
        self.change().stopped = true;
    }

    /// A write to `range` is waiting (what lies past the disk's end is ignored). Blocks until no one reads the source
    /// there. `preserve` is called without the lock held, once for each run that has to be in the overlay when it
    /// returns; runs are whole clusters, at most 1 MiB or one cluster. Its error leaves the run as it was, and is returned.
    pub fn before_write<E>(
        &self,
        range: ByteRange,
        mut preserve: impl FnMut(ByteRange) -> Result<(), E>,
    ) -> Result<Granted, E> {
        self.lock().trapped += 1;
        let mut rest = range.intersect(self.disk);
        let step = STEP.max(self.size.bytes());
        // What is free stays free, so steps may be granted one after the other.
        while !rest.is_empty() {
            let end = (rest.offset / step + 1).saturating_mul(step).min(rest.end());
            let granted = self.grant(ByteRange::between(rest.offset, end), &mut preserve)?;
            if granted == Granted::Stopped {
                return Ok(granted);
            }
            rest = ByteRange::between(end, rest.end());
        }
        Ok(Granted::Write)
    }

    fn grant<E>(&self, range: ByteRange, preserve: &mut impl FnMut(ByteRange) -> Result<(), E>) -> Result<Granted, E> {
        let mut shared = self.lock();
        loop {
            if shared.is_over() {
                return Ok(Granted::Stopped);
            }
            match shared.state.trap(range) {
                Trap::Proceed => return Ok(Granted::Write),
                Trap::Wait => shared = self.wait(shared),
                Trap::Preserve(claim) => {
                    drop(shared);
                    let run = claim.range();
                    let capture = Capture { tracker: self, claim: Some(claim) };
                    preserve(run)?;
                    capture.done();
                    shared = self.lock();
                }
            }
        }
    }

    /// `map` is told of every run that is free already, and from now on of every run that becomes free.
    pub fn attach_free_map(&self, map: Arc<dyn FreeMap>) {
        let mut shared = self.lock();
        shared.state.each_free(|run| map.free(run));
        shared.free_maps.push(map);
    }

    /// Everything is on the target, as of the instant.
    pub fn is_done(&self) -> bool {
        let shared = self.lock();
        !shared.is_over() && shared.state.is_done()
    }

    /// It was given up by [`Tracker::stop`], or by a panic in the middle of a change.
    pub fn is_stopped(&self) -> bool {
        self.lock().stopped
    }

    /// A copy failed after its clusters were released to writers: the target can no longer be made whole.
    pub fn is_lost(&self) -> bool {
        self.lock().state.is_lost()
    }

    /// Writes that were trapped so far.
    pub fn trapped(&self) -> u64 {
        self.lock().trapped
    }

    /// Bytes that are not yet on the target and in nobody's hands: there for a copier to claim, so none once it was
    /// stopped or lost.
    pub fn dirty_bytes(&self) -> u64 {
        let shared = self.lock();
        if shared.is_over() { 0 } else { shared.state.dirty_bytes() }
    }

    /// Clusters that the overlay holds.
    pub fn saved_clusters(&self) -> u64 {
        self.lock().state.saved_clusters()
    }

    /// The overlay holds something for the target still, and the instant was not given up.
    pub fn keeps_saved(&self) -> bool {
        let shared = self.lock();
        !shared.is_over() && shared.state.saved_clusters() > 0
    }

    fn lock(&self) -> MutexGuard<'_, Shared> {
        Shared::after_a_panic_stopped(self.shared.lock())
    }

    fn wait<'t>(&'t self, shared: MutexGuard<'t, Shared>) -> MutexGuard<'t, Shared> {
        Shared::after_a_panic_stopped(self.changed.wait(shared))
    }

    fn change(&self) -> Changing<'_> {
        Changing { tracker: self, shared: Some(self.lock()) }
    }
}

impl Shared {
    /// Somebody may have panicked in the middle of a change: then the table is not to be trusted, and no one may hang on it.
    fn after_a_panic_stopped(locked: LockResult<MutexGuard<'_, Self>>) -> MutexGuard<'_, Self> {
        locked.unwrap_or_else(|poisoned| {
            let mut shared = poisoned.into_inner();
            shared.stopped = true;
            shared
        })
    }

    fn is_over(&self) -> bool {
        self.stopped || self.state.is_lost()
    }

    fn publish(&self, clusters: &Clusters) {
        for map in &self.free_maps {
            map.free(clusters.clone());
        }
    }
}

/// The lock, held for a change that somebody may be waiting for.
struct Changing<'t> {
    tracker: &'t Tracker,
    shared: Option<MutexGuard<'t, Shared>>,
}

impl Deref for Changing<'_> {
    type Target = Shared;

    fn deref(&self) -> &Shared {
        self.shared.as_ref().expect("held until dropped")
    }
}

impl DerefMut for Changing<'_> {
    fn deref_mut(&mut self) -> &mut Shared {
        self.shared.as_mut().expect("held until dropped")
    }
}

impl Drop for Changing<'_> {
    fn drop(&mut self) {
        // Unlocked first: who wakes up should not find the lock taken.
        self.shared = None;
        self.tracker.changed.notify_all();
    }
}

/// A run of clusters that its owner alone moves to the target. Dropped without [`Claim::finish`], it has failed.
#[must_use = "dropping a claim fails it"]
pub struct Claim<'t> {
    tracker: &'t Tracker,
    claim: Option<copy_state::Claim>,
}

impl Claim<'_> {
    /// The bytes to move: whole granules, or up to the disk's end.
    pub fn range(&self) -> ByteRange {
        self.held().range()
    }

    /// Keeps the first `length` bytes, a multiple of the granule and not 0, and gives the rest back (nothing when it is
    /// not longer). Only before [`Claim::source_read`].
    pub fn shrink(&mut self, length: u64) {
        let claim = self.claim.as_mut().expect("held until finished");
        self.tracker.change().state.shrink(claim, length);
    }

    /// Takes what follows into the claim, as far as it is dirty and in whole granules, up to `limit` bytes in all. For
    /// runs of zeroes: data is better claimed in chunks, since writers wait for all of a claim. Only before
    /// [`Claim::source_read`].
    pub fn grow(&mut self, limit: u64) {
        let claim = self.claim.as_mut().expect("held until finished");
        self.tracker.lock().state.grow(claim, limit);
    }

    /// The first piece of the range, with who holds it.
    pub fn first_piece(&self) -> (ByteRange, Holder) {
        self.tracker.lock().state.first_piece(self.held())
    }

    /// The pieces of the range, in order, each with who holds it. Stays true until the claim is finished or shrunk.
    pub fn pieces(&self) -> Vec<(ByteRange, Holder)> {
        self.tracker.lock().state.pieces(self.held())
    }

    /// All bytes are in memory, and the source is not read for this claim again: waiting writers pass. At most once.
    pub fn source_read(&mut self) {
        let mut shared = self.tracker.change();
        let free = shared.state.source_read(self.held());
        shared.publish(&free);
    }

    /// The end: `ok` when the target has every byte. Returns the runs that the overlay may drop then. Otherwise the
    /// range is dirty again, or, if it was released to writers already, the instant is lost.
    pub fn finish(mut self, ok: bool) -> Vec<ByteRange> {
        self.end(ok)
    }

    fn end(&mut self, ok: bool) -> Vec<ByteRange> {
        let Some(claim) = self.claim.take() else { return Vec::new() };
        let clusters = self.tracker.size.covering(claim.range());
        let mut shared = self.tracker.change();
        let droppable = shared.state.finish(claim, ok);
        if ok {
            shared.publish(&clusters);
        }
        droppable
    }

    fn held(&self) -> &copy_state::Claim {
        self.claim.as_ref().expect("held until finished")
    }
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.end(false);
    }
}

/// A run that its owner alone saves in the overlay. Dropped without [`Capture::done`], it has failed.
struct Capture<'t> {
    tracker: &'t Tracker,
    claim: Option<copy_state::Claim>,
}

impl Capture<'_> {
    fn done(mut self) {
        self.end(true);
    }

    fn end(&mut self, ok: bool) {
        let Some(claim) = self.claim.take() else { return };
        let mut shared = self.tracker.change();
        if let Some(free) = shared.state.captured(claim, ok) {
            shared.publish(&free);
        }
    }
}

impl Drop for Capture<'_> {
    fn drop(&mut self) {
        self.end(false);
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests;
