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

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn clusters_grow_with_the_device_from_4_to_64_kib() {
        const GIB: u64 = 1 << 30;
        let sizes = [
            (0, 4),
            (1, 4),
            (256 * GIB, 4),
            (256 * GIB + 1, 8),
            (512 * GIB, 8),
            (512 * GIB + 1, 16),
            (2048 * GIB, 32),
            (2048 * GIB + 1, 64),
            (4096 * GIB, 64),
            (16384 * GIB, 64),
            (u64::MAX, 64),
        ];
        for (length, kib) in sizes {
            assert_eq!(ClusterSize::for_device(length).bytes(), kib << 10, "{length} bytes");
        }
    }

    #[test]
    fn bitmap_is_8_mib_at_most_up_to_4_tib() {
        for tib in [1, 2, 3, 4] {
            let length = tib << 40;
            assert!(ClusterSize::for_device(length).count(length) <= 8 << 23);
        }
    }

    #[test]
    fn largest_ranges_do_not_overflow() {
        let size = ClusterSize::new(1 << 16);
        let all = ByteRange::new(0, u64::MAX);
        assert_eq!(size.count(u64::MAX), 1 << 48);
        assert_eq!(size.covering(all), 0..1 << 48);
        assert_eq!(size.bytes_of(0..1 << 48, u64::MAX), all);
        assert_eq!(size.covering(ByteRange::new(u64::MAX, 0)), (1 << 48) - 1..(1 << 48) - 1);
    }

    proptest! {
        #![proptest_config(crate::ground::cases(500))]

        #[test]
        fn covering_is_every_cluster_with_a_byte_of_the_range(bits in 0..6u32, offset in 0..300u64, length in 0..300u64) {
            let size = ClusterSize::new(1 << bits);
            let range = ByteRange::new(offset, length);
            let mut naive: Vec<u64> = (offset..range.end()).map(|byte| byte >> bits).collect();
            naive.dedup();
            prop_assert_eq!(size.covering(range).collect::<Vec<_>>(), naive);
        }

        #[test]
        fn bytes_of_clusters_end_with_the_device(bits in 0..6u32, length in 0..300u64, first in 0..40u64, count in 0..40u64) {
            let size = ClusterSize::new(1 << bits);
            let range = size.bytes_of(first..first + count, length);
            let naive = (0..length).filter(|byte| (first..first + count).contains(&(byte >> bits)));
            prop_assert_eq!((range.offset..range.end()).collect::<Vec<_>>(), naive.collect::<Vec<_>>());
            prop_assert_eq!(size.count(length), (0..length).map(|byte| (byte >> bits) + 1).max().unwrap_or(0));
        }
    }
}
