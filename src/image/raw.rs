//! A raw image: a regular file or a block device, its bytes as they are.

use super::{Image, Properties};
use crate::error::{Error, Result, Side};
use crate::ground::range::{ByteRange, Extent};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// See the module.
#[derive(Debug)]
pub struct Raw {
    file: File,
    length: u64,
}

impl Raw {
    /// Opens `path` for reading.
    pub fn open(path: &Path, side: Side) -> Result<Self> {
        let file = OpenOptions::new().read(true).open(path).map_err(|e| Error::file(side, "open", path, e))?;
        let length = file.metadata().map_err(|e| Error::file(side, "stat", path, e))?.len();
        Ok(Self { file, length })
    }
}

impl Image for Raw {
    fn length(&self) -> u64 {
        self.length
    }

    fn block_status(&self, range: ByteRange) -> io::Result<Extent> {
        Ok(Extent::data(range))
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(buf, offset)
    }

    fn write_zeroes(&self, _range: ByteRange) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn discard(&self, _range: ByteRange) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn flush(&self) -> io::Result<()> {
        self.file.sync_all()
    }

    fn properties(&self) -> Properties {
        Properties { cluster_size: 1, alignment: 1, reads_zero: false, sequential: false }
    }

    fn file(&self) -> Option<&File> {
        Some(&self.file)
    }
}
