//! JSON lines: every one parses, exactly one ends a run, for every way to end.

use crate::kit::{Bench, DISK, Records, Running, Tmpfs, code, first, records};
use serde_json::Value;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::process::Stdio;

fn last_of(bench: &Bench, flags: &[&str]) -> (i32, Vec<Value>) {
    let output = bench.bare().args(flags).arg("--json").output().unwrap();
    (code(output.status), records(&output.stdout))
}

#[test]
fn a_good_run_starts_reports_and_sums_up() {
    let bench = Bench::new();
    let flags = ["--device", "disk.raw", "--target", "out.raw", "--speed", "16M", "--progress-interval", "0.1"];
    let (code, records) = last_of(&bench, &flags);
    assert_eq!(code, 0);
    bench.assert_copied("out.raw");

    let start = first(&records, "start");
    assert_eq!((&start["device"]["path"], &start["device"]["format"]), (&"disk.raw".into(), &"raw".into()));
    assert_eq!((&start["device"]["virtual_size"], &start["target"]["kind"]), (&DISK.into(), &"file".into()));
    assert_eq!((&start["speed_limit"], &start["version"]), (&(16 << 20).into(), &env!("CARGO_PKG_VERSION").into()));

    let statuses: Vec<&Value> = records.iter().filter(|record| record["message_type"] == "status").collect();
    assert!(!statuses.is_empty());
    let percents: Vec<f64> = statuses.iter().map(|status| status["percent_done"].as_f64().unwrap()).collect();
    assert!(percents.is_sorted() && percents.iter().all(|percent| (0.0..1.0).contains(percent)), "{percents:?}");

    let summary = records.last().unwrap();
    assert_eq!((&summary["result"], &summary["exit_code"]), (&"complete".into(), &0.into()));
    assert_eq!((&summary["bytes_done"], &summary["total_bytes"]), (&DISK.into(), &DISK.into()));
    assert_eq!((&summary["durable"], &summary["consistent"]), (&true.into(), &true.into()));
}

#[test]
fn without_fsync_nothing_is_called_durable() {
    let bench = Bench::new();
    let (code, records) = last_of(&bench, &["--device", "disk.raw", "--target", "out.raw", "--no-fsync"]);
    assert_eq!((code, &records.last().unwrap()["durable"]), (0, &false.into()));
}

#[test]
fn failures_name_their_side_in_code_and_record() {
    let bench = Bench::new();
    for (device, target, exit_code, reason) in [
        ("nowhere.raw", "out.raw", 4, "source"),
        (".", "out.raw", 4, "source"),
        ("disk.raw", "no/such/folder/out.raw", 5, "target"),
        ("disk.raw", "disk.raw", 2, "usage"),
    ] {
        let (code, records) = last_of(&bench, &["--device", device, "--target", target]);
        let last = records.last().unwrap();
        assert_eq!((code, &last["exit_code"]), (exit_code, &exit_code.into()), "{last}");
        assert_eq!((&last["message_type"], &last["reason"]), (&"exit_error".into(), &reason.into()), "{last}");
        assert!(bench.leftovers().is_empty());
    }
}

#[test]
fn a_full_target_is_exit_5_and_leaves_nothing() {
    let bench = Bench::new();
    let _small = Tmpfs::at(&bench.path("small"), DISK / 4);
    let (code, records) = last_of(&bench, &["--device", "disk.raw", "--target", "small/out.raw"]);
    assert_eq!(code, 5);
    let fault = records.iter().find(|record| record["message_type"] == "error").unwrap();
    assert_eq!((&fault["side"], &fault["errno"]), (&"target".into(), &"ENOSPC".into()));
    assert_eq!((&fault["action"], &fault["fatal"]), (&"report".into(), &true.into()));
    assert_eq!(records.last().unwrap()["target_state"], "removed");
    assert_eq!(fs::read_dir(bench.path("small")).unwrap().count(), 0);
}

#[test]
fn skipped_ranges_are_exit_3_and_listed() {
    let bench = Bench::new();
    let _small = Tmpfs::at(&bench.path("small"), DISK / 2);
    let flags = ["--device", "disk.raw", "--target", "small/out.raw", "--on-target-error", "ignore"];
    let output = bench.bare().args(flags).arg("--json").output().unwrap();
    let records = records(&output.stdout);
    assert_eq!(code(output.status), 3);
    let last = records.last().unwrap();
    assert_eq!((&last["message_type"], &last["result"]), (&"summary".into(), &"not_whole".into()));
    assert_eq!(last["bytes_done"], last["total_bytes"]);
    let skipped = last["skipped"].as_array().unwrap();
    assert!(skipped.iter().map(|range| range["length"].as_u64().unwrap()).sum::<u64>() >= DISK / 4, "{last}");
    let people = String::from_utf8(output.stderr).unwrap();
    assert!(people.contains("drive-backup: target range "), "{people}");
}

