//! Listens to the engine and looks at the job; passes both on to people and programs. Nothing here blocks.

use super::json::{self, Body, Device, Fault, PathName, Start, Status, Target, Warning};
use super::progress::pace::{Pace, View};
use super::progress::{self, Display};
use super::records::Records;
use super::signs::Signs;
use super::systemd::{self, Heartbeat};
use crate::error::{Error, Side};
use crate::ground::policy::Action;
use crate::ground::status::{Pause, Phase};
use crate::job::Job;
use crate::monitor::{self, Event, Instant, Monitor, Rehearsal, Started, TargetKind};
use crate::sandbox;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// Phases and pauses are noticed this soon.
const LOOK: Duration = Duration::from_millis(100);
/// A dying disk has millions of bad ranges: people get so many lines, programs get all.
const MOST_FAULT_LINES: u64 = 100;
/// Standard output as a path.
const STDOUT: &str = "-";

/// The monitor of a run.
pub struct Watch {
    pub job: Arc<Job>,
    pub display: Display,
    pub records: Option<Records>,
    pub quiet: bool,
    pub verbose: bool,
    /// Set when the instant is taken.
    pub started: OnceLock<Started>,
    pub warnings: AtomicU64,
    pub fault_lines: AtomicU64,
}

impl Monitor for Watch {
    fn event(&self, event: Event<'_>) {
        match event {
            Event::Opened { .. } => {}
            Event::Started(started) => {
                systemd::tell(systemd::READY);
                // Once a run: a second event would be about the same target.
                let _ = self.started.set(started.clone());
                self.record(|| Body::Start(Box::new(self.start(started))));
                if self.verbose {
                    self.display.say(&progress::started(started));
                }
            }
            Event::Rehearsed(rehearsal) => {
                systemd::tell(systemd::READY);
                self.record(|| Body::Plan(Box::new(plan_record(rehearsal))));
                progress::rehearsed(rehearsal, self.job.speed()).iter().for_each(|line| self.display.say(line));
            }
            Event::Warning(warning) => {
                self.warnings.fetch_add(1, Relaxed);
                self.record(|| Body::Warning(warning_record(warning)));
                // What is missing at a range was told as a fault, and is listed at the end.
                if !self.quiet && warning.range.is_none() {
                    self.display.warn(&warning.message);
                }
            }
            Event::Fault { error, action } => {
                self.record(|| Body::Error(self.fault(error, action)));
                self.say_fault(error, action);
            }
        }
    }
}

impl Watch {
    /// Everything is open: takes from this process what it needs no more; `for_good`: no program will be started.
    pub fn hold(&self, for_good: bool) {
        let shut = for_good && sandbox::shut_process();
        if self.verbose {
            self.display.say(&progress::held(sandbox::offered(), shut));
        }
    }

    fn record(&self, body: impl FnOnce() -> Body) {
        if let Some(records) = &self.records {
            let _ = records.push(body());
        }
    }

    fn say_fault(&self, error: &Error, action: Action) {
        let what_now = match action {
            // The run ends with this error: its last line says so.
            Action::Report => return,
            Action::Ignore => "going on without it".to_owned(),
            Action::Stop => {
                format!("stopped; press Enter to go on, or send SIGCONT to {}", std::process::id())
            }
        };
        match (self.fault_lines.fetch_add(1, Relaxed), action) {
            (MOST_FAULT_LINES, Action::Ignore) => self.display.fail("further errors are counted, not shown"),
            (shown, Action::Ignore) if shown > MOST_FAULT_LINES => {}
            _ => self.display.fail(&format!("{error}; {what_now}")),
        }
    }

    fn fault(&self, error: &Error, action: Action) -> Fault {
        let place = error.place();
        let range = place.and_then(|place| place.range);
        let named = place.and_then(|place| place.path.as_deref());
        Fault {
            during: place.map_or("", |place| place.during),
            side: place.map(|place| place.side.to_string()),
            name: named.or_else(|| self.path_of(place?.side)).map(PathName::of),
            offset: range.map(|range| range.offset),
            length: range.map(|range| range.length),
            errno: error.errno().map(json::errno_name),
            errno_num: error.errno(),
            action: action.name(),
            message: error.to_string(),
            fatal: action == Action::Report,
        }
    }

    fn path_of(&self, side: Side) -> Option<&Path> {
        let started = self.started.get()?;
        match side {
            Side::Source => Some(&started.device),
            Side::Target => Some(started.target.as_deref().unwrap_or(Path::new(STDOUT))),
            Side::Overlay | Side::Disk => None,
        }
    }

