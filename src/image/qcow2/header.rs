//! The header and its extensions, byte by byte: sections "Header" to "Feature name table".

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};

/// The first four bytes of every image.
pub const MAGIC: [u8; 4] = *b"QFI\xfb";
/// Clusters of 512 bytes to 2 MiB; the upper bound is QEMU's.
pub const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
/// Bytes of the largest cluster. The first one holds header, extensions and backing file name.
pub const LARGEST_CLUSTER: usize = 1 << 21;
/// Subclusters are 512 bytes at least, and there are 32 of them.
pub const EXTENDED_L2_CLUSTER_BITS: u32 = 14;
/// Bytes of the longest L1 table; the bound is QEMU's.
pub const L1_LIMIT: u64 = 32 << 20;
/// Bytes of the longest refcount table; the bound is QEMU's.
pub const REFCOUNT_TABLE_LIMIT: u64 = 8 << 20;
/// Snapshots in one image; the bound is QEMU's.
pub const SNAPSHOT_LIMIT: u32 = 65536;
/// Bytes of the longest backing file name.
pub const BACKING_NAME_LIMIT: u32 = 1023;
/// Bytes of a version 2 header.
pub const V2_LENGTH: usize = 72;
/// Bytes of the shortest version 3 header.
pub const V3_LENGTH: usize = 104;
/// Bytes of a version 3 header with the field `compression_type` and its padding.
pub const V3_LENGTH_WITH_COMPRESSION: usize = 112;

/// Bits of the field `incompatible_features`.
pub mod incompatible {
    /// Refcounts may be inconsistent. They are not needed to read.
    pub const DIRTY: u64 = 1 << 0;
    /// Any structure may be corrupt; never write.
    pub const CORRUPT: u64 = 1 << 1;
    /// Guest clusters are in an external data file, at their guest offset.
    pub const DATA_FILE: u64 = 1 << 2;
    /// The field `compression_type` is present and not zero.
    pub const COMPRESSION: u64 = 1 << 3;
    /// L2 entries are 16 bytes long, with a bitmap of subclusters.
    pub const EXTENDED_L2: u64 = 1 << 4;
    /// Every bit that has a meaning.
    pub const KNOWN: u64 = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2;
}

/// Bits of the field `compatible_features`.
pub mod compatible {
    /// Refcounts are updated late, under the dirty bit.
    pub const LAZY_REFCOUNTS: u64 = 1 << 0;
}

/// Bits of the field `autoclear_features`.
pub mod autoclear {
    /// The bitmaps extension is consistent.
    pub const BITMAPS: u64 = 1 << 0;
    /// The external data file is a raw image of its own.
    pub const RAW_DATA_FILE: u64 = 1 << 1;
}

/// Types of header extensions: section "Header extensions".
pub mod extension {
    /// End of the header extension area.
    pub const END: u32 = 0;
    /// Name of the backing file's format.
    pub const BACKING_FORMAT: u32 = 0xe279_2aca;
    /// Names of features.
    pub const FEATURE_NAMES: u32 = 0x6803_f857;
    /// Where the bitmaps are.
    pub const BITMAPS: u32 = 0x2385_2875;
    /// Where the encryption header is.
    pub const ENCRYPTION: u32 = 0x0537_be77;
    /// Name of the external data file.
    pub const DATA_FILE: u32 = 0x4441_5441;
}

/// How compressed clusters are compressed: the field `compression_type`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Compression {
    /// Raw deflate (RFC 1951), which QEMU calls zlib; its window is 4 KiB.
    Zlib,
    /// Zstandard frames.
    Zstd,
}

/// The image that answers for unallocated clusters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Backing {
    /// Its name as recorded: relative to the folder of the image that names it, or a protocol's.
    pub name: OsString,
    /// The name of its format, if recorded.
    pub format: Option<String>,
}

