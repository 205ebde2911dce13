//! A disk as a regular file, by FUSE: any program that opens it is a writer.
//!
//! The file may be mounted over the image itself, so that whoever opens the image writes through this server. It has the
//! image's owner and mode; its size never changes. Every open is direct: the page cache holds nothing that the disk does not,
//! and the kernel refuses a shared writable mapping (ENODEV), whose stores nobody would see. Locks are the kernel's own.
//!
//! A backup of the file finds the image behind it ([`crate::ring::folder::shown`]) and reads that. It could not read the file:
//! the kernel lets SEEK_DATA wait for writes in flight, and these may wait for the backup.

mod file;
mod mount;
mod work;

pub use mount::clear_stale;

use super::disk::Disk;
use super::{FrontEnd, Notice, Notify};
use crate::error::{Error, Kind, Result};
use crate::ring::folder::shown::Sign;
use file::File;
use fuser::{BackgroundSession, Config, MountOption, Session, SessionACL};
use mount::Mount;
use std::path::Path;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};
use work::Work;

/// Threads that take requests. Each has a buffer of 16 MiB, of which only what requests fill takes memory.
const THREADS: usize = 6;
/// The kernel ends what is left of a connection at once after it was aborted.
const ENDS_SOON: Duration = Duration::from_secs(2);

/// A mounted file.
struct Fuse {
    mount: Mount,
    work: Arc<Work>,
    /// Hears the end of the session.
    ended: Mutex<Receiver<()>>,
    _sign: Option<Sign>,
}

/// Shows `disk` as a file at `path`: an existing regular file, the image too, or one that is made now and removed at the end.
///
/// [`Kind::Usage`] when `path` is something else, [`Kind::Other`] when it can't be mounted. A mount that a killed server of ours
/// left is undone first ([`clear_stale`]).
pub fn start(disk: Arc<Disk>, path: &Path, notify: Notify) -> Result<Box<dyn FrontEnd>> {
    clear_stale(path)?;
    let point = mount::Point::at(path)?;
    let work = Arc::new(Work::new(THREADS));
    let failed = |e| Error::system(Kind::Other, format!("mount '{}'", path.display()), e);
    let mut config = Config::default();
    config.mount_options = vec![
        MountOption::FSName(mount::NAME.into()),
        MountOption::Subtype(mount::NAME.into()),
        MountOption::DefaultPermissions,
        if disk.is_read_only() { MountOption::RO } else { MountOption::RW },
    ];
    let is_root = rustix::process::geteuid().is_root();
    config.acl = if is_root { SessionACL::All } else { SessionACL::Owner };
    config.n_threads = Some(THREADS);
    config.clone_fd = true;
    let session = Session::new(File::new(disk.clone(), work.clone()), point.path(), &config).map_err(failed)?;
    // Nothing is answered yet: no write comes before the sign is there.
    let mount = Mount::over(point);
    let sign = disk.show_as(mount.identity().map_err(failed)?)?;
    let session = session.spawn().map_err(failed)?;
    let ended = watch(session, work.clone(), path, notify).map_err(failed)?;
    Ok(Box::new(Fuse { mount, work, ended: Mutex::new(ended), _sign: sign }))
}

/// Waits for the end of the session, and tells of one that nobody asked for.
fn watch(session: BackgroundSession, work: Arc<Work>, path: &Path, notify: Notify) -> std::io::Result<Receiver<()>> {
    let (end, ended) = channel();
    let path = path.to_owned();
    thread::Builder::new().name("fuse-end".into()).spawn(move || {
        let result = session.join();
        let _ = end.send(());
        if work.is_closed() {
            return;
        }
        let what = format!("the mount at '{}' is gone", path.display());
        notify(Notice::Failed(match result {
            Ok(()) => Error::new(Kind::Other, what),
            Err(e) => Error::system(Kind::Other, what, e),
        }));
    })?;
    Ok(ended)
}

impl Fuse {
    fn end(&self, deadline: Instant) -> bool {
        let drained = self.work.close(deadline);
        if self.mount.undo() {
            let bound = deadline.max(Instant::now()) + ENDS_SOON;
            let ended = self.ended.lock().unwrap_or_else(PoisonError::into_inner);
            // A thread that still waits for a backup holds the session; it ends with the process.
            if drained {
                let _ = ended.recv_timeout(bound.saturating_duration_since(Instant::now()));
            }
        }
        drained
    }
}

impl FrontEnd for Fuse {
    fn address(&self) -> String {
        self.mount.path().display().to_string()
    }

    fn stop(self: Box<Self>, deadline: Instant) -> bool {
        self.end(deadline)
    }
}

impl Drop for Fuse {
    fn drop(&mut self) {
        if !self.work.is_closed() {
            self.end(Instant::now());
        }
    }
}
