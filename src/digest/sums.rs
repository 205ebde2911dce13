//! Adds up the hashes of a disk while its bytes go by, in any order, from many threads.

use super::spread::spread;
use super::{BLOCK, BlockHash, Digest, ranges};
use crate::ground::range::ByteRange;
use crate::ground::zero;
use blake3::Hasher;
use blake3::hazmat::{HasherExt, Mode, merge_subtrees_non_root};
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Bytes of a leaf of BLAKE3's tree: pieces start on multiples of it.
const LEAF: u64 = blake3::CHUNK_LEN as u64;
/// Hashed again and again for what is zero; it stays in a core's cache.
static ZEROES: [u8; 64 << 10] = [0; 64 << 10];

/// See the module. Each byte of the disk is added once.
pub struct Sums {
    length: u64,
    /// Known beforehand: what comes is compared with it.
    expected: Option<Arc<Digest>>,
    /// Subtrees of blocks whose zeroes may wait for [`Summed::found`].
    most_deferred: usize,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Blocks of which a part is missing.
    open: HashMap<u64, Open>,
    hashes: Vec<(u64, BlockHash)>,
    deferred: Vec<Block>,
    /// Subtrees of those.
    deferred_parts: usize,
    /// Blocks that are not as expected.
    differing: Vec<u64>,
    /// Bytes added.
    covered: u64,
    /// The content of a disk of one block at most.
    small: Vec<u8>,
}

/// Subtrees by offset in the block. Neighbours are joined when both are zero or both are hashed.
#[derive(Default)]
struct Open {
    covered: u64,
    subtrees: BTreeMap<u64, Subtree>,
}

/// A power of two of leaves, less where the disk ends.
#[derive(Clone, Copy)]
struct Subtree {
    size: u64,
    node: Node,
}

/// `Zero`: the bytes are, and nobody needs their hash so far.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Node {
    Zero,
    Hash(BlockHash),
}

/// A block that is complete.
struct Block {
    number: u64,
    /// By offset in the block, ascending; one if nothing has to be hashed any more.
    parts: Vec<(u64, Subtree)>,
}

/// All of a disk, before the zeroes that were put off are hashed.
pub struct Summed {
    length: u64,
    state: State,
}

/// What a disk turned out to hold.
#[derive(Debug)]
pub struct Found {
    /// Its contents.
    pub digest: Digest,
    /// BLAKE3 of the whole, where that is known without the blocks: of a disk of one block at most.
    pub whole: Option<blake3::Hash>,
    /// Blocks that are not as expected, in no order; empty where nothing was.
    pub differing: Vec<u64>,
}

impl Sums {
    /// Of a disk of `length` bytes; `expected`, of the same length, is what it should hold.
    pub fn new(length: u64, expected: Option<Arc<Digest>>) -> Self {
        let small = if length <= BLOCK { vec![0; length as usize] } else { Vec::new() };
        Self { length, expected, most_deferred: 0, state: Mutex::new(State { small, ..State::default() }) }
    }

    /// The same, for one who has more time after the last byte than before: zeroes that share a block with data are hashed
    /// by [`Summed::found`], as long as such blocks have no more than `most` pieces of up to 64 bytes.
    pub fn deferring(length: u64, most: usize) -> Self {
        Self { most_deferred: most, ..Self::new(length, None) }
    }

    /// Adds `bytes` that are at `offset`, a multiple of 1 KiB; their end is one too, or the disk's. Takes as long as hashing.
    /// False: a block that became complete is not as expected.
    pub fn add(&self, offset: u64, bytes: &[u8]) -> bool {
        let range = ByteRange::new(offset, bytes.len() as u64);
        let pieces: Vec<_> = self
            .pieces(range)
            .map(|(at, piece, size)| {
                let bytes = &bytes[(piece.offset - offset) as usize..][..piece.length as usize];
                let node = if zero::is_zero(bytes) { Node::Zero } else { Node::Hash(hash(bytes, piece.offset)) };
                (at, piece, Subtree { size, node })
            })
            .collect();
        let mut state = self.state();
        if !state.small.is_empty() {
            state.small[offset as usize..][..bytes.len()].copy_from_slice(bytes);
        }
        self.place_all(state, pieces)
    }

