//! Where clusters are saved before a writer overwrites them: a sparse file without a name, same offsets as the disk.
//!
//! It dies with the process, whatever ends that, and is worth nothing after a crash. It is flushed once, at the end, for what
//! the kernel says then: pages that could not be written were read back as zeroes, or as what was there before.

use crate::error::{Error, Kind, Result, Side};
use crate::ground::range::ByteRange;
use crate::ground::status::OverlayUsage;
use rustix::fs::{CWD, FallocateFlags, MemfdFlags, Mode, OFlags};
use rustix::io::{Errno, retry_on_intr};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

/// Bytes: the file's length is a multiple of it, so that the block with the disk's last byte can be punched as well.
const BLOCK: u64 = 64 << 10;

/// See the module. All calls may come from several threads at once.
#[derive(Debug)]
pub struct Overlay {
    file: File,
    length: u64,
    limit: Option<u64>,
    used: AtomicU64,
    peak: AtomicU64,
}

impl Overlay {
    /// For a disk of `length` bytes, in the folder `dir`, with `limit` bytes at most.
    ///
    /// Errors of the file system have kind [`Kind::Usage`]: nothing was touched, another folder may do.
    pub fn in_folder(dir: &Path, length: u64, limit: Option<u64>) -> Result<Self> {
        let failed = |error| Error::file(Side::Overlay, "create", dir, error).with_kind(Kind::Usage);
        Self::with_file(unnamed_file(dir).map_err(failed)?, length, limit).map_err(failed)
    }

    /// For a disk of `length` bytes, in memory (pages that can be swapped), with `limit` bytes at most.
    pub fn in_memory(length: u64, limit: Option<u64>) -> Result<Self> {
        let failed = |error| Error::file(Side::Overlay, "create", Path::new("memory"), error).with_kind(Kind::Usage);
        let file = rustix::fs::memfd_create("drive-backup-overlay", MemfdFlags::CLOEXEC);
        Self::with_file(file.map_err(|e| failed(e.into()))?.into(), length, limit).map_err(failed)
    }

    fn with_file(file: File, length: u64, limit: Option<u64>) -> io::Result<Self> {
        // Now, and not when a write is waiting: a file system may not have files that long.
        file.set_len(length.checked_next_multiple_of(BLOCK).unwrap_or(length))?;
        Ok(Self { file, length, limit, used: AtomicU64::new(0), peak: AtomicU64::new(0) })
    }

    /// Writes all of `bytes` at byte `offset`, where nothing is saved yet. Blocks for one write to the page cache. On an
    /// error nothing of it is saved or counted; out of the limit or of space, the errno is ENOSPC.
    pub fn save(&self, bytes: &[u8], offset: u64) -> Result<()> {
        let range = ByteRange::new(offset, bytes.len() as u64);
        let failed = |error| Error::io(Side::Overlay, "write", range, error);
        debug_assert!(range.end() <= self.length, "saved within the disk");
        self.reserve(range.length).map_err(failed)?;
        self.file.write_all_at(bytes, offset).map_err(|error| {
            // Part of it may be there: what a full file system gives up helps whoever else writes there.
            let _ = self.punch(range);
            self.give_back(range.length);
            failed(error)
        })
    }

    /// Counts `range` as saved without writing it: its bytes are zero, and so is what was never written here.
    pub fn save_zeroes(&self, range: ByteRange) -> Result<()> {
        self.reserve(range.length).map_err(|error| Error::io(Side::Overlay, "write", range, error))
    }

    /// Fills `buf` from byte `offset`, where all is saved. Never short. The caller adds side and range to an error.
    pub fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }

    /// `range`, saved before, is not needed any more: its space is freed. Where it can't be, it stays used.
    pub fn drop_range(&self, range: ByteRange) {
        if !range.is_empty() && self.punch(range).is_ok() {
            self.give_back(range.length);
        }
    }

    /// After the last read: did the medium take everything that was saved? Blocks for a flush, if anything was. An error has
    /// kind [`Kind::InstantLost`]: nobody knows what was read.
    pub fn check(&self) -> Result<()> {
        if self.peak.load(Ordering::Acquire) == 0 {
            return Ok(());
        }
        self.file.sync_data().map_err(|error| Error::io(Side::Overlay, "flush", ByteRange::new(0, self.length), error))
    }

    /// How full it is now.
    pub fn usage(&self) -> OverlayUsage {
        let used = self.used.load(Ordering::Acquire);
        // A save may be between the two counts.
        let peak = self.peak.load(Ordering::Acquire).max(used);
        OverlayUsage { used, peak, limit: self.limit }
    }

    /// Counts before anything is written, so that no number of threads can exceed the limit together.
    fn reserve(&self, bytes: u64) -> io::Result<()> {
        let fits = |used: u64| used.checked_add(bytes).filter(|&sum| self.limit.is_none_or(|limit| sum <= limit));
        match self.used.fetch_update(Ordering::AcqRel, Ordering::Acquire, fits) {
            Ok(before) => {
                self.peak.fetch_max(before + bytes, Ordering::AcqRel);
                Ok(())
            }
            Err(used) => {
                let limit = self.limit.unwrap_or(u64::MAX);
                let what = format!("overlay limit of {limit} bytes reached ({used} used)");
                Err(io::Error::new(io::ErrorKind::StorageFull, what))
            }
        }
    }

    fn give_back(&self, bytes: u64) {
        let before = self.used.fetch_sub(bytes, Ordering::AcqRel);
        debug_assert!(before >= bytes, "dropped what was saved");
    }

    fn punch(&self, range: ByteRange) -> rustix::io::Result<()> {
        let end = if range.end() == self.length { range.end().next_multiple_of(BLOCK) } else { range.end() };
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        retry_on_intr(|| rustix::fs::fallocate(&self.file, flags, range.offset, end - range.offset))
    }
}

/// A file in `dir` that no name leads to.
fn unnamed_file(dir: &Path) -> io::Result<File> {
    let (flags, mode) = (OFlags::RDWR | OFlags::CLOEXEC, Mode::RUSR | Mode::WUSR);
    match retry_on_intr(|| rustix::fs::openat(CWD, dir, flags | OFlags::TMPFILE, mode)) {
        Ok(file) => Ok(file.into()),
        // File systems without O_TMPFILE (FUSE, NFS, overlayfs of old) answer in different ways.
        Err(Errno::OPNOTSUPP | Errno::ISDIR | Errno::INVAL) => created_and_unlinked(dir),
        Err(error) => Err(error.into()),
    }
}

fn created_and_unlinked(dir: &Path) -> io::Result<File> {
    const TRIES: u32 = 100;
    let (flags, mode) = (OFlags::RDWR | OFlags::CLOEXEC | OFlags::CREATE | OFlags::EXCL, Mode::RUSR | Mode::WUSR);
    for attempt in 0..TRIES {
        let path = dir.join(format!(".drive-backup-overlay.{}.{attempt}", std::process::id()));
        match retry_on_intr(|| rustix::fs::openat(CWD, &path, flags, mode)) {
            Ok(file) => {
                std::fs::remove_file(&path)?;
                return Ok(file.into());
            }
            Err(Errno::EXIST) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(Errno::EXIST.into())
}

#[cfg(test)]
mod tests;
