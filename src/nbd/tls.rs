//! TLS by rustls, with certificates in a folder of QEMU's layout.
//!
//! | file | holds |
//! |---|---|
//! | `ca-cert.pem` | whose signature the other side's certificate must have |
//! | `client-cert.pem`, `client-key.pem` | who a client is, where a server asks |
//! | `server-cert.pem`, `server-key.pem` | who a server is |

use super::stream::{Socket, Until, timed_out};
use super::uri::TlsChoice;
use rustix::net::sockopt::Timeout;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, ring};
use rustls::pki_types::pem::{self, PemObject};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::WebPkiClientVerifier;
use rustls::{
    AlertDescription, CertificateError, ClientConfig, ClientConnection, Connection, DigitallySignedStruct,
    RootCertStore, ServerConfig, ServerConnection, SignatureScheme,
};
use std::io::{self, IoSlice, Read, Write};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};
use std::time::{Duration, Instant};

/// Ciphertext that is read at once.
const READ_SIZE: usize = 64 << 10;
/// Bytes of one certificate or key file at most.
const PEM_LIMIT: u64 = 1 << 20;

/// What a client needs to connect.
#[derive(Clone, Debug)]
pub struct ClientTls {
    config: Arc<ClientConfig>,
    server_name: ServerName<'static>,
}

/// What a server needs to accept.
#[derive(Clone, Debug)]
pub struct ServerTls {
    config: Arc<ServerConfig>,
    verifies_clients: bool,
}

impl ClientTls {
    /// As `choice` says. A client certificate is shown when the folder has one. Errors name the file.
    pub fn new(choice: &TlsChoice) -> io::Result<Self> {
        let provider = Arc::new(ring::default_provider());
        let builder = ClientConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(io::Error::other)?
            .dangerous();
        let folder = choice.certificates.as_deref();
        let verifier: Arc<dyn ServerCertVerifier> = match folder.filter(|_| choice.verify_peer) {
            Some(folder) => WebPkiServerVerifier::builder_with_provider(Arc::new(authority(folder)?), provider)
                .build()
                .map_err(io::Error::other)?,
            None => Arc::new(AnyServer(provider)),
        };
        let builder = builder.with_custom_certificate_verifier(verifier);
        let config = match folder.filter(|folder| folder.join("client-cert.pem").exists()) {
            Some(folder) => {
                let (chain, key) = identity(folder, "client")?;
                builder.with_client_auth_cert(chain, key).map_err(|e| unusable(folder, "client", &e))?
            }
            None => builder.with_no_client_auth(),
        };
        let server_name = ServerName::try_from(choice.server_name.clone())
            .map_err(|_| invalid(format!("'{}' is no name that a certificate can have", choice.server_name)))?;
        Ok(Self { config: Arc::new(config), server_name })
    }

    pub(super) fn start(&self, socket: &Socket, timeout: Duration) -> io::Result<Session> {
        let connection = ClientConnection::new(self.config.clone(), self.server_name.clone()).map_err(explained)?;
        Session::begin(connection.into(), socket, timeout)
    }
}

impl ServerTls {
    /// With the server's certificate in `folder`. Clients must show one that `ca-cert.pem` signed, if that is there.
    pub fn new(folder: &Path) -> io::Result<Self> {
        let provider = Arc::new(ring::default_provider());
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(io::Error::other)?;
        let verifies_clients = folder.join("ca-cert.pem").exists();
        let builder = if verifies_clients {
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(authority(folder)?), provider).build();
            builder.with_client_cert_verifier(verifier.map_err(io::Error::other)?)
        } else {
            builder.with_no_client_auth()
        };
        let (chain, key) = identity(folder, "server")?;
        let config = builder.with_single_cert(chain, key).map_err(|e| unusable(folder, "server", &e))?;
        Ok(Self { config: Arc::new(config), verifies_clients })
    }

    /// Whether a client needs a certificate.
    pub fn verifies_clients(&self) -> bool {
        self.verifies_clients
    }

    pub(super) fn start(&self, socket: &Socket, timeout: Duration) -> io::Result<Session> {
        let connection = ServerConnection::new(self.config.clone()).map_err(explained)?;
        Session::begin(connection.into(), socket, timeout)
    }
}

/// An encrypted connection. The state of both directions is one, behind a lock that is never held across a system
/// call: bytes go between it and the socket through each side's own buffer.
pub(super) struct Session {
    connection: Mutex<Connection>,
    reading: Mutex<Incoming>,
    /// Ciphertext on its way out; who holds it sends, so that records stay in order.
    writing: Mutex<Vec<u8>>,
}