    fn start(&self, started: &Started) -> Start {
        let now = self.job.snapshot();
        Start {
            version: env!("CARGO_PKG_VERSION"),
            pid: std::process::id(),
            device: Device {
                name: PathName::of(&started.device),
                format: started.source_format,
                virtual_size: started.virtual_size,
            },
            target: target_record(started.target.as_deref(), started.target_format, started.target_kind),
            point_in_time: json::time(started.point_in_time),
            instant: match started.instant {
                Instant::Unchanging => "unchanging",
                Instant::Reflink => "reflink",
                Instant::Frozen => "frozen",
                Instant::Unwatched => "unwatched",
                Instant::Unchecked => "unchecked",
            },
            speed_limit: now.speed_limit,
            writers: now.writers.map_or(0, |writers| writers.attached),
            overlay: now.overlay.map(Into::into),
        }
    }
}

fn target_record(path: Option<&Path>, format: &'static str, kind: TargetKind) -> Target {
    Target {
        name: PathName::of(path.unwrap_or(Path::new(STDOUT))),
        format,
        kind: match kind {
            TargetKind::File => "file",
            TargetKind::Existing => "existing",
            TargetKind::Device => "device",
            TargetKind::Remote => "remote",
            TargetKind::Export => "nbd",
            TargetKind::Stdout => "stdout",
            TargetKind::Nowhere => "none",
        },
    }
}

fn plan_record(plan: &Rehearsal) -> json::Plan {
    json::Plan {
        version: env!("CARGO_PKG_VERSION"),
        device: Device {
            name: PathName::of(&plan.device),
            format: plan.source_format,
            virtual_size: plan.virtual_size,
        },
        target: target_record(plan.target.as_deref(), plan.target_format, plan.target_kind),
        bytes_data: plan.data,
        read_speed: plan.read_speed,
        seconds: plan.duration.map(|duration| duration.as_secs_f64()),
        target_free: plan.target_free,
        writers: plan.writers as u64,
        write_rate: plan.write_rate,
        overlay_most: plan.overlay_most,
        overlay_free: plan.overlay_free,
        overlay_limit: plan.overlay_limit,
    }
}

fn warning_record(warning: &monitor::Warning) -> Warning {
    Warning {
        code: warning.code,
        offset: warning.range.map(|range| range.offset),
        length: warning.range.map(|range| range.length),
        errno: warning.errno.map(json::errno_name),
        message: warning.message.clone(),
    }
}

/// Where statuses go.
pub struct Outlets {
    /// JSON lines.
    pub records: Option<Records>,
    /// Files, and the disk's place there.
    pub signs: Option<(Signs, usize)>,
    /// Of several disks it speaks to the service manager.
    pub is_first: bool,
}

impl Outlets {
    /// Somebody listens.
    pub fn are_wanted(&self) -> bool {
        self.records.is_some() || self.signs.is_some() || self.tells_systemd()
    }

    fn tells_systemd(&self) -> bool {
        self.is_first && systemd::is_there()
    }

    /// Tells how the job stands at every interval, when phase or pause change, and whenever `asked` says so. Returns when
    /// the other end of `asked` is gone.
    pub fn report_status(&self, job: &Job, interval: Duration, asked: &Receiver<()>) {
        let began = std::time::Instant::now();
        let mut pace = Pace::default();
        let mut heartbeat = self.tells_systemd().then(Heartbeat::default);
        let mut next = interval;
        let mut last: Option<(Phase, Option<Pause>)> = None;
        loop {
            let wanted = match asked.recv_timeout(LOOK) {
                Ok(()) => true,
                Err(RecvTimeoutError::Timeout) => false,
                Err(RecvTimeoutError::Disconnected) => return,
            };
            let view = pace.look(began.elapsed(), job.snapshot());
            let state = (view.job.phase, view.job.paused);
            let changed = last.is_some_and(|last| last != state);
            last = Some(state);
            if let Some(heartbeat) = &mut heartbeat {
                heartbeat.beat(view.elapsed, || progress::status(&view));
            }
            if wanted || changed || view.elapsed >= next {
                self.push(&view);
                next = view.elapsed + interval;
            }
        }
    }

    fn push(&self, view: &View) {
        let status = Body::Status(Box::new(status_record(view)));
        let seq = self.records.as_ref().and_then(|records| records.push(status.clone()));
        if let Some((signs, place)) = &self.signs {
            signs.status(*place, &status, seq);
        }
    }
}

fn status_record(view: &View) -> Status {
    let job = &view.job;
    Status {
        phase: job.phase.name(),
        status: view.status(),
        percent_done: (view.percent * 10_000.0).floor() / 10_000.0,
        total_bytes: job.total,
        bytes_done: job.done(),
        bytes_data: job.data,
        bytes_zero: job.zero,
        bytes_verified: job.verified,
        rate: view.rate,
        rate_avg: view.rate_avg,
        speed_limit: job.speed_limit,
        seconds_elapsed: view.elapsed.as_secs(),
        seconds_remaining: view.remaining.map(|left| left.as_secs()),
        seconds_stalled: view.stalled.as_secs(),
        error_count: job.errors,
        overlay: job.overlay.map(Into::into),
        writer: job.writers.map(Into::into),
    }
}
