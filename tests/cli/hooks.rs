//! The user's own commands: when they run, what they are told, and what their failure means.

use crate::kit::{Bench, Running, code, records, wait_until};
use drive_backup::writer::Writer;
use nix::libc::{SIGINT, SIGTERM};
use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};

/// Appends what it is told to the file `told`.
const TELL: &str = "echo $DRIVE_BACKUP_HOOK $DRIVE_BACKUP_HOOK_DEVICE $DRIVE_BACKUP_HOOK_TARGET $DRIVE_BACKUP_HOOK_EXIT_CODE \
     $DRIVE_BACKUP_HOOK_REASON $(test -e out.raw && echo there) >> told";

fn told(bench: &Bench) -> Vec<String> {
    fs::read_to_string(bench.path("told")).unwrap_or_default().lines().map(str::to_owned).collect()
}

const ALL: [&str; 8] = ["--hook-before", TELL, "--hook-frozen", TELL, "--hook-after", TELL, "--hook-failed", TELL];

#[test]
fn each_runs_at_its_time_and_is_told_what_it_is_about() {
    let bench = Bench::new();
    assert_eq!(code(bench.backup().args(ALL).output().unwrap().status), 0);
    let expected = ["before disk.raw out.raw", "frozen disk.raw out.raw", "after disk.raw out.raw 0 there"];
    assert_eq!(told(&bench), expected);

    fs::remove_file(bench.path("told")).unwrap();
    fs::remove_file(bench.path("out.raw")).unwrap();
    let failed = bench.backup().args(ALL).args(["--source-format", "qcow2"]).output().unwrap();
    assert_eq!(code(failed.status), 4);
    assert_eq!(told(&bench), ["before disk.raw out.raw", "failed disk.raw out.raw 4 source"]);
}

#[test]
fn each_is_told_a_path_byte_by_byte() {
    let bench = Bench::new();
    let name = |text: &[u8]| OsStr::from_bytes(text).to_owned();
    let (device, target) = (name(b"disk \xff.raw"), name(b"out \xfe.raw"));
    fs::rename(bench.path("disk.raw"), bench.folder.path().join(&device)).unwrap();
    let look =
        "test -e \"$DRIVE_BACKUP_HOOK_DEVICE\" && test \"$DRIVE_BACKUP_HOOK_TARGET\" = \"$(printf 'out \\376.raw')\"";
    let hooks = ["--hook-before", look, "--hook-frozen", look, "--hook-after", look];
    let ended = |more: &[&str]| {
        let mut command = bench.bare();
        command.arg("--device").arg(&device).arg("--target").arg(&target).args(more);
        code(command.output().unwrap().status)
    };
    assert_eq!(ended(&hooks), 0);
    let look = format!("{look} && touch told");
    assert_eq!(ended(&["--source-format", "qcow2", "--hook-failed", &look]), 4);
    assert!(bench.path("told").exists());
}

#[test]
fn both_ends_are_closed_when_the_last_ones_run() {
    let bench = Bench::new();
    // A volume that is open can't be removed.
    let look = "ls -l /proc/$PPID/fd > open && ! grep -e disk.raw -e out.raw open && echo $DRIVE_BACKUP_HOOK >> told";
    assert_eq!(code(bench.backup().args(["--hook-after", look]).output().unwrap().status), 0);
    assert_eq!(told(&bench), ["after"]);

    // Fails once both are open.
    let arguments = ["--hook-frozen", "! ls -l /proc/$PPID/fd | grep disk.raw", "--hook-failed", look];
    assert_eq!(code(bench.backup().args(arguments).output().unwrap().status), 9);
    assert_eq!(told(&bench), ["after", "failed"]);
}

#[test]
fn a_restore_has_them_too() {
    let bench = Bench::new();
    let restore = |image: &str| {
        let hooks = ["--hook-before", TELL, "--hook-after", TELL, "--hook-failed", TELL];
        let output = bench.bare().args(["restore", image, "--target", "out.raw"]).args(hooks).output().unwrap();
        code(output.status)
    };
    assert_eq!(restore("disk.raw"), 0);
    assert_eq!(told(&bench), ["before disk.raw out.raw", "after disk.raw out.raw 0 there"]);
    fs::remove_file(bench.path("told")).unwrap();
    assert_eq!(restore("none.raw"), 4);
    assert_eq!(told(&bench), ["before none.raw out.raw there", "failed none.raw out.raw 4 source there"]);
}

