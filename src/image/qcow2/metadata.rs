//! The tables of an image that is changed in place, in memory as far as a bound allows, and the order in which changes
//! of them reach the file.
//!
//! [`Metadata::commit`] writes refcounts, then L2 tables, then the L1 table, each on stable storage before the next, and
//! only then lets go of what they no longer refer to. A flush does the same in steps, so that requests go on while it waits
//! for the disk: [`Metadata::seal`] sets apart what is to be written, and what changes later is for the next one. Killed at any moment, the file holds old or new entries, each of
//! them of clusters that are counted and written: at worst space is counted that nobody uses.

use super::block_cache::BlockCache;
use super::header::{Header, invalid};
use super::refcount::{Refcounts, read_table};
use super::table::{COPIED, Cluster, Damage, L1Entry, L2Entry, Layout};
use crate::image::Image;
use std::io;
use std::ops::Range;
use std::sync::Arc;

/// Bytes of L2 tables in memory.
const CACHE: u64 = 16 << 20;
const ENTRY: u64 = 8;
/// Runs of clusters that wait to be released.
const LEAVING_LIMIT: usize = 64 << 10;
/// Offsets of header fields: section "Header".
const REFCOUNT_TABLE_OFFSET_FIELD: u64 = 48;
const AUTOCLEAR_FIELD: u64 = 88;

/// See the module.
pub struct Metadata {
    file: Arc<dyn Image>,
    layout: Layout,
    l1: Vec<u64>,
    l1_offset: u64,
    /// L1 entries that the file does not have yet.
    l1_dirty: Range<usize>,
    l2: BlockCache,
    counts: Refcounts,
    /// Host clusters that lose a reference once the tables that had it are on stable storage.
    leaving: Vec<Range<u64>>,
    /// Entries of the L1 table as they were when it was sealed, and the first one's index.
    l1_sealed: Option<(usize, Vec<u64>)>,
    /// Those that leave once what was sealed is on stable storage.
    leaving_sealed: Vec<Range<u64>>,
    /// What was sealed was made dirty again, and is not on stable storage for all we know.
    owes_sealed: bool,
    /// Autoclear features that are still set.
    autoclear: u64,
    lost: bool,
}

impl Metadata {
    /// Reads the L1 and the refcount table.
    pub fn load(file: Arc<dyn Image>, header: &Header) -> io::Result<Self> {
        let layout = Layout::of(header);
        let mut counts = Refcounts::load(file.clone(), header)?;
        let length = u64::from(header.l1_size) * ENTRY;
        let l1 = read_table(&*file, header.l1_table_offset, length, "the L1 table")?;
        counts.protect(header.l1_table_offset, length);
        for entry in &l1 {
            if let Some(table) = L1Entry(*entry).table(layout).map_err(|damage| damaged("L1", damage))? {
                counts.claim(table)?;
            }
        }
        let limit = (CACHE >> header.cluster_bits).clamp(8, 4096) as usize;
        let l2 = BlockCache::new(layout.cluster_size(), limit);
        let (l1_offset, autoclear) = (header.l1_table_offset, header.autoclear_features);
        Ok(Self {
            file,
            layout,
            l1,
            l1_offset,
            l1_dirty: 0..0,
            l2,
            counts,
            leaving: Vec::new(),
            l1_sealed: None,
            leaving_sealed: Vec::new(),
            owes_sealed: false,
            autoclear,
            lost: false,
        })
    }

    /// Before the first change: features that know nothing of it are switched off (bitmaps become invalid by that).
    pub fn touch(&mut self) -> io::Result<()> {
        self.check()?;
        if self.autoclear != 0 {
            self.file.write_at(&[0; 8], AUTOCLEAR_FIELD)?;
            self.sync()?;
            self.autoclear = 0;
        }
        Ok(())
    }

