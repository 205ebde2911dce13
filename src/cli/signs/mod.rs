//! Files that say how a run stands and how it ended, for monitors that do not read its streams.
//!
//! One thread writes them, and it alone blocks when their file system does. A file that can't be written is a warning, once,
//! and never the backup's end.

mod file;
mod metrics;

pub use metrics::Run;

use super::json::{self, Body, Record, SCHEMA};
use super::progress::Display;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::SystemTime;

/// Which files.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Files {
    /// The newest record of each disk, a line each, as of `--json`.
    pub status: Option<PathBuf>,
    /// How the run ended, for Prometheus.
    pub metrics: Option<PathBuf>,
    /// Of a run that is refused: the first device and target, as far as they can be read.
    pub refused: Option<[String; 2]>,
}

impl Files {
    /// Somebody asked for one.
    pub fn are_wanted(&self) -> bool {
        self.status.is_some() || self.metrics.is_some()
    }
}

/// The way to the files of a run. Clones lead to the same; nothing here blocks.
#[derive(Clone)]
pub struct Signs(Arc<Shared>);

struct Shared {
    state: Mutex<State>,
    wake: Condvar,
}

struct State {
    disks: Vec<Disk>,
    is_new: bool,
}

/// What is known of one disk.
struct Disk {
    /// As in the stream of records, if there is one.
    job: String,
    next_seq: u64,
    newest: Vec<u8>,
    ended: Option<Run>,
}

impl Signs {
    /// Starts the thread for a run of disks with these names of their jobs. It calls `written` once, when the last of them has ended and that is written.
    pub fn start(
        files: Files,
        jobs: &[String],
        display: Display,
        written: impl FnOnce() + Send + 'static,
    ) -> std::io::Result<Self> {
        let disk = |job: &String| Disk { job: job.clone(), next_seq: 0, newest: Vec::new(), ended: None };
        let disks = jobs.iter().map(disk).collect();
        let shared = Arc::new(Shared { state: Mutex::new(State { disks, is_new: false }), wake: Condvar::new() });
        let signs = Self(Arc::clone(&shared));
        let hold = display.hold();
        let write = move || {
            write_all(&files, &shared, |flag, why| display.warn(&format!("{flag}: {why}")));
            drop(hold);
            written();
        };
        thread::Builder::new().name("signs".to_owned()).spawn(write)?;
        Ok(signs)
    }

    /// How the disk at `place` stands. `seq` is the record's in the stream, where there is one.
    pub fn status(&self, place: usize, status: &Body, seq: Option<u64>) {
        self.0.state().take(place, status, seq);
        self.0.wake.notify_one();
    }

    /// How it ended; its last record.
    pub fn finish(&self, place: usize, last: &Body, seq: Option<u64>, run: Run) {
        let mut state = self.0.state();
        state.take(place, last, seq);
        state.disks[place].ended = Some(run);
        self.0.wake.notify_one();
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Blocks for news: the newest lines, and when all have ended how.
    fn next(&self) -> (Vec<u8>, Option<Vec<Run>>) {
        let news = self.wake.wait_while(self.state(), |state| !state.is_new);
        let mut state = news.unwrap_or_else(PoisonError::into_inner);
        state.is_new = false;
        let lines = state.disks.iter().flat_map(|disk| disk.newest.iter().copied()).collect();
        let ended: Option<Vec<Run>> = state.disks.iter().map(|disk| disk.ended.clone()).collect();
        (lines, ended)
    }
}

impl State {
    fn take(&mut self, place: usize, body: &Body, seq: Option<u64>) {
        let disk = &mut self.disks[place];
        if disk.ended.is_some() {
            // While others go on it is still looked at.
            return;
        }
        let seq = seq.unwrap_or(disk.next_seq);
        let time = json::time(SystemTime::now());
        let record = Record { body, schema: SCHEMA, time, job: &disk.job, seq };
        // Numbers and strings always serialize.
        if let Ok(mut line) = serde_json::to_vec(&record) {
            line.push(b'\n');
            disk.newest = line;
            disk.next_seq = seq + 1;
            self.is_new = true;
        }
    }
}

/// Writes until all disks have ended.
fn write_all(files: &Files, shared: &Shared, warn: impl Fn(&str, String)) {
    let mut has_warned = false;
    loop {
        let (lines, ended) = shared.next();
        if let Some(path) = &files.status
            && let Err(why) = file::replace(path, &lines)
            && !std::mem::replace(&mut has_warned, true)
        {
            warn("--status-file", why);
        }
        if let Some(runs) = ended {
            if let Some(Err(why)) =
                files.metrics.as_ref().map(|path| metrics::write(path, &runs, files.refused.is_some()))
            {
                warn("--metrics-file", why);
            }
            return;
        }
    }
}