#[test]
fn a_stream_leaves_standard_output_to_the_disk() {
    let bench = Bench::new();
    let output = bench.bare().args(["--device", "disk.raw", "--target", "-", "--json"]).output().unwrap();
    assert!(output.stdout == fs::read(bench.path("disk.raw")).unwrap());
    let records = records(&output.stderr);
    let start = first(&records, "start");
    assert_eq!((&start["target"]["path"], &start["target"]["kind"]), (&"-".into(), &"stdout".into()));
    assert_eq!(records.last().unwrap()["message_type"], "summary");
}

/// What the reader of a pipe does with the bytes is not known here.
#[test]
fn a_stream_is_durable_only_in_a_file() {
    let bench = Bench::new();
    let stream = ["--device", "disk.raw", "--target", "-"];
    let to = |out: Stdio, more: &str| {
        let more = more.split(' ');
        bench.bare().args(stream).args(more).stdout(out).stderr(Stdio::piped()).output()
    };
    let file = || Stdio::from(fs::File::create(bench.path("out.raw")).unwrap());
    for (out, is_durable) in [(file(), true), (Stdio::piped(), false)] {
        let records = records(&to(out, "--json").unwrap().stderr);
        assert_eq!(records.last().unwrap()["durable"], is_durable);
    }
    for (out, more, said) in [
        (file(), "--verbose", "; on stable storage\n"),
        (file(), "--verbose --no-fsync", "; NOT flushed to stable storage\n"),
        (Stdio::piped(), "--verbose", "; sent; what its reader does with it"),
    ] {
        let text = String::from_utf8(to(out, more).unwrap().stderr).unwrap();
        assert!(text.contains(said), "{text}");
    }
    assert_eq!(code(bench.backup().args(["--manifest", "m.json"]).output().unwrap().status), 0);
    let verified = bench.bare().args(["verify", "out.raw", "--manifest", "m.json", "--json"]).output().unwrap();
    let last = records(&verified.stdout).pop().unwrap();
    assert_eq!((&last["result"], &last["durable"]), (&"verified".into(), &false.into()));
}

#[test]
fn a_path_that_is_not_utf8_keeps_its_bytes() {
    let bench = Bench::new();
    let name = OsStr::from_bytes(b"out\xff.raw");
    let output = bench.bare().args(["--device", "disk.raw", "--json", "--target"]).arg(name).output().unwrap();
    let records = records(&output.stdout);
    assert_eq!(code(output.status), 0);
    let start = first(&records, "start");
    assert_eq!(start["target"]["path_b64"], "b3V0/y5yYXc=");
    assert_eq!(start["target"]["path"], "out\u{fffd}.raw");
    assert!(bench.folder.path().join(name).exists());
}

#[test]
fn a_reader_that_leaves_early_ends_nothing() {
    let bench = Bench::new();
    let mut backup = Running::start(bench.backup().args(["--json", "--speed", "32M"]).stdout(Stdio::piped()));
    drop(backup.child.stdout.take());
    assert_eq!(code(backup.wait()), 0);
    bench.assert_copied("out.raw");
}

#[test]
fn a_second_backup_of_one_target_is_busy_and_leaves_the_first_alone() {
    let bench = Bench::new();
    let mut command = bench.backup();
    command.args(["--speed", "2M", "--json"]).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut first = Running::start(&mut command);
    let mut seen = Records::of(&mut first);
    seen.until_copying();
    let (code, records) = last_of(&bench, &["--device", "disk.raw", "--target", "out.raw"]);
    let last = records.last().unwrap();
    assert_eq!((code, &last["reason"], &last["target_state"]), (8, &"busy".into(), &"untouched".into()), "{last}");
    first.signal(nix::libc::SIGUSR2);
    assert_eq!(seen.last().unwrap()["result"], "complete");
    assert_eq!(crate::kit::code(first.wait()), 0);
    bench.assert_copied("out.raw");
}
