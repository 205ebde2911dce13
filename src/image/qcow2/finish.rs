//! The metadata of a new image, written once: L2 tables, L1 table, refcounts, and the header last.
//!
//! The file: header cluster, data, L2 tables, L1 table, refcount table, refcount blocks. Memory: a few buffers of a
//! bounded size and the L1 and refcount tables, whatever the image's size.

use super::header::{Backing, CLUSTER_BITS, Compression, Header, L1_LIMIT, REFCOUNT_TABLE_LIMIT, incompatible};
use super::run_map::{Place, Run, RunMap};
use super::table::{COMPRESSED, COPIED, SECTOR, ZERO};
use crate::error::{Error, Kind, Result};
use crate::image::Image;
use std::io;
use std::ops::Range;

const ENTRY: u64 = 8;
const REFCOUNT_BITS: u64 = 16;

const PLAIN_OFFSET_BITS: u32 = 56;

/// Bytes that are collected before they are written.
const BATCH: usize = 1 << 20;
/// Refcounts that are counted at once.
const WINDOW: u64 = 8 << 20;

/// The shape of an image.
#[derive(Clone, Copy, Debug)]
pub struct Geometry {
    /// Bytes.
    pub cluster_size: u64,
    virtual_size: u64,
    l1_entries: u64,
}

impl Geometry {
    /// Refuses what no reader opens.
    pub fn new(length: u64, cluster_size: u64) -> Result<Self> {
        if !cluster_size.is_power_of_two() || !CLUSTER_BITS.contains(&cluster_size.trailing_zeros()) {
            let what = format!("cluster size {cluster_size} is not a power of two from 512 to 2097152 bytes");
            return Err(Error::new(Kind::Usage, what));
        }
        let l2_reach = cluster_size / ENTRY * cluster_size;
        let l1_entries = length.div_ceil(l2_reach);
        if l1_entries * ENTRY > L1_LIMIT || length > i64::MAX as u64 {
            let what =
                format!("a disk of {length} bytes is too large for a qcow2 image with clusters of {cluster_size}");
            return Err(Error::new(Kind::Usage, what));
        }
        Ok(Self { cluster_size, virtual_size: length.next_multiple_of(SECTOR), l1_entries })
    }

    fn cluster_bits(&self) -> u32 {
        self.cluster_size.trailing_zeros()
    }

    /// Bits of the offset in a compressed cluster's descriptor.
    fn packed_offset_bits(&self) -> u32 {
        62 - (self.cluster_bits() - 8)
    }

    /// File offsets that table entries can hold, in bytes.
    pub fn host_limit(&self, compressed: bool) -> u64 {
        1 << if compressed { self.packed_offset_bits().min(PLAIN_OFFSET_BITS) } else { PLAIN_OFFSET_BITS }
    }

    fn clusters(&self, bytes: u64) -> u64 {
        bytes.div_ceil(self.cluster_size)
    }

    fn l2_entries(&self) -> u64 {
        self.cluster_size / ENTRY
    }

    /// Clusters whose refcounts are in one refcount block.
    fn block_reach(&self) -> u64 {
        self.cluster_size * 8 / REFCOUNT_BITS
    }

    /// The descriptor of a compressed cluster of `length` bytes (specification: "Compressed Clusters Descriptor").
    fn packed_entry(&self, host: u64, length: u64) -> u64 {
        let additional_sectors = (host + length - 1) / SECTOR - host / SECTOR;
        COMPRESSED | additional_sectors << self.packed_offset_bits() | host
    }
}

/// What a header says beside the geometry.
#[derive(Clone, Copy, Debug)]
pub struct About<'a> {
    /// Of compressed clusters.
    pub compression: Compression,
    /// What answers for clusters that the image does not hold.
    pub backing: Option<&'a Backing>,
}

