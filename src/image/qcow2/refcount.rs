//! The refcounts of an image that is changed in place, and from them the space that is free: section "Refcounts".
//!
//! A count that grows may reach the file at any time before the tables that need it; one that falls, only after the
//! tables that no longer need it. So [`Refcounts::release`] is called when those are on stable storage, and then every
//! change may be written at any time: a count in the file is never less than the references in the file.

use super::block_cache::BlockCache;
use super::header::{Header, REFCOUNT_TABLE_LIMIT, invalid};
use super::table::{Layout, RefcountTableEntry};
use crate::image::Image;
use std::collections::HashSet;
use std::io;
use std::ops::Range;
use std::sync::Arc;

/// Bytes of refcount blocks in memory.
const CACHE: u64 = 4 << 20;
const ENTRY: u64 = 8;

/// See the module. Clusters are host clusters, by number.
pub struct Refcounts {
    file: Arc<dyn Image>,
    layout: Layout,
    order: u32,
    table: Vec<u64>,
    /// Host offset of the table.
    table_offset: u64,
    /// Entries that the file does not have yet.
    table_dirty: Range<usize>,
    /// The table has a new place, which the header does not name yet. Its old clusters.
    moved_from: Option<Range<u64>>,
    blocks: BlockCache,
    /// No cluster before it is free.
    hint: u64,
    /// Clusters that hold the image's own tables, whatever its refcounts say: never handed out, never written as data.
    metadata: HashSet<u64>,
}

impl Refcounts {
    /// Reads the refcount table.
    pub fn load(file: Arc<dyn Image>, header: &Header) -> io::Result<Self> {
        let layout = Layout::of(header);
        let length = u64::from(header.refcount_table_clusters) << header.cluster_bits;
        let table = read_table(&*file, header.refcount_table_offset, length, "the refcount table")?;
        let limit = (CACHE >> header.cluster_bits).clamp(2, 1024) as usize;
        let mut counts = Self {
            file,
            layout,
            order: header.refcount_order,
            table,
            table_offset: header.refcount_table_offset,
            table_dirty: 0..0,
            moved_from: None,
            blocks: BlockCache::new(layout.cluster_size(), limit),
            hint: 0,
            metadata: HashSet::from([0]),
        };
        counts.protect(header.refcount_table_offset, length);
        for entry in counts.table.clone() {
            if let Some(block) = RefcountTableEntry(entry).block(layout).map_err(damaged)? {
                counts.claim(block)?;
            }
        }
        Ok(counts)
    }

    /// These bytes of the file are a table.
    pub fn protect(&mut self, offset: u64, length: u64) {
        let bits = self.layout.cluster_bits;
        self.metadata.extend(offset >> bits..(offset + length).div_ceil(1 << bits));
    }

    /// The cluster at `offset` is a table of an image that was opened. Two at one place would destroy each other.
    pub fn claim(&mut self, offset: u64) -> io::Result<()> {
        match self.metadata.insert(offset >> self.layout.cluster_bits) {
            true => Ok(()),
            false => Err(invalid(format!("damaged image: two tables at host offset {offset:#x}"))),
        }
    }

    /// The cluster at `offset` is no table any more.
    pub fn unprotect(&mut self, offset: u64) {
        self.metadata.remove(&(offset >> self.layout.cluster_bits));
    }

    /// The cluster at `offset` holds a table.
    pub fn is_metadata(&self, offset: u64) -> bool {
        self.metadata.contains(&(offset >> self.layout.cluster_bits))
    }

    /// References to `cluster`.
    pub fn get(&mut self, cluster: u64) -> io::Result<u64> {
        let Some(block) = self.block_of(cluster)? else { return Ok(0) };
        let (order, index) = (self.order, self.index(cluster));
        Ok(count_at(self.blocks.get(block), index, order))
    }

    /// Up to `max` consecutive free clusters, which have one reference each afterwards: the first, and how many.
    pub fn allocate(&mut self, max: u64) -> io::Result<(u64, u64)> {
        loop {
            let reach = self.reach();
            let region = self.hint / reach;
            let block = match self.block_of(self.hint)? {
                Some(block) => block,
                None => self.add_block(region)?,
            };
            if let Some((first, count)) = self.free_run(block, max)? {
                self.set(first..first + count, 1)?;
                self.hint = first + count;
                return Ok((first, count));
            }
            self.hint = (region + 1) * reach;
        }
    }

    /// One reference to `cluster` less; at none it is free.
    pub fn release(&mut self, cluster: u64) -> io::Result<()> {
        match self.get(cluster)? {
            // The image is damaged: something else refers to it, too, and it stays counted as it is.
            0 => Ok(()),
            count => {
                self.set(cluster..cluster + 1, count - 1)?;
                if count == 1 {
                    self.hint = self.hint.min(cluster);
                }
                Ok(())
            }
        }
    }

    /// The table, which names blocks, or the header, which names the table, is not in the file yet.
    pub fn is_table_due(&self) -> bool {
        !self.table_dirty.is_empty() || self.has_moved()
    }

