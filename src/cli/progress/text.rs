//! The words that people read. No clock, no terminal.

use super::pace::{STALLED, View};
use crate::backup::{Summary, TargetState};
use crate::ground::range::ByteRange;
use crate::ground::size::{Bytes, Clock, Rate};
use crate::ground::status::{Pause, Phase};
use crate::monitor::{Instant, Rehearsal, Started, TargetKind};
use crate::sandbox::Held;
use std::fmt::Write;
use std::time::Duration;

/// More would bury what matters; `--json` has all.
const MOST_RANGES: usize = 100;

/// Whatever a path or a system holds, a message stays one line and sends no escapes to a terminal.
pub fn one_line(text: &str) -> String {
    text.chars().fold(String::with_capacity(text.len()), |mut line, c| {
        if c.is_control() {
            line.extend(c.escape_default())
        } else {
            line.push(c)
        }
        line
    })
}

/// How it stands, in one line.
pub fn status(view: &View) -> String {
    let job = &view.job;
    let clock = Clock(view.in_phase);
    match job.phase {
        Phase::Prepare => "preparing".to_owned(),
        Phase::Copy => copying(view),
        Phase::Flush => format!("flushing {} to stable storage, {clock}", Bytes(job.data)),
        Phase::Verify => format!("verifying, {} of {}, {clock}", Bytes(job.verified), Bytes(job.total)),
        Phase::Publish => "publishing".to_owned(),
        Phase::Cancel => "cancelling".to_owned(),
    }
}

fn copying(view: &View) -> String {
    let job = &view.job;
    // Cut, not rounded: 99.96 % is not yet 100.0 %.
    let percent = (view.percent * 1000.0).floor() / 10.0;
    let mut line = format!("{percent:.1} %, {} of {}", Bytes(job.done().min(job.total)), Bytes(job.total));
    match job.paused {
        Some(Pause::User) => line.push_str(", paused"),
        Some(Pause::Error) => line.push_str(", STOPPED by an error; Enter or SIGCONT goes on"),
        None if view.stalled >= STALLED => write!(line, ", STALLED for {}", Clock(view.stalled)).expect("a string"),
        None => {
            write!(line, ", {}", Rate(view.rate)).expect("a string");
            if let Some(remaining) = view.remaining {
                write!(line, ", {} left", Clock(remaining)).expect("a string");
            }
        }
    }
    if job.errors > 0 {
        write!(line, ", {} errors", job.errors).expect("a string");
    }
    line
}

/// What this process can't do any more, for `-v`.
pub fn held(threads: Held, is_shut: bool) -> String {
    let programs = if is_shut { "no program can be started any more" } else { "programs can still be started" };
    format!("the threads that read images are held by {threads}; {programs}")
}

/// What was found, for `-v`.
pub fn started(started: &Started) -> String {
    let target = started.target.as_ref().map_or("standard output".to_owned(), |path| format!("'{}'", path.display()));
    let kind = match started.target_kind {
        TargetKind::File => "new file",
        TargetKind::Existing => "existing image, in place",
        TargetKind::Device => "device, in place",
        TargetKind::Remote => "reached through QEMU, in place",
        TargetKind::Export => "NBD export, in place",
        TargetKind::Stdout => "stream",
        TargetKind::Nowhere => "",
    };
    let instant = match started.instant {
        Instant::Unchanging => "the source must not change",
        Instant::Reflink => "a clone by the file system",
        Instant::Frozen => "its writers were frozen",
        Instant::Unwatched => "the source must not change, which nobody can see behind a server",
        Instant::Unchecked => "the source may change",
    };
    let (device, size) = (started.device.display(), Bytes(started.virtual_size));
    let (from, to) = (started.source_format, started.target_format);
    if started.target_kind == TargetKind::Nowhere {
        return format!("comparing '{device}' ({from}, {size}) with its manifest");
    }
    format!("copying '{device}' ({from}, {size}) to {target} ({to}, {kind}); point in time: {instant}")
}