    /// The entry of guest cluster `cluster`, and what it says.
    pub fn entry(&mut self, cluster: u64) -> io::Result<(L2Entry, Cluster)> {
        let Some(table) = self.table_of(cluster)? else {
            return Ok((L2Entry { descriptor: 0, bitmap: 0 }, Cluster::Unallocated));
        };
        self.load_l2(table)?;
        let at = self.at(cluster);
        let bytes = self.l2.get(table)[at.clone()].try_into().expect("eight bytes");
        let entry = L2Entry { descriptor: u64::from_be_bytes(bytes), bitmap: 0 };
        let offset = cluster << self.layout.cluster_bits;
        let decoded = entry.cluster(self.layout, offset);
        Ok((entry, decoded.map_err(|damage| damaged(&format!("L2 (guest offset {offset:#x})"), damage))?))
    }

    /// The guest cluster after the last one that `cluster`'s L2 table describes, and whether there is such a table.
    pub fn table_end(&mut self, cluster: u64) -> io::Result<(u64, bool)> {
        let end = (cluster / self.l2_entries() + 1) * self.l2_entries();
        Ok((end, self.table_of(cluster)?.is_some()))
    }

    /// May the cluster at host offset `host` be overwritten where it is? Refuses what a damaged image would destroy.
    pub fn is_exclusive(&mut self, host: u64) -> io::Result<bool> {
        if self.counts.is_metadata(host) {
            return Err(invalid(format!("damaged image: guest data at host offset {host:#x}, where a table is")));
        }
        match self.counts.get(host >> self.layout.cluster_bits)? {
            0 => Err(invalid(format!("damaged image: the cluster at host offset {host:#x} has refcount 0"))),
            count => Ok(count == 1),
        }
    }

    /// Up to `max` consecutive free clusters: host offset of the first, and how many. They are the caller's, to be
    /// referred to or given back.
    pub fn allocate(&mut self, max: u64) -> io::Result<(u64, u64)> {
        if self.counts.has_moved() {
            // The refcount table can't move again before the header names its place.
            self.commit()?;
        }
        let (first, count) = self.counts.allocate(max)?;
        Ok((first << self.layout.cluster_bits, count))
    }

    /// Gives back a cluster that nothing ever referred to.
    pub fn give_back(&mut self, host: u64) -> io::Result<()> {
        self.counts.release(host >> self.layout.cluster_bits)
    }

    /// Sets the entry of guest cluster `cluster`; what the old one referred to is released in time.
    pub fn set_entry(&mut self, cluster: u64, descriptor: u64) -> io::Result<()> {
        if self.leaving.len() >= LEAVING_LIMIT {
            self.commit()?;
        }
        let (old, meaning) = self.entry(cluster)?;
        if old.descriptor == descriptor {
            return Ok(());
        }
        let table = self.writable_table(cluster)?;
        let at = self.at(cluster);
        self.l2.get_mut(table, at.clone())[at].copy_from_slice(&descriptor.to_be_bytes());
        let bits = self.layout.cluster_bits;
        let new = L2Entry { descriptor, bitmap: 0 };
        if let Cluster::Compressed(bytes) = meaning {
            // Readers count each host cluster that the descriptor's sectors touch.
            self.leave(bytes.offset >> bits..(bytes.offset + bytes.length).div_ceil(1 << bits));
        } else if let Some(host) = old.held().filter(|_| old.held() != new.held()) {
            self.leave(host >> bits..(host >> bits) + 1);
        }
        Ok(())
    }

    /// Everything that was changed is in the file, in an order that a crash does no harm to; the last of it is not on
    /// stable storage before the file's next flush.
    pub fn commit(&mut self) -> io::Result<()> {
        self.check()?;
        // The tables that let go of these may be written, and not on stable storage yet.
        let is_leaving = !self.leaving_sealed.is_empty();
        self.break_seal();
        self.owes_sealed = true;
        self.counts.write_blocks()?;
        if is_leaving || self.counts.is_table_due() || self.l2.is_dirty() || !self.l1_dirty.is_empty() {
            self.sync()?;
        }
        self.commit_refcount_table()?;
        if self.l2.is_dirty() {
            self.l2.write(&*self.file)?;
            self.sync()?;
        }
        if !self.l1_dirty.is_empty() {
            let dirty = self.l1_dirty.clone();
            self.write_l1_entries(dirty.start, &self.l1[dirty.clone()])?;
            self.l1_dirty = 0..0;
            self.sync()?;
        }
        self.owes_sealed = false;
        let mut leaving = std::mem::take(&mut self.leaving);
        let released = self.release(&mut leaving);
        self.leaving = leaving;
        released?;
        self.counts.write_blocks()
    }