/// What the header says, checked: every field is within its bounds, and no unknown incompatible feature is set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// 2 or 3.
    pub version: u32,
    /// A cluster is `1 << cluster_bits` bytes.
    pub cluster_bits: u32,
    /// Virtual size, in bytes.
    pub size: u64,
    /// Entries of the active L1 table.
    pub l1_size: u32,
    /// Host offset of the active L1 table.
    pub l1_table_offset: u64,
    /// Host offset of the refcount table.
    pub refcount_table_offset: u64,
    /// Clusters of the refcount table.
    pub refcount_table_clusters: u32,
    /// Internal snapshots.
    pub nb_snapshots: u32,
    /// Host offset of the snapshot table.
    pub snapshots_offset: u64,
    /// Bits of [`incompatible`]; 0 in version 2.
    pub incompatible_features: u64,
    /// Bits of [`compatible`]; 0 in version 2.
    pub compatible_features: u64,
    /// Bits of [`autoclear`]; 0 in version 2.
    pub autoclear_features: u64,
    /// A refcount is `1 << refcount_order` bits wide; 4 in version 2.
    pub refcount_order: u32,
    /// Of compressed clusters.
    pub compression: Compression,
    /// The backing file, if there is one.
    pub backing: Option<Backing>,
    /// Name of the external data file, if recorded; it may be without the feature bit, and then means nothing.
    pub data_file: Option<OsString>,
    /// There is a bitmaps extension.
    pub bitmaps: bool,
}

impl Header {
    /// Decodes `cluster`: the file's first cluster, or as many bytes as the file has. More bytes do no harm, so that
    /// the first [`LARGEST_CLUSTER`] bytes of any image will do.
    ///
    /// Errors are of kind `InvalidData`, one line that names the field.
    pub fn parse(cluster: &[u8]) -> io::Result<Self> {
        let mut header = Self::parse_v2(cluster)?;
        let mut header_length = V2_LENGTH;
        let mut compression_type = 0;
        if header.version == 3 {
            (header_length, compression_type) = header.parse_v3(cluster)?;
        }
        let cluster = &cluster[..cluster.len().min(1 << header.cluster_bits)];
        let extensions = header.parse_extensions(cluster, header_length)?;
        header.refuse_unknown_features(extensions.feature_names)?;
        header.compression = header.compression_of(compression_type)?;
        header.parse_backing(cluster, extensions.backing_format)?;
        header.data_file = extensions.data_file.map(|name| OsString::from_vec(name.to_vec()));
        header.bitmaps = extensions.bitmaps;
        header.check_encryption(be32(cluster, 32))?;
        header.check_tables()?;
        Ok(header)
    }

    /// Bytes of the first cluster, by the file's first [`V2_LENGTH`] bytes or more.
    pub fn first_cluster_size(start: &[u8]) -> io::Result<u64> {
        Ok(Self::parse_v2(start)?.cluster_size())
    }

    /// Bytes of a cluster.
    pub const fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// An incompatible feature (a bit of [`incompatible`]) is set.
    pub const fn has(&self, feature: u64) -> bool {
        self.incompatible_features & feature != 0
    }

    /// Bytes of an entry of an L2 table: 8, or 16 with extended L2 entries.
    pub const fn l2_entry_size(&self) -> u64 {
        if self.has(incompatible::EXTENDED_L2) { 16 } else { 8 }
    }

    /// Entries of an L2 table.
    pub const fn l2_entries(&self) -> u64 {
        self.cluster_size() / self.l2_entry_size()
    }

    /// Guest bytes that one L2 table describes.
    pub const fn l2_coverage(&self) -> u64 {
        self.l2_entries() << self.cluster_bits
    }

    /// Entries of the L1 table that the virtual size needs.
    pub const fn l1_needed(&self) -> u64 {
        self.size.div_ceil(self.l2_coverage())
    }

    /// The first 72 bytes, which are the same in both versions.
    fn parse_v2(bytes: &[u8]) -> io::Result<Self> {
        if bytes.is_empty() {
            return Err(invalid("not a qcow2 image: it is empty"));
        }
        if !bytes.starts_with(&MAGIC) {
            return Err(invalid("not a qcow2 image: it does not start with the magic bytes"));
        }
        if bytes.len() < V2_LENGTH {
            return Err(invalid(format!("truncated qcow2 image: {} bytes are no header", bytes.len())));
        }
        let version = be32(bytes, 4);
        if !(2..=3).contains(&version) {
            return Err(invalid(format!("qcow version {version} is not supported, only 2 and 3")));
        }
        let cluster_bits = be32(bytes, 20);
        if !CLUSTER_BITS.contains(&cluster_bits) {
            return Err(invalid(format!("cluster_bits is {cluster_bits}, not 9 to 21")));
        }
        Ok(Self {
            version,
            cluster_bits,
            size: be64(bytes, 24),
            l1_size: be32(bytes, 36),
            l1_table_offset: be64(bytes, 40),
            refcount_table_offset: be64(bytes, 48),
            refcount_table_clusters: be32(bytes, 56),
            nb_snapshots: be32(bytes, 60),
            snapshots_offset: be64(bytes, 64),
            incompatible_features: 0,
            compatible_features: 0,
            autoclear_features: 0,
            refcount_order: 4,
            compression: Compression::Zlib,
            backing: None,
            data_file: None,
            bitmaps: false,
        })
    }

