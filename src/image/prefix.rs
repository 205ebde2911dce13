//! The first bytes of a disk, where its format could only hold a few more.

use super::{Image, Properties};
use crate::ground::range::{ByteRange, Extent};
use std::io;
use std::sync::Arc;

/// To be read; writes go through as they are.
pub struct Prefix {
    image: Arc<dyn Image>,
    length: u64,
}

impl Prefix {
    /// The first `length` bytes of `image`, which has as many.
    pub fn of(image: Arc<dyn Image>, length: u64) -> Self {
        debug_assert!(length <= image.length(), "a prefix");
        Self { image, length }
    }
}

impl Image for Prefix {
    fn length(&self) -> u64 {
        self.length
    }

    fn block_status(&self, range: ByteRange) -> io::Result<Extent> {
        self.image.block_status(range)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.image.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.image.write_at(buf, offset)
    }

    fn write_zeroes(&self, range: ByteRange) -> io::Result<()> {
        self.image.write_zeroes(range)
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
