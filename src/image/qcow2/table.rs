//! Entries of the L1, L2 and refcount tables: sections "Host cluster management", "Cluster mapping" and "Extended L2
//! Entries". Small values, decoded and checked without I/O.

use super::header::{Header, incompatible};
use std::fmt;

/// Bits 9 to 55: a host offset, in L1 entries and in descriptors of standard clusters.
const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
/// No file is that long.
const OFFSETS_END: u64 = 1 << 56;
/// Bit 63: the refcount is exactly one. Readers don't need it, except with an external data file.
pub const COPIED: u64 = 1 << 63;
/// Bit 62 of an L2 entry: the cluster is compressed.
pub const COMPRESSED: u64 = 1 << 62;
/// Bit 0 of an L2 entry without subclusters: the cluster reads as zeroes.
pub const ZERO: u64 = 1;
/// Compressed data is counted in sectors of this size.
pub const SECTOR: u64 = 512;

/// What is wrong with an entry: one clause, to be completed with where the entry was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Damage {
    what: &'static str,
    entry: u64,
}

impl fmt::Display for Damage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (entry {:#018x})", self.what, self.entry)
    }
}

/// What decoding depends on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// A cluster is `1 << cluster_bits` bytes.
    pub cluster_bits: u32,
    /// L2 entries have a bitmap of subclusters.
    pub extended: bool,
    /// Guest clusters are in an external data file.
    pub data_file: bool,
    /// Version 2 knows no zero clusters.
    pub version: u32,
}

impl Layout {
    /// As the header says.
    pub fn of(header: &Header) -> Self {
        Self {
            cluster_bits: header.cluster_bits,
            extended: header.has(incompatible::EXTENDED_L2),
            data_file: header.has(incompatible::DATA_FILE),
            version: header.version,
        }
    }

    /// Bytes of a cluster.
    pub const fn cluster_size(self) -> u64 {
        1 << self.cluster_bits
    }

    const fn is_aligned(self, offset: u64) -> bool {
        offset & (self.cluster_size() - 1) == 0
    }
}

/// An entry of the L1 table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct L1Entry(pub u64);

impl L1Entry {
    /// The host offset of its L2 table; `None` when all that the table would describe is unallocated.
    pub fn table(self, layout: Layout) -> Result<Option<u64>, Damage> {
        let damage = |what| Err(Damage { what, entry: self.0 });
        match self.0 & OFFSET {
            _ if self.0 & !(OFFSET | COPIED) != 0 => damage("reserved bits are set in the L1 table"),
            0 if self.0 == 0 => Ok(None),
            0 => damage("the L1 table names an L2 table at host offset 0"),
            offset if !layout.is_aligned(offset) => damage("the L2 table's offset is no multiple of the cluster size"),
            offset => Ok(Some(offset)),
        }
    }
}

/// An entry of the refcount table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RefcountTableEntry(pub u64);

impl RefcountTableEntry {
    /// The host offset of its refcount block; `None` when all of its refcounts are 0.
    pub fn block(self, layout: Layout) -> Result<Option<u64>, Damage> {
        let damage = |what| Err(Damage { what, entry: self.0 });
        match self.0 {
            0 => Ok(None),
            offset if !layout.is_aligned(offset) => {
                damage("the refcount block's offset is no multiple of the cluster size")
            }
            offset if offset >= OFFSETS_END => damage("the refcount block's offset is none that a file can have"),
            offset => Ok(Some(offset)),
        }
    }
}

/// Where a guest cluster's bytes are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cluster {
    /// The backing file answers.
    Unallocated,
    /// All zeroes.
    Zero,
    /// At this host offset, as they are.
    Standard(u64),
    /// Compressed.
    Compressed(Compressed),
    /// Differently for each of its 32 subclusters.
    Mixed(Subclusters),
}

/// The compressed bytes of a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compressed {
    /// Host offset of the first byte.
    pub offset: u64,
    /// Bytes up to the end of the last sector: garbage or another cluster may follow the data.
    pub length: u64,
}

/// The subclusters of a cluster that is not the same all over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Subclusters {
    /// Host offset of the cluster.
    pub offset: u64,
    allocated: u32,
    zero: u32,
}

/// What a subcluster is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subcluster {
    /// The backing file answers.
    Unallocated,
    /// All zeroes.
    Zero,
    /// At its place in the cluster's host cluster.
    Allocated,
}

impl Subclusters {
    /// Of one cluster.
    pub const COUNT: u32 = 32;

    /// The status of subcluster `first`, and how many from it on have the same.
    pub fn run(self, first: u32) -> (Subcluster, u32) {
        let (allocated, zero) = (self.allocated >> first, self.zero >> first);
        let left = Self::COUNT - first;
        match (allocated & 1, zero & 1) {
            (1, _) => (Subcluster::Allocated, allocated.trailing_ones().min(left)),
            (_, 1) => (Subcluster::Zero, zero.trailing_ones().min(left)),
            _ => (Subcluster::Unallocated, (allocated | zero).trailing_zeros().min(left)),
        }
    }
}

