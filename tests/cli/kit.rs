//! A folder with a disk to copy, a backup under way, and bounded waits for what it does.

use serde_json::Value;
use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::LazyLock;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// Longer than anything here takes on a busy machine.
pub const BOUND: Duration = Duration::from_secs(30);
pub const DISK: u64 = 16 << 20;

pub const BINARY: &str = env!("CARGO_BIN_EXE_drive-backup");

/// A folder with a raw disk `disk.raw` that has no zeroes.
pub struct Bench {
    pub folder: TempDir,
}

impl Bench {
    pub fn new() -> Self {
        // Not on a tmpfs, which some of the tests mount for themselves.
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        static BYTES: LazyLock<Vec<u8>> = LazyLock::new(noise);
        fs::write(folder.path().join("disk.raw"), &*BYTES).unwrap();
        Self { folder }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// drive-backup in this folder, disk.raw to out.raw, and whatever is added. Nothing of this process's surroundings
    /// decides what it shows.
    pub fn backup(&self) -> Command {
        let mut command = self.bare();
        command.args(["--device", "disk.raw", "--target", "out.raw"]);
        command
    }

    pub fn bare(&self) -> Command {
        let mut command = undisturbed(BINARY);
        command.current_dir(&self.folder).env_remove("JOURNAL_STREAM").env_remove("NO_COLOR").stdin(Stdio::null());
        command
    }

    /// Everything in the folder but the disk.
    pub fn leftovers(&self) -> Vec<String> {
        let names = fs::read_dir(&self.folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
        names.filter(|name| name != "disk.raw").collect()
    }

    pub fn assert_copied(&self, name: &str) {
        assert!(fs::read(self.path("disk.raw")).unwrap() == fs::read(self.path(name)).unwrap(), "{name} differs");
    }
}

/// `program`, with the signals that this process may have been started to ignore (`cargo test &`) as by default.
pub fn undisturbed(program: &str) -> Command {
    let mut command = Command::new("env");
    command.args(["--default-signal", program]);
    command
}

/// Bytes without a run of zeroes (xorshift64).
fn noise() -> Vec<u8> {
    let mut state = 0x2545_f491_4f6c_dd1d_u64;
    let words = (0..DISK / 8).flat_map(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.collect()
}

/// A child that is killed when a test fails.
pub struct Running {
    pub child: Child,
}

impl Running {
    pub fn start(command: &mut Command) -> Self {
        Self { child: command.spawn().unwrap() }
    }

    pub fn signal(&self, signal: i32) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::from_named_raw(signal).unwrap()).unwrap();
    }

    pub fn wait(&mut self) -> ExitStatus {
        self.wait_for(BOUND)
    }

    pub fn wait_for(&mut self, bound: Duration) -> ExitStatus {
        let end = Instant::now() + bound;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < end, "still runs after {bound:?}");
            thread::sleep(Duration::from_millis(2));
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The JSON lines of a child, one by one, each within the bound.
pub struct Records(Receiver<String>);

impl Records {
    pub fn of(running: &mut Running) -> Self {
        Self::from(running.child.stdout.take().unwrap())
    }

    pub fn from(end: impl Read + Send + 'static) -> Self {
        let (send, lines) = channel();
        // It ends with the child, or with the test.
        thread::spawn(move || BufReader::new(end).lines().try_for_each(|line| send.send(line.unwrap())));
        Self(lines)
    }

    pub fn until(&mut self, what: impl Fn(&Value) -> bool) -> Value {
        self.find(what).expect("it ended without the record")
    }

    /// Copying is under way.
    pub fn until_copying(&mut self) -> Value {
        self.until(|record| record["phase"] == "copy" && record["bytes_done"].as_u64() > Some(0))
    }
}

impl Iterator for Records {
    type Item = Value;

    fn next(&mut self) -> Option<Value> {
        match self.0.recv_timeout(BOUND) {
            Ok(line) => Some(serde_json::from_str(&line).expect("a line is a JSON object")),
            Err(RecvTimeoutError::Disconnected) => None,
            Err(RecvTimeoutError::Timeout) => panic!("no record and no end within {BOUND:?}"),
        }
    }
}

/// Every line of a run that is over, checked for what holds of all runs.
pub fn records(output: &[u8]) -> Vec<Value> {
    let text = std::str::from_utf8(output).unwrap();
    let records: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let is_last = |record: &&Value| matches!(record["message_type"].as_str().unwrap(), "summary" | "exit_error");
    assert_eq!(records.iter().filter(is_last).count(), 1, "{text}");
    let last = records.last().unwrap();
    assert!(is_last(&last), "{text}");
    assert_none_is_lost(&records);
    for record in &records {
        assert_eq!(record["schema"], 1);
        assert_eq!(record["job"], last["job"]);
        let time = record["time"].as_str().unwrap();
        assert!(time.len() == "2026-01-01T00:00:00.000Z".len() && time.ends_with('Z'), "{time}");
    }
    records
}

/// Panics if a record is missing that the last one does not own up to: statuses make room for newer ones.
#[track_caller]
pub fn assert_none_is_lost(records: &[Value]) {
    let seqs: Vec<u64> = records.iter().map(|record| record["seq"].as_u64().unwrap()).collect();
    let last = records.last().unwrap();
    let missing = seqs[seqs.len() - 1] + 1 - seqs.len() as u64;
    assert!(seqs.is_sorted_by(|one, next| one < next), "{seqs:?}");
    assert_eq!((&last["status_dropped"], &last["events_dropped"]), (&missing.into(), &0.into()), "{seqs:?}: {last}");
}

/// The first record of this type; a slow run has told of its status before.
#[track_caller]
pub fn first<'a>(records: &'a [Value], message_type: &str) -> &'a Value {
    records.iter().find(|record| record["message_type"] == message_type).expect(message_type)
}

/// Waits for something that has no event.
pub fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let end = Instant::now() + BOUND;
    while !is_so() {
        assert!(Instant::now() < end, "{what}: not after {BOUND:?}");
        thread::sleep(Duration::from_millis(2));
    }
}

/// As a shell would show it.
pub fn code(status: ExitStatus) -> i32 {
    status.code().or(status.signal().map(|signal| 128 + signal)).unwrap()
}

/// A small tmpfs, unmounted on drop.
pub struct Tmpfs(PathBuf);

impl Tmpfs {
    pub fn at(path: &Path, size: u64) -> Self {
        fs::create_dir_all(path).unwrap();
        let options = format!("size={size}");
        let status = Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(path).status().unwrap();
        assert!(status.success(), "mount a tmpfs: run the tests as root");
        Self(path.to_owned())
    }

    pub fn resize(&self, size: u64) {
        let options = format!("remount,size={size}");
        assert!(Command::new("mount").args(["-o", &options]).arg(&self.0).status().unwrap().success());
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").args(["-l"]).arg(&self.0).status();
    }
}
