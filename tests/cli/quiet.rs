//! Silence where nobody looks, plain lines where a journal does.

use crate::kit::{Bench, code};
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;

#[test]
fn cron_hears_nothing_of_a_success() {
    let bench = Bench::new();
    let output = bench.backup().output().unwrap();
    assert_eq!(code(output.status), 0);
    assert!(output.stdout.is_empty() && output.stderr.is_empty());
}

#[test]
fn cron_hears_of_a_failure_in_one_line() {
    let bench = Bench::new();
    for quiet in [&[][..], &["-q"]] {
        let output = bench.bare().args(["--device", "nowhere", "--target", "out.raw"]).args(quiet).output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(code(output.status), 4);
        assert!(text.starts_with("drive-backup: ") && text.lines().count() == 1, "{text}");
        assert!(text.contains("nowhere") && text.contains("No such file or directory"), "{text}");
    }
}

#[test]
fn verbose_says_what_was_found_and_done() {
    let bench = Bench::new();
    let output = bench.backup().arg("-v").output().unwrap();
    let text = String::from_utf8(output.stderr).unwrap();
    assert!(text.contains("copying 'disk.raw' (raw, 16.0 MiB) to 'out.raw' (raw, new file)"), "{text}");
    assert!(text.contains("complete: 16.0 MiB") && text.contains("on stable storage"), "{text}");
}

/// Standard error is a file that JOURNAL_STREAM names, or not.
fn under_the_journal(named: bool, flags: &[&str]) -> String {
    let bench = Bench::new();
    let journal = File::create(bench.path("journal")).unwrap();
    let found = journal.metadata().unwrap();
    let inode = if named { found.ino() } else { found.ino() + 1 };
    let mut command = bench.backup();
    command.args(flags).env("JOURNAL_STREAM", format!("{}:{inode}", found.dev())).stderr(journal);
    assert_eq!(code(command.status().unwrap()), 0);
    fs::read_to_string(bench.path("journal")).unwrap()
}

#[test]
fn the_journal_gets_plain_lines_and_a_final_one() {
    let text = under_the_journal(true, &["--speed", "8M", "--progress-interval", "0.2"]);
    assert!(text.lines().all(|line| line.starts_with("<6>")), "information: {text}");
    assert!(text.lines().any(|line| line.contains(" %, ") && line.contains("of 16.0 MiB")), "{text}");
    assert!(text.lines().last().unwrap().starts_with("<6>complete: 16.0 MiB"), "{text}");
    assert!(!text.contains('\r') && !text.contains('\u{1b}'), "{text:?}");
}

#[test]
fn a_journal_that_is_not_on_standard_error_gets_none() {
    assert_eq!(under_the_journal(false, &[]), "");
    assert_eq!(under_the_journal(true, &["--progress=none"]), "");
    assert_eq!(under_the_journal(true, &["-q"]), "");
}
