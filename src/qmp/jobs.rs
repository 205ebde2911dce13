//! The jobs that clients see, and what they may ask of them.

use super::hub::Hub;
use super::wire::{Class, Refusal};
use crate::backup::{Failure, Summary};
use crate::error::{Error, Kind};
use crate::ground::life::{Status, Verb};
use crate::ground::policy::Action;
use crate::ground::status::Pause;
use crate::job::{Job, Observer};
use crate::monitor::{Event, Monitor};
use serde_json::{Value, json};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// A job to be shown.
pub struct New {
    /// Its id.
    pub id: String,
    /// The disk that it copies, as clients name it.
    pub device: String,
    /// The job.
    pub job: Arc<Job>,
    /// It is published without being asked.
    pub auto_finalize: bool,
    /// It is forgotten when it is over.
    pub auto_dismiss: bool,
    /// Jobs of one transaction are finalized together.
    pub group: Option<u64>,
}

/// One job.
pub struct Entry {
    /// What it is.
    pub new: New,
    hub: Arc<Hub>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Clients see it.
    shown: bool,
    concluded: bool,
    error: Option<String>,
    no_space: bool,
}

/// All jobs of a process.
#[derive(Default)]
pub struct Jobs {
    hub: Arc<Hub>,
    list: Mutex<Vec<Arc<Entry>>>,
}

/// QEMU's rule for ids: a letter, then letters, digits, `-`, `.` and `_`.
pub fn valid_id(id: &str) -> bool {
    id.starts_with(|first: char| first.is_ascii_alphabetic())
        && id.chars().all(|c| c.is_ascii_alphanumeric() || "-._".contains(c))
}

impl Jobs {
    /// None yet; events go to `hub`'s clients.
    pub(super) fn new(hub: Arc<Hub>) -> Self {
        Self { hub, list: Mutex::default() }
    }

    fn list(&self) -> MutexGuard<'_, Vec<Arc<Entry>>> {
        self.list.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes ids and disks for jobs that nobody sees yet, all or none.
    pub fn reserve(&self, jobs: Vec<New>) -> Result<Vec<Arc<Entry>>, Refusal> {
        let mut list = self.list();
        let before = list.len();
        for new in jobs {
            let busy = |entry: &Arc<Entry>| entry.new.device == new.device && !entry.state().concluded;
            let refusal = if list.iter().any(|entry| entry.new.id == new.id) {
                format!("Job ID '{}' already in use", new.id)
            } else if list.iter().any(busy) {
                format!("Node '{}' is busy: block device is in use by block job: backup", new.device)
            } else {
                list.push(Arc::new(Entry { new, hub: Arc::clone(&self.hub), state: Mutex::default() }));
                continue;
            };
            list.truncate(before);
            return Err(Refusal::generic(refusal));
        }
        Ok(list[before..].to_vec())
    }

    /// Forgets it without a word.
    pub fn forget(&self, entry: &Arc<Entry>) {
        self.list().retain(|other| !Arc::ptr_eq(other, entry));
    }

    /// It is over: tells so, and forgets it if it may.
    pub fn ended(&self, entry: &Arc<Entry>, result: Result<&Summary, &Failure>) {
        entry.conclude(result.err().map(|failure| &failure.error));
        if entry.new.auto_dismiss {
            self.dismiss(entry);
        }
    }

    fn dismiss(&self, entry: &Arc<Entry>) {
        self.forget(entry);
        entry.tell_status(Status::Null);
    }

    /// Those that clients see.
    pub fn shown(&self) -> Vec<Arc<Entry>> {
        self.list().iter().filter(|entry| entry.state().shown).cloned().collect()
    }

    /// Asks every job to end.
    pub fn cancel_all(&self) {
        let all: Vec<Arc<Entry>> = self.list().clone();
        all.iter().filter(|entry| !entry.state().concluded).for_each(|entry| entry.new.job.cancel());
    }

    /// Undoes what jobs that hang leave behind.
    pub fn abandon_all(&self) {
        let all: Vec<Arc<Entry>> = self.list().clone();
        for entry in all.iter().filter(|entry| !entry.state().concluded) {
            entry.new.job.abandon();
        }
    }

    /// Is any not over?
    pub fn is_busy(&self) -> bool {
        self.list().iter().any(|entry| !entry.state().concluded)
    }

    /// The job with this id, for commands named block-job-*.
    pub fn block_job(&self, id: &str) -> Result<Arc<Entry>, Refusal> {
        self.find(id).ok_or_else(|| Refusal::of(Class::DeviceNotActive, format!("Block job '{id}' not found")))
    }

