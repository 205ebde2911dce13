//! The one table of the backup: for each cluster, who holds its contents as of the instant.
//!
//! | dirty | saved | in flight | holder | may a writer overwrite the source? |
//! |---|---|---|---|---|
//! | yes | no | no | source | no: preserve it first |
//! | no | no | capture | source | no: wait for the capture |
//! | no | no | copy, source not read | source | no: wait for the read |
//! | no | no | copy, source read | the copier's buffer | yes |
//! | any | yes | any | overlay | yes |
//! | no | no | no | target | yes |
//!
//! Steps return what to do; the caller does it. One invariant: to claim is to clear the dirty bits and to enter the
//! in-flight list, in one step, so a cluster has one mover at most.

use crate::ground::bitmap::Bitmap;
use crate::ground::cluster::{ClusterSize, Clusters};
use crate::ground::range::ByteRange;

/// How chunks are cut and in which order they go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Plan {
    /// Bytes, a multiple of the cluster and of the target's cluster: a claim starts and ends on multiples of it.
    pub granule: u64,
    /// Claims must ascend without gaps, for a target that is a stream.
    pub ascending: bool,
}

/// The right and the duty to move a run of clusters. Only [`CopyState::finish`] or [`CopyState::captured`] takes it.
#[must_use = "a claim that is not finished blocks its clusters for ever"]
#[derive(Debug, PartialEq, Eq)]
pub struct Claim {
    id: u64,
    clusters: Clusters,
    range: ByteRange,
}

impl Claim {
    /// The bytes to move.
    pub fn range(&self) -> ByteRange {
        self.range
    }
}

/// What the copier does next.
#[derive(Debug, PartialEq, Eq)]
pub enum Next<C> {
    /// Move these.
    Claim(C),
    /// Everything left is in somebody's hands; ask again after a change.
    Wait,
    /// Everything is on the target.
    Done,
}

/// What a trapped write has to do next.
#[derive(Debug, PartialEq, Eq)]
pub enum Trap<C> {
    /// No one reads the source there any more: write.
    Proceed,
    /// Somebody is reading it; ask again after a change.
    Wait,
    /// Save these clusters in the overlay, then ask again.
    Preserve(C),
}

/// Who has a piece of a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Holder {
    /// Still unchanged on the source.
    Source,
    /// Saved before it was overwritten.
    Overlay,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    Copy { source_read: bool },
    Capture,
}

#[derive(Debug)]
struct Flight {
    id: u64,
    clusters: Clusters,
    work: Work,
}

/// See the module's table.
#[derive(Debug)]
pub struct CopyState {
    size: ClusterSize,
    length: u64,
    plan: Plan,
    dirty: Bitmap,
    saved: Bitmap,
    in_flight: Vec<Flight>,
    cursor: u64,
    saved_cursor: u64,
    next_id: u64,
    lost: bool,
}

impl CopyState {
    /// A disk of `length` bytes, all of it dirty.
    pub fn new(length: u64, size: ClusterSize, plan: Plan) -> Self {
        debug_assert!(plan.granule.is_multiple_of(size.bytes()), "granules are whole clusters");
        let count = size.count(length);
        let mut dirty = Bitmap::new(count);
        dirty.set(0..count);
        Self {
            size,
            length,
            plan,
            dirty,
            saved: Bitmap::new(count),
            in_flight: Vec::new(),
            cursor: 0,
            saved_cursor: 0,
            next_id: 0,
            lost: false,
        }
    }

    /// Bytes of the disk.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// What is tracked and saved as one.
    pub fn cluster_size(&self) -> ClusterSize {
        self.size
    }

