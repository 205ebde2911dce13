//! What the tests of the whole path share: chance that can be replayed, disks that describe themselves, defaults.

use drive_backup::backup::{
    Mode, OnCbwError, Options, OverlayPlace, ProofOptions, Restoring, SnapshotChoice, SyncMode, Target, WriterChoice,
};
use drive_backup::ground::policy::OnError;
use drive_backup::image::format::Format;
use drive_backup::image::open::{SourceOptions, open_source};
use drive_backup::job::Job;
use drive_backup::monitor::{Event, Monitor, Started};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, mpsc};
use std::time::{Duration, Instant};

/// No wait lasts so long unless something hangs, on whatever machine.
pub const HANGS: Duration = Duration::from_secs(60);
/// What the contents of the disks are made of.
pub const SECTOR: u64 = 512;

/// splitmix64: looks random and follows from the seed.
pub struct Random(u64);

pub fn scramble(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(scramble(seed))
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        scramble(self.0)
    }

    /// From 0 up to, not including, `end`, which is not 0.
    pub fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }

    /// One time in `n`.
    pub fn once_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }

    pub fn pick<T: Clone>(&mut self, from: &[T]) -> T {
        from[self.below(from.len() as u64) as usize].clone()
    }
}

fn number(variable: &str) -> Option<u64> {
    std::env::var(variable).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{variable}={text}")))
}

/// The seeds of a test's runs.
struct Seeds {
    first: u64,
    /// 0: one and the same.
    step: u64,
    runs: u64,
    until: Option<Instant>,
}

impl Seeds {
    fn chosen(default: u64, each: u64) -> Self {
        let until = number("DRIVE_BACKUP_SECONDS").map(|seconds| Instant::now() + Duration::from_secs(seconds));
        let runs = number("DRIVE_BACKUP_RUNS").map(|runs| runs.div_ceil(each));
        match number("DRIVE_BACKUP_SEED") {
            Some(first) => Self { first, step: 0, runs: runs.unwrap_or(1), until },
            None => {
                let runs = runs.unwrap_or(if until.is_some() { u64::MAX } else { default.div_ceil(each) });
                Self { first: number("DRIVE_BACKUP_FIRST_SEED").unwrap_or(0), step: 1, runs, until }
            }
        }
    }

    fn get(&self, run: u64) -> Option<u64> {
        let is_over = run >= self.runs || self.until.is_some_and(|until| Instant::now() >= until);
        (!is_over).then(|| self.first + run * self.step)
    }
}

/// Calls `test` with many seeds, on two threads, and says which one failed. `default`: how many runs, if nobody asks;
/// a seed is for `each` of them.
///
/// `DRIVE_BACKUP_RUNS` so many, `DRIVE_BACKUP_SECONDS` for so long, `DRIVE_BACKUP_FIRST_SEED` from that one on;
/// `DRIVE_BACKUP_SEED` that one, as often as `DRIVE_BACKUP_RUNS` says: a seed decides what is tried, not how threads meet.
pub fn each_seed(default: u64, each: u64, test: impl Fn(u64) + Sync) {
    let seeds = Seeds::chosen(default, each);
    let name = std::thread::current().name().unwrap_or_default().to_owned();
    let next = AtomicU64::new(0);
    let failed = AtomicBool::new(false);
    let work = || {
        while let (false, run) = (failed.load(Relaxed), next.fetch_add(1, Relaxed))
            && let Some(seed) = seeds.get(run)
        {
            let again = format!("DRIVE_BACKUP_SEED={seed} cargo test --test live -- --exact {name}");
            let ended = said_if_it_lasts(format!("the seed {seed} lasts long; this runs it again:\n{again}"));
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| test(seed))) {
                failed.store(true, Relaxed);
                eprintln!("the seed was {seed}; this runs it again:\n{again}");
                resume_unwind(panic);
            }
            drop(ended);
        }
    };
    std::thread::scope(|scope| {
        let other = scope.spawn(work);
        work();
        other.join().unwrap_or_else(|panic| resume_unwind(panic));
    });
    // Each thread asked for one that it did not get.
    let runs = next.into_inner() - 2;
    eprintln!("seeds {} to {}: {runs} runs of {name}", seeds.first, seeds.first + (runs.max(1) - 1) * seeds.step);
}

/// Says `what` unless what it gives is dropped in time: whoever ends a test that hangs is to know which seed did.
fn said_if_it_lasts(what: String) -> mpsc::Sender<()> {
    let (running, ended) = mpsc::channel();
    std::thread::spawn(move || {
        if ended.recv_timeout(HANGS) == Err(mpsc::RecvTimeoutError::Timeout) {
            eprintln!("{what}");
        }
    });
    running
}

