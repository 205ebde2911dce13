//! One run, from the engine's start to the last record: whatever the engine, the target or a reader does, it ends in
//! time and says how.

use super::json::{self, Body, ExitError};
use super::progress::{BadEnd, Display, GoodEnd, Style};
use super::records::Records;
use super::resolve::View;
use super::signals::{self, Request};
use super::watch::{Watch, report_status};
use super::{Ending, exit, keys};
use crate::backup::{Failure, Options, Summary, TargetState};
use crate::error::{Error, Kind};
use crate::ground::size::Rate;
use crate::ground::status::Pause;
use crate::job::Job;
use crate::monitor::{Monitor, TargetKind};
use anyhow::Context;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant};

/// A cancelled engine gets so long to undo what it did; one that hangs in an I/O call never comes back.
const GRACE: Duration = Duration::from_millis(600);
/// The undoing may hang like the engine.
const UNDO_BOUND: Duration = Duration::from_millis(150);
/// A signal ends the process within this, all told, even when nobody reads the last record.
const SIGNAL_BOUND: Duration = Duration::from_millis(900);
/// Who does not read has so long to get the last record.
const LAST_RECORD_BOUND: Duration = Duration::from_secs(2);
/// And so long from the next signal on.
const IMPATIENT_BOUND: Duration = Duration::from_millis(100);

/// Where a run writes.
pub struct Ends {
    /// JSON lines.
    pub json: Option<Box<dyn Write + Send>>,
    /// Lines for people.
    pub people: Box<dyn Write + Send>,
}

enum Wake {
    Ended(Box<Result<Summary, Failure>>),
    Panicked,
    Signal(i32),
    /// A reader has got everything, or is gone.
    Served,
}

/// A run under way.
pub struct Session {
    view: View,
    job: Arc<Job>,
    watch: Arc<Watch>,
    target: String,
    began: Instant,
    wake: Sender<Wake>,
    woken: Receiver<Wake>,
    status_wanted: Sender<()>,
    /// Readers that have not got everything yet.
    unserved: usize,
    cancelled: Option<(i32, Instant)>,
}

/// How the engine ended.
enum Outcome {
    Complete(Summary),
    Failed(Failure),
    /// It did not come back after a cancel.
    Abandoned {
        undone: bool,
    },
    Panicked {
        undone: bool,
    },
}

impl Session {
    /// Starts the threads that write. `speed` in bytes a second; `target` as messages name it.
    pub fn start(view: View, speed: Option<u64>, target: String, ends: Ends) -> anyhow::Result<Self> {
        let (wake, woken) = channel();
        let (status_wanted, asked) = channel();
        let served = || {
            let wake = wake.clone();
            move || drop(wake.send(Wake::Served))
        };
        let job = Arc::new(Job::new(speed));
        let display = Display::start(view.style, Arc::clone(&job), ends.people, served());
        let display = display.context("start the progress thread")?;
        let records = ends.json.map(|out| Records::to(out, served())).transpose().context("start the JSON thread")?;
        if let Some(records) = records.clone() {
            let (job, interval) = (Arc::clone(&job), view.status_interval);
            let report = move || report_status(&job, &records, interval, &asked);
            thread::Builder::new().name("status".to_owned()).spawn(report).context("start the status thread")?;
        }
        let unserved = 1 + usize::from(records.is_some());
        let watch = Arc::new(Watch {
            job: Arc::clone(&job),
            display,
            records,
            quiet: view.quiet,
            verbose: view.verbose,
            started: OnceLock::new(),
            warnings: AtomicU64::new(0),
            fault_lines: AtomicU64::new(0),
        });
        let began = Instant::now();
        Ok(Self { view, job, watch, target, began, wake, woken, status_wanted, unserved, cancelled: None })
    }

    /// Takes over what a process has only one of: signals, the panic hook, the keyboard.
    pub fn own_process(&self, speed: Option<u64>) -> anyhow::Result<()> {
        let display = self.watch.display.clone();
        // The default hook writes to standard error, which may block.
        std::panic::set_hook(Box::new(move |panic| display.say(&format!("internal error: {panic}"))));
        let (wake, job, display) = (self.wake.clone(), Arc::clone(&self.job), self.watch.display.clone());
        let status_wanted = self.status_wanted.clone();
        signals::listen(move |request| match request {
            Request::End(signal) => drop(wake.send(Wake::Signal(signal))),
            Request::Status => {
                display.show_status();
                // Without --json nobody listens.
                let _ = status_wanted.send(());
            }
            Request::ToggleSpeed => display.say(&toggle_speed(&job, speed)),
            Request::GoOn if job.snapshot().paused == Some(Pause::Error) => job.resume(),
            Request::GoOn => {}
        })?;
        keys::resume_on_enter(Arc::clone(&self.job)).context("start the keyboard thread")
    }

