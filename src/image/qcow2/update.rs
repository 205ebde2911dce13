//! An existing qcow2 image, changed in place: it keeps its geometry and its backing file.
//!
//! Data goes to its place first, then the tables say so: see [`super::metadata`] for the order. A cluster that is
//! overwritten whole or in part stays where it is when it is the only one there; a compressed, zero, unallocated or
//! shared one moves to free space, and its old place is released when no table in the file refers to it any more.

use super::decompress::Scratch;
use super::header::{Compression, Header, incompatible, invalid};
use super::metadata::Metadata;
use super::reader::Qcow2;
use super::region_lock::{Mode, RegionLock};
use super::table::{COPIED, Cluster, Compressed, ZERO};
use crate::error::{Error, Result, Side};
use crate::ground::cluster::{ClusterSize, Clusters};
use crate::ground::range::{ByteRange, Extent};
use crate::image::flush_queue::FlushQueue;
use crate::image::{Image, Properties};
use std::io;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Bytes whose clusters are moved at once.
const STEP: u64 = 4 << 20;

/// See the module. Requests may have any alignment and come from several threads.
///
/// Nothing is durable before [`Image::flush`]. Killed at any moment, the image is one that `qemu-img check` finds at
/// worst leaks in. After a flush that failed, every further change and flush fails.
pub struct ExistingQcow2 {
    file: Arc<dyn Image>,
    backing: Option<Arc<dyn Image>>,
    length: u64,
    size: ClusterSize,
    compression: Compression,
    /// Version 3 has zero clusters.
    has_zero: bool,
    state: Mutex<Metadata>,
    regions: RegionLock,
    flushes: FlushQueue,
}

/// Where the bytes of a guest cluster go.
struct Destination {
    cluster: u64,
    /// Host offset.
    host: u64,
    /// What the cluster is now.
    old: Cluster,
    /// The cluster has its data there already: its entry stays.
    stays: bool,
    /// The host cluster is new, and free again if the write fails.
    is_new: bool,
}

impl ExistingQcow2 {
    /// Opens the image in `file` for reading and writing; `path` is its name in errors. `backing` is the open backing
    /// file as a whole disk, if the header names one. Reads tables, writes nothing. Blocks.
    ///
    /// Errors of [`crate::error::Kind::Target`] name the feature that cannot be written, or say what is damaged. Persistent bitmaps
    /// are no reason to refuse: their autoclear bit is cleared before the first change, which makes them invalid, as
    /// they know nothing of it.
    pub fn open(path: &Path, file: Arc<dyn Image>, backing: Option<Arc<dyn Image>>) -> Result<Self> {
        Self::load(file, backing).map_err(|e| Error::file(Side::Target, "open", path, e))
    }

    /// [`ExistingQcow2::open`] with errors that do not name the image.
    pub fn load(file: Arc<dyn Image>, backing: Option<Arc<dyn Image>>) -> io::Result<Self> {
        let header = Qcow2::header_of(&*file)?;
        refuse_unwritable(&header, backing.is_some())?;
        let state = Metadata::load(file.clone(), &header)?;
        Ok(Self {
            file,
            backing,
            length: header.size,
            size: ClusterSize::new(header.cluster_size()),
            compression: header.compression,
            has_zero: header.version >= 3,
            state: Mutex::new(state),
            regions: RegionLock::default(),
            flushes: FlushQueue::default(),
        })
    }

    fn state(&self) -> MutexGuard<'_, Metadata> {
        // Each change of the state is complete before anything that could panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The bytes of one guest cluster; the disk's last one may be short.
    fn bytes_of(&self, cluster: u64) -> ByteRange {
        self.size.bytes_of(cluster..cluster + 1, self.length)
    }

    /// Clusters that lie in `range` as a whole; the disk's last one may be short.
    fn whole_clusters(&self, range: ByteRange) -> Clusters {
        let end =
            if range.end() == self.length { self.size.count(self.length) } else { range.end() / self.size.bytes() };
        let start = range.offset.div_ceil(self.size.bytes());
        start..end.max(start)
    }

