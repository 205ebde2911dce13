//! Backups and writers that are killed, stopped and continued at random moments, as processes. The writer always goes
//! on within its bound; a target that is there is the disk of one instant.

use crate::kit::{self, HANGS, Random};
use crate::support::{self, Running, text};
use crate::trail::{self, Typist};
use drive_backup::writer::Writer;
use nix::sys::signal::Signal;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const ROLE: &str = "DRIVE_BACKUP_TEST_ROLE";
/// The writer writes nothing as long as a file of that name is there.
const PAUSE: &str = "pause";
/// Runs that one writer lives through, if it is not the one that is killed.
const LIFE: u64 = 10;
/// A machine under load may be late by so much.
const SLACK: Duration = Duration::from_secs(20);

/// A disk and a process that writes it.
struct Scene {
    folder: tempfile::TempDir,
    writer: Running,
}

fn start_writer(folder: &Path) -> Running {
    let mut writer = Command::new(std::env::current_exe().unwrap());
    writer.args(["--exact", "death::another_process_writes"]).env(ROLE, "writer").current_dir(folder);
    Running::start(writer.stdin(Stdio::null()).stdout(Stdio::null()))
}

/// The writer's process: for ever, but for its pauses.
fn write_for_ever() -> ! {
    let disk = OpenOptions::new().read(true).write(true).open("disk").unwrap();
    let progress = OpenOptions::new().write(true).create(true).truncate(false).open("progress").unwrap();
    let mut number = trail::last(&disk);
    let writer = Writer::open_in("disk", "meet").unwrap();
    loop {
        while Path::new(PAUSE).exists() {
            std::thread::yield_now();
        }
        number += 1;
        trail::write(&writer, &disk, number).unwrap();
        progress.write_all_at(&number.to_le_bytes(), 0).unwrap();
    }
}

#[test]
fn another_process_writes() {
    if std::env::var(ROLE).is_ok() {
        write_for_ever();
    }
    let scene = Scene::new();
    scene.goes_on(100, SLACK);
}