    /// First step of a flush: sets apart what is dirty, and writes the refcounts that it needs; they must be on stable
    /// storage, as must all data, before [`Metadata::write_tables`]. False: there is nothing more to do than that.
    pub fn seal(&mut self) -> io::Result<bool> {
        self.check()?;
        if self.counts.is_table_due() {
            // Once in a gigabyte or so of new space.
            self.commit()?;
            return Ok(false);
        }
        self.break_seal();
        self.owes_sealed = false;
        self.counts.write_blocks()?;
        let has_tables = self.l2.seal();
        if !self.l1_dirty.is_empty() {
            let dirty = std::mem::take(&mut self.l1_dirty);
            self.l1_sealed = Some((dirty.start, self.l1[dirty].to_vec()));
        }
        self.leaving_sealed = std::mem::take(&mut self.leaving);
        Ok(has_tables || self.l1_sealed.is_some() || !self.leaving_sealed.is_empty())
    }

    /// Second step: sealed L2 tables. True when there were any; they must be on stable storage before the next step.
    pub fn write_tables(&mut self) -> io::Result<bool> {
        self.check()?;
        self.l2.write_sealed(&*self.file)
    }

    /// Third step: sealed L1 entries. True when there were any; they must be on stable storage before the next step.
    pub fn write_l1(&mut self) -> io::Result<bool> {
        self.check()?;
        let Some((first, entries)) = &self.l1_sealed else { return Ok(false) };
        self.write_l1_entries(*first, entries)?;
        self.l1_sealed = None;
        Ok(true)
    }

    /// Last step: lets go of what nothing refers to any more. False: a commit that failed meanwhile has broken the seal, and a
    /// flush has to begin anew.
    pub fn release_sealed(&mut self) -> io::Result<bool> {
        self.check()?;
        if self.owes_sealed {
            return Ok(false);
        }
        let mut leaving = std::mem::take(&mut self.leaving_sealed);
        let released = self.release(&mut leaving);
        self.leaving_sealed = leaving;
        released?;
        self.counts.write_blocks()?;
        Ok(true)
    }

    /// What was sealed and is not in the file yet is dirty again, as if it never had been.
    fn break_seal(&mut self) {
        if let Some((first, entries)) = self.l1_sealed.take() {
            let sealed = first..first + entries.len();
            self.l1_dirty = match self.l1_dirty.is_empty() {
                true => sealed,
                false => self.l1_dirty.start.min(sealed.start)..self.l1_dirty.end.max(sealed.end),
            };
        }
        self.leaving.append(&mut self.leaving_sealed);
    }

