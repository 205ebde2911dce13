//! A server's life: disks are opened, front-ends started, and at a signal or a fault stopped, drained and flushed.

use super::front_ends::{self, FrontEnds};
use super::plan::Plan;
use crate::cli::json::{self, Body, Dropped, ExitError, PathName, Ready, ServedDisk, Stopped, Warning};
use crate::cli::progress::{Display, Row, Style};
use crate::cli::records::Records;
use crate::cli::remote::name_of;
use crate::cli::session::Ends;
use crate::cli::signals::{self, Request};
use crate::cli::systemd;
use crate::cli::{Ending, exit};
use crate::error::{Error, Kind, Result, Side};
use crate::hold::{self, Place};
use crate::job::Job;
use crate::qmp::{Node, Server, Setup, valid_id};
use crate::ring::folder;
use crate::serve::disk::Disk;
use crate::serve::{Notice, Notify};
use anyhow::Context;
use signal_hook::consts::SIGTERM;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

/// Requests in flight have so long to be answered once the end is asked for.
const DRAIN: Duration = Duration::from_secs(5);
/// Who does not read has so long to get the last lines.
const LAST_LINES_BOUND: Duration = Duration::from_secs(2);

/// Backups that clients started have so long to undo what they did, and clients to read the end.
const JOBS_BOUND: Duration = Duration::from_millis(600);
/// Between two looks at them.
const LOOK: Duration = Duration::from_millis(5);

enum Wake {
    /// Everything is served.
    Ready(Box<Served>),
    Notice(Notice),
    Signal(i32),
    /// A client of QMP wants it to end.
    Quit,
    /// Stopped and flushed, or not, or never served; true: every request was answered.
    Stopped(Result<bool>),
    /// A reader has got everything, or is gone.
    Told,
}

/// What is open and runs.
struct Served {
    disks: Vec<Arc<Disk>>,
    front_ends: FrontEnds,
    remote: Server,
}

/// What a server says, and hears.
pub struct Session {
    display: Display,
    records: Option<Records>,
    quiet: bool,
    began: Instant,
    door: Arc<Door>,
    wake: Sender<Wake>,
    woken: Receiver<Wake>,
    /// Readers that have not got everything yet.
    untold: usize,
}

/// What clients come through: taken to let them in, or by a signal that ends a server at once because nobody was.
#[derive(Default)]
struct Door(AtomicBool);

impl Door {
    /// True for the first; whoever comes second is not to do it.
    fn take(&self) -> bool {
        !self.0.swap(true, Ordering::SeqCst)
    }
}

/// Why it ends.
#[derive(Clone, Copy)]
enum Cause {
    Signal(i32),
    Fault,
}

impl Session {
    /// Starts the threads that write.
    pub fn start(ends: Ends, quiet: bool) -> anyhow::Result<Self> {
        let (wake, woken) = channel();
        let told = || {
            let wake = wake.clone();
            move || drop(wake.send(Wake::Told))
        };
        let row = Row { name: None, job: Arc::new(Job::new(None)) };
        let display =
            Display::start(Style::None, vec![row], ends.people, told()).context("start the display thread")?;
        let records = ends
            .json
            .map(|out| Records::to(json::new_job(), out, told()))
            .transpose()
            .context("start the JSON thread")?;
        let untold = 1 + usize::from(records.is_some());
        Ok(Self { display, records, quiet, began: Instant::now(), door: Arc::default(), wake, woken, untold })
    }

    /// Takes over what a process has only one of: signals and the panic hook.
    pub fn own_process(&self) -> anyhow::Result<()> {
        let display = self.display.clone();
        std::panic::set_hook(Box::new(move |panic| display.fail(&format!("internal error: {panic}"))));
        let wake = self.wake.clone();
        signals::listen(move |request| {
            if let Request::End(signal) = request {
                // Gone only when the process is about to be.
                let _ = wake.send(Wake::Signal(signal));
            }
        })
    }

    /// Ends a server that never began.
    pub fn refuse(mut self, error: &Error) -> Ending {
        let code = self.fail(error);
        self.end(Ending::with_code(code))
    }

