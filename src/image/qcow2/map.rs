//! From guest offsets to host offsets: the L1 table, the L2 tables that are needed, and a walk over both.

use super::cache::{Cache, Table};
use super::header::{Header, L1_LIMIT, invalid};
use super::table::{Cluster, Compressed, Damage, L1Entry, L2Entry, Layout, Subcluster, Subclusters};
use crate::ground::range::ByteRange;
use crate::image::Image;
use std::io;
use std::sync::Arc;

/// The guest's view of an image's active state.
pub struct Map {
    file: Arc<dyn Image>,
    layout: Layout,
    coverage: u64,
    l1: Box<[u64]>,
    cache: Cache,
}

/// Guest bytes, and where they are.
pub struct Piece {
    /// Guest bytes, not empty.
    pub range: ByteRange,
    /// Where they are.
    pub mapping: Mapping,
}

/// Where guest bytes are.
pub enum Mapping {
    /// The backing file answers.
    Unallocated,
    /// All zeroes.
    Zero,
    /// From this host offset on, within the file.
    Host(u64),
    /// Part of the cluster at guest offset `cluster`, which is compressed. Its bytes begin within the file.
    Compressed {
        /// Guest offset of the cluster.
        cluster: u64,
        /// Its compressed bytes, none past the end of the file.
        bytes: Compressed,
    },
    /// The tables make no sense or can't be read.
    Failed(io::Error),
}

impl Piece {
    /// Takes `next`, which follows in the guest, in, if both are one run; else gives it back.
    fn join(&mut self, next: Self) -> Option<Self> {
        let follows = match (&self.mapping, &next.mapping) {
            (Mapping::Unallocated, Mapping::Unallocated) | (Mapping::Zero, Mapping::Zero) => true,
            (Mapping::Host(offset), Mapping::Host(after)) => offset + self.range.length == *after,
            _ => false,
        };
        if !follows {
            return Some(next);
        }
        self.range.length += next.range.length;
        None
    }

    /// Without its first `length` bytes.
    pub fn skip(self, length: u64) -> Self {
        let range = ByteRange::between(self.range.offset + length, self.range.end());
        match self.mapping {
            Mapping::Host(offset) => Self { range, mapping: Mapping::Host(offset + length) },
            mapping => Self { range, mapping },
        }
    }
}

impl Map {
    /// Reads the L1 table. Errors of kind `InvalidData` are about the image.
    pub fn load(file: Arc<dyn Image>, header: &Header, cache: Cache) -> io::Result<Self> {
        // More entries than the disk needs are for a guest's saved memory.
        let size = header.l1_needed() * 8;
        debug_assert!(size <= L1_LIMIT, "checked by the header");
        let l1 = read_words(&*file, header.l1_table_offset, size)
            .map_err(|e| e.unwrap_or_else(|| past_end("the L1 table", header.l1_table_offset, size, &*file)))?;
        Ok(Self { file, layout: Layout::of(header), coverage: header.l2_coverage(), l1: l1.into(), cache })
    }

    /// Walks over `range` in pieces, in order. `data_length` is the length of the file that holds the guest's data.
    pub fn walk(&self, range: ByteRange, data_length: u64) -> Walk<'_> {
        Walk { map: self, at: range.offset, end: range.end(), data_length, table: None, mixed: None }
    }

    /// The same, with neighbours merged that are one run of the host file, all zero, or unallocated. Ends early after
    /// `limit` pieces.
    pub fn runs(&self, range: ByteRange, data_length: u64, limit: usize) -> Runs<'_> {
        Runs { walk: self.walk(range, data_length).take(limit), next: None }
    }

    /// Where inflated clusters are kept, too.
    pub fn cache(&self) -> &Cache {
        &self.cache
    }

    /// The L2 table at `offset`, found for `guest_offset`.
    fn table(&self, offset: u64, guest_offset: u64) -> io::Result<Table> {
        let size = self.layout.cluster_size();
        self.cache.table(offset, || match read_words(&*self.file, offset, size) {
            Ok(words) => Ok(words.into()),
            Err(Some(e)) => Err(e),
            Err(None) => Err(past_end(&format!("the L2 table for {guest_offset:#x}"), offset, size, &*self.file)),
        })
    }

    /// Where the run of absent L2 tables that starts with L1 entry `index` ends, as a guest offset.
    fn absent_end(&self, index: usize) -> u64 {
        let absent = self.l1[index..].iter().take_while(|entry| **entry == 0).count();
        (index + absent) as u64 * self.coverage
    }
}

/// `size` bytes of big-endian words; `Err(None)` when they are past the end of the file.
fn read_words(file: &dyn Image, offset: u64, size: u64) -> Result<Vec<u64>, Option<io::Error>> {
    if offset.checked_add(size).is_none_or(|end| end > file.length()) {
        return Err(None);
    }
    let mut bytes = vec![0; size as usize];
    file.read_at(&mut bytes, offset)?;
    Ok(bytes.chunks_exact(8).map(|word| u64::from_be_bytes(word.try_into().expect("eight bytes"))).collect())
}

fn past_end(what: &str, offset: u64, size: u64, file: &dyn Image) -> io::Error {
    invalid(format!("{what}, at host offset {offset:#x}+{size}, is past the end of the file at {:#x}", file.length()))
}