    /// `range` in pieces that do not cross a step.
    fn steps(&self, range: ByteRange) -> impl Iterator<Item = ByteRange> {
        let mut at = range.offset;
        std::iter::from_fn(move || {
            let next = ByteRange::between(at, range.end().min((at / STEP + 1) * STEP));
            at = next.end();
            (!next.is_empty()).then_some(next)
        })
    }

    /// Writes where the data is, if every cluster may stay there.
    fn write_in_place(&self, buf: &[u8], range: ByteRange) -> io::Result<bool> {
        let clusters = self.size.covering(range);
        let _region = self.regions.hold(clusters.clone(), Mode::Stay);
        let Some(runs) = self.places(clusters, range)? else { return Ok(false) };
        for (part, host) in runs {
            let start = (part.offset - range.offset) as usize;
            self.file.write_at(&buf[start..start + part.length as usize], host)?;
        }
        Ok(true)
    }

    /// Runs of `range` and the host offset of each; `None` when a cluster can't stay where it is.
    fn places(&self, clusters: Clusters, range: ByteRange) -> io::Result<Option<Vec<(ByteRange, u64)>>> {
        let mut runs: Vec<(ByteRange, u64)> = Vec::new();
        let mut state = self.state();
        state.touch()?;
        for cluster in clusters {
            let bytes = self.bytes_of(cluster);
            let part = bytes.intersect(range);
            match state.entry(cluster)?.1 {
                Cluster::Standard(host) if state.is_exclusive(host)? => {
                    let host = host + (part.offset - bytes.offset);
                    match runs.last_mut() {
                        Some((run, at)) if *at + run.length == host => run.length += part.length,
                        _ => runs.push((part, host)),
                    }
                }
                _ => return Ok(None),
            }
        }
        Ok(Some(runs))
    }

    /// Writes to new places where it must, and makes the tables say so. The caller holds the region.
    fn write_moving(&self, buf: &[u8], range: ByteRange) -> io::Result<()> {
        let destinations = self.plan(self.size.covering(range))?;
        let mut set = 0;
        let written = self.write_to(&destinations, buf, range).and_then(|()| {
            let mut state = self.state();
            for to in &destinations {
                if !to.stays {
                    state.set_entry(to.cluster, to.host | COPIED)?;
                }
                set += 1;
            }
            Ok(())
        });
        if written.is_err() {
            self.give_back(&destinations[set..]);
        }
        written
    }

    /// Space for every cluster that can't stay.
    fn plan(&self, clusters: Clusters) -> io::Result<Vec<Destination>> {
        let (mut plan, mut free) = (Vec::new(), 0..0);
        let planned = self.plan_into(&mut plan, &mut free, clusters);
        let mut state = self.state();
        for host in free.step_by(self.size.bytes() as usize) {
            state.give_back(host)?;
        }
        drop(state);
        if planned.is_err() {
            self.give_back(&plan);
        }
        planned.map(|()| plan)
    }

    /// `free` is space that was allocated and is not used yet.
    fn plan_into(&self, plan: &mut Vec<Destination>, free: &mut Range<u64>, clusters: Clusters) -> io::Result<()> {
        let mut state = self.state();
        for cluster in clusters.clone() {
            let (entry, old) = state.entry(cluster)?;
            let held = match entry.held() {
                Some(host) if state.is_exclusive(host)? => Some(host),
                _ => None,
            };
            if held.is_none() && free.is_empty() {
                let (host, count) = state.allocate(clusters.end - cluster)?;
                *free = host..host + count * self.size.bytes();
            }
            let stays = held.is_some() && matches!(old, Cluster::Standard(_));
            let host = held.unwrap_or(free.start);
            free.start += if held.is_none() { self.size.bytes() } else { 0 };
            plan.push(Destination { cluster, host, old, stays, is_new: held.is_none() });
        }
        Ok(())
    }

