//! What the engine tells while it works. It knows no terminal: whoever listens decides what people see.

use crate::error::Error;
use crate::ground::policy::Action;
use crate::ground::range::ByteRange;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

/// Listens to a job. Called from the engine's threads: must return at once, whatever its own readers do.
pub trait Monitor: Send + Sync {
    /// Something happened.
    fn event(&self, event: Event<'_>);
}

/// Something that happened.
#[derive(Debug)]
pub enum Event<'a> {
    /// Everything is open, of every disk of the backup; the instant comes next. Said of each disk.
    Opened {
        /// A program may still have to be started, of the user's or of QEMU's.
        programs: bool,
    },
    /// The instant is taken; copying begins.
    Started(&'a Started),
    /// Everything was opened and checked, and nothing more will be done.
    Rehearsed(&'a Rehearsal),
    /// Something that the user should know and that ends nothing.
    Warning(&'a Warning),
    /// An I/O error, each time, with what was done about it.
    Fault {
        /// What, where, why.
        error: &'a Error,
        /// By the side's policy.
        action: Action,
    },
}

/// How the instant was taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Instant {
    /// The source did not change while it was copied, which is checked at the end.
    Unchanging,
    /// The file system cloned it.
    Reflink,
    /// Its writers were frozen, then trapped.
    Frozen,
    /// The source is behind a server: whether it changes can't be seen, and is its user's to see to.
    Unwatched,
    /// The user allowed an inconsistent copy.
    Unchecked,
}

/// What kind of end the target is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TargetKind {
    /// A new file, published by rename.
    File,
    /// An existing image, written in place.
    Existing,
    /// A block device, written in place.
    Device,
    /// An export of an NBD server, written in place.
    Export,
    /// Something that QEMU reaches, written in place.
    Remote,
    /// A stream.
    Stdout,
    /// None: the source is only read.
    Nowhere,
}

/// What is known when copying begins.
#[derive(Clone, Debug)]
pub struct Started {
    /// The source, as given.
    pub device: PathBuf,
    /// Its format's name.
    pub source_format: &'static str,
    /// Its size in bytes.
    pub virtual_size: u64,
    /// The target, as given; `None`: standard output.
    pub target: Option<PathBuf>,
    /// Its format's name.
    pub target_format: &'static str,
    /// What kind of end it is.
    pub target_kind: TargetKind,
    /// The instant that the copy shows.
    pub point_in_time: SystemTime,
    /// How it was taken.
    pub instant: Instant,
    /// Writers attached.
    pub writers: usize,
    /// For how long they were frozen.
    pub frozen: Option<Duration>,
}

/// What a backup would take.
#[derive(Clone, Debug)]
pub struct Rehearsal {
    /// The source, as given.
    pub device: PathBuf,
    /// Its format's name.
    pub source_format: &'static str,
    /// Its size in bytes.
    pub virtual_size: u64,
    /// Bytes of it that would be copied.
    pub data: u64,
    /// The target, as given; `None`: standard output.
    pub target: Option<PathBuf>,
    /// Its format's name.
    pub target_format: &'static str,
    /// What kind of end it is.
    pub target_kind: TargetKind,
    /// Bytes that are free in the folder of a file.
    pub target_free: Option<u64>,
    /// Bytes a second that could be read; `None`: there is no data.
    pub read_speed: Option<u64>,
    /// How long the copy would take at the asked speed, or as fast as the source can be read.
    pub duration: Option<Duration>,
    /// Writers attached.
    pub writers: usize,
    /// Bytes a second by which their writes would make the overlay grow at first.
    pub write_rate: Option<u64>,
    /// Bytes that the overlay holds at most, if they go on like that.
    pub overlay_most: Option<u64>,
    /// Bytes that are free in its folder.
    pub overlay_free: Option<u64>,
    /// Bytes that it may hold.
    pub overlay_limit: Option<u64>,
}

/// Something that ends nothing.
#[derive(Clone, Debug)]
pub struct Warning {
    /// Stable, for programs: `corrupt_bit`, `unreadable_range`, …
    pub code: &'static str,
    /// Which bytes, where it is about bytes.
    pub range: Option<ByteRange>,
    /// The system's error number, if it had one.
    pub errno: Option<i32>,
    /// One line for people.
    pub message: String,
}

impl Warning {
    /// About no particular bytes.
    pub fn general(code: &'static str, message: String) -> Self {
        Self { code, range: None, errno: None, message }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_general_warning_is_about_no_bytes() {
        let warning = Warning::general("no_flush", "the target can't flush".to_owned());
        assert_eq!((warning.code, warning.message.as_str()), ("no_flush", "the target can't flush"));
        assert_eq!((warning.range, warning.errno), (None, None));
    }
}
