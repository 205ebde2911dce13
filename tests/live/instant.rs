//! Random live backups in one process. Two proofs of the instant, neither knowing anything of the code under test:
//!
//! - **Seen:** a freeze lets each writer call back when nothing of it is in flight. The last of those calls reads the
//!   disk, and the copy must be those bytes. Writes go anywhere, with any alignment, over each other.
//! - **Ordered:** no callback. Each sector has one thread that writes it, and all begins and ends of writes are numbered
//!   by one clock. The copy shows for each sector how many of its writes it has. There must be one moment between all
//!   that it has and all that it lacks: no write that it lacks ended before one that it has began.

use crate::kit::{self, Ear, HANGS, Random, SECTOR};
use drive_backup::backup::{self, Mode, OnCbwError, Options, OverlayPlace, SnapshotChoice, Target, WriterChoice};
use drive_backup::error::Kind;
use drive_backup::image::format::Format;
use drive_backup::image::qcow2::CompressOptions;
use drive_backup::image::qcow2::header::Compression;
use drive_backup::job::Job;
use drive_backup::writer::Writer;
use rustix::fs::{FallocateFlags, fallocate};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Instant;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Proof {
    Seen,
    Ordered,
}

/// A write of the ordered proof; the three times are of [`Scene::clock`].
#[derive(Clone, Copy, Debug)]
struct Entry {
    sector: u64,
    number: u64,
    asked: u64,
    ended: u64,
}

/// A disk with its writers.
struct Scene {
    folder: tempfile::TempDir,
    disk: File,
    length: u64,
    proof: Proof,
    threads: u64,
    may_fail: bool,
    clock: AtomicU64,
    written: AtomicU64,
    stop: AtomicBool,
    seen: Arc<Mutex<Option<Vec<u8>>>>,
    journal: Mutex<Vec<Entry>>,
}

/// The backup of a run.
struct Plan {
    options: Options,
    rate: Option<u64>,
    stream: bool,
}

fn length(random: &mut Random) -> u64 {
    match random.below(12) {
        0 => random.below(3),
        1 => 1 + random.below(SECTOR * 2),
        2 => 4096 * random.below(9) + random.pick(&[0, 1, 511, 512, 4095]),
        3..8 => 1 + random.below(96 << 10),
        _ => SECTOR * random.below(1024),
    }
}

fn plan(random: &mut Random, scene: &Scene) -> Plan {
    let (device, folder) = (scene.path("disk"), scene.path("meet"));
    let stream = random.once_in(40);
    let qcow2 = !stream && random.once_in(3);
    let existing = !stream && !qcow2 && random.once_in(4);
    let mut options = kit::options(&device, &scene.path("copy"), &folder);
    if qcow2 {
        options.format = Some(Format::Qcow2);
        options.cluster_size = random.pick(&[None, Some(512), Some(4096), Some(1 << 20)]);
        options.compression = random
            .pick(&[None, None, Some(Compression::Zlib), Some(Compression::Zstd)])
            .map(CompressOptions::default_of);
    }
    if existing {
        options.mode = Mode::Existing;
    }
    options.sparse = !random.once_in(4);
    options.workers = 1 + random.below(4) as usize;
    options.snapshot = random.pick(&[SnapshotChoice::Auto, SnapshotChoice::Overlay]);
    if random.once_in(2) {
        options.overlay = OverlayPlace::Folder(scene.folder.path().to_owned());
    }
    if random.once_in(3) {
        options.overlay_limit = Some(random.pick(&[0, 1, 4096, 3 << 12, 8 << 12, 20 << 12, 64 << 12]));
        options.on_cbw_error = random.pick(&[OnCbwError::BreakSnapshot, OnCbwError::BreakGuestWrite]);
    }
    // So that it takes up to 20 ms.
    let rate = (!random.once_in(4)).then(|| (scene.length * 50).max(1 << 16) << random.below(4));
    Plan { options, rate, stream }
}