    /// The job with this id, for commands named job-*.
    pub fn job(&self, id: &str) -> Result<Arc<Entry>, Refusal> {
        self.find(id).ok_or_else(|| Refusal::generic("Job not found"))
    }

    fn find(&self, id: &str) -> Option<Arc<Entry>> {
        self.shown().into_iter().find(|entry| entry.new.id == id)
    }

    /// Does what `verb` says, if the job's status lets it.
    pub fn verb(&self, entry: &Arc<Entry>, verb: Verb) -> Result<(), Refusal> {
        let job = &entry.new.job;
        let paused = !entry.state().concluded && job.snapshot().paused.is_some();
        // In QEMU's order.
        if verb == Verb::Resume && !paused {
            return Err(Refusal::generic("Can't resume a job that was not paused"));
        }
        entry.allow(verb)?;
        if verb == Verb::Pause && paused {
            return Err(Refusal::generic("Job is already paused"));
        }
        match verb {
            Verb::Cancel => job.cancel(),
            Verb::Pause => job.pause(),
            Verb::Resume => job.resume(),
            Verb::Finalize => self.finalize(entry),
            Verb::Dismiss => self.dismiss(entry),
            Verb::Change => return Err(Refusal::generic("Job type does not support change")),
            // A backup is never ready, and a speed comes with its number.
            Verb::Complete | Verb::SetSpeed => {}
        }
        Ok(())
    }

    fn finalize(&self, entry: &Arc<Entry>) {
        let group = entry.new.group;
        let together = |other: &Arc<Entry>| Arc::ptr_eq(other, entry) || group.is_some() && other.new.group == group;
        let all: Vec<Arc<Entry>> = self.list().iter().filter(|other| together(other)).cloned().collect();
        all.iter().for_each(|other| other.new.job.finalize());
    }
}

impl Entry {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Clients see it from now on, and hear of each status; `listener` hears of it too, and must not block.
    pub fn show(self: &Arc<Self>, listener: Option<Observer>) {
        if std::mem::replace(&mut self.state().shown, true) {
            return;
        }
        let (hub, id) = (Arc::clone(&self.hub), self.new.id.clone());
        let manual = !self.new.auto_finalize;
        self.new.job.observe(Box::new(move |status| {
            hub.event("JOB_STATUS_CHANGE", json!({"status": status.name(), "id": id}));
            if manual && status == Status::Pending {
                hub.event("BLOCK_JOB_PENDING", json!({"type": "backup", "id": id}));
            }
            listener.iter().for_each(|listener| listener(status));
        }));
    }

    /// Where its life is.
    pub fn status(&self) -> Status {
        if self.state().concluded { Status::Concluded } else { self.new.job.status() }
    }

    /// Refuses a verb that the status does not accept.
    pub fn allow(&self, verb: Verb) -> Result<(), Refusal> {
        let status = self.status();
        let too_late = status == Status::Pending && self.new.job.is_committed();
        if status.accepts(verb) && !too_late {
            return Ok(());
        }
        let (id, status, verb) = (&self.new.id, status.name(), verb.name());
        Err(Refusal::generic(format!("Job '{id}' in state '{status}' cannot accept command verb '{verb}'")))
    }

    fn tell_status(&self, status: Status) {
        self.hub.event("JOB_STATUS_CHANGE", json!({"status": status.name(), "id": self.new.id}));
    }

    fn conclude(self: &Arc<Self>, error: Option<&Error>) {
        // One that failed before it was shown.
        self.show(None);
        if error.is_some() {
            self.new.job.interrupt();
        }
        let now = self.new.job.snapshot();
        let mut data = json!({
            "type": "backup", "device": self.new.id, "len": now.total, "offset": now.done(),
            "speed": now.speed_limit.unwrap_or(0),
        });
        let name = match error {
            Some(error) if error.kind() == Kind::Cancelled => "BLOCK_JOB_CANCELLED",
            Some(error) => {
                data["error"] = error.to_string().into();
                "BLOCK_JOB_COMPLETED"
            }
            None => "BLOCK_JOB_COMPLETED",
        };
        {
            let mut state = self.state();
            state.concluded = true;
            state.error = error.map(|error| match error.kind() {
                Kind::Cancelled => "Operation canceled".to_owned(),
                _ => error.to_string(),
            });
        }
        self.hub.event(name, data);
        self.tell_status(Status::Concluded);
    }

