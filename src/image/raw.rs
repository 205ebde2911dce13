//! A raw image: a regular file or a block device, its bytes as they are.

use super::direct::{AlignedBuffer, Direct};
use super::flush_queue::FlushQueue;
use super::holes::Holes;
use super::medium::{self, Access, Medium};
use super::{Image, Properties, sys};
use crate::error::{Error, Result, Side};
use crate::ground::range::{ByteRange, Extent};
use rustix::fs::SeekFrom;
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering::Relaxed};

/// Bytes written between two starts of write-back that keep the last flush short.
pub const WRITEBACK_STEP: u64 = 16 << 20;

/// See the module.
#[derive(Debug)]
pub struct Raw {
    file: File,
    medium: Medium,
    direct: Option<Direct>,
    length: AtomicU64,
    is_fresh: bool,
    holes: Holes,
    writeback: Option<Writeback>,
    flush: Flush,
    flushes: FlushQueue,
    /// The errno of the first failed flush or write-back; 0 while all went well.
    lost: AtomicI32,
    no_seek_data: AtomicBool,
    /// The data extent that was found last: a long one is not searched for its end again at every request.
    last_data: Mutex<ByteRange>,
}

/// What [`Image::flush`] does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flush {
    Nothing,
    /// Bytes, and what finds them.
    Data,
    All,
}

#[derive(Debug)]
struct Writeback {
    step: u64,
    pending: AtomicU64,
}

impl Raw {
    /// Opens `path` for reading. Anything but a regular file or a block device is refused; never blocks on a fifo.
    pub fn open(path: &Path, side: Side) -> Result<Self> {
        Self::open_for(path, Access::Read, side)
    }

    fn open_for(path: &Path, access: Access, side: Side) -> Result<Self> {
        let (file, medium) = medium::open(path, access, side)?;
        Self::wrap(file, medium).map_err(|e| Error::file(side, "open", path, e))
    }

    /// Takes an open file or device as it is, with the access that it was opened for.
    pub fn of(file: File) -> io::Result<Self> {
        let medium = Medium::of(&file)?;
        Self::wrap(file, medium)
    }

    /// Takes an empty file that nobody else has, such as a temporary one, and makes it `length` zero bytes long.
    pub fn fresh(file: File, length: u64) -> io::Result<Self> {
        // Not without need: ext4 writes a file that was ever truncated to nothing out when it is closed, and the closer
        // waits for the disk.
        if file.metadata()?.len() > 0 {
            file.set_len(0)?;
        }
        if length > 0 {
            file.set_len(length)?;
        }
        Ok(Self { is_fresh: true, ..Self::of(file)? })
    }

    fn wrap(file: File, medium: Medium) -> io::Result<Self> {
        Ok(Self {
            length: AtomicU64::new(medium.length(&file)?),
            file,
            medium,
            direct: None,
            is_fresh: false,
            holes: Holes::default(),
            writeback: None,
            flush: Flush::All,
            flushes: FlushQueue::default(),
            lost: AtomicI32::new(0),
            no_seek_data: AtomicBool::new(false),
            last_data: Mutex::default(),
        })
    }

    /// Reads and writes past the page cache. `Unsupported` where the file system can't.
    pub fn with_direct(self) -> io::Result<Self> {
        Ok(Self { direct: Some(Direct::reopen(&self.file, self.medium)?), ..self })
    }

    /// Starts write-back after every `step` bytes written, so that the last flush is short and errors show early.
    pub fn with_writeback(self, step: u64) -> Self {
        Self { writeback: Some(Writeback { step, pending: AtomicU64::new(0) }), ..self }
    }

    /// Leaves writing out to the kernel: [`Image::flush`] does nothing, and promises nothing.
    pub fn without_flush(self) -> Self {
        Self { flush: Flush::Nothing, ..self }
    }

    /// Leaves times out of [`Image::flush`]: bytes are as durable, and a file that is flushed often costs its file system
    /// less.
    pub fn with_data_flush(self) -> Self {
        Self { flush: Flush::Data, ..self }
    }

    /// Makes `range` read as zeroes and keeps its space: no hole. Blocks.
    pub fn write_zeroes_allocated(&self, range: ByteRange) -> io::Result<()> {
        self.forget_data();
        let whole = self.whole_sectors(range);
        if self.medium != Medium::File || whole.is_empty() || !self.holes.zero_allocated(&self.file, whole)? {
            return self.write_zero_bytes(range);
        }
        self.wrote(range)
    }

    /// Makes `range` of a file read as zeroes where the file system does that without bytes; with its space kept unless it
    /// `may_unmap`. False, and nothing has changed, where it takes bytes. What a device does is not known: false.
    pub fn write_zeroes_fast(&self, range: ByteRange, may_unmap: bool) -> io::Result<bool> {
        if self.medium != Medium::File {
            return Ok(false);
        }
        self.forget_data();
        if may_unmap { self.holes.zero(&self.file, range) } else { self.holes.zero_allocated(&self.file, range) }
    }