    fn write_l1_entries(&self, first: usize, entries: &[u64]) -> io::Result<()> {
        let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.to_be_bytes()).collect();
        self.file.write_at(&bytes, self.l1_offset + first as u64 * ENTRY)
    }

    /// Flushes the file; a failure is final.
    pub fn sync(&mut self) -> io::Result<()> {
        self.check()?;
        let flushed = self.file.flush();
        self.lost = flushed.is_err();
        flushed
    }

    /// A flush failed outside.
    pub fn lose(&mut self) {
        self.lost = true;
    }

    fn check(&self) -> io::Result<()> {
        if self.lost {
            return Err(io::Error::other("an earlier flush of this qcow2 image failed"));
        }
        Ok(())
    }

    fn commit_refcount_table(&mut self) -> io::Result<()> {
        // Written, and the header that names it not: that header is due as well.
        if !self.counts.is_table_due() {
            return Ok(());
        }
        let moved = self.counts.write_table()?;
        self.sync()?;
        if moved {
            // One sector holds both fields: the file never names half of a table.
            self.file.write_at(&self.counts.header_fields(), REFCOUNT_TABLE_OFFSET_FIELD)?;
            self.sync()?;
            self.counts.moved()?;
        }
        Ok(())
    }

    fn l2_entries(&self) -> u64 {
        self.layout.cluster_size() / ENTRY
    }

    /// Where the entry of `cluster` is in its table, in bytes.
    fn at(&self, cluster: u64) -> Range<usize> {
        let index = (cluster % self.l2_entries() * ENTRY) as usize;
        index..index + ENTRY as usize
    }

    fn table_of(&self, cluster: u64) -> io::Result<Option<u64>> {
        let entry = self.l1[(cluster / self.l2_entries()) as usize];
        L1Entry(entry).table(self.layout).map_err(|damage| damaged("L1", damage))
    }

    fn load_l2(&mut self, table: u64) -> io::Result<()> {
        if self.l2.contains(table) {
            return Ok(());
        }
        let (size, length) = (self.layout.cluster_size(), self.file.length());
        if table + size > length {
            return Err(invalid(format!(
                "the L2 table at host offset {table:#x} is past the end of the file at {length:#x}"
            )));
        }
        self.make_room()?;
        self.l2.load(&*self.file, table)
    }

    fn make_room(&mut self) -> io::Result<()> {
        if !self.l2.is_full() {
            return Ok(());
        }
        self.l2.forget_old();
        if self.l2.is_crowded() {
            self.commit()?;
            self.l2.forget_old();
        }
        Ok(())
    }

    /// The L2 table of `cluster`, in memory, and no one else's.
    fn writable_table(&mut self, cluster: u64) -> io::Result<u64> {
        let size = self.layout.cluster_size();
        let old = self.table_of(cluster)?;
        let bytes = match old {
            Some(table) => {
                self.load_l2(table)?;
                match self.counts.get(table >> self.layout.cluster_bits)? {
                    0 => return Err(invalid(format!("damaged image: the L2 table at {table:#x} has refcount 0"))),
                    1 => return Ok(table),
                    _ => self.l2.get(table).into(),
                }
            }
            None => vec![0; size as usize].into_boxed_slice(),
        };
        self.make_room()?;
        let (new, _) = self.allocate(1)?;
        self.l2.insert(new, bytes);
        self.counts.protect(new, size);
        let index = (cluster / self.l2_entries()) as usize;
        self.l1[index] = new | COPIED;
        self.l1_dirty = match self.l1_dirty.is_empty() {
            true => index..index + 1,
            false => self.l1_dirty.start.min(index)..self.l1_dirty.end.max(index + 1),
        };
        if let Some(table) = old {
            self.l2.remove(table);
            self.counts.unprotect(table);
            self.leave(table >> self.layout.cluster_bits..(table >> self.layout.cluster_bits) + 1);
        }
        Ok(new)
    }

    /// One reference less to each of these host clusters, in time.
    fn leave(&mut self, clusters: Range<u64>) {
        match self.leaving.last_mut() {
            Some(last) if last.end == clusters.start => last.end = clusters.end,
            _ => self.leaving.push(clusters),
        }
    }

    /// After an error `leaving` has what is left of it.
    fn release(&mut self, leaving: &mut Vec<Range<u64>>) -> io::Result<()> {
        while let Some(clusters) = leaving.pop() {
            for cluster in clusters.clone() {
                if let Err(e) = self.counts.release(cluster) {
                    leaving.push(cluster..clusters.end);
                    return Err(e);
                }
            }
        }
        Ok(())
    }
}

fn damaged(table: &str, damage: Damage) -> io::Error {
    invalid(format!("the {table} table is damaged: {damage}"))
}