impl Scene {
    fn new(random: &mut Random) -> Self {
        let folder = kit::memory_folder();
        let length = length(random);
        let bytes = kit::contents(0, 0, length);
        std::fs::write(folder.path().join("disk"), bytes).unwrap();
        let disk = OpenOptions::new().read(true).write(true).open(folder.path().join("disk")).unwrap();
        let proof = random.pick(&[Proof::Seen, Proof::Ordered]);
        Self {
            folder,
            disk,
            length,
            proof,
            threads: 1 + random.below(4),
            may_fail: false,
            clock: AtomicU64::new(1),
            written: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            seen: Arc::default(),
            journal: Mutex::default(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn tick(&self) -> u64 {
        self.clock.fetch_add(1, SeqCst)
    }

    fn read(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.length as usize];
        self.disk.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    }

    fn open_writer(&self) -> Writer {
        let writer = Writer::open_in(self.path("disk"), self.path("meet")).unwrap();
        if self.proof == Proof::Seen {
            let (disk, length, seen) = (self.disk.try_clone().unwrap(), self.length as usize, self.seen.clone());
            writer.on_freeze(move || {
                // Locked while it reads: whoever comes last begins to read when nothing of anybody is in flight.
                let mut seen = seen.lock().unwrap();
                let mut bytes = vec![0; length];
                disk.read_exact_at(&mut bytes, 0)?;
                *seen = Some(bytes);
                Ok(())
            });
        }
        writer
    }

    /// Writes through `writer` as thread `me` until the scene ends. One that is `late` lets the copy begin after some.
    fn write(&self, writer: &Writer, me: u64, mut random: Random, mut late: Option<(&Ear, Resume<'_>)>) {
        let mut journal = Vec::new();
        let mut left = 5 + random.below(40);
        while !self.stop.load(SeqCst) {
            if late.as_ref().is_some_and(|(ear, _)| ear.started().is_some()) {
                left -= 1;
                late = late.filter(|_| left > 0);
            }
            match self.proof {
                Proof::Seen => self.write_anywhere(writer, &mut random),
                Proof::Ordered => journal.extend(self.write_own_sector(writer, me, &mut random)),
            }
            self.written.fetch_add(1, SeqCst);
            if random.once_in(8) {
                std::thread::yield_now();
            }
        }
        self.journal.lock().unwrap().extend(journal);
    }

    /// The bracket; `None`: the write has to fail, and may.
    fn begin<'a>(&self, writer: &'a Writer, offset: u64, length: u64) -> Option<drive_backup::writer::Write<'a>> {
        match writer.begin(offset, length) {
            Ok(bracket) => Some(bracket),
            Err(error) => {
                assert!(self.may_fail && error.raw_os_error() == Some(28), "write {offset}+{length}: {error}");
                None
            }
        }
    }

    fn write_own_sector(&self, writer: &Writer, me: u64, random: &mut Random) -> Option<Entry> {
        let sectors = self.length / SECTOR;
        // Those of the other threads are in the same clusters.
        let mine = sectors / self.threads + u64::from(me < sectors % self.threads);
        if mine == 0 {
            let _nothing = self.begin(writer, random.below(self.length + 1), 0)?;
            return None;
        }
        let sector = random.below(mine) * self.threads + me;
        let asked = self.tick();
        let bracket = self.begin(writer, sector * SECTOR, SECTOR)?;
        let bytes = kit::contents(asked, sector * SECTOR, SECTOR);
        self.disk.write_all_at(&bytes, sector * SECTOR).unwrap();
        drop(bracket);
        Some(Entry { sector, number: asked, asked, ended: self.tick() })
    }

    fn write_anywhere(&self, writer: &Writer, random: &mut Random) {
        let (offset, length) = self.anywhere(random);
        let number = self.tick();
        let Some(_bracket) = self.begin(writer, offset, length) else { return };
        if length == 0 {
            return;
        }
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match random.below(10) {
            0 => fallocate(&self.disk, punch, offset, length).unwrap(),
            1 => self.disk.write_all_at(&vec![0; length as usize], offset).unwrap(),
            _ => self.disk.write_all_at(&kit::contents(number, offset, length), offset).unwrap(),
        }
    }

    fn anywhere(&self, random: &mut Random) -> (u64, u64) {
        let end = self.length;
        if end == 0 {
            return (0, 0);
        }
        let clip = |offset: u64, length: u64| (offset, length.min(end - offset));
        match random.below(12) {
            0 => (random.below(end + 1), 0),
            1 => (0, 1),
            2 => (end - 1, 1),
            3 => clip(0, 1 + random.below(8192)),
            4 => clip(random.below(end), end),
            5 => (0, end),
            6 => {
                // Across the end of a cluster.
                let edge = (random.below(end) / 4096 * 4096).max(1);
                clip(edge - 1, 2)
            }
            7 | 8 => clip(random.below(end) / SECTOR * SECTOR, SECTOR * (1 + random.below(20))),
            _ => clip(random.below(end), 1 + random.below(3000)),
        }
    }
}

/// One backup of a disk that is being written, proven.
fn run(seed: u64) {
    let mut random = Random::new(seed);
    let mut scene = Scene::new(&mut random);
    let plan = plan(&mut random, &scene);
    scene.may_fail = plan.options.on_cbw_error == OnCbwError::BreakGuestWrite;
    let scene = &scene;
    if plan.options.mode == Mode::Existing {
        std::fs::write(scene.path("copy"), vec![0xEE; scene.length as usize]).unwrap();
    }
    let before = scene.read();
    // 0: a disk at rest, but for a writer that comes later.
    let early = if random.once_in(12) { 0 } else { 1 + random.below(2) };
    let late = early == 0 || random.once_in(4);
    let writers: Vec<Writer> = (0..early).map(|_| scene.open_writer()).collect();
    let job = Arc::new(Job::new(plan.rate));
    // Nothing is copied before one who comes late has written.
    let ear = Ear::pausing((late && !plan.stream).then(|| job.clone()));
    let mut copy = None;
    let (mut asked, mut ended) = (0, 0);
    std::thread::scope(|scope| {
        for me in 0..scene.threads {
            let random = Random::new(random.next());
            match writers.get((me % early.max(1)) as usize) {
                Some(writer) if !(late && me == 0) => drop(scope.spawn(move || scene.write(writer, me, random, None))),
                // Its thread has one of its own, which comes when the copy is under way, or any time before.
                _ => {
                    let (ear, job, any_time) = (&ear, &*job, early > 0 && seed.is_multiple_of(2));
                    scope.spawn(move || {
                        let resume = Resume(job);
                        if any_time || wait_for_start(ear, scene) {
                            let writer = scene.open_writer();
                            scene.write(&writer, me, random, Some((ear, resume)));
                        }
                    });
                }
            }
        }
        let stop = StopAtEnd(scene);
        let enough = if early > 0 && (scene.threads > 1 || !late) { random.below(60) } else { 0 };
        wait_for_writes(scene, enough);
        asked = scene.tick();
        copy = back_up(&plan, scene, &job, &ear, &mut ended);
        drop(stop);
    });
    drop(writers);
    let Some(copy) = copy else { return };
    match scene.proof {
        Proof::Seen => {
            let seen = scene.seen.lock().unwrap().take();
            kit::same("the copy", &copy, &seen.unwrap_or(before));
        }
        Proof::Ordered => prove_order(scene, &copy, asked, ended),
    }
}

/// Lets the copy go on when it is dropped.
struct Resume<'a>(&'a Job);