    /// The table has a place that the header does not name yet; it must, before anything is allocated.
    pub fn has_moved(&self) -> bool {
        self.moved_from.is_some()
    }

    /// Writes changed blocks. They must be on stable storage before [`Refcounts::write_table`].
    pub fn write_blocks(&mut self) -> io::Result<()> {
        self.blocks.write(&*self.file)
    }

    /// Writes changed entries of the table. True when the table moved: once it is on stable storage, so must be a header
    /// that names it, and then [`Refcounts::moved`].
    pub fn write_table(&mut self) -> io::Result<bool> {
        let dirty = self.table_dirty.clone();
        let bytes: Vec<u8> = self.table[dirty.clone()].iter().flat_map(|entry| entry.to_be_bytes()).collect();
        self.file.write_at(&bytes, self.table_offset + dirty.start as u64 * ENTRY)?;
        self.table_dirty = 0..0;
        Ok(self.moved_from.is_some())
    }

    /// The header's fields `refcount_table_offset` and `refcount_table_clusters`.
    pub fn header_fields(&self) -> [u8; 12] {
        let clusters = (self.table.len() as u64 * ENTRY) >> self.layout.cluster_bits;
        let mut fields = [0; 12];
        fields[..8].copy_from_slice(&self.table_offset.to_be_bytes());
        fields[8..].copy_from_slice(&(clusters as u32).to_be_bytes());
        fields
    }

    /// The header that names the table's new place is on stable storage: the old place is free.
    pub fn moved(&mut self) -> io::Result<()> {
        for cluster in self.moved_from.take().unwrap_or(0..0) {
            self.metadata.remove(&cluster);
            self.release(cluster)?;
        }
        Ok(())
    }

    /// Clusters whose counts one block holds.
    fn reach(&self) -> u64 {
        (self.layout.cluster_size() * 8) >> self.order
    }

    fn index(&self, cluster: u64) -> usize {
        (cluster % self.reach()) as usize
    }

    /// The block with the count of `cluster`, in memory now; `None` when there is none.
    fn block_of(&mut self, cluster: u64) -> io::Result<Option<u64>> {
        let entry = usize::try_from(cluster / self.reach()).ok().and_then(|region| self.table.get(region));
        let Some(&entry) = entry else { return Ok(None) };
        let Some(block) = RefcountTableEntry(entry).block(self.layout).map_err(damaged)? else { return Ok(None) };
        if !self.blocks.contains(block) {
            let length = self.file.length();
            if block + self.layout.cluster_size() > length {
                let what =
                    format!("the refcount block at host offset {block:#x} is past the end of the file at {length:#x}");
                return Err(invalid(what));
            }
            self.make_room()?;
            self.blocks.load(&*self.file, block)?;
        }
        Ok(Some(block))
    }

    fn make_room(&mut self) -> io::Result<()> {
        if self.blocks.is_full() {
            self.blocks.write(&*self.file)?;
            self.blocks.forget_old();
        }
        Ok(())
    }

    /// The first run of free clusters from the hint on, in the hint's block.
    fn free_run(&mut self, block: u64, max: u64) -> io::Result<Option<(u64, u64)>> {
        let (order, reach) = (self.order, self.reach());
        let start = self.hint / reach * reach;
        let bytes = self.blocks.get(block);
        let is_free = |cluster: &u64| count_at(bytes, (cluster - start) as usize, order) == 0;
        let Some(first) = (self.hint..start + reach).find(is_free) else { return Ok(None) };
        let count = (first..start + reach).take(max as usize).take_while(is_free).count() as u64;
        self.refuse_metadata(first..first + count)?;
        Ok(Some((first, count)))
    }

    /// Free by its count, but in use: only a damaged image has that.
    fn refuse_metadata(&self, mut clusters: Range<u64>) -> io::Result<()> {
        let Some(cluster) = clusters.find(|cluster| self.metadata.contains(cluster)) else { return Ok(()) };
        let offset = cluster << self.layout.cluster_bits;
        Err(invalid(format!("damaged image: the table at host offset {offset:#x} has refcount 0")))
    }

    /// All of `clusters` are in one block, which exists.
    fn set(&mut self, clusters: Range<u64>, count: u64) -> io::Result<()> {
        let block = self.block_of(clusters.start)?.expect("a count that was read, or a block that was added");
        let (order, first) = (self.order, self.index(clusters.start));
        let last = first + (clusters.end - clusters.start) as usize;
        let bytes = self.blocks.get_mut(block, first << order >> 3..(last << order).div_ceil(8));
        (first..last).for_each(|index| set_count(bytes, index, order, count));
        Ok(())
    }

    /// A block for a region that has none: all of its clusters are free, and its first one holds the block.
    fn add_block(&mut self, region: u64) -> io::Result<u64> {
        if region >= self.table.len() as u64 {
            self.grow_table()?;
        }
        if self.table[region as usize] == 0 {
            let first = region * self.reach();
            self.refuse_metadata(first..first + 1)?;
            self.make_room()?;
            self.insert_block(region, first, 1);
        }
        Ok(self.table[region as usize])
    }

