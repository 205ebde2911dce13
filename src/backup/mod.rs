//! A whole backup: options in, a published copy or a failure out.

mod options;
mod outcome;

pub use options::{Mode, Options, Target};
pub use outcome::{Failure, Summary, TargetState};
