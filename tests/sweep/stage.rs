//! Where the command runs, and what is looked at when it has ended.

use crate::inject::{self, Calls, Fault, Library, Prepared, When};
use crate::kit;
use crate::rule::{Name, Place, Policy, Promise, Writes};
use crate::support::bytes::{read, scribble, sound};
use crate::support::{self, Ended, Running, names, sparse_file, text};
use crate::trail::{self, Typist};
use drive_backup::image::format::Format;
use nix::sys::signal::Signal;
use serde_json::Value;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;
const OLD: &[u8] = b"what was there before";
/// Seconds that a write waits for a backup at most: more than it takes, whatever the machine does beside it.
const BOUND: u64 = 20;
/// The same where a fault takes longer than the bound.
const SHORT_BOUND: u64 = 1;
/// So much later than its bound a write may end on a busy machine. A fault that is too late is later than both.
const SLACK: Duration = Duration::from_secs(4);
const _: () = assert!(inject::TOO_LATE > SHORT_BOUND * 1000 + SLACK.as_millis() as u64);

/// So slow that writes come before the copier.
const SPEED: &str = "2M";
/// After so many signals there is no limit any more.
const STORM: u64 = 100;

/// How the command is called, and beside whom.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Setup {
    Raw,
    Direct,
    Qcow2,
    Compressed,
    InPlace,
    /// So much that write-back is begun before the end.
    Large,
    Verify,
    Manifest,
    /// Beside a program that writes as fast as it can.
    LiveRaw,
    LiveQcow2,
    LiveInPlace,
    LiveMemory,
}

impl Setup {
    pub fn is_live(self) -> bool {
        matches!(self, Self::LiveRaw | Self::LiveQcow2 | Self::LiveInPlace | Self::LiveMemory)
    }

    fn is_in_place(self) -> bool {
        matches!(self, Self::InPlace | Self::LiveInPlace)
    }

    fn format(self) -> Format {
        match self {
            Self::Qcow2 | Self::Compressed | Self::LiveQcow2 => Format::Qcow2,
            _ => Format::Raw,
        }
    }

    fn flags(self) -> &'static [&'static str] {
        match self {
            Self::Raw | Self::Large | Self::Manifest | Self::LiveRaw | Self::LiveMemory => &[],
            Self::Verify => &["--verify"],
            Self::Direct => &["--direct", "--sparse=never"],
            Self::Qcow2 | Self::LiveQcow2 => &["--cluster-size", "4K"],
            Self::Compressed => &["--compress", "zstd"],
            Self::InPlace | Self::LiveInPlace => &["--mode", "existing", "--format", "raw"],
        }
    }
}

/// A run to try.
#[derive(Clone, Debug)]
pub struct Case {
    pub setup: Setup,
    pub place: Place,
    pub call: &'static str,
    pub fault: Fault,
    pub policy: Policy,
    pub when: When,
    pub json: bool,
}

pub struct Stage {
    folder: tempfile::TempDir,
    setup: Setup,
}

/// What came of a run.
#[derive(Debug)]
struct Seen {
    ended: Ended,
    /// Of the run's records, with `--json`.
    records: Vec<Value>,
    injected: u64,
    /// What the overlay's policy did to the writer.
    failures: Vec<i32>,
    /// The writer's last write before the run, and at its end.
    written: Option<(u64, u64)>,
}