    /// Nothing refers to new clusters of a write that failed. What can't be given back is leaked, no worse.
    fn give_back(&self, destinations: &[Destination]) {
        let mut state = self.state();
        for to in destinations.iter().filter(|to| to.is_new) {
            let _ = state.give_back(to.host);
        }
    }

    /// The data to its places: one write for each run of whole clusters that follow each other there.
    fn write_to(&self, destinations: &[Destination], buf: &[u8], range: ByteRange) -> io::Result<()> {
        let size = self.size.bytes();
        let (mut start, mut end, mut host) = (0, 0, 0);
        for to in destinations {
            let part = self.bytes_of(to.cluster).intersect(range);
            let at = part.offset - to.cluster * size;
            let is_direct = to.stays || part.length == size;
            if !is_direct || to.host + at != host + (end - start) as u64 {
                self.write_run(&buf[start..end], host)?;
                (start, host) = (end, to.host + at);
            }
            end += part.length as usize;
            if !is_direct {
                self.write_merged(to, &buf[start..end], at as usize)?;
                start = end;
                host = to.host + size;
            }
        }
        self.write_run(&buf[start..end], host)
    }

    fn write_run(&self, bytes: &[u8], host: u64) -> io::Result<()> {
        if bytes.is_empty() { Ok(()) } else { self.file.write_at(bytes, host) }
    }

    /// A whole cluster, `bytes` at `at` of it, the rest as it was.
    fn write_merged(&self, to: &Destination, bytes: &[u8], at: usize) -> io::Result<()> {
        let mut whole = vec![0; self.size.bytes() as usize];
        let old = self.bytes_of(to.cluster).length as usize;
        if bytes.len() < old {
            self.read_cluster(to.cluster, to.old, 0, &mut whole[..old])?;
        }
        whole[at..at + bytes.len()].copy_from_slice(bytes);
        self.file.write_at(&whole, to.host)
    }

    /// Fills `buf` from byte `at` of a cluster on, which is `what`.
    fn read_cluster(&self, cluster: u64, what: Cluster, at: u64, buf: &mut [u8]) -> io::Result<()> {
        match what {
            Cluster::Standard(host) => self.read_host(host + at, buf),
            Cluster::Compressed(bytes) => self.inflate(cluster, bytes, at, buf),
            Cluster::Zero => {
                buf.fill(0);
                Ok(())
            }
            Cluster::Unallocated => self.read_backing(cluster * self.size.bytes() + at, buf),
            Cluster::Mixed(_) => unreachable!("images with subclusters are refused"),
        }
    }

    /// `range` in parts of one cluster each, or of several whose data follows each other in the file.
    fn runs(&self, clusters: Clusters, range: ByteRange) -> io::Result<Vec<(ByteRange, Cluster)>> {
        let mut runs: Vec<(ByteRange, Cluster)> = Vec::new();
        let mut state = self.state();
        for cluster in clusters {
            let (part, what) = (self.bytes_of(cluster).intersect(range), state.entry(cluster)?.1);
            match (runs.last_mut(), what) {
                (Some((run, Cluster::Standard(first))), Cluster::Standard(host))
                    if *first + (cluster - run.offset / self.size.bytes()) * self.size.bytes() == host =>
                {
                    run.length += part.length;
                }
                _ => runs.push((part, what)),
            }
        }
        Ok(runs)
    }

    /// Refcounts and data, L2 tables, the L1 table: requests go on while each goes to stable storage.
    fn flush_in_steps(&self) -> io::Result<()> {
        loop {
            let has_tables = self.state().seal()?;
            self.sync()?;
            if !has_tables {
                return Ok(());
            }
            for step in [Metadata::write_tables, Metadata::write_l1] {
                let wrote = step(&mut self.state())?;
                if wrote {
                    self.sync()?;
                }
            }
            if self.state().release_sealed()? {
                return Ok(());
            }
        }
    }

    fn sync(&self) -> io::Result<()> {
        self.file.flush().inspect_err(|_| self.state().lose())
    }