/// An entry of an L2 table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct L2Entry {
    /// The cluster descriptor and its two flags.
    pub descriptor: u64,
    /// The subcluster allocation bitmap; 0 without extended L2 entries.
    pub bitmap: u64,
}

impl L2Entry {
    /// Entry `index` of a table of decoded words.
    pub fn get(table: &[u64], index: usize, layout: Layout) -> Self {
        match layout.extended {
            false => Self { descriptor: table[index], bitmap: 0 },
            true => Self { descriptor: table[2 * index], bitmap: table[2 * index + 1] },
        }
    }

    /// Decodes the entry of the cluster at `guest_offset`.
    pub fn cluster(self, layout: Layout, guest_offset: u64) -> Result<Cluster, Damage> {
        if self.descriptor == 0 && self.bitmap == 0 {
            return Ok(Cluster::Unallocated);
        }
        if self.descriptor & COMPRESSED != 0 {
            return self.compressed(layout).map(Cluster::Compressed);
        }
        let flags = if layout.extended { COPIED } else { COPIED | ZERO };
        if self.descriptor & !(OFFSET | flags) != 0 {
            return self.damage("reserved bits are set in the L2 table");
        }
        let offset = self.host_offset(layout, guest_offset)?;
        if layout.extended {
            return self.subclusters(offset);
        }
        match (self.descriptor & ZERO != 0, offset) {
            (true, _) if layout.version == 2 => self.damage("a zero cluster in a version 2 image"),
            (true, _) => Ok(Cluster::Zero),
            (false, Some(offset)) => Ok(Cluster::Standard(offset)),
            (false, None) => Ok(Cluster::Unallocated),
        }
    }

    /// The host cluster that the entry holds, as data or in reserve under zeroes; `None` when it is compressed or has
    /// none. Meant for entries that [`L2Entry::cluster`] took.
    pub fn held(self) -> Option<u64> {
        let offset = self.descriptor & OFFSET;
        (self.descriptor & COMPRESSED == 0 && offset != 0).then_some(offset)
    }

    fn damage<T>(self, what: &'static str) -> Result<T, Damage> {
        Err(Damage { what, entry: self.descriptor })
    }

    /// Section "Compressed Clusters Descriptor": the smaller the clusters, the longer the offset.
    fn compressed(self, layout: Layout) -> Result<Compressed, Damage> {
        if layout.data_file {
            return self.damage("a compressed cluster in an image with an external data file");
        }
        if self.descriptor & COPIED != 0 {
            return self.damage("a compressed cluster is marked as copied");
        }
        let offset_bits = 62 - (layout.cluster_bits - 8);
        let offset = self.descriptor & ((1 << offset_bits) - 1);
        if offset >= OFFSETS_END {
            return self.damage("reserved bits are set in a compressed cluster's descriptor");
        }
        let more_sectors = (self.descriptor & (COMPRESSED - 1)) >> offset_bits;
        Ok(Compressed { offset, length: (more_sectors + 1) * SECTOR - offset % SECTOR })
    }

    /// The host cluster, `None` when there is none.
    fn host_offset(self, layout: Layout, guest_offset: u64) -> Result<Option<u64>, Damage> {
        let offset = self.descriptor & OFFSET;
        let is_none = offset == 0 && (self.descriptor & COPIED == 0 || !layout.data_file);
        if is_none && self.descriptor & COPIED != 0 {
            return self.damage("a cluster is marked as copied, but has no host offset");
        }
        if is_none {
            return Ok(None);
        }
        if !layout.is_aligned(offset) {
            return self.damage("the host offset is no multiple of the cluster size");
        }
        if layout.data_file && offset != guest_offset {
            return self.damage("the offset in the external data file is not the guest offset");
        }
        Ok(Some(offset))
    }

