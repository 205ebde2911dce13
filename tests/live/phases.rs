//! Signals and death at named places of a backup and of a writer, which are held there: see `DRIVE_BACKUP_HOLD` in
//! `src/hold.rs`. Whatever comes, the writer goes on, the target is the old one or a whole copy, and the last record says which.
//! `DRIVE_BACKUP_SWEEP=all` tries every signal at every place.

mod writer;

use crate::kit::HANGS;
use crate::support::hold::Hold;
use crate::support::{self, BINARY, Running, text, wait_for};
use crate::trail::{self, Typist};
use nix::sys::signal::Signal;
use serde_json::Value;
use std::io::{BufRead, BufReader};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Instant;

/// Where a backup is held, in the order in which it comes there.
const PLACES: [&str; 9] =
    ["Opened", "Frozen", "Copying", "Capturing", "Flushing", "Verifying", "Publishing", "Renamed", "Published"];
const OLD: &[u8] = b"what was there before";
const PARTIAL: &str = ".copy.drive-backup-partial";

struct Scene {
    folder: tempfile::TempDir,
    typist: Typist,
}

/// A backup that is held at a place.
struct Held {
    running: Running,
    hold: Option<UnixStream>,
    lines: Receiver<String>,
    records: Vec<Value>,
}

impl Scene {
    fn new() -> Self {
        let folder = crate::kit::memory_folder();
        let path = |name: &str| folder.path().join(name);
        trail::create(&path("disk"));
        std::fs::create_dir(path("out")).unwrap();
        std::fs::write(path("out").join("copy"), OLD).unwrap();
        let typist = Typist::start(&path("disk"), &path("meet"));
        Self { folder, typist }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn command(&self, bound: &str) -> Command {
        let (disk, copy, meet) = (self.path("disk"), self.path("out/copy"), self.path("meet"));
        // A shell's background job ignores SIGINT, and so would this.
        let mut command = Command::new("env");
        command.args(["--default-signal", BINARY, "--device", text(&disk), "--target", text(&copy), "--json"]);
        let mut command = support::piped(command);
        command.args(["--writer-dir", text(&meet), "--overlay", "memory", "--snapshot", "overlay", "--workers", "1"]);
        command.args(["--cbw-timeout", bound, "--freeze-timeout", bound, "--progress-interval", "0.1"]);
        command
    }

    /// A backup that has come to `place`; its writers wait `bound` seconds for it.
    #[track_caller]
    fn held(&self, place: &str, bound: &str) -> Held {
        let hold = Hold::at(place, self.folder.path());
        let mut command = self.command(bound);
        match place {
            // Writes must come before the copier does.
            "Capturing" => _ = command.args(["--speed", "16K"]),
            "Verifying" => _ = command.arg("--verify"),
            _ => {}
        }
        let mut running = Running::start(command.env("DRIVE_BACKUP_HOLD", hold.variable()));
        let lines = lines_of(&mut running);
        let hold = Some(hold.reached(&mut running));
        Held { running, hold, lines, records: Vec::new() }
    }

    fn target(&self) -> Vec<u8> {
        std::fs::read(self.path("out/copy")).expect("there is always something under the target's name")
    }

    /// The target is the old one, or else a whole copy: true.
    #[track_caller]
    fn is_new(&self) -> bool {
        let target = self.target();
        target != OLD && trail::check(&target) > 0
    }

    /// The writer is well, and nothing stands in the next backup's way, or stays after it.
    #[track_caller]
    fn all_goes_on(&self, what: &str) {
        self.typist.goes_on(2 * trail::BLOCKS);
        assert_eq!(self.typist.failures(), [0; 0], "{what}: a write failed");
        Running::start(&mut self.command("60")).ended().succeeds();
        assert!(self.is_new(), "{what}");
        assert_eq!(support::names(&self.path("out")), ["copy"], "{what}: not swept");
    }
}

fn lines_of(running: &mut Running) -> Receiver<String> {
    let stdout = BufReader::new(running.child().stdout.take().unwrap());
    let (send, lines) = channel();
    // It ends with the child.
    std::thread::spawn(move || stdout.lines().map_while(Result::ok).try_for_each(|line| send.send(line)));
    lines
}

fn record(line: &str) -> Value {
    serde_json::from_str(line).unwrap()
}

impl Held {
    /// Waits until it knows of its end, or has ended: where another thread than the copier's is held, by itself.
    #[track_caller]
    fn is_cancelled(&mut self) {
        loop {
            match self.lines.recv_timeout(HANGS) {
                Ok(line) => self.records.push(record(&line)),
                Err(RecvTimeoutError::Disconnected) => return,
                Err(_) => panic!("it does not hear of its end: {:?}", self.records),
            }
            let last = self.records.last().unwrap();
            if last["phase"] == "cancel" || last["message_type"] == "exit_error" {
                return;
            }
        }
    }

