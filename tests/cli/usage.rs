//! Bad arguments: exit 2, one line with a hint, nothing touched. Help and version: standard output.

use crate::kit::{Bench, code, first, records};
use std::fs;

#[test]
fn nonsense_is_one_line_exit_2_and_touches_nothing() {
    let bench = Bench::new();
    fs::write(bench.path("out.raw"), "precious").unwrap();
    for (flags, hint) in [
        (&["--speed", "-1"][..], "negative"),
        (&["--speed", "50Mb"], "bits"),
        (&["--speed", "1e99"], "units are"),
        (&["--speed", "50M/s"], "per second"),
        (&["--format", "tar"], "possible values: raw, qcow2"),
        (&["--source-format", "tar"], "possible values: raw, qcow2"),
        (&["--compress", "zstd"], "use --format qcow2"),
        (&["--compress", "lzma", "--format", "qcow2"], "use zlib, zstd"),
        (&["--cluster-size", "1000", "--format", "qcow2"], "power of two"),
        (&["--mode", "existing", "--compress", "zlib"], "leave one out"),
        (&["--workers", "0"], "1..=256"),
        (&["--on-source-error", "retry"], "possible values: report, ignore, enospc, stop"),
        (&["--spede", "1"], "'--speed'"),
        (&["--target", "other"], "one --target for each"),
        (&["--speed", "1M", "--speed", "2M"], "multiple times"),
    ] {
        let output = bench.backup().args(flags).output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{flags:?}: {text}");
        assert!(text.starts_with("drive-backup: ") && text.lines().count() == 1, "{flags:?}: {text}");
        assert!(text.contains(hint), "{flags:?}: {text}");
        assert!(output.stdout.is_empty());
    }
    assert_eq!(fs::read_to_string(bench.path("out.raw")).unwrap(), "precious");
    assert_eq!(bench.leftovers(), ["out.raw"]);
}

/// Whoever gives one believes that the copy is encrypted.
#[test]
fn a_secret_for_a_target_that_is_not_encrypted_is_refused() {
    let bench = Bench::new();
    fs::write(bench.path("key"), "secret").unwrap();
    fs::write(bench.path("old.raw"), "precious").unwrap();
    for (target, more, name) in [
        ("out.raw", &[][..], "raw"),
        ("old.raw", &[], "raw"),
        ("out.qcow2", &[], "qcow2"),
        ("out.luks", &["--format", "raw"], "raw"),
        ("-", &[], "raw"),
    ] {
        let ends = ["--device", "disk.raw", "--target", target, "--target-secret", "file:key"];
        let output = bench.bare().args(ends).args(more).output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{text}");
        assert!(text.contains(&format!("is to be {name}, which is not encrypted: use --format luks")), "{text}");
        assert!(output.stdout.is_empty());
    }
    let restore = ["restore", "disk.raw", "--target", "out.qcow2", "--target-secret", "file:key"];
    assert_eq!(bench.bare().args(restore).output().unwrap().status.code(), Some(2));
    assert_eq!(fs::read_to_string(bench.path("old.raw")).unwrap(), "precious");
    assert_eq!(bench.leftovers(), ["key", "old.raw"]);
    // That of the source is for a target that is encrypted too, if it is.
    assert_eq!(code(bench.backup().args(["--secret", "file:key"]).output().unwrap().status), 0);
}

#[test]
fn a_stream_is_raw() {
    let bench = Bench::new();
    for flags in [&["--format", "qcow2"][..], &["--compress", "zlib"], &["--mode", "existing"]] {
        let output = bench.bare().args(["--device", "disk.raw", "--target", "-"]).args(flags).output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{text}");
        assert!(text.contains("--target -") && output.stdout.is_empty(), "{text}");
    }
}

