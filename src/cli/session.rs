//! One run, from the engine's start to the last record: whatever the engine, the target or a reader does, it ends in
//! time and says how.

use super::cause::{Cause, Verdict};
use super::hooks::{Hooks, RunHooks};
use super::json::{self, Body, ExitError};
use super::progress::{BadEnd, Display, GoodEnd, People, Row, Style, differing};
use super::records::{Lines, Records};
use super::remote::{Remote, Tee};
use super::resolve::{View, target_name, target_word};
use super::signals::{self, Request};
use super::signs::{Files, Run, Signs};
use super::steer::{self, Steering};
use super::watch::{Outlets, Watch};
use super::{Ending, exit, keys};
use crate::backup::{self, Disk, Ended, Failure, Options, Summary, TargetState};
use crate::error::{Error, Kind};
use crate::ground::size::Rate;
use crate::ground::status::Pause;
use crate::image::stream::can_flush;
use crate::job::Job;
use crate::monitor::TargetKind;
use anyhow::Context;
use std::io::{self, Write};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, OnceLock};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

/// How long it waits for whom.
#[derive(Clone, Copy, Debug)]
struct Bounds {
    /// For a cancelled engine to undo what it did; one that hangs in an I/O call never comes back.
    grace: Duration,
    /// For the undoing, which may hang like the engine.
    undo: Duration,
    /// From a signal to the end, all told, even when nobody reads the last record.
    signal: Duration,
    /// For who does not read to get the last record.
    last_record: Duration,
    /// And from the next signal on.
    impatient: Duration,
}

const BOUNDS: Bounds = Bounds {
    grace: Duration::from_millis(600),
    undo: Duration::from_millis(150),
    signal: Duration::from_millis(900),
    last_record: Duration::from_secs(2),
    impatient: Duration::from_millis(100),
};

/// Where a run writes.
pub struct Ends {
    /// JSON lines.
    pub json: Option<Box<dyn Write + Send>>,
    /// Lines for people.
    pub people: People,
    /// Files for monitors.
    pub files: Files,
}

enum Wake {
    /// The disk at this place.
    Ended(usize, Box<Result<Summary, Failure>>),
    /// The engine is gone; a disk that has not ended never will.
    Left,
    Signal(i32),
    /// This flag's time is up.
    Late(&'static str),
    /// A reader has got everything, or is gone.
    Served,
}

/// A run under way.
pub struct Session {
    disks: Vec<Watched>,
    display: Display,
    wake: Sender<Wake>,
    woken: Receiver<Wake>,
    /// Readers that have not got everything yet.
    unserved: usize,
    cancelled: Option<(Cause, Instant)>,
    /// The engine did not come back after a cancel.
    abandoned: bool,
    remote: Option<Remote>,
    bounds: Bounds,
}

/// One disk of a run.
struct Watched {
    job: Arc<Job>,
    watch: Arc<Watch>,
    /// As messages name it.
    target: String,
    /// Device and target as given.
    ends: [String; 2],
    /// Where files say how it stands, and its place there.
    signs: Option<(Signs, usize)>,
    view: View,
    began: Instant,
    status_wanted: Sender<()>,
    /// Set with the last record.
    code: Option<u8>,
}

/// How far an undoing came.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Undone {
    All,
    /// It came when the copy was being published.
    TooLate,
    /// It hangs.
    NotInTime,
}

/// How a disk ended.
enum Outcome {
    Complete(Summary),
    /// `released`: the writers were.
    Failed {
        failure: Failure,
        released: bool,
    },
}

