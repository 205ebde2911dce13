//! The two ends of a copy: one trait, and a file for each kind of end.

pub mod chain;
pub mod changed;
pub mod clone;
pub mod direct;
#[cfg(test)]
pub(crate) mod fixture;
mod flush_queue;
pub mod format;
mod holes;
pub mod identity;
pub mod location;
pub mod lock;
pub mod medium;
#[cfg(feature = "nbd")]
pub mod nbd;
pub mod null;
pub mod open;
pub mod prefix;
pub mod probe;
pub mod qcow2;
#[cfg(feature = "nbd")]
pub mod qemu;
pub mod raw;
pub mod secret;
pub mod stability;
pub mod stream;
mod sys;
pub mod target;
pub mod top;

use crate::ground::range::{ByteRange, Extent};
use std::fs::File;
use std::io;

/// A disk, seen as bytes. All calls may block and may come from several threads at once.
///
/// Errors are the world's, as [`io::Error`]: with the system's errno where there is one, else of kind `InvalidData`
/// with one line that says what is wrong and where. The caller adds the side and the range. Offsets past the end are
/// the caller's bug and may panic in debug builds, except that a regular file written past its end grows.
pub trait Image: Send + Sync {
    /// Size in bytes.
    fn length(&self) -> u64;

    /// The first extent of `range`: starts at `range.offset`, is not empty, ends at `range.end()` at the latest.
    /// Neighbours of one kind are merged as far as that is cheap. `range` must not be empty.
    fn block_status(&self, range: ByteRange) -> io::Result<Extent>;

    /// Fills `buf` from byte `offset`. Never short.
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;

    /// Writes all of `buf` at byte `offset`. Not durable before [`Image::flush`].
    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()>;

    /// Makes `range` read as zeroes, by the cheapest way that holds: punch, discard, or bytes.
    fn write_zeroes(&self, range: ByteRange) -> io::Result<()>;

    /// `range` is no longer needed; what it reads as afterwards is undefined.
    fn discard(&self, range: ByteRange) -> io::Result<()>;

    /// Everything written before is on stable storage afterwards. A failure is final: never flush again and call it good.
    fn flush(&self) -> io::Result<()>;

    /// Makes requests under way fail, from another thread, where that is possible: the image is of no use any more. Does
    /// not block for long.
    fn abandon(&self) {}

    /// What a copy may make use of.
    fn properties(&self) -> Properties;

    /// The file whose bytes are this image's bytes at the same offsets, so that the kernel may copy; else `None`.
    fn file(&self) -> Option<&File> {
        None
    }
}

/// Capabilities as data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Properties {
    /// Bytes: writes that start and end on multiples of it cost no read-modify-write. 1 when it makes no difference.
    pub cluster_size: u64,
    /// Bytes: `--direct` wants offsets, lengths and memory aligned to it; other requests still work, slower. 1 if not.
    pub alignment: u64,
    /// What was never written reads as zeroes (a new file), so that zero runs need no call at all.
    pub reads_zero: bool,
    /// Must be written in ascending order without gaps (a stream).
    pub sequential: bool,
}