impl Stage {
    pub fn new(setup: Setup) -> Self {
        let folder = if setup == Setup::Direct { support::folder() } else { kit::memory_folder() };
        let stage = Self { folder, setup };
        std::fs::create_dir(stage.path("overlay")).unwrap();
        let disk = stage.path("disk");
        match setup {
            Setup::Large => {
                sparse_file(&disk, 20 * MIB);
                scribble(&disk, 0, 20 << 20);
            }
            _ if setup.is_live() => trail::create(&disk),
            // Runs of data of many lengths, and holes between them.
            _ => {
                sparse_file(&disk, 3 * MIB);
                (0..12).for_each(|n| scribble(&disk, n * 128 * 1024, (4 + 6 * n as usize) << 10));
                scribble(&disk, 2 * MIB, 1 << 20);
            }
        }
        stage
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn target(&self) -> PathBuf {
        self.path("out").join("copy")
    }

    fn manifest(&self) -> PathBuf {
        self.path("proofs").join("manifest")
    }

    fn length(&self) -> u64 {
        std::fs::metadata(self.path("disk")).unwrap().len()
    }

    /// What the target holds before a run.
    fn old(&self) -> Vec<u8> {
        if self.setup.is_in_place() { vec![0xA5; self.length() as usize] } else { OLD.to_vec() }
    }

    fn reset(&self) {
        for folder in ["out", "proofs"].map(|name| self.path(name)) {
            let _ = std::fs::remove_dir_all(&folder);
            std::fs::create_dir(folder).unwrap();
        }
        let _ = std::fs::remove_file(self.path("counts"));
        std::fs::write(self.target(), self.old()).unwrap();
    }

    /// Where the calls of a place are seen; `None`: this setup does not have it.
    fn calls(&self, place: Place, kind: &'static str) -> Option<Calls> {
        let [disk, out, overlay, proofs] =
            ["disk", "out", "overlay", "proofs"].map(|name| text(&self.path(name)).to_owned());
        let of = |path: String, thread| Some(Calls { kind, path, thread });
        match place {
            Place::Source => of(disk, Some("!trap")),
            Place::Capture => of(disk, Some("trap")),
            Place::ReadBack if self.setup != Setup::Verify => None,
            // By a name that other threads can't take away.
            Place::ReadBack if kind == "open" => of("/proc/self/fd/*".to_owned(), None),
            Place::ReadBack | Place::Target => of(format!("{out}/.copy*"), None),
            Place::Folder => of(out, None),
            Place::Existing | Place::Old if (place == Place::Existing) != self.setup.is_in_place() => None,
            Place::Existing | Place::Old => of(format!("{out}/copy"), None),
            Place::Manifest => of(format!("{proofs}/*"), None),
            Place::ManifestFolder => of(proofs, None),
            Place::Overlay => of(format!("{overlay}*"), None),
            Place::Memory => of("/memfd:drive-backup-overlay*".to_owned(), None),
            Place::Ring => of("/memfd:drive-backup-ring*".to_owned(), None),
            Place::Bitmap => of("/memfd:drive-backup-free*".to_owned(), None),
        }
    }

    /// The places where a call of the trace is seen.
    pub fn places(&self, kind: &'static str, line: &str) -> Vec<Place> {
        let is_there = |&place: &Place| self.calls(place, kind).is_some_and(|calls| calls.count(line) == 1);
        Place::ALL.into_iter().filter(is_there).collect()
    }

    /// Beside a writer the copy has this `speed`.
    fn arguments(&self, speed: &str, policy: Policy, bound: u64, json: bool) -> Vec<String> {
        let (disk, target, meet) = (self.path("disk"), self.target(), self.path("meet"));
        let (overlay, manifest, bound) = (self.path("overlay"), self.manifest(), bound.to_string());
        let mut arguments = vec!["--device", text(&disk), "--target", text(&target), "--writer-dir", text(&meet)];
        arguments.extend([
            "--source-format",
            "raw",
            "--workers",
            "1",
            "--cbw-timeout",
            &bound,
            "--freeze-timeout",
            "60",
        ]);
        arguments.extend(["--overlay", if self.setup == Setup::LiveMemory { "memory" } else { text(&overlay) }]);
        if self.setup.is_live() {
            arguments.extend(["--snapshot", "overlay", "--speed", speed]);
        }
        arguments.extend(self.setup.flags().iter().chain(policy.flags()));
        if self.setup.format() == Format::Qcow2 {
            arguments.extend(["--format", "qcow2"]);
        }
        if self.setup == Setup::Manifest {
            arguments.extend(["--manifest", text(&manifest)]);
        }
        if json {
            arguments.push("--json");
        }
        arguments.into_iter().map(str::to_owned).collect()
    }

    fn typist(&self) -> Option<Typist> {
        self.setup.is_live().then(|| Typist::start(&self.path("disk"), &self.path("meet")))
    }

    /// Every call of a good run.
    pub fn trace(&self, library: &Library) -> String {
        self.reset();
        let typist = self.typist();
        let _ = std::fs::remove_file(self.path("trace"));
        let arguments = self.arguments(SPEED, Policy::Default, BOUND, false);
        let mut prepared = library.command(&arguments, self.folder.path()).tracing();
        Running::start(&mut prepared.command).ended().succeeds();
        drop(typist);
        prepared.trace()
    }

    /// How many calls a good run makes.
    pub fn count(&self, trace: &str, place: Place, call: &'static str) -> u64 {
        self.calls(place, call).map_or(0, |calls| calls.count(trace))
    }

    /// Tries `case`. What it was, if the fault happened; panics unless it was what is promised.
    pub fn judge(&self, library: &Library, case: &Case, promise: Promise) -> bool {
        let seen = self.run(library, case);
        let happened = seen.injected > 0;
        // A busy machine can be too late by itself, before the chosen call.
        let is_late = case.fault == Fault::TooLate && (seen.ended.code != 0 || !seen.failures.is_empty());
        let promise = if happened || is_late { promise } else { crate::rule::COMPLETE };
        let what = format!("{case:?} in {}, seen {seen:?}, promised {promise:?}", self.folder.path().display());
        assert_eq!(seen.ended.code, promise.code, "{what}");
        seen.says_so(promise, case, &what);
        self.look_at_target(promise, &seen, &what);
        if let Some((_, last)) = seen.written {
            assert_eq!(trail::check(&read(&self.path("disk"))), last, "{what}: a write is lost");
            match promise.writes {
                Writes::Done => assert_eq!(seen.failures, [0; 0], "{what}"),
                Writes::Refused => {
                    let errno = case.fault.errno().unwrap_or(nix::libc::ETIMEDOUT);
                    let failures = &seen.failures;
                    assert!(!failures.is_empty() && failures.iter().all(|&e| e == errno), "{what}");
                }
            }
        }
        assert_eq!(names(&self.path("overlay")), [""; 0], "{what}");
        happened
    }

    fn run(&self, library: &Library, case: &Case) -> Seen {
        self.reset();
        let typist = self.typist();
        let before = typist.as_ref().map(Typist::written);
        let bound = if case.fault == Fault::TooLate { SHORT_BOUND } else { BOUND };
        let arguments = self.arguments(SPEED, case.policy, bound, case.json);
        let prepared = library.command(&arguments, self.folder.path());
        let calls = self.calls(case.place, case.call).expect("a place of this setup");
        let mut prepared = prepared.with(&calls, case.fault, case.when);
        let (ended, records) = ended(&mut prepared, case.json);
        let mut failures = Vec::new();
        let written = typist.zip(before).map(|(typist, before)| {
            typist.goes_on(2 * trail::BLOCKS);
            failures = typist.failures();
            let longest = typist.longest();
            assert!(longest < Duration::from_secs(bound) + SLACK, "{case:?}: a write took {longest:?} of {bound} s");
            (before, typist.end())
        });
        Seen { ended, records, injected: prepared.injected(), failures, written }
    }

    /// A run whose process gets one signal after the other; how many there were.
    pub fn endures(&self, signal: Signal) -> u64 {
        self.reset();
        let typist = self.typist();
        let before = typist.as_ref().map(Typist::written);
        let arguments = self.arguments("64K", Policy::Default, BOUND, true);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        let mut running = Running::drive_backup(&arguments);
        let mut lines = BufReader::new(running.child().stdout.take().unwrap()).lines().map(Result::unwrap);
        // Before that it may not listen yet, and signals that nobody handles are fatal.
        let mut records = vec![lines.next().unwrap()];
        let rest = std::thread::spawn(move || lines.collect::<Vec<_>>());
        let mut sent = 0;
        while !running.has_ended() {
            running.signal(signal);
            sent += 1;
            if sent == STORM {
                running.signal(Signal::SIGUSR2);
            }
            std::thread::yield_now();
        }
        let ended = running.ended();
        records.extend(rest.join().unwrap());
        let records = records.iter().map(|line| serde_json::from_str(line).unwrap()).collect();
        let written = typist.zip(before).map(|(typist, before)| (before, typist.end()));
        assert_eq!(ended.code, 0, "{ended:?}");
        let seen = Seen { ended, records, injected: 0, failures: Vec::new(), written };
        assert_eq!(seen.records.last().unwrap()["exit_code"], 0, "{seen:?}");
        self.look_at_target(crate::rule::COMPLETE, &seen, "a storm of signals");
        sent
    }

    fn look_at_target(&self, promise: Promise, seen: &Seen, what: &str) {
        let beside: &[&str] = match promise.name {
            Name::CopyBesideOld => &[".copy.drive-backup-partial", "copy"],
            Name::OldBesideBad => &["copy", "copy.drive-backup-bad"],
            _ => &["copy"],
        };
        assert_eq!(names(&self.path("out")), beside, "{what}");
        let is_proved = self.setup == Setup::Manifest && matches!(promise.code, 0 | 3);
        assert_eq!(names(&self.path("proofs")).len(), usize::from(is_proved), "{what}");
        match promise.name {
            Name::Old | Name::OldBesideBad => assert!(read(&self.target()) == self.old(), "{what}"),
            Name::Incomplete => assert_eq!(read(&self.target()).len() as u64, self.length(), "{what}"),
            Name::Copy | Name::CopyBut | Name::CopyAlone | Name::CopyBesideOld => {
                if is_proved {
                    let manifest: Value = serde_json::from_slice(&read(&self.manifest())).unwrap();
                    let whole = blake3::hash(&read(&self.path("disk"))).to_hex();
                    assert_eq!(manifest["blake3"], whole.as_str(), "{what}");
                }
                let copy = kit::disk_of(&self.target(), self.setup.format(), self.length());
                if self.setup.format() == Format::Qcow2 {
                    sound(&self.target());
                }
                match seen.written {
                    Some((before, last)) => {
                        let instant = trail::check(&copy);
                        assert!((before..=last).contains(&instant), "{what}: the copy is of {instant}");
                    }
                    None => kit::same(what, &copy, &self.expected(promise, seen)),
                }
            }
        }
    }

    /// The source, but for the ranges that the summary lists.
    fn expected(&self, promise: Promise, seen: &Seen) -> Vec<u8> {
        let mut expected = read(&self.path("disk"));
        if promise.name == Name::CopyBut {
            let old = if self.setup.is_in_place() { self.old() } else { vec![0; expected.len()] };
            let last = seen.records.last().expect("told in JSON");
            let number = |value: &Value| value.as_u64().unwrap() as usize;
            let listed = |field| last[field].as_array().unwrap().iter();
            let lost = |range: &Value| number(&range["offset"])..number(&range["offset"]) + number(&range["length"]);
            listed("unreadable").map(lost).for_each(|range| expected[range].fill(0));
            for range in listed("skipped").map(lost) {
                expected[range.clone()].copy_from_slice(&old[range]);
            }
            assert!(listed("unreadable").chain(listed("skipped")).count() > 0, "{last}");
        }
        expected
    }
}

/// Runs to the end; a job that stops for an error is resumed.
fn ended(prepared: &mut Prepared, json: bool) -> (Ended, Vec<Value>) {
    let mut running = Running::start(&mut prepared.command);
    if !json {
        return (running.ended(), Vec::new());
    }
    let stdout = BufReader::new(running.child().stdout.take().unwrap());
    let (sender, lines) = mpsc::channel();
    std::thread::spawn(move || stdout.lines().map(Result::unwrap).try_for_each(|line| sender.send(line)));
    let mut records: Vec<Value> = Vec::new();
    let since = Instant::now();
    loop {
        // One that hangs still tells its status.
        let line = match lines.recv_timeout(kit::HANGS.saturating_sub(since.elapsed())) {
            Ok(line) => line,
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => panic!("{:?} does not end: {records:?}", prepared.command),
        };
        let record: Value = serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line}"));
        if record["message_type"] == "error" && record["action"] == "stop" {
            running.signal(Signal::SIGCONT);
        }
        records.push(record);
    }
    (running.ended(), records)
}