    /// Runs the engine to its end, or to the end of patience.
    pub fn run<E>(mut self, options: Options, engine: E) -> Ending
    where
        E: FnOnce(&Options, &Arc<Job>, &dyn Monitor) -> Result<Summary, Failure> + Send + 'static,
    {
        let (wake, job, watch) = (self.wake.clone(), Arc::clone(&self.job), Arc::clone(&self.watch));
        let work = move || {
            // Nothing of what it shares is used after a panic, but for the job, whose locks recover.
            let ended = catch_unwind(AssertUnwindSafe(|| engine(&options, &job, &*watch)));
            // Gone only when the process is about to be.
            let _ = wake.send(ended.map_or(Wake::Panicked, |result| Wake::Ended(Box::new(result))));
        };
        let outcome = match thread::Builder::new().name("backup".to_owned()).spawn(work) {
            Ok(_) => self.supervise(),
            Err(error) => {
                let error = Error::new(Kind::Other, format!("start the backup thread: {error}"));
                Outcome::Failed(Failure { error, target: TargetState::Untouched })
            }
        };
        self.end(outcome)
    }

    /// Ends a run that never began.
    pub fn refuse(mut self, error: Error) -> Ending {
        self.end(Outcome::Failed(Failure { error, target: TargetState::Untouched }))
    }

    fn supervise(&mut self) -> Outcome {
        loop {
            let wake = match self.cancelled {
                None => self.woken.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some((_, at)) => self.woken.recv_timeout((at + GRACE).saturating_duration_since(Instant::now())),
            };
            match wake {
                Ok(Wake::Ended(result)) => {
                    return result.map_or_else(Outcome::Failed, Outcome::Complete);
                }
                Ok(Wake::Panicked) => return Outcome::Panicked { undone: self.undo() },
                Ok(Wake::Served) => self.unserved -= 1,
                Ok(Wake::Signal(signal)) => match self.cancelled {
                    None => {
                        self.cancelled = Some((signal, Instant::now()));
                        self.job.cancel();
                    }
                    Some(_) if signal == signal_hook::consts::SIGINT => {
                        return Outcome::Abandoned { undone: self.undo() };
                    }
                    Some(_) => {}
                },
                Err(_) => return Outcome::Abandoned { undone: self.undo() },
            }
        }
    }

    /// Undoes what the engine can't: releases writers, unlinks the partial target. False when that hangs too.
    fn undo(&self) -> bool {
        let (done, undone) = channel();
        let job = Arc::clone(&self.job);
        let undo = move || {
            job.abandon();
            let _ = done.send(());
        };
        thread::Builder::new().name("undo".to_owned()).spawn(undo).is_ok() && undone.recv_timeout(UNDO_BOUND).is_ok()
    }

    fn end(&mut self, outcome: Outcome) -> Ending {
        let abandoned = matches!(outcome, Outcome::Abandoned { .. });
        let (code, last) = match outcome {
            Outcome::Complete(summary) => self.complete(&summary),
            Outcome::Failed(Failure { error, target }) => self.failed(&error, target, true),
            Outcome::Abandoned { undone } => {
                let error = Error::new(Kind::Cancelled, "the job hangs and was abandoned");
                self.failed(&error, self.state_after(undone), undone)
            }
            Outcome::Panicked { undone } => {
                self.failed(&Error::new(Kind::Other, "internal error"), self.state_after(undone), undone)
            }
        };
        if let Some(records) = &self.watch.records {
            records.finish(last);
        }
        self.watch.display.finish();
        self.wait_for_readers();
        let signal = self.cancelled.map(|(signal, _)| signal).filter(|signal| code == exit::of_signal(*signal));
        Ending { code, signal, abandoned }
    }

