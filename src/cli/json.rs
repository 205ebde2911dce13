//! JSON lines, schema 1: the shapes on the wire and nothing else. Field names are restic's where it has them. Fields
//! are only ever added; a change of meaning is a new schema.

use crate::ground::range::ByteRange;
use crate::ground::status::{OverlayUsage, WriterStats};
pub use crate::manifest::PathName;
use serde::Serialize;

/// Of every record.
pub const SCHEMA: u32 = 1;

/// One line.
#[derive(Debug, Serialize)]
pub struct Record<'a> {
    /// What it says.
    #[serde(flatten)]
    pub body: &'a Body,
    /// [`SCHEMA`].
    pub schema: u32,
    /// RFC 3339, UTC, milliseconds.
    pub time: String,
    /// UUID of this run.
    pub job: &'a str,
    /// Counts records from 0; a gap is as many dropped ones.
    pub seq: u64,
}

/// What a record says.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "message_type", rename_all = "snake_case")]
pub enum Body {
    /// The instant is taken.
    Start(Box<Start>),
    /// What a backup would take; nothing is copied.
    Plan(Box<Plan>),
    /// At every interval, and when phase or status change.
    Status(Box<Status>),
    /// Something that ends nothing.
    Warning(Warning),
    /// An I/O error, each time.
    Error(Fault),
    /// A server may be used.
    Ready(Ready),
    /// Last record of a server that was asked to end.
    Stopped(Stopped),
    /// Last record, exit codes 0 and 3.
    Summary(Box<Summary>),
    /// Last record, every other ending.
    ExitError(Box<ExitError>),
}

/// The source.
#[derive(Clone, Debug, Serialize)]
pub struct Device {
    #[serde(flatten)]
    pub name: PathName,
    pub format: &'static str,
    /// Bytes.
    pub virtual_size: u64,
}

/// The target; its path is `-` for standard output.
#[derive(Clone, Debug, Serialize)]
pub struct Target {
    #[serde(flatten)]
    pub name: PathName,
    pub format: &'static str,
    /// file, existing, device, remote, nbd, stdout, none.
    pub kind: &'static str,
}

#[derive(Clone, Debug, Serialize)]
pub struct Start {
    pub version: &'static str,
    pub pid: u32,
    pub device: Device,
    pub target: Target,
    pub point_in_time: String,
    /// How it was taken: unchanging, reflink, frozen, unwatched, unchecked.
    pub instant: &'static str,
    /// Bytes a second; null: none.
    pub speed_limit: Option<u64>,
    /// Writer processes attached.
    pub writers: u64,
    pub overlay: Option<Overlay>,
}

#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    pub version: &'static str,
    pub device: Device,
    pub target: Target,
    /// To be copied.
    pub bytes_data: u64,
    /// Bytes a second that could be read; null: there is no data.
    pub read_speed: Option<u64>,
    /// How long the copy would take.
    pub seconds: Option<f64>,
    /// Bytes that are free in the target's folder.
    pub target_free: Option<u64>,
    /// Writer processes attached.
    pub writers: u64,
    /// Bytes a second by which the overlay would grow at first.
    pub write_rate: Option<u64>,
    /// Bytes that the overlay would hold at most, if writers go on like that.
    pub overlay_most: Option<u64>,
    /// Bytes that are free in its folder.
    pub overlay_free: Option<u64>,
    /// Bytes that it may hold; null: no limit.
    pub overlay_limit: Option<u64>,
}

#[derive(Clone, Debug, Serialize)]
pub struct Status {
    /// prepare, copy, flush, verify, publish, cancel.
    pub phase: &'static str,
    /// running, paused.
    pub status: &'static str,
    /// Of copying: 0 to 1, never falls; below 1 until the target is published.
    pub percent_done: f64,
    pub total_bytes: u64,
    pub bytes_done: u64,
    pub bytes_data: u64,
    pub bytes_zero: u64,
    /// Of the target, read back so far.
    pub bytes_verified: u64,
    /// Data bytes a second, over the last seconds.
    pub rate: u64,
    /// Data bytes a second, since copying began.
    pub rate_avg: u64,
    pub speed_limit: Option<u64>,
    pub seconds_elapsed: u64,
    pub seconds_remaining: Option<u64>,
    /// Since a running copy last got anywhere.
    pub seconds_stalled: u64,
    pub error_count: u64,
    pub overlay: Option<Overlay>,
    pub writer: Option<Writer>,
}

#[derive(Clone, Debug, Serialize)]
pub struct Warning {
    pub code: &'static str,
    pub offset: Option<u64>,
    pub length: Option<u64>,
    pub errno: Option<String>,
    pub message: String,
}

#[derive(Clone, Debug, Serialize)]
pub struct Fault {
    /// read, write, flush, ...
    pub during: &'static str,
    /// source, target, overlay.
    pub side: Option<String>,
    #[serde(flatten)]
    pub name: Option<PathName>,
    pub offset: Option<u64>,
    pub length: Option<u64>,
    /// Its name, such as ENOSPC.
    pub errno: Option<String>,
    pub errno_num: Option<i32>,
    /// report, ignore, stop.
    pub action: &'static str,
    pub message: String,
    /// It ends the job.
    pub fatal: bool,
}

