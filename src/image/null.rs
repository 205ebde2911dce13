//! A target that swallows everything: it makes the engine alone measurable.

use super::{Image, Properties};
use crate::ground::range::{ByteRange, Extent};
use std::io;

/// `length` bytes that read as zeroes, whatever was written.
#[derive(Clone, Copy, Debug)]
pub struct Null {
    length: u64,
}

impl Null {
    /// A disk of `length` bytes.
    pub const fn new(length: u64) -> Self {
        Self { length }
    }
}

impl Image for Null {
    fn length(&self) -> u64 {
        self.length
    }

    fn block_status(&self, range: ByteRange) -> io::Result<Extent> {
        Ok(Extent::zero(range))
    }

    fn read_at(&self, buf: &mut [u8], _offset: u64) -> io::Result<()> {
        buf.fill(0);
        Ok(())
    }

    fn write_at(&self, _buf: &[u8], _offset: u64) -> io::Result<()> {
        Ok(())
    }

    fn write_zeroes(&self, _range: ByteRange) -> io::Result<()> {
        Ok(())
    }

    fn discard(&self, _range: ByteRange) -> io::Result<()> {
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn properties(&self) -> Properties {
        Properties { cluster_size: 1, alignment: 1, reads_zero: true, sequential: false }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_is_written_reads_as_zeroes() {
        let null = Null::new(4096);
        null.write_at(&[1; 512], 0).unwrap();
        let mut read = [1; 512];
        null.read_at(&mut read, 0).unwrap();
        assert_eq!(read, [0; 512]);
        assert_eq!(null.block_status(ByteRange::new(0, 4096)).unwrap(), Extent::zero(ByteRange::new(0, 4096)));
    }
}
