//! Unix sockets that a server listens on: what a dead server left is replaced, a live one's is not.

use crate::error::{Error, Kind, Result};
use crate::image::medium::Identity;
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Clients that wait to be let in.
const BACKLOG: i32 = 128;
/// For the lock of a folder. Whoever begins holds it for a moment.
const LOCK_BOUND: Duration = Duration::from_secs(1);
/// Between two attempts.
const LOCK_LOOK: Duration = Duration::from_millis(5);

/// A listening socket with its name, which is removed when this is dropped.
#[derive(Debug)]
pub struct Bound {
    listener: UnixListener,
    path: PathBuf,
    identity: Identity,
}

impl Bound {
    /// Listens at `path`. [`Kind::Busy`] when a server that lives listens there; [`Kind::Usage`] when there is something that is
    /// no socket, or the path can't be one.
    pub fn at(path: &Path) -> Result<Self> {
        let failed = |e: io::Error| match e.kind() {
            io::ErrorKind::InvalidInput
            | io::ErrorKind::InvalidFilename
            | io::ErrorKind::NotFound
            | io::ErrorKind::NotADirectory
            | io::ErrorKind::PermissionDenied
            | io::ErrorKind::ReadOnlyFilesystem => {
                Error::system(Kind::Usage, format!("listen at '{}'", path.display()), e)
            }
            _ => Error::system(Kind::Other, format!("listen at '{}'", path.display()), e),
        };
        // Of two servers that find a dead one's socket only one may remove it.
        let _turn = lock_folder(path).map_err(failed)?;
        remove_stale(path, failed)?;
        let listener = listen(path).map_err(failed)?;
        let identity = std::fs::symlink_metadata(path).map(|found| Identity::of(&found)).map_err(failed)?;
        Ok(Self { listener, path: path.to_owned(), identity })
    }

    /// The socket; a clone of it for whoever wants to own one.
    pub fn listener(&self) -> &UnixListener {
        &self.listener
    }

    /// Its name goes, if it is still ours; whoever is connected stays so.
    pub fn remove(&self) {
        let is_ours = |found: std::fs::Metadata| Identity::of(&found) == self.identity;
        if std::fs::symlink_metadata(&self.path).is_ok_and(is_ours) {
            // At worst it stays, and the next server replaces it.
            let _ = std::fs::remove_file(&self.path);
        }
    }

    /// Its name.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        self.remove();
    }
}

/// Does a server that lives listen there? Does not wait for one that stands still: its queue may be full.
pub fn is_live(path: &Path) -> io::Result<bool> {
    let address = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    match rustix::net::connect(&socket, &address) {
        Ok(()) | Err(Errno::AGAIN) => Ok(true),
        Err(Errno::CONNREFUSED) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

/// Only for its owner: what may connect may write the disk. On Linux the name gets the mode of the unbound socket, so that there is
/// no moment at which others could connect.
fn listen(path: &Path) -> io::Result<UnixListener> {
    let address = SocketAddrUnix::new(path)?;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, &address)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

/// Held until it is closed. Waits for other servers that begin, not for one that stands still.
fn lock_folder(path: &Path) -> io::Result<std::os::fd::OwnedFd> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let folder = rustix::fs::open(folder, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let deadline = Instant::now() + LOCK_BOUND;
    loop {
        match rustix::fs::flock(&folder, FlockOperation::NonBlockingLockExclusive) {
            // A file system without locks: then it is as good as can be.
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOLCK | Errno::NOSYS) => return Ok(folder),
            Err(Errno::INTR) => {}
            Err(Errno::WOULDBLOCK) if Instant::now() < deadline => std::thread::sleep(LOCK_LOOK),
            Err(Errno::WOULDBLOCK) => {
                return Err(io::Error::other("its folder is locked by a process that keeps the lock"));
            }
            Err(e) => return Err(e.into()),
        }
    }
}

fn remove_stale(path: &Path, failed: impl Fn(io::Error) -> Error) -> Result<()> {
    let found = match std::fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(failed(e)),
    };
    if !found.file_type().is_socket() {
        return Err(Error::new(Kind::Usage, format!("listen at '{}': it exists, and is no socket", path.display())));
    }
    if is_live(path).map_err(&failed)? {
        return Err(Error::new(Kind::Busy, format!("another server listens at '{}'", path.display())));
    }
    std::fs::remove_file(path).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_dead_servers_socket_is_replaced_and_a_live_ones_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        // Closed without being removed, as by a kill.
        drop(UnixListener::bind(&path).unwrap());
        let bound = Bound::at(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        UnixStream::connect(&path).unwrap();
        let error = Bound::at(&path).unwrap_err();
        let expected = format!("another server listens at '{}'", path.display());
        assert_eq!((error.kind(), error.to_string()), (Kind::Busy, expected));
        drop(bound);
        assert!(!path.exists());
    }

    #[test]
    fn a_server_that_stands_still_with_a_full_queue_is_live_and_holds_nobody_up() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let _never_accepts = Bound::at(&path).unwrap();
        for _ in 0..2 * BACKLOG {
            assert!(is_live(&path).unwrap());
        }
        assert_eq!(Bound::at(&path).unwrap_err().kind(), Kind::Busy);
    }

    #[test]
    fn what_is_no_socket_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::write(&path, "precious").unwrap();
        let error = Bound::at(&path).unwrap_err();
        let expected = format!("listen at '{}': it exists, and is no socket", path.display());
        assert_eq!((error.kind(), error.to_string()), (Kind::Usage, expected));
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
        for wrong in [folder.path().join("none/socket"), folder.path().join("x".repeat(120))] {
            assert_eq!(Bound::at(&wrong).unwrap_err().kind(), Kind::Usage);
        }
    }

    #[test]
    fn a_name_that_another_server_took_over_stays() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let first = Bound::at(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let _second = Bound::at(&path).unwrap();
        drop(first);
        UnixStream::connect(&path).unwrap();
    }

    #[test]
    fn who_keeps_the_folder_locked_holds_nobody_for_long() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let lock = lock_folder(&path).unwrap();
        let error = Bound::at(&path).unwrap_err();
        assert!(error.to_string().contains("locked by a process that keeps the lock"), "{error}");
        drop(lock);
        Bound::at(&path).unwrap();
    }
}
