//! Several disks at one instant: a copy, a job and a bar each, all or nothing at the start.

use crate::kit::{BOUND, Bench, DISK, Records, Running, assert_none_is_lost, code, first};
use nix::libc::SIGINT;
use serde_json::Value;
use std::collections::HashMap;
use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::time::Instant;

/// disk.raw and half of it: disks `disk.raw` and `half.raw`.
fn two() -> Bench {
    let bench = Bench::new();
    let bytes = fs::read(bench.path("disk.raw")).unwrap();
    fs::write(bench.path("half.raw"), &bytes[bytes.len() / 2..]).unwrap();
    bench
}

fn backup(bench: &Bench, targets: [&str; 2]) -> Command {
    let mut command = bench.bare();
    command.args(["--device", "disk.raw", "--target", targets[0], "--device", "half.raw", "--target", targets[1]]);
    command
}

/// By the source's name, as the record of the job's start has it; where none was started, by the job.
fn by_disk(records: impl IntoIterator<Item = Value>) -> HashMap<String, Vec<Value>> {
    let mut jobs: HashMap<String, Vec<Value>> = HashMap::new();
    for record in records {
        jobs.entry(record["job"].as_str().unwrap().to_owned()).or_default().push(record);
    }
    let name = |(job, records): (String, Vec<Value>)| {
        assert_none_is_lost(&records);
        let is_end = |record: &Value| matches!(record["message_type"].as_str(), Some("summary" | "exit_error"));
        assert!(is_end(records.last().unwrap()) && records.iter().filter(|record| is_end(record)).count() == 1);
        let name = records.iter().find_map(|record| record["device"]["path"].as_str());
        (name.map_or(job, str::to_owned), records)
    };
    jobs.into_iter().map(name).collect()
}

fn parsed(output: &[u8]) -> HashMap<String, Vec<Value>> {
    by_disk(std::str::from_utf8(output).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()))
}

#[test]
fn two_disks_are_copied_with_a_job_each() {
    let bench = two();
    let output = backup(&bench, ["out.raw", "other.raw"]).args(["--json", "--speed", "32M"]).output().unwrap();
    assert_eq!(code(output.status), 0);
    assert!(output.stderr.is_empty(), "cron is silent on success");
    bench.assert_copied("out.raw");
    assert!(fs::read(bench.path("half.raw")).unwrap() == fs::read(bench.path("other.raw")).unwrap());
    let jobs = parsed(&output.stdout);
    assert_eq!(jobs.len(), 2);
    let instant = |disk: &str| first(&jobs[disk], "start")["point_in_time"].clone();
    assert_eq!(instant("disk.raw"), instant("half.raw"), "one instant");
    for (disk, target, size) in [("disk.raw", "out.raw", DISK), ("half.raw", "other.raw", DISK / 2)] {
        let (start, last) = (first(&jobs[disk], "start"), jobs[disk].last().unwrap());
        assert_eq!(start["target"]["path"], target);
        assert_eq!((&last["message_type"], &last["bytes_done"]), (&"summary".into(), &size.into()));
    }
}

#[test]
fn one_bad_target_fails_both_before_anything_is_touched() {
    let bench = two();
    fs::write(bench.path("out.raw"), "precious").unwrap();
    let output = backup(&bench, ["out.raw", "no/such/folder/out.raw"]).arg("--json").output().unwrap();
    assert_eq!(code(output.status), 5);
    let people = String::from_utf8(output.stderr).unwrap();
    let lines: Vec<&str> = people.lines().collect();
    assert!(lines.len() == 2 && lines[0].starts_with("drive-backup: disk.raw: not started, since another"), "{people}");
    assert!(lines[1].starts_with("drive-backup: half.raw: ") && lines[1].contains("no/such/folder"), "{people}");
    let jobs = parsed(&output.stdout);
    assert_eq!(jobs.len(), 2);
    for records in jobs.values() {
        let last = records.last().unwrap();
        assert_eq!((&last["exit_code"], &last["target_state"]), (&5.into(), &"untouched".into()), "{last}");
    }
    assert_eq!(fs::read_to_string(bench.path("out.raw")).unwrap(), "precious");
    let mut left = bench.leftovers();
    left.sort();
    assert_eq!(left, ["half.raw", "out.raw"]);
}