impl Session {
    /// Starts the threads that write. `speed` in bytes a second. Without `disks` it is for a refusal.
    pub fn start(view: View, speed: Option<u64>, disks: &[Options], ends: Ends) -> anyhow::Result<Self> {
        let (wake, woken) = channel();
        let served = || {
            let wake = wake.clone();
            move || drop(wake.send(Wake::Served))
        };
        let places = 0..disks.len().max(1);
        let jobs: Vec<Arc<Job>> = places.map(|_| Arc::new(Job::new(speed))).collect();
        let name = |place: usize| (jobs.len() > 1).then(|| disks[place].device.to_string());
        let row = |(place, job): (usize, &Arc<Job>)| Row { name: name(place), job: Arc::clone(job) };
        let rows = jobs.iter().enumerate().map(row).collect();
        let display = Display::start(view.style, rows, ends.people, served()).context("start the progress thread")?;
        let lines = ends.json.map(Lines::to);
        let refused = ends.files.refused.clone();
        // A rehearsal is neither a success nor a failure of backups.
        let files = Files { metrics: ends.files.metrics.filter(|_| !view.dry_run), ..ends.files };
        let ids: Vec<String> = jobs.iter().map(|_| json::new_job()).collect();
        let signs = files.are_wanted().then(|| Signs::start(files, &ids, display.clone(), served()));
        let signs = signs.transpose().context("start the thread of the files")?;
        let mut watched = Vec::new();
        for (place, (job, id)) in jobs.iter().zip(ids).enumerate() {
            let records = lines.clone().map(|lines| Records::to(id, lines, served())).transpose();
            let records = records.context("start a JSON thread")?;
            let outlets = Outlets { records, signs: signs.clone().map(|signs| (signs, place)), is_first: place == 0 };
            watched.push(Watched::start(view, Arc::clone(job), disks.get(place), display.about(name(place)), outlets)?);
        }
        if let Some(ends) = refused {
            watched[0].ends = ends;
        }
        let unserved = 1 + lines.map_or(0, |_| jobs.len()) + usize::from(signs.is_some());
        Ok(Self {
            disks: watched,
            display,
            wake,
            woken,
            unserved,
            cancelled: None,
            abandoned: false,
            remote: None,
            bounds: BOUNDS,
        })
    }

    /// Lets clients of QMP watch and steer, at `named` if there is one.
    pub fn listen(&mut self, disks: &[Options], named: Option<&Path>) -> Result<(), Error> {
        let wake = self.wake.clone();
        let quit = move || drop(wake.send(Wake::Signal(signal_hook::consts::SIGTERM)));
        self.remote = Some(Remote::start(disks, &self.jobs(), named, quit)?);
        Ok(())
    }

    /// Takes over what a process has only one of: signals, the panic hook, the keyboard.
    pub fn own_process(&self) -> anyhow::Result<()> {
        let display = self.display.clone();
        // The default hook writes to standard error, which may block.
        std::panic::set_hook(Box::new(move |panic| display.fail(&format!("internal error: {panic}"))));
        let (wake, jobs, display) = (self.wake.clone(), self.jobs(), self.display.clone());
        let status_wanted: Vec<Sender<()>> = self.disks.iter().map(|disk| disk.status_wanted.clone()).collect();
        signals::listen(move |request| match request {
            Request::End(signal) => drop(wake.send(Wake::Signal(signal))),
            Request::Status => {
                display.show_status();
                for wanted in &status_wanted {
                    // Without --json nobody listens.
                    let _ = wanted.send(());
                }
            }
            Request::ToggleSpeed => display.say(&toggle_speed(&jobs)),
            Request::GoOn => {
                let stopped = |job: &&Arc<Job>| job.snapshot().paused == Some(Pause::Error);
                jobs.iter().filter(stopped).for_each(|job| job.resume());
            }
        })?;
        keys::resume_on_enter(self.jobs()).context("start the keyboard thread")
    }

    /// Lets the speed, which is `first` now, follow `steering`, and ends the run when its time is up.
    pub fn steer(&self, steering: Steering, first: Option<u64>) -> anyhow::Result<()> {
        let wake = self.wake.clone();
        let late = move |flag| drop(wake.send(Wake::Late(flag)));
        steer::start(steering, first, self.jobs(), late).context("start the thread that steers")
    }

    fn jobs(&self) -> Vec<Arc<Job>> {
        self.disks.iter().map(|disk| Arc::clone(&disk.job)).collect()
    }

