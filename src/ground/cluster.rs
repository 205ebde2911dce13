//! The unit of tracking, and runs of it.

use super::range::ByteRange;

const SMALLEST: u64 = 4 << 10;
const LARGEST: u64 = 64 << 10;
/// Up to here clusters are the smallest; from here they double with the device.
const SMALLEST_UP_TO: u64 = 256 << 30;

/// A power of two of bytes: what is trapped and saved as one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClusterSize {
    bits: u32,
}

/// A run of clusters: `first` and the clusters after it, without `end`.
pub type Clusters = std::ops::Range<u64>;

impl ClusterSize {
    /// `bytes` must be a power of two.
    pub const fn new(bytes: u64) -> Self {
        assert!(bytes.is_power_of_two(), "cluster size is a power of two");
        Self { bits: bytes.trailing_zeros() }
    }

    /// 4 KiB up to a device of 256 GiB, doubling with it to 64 KiB from 4 TiB on.
    pub fn for_device(length: u64) -> Self {
        let mut bytes = SMALLEST;
        while bytes < LARGEST && length > SMALLEST_UP_TO * (bytes / SMALLEST) {
            bytes *= 2;
        }
        Self::new(bytes)
    }

    /// In bytes.
    pub const fn bytes(self) -> u64 {
        1 << self.bits
    }

    /// Number of clusters that hold `length` bytes; the last may be partial.
    pub const fn count(self, length: u64) -> u64 {
        length.div_ceil(self.bytes())
    }

    /// Every cluster that `range` touches.
    pub const fn covering(self, range: ByteRange) -> Clusters {
        let first = range.offset >> self.bits;
        if range.is_empty() { first..first } else { first..((range.end() - 1) >> self.bits) + 1 }
    }

    /// The bytes of `clusters` on a device of `length` bytes.
    pub fn bytes_of(self, clusters: Clusters, length: u64) -> ByteRange {
        let offset = (clusters.start << self.bits).min(length);
        // The last cluster may end past the device, and past 2^64 with it.
        let end = if clusters.end >= self.count(length) { length } else { clusters.end << self.bits };
        ByteRange::between(offset, end.max(offset))
    }
}
