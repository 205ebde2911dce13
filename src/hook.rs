//! Commands of the user that run at a given moment of a backup.

use crate::error::{Error, Kind, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

/// How soon a cancel is noticed.
const LOOK: Duration = Duration::from_millis(50);

/// When a hook runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum When {
    /// Before anything is opened.
    Before,
    /// While the writers are frozen.
    Frozen,
    /// When the copy is complete.
    After,
    /// When there is none.
    Failed,
}

impl When {
    /// As in its flag and its environment.
    pub fn name(self) -> &'static str {
        match self {
            Self::Before => "before",
            Self::Frozen => "frozen",
            Self::After => "after",
            Self::Failed => "failed",
        }
    }
}

/// A command for the shell, and what it is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hook {
    when: When,
    command: String,
    environment: Vec<(String, OsString)>,
}

impl Hook {
    /// Runs `command` with `sh -c`. In its environment DRIVE_BACKUP_HOOK says `when`.
    pub fn new(when: When, command: &str) -> Self {
        let environment = vec![("DRIVE_BACKUP_HOOK".to_owned(), when.name().into())];
        Self { when, command: command.to_owned(), environment }
    }

    /// Tells it one thing more: DRIVE_BACKUP_HOOK_`name`.
    pub fn telling(mut self, name: &str, value: impl Into<OsString>) -> Self {
        self.environment.push((format!("DRIVE_BACKUP_HOOK_{name}"), value.into()));
        self
    }

    /// Runs it, and blocks until it ends; for `bound` at most, and not after `is_cancelled`. Then it is killed, with the
    /// processes that it has started and not put into groups of their own.
    ///
    /// [`Kind::Hook`] unless it ends with status 0. It reads nothing, and writes to our standard error.
    pub fn run(&self, bound: Duration, is_cancelled: impl Fn() -> bool) -> Result<()> {
        let begin = Instant::now();
        let failed =
            |why: String| Error::new(Kind::Hook, format!("--hook-{} '{}': {why}", self.when.name(), self.command));
        let mut child = Owned(self.spawn().map_err(|error| failed(format!("start it: {error}")))?);
        let end = child.end().map_err(|error| failed(format!("watch it: {error}")))?;
        loop {
            let left = bound.saturating_sub(begin.elapsed());
            match child.ended_within(&end, left.min(LOOK)).map_err(|error| failed(format!("wait for it: {error}")))? {
                Some(status) if status.success() => return Ok(()),
                Some(status) => return Err(failed(format!("ended with {status}"))),
                None if is_cancelled() => return Err(Error::new(Kind::Cancelled, "cancelled")),
                None if left.is_zero() => {
                    return Err(failed(format!("did not end within {} s and was killed", bound.as_secs_f64())));
                }
                None => {}
            }
        }
    }

    /// Starts it and leaves it to itself.
    pub fn start(&self) -> Result<()> {
        let failed =
            |error| Error::system(Kind::Hook, format!("start --hook-{} '{}'", self.when.name(), self.command), error);
        self.spawn().map(drop).map_err(failed)
    }

    fn spawn(&self) -> io::Result<Child> {
        let err = io::stderr().as_fd().try_clone_to_owned()?;
        let mut shell = Command::new("/bin/sh");
        shell.arg("-c").arg(&self.command).envs(self.environment.iter().map(|(name, value)| (name, value)));
        // Ctrl-C is for us to pass on; standard output may be the copy.
        shell.process_group(0).stdin(Stdio::null()).stdout(err).spawn()
    }
}

/// A running hook, with its process group.
struct Owned(Child);

impl Owned {
    /// What becomes readable when it ends.
    fn end(&self) -> io::Result<OwnedFd> {
        Ok(pidfd_open(Pid::from_child(&self.0), PidfdFlags::empty())?)
    }

    fn ended_within(&mut self, end: &OwnedFd, limit: Duration) -> io::Result<Option<ExitStatus>> {
        let limit = Timespec { tv_sec: limit.as_secs() as i64, tv_nsec: limit.subsec_nanos().into() };
        match poll(&mut [PollFd::new(end, PollFlags::IN)], Some(&limit)) {
            Ok(_) | Err(rustix::io::Errno::INTR) => self.0.try_wait(),
            Err(error) => Err(error.into()),
        }
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        if let Ok(None) = self.0.try_wait() {
            // It fails when it has ended meanwhile.
            let _ = kill_process_group(Pid::from_child(&self.0), Signal::KILL);
            let _ = self.0.wait();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(60);

    fn hook(command: &str) -> Hook {
        Hook::new(When::Before, command)
    }

    #[test]
    fn status_0_is_good_and_any_other_end_is_told() {
        hook("true").run(LONG, || false).unwrap();
        for (command, why) in [("exit 3", "exit status: 3"), ("kill -9 $$", "signal: 9"), ("no-such-program", "127")] {
            let error = hook(command).run(LONG, || false).expect_err(command);
            assert_eq!(error.kind(), Kind::Hook);
            let text = error.to_string();
            assert!(
                text.starts_with(&format!("--hook-before '{command}': ended with ")) && text.contains(why),
                "{text}"
            );
        }
    }

    #[test]
    fn it_is_told_when_and_what() {
        let told =
            hook("test \"$DRIVE_BACKUP_HOOK $DRIVE_BACKUP_HOOK_DEVICE\" = 'before a b'").telling("DEVICE", "a b");
        told.run(LONG, || false).unwrap();
    }

    #[test]
    fn one_that_hangs_is_left_at_its_bound() {
        let begin = Instant::now();
        let error = hook("sleep 1000").run(Duration::from_millis(300), || false).expect_err("it hangs");
        assert!(error.to_string().contains("did not end within 0.3 s"), "{error}");
        assert!(begin.elapsed() < LONG);
    }

    #[test]
    fn one_that_does_not_end_is_killed_with_what_it_started() {
        let folder = tempfile::tempdir().unwrap();
        let pids = folder.path().join("pids");
        let command = format!("sleep 1000 & echo $$ $! > {}; wait", pids.display());
        let begin = Instant::now();
        let told = || std::fs::read_to_string(&pids).unwrap_or_default();
        assert_eq!(hook(&command).run(LONG, || told().ends_with('\n')).expect_err("cancelled").kind(), Kind::Cancelled);
        assert_eq!(told().split_whitespace().count(), 2);
        for pid in told().split_whitespace() {
            let is_alive =
                || std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "));
            while is_alive() {
                assert!(begin.elapsed() < LONG, "{pid} lives");
                std::thread::yield_now();
            }
        }
    }
}
