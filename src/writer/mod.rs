//! What a program that writes a disk links, so that a backup may attach to it while it runs.
//!
//! ```no_run
//! use drive_backup::writer::Writer;
//! use std::os::unix::fs::FileExt;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let disk = std::fs::OpenOptions::new().read(true).write(true).open("disk.raw")?;
//! let writer = Writer::open("disk.raw")?; // before the first write
//! {
//!     let _write = writer.begin(4096, 3)?; // every write, discard and write-zeroes is bracketed
//!     disk.write_all_at(b"new", 4096)?;
//! }
//! # Ok(())
//! # }
//! ```
//!
//! Without a backup a bracket costs two additions and two loads. While one runs, a write to a cluster that is not safe
//! yet waits until its old contents are; never for the target, and never longer than the backup's `--cbw-timeout`.
//!
//! **What a program owes.** Every change to the disk is inside a bracket, by whatever thread and system call; a write
//! of another process is not seen. The bracket ends when the write call has returned: bytes that are still in a buffer
//! of the program are not on the disk. A bracket is for one write: one that is never closed makes every freeze fail.
//!
//! **fork.** A child has no service thread, and its copies of the sockets hide the parent's death. Fork only to exec
//! (the descriptors are close-on-exec), or before [`Writer::open`].

#[cfg(any(feature = "capi", test))]
pub mod capi;
mod service;
mod session;

use crate::error::{Error, Kind, Result};
use crate::ground::range::ByteRange;
use crate::hold;
use crate::ring::folder::{self, Announced, Disk, Entry, Folder};
use crate::ring::gate::{Gate, Passage};
use crate::ring::layout::Breach;
use crate::ring::meeting::{self, Door, Place};
use rustix::event::EventfdFlags;
use session::{Asked, Session};
use std::cell::Cell;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How often a starting writer looks whether the backup that it waits for still lives.
const LOOK: Duration = Duration::from_millis(20);

/// What brings the program's own buffers to the disk during a freeze.
type Quiesce = Box<dyn FnMut() -> io::Result<()> + Send>;

/// A disk that this process writes. See the module.
#[derive(Debug)]
pub struct Writer {
    shared: Arc<Shared>,
    service: Option<JoinHandle<()>>,
    _name: Entry,
}

/// The bracket around one write. Ends when it is dropped, on any thread.
#[must_use = "the bracket ends at once when it is dropped"]
#[derive(Debug)]
pub struct Write<'a> {
    shared: &'a Shared,
}

/// What the program's threads and the service thread share.
struct Shared {
    gate: Gate,
    control: RwLock<Control>,
    attached: Mutex<Vec<u64>>,
    arrived: Condvar,
    quiesce: Mutex<Option<Quiesce>>,
    /// The callback runs, or will in a moment. It is replaced under this lock, when it does not.
    quiescing: Mutex<bool>,
    quiesced: Condvar,
    /// Writes that wait for a thaw. The next freeze begins when they have come in: one backup after the other would
    /// hold them for ever.
    waiting: AtomicUsize,
    bell: OwnedFd,
    stop: AtomicBool,
}

/// Who may change the gate. A change of session and the change of the gate that goes with it are one step.
struct Control {
    session: Option<Arc<Session>>,
    frozen_until: Option<Instant>,
    /// No write has begun: a backup whose instant has passed may still attach.
    opening: bool,
}

impl Control {
    fn is(&self, session: &Arc<Session>) -> bool {
        self.session.as_ref().is_some_and(|current| Arc::ptr_eq(current, session))
    }
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shared").field("gate", &self.gate).finish_non_exhaustive()
    }
}

thread_local! {
    /// Spreads threads over counters.
    static NUMBER: Cell<usize> = const { Cell::new(usize::MAX) };
    /// This thread runs the quiesce callback: its writes belong to the time before the instant.
    static QUIESCING: Cell<bool> = const { Cell::new(false) };
}

#[inline]
fn thread_number() -> usize {
    match NUMBER.get() {
        usize::MAX => new_thread_number(),
        number => number,
    }
}

