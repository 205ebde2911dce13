//! What a connection needs of its stream: a seam for tests.

use crate::nbd::stream::Stream;
use crate::nbd::tls::ServerTls;
use std::io::{self, IoSlice};
use std::time::Duration;

/// A connected byte stream; one thread may read while another writes.
pub trait Wire: Send + Sync + Sized + 'static {
    /// Reads some bytes; 0 at the end. Blocks.
    fn read(&self, buf: &mut [u8]) -> io::Result<usize>;

    /// Sends all of `bytes`. Blocks.
    fn write_all(&self, bytes: &[u8]) -> io::Result<()>;

    /// A read that waits longer than `receive`, or a write in which nothing moves for longer than `send`, fails.
    fn set_timeouts(&self, receive: Option<Duration>, send: Option<Duration>) -> io::Result<()>;

    /// Goes on in TLS.
    fn start_tls(self, tls: &ServerTls, timeout: Duration) -> io::Result<Self>;

    /// Ends whatever blocks, now and later.
    fn shutdown(&self);
}

impl Wire for Stream {
    fn read(&self, buf: &mut [u8]) -> io::Result<usize> {
        loop {
            match Self::read(self, buf) {
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                other => return other,
            }
        }
    }

    fn write_all(&self, bytes: &[u8]) -> io::Result<()> {
        self.write_all_vectored(&mut [IoSlice::new(bytes)])
    }

    fn set_timeouts(&self, receive: Option<Duration>, send: Option<Duration>) -> io::Result<()> {
        self.set_read_timeout(receive)?;
        self.set_write_timeout(send)
    }

    fn start_tls(self, tls: &ServerTls, timeout: Duration) -> io::Result<Self> {
        self.start_tls_server(tls, timeout)
    }

    fn shutdown(&self) {
        Self::shutdown(self);
    }
}
