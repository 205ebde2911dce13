//! Several disks at one instant.

use crate::kit::{self, Ear, HANGS, Random, SECTOR, contents};
use drive_backup::backup::{self, Disk, Failure, Options, Summary, TargetState};
use drive_backup::error::Kind;
use drive_backup::job::Job;
use drive_backup::writer::Writer;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Instant;

/// On each disk.
const SECTORS: u64 = 600;

struct Scene {
    folder: tempfile::TempDir,
    stop: AtomicBool,
    written: AtomicU64,
}

struct End {
    writer: Writer,
    disk: File,
}

impl End {
    fn write(&self, number: u64, sector: u64) {
        let _bracket = self.writer.begin(sector * SECTOR, SECTOR).unwrap();
        self.disk.write_all_at(&contents(number, sector * SECTOR, SECTOR), sector * SECTOR).unwrap();
    }
}

impl Scene {
    fn new() -> Self {
        let folder = kit::memory_folder();
        for name in ["a", "b"] {
            std::fs::write(folder.path().join(name), vec![0; (SECTORS * SECTOR) as usize]).unwrap();
        }
        Self { folder, stop: AtomicBool::new(false), written: AtomicU64::new(0) }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn open(&self, name: &str) -> End {
        let disk = OpenOptions::new().write(true).open(self.path(name)).unwrap();
        End { writer: Writer::open_in(self.path(name), self.path("meet")).unwrap(), disk }
    }

    fn options(&self, name: &str) -> Options {
        kit::options(&self.path(name), &self.path(&format!("copy of {name}")), &self.path("meet"))
    }

    /// First A, then B, again and again: thread `me` of four, in the sectors that are its own.
    fn write(&self, ends: &[End; 2], me: u64, mut random: Random) {
        let mut number = 0;
        while !self.stop.load(SeqCst) {
            let sector = random.below(SECTORS / 4) * 4 + me;
            number += 1;
            for end in ends {
                end.write(number, sector);
            }
            self.written.fetch_add(1, SeqCst);
        }
    }

    #[track_caller]
    fn goes_on(&self, writes: u64) {
        let (from, since) = (self.written.load(SeqCst), Instant::now());
        while self.written.load(SeqCst) < from + writes {
            assert!(since.elapsed() < HANGS, "the writers do not go on");
            std::thread::yield_now();
        }
    }

    /// What thread `me` had written last, by a copy.
    fn last(&self, copy: &[u8], me: u64) -> u64 {
        let numbers = (me..SECTORS).step_by(4).map(|sector| {
            let bytes = &copy[(sector * SECTOR) as usize..][..SECTOR as usize];
            let number = u64::from_le_bytes(bytes[..8].try_into().unwrap());
            let expected =
                if number == 0 { vec![0; SECTOR as usize] } else { contents(number, sector * SECTOR, SECTOR) };
            kit::same("a sector of a copy", bytes, &expected);
            number
        });
        numbers.max().unwrap()
    }
}

struct StopAtEnd<'a>(&'a Scene);

impl Drop for StopAtEnd<'_> {
    fn drop(&mut self) {
        self.0.stop.store(true, SeqCst);
    }
}

fn back_up(disks: [&Options; 2], rates: [Option<u64>; 2]) -> (Vec<Result<Summary, Failure>>, [Ear; 2]) {
    let ears = [Ear::default(), Ear::default()];
    let jobs = rates.map(|rate| Arc::new(Job::new(rate)));
    let disk = |at: usize| Disk { options: disks[at], job: &jobs[at], monitor: &ears[at] };
    let ended = [Mutex::new(None), Mutex::new(None)];
    backup::run_all(&[disk(0), disk(1)], &|place, result| {
        assert!(ended[place].lock().unwrap().replace(result).is_none(), "it ends once");
    });
    (ended.map(|result| result.into_inner().unwrap().expect("each ends")).into(), ears)
}

