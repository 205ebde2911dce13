//! What a disk holds, in hashes: BLAKE3 of the whole, from hashes of its blocks, which may come in any order.
//!
//! BLAKE3 is a binary tree over pieces of 1 KiB, and so a block of 4 MiB is one subtree of it: its *chaining value* is made
//! of its bytes and its place, and the chaining values of all blocks make the hash of the whole, the one that `b3sum` prints
//! of the raw image. A block that is zero throughout has no hash here: nothing has to be computed to see that it is zero.

mod root;
mod spread;
mod sums;

pub use sums::{Found, Summed, Sums};

use crate::ground::range::ByteRange;
use std::collections::BTreeSet;

/// Bytes of a block; the last one may be shorter.
pub const BLOCK: u64 = 4 << 20;

/// BLAKE3 of a block as a part of its disk: the chaining value of its subtree.
pub type BlockHash = [u8; 32];

/// The contents of a disk, as of one reading. Two of them are equal when the contents are, whatever the disks' formats.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Digest {
    length: u64,
    /// By number, ascending. A block that is not here is zero throughout.
    hashes: Vec<(u64, BlockHash)>,
}

impl Digest {
    /// Of a disk of `length` bytes. `None` unless the numbers of `hashes` ascend and are of blocks of the disk.
    pub fn new(length: u64, hashes: Vec<(u64, BlockHash)>) -> Option<Self> {
        let ascend = hashes.is_sorted_by(|one, next| one.0 < next.0);
        let within = hashes.last().is_none_or(|(last, _)| *last < length.div_ceil(BLOCK));
        (ascend && within).then_some(Self { length, hashes })
    }

    /// Bytes of the disk.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Blocks of the disk.
    pub fn blocks(&self) -> u64 {
        self.length.div_ceil(BLOCK)
    }

    /// Blocks that are not zero: number and hash, ascending.
    pub fn hashes(&self) -> &[(u64, BlockHash)] {
        &self.hashes
    }

    /// Of one block; `None`: it is zero throughout.
    pub fn hash_of(&self, block: u64) -> Option<&BlockHash> {
        self.hashes.binary_search_by_key(&block, |(number, _)| *number).ok().map(|at| &self.hashes[at].1)
    }

    /// Is no block of `first` up to, without, `end` other than zero?
    fn is_zero(&self, first: u64, end: u64) -> bool {
        let at = self.hashes.partition_point(|(number, _)| *number < first);
        self.hashes.get(at).is_none_or(|(number, _)| *number >= end)
    }

    /// Where two disks of one length differ, to whole blocks: ascending, neighbours joined.
    pub fn differences(&self, other: &Self) -> Vec<ByteRange> {
        debug_assert_eq!(self.length, other.length, "disks of one length");
        let missing = |one: &Self, other: &Self| -> Vec<u64> {
            let differs = |entry: &&(u64, BlockHash)| other.hash_of(entry.0) != Some(&entry.1);
            one.hashes.iter().filter(differs).map(|(block, _)| *block).collect()
        };
        ranges(self.length, missing(self, other).into_iter().chain(missing(other, self)))
    }
}

/// Blocks as ranges of a disk of `length` bytes: ascending, neighbours joined.
pub fn ranges(length: u64, blocks: impl IntoIterator<Item = u64>) -> Vec<ByteRange> {
    let mut joined: Vec<ByteRange> = Vec::new();
    for block in blocks.into_iter().collect::<BTreeSet<u64>>() {
        let range = ByteRange::between(block * BLOCK, (block.saturating_mul(BLOCK).saturating_add(BLOCK)).min(length));
        match joined.last_mut() {
            Some(last) if last.end() == range.offset => last.length += range.length,
            _ => joined.push(range),
        }
    }
    joined
}

#[cfg(test)]
mod tests;