impl Drop for Resume<'_> {
    fn drop(&mut self) {
        self.0.resume();
    }
}

struct StopAtEnd<'a>(&'a Scene);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.stop.store(true, SeqCst);
    }
}

fn wait_for_writes(scene: &Scene, writes: u64) {
    let since = Instant::now();
    while scene.written.load(SeqCst) < writes {
        assert!(since.elapsed() < HANGS, "the writers do not write");
        std::thread::yield_now();
    }
}

/// False: it never began.
fn wait_for_start(ear: &Ear, scene: &Scene) -> bool {
    while ear.started().is_none() {
        if scene.stop.load(SeqCst) {
            return false;
        }
        std::thread::yield_now();
    }
    true
}

/// The copy; `None` where the overlay was too small and the backup said so. `at`: when it had ended, by the clock.
fn back_up(plan: &Plan, scene: &Scene, job: &Arc<Job>, ear: &Ear, at: &mut u64) -> Option<Vec<u8>> {
    if plan.stream {
        return stream(plan, scene);
    }
    let target = scene.path("copy");
    let ended = backup::run(&plan.options, job, ear);
    *at = scene.tick();
    match ended {
        Ok(summary) => {
            assert!(summary.is_whole() && summary.consistent && summary.total == scene.length, "{summary:?}");
            check_with_qemu(plan, &target);
            Some(kit::disk_of(&target, plan.options.format.unwrap(), scene.length))
        }
        Err(failure) => {
            assert_eq!(failure.error.kind(), Kind::InstantLost, "{failure:?}");
            let limited = plan.options.overlay_limit.is_some() && !scene.may_fail;
            assert!(limited && failure.error.to_string().contains("overlay limit"), "{failure:?}");
            assert!(plan.options.mode == Mode::Existing || !target.exists(), "a failed backup left a target");
            None
        }
    }
}