    /// Runs the engine to its end, or to the end of patience.
    pub fn run<E>(mut self, options: Vec<Options>, hooks: Hooks, engine: E) -> Ending
    where
        E: FnOnce(&[Disk<'_>], &Ended<'_>) + Send + 'static,
    {
        let wake = self.wake.clone();
        let watched: Vec<_> = self.disks.iter().map(|disk| (Arc::clone(&disk.job), Arc::clone(&disk.watch))).collect();
        let remote = self.remote.as_ref();
        let entries: Vec<_> = (0..watched.len()).map(|place| remote.and_then(|remote| remote.entry(place))).collect();
        let tell_remote = remote.map(Remote::ended);
        let shuts = hooks.runs_nothing_later();
        let hooks = Arc::new(RunHooks::new(hooks, &options));
        let told = Arc::clone(&hooks);
        let work = move || {
            let tees = watched.iter().zip(entries).enumerate().map(|(place, ((_, watch), remote))| {
                let shuts = (place == 0).then_some(shuts);
                Tee { own: watch, remote, shuts }
            });
            let tees: Vec<Tee<'_>> = tees.collect();
            let disks = options.iter().zip(&watched).zip(&tees);
            let disks: Vec<Disk<'_>> =
                disks.map(|((options, (job, _)), tee)| Disk { options, job, monitor: tee }).collect();
            let ended = |place: usize, result| {
                let result: Result<Summary, Failure> = hooks.after(place, disks[place].job, result);
                tell_remote.iter().for_each(|tell| tell(place, result.as_ref()));
                // Gone only when the process is about to be.
                let _ = wake.send(Wake::Ended(place, Box::new(result)));
            };
            // Nothing of what it shares is used after a panic, but for the jobs, whose locks recover.
            let _ = catch_unwind(AssertUnwindSafe(|| match hooks.before(&disks) {
                Ok(()) => engine(&disks, &ended),
                Err(error) => backup::fail_all(disks.len(), error, &ended),
            }));
            let _ = wake.send(Wake::Left);
        };
        match thread::Builder::new().name("backup".to_owned()).spawn(work) {
            Ok(_) => self.supervise(&told),
            Err(error) => self.fail_all(&format!("start the backup thread: {error}"), Kind::Other),
        }
        self.end()
    }

    /// Ends a run that never began.
    pub fn refuse(mut self, error: &Error) -> Ending {
        self.fail_all(&error.to_string(), error.kind());
        self.end()
    }

    fn fail_all(&mut self, why: &str, kind: Kind) {
        for place in 0..self.disks.len() {
            let failure = Failure { error: Error::new(kind, why), target: TargetState::Untouched };
            self.end_disk(place, Outcome::Failed { failure, released: true });
        }
    }

    fn supervise(&mut self, hooks: &RunHooks) {
        while self.disks.iter().any(|disk| disk.code.is_none()) {
            let wake = match self.cancelled {
                None => self.woken.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some((_, at)) => {
                    self.woken.recv_timeout((at + self.bounds.grace).saturating_duration_since(Instant::now()))
                }
            };
            match wake {
                Ok(Wake::Ended(place, result)) => {
                    let failed = |failure| Outcome::Failed { failure, released: true };
                    self.end_disk(place, result.map_or_else(failed, Outcome::Complete));
                }
                Ok(Wake::Left) => self.give_up(hooks, Kind::Other, "internal error"),
                Ok(Wake::Served) => self.unserved -= 1,
                Ok(Wake::Signal(signal)) => match self.cancelled {
                    None => self.cancel(hooks, Cause::Signal(signal)),
                    Some(_) if signal == signal_hook::consts::SIGINT => self.abandon(hooks),
                    Some(_) => {}
                },
                Ok(Wake::Late(flag)) if self.cancelled.is_none() => self.cancel(hooks, Cause::Deadline(flag)),
                Ok(Wake::Late(_)) => {}
                Err(_) => self.abandon(hooks),
            }
        }
    }

    fn cancel(&mut self, hooks: &RunHooks, cause: Cause) {
        self.cancelled = Some((cause, Instant::now()));
        hooks.set_cause(cause);
        self.disks.iter().for_each(|disk| disk.job.cancel());
    }

    fn abandon(&mut self, hooks: &RunHooks) {
        self.abandoned = true;
        self.give_up(hooks, Kind::Cancelled, "the job hangs and was abandoned");
    }

    /// Undoes what the engine can't, for every disk that has not ended; `why` it can't.
    fn give_up(&mut self, hooks: &RunHooks, kind: Kind, why: &str) {
        let open = self.disks.iter().enumerate().filter(|(_, disk)| disk.code.is_none());
        let undoing: Vec<(usize, Receiver<bool>)> = open.map(|(place, disk)| (place, disk.undo())).collect();
        let bound = Instant::now() + self.bounds.undo;
        for (place, undone) in undoing {
            let undone = match undone.recv_timeout(bound.saturating_duration_since(Instant::now())) {
                Ok(true) => Undone::All,
                Ok(false) => Undone::TooLate,
                Err(_) => Undone::NotInTime,
            };
            let failure = Failure { error: Error::new(kind, why), target: self.disks[place].state_after(undone) };
            hooks.gave_up(place, &failure);
            self.end_disk(place, Outcome::Failed { failure, released: undone != Undone::NotInTime });
        }
    }

    fn end_disk(&mut self, place: usize, outcome: Outcome) {
        self.disks[place].end(outcome, self.cancelled.map(|(cause, _)| cause));
        self.display.finish(place);
    }

    fn end(&mut self) -> Ending {
        if let Some(remote) = self.remote.take() {
            remote.stop();
        }
        self.wait_for_readers();
        let code = exit::of_all(self.disks.iter().filter_map(|disk| disk.code));
        let signal = match self.cancelled {
            Some((Cause::Signal(signal), _)) if code == exit::of_signal(signal) => Some(signal),
            _ => None,
        };
        Ending { code, signal, abandoned: self.abandoned }
    }

    fn wait_for_readers(&mut self) {
        let mut bound = Instant::now() + self.bounds.last_record;
        if let Some((_, at)) = self.cancelled {
            bound = bound.min(at + self.bounds.signal);
        }
        while self.unserved > 0 {
            match self.woken.recv_timeout(bound.saturating_duration_since(Instant::now())) {
                Ok(Wake::Served) => self.unserved -= 1,
                // The outcome stands; who reads gets it, and nobody wants to wait for who does not.
                Ok(Wake::Signal(_)) => bound = bound.min(Instant::now() + self.bounds.impatient),
                Ok(Wake::Ended(..) | Wake::Left | Wake::Late(_)) => {}
                Err(_) => return,
            }
        }
    }
}

impl Watched {
    fn start(
        view: View,
        job: Arc<Job>,
        disk: Option<&Options>,
        display: Display,
        outlets: Outlets,
    ) -> anyhow::Result<Self> {
        let (status_wanted, asked) = channel();
        let (records, signs) = (outlets.records.clone(), outlets.signs.clone());
        if outlets.are_wanted() {
            let (job, interval) = (Arc::clone(&job), view.status_interval);
            let report = move || outlets.report_status(&job, interval, &asked);
            thread::Builder::new().name("status".to_owned()).spawn(report).context("start a status thread")?;
        }
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
        let target = disk.map_or_else(String::new, |disk| target_name(&disk.target));
        let words = |disk: &Options| [disk.device.to_string(), target_word(&disk.target).display().to_string()];
        let ends = disk.map_or_else(Default::default, words);
        Ok(Self { job, watch, target, ends, signs, view, began: Instant::now(), status_wanted, code: None })
    }

