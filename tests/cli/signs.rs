//! What monitors read beside the streams: the status file, the metrics file, the service manager's socket.

use crate::kit::{Bench, DISK, Records, Running, Tmpfs, code, records, wait_until};
use nix::libc::{SIGKILL, SIGTERM, SIGUSR2};
use serde_json::Value;
use std::fs;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixDatagram;
use std::process::Stdio;
use std::time::Duration;

fn metric(bench: &Bench, name: &str) -> Option<f64> {
    let text = fs::read_to_string(bench.path("m.prom")).unwrap();
    let line = text.lines().find_map(|line| line.strip_prefix(&format!("drive_backup_{name}{{")));
    line.map(|line| line.rsplit(' ').next().unwrap().parse().unwrap())
}

fn newest(bench: &Bench) -> Option<Value> {
    let text = fs::read_to_string(bench.path("status")).ok()?;
    Some(serde_json::from_str(&text).expect("always whole"))
}

/// Ends one with a status file. Was that all that was left?
fn leaves_its_last_status() -> bool {
    let bench = Bench::new();
    let mut command = bench.backup();
    command.args(["--speed", "128K", "--progress-interval", "0.1", "--status-file", "status"]);
    let mut backup = Running::start(command.stdout(Stdio::null()).stderr(Stdio::null()));
    wait_until("a status", || newest(&bench).is_some_and(|status| status["bytes_done"].as_u64() > Some(0)));
    let status = newest(&bench).unwrap();
    assert_eq!((&status["message_type"], &status["total_bytes"]), (&"status".into(), &DISK.into()));
    backup.signal(SIGTERM);
    assert_eq!(code(backup.wait()), 143);
    let last = newest(&bench).unwrap();
    assert_eq!((&last["message_type"], &last["exit_code"]), (&"exit_error".into(), &143.into()));
    assert_eq!(last["job"], status["job"]);
    bench.leftovers() == ["status"]
}

/// A busy machine may have no time to undo the copy, but not each time.
#[test]
fn the_status_file_has_the_newest_record_and_at_the_end_the_last() {
    assert!((0..5).any(|_| leaves_its_last_status()), "something partial is left");
}

#[test]
fn of_several_disks_the_status_file_has_a_line_each() {
    let bench = Bench::new();
    fs::write(bench.path("b.raw"), vec![1; 1 << 20]).unwrap();
    let mut command = bench.backup();
    command.args(["--device", "b.raw", "--target", "b.out", "--status-file", "status", "--metrics-file", "m.prom"]);
    assert_eq!(code(command.output().unwrap().status), 0);
    let text = fs::read_to_string(bench.path("status")).unwrap();
    let totals: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(totals.iter().map(|last| last["total_bytes"].as_u64().unwrap()).collect::<Vec<_>>(), [DISK, 1 << 20]);
    let metrics = fs::read_to_string(bench.path("m.prom")).unwrap();
    for line in [
        "drive_backup_last_exit_code{device=\"disk.raw\",target=\"out.raw\"} 0\n",
        "drive_backup_copied_bytes{device=\"b.raw\",target=\"b.out\"} 1048576\n",
    ] {
        assert!(metrics.contains(line), "{line} in {metrics}");
    }
}

#[test]
fn a_disk_that_has_ended_keeps_its_last_record_which_is_the_streams() {
    let bench = Bench::new();
    fs::write(bench.path("b.raw"), vec![1; 4096]).unwrap();
    let mut command = bench.bare();
    command.args(["--device", "b.raw", "--target", "b.out", "--device", "disk.raw", "--target", "out.raw"]);
    command.args(["--speed", "128K", "--progress-interval", "0.1", "--json", "--status-file", "status"]);
    let mut backup = Running::start(command.stdout(Stdio::piped()).stderr(Stdio::null()));
    let mut seen = Records::of(&mut backup);
    let last = seen.until(|record| record["message_type"] == "summary");
    // Time for many more looks at both.
    for _ in 0..10 {
        seen.until(|record| record["message_type"] == "status");
    }
    let text = fs::read_to_string(bench.path("status")).unwrap();
    let lines: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    for field in ["message_type", "job", "seq", "exit_code"] {
        assert_eq!(lines[0][field], last[field], "{field}");
    }
    assert_eq!(lines[1]["message_type"], "status");
    assert_ne!(lines[1]["job"], last["job"]);
    backup.signal(SIGTERM);
}