    /// The fields that version 3 adds. Returns `header_length` and `compression_type`.
    fn parse_v3(&mut self, bytes: &[u8]) -> io::Result<(usize, u8)> {
        if bytes.len() < V3_LENGTH {
            return Err(invalid(format!("truncated qcow2 image: {} bytes are no version 3 header", bytes.len())));
        }
        self.incompatible_features = be64(bytes, 72);
        self.compatible_features = be64(bytes, 80);
        self.autoclear_features = be64(bytes, 88);
        self.refcount_order = be32(bytes, 96);
        let length = be32(bytes, 100) as usize;
        if length < V3_LENGTH || !length.is_multiple_of(8) || length as u64 > self.cluster_size() {
            return Err(invalid(format!(
                "header_length is {length}, not a multiple of 8 from 104 to the cluster size"
            )));
        }
        if length > bytes.len() {
            return Err(invalid(format!("truncated qcow2 image: {} of {length} bytes of header", bytes.len())));
        }
        Ok((length, if length > V3_LENGTH { bytes[V3_LENGTH] } else { 0 }))
    }

    /// Section "Header extensions": they end at the end marker, at the backing file name, or with the cluster.
    fn parse_extensions<'a>(&self, cluster: &'a [u8], header_length: usize) -> io::Result<Extensions<'a>> {
        let mut found = Extensions::default();
        let name_offset = usize::try_from(be64(cluster, 8)).unwrap_or(usize::MAX);
        let end = if name_offset >= header_length { name_offset.min(cluster.len()) } else { cluster.len() };
        let mut at = header_length;
        while at + 8 <= end {
            let kind = be32(cluster, at);
            let length = be32(cluster, at + 4) as usize;
            if kind == extension::END {
                break;
            }
            let start = at + 8;
            if length > end - start {
                return Err(invalid(format!(
                    "header extension {kind:#010x} at {at:#x} is {length} bytes long, which is more than there is room for"
                )));
            }
            found.add(kind, &cluster[start..start + length])?;
            at = start + length.next_multiple_of(8);
        }
        Ok(found)
    }

    fn refuse_unknown_features(&self, names: &[u8]) -> io::Result<()> {
        let unknown = self.incompatible_features & !incompatible::KNOWN;
        if unknown == 0 {
            return Ok(());
        }
        let listed: Vec<_> = (0..64)
            .filter(|bit| unknown >> bit & 1 == 1)
            .map(|bit| match feature_name(names, 0, bit) {
                Some(name) => format!("'{name}' (bit {bit})"),
                None => format!("bit {bit}"),
            })
            .collect();
        Err(invalid(format!("unsupported incompatible qcow2 feature: {}", listed.join(", "))))
    }

    fn compression_of(&self, compression_type: u8) -> io::Result<Compression> {
        match (self.has(incompatible::COMPRESSION), compression_type) {
            (false, 0) => Ok(Compression::Zlib),
            (true, 1) => Ok(Compression::Zstd),
            (true, 0) => Err(invalid("the compression type feature is set, but compression_type is 0")),
            (true, other) => Err(invalid(format!("unsupported compression type {other}"))),
            (false, other) => {
                Err(invalid(format!("compression_type is {other}, but its incompatible feature is not set")))
            }
        }
    }

    fn parse_backing(&mut self, cluster: &[u8], format: Option<&[u8]>) -> io::Result<()> {
        let (offset, length) = (be64(cluster, 8), be32(cluster, 16));
        if offset == 0 {
            return Ok(());
        }
        if length == 0 || length > BACKING_NAME_LIMIT {
            return Err(invalid(format!("backing_file_size is {length}, not 1 to {BACKING_NAME_LIMIT}")));
        }
        let name = usize::try_from(offset).ok().and_then(|start| cluster.get(start..)?.get(..length as usize));
        let name = name.ok_or_else(|| {
            invalid(format!("backing file name at {offset:#x}+{length} is not within the first cluster"))
        })?;
        if name.contains(&0) {
            return Err(invalid("backing file name has a zero byte in it"));
        }
        let format = format.map(|format| String::from_utf8_lossy(format).into_owned());
        self.backing = Some(Backing { name: OsString::from_vec(name.to_vec()), format });
        Ok(())
    }

    fn check_encryption(&self, crypt_method: u32) -> io::Result<()> {
        match crypt_method {
            0 => Ok(()),
            1 => Err(invalid("it is encrypted with AES (crypt_method 1), which is not supported")),
            2 => Err(invalid("it is encrypted with LUKS (crypt_method 2): what opens it is --secret")),
            other => Err(invalid(format!("it is encrypted in an unknown way: crypt_method is {other}"))),
        }
    }

    /// Every size and offset of a table, and what fields demand of each other.
    fn check_tables(&self) -> io::Result<()> {
        if self.has(incompatible::EXTENDED_L2) && self.cluster_bits < EXTENDED_L2_CLUSTER_BITS {
            let bits = self.cluster_bits;
            return Err(invalid(format!("cluster_bits is {bits}, but extended L2 entries need 14 at least")));
        }
        if self.autoclear_features & autoclear::RAW_DATA_FILE != 0 {
            if !self.has(incompatible::DATA_FILE) {
                return Err(invalid("the raw external data bit is set, but there is no external data file"));
            }
            if self.backing.is_some() {
                return Err(invalid("it has a raw external data file and a backing file, which exclude each other"));
            }
        }
        if self.refcount_order > 6 {
            return Err(invalid(format!("refcount_order is {}, not 0 to 6", self.refcount_order)));
        }
        let l1_bytes = u64::from(self.l1_size) * 8;
        if l1_bytes > L1_LIMIT {
            return Err(invalid(format!("the L1 table has {} entries, which is more than 32 MiB", self.l1_size)));
        }
        let needed = self.l1_needed();
        if needed > u64::from(self.l1_size) {
            return Err(invalid(format!(
                "the L1 table has {} entries, but a virtual size of {} bytes needs {needed}",
                self.l1_size, self.size
            )));
        }
        self.check_offset("L1", self.l1_table_offset, l1_bytes)?;
        let refcount_bytes = u64::from(self.refcount_table_clusters) << self.cluster_bits;
        if refcount_bytes > REFCOUNT_TABLE_LIMIT || refcount_bytes == 0 {
            let clusters = self.refcount_table_clusters;
            return Err(invalid(format!("the refcount table has {clusters} clusters, not some, up to 8 MiB")));
        }
        self.check_offset("refcount", self.refcount_table_offset, refcount_bytes)?;
        if self.nb_snapshots > SNAPSHOT_LIMIT {
            return Err(invalid(format!("nb_snapshots is {}, more than {SNAPSHOT_LIMIT}", self.nb_snapshots)));
        }
        if self.nb_snapshots > 0 {
            self.check_offset("snapshot", self.snapshots_offset, 0)?;
        }
        Ok(())
    }

    /// Host offsets are signed 64-bit numbers in the kernel.
    fn check_offset(&self, table: &str, offset: u64, length: u64) -> io::Result<()> {
        if !offset.is_multiple_of(self.cluster_size()) {
            return Err(invalid(format!("the {table} table's offset {offset:#x} is no multiple of the cluster size")));
        }
        if offset == 0 && length > 0 {
            return Err(invalid(format!("the {table} table's offset is 0, where the header is")));
        }
        match offset.checked_add(length) {
            Some(end) if end <= i64::MAX as u64 => Ok(()),
            _ => Err(invalid(format!("the {table} table at {offset:#x}+{length} is past every file's end"))),
        }
    }
}