    /// The next run to copy: at most `limit` bytes, but at least one granule. With `overlay_first`, a run that the
    /// overlay holds is preferred, wherever it is (unless claims must ascend).
    pub fn claim_next(&mut self, limit: u64, overlay_first: bool) -> Next<Claim> {
        if self.is_done() {
            return Next::Done;
        }
        let saved = if overlay_first && !self.plan.ascending { self.claim_saved(limit) } else { None };
        if let Some(claim) = saved {
            return Next::Claim(claim);
        }
        let count = self.dirty.len();
        let found = self.dirty_granules(self.cursor, count, limit).or_else(|| {
            let end = if self.plan.ascending { 0 } else { self.cursor };
            self.dirty_granules(0, end, limit)
        });
        match found {
            Some(clusters)
                if self.plan.ascending && self.in_flight.iter().any(|f| f.clusters.start < clusters.start) =>
            {
                Next::Wait
            }
            Some(clusters) => {
                self.cursor = clusters.end;
                Next::Claim(self.claim(clusters, Work::Copy { source_read: false }))
            }
            None => Next::Wait,
        }
    }

    /// A run of granules that the overlay holds at least in part; at most `limit` bytes, but one granule at least.
    pub fn claim_saved(&mut self, limit: u64) -> Option<Claim> {
        let clusters = self.saved_granules(limit)?;
        self.saved_cursor = clusters.end;
        Some(self.claim(clusters, Work::Copy { source_read: false }))
    }

    /// Keeps the first `length` bytes of a claim, whole granules, and gives the rest back. Before the source is read.
    pub fn shrink(&mut self, claim: &mut Claim, length: u64) {
        debug_assert!(length > 0 && length.is_multiple_of(self.plan.granule) || length >= claim.range.length);
        let kept = self.size.covering(claim.range.prefix(length));
        let flight = Self::flight(&mut self.in_flight, claim.id);
        debug_assert!(flight.work == Work::Copy { source_read: false }, "shrunk before it is read");
        let rest = kept.end..flight.clusters.end;
        flight.clusters = kept.clone();
        // The copier comes back to the rest next; it is still the lowest that is dirty.
        self.cursor = self.cursor.min(rest.start);
        self.dirty.set(rest);
        claim.range = self.size.bytes_of(kept.clone(), self.length);
        claim.clusters = kept;
    }

    /// Takes the dirty granules that follow a claim into it, as long as it stays within `limit` bytes. Before the
    /// source is read.
    pub fn grow(&mut self, claim: &mut Claim, limit: u64) {
        let flight = Self::flight(&mut self.in_flight, claim.id);
        debug_assert!(flight.work == Work::Copy { source_read: false }, "grown before it is read");
        let end = flight.clusters.end;
        let most = (limit / self.size.bytes()).saturating_sub(end - flight.clusters.start);
        let granule = self.plan.granule / self.size.bytes();
        let stop = end.saturating_add(most / granule * granule).min(self.dirty.len());
        let whole = match self.dirty.next_clear(end, stop) {
            Some(clear) => clear / granule * granule,
            None => stop,
        };
        flight.clusters.end = whole;
        self.dirty.clear(end..whole);
        // Elsewhere it stands at what another claim gave back.
        if self.cursor == end {
            self.cursor = whole;
        }
        claim.clusters.end = whole;
        claim.range = self.size.bytes_of(claim.clusters.clone(), self.length);
    }

    /// The first piece of a claim, with who has it.
    pub fn first_piece(&self, claim: &Claim) -> (ByteRange, Holder) {
        self.piece(claim.clusters.clone())
    }

    /// The pieces of a claim, in order, each with who has it. Stable until the claim is finished.
    pub fn pieces(&self, claim: &Claim) -> Vec<(ByteRange, Holder)> {
        let mut pieces = Vec::new();
        let mut rest = claim.range;
        while !rest.is_empty() {
            let piece = self.piece(self.size.covering(rest));
            rest = ByteRange::between(piece.0.end(), rest.end());
            pieces.push(piece);
        }
        pieces
    }

    /// The bytes of a copy are in memory: writers may overwrite its clusters. Returns them, free from now on.
    pub fn source_read(&mut self, claim: &Claim) -> Clusters {
        let flight = Self::flight(&mut self.in_flight, claim.id);
        debug_assert!(flight.work == Work::Copy { source_read: false }, "read once");
        flight.work = Work::Copy { source_read: true };
        flight.clusters.clone()
    }

