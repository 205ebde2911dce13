//! A disk of which only that is to be copied which its top layer holds. The rest is unallocated, and can be read all the same.

use super::{Image, Properties};
use crate::ground::range::{ByteRange, Extent};
use std::io;
use std::sync::Arc;

/// Read-only. See the module.
pub struct Top {
    layer: Arc<dyn Image>,
    disk: Arc<dyn Image>,
}

impl Top {
    /// `disk` is `layer` over its backing files.
    pub fn of(layer: Arc<dyn Image>, disk: Arc<dyn Image>) -> Self {
        debug_assert_eq!(layer.length(), disk.length(), "the top layer's length is the disk's");
        Self { layer, disk }
    }
}

impl Image for Top {
    fn length(&self) -> u64 {
        self.disk.length()
    }

    fn block_status(&self, range: ByteRange) -> io::Result<Extent> {
        self.layer.block_status(range)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.disk.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.disk.write_at(buf, offset)
    }

    fn write_zeroes(&self, range: ByteRange) -> io::Result<()> {
        self.disk.write_zeroes(range)
    }

    fn discard(&self, range: ByteRange) -> io::Result<()> {
        self.disk.discard(range)
    }

    fn flush(&self) -> io::Result<()> {
        self.disk.flush()
    }

    fn abandon(&self) {
        self.layer.abandon();
        self.disk.abandon();
    }

    fn properties(&self) -> Properties {
        self.disk.properties()
    }
}
