//! The user's commands around the backup of each disk.

use super::exit;
use super::resolve::target_word;
use crate::backup::{Disk, Failure, Summary, TargetState};
use crate::error::Result;
use crate::hook::{Hook, When};
use std::time::Duration;

/// What runs around each disk's backup. The one that runs while writers are frozen is the engine's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hooks {
    /// Before anything is opened. When it fails nothing is.
    pub before: Option<String>,
    /// When the copy is complete. When it fails the backup has, though the copy stays.
    pub after: Option<String>,
    /// When there is no copy.
    pub failed: Option<String>,
    /// In which each has to end.
    pub timeout: Duration,
}

impl Hooks {
    /// For all disks; the first that fails ends it.
    pub fn before(&self, disks: &[Disk<'_>]) -> Result<()> {
        let Some(command) = &self.before else { return Ok(()) };
        disks.iter().try_for_each(|disk| {
            about(Hook::new(When::Before, command), disk).run(self.timeout, || disk.job.is_cancelled())
        })
    }

    /// What `result` becomes when the hook for it has run.
    pub fn after(&self, disk: &Disk<'_>, result: Result<Summary, Failure>) -> Result<Summary, Failure> {
        match (&result, &self.after, &self.failed) {
            (Ok(summary), Some(command), _) => {
                let code = if summary.is_whole() { exit::COMPLETE } else { exit::NOT_WHOLE };
                let hook = about(Hook::new(When::After, command), disk).telling("EXIT_CODE", code.to_string());
                let hook = hook.telling("BYTES", summary.total.to_string());
                let ran = hook.run(self.timeout, || disk.job.is_cancelled());
                ran.map_err(|error| Failure { error, target: TargetState::Complete })?;
            }
            (Err(failure), _, Some(command)) => self.tell_failure(command, disk, failure),
            _ => {}
        }
        result
    }

    /// Its own failure changes nothing: the error that it tells of is the one to know.
    fn tell_failure(&self, command: &str, disk: &Disk<'_>, Failure { error, target }: &Failure) {
        let (code, reason) = exit::of(error.kind());
        let hook = about(Hook::new(When::Failed, command), disk).telling("EXIT_CODE", code.to_string());
        let hook =
            hook.telling("REASON", reason).telling("MESSAGE", error.to_string()).telling("TARGET_STATE", target.name());
        // Whoever ended the backup does not wait for it.
        let _ = if disk.job.is_cancelled() { hook.start() } else { hook.run(self.timeout, || disk.job.is_cancelled()) };
    }
}

fn about(hook: Hook, disk: &Disk<'_>) -> Hook {
    hook.telling("DEVICE", disk.options.device.to_string()).telling("TARGET", target_word(&disk.options.target))
}