    /// As query-block-jobs shows it.
    pub fn block_job(&self) -> Value {
        let (status, now) = (self.status(), self.new.job.snapshot());
        let is_over = status == Status::Concluded;
        let state = self.state();
        let io_status = match (now.paused, state.no_space) {
            (Some(Pause::Error), true) => "nospace",
            (Some(Pause::Error), false) => "failed",
            _ => "ok",
        };
        let mut shown = json!({
            "type": "backup", "device": self.new.id, "disk": self.new.device, "len": now.total, "offset": now.done(),
            "busy": status == Status::Running, "paused": !is_over && now.paused.is_some(),
            "speed": now.speed_limit.unwrap_or(0), "io-status": io_status, "ready": false, "status": status.name(),
            "auto-finalize": self.new.auto_finalize, "auto-dismiss": self.new.auto_dismiss,
        });
        if let Some(error) = &state.error {
            shown["error"] = error.clone().into();
        }
        shown
    }

    /// As query-jobs shows it.
    pub fn job(&self) -> Value {
        let (status, now) = (self.status(), self.new.job.snapshot());
        let mut shown = json!({
            "id": self.new.id, "type": "backup", "status": status.name(),
            "current-progress": now.done(), "total-progress": now.total,
        });
        if let Some(error) = &self.state().error {
            shown["error"] = error.clone().into();
        }
        shown
    }
}

impl Monitor for Entry {
    fn event(&self, event: Event<'_>) {
        let Event::Fault { error, action } = event else { return };
        let operation = match error.place().map(|place| place.during) {
            Some("read") => "read",
            _ => "write",
        };
        if action == Action::Stop {
            self.state().no_space = error.errno() == Some(nix::libc::ENOSPC);
        }
        let data = json!({"device": self.new.id, "operation": operation, "action": action.name()});
        self.hub.event("BLOCK_JOB_ERROR", data);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ground::status::Phase;
    use std::thread;

    /// A job in this status, the others of its transaction still to come, if it needs that.
    fn entry_in(jobs: &Jobs, status: Status) -> Arc<Entry> {
        let job = Arc::new(Job::new(None));
        let (id, device) = (String::from("j"), String::from("d0"));
        let new = New { id, device, job: Arc::clone(&job), auto_finalize: true, auto_dismiss: false, group: None };
        let entry = jobs.reserve(vec![new]).unwrap().remove(0);
        entry.show(None);
        if status != Status::Created {
            job.enter(Phase::Copy);
        }
        match status {
            Status::Paused => job.pause(),
            Status::Waiting => job.hold(),
            Status::Pending => job.require_finalize(),
            Status::Aborting => job.interrupt(),
            Status::Concluded => entry.conclude(None),
            _ => {}
        }
        if matches!(status, Status::Waiting | Status::Pending) {
            let waits = Arc::clone(&job);
            // Ends with the process, if nobody completes the job.
            thread::spawn(move || waits.complete());
            while job.status() != status {
                thread::yield_now();
            }
        }
        assert_eq!(entry.status(), status);
        entry
    }

    #[test]
    fn every_verb_in_every_status_of_a_backup_does_what_the_table_says() {
        use Status::{Aborting, Concluded, Created, Paused, Pending, Running, Waiting};
        for status in [Created, Running, Paused, Waiting, Pending, Aborting, Concluded] {
            for verb in Verb::ALL {
                let jobs = Jobs::default();
                let entry = entry_in(&jobs, status);
                let said = jobs.verb(&entry, verb).err().map(|refusal| refusal.text);
                let (name, word) = (status.name(), verb.name());
                let expected = match (status, verb) {
                    (Paused, Verb::Pause) => Some("Job is already paused".to_owned()),
                    (_, Verb::Resume) if status != Paused => Some("Can't resume a job that was not paused".to_owned()),
                    _ if !status.accepts(verb) => {
                        Some(format!("Job 'j' in state '{name}' cannot accept command verb '{word}'"))
                    }
                    (_, Verb::Change) => Some("Job type does not support change".to_owned()),
                    _ => None,
                };
                assert_eq!(said, expected, "{word} in {name}");
                let now = entry.status();
                match (status, verb) {
                    (Created, Verb::Pause) | (Running, Verb::Pause) => {
                        assert!(entry.new.job.snapshot().paused.is_some())
                    }
                    (Paused, Verb::Resume) => assert_eq!(now, Running),
                    (Concluded, Verb::Dismiss) => assert!(jobs.job("j").is_err(), "it is gone"),
                    (Created | Running | Paused | Waiting | Pending, Verb::Cancel) => assert_eq!(now, Aborting),
                    (Pending, Verb::Finalize) => {
                        while !entry.new.job.is_committed() {
                            thread::yield_now();
                        }
                    }
                    _ => assert_eq!(now, status, "{word} changes nothing"),
                }
            }
        }
    }
}
