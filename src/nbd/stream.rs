//! A connection: a Unix socket or TCP, in the clear or in TLS. One thread reads while another writes.

use super::tls::{ClientTls, ServerTls, Session};
use super::uri::Address;
use rustix::io::retry_on_intr;
use rustix::net::sockopt::{self, Timeout};
use rustix::net::{AddressFamily, SendAncillaryBuffer, SendFlags, SocketFlags, SocketType};
use std::io::{self, IoSlice, Read, Write};
use std::net::{Shutdown, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// The system's IOV_MAX.
const MOST_PARTS: usize = 1024;

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
            match self.socket.write_vectored(parts)? {
                0 => return Err(io::ErrorKind::WriteZero.into()),
                sent => IoSlice::advance_slices(&mut parts, sent),
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

    /// Never raises SIGPIPE: the library may live in a process that does not ignore it.
    pub(super) fn write(&self, buf: &[u8]) -> io::Result<usize> {
        Ok(retry_on_intr(|| rustix::net::send(self, buf, SendFlags::NOSIGNAL))?)
    }

    fn write_vectored(&self, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        let parts = &parts[..parts.len().min(MOST_PARTS)];
        let nothing_more = SendAncillaryBuffer::default;
        Ok(retry_on_intr(|| rustix::net::sendmsg(self, parts, &mut nothing_more(), SendFlags::NOSIGNAL))?)
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nbd::uri::TlsChoice;
    use rustls::pki_types::{CertificateDer, PrivateKeyDer};
    use rustls::{ServerConfig, ServerConnection, StreamOwned};
    use std::path::Path;
    use std::process::{Command, Stdio};
    use std::sync::Arc;
    use std::thread;

    const TIMEOUT: Duration = Duration::from_secs(10);
    /// Much more than the sockets' buffers hold: who does not read while it writes stands still.
    const BYTES: usize = 8 << 20;

    fn openssl(folder: &Path, arguments: &str) {
        let mut command = Command::new("openssl");
        command.current_dir(folder).args(arguments.split_whitespace()).stdout(Stdio::null()).stderr(Stdio::null());
        assert!(command.status().unwrap().success(), "{arguments}");
    }

    /// A folder with a server's certificate that its own authority signed, and with a client's.
    fn certificates() -> tempfile::TempDir {
        let folder = tempfile::tempdir().unwrap();
        let key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -batch";
        openssl(folder.path(), &format!("req -x509 {key} -subj /CN=authority -keyout ca-key.pem -out ca-cert.pem"));
        std::fs::write(folder.path().join("names"), "subjectAltName=DNS:localhost\nbasicConstraints=CA:FALSE\n")
            .unwrap();
        for who in ["server", "client"] {
            openssl(folder.path(), &format!("req -new {key} -subj /CN={who} -keyout {who}-key.pem -out request"));
            let signed = "-CA ca-cert.pem -CAkey ca-key.pem -CAcreateserial -extfile names";
            openssl(folder.path(), &format!("x509 -req -in request {signed} -days 2 -out {who}-cert.pem"));
        }
        folder
    }

    fn choice(certificates: &Path) -> TlsChoice {
        TlsChoice {
            certificates: Some(certificates.to_owned()),
            server_name: "localhost".to_owned(),
            verify_peer: true,
        }
    }

    /// Both ends of a connection in TLS, over a Unix socket.
    fn tls_pair(certificates: &Path, client: &ClientTls) -> (io::Result<Stream>, io::Result<Stream>) {
        let server = ServerTls::new(certificates).unwrap();
        let (one, other) = UnixStream::pair().unwrap();
        thread::scope(|scope| {
            let serving = scope.spawn(|| Stream::unix(other).start_tls_server(&server, TIMEOUT));
            let client = Stream::unix(one).start_tls_client(client, TIMEOUT);
            (client, serving.join().unwrap())
        })
    }

    fn noise(seed: u8) -> Vec<u8> {
        let mut state = u32::from(seed) + 1;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        };
        (0..BYTES).map(|_| next()).collect()
    }

    /// Writes and reads at once at both ends, in pieces of odd sizes and several parts.
    fn talk(ends: [&Stream; 2]) {
        ends.iter().for_each(|end| end.set_read_timeout(Some(TIMEOUT)).unwrap());
        ends.iter().for_each(|end| end.set_write_timeout(Some(TIMEOUT)).unwrap());
        thread::scope(|scope| {
            for (seed, end) in ends.into_iter().enumerate() {
                scope.spawn(move || {
                    for piece in noise(seed as u8).chunks(70_001) {
                        let (head, rest) = piece.split_at(piece.len().min(28));
                        end.write_all_vectored(&mut [IoSlice::new(head), IoSlice::new(rest)]).unwrap();
                    }
                });
                scope.spawn(move || {
                    let (expected, mut found) = (noise(1 - seed as u8), vec![0; BYTES]);
                    found.chunks_mut(33_333).for_each(|piece| end.read_exact(piece).unwrap());
                    assert!(found == expected, "bytes of end {seed}");
                });
            }
        });
    }

    #[test]
    fn one_thread_reads_while_another_writes() {
        let (one, other) = UnixStream::pair().unwrap();
        talk([&Stream::unix(one), &Stream::unix(other)]);
    }

    #[test]
    fn one_thread_reads_while_another_writes_in_tls() {
        let folder = certificates();
        let client = ClientTls::new(&choice(folder.path())).unwrap();
        let (client, server) = tls_pair(folder.path(), &client);
        let (client, server) = (client.unwrap(), server.unwrap());
        assert!(client.is_tls() && server.is_tls());
        talk([&client, &server]);
        // The end of one is the end of the other, also of who waits for bytes already.
        thread::scope(|scope| {
            let reading = scope.spawn(|| server.read(&mut [0; 1]).unwrap());
            client.shutdown();
            assert_eq!(reading.join().unwrap(), 0);
        });
        assert!(client.write_all(&[0; 1]).is_err());
    }

    #[test]
    fn a_server_in_tls_knows_its_clients() {
        let (folder, strangers) = (certificates(), certificates());
        let stranger = TlsChoice { verify_peer: false, ..choice(strangers.path()) };
        let (_client, server) = tls_pair(folder.path(), &ClientTls::new(&stranger).unwrap());
        let why = server.expect_err("signed by another authority").to_string();
        assert_eq!(why, "the peer's certificate is not signed by the authority of ca-cert.pem");
        std::fs::remove_file(strangers.path().join("client-cert.pem")).unwrap();
        let (_client, server) = tls_pair(folder.path(), &ClientTls::new(&stranger).unwrap());
        assert_eq!(server.expect_err("anonymous").to_string(), "the peer showed no certificate");
        // One that says nothing is not waited for, nor is one that speaks something else.
        let server = ServerTls::new(folder.path()).unwrap();
        let (silent, other) = UnixStream::pair().unwrap();
        let refused = Stream::unix(other).start_tls_server(&server, Duration::from_millis(50)).unwrap_err();
        assert_eq!((refused.kind(), refused.to_string().as_str()), (io::ErrorKind::TimedOut, "timed out"));
        drop(silent);
        let (_, other) = UnixStream::pair().unwrap();
        let refused = Stream::unix(other).start_tls_server(&server, TIMEOUT).unwrap_err();
        assert_eq!(refused.to_string(), "the peer hung up during the TLS handshake");
        let (chatty, other) = UnixStream::pair().unwrap();
        Stream::unix(chatty).write_all(b"NBDMAGIC and no TLS at all").unwrap();
        assert!(Stream::unix(other).start_tls_server(&server, TIMEOUT).unwrap_err().to_string().starts_with("TLS: "));
    }

    #[test]
    fn a_client_may_be_anonymous_where_no_authority_is_named() {
        let folder = certificates();
        assert!(ServerTls::new(folder.path()).unwrap().verifies_clients());
        std::fs::remove_file(folder.path().join("ca-cert.pem")).unwrap();
        assert!(!ServerTls::new(folder.path()).unwrap().verifies_clients());
    }

    #[test]
    fn a_file_without_a_certificate_is_named_and_never_quoted() {
        let folder = certificates();
        for (contents, why) in
            [("secret", "it holds no certificate in PEM"), ("-----BEGIN CERTIFICATE-----\n!", "it is not PEM")]
        {
            let path = folder.path().join("ca-cert.pem");
            std::fs::write(&path, contents).unwrap();
            let error = ServerTls::new(folder.path()).unwrap_err().to_string();
            assert_eq!(error, format!("'{}': {why}", path.display()));
        }
    }

    #[test]
    fn the_end_is_announced_in_tls() {
        use rustls::pki_types::pem::PemObject;
        let folder = certificates();
        let file = |name: &str| folder.path().join(name);
        let chain = CertificateDer::pem_file_iter(file("server-cert.pem")).unwrap().map(Result::unwrap).collect();
        let key = PrivateKeyDer::from_pem_file(file("server-key.pem")).unwrap();
        let builder = ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()));
        let builder = builder.with_safe_default_protocol_versions().unwrap().with_no_client_auth();
        let mut config = builder.with_single_cert(chain, key).unwrap();
        // They would be sent to a client that may have gone.
        config.send_tls13_tickets = 0;
        let server = ServerConnection::new(Arc::new(config)).unwrap();
        let client = ClientTls::new(&choice(folder.path())).unwrap();
        let (one, other) = UnixStream::pair().unwrap();
        thread::scope(|scope| {
            // Whoever asks rustls itself hears of an end without a farewell as an error.
            let serving = scope.spawn(|| StreamOwned::new(server, other).read(&mut [0]).unwrap());
            Stream::unix(one).start_tls_client(&client, TIMEOUT).unwrap().shutdown();
            assert_eq!(serving.join().unwrap(), 0);
        });
    }

    #[test]
    fn it_connects_by_a_name_and_by_a_path() {
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let one = Stream::connect(&Address::Tcp { host: "127.0.0.1".to_owned(), port }, TIMEOUT).unwrap();
        let other = Stream::tcp(listener.accept().unwrap().0).unwrap();
        talk([&one, &other]);
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("socket");
        let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
        let one = Stream::connect(&Address::Unix(path), TIMEOUT).unwrap();
        let mut other = listener.accept().unwrap().0;
        assert!(!one.is_tls());
        assert_eq!((&one).write(b"abc").unwrap(), 3);
        let mut found = [0; 3];
        other.read_exact(&mut found).unwrap();
        assert_eq!(&found, b"abc");
    }

    #[test]
    fn a_peer_that_stands_still_is_waited_for_as_long_as_was_said() {
        let (one, _other) = UnixStream::pair().unwrap();
        let stream = Stream::unix(one);
        stream.set_read_timeout(Some(Duration::ZERO)).unwrap();
        stream.set_write_timeout(Some(Duration::ZERO)).unwrap();
        assert_eq!(stream.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        assert_eq!(stream.write_all(&vec![0; BYTES]).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }

    #[test]
    fn a_write_to_who_is_gone_fails() {
        let (one, other) = UnixStream::pair().unwrap();
        drop(other);
        assert_eq!(Stream::unix(one).write_all(b"x").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn more_parts_than_one_call_takes_are_sent() {
        let (one, other) = UnixStream::pair().unwrap();
        let bytes: Vec<u8> = (0..3 * MOST_PARTS).map(|part| part as u8).collect();
        let mut parts: Vec<IoSlice<'_>> = bytes.chunks(1).map(IoSlice::new).collect();
        Stream::unix(one).write_all_vectored(&mut parts).unwrap();
        let mut found = vec![0; bytes.len()];
        Stream::unix(other).read_exact(&mut found).unwrap();
        assert_eq!(found, bytes);
    }
}
