//! Speeds that change by themselves, and times that run out.

use crate::kit::{Bench, DISK, Records, Running, code, records};
use drive_backup::writer::Writer;
use jiff::{ToSpan, Zoned};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

#[test]
fn a_timeout_ends_it_with_status_10_and_leaves_the_old_copy() {
    let bench = Bench::new();
    fs::write(bench.path("out.raw"), "the old copy").unwrap();
    let output = bench.backup().args(["--speed", "128K", "--timeout", "2", "--json"]).output().unwrap();
    assert_eq!(code(output.status), 10);
    let last = records(&output.stdout).pop().unwrap();
    assert_eq!((&last["exit_code"], &last["reason"]), (&10.into(), &"deadline".into()));
    assert_eq!(last["target_state"], "removed");
    let line = "the time of --timeout was up before the copy was complete; the partial copy was removed";
    assert_eq!(String::from_utf8(output.stderr).unwrap(), format!("drive-backup: {line}\n"));
    assert_eq!(bench.leftovers(), ["out.raw"]);
    assert_eq!(fs::read_to_string(bench.path("out.raw")).unwrap(), "the old copy");
}

#[test]
fn a_timeout_that_comes_while_a_last_hook_runs_keeps_the_truth() {
    let bench = Bench::new();
    let (slow, missing) = ("sleep 1000", ["--device", "nope.raw", "--target", "out.raw", "--hook-failed"]);
    let output = bench.bare().args(missing).args([slow, "--timeout", "1"]).output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(code(output.status) == 4 && text.contains("'nope.raw': No such file"), "{text}");

    // Longer than the copy takes, whatever else this machine does.
    let output = bench.backup().args(["--hook-after", slow, "--timeout", "10"]).output().unwrap();
    assert_eq!(code(output.status), 10);
    let line = "the time of --timeout was up during --hook-after; 'out.raw' is complete";
    assert_eq!(String::from_utf8(output.stderr).unwrap(), format!("drive-backup: {line}\n"));
    bench.assert_copied("out.raw");
}

#[test]
fn a_target_that_hangs_does_not_outlive_the_timeout() {
    let bench = Bench::new();
    let (_unread, end) = std::io::pipe().unwrap();
    let mut command = bench.bare();
    command.args(["--device", "disk.raw", "--target", "-", "--timeout", "0.3"]);
    let mut backup = Running::start(command.stdout(end).stderr(Stdio::null()));
    assert_eq!(code(backup.wait()), 10);
}

#[test]
fn a_copy_that_is_ready_in_time_is_not_late() {
    let soon = (&Zoned::now() + 1.hour()).timestamp().to_string();
    // 16 MiB in 57 minutes, less what was copied before the first look; twice if they are read back too.
    for (flags, lowest, highest) in [(&[][..], 0, DISK / 3400), (&["--verify"], DISK / 3000, 2 * DISK / 3400)] {
        let bench = Bench::new();
        let mut command = bench.backup();
        command.args(["--finish-by", &soon, "--json", "--progress-interval", "0.1", "--timeout", "1h"]).args(flags);
        let mut backup = Running::start(command.stdout(Stdio::piped()).stderr(Stdio::piped()));
        let mut records = Records::of(&mut backup);
        let is_planned = |limit| (lowest..=highest).contains(&limit);
        records.until(|record| record["speed_limit"].as_u64().is_some_and(is_planned));
        backup.signal(nix::libc::SIGUSR2);
        drop(records);
        assert_eq!(code(backup.wait()), 0);
        bench.assert_copied("out.raw");
    }
}

#[test]
fn a_schedule_holds_from_the_first_byte() {
    let bench = Bench::new();
    let mut command = bench.backup();
    command.args(["--speed-schedule", "00:00=128K 12:00=128K", "--json", "--progress-interval", "0.1"]);
    let mut backup = Running::start(command.stdout(Stdio::piped()).stderr(Stdio::piped()));
    let mut records = Records::of(&mut backup);
    assert_eq!(records.until(|record| record["message_type"] == "start")["speed_limit"], 128 << 10);
    assert_eq!(records.until_copying()["speed_limit"], 128 << 10);
}

#[test]
fn auto_has_no_limit_without_a_writer_and_one_beside_it() {
    let bench = Bench::new();
    let alone = bench.backup().args(["--speed", "auto", "--timeout", "60"]).output().unwrap();
    assert_eq!(code(alone.status), 0);
    bench.assert_copied("out.raw");

    let (disk, meet) = (bench.path("disk.raw"), bench.path("meet"));
    let writer = Writer::open_in(&disk, &meet).unwrap();
    let file = File::options().write(true).open(&disk).unwrap();
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut at = 0;
            while !is_over.load(Relaxed) {
                let _write = writer.begin(at, 4096).unwrap();
                file.write_all_at(&[7; 4096], at).unwrap();
                at = (at + 4096) % DISK;
            }
        });
        let mut command = bench.backup();
        command.args(["--speed", "auto", "--writer", "required", "--snapshot", "overlay", "--writer-dir"]);
        command.arg(&meet).args(["--json", "--progress-interval", "0.1"]);
        let mut backup = Running::start(command.stdout(Stdio::piped()).stderr(Stdio::piped()));
        let limits: Vec<_> = Records::of(&mut backup).filter_map(|record| record["speed_limit"].as_u64()).collect();
        is_over.store(true, Relaxed);
        assert_eq!(code(backup.wait()), 0);
        assert!(!limits.is_empty() && limits.iter().all(|limit| *limit >= 1 << 20), "{limits:?}");
    });
}

#[test]
fn times_that_make_no_sense_touch_nothing() {
    let bench = Bench::new();
    for (flags, what) in [
        (["--finish-by", "2020-01-01T00:00"], "that time has passed"),
        (["--finish-by", "soon"], "write a time of day"),
        (["--speed-schedule", "08:00=1M 08:00=2M"], "08:00 is given twice"),
        (["--speed-schedule", ""], "it is empty"),
        (["--timeout", "0"], "from 0.1 seconds"),
    ] {
        let output = bench.backup().args(flags).output().unwrap();
        assert_eq!(code(output.status), 2, "{flags:?}");
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(text.contains(what) && text.lines().count() == 1, "{text}");
        assert!(bench.leftovers().is_empty());
    }
}
