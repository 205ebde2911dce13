//! What ended a run from outside, and what that makes of its errors.

use super::exit;
use super::signals;
use crate::backup::TargetState;
use crate::error::{Error, Kind};

/// What cancelled a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// This one.
    Signal(i32),
    /// The time of this flag was up.
    Deadline(&'static str),
}

/// Why there is no copy, in the words that everybody is told: people, programs, hooks, and whoever started the process.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    pub code: u8,
    /// As in JSON.
    pub reason: &'static str,
    /// The name of the signal that ended the run.
    pub signal: Option<&'static str>,
    pub message: String,
}

impl Verdict {
    /// On `error`, with the target in `state`. `cause` cancelled the run.
    pub fn of(error: &Error, state: TargetState, cause: Option<Cause>) -> Self {
        match cause {
            // Whatever else went wrong meanwhile, a signal is what ended it: a pipe's reader dies of the same Ctrl-C.
            Some(Cause::Signal(number)) => {
                let name = signals::name(number);
                let message = format!("ended by {name}: {error}");
                Self { code: exit::of_signal(number), reason: "signal", signal: Some(name), message }
            }
            // Nothing else had gone wrong: a command that ran after the end may have been under way.
            Some(Cause::Deadline(flag)) if error.kind() == Kind::Cancelled => {
                let (code, reason) = exit::of(Kind::Deadline);
                let when = match state {
                    TargetState::Complete => "during --hook-after",
                    _ => "before the copy was complete",
                };
                Self { code, reason, signal: None, message: format!("the time of {flag} was up {when}") }
            }
            _ => {
                let (code, reason) = exit::of(error.kind());
                Self { code, reason, signal: None, message: error.to_string() }
            }
        }
    }
}