/// Ciphertext that was read and not yet decrypted: `bytes[start..end]`.
struct Incoming {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl std::fmt::Debug for Session {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Session")
    }
}

impl Session {
    fn begin(mut connection: Connection, socket: &Socket, timeout: Duration) -> io::Result<Self> {
        let mut until = Until { socket, deadline: Instant::now() + timeout };
        while connection.is_handshaking() {
            connection.complete_io(&mut until).map_err(|error| {
                match error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>()) {
                    Some(why) => explained(why.clone()),
                    None if error.kind() == io::ErrorKind::UnexpectedEof => {
                        io::Error::new(error.kind(), "the peer hung up during the TLS handshake")
                    }
                    None => error,
                }
            })?;
        }
        while connection.wants_write() {
            connection.write_tls(&mut until)?;
        }
        socket.set_timeout(Timeout::Recv, None)?;
        socket.set_timeout(Timeout::Send, None)?;
        Ok(Self {
            connection: Mutex::new(connection),
            reading: Mutex::new(Incoming { bytes: vec![0; READ_SIZE], start: 0, end: 0 }),
            writing: Mutex::default(),
        })
    }

    pub(super) fn read(&self, socket: &Socket, buf: &mut [u8]) -> io::Result<usize> {
        let mut incoming = self.reading.lock().expect("nothing panics under this lock");
        loop {
            if let Some(length) = self.decrypt(socket, &mut incoming, buf)? {
                return Ok(length);
            }
            (incoming.start, incoming.end) = (0, 0);
            incoming.end = socket.read(&mut incoming.bytes)?;
            if incoming.end == 0 {
                return Ok(0);
            }
        }
    }

    /// Bytes of plaintext; `None`: more ciphertext is needed.
    fn decrypt(&self, socket: &Socket, incoming: &mut Incoming, buf: &mut [u8]) -> io::Result<Option<usize>> {
        let mut connection = self.lock();
        loop {
            // An error means that nothing is decrypted: it is never told of an end without a farewell, which is one all the
            // same, and NBD says itself whether it was expected.
            if let Ok(length) = connection.reader().read(buf) {
                return Ok(Some(length));
            }
            if incoming.start == incoming.end {
                return Ok(None);
            }
            let mut ciphertext = &incoming.bytes[incoming.start..incoming.end];
            let taken = connection.read_tls(&mut ciphertext)?;
            incoming.start += taken;
            let processed = connection.process_new_packets();
            if connection.wants_write() {
                // An answer of the protocol itself. Who is writing now takes it along.
                drop(connection);
                self.send_pending(socket);
                connection = self.lock();
            }
            processed.map_err(explained)?;
        }
    }

    pub(super) fn write_all(&self, socket: &Socket, parts: &[IoSlice<'_>]) -> io::Result<()> {
        let mut ciphertext = self.writing.lock().expect("nothing panics under this lock");
        for part in parts {
            let mut rest: &[u8] = part;
            while !rest.is_empty() {
                let mut connection = self.lock();
                let taken = connection.writer().write(rest)?;
                rest = &rest[taken..];
                take_out(&mut connection, &mut ciphertext)?;
                drop(connection);
                // Small parts go with what follows them.
                if ciphertext.len() >= READ_SIZE {
                    send(socket, &mut ciphertext)?;
                }
            }
        }
        send(socket, &mut ciphertext)
    }

    pub(super) fn say_goodbye(&self, socket: &Socket) {
        self.lock().send_close_notify();
        // A peer that does not read must not hold up the end.
        let _ = socket.set_timeout(Timeout::Send, Some(Duration::from_millis(1)));
        self.send_pending(socket);
    }

    fn send_pending(&self, socket: &Socket) {
        let mut ciphertext = match self.writing.try_lock() {
            Ok(ciphertext) => ciphertext,
            Err(TryLockError::WouldBlock) => return,
            Err(TryLockError::Poisoned(_)) => unreachable!("nothing panics under this lock"),
        };
        // A connection that broke tells its readers and writers.
        if take_out(&mut self.lock(), &mut ciphertext).is_ok() {
            let _ = send(socket, &mut ciphertext);
        }
    }

    fn lock(&self) -> MutexGuard<'_, Connection> {
        self.connection.lock().expect("nothing panics under this lock")
    }
}

fn take_out(connection: &mut Connection, ciphertext: &mut Vec<u8>) -> io::Result<()> {
    while connection.wants_write() {
        connection.write_tls(ciphertext)?;
    }
    Ok(())
}