impl Scene {
    fn new() -> Self {
        let folder = kit::memory_folder();
        trail::create(&folder.path().join("disk"));
        let writer = start_writer(folder.path());
        let scene = Self { folder, writer };
        support::wait_for("the first write", || (scene.progress() > 10).then_some(()));
        scene
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn progress(&self) -> u64 {
        let mut word = [0; 8];
        let Ok(file) = File::open(self.path("progress")) else { return 0 };
        if file.read_exact_at(&mut word, 0).is_ok() { u64::from_le_bytes(word) } else { 0 }
    }

    #[track_caller]
    fn goes_on(&self, writes: u64, bound: Duration) {
        let (from, since) = (self.progress(), Instant::now());
        while self.progress() < from + writes {
            assert!(since.elapsed() < bound, "the writer does not go on");
            std::thread::yield_now();
        }
    }

    fn arguments(&self, more: &[&str]) -> Vec<String> {
        let (disk, copy, meet) = (self.path("disk"), self.path("copy"), self.path("meet"));
        let ends = ["--device", text(&disk), "--target", text(&copy), "--writer-dir", text(&meet)];
        let how = ["--overlay", "memory", "--snapshot", "overlay", "--no-fsync"];
        ends.iter().chain(&how).chain(more).map(ToString::to_string).collect()
    }

    fn start_backup(&self, more: &[&str]) -> Running {
        let arguments = self.arguments(more);
        Running::drive_backup(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// The target, if there is one, is an instant; it is gone afterwards.
    #[track_caller]
    fn take_copy(&self) -> Option<u64> {
        let copy = std::fs::read(self.path("copy")).ok()?;
        std::fs::remove_file(self.path("copy")).unwrap();
        Some(trail::check(&copy))
    }

    /// A backup that ended by itself, whose writers did what may cost it the instant.
    #[track_caller]
    fn ends_well_or_without_target(&self, backup: Running) {
        let ended = backup.ended();
        let copy = self.take_copy();
        match ended.code {
            0 => assert!(copy.is_some(), "{ended:?}"),
            6 => assert!(copy.is_none(), "{ended:?}"),
            _ => panic!("{ended:?}"),
        }
    }
}

/// What happens during a backup.
#[derive(Clone, Copy, Debug)]
enum Fate {
    BackupKilled,
    BackupStopped,
    WriterKilled,
    WriterStopped,
}

/// After up to 40 ms: at any moment of the backup's life.
fn moment(random: &mut Random) {
    // It makes the moment random; nothing waits for it.
    std::thread::sleep(Duration::from_micros(random.below(40_000)));
}

fn run(scene: &mut Scene, random: &mut Random) {
    let fate = random.pick(&[Fate::BackupKilled, Fate::BackupStopped, Fate::WriterKilled, Fate::WriterStopped]);
    let speed = random.pick(&["8M", "16M", "32M", "off"]);
    let cbw_timeout = random.pick(&["0.1", "0.2", "60"]);
    let freeze_timeout = random.pick(&["0.1", "5"]);
    let workers = random.pick(&["1", "2"]);
    let bounds = ["--cbw-timeout", cbw_timeout, "--freeze-timeout", freeze_timeout];
    let backup = scene.start_backup(&[&bounds[..], &["--speed", speed, "--workers", workers]].concat());
    moment(random);
    match fate {
        Fate::BackupKilled => {
            backup.signal(Signal::SIGKILL);
            drop(backup);
            scene.goes_on(20, SLACK);
            scene.take_copy();
        }
        Fate::BackupStopped => {
            backup.signal(Signal::SIGSTOP);
            // Within its bound, a minute of which nobody waits for here.
            if cbw_timeout != "60" {
                scene.goes_on(20 + random.below(200), SLACK);
            }
            backup.signal(Signal::SIGCONT);
            scene.ends_well_or_without_target(backup);
            scene.goes_on(20, SLACK);
        }
        Fate::WriterKilled => {
            scene.writer = {
                scene.writer.signal(Signal::SIGKILL);
                scene.writer.child().wait().unwrap();
                start_writer(scene.folder.path())
            };
            scene.ends_well_or_without_target(backup);
            scene.goes_on(20, SLACK);
        }
        Fate::WriterStopped => {
            scene.writer.signal(Signal::SIGSTOP);
            moment(random);
            scene.writer.signal(Signal::SIGCONT);
            scene.ends_well_or_without_target(backup);
            scene.goes_on(20, SLACK);
        }
    }
}

#[test]
fn whoever_dies_or_stops_the_writer_goes_on_and_no_torn_copy_is_published() {
    kit::each_seed(20, LIFE, |seed| {
        let mut random = Random::new(seed);
        let mut scene = Scene::new();
        (0..LIFE).for_each(|_| run(&mut scene, &mut random));
        // What those that were killed left is in nobody's way, and gone after the next.
        let long = ["--cbw-timeout", "60", "--freeze-timeout", "60"];
        scene.start_backup(&long).ended().succeeds();
        assert!(scene.take_copy().is_some());
        assert_eq!(support::names(scene.folder.path()), ["disk", "meet", "progress"]);
    });
}

#[test]
fn a_backup_that_is_stopped_past_its_bound_fails_when_it_wakes() {
    let scene = Scene::new();
    // Nobody writes before the stop: what was saved by then could be all there is.
    File::create(scene.path(PAUSE)).unwrap();
    let slow = ["--speed", "64K", "--cbw-timeout", "0.2", "--freeze-timeout", "60", "--json"];
    let mut backup = scene.start_backup(&slow);
    let mut records = BufReader::new(backup.child().stdout.take().unwrap());
    let line = support::start_of(records.by_ref().lines().map(Result::unwrap));
    assert!(line.contains(r#""instant":"frozen""#), "{line}");
    backup.signal(Signal::SIGSTOP);
    // All blocks: some of them can't have been saved.
    std::fs::remove_file(scene.path(PAUSE)).unwrap();
    scene.goes_on(3000, HANGS);
    backup.signal(Signal::SIGCONT);
    // Its reader must not be gone.
    let reader = std::thread::spawn(move || records.lines().map(Result::unwrap).last());
    let ended = backup.ended();
    // Whichever it looks at first when it wakes: the writer's mark, or a capture that it was in the middle of.
    let told = ["went on without us", "took longer than 0.2 s"].iter().any(|why| ended.stderr.contains(why));
    assert!(ended.code == 6 && told, "{ended:?}");
    assert!(reader.join().unwrap().unwrap().contains(r#""reason":"instant_lost""#));
    assert_eq!(support::names(scene.folder.path()), ["disk", "meet", "progress"]);
    scene.goes_on(100, SLACK);
}

#[test]
fn a_backup_whose_writer_dies_succeeds() {
    let mut scene = Scene::new();
    let slow = ["--speed", "2M", "--freeze-timeout", "60", "--cbw-timeout", "60", "--json"];
    let mut backup = scene.start_backup(&slow);
    let mut records = BufReader::new(backup.child().stdout.take().unwrap());
    let line = support::start_of(records.by_ref().lines().map(Result::unwrap));
    assert!(line.contains(r#""instant":"frozen""#), "{line}");
    scene.writer.signal(Signal::SIGKILL);
    scene.writer.child().wait().unwrap();
    // Another one takes over while it runs.
    let typist = Typist::start(&scene.path("disk"), &scene.path("meet"));
    let reader = std::thread::spawn(move || records.lines().map(Result::unwrap).last());
    backup.ended().succeeds();
    assert!(reader.join().unwrap().unwrap().contains(r#""message_type":"summary""#));
    let instant = scene.take_copy().unwrap();
    typist.goes_on(100);
    assert!(instant < typist.written());
}

/// The hook is for tests: a program that is delivered does not know its name.
#[test]
fn only_builds_for_tests_can_be_held() {
    let binary = std::fs::read(support::BINARY).unwrap();
    let is_there = binary.windows(17).any(|bytes| bytes == b"DRIVE_BACKUP_HOLD");
    assert_eq!(is_there, cfg!(debug_assertions));
}