#[test]
fn one_that_fails_before_leaves_everything_untouched() {
    let bench = Bench::new();
    let output = bench.backup().args(ALL).args(["--json"]).output().unwrap();
    assert_eq!(code(output.status), 0);
    fs::write(bench.path("out.raw"), "the old copy").unwrap();
    for (flag, state) in [("--hook-before", "untouched"), ("--hook-frozen", "untouched")] {
        let output = bench.backup().args([flag, "echo said; exit 7", "--json"]).output().unwrap();
        assert_eq!(code(output.status), 9, "{flag}");
        let last = records(&output.stdout).pop().unwrap();
        assert_eq!((&last["reason"], &last["target_state"]), (&"hook".into(), &state.into()));
        let text = String::from_utf8(output.stderr).unwrap();
        let line = format!("drive-backup: {flag} 'echo said; exit 7': ended with exit status: 7\n");
        assert_eq!(text, format!("said\n{line}"));
        assert_eq!(fs::read_to_string(bench.path("out.raw")).unwrap(), "the old copy");
    }
}

#[test]
fn one_that_fails_after_leaves_the_copy_and_says_so() {
    let bench = Bench::new();
    let output = bench.backup().args(["--hook-after", "false", "--json"]).output().unwrap();
    assert_eq!(code(output.status), 9);
    let last = records(&output.stdout).pop().unwrap();
    assert_eq!((&last["message_type"], &last["target_state"]), (&"exit_error".into(), &"complete".into()));
    assert!(String::from_utf8(output.stderr).unwrap().ends_with("exit status: 1; 'out.raw' is complete\n"));
    bench.assert_copied("out.raw");
}

#[test]
fn one_that_fails_after_a_failure_changes_nothing() {
    let bench = Bench::new();
    let output = bench.backup().args(["--hook-failed", "false", "--source-format", "qcow2"]).output().unwrap();
    assert_eq!(code(output.status), 4);
}

#[test]
fn one_that_hangs_is_ended_by_its_bound_or_a_signal() {
    let bench = Bench::new();
    for flag in ["--hook-before", "--hook-after", "--hook-frozen"] {
        let flags = [flag, "sleep 1000", "--hook-timeout", "0.2", "--freeze-timeout", "0.2"];
        let output = bench.backup().args(flags).output().unwrap();
        assert_eq!(code(output.status), 9, "{flag}");
        assert!(String::from_utf8(output.stderr).unwrap().contains("s and was killed"));
    }
    for flag in ["--hook-before", "--hook-after", "--hook-frozen"] {
        let mut command = bench.backup();
        command.args([flag, "touch begun; sleep 1000", "--freeze-timeout", "60"]);
        let mut backup = Running::start(command.stdout(Stdio::null()).stderr(Stdio::null()));
        wait_until("the hook", || bench.path("begun").exists());
        backup.signal(SIGINT);
        assert_eq!(code(backup.wait()), 130, "{flag}");
        fs::remove_file(bench.path("begun")).unwrap();
    }
}

/// It is not waited for; it hears what whoever started the process hears.
#[test]
fn the_one_for_failures_is_told_what_ended_the_run() {
    let bench = Bench::new();
    let heard = || wait_until("the hook", || !told(&bench).is_empty());
    let slow = ["--speed", "64K", "--hook-failed", TELL];
    assert_eq!(code(bench.backup().args(slow).args(["--timeout", "0.3"]).output().unwrap().status), 10);
    heard();
    assert_eq!(told(&bench), ["failed disk.raw out.raw 10 deadline"]);
    fs::remove_file(bench.path("told")).unwrap();
    for (signal, line) in [(SIGINT, "130 signal"), (SIGTERM, "143 signal")] {
        let mut command = bench.backup();
        command.args(slow).args(["--hook-frozen", "touch begun"]);
        let mut backup = Running::start(command.stdout(Stdio::null()).stderr(Stdio::null()));
        wait_until("the copy", || bench.path("begun").exists());
        backup.signal(signal);
        backup.wait();
        heard();
        assert_eq!(told(&bench), [format!("failed disk.raw out.raw {line}")]);
        fs::remove_file(bench.path("told")).unwrap();
        fs::remove_file(bench.path("begun")).unwrap();
    }
}

#[test]
fn nobody_writes_while_the_frozen_one_runs() {
    let bench = Bench::new();
    let (disk, meet) = (bench.path("disk.raw"), bench.path("meet"));
    let writer = Writer::open_in(&disk, &meet).unwrap();
    let (is_over, path) = (Arc::new(AtomicBool::new(false)), bench.path("written"));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (file, mut number) = (File::create(&path).unwrap(), 0_u64);
            while !is_over.load(SeqCst) {
                let _write = writer.begin(0, 1).unwrap();
                number += 1;
                file.write_all_at(&number.to_le_bytes(), 0).unwrap();
            }
        });
        wait_until("a write", || fs::metadata(&path).is_ok_and(|written| written.len() == 8));
        let mut command = bench.backup();
        let hook = "cp written first; sleep 0.3; cmp written first && touch still";
        command
            .args(["--hook-frozen", hook, "--freeze-timeout", "60", "--writer", "required", "--writer-dir"])
            .arg(&meet);
        let output = command.output().unwrap();
        is_over.store(true, SeqCst);
        assert_eq!(code(output.status), 0, "{}", String::from_utf8_lossy(&output.stderr));
        assert!(bench.path("still").exists());
    });
}
