//! A new qcow2 image, written once: data in the order in which it comes, all metadata at the end, the header last.
//!
//! An interrupted file has no header and is never taken for an image. Refcounts are computed from what is referenced, so
//! that space which a failed write had reserved is neither used nor leaked.

use super::bump::Bump;
use super::compress::{self, CompressOptions};
use super::finish::{self, About, Geometry};
use super::header::{BACKING_NAME_LIMIT, Backing, Compression};
use super::run_map::{Place, Run, RunMap};
use crate::error::{Error, Kind, Result};
use crate::ground::range::{ByteRange, Extent};
use crate::image::{Image, Properties};
use std::io;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What the owner of a new image chooses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CreateOptions {
    /// Bytes: a power of two from 512 to 2 MiB.
    pub cluster_size: u64,
    /// `None` stores clusters as they are.
    pub compression: Option<CompressOptions>,
}

impl CreateOptions {
    /// Bytes, as in `qemu-img create`.
    pub const DEFAULT_CLUSTER_SIZE: u64 = 64 << 10;
}

/// See the module.
///
/// Writes take whole clusters: they start on a cluster and end on one, or at the end of the disk; anything else is an
/// error of kind `InvalidInput`. A cluster may be written again, the last write holds. Writes may come from several
/// threads; those that overlap must not run at once.
///
/// [`Image::flush`] is called once, after the last write: it makes the file an image. A second flush does nothing; a
/// write after the first is an error. After a flush that failed, the image is lost and each call fails.
pub struct NewQcow2 {
    file: Arc<dyn Image>,
    length: u64,
    geometry: Geometry,
    compression: Option<CompressOptions>,
    backing: Option<Backing>,
    state: Mutex<State>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Writing,
    Finished,
    Lost,
}

struct State {
    stage: Stage,
    /// The file has no old header any more.
    wiped: bool,
    bump: Bump,
    runs: RunMap,
}

impl NewQcow2 {
    /// A version 3 image for a disk of `length` bytes in `file`, which should be new and empty; an image header that it
    /// holds is wiped by the first write or flush, and nothing is touched before. The virtual size is `length` rounded up
    /// to 512 bytes, as by qemu-img; what is beyond `length` reads as zeroes.
    pub fn create(file: Arc<dyn Image>, length: u64, options: CreateOptions) -> Result<Self> {
        let geometry = Geometry::new(length, options.cluster_size)?;
        if let Some(compression) = options.compression {
            compression.check().map_err(|reason| Error::new(Kind::Usage, reason))?;
        }
        let state = State {
            stage: Stage::Writing,
            wiped: false,
            bump: Bump::new(options.cluster_size, geometry.host_limit(options.compression.is_some())),
            runs: RunMap::new(options.cluster_size),
        };
        Ok(Self { file, length, geometry, compression: options.compression, backing: None, state: Mutex::new(state) })
    }

    /// The same over a backing file, which answers for what is never written; zeroes are then recorded as such. Only its
    /// name is needed here. Refuses one that no header holds.
    pub fn over(self, backing: Backing) -> Result<Self> {
        let length = backing.name.len() as u64;
        // The header, its extensions and the name are within the first cluster.
        if length > u64::from(BACKING_NAME_LIMIT).min(self.geometry.cluster_size / 2) {
            let what = format!("'{}' is too long for the name of a backing file", backing.name.display());
            return Err(Error::new(Kind::Usage, what));
        }
        Ok(Self { backing: Some(backing), ..self })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Each change of the state is complete before anything that could panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn writing(&self) -> io::Result<MutexGuard<'_, State>> {
        let state = self.state();
        match state.stage {
            Stage::Writing => Ok(state),
            Stage::Finished => Err(invalid("the new qcow2 image is finished")),
            Stage::Lost => Err(lost()),
        }
    }