#[test]
fn metrics_are_written_whatever_ends_a_run_and_keep_the_last_success() {
    let bench = Bench::new();
    let run = |flags: &[&str]| {
        let status = bench.backup().args(["--metrics-file", "m.prom"]).args(flags).output().unwrap().status;
        assert_eq!(metric(&bench, "last_exit_code"), Some(code(status).into()), "{flags:?}");
        code(status)
    };
    assert_eq!(run(&[]), 0);
    let success = metric(&bench, "last_success_timestamp_seconds").unwrap();
    assert_eq!(metric(&bench, "copied_bytes"), Some(DISK as f64));
    assert_eq!(run(&["--speed", "128K", "--timeout", "0.2"]), 10);
    assert_eq!(run(&["--source-format", "qcow2"]), 4);
    assert_eq!(run(&["--cluster-size", "3000"]), 2);
    assert_eq!(run(&["--no-such-flag"]), 2);
    // As a service manager's file has them.
    let mut command = bench.bare();
    for (option, value) in
        [("DEVICE", "disk.raw"), ("TARGET", "out.raw"), ("METRICS_FILE", "env.prom"), ("SPEED", "50Mb")]
    {
        command.env(format!("DRIVE_BACKUP_{option}"), value);
    }
    assert_eq!(code(command.output().unwrap().status), 2);
    let written = fs::read_to_string(bench.path("env.prom")).unwrap();
    assert!(written.contains("last_exit_code{device=\"disk.raw\",target=\"out.raw\"} 2"), "{written}");
    fs::remove_file(bench.path("env.prom")).unwrap();
    assert_eq!(metric(&bench, "last_success_timestamp_seconds"), Some(success));
    assert_eq!(run(&[]), 0);
    assert!(metric(&bench, "last_success_timestamp_seconds") > Some(success));
    assert_eq!(bench.leftovers().len(), 2, "m.prom and out.raw: {:?}", bench.leftovers());
}

#[test]
fn a_refused_run_keeps_every_disks_last_success_and_shows_no_password() {
    let bench = Bench::new();
    let label = |device: &str| format!("drive_backup_last_success_timestamp_seconds{{device=\"{device}\",target=");
    let disks = ["https://alice:…@h/x", "b.raw"];
    let before: String = disks.iter().map(|disk| format!("{}\"{disk}.out\"}} 100\n", label(disk))).collect();
    fs::write(bench.path("m.prom"), &before).unwrap();
    let mut command = bench.bare();
    for disk in disks {
        command.args(["--device", &disk.replace('…', "hunter2"), "--target", &format!("{disk}.out")]);
    }
    let output = command.args(["--metrics-file", "m.prom", "--bogus"]).output().unwrap();
    assert_eq!(code(output.status), 2);
    let after = fs::read_to_string(bench.path("m.prom")).unwrap();
    assert!(before.lines().all(|line| after.contains(line)) && !after.contains("hunter2"), "{after}");
    assert_eq!(metric(&bench, "last_exit_code"), Some(2.0));
}

#[test]
fn a_dry_run_leaves_the_metrics_of_the_last_backup() {
    let bench = Bench::new();
    let variable = ("DRIVE_BACKUP_METRICS_FILE", bench.path("m.prom"));
    for before in ["", "# of the last backup\n"] {
        fs::write(bench.path("m.prom"), before).unwrap();
        for (flags, status) in [(&[][..], 0), (&["--source-format", "qcow2"], 4), (&["--no-such-flag"], 2)] {
            let mut command = bench.backup();
            command.args(["--dry-run", "--status-file", "status"]).args(flags).env(variable.0, &variable.1);
            assert_eq!(code(command.output().unwrap().status), status, "{flags:?}");
            assert_eq!(newest(&bench).unwrap()["exit_code"], status, "{flags:?}");
            assert_eq!(fs::read_to_string(&variable.1).unwrap(), before, "{flags:?}");
        }
    }
}

#[test]
fn files_that_can_not_be_written_are_a_warning_and_not_the_end() {
    let bench = Bench::new();
    let full = Tmpfs::at(&bench.path("full"), 4096);
    fs::write(bench.path("full/fill"), [1; 4096]).unwrap();
    for (status, metrics) in [("missing/status", "missing/m"), ("full/status", "full/m"), ("/proc/status", "/proc/m")] {
        let mut command = bench.backup();
        command.args(["--status-file", status, "--metrics-file", metrics, "--json", "--progress-interval", "0.1"]);
        let output = command.output().unwrap();
        assert_eq!(code(output.status), 0, "{status}");
        assert_eq!(records(&output.stdout).pop().unwrap()["result"], "complete");
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(text.matches("warning: --status-file: write").count(), 1, "once: {text}");
        assert_eq!(text.matches("warning: --metrics-file: write").count(), 1, "{text}");
    }
    drop(full);
    bench.assert_copied("out.raw");
}

