//! Random backups beside several processes that write one disk, are killed and started again while the job runs; at speeds
//! that change, with overlays that are too small, with faults of source, target and overlay. What a copy shows is proven
//! by `proof`; whatever ends a backup, its writers have lost nothing.

mod proof;
mod writers;

use crate::kit::{self, Ear, Random, SECTOR};
use crate::support::{self, Mount, Running, text};
use drive_backup::backup::{self, Mode, OnCbwError, Options, OverlayPlace};
use drive_backup::error::Kind;
use drive_backup::image::format::Format;
use drive_backup::job::Job;
use proof::{Layout, NEVER, now};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::time::Duration;
use writers::{Orders, Process};

/// What goes wrong beside the writers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    None,
    /// The overlay's file system is full soon.
    OverlayFull,
    /// The target's is.
    TargetFull,
    /// A system call of the backup fails or is late, by strace: (call, what is done to it, about the source alone).
    Call(&'static str, &'static str, bool),
}

const CALLS: &[Fault] = &[
    // Reads of the copier and of captures.
    Fault::Call("pread64", "error=EIO", true),
    Fault::Call("pread64", "delay_enter=3000", true),
    // Writes to overlay and target.
    Fault::Call("pwrite64", "error=EIO", false),
    Fault::Call("pwrite64", "error=ENOSPC", false),
    Fault::Call("pwrite64", "delay_exit=3000", false),
    Fault::Call("fallocate", "error=EIO", false),
];

/// A disk, its writers, and the backup of a run.
struct Scene {
    folder: tempfile::TempDir,
    /// Where a file system is full.
    small: Option<Mount>,
    orders: Orders,
    fault: Fault,
    options: Options,
    rate: Option<u64>,
}

/// How a backup ended: the copy, if it is whole; else why not.
type Outcome = Result<Vec<u8>, (Kind, String)>;

fn layout(random: &mut Random, seed: u64, is_qcow2: bool, threads: u64) -> Layout {
    let sectors = random.pick(&[1, 7, 64, 200, 500, 900]) + random.below(40);
    let tail = if is_qcow2 { 0 } else { random.pick(&[0, 0, 1, 511]) };
    Layout { seed, length: sectors * SECTOR + tail, stripe: 1 + random.below(16), threads }
}

impl Scene {
    fn new(seed: u64, random: &mut Random, processes: u64) -> Self {
        let folder = kit::memory_folder();
        let is_qcow2 = processes == 1 && random.once_in(2);
        let threads = 1 + random.below(3);
        let layout = layout(random, seed, is_qcow2, processes * threads);
        let fault = match random.below(8) {
            0 => Fault::OverlayFull,
            1 => Fault::TargetFull,
            2 => random.pick(CALLS),
            _ => Fault::None,
        };
        let full = matches!(fault, Fault::OverlayFull | Fault::TargetFull);
        let small = full.then(|| Mount::tmpfs(16 << 10 << random.below(4)));
        let path = |name: &str| folder.path().join(name);
        let mut options = kit::options(&path("disk"), &path("copy"), &path("meet"));
        if is_qcow2 {
            options.source_format = Some(Format::Qcow2);
        }
        options.format = Some(random.pick(&[Format::Raw, Format::Raw, Format::Qcow2]));
        options.workers = 1 + random.below(4) as usize;
        options.sparse = !random.once_in(4);
        options.overlay = match &small {
            Some(small) if fault == Fault::OverlayFull => OverlayPlace::Folder(small.path().to_owned()),
            _ => random.pick(&[OverlayPlace::Memory, OverlayPlace::Folder(folder.path().to_owned())]),
        };
        if let (Fault::TargetFull, Some(small)) = (fault, &small) {
            options.target = backup::Target::At(small.join("copy").into());
        } else if options.format == Some(Format::Raw) && random.once_in(4) {
            options.mode = Mode::Existing;
        }
        if random.once_in(3) {
            options.overlay_limit = Some(random.pick(&[1, 4096, 8 << 12, 64 << 12]));
        }
        options.on_cbw_error = random.pick(&[OnCbwError::BreakSnapshot, OnCbwError::BreakGuestWrite]);
        let may_fail = options.on_cbw_error == OnCbwError::BreakGuestWrite;
        let orders = Orders { layout, is_qcow2, may_fail, first: 0, threads };
        let rate = (!random.once_in(5)).then(|| layout.length.max(1 << 14) << random.below(5));
        let scene = Self { folder, small, orders, fault, options, rate };
        scene.make_disk();
        scene
    }

