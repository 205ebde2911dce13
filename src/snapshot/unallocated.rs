//! Clusters that the source's image did not hold at the instant, as far as writers came before the copier: once they have
//! written there, the image's own tables no longer tell.

use crate::ground::bitmap::Bitmap;
use crate::ground::cluster::{ClusterSize, Clusters};
use crate::ground::range::{Allocation, ByteRange, Extent};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// See the module. Shared by those who preserve and those who copy.
#[derive(Debug)]
pub struct Unallocated {
    size: ClusterSize,
    length: u64,
    clusters: Mutex<Bitmap>,
}

impl Unallocated {
    /// Of a disk of `length` bytes that is preserved in clusters of `size`.
    pub fn new(length: u64, size: ClusterSize) -> Self {
        Self { size, length, clusters: Mutex::new(Bitmap::new(size.count(length))) }
    }

    fn clusters(&self) -> MutexGuard<'_, Bitmap> {
        self.clusters.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Remembers which clusters the image does not hold, as `extent` says, of a range that nobody may overwrite yet.
    pub fn note(&self, extent: Extent) {
        if extent.allocation == Allocation::Unallocated {
            self.clusters().set(self.within(extent.range));
        }
    }

    /// The beginning of `piece`, which the overlay holds: was it allocated?
    pub fn status(&self, piece: ByteRange) -> Extent {
        let of = self.size.covering(piece);
        let clusters = self.clusters();
        let is_unallocated = clusters.get(of.start);
        let end =
            if is_unallocated { clusters.next_clear(of.start, of.end) } else { clusters.next_set(of.start, of.end) };
        let range = self.size.bytes_of(of.start..end.unwrap_or(of.end), self.length).intersect(piece);
        if is_unallocated { Extent::unallocated(range) } else { Extent::data(range) }
    }

    /// The clusters that `range` covers whole.
    fn within(&self, range: ByteRange) -> Clusters {
        let touched = self.size.covering(range);
        let is_whole = |cluster: u64| {
            let bytes = self.size.bytes_of(cluster..cluster + 1, self.length);
            bytes.intersect(range) == bytes
        };
        let start = if is_whole(touched.start) { touched.start } else { touched.start + 1 };
        let end = if touched.end > start && !is_whole(touched.end - 1) { touched.end - 1 } else { touched.end };
        start..end.max(start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noted(hole: ByteRange) -> Vec<(ByteRange, Allocation)> {
        let unallocated = Unallocated::new(41_000, ClusterSize::new(4096));
        unallocated.note(Extent::data(ByteRange::between(0, hole.offset)));
        unallocated.note(Extent::unallocated(hole));
        unallocated.note(Extent::zero(ByteRange::between(hole.end(), 41_000)));
        let (mut found, mut rest) = (Vec::new(), ByteRange::new(0, 41_000));
        while !rest.is_empty() {
            let extent = unallocated.status(rest);
            found.push((extent.range, extent.allocation));
            rest = ByteRange::between(extent.range.end(), rest.end());
        }
        found
    }

    #[test]
    fn only_what_is_wholly_unallocated_counts() {
        use Allocation::{Data, Unallocated};
        let hole = ByteRange::between(8000, 20_000);
        let expected = [
            (ByteRange::between(0, 8192), Data),
            (ByteRange::between(8192, 16_384), Unallocated),
            (ByteRange::between(16_384, 41_000), Data),
        ];
        assert_eq!(noted(hole), expected);
        assert_eq!(noted(ByteRange::between(8193, 16_383)).len(), 1, "no whole cluster");
        let tail = noted(ByteRange::between(36_864, 41_000));
        assert_eq!(tail[1..], [(ByteRange::between(36_864, 41_000), Unallocated)], "the last cluster is a short one");
    }
}