    /// Before a byte is written: an old image that this file held must not come back to life with new data under it.
    fn begun(&self) -> io::Result<MutexGuard<'_, State>> {
        let mut state = self.writing()?;
        // With the lock: nobody may write until that is on stable storage.
        self.wipe_header(&mut state)?;
        Ok(state)
    }

    fn wipe_header(&self, state: &mut State) -> io::Result<()> {
        let length = self.file.length().min(self.geometry.cluster_size);
        if !state.wiped && length > 0 {
            self.file.write_at(&vec![0; length as usize], 0)?;
            self.file.flush()?;
        }
        state.wiped = true;
        Ok(())
    }

    /// First cluster and number of clusters of a write.
    fn whole_clusters(&self, range: ByteRange) -> io::Result<(u64, u64)> {
        let size = self.geometry.cluster_size;
        let ends_well = range.end().is_multiple_of(size) || range.end() == self.length;
        if !range.offset.is_multiple_of(size) || !ends_well || range.end() > self.length {
            return Err(invalid("a write to a new qcow2 image is whole clusters"));
        }
        Ok((range.offset / size, range.length.div_ceil(size)))
    }

    fn write_plain(&self, buf: &[u8], first: u64, count: u64) -> io::Result<()> {
        let host = self.begun()?.bump.clusters(count)?;
        self.write_clusters(buf, host)?;
        self.writing()?.runs.insert(first, Run::plain(host, count));
        Ok(())
    }

    /// One write; the last cluster of the disk is padded with zeroes.
    fn write_clusters(&self, buf: &[u8], host: u64) -> io::Result<()> {
        self.file.write_at(buf, host)?;
        let padding = buf.len().next_multiple_of(self.geometry.cluster_size as usize) - buf.len();
        if padding > 0 {
            self.file.write_at(&vec![0; padding], host + buf.len() as u64)?;
        }
        Ok(())
    }

    fn write_compressed(&self, buf: &[u8], first: u64, compression: CompressOptions) -> io::Result<()> {
        let size = self.geometry.cluster_size as usize;
        compress::with_chunk(compression, buf, size, |chunk| {
            let lengths: Vec<u32> = chunk.clusters.iter().copied().flatten().collect();
            let plain_count = (chunk.clusters.len() - lengths.len()) as u64;
            let (plain_host, packed_hosts) = {
                let bump = &mut self.begun()?.bump;
                (bump.clusters(plain_count)?, bump.packed(&lengths)?)
            };
            self.write_packed(chunk.bytes, &lengths, &packed_hosts)?;
            let runs = runs_of(chunk.clusters, plain_host, &packed_hosts, size as u64);
            for (at, run) in &runs {
                if let Place::Plain { host } = run.place {
                    let start = *at as usize * size;
                    let end = (start + run.count as usize * size).min(buf.len());
                    self.write_clusters(&buf[start..end], host)?;
                }
            }
            let mut state = self.writing()?;
            runs.into_iter().for_each(|(at, run)| state.runs.insert(first + at, run));
            Ok(())
        })
    }

    /// One write for all that follows without a gap.
    fn write_packed(&self, bytes: &[u8], lengths: &[u32], hosts: &[u64]) -> io::Result<()> {
        let Some(&first) = hosts.first() else { return Ok(()) };
        let (mut start, mut end, mut host) = (0, 0, first);
        for (&length, &at) in lengths.iter().zip(hosts) {
            if at != host + (end - start) as u64 {
                self.file.write_at(&bytes[start..end], host)?;
                (start, host) = (end, at);
            }
            end += length as usize;
        }
        self.file.write_at(&bytes[start..end], host)
    }

    /// Whole clusters of `range`, without those that it only touches.
    fn inner_clusters(&self, range: ByteRange) -> Range<u64> {
        let size = self.geometry.cluster_size;
        let end = if range.end() == self.length { range.end().div_ceil(size) } else { range.end() / size };
        range.offset.div_ceil(size)..end
    }
}

