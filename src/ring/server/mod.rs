//! The backup's side: the writers of one disk, from attaching to the end of the job.
//!
//! | phase | begins with | writers that start now |
//! |---|---|---|
//! | gathering | [`Writers::attach`] | are attached, and frozen with the others |
//! | frozen | [`Writers::freeze_all`] | wait |
//! | trapping | [`Frozen::thaw`] | are attached with every write trapped from their first on |
//! | over | [`Writers::finish`], [`Frozen::release`], or the loss of the instant | are none of our business |
//!
//! The instant is lost for good as soon as one writer may have written without a grant. Then everybody is let go at
//! once, and [`Writers::check`] says why, which is the last thing to ask before anything is published.

mod freeze;
mod link;
mod lookout;

pub use freeze::Frozen;

use crate::error::{Error, Kind, Result};
use crate::ground::cluster::{ClusterSize, Clusters};
use crate::ground::range::ByteRange;
use crate::ring::folder::{Disk, Entry, Folder};
use crate::ring::layout::{Breach, bitmap_bytes};
use crate::ring::packet::{self, Attach};
use crate::ring::shm::{Bits, Ring};
use crate::ring::stall::Stalls;
use crate::snapshot::tracker::FreeMap;
use link::{Link, Unattached};
use rustix::event::EventfdFlags;
use rustix::io::Errno;
use rustix::process::Pid;
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// What the writer is given to be frozen beyond the time in which all have to be: for the instant itself.
const INSTANT: Duration = Duration::from_secs(1);
/// A writer whose own write is to fail waits so much longer than the capture may take: the refusal comes first.
const REFUSAL: Duration = Duration::from_secs(2);
/// A starting writer waits so much longer than a freeze may take, until it is attached.
const ATTACHING: Duration = Duration::from_secs(5);
/// How long the end waits for threads that are in the middle of a capture. Those that hang are left behind.
const LAST_THREADS: Duration = Duration::from_secs(1);

/// The longest [`Options::freeze_timeout`] and [`Options::cbw_timeout`] that mean what they say: writers wait no longer.
pub const LONGEST_FREEZE: Duration = packet::LONGEST_FREEZE;
/// See [`LONGEST_FREEZE`].
pub const LONGEST_CAPTURE: Duration = packet::LONGEST_WAIT.saturating_sub(REFUSAL);

/// What happens when the old contents can't be saved in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnCbwError {
    /// The write goes on, the backup fails.
    BreakSnapshot,
    /// The write fails with the capture's errno, the backup goes on.
    BreakGuestWrite,
}

/// The terms for the writers of one disk.
#[derive(Clone, Copy, Debug)]
pub struct Options {
    /// Bytes of the disk, as its writers address it.
    pub length: u64,
    /// What is trapped as one.
    pub cluster_size: ClusterSize,
    /// In which all writers must be frozen.
    pub freeze_timeout: Duration,
    /// In which a trapped write must have been captured.
    pub cbw_timeout: Duration,
    /// What happens otherwise.
    pub on_cbw_error: OnCbwError,
    /// Threads for each writer: so many of its trapped writes may be in captures at once.
    pub threads: usize,
}

/// What a trapped write sets going. Called from several threads at once.
pub trait Trap: Send + Sync {
    /// A write to `range`, which is not empty and within the disk, is waiting. Returns when no one will read the source
    /// there again for the instant. May block; after the time-out nobody waits for it any more.
    fn before_write(&self, range: ByteRange) -> Result<()>;

    /// A writer may have started after the instant, unless it is one that died: it has written nothing yet, and does not until
    /// this returns. May block for a moment.
    fn writer_may_come(&self) {}

    /// It did, and is attached.
    fn writer_came(&self) {}

    /// The last writer has left. May block for a moment.
    fn writers_left(&self) {}

    /// The instant is lost, and why. Called once, before any writer is let go. Must not block.
    fn lost(&self, why: &Error);
}

/// What the writers of a disk did and felt during the job.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WriterCounts {
    /// Writers attached now.
    pub attached: usize,
    /// Writers that were ever attached.
    pub ever: usize,
    /// Writes begun since the thaw.
    pub writes: u64,
    /// Writes that waited, for a grant or for the thaw.
    pub trapped: u64,
    /// How long those waited.
    pub stalls: Stalls,
}

/// See the module. Dropped, it lets everybody go.
pub struct Writers {
    hub: Arc<Hub>,
    lookout: Option<JoinHandle<()>>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Gathering,
    Frozen,
    Trapping,
    Over,
}

/// The free bitmap, as the tracker sees it.
struct Map(Bits);

