//! Starts backups of the disks that this process serves: the same engine over the same ring as a backup of another process.

use super::arguments::{self, flag, text};
use super::jobs::{Entry, Jobs, New, valid_id};
use super::schema::BACKUP;
use super::server::{Node, Shared};
use super::wire::{Answer, Class, Refusal};
use crate::backup::{
    self, Disk, Failure, Mode, OnCbwError, Options, OverlayPlace, ProofOptions, Restoring, SnapshotChoice, Summary,
    SyncMode, Target, WriterChoice,
};
use crate::error::{Error, Kind, reason};
use crate::ground::life::Status;
use crate::ground::policy::OnError;
use crate::image::format::Format;
use crate::image::identity;
use crate::image::location::Location;
use crate::image::qcow2::CompressOptions;
use crate::image::qcow2::header::Compression;
use crate::job::Job;
use crate::monitor::{Event, Monitor};
use serde_json::{Map, Value, json};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

/// Copying threads of one job.
const MOST_WORKERS: i64 = 256;
const WORKERS: usize = 2;
/// As the command's defaults.
const FREEZE_TIMEOUT: Duration = Duration::from_secs(5);
const CBW_TIMEOUT: Duration = Duration::from_secs(30);
const RECONNECT: Duration = Duration::from_secs(10);

/// What one drive-backup asks for.
struct Wanted {
    options: Options,
    new: New,
}

/// To whoever waits for the start.
type Starting = Sender<Result<(), Error>>;

/// Answers once.
fn answer(starting: &Mutex<Option<Starting>>, result: Result<(), Error>) {
    if let Some(starting) = starting.lock().unwrap_or_else(PoisonError::into_inner).take() {
        // Whoever waited may be gone with the process.
        let _ = starting.send(result);
    }
}

/// A disk under way: the engine's monitor.
struct Running {
    entry: Arc<Entry>,
    is_started: AtomicBool,
    /// Whoever asked for it waits for this.
    starting: Arc<Mutex<Option<Starting>>>,
    steward: Option<Sender<(usize, Status)>>,
    place: usize,
}

impl Monitor for Running {
    fn event(&self, event: Event<'_>) {
        if matches!(event, Event::Started(_)) {
            self.started();
        }
        self.entry.event(event);
    }
}

impl Running {
    fn started(&self) {
        self.is_started.store(true, Relaxed);
        let (starting, steward, place) = (Arc::clone(&self.starting), self.steward.clone(), self.place);
        self.entry.show(Some(Box::new(move |status| {
            if let Some(steward) = &steward {
                // It ends with the last of its jobs.
                let _ = steward.send((place, status));
            }
            // Whoever is answered sees it running, as with QEMU.
            if status != Status::Created {
                answer(&starting, Ok(()));
            }
        })));
    }

    fn ended(&self, jobs: &Jobs, result: Result<Summary, Failure>) {
        match result {
            Err(failure) if !self.is_started.load(Relaxed) => {
                jobs.forget(&self.entry);
                answer(&self.starting, Err(failure.error));
            }
            result => jobs.ended(&self.entry, result.as_ref()),
        }
    }
}

impl Shared {
    pub fn drive_backup(&self, given: &Map<String, Value>) -> Answer {
        let wanted = self.wanted(given, None)?;
        self.start(vec![wanted], false)
    }

    pub fn transaction(&self, given: &Map<String, Value>) -> Answer {
        let grouped = given.get("properties").and_then(|p| p["completion-mode"].as_str()) == Some("grouped");
        let group = grouped.then(|| self.groups.fetch_add(1, Relaxed));
        let mut wanted = Vec::new();
        for action in given.get("actions").and_then(Value::as_array).into_iter().flatten() {
            let kind = action["type"].as_str().ok_or_else(|| Refusal::generic("Parameter 'type' is missing"))?;
            if kind != "drive-backup" {
                return Err(Refusal::generic(format!("Parameter 'type' does not accept value '{kind}'")));
            }
            let data = action["data"].as_object().ok_or_else(|| Refusal::generic("Parameter 'data' is missing"))?;
            arguments::check(BACKUP, data)?;
            wanted.push(self.wanted(data, group)?);
        }
        let targets: Vec<PathBuf> = wanted.iter().filter_map(|one| target_of(&one.options)).collect();
        for (place, target) in targets.iter().enumerate() {
            if targets[..place].iter().any(|other| other == target || identity::is_overlapping(other, target)) {
                return Err(Refusal::generic(format!("Target '{}' is given twice", target.display())));
            }
        }
        if wanted.is_empty() { Ok(json!({})) } else { self.start(wanted, grouped) }
    }

    fn node(&self, name: &str) -> Result<&Node, Refusal> {
        let found = self.setup.nodes.iter().find(|node| node.device == name);
        found.ok_or_else(|| {
            Refusal::of(Class::DeviceNotFound, format!("Cannot find device='{name}' nor node-name='{name}'"))
        })
    }

