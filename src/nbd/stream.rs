//! A connection: a Unix socket or TCP, in the clear or in TLS. One thread reads while another writes.

use super::tls::{ClientTls, ServerTls, Session};
use super::uri::Address;
use rustix::net::sockopt::{self, Timeout};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// A connected byte stream. All calls take `&self` and may block; a call of [`Stream::shutdown`] from any thread ends
/// them. Two threads that read, or two that write, at once get in each other's way: callers keep to one of each.
#[derive(Debug)]
pub struct Stream {
    socket: Socket,
    tls: Option<Box<Session>>,
}

/// What the bytes go through, encrypted or not.
#[derive(Debug)]
pub(super) enum Socket {
    Unix(UnixStream),
    Tcp(TcpStream),
}

impl Stream {
    /// In the clear over a connected Unix socket.
    pub fn unix(socket: UnixStream) -> Self {
        Self { socket: Socket::Unix(socket), tls: None }
    }

    /// In the clear over TCP; small writes are sent at once.
    pub fn tcp(socket: TcpStream) -> io::Result<Self> {
        socket.set_nodelay(true)?;
        Ok(Self { socket: Socket::Tcp(socket), tls: None })
    }

    /// Connects within `timeout`; looking up a name takes as long as the system's resolver allows.
    pub fn connect(address: &Address, timeout: Duration) -> io::Result<Self> {
        match address {
            Address::Unix(path) => {
                let socket =
                    rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
                // It bounds connect too, which waits while the listener's queue is full.
                sockopt::set_socket_timeout(&socket, Timeout::Send, Some(timeout))?;
                rustix::net::connect(&socket, &rustix::net::SocketAddrUnix::new(path)?)?;
                sockopt::set_socket_timeout(&socket, Timeout::Send, None)?;
                Ok(Self::unix(socket.into()))
            }
            Address::Tcp { host, port } => Self::tcp(connect_tcp(host, *port, timeout)?),
        }
    }

    /// Goes on in TLS as a client, within `timeout`. The error says what is wrong with whose certificate.
    pub fn start_tls_client(self, tls: &ClientTls, timeout: Duration) -> io::Result<Self> {
        let session = tls.start(&self.socket, timeout)?;
        Ok(Self { tls: Some(Box::new(session)), ..self })
    }

    /// Goes on in TLS as a server, within `timeout`.
    pub fn start_tls_server(self, tls: &ServerTls, timeout: Duration) -> io::Result<Self> {
        let session = tls.start(&self.socket, timeout)?;
        Ok(Self { tls: Some(Box::new(session)), ..self })
    }

    /// Whether it is encrypted.
    pub fn is_tls(&self) -> bool {
        self.tls.is_some()
    }

    /// Reads some bytes; 0 only at the end, or when `buf` is empty.
    pub fn read(&self, buf: &mut [u8]) -> io::Result<usize> {
        match &self.tls {
            Some(session) => session.read(&self.socket, buf),
            None => self.socket.read(buf),
        }
    }

    /// Fills `buf`; `UnexpectedEof` when the peer hung up before.
    pub fn read_exact(&self, buf: &mut [u8]) -> io::Result<()> {
        Read::read_exact(&mut &*self, buf)
    }

    /// Sends all of `buf`.
    pub fn write_all(&self, buf: &[u8]) -> io::Result<()> {
        self.write_all_vectored(&mut [IoSlice::new(buf)])
    }

    /// Sends all of `parts`, one after the other, in as few system calls as possible.
    pub fn write_all_vectored(&self, parts: &mut [IoSlice<'_>]) -> io::Result<()> {
        if let Some(session) = &self.tls {
            return session.write_all(&self.socket, parts);
        }
        let mut parts = parts;
        // Empty parts in front count as sent.
        IoSlice::advance_slices(&mut parts, 0);
        while !parts.is_empty() {
            match self.socket.write_vectored(parts) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(sent) => IoSlice::advance_slices(&mut parts, sent),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// A read that waits longer fails with `WouldBlock` or `TimedOut`; `None` waits for ever.
    pub fn set_read_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.socket.set_timeout(Timeout::Recv, timeout)
    }

    /// A write that waits longer fails with `WouldBlock` or `TimedOut`; what it sent before is unknown.
    pub fn set_write_timeout(&self, timeout: Option<Duration>) -> io::Result<()> {
        self.socket.set_timeout(Timeout::Send, timeout)
    }

    /// Ends the connection both ways: readers see the end, writers an error. With TLS the peer is told first, if that
    /// takes no waiting.
    pub fn shutdown(&self) {
        if let Some(session) = &self.tls {
            session.say_goodbye(&self.socket);
        }
        // It fails when the peer has hung up already.
        let _ = match &self.socket {
            Socket::Unix(socket) => socket.shutdown(Shutdown::Both),
            Socket::Tcp(socket) => socket.shutdown(Shutdown::Both),
        };
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

impl Read for &Stream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        Stream::read(self, buf)
    }
}

impl Write for &Stream {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        Stream::write_all(self, buf)?;
        Ok(buf.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Socket {
    pub(super) fn read(&self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Unix(socket) => (&*socket).read(buf),
            Self::Tcp(socket) => (&*socket).read(buf),
        }
    }

    pub(super) fn write(&self, buf: &[u8]) -> io::Result<usize> {
        match self {
            Self::Unix(socket) => (&*socket).write(buf),
            Self::Tcp(socket) => (&*socket).write(buf),
        }
    }

    fn write_vectored(&self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        match self {
            Self::Unix(socket) => (&*socket).write_vectored(parts),
            Self::Tcp(socket) => (&*socket).write_vectored(parts),
        }
    }

    pub(super) fn set_timeout(&self, which: Timeout, timeout: Option<Duration>) -> io::Result<()> {
        // Zero would mean for ever.
        let timeout = timeout.map(|timeout| timeout.max(Duration::from_millis(1)));
        Ok(sockopt::set_socket_timeout(self, which, timeout)?)
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Unix(socket) => socket.as_fd(),
            Self::Tcp(socket) => socket.as_fd(),
        }
    }
}

/// A socket whose reads and writes all end at one time: for handshakes, which are several of each.
pub(super) struct Until<'a> {
    pub socket: &'a Socket,
    pub deadline: Instant,
}

impl Until<'_> {
    fn limit(&self, which: Timeout) -> io::Result<()> {
        let rest = self.deadline.saturating_duration_since(Instant::now());
        if rest.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.socket.set_timeout(which, Some(rest))
    }
}

impl Read for Until<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        self.limit(Timeout::Recv)?;
        self.socket.read(buf).map_err(timed_out)
    }
}

impl Write for Until<'_> {
    fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
        self.limit(Timeout::Send)?;
        self.socket.write(buf).map_err(timed_out)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A socket's time-out comes as EAGAIN.
pub(super) fn timed_out(error: io::Error) -> io::Error {
    if error.kind() == io::ErrorKind::WouldBlock { io::ErrorKind::TimedOut.into() } else { error }
}

fn connect_tcp(host: &str, port: u16, timeout: Duration) -> io::Result<TcpStream> {
    let deadline = Instant::now() + timeout;
    let mut last = io::Error::new(io::ErrorKind::NotFound, format!("'{host}' has no address"));
    for address in (host, port).to_socket_addrs()? {
        let rest = deadline.saturating_duration_since(Instant::now());
        if rest.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        match TcpStream::connect_timeout(&address, rest) {
            Ok(socket) => return Ok(socket),
            Err(error) => last = error,
        }
    }
    Err(last)
}