fn run(seed: u64) {
    let mut random = Random::new(seed);
    let scene = Scene::new();
    let ends = [scene.open("a"), scene.open("b")];
    let rate = |random: &mut Random| random.pick(&[None, Some(8 << 20), Some(32 << 20)]);
    let rates = [rate(&mut random), rate(&mut random)];
    std::thread::scope(|scope| {
        for me in 0..4 {
            let (scene, ends, random) = (&scene, &ends, Random::new(random.next()));
            scope.spawn(move || scene.write(ends, me, random));
        }
        let _stop = StopAtEnd(&scene);
        scene.goes_on(random.below(300));
        let (a, b) = (scene.options("a"), scene.options("b"));
        // Whichever is asked for first.
        let order = if random.once_in(2) { [&a, &b] } else { [&b, &a] };
        let (ended, ears) = back_up(order, rates);
        ended.into_iter().for_each(|ended| drop(ended.unwrap()));
        let [one, other] = ears.each_ref().map(|ear| ear.started().unwrap());
        assert_eq!(one.point_in_time, other.point_in_time);
        assert_eq!((one.writers, other.writers), (1, 1));
        scene.goes_on(100);
    });
    let [a, b] = ["copy of a", "copy of b"].map(|name| std::fs::read(scene.path(name)).unwrap());
    for me in 0..4 {
        let (a, b) = (scene.last(&a, me), scene.last(&b, me));
        assert!(a == b || a == b + 1, "A has write {a} of thread {me}, B has {b}");
    }
}

#[test]
fn two_disks_are_copied_as_of_one_instant() {
    kit::each_seed(20, 1, run);
}

/// Backs up both with `change` made to B, which can't start; the writers of both go on, and a next backup works.
#[track_caller]
fn all_fail(change: impl FnOnce(&Scene, &[End; 2], &mut Options), kind: Kind, why: &str) {
    let scene = Scene::new();
    let ends = [scene.open("a"), scene.open("b")];
    std::thread::scope(|scope| {
        let _stop = StopAtEnd(&scene);
        for me in 0..4 {
            let (scene, ends) = (&scene, &ends);
            scope.spawn(move || scene.write(ends, me, Random::new(me)));
        }
        scene.goes_on(10);
        let (a, mut b) = (scene.options("a"), scene.options("b"));
        change(&scene, &ends, &mut b);
        let (ended, ears) = back_up([&a, &b], [None, None]);
        for (ended, ear) in ended.into_iter().zip(ears) {
            let failure = ended.unwrap_err();
            assert_eq!((failure.error.kind(), failure.target), (kind, TargetState::Untouched), "{failure:?}");
            assert!(failure.error.to_string().contains(why), "{failure:?}");
            assert!(ear.started().is_none());
        }
        assert!(!scene.path("copy of a").exists() && !scene.path("copy of b").exists());
        scene.goes_on(1000);
        ends.iter().for_each(|end| end.writer.on_freeze(|| Ok(())));
        let (ended, _) = back_up([&a, &scene.options("b")], [None, None]);
        ended.into_iter().for_each(|ended| drop(ended.unwrap()));
        scene.goes_on(1000);
    });
}

#[test]
fn a_disk_that_is_missing_fails_all() {
    all_fail(|scene, _, b| b.device = scene.path("nothing").into(), Kind::Source, "No such file");
}

#[test]
fn a_target_that_cannot_be_made_fails_all() {
    all_fail(
        |scene, _, b| b.target = backup::Target::At(scene.path("no folder").join("copy").into()),
        Kind::Target,
        "No such file",
    );
}

#[test]
fn a_writer_that_cannot_flush_fails_all() {
    let quiesce = || Err(std::io::Error::from_raw_os_error(5));
    all_fail(|_, ends, _| ends[1].writer.on_freeze(quiesce), Kind::InstantLost, "Input/output error");
}

#[test]
fn an_overlay_that_cannot_be_made_fails_all() {
    all_fail(
        |scene, _, b| b.overlay = backup::OverlayPlace::Folder(scene.path("no folder")),
        Kind::Usage,
        "No such file",
    );
}
