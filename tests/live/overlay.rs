//! The overlay is full or fails: who wins is what was asked for, and it is never both.

use crate::kit;
use crate::support::{self, Ended, Mount, Running, command, text};
use crate::trail::{self, BLOCK, BLOCKS, Typist};
use nix::sys::signal::Signal;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const EIO: i32 = 5;
const ENOSPC: i32 = 28;
/// A copy takes eight seconds, if it is let.
const SLOW: &str = "64K";
/// And two, from the beginning to the end.
const SLOWISH: &str = "256K";

struct Scene {
    folder: tempfile::TempDir,
    typist: Typist,
}

impl Scene {
    fn new() -> Self {
        let folder = kit::memory_folder();
        trail::create(&folder.path().join("disk"));
        let typist = Typist::start(&folder.path().join("disk"), &folder.path().join("meet"));
        Self { folder, typist }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn arguments<'a>(&self, target: &'a str, more: &[&'a str]) -> Vec<String> {
        let (disk, meet) = (self.path("disk"), self.path("meet"));
        let fixed = ["--device", text(&disk), "--target", target, "--writer-dir", text(&meet)];
        let bounds = ["--snapshot", "overlay", "--freeze-timeout", "60", "--cbw-timeout", "60", "--workers", "1"];
        fixed.iter().chain(&bounds).chain(more).map(ToString::to_string).collect()
    }

    fn start(&self, target: &Path, speed: &str, more: &[&str]) -> Running {
        let arguments = self.arguments(text(target), &[&["--speed", speed], more].concat());
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        Running::start(&mut command(&arguments))
    }

    /// Slowly, so that writes come before the copier.
    fn back_up(&self, more: &[&str]) -> Ended {
        self.start(&self.path("copy"), SLOW, more).ended()
    }

    /// Slowly until a write has failed.
    fn back_up_and_fail_writes(&self, more: &[&str]) -> Ended {
        let policy = ["--on-cbw-error", "break-guest-write"];
        let backup = self.start(&self.path("copy"), SLOW, &[&policy, more].concat());
        support::wait_for("a write that fails", || (!self.typist.failures().is_empty()).then_some(()));
        backup.signal(Signal::SIGUSR2);
        backup.ended()
    }

    /// The backup failed for the overlay; the writer did not.
    #[track_caller]
    fn is_lost(&self, ended: &Ended, why: &str) {
        ended.fails(6, why);
        assert_eq!(support::names(self.folder.path()), ["disk", "meet"]);
        self.writer_is_well();
    }

    #[track_caller]
    fn writer_is_well(&self) {
        self.typist.goes_on(2 * BLOCKS);
        assert_eq!(self.typist.failures(), [0; 0]);
    }

    /// The writer's writes failed with `errno`; the backup did not.
    #[track_caller]
    fn is_kept(&self, copy: &[u8], errno: i32) {
        let failures = self.typist.failures();
        assert!(!failures.is_empty() && failures.iter().all(|&failure| failure == errno), "{failures:?}");
        let instant = trail::check(copy);
        self.typist.goes_on(2 * BLOCKS);
        assert!(instant < self.typist.written());
    }
}

/// A number of the last JSON record's field, which is in an object `of`.
fn last_number(ended: &Ended, of: &str, field: &str) -> Option<f64> {
    let output = String::from_utf8(ended.stdout.clone()).unwrap();
    let records: Vec<serde_json::Value> = output.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    records.iter().rev().find_map(|record| record.get(of)?.get(field)?.as_f64())
}

#[test]
fn a_full_overlay_breaks_the_backup_and_no_write() {
    let scene = Scene::new();
    let ended = scene.back_up(&["--overlay", "memory", "--overlay-limit", "12K"]);
    scene.is_lost(&ended, "overlay limit of 12288 bytes");
}

#[test]
fn a_full_overlay_fails_writes_where_that_is_asked_for() {
    let scene = Scene::new();
    let ended = scene.back_up_and_fail_writes(&["--overlay", "memory", "--overlay-limit", "12K", "--json"]);
    ended.succeeds_unlimited();
    scene.is_kept(&std::fs::read(scene.path("copy")).unwrap(), ENOSPC);
    assert_eq!(last_number(&ended, "overlay", "limit"), Some(12288.0));
    assert_eq!(last_number(&ended, "overlay", "used"), Some(0.0), "everything is on the target");
    let peak = last_number(&ended, "overlay", "peak").unwrap();
    assert!(peak > 0.0 && peak <= 12288.0 && peak % BLOCK as f64 == 0.0, "{peak}");
    let writes = |field| last_number(&ended, "writer", field).unwrap();
    assert!(writes("trapped") > 0.0 && writes("writes") > 0.0);
    assert!(writes("stall_ms_p50") <= writes("stall_ms_p99") && writes("stall_ms_p99") <= writes("stall_ms_max"));
}

#[test]
fn an_overlay_without_limit_counts_what_it_holds() {
    let scene = Scene::new();
    let ended = scene.start(&scene.path("copy"), SLOWISH, &["--overlay", "memory", "--json"]).ended();
    ended.succeeds();
    trail::check(&std::fs::read(scene.path("copy")).unwrap());
    scene.writer_is_well();
    assert_eq!(last_number(&ended, "overlay", "limit"), None);
    assert_eq!(last_number(&ended, "overlay", "used"), Some(0.0));
    let peak = last_number(&ended, "overlay", "peak").unwrap();
    assert!(peak > 12288.0 && peak <= (BLOCKS * BLOCK) as f64, "{peak}");
}

#[test]
fn its_folder_is_tmpdir_and_var_tmp_where_that_is_empty() {
    let scene = Scene::new();
    let missing = scene.path("missing");
    for (folder, fails) in [(text(&missing), true), ("", false)] {
        let arguments = scene.arguments("-", &["--format", "raw"]);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let ended = Running::start(command(&arguments).env("TMPDIR", folder).stdout(Stdio::piped())).ended();
        if fails {
            ended.fails(2, &format!("overlay '{folder}'"));
        } else {
            ended.succeeds();
        }
    }
    scene.writer_is_well();
}

/// The kernel took it, could not write it, and would read back something else.
#[test]
fn an_overlay_that_is_lost_behind_the_cache_breaks_the_backup_and_no_write() {
    let scene = Scene::new();
    let pool = Mount::tmpfs(8 << 20);
    support::sparse_file(&pool.join("disk"), 64 << 20);
    support::run("mkfs.ext4", &["-q", text(&pool.join("disk"))]);
    let device = support::LoopDevice::over(&pool.join("disk"), &[]);
    let mount = Mount::device(device.path());
    let room = std::fs::File::create(pool.join("rest")).unwrap();
    let full = (0..).find(|at| room.write_all_at(&[1; 4096], at * 4096).is_err());
    assert!(full > Some(0));
    let ended = scene.back_up(&["--overlay", text(mount.path())]);
    scene.is_lost(&ended, "flush overlay at 0x0+");
}

#[test]
fn a_full_file_system_breaks_the_backup_and_no_write() {
    let scene = Scene::new();
    let small = Mount::tmpfs(32 << 10);
    let ended = scene.back_up(&["--overlay", text(small.path())]);
    scene.is_lost(&ended, "No space left on device");
    assert_eq!(support::names(small.path()), [""; 0], "nothing is left there");
}

#[test]
fn a_full_file_system_fails_writes_where_that_is_asked_for() {
    let scene = Scene::new();
    let small = Mount::tmpfs(32 << 10);
    scene.back_up_and_fail_writes(&["--overlay", text(small.path())]).succeeds_unlimited();
    scene.is_kept(&std::fs::read(scene.path("copy")).unwrap(), ENOSPC);
}

/// Target and overlay are on one file system, which has room for half of either: what is first out of room fails the
/// backup, and never a write. What is left there.
fn on_one_small_file_system(speed: &str, old: Option<&[u8]>) -> Vec<String> {
    let scene = Scene::new();
    // All of the disk has data.
    scene.typist.goes_on(6 * BLOCKS);
    let small = Mount::tmpfs(BLOCKS * BLOCK / 2);
    let target = small.join("copy");
    if let Some(old) = old {
        std::fs::write(&target, old).unwrap();
    }
    let ended = scene.start(&target, speed, &["--overlay", text(small.path())]).ended();
    let (of_target, of_overlay) = (ended.stderr.contains("write target"), ended.stderr.contains("overlay"));
    match ended.code {
        5 => assert!(of_target && !of_overlay, "{ended:?}"),
        _ => assert!(of_overlay && !of_target, "{ended:?}"),
    }
    ended.fails(if of_target { 5 } else { 6 }, "No space left on device");
    println!("at {speed}: {}", ended.stderr.trim_end());
    scene.writer_is_well();
    let disk = scene.path("disk");
    let Scene { typist, folder: _folder } = scene;
    let last = typist.end();
    assert_eq!(trail::check(&std::fs::read(disk).unwrap()), last, "a write is lost");
    if let Some(old) = old {
        assert!(std::fs::read(target).unwrap() == old, "the old target has changed");
    }
    support::names(small.path())
}

/// The slow copier loses against the writer, the fast one may be first.
const SPEEDS: [&str; 3] = ["64K", "8M", "unlimited"];

#[test]
fn a_file_system_that_is_full_of_target_and_overlay_breaks_the_backup_and_no_write() {
    for speed in SPEEDS {
        assert_eq!(on_one_small_file_system(speed, None), [""; 0], "nothing is left there");
    }
}

#[test]
fn a_file_system_that_is_full_of_target_and_overlay_keeps_the_old_target() {
    for speed in SPEEDS {
        assert_eq!(on_one_small_file_system(speed, Some(b"what was there before")), ["copy"], "and nothing beside it");
    }
}

/// A stream is written by other calls, so that all these fail on the overlay.
fn with_failing_overlay(scene: &Scene, speed: &str, more: &[&str]) -> Ended {
    let mut strace = Command::new("strace");
    let log = scene.path("log");
    strace.args(["-f", "-qq", "-o", text(&log), "-e", "trace=pwrite64", "-e", "inject=pwrite64:error=EIO:when=3+"]);
    strace
        .arg(support::BINARY)
        .args(scene.arguments("-", &[&["--speed", speed, "--overlay", "memory"], more].concat()));
    let ended = Running::start(&mut support::piped(strace)).ended();
    assert!(std::fs::read_to_string(&log).unwrap().contains("INJECTED"));
    std::fs::remove_file(log).unwrap();
    ended
}

#[test]
fn an_overlay_that_fails_breaks_the_backup_and_no_write() {
    let scene = Scene::new();
    let ended = with_failing_overlay(&scene, SLOW, &[]);
    scene.is_lost(&ended, "Input/output error");
}

#[test]
fn an_overlay_that_fails_fails_writes_where_that_is_asked_for() {
    let scene = Scene::new();
    let ended = with_failing_overlay(&scene, SLOWISH, &["--on-cbw-error", "break-guest-write"]);
    ended.succeeds();
    scene.is_kept(&ended.stdout, EIO);
}