    fn wanted(&self, given: &Map<String, Value>, group: Option<u64>) -> Result<Wanted, Refusal> {
        let node = self.node(text(given, "device").unwrap_or_default())?;
        let id = text(given, "job-id").unwrap_or(&node.device);
        if !valid_id(id) {
            return Err(Refusal::generic(format!("Invalid job ID '{id}'")));
        }
        let speed = arguments::speed(given)?;
        let options = options(given, node, self.setup.writer_dir.as_deref())?;
        let new = New {
            id: id.to_owned(),
            device: node.device.clone(),
            job: Arc::new(Job::new(speed)),
            auto_finalize: flag(given, "auto-finalize").unwrap_or(true),
            auto_dismiss: flag(given, "auto-dismiss").unwrap_or(true),
            group,
        };
        if !new.auto_finalize {
            new.job.require_finalize();
        }
        Ok(Wanted { options, new })
    }

    /// Blocks until all of them have their instant, or none has.
    fn start(&self, wanted: Vec<Wanted>, grouped: bool) -> Answer {
        let (options, new): (Vec<Options>, Vec<New>) = wanted.into_iter().map(|one| (one.options, one.new)).unzip();
        let entries = self.jobs.reserve(new)?;
        let (answer, answers) = channel();
        let steward = grouped.then(|| steward(&entries)).transpose();
        let steward = steward.map_err(|e| Refusal::generic(format!("start a thread: {e}")))?;
        let running = |(place, entry): (usize, &Arc<Entry>)| Running {
            entry: Arc::clone(entry),
            is_started: AtomicBool::new(false),
            starting: Arc::new(Mutex::new(Some(answer.clone()))),
            steward: steward.clone(),
            place,
        };
        let running: Vec<Running> = entries.iter().enumerate().map(running).collect();
        drop(answer);
        let jobs = Arc::clone(&self.jobs);
        let work = move || run(&jobs, &options, &running);
        if let Err(error) = thread::Builder::new().name("backup".to_owned()).spawn(work) {
            entries.iter().for_each(|entry| self.jobs.forget(entry));
            return Err(Refusal::generic(format!("start a thread: {error}")));
        }
        let errors: Vec<Error> = answers.iter().filter_map(Result::err).collect();
        // The others' say the same, and that they were not at fault.
        match errors.into_iter().min_by_key(|error| error.to_string().len()) {
            None => Ok(json!({})),
            Some(error) => Err(refusal(&error)),
        }
    }
}

fn run(jobs: &Jobs, options: &[Options], running: &[Running]) {
    let disks = options.iter().zip(running);
    let disks: Vec<Disk<'_>> =
        disks.map(|(options, running)| Disk { options, job: &running.entry.new.job, monitor: running }).collect();
    let ended = |place: usize, result| running[place].ended(jobs, result);
    if catch_unwind(AssertUnwindSafe(|| backup::run_all(&disks, &ended))).is_err() {
        for one in running.iter().filter(|one| one.entry.status() != Status::Concluded) {
            one.entry.new.job.abandon();
            let error = Error::new(Kind::Other, "internal error: the backup panicked");
            one.ended(jobs, Err(Failure { error, target: backup::TargetState::Removed }));
        }
    }
}

/// Lets jobs of one transaction be completed together: when all of them wait, or none. One that fails cancels the rest.
fn steward(entries: &[Arc<Entry>]) -> std::io::Result<Sender<(usize, Status)>> {
    let (tell, told): (_, Receiver<(usize, Status)>) = channel();
    let jobs: Vec<Arc<Job>> = entries.iter().map(|entry| Arc::clone(&entry.new.job)).collect();
    jobs.iter().for_each(|job| job.hold());
    let watch = move || {
        let mut waiting = vec![false; jobs.len()];
        for (place, status) in told {
            match status {
                Status::Waiting => waiting[place] = true,
                Status::Aborting => jobs.iter().for_each(|job| job.cancel()),
                _ => continue,
            }
            if waiting.iter().all(|waits| *waits) {
                jobs.iter().for_each(|job| job.release());
            }
        }
    };
    thread::Builder::new().name("qmp-steward".to_owned()).spawn(watch)?;
    Ok(tell)
}

fn target_of(options: &Options) -> Option<PathBuf> {
    match &options.target {
        Target::At(location) => location.path().map(Path::to_owned),
        Target::Stdout | Target::Nowhere => None,
    }
}

/// QEMU's words where it has some.
fn refusal(error: &Error) -> Refusal {
    let during = error.place().map_or("", |place| place.during);
    let target = error.place().and_then(|place| place.path.as_ref());
    match (target, error.errno()) {
        (Some(target), Some(errno)) if matches!(during, "create" | "open the folder of") => {
            let why = reason(&std::io::Error::from_raw_os_error(errno));
            Refusal::generic(format!("Could not create '{}': {why}", target.display()))
        }
        _ => Refusal::generic(error.to_string()),
    }
}

