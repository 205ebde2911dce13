//! INT, TERM and HUP cancel; USR1, USR2 and CONT steer.

use crate::kit::{BINARY, BOUND, Bench, DISK, Records, Running, Tmpfs, code, undisturbed};
use nix::libc::{SIGCONT, SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2};
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// A backup that takes minutes, seen copying.
fn slow(bench: &Bench) -> (Running, Records) {
    slow_by(&mut bench.backup())
}

fn slow_by(command: &mut Command) -> (Running, Records) {
    command.args(["--speed", "128K", "--json", "--progress-interval", "0.1"]);
    let mut backup = Running::start(command.stdout(Stdio::piped()).stderr(Stdio::piped()));
    let mut records = Records::of(&mut backup);
    records.until_copying();
    (backup, records)
}

/// Ends it by `signal`. Was that within a second, and was nothing partial left?
fn is_ended_by(signal: i32) -> bool {
    let bench = Bench::new();
    fs::write(bench.path("out.raw"), "the old copy").unwrap();
    let (mut backup, records) = slow(&bench);
    let sent = Instant::now();
    backup.signal(signal);
    let status = backup.wait();
    let took = sent.elapsed();
    assert_eq!(status.signal(), Some(signal), "{status}");
    assert_eq!(fs::read_to_string(bench.path("out.raw")).unwrap(), "the old copy");
    let (last, left) = (records.last(), bench.leftovers());
    println!("{took:?}, {last:?}, {left:?}");
    let Some(last) = last.filter(|last| last["message_type"] == "exit_error") else { return false };
    assert_eq!((&last["reason"], &last["exit_code"]), (&"signal".into(), &(128 + signal).into()), "{last}");
    took < Duration::from_secs(1) && last["target_state"] == "removed" && left == ["out.raw"]
}

/// A busy machine may be late, and have no time to undo it, but not each time.
#[test]
fn each_signal_ends_it_within_a_second_and_removes_the_partial_target() {
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        assert!((0..5).any(|_| is_ended_by(signal)), "{signal}: late, or something partial is left");
    }
}

#[test]
fn signals_that_were_ignored_stay_ignored() {
    for (signal, name) in [(SIGHUP, "HUP"), (SIGINT, "INT")] {
        let bench = Bench::new();
        let line = format!("trap '' {name}; exec {BINARY} --device disk.raw --target out.raw \"$@\"");
        let mut shell = undisturbed("sh");
        shell.args(["-c", &line, "sh"]).current_dir(&bench.folder);
        let (mut backup, mut records) = slow_by(&mut shell);
        backup.signal(signal);
        let done = records.until_copying()["bytes_done"].as_u64();
        records.until(|record| record["phase"] == "copy" && record["bytes_done"].as_u64() > done);
        backup.signal(SIGTERM);
        assert_eq!(backup.wait().signal(), Some(SIGTERM), "{name} did not end it");
    }
}

#[test]
fn a_status_is_printed_on_request_and_only_then() {
    let bench = Bench::new();
    let (mut backup, mut records) = slow(&bench);
    backup.signal(SIGUSR1);
    let mut lines = BufReader::new(backup.child.stderr.take().unwrap()).lines();
    let line = lines.next().unwrap().unwrap();
    assert!(line.starts_with("drive-backup: ") && line.contains(" %, ") && line.contains("of 16.0 MiB"), "{line}");
    records.until(|record| record["message_type"] == "status");
    backup.signal(SIGTERM);
    backup.wait();
    let rest: Vec<String> = lines.map(Result::unwrap).collect();
    assert!(rest.len() == 1 && rest[0].contains("ended by SIGTERM"), "{rest:?}");
}

#[test]
fn the_speed_limit_is_turned_off_and_the_rest_takes_no_time() {
    let bench = Bench::new();
    let (mut backup, mut records) = slow(&bench);
    backup.signal(SIGUSR2);
    records.until(|record| record["speed_limit"].is_null());
    assert_eq!(code(backup.wait()), 0);
    bench.assert_copied("out.raw");
    let mut people = BufReader::new(backup.child.stderr.take().unwrap()).lines();
    assert!(people.any(|line| line.unwrap().contains("speed limit off")));
}

#[test]
fn a_stopped_job_goes_on_with_cont() {
    let bench = Bench::new();
    let small = Tmpfs::at(&bench.path("small"), DISK / 2);
    let flags = ["--device", "disk.raw", "--target", "small/out.raw", "--on-target-error", "stop", "--json"];
    let mut command = bench.bare();
    let mut backup = Running::start(command.args(flags).stdout(Stdio::piped()).stderr(Stdio::piped()));
    let mut records = Records::of(&mut backup);
    let fault = records.until(|record| record["message_type"] == "error");
    assert_eq!((&fault["action"], &fault["fatal"], &fault["errno"]), (&"stop".into(), &false.into(), &"ENOSPC".into()));
    records.until(|record| record["status"] == "paused");
    let mut people = BufReader::new(backup.child.stderr.take().unwrap()).lines();
    let line = people.next().unwrap().unwrap();
    assert!(line.contains("No space left on device; stopped; press Enter to go on, or send SIGCONT to"), "{line}");
    small.resize(2 * DISK);
    backup.signal(SIGCONT);
    assert_eq!(code(backup.wait()), 0);
    let last = records.last().unwrap();
    assert_eq!((&last["result"], &last["bytes_done"]), (&"complete".into(), &DISK.into()));
    bench.assert_copied("small/out.raw");
}

/// Ends one that is stopped. Was nothing partial left?
fn is_ended_when_stopped() -> bool {
    let bench = Bench::new();
    let _small = Tmpfs::at(&bench.path("small"), DISK / 2);
    let flags = ["--device", "disk.raw", "--target", "small/out.raw", "--on-target-error", "enospc", "--json"];
    let mut backup = Running::start(bench.bare().args(flags).stdout(Stdio::piped()).stderr(Stdio::null()));
    let mut records = Records::of(&mut backup);
    records.until(|record| record["status"] == "paused");
    let sent = Instant::now();
    backup.signal(SIGTERM);
    assert_eq!(backup.wait().signal(), Some(SIGTERM));
    assert!(sent.elapsed() < BOUND / 3, "{:?}", sent.elapsed());
    fs::read_dir(bench.path("small")).unwrap().count() == 0
}

/// A busy machine may have no time to undo it, but not each time.
#[test]
fn a_stopped_job_can_be_ended() {
    assert!((0..5).any(|_| is_ended_when_stopped()), "something partial is left");
}