/// Makes `file` an image: what `runs` says is where it says, and the file is in use up to `data_end`. Blocks until
/// everything is on stable storage.
pub fn finish(file: &dyn Image, geometry: &Geometry, about: About<'_>, runs: &RunMap, data_end: u64) -> io::Result<()> {
    let mut out = Batch::new(file, data_end);
    let l1 = write_l2_tables(&mut out, geometry, runs)?;
    let l1_offset = out.end();
    out.numbers(&l1)?;
    out.pad(geometry.cluster_size)?;
    let refcounts = RefcountLayout::after(out.end(), geometry)?;
    write_refcounts(&mut out, geometry, runs, data_end, refcounts)?;
    out.write()?;
    file.flush()?;
    file.write_at(&header(geometry, about, l1_offset, refcounts)?, 0)?;
    file.flush()
}

/// Writes the tables that have an entry; returns the L1 table.
fn write_l2_tables(out: &mut Batch<'_>, geometry: &Geometry, runs: &RunMap) -> io::Result<Vec<u64>> {
    let reach = geometry.l2_entries();
    let mut l1 = vec![0; geometry.l1_entries as usize];
    // Guest clusters up to here have their entries in the file.
    let mut filled = 0;
    for (first, run) in runs.iter() {
        for (cluster, entry) in (first..).zip(run.entries(geometry)) {
            let slot = &mut l1[(cluster / reach) as usize];
            if *slot == 0 {
                out.pad(geometry.cluster_size)?;
                *slot = out.end() | COPIED;
                filled = cluster / reach * reach;
            }
            out.zeroes((cluster - filled) * ENTRY)?;
            out.numbers(&[entry])?;
            filled = cluster + 1;
        }
    }
    out.pad(geometry.cluster_size)?;
    Ok(l1)
}

impl Run {
    /// The L2 entry of each of its clusters.
    fn entries<'a>(&'a self, geometry: &'a Geometry) -> impl Iterator<Item = u64> + 'a {
        let mut at = self.host();
        (0..self.count as usize).map(move |n| {
            let host = at;
            match &self.place {
                Place::Plain { .. } => {
                    at += geometry.cluster_size;
                    host | COPIED
                }
                Place::Packed { lengths, .. } => {
                    at += u64::from(lengths[n]);
                    geometry.packed_entry(host, u64::from(lengths[n]))
                }
                Place::Zero => ZERO,
            }
        })
    }

    fn host(&self) -> u64 {
        match self.place {
            Place::Plain { host } | Place::Packed { host, .. } => host,
            Place::Zero => 0,
        }
    }

    /// Calls `count` with each run of host clusters that gets one more reference.
    fn references(&self, geometry: &Geometry, mut count: impl FnMut(Range<u64>)) {
        let size = geometry.cluster_size;
        match &self.place {
            Place::Plain { host } => count(host / size..host / size + self.count),
            Place::Packed { host, lengths } => {
                let mut at = *host;
                for &length in lengths {
                    let end = at + u64::from(length);
                    // A descriptor speaks of whole sectors, which cross no cluster's border.
                    count(at / size..end.div_ceil(size));
                    at = end;
                }
            }
            Place::Zero => {}
        }
    }
}

/// Where the refcounts go: the table, and its blocks right behind it.
#[derive(Clone, Copy)]
struct RefcountLayout {
    table: u64,
    table_clusters: u64,
    blocks: u64,
    /// Clusters of the whole file.
    total: u64,
}

impl RefcountLayout {
    /// The refcounts hold their own clusters' too, so the sizes are a fixed point.
    fn after(table: u64, geometry: &Geometry) -> io::Result<Self> {
        let used = table / geometry.cluster_size;
        let (mut table_clusters, mut blocks) = (1, 1);
        loop {
            let total = used + table_clusters + blocks;
            let needed_blocks = total.div_ceil(geometry.block_reach());
            let needed_table = geometry.clusters(needed_blocks * ENTRY);
            if (needed_table, needed_blocks) == (table_clusters, blocks) {
                break;
            }
            // Both only grow, so that this ends.
            (table_clusters, blocks) = (needed_table.max(table_clusters), needed_blocks.max(blocks));
        }
        if table_clusters * geometry.cluster_size > REFCOUNT_TABLE_LIMIT {
            let what = format!("a file of {table} bytes is too large for qcow2 clusters of {}", geometry.cluster_size);
            return Err(io::Error::new(io::ErrorKind::StorageFull, what));
        }
        Ok(Self { table, table_clusters, blocks, total: used + table_clusters + blocks })
    }
}