    /// Adds a run of zeroes, without looking at them; otherwise as [`Sums::add`].
    pub fn add_zeroes(&self, range: ByteRange) -> bool {
        let (first, end) = (range.offset.div_ceil(BLOCK), self.blocks_before(range.end()));
        if first >= end {
            return self.add_zero_part(range);
        }
        let (start, stop) = (first * BLOCK, (end.saturating_mul(BLOCK)).min(self.length));
        let head = self.add_zero_part(ByteRange::between(range.offset, start));
        let tail = self.add_zero_part(ByteRange::between(stop, range.end().max(stop)));
        let mut state = self.state();
        state.covered += stop - start;
        let Some(expected) = self.expected.as_ref().filter(|expected| !expected.is_zero(first, end)) else {
            return head && tail;
        };
        state.differing.extend((first..end).filter(|block| expected.hash_of(*block).is_some()));
        false
    }

    /// Whole blocks before `end`; the last one of the disk is whole as it is.
    fn blocks_before(&self, end: u64) -> u64 {
        if end == self.length { end.div_ceil(BLOCK) } else { end / BLOCK }
    }

    fn add_zero_part(&self, range: ByteRange) -> bool {
        let zero = |size| Subtree { size, node: Node::Zero };
        self.place_all(self.state(), self.pieces(range).map(|(at, piece, size)| (at, piece, zero(size))))
    }

    /// Places subtrees, and hashes what became complete once the lock is gone.
    fn place_all(
        &self,
        mut state: MutexGuard<'_, State>,
        pieces: impl IntoIterator<Item = (u64, ByteRange, Subtree)>,
    ) -> bool {
        let place = |(at, piece, subtree)| self.place(&mut state, at, piece, subtree);
        let complete: Vec<Block> = pieces.into_iter().filter_map(place).collect();
        drop(state);
        let mut as_expected = true;
        for block in complete {
            as_expected &= self.settle(block);
        }
        as_expected
    }

    /// Cuts `range` into the largest whole subtrees: offset in its block, bytes, size of the subtree.
    fn pieces(&self, range: ByteRange) -> impl Iterator<Item = (u64, ByteRange, u64)> {
        debug_assert!(range.is_empty() || range.offset.is_multiple_of(LEAF), "{range} starts within a leaf");
        debug_assert!(range.end().is_multiple_of(LEAF) || range.end() == self.length, "{range} ends within a leaf");
        let mut at = range.offset;
        std::iter::from_fn(move || {
            if at >= range.end() {
                return None;
            }
            let (offset, mut size) = (at % BLOCK, BLOCK);
            let stop = |size: u64| at.saturating_add(size).min(self.length);
            while !offset.is_multiple_of(size) || stop(size) > range.end() {
                size /= 2;
            }
            let piece = ByteRange::between(at, stop(size));
            at = piece.end();
            Some((offset, piece, size))
        })
    }

    /// Puts a subtree in its place and joins it with its neighbours as far as they are there; the block, if it is complete.
    fn place(&self, state: &mut State, offset: u64, piece: ByteRange, mut subtree: Subtree) -> Option<Block> {
        state.covered += piece.length;
        let number = piece.offset / BLOCK;
        let length = (self.length - number * BLOCK).min(BLOCK);
        let open = state.open.entry(number).or_default();
        open.covered += piece.length;
        let mut at = offset;
        while subtree.size != BLOCK {
            let is_left = at.is_multiple_of(2 * subtree.size);
            let other = if is_left { at + subtree.size } else { at - subtree.size };
            // Where the disk ends, there is nothing to the right: the parent is the subtree itself.
            if other < length {
                let sibling = open.subtrees.get(&other).filter(|sibling| sibling.size == subtree.size);
                let joined = sibling.and_then(|sibling| {
                    let (left, right) = if is_left { (subtree, *sibling) } else { (*sibling, subtree) };
                    join(left.node, right.node)
                });
                let Some(node) = joined else { break };
                open.subtrees.remove(&other);
                at = at.min(other);
                subtree.node = node;
            }
            subtree.size *= 2;
        }
        open.subtrees.insert(at, subtree);
        if open.covered < length {
            return None;
        }
        let parts = state.open.remove(&number).map(|open| open.subtrees.into_iter().collect())?;
        Some(Block { number, parts })
    }

    /// Hashes what is left of a complete block, or puts that off; false when it is not as expected.
    fn settle(&self, block: Block) -> bool {
        if block.is_mixed() {
            let mut state = self.state();
            if state.deferred_parts + block.parts.len() <= self.most_deferred {
                state.deferred_parts += block.parts.len();
                state.deferred.push(block);
                return true;
            }
        }
        let hash = block.hash(self.length);
        let is_expected = self.expected.as_ref().is_none_or(|expected| expected.hash_of(block.number) == hash.as_ref());
        let mut state = self.state();
        state.hashes.extend(hash.map(|hash| (block.number, hash)));
        if !is_expected {
            state.differing.push(block.number);
        }
        is_expected
    }

