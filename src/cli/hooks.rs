//! The user's commands around the backup of each disk.

use super::args::timeout;
use super::exit;
use super::resolve::target_word;
use crate::backup::{Disk, Failure, Summary, Target, TargetState};
use crate::error::Result;
use crate::hook::{Hook, When};
use crate::image::location::Location;
use clap::Args;
use std::time::Duration;

const HOOKS: &str = "Commands of your own";

// No doc comment: it would take the place of the command's own.
#[derive(Args, Clone, Debug)]
pub struct HookFlags {
    /// A shell command that runs before a disk is opened; exit status 9 if it fails
    ///
    /// Of several disks it runs for each. Hooks are told in their environment: DRIVE_BACKUP_HOOK (before, frozen, after,
    /// failed), and DRIVE_BACKUP_HOOK_DEVICE, _TARGET, _EXIT_CODE, and after a failure _REASON, _MESSAGE and _TARGET_STATE.
    /// What they print goes to standard error.
    #[arg(long, value_name = "COMMAND", help_heading = HOOKS)]
    pub hook_before: Option<String>,

    /// One that runs when the copy is complete and both ends are closed; if it fails the copy stays, and the exit status is 9
    #[arg(long, value_name = "COMMAND", help_heading = HOOKS)]
    pub hook_after: Option<String>,

    /// One that runs when there is no copy, both ends closed
    #[arg(long, value_name = "COMMAND", help_heading = HOOKS)]
    pub hook_failed: Option<String>,

    /// In which time each of these must end
    #[arg(long, value_name = "TIME", allow_negative_numbers = true, value_parser = timeout, default_value = "10m", help_heading = HOOKS)]
    pub hook_timeout: Duration,
}

impl From<HookFlags> for Hooks {
    fn from(flags: HookFlags) -> Self {
        let HookFlags { hook_before: before, hook_after: after, hook_failed: failed, hook_timeout: timeout } = flags;
        Self { before, after, failed, timeout }
    }
}

/// What runs around each disk's backup. The one that runs while writers are frozen is the engine's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hooks {
    /// Before anything is opened. When it fails nothing is.
    pub before: Option<String>,
    /// When the copy is complete, both ends closed. When it fails the backup has, though the copy stays.
    pub after: Option<String>,
    /// When there is no copy, both ends closed.
    pub failed: Option<String>,
    /// In which each has to end.
    pub timeout: Duration,
}

impl Hooks {
    /// For all disks; the first that fails ends it.
    pub fn before(&self, disks: &[Disk<'_>]) -> Result<()> {
        let Some(command) = &self.before else { return Ok(()) };
        disks
            .iter()
            .try_for_each(|disk| of_disk(When::Before, command, disk).run(self.timeout, || disk.job.is_cancelled()))
    }

    /// Nothing is left to run once the disks are open.
    pub fn runs_nothing_later(&self) -> bool {
        self.after.is_none() && self.failed.is_none()
    }

    /// What `result` becomes when the hook for it has run.
    pub fn after(&self, disk: &Disk<'_>, result: Result<Summary, Failure>) -> Result<Summary, Failure> {
        match (&result, &self.after, &self.failed) {
            (Ok(summary), Some(command), _) => {
                let code = if summary.is_whole() { exit::COMPLETE } else { exit::NOT_WHOLE };
                let hook = of_disk(When::After, command, disk).telling("EXIT_CODE", code.to_string());
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
        let hook = of_disk(When::Failed, command, disk).telling("EXIT_CODE", code.to_string());
        let hook =
            hook.telling("REASON", reason).telling("MESSAGE", error.to_string()).telling("TARGET_STATE", target.name());
        // Whoever ended the backup does not wait for it.
        let _ = if disk.job.is_cancelled() { hook.start() } else { hook.run(self.timeout, || disk.job.is_cancelled()) };
    }
}

fn of_disk(when: When, command: &str, disk: &Disk<'_>) -> Hook {
    about(Hook::new(when, command), &disk.options.device, &disk.options.target)
}

/// Tells it of both ends, as messages name them: of a path each byte, of a URI no password.
pub fn about(hook: Hook, device: &Location, target: &Target) -> Hook {
    hook.telling("DEVICE", device.name()).telling("TARGET", target_word(target))
}
