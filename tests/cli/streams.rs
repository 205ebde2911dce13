//! Readers that stop or go away slow, block and end nothing.

use crate::kit::{Bench, DISK, Running, code};
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::process::Stdio;
use std::time::{Duration, Instant};

/// A pipe that is full already. Reading it is up to the caller.
fn full_pipe() -> (PipeReader, PipeWriter) {
    let (read, mut write) = io::pipe().unwrap();
    let flags = fcntl_getfl(&write).unwrap();
    fcntl_setfl(&write, flags | OFlags::NONBLOCK).unwrap();
    while write.write(&[b'x'; 4096]).is_ok() {}
    fcntl_setfl(&write, flags).unwrap();
    (read, write)
}

/// The copy takes no time and the last record is waited for, 2 seconds; a busy machine takes longer.
const SOON: Duration = Duration::from_secs(30);

#[test]
fn a_stopped_json_reader_costs_a_bounded_wait() {
    let bench = Bench::new();
    let (_read, write) = full_pipe();
    let began = Instant::now();
    let flags = ["--json", "--progress-interval", "0.1"];
    let mut backup = Running::start(bench.backup().args(flags).stdout(write));
    assert_eq!(code(backup.wait_for(SOON)), 0);
    assert!(began.elapsed() >= Duration::from_secs(2), "the last record was waited for");
    bench.assert_copied("out.raw");
}

#[test]
fn a_json_reader_that_wakes_up_in_time_gets_the_last_record() {
    let bench = Bench::new();
    let (mut read, write) = full_pipe();
    let mut backup = Running::start(bench.backup().args(["--json", "-v"]).stdout(write).stderr(Stdio::piped()));
    // The line for people comes with the end of the copy.
    let mut lines = io::BufRead::lines(io::BufReader::new(backup.child.stderr.take().unwrap()));
    assert!(lines.any(|line| line.unwrap().starts_with("drive-backup: complete")));
    let mut text = String::new();
    read.read_to_string(&mut text).unwrap();
    assert_eq!(code(backup.wait()), 0);
    assert!(text.trim_start_matches('x').lines().last().unwrap().contains("\"summary\""), "{text}");
}

#[test]
fn a_stopped_reader_of_standard_error_costs_a_bounded_wait() {
    let bench = Bench::new();
    let (_read, write) = full_pipe();
    let flags = ["--progress=plain", "--progress-interval", "0.1", "-v"];
    let mut backup = Running::start(bench.backup().args(flags).stderr(write));
    assert_eq!(code(backup.wait_for(SOON)), 0);
    bench.assert_copied("out.raw");
}

#[test]
fn stopped_readers_leave_the_code_of_a_failure() {
    let bench = Bench::new();
    let ((_out, out), (_err, err)) = (full_pipe(), full_pipe());
    let flags = ["--device", "nowhere", "--target", "out.raw", "--json"];
    let mut backup = Running::start(bench.bare().args(flags).stdout(out).stderr(err));
    assert_eq!(code(backup.wait_for(SOON)), 4);
}

#[test]
fn readers_that_are_gone_cost_nothing() {
    let bench = Bench::new();
    let ((out_read, out), (err_read, err)) = (io::pipe().unwrap(), io::pipe().unwrap());
    drop((out_read, err_read));
    let flags = ["--json", "-v", "--progress=plain", "--progress-interval", "0.1"];
    let mut backup = Running::start(bench.backup().args(flags).stdout(out).stderr(err));
    assert_eq!(code(backup.wait()), 0);
    bench.assert_copied("out.raw");
}

#[test]
fn closed_streams_are_no_error() {
    let bench = Bench::new();
    let mut shell = std::process::Command::new("sh");
    let line = format!("exec {} --device disk.raw --target out.raw --json -v >&- 2>&- <&-", crate::kit::BINARY);
    let mut backup = Running::start(shell.args(["-c", &line]).current_dir(&bench.folder));
    assert_eq!(code(backup.wait()), 0);
    bench.assert_copied("out.raw");
}

#[test]
fn a_stream_whose_reader_leaves_is_a_target_that_failed() {
    let bench = Bench::new();
    let (read, write) = io::pipe().unwrap();
    drop(read);
    let mut command = bench.bare();
    command.args(["--device", "disk.raw", "--target", "-"]).stdout(write).stderr(Stdio::piped());
    let output = command.output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert_eq!(code(output.status), 5, "{text}");
    assert!(text.contains("Broken pipe") && text.contains("INCOMPLETE"), "{text}");
}

#[test]
fn a_slow_reader_of_the_stream_gets_every_byte() {
    let bench = Bench::new();
    let mut command = bench.bare();
    let mut backup = Running::start(command.args(["--device", "disk.raw", "--target", "-"]).stdout(Stdio::piped()));
    let mut out = backup.child.stdout.take().unwrap();
    let (mut copied, mut some) = (Vec::new(), [0; 1000]);
    loop {
        match out.read(&mut some).unwrap() {
            0 => break,
            length => copied.extend_from_slice(&some[..length]),
        }
    }
    assert_eq!(copied.len() as u64, DISK);
    assert!(copied == std::fs::read(bench.path("disk.raw")).unwrap());
    assert_eq!(code(backup.wait()), 0);
}
