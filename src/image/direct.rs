//! I/O past the page cache, for `--direct`.

use super::medium::Medium;
use rustix::fs::{AtFlags, Mode, OFlags, StatxFlags};
use rustix::io::{Errno, retry_on_intr};
use std::fs::File;
use std::io;
use std::ops::{Deref, DerefMut};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

/// A second descriptor of the same file, with O_DIRECT.
#[derive(Debug)]
pub struct Direct {
    file: File,
    alignment: usize,
}

/// Bytes of one bounce buffer.
const BOUNCE: usize = 1 << 20;

impl Direct {
    /// Opens `file` once more with O_DIRECT, with the same access. `Unsupported` when the file system has none.
    pub fn reopen(file: &File, medium: Medium) -> io::Result<Self> {
        let access = rustix::fs::fcntl_getfl(file)? & OFlags::ACCMODE;
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let flags = access | OFlags::DIRECT | OFlags::CLOEXEC;
        let opened = retry_on_intr(|| rustix::fs::open(&path, flags, Mode::empty()));
        let fd = opened.map_err(|e| match e {
            Errno::INVAL => io::Error::new(io::ErrorKind::Unsupported, "the file system has no direct I/O (O_DIRECT)"),
            e => e.into(),
        })?;
        Ok(Self { alignment: alignment(file, medium)?, file: File::from(fd) })
    }

    /// Bytes: offsets, lengths and memory that are multiples of it go without a bounce buffer.
    pub fn alignment(&self) -> u64 {
        self.alignment as u64
    }

    /// The middle of `length` bytes at `offset` that starts and ends on whole blocks: what comes before, and its length.
    pub fn split(&self, offset: u64, length: usize) -> (usize, usize) {
        let block = self.alignment as u64;
        let head = (offset.next_multiple_of(block) - offset).min(length as u64) as usize;
        let middle = (length - head) / self.alignment * self.alignment;
        (head, middle)
    }

    /// Whether `length` bytes are whole blocks.
    pub fn is_whole(&self, length: usize) -> bool {
        length.is_multiple_of(self.alignment)
    }

    /// Reads whole blocks, at most `buf.len()` bytes; 0 at the end of the file. Short reads happen.
    pub fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        if self.is_aligned(buf) {
            return self.file.read_at(buf, offset);
        }
        let mut bounce = AlignedBuffer::new(buf.len().min(BOUNCE), self.alignment);
        let n = self.file.read_at(&mut bounce, offset)?;
        buf[..n].copy_from_slice(&bounce[..n]);
        Ok(n)
    }

    /// Writes whole blocks, at most `buf.len()` bytes. Short writes happen.
    pub fn write(&self, buf: &[u8], offset: u64) -> io::Result<usize> {
        if self.is_aligned(buf) {
            return self.file.write_at(buf, offset);
        }
        let mut bounce = AlignedBuffer::new(buf.len().min(BOUNCE), self.alignment);
        let n = bounce.len();
        bounce.copy_from_slice(&buf[..n]);
        self.file.write_at(&bounce, offset)
    }

    fn is_aligned(&self, buf: &[u8]) -> bool {
        buf.as_ptr().addr().is_multiple_of(self.alignment)
    }
}

/// Never less than a page: a page that is written directly in one half and through the cache in the other could lose one.
fn alignment(file: &File, medium: Medium) -> io::Result<usize> {
    let statx = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN);
    let (offset, memory) = match &statx {
        Ok(s) if s.stx_mask & StatxFlags::DIOALIGN.bits() != 0 => (s.stx_dio_offset_align, s.stx_dio_mem_align),
        _ => (0, 0),
    };
    let sector = match medium {
        Medium::Device { sector } => sector as usize,
        Medium::File => 512,
    };
    let page = rustix::param::page_size();
    Ok(page.max(sector).max(offset as usize).max(memory as usize).next_power_of_two())
}

/// Memory that starts on a multiple of an alignment, as O_DIRECT wants it. Zeroed.
#[derive(Debug)]
pub struct AlignedBuffer {
    bytes: Vec<u8>,
    start: usize,
    length: usize,
}

impl AlignedBuffer {
    /// `length` zero bytes. `alignment` is at least 1.
    pub fn new(length: usize, alignment: usize) -> Self {
        let bytes = vec![0; length + alignment - 1];
        let address = bytes.as_ptr().addr();
        Self { start: address.next_multiple_of(alignment) - address, bytes, length }
    }
}

impl Deref for AlignedBuffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.bytes[self.start..self.start + self.length]
    }
}

impl DerefMut for AlignedBuffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.length]
    }
}