    /// Undoes what the engine can't: releases writers, unlinks the partial target. Tells when that is done, and whether it
    /// came in time.
    fn undo(&self) -> Receiver<bool> {
        let (done, undone) = channel();
        let job = Arc::clone(&self.job);
        let undo = move || {
            let _ = done.send(job.abandon());
        };
        // Without a thread the other end is gone, and nothing was undone.
        let _ = thread::Builder::new().name("undo".to_owned()).spawn(undo);
        undone
    }

    /// Says how it ended, in its last line and its last record. `cause` cancelled the run.
    fn end(&mut self, outcome: Outcome, cause: Option<Cause>) {
        let (code, last) = match outcome {
            Outcome::Complete(summary) => self.complete(&summary),
            Outcome::Failed { failure, released } => self.failed(&failure, released, cause),
        };
        let seq = self.watch.records.as_ref().and_then(|records| records.finish(last.clone()));
        if let Some((signs, place)) = &self.signs {
            signs.finish(*place, &last, seq, self.run(code));
        }
        self.code = Some(code);
    }

    fn run(&self, exit_code: u8) -> Run {
        let [device, target] = self.ends.clone();
        let is_success = exit::is_success(exit_code);
        let (duration, ended) = (self.began.elapsed(), SystemTime::now());
        Run { device, target, exit_code, is_success, duration, ended, job: self.job.snapshot() }
    }

