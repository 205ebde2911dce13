//! A target of which only that is written which is not there already.

use super::{Image, Properties};
use crate::ground::range::{Allocation, ByteRange, Extent};
use crate::ground::zero;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};

/// Bytes that are compared at once, and the least that is written: a page of the system's cache.
const PIECE: usize = 4 << 10;
/// Bytes that are read at once.
const CHUNK: u64 = 1 << 20;

/// See the module.
pub struct Changed {
    image: Arc<dyn Image>,
    /// Bytes.
    written: AtomicU64,
}

impl Changed {
    /// Over an image that can be read.
    pub fn of(image: Arc<dyn Image>) -> Self {
        Self { image, written: AtomicU64::new(0) }
    }

    /// Bytes that were not there and had to be written so far.
    pub fn written(&self) -> u64 {
        self.written.load(Relaxed)
    }

    /// Writes those pieces of `new` that are not as `old`.
    fn write_differing(&self, old: &[u8], new: &[u8], offset: u64) -> io::Result<()> {
        // Judged by pieces of the disk, so that each is written whole.
        let head = (PIECE - offset as usize % PIECE) % PIECE;
        let mut start = 0;
        while start < new.len() {
            let end_of = |at: usize| if at < head { head } else { at + PIECE }.min(new.len());
            let differs = |at: usize| old[at..end_of(at)] != new[at..end_of(at)];
            let is_old = !differs(start);
            let mut end = end_of(start);
            while end < new.len() && differs(end) != is_old {
                end = end_of(end);
            }
            if !is_old {
                self.image.write_at(&new[start..end], offset + start as u64)?;
                self.written.fetch_add((end - start) as u64, Relaxed);
            }
            start = end;
        }
        Ok(())
    }

    fn zero_data(&self, range: ByteRange) -> io::Result<()> {
        let mut old = vec![0; range.length.min(CHUNK) as usize];
        let mut rest = range;
        while !rest.is_empty() {
            let piece = rest.prefix(CHUNK);
            let old = &mut old[..piece.length as usize];
            // What can't be read may be written, as in `write_at`.
            if !self.image.read_at(old, piece.offset).is_ok_and(|()| zero::is_zero(old)) {
                self.image.write_zeroes(piece)?;
                self.written.fetch_add(piece.length, Relaxed);
            }
            rest = ByteRange::between(piece.end(), range.end());
        }
        Ok(())
    }
}

impl Image for Changed {
    fn length(&self) -> u64 {
        self.image.length()
    }

    fn block_status(&self, range: ByteRange) -> io::Result<Extent> {
        self.image.block_status(range)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.image.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let mut old = vec![0; buf.len()];
        match self.image.read_at(&mut old, offset) {
            Ok(()) => self.write_differing(&old, buf, offset),
            // What can't be read may be written: a disk replaces a bad sector then.
            Err(_) => {
                self.written.fetch_add(buf.len() as u64, Relaxed);
                self.image.write_at(buf, offset)
            }
        }
    }

    fn write_zeroes(&self, range: ByteRange) -> io::Result<()> {
        let mut rest = range;
        while !rest.is_empty() {
            let extent = self.image.block_status(rest)?;
            if extent.allocation == Allocation::Data {
                self.zero_data(extent.range)?;
            }
            rest = ByteRange::between(extent.range.end(), range.end());
        }
        Ok(())
    }

    fn discard(&self, range: ByteRange) -> io::Result<()> {
        self.image.discard(range)
    }

    fn flush(&self) -> io::Result<()> {
        self.image.flush()
    }

    fn properties(&self) -> Properties {
        self.image.properties()
    }

    fn abandon(&self) {
        self.image.abandon();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::raw::Raw;
    use std::sync::Mutex;

    /// Remembers where it was written.
    struct Logged {
        raw: Raw,
        log: Mutex<Vec<ByteRange>>,
        /// Where a sector can't be read.
        bad: Option<u64>,
    }

    impl Image for Logged {
        fn length(&self) -> u64 {
            self.raw.length()
        }

        fn block_status(&self, range: ByteRange) -> io::Result<Extent> {
            self.raw.block_status(range)
        }

        fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
            let range = ByteRange::new(offset, buf.len() as u64);
            match self.bad.filter(|bad| range.offset <= *bad && *bad < range.end()) {
                Some(_) => Err(io::Error::from_raw_os_error(5)),
                None => self.raw.read_at(buf, offset),
            }
        }

        fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
            self.log.lock().unwrap().push(ByteRange::new(offset, buf.len() as u64));
            self.raw.write_at(buf, offset)
        }

        fn write_zeroes(&self, range: ByteRange) -> io::Result<()> {
            self.log.lock().unwrap().push(range);
            self.raw.write_zeroes(range)
        }

        fn discard(&self, range: ByteRange) -> io::Result<()> {
            self.raw.discard(range)
        }

        fn flush(&self) -> io::Result<()> {
            self.raw.flush()
        }

        fn properties(&self) -> Properties {
            self.raw.properties()
        }
    }

    fn disk_with(bad: Option<u64>) -> Arc<Logged> {
        let raw = Raw::fresh(tempfile::tempfile().unwrap(), 3 << 20).unwrap();
        raw.write_at(&[7; 1 << 20], 0).unwrap();
        Arc::new(Logged { raw, log: Mutex::default(), bad })
    }

    fn disk() -> Arc<Logged> {
        disk_with(None)
    }

    #[test]
    fn only_the_pages_that_differ_are_written() {
        let disk = disk();
        let changed = Changed::of(disk.clone());
        let mut new = vec![7; 40_000];
        changed.write_at(&new, 1000).unwrap();
        assert_eq!((disk.log.lock().unwrap().len(), changed.written()), (0, 0));
        // The first byte, two in neighbouring pages, and the last.
        for at in [0, 8192 - 1000, 12288 - 1000, 39_999] {
            new[at] = 8;
        }
        changed.write_at(&new, 1000).unwrap();
        let expected = [ByteRange::new(1000, 3096), ByteRange::new(8192, 8192), ByteRange::new(40_960, 40)];
        assert_eq!(*disk.log.lock().unwrap(), expected);
        assert_eq!(changed.written(), 3096 + 8192 + 40);
        let mut read = vec![0; 40_000];
        disk.raw.read_at(&mut read, 1000).unwrap();
        assert!(read == new);
    }

    #[test]
    fn zeroes_go_only_where_there_are_none() {
        let disk = disk();
        let changed = Changed::of(disk.clone());
        disk.raw.write_at(&vec![0; 1 << 20], 1 << 20).unwrap();
        changed.write_zeroes(ByteRange::new(512 << 10, 2 << 20)).unwrap();
        let written: u64 = disk.log.lock().unwrap().iter().map(|range| range.length).sum();
        assert_eq!((written, changed.written()), (1 << 20, 1 << 20), "the chunk with data in it, no hole, no zeroes");
        let mut read = vec![1; 2 << 20];
        disk.raw.read_at(&mut read, 512 << 10).unwrap();
        assert!(zero::is_zero(&read));
    }

    #[test]
    fn what_cannot_be_read_is_written() {
        let disk = disk_with(Some(70_000));
        let changed = Changed::of(disk.clone());
        changed.write_zeroes(ByteRange::new(65_536, 8192)).unwrap();
        changed.write_at(&[7; 4096], 69_632).unwrap();
        let expected = [ByteRange::new(65_536, 8192), ByteRange::new(69_632, 4096)];
        assert_eq!(*disk.log.lock().unwrap(), expected);
        assert_eq!(changed.written(), 8192 + 4096);
    }
}
