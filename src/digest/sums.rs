//! Adds up the hashes of a disk while its bytes go by, in any order, from many threads.

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
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Blocks of which a part is missing: their subtrees by offset in the block, no two of which touch.
    open: HashMap<u64, BTreeMap<u64, Subtree>>,
    hashes: Vec<(u64, BlockHash)>,
    /// Blocks that are not as expected.
    differing: Vec<u64>,
    /// Bytes added.
    covered: u64,
    /// The content of a disk of one block at most.
    small: Vec<u8>,
}

/// A power of two of leaves, less where the disk ends.
#[derive(Clone, Copy)]
struct Subtree {
    size: u64,
    hash: Node,
}

/// `Zero`: the bytes are, and nobody needs their hash so far.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Node {
    Zero,
    Hash(BlockHash),
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
        Self { length, expected, state: Mutex::new(State { small, ..State::default() }) }
    }

    /// Adds `bytes` that are at `offset`, a multiple of 1 KiB; their end is one too, or the disk's. Takes as long as hashing.
    /// False: a block that became complete is not as expected.
    pub fn add(&self, offset: u64, bytes: &[u8]) -> bool {
        let range = ByteRange::new(offset, bytes.len() as u64);
        let pieces: Vec<_> = self
            .pieces(range)
            .map(|(at, piece, size)| {
                let bytes = &bytes[(piece.offset - offset) as usize..][..piece.length as usize];
                let hash = if zero::is_zero(bytes) { Node::Zero } else { Node::Hash(hash(bytes, piece.offset)) };
                (at, piece, Subtree { size, hash })
            })
            .collect();
        let mut state = self.state();
        if !state.small.is_empty() {
            state.small[offset as usize..][..bytes.len()].copy_from_slice(bytes);
        }
        pieces.into_iter().fold(true, |all, (at, piece, subtree)| self.place(&mut state, at, piece, subtree) && all)
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
        let mut state = self.state();
        let zero = |size| Subtree { size, hash: Node::Zero };
        self.pieces(range).fold(true, |all, (at, piece, size)| self.place(&mut state, at, piece, zero(size)) && all)
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

    /// Puts a subtree in its place and joins it with its neighbours as far as they are there.
    fn place(&self, state: &mut State, offset: u64, piece: ByteRange, subtree: Subtree) -> bool {
        state.covered += piece.length;
        let block = piece.offset / BLOCK;
        let start = block * BLOCK;
        let length = (self.length - start).min(BLOCK);
        let (mut at, mut subtree) = (offset, subtree);
        let open = state.open.entry(block).or_default();
        while subtree.size < BLOCK {
            let is_left = at.is_multiple_of(2 * subtree.size);
            let other = if is_left { at + subtree.size } else { at - subtree.size };
            // Where the disk ends, there is nothing to the right: the parent is the subtree itself.
            if other < length {
                let Some(sibling) = open.get(&other).copied().filter(|sibling| sibling.size == subtree.size) else {
                    open.insert(at, subtree);
                    return true;
                };
                open.remove(&other);
                let (left, right) = if is_left { (subtree, sibling) } else { (sibling, subtree) };
                let middle = at.max(other);
                at = at.min(other);
                subtree.hash = join(left.hash, right.hash, start, [at, middle, (at + 2 * subtree.size).min(length)]);
            }
            subtree.size *= 2;
        }
        state.open.remove(&block);
        let hash = match subtree.hash {
            Node::Zero => None,
            Node::Hash(hash) => Some(hash),
        };
        state.hashes.extend(hash.map(|hash| (block, hash)));
        let is_expected = self.expected.as_ref().is_none_or(|expected| expected.hash_of(block) == hash.as_ref());
        if !is_expected {
            state.differing.push(block);
        }
        is_expected
    }

    /// Blocks that are known not to be as expected: ascending, neighbours joined.
    pub fn differences(&self) -> Vec<ByteRange> {
        ranges(self.length, self.state().differing.iter().copied())
    }

    /// The sum, once every byte was added; `None` when some were not.
    pub fn finish(self) -> Option<Found> {
        let mut state = self.state.into_inner().unwrap_or_else(PoisonError::into_inner);
        if state.covered != self.length {
            return None;
        }
        state.hashes.sort_unstable_by_key(|(block, _)| *block);
        let whole = (self.length <= BLOCK).then(|| blake3::hash(&state.small));
        let digest = Digest { length: self.length, hashes: state.hashes };
        Some(Found { digest, whole, differing: state.differing })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The parent of two neighbours in the block at `start`; `bounds` are where the left one, the right one, and what follows begin.
fn join(left: Node, right: Node, start: u64, bounds: [u64; 3]) -> Node {
    if left == Node::Zero && right == Node::Zero {
        return Node::Zero;
    }
    let hash_of = |node, at: u64, end: u64| match node {
        Node::Zero => hash_of_zeroes(ByteRange::between(start + at, start + end)),
        Node::Hash(hash) => hash,
    };
    let [begin, middle, end] = bounds;
    let (left, right) = (hash_of(left, begin, middle), hash_of(right, middle, end));
    Node::Hash(merge_subtrees_non_root(&left, &right, Mode::Hash))
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