/// The extensions that mean something to a reader.
#[derive(Default)]
struct Extensions<'a> {
    backing_format: Option<&'a [u8]>,
    data_file: Option<&'a [u8]>,
    feature_names: &'a [u8],
    bitmaps: bool,
}

impl<'a> Extensions<'a> {
    fn add(&mut self, kind: u32, data: &'a [u8]) -> io::Result<()> {
        match kind {
            extension::BACKING_FORMAT => self.backing_format = Some(data),
            extension::DATA_FILE if data.is_empty() || data.contains(&0) => {
                return Err(invalid("the external data file's name is empty or has a zero byte in it"));
            }
            extension::DATA_FILE => self.data_file = Some(data),
            extension::FEATURE_NAMES => self.feature_names = data,
            extension::BITMAPS => self.bitmaps = true,
            _ => {}
        }
        Ok(())
    }
}

/// Bytes of an entry of the feature name table.
const FEATURE_NAME_LENGTH: usize = 48;

/// The name of feature `bit` of feature set `set` (0: incompatible), as printable text, from a feature name table.
fn feature_name(table: &[u8], set: u8, bit: u8) -> Option<String> {
    let entry = table.chunks_exact(FEATURE_NAME_LENGTH).find(|entry| entry[..2] == [set, bit])?;
    let name = entry[2..].split(|byte| *byte == 0).next().unwrap_or_default();
    // It goes to a terminal, from an untrusted file.
    let name: String = String::from_utf8_lossy(name).chars().filter(|c| !c.is_control()).collect();
    (!name.is_empty()).then_some(name)
}