fn options(given: &Map<String, Value>, node: &Node, writer_dir: Option<&Path>) -> Result<Options, Refusal> {
    let target = Path::new(text(given, "target").unwrap_or_default());
    let mode = match text(given, "mode") {
        Some("existing") => Mode::Existing,
        _ => Mode::AbsolutePaths,
    };
    let sync = sync(given)?;
    let format = match (text(given, "format"), mode) {
        (None, Mode::Existing) => None,
        // As in QEMU, whatever the target is called.
        (None, _) => node.format,
        (Some(name), mode) => match (name.parse(), mode) {
            (Ok(format), _) => Some(format),
            (Err(_), Mode::Existing) => return Err(Refusal::generic(format!("Unknown driver '{name}'"))),
            (Err(_), _) => return Err(Refusal::generic(format!("Unknown file format '{name}'"))),
        },
    };
    let compress = flag(given, "compress") == Some(true);
    if compress && (format != Some(Format::Qcow2) || mode == Mode::Existing) {
        return Err(Refusal::generic("Compression is not supported for this drive"));
    }
    if mode == Mode::Existing
        && let Err(error) = target.metadata()
    {
        return Err(Refusal::generic(format!("Could not open '{}': {}", target.display(), reason(&error))));
    }
    if identity::is_overlapping(&node.path, target) {
        return Err(Refusal::generic("Source and target cannot be the same"));
    }
    Ok(Options {
        device: Location::from(&node.path),
        source_format: node.format,
        sync,
        backing: true,
        target: Target::At(Location::from(target)),
        format,
        mode,
        cluster_size: None,
        secret: node.secret.clone(),
        target_secret: None,
        restoring: Restoring::default(),
        proof: ProofOptions::default(),
        hook_frozen: None,
        reconnect: RECONNECT,
        compression: compress.then_some(CompressOptions::default_of(Compression::Zlib)),
        sparse: true,
        direct: false,
        fsync: true,
        workers: workers(given)?,
        allow_inconsistent: false,
        writer: if node.read_only { WriterChoice::None } else { WriterChoice::Required },
        writer_dir: writer_dir.map(Path::to_owned),
        snapshot: SnapshotChoice::Auto,
        overlay: OverlayPlace::of_environment(),
        overlay_limit: None,
        freeze_timeout: FREEZE_TIMEOUT,
        cbw_timeout: CBW_TIMEOUT,
        on_cbw_error: match text(given, "on-cbw-error") {
            Some("break-guest-write") => OnCbwError::BreakGuestWrite,
            _ => OnCbwError::BreakSnapshot,
        },
        on_source_error: on_error(given, "on-source-error"),
        on_target_error: on_error(given, "on-target-error"),
    })
}

fn on_error(given: &Map<String, Value>, name: &str) -> OnError {
    match text(given, name) {
        None | Some("report" | "auto") => OnError::Report,
        Some("ignore") => OnError::Ignore,
        Some("enospc") => OnError::Enospc,
        Some(_) => OnError::Stop,
    }
}

/// What is copied. What can't be asked for yet is refused by name.
fn sync(given: &Map<String, Value>) -> Result<SyncMode, Refusal> {
    for name in ["bitmap", "bitmap-mode", "discard-source", "filter-node-name"] {
        if given.get(name).is_some_and(|value| *value != Value::Bool(false)) {
            return Err(Refusal::generic(format!("Parameter '{name}' is not supported")));
        }
    }
    match text(given, "sync") {
        None | Some("full") => Ok(SyncMode::Full),
        Some("top") => Ok(SyncMode::Top),
        Some("none") => Ok(SyncMode::None),
        Some(other) => {
            let why = format!("sync mode '{other}' is not supported: dirty bitmaps are not supported yet");
            Err(Refusal::generic(why))
        }
    }
}

/// x-perf, checked as QEMU does.
fn workers(given: &Map<String, Value>) -> Result<usize, Refusal> {
    const CLUSTER: i64 = 64 << 10;
    let member = |name| given.get("x-perf").and_then(|perf| perf[name].as_i64());
    if let Some(chunk) = member("max-chunk").filter(|chunk| *chunk != 0) {
        if chunk < 0 {
            return Err(Refusal::generic("max-chunk must be zero (which means no limit) or positive"));
        }
        if chunk < CLUSTER {
            let text = format!("Required max-chunk ({chunk}) is less than backup cluster size ({CLUSTER})");
            return Err(Refusal::generic(text));
        }
    }
    if member("min-cluster-size").is_some_and(|size| size < 0 || size != 0 && size & (size - 1) != 0) {
        return Err(Refusal::generic("min-cluster-size needs to be a power of 2"));
    }
    match member("max-workers") {
        None => Ok(WORKERS),
        Some(workers) if (1..=i64::from(i32::MAX)).contains(&workers) => Ok(workers.min(MOST_WORKERS) as usize),
        Some(_) => Err(Refusal::generic("max-workers must be between 1 and 2147483647")),
    }
}
