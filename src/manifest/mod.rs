//! The manifest of a copy: what the disk held at the instant, in hashes, and how the instant was taken. docs/MANIFEST.md has
//! the format.
//!
//! A manifest that is read is not trusted: the file may be no longer than a manifest of a disk of that size is, numbers are
//! checked before they are used, and a seal over everything that is compared tells a damaged manifest from a damaged disk. The
//! seal is no signature: who can write the file can write another one.

mod blocks;
mod path_name;

pub use path_name::PathName;

use crate::digest::{BLOCK, Digest};
use crate::error::{Error, Kind, Result, reason};
use crate::ground::range::ByteRange;
use blocks::Blocks;
use serde::{Deserialize, Serialize};
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;
use std::time::SystemTime;

/// Of the format: fields are only ever added to one.
pub const SCHEMA: u32 = 1;
const KIND: &str = "drive-backup manifest";

/// Bytes of a manifest beside its blocks: names, and what was unreadable.
const HEAD_LIMIT: u64 = 16 << 20;
/// Bytes: the sizes of disks in most formats are multiples of it.
const SECTOR: u64 = 512;
/// Bytes of a block's line at most, whoever has formatted it.
const LINE_LIMIT: u64 = 96;

/// See the module. The order of the fields is the order in the file.
#[derive(Debug, Serialize)]
pub struct Manifest {
    r#type: &'static str,
    schema: u32,
    /// Name and version of what wrote it.
    pub tool: String,
    /// When it was written, RFC 3339, UTC.
    pub created: String,
    /// The instant that the copy shows.
    pub instant: Taken,
    /// What was copied.
    pub source: End,
    /// The copy.
    pub target: End,
    /// Source ranges that could not be read: they are zeroes in the copy, and here.
    pub unreadable: Vec<Range>,
    /// Target ranges that could not be written: the copy does not hold there what the hashes say.
    pub skipped: Vec<Range>,
    /// Bytes of the disk.
    length: u64,
    /// BLAKE3 of all its bytes.
    blake3: String,
    /// Bytes of a block.
    block_size: u64,
    blocks: Blocks,
    seal: String,
}

/// How an instant was taken.
#[derive(Debug, Serialize)]
pub struct Taken {
    /// RFC 3339, UTC.
    pub time: String,
    /// CLOCK_MONOTONIC, nanoseconds.
    pub monotonic_ns: u64,
    /// Of the boot that the monotonic time is of; null where the system has none.
    pub boot_id: Option<String>,
    /// frozen, reflink, unchanging, unwatched, unchecked.
    pub how: &'static str,
    /// Writer processes that took part.
    pub writers: u64,
    /// For how long they were frozen; null without writers.
    pub frozen_ms: Option<f64>,
    /// The copy is known to show one instant.
    pub consistent: bool,
}

/// Source or target.
#[derive(Debug, Serialize)]
pub struct End {
    /// As it was named; `-` for a standard stream.
    #[serde(flatten)]
    pub name: PathName,
    /// Of the image.
    pub format: &'static str,
}

/// Bytes of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Range {
    /// First byte.
    pub offset: u64,
    /// Number of bytes.
    pub length: u64,
}

impl From<ByteRange> for Range {
    fn from(range: ByteRange) -> Self {
        Self { offset: range.offset, length: range.length }
    }
}

/// What a copy was: all of a manifest but the contents.
#[derive(Debug)]
pub struct Story {
    /// The instant that the copy shows.
    pub instant: Taken,
    /// What was copied.
    pub source: End,
    /// The copy.
    pub target: End,
    /// Source ranges that could not be read.
    pub unreadable: Vec<ByteRange>,
    /// Target ranges that could not be written.
    pub skipped: Vec<ByteRange>,
}

impl Manifest {
    /// Of a disk that holds `digest`, and whose BLAKE3 is `whole`.
    pub fn new(story: Story, digest: Digest, whole: blake3::Hash) -> Self {
        let Story { instant, source, target, unreadable, skipped } = story;
        Self {
            r#type: KIND,
            schema: SCHEMA,
            tool: concat!(env!("CARGO_PKG_NAME"), " ", env!("CARGO_PKG_VERSION")).to_owned(),
            created: rfc3339(SystemTime::now()),
            instant,
            source,
            target,
            unreadable: unreadable.into_iter().map(Into::into).collect(),
            skipped: skipped.into_iter().map(Into::into).collect(),
            length: digest.length(),
            blake3: whole.to_string(),
            block_size: BLOCK,
            seal: seal(&digest, &whole).to_string(),
            blocks: Blocks::of(digest),
        }
    }

    /// The file's bytes: JSON, a block in a line.
    pub fn bytes(&self) -> io::Result<Vec<u8>> {
        let mut bytes = serde_json::to_vec_pretty(self)?;
        bytes.push(b'\n');
        Ok(bytes)
    }
}