#[test]
fn usage_errors_are_records_too_wherever_json_stands() {
    let bench = Bench::new();
    for flags in [&["--json", "--speed", "50Mb"][..], &["--bogus", "--json"], &["--compress", "zlib", "--json"]] {
        let output = bench.backup().args(flags).output().unwrap();
        let records = records(&output.stdout);
        assert_eq!(output.status.code(), Some(2));
        assert_eq!(records.len(), 1);
        assert_eq!((&records[0]["message_type"], &records[0]["reason"]), (&"exit_error".into(), &"usage".into()));
        assert_eq!((&records[0]["exit_code"], &records[0]["target_state"]), (&2.into(), &"untouched".into()));
        let message = records[0]["message"].as_str().unwrap();
        assert!(String::from_utf8(output.stderr).unwrap().contains(message));
    }
    let output = bench.backup().arg("--bogus").env("DRIVE_BACKUP_JSON", "1").output().unwrap();
    assert_eq!(records(&output.stdout)[0]["exit_code"], 2);
    let output = bench.backup().arg("--bogus").env("DRIVE_BACKUP_JSON", "off").output().unwrap();
    assert!(output.stdout.is_empty());
    let output = bench.bare().args(["--target", "-", "--json", "--bogus"]).output().unwrap();
    assert_eq!(records(&output.stderr)[0]["exit_code"], 2);
    assert!(output.stdout.is_empty(), "standard output is the target's");
}

#[test]
fn help_and_version_go_to_standard_output() {
    let bench = Bench::new();
    for (flag, word) in [("--help", "--on-target-error"), ("-h", "--speed"), ("--version", env!("CARGO_PKG_VERSION"))] {
        let output = bench.bare().arg(flag).output().unwrap();
        assert_eq!(output.status.code(), Some(0));
        assert!(String::from_utf8(output.stdout).unwrap().contains(word) && output.stderr.is_empty(), "{flag}");
    }
}

#[test]
fn options_may_come_from_the_environment() {
    let bench = Bench::new();
    let mut command = bench.bare();
    command.args(["--target", "out.raw"]).envs([
        ("DRIVE_BACKUP_DEVICE", "disk.raw"),
        ("DRIVE_BACKUP_JSON", "1"),
        ("DRIVE_BACKUP_NO_FSYNC", "off"),
        ("DRIVE_BACKUP_SPEED", "1G"),
        ("DRIVE_BACKUP_FINISH_BY", ""),
        ("DRIVE_BACKUP_TARGET", "elsewhere.raw"),
    ]);
    let output = command.output().unwrap();
    assert_eq!(code(output.status), 0, "{}", String::from_utf8_lossy(&output.stderr));
    let records = records(&output.stdout);
    assert_eq!(first(&records, "start")["speed_limit"], 1 << 30);
    assert_eq!(records.last().unwrap()["durable"], true, "a flag that is off is not given");
    bench.assert_copied("out.raw");
    assert_eq!(bench.leftovers(), ["out.raw"], "what is on the command line counts");
    let wrong = bench.backup().env("DRIVE_BACKUP_SPEED", "fast").output().unwrap();
    assert_eq!(code(wrong.status), 2);
    let help = String::from_utf8(bench.bare().arg("--help").output().unwrap().stdout).unwrap();
    assert!(help.contains("[env: DRIVE_BACKUP_SPEED]") && help.contains("[env: DRIVE_BACKUP_ON_SOURCE_ERROR]"));
}

#[test]
fn a_variable_that_is_off_contradicts_no_option() {
    let bench = Bench::new();
    let ends_with = |expected: i32, variable: &str, value: &str, options: &[&str]| {
        let mut command = bench.backup();
        let output = command.arg("--dry-run").args(options).env(format!("DRIVE_BACKUP_{variable}"), value).output();
        let output = output.unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(code(output.status), expected, "{variable}={value} {options:?}: {said}");
    };
    for (variable, value, options) in [
        ("NO_FSYNC", "0", &["--verify"][..]),
        ("VERIFY", "no", &["--no-fsync"]),
        ("QUIET", "False", &["-v"]),
        ("SPEED", "off", &["--finish-by", "00:00"]),
        ("SPEED", "0", &["--speed-schedule", "00:00=1G"]),
        ("SPEED", "unlimited", &["--speed-schedule", "00:00=1G"]),
    ] {
        ends_with(0, variable, value, options);
    }
    ends_with(2, "NO_FSYNC", "1", &["--verify"]);
    ends_with(2, "SPEED", "1G", &["--finish-by", "00:00"]);
    let restore = ["restore", "disk.raw", "--target", "back.raw", "--verify"];
    let output = bench.bare().args(restore).env("DRIVE_BACKUP_RESTORE_NO_FSYNC", "off").output().unwrap();
    assert_eq!(code(output.status), 0);
}
