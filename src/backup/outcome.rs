//! How a backup ended.

use crate::error::Error;
use crate::ground::range::ByteRange;

/// A copy that is complete under its final name.
#[derive(Clone, Debug)]
pub struct Summary {
    /// Bytes of the disk.
    pub total: u64,
    /// Bytes that were read and written.
    pub data: u64,
    /// Bytes that read as zeroes and were not copied.
    pub zero: u64,
    /// On stable storage.
    pub durable: bool,
    /// The source is known not to have changed, or the copy shows one instant of it.
    pub consistent: bool,
    /// The target was read back and compared; `None`: nobody asked.
    pub verified: Option<bool>,
    /// BLAKE3 of the disk, in hexadecimal; `None`: nobody asked.
    pub hash: Option<String>,
    /// Bytes that differed and were written; `None`: all were.
    pub written: Option<u64>,
    /// Source ranges that could not be read and are zeroes on the target.
    pub unreadable: Vec<ByteRange>,
    /// Target ranges that could not be written and hold what they held before.
    pub skipped: Vec<ByteRange>,
}

impl Summary {
    /// Every byte of the source is on the target.
    pub fn is_whole(&self) -> bool {
        self.unreadable.is_empty() && self.skipped.is_empty()
    }
}

/// What a failed backup left under the target's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TargetState {
    /// Nothing was touched.
    Untouched,
    /// What the job made is gone; what was there before is still there.
    Removed,
    /// A device, an existing image or a stream that holds half a copy.
    Incomplete,
    /// A copy that is not what was written, kept under a name of its own; what was there before is still there.
    KeptBad,
    /// A whole copy: what failed came after it.
    Complete,
    /// What was there before or the whole copy: nobody could wait for its end, or a crash may bring the old one back.
    OldOrComplete,
}

impl TargetState {
    /// As in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Untouched => "untouched",
            Self::Removed => "removed",
            Self::Incomplete => "incomplete",
            Self::KeptBad => "kept_bad",
            Self::Complete => "complete",
            Self::OldOrComplete => "old_or_complete",
        }
    }
}

/// A backup that failed.
#[derive(Debug)]
pub struct Failure {
    /// Why.
    pub error: Error,
    /// What it left.
    pub target: TargetState,
}
