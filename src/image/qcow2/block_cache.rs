//! L2 tables and refcount blocks that are in memory, with what was changed in them: bounded in number.

use crate::image::Image;
use std::collections::HashMap;
use std::io;
use std::ops::Range;

/// Blocks of one cluster each, by host offset.
#[derive(Debug)]
pub struct BlockCache {
    block_size: usize,
    limit: usize,
    clock: u64,
    blocks: HashMap<u64, Block>,
}

#[derive(Debug)]
struct Block {
    bytes: Box<[u8]>,
    /// Bytes that the file does not have yet; empty when it has all.
    dirty: Range<usize>,
    /// What was dirty when it was sealed, as it was then, from this byte on. Not in the file yet either.
    sealed: Option<(usize, Box<[u8]>)>,
    used: u64,
}

impl Block {
    fn is_clean(&self) -> bool {
        self.dirty.is_empty() && self.sealed.is_none()
    }

    /// What the file does not have, sealed or not, is dirty now.
    fn break_seal(&mut self) {
        if let Some((start, bytes)) = self.sealed.take() {
            self.dirty = join(self.dirty.clone(), start..start + bytes.len());
        }
    }
}

/// The least range with all bytes of both.
fn join(one: Range<usize>, other: Range<usize>) -> Range<usize> {
    match (one.is_empty(), other.is_empty()) {
        (true, _) => other,
        (_, true) => one,
        _ => one.start.min(other.start)..one.end.max(other.end),
    }
}

/// Changes go to the file by sectors.
const SECTOR: usize = 512;

impl BlockCache {
    /// At most `limit` blocks of `block_size` bytes.
    pub fn new(block_size: u64, limit: usize) -> Self {
        Self { block_size: block_size as usize, limit, clock: 0, blocks: HashMap::new() }
    }

    /// Is the block in memory?
    pub fn contains(&self, offset: u64) -> bool {
        self.blocks.contains_key(&offset)
    }

    /// Something is not in the file yet.
    pub fn is_dirty(&self) -> bool {
        self.blocks.values().any(|block| !block.is_clean())
    }

    /// Another block needs space first: [`BlockCache::forget_old`].
    pub fn is_full(&self) -> bool {
        self.blocks.len() >= self.limit
    }

    /// So full of dirty blocks that [`BlockCache::forget_old`] is no use: they have to be written.
    pub fn is_crowded(&self) -> bool {
        self.blocks.len() * 4 > self.limit * 3
    }

    /// Forgets the older half of what the file has, too. The cache may still be full of dirty blocks then.
    pub fn forget_old(&mut self) {
        let mut clean: Vec<u64> = self.blocks.values().filter(|b| b.is_clean()).map(|b| b.used).collect();
        let middle = clean.len() / 2;
        if clean.is_empty() {
            return;
        }
        let (_, &mut newest_forgotten, _) = clean.select_nth_unstable(middle);
        self.blocks.retain(|_, block| !block.is_clean() || block.used > newest_forgotten);
    }

    /// Reads the block at `offset` into memory; it is not there yet.
    pub fn load(&mut self, file: &dyn Image, offset: u64) -> io::Result<()> {
        let mut bytes = vec![0; self.block_size].into_boxed_slice();
        file.read_at(&mut bytes, offset)?;
        self.clock += 1;
        self.blocks.insert(offset, Block { bytes, dirty: 0..0, sealed: None, used: self.clock });
        Ok(())
    }

    /// A new block at `offset`: all of it goes to the file.
    pub fn insert(&mut self, offset: u64, bytes: Box<[u8]>) {
        debug_assert_eq!(bytes.len(), self.block_size);
        self.clock += 1;
        self.blocks.insert(offset, Block { dirty: 0..bytes.len(), bytes, sealed: None, used: self.clock });
    }

    /// The bytes of a block that is in memory.
    pub fn get(&mut self, offset: u64) -> &[u8] {
        self.clock += 1;
        let block = self.blocks.get_mut(&offset).expect("loaded before");
        block.used = self.clock;
        &block.bytes
    }