    fn complete(&self, summary: &Summary) -> (u8, Body) {
        let code = if summary.is_whole() { exit::COMPLETE } else { exit::NOT_WHOLE };
        let elapsed = self.began.elapsed();
        let rate_avg = (summary.data as f64 / elapsed.as_secs_f64().max(1e-3)) as u64;
        let good = GoodEnd { summary, elapsed, rate_avg };
        let display = &self.watch.display;
        good.missing().iter().for_each(|line| display.say(line));
        if !summary.consistent && !self.view.quiet {
            display.say("warning: the copy may be INCONSISTENT: the source could change while it was copied");
        }
        if self.view.verbose || (self.view.style != Style::None && !self.view.quiet) {
            display.say(&good.line());
        }
        let now = self.job.snapshot();
        let body = json::Summary {
            result: if summary.is_whole() { "complete" } else { "not_whole" },
            exit_code: code,
            durable: summary.durable,
            verified: None,
            hash: None,
            consistent: summary.consistent,
            total_bytes: summary.total,
            bytes_done: summary.data + summary.zero,
            bytes_data: summary.data,
            bytes_zero: summary.zero,
            total_duration: elapsed.as_secs_f64(),
            rate_avg,
            warnings: self.watch.warnings.load(Relaxed),
            error_count: now.errors,
            unreadable: summary.unreadable.iter().copied().map(Into::into).collect(),
            skipped: summary.skipped.iter().copied().map(Into::into).collect(),
            overlay: now.overlay.map(Into::into),
            writer: now.writers.map(Into::into),
            dropped: json::Dropped::default(),
        };
        (code, Body::Summary(Box::new(body)))
    }

    fn failed(&self, error: &Error, state: TargetState, released: bool) -> (u8, Body) {
        let (mut code, mut reason) = exit::of(error.kind());
        let mut message = error.to_string();
        let mut signal = None;
        // Whatever else went wrong meanwhile, a signal is what ended it: a pipe's reader dies of the same Ctrl-C.
        if let Some((number, _)) = self.cancelled {
            let name = signals::name(number);
            (code, reason, signal) = (exit::of_signal(number), "signal", Some(name));
            message = format!("ended by {name}: {message}");
        }
        let begun = self.watch.started.get().is_some();
        let line = BadEnd { message: &message, state, target: &self.target, begun }.line();
        self.watch.display.say(&line);
        let body = ExitError {
            exit_code: code,
            reason,
            signal,
            message: line,
            target_state: state.name(),
            writer_released: self.job.snapshot().writers.map(|_| released),
            seconds_elapsed: self.began.elapsed().as_secs(),
            dropped: json::Dropped::default(),
        };
        (code, Body::ExitError(Box::new(body)))
    }

    /// What the target is when the engine can't say it.
    fn state_after(&self, undone: bool) -> TargetState {
        match self.watch.started.get().map(|started| started.target_kind) {
            None if undone => TargetState::Untouched,
            Some(TargetKind::File) if undone => TargetState::Removed,
            _ => TargetState::Incomplete,
        }
    }

    fn wait_for_readers(&mut self) {
        let mut bound = Instant::now() + LAST_RECORD_BOUND;
        if let Some((_, at)) = self.cancelled {
            bound = bound.min(at + SIGNAL_BOUND);
        }
        while self.unserved > 0 {
            match self.woken.recv_timeout(bound.saturating_duration_since(Instant::now())) {
                Ok(Wake::Served) => self.unserved -= 1,
                // The outcome stands; who reads gets it, and nobody wants to wait for who does not.
                Ok(Wake::Signal(_)) => bound = bound.min(Instant::now() + IMPATIENT_BOUND),
                Ok(Wake::Ended(_) | Wake::Panicked) => {}
                Err(_) => return,
            }
        }
    }
}

/// SIGUSR2; what it did, in words.
fn toggle_speed(job: &Job, limit: Option<u64>) -> String {
    match (limit, job.speed()) {
        (None, _) => "SIGUSR2: there is no --speed to turn off".to_owned(),
        (Some(_), Some(_)) => {
            job.set_speed(None);
            "speed limit off; SIGUSR2 turns it on again".to_owned()
        }
        (Some(limit), None) => {
            job.set_speed(Some(limit));
            format!("speed limit {} again", Rate(limit))
        }
    }
}

#[cfg(test)]
mod tests;