fn send(socket: &Socket, ciphertext: &mut Vec<u8>) -> io::Result<()> {
    let mut sent = 0;
    while sent < ciphertext.len() {
        match socket.write(&ciphertext[sent..]).map_err(timed_out)? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            length => sent += length,
        }
    }
    ciphertext.clear();
    Ok(())
}

/// Lets every server through, as `tls-verify-peer=false` asks; its signatures must still be its certificate's.
#[derive(Debug)]
struct AnyServer(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyServer {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

fn authority(folder: &Path) -> io::Result<RootCertStore> {
    let path = folder.join("ca-cert.pem");
    let mut roots = RootCertStore::empty();
    for certificate in certificates(&path)? {
        roots.add(certificate).map_err(|e| invalid(format!("'{}': {e}", path.display())))?;
    }
    Ok(roots)
}

fn identity(folder: &Path, who: &str) -> io::Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>)> {
    let chain = certificates(&folder.join(format!("{who}-cert.pem")))?;
    let path = folder.join(format!("{who}-key.pem"));
    let key = PrivateKeyDer::from_pem_slice(&contents(&path)?).map_err(|e| pem_error(&path, "private key", e))?;
    Ok((chain, key))
}

fn certificates(path: &Path) -> io::Result<Vec<CertificateDer<'static>>> {
    let contents = contents(path)?;
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&contents).collect();
    match found {
        Ok(found) if found.is_empty() => Err(pem_error(path, "certificate", pem::Error::NoItemsFound)),
        Ok(found) => Ok(found),
        Err(error) => Err(pem_error(path, "certificate", error)),
    }
}

fn contents(path: &Path) -> io::Result<Vec<u8>> {
    let named = |e: io::Error| io::Error::new(e.kind(), format!("'{}': {}", path.display(), crate::error::reason(&e)));
    let mut contents = Vec::new();
    std::fs::File::open(path).map_err(named)?.take(PEM_LIMIT).read_to_end(&mut contents).map_err(named)?;
    Ok(contents)
}

/// Never with the text that is wrong: it may be a key's.
fn pem_error(path: &Path, what: &str, error: pem::Error) -> io::Error {
    let why = match error {
        pem::Error::NoItemsFound => format!("it holds no {what} in PEM"),
        _ => "it is not PEM".to_owned(),
    };
    invalid(format!("'{}': {why}", path.display()))
}

fn unusable(folder: &Path, who: &str, error: &rustls::Error) -> io::Error {
    let path = folder.join(format!("{who}-cert.pem"));
    let why = match error {
        rustls::Error::InconsistentKeys(_) => format!("{who}-key.pem is another certificate's key"),
        other => other.to_string(),
    };
    invalid(format!("'{}': {why}", path.display()))
}

fn invalid(why: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

/// What a TLS error means for the one who reads it.
fn explained(error: rustls::Error) -> io::Error {
    let why = match &error {
        rustls::Error::InvalidCertificate(wrong) => certificate_fault(wrong),
        rustls::Error::NoCertificatesPresented => "the peer showed no certificate".to_owned(),
        rustls::Error::AlertReceived(alert) => match alert {
            AlertDescription::CertificateRequired => "the peer asks for a certificate".to_owned(),
            AlertDescription::CertificateExpired => "the peer refused our certificate: it has expired".to_owned(),
            AlertDescription::UnknownCA => "the peer refused our certificate: unknown authority".to_owned(),
            AlertDescription::BadCertificate
            | AlertDescription::UnsupportedCertificate
            | AlertDescription::CertificateUnknown
            | AlertDescription::CertificateRevoked => "the peer refused our certificate".to_owned(),
            other => format!("TLS: the peer ended it with {other:?}"),
        },
        other => format!("TLS: {other}"),
    };
    io::Error::new(io::ErrorKind::PermissionDenied, why)
}

fn certificate_fault(wrong: &CertificateError) -> String {
    match wrong {
        CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
            "the peer's certificate has expired".to_owned()
        }
        CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
            "the peer's certificate is not valid yet".to_owned()
        }
        CertificateError::UnknownIssuer | CertificateError::BadSignature => {
            "the peer's certificate is not signed by the authority of ca-cert.pem".to_owned()
        }
        CertificateError::NotValidForName => "the peer's certificate is for another name".to_owned(),
        CertificateError::NotValidForNameContext { expected, presented } => {
            let presented = if presented.is_empty() { "no name".to_owned() } else { presented.join(", ") };
            format!("the peer's certificate is not for '{}' but for {presented}", expected.to_str())
        }
        other => format!("the peer's certificate: {other}"),
    }
}