#[test]
fn no_target_is_a_backing_file_of_another_disk() {
    let bench = two();
    fs::copy(bench.path("half.raw"), bench.path("base.raw")).unwrap();
    let options = ["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "top.qcow2"];
    assert!(Command::new("qemu-img").args(options).current_dir(bench.path(".")).status().unwrap().success());
    let half = fs::read(bench.path("half.raw")).unwrap();
    for (other, flags) in
        [("base.raw", ""), ("new.raw", "--manifest x.json --manifest base.raw"), ("base.raw", "--dry-run")]
    {
        for order in [["top.qcow2", "x.qcow2", "disk.raw", other], ["disk.raw", other, "top.qcow2", "x.qcow2"]] {
            let mut flags: Vec<&str> = flags.split_whitespace().collect();
            if order[0] == "disk.raw" && flags.contains(&"base.raw") {
                flags.swap(1, 3);
            }
            let mut command = bench.bare();
            command.args(["--device", order[0], "--target", order[1], "--device", order[2], "--target", order[3]]);
            let output = command.args(flags).output().unwrap();
            let said = String::from_utf8(output.stderr).unwrap();
            assert_eq!(code(output.status), 2, "{said}");
            assert!(said.contains("'base.raw' holds bytes of '") && said.contains("base.raw'"), "{said}");
            assert!(fs::read(bench.path("base.raw")).unwrap() == half, "{other}");
            assert!(!bench.path("x.qcow2").exists() && !bench.path("new.raw").exists());
        }
    }
}

/// Interrupts both. Did each come back by itself, with nothing left?
fn are_cancelled() -> bool {
    let bench = two();
    let mut command = backup(&bench, ["out.raw", "other.raw"]);
    command.args(["--speed", "128K", "--json", "--progress-interval", "0.1"]);
    let mut backup = Running::start(command.stdout(Stdio::piped()).stderr(Stdio::null()));
    let mut records = Records::of(&mut backup);
    let mut seen = Vec::new();
    let is_copying =
        |record: &Value, size: u64| record["total_bytes"] == size && record["bytes_done"].as_u64() > Some(0);
    while ![DISK, DISK / 2].iter().all(|size| seen.iter().any(|record| is_copying(record, *size))) {
        seen.push(records.next().expect("it copies"));
    }
    let sent = Instant::now();
    backup.signal(SIGINT);
    let status = backup.wait();
    assert_eq!(status.signal(), Some(SIGINT), "{status}");
    assert!(sent.elapsed() < BOUND / 3, "{:?}", sent.elapsed());
    let jobs = by_disk(seen.into_iter().chain(records));
    assert_eq!(jobs.len(), 2);
    let is_cancelled = |records: &Vec<Value>| {
        let last = records.last().unwrap();
        println!("{last}");
        assert_eq!(last["signal"], "SIGINT", "{last}");
        last["target_state"] == "removed" && last["message"].as_str().unwrap().contains("cancelled")
    };
    jobs.values().all(is_cancelled) && bench.leftovers() == ["half.raw"]
}

/// A busy machine may not come back before they are given up, but not each time.
#[test]
fn an_interrupt_cancels_both() {
    assert!((0..5).any(|_| are_cancelled()), "they hang, or something partial is left");
}

#[test]
fn what_can_not_be_paired_is_one_line_and_exit_2() {
    let bench = two();
    fs::write(bench.path("out.raw"), "precious").unwrap();
    std::os::unix::fs::symlink("out.raw", bench.path("alias")).unwrap();
    let flags = |line: &str| line.split_whitespace().map(str::to_owned).collect::<Vec<String>>();
    for (line, part) in [
        ("--device disk.raw --device half.raw --target out.raw", "2 --device and 1 --target"),
        ("--device disk.raw --device half.raw --target out.raw --target alias", "are one, given twice"),
        ("--device disk.raw --device ./disk.raw --target out.raw --target new", "name each disk once"),
        ("--device disk.raw --device half.raw --target out.raw --target -", "--target - takes one disk"),
        ("--device disk.raw --device half.raw --target half.raw --target new", "holds bytes of --device"),
    ] {
        let output = bench.bare().args(flags(line)).arg("-v").output().unwrap();
        let people = String::from_utf8(output.stderr).unwrap();
        assert_eq!(code(output.status), 2, "{line}: {people}");
        assert!(people.lines().count() == 1 && people.contains(part), "{line}: {people}");
        let output = bench.bare().args(flags(line)).arg("--json").output().unwrap();
        let records = if line.ends_with(" -") { output.stderr } else { output.stdout };
        assert_eq!(crate::kit::records(&records)[0]["reason"], "usage");
    }
    assert_eq!(fs::read_to_string(bench.path("out.raw")).unwrap(), "precious");
    assert!(!bench.path("new").exists());
}
