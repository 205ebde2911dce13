//! The job as its watchers and the copier see it: a gate, a throttle, counters. Waits, does no I/O.
//!
//! Every wait here is on one condition variable, so that a verb (cancel, resume, a new speed) wakes the sleeper.

use crate::ground::life::Status;
use crate::ground::status::{OverlayUsage, Pause, Phase, Snapshot, WriterStats};
use crate::ground::throttle::Throttle;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// May the copier go on?
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub enum Gate {
    /// Go on.
    Go,
    /// Give up: the job was cancelled or interrupted.
    Cancelled,
}

/// What the overlay and the writers tell a watcher, where a job has them. Must not block.
pub trait Gauges: Send + Sync {
    /// Now.
    fn read(&self) -> Readings;
}

/// Of [`Gauges`].
pub type Readings = (Option<OverlayUsage>, Option<WriterStats>);

/// Shared by the copier, the command line and whoever else steers.
pub struct Job {
    control: Mutex<Control>,
    wake: Condvar,
    started: Instant,
    total: AtomicU64,
    data: AtomicU64,
    zero: AtomicU64,
    verified: AtomicU64,
    errors: AtomicU64,
}

type Undo = Box<dyn FnOnce() -> bool + Send>;

struct Control {
    phase: Phase,
    cancelled: bool,
    interrupted: bool,
    paused_by_user: bool,
    stopped_by_error: bool,
    rate: Option<u64>,
    /// Whatever the rate is, there is no limit just now.
    lifted: bool,
    throttle: Throttle,
    gauges: Option<Arc<dyn Gauges>>,
    last_read: Readings,
    abandon: Vec<Undo>,
    completion: Completion,
    /// Others of its transaction have to be complete first.
    held: bool,
    /// Somebody has to finalize it.
    unfinalized: bool,
    observer: Option<Observer>,
    announced: Option<Status>,
}

/// Hears each new status once, in order. Called under the job's lock: must neither block nor ask the job anything.
pub type Observer = Box<dyn Fn(Status) + Send>;

/// How far a job is whose bytes are all on the target.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Completion {
    Copying,
    Waiting,
    Pending,
    /// The target is getting its name: too late for any verb.
    Committed,
}

impl Control {
    fn read_gauges(&self) -> Readings {
        self.gauges.as_ref().map_or(self.last_read, |gauges| gauges.read())
    }

    fn status(&self) -> Status {
        match self.completion {
            Completion::Committed => Status::Pending,
            _ if self.is_over() => Status::Aborting,
            Completion::Pending => Status::Pending,
            Completion::Waiting => Status::Waiting,
            Completion::Copying if self.phase == Phase::Prepare => Status::Created,
            Completion::Copying if self.is_paused() => Status::Paused,
            Completion::Copying => Status::Running,
        }
    }

    fn is_paused(&self) -> bool {
        self.paused_by_user || self.stopped_by_error
    }

    /// Tells the observer, if the status is a new one.
    fn announce(&mut self) {
        let status = self.status();
        if let Some(observer) = self.observer.as_ref().filter(|_| self.announced != Some(status)) {
            self.announced = Some(status);
            observer(status);
        }
    }

    fn is_over(&self) -> bool {
        self.cancelled || self.interrupted
    }

    fn limit(&self) -> Option<u64> {
        self.rate.filter(|_| !self.lifted)
    }
}

impl Job {
    /// A job that may move `rate` bytes a second; `None`: no limit.
    pub fn new(rate: Option<u64>) -> Self {
        Self {
            control: Mutex::new(Control {
                phase: Phase::Prepare,
                cancelled: false,
                interrupted: false,
                paused_by_user: false,
                stopped_by_error: false,
                rate,
                lifted: false,
                throttle: Throttle::new(rate),
                gauges: None,
                last_read: Readings::default(),
                abandon: Vec::new(),
                completion: Completion::Copying,
                held: false,
                unfinalized: false,
                observer: None,
                announced: None,
            }),
            wake: Condvar::new(),
            started: Instant::now(),
            total: AtomicU64::new(0),
            data: AtomicU64::new(0),
            zero: AtomicU64::new(0),
            verified: AtomicU64::new(0),
            errors: AtomicU64::new(0),
        }
    }

