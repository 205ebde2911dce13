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