    fn make_disk(&self) {
        let fresh = self.orders.layout.fresh();
        if self.orders.is_qcow2 {
            std::fs::write(self.path("fresh"), fresh).unwrap();
            let how = format!("convert -f raw -O qcow2 -o cluster_size={}", 4096 << (self.orders.layout.seed % 3));
            support::qemu_img(&how, &[&self.path("fresh"), &self.path("disk")]);
        } else {
            std::fs::write(self.path("disk"), fresh).unwrap();
        }
        if self.options.mode == Mode::Existing {
            std::fs::write(self.target(), vec![0xEE; self.orders.layout.length as usize]).unwrap();
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn target(&self) -> PathBuf {
        self.small
            .as_ref()
            .filter(|_| self.fault == Fault::TargetFull)
            .map_or(self.path("copy"), |small| small.join("copy"))
    }

    fn processes(&self, count: u64) -> Vec<Process> {
        let of = |n| Process::new(Orders { first: n * self.orders.threads, ..self.orders });
        (0..count).map(of).collect()
    }

    fn journals(&self) -> Vec<Vec<proof::Entry>> {
        let journal = |thread| proof::read(&self.orders.journal(self.folder.path(), thread));
        (0..self.orders.layout.threads).map(journal).collect()
    }

    fn back_up(&self, job: &Arc<Job>, random: &mut Random) -> Outcome {
        let kind = match self.fault {
            Fault::Call(call, what, about_source) => {
                let from = 1 + random.below(30);
                let inject = format!("inject={call}:{what}:when={from}{}", random.pick(&["", "+", "+7"]));
                self.under_strace(call, &inject, about_source)
            }
            _ => backup::run(&self.options, job, &Ear::default())
                .map(drop)
                .map_err(|failure| (failure.error.kind(), failure.error.to_string())),
        };
        kind.map(|()| kit::disk_of(&self.target(), self.options.format.unwrap(), self.orders.layout.length))
    }

    /// The command, for faults are not to hit this process.
    fn under_strace(&self, call: &str, inject: &str, about_source: bool) -> Result<(), (Kind, String)> {
        let (log, disk, target, meet) = (self.path("log"), self.path("disk"), self.target(), self.path("meet"));
        let mut command = Command::new("strace");
        command.args(["-f", "-qq", "-o", text(&log), "-e", &format!("trace={call}"), "-e", inject]);
        if about_source {
            command.args(["-P", text(&disk)]);
        }
        command.args([
            support::BINARY,
            "--device",
            text(&disk),
            "--target",
            text(&target),
            "--writer-dir",
            text(&meet),
        ]);
        command.args(["--snapshot", "overlay", "--overlay", "memory", "--no-fsync"]);
        command.args(["--freeze-timeout", "60", "--cbw-timeout", "60", "--workers", &self.options.workers.to_string()]);
        for (flag, format) in [("--source-format", &self.options.source_format), ("--format", &self.options.format)] {
            command.args([flag, format.as_ref().unwrap().name()]);
        }
        if self.options.mode == Mode::Existing {
            command.args(["--mode", "existing"]);
        }
        if let Some(rate) = self.rate {
            command.args(["--speed", &rate.to_string()]);
        }
        if let Some(limit) = self.options.overlay_limit {
            command.args(["--overlay-limit", &limit.to_string()]);
        }
        if self.orders.may_fail {
            command.args(["--on-cbw-error", "break-guest-write"]);
        }
        let ended = Running::start(&mut support::piped(command)).ended();
        match ended.code {
            0 => Ok(()),
            4 => Err((Kind::Source, ended.stderr)),
            5 => Err((Kind::Target, ended.stderr)),
            6 => Err((Kind::InstantLost, ended.stderr)),
            _ => panic!("{inject}: {ended:?}"),
        }
    }

    /// Is this how such a backup may fail?
    #[track_caller]
    fn excuse(&self, kind: Kind, why: &str) {
        let breaks = !self.orders.may_fail;
        let limited = self.options.overlay_limit.is_some() || self.fault == Fault::OverlayFull;
        let is_call = |side: bool| matches!(self.fault, Fault::Call(_, what, source) if source == side && what.starts_with("error"));
        // It makes the memory that writers share, too.
        let shares_memory = matches!(self.fault, Fault::Call("fallocate", ..));
        let excused = match kind {
            Kind::InstantLost | Kind::Source if shares_memory => true,
            Kind::InstantLost => breaks && (limited || is_call(true) || is_call(false)),
            Kind::Source => is_call(true),
            Kind::Target => self.fault == Fault::TargetFull || is_call(false),
            _ => false,
        };
        assert!(excused, "{why}: with {:?}, {:?}", self.fault, self.options);
        assert!(self.options.mode == Mode::Existing || !self.target().exists(), "a failed backup left a target");
    }
}

/// Changes speeds, kills and starts processes until `over`.
fn disturb(processes: &mut [Process], folder: &Path, job: &Job, random: &mut Random, over: &AtomicBool) {
    // How many, so that a slow job has an end.
    for _ in 0..random.below(6) {
        // It makes the moment random; nothing waits for it.
        std::thread::sleep(Duration::from_micros(random.below(20_000)));
        if over.load(SeqCst) {
            break;
        }
        let at = random.below(processes.len() as u64) as usize;
        let process = &mut processes[at];
        match random.below(8) {
            0 => job.set_speed(Some(1 << (14 + random.below(8)))),
            1 => job.pause(),
            2 => job.resume(),
            3 if process.is_running() => process.end(),
            4 | 5 if process.is_running() => {
                process.kill();
                process.start(folder);
            }
            _ if !process.is_running() => process.start(folder),
            _ => {}
        }
    }
    job.resume();
    job.set_speed(None);
}

/// True: there was a copy, and it was proven.
fn run(seed: u64) -> bool {
    let mut random = Random::new(seed);
    let count = random.pick(&[1, 1, 2, 3]);
    let scene = Scene::new(seed, &mut random, count);
    let folder = scene.folder.path();
    let mut processes = scene.processes(count);
    // Others start later; a disk that nobody writes at first is looked at instead.
    for process in processes.iter_mut().skip(usize::from(count > 1 && random.once_in(3))) {
        process.start(folder);
        process.goes_on(folder);
    }
    let job = Arc::new(Job::new(scene.rate));
    let over = AtomicBool::new(false);
    let mut disturbance = Random::new(random.next());
    let asked = now();
    let (outcome, ended) = std::thread::scope(|scope| {
        let backup = scope.spawn(|| {
            let outcome = scene.back_up(&job, &mut random);
            over.store(true, SeqCst);
            (outcome, now())
        });
        disturb(&mut processes, folder, &job, &mut disturbance, &over);
        backup.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    });
    for process in &mut processes {
        process.goes_on(folder);
        process.end();
    }
    let (layout, journals) = (&scene.orders.layout, scene.journals());
    let format = scene.options.source_format.unwrap();
    let disk = kit::disk_of(&scene.path("disk"), format, layout.length);
    proof::prove("the disk", &disk, layout, &journals, (NEVER, NEVER));
    match outcome {
        Ok(ref copy) => proof::prove("the copy", copy, layout, &journals, (asked, ended)),
        Err((kind, ref why)) => scene.excuse(kind, why),
    }
    outcome.is_ok()
}

#[test]
fn a_copy_beside_processes_that_come_and_go_is_one_moment() {
    let (proven, failed) = (AtomicU64::new(0), AtomicU64::new(0));
    kit::each_seed(24, 1, |seed| {
        let count = if run(seed) { &proven } else { &failed };
        count.fetch_add(1, SeqCst);
    });
    let (proven, failed) = (proven.into_inner(), failed.into_inner());
    eprintln!("{proven} copies proven, {failed} backups failed as they had to");
    assert!(proven + failed < 20 || proven > failed / 2);
}