    /// The end of a copy. `ok`: the target has it; returns the runs that the overlay may drop. Otherwise it is dirty
    /// again; what had been released to writers by then and is in no overlay is lost, and with it the instant.
    pub fn finish(&mut self, claim: Claim, ok: bool) -> Vec<ByteRange> {
        let flight = self.land(claim.id);
        debug_assert!(flight.work != Work::Capture, "a copy");
        let overlay: Vec<_> = self.saved.runs(flight.clusters.clone()).collect();
        if ok {
            self.saved.clear(flight.clusters);
            return overlay.into_iter().map(|run| self.size.bytes_of(run, self.length)).collect();
        }
        let saved: u64 = overlay.iter().map(|run| run.end - run.start).sum();
        let unsaved = flight.clusters.end - flight.clusters.start - saved;
        self.lost |= flight.work == Work::Copy { source_read: true } && unsaved > 0;
        if self.plan.ascending {
            self.cursor = self.cursor.min(flight.clusters.start);
        }
        self.dirty.set(flight.clusters);
        Vec::new()
    }

    /// A write to `range` is waiting: what has it to do? Ask again until `Proceed`.
    pub fn trap(&mut self, range: ByteRange) -> Trap<Claim> {
        let touched = self.size.covering(range);
        debug_assert!(touched.end <= self.dirty.len(), "write within the disk");
        let mut wait = false;
        let mut cluster = touched.start;
        while cluster < touched.end {
            if self.must_preserve(cluster) {
                let end = (cluster..touched.end).find(|&c| !self.must_preserve(c)).unwrap_or(touched.end);
                return Trap::Preserve(self.claim(cluster..end, Work::Capture));
            }
            wait |= !self.is_free(cluster);
            cluster += 1;
        }
        if wait { Trap::Wait } else { Trap::Proceed }
    }

    /// The end of a capture. `ok`: the overlay has it, and these clusters are free from now on.
    pub fn captured(&mut self, claim: Claim, ok: bool) -> Option<Clusters> {
        let flight = self.land(claim.id);
        debug_assert!(flight.work == Work::Capture, "a capture");
        self.dirty.set(flight.clusters.clone());
        ok.then(|| {
            self.saved.set(flight.clusters.clone());
            flight.clusters
        })
    }

    /// May a writer overwrite this cluster without asking? Once true, true for the rest of the job, unless it is lost.
    pub fn is_free(&self, cluster: u64) -> bool {
        if self.saved.get(cluster) {
            return true;
        }
        match self.in_flight.iter().find(|f| f.clusters.contains(&cluster)) {
            Some(flight) => flight.work == Work::Copy { source_read: true },
            None => !self.dirty.get(cluster),
        }
    }

    /// Tells `each` every run of clusters that writers may overwrite without asking; some of them twice.
    pub fn each_free(&self, mut each: impl FnMut(Clusters)) {
        let count = self.dirty.len();
        self.saved.runs(0..count).for_each(&mut each);
        let read = Work::Copy { source_read: true };
        let mut held: Vec<_> = self.in_flight.iter().filter(|f| f.work != read).map(|f| f.clusters.clone()).collect();
        held.sort_by_key(|clusters| clusters.start);
        // Between those, what is not dirty is on the target or in a copier's memory.
        let mut from = 0;
        for clusters in held {
            self.dirty.clear_runs(from..clusters.start).for_each(&mut each);
            from = clusters.end;
        }
        self.dirty.clear_runs(from..count).for_each(&mut each);
    }

    /// Everything is on the target, and nothing is in flight.
    pub fn is_done(&self) -> bool {
        self.in_flight.is_empty() && self.dirty.count_ones() == 0
    }

    /// A copy failed after its clusters were released: the target can no longer be made whole.
    pub fn is_lost(&self) -> bool {
        self.lost
    }

