//! The path of a trapped write and of a copied byte with real threads, on a disk in memory.

use super::*;
use crate::copier::{Copier, Ends, Rules};
use crate::error::Kind;
use crate::ground::cluster::{ClusterSize, Clusters};
use crate::ground::policy::OnError;
use crate::ground::range::{Allocation, Extent};
use crate::image::Properties;
use crate::job::Job;
use crate::monitor::{Event, Monitor};
use crate::snapshot::copy_state::{CopyState, Holder, Plan};
use crate::snapshot::tracker::FreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

const SECTOR: usize = 64;
const CLUSTER: u64 = 512;

/// splitmix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    /// Anything that a writer may touch: single bytes, the last byte, a few clusters, all.
    fn range(&mut self, length: u64) -> ByteRange {
        let offset = match self.below(8) {
            0 => 0,
            1 => length - 1,
            2 => self.below(length) / CLUSTER * CLUSTER,
            _ => self.below(length),
        };
        let most = match self.below(8) {
            0 => 1,
            1 => CLUSTER,
            2 => length,
            _ => 3 * CLUSTER,
        };
        ByteRange::new(offset, (1 + self.below(most)).min(length - offset))
    }
}

/// A disk whose reads and writes other threads can get between, sector by sector.
struct Disk {
    sectors: Vec<Mutex<[u8; SECTOR]>>,
    length: u64,
    bad: Option<u64>,
    /// All zeroes at the first look at it, all data from the second on: looks so far.
    filling: Option<AtomicU64>,
}

impl Disk {
    /// Every sector says what it is: who wrote it (nobody: 0), where it belongs, and a checksum of both.
    fn new(length: u64) -> Self {
        let sectors = (0..length.div_ceil(SECTOR as u64)).map(|n| Mutex::new(sector(n))).collect();
        Self { sectors, length, bad: None, filling: None }
    }

    fn each(&self, range: ByteRange, mut access: impl FnMut(&mut [u8], std::ops::Range<usize>)) {
        let (mut offset, mut done) = (range.offset as usize, 0);
        while done < range.length as usize {
            let (sector, at) = (offset / SECTOR, offset % SECTOR);
            let count = (SECTOR - at).min(range.length as usize - done);
            access(&mut self.sectors[sector].lock().unwrap()[at..at + count], done..done + count);
            offset += count;
            done += count;
            if sector.is_multiple_of(5) {
                thread::yield_now();
            }
        }
    }

    fn fill(&self, range: ByteRange, byte: u8) {
        self.each(range, |bytes, _| bytes.fill(byte));
    }
}

fn sector(n: u64) -> [u8; SECTOR] {
    let mut bytes = [0; SECTOR];
    // Some clusters are zero, and on a large disk long runs of them.
    if n * SECTOR as u64 / CLUSTER % 7 != 3 && n / 20480 % 2 != 1 {
        for (word, value) in bytes.chunks_mut(8).zip([0, n, n.wrapping_mul(0x9e37_79b9_7f4a_7c15), !n].iter().cycle()) {
            word.copy_from_slice(&u64::to_le_bytes(*value));
        }
    }
    bytes
}

impl Image for Disk {
    fn length(&self) -> u64 {
        self.length
    }

    /// As of a sparse file: what is zero now may be written a moment later.
    fn block_status(&self, range: ByteRange) -> io::Result<Extent> {
        if let Some(looks) = &self.filling {
            let is_first = looks.fetch_add(1, Ordering::Relaxed) == 0;
            return Ok(if is_first { Extent::zero(range) } else { Extent::data(range) });
        }
        let first = range.offset as usize / SECTOR;
        let sectors = self.sectors[first..(range.end() as usize).div_ceil(SECTOR)].iter();
        let mut zero = sectors.map(|sector| is_zero(&sector.lock().unwrap()[..]));
        let is_zero = zero.next().unwrap();
        let count = 1 + zero.take_while(|&other| other == is_zero).count();
        let end = range.end().min(((first + count) * SECTOR) as u64);
        let allocation = if is_zero { Allocation::Zero } else { Allocation::Data };
        Ok(Extent { range: ByteRange::between(range.offset, end), allocation })
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let range = ByteRange::new(offset, buf.len() as u64);
        if self.bad.is_some_and(|bad| (range.offset..range.end()).contains(&bad)) {
            return Err(io::Error::from_raw_os_error(nix::libc::EIO));
        }
        self.each(range, |bytes, at| buf[at].copy_from_slice(bytes));
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.each(ByteRange::new(offset, buf.len() as u64), |bytes, at| bytes.copy_from_slice(&buf[at]));
        Ok(())
    }

