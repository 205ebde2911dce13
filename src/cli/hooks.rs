//! The user's commands around the backup of each disk.

use super::args::timeout;
use super::cause::{Cause, Verdict};
use super::exit;
use super::resolve::target_word;
use crate::backup::{Disk, Failure, Options, Summary, Target, TargetState};
use crate::error::Result;
use crate::hook::{Hook, When};
use crate::image::location::Location;
use crate::job::Job;
use clap::Args;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

const HOOKS: &str = "Commands of your own";

// No doc comment: it would take the place of the command's own.
#[derive(Args, Clone, Debug)]
pub struct HookFlags {
    /// A shell command that runs before a disk is opened; exit status 9 if it fails
    ///
    /// Of several disks it runs for each. Hooks are told in their environment: DRIVE_BACKUP_HOOK (before, frozen, after,
    /// failed), DRIVE_BACKUP_HOOK_DEVICE and _TARGET; after the copy also _EXIT_CODE and _BYTES, and after a failure
    /// _EXIT_CODE, _REASON, _MESSAGE and _TARGET_STATE, as the JSON record has them. What they print goes to standard error.
    #[arg(long, value_name = "COMMAND", help_heading = HOOKS)]
    pub hook_before: Option<String>,

    /// One that runs when the copy is complete and both ends are closed; if it fails the copy stays, and the exit status is 9
    #[arg(long, value_name = "COMMAND", help_heading = HOOKS)]
    pub hook_after: Option<String>,

    /// One that runs when there is no copy, both ends closed
    ///
    /// After a signal, or when the time of --timeout or --finish-by was up, it is started and not waited for; if an end hangs,
    /// before that is closed.
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
    /// Nothing is left to run once the disks are open.
    pub fn runs_nothing_later(&self) -> bool {
        self.after.is_none() && self.failed.is_none()
    }
}

/// The hooks of a run under way. Each disk's end is told once: by the engine, or by whoever gave the engine up.
pub struct RunHooks {
    hooks: Hooks,
    disks: Vec<Options>,
    /// Whose end was told, or is being told.
    told: Vec<AtomicBool>,
    cause: OnceLock<Cause>,
}

impl RunHooks {
    /// Of a run of `disks`.
    pub fn new(hooks: Hooks, disks: &[Options]) -> Self {
        let told = disks.iter().map(|_| AtomicBool::new(false)).collect();
        Self { hooks, disks: disks.to_vec(), told, cause: OnceLock::new() }
    }

    /// Why jobs are cancelled; before they are.
    pub fn set_cause(&self, cause: Cause) {
        // The first one counts.
        let _ = self.cause.set(cause);
    }

    /// For all disks; the first that fails ends it.
    pub fn before(&self, disks: &[Disk<'_>]) -> Result<()> {
        let Some(command) = &self.hooks.before else { return Ok(()) };
        disks.iter().try_for_each(|disk| {
            of_disk(When::Before, command, disk.options).run(self.hooks.timeout, || disk.job.is_cancelled())
        })
    }

    /// What the engine's `result` becomes when the hook for it has run.
    pub fn after(&self, place: usize, job: &Job, result: Result<Summary, Failure>) -> Result<Summary, Failure> {
        if !self.is_first_to_tell(place) {
            return result;
        }
        match (&result, &self.hooks.after) {
            (Ok(summary), Some(command)) => {
                let code = if summary.is_whole() { exit::COMPLETE } else { exit::NOT_WHOLE };
                let hook = of_disk(When::After, command, &self.disks[place]).telling("EXIT_CODE", code.to_string());
                let hook = hook.telling("BYTES", summary.total.to_string());
                let ran = hook.run(self.hooks.timeout, || job.is_cancelled());
                ran.map_err(|error| Failure { error, target: TargetState::Complete })?;
            }
            (Err(failure), _) => self.tell_failure(place, failure, |hook| {
                // Whoever ended the backup does not wait for it.
                let is_cancelled = || job.is_cancelled();
                if is_cancelled() { hook.start() } else { hook.run(self.hooks.timeout, is_cancelled) }
            }),
            _ => {}
        }
        result
    }

    /// The engine does not come back, or not with a result: the hook is started.
    pub fn gave_up(&self, place: usize, failure: &Failure) {
        if self.is_first_to_tell(place) {
            self.tell_failure(place, failure, Hook::start);
        }
    }

    fn is_first_to_tell(&self, place: usize) -> bool {
        !self.told[place].swap(true, Relaxed)
    }

    /// Its own failure changes nothing: the error that it tells of is the one to know.
    fn tell_failure(&self, place: usize, failure: &Failure, run: impl FnOnce(&Hook) -> Result<()>) {
        let Some(command) = &self.hooks.failed else { return };
        let Failure { error, target } = failure;
        let verdict = Verdict::of(error, *target, self.cause.get().copied());
        let hook = of_disk(When::Failed, command, &self.disks[place]);
        let hook = hook.telling("EXIT_CODE", verdict.code.to_string()).telling("REASON", verdict.reason);
        let _ = run(&hook.telling("MESSAGE", verdict.message).telling("TARGET_STATE", target.name()));
    }
}

fn of_disk(when: When, command: &str, options: &Options) -> Hook {
    about(Hook::new(when, command), &options.device, &options.target)
}

/// Tells it of both ends, as messages name them: of a path each byte, of a URI no password.
pub fn about(hook: Hook, device: &Location, target: &Target) -> Hook {
    hook.telling("DEVICE", device.name()).telling("TARGET", target_word(target))
}