    /// Waits for its end; the exit code, and the last record, the only one of its kind.
    #[track_caller]
    fn end_of_any(self) -> (i32, Option<Value>) {
        let Self { running, hold, lines, mut records } = self;
        let code = running.ended().code;
        drop(hold);
        records.extend(lines.iter().map(|line| record(&line)));
        let is_last = |record: &&Value| record["message_type"] == "summary" || record["message_type"] == "exit_error";
        assert!(records.iter().filter(is_last).count() <= 1, "{records:?}");
        (code, records.last().filter(is_last).cloned())
    }

    /// [`Held::end_of_any`] of one that was not killed: it does not end without that record.
    #[track_caller]
    fn end(self, what: &str) -> (i32, Value) {
        let (code, last) = self.end_of_any();
        (code, last.unwrap_or_else(|| panic!("{what}: no last record")))
    }

    /// [`Held::end`] of one that is let go.
    #[track_caller]
    fn let_go(mut self, what: &str) -> (i32, Value) {
        self.hold = None;
        self.end(what)
    }
}

fn is_wide() -> bool {
    std::env::var("DRIVE_BACKUP_SWEEP").is_ok_and(|width| width == "all")
}

/// All places, or `few` of them, the most telling ones.
fn places(few: &[&'static str]) -> Vec<&'static str> {
    if is_wide() { PLACES.to_vec() } else { few.to_vec() }
}

/// Every pair, or for each place the signal whose turn it is.
fn signals() -> Vec<(&'static str, Signal)> {
    const SIGNALS: [Signal; 3] = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP];
    let pairs = PLACES.iter().enumerate();
    pairs
        .flat_map(|(place, &name)| SIGNALS.iter().enumerate().map(move |(turn, &signal)| (place, turn, name, signal)))
        .filter(|(place, turn, ..)| is_wide() || place % 3 == *turn)
        .map(|(.., name, signal)| (name, signal))
        .collect()
}

/// What the last record says of the target when a run is interrupted there and never comes back.
fn state_at(place: &str) -> &'static str {
    match place {
        "Opened" | "Frozen" => "untouched",
        "Renamed" | "Published" => "old_or_complete",
        _ => "removed",
    }
}

/// Interrupts a backup that hangs at `place`. Did it say what the target is, and is nothing else left?
fn tells_its_target(place: &str, signal: Signal) -> bool {
    let (what, scene) = (format!("{signal} at {place}"), Scene::new());
    let mut held = scene.held(place, "60");
    held.running.signal(signal);
    held.is_cancelled();
    // At once: the first one would give it some time.
    held.running.signal(Signal::SIGINT);
    let (code, last) = held.end_of_any();
    assert_eq!(code, 128 + signal as i32, "{what}: {last:?}");
    assert_eq!(scene.is_new(), state_at(place) == "old_or_complete", "{what}: {last:?}");
    let found = support::names(&scene.path("out"));
    scene.all_goes_on(&what);
    println!("{what}: {last:?}, {found:?}");
    let Some(last) = last else { return false };
    assert_eq!((&last["exit_code"], &last["reason"]), (&code.into(), &"signal".into()), "{what}: {last}");
    // What the name had before stays beside it until the folder was flushed.
    let left: &[&str] = if place == "Renamed" { &[PARTIAL, "copy"] } else { &["copy"] };
    last["target_state"] == state_at(place) && found == left
}

/// A busy machine may be too late to undo it and to say so, but not each time.
#[test]
fn a_signal_at_any_place_ends_a_backup_that_hangs_and_says_what_the_target_is() {
    for (place, signal) in signals() {
        assert!((0..5).any(|_| tells_its_target(place, signal)), "{signal} at {place}");
    }
}

#[test]
fn a_signal_at_any_place_ends_a_backup_in_order() {
    let few = places(&["Frozen", "Capturing", "Flushing", "Publishing"]);
    for (place, signal) in signals().into_iter().filter(|(place, _)| few.contains(place)) {
        let (what, scene) = (format!("{signal} at {place}, let go"), Scene::new());
        let mut held = scene.held(place, "60");
        held.running.signal(signal);
        held.is_cancelled();
        let (code, last) = held.let_go(&what);
        assert_eq!(last["exit_code"], code, "{what}: {last}");
        match last["target_state"].as_str() {
            // It was too late to cancel it.
            None => assert!(code == 0 && scene.is_new(), "{what}: {last}"),
            // It was given up before it came back.
            Some("old_or_complete") => assert_eq!(code, 128 + signal as i32, "{what}: {last}"),
            Some(_) => assert!(code == 128 + signal as i32 && !scene.is_new(), "{what}: {last}"),
        }
        let may_be_new = ["Publishing", "Renamed", "Published"].contains(&place);
        assert!(code != 0 || may_be_new, "{what}: {last}");
        scene.all_goes_on(&what);
    }
}

#[test]
fn killed_at_any_place_a_backup_leaves_the_old_target_or_the_whole_copy() {
    for place in places(&["Frozen", "Capturing", "Publishing", "Renamed"]) {
        let scene = Scene::new();
        let held = scene.held(place, "60");
        held.running.signal(Signal::SIGKILL);
        assert_eq!(held.end_of_any(), (137, None), "{place}");
        assert_eq!(scene.is_new(), ["Renamed", "Published"].contains(&place), "{place}");
        scene.all_goes_on(place);
    }
}

#[test]
fn stopped_at_any_place_a_backup_holds_nobody_and_never_publishes_what_it_missed() {
    for place in places(&["Frozen", "Capturing", "Publishing"]) {
        let scene = Scene::new();
        // A busy machine comes to the place within it; then the writer goes on when it is over.
        let held = scene.held(place, "2");
        held.running.signal(Signal::SIGSTOP);
        scene.typist.goes_on(2 * trail::BLOCKS);
        assert_eq!(scene.typist.failures(), [0; 0], "{place}");
        held.running.signal(Signal::SIGCONT);
        let (code, last) = held.let_go(place);
        assert_eq!(last["exit_code"], code, "{place}: {last}");
        assert!([0, 6].contains(&code), "{place}: {last}");
        assert_eq!(scene.is_new(), code == 0, "{place}: {last}");
        if ["Frozen", "Capturing"].contains(&place) {
            assert_eq!((code, &last["reason"]), (6, &"instant_lost".into()), "{place}: {last}");
        }
        scene.all_goes_on(place);
    }
}

/// Servers of NBD in front of a file, `behind`: the daemons of targets.
const DAEMONS: [&str; 2] = ["qemu-nbd", "drive-backup serve"];

fn nbd_target(daemon: &str, folder: &Path) -> (Running, String) {
    let (behind, socket) = (folder.join("behind"), folder.join("nbd"));
    support::sparse_file(&behind, trail::BLOCKS * trail::BLOCK);
    let _ = std::fs::remove_file(&socket);
    let mut command = Command::new("qemu-nbd");
    command.args(["-t", "-f", "raw", "-k", text(&socket), text(&behind)]);
    if daemon != "qemu-nbd" {
        let (address, meet) = (format!("unix:{}", text(&socket)), folder.join("meet-of-target"));
        command = support::command(&["serve", "-q", "--device", text(&behind), "--format", "raw", "--nbd", &address]);
        command.arg("--writer-dir").arg(meet);
    }
    let mut daemon = Running::start(&mut command);
    wait_for("the server", || {
        assert!(!daemon.has_ended());
        UnixStream::connect(&socket).ok()
    });
    (daemon, format!("nbd+unix:///?socket={}", text(&socket)))
}

/// Every daemon at every place, or of each place the one whose turn it is.
fn daemons_at(places: &[&'static str]) -> Vec<(&'static str, &'static str)> {
    let daemons =
        |turn: usize| (0..2).filter(move |&at| is_wide() || (turn + at).is_multiple_of(2)).map(|at| DAEMONS[at]);
    places.iter().enumerate().flat_map(|(turn, &place)| daemons(turn).map(move |daemon| (daemon, place))).collect()
}

/// How a daemon is ended at each of `places`: in every way, or killed and in the way whose turn it is.
fn ends_of_daemons(places: &[&'static str]) -> Vec<(&'static str, &'static str, Signal)> {
    const ORDERLY: [Signal; 3] = [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP];
    let of = |(turn, (daemon, place))| {
        let orderly = (0..3).filter(move |&at| is_wide() || at == turn % 3).map(|at| ORDERLY[at]);
        orderly.chain([Signal::SIGKILL]).map(move |end| (daemon, place, end))
    };
    daemons_at(places).into_iter().enumerate().flat_map(of).collect()
}

impl Scene {
    /// A backup to a daemon that has come to `place`.
    #[track_caller]
    fn held_with_daemon(&self, uri: &str, place: &str, more: &[&str]) -> Held {
        let hold = Hold::at(place, self.folder.path());
        let (disk, meet) = (self.path("disk"), self.path("meet"));
        let mut command = support::command(&["--device", text(&disk), "--target", uri, "--json", "--mode", "existing"]);
        command.args(["--writer-dir", text(&meet), "--overlay", "memory", "--progress-interval", "0.1"]);
        command.args(["--cbw-timeout", "60", "--freeze-timeout", "60", "--format", "raw"]).args(more);
        let mut running = Running::start(command.env("DRIVE_BACKUP_HOLD", hold.variable()));
        let lines = lines_of(&mut running);
        let hold = Some(hold.reached(&mut running));
        Held { running, hold, lines, records: Vec::new() }
    }

    #[track_caller]
    fn writer_is_well(&self, what: &str) {
        self.typist.goes_on(2 * trail::BLOCKS);
        assert_eq!(self.typist.failures(), [0; 0], "{what}");
    }
}

impl Held {
    /// Let go, it comes to stand still, and says so; of a flush it is not known how long it takes.
    #[track_caller]
    fn stalls(&mut self, what: &str) {
        self.hold = None;
        let since = Instant::now();
        while since.elapsed() < HANGS {
            let line = self.lines.recv_timeout(HANGS).unwrap_or_else(|_| panic!("{what}: {:?}", self.records));
            self.records.push(record(&line));
            let last = self.records.last().unwrap();
            if last["phase"] == "flush" || last["seconds_stalled"].as_f64().is_some_and(|seconds| seconds > 0.0) {
                return;
            }
        }
        panic!("{what}: it does not stand still: {:?}", self.records.last());
    }

    /// Its end, which comes soon, and leaves the target incomplete.
    #[track_caller]
    fn ends_incomplete(self, code: i32, reason: &str, what: &str) {
        let since = Instant::now();
        let (found, last) = self.end(what);
        assert_eq!(
            (found, &last["exit_code"], &last["reason"]),
            (code, &code.into(), &reason.into()),
            "{what}: {last}"
        );
        assert_eq!(last["target_state"], "incomplete", "{what}: {last}");
        assert!(since.elapsed() < support::PATIENCE / 3, "{what}: {:?}", since.elapsed());
    }
}

#[test]
fn a_target_whose_daemon_ends_at_any_place_is_incomplete_and_its_writer_goes_on() {
    for (daemon, place, end) in ends_of_daemons(&["Copying", "Flushing", "Verifying"]) {
        let (what, scene) = (format!("{daemon} at {place}, {end}"), Scene::new());
        let (daemon, uri) = nbd_target(daemon, scene.folder.path());
        let held = scene.held_with_daemon(&uri, place, &["--reconnect-delay", "0.1", "--verify"]);
        daemon.signal(end);
        // Asked to, it ends in order, though a client is connected.
        assert_eq!(daemon.ended().code, if end == Signal::SIGKILL { 137 } else { 0 }, "{what}");
        let (code, last) = held.let_go(&what);
        assert_eq!((&last["exit_code"], &last["target_state"]), (&code.into(), &"incomplete".into()), "{what}: {last}");
        assert!(code == 5 || code == 7 && place == "Verifying", "{what}: {last}");
        scene.writer_is_well(&what);
    }
}

#[test]
fn a_target_whose_daemon_stands_still_is_waited_for_and_holds_no_writer() {
    for (daemon, place) in daemons_at(&["Copying", "Flushing"]) {
        let (what, scene) = (format!("{daemon} at {place}"), Scene::new());
        let (daemon, uri) = nbd_target(daemon, scene.folder.path());
        let mut held = scene.held_with_daemon(&uri, place, &[]);
        daemon.signal(Signal::SIGSTOP);
        held.stalls(&what);
        scene.writer_is_well(&what);
        daemon.signal(Signal::SIGCONT);
        let (code, last) = held.end(&what);
        assert_eq!((code, &last["exit_code"], &last["durable"]), (0, &0.into(), &true.into()), "{what}: {last}");
        trail::check(&std::fs::read(scene.path("behind")).unwrap());
    }
}

#[test]
fn a_target_whose_daemon_stands_still_is_given_up_on_request_and_serves_the_next_one() {
    for (daemon, place) in daemons_at(&["Flushing", "Copying"]) {
        let (what, scene) = (format!("{daemon} at {place}"), Scene::new());
        let (daemon, uri) = nbd_target(daemon, scene.folder.path());
        let mut held = scene.held_with_daemon(&uri, place, &[]);
        daemon.signal(Signal::SIGSTOP);
        held.stalls(&what);
        held.running.signal(Signal::SIGTERM);
        held.ends_incomplete(143, "signal", &what);
        daemon.signal(Signal::SIGCONT);
        let (code, last) = scene.held_with_daemon(&uri, place, &[]).let_go(&what);
        assert_eq!((code, &last["exit_code"]), (0, &0.into()), "{what}: {last}");
        scene.writer_is_well(&what);
    }
}

#[test]
fn a_target_whose_daemon_stands_still_is_given_up_in_time() {
    let places: &[&str] = if is_wide() { &["Copying", "Flushing"] } else { &["Copying"] };
    for (daemon, place) in daemons_at(places) {
        let (what, scene) = (format!("{daemon} at {place}"), Scene::new());
        let (daemon, uri) = nbd_target(daemon, scene.folder.path());
        // It has to come to the place before, on a busy machine too.
        let mut held = scene.held_with_daemon(&uri, place, &["--timeout", "6"]);
        daemon.signal(Signal::SIGSTOP);
        held.hold = None;
        held.ends_incomplete(10, "deadline", &what);
        scene.writer_is_well(&what);
    }
}