    /// Blocks that are known not to be as expected: ascending, neighbours joined.
    pub fn differences(&self) -> Vec<ByteRange> {
        ranges(self.length, self.state().differing.iter().copied())
    }

    /// Everything, once every byte was added; `None` when some were not.
    pub fn finish(self) -> Option<Summed> {
        let state = self.state.into_inner().unwrap_or_else(PoisonError::into_inner);
        (state.covered == self.length).then_some(Summed { length: self.length, state })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Summed {
    /// Bytes of the disk.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Blocks whose zeroes are not hashed yet.
    #[cfg(test)]
    pub fn deferred(&self) -> usize {
        self.state.deferred.len()
    }

    /// Blocks that are not as expected, in no order.
    pub fn differing(&self) -> &[u64] {
        &self.state.differing
    }

    /// The sum. Hashes with `threads` threads what was put off; `None`: `go_on` said no.
    pub fn found(self, threads: usize, go_on: &(dyn Fn() -> bool + Sync)) -> Option<Found> {
        let State { mut hashes, deferred, differing, small, .. } = self.state;
        let folded = Mutex::new(Vec::with_capacity(deferred.len()));
        let went = spread(deferred.len() as u64, threads, go_on, &|at| {
            let block = &deferred[at as usize];
            let hash = block.hash(self.length).map(|hash| (block.number, hash));
            folded.lock().unwrap_or_else(PoisonError::into_inner).extend(hash);
        });
        if !went {
            return None;
        }
        hashes.append(&mut folded.into_inner().unwrap_or_else(PoisonError::into_inner));
        hashes.sort_unstable_by_key(|(block, _)| *block);
        let whole = (self.length <= BLOCK).then(|| blake3::hash(&small));
        Some(Found { digest: Digest { length: self.length, hashes }, whole, differing })
    }
}

impl Block {
    /// Zeroes beside data: something is left to hash.
    fn is_mixed(&self) -> bool {
        self.parts.len() > 1
    }

    /// Of the block of a disk of `length` bytes; `None`: it is zero throughout.
    fn hash(&self, length: u64) -> Option<BlockHash> {
        match self.parts.as_slice() {
            [(_, Subtree { node: Node::Zero, .. })] => None,
            [(_, Subtree { node: Node::Hash(hash), .. })] => Some(*hash),
            parts => {
                let start = self.number * BLOCK;
                Some(fold(ByteRange::between(start, start.saturating_add(BLOCK).min(length)), 0, BLOCK, parts))
            }
        }
    }
}

/// The subtree of `size` bytes at `at` of a block, which `parts` make.
fn fold(block: ByteRange, at: u64, size: u64, parts: &[(u64, Subtree)]) -> BlockHash {
    debug_assert!(!parts.is_empty(), "a complete block has no gap at {at:#x}");
    if let [(_, subtree)] = parts
        && subtree.size == size
    {
        let start = block.offset + at;
        return match subtree.node {
            Node::Zero => hash_of_zeroes(ByteRange::between(start, (start + size).min(block.end()))),
            Node::Hash(hash) => hash,
        };
    }
    let half = size / 2;
    let (left, right) = parts.split_at(parts.partition_point(|(offset, _)| *offset < at + half));
    let left = fold(block, at, half, left);
    // The disk may end there.
    if right.is_empty() {
        return left;
    }
    merge_subtrees_non_root(&left, &fold(block, at + half, half, right), Mode::Hash)
}

/// The parent of two neighbours, if it costs nothing.
fn join(left: Node, right: Node) -> Option<Node> {
    match (left, right) {
        (Node::Zero, Node::Zero) => Some(Node::Zero),
        (Node::Hash(left), Node::Hash(right)) => Some(Node::Hash(merge_subtrees_non_root(&left, &right, Mode::Hash))),
        _ => None,
    }
}

/// The chaining value of a subtree.
fn hash(bytes: &[u8], offset: u64) -> BlockHash {
    Hasher::new().set_input_offset(offset).update(bytes).finalize_non_root()
}

/// The chaining value of a subtree that is zero.
pub(super) fn hash_of_zeroes(range: ByteRange) -> BlockHash {
    let mut hasher = Hasher::new();
    hasher.set_input_offset(range.offset);
    let mut left = range.length;
    while left > 0 {
        let piece = left.min(ZEROES.len() as u64);
        hasher.update(&ZEROES[..piece as usize]);
        left -= piece;
    }
    hasher.finalize_non_root()
}