    /// The same to change: `changed` are the bytes that will be.
    pub fn get_mut(&mut self, offset: u64, changed: Range<usize>) -> &mut [u8] {
        self.clock += 1;
        let block = self.blocks.get_mut(&offset).expect("loaded before");
        block.used = self.clock;
        let sectors = changed.start / SECTOR * SECTOR..changed.end.next_multiple_of(SECTOR);
        block.dirty = join(block.dirty.clone(), sectors);
        &mut block.bytes
    }

    /// Keeps what is dirty now apart from what becomes so later, for [`BlockCache::write_sealed`]. True when there is any.
    pub fn seal(&mut self) -> bool {
        let mut any = false;
        for block in self.blocks.values_mut() {
            // Left by a flush that failed.
            block.break_seal();
            if !block.dirty.is_empty() {
                let dirty = std::mem::take(&mut block.dirty);
                block.sealed = Some((dirty.start, block.bytes[dirty].into()));
                any = true;
            }
        }
        any
    }

    /// Writes what was sealed, if nobody has written it since. True when it wrote anything. After an error the rest is
    /// sealed still.
    pub fn write_sealed(&mut self, file: &dyn Image) -> io::Result<bool> {
        let mut sealed: Vec<_> = self.blocks.iter_mut().filter(|(_, block)| block.sealed.is_some()).collect();
        sealed.sort_unstable_by_key(|(offset, _)| **offset);
        let any = !sealed.is_empty();
        for (offset, block) in sealed {
            if let Some((start, bytes)) = &block.sealed {
                file.write_at(bytes, offset + *start as u64)?;
            }
            block.sealed = None;
        }
        Ok(any)
    }

    /// Writes what the file does not have yet, sealed or not. After an error the rest is still dirty.
    pub fn write(&mut self, file: &dyn Image) -> io::Result<()> {
        self.blocks.values_mut().for_each(Block::break_seal);
        let mut dirty: Vec<_> = self.blocks.iter_mut().filter(|(_, block)| !block.dirty.is_empty()).collect();
        dirty.sort_unstable_by_key(|(offset, _)| **offset);
        for (offset, block) in dirty {
            file.write_at(&block.bytes[block.dirty.clone()], offset + block.dirty.start as u64)?;
            block.dirty = 0..0;
        }
        Ok(())
    }

    /// The block's cluster has another use now.
    pub fn remove(&mut self, offset: u64) {
        self.blocks.remove(&offset);
    }
}

#[cfg(test)]
mod tests {
    use super::super::fixture::{MemoryDisk, Operation};
    use super::*;

    #[test]
    fn changes_go_to_the_file_by_sectors_and_once() {
        let disk = MemoryDisk::of(vec![7; 16384]);
        let mut cache = BlockCache::new(4096, 4);
        cache.load(&disk, 4096).unwrap();
        cache.get_mut(4096, 600..608)[600..608].fill(9);
        cache.get_mut(4096, 1016..1024)[1016..1024].fill(9);
        assert!(cache.is_dirty());
        cache.write(&disk).unwrap();
        cache.write(&disk).unwrap();
        let log = disk.log();
        let [Operation::Write { offset, bytes }] = &log[..] else { panic!("{log:?}") };
        assert_eq!((*offset, bytes.len()), (4096 + 512, 512));
        assert_eq!((bytes[600 - 512], bytes[1016 - 512], bytes[0]), (9, 9, 7));
    }

    #[test]
    fn dirty_blocks_and_the_latest_stay() {
        let disk = MemoryDisk::of(vec![0; 16 * 512]);
        let mut cache = BlockCache::new(512, 4);
        (0..4).for_each(|block| cache.load(&disk, block * 512).unwrap());
        cache.get_mut(0, 0..8);
        cache.get(512);
        assert!(cache.is_full());
        cache.forget_old();
        assert!(cache.contains(0) && cache.contains(512));
        assert!(!cache.contains(1024) && !cache.contains(1536));
    }
}