/// A folder of the test's own, in memory.
pub fn memory_folder() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap()
}

/// A live backup with bounds that no loaded machine passes.
pub fn options(device: &Path, target: &Path, folder: &Path) -> Options {
    Options {
        device: device.into(),
        source_format: Some(Format::Raw),
        secret: None,
        target_secret: None,
        backing: true,
        target: Target::At(target.into()),
        format: Some(Format::Raw),
        mode: Mode::AbsolutePaths,
        sync: SyncMode::Full,
        restoring: Restoring::default(),
        proof: ProofOptions::default(),
        cluster_size: None,
        compression: None,
        sparse: true,
        direct: false,
        fsync: false,
        workers: 1,
        allow_inconsistent: false,
        writer: WriterChoice::Auto,
        writer_dir: Some(folder.to_owned()),
        snapshot: SnapshotChoice::Overlay,
        overlay: OverlayPlace::Memory,
        overlay_limit: None,
        hook_frozen: None,
        freeze_timeout: HANGS,
        reconnect: HANGS,
        cbw_timeout: HANGS,
        on_cbw_error: OnCbwError::BreakSnapshot,
        on_source_error: OnError::Report,
        on_target_error: OnError::Report,
    }
}

/// The disk of `length` bytes in an image, read through this library. A qcow2 is one of whole sectors, the rest zero.
pub fn disk_of(image: &Path, format: Format, length: u64) -> Vec<u8> {
    let options = SourceOptions { format: Some(format), backing: true, direct: false, secret: None, shared: false };
    let source = open_source(image, &options).unwrap();
    let mut bytes = vec![0; source.virtual_size as usize];
    if !bytes.is_empty() {
        source.image.read_at(&mut bytes, 0).unwrap();
    }
    if format == Format::Qcow2 {
        assert_eq!(bytes.len() as u64, length.next_multiple_of(SECTOR));
        assert!(bytes.drain(length as usize..).all(|byte| byte == 0));
    }
    bytes
}

/// Panics unless two disks are equal, and says where they differ.
#[track_caller]
pub fn same(what: &str, found: &[u8], expected: &[u8]) {
    assert_eq!(found.len(), expected.len(), "{what}: length");
    if found == expected {
        return;
    }
    if let Some(at) = (0..found.len()).find(|&at| found[at] != expected[at]) {
        let sector = at / SECTOR as usize * SECTOR as usize;
        let word = |bytes: &[u8]| bytes.get(sector..sector + 8).map(|w| u64::from_le_bytes(w.try_into().unwrap()));
        let (found, expected) = (word(found), word(expected));
        panic!("{what}: byte {at:#x} differs; its sector begins with {found:?} and should with {expected:?}");
    }
}

/// What write `number` puts at `offset`: sectors of {number, own offset, checksum, …}, cut to the range.
pub fn contents(number: u64, offset: u64, length: u64) -> Vec<u8> {
    let (first, last) = (offset / SECTOR, (offset + length).div_ceil(SECTOR));
    let mut bytes = Vec::with_capacity(((last - first) * SECTOR) as usize);
    for sector in first..last {
        let sum = scramble(number ^ scramble(sector));
        bytes.extend(number.to_le_bytes());
        bytes.extend((sector * SECTOR).to_le_bytes());
        (2..SECTOR / 8).for_each(|word| bytes.extend(sum.wrapping_mul(word * 2 + 1).to_le_bytes()));
    }
    let skip = (offset - first * SECTOR) as usize;
    bytes[skip..skip + length as usize].to_vec()
}

/// Hears the start of a copy.
#[derive(Default)]
pub struct Ear {
    pause: Option<Arc<Job>>,
    started: Mutex<Option<Started>>,
    heard: Condvar,
}

impl Monitor for Ear {
    fn event(&self, event: Event<'_>) {
        if let Event::Started(started) = event {
            if let Some(job) = &self.pause {
                job.pause();
            }
            *self.started.lock().unwrap() = Some(started.clone());
            self.heard.notify_all();
        }
    }
}

impl Ear {
    /// And lets `job` stand still before anything is copied.
    pub fn pausing(job: Option<Arc<Job>>) -> Self {
        Self { pause: job, ..Self::default() }
    }

    pub fn started(&self) -> Option<Started> {
        self.started.lock().unwrap().clone()
    }

    /// Waits until copying begins.
    #[track_caller]
    pub fn wait_for_start(&self) -> Started {
        let started = self.started.lock().unwrap();
        let (started, timeout) = self.heard.wait_timeout_while(started, HANGS, |started| started.is_none()).unwrap();
        assert!(!timeout.timed_out(), "copying does not begin");
        started.clone().unwrap()
    }
}