/// What a backup would take at `asked` bytes a second, in lines. What is too small is said in words that are seen.
pub fn rehearsed(plan: &Rehearsal, asked: Option<u64>) -> Vec<String> {
    let (device, size, data) = (plan.device.display(), Bytes(plan.virtual_size), Bytes(plan.data));
    let mut lines = vec![format!("source '{device}': {}, {size}, of which {data} is data", plan.source_format)];
    let target = plan.target.as_ref().map_or("standard output".to_owned(), |path| format!("'{}'", path.display()));
    let mut line = format!("target {target}: {}", plan.target_format);
    if let Some(free) = plan.target_free {
        let short =
            if plan.target_kind == TargetKind::File && free < plan.data { ", which may be TOO LITTLE" } else { "" };
        write!(line, ", {} free there{short}", Bytes(free)).expect("a string");
    }
    lines.push(line);
    if let Some(duration) = plan.duration {
        let speed = asked.map_or("no limit asked for".to_owned(), |asked| format!("asked for {}", Rate(asked)));
        let read = plan.read_speed.map_or(String::new(), |read| format!(", the source can be read at {}", Rate(read)));
        lines.push(format!("time: {} or more; {speed}{read}", Clock(duration)));
    }
    let Some(rate) = plan.write_rate else {
        lines.push("writers: none; the source must not change during the copy".to_owned());
        return lines;
    };
    let most = plan.overlay_most.unwrap_or(0);
    lines.push(format!("writers: {}, changing {} of clusters", plan.writers, Rate(rate)));
    let mut line = format!("overlay: up to {}", Bytes(most));
    if let Some(free) = plan.overlay_free {
        write!(line, ", {} free there{}", Bytes(free), if free < most { ", which is TOO LITTLE" } else { "" })
            .expect("a string");
    }
    if let Some(limit) = plan.overlay_limit {
        write!(line, ", limit {}{}", Bytes(limit), if limit < most { ", which is TOO LITTLE" } else { "" })
            .expect("a string");
    }
    lines.push(line);
    lines
}

/// A backup that is complete.
pub struct GoodEnd<'a> {
    pub summary: &'a Summary,
    pub elapsed: Duration,
    pub rate_avg: u64,
    /// Nothing was written.
    pub compared: bool,
    /// To standard output.
    pub sent: bool,
}

impl GoodEnd<'_> {
    /// In one line.
    pub fn line(&self) -> String {
        let Summary { total, data, durable, .. } = *self.summary;
        let stable = match (durable, self.sent) {
            (true, _) => "on stable storage",
            (false, true) => "sent; what its reader does with it is not known here",
            (false, false) => "NOT flushed to stable storage",
        };
        let (total, data, rate) = (Bytes(total), Bytes(data), Rate(self.rate_avg));
        let took = match self.elapsed.as_secs() {
            0 => format!("{} ms", self.elapsed.as_millis()),
            1..60 => format!("{:.1} s", self.elapsed.as_secs_f64()),
            _ => Clock(self.elapsed).to_string(),
        };
        if self.compared {
            return format!("verified: {total}, {data} of it data, in {took}, {rate}; as its manifest says");
        }
        let written = self.summary.written.map(|written| format!("; {} differed and was written", Bytes(written)));
        let written = written.unwrap_or_default();
        let proven = if self.summary.verified == Some(true) { ", read back and compared" } else { "" };
        format!("complete: {total}, {data} of it data, in {took}, {rate}; {stable}{proven}{written}")
    }

    /// The ranges that are missing, a line each: they must be known even where success is silent.
    pub fn missing(&self) -> Vec<String> {
        let Summary { unreadable, skipped, .. } = self.summary;
        let mut lines = Vec::new();
        listed(&mut lines, unreadable, "source range", "could not be read: it is zeroes in the copy");
        listed(&mut lines, skipped, "target range", "could not be written: it holds what it held before");
        lines
    }
}

/// The ranges of a comparison that failed, a line each, where its error can't name them all.
pub fn differing(ranges: &[ByteRange]) -> Vec<String> {
    let mut lines = Vec::new();
    if ranges.len() > 1 {
        listed(&mut lines, ranges, "range", "differs");
    }
    lines
}

fn listed(lines: &mut Vec<String>, ranges: &[ByteRange], what: &str, outcome: &str) {
    lines.extend(ranges.iter().take(MOST_RANGES).map(|range| format!("{what} {range} {outcome}")));
    if let Some(more) = ranges.len().checked_sub(MOST_RANGES).filter(|more| *more > 0) {
        lines.push(format!("{more} more {what}s {outcome}; --json lists all"));
    }
}

/// A backup that failed.
pub struct BadEnd<'a> {
    pub message: &'a str,
    pub state: TargetState,
    /// As the user named it.
    pub target: &'a str,
    /// Writing had begun, so that the target's state is worth a word.
    pub begun: bool,
}

impl BadEnd<'_> {
    /// In one line.
    pub fn line(&self) -> String {
        let Self { message, target, .. } = self;
        match self.state {
            TargetState::Incomplete => format!("{message}; {target} is INCOMPLETE, do not use it"),
            TargetState::Complete => format!("{message}; {target} is complete"),
            TargetState::OldOrComplete => format!("{message}; {target} is what it was before or the complete copy"),
            TargetState::Removed if self.begun => format!("{message}; the partial copy was removed"),
            _ => (*message).to_owned(),
        }
    }
}