impl Seen {
    /// One line on stderr, or one last record, that agree with the outcome.
    fn says_so(&self, promise: Promise, case: &Case, what: &str) {
        let stderr = &self.ended.stderr;
        assert!(stderr.lines().all(|line| line.starts_with("drive-backup: ")), "{what}");
        if !case.json {
            assert!(self.ended.stdout.is_empty(), "{what}");
            let lines = match promise.name {
                // Where it could not be read is told of, too.
                Name::OldBesideBad => 1..=2,
                Name::CopyBesideOld => 1..=1,
                _ => usize::from(promise.code != 0)..=usize::from(promise.code != 0),
            };
            assert!(lines.contains(&stderr.lines().count()), "{what}");
            return;
        }
        let is_last = |record: &&Value| record["message_type"] == "summary" || record["message_type"] == "exit_error";
        assert_eq!(self.records.iter().filter(is_last).count(), 1, "{what}");
        let last = self.records.last().filter(is_last).unwrap_or_else(|| panic!("{what}: the last record is not last"));
        assert_eq!(last["exit_code"], promise.code, "{what}");
        let is_success = matches!(promise.code, 0 | 3);
        assert_eq!(last["message_type"] == "summary", is_success, "{what}");
        let begun = self.records.iter().any(|record| record["message_type"] == "start");
        match promise.name {
            Name::Copy | Name::CopyBut | Name::CopyBesideOld => assert!(last.get("target_state").is_none(), "{what}"),
            Name::CopyAlone => assert_eq!(last["target_state"], "complete", "{what}"),
            Name::OldBesideBad => assert_eq!(last["target_state"], "kept_bad", "{what}"),
            Name::Incomplete => assert_eq!(last["target_state"], "incomplete", "{what}"),
            Name::Old => {
                assert_eq!(last["target_state"], if begun { "removed" } else { "untouched" }, "{what}");
            }
        }
        if !is_success && last["writer_released"] != Value::Null {
            assert_eq!(last["writer_released"], true, "{what}");
        }
    }
}
