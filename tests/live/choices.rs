//! What is asked for of writers and of the snapshot, and what becomes of it beside a program that writes.

use crate::kit;
use crate::support::hold::Hold;
use crate::support::{self, Ended, Mount, PATIENCE, Running, command, fingerprint, folder, text};
use crate::trail::{self, Typist};
use drive_backup::writer::Writer;
use nix::sys::signal::Signal;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::channel;
use std::time::Instant;

/// A disk and where its writers are found.
struct Scene {
    home: PathBuf,
    _folder: Option<tempfile::TempDir>,
}

impl Scene {
    /// In memory, which can't clone.
    fn new() -> Self {
        let folder = kit::memory_folder();
        let scene = Self { home: folder.path().to_owned(), _folder: Some(folder) };
        trail::create(&scene.path("disk"));
        scene
    }

    /// On a mounted file system.
    fn on(mount: &Mount) -> Self {
        let scene = Self { home: mount.path().to_owned(), _folder: None };
        trail::create(&scene.path("disk"));
        scene
    }

    fn path(&self, name: &str) -> PathBuf {
        self.home.join(name)
    }

    fn typist(&self) -> Typist {
        Typist::start(&self.path("disk"), &self.path("meet"))
    }

    fn start(&self, target: &Path, more: &[&str]) -> Running {
        let (disk, meet) = (self.path("disk"), self.path("meet"));
        let ends = ["--device", text(&disk), "--target", text(target), "--writer-dir", text(&meet)];
        let bounds = ["--overlay", "memory", "--cbw-timeout", "60"];
        Running::start(&mut command(&[&ends[..], &bounds, more].concat()))
    }

    fn back_up(&self, more: &[&str]) -> Ended {
        self.start(&self.path("copy"), more).ended()
    }

    /// How a backup ends that is held amid its copy until `typist` has written.
    fn written_meanwhile(&self, typist: &Typist, arguments: &[&str]) -> Ended {
        let hold = Hold::at("Copying", &self.home);
        let mut running = Running::start(command(arguments).env("DRIVE_BACKUP_HOLD", hold.variable()));
        let held = hold.reached(&mut running);
        typist.goes_on(10);
        drop(held);
        running.ended()
    }

    fn copy(&self) -> Vec<u8> {
        std::fs::read(self.path("copy")).unwrap()
    }
}

fn said(ended: &Ended) -> String {
    String::from_utf8(ended.stdout.clone()).unwrap()
}

#[track_caller]
fn start_of(ended: &Ended) -> String {
    support::start_of(said(ended).lines().map(str::to_owned))
}

#[test]
fn a_writer_that_is_required_and_missing_is_a_refusal_that_touches_nothing() {
    let scene = Scene::new();
    let before = fingerprint(&scene.home);
    scene.back_up(&["--writer", "required"]).fails(4, "no cooperating writer");
    std::fs::remove_dir(scene.path("meet")).unwrap();
    assert_eq!(fingerprint(&scene.home), before);
}

