//! A target that hangs: a signal ends the run within a second all the same, and says what is left.

use crate::kit::{Bench, DISK, Records, Running, wait_until};
use nix::libc::{SIGCONT, SIGINT, SIGSTOP, SIGTERM};
use serde_json::Value;
use std::fs::{self, File};
use std::io::PipeReader;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

const A_SECOND: Duration = Duration::from_secs(1);

fn is_stalled(record: &Value) -> bool {
    record["phase"] == "copy" && record["seconds_stalled"].as_u64() > Some(0)
}

/// Ends it. Was that before `bound`, with a last record?
fn ends_before(bound: Instant, signal: i32, backup: &mut Running, records: Records) -> bool {
    backup.signal(signal);
    let status = backup.wait();
    let in_time = Instant::now() < bound;
    assert_eq!(status.signal(), Some(signal), "{status}");
    let last = records.last();
    println!("in time: {in_time}, {last:?}");
    let Some(last) = last.filter(|last| last["message_type"] == "exit_error") else { return false };
    assert_eq!((&last["reason"], &last["exit_code"]), (&"signal".into(), &(128 + signal).into()), "{last}");
    assert_eq!(last["target_state"], "incomplete", "{last}");
    assert!(last["message"].as_str().unwrap().contains("INCOMPLETE"), "{last}");
    in_time
}

/// Who waits too long does each time; who does not may be late on a busy machine, but not each time.
fn is_once(mut what: impl FnMut() -> bool) -> bool {
    (0..10).any(|_| what())
}

/// A stream that nobody reads: the writer hangs in write(2).
fn unread_stream(bench: &Bench) -> (Running, Records, PipeReader) {
    let (read, write) = std::io::pipe().unwrap();
    let mut command = bench.bare();
    command.args(["--device", "disk.raw", "--target", "-", "--json", "--progress-interval", "0.1"]);
    let mut backup = Running::start(command.stdout(write).stderr(Stdio::piped()));
    let mut records = Records::from(backup.child.stderr.take().unwrap());
    records.until(is_stalled);
    (backup, records, read)
}

#[test]
fn a_stream_that_nobody_reads_is_left_within_a_second() {
    let bench = Bench::new();
    for signal in [SIGINT, SIGTERM] {
        let ended = is_once(|| {
            let (mut backup, records, _read) = unread_stream(&bench);
            ends_before(Instant::now() + A_SECOND, signal, &mut backup, records)
        });
        assert!(ended, "{signal}: it takes longer than a second, or says nothing");
    }
}

/// Two interrupts. Did it end within `bound` from the first one on?
fn interrupted_twice(bench: &Bench, bound: Duration) -> bool {
    let (mut backup, mut records, _read) = unread_stream(bench);
    let bound = Instant::now() + bound;
    backup.signal(SIGINT);
    // The first one was taken: two at once may merge into one.
    records.any(|record| record["phase"] == "cancel") && ends_before(bound, SIGINT, &mut backup, records)
}

/// Who waits for the grace never ends before it is over.
#[test]
fn a_second_interrupt_ends_a_hung_run_at_once() {
    const GRACE: Duration = Duration::from_millis(600);
    let bench = Bench::new();
    assert!(is_once(|| interrupted_twice(&bench, GRACE)), "it waits for the grace");
}

/// The disk of a daemon that can be stopped, as a file: its users hang in the kernel.
struct Export {
    daemon: Running,
}

impl Export {
    fn new(bench: &Bench) -> Self {
        File::create(bench.path("behind.raw")).unwrap().set_len(DISK).unwrap();
        File::create(bench.path("export")).unwrap();
        let export = format!("fuse,id=e,node-name=f,writable=on,mountpoint={}", bench.path("export").display());
        let mut command = Command::new("qemu-storage-daemon");
        command.args(["--blockdev", "file,node-name=f,filename=behind.raw", "--export", &export]);
        let daemon = Running::start(command.current_dir(&bench.folder));
        wait_until("the export", || fs::metadata(bench.path("export")).is_ok_and(|found| found.len() == DISK));
        Self { daemon }
    }
}

impl Drop for Export {
    fn drop(&mut self) {
        // Whoever still hangs on it is let go before it ends.
        self.daemon.signal(SIGCONT);
        self.daemon.signal(SIGTERM);
        self.daemon.wait();
    }
}

/// Stops a process and waits until it is stopped: none of its threads is inside a request then.
fn stop(running: &Running) {
    running.signal(SIGSTOP);
    let tasks = format!("/proc/{}/task", running.child.id());
    let is_stopped = |task: fs::DirEntry| {
        let stat = fs::read_to_string(task.path().join("stat")).unwrap_or_default();
        stat.rsplit(") ").next().is_some_and(|rest| rest.starts_with('T'))
    };
    wait_until("stopped", || fs::read_dir(&tasks).unwrap().all(|task| is_stopped(task.unwrap())));
}

/// Dropped in this order: who hangs on the export can't be killed before it is let go.
struct Hung {
    export: Export,
    backup: Running,
}

/// An interrupt while the target hangs in the kernel. Did it end within a second?
fn interrupted_on_hung_file_system() -> bool {
    let bench = Bench::new();
    let export = Export::new(&bench);
    let flags = ["--device", "disk.raw", "--target", "export", "--mode", "existing", "--speed", "2M", "--json"];
    let mut command = bench.bare();
    command.args(flags).args(["--progress-interval", "0.1"]).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut hung = Hung { export, backup: Running::start(&mut command) };
    let mut records = Records::of(&mut hung.backup);
    records.until_copying();
    // A request that the daemon has begun can't be given up by anybody: it stops between two.
    stop(&hung.backup);
    stop(&hung.export.daemon);
    hung.backup.signal(SIGCONT);
    records.until(is_stalled);
    ends_before(Instant::now() + A_SECOND, SIGINT, &mut hung.backup, records)
}

#[test]
fn a_hung_file_system_is_left_within_a_second() {
    assert!(is_once(interrupted_on_hung_file_system), "it takes longer than a second, or says nothing");
}