    fn status_of_unallocated(&self, range: ByteRange) -> Extent {
        match &self.backing {
            Some(backing) if range.offset < backing.length() => {
                Extent::data(range.prefix(backing.length() - range.offset))
            }
            _ => Extent::zero(range),
        }
    }

    fn read_host(&self, host: u64, buf: &mut [u8]) -> io::Result<()> {
        let (wanted, length) = (ByteRange::new(host, buf.len() as u64), self.file.length());
        if wanted.end() > length {
            return Err(damaged(format!(
                "guest data at host offset {wanted} is past the end of the file at {length:#x}"
            )));
        }
        self.file.read_at(buf, host)
    }

    fn inflate(&self, cluster: u64, bytes: Compressed, at: u64, buf: &mut [u8]) -> io::Result<()> {
        // The last sector may be cut off by the end of the file.
        let length = bytes.length.min(self.file.length().saturating_sub(bytes.offset)) as usize;
        Scratch::lend(|scratch| {
            scratch.input.resize(scratch.input.len().max(length), 0);
            self.file.read_at(&mut scratch.input[..length], bytes.offset)?;
            let mut whole = vec![0; self.size.bytes() as usize];
            scratch.inflate(self.compression, 0..length, &mut whole).map_err(|why| {
                let guest = cluster * self.size.bytes();
                damaged(format!("the compressed cluster for guest offset {guest:#x} does not inflate: {why}"))
            })?;
            buf.copy_from_slice(&whole[at as usize..at as usize + buf.len()]);
            Ok(())
        })
    }

    /// A backing file that is shorter reads as zeroes beyond its end.
    fn read_backing(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let there = self.backing.as_ref().map_or(0, |backing| backing.length().saturating_sub(offset));
        let (head, tail) = buf.split_at_mut((buf.len() as u64).min(there) as usize);
        tail.fill(0);
        match &self.backing {
            Some(backing) if !head.is_empty() => backing.read_at(head, offset),
            _ => Ok(()),
        }
    }

    /// Sets the entries of whole clusters to `descriptor`, which refers to nothing.
    fn set_entries(&self, clusters: Clusters, descriptor: u64) -> io::Result<()> {
        let mut at = clusters.start;
        while at < clusters.end {
            let (end, is_there) = self.state().table_end(at)?;
            let part = at..end.min(clusters.end);
            at = part.end;
            // Without a backing file, what is unallocated reads as zeroes as it is.
            if is_there || self.backing.is_some() && descriptor != 0 {
                let _region = self.regions.hold(part.clone(), Mode::Move);
                let mut state = self.state();
                state.touch()?;
                part.into_iter().try_for_each(|cluster| state.set_entry(cluster, descriptor))?;
            }
        }
        Ok(())
    }

    /// Zero bytes where they are not already.
    fn write_zero_bytes(&self, range: ByteRange) -> io::Result<()> {
        let mut at = range.offset;
        while at < range.end() {
            let extent = self.block_status(ByteRange::between(at, range.end()))?;
            if extent != Extent::zero(extent.range) {
                for step in self.steps(extent.range) {
                    self.write_at(&vec![0; step.length as usize], step.offset)?;
                }
            }
            at = extent.range.end();
        }
        Ok(())
    }
}

/// Names what this program does not write.
fn refuse_unwritable(header: &Header, has_backing: bool) -> io::Result<()> {
    let features = [
        (header.nb_snapshots > 0, "it has internal snapshots, which are not written"),
        (
            header.has(incompatible::DIRTY),
            "it is dirty: it was not closed properly; repair it with qemu-img check -r all",
        ),
        (header.has(incompatible::CORRUPT), "it is marked as corrupt; repair it with qemu-img check -r all"),
        (header.has(incompatible::DATA_FILE), "it has an external data file, which is not written"),
        (header.has(incompatible::EXTENDED_L2), "it has extended L2 entries (subclusters), which are not written"),
        (header.backing.is_some() && !has_backing, "it has a backing file, which is not open"),
        (header.backing.is_none() && has_backing, "it has no backing file, but one was given"),
    ];
    match features.into_iter().find(|(is_set, _)| *is_set) {
        Some((_, what)) => Err(invalid(what)),
        None => Ok(()),
    }
}