    /// Bytes that are not yet on the target and in nobody's hands.
    pub fn dirty_bytes(&self) -> u64 {
        let count = self.dirty.len();
        let past_end = match self.dirty.next_set(count.saturating_sub(1), count) {
            Some(last) => self.size.bytes() - self.size.bytes_of(last..count, self.length).length,
            None => 0,
        };
        // In 128 bits: the last cluster may end past 2^64.
        (u128::from(self.dirty.count_ones()) * u128::from(self.size.bytes()) - u128::from(past_end)) as u64
    }

    /// Clusters that the overlay holds.
    pub fn saved_clusters(&self) -> u64 {
        self.saved.count_ones()
    }

    fn must_preserve(&self, cluster: u64) -> bool {
        self.dirty.get(cluster) && !self.saved.get(cluster)
    }

    /// The first of `clusters` and those after it with the same holder.
    fn piece(&self, clusters: Clusters) -> (ByteRange, Holder) {
        let Clusters { start, end } = clusters;
        let (holder, stop) = if self.saved.get(start) {
            (Holder::Overlay, self.saved.next_clear(start, end))
        } else {
            (Holder::Source, self.saved.next_set(start, end))
        };
        (self.size.bytes_of(start..stop.unwrap_or(end), self.length), holder)
    }

    fn claim(&mut self, clusters: Clusters, work: Work) -> Claim {
        debug_assert!(
            self.in_flight.iter().all(|f| f.clusters.end <= clusters.start || clusters.end <= f.clusters.start),
            "one mover for a cluster"
        );
        let id = self.next_id;
        self.next_id += 1;
        self.dirty.clear(clusters.clone());
        self.in_flight.push(Flight { id, clusters: clusters.clone(), work });
        Claim { id, range: self.size.bytes_of(clusters.clone(), self.length), clusters }
    }

    fn flight(in_flight: &mut [Flight], id: u64) -> &mut Flight {
        in_flight.iter_mut().find(|f| f.id == id).expect("a claim is in flight until it is finished")
    }

    fn land(&mut self, id: u64) -> Flight {
        let at = self.in_flight.iter().position(|f| f.id == id).expect("a claim is finished once");
        self.in_flight.swap_remove(at)
    }

    fn granule(&self) -> u64 {
        self.plan.granule / self.size.bytes()
    }

    /// Whole granules in `limit` bytes, one at least.
    fn most(&self, limit: u64) -> u64 {
        let granule = self.granule();
        (limit / self.size.bytes()).max(granule) / granule * granule
    }

    /// First run of wholly dirty granules in `from..to`, at most `limit` bytes but one granule at least.
    fn dirty_granules(&self, from: u64, to: u64, limit: u64) -> Option<Clusters> {
        let granule = self.granule();
        let most = self.most(limit);
        let mut from = from;
        loop {
            let first = self.dirty.next_set(from, to)? / granule * granule;
            let stop = first.saturating_add(most).min(self.dirty.len());
            let end = self.dirty.next_clear(first, stop).unwrap_or(stop);
            let whole = if end == self.dirty.len() { end } else { end / granule * granule };
            if whole > first {
                return Some(first..whole);
            }
            from = first + granule;
        }
    }

    /// The next run of granules that are wholly dirty and each at least partly in the overlay.
    fn saved_granules(&self, limit: u64) -> Option<Clusters> {
        let granule = self.granule();
        let count = self.saved.len();
        let first =
            self.saved_granule(self.saved_cursor, count).or_else(|| self.saved_granule(0, self.saved_cursor))?;
        let stop = first.saturating_add(self.most(limit)).min(count);
        let mut end = first;
        while end < stop && self.is_saved_granule(end) {
            end = (end + granule).min(count);
        }
        Some(first..end)
    }

    fn saved_granule(&self, from: u64, to: u64) -> Option<u64> {
        let granule = self.granule();
        let mut from = from;
        loop {
            let first = self.saved.next_set(from, to)? / granule * granule;
            if self.is_saved_granule(first) {
                return Some(first);
            }
            from = first + granule;
        }
    }

    fn is_saved_granule(&self, first: u64) -> bool {
        let end = (first + self.granule()).min(self.dirty.len());
        self.dirty.next_clear(first, end).is_none() && self.saved.next_set(first, end).is_some()
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests;