/// Runs of a chunk, by the number of their first cluster in it: `clusters` says how long each compressed one is.
fn runs_of(clusters: &[Option<u32>], mut plain_host: u64, packed: &[u64], size: u64) -> Vec<(u64, Run)> {
    let mut runs = Vec::new();
    let mut hosts = packed;
    let mut at = 0;
    while at < clusters.len() {
        let rest = &clusters[at..];
        let run = if rest[0].is_none() {
            let count = rest.iter().take_while(|length| length.is_none()).count() as u64;
            plain_host += count * size;
            Run::plain(plain_host - count * size, count)
        } else {
            let lengths: Vec<u32> = rest.iter().map_while(|&length| length).collect();
            let host = hosts[0];
            let mut next = host;
            let together = lengths.iter().zip(hosts).take_while(|&(&length, &at)| {
                let follows = at == next;
                next = at + u64::from(length);
                follows
            });
            let count = together.count();
            hosts = &hosts[count..];
            Run::packed(host, &lengths[..count])
        };
        let first = at as u64;
        at += run.count as usize;
        runs.push((first, run));
    }
    runs
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, what)
}

fn lost() -> io::Error {
    io::Error::other("an earlier flush of the new qcow2 image failed")
}

impl Image for NewQcow2 {
    fn length(&self) -> u64 {
        self.length
    }

    fn block_status(&self, range: ByteRange) -> io::Result<Extent> {
        let size = self.geometry.cluster_size;
        let cluster = range.offset / size;
        let state = self.state();
        let to = |end: u64| ByteRange::between(range.offset, range.end().min(end.saturating_mul(size)));
        Ok(match state.runs.find(cluster) {
            Some((first, Run { count, place: Place::Zero })) => Extent::zero(to(first + count)),
            Some((first, run)) => Extent::data(to(first + run.count)),
            None => {
                let range = to(state.runs.next_from(cluster).unwrap_or(u64::MAX));
                if self.backing.is_some() { Extent::unallocated(range) } else { Extent::zero(range) }
            }
        })
    }

    fn read_at(&self, _buf: &mut [u8], _offset: u64) -> io::Result<()> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "a qcow2 image is read back once it is finished and opened"))
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let (first, count) = self.whole_clusters(ByteRange::new(offset, buf.len() as u64))?;
        match self.compression {
            _ if count == 0 => Ok(()),
            None => self.write_plain(buf, first, count),
            Some(compression) => self.write_compressed(buf, first, compression),
        }
    }

    /// Without a backing file what nothing holds reads as zeroes.
    fn write_zeroes(&self, range: ByteRange) -> io::Result<()> {
        let mut state = self.writing()?;
        let inner = self.inner_clusters(range);
        let outer = range.offset / self.geometry.cluster_size..range.end().div_ceil(self.geometry.cluster_size);
        let written = |cluster| !inner.contains(&cluster) && state.runs.find(cluster).is_some();
        if !range.is_empty() && (written(outer.start) || written(outer.end - 1)) {
            return Err(invalid("zeroes over part of a cluster that was written"));
        }
        match &self.backing {
            _ if range.is_empty() => {}
            Some(_) if inner != outer => return Err(invalid("zeroes over part of a cluster of the backing file")),
            Some(_) => state.runs.insert(inner.start, Run::zero(inner.end - inner.start)),
            _ => state.runs.remove(inner),
        }
        Ok(())
    }

    fn discard(&self, range: ByteRange) -> io::Result<()> {
        let inner = self.inner_clusters(range);
        self.writing()?.runs.remove(inner);
        Ok(())
    }

    /// Writes all metadata, flushes, writes the header, flushes. See [`NewQcow2`].
    fn flush(&self) -> io::Result<()> {
        let mut state = self.state();
        match state.stage {
            Stage::Finished => return Ok(()),
            Stage::Lost => return Err(lost()),
            Stage::Writing => {}
        }
        state.stage = Stage::Lost;
        self.wipe_header(&mut state)?;
        let kind = self.compression.map_or(Compression::Zlib, |compression| compression.kind);
        let about = About { compression: kind, backing: self.backing.as_ref() };
        finish::finish(self.file.as_ref(), &self.geometry, about, &state.runs, state.bump.end())?;
        state.stage = Stage::Finished;
        Ok(())
    }

    fn properties(&self) -> Properties {
        Properties {
            cluster_size: self.geometry.cluster_size,
            alignment: self.file.properties().alignment,
            reads_zero: self.backing.is_none(),
            sequential: false,
        }
    }
}

#[cfg(test)]
mod tests;
