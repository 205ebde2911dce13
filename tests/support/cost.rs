//! What a run of the command costs, and what the images of strangers may cost.

use super::{BINARY, Ended, PATIENCE, Running, piped, text};
use std::path::Path;
use std::process::Command;

/// Seconds of processor time.
const TIME: f64 = 5.0;
/// KiB of memory, at the worst moment.
const MEMORY: u64 = 256 << 10;

/// How a run ended, and what it cost.
pub struct Cost {
    pub ended: Ended,
    /// Of processor time.
    seconds: f64,
    /// KiB, at the worst moment.
    memory: u64,
}

/// Runs the command with `arguments` to its end, for as long as a test waits at most; `folder` is the test's own.
pub fn cost(folder: &Path, arguments: &[&str]) -> Cost {
    let measured = folder.join("measured");
    let mut command = Command::new("/usr/bin/time");
    command.args(["--quiet", "-f", "%U %S %M", "-o", text(&measured), "timeout", "--kill-after=1", "50", BINARY]);
    command.args(arguments);
    assert!(PATIENCE.as_secs() > 51);
    let ended = Running::start(&mut piped(command)).ended();
    let line = std::fs::read_to_string(&measured).unwrap();
    let [user, system, memory] = line.split_whitespace().collect::<Vec<_>>()[..] else { panic!("{line}") };
    let seconds = user.parse::<f64>().unwrap() + system.parse::<f64>().unwrap();
    Cost { ended, seconds, memory: memory.parse().unwrap() }
}

impl Cost {
    /// It ended with one of the `codes`, in one line at most, for no more than docs/SECURITY.md promises.
    #[track_caller]
    pub fn assert_cheap(&self, codes: &[i32], what: &str) {
        let Self { ended: Ended { code, stderr, .. }, seconds, memory } = self;
        println!("{what}: exit status {code}, {seconds} s, {memory} KiB: {}", stderr.trim_end());
        assert!(codes.contains(code), "{what}: exit status {code}: {stderr}");
        assert!(stderr.lines().count() <= 1 && !stderr.contains("internal error"), "{what}: {stderr}");
        assert!(*seconds < TIME && *memory < MEMORY, "{what}: {seconds} s, {memory} KiB");
    }
}
