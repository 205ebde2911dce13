//! A qcow2 image, read-only: its active state, as one layer. Internal snapshots and bitmaps are left alone.

use super::batch::Batch;
use super::cache::Cache;
use super::decompress::Scratch;
use super::header::{Header, V3_LENGTH_WITH_COMPRESSION, incompatible};
use super::map::{Map, Mapping, Piece, Runs};
use crate::ground::range::{Allocation, ByteRange, Extent};
use crate::image::{Image, Properties};
use std::io;
use std::sync::Arc;

/// A hole in the host file that is worth to be told apart from the data around it.
const HOLE: u64 = 64 << 10;
/// Clusters that one call looks at for its extent: milliseconds, however large the disk.
const STATUS_LIMIT: usize = 1 << 18;

/// See the module. What is unallocated here reads as zeroes: it takes a [`crate::image::chain::Chain`] to look further.
pub struct Qcow2 {
    header: Header,
    map: Map,
    /// The image file: tables and compressed clusters.
    file: Arc<dyn Image>,
    /// Standard clusters: the image file, or the external data file.
    data: Arc<dyn Image>,
    /// The file with the data has holes, as a preallocated one has: worth to be asked for them.
    is_sparse: bool,
}

impl Qcow2 {
    /// Reads the header of the image in `file`.
    pub fn header_of(file: &dyn Image) -> io::Result<Header> {
        let start = first_bytes(file, V3_LENGTH_WITH_COMPRESSION as u64)?;
        Header::parse(&first_bytes(file, Header::first_cluster_size(&start)?)?)
    }

    /// Opens the image in `file`, whose header was read; `data` is its external data file, if it has one. Of `cache`
    /// it uses what is of its layer. Errors of kind `InvalidData` are about the image.
    pub fn open(file: Arc<dyn Image>, header: Header, data: Option<Arc<dyn Image>>, cache: Cache) -> io::Result<Self> {
        debug_assert_eq!(data.is_some(), header.has(incompatible::DATA_FILE), "as the header says");
        let data = data.unwrap_or_else(|| file.clone());
        let map = Map::load(file.clone(), &header, cache)?;
        let is_sparse = has_holes(&*data)?;
        Ok(Self { header, map, file, data, is_sparse })
    }

    /// As it was read.
    pub fn header(&self) -> &Header {
        &self.header
    }

    fn runs(&self, range: ByteRange, limit: usize) -> Runs<'_> {
        self.map.runs(range, self.data.length(), limit)
    }

    /// What the first bytes of `run` are, and how many of them.
    fn allocation(&self, run: &Piece) -> io::Result<(Allocation, u64)> {
        let length = run.range.length;
        match run.mapping {
            Mapping::Unallocated => Ok((Allocation::Unallocated, length)),
            Mapping::Zero => Ok((Allocation::Zero, length)),
            Mapping::Host(offset) if self.is_sparse => {
                let extent = self.data.block_status(ByteRange::new(offset, length))?;
                let is_hole = extent.allocation == Allocation::Zero
                    && (extent.range.length >= HOLE || extent.range.length == length);
                Ok((if is_hole { Allocation::Zero } else { Allocation::Data }, extent.range.length))
            }
            // Reading tells what failed, for those bytes alone.
            Mapping::Host(_) | Mapping::Compressed { .. } | Mapping::Failed(_) => Ok((Allocation::Data, length)),
        }
    }

    /// Inflates the clusters of `batch` into `buf`, whole and side by side.
    fn inflate(&self, batch: &Batch, buf: &mut [u8]) -> io::Result<()> {
        Scratch::lend(|scratch| {
            let length = (batch.end - batch.start) as usize;
            if scratch.input.len() < length {
                scratch.input.resize(length, 0);
            }
            self.file.read_at(&mut scratch.input[..length], batch.start)?;
            for (part, output) in batch.parts.iter().zip(buf.chunks_exact_mut(self.header.cluster_size() as usize)) {
                let start = (part.bytes.offset - batch.start) as usize;
                let input = start..start + part.bytes.length as usize;
                scratch.inflate(self.header.compression, input, output).map_err(|why| part.damaged(&why))?;
            }
            Ok(())
        })
    }

    /// Fills `output` with a part of the only cluster of `batch`.
    fn inflate_part(&self, batch: &Batch, output: &mut [u8]) -> io::Result<()> {
        let part = &batch.parts[0];
        let size = self.header.cluster_size() as usize;
        let cluster = self.map.cache().cluster(part.cluster, size, |cluster| self.inflate(batch, cluster))?;
        let within = (part.range.offset - part.cluster) as usize;
        output.copy_from_slice(&cluster[within..within + output.len()]);
        Ok(())
    }
}