#[test]
fn a_file_that_is_something_else_of_the_run_is_refused_and_stays_as_it_is() {
    let bench = Bench::new();
    fs::write(bench.path("out.raw"), "the old copy").unwrap();
    fs::hard_link(bench.path("disk.raw"), bench.path("hard")).unwrap();
    symlink("disk.raw", bench.path("link")).unwrap();
    symlink("m.json", bench.path("dangling")).unwrap();
    let names = bench.leftovers().len();
    for (flags, alias, of) in [
        (&["--status-file", "out.raw"][..], "out.raw", "out.raw"),
        (&["--metrics-file", "disk.raw"], "disk.raw", "disk.raw"),
        (&["--metrics-file", "hard"], "hard", "disk.raw"),
        (&["--status-file", "link"], "link", "disk.raw"),
        (&["--manifest", "m.json", "--status-file", "dangling"], "dangling", "m.json"),
        (&["--status-file", "new", "--metrics-file", "./new"], "./new", "new"),
    ] {
        let output = bench.backup().args(flags).output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!((code(output.status), text.lines().count()), (2, 1), "{flags:?}: {text}");
        assert!(text.contains(&format!("-file '{alias}' is '{of}' too: name another file")), "{text}");
        // Nor does a run that is refused for something else write there.
        assert_eq!(code(bench.backup().args(flags).arg("--bogus").output().unwrap().status), 2);
        assert_eq!(fs::metadata(bench.path("disk.raw")).unwrap().len(), DISK, "{flags:?}");
        assert_eq!(fs::read_to_string(bench.path("out.raw")).unwrap(), "the old copy", "{flags:?}");
        assert_eq!(bench.leftovers().len(), names, "{flags:?}: {:?}", bench.leftovers());
    }
    // A file of its own says how that went.
    let flags = ["--metrics-file", "m.prom", "--status-file", "disk.raw"];
    assert_eq!(code(bench.backup().args(flags).output().unwrap().status), 2);
    assert_eq!(metric(&bench, "last_exit_code"), Some(2.0));
}

#[test]
fn a_kill_leaves_a_whole_status_file() {
    let bench = Bench::new();
    for _ in 0..5 {
        let mut command = bench.backup();
        command.args(["--speed", "128K", "--progress-interval", "0.1", "--status-file", "status"]);
        let mut backup = Running::start(command.stdout(Stdio::null()).stderr(Stdio::null()));
        wait_until("a status", || newest(&bench).is_some_and(|status| status["phase"] == "copy"));
        backup.signal(SIGKILL);
        backup.wait();
        assert!(newest(&bench).is_some());
        fs::remove_file(bench.path("status")).unwrap();
    }
}

#[test]
fn a_service_manager_hears_a_heartbeat_and_how_it_stands() {
    let bench = Bench::new();
    let socket = UnixDatagram::bind(bench.path("notify")).unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    let mut command = bench.backup();
    command.args(["--speed", "128K"]).env("NOTIFY_SOCKET", bench.path("notify"));
    let mut backup = Running::start(command.stdout(Stdio::null()).stderr(Stdio::null()));
    let (mut beats, mut last) = (0, String::new());
    while beats < 3 || !last.contains(" of 16.0 MiB") {
        last = heard(&socket).unwrap_or_else(|| panic!("no heartbeat after {beats}: {last}"));
        if last != "READY=1" {
            assert!(last.starts_with("WATCHDOG=1\nSTATUS="), "{last}");
            beats += 1;
        }
    }
    backup.signal(SIGUSR2);
    assert_eq!(code(backup.wait()), 0);
}

/// The next message to the service manager; `None` when none came within the socket's time.
fn heard(socket: &UnixDatagram) -> Option<String> {
    let mut buffer = [0; 1000];
    let length = socket.recv(&mut buffer).ok()?;
    Some(String::from_utf8(buffer[..length].to_vec()).unwrap())
}

/// A service of Type=notify that ends without having said so has failed, whatever its status.
#[test]
fn a_service_manager_hears_of_every_instant_and_of_nothing_before_it() {
    let bench = Bench::new();
    let socket = UnixDatagram::bind(bench.path("notify")).unwrap();
    socket.set_nonblocking(true).unwrap();
    let run = |arguments: &[&str]| {
        let status = bench.bare().args(arguments).env("NOTIFY_SOCKET", "notify").output().unwrap().status;
        (code(status), std::iter::from_fn(|| heard(&socket)).filter(|message| message.contains("READY=1")).count())
    };
    let ends = ["--device", "disk.raw", "--target", "out.raw"];
    let with = |more: &[&'static str]| [&ends[..], more].concat();
    assert_eq!(run(&ends), (0, 1));
    assert_eq!(run(&with(&["--dry-run"])), (0, 1));
    assert_eq!(run(&with(&["--manifest", "out.json"])), (0, 1));
    assert_eq!(run(&["verify", "out.raw", "--manifest", "out.json"]), (0, 1));
    assert_eq!(run(&["restore", "out.raw", "--target", "restored.raw"]), (0, 1));
    // Longer than to the first heartbeat.
    assert_eq!(run(&with(&["--hook-before", "sleep 0.5; false"])), (9, 0));
}

#[test]
fn a_service_manager_that_does_not_listen_changes_nothing() {
    let bench = Bench::new();
    let socket = UnixDatagram::bind(bench.path("notify")).unwrap();
    for address in ["notify", "/nowhere", "@nobody", "", "x\u{e4}"] {
        let mut command = bench.backup();
        command.args(["--json", "--progress-interval", "0.1"]).env("NOTIFY_SOCKET", address);
        let mut backup = Running::start(command.stdout(Stdio::piped()).stderr(Stdio::null()));
        assert_eq!(Records::of(&mut backup).last().unwrap()["result"], "complete");
        assert_eq!(code(backup.wait()), 0, "{address}");
    }
    drop(socket);
}