impl FreeMap for Map {
    fn free(&self, clusters: Clusters) {
        self.0.free(clusters);
    }
}

/// Our announcement, and the lock that proves that we live.
struct Announcement {
    _lock: OwnedFd,
    _name: Entry,
}

/// What all threads share. `phase` is locked before any other; no two of the others are held together.
struct Hub {
    disk: Disk,
    folder: Arc<Folder>,
    options: Options,
    number: u64,
    /// Held while writers are attached, so that none is between two phases.
    phase: Mutex<Phase>,
    links: Mutex<Vec<Arc<Link>>>,
    gone: Mutex<Vec<(i32, Arc<Ring>)>>,
    past: Mutex<WriterCounts>,
    announcement: Mutex<Option<Announcement>>,
    lost: OnceLock<String>,
    trap: OnceLock<Arc<dyn Trap>>,
    map: Arc<Map>,
    map_descriptor: OwnedFd,
    bell: OwnedFd,
    threads: Mutex<usize>,
    fewer_threads: Condvar,
}

/// A machine that has no such memory, or no such folder for us, has no writers; one that is out of memory or room, or a process
/// that may open no more, may have some.
fn kind_of(error: &io::Error) -> Kind {
    use io::ErrorKind::{NotADirectory, NotFound, PermissionDenied, ReadOnlyFilesystem, Unsupported};
    match error.kind() {
        NotFound | NotADirectory | PermissionDenied | ReadOnlyFilesystem | Unsupported => Kind::Other,
        _ if error.raw_os_error() == Some(Errno::LOOP.raw_os_error()) => Kind::Other,
        _ => Kind::InstantLost,
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Writers {
    /// Announces a backup of `disk` in `folder` (which is made if missing) and attaches to all its writers; there may be
    /// none. From now on writers that start are attached too. They all write on as before until they are frozen.
    ///
    /// Fails with [`Kind::Busy`] when another backup is attached to one of them, with [`Kind::InstantLost`] when a writer
    /// that lives can't be attached or there is no memory for one, and with [`Kind::Other`] where this is not possible at
    /// all. Blocks for the answer of each, 2 s at most.
    pub fn attach(disk: Disk, folder: &Path, options: Options) -> Result<Self> {
        let failed = |e| Error::system(kind_of(&e), format!("use writer folder '{}'", folder.display()), e);
        let folder = Folder::open(folder).map_err(failed)?;
        let shared = |e| Error::system(kind_of(&e), "make the memory that writers share", e);
        let bytes = bitmap_bytes(options.cluster_size.count(options.length));
        let (bits, map_descriptor) = Bits::create(bytes).map_err(shared)?;
        let flags = EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK;
        let bell = rustix::event::eventfd(0, flags).map_err(|e| shared(e.into()))?;
        let (number, descriptor, name) = folder.announce(disk, options.freeze_timeout + ATTACHING).map_err(failed)?;
        let hub = Arc::new(Hub {
            disk,
            folder,
            options,
            number,
            phase: Mutex::new(Phase::Gathering),
            links: Mutex::default(),
            gone: Mutex::default(),
            past: Mutex::default(),
            announcement: Mutex::new(Some(Announcement { _lock: descriptor, _name: name })),
            lost: OnceLock::new(),
            trap: OnceLock::new(),
            map: Arc::new(Map(bits)),
            map_descriptor,
            bell,
            threads: Mutex::new(0),
            fewer_threads: Condvar::new(),
        });
        // Announced; now look. A writer that comes between the two is found here or finds us.
        let mut writers = Self { hub, lookout: None };
        writers.hub.scan(&lock(&writers.hub.phase))?;
        let lookout = lookout::start(writers.hub.clone()).map_err(shared)?;
        writers.lookout = Some(lookout);
        Ok(writers)
    }

    /// The bitmap that all writers of this disk read, for [`crate::snapshot::tracker::Tracker::attach_free_map`] once
    /// the instant is there.
    pub fn free_map(&self) -> Arc<dyn FreeMap> {
        self.hub.map.clone()
    }

    /// Number of writers attached now.
    pub fn attached(&self) -> usize {
        lock(&self.hub.links).iter().filter(|link| !link.is_over()).count()
    }

    /// Freezes the writers of several disks. When this returns nothing is in flight on any of them and their buffers
    /// are flushed: that is the instant, until they are thawed, which must be within a second. Each [`Frozen`] belongs to
    /// the disk at its place.
    ///
    /// Fails with [`Kind::InstantLost`] when one of them is not frozen within the longest `freeze_timeout`; those that
    /// were are thawed. Only once for each.
    pub fn freeze_all(disks: &[&Self]) -> Result<Vec<Frozen>> {
        freeze::freeze_all(&disks.iter().map(|writers| writers.hub.clone()).collect::<Vec<_>>())
    }

    /// [`Writers::freeze_all`] for one disk.
    pub fn freeze(&self) -> Result<Frozen> {
        Ok(Self::freeze_all(&[self])?.remove(0))
    }

    /// Is the copy still as of the instant? Looks at every mark of every writer, and for writers that started and could
    /// not be attached. To be asked after the last read of the source and before anything is published.
    pub fn check(&self) -> Result<()> {
        self.hub.check(&lock(&self.hub.phase))
    }

    /// Why the instant is lost, if it is known to be. Cheap; [`Writers::check`] looks.
    pub fn lost(&self) -> Option<Error> {
        self.hub.lost_error()
    }

    /// The copy has everything: checks a last time, then lets all writers go. Counts may still be asked for.
    pub fn finish(&self) -> Result<()> {
        // One hold: a writer that starts between the two is none of our business.
        let mut phase = lock(&self.hub.phase);
        let checked = self.hub.check(&phase);
        self.hub.end(&mut phase);
        checked
    }

    /// What they did and felt so far.
    pub fn counts(&self) -> WriterCounts {
        let links = lock(&self.hub.links).clone();
        let mut counts = lock(&self.hub.past).clone();
        counts.attached = links.iter().filter(|link| !link.is_over()).count();
        links.iter().for_each(|link| link.count_into(&mut counts));
        counts
    }
}

impl Drop for Writers {
    fn drop(&mut self) {
        self.hub.end(&mut lock(&self.hub.phase));
        if let Some(lookout) = self.lookout.take() {
            // It fails if that thread panicked; then there is nothing left to end.
            let _ = lookout.join();
        }
        let threads = lock(&self.hub.threads);
        drop(self.hub.fewer_threads.wait_timeout_while(threads, LAST_THREADS, |threads| *threads > 0));
    }
}

/// Counts a thread until it is dropped.
struct Counted(Arc<Hub>);

impl Drop for Counted {
    fn drop(&mut self) {
        *lock(&self.0.threads) -= 1;
        self.0.fewer_threads.notify_all();
    }
}

impl Hub {
    /// Attaches to every writer that we are not attached to. The phase is held, so that it is the same for all.
    fn scan(self: &Arc<Self>, phase: &MutexGuard<'_, Phase>) -> Result<()> {
        let failed =
            |e| Error::system(Kind::InstantLost, format!("look for writers in '{}'", self.folder.path().display()), e);
        let trap_at_once = match **phase {
            Phase::Gathering => false,
            Phase::Trapping => true,
            Phase::Frozen | Phase::Over => return Ok(()),
        };
        for number in self.folder.writers(self.disk).map_err(failed)? {
            if lock(&self.links).iter().any(|link| link.number == number && !link.is_over()) {
                continue;
            }
            let trap = self.trap.get();
            trap.iter().for_each(|trap| trap.writer_may_come());
            match Link::attach(self, number, self.terms(trap_at_once)) {
                Ok(Some(link)) => {
                    trap.iter().for_each(|trap| trap.writer_came());
                    self.admit(link)?;
                }
                Ok(None) => {}
                Err(why) => return Err(self.unattached(&why)),
            }
        }
        Ok(())
    }

    fn terms(&self, trap_at_once: bool) -> Attach {
        let grace = if self.options.on_cbw_error == OnCbwError::BreakGuestWrite { REFUSAL } else { Duration::ZERO };
        Attach {
            announcement: self.number,
            length: self.options.length,
            cluster_size: self.options.cluster_size,
            freeze_timeout: self.options.freeze_timeout + INSTANT,
            cbw_timeout: self.options.cbw_timeout + grace,
            trap_at_once,
        }
    }

    fn unattached(&self, why: &Unattached) -> Error {
        let kind = if matches!(why, Unattached::Busy(_)) { Kind::Busy } else { Kind::InstantLost };
        Error::new(kind, why.to_string())
    }

    fn admit(self: &Arc<Self>, link: Arc<Link>) -> Result<()> {
        for _ in 0..self.options.threads.max(1) {
            self.start_serving(link.clone()).map_err(|e| {
                // Else those that did start would keep the writer from every later backup.
                link.let_go();
                Error::system(Kind::InstantLost, "start a thread for a writer", e)
            })?;
        }
        lock(&self.past).ever += 1;
        lock(&self.links).push(link);
        // So that the lookout watches its connection.
        self.ring_bell();
        Ok(())
    }

    fn start_serving(self: &Arc<Self>, link: Arc<Link>) -> io::Result<()> {
        *lock(&self.threads) += 1;
        let (counted, hub) = (Counted(self.clone()), self.clone());
        let serving = move || {
            let _counted = counted;
            link::serve(&hub, &link);
        };
        thread::Builder::new().name("trap".into()).spawn(serving).map(drop)
    }

    fn ring_bell(&self) {
        // It fails only when it has rung 2^64 times unheard.
        let _ = rustix::io::write(&self.bell, &1_u64.to_ne_bytes());
    }

    /// Gives the instant up, once: tells the job, then lets every writer go.
    fn lose(&self, why: String) {
        if self.lost.set(why).is_err() {
            return;
        }
        if let (Some(trap), Some(error)) = (self.trap.get(), self.lost_error()) {
            trap.lost(&error);
        }
        let links = lock(&self.links).clone();
        links.iter().for_each(|link| link.let_go());
    }

    fn lost_error(&self) -> Option<Error> {
        self.lost.get().map(|why| Error::new(Kind::InstantLost, why.clone()))
    }

    /// What does the mark in its ring say?
    fn look_at_mark(&self, pid: i32, ring: &Ring) {
        let mark = ring.broken();
        if mark != 0 {
            self.lose(format!("writer (pid {pid}) went on without us: {}", Breach::describe(mark)));
        }
    }

    /// The writer is gone. What it had not been granted it never wrote. Its ring is kept while its process lives: it may only
    /// have lost its connection, and mark the ring later, before it writes.
    fn forget(&self, link: &Arc<Link>) {
        self.remove(link);
        if lock(&self.links).iter().all(|link| link.is_over()) {
            self.trap.get().iter().for_each(|trap| trap.writers_left());
        }
    }

    fn remove(&self, link: &Arc<Link>) {
        link.let_go();
        let mut links = lock(&self.links);
        let Some(at) = links.iter().position(|other| Arc::ptr_eq(other, link)) else { return };
        links.swap_remove(at);
        drop(links);
        link.count_into(&mut lock(&self.past));
        lock(&self.gone).push((link.pid, link.ring.clone()));
    }

    /// Lets go of the rings whose processes have ended, after a last look: nothing is written there any more, and a long job may
    /// see any number of writers come and go.
    fn bury_the_dead(&self) {
        let dead: Vec<_> = lock(&self.gone).extract_if(.., |(pid, _)| has_ended(*pid)).collect();
        dead.iter().for_each(|(pid, ring)| self.look_at_mark(*pid, ring));
    }

    fn check(self: &Arc<Self>, phase: &MutexGuard<'_, Phase>) -> Result<()> {
        let links = lock(&self.links).clone();
        let gone = lock(&self.gone).clone();
        for (pid, ring) in links.iter().map(|link| (link.pid, &link.ring)).chain(gone.iter().map(|(p, r)| (*p, r))) {
            self.look_at_mark(pid, ring);
        }
        if **phase == Phase::Trapping {
            let failed = |e| Error::system(Kind::InstantLost, "look for writers that began without us", e);
            if self.folder.is_marked_unattached(self.disk, self.number).map_err(failed)? {
                self.lose("a writer began to write before we could attach to it".into());
            }
            if let Err(error) = self.scan(phase) {
                self.lose(error.to_string());
            }
        }
        self.lost_error().map_or(Ok(()), Err)
    }

    /// Lets everybody go, for good.
    fn end(&self, phase: &mut MutexGuard<'_, Phase>) {
        **phase = Phase::Over;
        if lock(&self.announcement).take().is_some() {
            self.folder.clear_mark(self.disk, self.number);
        }
        let links = lock(&self.links).clone();
        for link in &links {
            link.detach();
            self.remove(link);
        }
        self.ring_bell();
    }

    fn is_over(&self) -> bool {
        *lock(&self.phase) == Phase::Over
    }
}

/// False as well where that can't be told: of one that its parent has not waited for, whose number is in use again, or that
/// is not of our process namespace.
fn has_ended(pid: i32) -> bool {
    Pid::from_raw(pid).is_some_and(|pid| rustix::process::test_kill_process(pid) == Err(Errno::SRCH))
}

/// Errors of the machine while a capture is made, by number: what a refused write fails with.
fn errno_of(error: &Error) -> u32 {
    let raw = error.errno().unwrap_or_else(|| Errno::IO.raw_os_error());
    u32::try_from(raw).ok().filter(|errno| (1..4096).contains(errno)).unwrap_or(5)
}

/// For messages: the bound that was passed.
fn seconds(duration: Duration) -> String {
    format!("{} s", duration.as_secs_f64())
}

fn is_timeout(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut)
}

#[cfg(test)]
mod tests;