/// The first `length` bytes, or as many as there are.
fn first_bytes(file: &dyn Image, length: u64) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; length.min(file.length()) as usize];
    file.read_at(&mut bytes, 0)?;
    Ok(bytes)
}

/// A file with a hole anywhere.
fn has_holes(file: &dyn Image) -> io::Result<bool> {
    let whole = ByteRange::new(0, file.length());
    Ok(!whole.is_empty() && file.block_status(whole)? != Extent::data(whole))
}

/// Splits the first `length` bytes off `rest`.
fn take<'a>(rest: &mut &'a mut [u8], length: u64) -> &'a mut [u8] {
    rest.split_off_mut(..length as usize).expect("runs are within the request")
}

fn read_only() -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, "this qcow2 image was opened for reading")
}

impl Image for Qcow2 {
    fn length(&self) -> u64 {
        self.header.size
    }

    /// Never fails because of damaged tables: what they describe is data, and reading it says what is wrong with it.
    fn block_status(&self, range: ByteRange) -> io::Result<Extent> {
        debug_assert!(!range.is_empty() && range.end() <= self.length());
        let mut found = None;
        let mut end = range.offset;
        'runs: for mut run in self.runs(range, STATUS_LIMIT) {
            while !run.range.is_empty() {
                let (allocation, length) = self.allocation(&run)?;
                if *found.get_or_insert(allocation) != allocation {
                    break 'runs;
                }
                end += length;
                run = run.skip(length);
            }
        }
        let allocation = found.unwrap_or(Allocation::Zero);
        Ok(Extent { range: ByteRange::between(range.offset, end), allocation })
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let range = ByteRange::new(offset, buf.len() as u64);
        debug_assert!(range.end() <= self.length());
        let cluster_size = self.header.cluster_size();
        let mut runs = self.runs(range, usize::MAX).peekable();
        let mut rest = buf;
        while let Some(run) = runs.next() {
            if let Some(mut batch) = Batch::of(&run) {
                if run.range.length < cluster_size {
                    self.inflate_part(&batch, take(&mut rest, run.range.length))?;
                    continue;
                }
                while runs.next_if(|next| next.range.length == cluster_size && batch.join(next)).is_some() {}
                self.inflate(&batch, take(&mut rest, batch.guest_length()))?;
                continue;
            }
            let output = take(&mut rest, run.range.length);
            match run.mapping {
                Mapping::Host(offset) => self.data.read_at(output, offset)?,
                Mapping::Failed(e) => return Err(e),
                Mapping::Unallocated | Mapping::Zero | Mapping::Compressed { .. } => output.fill(0),
            }
        }
        Ok(())
    }

    fn write_at(&self, _buf: &[u8], _offset: u64) -> io::Result<()> {
        Err(read_only())
    }

    fn write_zeroes(&self, _range: ByteRange) -> io::Result<()> {
        Err(read_only())
    }

    fn discard(&self, _range: ByteRange) -> io::Result<()> {
        Err(read_only())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn properties(&self) -> Properties {
        Properties {
            cluster_size: self.header.cluster_size(),
            alignment: self.data.properties().alignment,
            reads_zero: false,
            sequential: false,
        }
    }
}

#[cfg(test)]
mod tests;