fn damaged(what: String) -> io::Error {
    invalid(format!("damaged image: {what}"))
}

impl Image for ExistingQcow2 {
    fn length(&self) -> u64 {
        self.length
    }

    fn block_status(&self, range: ByteRange) -> io::Result<Extent> {
        let clusters = self.size.covering(range);
        let mut state = self.state();
        let (table_end, is_there) = state.table_end(clusters.start)?;
        if !is_there {
            let clusters = clusters.start..table_end.min(clusters.end);
            return Ok(self.status_of_unallocated(self.size.bytes_of(clusters, self.length).intersect(range)));
        }
        let mut found: Option<Extent> = None;
        for cluster in clusters.start..table_end.min(clusters.end) {
            let part = self.bytes_of(cluster).intersect(range);
            let extent = match state.entry(cluster)?.1 {
                Cluster::Zero => Extent::zero(part),
                Cluster::Unallocated => self.status_of_unallocated(part),
                _ => Extent::data(part),
            };
            match &mut found {
                None => found = Some(extent),
                Some(first) if first.allocation == extent.allocation => first.range.length += extent.range.length,
                Some(_) => break,
            }
            if extent.range != part {
                break;
            }
        }
        found.ok_or_else(|| invalid("a status was asked for no bytes"))
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let range = ByteRange::new(offset, buf.len() as u64);
        let clusters = self.size.covering(range);
        let _region = self.regions.hold(clusters.clone(), Mode::Stay);
        let mut rest = buf;
        for (part, what) in self.runs(clusters, range)? {
            let (piece, after) = rest.split_at_mut(part.length as usize);
            rest = after;
            let cluster = part.offset / self.size.bytes();
            self.read_cluster(cluster, what, part.offset % self.size.bytes(), piece)?;
        }
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        for range in self.steps(ByteRange::new(offset, buf.len() as u64)) {
            let start = (range.offset - offset) as usize;
            let piece = &buf[start..start + range.length as usize];
            if !self.write_in_place(piece, range)? {
                let _region = self.regions.hold(self.size.covering(range), Mode::Move);
                self.write_moving(piece, range)?;
            }
        }
        Ok(())
    }

    /// Whole clusters become zero clusters and release their space; version 2 has none: there they become unallocated,
    /// or, above a backing file, are written. What is not a whole cluster is written.
    fn write_zeroes(&self, range: ByteRange) -> io::Result<()> {
        let whole = self.whole_clusters(range);
        if whole.is_empty() || !self.has_zero && self.backing.is_some() {
            return self.write_zero_bytes(range);
        }
        let inner = self.size.bytes_of(whole.clone(), self.length);
        self.write_zero_bytes(ByteRange::between(range.offset, inner.offset))?;
        self.set_entries(whole, if self.has_zero { ZERO } else { 0 })?;
        self.write_zero_bytes(ByteRange::between(inner.end(), range.end()))
    }

    /// Whole clusters release their space and read as zeroes; the rest stays as it is, and so does everything in a
    /// version 2 image above a backing file, whose old data would show.
    fn discard(&self, range: ByteRange) -> io::Result<()> {
        let descriptor = if self.backing.is_none() { 0 } else { ZERO };
        if descriptor == ZERO && !self.has_zero {
            return Ok(());
        }
        self.set_entries(self.whole_clusters(range), descriptor)
    }

    fn flush(&self) -> io::Result<()> {
        self.flushes.join(|| self.flush_in_steps())
    }

    fn properties(&self) -> Properties {
        Properties {
            cluster_size: self.size.bytes(),
            alignment: self.file.properties().alignment,
            reads_zero: false,
            sequential: false,
        }
    }
}

#[cfg(test)]
mod tests;
