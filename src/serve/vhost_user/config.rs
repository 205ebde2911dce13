//! What the guest is told of the disk: features and the configuration space. virtio 1.2, 5.2.3 and 5.2.4.

use super::perform::{MOST_RANGES, MOST_SECTORS};
use super::request::SECTOR;
use crate::serve::disk::Disk;
use virtio_bindings::virtio_blk as blk;
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

/// Entries of a queue at most, and by default.
pub const QUEUE_SIZE: u16 = 256;
/// Descriptors of data in a request. A guest without indirect descriptors has 128 for all of it in QEMU.
const SEGMENTS: u32 = 126;
/// Where the cache's mode is, the only field that a guest writes.
pub const WRITEBACK: usize = 32;
/// Bytes of all fields that we know.
const LENGTH: usize = 60;

fn bit(feature: u32) -> u64 {
    1 << feature
}

/// What a disk can do, but for what belongs to vhost-user itself.
pub fn features(disk: &Disk, queues: u16) -> u64 {
    let always = [
        blk::VIRTIO_BLK_F_SEG_MAX,
        blk::VIRTIO_BLK_F_BLK_SIZE,
        blk::VIRTIO_BLK_F_TOPOLOGY,
        blk::VIRTIO_BLK_F_FLUSH,
        blk::VIRTIO_BLK_F_CONFIG_WCE,
        VIRTIO_F_VERSION_1,
        VIRTIO_RING_F_EVENT_IDX,
        VIRTIO_RING_F_INDIRECT_DESC,
    ];
    let changes = [blk::VIRTIO_BLK_F_DISCARD, blk::VIRTIO_BLK_F_WRITE_ZEROES];
    let mut features = always.map(bit).iter().sum();
    features |= if disk.is_read_only() { bit(blk::VIRTIO_BLK_F_RO) } else { changes.map(bit).iter().sum() };
    if queues > 1 {
        features |= bit(blk::VIRTIO_BLK_F_MQ);
    }
    features
}

/// A guest that knows neither flushes nor the cache's mode expects its writes to be durable when they are answered.
pub fn writes_through(acknowledged: u64, writeback: bool) -> bool {
    let has = |feature| acknowledged & bit(feature) != 0;
    if has(blk::VIRTIO_BLK_F_CONFIG_WCE) && has(blk::VIRTIO_BLK_F_FLUSH) {
        !writeback
    } else {
        !has(blk::VIRTIO_BLK_F_FLUSH)
    }
}

/// The configuration space, `size` bytes from `offset`; zeroes where we know of no field.
pub fn space(disk: &Disk, queues: u16, writeback: bool, offset: u32, size: u32) -> Vec<u8> {
    // Requests may be any whole sectors; these cost no more than they move.
    let physical = disk.sizes().preferred.max(SECTOR as u32) / SECTOR as u32;
    let mut bytes = vec![0; LENGTH];
    let mut put = |at: usize, field: &[u8]| bytes[at..at + field.len()].copy_from_slice(field);
    put(0, &(disk.length() / SECTOR).to_le_bytes());
    put(12, &SEGMENTS.to_le_bytes());
    put(20, &(SECTOR as u32).to_le_bytes());
    put(24, &[physical.ilog2() as u8]);
    put(26, &(physical as u16).to_le_bytes());
    put(WRITEBACK, &[u8::from(writeback)]);
    put(34, &queues.to_le_bytes());
    put(36, &MOST_SECTORS.to_le_bytes());
    put(40, &MOST_RANGES.to_le_bytes());
    put(44, &physical.to_le_bytes());
    put(48, &MOST_SECTORS.to_le_bytes());
    put(52, &MOST_RANGES.to_le_bytes());
    put(56, &[1]);
    let known = bytes.into_iter().skip(offset as usize);
    known.chain(std::iter::repeat(0)).take(size as usize).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::raw::Raw;
    use crate::serve::disk::DiskOptions;
    use std::sync::Arc;

    fn disk(read_only: bool) -> Disk {
        let raw = Raw::fresh(tempfile::tempfile().unwrap(), (1 << 20) + 100).unwrap();
        let (name, path) = ("d".into(), "d".into());
        let options = DiskOptions { name, path, format: None, read_only, secret: None, writer_dir: None };
        Disk::over(&options, Arc::new(raw))
    }

    #[test]
    fn a_guest_is_told_that_a_disk_is_read_only_and_what_it_can_change() {
        let changes = bit(blk::VIRTIO_BLK_F_DISCARD) | bit(blk::VIRTIO_BLK_F_WRITE_ZEROES);
        let [read_only, several] = [bit(blk::VIRTIO_BLK_F_RO), bit(blk::VIRTIO_BLK_F_MQ)];
        let of = |is_read_only, queues| features(&disk(is_read_only), queues) & (changes | read_only | several);
        assert_eq!([of(false, 1), of(true, 1)], [changes, read_only]);
        assert_eq!([of(false, 2), of(true, 16)], [changes | several, read_only | several]);
    }

    #[test]
    fn a_write_is_durable_at_once_for_a_guest_that_can_not_or_does_not_want_to_flush() {
        let [flush, mode] = [bit(blk::VIRTIO_BLK_F_FLUSH), bit(blk::VIRTIO_BLK_F_CONFIG_WCE)];
        // A guest that does not know of the mode can't have chosen it.
        let expected = [(0, true, true), (mode, true, true), (flush, false, false), (flush | mode, false, true)];
        for (acknowledged, writeback, through) in expected {
            assert_eq!(writes_through(acknowledged, writeback), through, "{acknowledged:#x}, {writeback}");
        }
        assert!(!writes_through(flush | mode, true) && !writes_through(flush, true));
    }

    #[test]
    fn the_configuration_space_is_what_the_specification_says_and_zeroes_behind_it() {
        let space = space(&disk(false), 4, true, 0, 80);
        let at = |offset: usize, size: usize| {
            space[offset..offset + size].iter().rev().fold(0_u64, |word, byte| word << 8 | u64::from(*byte))
        };
        // Whole sectors alone; most segments; block size; blocks of 4 KiB as an exponent and as the least that is quick.
        assert_eq!([at(0, 8), at(12, 4), at(20, 4), at(24, 1), at(26, 2)], [2048, 126, 512, 3, 8]);
        // The cache's mode, queues, then the limits of a discard and of a write of zeroes, which may unmap.
        assert_eq!([at(32, 1), at(34, 2), at(36, 4), at(40, 4), at(44, 4)], [1, 4, 1 << 22, 32, 8]);
        assert_eq!([at(48, 4), at(52, 4), at(56, 1), at(57, 8), at(72, 8)], [1 << 22, 32, 1, 0, 0]);
        assert_eq!(super::space(&disk(false), 4, false, 30, 6), [0, 0, 0, 0, 4, 0]);
        assert_eq!(super::space(&disk(false), 4, true, u32::MAX, 2), [0, 0]);
    }
}