    /// Serves until something ends it.
    pub fn run(self, plan: Plan) -> Ending {
        if let Err(error) = self.open(plan) {
            return self.refuse(&error);
        }
        self.supervise()
    }

    fn supervise(mut self) -> Ending {
        let mut served = None;
        let mut cause = None;
        // Only a second signal has no patience: what was answered is not lost for a fault or a `quit` before the first.
        let mut signalled = false;
        loop {
            match (self.woken.recv(), cause) {
                (Ok(Wake::Ready(ready)), None) => {
                    self.ready(&ready);
                    served = Some(ready);
                }
                // Its end was asked for while its front-ends began.
                (Ok(Wake::Ready(ready)), Some(_)) => self.stop(ready),
                (Ok(Wake::Notice(Notice::Warning(line))), _) => self.warn(&line),
                (Ok(Wake::Notice(Notice::Failed(error))), None) => {
                    self.fail(&error);
                    cause = Some((Cause::Fault, exit::of(error.kind()).0));
                    self.begin_to_end(served.take());
                }
                (Ok(Wake::Notice(Notice::Failed(error))), Some(_)) => self.warn(&error.to_string()),
                // Nobody was let in yet, or whoever asks has no patience.
                (Ok(Wake::Signal(signal)), before) if signalled || before.is_none() && self.door.take() => {
                    return self.cut(signal, signalled);
                }
                (Ok(Wake::Signal(signal)), before) => {
                    signalled = true;
                    if before.is_none() {
                        cause = Some((Cause::Signal(signal), exit::COMPLETE));
                        self.begin_to_end(served.take());
                    }
                }
                (Ok(Wake::Quit), None) => {
                    cause = Some((Cause::Signal(SIGTERM), exit::COMPLETE));
                    self.begin_to_end(served.take());
                }
                (Ok(Wake::Quit), Some(_)) => {}
                (Ok(Wake::Stopped(stopped)), cause) => return self.stopped(stopped, cause),
                (Ok(Wake::Told), _) => self.untold = self.untold.saturating_sub(1),
                (Err(_), _) => return Ending::with_code(exit::OTHER),
            }
        }
    }

    /// On a thread of its own: opening may wait, and a signal must not.
    fn open(&self, plan: Plan) -> Result<()> {
        let (wake, told) = (self.wake.clone(), self.wake.clone());
        let quitting = self.wake.clone();
        let quit = move || drop(quitting.send(Wake::Quit));
        let notify: Notify = Arc::new(move |notice| drop(told.send(Wake::Notice(notice))));
        let door = self.door.clone();
        self.work("open", move || {
            hold::at(Place::Opening);
            let opened = catch_unwind(AssertUnwindSafe(|| open(&plan, &notify, &door, quit)))
                .unwrap_or_else(|_| Err(internal()));
            let _ = wake.send(opened.map_or_else(|e| Wake::Stopped(Err(e)), |served| Wake::Ready(Box::new(served))));
        })
    }

    /// Stops what is served; without it whatever opens the front-ends hands it over when they have begun.
    fn begin_to_end(&self, served: Option<Box<Served>>) {
        systemd::tell(systemd::STOPPING);
        served.into_iter().for_each(|served| self.stop(served));
    }

    fn stop(&self, served: Box<Served>) {
        let wake = self.wake.clone();
        let work = move || {
            hold::at(Place::Stopping);
            let stop = || served.stop(Instant::now() + DRAIN);
            let stopped = catch_unwind(AssertUnwindSafe(stop)).unwrap_or_else(|_| Err(internal()));
            let _ = wake.send(Wake::Stopped(stopped));
        };
        if let Err(error) = self.work("stop", work) {
            let _ = self.wake.send(Wake::Stopped(Err(error)));
        }
    }

    fn work(&self, name: &str, work: impl FnOnce() + Send + 'static) -> Result<()> {
        let started = thread::Builder::new().name(name.to_owned()).spawn(work);
        started.map(drop).map_err(|e| Error::system(Kind::Other, format!("start the {name} thread"), e))
    }