/// What a manifest says of a disk's contents.
#[derive(Debug)]
pub struct Contents {
    /// In blocks.
    pub digest: Digest,
    /// BLAKE3 of the whole.
    pub whole: blake3::Hash,
    /// Ranges of the copy that were known not to be as the hashes say.
    pub skipped: Vec<ByteRange>,
}

/// The part of a manifest that is compared. Unknown fields are a later version's.
#[derive(Deserialize)]
struct Claims {
    r#type: String,
    schema: u32,
    length: u64,
    blake3: String,
    block_size: u64,
    blocks: Blocks,
    seal: String,
    #[serde(default)]
    skipped: Vec<Range>,
}

impl Contents {
    /// Reads the manifest at `path`, of a disk of `length` bytes, in memory that the disk's size bounds. What it says may be of
    /// less than a sector fewer bytes.
    ///
    /// [`Kind::Usage`] when it is no manifest, or damaged; [`Kind::Differs`] when it is of a disk of another size.
    pub fn read(path: &Path, length: u64) -> Result<Self> {
        let refuse = |why: &str| Error::new(Kind::Usage, format!("manifest '{}': {why}", path.display()));
        let limit = HEAD_LIMIT.saturating_add(length.div_ceil(BLOCK).saturating_mul(LINE_LIMIT));
        let bytes = read_file(path, limit).map_err(|error| refuse(&reason(&error)))?;
        let claims: Claims = serde_json::from_slice(&bytes).map_err(|error| refuse(&words(&error)))?;
        drop(bytes);
        if claims.r#type != KIND {
            return Err(refuse("it is not a manifest of drive-backup"));
        }
        if claims.schema != SCHEMA {
            return Err(refuse(&format!("its schema is {}, known is {SCHEMA}", claims.schema)));
        }
        if claims.block_size != BLOCK {
            return Err(refuse(&format!("its blocks have {} bytes, not {BLOCK}", claims.block_size)));
        }
        let whole = blake3::Hash::from_hex(&claims.blake3).map_err(|_| refuse("blake3 is not a hash"))?;
        let digest =
            claims.blocks.digest(claims.length).ok_or_else(|| refuse("its blocks are not those of its length"))?;
        let skipped = claims.skipped.iter().map(|range| ByteRange::checked(range.offset, range.length)).collect();
        let skipped: Vec<ByteRange> = Option::ok_or_else(skipped, || refuse("a skipped range overflows"))?;
        if seal(&digest, &whole).to_string() != claims.seal {
            return Err(refuse("it is damaged: its seal does not fit"));
        }
        // Formats that count in sectors hold a few zero bytes more.
        if claims.length.checked_next_multiple_of(SECTOR) != length.checked_next_multiple_of(SECTOR)
            || claims.length > length
        {
            let what = format!(
                "manifest '{}' is of another disk: of {} bytes, this one has {length}",
                path.display(),
                claims.length
            );
            return Err(Error::new(Kind::Differs, what));
        }
        Ok(Self { digest, whole, skipped })
    }
}

/// A regular file of at most `limit` bytes; never blocks on a fifo.
fn read_file(path: &Path, limit: u64) -> io::Result<Vec<u8>> {
    if !std::fs::metadata(path)?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "is not a regular file"));
    }
    let mut bytes = Vec::new();
    File::open(path)?.take(limit + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > limit {
        let what = format!("has more than {limit} bytes, more than a manifest of a disk of this size can have");
        return Err(io::Error::new(io::ErrorKind::InvalidData, what));
    }
    Ok(bytes)
}

/// serde's words, without what the file holds.
fn words(error: &serde_json::Error) -> String {
    use serde_json::error::Category;
    let (line, column) = (error.line(), error.column());
    match error.classify() {
        Category::Eof => format!("it ends too early, at line {line}"),
        Category::Syntax => format!("it is not JSON: line {line}, column {column}"),
        Category::Data | Category::Io => {
            let text: String = error.to_string().chars().filter(|c| !c.is_control()).take(200).collect();
            format!("it is not a manifest of drive-backup: {text}")
        }
    }
}

/// Over all that is compared: length, hash of the whole, blocks.
fn seal(digest: &Digest, whole: &blake3::Hash) -> blake3::Hash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(b"drive-backup manifest 1\n").update(&digest.length().to_le_bytes()).update(whole.as_bytes());
    for (block, hash) in digest.hashes() {
        hasher.update(&block.to_le_bytes()).update(hash);
    }
    hasher.finalize()
}

/// RFC 3339, UTC, milliseconds.
pub fn rfc3339(at: SystemTime) -> String {
    let at = jiff::Timestamp::try_from(at).unwrap_or(jiff::Timestamp::UNIX_EPOCH);
    format!("{at:.3}")
}

#[cfg(test)]
mod tests;