fn be32(bytes: &[u8], at: usize) -> u32 {
    u32::from_be_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// An error about the contents of an image.
pub(super) fn invalid(what: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.into())
}

impl Header {
    /// The header, its extensions, a feature name table and the backing file name, as the first bytes of an image.
    /// The caller pads them to a cluster. Fails with `InvalidInput` when they are longer than a cluster.
    pub fn encode(&self) -> io::Result<Vec<u8>> {
        let header_length = match self.version {
            2 => V2_LENGTH,
            _ => V3_LENGTH_WITH_COMPRESSION,
        };
        let mut bytes = vec![0; header_length];
        bytes[..4].copy_from_slice(&MAGIC);
        bytes[4..8].copy_from_slice(&self.version.to_be_bytes());
        bytes[20..24].copy_from_slice(&self.cluster_bits.to_be_bytes());
        bytes[24..32].copy_from_slice(&self.size.to_be_bytes());
        bytes[36..40].copy_from_slice(&self.l1_size.to_be_bytes());
        bytes[40..48].copy_from_slice(&self.l1_table_offset.to_be_bytes());
        bytes[48..56].copy_from_slice(&self.refcount_table_offset.to_be_bytes());
        bytes[56..60].copy_from_slice(&self.refcount_table_clusters.to_be_bytes());
        bytes[60..64].copy_from_slice(&self.nb_snapshots.to_be_bytes());
        bytes[64..72].copy_from_slice(&self.snapshots_offset.to_be_bytes());
        if self.version == 3 {
            bytes[72..80].copy_from_slice(&self.incompatible_features.to_be_bytes());
            bytes[80..88].copy_from_slice(&self.compatible_features.to_be_bytes());
            bytes[88..96].copy_from_slice(&self.autoclear_features.to_be_bytes());
            bytes[96..100].copy_from_slice(&self.refcount_order.to_be_bytes());
            bytes[100..104].copy_from_slice(&(header_length as u32).to_be_bytes());
            bytes[104] = u8::from(self.compression == Compression::Zstd);
        }
        self.encode_extensions(&mut bytes);
        if let Some(backing) = &self.backing {
            let (offset, name) = (bytes.len() as u64, backing.name.as_bytes());
            bytes[8..16].copy_from_slice(&offset.to_be_bytes());
            bytes[16..20].copy_from_slice(&(name.len() as u32).to_be_bytes());
            bytes.extend_from_slice(name);
        }
        match bytes.len() as u64 <= self.cluster_size() {
            true => Ok(bytes),
            false => Err(io::Error::new(io::ErrorKind::InvalidInput, "the header does not fit in one cluster")),
        }
    }

    fn encode_extensions(&self, bytes: &mut Vec<u8>) {
        if let Some(format) = self.backing.as_ref().and_then(|backing| backing.format.as_ref()) {
            push_extension(bytes, extension::BACKING_FORMAT, format.as_bytes());
        }
        if let Some(name) = &self.data_file {
            push_extension(bytes, extension::DATA_FILE, name.as_bytes());
        }
        push_extension(bytes, extension::END, &[]);
    }
}

fn push_extension(bytes: &mut Vec<u8>, kind: u32, data: &[u8]) {
    bytes.extend_from_slice(&kind.to_be_bytes());
    bytes.extend_from_slice(&(data.len() as u32).to_be_bytes());
    bytes.extend_from_slice(data);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
}

#[cfg(test)]
mod tests;