/// The pieces of a range: see [`Map::walk`].
pub struct Walk<'a> {
    map: &'a Map,
    at: u64,
    end: u64,
    data_length: u64,
    /// The L2 table of `at`, with where what it describes ends.
    table: Option<(u64, Table)>,
    /// The cluster of `at`, when only some of its subclusters are behind.
    mixed: Option<Subclusters>,
}

impl Iterator for Walk<'_> {
    type Item = Piece;

    fn next(&mut self) -> Option<Piece> {
        if self.at >= self.end {
            return None;
        }
        let (mapping, end) = match self.mixed {
            Some(subclusters) => self.subclusters(subclusters),
            None => self.lookup(),
        };
        let end = end.min(self.end);
        let range = ByteRange::between(self.at, end);
        self.at = end;
        if self.at & (self.map.layout.cluster_size() - 1) == 0 {
            self.mixed = None;
        }
        Some(Piece { range, mapping: self.within_file(mapping, range) })
    }
}

impl Walk<'_> {
    /// What is at `at`, and where that ends.
    fn lookup(&mut self) -> (Mapping, u64) {
        let table = match self.table.take() {
            Some((end, table)) if self.at < end => (end, table),
            _ => match self.next_table() {
                Ok(table) => table,
                Err(absent) => return absent,
            },
        };
        let found = self.cluster(&table.1);
        self.table = Some(table);
        found
    }

    /// The L2 table of `at`, or what is there without one.
    fn next_table(&self) -> Result<(u64, Table), (Mapping, u64)> {
        let map = self.map;
        let index = (self.at / map.coverage) as usize;
        let end = (index as u64 + 1) * map.coverage;
        let offset = match L1Entry(map.l1[index]).table(map.layout) {
            Ok(Some(offset)) => offset,
            Ok(None) => return Err((Mapping::Unallocated, map.absent_end(index))),
            Err(damage) => return Err((self.damaged(damage), end)),
        };
        match map.table(offset, self.at) {
            Ok(table) => Ok((end, table)),
            Err(e) => Err((Mapping::Failed(e), end)),
        }
    }

    fn cluster(&mut self, table: &[u64]) -> (Mapping, u64) {
        let layout = self.map.layout;
        let within = self.at & (layout.cluster_size() - 1);
        let start = self.at - within;
        let index = (self.at % self.map.coverage) >> layout.cluster_bits;
        let mapping = match L2Entry::get(table, index as usize, layout).cluster(layout, start) {
            Ok(Cluster::Unallocated) => Mapping::Unallocated,
            Ok(Cluster::Zero) => Mapping::Zero,
            Ok(Cluster::Standard(offset)) => Mapping::Host(offset + within),
            Ok(Cluster::Compressed(bytes)) => Mapping::Compressed { cluster: start, bytes },
            Ok(Cluster::Mixed(subclusters)) => {
                self.mixed = Some(subclusters);
                return self.subclusters(subclusters);
            }
            Err(damage) => self.damaged(damage),
        };
        (mapping, start + layout.cluster_size())
    }

    fn subclusters(&self, subclusters: Subclusters) -> (Mapping, u64) {
        let size = self.map.layout.cluster_size() / u64::from(Subclusters::COUNT);
        let within = self.at & (self.map.layout.cluster_size() - 1);
        let first = within / size;
        let (status, count) = subclusters.run(first as u32);
        let mapping = match status {
            Subcluster::Unallocated => Mapping::Unallocated,
            Subcluster::Zero => Mapping::Zero,
            Subcluster::Allocated => Mapping::Host(subclusters.offset + within),
        };
        (mapping, self.at - within + (first + u64::from(count)) * size)
    }

    fn damaged(&self, damage: Damage) -> Mapping {
        Mapping::Failed(invalid(format!("the table entry for guest offset {:#x} is damaged: {damage}", self.at)))
    }

    /// Nothing is read past the end of the file; of compressed data only the last sector may be cut off there.
    fn within_file(&self, mapping: Mapping, range: ByteRange) -> Mapping {
        let length = self.data_length;
        match mapping {
            Mapping::Host(offset) if offset + range.length > length => Mapping::Failed(invalid(format!(
                "the cluster for guest offset {:#x}, at host offset {offset:#x}+{}, is past the end of the file at \
                 {length:#x}",
                range.offset, range.length
            ))),
            Mapping::Compressed { cluster, bytes } if bytes.offset >= length => Mapping::Failed(invalid(format!(
                "the compressed cluster for guest offset {cluster:#x}, at host offset {:#x}+{}, is past the end of \
                 the file at {length:#x}",
                bytes.offset, bytes.length
            ))),
            Mapping::Compressed { cluster, bytes } => {
                let bytes = Compressed { length: bytes.length.min(length - bytes.offset), ..bytes };
                Mapping::Compressed { cluster, bytes }
            }
            other => other,
        }
    }
}

/// The merged pieces of a range: see [`Map::runs`].
pub struct Runs<'a> {
    walk: std::iter::Take<Walk<'a>>,
    next: Option<Piece>,
}

impl Iterator for Runs<'_> {
    type Item = Piece;

    fn next(&mut self) -> Option<Piece> {
        let mut run = self.next.take().or_else(|| self.walk.next())?;
        for piece in self.walk.by_ref() {
            self.next = run.join(piece);
            if self.next.is_some() {
                break;
            }
        }
        Some(run)
    }
}
