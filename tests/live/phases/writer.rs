//! Signals and death of the writer, in each of its phases. The backup goes on without one that died, and fails before it
//! starts when one stands still in the freeze for too long. A writer that goes on has lost no write.

use super::{is_wide, lines_of, record};
use crate::kit::HANGS;
use crate::support::hold::Hold;
use crate::support::{self, Running, text, wait_for};
use crate::trail;
use nix::sys::signal::Signal;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::Receiver;

/// Where the writer is held, in the order in which it comes there; at "Frozen" the backup is, and the writer waits for it.
const BEFORE_THE_START: [&str; 4] = ["Attaching", "Draining", "Frozen", "Thawing"];
const WHILE_IT_COPIES: [&str; 3] = ["Asking", "Waiting", "Granted"];
const DEATHS: [Signal; 4] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP, Signal::SIGKILL];
/// Seconds: the bound that is passed by who stands still. Whoever does not comes in time, on a busy machine too.
const BOUND: u64 = 2;

/// A disk, the process that writes it, and a backup of it that is so slow that it lasts.
struct Scene {
    folder: tempfile::TempDir,
    writer: Running,
    backup: Running,
    lines: Receiver<String>,
    hold: UnixStream,
}

/// The process of `death.rs` that writes for ever, and has begun to. It does not ignore SIGINT, as a shell's background
/// job does.
fn start_writer(folder: &Path, hold: Option<&Hold>) -> Running {
    let mut writer = Command::new("env");
    writer.arg("--default-signal").arg(std::env::current_exe().unwrap());
    writer.args(["--exact", "death::another_process_writes"]).env("DRIVE_BACKUP_TEST_ROLE", "writer");
    if let Some(hold) = hold {
        writer.env("DRIVE_BACKUP_HOLD", hold.variable());
    }
    let before = progress(folder);
    let writer = Running::start(writer.current_dir(folder).stdin(Stdio::null()).stdout(Stdio::null()));
    wait_for("the first writes", || (progress(folder) > before + 10).then_some(()));
    writer
}

/// The last write that the writer knows to be done.
fn progress(folder: &Path) -> u64 {
    let word = std::fs::read(folder.join("progress")).ok();
    word.and_then(|word| word.try_into().ok()).map_or(0, u64::from_le_bytes)
}

fn backup(folder: &Path) -> Command {
    let path = |name: &str| folder.join(name);
    let (disk, copy, meet) = (path("disk"), path("copy"), path("meet"));
    let mut command = support::command(&["--device", text(&disk), "--target", text(&copy), "--no-fsync"]);
    command.args(["--writer-dir", text(&meet), "--overlay", "memory", "--snapshot", "overlay"]);
    command
}

impl Scene {
    /// At `place`; a freeze and a capture may last so long.
    #[track_caller]
    fn held(place: &str, freeze_timeout: u64, cbw_timeout: u64) -> Self {
        let folder = crate::kit::memory_folder();
        trail::create(&folder.path().join("disk"));
        let hold = Hold::at(place, folder.path());
        let of_backup = place == "Frozen";
        let mut writer = start_writer(folder.path(), (!of_backup).then_some(&hold));
        let mut command = backup(folder.path());
        command.args(["--speed", "16K", "--json", "--progress-interval", "0.1"]);
        command.args(["--freeze-timeout", &freeze_timeout.to_string(), "--cbw-timeout", &cbw_timeout.to_string()]);
        if of_backup {
            command.env("DRIVE_BACKUP_HOLD", hold.variable());
        }
        let mut backup = Running::start(&mut command);
        let lines = lines_of(&mut backup);
        let hold = hold.reached(if of_backup { &mut backup } else { &mut writer });
        Self { folder, writer, backup, lines, hold }
    }

    /// Waits until the backup has copied for longer than a capture may take.
    #[track_caller]
    fn goes_on_beyond_the_bound(&self) {
        let elapsed = || loop {
            let line = self.lines.recv_timeout(HANGS).expect("a backup that goes on");
            if let Some(seconds) = record(&line)["seconds_elapsed"].as_u64() {
                return seconds;
            }
        };
        let since = elapsed();
        // Of whole seconds one more.
        while elapsed() <= since + BOUND {}
    }
}

#[track_caller]
fn goes_on(folder: &Path, what: &str) {
    let from = progress(folder);
    wait_for(&format!("the writer, {what}"), || (progress(folder) >= from + 2 * trail::BLOCKS).then_some(()));
}

/// The writer is dead: the disk has all that it knew to be written, and of the rest at most the write that it was in.
/// Gives the last one.
#[track_caller]
fn writes_on_disk(folder: &Path, what: &str) -> u64 {
    let last = trail::check(&std::fs::read(folder.join("disk")).unwrap());
    let known = progress(folder);
    assert!((known..=known + 1).contains(&last), "{what}: {last} is on the disk, {known} are known to be");
    last
}