    /// Section "Extended L2 Entries".
    fn subclusters(self, offset: Option<u64>) -> Result<Cluster, Damage> {
        let (allocated, zero) = (self.bitmap as u32, (self.bitmap >> 32) as u32);
        if allocated & zero != 0 {
            return Err(Damage { what: "a subcluster is both allocated and zero", entry: self.bitmap });
        }
        match (offset, allocated, zero) {
            (Some(offset), u32::MAX, _) => Ok(Cluster::Standard(offset)),
            (_, 0, u32::MAX) => Ok(Cluster::Zero),
            (_, 0, 0) => Ok(Cluster::Unallocated),
            (None, 0, _) => Ok(Cluster::Mixed(Subclusters { offset: 0, allocated, zero })),
            (None, ..) => self.damage("a subcluster is allocated, but its cluster has no host offset"),
            (Some(offset), ..) => Ok(Cluster::Mixed(Subclusters { offset, allocated, zero })),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLAIN: Layout = Layout { cluster_bits: 16, extended: false, data_file: false, version: 3 };

    fn cluster(layout: Layout, descriptor: u64, bitmap: u64) -> Result<Cluster, Damage> {
        L2Entry { descriptor, bitmap }.cluster(layout, 0x50000)
    }

    fn damage(layout: Layout, descriptor: u64, bitmap: u64) -> &'static str {
        cluster(layout, descriptor, bitmap).expect_err("damaged").what
    }

    #[test]
    fn an_l1_entry_names_an_aligned_table_or_none() {
        assert_eq!(L1Entry(0).table(PLAIN), Ok(None));
        assert_eq!(L1Entry(COPIED | 0x50000).table(PLAIN), Ok(Some(0x50000)));
        assert_eq!(L1Entry(0x50000).table(PLAIN), Ok(Some(0x50000)));
        for bad in [COPIED, 0x50200, 0x50001, 1 << 56 | 0x50000, 1 << 62] {
            assert!(L1Entry(bad).table(PLAIN).is_err(), "{bad:#x}");
        }
    }

    #[test]
    fn a_refcount_table_entry_names_an_aligned_block_or_none() {
        assert_eq!(RefcountTableEntry(0).block(PLAIN), Ok(None));
        assert_eq!(RefcountTableEntry(0x20000).block(PLAIN), Ok(Some(0x20000)));
        assert_eq!(RefcountTableEntry(0xff_ffff_ffff_0000).block(PLAIN), Ok(Some(0xff_ffff_ffff_0000)));
        for bad in [0x20200, 1 << 56, u64::MAX << 16] {
            assert!(RefcountTableEntry(bad).block(PLAIN).is_err(), "{bad:#x}");
        }
    }

    #[test]
    fn standard_clusters_are_data_zero_or_unallocated() {
        assert_eq!(cluster(PLAIN, 0, 0), Ok(Cluster::Unallocated));
        assert_eq!(cluster(PLAIN, COPIED | 0x70000, 0), Ok(Cluster::Standard(0x70000)));
        assert_eq!(cluster(PLAIN, ZERO, 0), Ok(Cluster::Zero));
        assert_eq!(cluster(PLAIN, COPIED | 0x70000 | ZERO, 0), Ok(Cluster::Zero));
        assert!(damage(Layout { version: 2, ..PLAIN }, ZERO, 0).contains("version 2"));
        assert!(damage(PLAIN, COPIED, 0).contains("no host offset"));
        assert!(damage(PLAIN, 0x70200, 0).contains("no multiple"));
        assert!(damage(PLAIN, 0x70002, 0).contains("reserved"));
        assert!(damage(PLAIN, 1 << 56 | 0x70000, 0).contains("reserved"));
    }

    #[test]
    fn compressed_data_ends_with_its_last_sector() {
        let sectors = |more: u64| more << 54;
        let decoded = |descriptor| cluster(PLAIN, COMPRESSED | descriptor, 0);
        let compressed = |offset, length| Ok(Cluster::Compressed(Compressed { offset, length }));
        assert_eq!(decoded(0x70000), compressed(0x70000, 512));
        assert_eq!(decoded(0x701ff | sectors(2)), compressed(0x701ff, 1025));
        assert_eq!(decoded(sectors(255)), compressed(0, 128 << 10));
        assert!(damage(PLAIN, COMPRESSED | COPIED | 0x70000, 0).contains("copied"));
        let small = Layout { cluster_bits: 9, ..PLAIN };
        assert_eq!(cluster(small, COMPRESSED | 1 << 61 | 7, 0), compressed(7, 1017));
        assert!(damage(small, COMPRESSED | 1 << 56, 0).contains("reserved"));
    }

    #[test]
    fn an_external_data_file_has_every_cluster_at_its_guest_offset() {
        let external = Layout { data_file: true, ..PLAIN };
        assert_eq!(cluster(external, COPIED | 0x50000, 0), Ok(Cluster::Standard(0x50000)));
        assert!(damage(external, COPIED | 0x60000, 0).contains("not the guest offset"));
        assert!(damage(external, COMPRESSED | 0x50000, 0).contains("external data file"));
        let first = L2Entry { descriptor: COPIED, bitmap: 0 };
        assert_eq!(first.cluster(external, 0), Ok(Cluster::Standard(0)));
    }

    #[test]
    fn subclusters_have_each_their_own_status() {
        let extended = Layout { extended: true, ..PLAIN };
        assert_eq!(cluster(extended, 0x70000, u64::from(u32::MAX)), Ok(Cluster::Standard(0x70000)));
        assert_eq!(cluster(extended, 0, u64::from(u32::MAX) << 32), Ok(Cluster::Zero));
        assert_eq!(cluster(extended, 0x70000, 0), Ok(Cluster::Unallocated));
        let Ok(Cluster::Mixed(mixed)) = cluster(extended, 0x70000, 0xf0 << 32 | 0x8000_0003) else { panic!("mixed") };
        let runs = [0, 1, 2, 4, 8, 30, 31].map(|first| mixed.run(first));
        use Subcluster::{Allocated, Unallocated, Zero};
        let expected = [(Allocated, 2), (Allocated, 1), (Unallocated, 2), (Zero, 4)];
        assert_eq!(runs[..4], expected);
        assert_eq!(runs[4..], [(Unallocated, 23), (Unallocated, 1), (Allocated, 1)]);
        assert!(damage(extended, 0x70000, 1 << 32 | 1).contains("both"));
        assert!(damage(extended, 0, 1).contains("no host offset"));
        assert!(damage(extended, 0x70001, 1).contains("reserved"));
    }
}