#[cold]
fn new_thread_number() -> usize {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let number = NEXT.fetch_add(1, Ordering::Relaxed) % 4096;
    NUMBER.set(number);
    number
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Writer {
    /// Lets backups of the disk at `device`, a file or a block device, attach to this process. Call it before the
    /// first write. If a backup of it runs right now, this waits until that one has attached, some seconds, 60 at most.
    ///
    /// Writers and backups meet in [`folder::default_path`].
    pub fn open(device: impl AsRef<Path>) -> Result<Self> {
        Self::open_in(device, folder::default_path())
    }

    /// [`Writer::open`], meeting in `folder`: a folder of mode 0700 that belongs to this user, made if missing.
    pub fn open_in(device: impl AsRef<Path>, folder: impl AsRef<Path>) -> Result<Self> {
        let (device, path) = (device.as_ref(), folder.as_ref());
        let failed = |what: String| move |e| Error::system(Kind::Other, what, e);
        let disk = Disk::at(device).map_err(failed(format!("open disk '{}'", device.display())))?;
        let in_folder = || format!("use writer folder '{}'", path.display());
        let folder = Folder::open(path).map_err(failed(in_folder()))?;
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let bell =
            rustix::event::eventfd(0, flags).map_err(io::Error::from).map_err(failed("make an eventfd".into()))?;
        let shared = Arc::new(Shared {
            gate: Gate::default(),
            control: RwLock::new(Control { session: None, frozen_until: None, opening: true }),
            attached: Mutex::default(),
            arrived: Condvar::new(),
            quiesce: Mutex::default(),
            quiescing: Mutex::new(false),
            quiesced: Condvar::new(),
            waiting: AtomicUsize::new(0),
            bell,
            stop: AtomicBool::new(false),
        });
        let starting = Starting { shared: &shared, folder: &folder, disk, since: Instant::now() };
        meeting::join(&starting, &starting, || {
            let (listener, name) = folder.listen(disk).map_err(failed(in_folder()))?;
            let service = service::start(shared.clone(), listener, folder.clone());
            let service = service.map_err(failed("start the writer's thread".into()))?;
            Ok(Self { shared: shared.clone(), service: Some(service), _name: name })
        })
    }

    /// Begins a write of `length` bytes at `offset`; a discard or write-zeroes is one too. The disk may be touched
    /// until the guard is dropped.
    ///
    /// Blocks while the writer is frozen, and until a backup has saved what the write is about to overwrite; a bounded
    /// time in either case. Fails with the errno of a failed capture if the backup runs with
    /// `--on-cbw-error break-guest-write`, and with EINVAL when `offset + length` overflows; then nothing has begun.
    #[inline]
    pub fn begin(&self, offset: u64, length: u64) -> io::Result<Write<'_>> {
        self.enter(offset, length)?;
        Ok(Write { shared: &self.shared })
    }

    /// Would a write there wait now, for a thaw or for its old contents to be saved? A hint for who has other threads to
    /// wait: it may be otherwise when the write begins. Does not block.
    #[inline]
    pub fn would_wait(&self, offset: u64, length: u64) -> bool {
        match self.shared.gate.look() {
            Passage::Open => false,
            Passage::Frozen => true,
            Passage::Trapping => self.shared.is_held(offset, length),
        }
    }

    /// During a freeze, when no write is in flight, `quiesce` brings everything that this program has buffered to the
    /// disk; an error makes the backup fail. It replaces an earlier one; blocks while that one runs.
    ///
    /// It runs on a thread of its own, with the signals blocked that were when the writer was opened. Its writes may be
    /// bracketed on that thread; writes that other threads begin wait for the end of the freeze.
    pub fn on_freeze(&self, quiesce: impl FnMut() -> io::Result<()> + Send + 'static) {
        self.shared.set_quiesce(Some(Box::new(quiesce)));
    }

    /// [`Writer::begin`] without the guard.
    #[inline]
    pub(crate) fn enter(&self, offset: u64, length: u64) -> io::Result<()> {
        self.shared.enter(offset, length)
    }

    /// Writes that wait for a thaw.
    #[cfg(test)]
    pub(crate) fn waiting(&self) -> usize {
        self.shared.waiting.load(Ordering::SeqCst)
    }

    /// The callback runs, or will in a moment.
    #[cfg(test)]
    pub(crate) fn is_quiescing(&self) -> bool {
        *lock(&self.shared.quiescing)
    }

    /// The end of a [`Writer::enter`], on any thread.
    #[inline]
    #[cfg(any(feature = "capi", test))]
    pub(crate) fn leave(&self) {
        self.shared.leave();
    }
}

impl Drop for Write<'_> {
    #[inline]
    fn drop(&mut self) {
        self.shared.leave();
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.ring_bell();
        if let Some(service) = self.service.take() {
            // It fails if that thread panicked; then it has let everybody go already.
            let _ = service.join();
        }
        // Waits for a callback that is running, so that what it refers to may go.
        self.shared.set_quiesce(None);
    }
}

impl Shared {
    #[inline]
    fn enter(&self, offset: u64, length: u64) -> io::Result<()> {
        let Some(range) = ByteRange::checked(offset, length) else {
            return Err(io::Error::from_raw_os_error(rustix::io::Errno::INVAL.raw_os_error()));
        };
        let mine = thread_number();
        match self.gate.enter(mine) {
            Passage::Open => Ok(()),
            passage => self.enter_slowly(passage, mine, range),
        }
    }

    #[inline]
    fn leave(&self) {
        if self.gate.leave(thread_number()) {
            self.ring_bell();
        }
    }

    #[inline(never)]
    fn enter_slowly(&self, passage: Passage, mine: usize, range: ByteRange) -> io::Result<()> {
        let mut passage = passage;
        if passage == Passage::Frozen {
            // The service thread may have summed up while this write was counted for a moment.
            self.ring_bell();
            if QUIESCING.get() {
                self.gate.enter_frozen(mine);
                return Ok(());
            }
            passage = self.enter_after_thaw(mine);
        }
        match passage {
            Passage::Trapping => self.ask(mine, range).inspect_err(|_| self.leave()),
            _ => Ok(()),
        }
    }

