//! Sockets that only their owner can reach: what a dead server left is replaced, a live one's is not.

use crate::error::{Error, Kind, Result};
use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

/// A listening socket with its name, which is removed when this is dropped.
#[derive(Debug)]
pub struct Bound {
    /// Accepts.
    pub listener: UnixListener,
    path: PathBuf,
    inode: u64,
}

impl Bound {
    /// Listens at `path`, mode 0600 from its first moment on. [`Kind::Busy`] when somebody listens there already,
    /// [`Kind::Usage`] when there is something that is no socket, or the path can't be one.
    pub fn at(path: &Path) -> Result<Self> {
        let failed = |e: io::Error| {
            let kind = match e.kind() {
                io::ErrorKind::InvalidInput
                | io::ErrorKind::InvalidFilename
                | io::ErrorKind::NotFound
                | io::ErrorKind::NotADirectory => Kind::Usage,
                _ => Kind::Other,
            };
            Error::system(kind, format!("listen at '{}'", path.display()), e)
        };
        if let Ok(found) = std::fs::symlink_metadata(path) {
            if !found.file_type().is_socket() {
                let what = format!("listen at '{}': it exists, and is no socket", path.display());
                return Err(Error::new(Kind::Usage, what));
            }
            if is_live(path) {
                return Err(Error::new(Kind::Busy, format!("another server listens at '{}'", path.display())));
            }
            std::fs::remove_file(path).map_err(failed)?;
        }
        let listener = bind(path).map_err(failed)?;
        let inode = std::fs::symlink_metadata(path).map_err(failed)?.ino();
        Ok(Self { listener, path: path.to_owned(), inode })
    }
}

/// Does somebody listen there?
pub fn is_live(path: &Path) -> bool {
    !UnixStream::connect(path).is_err_and(|e| e.kind() == io::ErrorKind::ConnectionRefused)
}

fn bind(path: &Path) -> io::Result<UnixListener> {
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    // The name takes over the mode of the socket: at no moment can anybody else connect.
    rustix::fs::fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&socket, &SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, 16)?;
    Ok(socket.into())
}

impl Bound {
    /// Its name, if it is still ours, goes.
    pub fn remove(&self) {
        if std::fs::symlink_metadata(&self.path).is_ok_and(|found| found.ino() == self.inode) {
            // At worst it stays, and the next server replaces it.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl Drop for Bound {
    fn drop(&mut self) {
        self.remove();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_for_its_owner_alone_and_replaces_the_dead_only() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        drop(UnixListener::bind(&path).unwrap());
        let bound = Bound::at(&path).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
        assert_eq!(Bound::at(&path).unwrap_err().kind(), Kind::Busy);
        drop(bound);
        assert!(!path.exists());
        std::fs::write(&path, "precious").unwrap();
        assert_eq!(Bound::at(&path).unwrap_err().kind(), Kind::Usage);
        assert_eq!(Bound::at(&folder.path().join("x".repeat(120))).unwrap_err().kind(), Kind::Usage);
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
    }
}