    /// The block of `region` in cluster `at`, with the first `used` clusters of the region in use.
    fn insert_block(&mut self, region: u64, at: u64, used: u64) {
        let offset = at << self.layout.cluster_bits;
        let mut bytes = vec![0; self.layout.cluster_size() as usize].into_boxed_slice();
        (0..used as usize).for_each(|index| set_count(&mut bytes, index, self.order, 1));
        self.blocks.insert(offset, bytes);
        self.metadata.insert(at);
        self.table[region as usize] = offset;
        let entry = region as usize;
        self.table_dirty = match self.table_dirty.is_empty() {
            true => entry..entry + 1,
            false => self.table_dirty.start.min(entry)..self.table_dirty.end.max(entry + 1),
        };
    }

    /// A table half as large again, behind all that the old one covers, with the blocks that count it before it.
    fn grow_table(&mut self) -> io::Result<()> {
        let (reach, bits) = (self.reach(), self.layout.cluster_bits);
        debug_assert!(!self.has_moved(), "the header names the last place before there is another");
        let old_entries = self.table.len() as u64;
        let old_clusters = (old_entries * ENTRY) >> bits;
        let clusters = old_clusters + old_clusters.div_ceil(2);
        if clusters << bits > REFCOUNT_TABLE_LIMIT {
            let what = format!("a qcow2 file with clusters of {} cannot grow further", 1u64 << bits);
            return Err(io::Error::new(io::ErrorKind::StorageFull, what));
        }
        let mut blocks = 1;
        while blocks * reach < blocks + clusters {
            blocks += 1;
        }
        let base = old_entries * reach;
        self.refuse_metadata(base..base + blocks + clusters)?;
        // From here on nothing fails: blocks are few, and may be more than the cache's limit for a while.
        self.make_room()?;
        self.moved_from = Some(self.table_offset >> bits..(self.table_offset >> bits) + old_clusters);
        self.table.resize((clusters << bits) as usize / ENTRY as usize, 0);
        self.table_offset = (base + blocks) << bits;
        self.protect(self.table_offset, clusters << bits);
        for n in 0..blocks {
            let used = (blocks + clusters - n * reach).min(reach);
            self.insert_block(old_entries + n, base + n, used);
        }
        self.table_dirty = 0..self.table.len();
        Ok(())
    }
}

/// `length` bytes of big-endian words.
pub fn read_table(file: &dyn Image, offset: u64, length: u64, what: &str) -> io::Result<Vec<u64>> {
    if offset.checked_add(length).is_none_or(|end| end > file.length()) {
        let end = file.length();
        return Err(invalid(format!(
            "{what}, at host offset {offset:#x}+{length}, is past the end of the file at {end:#x}"
        )));
    }
    let mut bytes = vec![0; length as usize];
    file.read_at(&mut bytes, offset)?;
    Ok(bytes.chunks_exact(8).map(|word| u64::from_be_bytes(word.try_into().expect("eight bytes"))).collect())
}

fn damaged(damage: super::table::Damage) -> io::Error {
    invalid(format!("the refcount table is damaged: {damage}"))
}

/// Count `index` of a block: `1 << order` bits each, the lower ones first within a byte, whole bytes big-endian.
fn count_at(block: &[u8], index: usize, order: u32) -> u64 {
    if order < 3 {
        let bits = 1 << order;
        let shift = (index << order) % 8;
        return u64::from(block[(index << order) / 8] >> shift) & ((1 << bits) - 1);
    }
    let size = 1 << (order - 3);
    block[index * size..(index + 1) * size].iter().fold(0, |count, byte| count << 8 | u64::from(*byte))
}

fn set_count(block: &mut [u8], index: usize, order: u32, count: u64) {
    if order < 3 {
        let bits = 1 << order;
        let shift = (index << order) % 8;
        let byte = &mut block[(index << order) / 8];
        *byte = *byte & !(((1u8 << bits) - 1) << shift) | (count as u8) << shift;
        return;
    }
    let size = 1 << (order - 3);
    block[index * size..(index + 1) * size].copy_from_slice(&count.to_be_bytes()[8 - size..]);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_of_every_width_stay_apart() {
        for order in 0..=6 {
            let largest = if order == 6 { u64::MAX } else { (1 << (1 << order)) - 1 };
            let mut block = vec![0; 512];
            let counts = (512 * 8) >> order;
            for index in 0..counts {
                set_count(&mut block, index, order, if index % 3 == 0 { largest } else { 0 });
            }
            for index in 0..counts {
                assert_eq!(count_at(&block, index, order), if index % 3 == 0 { largest } else { 0 }, "order {order}");
            }
        }
        let mut block = [0; 8];
        set_count(&mut block, 1, 4, 0x1234);
        set_count(&mut block, 3, 1, 2);
        assert_eq!(block[..4], [0b1000_0000, 0, 0x12, 0x34]);
    }
}