/// The backup succeeds, without its limit of speed from now on; the last write in its copy.
#[track_caller]
fn instant_of(backup: Running, folder: &Path) -> u64 {
    backup.signal(Signal::SIGUSR2);
    let ended = backup.ended();
    assert!(ended.code == 0 && ended.stderr.lines().all(|line| line.contains("speed limit off")), "{ended:?}");
    trail::check(&std::fs::read(folder.join("copy")).unwrap())
}

/// Nothing stands in the way of the next backup, beside a writer that lives; then that one is killed.
#[track_caller]
fn next_backup_succeeds(folder: &Path, writer: Running, what: &str) {
    let bounds = ["--freeze-timeout", "60", "--cbw-timeout", "60"];
    Running::start(backup(folder).args(bounds)).ended().succeeds();
    let instant = trail::check(&std::fs::read(folder.join("copy")).unwrap());
    writer.signal(Signal::SIGKILL);
    assert_eq!(writer.ended().code, 137);
    assert!(instant <= writes_on_disk(folder, what), "{what}");
    assert_eq!(support::names(folder), ["copy", "disk", "hold", "meet", "progress"], "{what}: not swept");
}

/// Every pair, or each place with the signal whose turn it is.
fn deaths() -> Vec<(&'static str, Signal)> {
    let places = BEFORE_THE_START.into_iter().chain(WHILE_IT_COPIES).enumerate();
    let pairs = places
        .flat_map(|(at, place)| DEATHS.into_iter().enumerate().map(move |(turn, death)| (at, turn, place, death)));
    let pairs = pairs.filter(|(at, turn, ..)| is_wide() || at % DEATHS.len() == *turn);
    pairs.map(|(.., place, death)| (place, death)).collect()
}

#[test]
fn a_backup_whose_writer_dies_in_any_phase_goes_on_and_is_one_instant() {
    for (place, death) in deaths() {
        let what = format!("{death} at {place}");
        let Scene { folder, writer, backup, lines, hold } = Scene::held(place, 60, 60);
        let held_at = progress(folder.path());
        writer.signal(death);
        assert_eq!(writer.ended().code, 128 + death as i32, "{what}");
        drop(hold);
        let instant = instant_of(backup, folder.path());
        let last = writes_on_disk(folder.path(), &what);
        if WHILE_IT_COPIES.contains(&place) {
            assert!(instant <= held_at && last == held_at, "{what}: {instant}, {held_at}, {last}");
        } else {
            assert_eq!(instant, last, "{what}: nobody wrote after it");
        }
        assert!(lines.iter().any(|line| record(&line)["message_type"] == "summary"), "{what}");
        next_backup_succeeds(folder.path(), start_writer(folder.path(), None), &what);
    }
}

#[test]
fn a_writer_that_stands_still_in_the_freeze_fails_the_backup_in_time_and_writes_on() {
    let few: &[&str] = if is_wide() { &BEFORE_THE_START } else { &["Draining"] };
    for &place in few {
        let Scene { folder, writer, backup, lines, hold } = Scene::held(place, BOUND, 60);
        writer.signal(Signal::SIGSTOP);
        // At "Frozen" it is the backup's.
        let hold = (place != "Frozen").then_some(hold);
        let why = if place == "Draining" { "did not freeze within 2 s" } else { "does not answer" };
        backup.ended().fails(6, why);
        let has_started = lines.iter().any(|line| record(&line)["message_type"] == "start");
        assert!(!has_started && !folder.path().join("copy").exists(), "{place}");
        writer.signal(Signal::SIGCONT);
        // Who writes keeps the bound himself: the thread that is held is not needed for it.
        goes_on(folder.path(), place);
        drop(hold);
        next_backup_succeeds(folder.path(), writer, place);
    }
}

#[test]
fn a_writer_that_stands_still_around_its_grant_holds_no_backup_and_writes_on() {
    let few: &[&str] = if is_wide() { &WHILE_IT_COPIES } else { &["Granted"] };
    for &place in few {
        let scene = Scene::held(place, 60, BOUND);
        let held_at = progress(scene.folder.path());
        scene.writer.signal(Signal::SIGSTOP);
        scene.goes_on_beyond_the_bound();
        let Scene { folder, writer, backup, hold, lines: _lines } = scene;
        writer.signal(Signal::SIGCONT);
        drop(hold);
        goes_on(folder.path(), place);
        let instant = instant_of(backup, folder.path());
        assert!(instant <= held_at, "{place}: {instant}, {held_at}");
        next_backup_succeeds(folder.path(), writer, place);
    }
}
