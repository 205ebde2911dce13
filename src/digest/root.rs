//! From the hashes of the blocks to the hash of the whole.

use super::spread::spread;
use super::sums::hash_of_zeroes;
use super::{BLOCK, BlockHash, Digest};
use crate::ground::range::ByteRange;
use blake3::hazmat::{Mode, left_subtree_len, merge_subtrees_non_root, merge_subtrees_root};
use std::sync::{Mutex, PoisonError};

/// What a thread computes at once: small enough that all threads have some, and few enough for memory.
const SMALLEST_STRETCH: u64 = 16 << 20;
const LARGEST_STRETCH: u64 = 1 << 30;
const STRETCHES: u64 = 4096;

impl Digest {
    /// BLAKE3 of the whole disk, as `b3sum` prints it of the raw image. `None`: the disk is one block at most, of which
    /// [`super::Found`] knows it, or `go_on` said no.
    ///
    /// Hashes each zero block, since even zeroes have another hash at another place: some gigabytes a second and thread.
    pub fn whole(&self, threads: usize, go_on: &(dyn Fn() -> bool + Sync)) -> Option<blake3::Hash> {
        if self.length <= BLOCK {
            return None;
        }
        let stretch = stretch_of(self.length);
        if self.length <= stretch {
            return Some(self.root(&|range| self.subtree(range)));
        }
        let count = self.length.div_ceil(stretch);
        let stretches = Mutex::new(vec![BlockHash::default(); count as usize]);
        let went = spread(count, threads, go_on, &|number| {
            let start = number * stretch;
            let hash = self.subtree(ByteRange::between(start, start.saturating_add(stretch).min(self.length)));
            stretches.lock().unwrap_or_else(PoisonError::into_inner)[number as usize] = hash;
        });
        let stretches = stretches.into_inner().unwrap_or_else(PoisonError::into_inner);
        let known = |range: ByteRange| above(range, stretch, &|range| stretches[(range.offset / stretch) as usize]);
        went.then(|| self.root(&known))
    }

    fn root(&self, subtree: &dyn Fn(ByteRange) -> BlockHash) -> blake3::Hash {
        let left = left_subtree_len(self.length);
        let (left, right) = (ByteRange::new(0, left), ByteRange::between(left, self.length));
        merge_subtrees_root(&subtree(left), &subtree(right), Mode::Hash)
    }

    fn subtree(&self, range: ByteRange) -> BlockHash {
        above(range, BLOCK, &|block| match self.hash_of(block.offset / BLOCK) {
            Some(hash) => *hash,
            None => hash_of_zeroes(block),
        })
    }
}

/// Bytes of a stretch of a disk of `length` bytes.
pub(super) fn stretch_of(length: u64) -> u64 {
    (length / STRETCHES).next_power_of_two().clamp(SMALLEST_STRETCH, LARGEST_STRETCH)
}

/// The chaining value of `range` over the known ones of ranges of `unit` bytes.
fn above(range: ByteRange, unit: u64, known: &dyn Fn(ByteRange) -> BlockHash) -> BlockHash {
    if range.length <= unit {
        return known(range);
    }
    let middle = range.offset + left_subtree_len(range.length);
    let left = above(ByteRange::between(range.offset, middle), unit, known);
    let right = above(ByteRange::between(middle, range.end()), unit, known);
    merge_subtrees_non_root(&left, &right, Mode::Hash)
}