    fn ready(&self, served: &Served) {
        for line in served.disks.iter().flat_map(|disk| disk.warnings()) {
            self.warn(line);
        }
        let addresses: Vec<String> = served.front_ends.iter().map(|front_end| front_end.address()).collect();
        if !self.quiet {
            self.display.say(&format!("ready: {}", addresses.join(", ")));
        }
        if let Some(records) = &self.records {
            let disk = |disk: &Arc<Disk>| ServedDisk {
                name: disk.name().to_owned(),
                path: PathName::of(disk.path()),
                format: disk.format().name(),
                virtual_size: disk.length(),
                read_only: disk.is_read_only(),
            };
            records.push(Body::Ready(Ready {
                version: env!("CARGO_PKG_VERSION"),
                pid: std::process::id(),
                disks: served.disks.iter().map(disk).collect(),
                addresses,
            }));
        }
        systemd::tell(systemd::READY);
    }

    fn warn(&self, line: &str) {
        if !self.quiet {
            self.display.warn(line);
        }
        if let Some(records) = &self.records {
            let message = line.to_owned();
            records.push(Body::Warning(Warning { code: "serve", offset: None, length: None, errno: None, message }));
        }
    }

    fn stopped(mut self, stopped: Result<bool>, cause: Option<(Cause, u8)>) -> Ending {
        match (stopped, cause) {
            (Ok(drained), Some((Cause::Signal(signal), code))) => {
                if !drained {
                    self.warn(&format!(
                        "requests were cut off, {} seconds after the end was asked for",
                        DRAIN.as_secs()
                    ));
                }
                if let Some(records) = &self.records {
                    records.finish(Body::Stopped(Stopped {
                        exit_code: code,
                        signal: signals::name(signal),
                        drained,
                        seconds_elapsed: self.began.elapsed().as_secs(),
                        dropped: Dropped::default(),
                    }));
                }
                self.end(Ending::with_code(code))
            }
            // What failed first has been told, in the last record too.
            (stopped, Some((Cause::Fault, code))) => {
                if let Err(error) = stopped {
                    self.display.fail(&error.to_string());
                }
                self.end(Ending::with_code(code))
            }
            (stopped, _) => {
                let code = self.fail(&stopped.err().unwrap_or_else(internal));
                self.end(Ending::with_code(code))
            }
        }
    }

    /// Ends at once, by a signal that came before there was anything to drain, or again.
    fn cut(mut self, signal: i32, again: bool) -> Ending {
        let (name, code) = (signals::name(signal), exit::of_signal(signal));
        let when = if again { "before its disks were flushed" } else { "before anything was served" };
        self.last_record(code, "signal", Some(name), format!("ended by {name} {when}"));
        self.end(Ending { code, signal: Some(signal), abandoned: again })
    }

    /// Says why it ends, once; the exit code.
    fn fail(&mut self, error: &Error) -> u8 {
        let (code, reason) = exit::of(error.kind());
        self.last_record(code, reason, None, error.to_string());
        code
    }

    fn last_record(&mut self, exit_code: u8, reason: &'static str, signal: Option<&'static str>, message: String) {
        self.display.fail(&message);
        if let Some(records) = &self.records {
            records.finish(Body::ExitError(Box::new(ExitError {
                exit_code,
                reason,
                signal,
                message,
                target_state: None,
                differs: Vec::new(),
                writer_released: None,
                seconds_elapsed: self.began.elapsed().as_secs(),
                dropped: Dropped::default(),
            })));
        }
    }

    fn end(&mut self, ending: Ending) -> Ending {
        self.display.finish(0);
        let bound = Instant::now() + LAST_LINES_BOUND;
        while self.untold > 0 {
            match self.woken.recv_timeout(bound.saturating_duration_since(Instant::now())) {
                Ok(Wake::Told) => self.untold -= 1,
                // It ends already; what is still said is too late.
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => break,
            }
        }
        ending
    }
}

fn internal() -> Error {
    Error::new(Kind::Other, "internal error")
}

