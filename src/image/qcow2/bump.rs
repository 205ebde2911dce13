//! Space in a new qcow2 file: handed out in ascending order, never taken back.

use std::io;
use std::ops::Range;

/// The next free byte of the file. Offsets in bytes.
#[derive(Debug)]
pub struct Bump {
    cluster_size: u64,
    /// First cluster that nobody has.
    next: u64,
    /// What is left of the last cluster that holds compressed data.
    room: Range<u64>,
    /// Offsets end here: a table entry has no bits for more.
    limit: u64,
}

impl Bump {
    /// Free from the second cluster on; the first one is the header's.
    pub fn new(cluster_size: u64, limit: u64) -> Self {
        Self { cluster_size, next: cluster_size, room: 0..0, limit }
    }

    /// First cluster that nobody has: the end of all that was handed out.
    pub fn end(&self) -> u64 {
        self.next
    }

    /// `count` consecutive clusters; the offset of the first.
    pub fn clusters(&mut self, count: u64) -> io::Result<u64> {
        let end = count
            .checked_mul(self.cluster_size)
            .and_then(|bytes| self.next.checked_add(bytes))
            .filter(|&end| end <= self.limit)
            .ok_or_else(|| io::Error::new(io::ErrorKind::StorageFull, "a qcow2 file cannot grow past its offsets"))?;
        let host = self.next;
        self.next = end;
        Ok(host)
    }

    /// Room for compressed clusters of `lengths` bytes: the offset of each. They follow each other without a gap, except
    /// for one where the cluster that the last call left half full is not followed by free space.
    pub fn packed(&mut self, lengths: &[u32]) -> io::Result<Vec<u64>> {
        let mut hosts = Vec::with_capacity(lengths.len());
        let mut rest = lengths.iter().map(|&length| u64::from(length)).sum::<u64>();
        for length in lengths.iter().map(|&length| u64::from(length)) {
            if length > self.room.end - self.room.start {
                self.grow_room(rest)?;
            }
            hosts.push(self.room.start);
            self.room.start += length;
            rest -= length;
        }
        Ok(hosts)
    }

    /// Makes room for `bytes`, as a continuation of the old room where the file goes on free behind it.
    fn grow_room(&mut self, bytes: u64) -> io::Result<()> {
        let continues = self.room.end == self.next && !self.room.is_empty();
        let old = if continues { self.room.end - self.room.start } else { 0 };
        let host = self.clusters((bytes - old).div_ceil(self.cluster_size))?;
        self.room = if continues { self.room.start..self.next } else { host..self.next };
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn compressed_clusters_follow_each_other_across_calls() {
        let mut bump = Bump::new(512, 1 << 40);
        assert_eq!(bump.packed(&[100, 300, 400]).unwrap(), [512, 612, 912]);
        assert_eq!(bump.packed(&[200, 300]).unwrap(), [1312, 1512]);
        assert_eq!(bump.end(), 2048);
    }

    #[test]
    fn a_half_full_cluster_is_filled_before_a_new_one_begins() {
        let mut bump = Bump::new(512, 1 << 40);
        assert_eq!(bump.packed(&[100]).unwrap(), [512]);
        assert_eq!(bump.clusters(2).unwrap(), 1024);
        assert_eq!(bump.packed(&[200, 200, 90]).unwrap(), [612, 812, 2048]);
        assert_eq!(bump.packed(&[100]).unwrap(), [2138]);
    }

    #[test]
    fn the_file_ends_where_entries_have_no_bits() {
        let mut bump = Bump::new(512, 2048);
        assert_eq!(bump.clusters(3).unwrap(), 512);
        assert_eq!(bump.clusters(1).unwrap_err().kind(), io::ErrorKind::StorageFull);
        assert_eq!(bump.clusters(u64::MAX).unwrap_err().kind(), io::ErrorKind::StorageFull);
    }
}