#[test]
fn a_writer_that_is_required_is_found() {
    let scene = Scene::new();
    let typist = scene.typist();
    let ended = scene.back_up(&["--writer", "required", "--freeze-timeout", "60", "--json"]);
    ended.succeeds();
    let start = start_of(&ended);
    assert!(start.contains(r#""instant":"frozen""#) && start.contains(r#""writers":1"#), "{start}");
    assert!(trail::check(&scene.copy()) < typist.written() + 1);
}

#[test]
fn a_writer_in_another_folder_is_not_found_but_noticed() {
    let scene = Scene::new();
    let typist = scene.typist();
    let elsewhere = scene.path("elsewhere");
    let ended = scene.back_up(&["--writer-dir", text(&elsewhere), "--speed", "4M"]);
    // A flag is given once.
    ended.fails(2, "writer-dir");
    let (disk, copy) = (scene.path("disk"), scene.path("copy"));
    let ends = ["--device", text(&disk), "--target", text(&copy), "--writer-dir", text(&elsewhere), "--speed", "4M"];
    scene.written_meanwhile(&typist, &ends).fails(4, "is not consistent");
    assert!(!copy.exists());
    typist.goes_on(100);
}

#[test]
fn a_writer_that_nobody_looks_for_is_noticed() {
    let scene = Scene::new();
    let typist = scene.typist();
    let (disk, copy) = (scene.path("disk"), scene.path("copy"));
    let ends = ["--device", text(&disk), "--target", text(&copy), "--writer", "none", "--speed", "4M"];
    scene.written_meanwhile(&typist, &ends).fails(4, "is not consistent");
    assert!(!copy.exists());
    typist.goes_on(100);
    let allowed = ["--writer", "none", "--allow-inconsistent", "--json"];
    let ended = scene.start(&scene.path("copy"), &allowed).ended();
    assert_eq!(ended.code, 0, "{ended:?}");
    assert!(said(&ended).contains(r#""instant":"unchecked""#), "{ended:?}");
}

#[test]
fn a_clone_that_cannot_be_made_is_a_refusal() {
    let ext4 = Mount::fresh("ext4");
    for scene in [Scene::new(), Scene::on(&ext4)] {
        let typist = scene.typist();
        scene.back_up(&["--snapshot", "reflink"]).fails(4, "can't be cloned here");
        assert!(!scene.path("copy").exists());
        typist.goes_on(100);
    }
}

#[test]
fn a_clone_is_taken_in_the_freeze_and_traps_nothing() {
    for kind in ["xfs", "btrfs"] {
        let mount = Mount::fresh(kind);
        let scene = Scene::on(&mount);
        let typist = scene.typist();
        // On the same file system, where the target is the clone; and on another, where it is copied from.
        let elsewhere = folder();
        for target in [scene.path("copy"), elsewhere.path().join("copy")] {
            for how in ["auto", "reflink"] {
                let before = typist.written();
                let more = ["--snapshot", how, "--freeze-timeout", "60", "--json", "--speed", "8M"];
                let ended = scene.start(&target, &more).ended();
                ended.succeeds();
                let said = said(&ended);
                let start = start_of(&ended);
                assert!(start.contains(r#""instant":"reflink""#) && start.contains(r#""overlay":null"#), "{start}");
                let instant = trail::check(&std::fs::read(&target).unwrap());
                assert!(instant >= before && instant <= typist.written(), "{kind}: {instant}");
                let records = said.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
                let trapped = records.filter_map(|record| record.get("writer")?.get("trapped")?.as_u64()).max();
                assert_eq!(trapped.unwrap_or(0), 0, "nothing is trapped");
            }
        }
        typist.goes_on(50);
        assert_eq!(support::names(mount.path()).len(), 3);
    }
}

#[test]
fn an_overlay_works_where_clones_do_too() {
    for kind in ["xfs", "btrfs"] {
        let mount = Mount::fresh(kind);
        let scene = Scene::on(&mount);
        let typist = scene.typist();
        let more = ["--snapshot", "overlay", "--freeze-timeout", "60", "--json", "--speed", "2M"];
        let ended = scene.back_up(&more);
        ended.succeeds();
        assert!(said(&ended).contains(r#""instant":"frozen""#));
        let instant = trail::check(&scene.copy());
        typist.goes_on(10);
        assert!(instant <= typist.written());
    }
}

#[test]
fn the_overlay_is_a_file_without_a_name_in_the_folder_that_was_said() {
    let scene = Scene::new();
    let typist = scene.typist();
    let place = folder();
    let (disk, meet, copy) = (scene.path("disk"), scene.path("meet"), scene.path("copy"));
    let ends = ["--device", text(&disk), "--target", text(&copy), "--writer-dir", text(&meet)];
    let how = ["--overlay", text(place.path()), "--speed", "16K", "--freeze-timeout", "60", "--cbw-timeout", "60"];
    let backup = Running::start(&mut command(&[&ends[..], &how].concat()));
    let device = std::fs::metadata(place.path()).unwrap().dev();
    let descriptors = PathBuf::from(format!("/proc/{}/fd", backup.id()));
    support::wait_for("the overlay", || {
        let found = std::fs::read_dir(&descriptors).ok()?.filter_map(Result::ok).find_map(|entry| {
            let metadata = std::fs::metadata(entry.path()).ok()?;
            (metadata.is_file() && metadata.nlink() == 0 && metadata.dev() == device && metadata.blocks() > 0)
                .then_some(())
        });
        assert_eq!(support::names(place.path()), [""; 0]);
        found
    });
    backup.signal(Signal::SIGTERM);
    assert_eq!(backup.ended().code, 143);
    assert!(!copy.exists());
    typist.goes_on(100);
}

#[test]
fn a_second_backup_of_a_disk_is_busy() {
    let scene = Scene::new();
    let typist = scene.typist();
    let mut first = scene.start(&scene.path("copy"), &["--speed", "16K", "--freeze-timeout", "60", "--json"]);
    let mut records = BufReader::new(first.child().stdout.take().unwrap());
    support::start_of(records.by_ref().lines().map(Result::unwrap));
    scene.start(&scene.path("second"), &[]).ended().fails(8, "another backup");
    assert!(!scene.path("second").exists());
    let rest = std::thread::spawn(move || records.lines().map(Result::unwrap).count());
    first.signal(Signal::SIGUSR2);
    first.ended().succeeds_unlimited();
    rest.join().unwrap();
    trail::check(&scene.copy());
    typist.goes_on(100);
}

#[test]
fn a_writer_that_does_not_freeze_in_time_fails_the_backup_and_goes_on() {
    let scene = Scene::new();
    let writer = Writer::open_in(scene.path("disk"), scene.path("meet")).unwrap();
    let (release, released) = channel::<()>();
    let (hangs, hanging) = channel();
    writer.on_freeze(move || {
        hangs.send(()).unwrap();
        // Until it is released, which is after the backup has ended.
        let _ = released.recv();
        Ok(())
    });
    let typist = Typist::with(writer, &scene.path("disk"));
    // The time may be up before the writer has heard of the freeze.
    support::wait_for("a freeze that hangs", || {
        let since = Instant::now();
        scene.back_up(&["--freeze-timeout", "0.3"]).fails(6, "did not freeze within 0.3 s");
        assert!(since.elapsed() < PATIENCE / 2);
        hanging.try_recv().ok()
    });
    assert!(!scene.path("copy").exists());
    typist.goes_on(100);
    drop(release);
    // And the next one finds it well again.
    let again = ["--freeze-timeout", "60"];
    support::wait_for("a backup that freezes it", || {
        hanging.try_recv().ok();
        let ended = scene.back_up(&again);
        (ended.code == 0).then_some(())
    });
    trail::check(&scene.copy());
}

#[test]
fn several_writers_of_one_disk_are_all_found() {
    let scene = Scene::new();
    let typist = scene.typist();
    let quiet: Vec<_> = (0..3).map(|_| Writer::open_in(scene.path("disk"), scene.path("meet")).unwrap()).collect();
    let link = scene.path("another name");
    std::fs::hard_link(scene.path("disk"), &link).unwrap();
    let (meet, copy) = (scene.path("meet"), scene.path("copy"));
    let ends = ["--device", text(&link), "--target", text(&copy), "--writer-dir", text(&meet), "--json"];
    let ended = support::drive_backup(&[&ends[..], &["--freeze-timeout", "60", "--overlay", "memory"]].concat());
    ended.succeeds();
    assert!(start_of(&ended).contains(r#""writers":4"#));
    assert!(trail::check(&scene.copy()) <= typist.written());
    drop(quiet);
}

/// A write waits for a read that a copying thread has begun. Where others keep the processors busy, one of a lower priority would
/// hold it for as long as they like: at nice 15 for up to 432 ms beside four busy loops on two processors, 8 to 16 without.
#[test]
fn no_thread_of_a_backup_stands_back_while_writes_wait_for_it() {
    let scene = Scene::new();
    let _typist = scene.typist();
    let mut backup = scene.start(&scene.path("copy"), &["--speed", "16K", "--freeze-timeout", "60", "--json"]);
    let mut records = BufReader::new(backup.child().stdout.take().unwrap())
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(&line.unwrap()).unwrap());
    assert!(records.any(|record| record["writer"]["trapped"].as_u64() > Some(0)), "no write is trapped");
    let nice = |stat: PathBuf| {
        let stat = std::fs::read_to_string(stat).unwrap();
        // The nineteenth field, proc_pid_stat(5); the second is a name in brackets.
        stat.rsplit(')').next().unwrap().split_whitespace().nth(16).unwrap().parse::<i32>().unwrap()
    };
    let ours = nice(PathBuf::from("/proc/self/stat"));
    let threads = std::fs::read_dir(format!("/proc/{}/task", backup.id())).unwrap();
    let nice: Vec<_> = threads.map(|thread| nice(thread.unwrap().path().join("stat"))).collect();
    assert!(nice.len() > 1 && nice.iter().all(|&nice| nice == ours), "{nice:?}");
    backup.signal(Signal::SIGTERM);
    assert_eq!(backup.ended().code, 143);
}
