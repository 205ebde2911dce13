//! Where an NBD server listens: `unix:PATH`, `HOST:PORT`, or `:PORT` for the loopback alone.

use crate::error::{Error, Kind, Result};
use crate::nbd::stream::Stream;
use crate::unix_socket::Bound;
use percent_encoding::{AsciiSet, CONTROLS, utf8_percent_encode};
use rustix::net::sockopt;
use std::io;
use std::net::{Ipv4Addr, TcpListener};
use std::os::fd::{AsFd, BorrowedFd};

/// Bytes that do not stand for themselves in a URI's query.
const ESCAPED: &AsciiSet = &CONTROLS.add(b' ').add(b'"').add(b'#').add(b'%').add(b'&').add(b'+').add(b'?').add(b'<');

/// A socket that listens.
#[derive(Debug)]
pub enum Listener {
    /// Its name is removed when this is dropped.
    Unix(Bound),
    /// TCP.
    Tcp(TcpListener),
}

impl Listener {
    /// Listens at `address`. [`Kind::Usage`] when it makes no sense or is not ours, [`Kind::Busy`] when it is taken.
    pub fn at(address: &str) -> Result<Self> {
        if let Some(path) = address.strip_prefix("unix:") {
            if path.is_empty() {
                return Err(Error::new(Kind::Usage, format!("--nbd '{address}': the path is empty")));
            }
            return Bound::at(path.as_ref()).map(Self::Unix);
        }
        let failed = |e: io::Error| {
            let kind = if e.kind() == io::ErrorKind::AddrInUse { Kind::Busy } else { Kind::Usage };
            Error::system(kind, format!("listen at '{address}'"), e)
        };
        let port = |port: &str| port.parse::<u16>().map_err(|_| not_an_address(address));
        let (host, number) = address.rsplit_once(':').ok_or_else(|| not_an_address(address))?;
        let number = port(number)?;
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        let listener = match bare {
            "" => TcpListener::bind((Ipv4Addr::LOCALHOST, number)),
            host => TcpListener::bind((host, number)),
        };
        listener.map(Self::Tcp).map_err(failed)
    }

    /// A URI that its clients understand.
    pub fn uri(&self, encrypted: bool) -> String {
        let s = if encrypted { "s" } else { "" };
        match self {
            Self::Unix(bound) => {
                let path = std::path::absolute(bound.path()).unwrap_or_else(|_| bound.path().to_owned());
                format!("nbd{s}+unix:///?socket={}", utf8_percent_encode(&path.to_string_lossy(), ESCAPED))
            }
            Self::Tcp(listener) => match listener.local_addr() {
                Ok(address) => format!("nbd{s}://{address}"),
                Err(_) => format!("nbd{s}://"),
            },
        }
    }

    /// The next client. Blocks unless the socket does not.
    pub fn accept(&self) -> io::Result<Stream> {
        match self {
            Self::Unix(bound) => {
                let (socket, _) = bound.listener().accept()?;
                socket.set_nonblocking(false)?;
                Ok(Stream::unix(socket))
            }
            Self::Tcp(listener) => {
                let (socket, _) = listener.accept()?;
                socket.set_nonblocking(false)?;
                // A client whose machine is gone is noticed, some time.
                sockopt::set_socket_keepalive(&socket, true)?;
                Stream::tcp(socket)
            }
        }
    }

    /// [`Listener::accept`] blocks no more.
    pub fn set_nonblocking(&self) -> io::Result<()> {
        match self {
            Self::Unix(bound) => bound.listener().set_nonblocking(true),
            Self::Tcp(listener) => listener.set_nonblocking(true),
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(bound) => bound.listener().as_fd(),
            Self::Tcp(listener) => listener.as_fd(),
        }
    }
}

fn not_an_address(address: &str) -> Error {
    Error::new(Kind::Usage, format!("--nbd '{address}' is none of unix:PATH, HOST:PORT and :PORT"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn without_a_host_only_the_loopback_is_served() {
        let Listener::Tcp(listener) = Listener::at(":0").unwrap() else { panic!() };
        assert!(listener.local_addr().unwrap().ip().is_loopback());
        let port = listener.local_addr().unwrap().port();
        assert_eq!(Listener::Tcp(listener).uri(true), format!("nbds://127.0.0.1:{port}"));
    }

    #[test]
    fn nonsense_is_refused_and_a_taken_port_is_busy() {
        for address in ["", "unix:", "localhost", ":", "localhost:port", "localhost:70000", "/run/socket"] {
            assert_eq!(Listener::at(address).unwrap_err().kind(), Kind::Usage, "{address}");
        }
        let Listener::Tcp(taken) = Listener::at("127.0.0.1:0").unwrap() else { panic!() };
        let again = Listener::at(&taken.local_addr().unwrap().to_string()).unwrap_err();
        assert_eq!(again.kind(), Kind::Busy);
    }

    #[test]
    fn a_unix_socket_is_for_its_owner_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a b%");
        let listener = Listener::at(&format!("unix:{}", path.display())).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert!(listener.uri(false).ends_with("/a%20b%25"), "{}", listener.uri(false));
        drop(listener);
        assert!(!path.exists());
    }
}