fn stream(plan: &Plan, scene: &Scene) -> Option<Vec<u8>> {
    let options = &plan.options;
    let mut command = Command::new(env!("CARGO_BIN_EXE_drive-backup"));
    command.args(["--target", "-", "--source-format", "raw", "--overlay", "memory", "--freeze-timeout", "60"]);
    command.arg("--device").arg(options.device.name()).arg("--writer-dir").arg(scene.path("meet"));
    command.args(["--workers", &options.workers.to_string(), "--cbw-timeout", "60", "--no-fsync"]);
    if let Some(rate) = plan.rate {
        command.args(["--speed", &rate.to_string()]);
    }
    if let Some(limit) = options.overlay_limit {
        // 0 would be no limit.
        command.args(["--overlay-limit", &limit.max(1).to_string()]);
    }
    if scene.may_fail {
        command.args(["--on-cbw-error", "break-guest-write"]);
    }
    let output = command.output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    if options.overlay_limit.is_some() && !scene.may_fail && output.status.code() == Some(6) {
        assert!(said.contains("overlay limit"), "{said}");
        return None;
    }
    assert!(output.status.success(), "{}: {said}", output.status);
    Some(output.stdout)
}

/// An independent reader, of some.
fn check_with_qemu(plan: &Plan, target: &Path) {
    if plan.options.format == Some(Format::Qcow2) && plan.options.workers == 4 {
        let output = Command::new("qemu-img").args(["check", "-q", "-f", "qcow2"]).arg(target).output().unwrap();
        assert!(output.status.success(), "{output:?}");
    }
}

/// See the module. `asked`: the backup began after this; `ended`: after this it had ended, or 0.
fn prove_order(scene: &Scene, copy: &[u8], asked: u64, ended: u64) {
    let journal = scene.journal.lock().unwrap();
    let sectors = scene.length / SECTOR;
    assert_eq!(copy.len() as u64, scene.length);
    let mut writes = vec![Vec::new(); sectors as usize];
    for entry in journal.iter() {
        writes[entry.sector as usize].push(*entry);
    }
    let (mut last_in, mut first_out) = (None::<Entry>, None::<Entry>);
    for sector in 0..sectors {
        let bytes = &copy[(sector * SECTOR) as usize..][..SECTOR as usize];
        let number = u64::from_le_bytes(bytes[..8].try_into().unwrap());
        kit::same("a sector of the copy", bytes, &kit::contents(number, sector * SECTOR, SECTOR));
        let writes = &writes[sector as usize];
        let known = number == 0 || writes.iter().any(|entry| entry.number == number);
        assert!(known, "sector {sector} holds {number}, which was never written there");
        for entry in writes {
            if entry.number <= number {
                last_in = last_in.filter(|last| last.asked > entry.asked).or(Some(*entry));
            } else {
                first_out = first_out.filter(|first| first.ended < entry.ended).or(Some(*entry));
            }
        }
    }
    if let Some(out) = first_out {
        assert!(out.ended > asked, "{out:?} ended before the backup was asked for, at {asked}, and is not in the copy");
    }
    if let Some(last) = last_in {
        assert!(ended == 0 || last.asked < ended, "{last:?} began after the backup had ended, at {ended}");
    }
    if let (Some(last), Some(out)) = (last_in, first_out) {
        assert!(out.ended > last.asked, "the copy has {last:?} and lacks {out:?}, which had ended before");
    }
    let tail = (sectors * SECTOR) as usize;
    let untouched = kit::contents(0, tail as u64, scene.length - tail as u64);
    kit::same("the end of the copy", &copy[tail..], &untouched);
}

#[test]
fn a_copy_is_the_disk_of_one_instant() {
    kit::each_seed(100, 1, run);
}

#[test]
fn a_backup_may_require_the_writer_that_is_there() {
    let scene = Scene::new(&mut Random::new(7));
    let _writer = scene.open_writer();
    let mut options = kit::options(&scene.path("disk"), &scene.path("copy"), &scene.path("meet"));
    options.writer = WriterChoice::Required;
    assert_eq!(options.target, Target::At(scene.path("copy").into()));
    let ear = Ear::default();
    backup::run(&options, &Arc::new(Job::new(None)), &ear).unwrap();
    assert_eq!(ear.wait_for_start().writers, 1);
}