    fn complete(&self, summary: &Summary) -> (u8, Body) {
        let code = if summary.is_whole() { exit::COMPLETE } else { exit::NOT_WHOLE };
        let elapsed = self.began.elapsed();
        let rate_avg = (summary.data as f64 / elapsed.as_secs_f64().max(1e-3)) as u64;
        let kind = self.watch.started.get().map(|started| started.target_kind);
        let compared = kind == Some(TargetKind::Nowhere);
        let good = GoodEnd {
            summary,
            elapsed,
            rate_avg,
            compared,
            sent: kind == Some(TargetKind::Stdout) && !can_flush(io::stdout()).is_ok_and(|can| can),
        };
        let display = &self.watch.display;
        good.missing().iter().for_each(|line| display.fail(line));
        if !summary.consistent && !self.view.quiet {
            display.warn("the copy may be INCONSISTENT: the source could change while it was copied");
        }
        if self.view.dry_run {
            display.say("dry run: nothing was copied");
        } else if self.view.verbose || (self.view.style != Style::None && !self.view.quiet) {
            display.say(&good.line());
        }
        let now = self.job.snapshot();
        let body = json::Summary {
            result: match summary.is_whole() {
                _ if self.view.dry_run => "planned",
                true if compared => "verified",
                true => "complete",
                false => "not_whole",
            },
            exit_code: code,
            durable: summary.durable,
            verified: summary.verified,
            hash: summary.hash.clone(),
            consistent: summary.consistent,
            total_bytes: summary.total,
            bytes_done: summary.data + summary.zero,
            bytes_data: summary.data,
            bytes_zero: summary.zero,
            bytes_written: summary.written,
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

    fn failed(&self, failure: &Failure, released: bool, cause: Option<Cause>) -> (u8, Body) {
        let Failure { error, target: state } = failure;
        let Verdict { code, reason, signal, message } = Verdict::of(error, *state, cause);
        let begun = self.watch.started.get().is_some();
        let line = BadEnd { message: &message, state: *state, target: &self.target, begun }.line();
        differing(error.differences()).iter().for_each(|line| self.watch.display.fail(line));
        self.watch.display.fail(&line);
        let body = ExitError {
            exit_code: code,
            reason,
            signal,
            message: line,
            target_state: Some(state.name()),
            differs: error.differences().iter().copied().map(Into::into).collect(),
            writer_released: self.job.snapshot().writers.map(|_| released),
            seconds_elapsed: self.began.elapsed().as_secs(),
            dropped: json::Dropped::default(),
        };
        (code, Body::ExitError(Box::new(body)))
    }

    /// What the target is when the engine can't say it.
    fn state_after(&self, undone: Undone) -> TargetState {
        match self.watch.started.get().map(|started| started.target_kind) {
            // What was begun by then is beside the name.
            None | Some(TargetKind::Nowhere) => TargetState::Untouched,
            Some(TargetKind::File) if undone == Undone::All => TargetState::Removed,
            // It is beside the name still, or has it, whole.
            Some(TargetKind::File) => TargetState::OldOrComplete,
            _ => TargetState::Incomplete,
        }
    }
}

/// SIGUSR2; what it did, in words.
fn toggle_speed(jobs: &[Arc<Job>]) -> String {
    let lift = |lifted| jobs.iter().for_each(|job| job.lift(lifted));
    if jobs.iter().any(|job| job.speed().is_some()) {
        lift(true);
        return "speed limit off; SIGUSR2 turns it on again".to_owned();
    }
    if !jobs.iter().any(|job| job.is_lifted()) {
        return "SIGUSR2: there is no limit to turn off".to_owned();
    }
    lift(false);
    match jobs.iter().find_map(|job| job.speed()) {
        Some(limit) => format!("speed limit {} again", Rate(limit)),
        None => "no speed limit is asked for any more".to_owned(),
    }
}

#[cfg(test)]
mod tests;