    fn write_zeroes(&self, range: ByteRange) -> io::Result<()> {
        self.fill(range, 0);
        Ok(())
    }

    fn discard(&self, _: ByteRange) -> io::Result<()> {
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn properties(&self) -> Properties {
        Properties { cluster_size: 1, alignment: 1, reads_zero: false, sequential: false }
    }
}

/// The bitmap that a writer looks at first, as it will be in shared memory.
struct Bits(Vec<AtomicBool>);

impl FreeMap for Bits {
    fn free(&self, clusters: Clusters) {
        for bit in &self.0[clusters.start as usize..clusters.end as usize] {
            bit.store(true, Ordering::Release);
        }
    }
}

impl Bits {
    fn all_free(&self, clusters: Clusters) -> bool {
        self.0[clusters.start as usize..clusters.end as usize].iter().all(|bit| bit.load(Ordering::Acquire))
    }
}

struct Bench {
    disk: Arc<Disk>,
    overlay: Arc<Overlay>,
    tracker: Arc<Tracker>,
    preserver: Preserver,
    bits: Arc<Bits>,
    target: Disk,
    granule: u64,
}

impl Bench {
    fn new(disk: Disk, limit: Option<u64>, plan: Plan) -> Self {
        let (length, size) = (disk.length, ClusterSize::new(CLUSTER));
        let overlay = Arc::new(Overlay::in_memory(length, limit).unwrap());
        let tracker = Arc::new(Tracker::new(CopyState::new(length, size, plan)));
        let bits = Arc::new(Bits((0..size.count(length)).map(|_| AtomicBool::new(false)).collect()));
        tracker.attach_free_map(bits.clone());
        let disk = Arc::new(disk);
        let preserver = Preserver::new(tracker.clone(), disk.clone(), overlay.clone());
        let target = Disk::new(length);
        target.fill(ByteRange::new(0, length), 0xee);
        Self { disk, overlay, tracker, preserver, bits, target, granule: plan.granule }
    }

    fn write(&self, random: &mut Random) {
        let range = random.range(self.disk.length);
        if !self.bits.all_free(self.tracker.cluster_size().covering(range))
            && let Err(error) = self.preserver.before_write(range)
        {
            assert_eq!(error.kind(), Kind::InstantLost);
            self.tracker.stop();
        }
        self.disk.fill(range, random.next() as u8 | 1);
    }

    /// A copier that gives back, fails and forgets at random, but never after the source was released.
    fn copy(&self, random: &mut Random) {
        let limit = CLUSTER * (1 + random.below(8));
        while let Some(mut claim) = self.tracker.claim_next(limit) {
            match random.below(12) {
                0 => claim.shrink(self.granule.min(claim.range().length)),
                1 => {
                    claim.finish(false);
                    continue;
                }
                2 => continue,
                _ => {}
            }
            let range = claim.range();
            let mut bytes = vec![0; range.length as usize];
            for (piece, holder) in claim.pieces() {
                let at = (piece.offset - range.offset) as usize;
                let bytes = &mut bytes[at..at + piece.length as usize];
                match holder {
                    Holder::Source => self.disk.read_at(bytes, piece.offset).unwrap(),
                    Holder::Overlay => self.overlay.read_at(bytes, piece.offset).unwrap(),
                }
            }
            if !random.one_in(4) {
                claim.source_read();
            }
            self.target.write_at(&bytes, range.offset).unwrap();
            for run in claim.finish(true) {
                self.overlay.drop_range(run);
            }
        }
    }

