//! Compressed clusters that follow each other in the guest and lie close together in the file: one read for all.

use super::header::invalid;
use super::map::{Mapping, Piece};
use super::table::Compressed;
use crate::ground::range::ByteRange;
use std::io;

/// Bytes read at once. A single cluster's are at most as many.
const LIMIT: u64 = 4 << 20;
/// Bytes between the clusters, per cluster, that are cheaper read than skipped.
const SLACK: u64 = 4 << 10;

/// Guest bytes of one compressed cluster.
pub struct Part {
    /// The guest bytes that are wanted.
    pub range: ByteRange,
    /// Guest offset of the cluster.
    pub cluster: u64,
    /// Its compressed bytes.
    pub bytes: Compressed,
}

impl Part {
    fn of(piece: &Piece) -> Option<Self> {
        match piece.mapping {
            Mapping::Compressed { cluster, bytes } => Some(Self { range: piece.range, cluster, bytes }),
            _ => None,
        }
    }

    /// The error that this cluster does not inflate.
    pub fn damaged(&self, why: &str) -> io::Error {
        invalid(format!(
            "the compressed cluster for guest offset {:#x}, at host offset {:#x}+{}, is damaged: {why}",
            self.cluster, self.bytes.offset, self.bytes.length
        ))
    }
}

/// Parts, and the host bytes that hold all of them. Writers with several threads leave them in any order.
pub struct Batch {
    /// Host offset of the first byte.
    pub start: u64,
    /// Host offset after the last byte.
    pub end: u64,
    /// In the guest's order, without gaps.
    pub parts: Vec<Part>,
    /// Bytes of all parts and of the slack they may have.
    worth: u64,
}

impl Batch {
    /// A batch of one; `None` when `piece` is not compressed.
    pub fn of(piece: &Piece) -> Option<Self> {
        let part = Part::of(piece)?;
        let (start, length) = (part.bytes.offset, part.bytes.length);
        Some(Self { start, end: start + length, worth: length + SLACK, parts: vec![part] })
    }

    /// Takes in the piece that follows in the guest, if it is compressed and close by.
    pub fn join(&mut self, piece: &Piece) -> bool {
        let Some(part) = Part::of(piece) else { return false };
        let start = self.start.min(part.bytes.offset);
        let end = self.end.max(part.bytes.offset + part.bytes.length);
        let worth = self.worth + part.bytes.length + SLACK;
        if end - start > worth.min(LIMIT) {
            return false;
        }
        (self.start, self.end, self.worth) = (start, end, worth);
        self.parts.push(part);
        true
    }

    /// Bytes of the guest that the parts cover.
    pub fn guest_length(&self) -> u64 {
        self.parts.iter().map(|part| part.range.length).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn piece(cluster: u64, offset: u64, length: u64) -> Piece {
        let bytes = Compressed { offset, length };
        Piece { range: ByteRange::new(cluster, 65536), mapping: Mapping::Compressed { cluster, bytes } }
    }

    fn batch(first: &Piece, more: &[Piece]) -> (u64, u64, usize) {
        let mut batch = Batch::of(first).expect("compressed");
        let joined = more.iter().take_while(|piece| batch.join(piece)).count();
        assert_eq!(batch.guest_length(), 65536 * (joined as u64 + 1));
        (batch.start, batch.end, joined)
    }

    #[test]
    fn neighbours_are_read_at_once_in_any_order() {
        let pieces = [piece(0x10000, 70000, 20000), piece(0x20000, 30000, 20000)];
        assert_eq!(batch(&piece(0, 50000, 20000), &pieces), (30000, 90000, 2));
    }

    #[test]
    fn a_cluster_far_away_is_read_alone() {
        assert_eq!(batch(&piece(0, 50000, 20000), &[piece(0x10000, 99000, 20000)]), (50000, 70000, 0));
        assert_eq!(batch(&piece(0, 50000, 20000), &[piece(0x10000, 0, 20000)]), (50000, 70000, 0));
    }

    #[test]
    fn a_batch_is_bounded() {
        let pieces: Vec<_> = (1..100).map(|i| piece(i << 16, i * 100_000, 100_000)).collect();
        assert_eq!(batch(&piece(0, 0, 100_000), &pieces), (0, 4_100_000, 40));
    }

    #[test]
    fn other_pieces_do_not_join() {
        let zero = Piece { range: ByteRange::new(0x10000, 65536), mapping: Mapping::Zero };
        assert!(Batch::of(&zero).is_none());
        assert_eq!(batch(&piece(0, 0, 512), &[zero]), (0, 512, 0));
    }
}