    // A panic elsewhere must not take the gate away from the writers' release.
    fn control(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Blocks while the job is paused, stopped or ahead of its speed. Called before a claim, so that a sleeper holds
    /// nothing that a writer could wait for.
    pub fn gate(&self) -> Gate {
        let mut control = self.control();
        loop {
            if control.is_over() {
                return Gate::Cancelled;
            }
            if control.is_paused() {
                control = self.wake.wait(control).unwrap_or_else(PoisonError::into_inner);
                continue;
            }
            let delay = control.throttle.delay(self.started.elapsed());
            if delay == Duration::ZERO {
                return Gate::Go;
            }
            control = self.wake.wait_timeout(control, delay).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Blocks for `duration`, or less: until somebody asks something of the job.
    pub fn rest(&self, duration: Duration) {
        let control = self.control();
        if !control.is_over() {
            drop(self.wake.wait_timeout(control, duration));
        }
    }

    /// Blocks for `duration`, or until the job is cancelled, whatever else is asked of it.
    pub fn sleep(&self, duration: Duration) {
        let goes_on = |control: &mut Control| !control.is_over();
        drop(self.wake.wait_timeout_while(self.control(), duration, goes_on));
    }

    /// Charges bytes that were moved to the speed's budget. Never blocks.
    pub fn charge(&self, bytes: u64) {
        self.control().throttle.charge(bytes);
    }

    /// Stops the job after an error and blocks until it is resumed or cancelled. `tell` says why, once the job is
    /// stopped: who is told may resume it at once.
    pub fn stop_for_error(&self, tell: impl FnOnce()) -> Gate {
        self.control().stopped_by_error = true;
        tell();
        let mut control = self.control();
        // What happened has been told; now what it led to.
        control.announce();
        while control.stopped_by_error && !control.is_over() {
            control = self.wake.wait(control).unwrap_or_else(PoisonError::into_inner);
        }
        if control.is_over() { Gate::Cancelled } else { Gate::Go }
    }

    /// Stands still at the next gate. Captures for writers go on: the instant can't pause.
    pub fn pause(&self) {
        let mut control = self.control();
        control.paused_by_user = true;
        control.announce();
    }

    /// Goes on, after a pause as after an error.
    pub fn resume(&self) {
        let mut control = self.control();
        control.paused_by_user = false;
        control.stopped_by_error = false;
        control.announce();
        self.wake.notify_all();
    }

    /// Ends the job at the next gate.
    pub fn cancel(&self) {
        let mut control = self.control();
        control.cancelled = true;
        control.phase = Phase::Cancel;
        control.announce();
        self.wake.notify_all();
    }

    /// Ends the job at the next gate, since it failed elsewhere: whoever calls this knows why.
    pub fn interrupt(&self) {
        let mut control = self.control();
        control.interrupted = true;
        control.announce();
        self.wake.notify_all();
    }

    /// Was it cancelled?
    pub fn is_cancelled(&self) -> bool {
        self.control().cancelled
    }

    /// A new speed in bytes a second, at any time; `None`: no limit. It holds from now on, even where the limit was lifted.
    pub fn set_speed(&self, rate: Option<u64>) {
        self.set_limit(|control| (control.rate, control.lifted) = (rate, false));
    }

    /// A new speed that is found and not asked for: it holds when the limit is not lifted any more.
    pub fn steer(&self, rate: Option<u64>) {
        self.set_limit(|control| control.rate = rate);
    }

    /// Lifts the limit, or lets it hold again as it is by then.
    pub fn lift(&self, lifted: bool) {
        self.set_limit(|control| control.lifted = lifted);
    }

    fn set_limit(&self, change: impl FnOnce(&mut Control)) {
        let mut control = self.control();
        change(&mut control);
        let limit = control.limit();
        control.throttle.set_rate(limit, self.started.elapsed());
        self.wake.notify_all();
    }

    /// The speed in bytes a second that holds now; `None`: no limit.
    pub fn speed(&self) -> Option<u64> {
        self.control().limit()
    }

    /// The speed that holds when nobody has lifted it.
    pub fn steered_speed(&self) -> Option<u64> {
        self.control().rate
    }

    /// Has somebody lifted the limit?
    pub fn is_lifted(&self) -> bool {
        self.control().lifted
    }

    /// Enters a phase; a cancelled job stays in `Cancel`.
    pub fn enter(&self, phase: Phase) {
        let mut control = self.control();
        if !control.cancelled {
            control.phase = phase;
            control.announce();
        }
    }

    /// Every byte is on the target: waits until the job may be published, as long as it is paused, held for its transaction,
    /// or has to be finalized. After [`Gate::Go`] no verb is in time any more.
    pub fn complete(&self) -> Gate {
        let mut control = self.control();
        for stage in [Completion::Waiting, Completion::Pending, Completion::Committed] {
            let must_wait = |control: &Control| match stage {
                Completion::Waiting => control.is_paused(),
                Completion::Pending => control.held,
                _ => control.unfinalized,
            };
            while must_wait(&control) && !control.is_over() {
                control = self.wake.wait(control).unwrap_or_else(PoisonError::into_inner);
            }
            if control.is_over() {
                return Gate::Cancelled;
            }
            control.completion = stage;
            control.announce();
        }
        Gate::Go
    }

    /// It has to wait in `waiting` for [`Job::release`].
    pub fn hold(&self) {
        self.control().held = true;
    }

    /// The end of [`Job::hold`].
    pub fn release(&self) {
        self.control().held = false;
        self.wake.notify_all();
    }

    /// It has to wait in `pending` for [`Job::finalize`].
    pub fn require_finalize(&self) {
        self.control().unfinalized = true;
    }

    /// The end of [`Job::require_finalize`].
    pub fn finalize(&self) {
        self.control().unfinalized = false;
        self.wake.notify_all();
    }

    /// Where its life is, up to `pending` or `aborting`: that it is over only those know who started it.
    pub fn status(&self) -> Status {
        self.control().status()
    }

    /// Is the target getting its name?
    pub fn is_committed(&self) -> bool {
        self.control().completion == Completion::Committed
    }

    /// Tells `observer` of the status now and of each later one.
    pub fn observe(&self, observer: Observer) {
        let mut control = self.control();
        control.observer = Some(observer);
        control.announced = None;
        control.announce();
    }

    /// The size of the disk in bytes is known.
    pub fn set_total(&self, bytes: u64) {
        self.total.store(bytes, Relaxed);
    }

    /// Counts bytes that are on the target.
    pub fn count_data(&self, bytes: u64) {
        self.data.fetch_add(bytes, Relaxed);
    }

    /// Counts bytes that need not be copied.
    pub fn count_zero(&self, bytes: u64) {
        self.zero.fetch_add(bytes, Relaxed);
    }

    /// Counts bytes of the target that were read back.
    pub fn count_verified(&self, bytes: u64) {
        self.verified.fetch_add(bytes, Relaxed);
    }

    /// Counts an I/O error.
    pub fn count_error(&self) {
        self.errors.fetch_add(1, Relaxed);
    }

    /// Where a watcher reads the overlay and the writers.
    pub fn set_gauges(&self, gauges: Arc<dyn Gauges>) {
        self.control().gauges = Some(gauges);
    }

    /// One look; never blocks for long.
    pub fn snapshot(&self) -> Snapshot {
        let control = self.control();
        let (overlay, writers) = control.read_gauges();
        Snapshot {
            phase: control.phase,
            paused: match (control.stopped_by_error, control.paused_by_user) {
                (true, _) => Some(Pause::Error),
                (_, true) => Some(Pause::User),
                _ => None,
            },
            total: self.total.load(Relaxed),
            data: self.data.load(Relaxed),
            zero: self.zero.load(Relaxed),
            verified: self.verified.load(Relaxed),
            errors: self.errors.load(Relaxed),
            speed_limit: control.limit(),
            overlay,
            writers,
        }
    }

    /// What has to be undone when nobody can wait for the job: it may hang in an I/O call for ever.
    pub fn on_abandon(&self, undo: impl FnOnce() + Send + 'static) {
        self.on_abandon_in_time(move || {
            undo();
            true
        });
    }

    /// [`Job::on_abandon`] of what can't be undone any more at some point: `undo` gives false when it was too late.
    pub fn on_abandon_in_time(&self, undo: impl FnOnce() -> bool + Send + 'static) {
        self.control().abandon.push(Box::new(undo));
    }

    /// It is over: lets go of what was kept to be undone and of what is read for watchers, who see the last of it. They were
    /// the last to hold the ends open. From now on [`Job::abandon`] gives `in_time`. May block as long as closing files does.
    pub fn end(&self, in_time: bool) {
        let held = {
            let mut control = self.control();
            control.last_read = control.read_gauges();
            let undo = std::mem::replace(&mut control.abandon, vec![Box::new(move || in_time)]);
            (undo, control.gauges.take())
        };
        drop(held);
    }

    /// Undoes, the newest first, once; false when it was too late for some of it. May block as long as the undoings do.
    pub fn abandon(&self) -> bool {
        let undo = std::mem::take(&mut self.control().abandon);
        let mut in_time = true;
        for undo in undo.into_iter().rev() {
            in_time &= undo();
        }
        in_time
    }
}

#[cfg(test)]
mod tests;