    /// The file or device itself.
    pub fn as_file(&self) -> &File {
        &self.file
    }

    /// File or device.
    pub fn medium(&self) -> Medium {
        self.medium
    }

    fn forget_data(&self) {
        *self.last_data.lock().expect("nothing panics under this lock") = ByteRange::default();
    }

    /// Where data starts at or after `offset`; `None` when the rest is a hole or the file has ended.
    fn seek(&self, position: SeekFrom) -> io::Result<Option<u64>> {
        loop {
            match rustix::fs::seek(&self.file, position) {
                Ok(found) => return Ok(Some(found)),
                Err(Errno::NXIO) => return Ok(None),
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    fn file_status(&self, range: ByteRange) -> io::Result<Extent> {
        let known = self.last_data.lock().expect("nothing panics under this lock").intersect(range);
        if known.offset == range.offset && !known.is_empty() {
            return Ok(Extent::data(known));
        }
        let data = match self.seek(SeekFrom::Data(range.offset)) {
            Err(e) if e.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => {
                self.no_seek_data.store(true, Relaxed);
                return Ok(Extent::data(range));
            }
            other => other?,
        };
        match data {
            Some(data) if data > range.offset => Ok(Extent::zero(range.prefix(data - range.offset))),
            Some(_) => self.data_extent(range),
            None => self.trailing_hole(range),
        }
    }

    fn data_extent(&self, range: ByteRange) -> io::Result<Extent> {
        // A hole punched between the two calls ends it at once: what was just seen as data is still right to read.
        let end = self.seek(SeekFrom::Hole(range.offset))?.filter(|&end| end > range.offset).unwrap_or(range.end());
        let whole = ByteRange::between(range.offset, end);
        *self.last_data.lock().expect("nothing panics under this lock") = whole;
        Ok(Extent::data(whole.intersect(range)))
    }

    /// No data up to the end, which may have come nearer than it was.
    fn trailing_hole(&self, range: ByteRange) -> io::Result<Extent> {
        let end = self.medium.length(&self.file)?;
        match end.checked_sub(range.offset) {
            None | Some(0) => Err(ended_at(end)),
            Some(rest) => Ok(Extent::zero(range.prefix(rest))),
        }
    }

    fn read_buffered(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let mut done = 0;
        while done < buf.len() {
            match self.file.read_at(&mut buf[done..], offset + done as u64) {
                Ok(0) => return Err(ended_at(self.medium.length(&self.file)?)),
                Ok(n) => done += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn read_direct(&self, direct: &Direct, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let (head, middle) = direct.split(offset, buf.len());
        let (head_buf, rest) = buf.split_at_mut(head);
        let (middle_buf, tail_buf) = rest.split_at_mut(middle);
        self.read_buffered(head_buf, offset)?;
        let mut done = 0;
        while done < middle {
            let at = offset + (head + done) as u64;
            match direct.read(&mut middle_buf[done..], at) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // A short read ends at an odd byte or at the end of the file: the cache knows the rest.
                Ok(n) if n == 0 || !direct.is_whole(n) => {
                    return self.read_buffered(&mut buf[head + done..], at);
                }
                Ok(n) => done += n,
                Err(e) => return Err(e),
            }
        }
        self.read_buffered(tail_buf, offset + (head + middle) as u64)
    }

    fn write_direct(&self, direct: &Direct, buf: &[u8], offset: u64) -> io::Result<()> {
        let (head, middle) = direct.split(offset, buf.len());
        self.file.write_all_at(&buf[..head], offset)?;
        let mut done = head;
        while done < head + middle {
            match direct.write(&buf[done..head + middle], offset + done as u64) {
                Ok(n) if n > 0 && direct.is_whole(n) => done += n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
                // Short at an odd byte: the full disk shows in the cached write that follows.
                Ok(n) => {
                    done += n;
                    break;
                }
            }
        }
        self.file.write_all_at(&buf[done..], offset + done as u64)
    }

    /// Counts bytes as written, and at every step asks the kernel to begin writing them out.
    fn wrote(&self, range: ByteRange) -> io::Result<()> {
        self.length.fetch_max(range.end(), Relaxed);
        let Some(writeback) = &self.writeback else { return Ok(()) };
        let before = writeback.pending.fetch_add(range.length, Relaxed);
        if before / writeback.step == (before + range.length) / writeback.step {
            return Ok(());
        }
        match sys::start_writeback(&self.file) {
            Err(e) if is_loss(&e) => Err(self.lose(e)),
            // Only a hint: what it can't do, the last flush does.
            _ => Ok(()),
        }
    }

    /// The kernel tells of a page that it lost once, and marks it clean: of two flushes at once only one would hear of it, and a
    /// later one would succeed without the data.
    fn flush_by(&self, sync: impl FnOnce(&File) -> io::Result<()>) -> io::Result<()> {
        self.flushes.join(|| match self.lost.load(Relaxed) {
            0 => sync(&self.file).map_err(|e| self.lose(e)),
            errno => Err(io::Error::from_raw_os_error(errno)),
        })
    }

    fn lose(&self, error: io::Error) -> io::Error {
        let errno = error.raw_os_error().unwrap_or(Errno::IO.raw_os_error());
        self.lost.store(errno, Relaxed);
        error
    }

    fn write_zero_bytes(&self, range: ByteRange) -> io::Result<()> {
        const PIECE: u64 = 1 << 20;
        let alignment = self.direct.as_ref().map_or(1, Direct::alignment);
        let zeroes = AlignedBuffer::new(range.length.min(PIECE) as usize, alignment as usize);
        let mut rest = range;
        while !rest.is_empty() {
            let piece = rest.prefix(PIECE);
            self.write_at(&zeroes[..piece.length as usize], piece.offset)?;
            rest = ByteRange::between(piece.end(), rest.end());
        }
        Ok(())
    }

    /// The part of `range` that is whole sectors of a device; on a file all of it.
    fn whole_sectors(&self, range: ByteRange) -> ByteRange {
        let Medium::Device { sector } = self.medium else { return range };
        let start = range.offset.next_multiple_of(sector);
        let end = range.end() / sector * sector;
        ByteRange::between(start, end.max(start))
    }

    fn zero_inside(&self, range: ByteRange) -> io::Result<()> {
        let whole = self.whole_sectors(range);
        if whole.is_empty() || !self.holes.zero(&self.file, whole)? {
            return self.write_zero_bytes(range);
        }
        self.write_zero_bytes(ByteRange::between(range.offset, whole.offset))?;
        self.write_zero_bytes(ByteRange::between(whole.end(), range.end()))
    }

    /// Makes a file at least `end` bytes long. Writes a byte, since a truncate could race with another thread's
    /// write further on and cut it off.
    fn grow(&self, end: u64) -> io::Result<()> {
        if self.length.load(Relaxed) < end && self.medium.length(&self.file)? < end {
            self.file.write_all_at(&[0], end - 1)?;
        }
        self.length.fetch_max(end, Relaxed);
        Ok(())
    }
}

impl Image for Raw {
    fn length(&self) -> u64 {
        self.length.load(Relaxed)
    }

    fn block_status(&self, range: ByteRange) -> io::Result<Extent> {
        debug_assert!(!range.is_empty());
        match self.medium {
            Medium::File if !self.no_seek_data.load(Relaxed) => self.file_status(range),
            _ => Ok(Extent::data(range)),
        }
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        match &self.direct {
            Some(direct) => self.read_direct(direct, buf, offset),
            None => self.read_buffered(buf, offset),
        }
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        match &self.direct {
            Some(direct) => self.write_direct(direct, buf, offset)?,
            None => self.file.write_all_at(buf, offset)?,
        }
        self.wrote(ByteRange::new(offset, buf.len() as u64))
    }

    fn write_zeroes(&self, range: ByteRange) -> io::Result<()> {
        if range.is_empty() {
            return Ok(());
        }
        self.forget_data();
        match self.medium {
            Medium::Device { .. } => self.zero_inside(range),
            Medium::File => {
                self.grow(range.end())?;
                self.zero_inside(range)
            }
        }
    }

    fn discard(&self, range: ByteRange) -> io::Result<()> {
        let whole = self.whole_sectors(range);
        if whole.is_empty() {
            return Ok(());
        }
        self.forget_data();
        self.holes.discard(&self.file, self.medium, whole)
    }

    fn flush(&self) -> io::Result<()> {
        self.flush_by(|file| match self.flush {
            Flush::Nothing => Ok(()),
            Flush::Data => file.sync_data(),
            Flush::All => file.sync_all(),
        })
    }

    fn properties(&self) -> Properties {
        Properties {
            cluster_size: 1,
            alignment: self.direct.as_ref().map_or(1, Direct::alignment),
            reads_zero: self.is_fresh,
            sequential: false,
        }
    }

    fn file(&self) -> Option<&File> {
        Some(&self.file)
    }
}

fn is_loss(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw_os_error);
    matches!(errno, Some(Errno::IO | Errno::NOSPC | Errno::DQUOT))
}

fn ended_at(end: u64) -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, format!("the file ended at {end:#x}"))
}

#[cfg(test)]
mod tests;