fn open(plan: &Plan, notify: &Notify, door: &Door, quit: impl Fn() + Send + Sync + 'static) -> Result<Served> {
    front_ends::check(plan)?;
    let disks: Vec<Arc<Disk>> = plan.disks.iter().map(|disk| Disk::open(disk).map(Arc::new)).collect::<Result<_>>()?;
    if !door.take() {
        return Err(Error::new(Kind::Other, "it ended before anything was served"));
    }
    let mut remote = Server::new(remote_setup(plan, &disks, quit));
    match let_in(plan, &disks, notify, &mut remote) {
        Ok(front_ends) => Ok(Served { disks, front_ends, remote }),
        // Clients of those that began before one that fails may have been answered.
        Err(error) => flush(&disks).and(Err(error)),
    }
}

/// Starts everything that clients come by.
fn let_in(plan: &Plan, disks: &[Arc<Disk>], notify: &Notify, remote: &mut Server) -> Result<FrontEnds> {
    let front_ends = front_ends::start(plan, disks, notify)?;
    hold::at(Place::Reachable);
    if let Some(path) = &plan.qmp {
        remote.listen(path)?;
    }
    // Without it `ctl` needs the socket's name.
    let _ = remote.listen_privately(plan.disks.first().and_then(|disk| disk.writer_dir.as_deref()));
    Ok(front_ends)
}

/// All of them, whichever fails; the first error.
fn flush(disks: &[Arc<Disk>]) -> Result<()> {
    let flush = |disk: &Arc<Disk>| disk.flush().map_err(|e| Error::file(Side::Disk, "flush", disk.path(), e));
    let flushed: Vec<Result<()>> = disks.iter().map(flush).collect();
    flushed.into_iter().collect()
}

fn remote_setup(plan: &Plan, disks: &[Arc<Disk>], quit: impl Fn() + Send + Sync + 'static) -> Setup {
    let path = |disk: &Arc<Disk>| disk.path().canonicalize().unwrap_or_else(|_| disk.path().to_owned());
    let named: Vec<(&str, PathBuf)> = disks.iter().map(|disk| (disk.name(), path(disk))).collect();
    let mut nodes: Vec<Node> = Vec::new();
    for (((disk, asked), device), (_, path)) in disks.iter().zip(&plan.disks).zip(devices(&named)).zip(named) {
        let (format, length) = (Some(disk.format()), Some(disk.length()));
        let (read_only, secret) = (disk.is_read_only(), asked.secret.clone());
        nodes.push(Node { device, path, format, length, read_only, secret });
    }
    let writer_dir = plan.disks.first().and_then(|disk| disk.writer_dir.clone());
    Setup { nodes, writer_dir: Some(writer_dir.unwrap_or_else(folder::default_path)), quit: Box::new(quit) }
}

/// What disks with these names and paths are called by clients: each by its name, if that is an id, else by a new one.
fn devices(named: &[(&str, PathBuf)]) -> Vec<String> {
    let mut devices: Vec<String> = Vec::new();
    for (name, path) in named {
        let is_free =
            |new: &str| named.iter().all(|(name, _)| *name != new) && devices.iter().all(|device| device != new);
        let device = if valid_id(name) { (*name).to_owned() } else { name_of(path, is_free) };
        devices.push(device);
    }
    devices
}

/// Ends the backups that clients started: their targets are removed, or were never begun.
fn stop_jobs(remote: Server) {
    let jobs = Arc::clone(remote.jobs());
    jobs.cancel_all();
    let bound = Instant::now() + JOBS_BOUND;
    while jobs.is_busy() && Instant::now() < bound {
        thread::sleep(LOOK);
    }
    jobs.abandon_all();
    remote.stop("host-signal", Instant::now() + JOBS_BOUND);
}

impl Served {
    /// Lets requests end until `deadline`, then flushes. True: every request was answered.
    fn stop(self, deadline: Instant) -> Result<bool> {
        stop_jobs(self.remote);
        // Side by side: none may use up the time of another.
        let drained = thread::scope(|scope| {
            let stop = |front_end: Box<dyn crate::serve::FrontEnd>| scope.spawn(move || front_end.stop(deadline));
            let stopping: Vec<_> = self.front_ends.into_iter().map(stop).collect();
            let stopped: Vec<bool> = stopping.into_iter().map(|one| one.join().unwrap_or(false)).collect();
            stopped.into_iter().all(|drained| drained)
        });
        flush(&self.disks).map(|()| drained)
    }
}

#[cfg(test)]
mod tests;