fn write_refcounts(
    out: &mut Batch<'_>,
    geometry: &Geometry,
    runs: &RunMap,
    data_end: u64,
    layout: RefcountLayout,
) -> io::Result<()> {
    let size = geometry.cluster_size;
    let first_block = layout.table + layout.table_clusters * size;
    out.numbers(&(0..layout.blocks).map(|block| first_block + block * size).collect::<Vec<_>>())?;
    out.pad(size)?;
    let mut start = 0;
    while start < layout.total {
        let window = start..layout.total.min(start + WINDOW);
        let mut counts = vec![0u16; (window.end - window.start) as usize];
        let mut count = |clusters: Range<u64>| {
            for cluster in clusters.start.max(window.start)..clusters.end.min(window.end) {
                counts[(cluster - window.start) as usize] += 1;
            }
        };
        count(0..1);
        count(data_end / size..layout.total);
        runs.iter().for_each(|(_, run)| run.references(geometry, &mut count));
        for piece in counts.chunks(BATCH / 2) {
            out.bytes(&piece.iter().flat_map(|count| count.to_be_bytes()).collect::<Vec<_>>())?;
        }
        start = window.end;
    }
    out.pad(size)
}

/// Version 3, as short as it can be.
fn header(
    geometry: &Geometry,
    about: About<'_>,
    l1_table_offset: u64,
    refcounts: RefcountLayout,
) -> io::Result<Vec<u8>> {
    let About { compression, backing } = about;
    let header = Header {
        version: 3,
        cluster_bits: geometry.cluster_bits(),
        size: geometry.virtual_size,
        l1_size: geometry.l1_entries as u32,
        l1_table_offset,
        refcount_table_offset: refcounts.table,
        refcount_table_clusters: refcounts.table_clusters as u32,
        nb_snapshots: 0,
        snapshots_offset: 0,
        incompatible_features: if compression == Compression::Zstd { incompatible::COMPRESSION } else { 0 },
        compatible_features: 0,
        autoclear_features: 0,
        refcount_order: REFCOUNT_BITS.trailing_zeros(),
        compression,
        backing: backing.cloned(),
        data_file: None,
        bitmaps: false,
    };
    let mut bytes = header.encode()?;
    bytes.resize(bytes.len().max(geometry.cluster_size.min(4096) as usize), 0);
    Ok(bytes)
}

/// Bytes that go to the file one after the other, in large pieces.
struct Batch<'a> {
    file: &'a dyn Image,
    /// Where `pending` goes.
    offset: u64,
    pending: Vec<u8>,
}

impl<'a> Batch<'a> {
    fn new(file: &'a dyn Image, offset: u64) -> Self {
        Self { file, offset, pending: Vec::new() }
    }

    fn end(&self) -> u64 {
        self.offset + self.pending.len() as u64
    }

    fn bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.pending.extend_from_slice(bytes);
        if self.pending.len() < BATCH {
            return Ok(());
        }
        self.write()
    }

    fn numbers(&mut self, numbers: &[u64]) -> io::Result<()> {
        numbers.iter().try_for_each(|number| self.bytes(&number.to_be_bytes()))
    }

    fn zeroes(&mut self, mut length: u64) -> io::Result<()> {
        while length > 0 {
            let piece = length.min(BATCH as u64);
            self.pending.resize(self.pending.len() + piece as usize, 0);
            self.bytes(&[])?;
            length -= piece;
        }
        Ok(())
    }

    /// Zeroes up to a multiple of `cluster_size`.
    fn pad(&mut self, cluster_size: u64) -> io::Result<()> {
        self.zeroes(self.end().next_multiple_of(cluster_size) - self.end())
    }

    fn write(&mut self) -> io::Result<()> {
        self.file.write_at(&self.pending, self.offset)?;
        self.offset += self.pending.len() as u64;
        self.pending.clear();
        Ok(())
    }
}