#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// complete; not_whole where ranges are missing; planned where nothing was to be copied; verified where only a comparison
    /// was asked for.
    pub result: &'static str,
    pub exit_code: u8,
    pub durable: bool,
    /// Null: nobody asked.
    pub verified: Option<bool>,
    /// Null: nobody asked.
    pub hash: Option<String>,
    /// The copy is known to show one instant.
    pub consistent: bool,
    pub total_bytes: u64,
    pub bytes_done: u64,
    pub bytes_data: u64,
    pub bytes_zero: u64,
    /// Seconds.
    pub total_duration: f64,
    pub rate_avg: u64,
    /// How many there were.
    pub warnings: u64,
    pub error_count: u64,
    /// That differed and were written, with --only-changed; null: all were.
    pub bytes_written: Option<u64>,
    /// Source ranges that are zeroes on the target.
    pub unreadable: Vec<Range>,
    /// Target ranges that were not written.
    pub skipped: Vec<Range>,
    pub overlay: Option<Overlay>,
    pub writer: Option<Writer>,
    #[serde(flatten)]
    pub dropped: Dropped,
}

#[derive(Clone, Debug, Serialize)]
pub struct ExitError {
    pub exit_code: u8,
    /// usage, source, target, instant_lost, differs, busy, hook, deadline, signal, cancelled, other.
    pub reason: &'static str,
    /// Its name, such as SIGINT.
    pub signal: Option<&'static str>,
    pub message: String,
    /// removed, incomplete, untouched, complete, kept_bad, old_or_complete; absent where there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub target_state: Option<&'static str>,
    /// Where a comparison found differences.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub differs: Vec<Range>,
    /// Null: there was none.
    pub writer_released: Option<bool>,
    pub seconds_elapsed: u64,
    #[serde(flatten)]
    pub dropped: Dropped,
}

#[derive(Clone, Debug, Serialize)]
pub struct Ready {
    pub version: &'static str,
    pub pid: u32,
    pub disks: Vec<ServedDisk>,
    /// Where clients find them, as URIs or paths.
    pub addresses: Vec<String>,
}

#[derive(Clone, Debug, Serialize)]
pub struct ServedDisk {
    pub name: String,
    #[serde(flatten)]
    pub path: PathName,
    pub format: &'static str,
    /// Bytes.
    pub virtual_size: u64,
    pub read_only: bool,
}

#[derive(Clone, Debug, Serialize)]
pub struct Stopped {
    pub exit_code: u8,
    /// What asked for it, such as SIGTERM.
    pub signal: &'static str,
    /// Every request in flight was answered.
    pub drained: bool,
    pub seconds_elapsed: u64,
    #[serde(flatten)]
    pub dropped: Dropped,
}

/// Records that a slow reader lost; known when the last one is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Dropped {
    pub status_dropped: u64,
    /// Warnings and errors.
    pub events_dropped: u64,
}

#[derive(Clone, Copy, Debug, Serialize)]
pub struct Range {
    pub offset: u64,
    pub length: u64,
}

impl From<ByteRange> for Range {
    fn from(range: ByteRange) -> Self {
        Self { offset: range.offset, length: range.length }
    }
}

/// In bytes.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Overlay {
    pub used: u64,
    pub peak: u64,
    /// Null: none.
    pub limit: Option<u64>,
}

impl From<OverlayUsage> for Overlay {
    fn from(usage: OverlayUsage) -> Self {
        Self { used: usage.used, peak: usage.peak, limit: usage.limit }
    }
}

#[derive(Clone, Copy, Debug, Serialize)]
pub struct Writer {
    pub attached: u64,
    pub writes: u64,
    pub trapped: u64,
    pub stall_ms_p50: f64,
    pub stall_ms_p99: f64,
    pub stall_ms_max: f64,
}

impl From<WriterStats> for Writer {
    fn from(stats: WriterStats) -> Self {
        let [stall_ms_p50, stall_ms_p99, stall_ms_max] = stats.stall_ms;
        let WriterStats { attached, writes, trapped, .. } = stats;
        Self { attached, writes, trapped, stall_ms_p50, stall_ms_p99, stall_ms_max }
    }
}

pub use crate::manifest::rfc3339 as time;

/// A name for a run of one disk.
pub fn new_job() -> String {
    uuid::Uuid::new_v4().to_string()
}

/// The errno's name, such as `ENOSPC`.
pub fn errno_name(errno: i32) -> String {
    format!("{:?}", nix::errno::Errno::from_raw(errno))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::{Duration, SystemTime};

    #[test]
    fn times_are_utc_with_milliseconds() {
        let at = SystemTime::UNIX_EPOCH + Duration::from_micros(1_700_000_000_123_999);
        assert_eq!(time(at), "2023-11-14T22:13:20.123Z");
    }

    #[test]
    fn a_record_has_its_fields_side_by_side() {
        let body = Body::Error(Fault {
            during: "write",
            side: Some("target".to_owned()),
            name: None,
            offset: Some(65536),
            length: Some(512),
            errno: Some(errno_name(28)),
            errno_num: Some(28),
            action: "stop",
            message: "write target at 0x10000+512: No space left on device".to_owned(),
            fatal: false,
        });
        let record = Record { body: &body, schema: SCHEMA, time: "T".to_owned(), job: "J", seq: 7 };
        let value: serde_json::Value = serde_json::from_str(&serde_json::to_string(&record).unwrap()).unwrap();
        assert_eq!(value["message_type"], "error");
        assert_eq!(value["errno"], "ENOSPC");
        assert_eq!((&value["schema"], &value["seq"], &value["job"]), (&1.into(), &7.into(), &"J".into()));
        assert!(value.get("path").is_none());
    }
}
