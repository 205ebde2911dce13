//! From the hashes of the blocks to the hash of the whole.

use super::sums::hash_of_zeroes;
use super::{BLOCK, BlockHash, Digest};
use crate::ground::range::ByteRange;
use blake3::hazmat::{Mode, left_subtree_len, merge_subtrees_non_root, merge_subtrees_root};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};
use std::thread;

/// What a thread computes at once.
const STRETCH: u64 = 1 << 30;

impl Digest {
    /// BLAKE3 of the whole disk, as `b3sum` prints it of the raw image. `None`: the disk is one block at most, of which
    /// [`super::Found`] knows it, or `go_on` said no.
    ///
    /// Hashes each zero block, since even zeroes have another hash at another place: some gigabytes a second and thread.
    pub fn whole(&self, threads: usize, go_on: &(dyn Fn() -> bool + Sync)) -> Option<blake3::Hash> {
        if self.length <= BLOCK {
            return None;
        }
        if self.length <= STRETCH {
            return Some(self.root(&|range| self.subtree(range)));
        }
        let count = self.length.div_ceil(STRETCH);
        let stretches = Mutex::new(vec![BlockHash::default(); count as usize]);
        let (next, stopped) = (AtomicU64::new(0), AtomicBool::new(false));
        let work = || {
            while !stopped.load(Relaxed) {
                let number = next.fetch_add(1, Relaxed);
                if number >= count {
                    return;
                }
                if !go_on() {
                    stopped.store(true, Relaxed);
                    return;
                }
                let start = number * STRETCH;
                let hash = self.subtree(ByteRange::between(start, start.saturating_add(STRETCH).min(self.length)));
                stretches.lock().unwrap_or_else(PoisonError::into_inner)[number as usize] = hash;
            }
        };
        thread::scope(|scope| {
            (1..threads).for_each(|_| drop(scope.spawn(work)));
            work();
        });
        let stretches = stretches.into_inner().unwrap_or_else(PoisonError::into_inner);
        let known = |range: ByteRange| above(range, STRETCH, &|range| stretches[(range.offset / STRETCH) as usize]);
        (!stopped.load(Relaxed)).then(|| self.root(&known))
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
