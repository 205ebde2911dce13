//! What a watcher of a job may know at any moment.

use std::time::Duration;

/// Where the job is. Only `Copy` moves the percentage.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Opening, locking, checking; taking the instant.
    Prepare,
    /// Moving bytes.
    Copy,
    /// Waiting for stable storage.
    Flush,
    /// Reading the target back.
    Verify,
    /// Giving the target its name.
    Publish,
    /// Ending early.
    Cancel,
}

impl Phase {
    /// As in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Prepare => "prepare",
            Self::Copy => "copy",
            Self::Flush => "flush",
            Self::Verify => "verify",
            Self::Publish => "publish",
            Self::Cancel => "cancel",
        }
    }
}

/// Why a job stands still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pause {
    /// Somebody asked for it.
    User,
    /// An I/O error under the policy `stop`; resume tries the same range again.
    Error,
}

/// The overlay, in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct OverlayUsage {
    /// Held now.
    pub used: u64,
    /// The most that was held at once.
    pub peak: u64,
    /// May never be exceeded; `None`: no limit.
    pub limit: Option<u64>,
}

impl OverlayUsage {
    /// More than half of the limit is used: time to copy what the overlay holds first.
    pub fn past_half(&self) -> bool {
        self.limit.is_some_and(|limit| self.used > limit / 2)
    }
}

/// How the writers fared.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct WriterStats {
    /// Writer processes attached now.
    pub attached: u64,
    /// Writes bracketed since the instant.
    pub writes: u64,
    /// Of these, the ones that had to wait for a capture or a read.
    pub trapped: u64,
    /// Milliseconds that a trapped write waited: median, 99th percentile, longest.
    pub stall_ms: [f64; 3],
    /// How long trapped writes waited, added up; right to an eighth.
    pub stalled: Duration,
}

/// One look at a job.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Snapshot {
    /// Where it is.
    pub phase: Phase,
    /// Why it stands still, if it does.
    pub paused: Option<Pause>,
    /// Size of the disk in bytes; 0 until it is known.
    pub total: u64,
    /// Bytes that were read and written.
    pub data: u64,
    /// Bytes that read as zeroes and needed no copying.
    pub zero: u64,
    /// Bytes of the target that were read back.
    pub verified: u64,
    /// I/O errors so far.
    pub errors: u64,
    /// Bytes a second; `None`: no limit.
    pub speed_limit: Option<u64>,
    /// With an overlay.
    pub overlay: Option<OverlayUsage>,
    /// With cooperating writers.
    pub writers: Option<WriterStats>,
}

impl Snapshot {
    /// Bytes that are on the target or need not be. Never falls; equals `total` at the end.
    pub fn done(&self) -> u64 {
        self.data + self.zero
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn phases_have_the_names_that_json_has() {
        use Phase::{Cancel, Copy, Flush, Prepare, Publish, Verify};
        let names = [Prepare, Copy, Flush, Verify, Publish, Cancel].map(Phase::name);
        assert_eq!(names, ["prepare", "copy", "flush", "verify", "publish", "cancel"]);
    }

    #[test]
    fn half_of_the_limit_is_not_past_it_and_without_a_limit_there_is_no_half() {
        let used = |used, limit| OverlayUsage { used, peak: used, limit }.past_half();
        assert!(!used(50, Some(100)) && used(51, Some(100)));
        assert!(!used(u64::MAX, None));
    }

    #[test]
    fn zeroes_are_done_as_data_is() {
        let seen = Snapshot {
            phase: Phase::Copy,
            paused: None,
            total: 9,
            data: 3,
            zero: 4,
            verified: 0,
            errors: 0,
            speed_limit: None,
            overlay: None,
            writers: None,
        };
        assert_eq!(seen.done(), 7);
    }
}