    /// The real one; `copy` stands for copiers that give back and forget.
    fn copier<'a>(&'a self, job: &'a Job, granule: u64, hole: Option<u64>) -> Copier<'a> {
        let (source, overlay) = (&*self.disk, Some(&*self.overlay));
        let ends = Ends { source, overlay, target: &self.target, unallocated: None };
        let (on_source_error, on_target_error) = (OnError::Report, OnError::Report);
        let rules = Rules { granule, hole, on_source_error, on_target_error, capture: Duration::ZERO };
        Copier::new(job, &Silent, &self.tracker, ends, rules)
    }

    /// What the target has where it is not the instant.
    fn first_difference(&self) -> Option<String> {
        for (n, now) in self.target.sectors.iter().enumerate() {
            let (now, then) = (now.lock().unwrap(), sector(n as u64));
            let count = SECTOR.min(self.disk.length as usize - n * SECTOR);
            if now[..count] != then[..count] {
                return Some(format!("sector {n} is {:x?}, was {:x?}", &now[..count], &then[..count]));
            }
        }
        None
    }
}

fn seeds() -> u64 {
    std::env::var("DRIVE_BACKUP_SEEDS").ok().and_then(|n| n.parse().ok()).unwrap_or(2000)
}

/// One disk, one to three writers, one to three copiers. True when the copy was finished.
fn run(seed: u64, limited: bool) -> bool {
    let mut random = Random(seed);
    let clusters = 1 + random.below(40);
    let length = clusters * CLUSTER - random.below(CLUSTER);
    let limit = limited.then(|| random.below(clusters + 1) * CLUSTER);
    let plan = Plan { granule: CLUSTER << random.below(3), ascending: random.one_in(4) };
    let bench = Bench::new(Disk::new(length), limit, plan);
    let (writers, copiers) = (1 + random.below(3), 1 + random.below(3));
    let copied = AtomicU64::new(0);
    thread::scope(|scope| {
        for _ in 0..writers {
            let mut random = Random(random.next());
            let (bench, copied) = (&bench, &copied);
            scope.spawn(move || {
                let writes = random.below(40);
                for write in 0.. {
                    bench.write(&mut random);
                    if write >= writes && (copied.load(Ordering::Relaxed) == copiers || write > 400) {
                        break;
                    }
                }
            });
        }
        for _ in 0..copiers {
            let mut random = Random(random.next());
            let (bench, copied) = (&bench, &copied);
            scope.spawn(move || {
                bench.copy(&mut random);
                copied.fetch_add(1, Ordering::Relaxed);
            });
        }
    });
    let done = bench.tracker.is_done();
    assert!(done || limited, "seed {seed}: the copy did not end");
    if done {
        assert_eq!(bench.first_difference(), None, "seed {seed}");
        assert_eq!(bench.overlay.usage().used, 0, "seed {seed}: overlay is empty in the end");
        assert!(bench.bits.all_free(0..clusters), "seed {seed}: all is free in the end");
    }
    let usage = bench.overlay.usage();
    assert!(usage.limit.is_none_or(|limit| usage.peak <= limit), "seed {seed}: {usage:?}");
    done
}

#[test]
fn copy_of_a_disk_that_is_written_is_the_instant() {
    for seed in 0..seeds() {
        assert!(run(seed, false));
    }
}

#[test]
fn overlay_too_small_ends_the_copy_and_no_write() {
    let done = (0..seeds() / 4).filter(|&seed| run(seed, true)).count() as u64;
    assert!(done > 0 && done < seeds() / 4, "{done} of {} copies ended well", seeds() / 4);
}

struct Silent;

impl Monitor for Silent {
    fn event(&self, _: Event<'_>) {}
}

#[test]
fn copier_takes_the_instant_of_a_sparse_disk_that_is_written() {
    for seed in 0..seeds() / 100 {
        let mut random = Random(seed);
        let length = (3 << 20) - random.below(1 << 20);
        let plan = Plan { granule: CLUSTER << random.below(3), ascending: random.one_in(8) };
        let bench = Bench::new(Disk::new(length), None, plan);
        let job = Job::new(None);
        let copier = bench.copier(&job, plan.granule, random.one_in(2).then_some(CLUSTER));
        let copied = AtomicBool::new(false);
        thread::scope(|scope| {
            for _ in 0..2 {
                let mut random = Random(random.next());
                let (bench, copied) = (&bench, &copied);
                let most = [0, 3, u64::MAX][seed as usize % 3];
                scope.spawn(move || {
                    for _ in (0..most).take_while(|_| !copied.load(Ordering::Relaxed)) {
                        bench.write(&mut random);
                    }
                });
            }
            copier.run(2).unwrap();
            copied.store(true, Ordering::Relaxed);
        });
        assert!(bench.tracker.is_done());
        assert_eq!(bench.first_difference(), None, "seed {seed}");
        assert_eq!(bench.overlay.usage().used, 0, "seed {seed}");
    }
}

#[test]
fn an_instant_that_was_given_up_ends_the_copy_however_long_its_writers_go_on() {
    let bench = Bench::new(Disk::new(4 << 20), None, SMALL);
    let job = Job::new(None);
    job.pause();
    let copier = bench.copier(&job, CLUSTER, None);
    let copied = AtomicBool::new(false);
    thread::scope(|scope| {
        let writer = scope.spawn(|| {
            bench.preserver.before_write(one_cluster(0)).unwrap();
            bench.tracker.stop();
            job.resume();
            let patience = Instant::now();
            while !copied.load(Ordering::Relaxed) && patience.elapsed() < Duration::from_secs(20) {
                bench.preserver.before_write(one_cluster(0)).unwrap();
            }
            copied.load(Ordering::Relaxed)
        });
        let error = copier.run(8).unwrap_err();
        copied.store(true, Ordering::Relaxed);
        assert_eq!(error.kind(), Kind::InstantLost);
        assert!(writer.join().unwrap(), "the copy waited for the writer's last write");
    });
}

/// Tells of faults.
struct Faults(mpsc::Sender<()>);

impl Monitor for Faults {
    fn event(&self, event: Event<'_>) {
        if matches!(event, Event::Fault { .. }) {
            self.0.send(()).unwrap();
        }
    }
}

#[test]
fn nobodys_write_waits_for_a_job_that_stopped_for_its_source() {
    let bench = Bench::new(Disk { bad: Some(CLUSTER + 3), ..Disk::new(3 * CLUSTER) }, None, SMALL);
    let (job, (tell, told)) = (Job::new(None), mpsc::channel());
    let monitor = Faults(tell);
    let ends = Ends { source: &*bench.disk, overlay: Some(&*bench.overlay), target: &bench.target, unallocated: None };
    let (granule, hole) = (CLUSTER, None);
    let (on_source_error, on_target_error) = (OnError::Stop, OnError::Report);
    let rules = Rules { granule, hole, on_source_error, on_target_error, capture: Duration::ZERO };
    let copier = Copier::new(&job, &monitor, &bench.tracker, ends, rules);
    thread::scope(|scope| {
        let (done, granted) = mpsc::channel();
        let (bench, job) = (&bench, &job);
        scope.spawn(move || {
            told.recv().unwrap();
            done.send(bench.preserver.before_write(one_cluster(2))).unwrap();
        });
        let end = scope.spawn(move || {
            let granted = granted.recv_timeout(Duration::from_secs(20));
            job.cancel();
            granted
        });
        assert_eq!(copier.run(1).unwrap_err().kind(), Kind::Cancelled);
        assert_eq!(end.join().unwrap().expect("it waited for whoever resumes the job").unwrap(), Granted::Write);
    });
}

#[test]
fn a_run_of_zeroes_that_is_data_at_the_second_look_is_no_longer_than_a_chunk() {
    let bench = Bench::new(Disk { filling: Some(AtomicU64::new(0)), ..Disk::new(4 << 20) }, None, SMALL);
    bench.copier(&Job::new(None), CLUSTER, None).run(1).unwrap();
    assert!(bench.tracker.is_done());
}

fn one_cluster(n: u64) -> ByteRange {
    ByteRange::new(n * CLUSTER, CLUSTER)
}

const SMALL: Plan = Plan { granule: CLUSTER, ascending: false };

#[test]
fn a_cluster_is_captured_once() {
    let bench = Bench::new(Disk::new(4 * CLUSTER), None, SMALL);
    let wide = ByteRange::new(CLUSTER / 2, CLUSTER);
    for _ in 0..2 {
        assert_eq!(bench.preserver.before_write(wide).unwrap(), Granted::Write);
        assert_eq!(bench.overlay.usage().used, 2 * CLUSTER);
        bench.disk.fill(wide, 9);
    }
    let mut saved = vec![0; 2 * CLUSTER as usize];
    bench.overlay.read_at(&mut saved, 0).unwrap();
    let before: Vec<u8> = (0..2 * CLUSTER / SECTOR as u64).flat_map(sector).collect();
    assert_eq!(saved, before);
}

#[test]
fn unreadable_source_fails_the_capture_with_its_errno_and_range() {
    let bench = Bench::new(Disk { bad: Some(CLUSTER + 3), ..Disk::new(4 * CLUSTER) }, None, SMALL);
    let error = bench.preserver.before_write(ByteRange::new(0, 3 * CLUSTER)).unwrap_err();
    assert_eq!(error.to_string(), "read source at 0x0+1536: Input/output error");
    assert_eq!((error.kind(), error.errno()), (Kind::InstantLost, Some(nix::libc::EIO)));
    assert_eq!((bench.tracker.saved_clusters(), bench.overlay.usage().used), (0, 0));
    assert!(!bench.tracker.is_stopped(), "that is for the caller to decide");
    bench.preserver.before_write(one_cluster(0)).unwrap();
}

#[test]
fn full_overlay_fails_the_capture_and_leaves_the_cluster_dirty() {
    let bench = Bench::new(Disk::new(4 * CLUSTER), Some(CLUSTER), SMALL);
    bench.preserver.before_write(one_cluster(0)).unwrap();
    let error = bench.preserver.before_write(one_cluster(1)).unwrap_err();
    assert_eq!((error.kind(), error.errno()), (Kind::InstantLost, Some(nix::libc::ENOSPC)));
    assert_eq!(bench.tracker.dirty_bytes(), 4 * CLUSTER);
    bench.tracker.claim_next(CLUSTER).unwrap().finish(true).into_iter().for_each(|run| bench.overlay.drop_range(run));
    bench.preserver.before_write(one_cluster(1)).unwrap();
}

#[test]
fn overlay_goes_first_past_half_of_its_limit() {
    let bench = Bench::new(Disk::new(8 * CLUSTER), Some(2 * CLUSTER), SMALL);
    bench.preserver.before_write(one_cluster(6)).unwrap();
    assert_eq!(bench.tracker.claim_next(CLUSTER).unwrap().range(), one_cluster(0));
    bench.preserver.before_write(one_cluster(7)).unwrap();
    assert_eq!(bench.tracker.claim_next(CLUSTER).unwrap().range(), one_cluster(6));
}

#[test]
fn stopped_instant_grants_without_a_capture() {
    let bench = Bench::new(Disk::new(CLUSTER), None, SMALL);
    bench.tracker.stop();
    assert_eq!(bench.preserver.before_write(one_cluster(0)).unwrap(), Granted::Stopped);
    assert_eq!(bench.overlay.usage().used, 0);
}