    fn enter_after_thaw(&self, mine: usize) -> Passage {
        let since = Instant::now();
        self.waiting.fetch_add(1, Ordering::SeqCst);
        let passage = loop {
            self.wait_thaw();
            match self.gate.enter(mine) {
                Passage::Frozen => self.ring_bell(),
                passage => break passage,
            }
        };
        self.waiting.fetch_sub(1, Ordering::SeqCst);
        self.ring_bell();
        if let Some(session) = &self.control().session {
            session.ring.count_stall(since.elapsed());
        }
        passage
    }

    /// Inside the gate, while it traps.
    fn ask(&self, mine: usize, range: ByteRange) -> io::Result<()> {
        let control = self.control();
        // No session: it has ended since the gate was read, and the gate is open.
        let Some(session) = &control.session else { return Ok(()) };
        let Some(first) = session.first_held(mine, range) else { return Ok(()) };
        let session = session.clone();
        drop(control);
        let since = Instant::now();
        hold::at(hold::Place::Asking);
        let asked = session.ask(range, first);
        session.ring.count_stall(since.elapsed());
        match asked {
            Asked::Granted => {
                hold::at(hold::Place::Granted);
                Ok(())
            }
            Asked::Refused(error) => Err(error),
            Asked::Left(breach) => {
                self.end(&session, Some(breach));
                Ok(())
            }
        }
    }

    #[inline(never)]
    fn is_held(&self, offset: u64, length: u64) -> bool {
        let range = ByteRange::checked(offset, length);
        range.is_some_and(|range| self.control().session.as_ref().is_some_and(|session| session.is_held(range)))
    }

    /// Waits for the end of a freeze, and ends it if it lasts too long: whoever waits keeps the bound himself.
    fn wait_thaw(&self) {
        let (session, until) = {
            let control = self.control();
            (control.session.clone(), control.frozen_until)
        };
        let (Some(session), Some(until)) = (session, until) else { return };
        if !self.gate.wait_thaw(until.saturating_duration_since(Instant::now())) && Instant::now() >= until {
            self.end(&session, Some(Breach::FrozenTooLong));
        }
    }

    /// Ends `session` if it has not ended: marks its ring for `breach` first, then opens the gate, then releases
    /// everybody who waits, and hangs up.
    fn end(&self, session: &Arc<Session>, breach: Option<Breach>) {
        self.let_go(session, breach);
        session.end();
    }

    /// The first half of [`Shared::end`]: the mark and the gate. True: the session had not ended before.
    fn let_go(&self, session: &Arc<Session>, breach: Option<Breach>) -> bool {
        let mut control = self.control_mut();
        if let Some(breach) = breach {
            session.ring.mark_broken(breach);
        }
        let current = control.is(session);
        if current {
            control.session = None;
            control.frozen_until = None;
            self.gate.open();
        }
        current
    }

    fn set_quiesce(&self, quiesce: Option<Quiesce>) {
        let running = self.quiesced.wait_while(lock(&self.quiescing), |running| *running);
        let earlier = std::mem::replace(&mut *lock(&self.quiesce), quiesce);
        // Dropped without the lock, for which a freeze may be waiting.
        drop(running);
        drop(earlier);
    }

    fn has_quiesced(&self) {
        *lock(&self.quiescing) = false;
        self.quiesced.notify_all();
    }

    fn control(&self) -> RwLockReadGuard<'_, Control> {
        self.control.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn control_mut(&self) -> RwLockWriteGuard<'_, Control> {
        self.control.write().unwrap_or_else(PoisonError::into_inner)
    }

    fn ring_bell(&self) {
        // It fails only when it has rung 2^64 times unheard.
        let _ = rustix::io::write(&self.bell, &1_u64.to_ne_bytes());
    }
}

/// A writer that has not begun, among the names of its folder.
struct Starting<'a> {
    shared: &'a Shared,
    folder: &'a Folder,
    disk: Disk,
    since: Instant,
}

impl Starting<'_> {
    fn failed(&self, error: io::Error) -> Error {
        Error::system(Kind::Other, format!("use writer folder '{}'", self.folder.path().display()), error)
    }
}

impl Place for Starting<'_> {
    type Error = Error;

    fn backups(&self) -> Result<Vec<Announced>> {
        self.folder.backups(self.disk).map_err(|error| self.failed(error))
    }

    fn mark_unattached(&self, number: u64) -> Result<()> {
        self.folder.mark_unattached(self.disk, number).map_err(|error| self.failed(error))
    }
}

impl Door for Starting<'_> {
    fn attached(&self) -> Vec<u64> {
        lock(&self.shared.attached).clone()
    }

    fn waits_for(&self, backup: &Announced) -> bool {
        self.since.elapsed() < backup.patience
    }

    fn wait(&self, count: usize) {
        let attached = lock(&self.shared.attached);
        drop(self.shared.arrived.wait_timeout_while(attached, LOOK, |attached| attached.len() <= count));
    }

    fn shut(&self) {
        self.shared.control_mut().opening = false;
    }
}

#[cfg(test)]
mod tests;
