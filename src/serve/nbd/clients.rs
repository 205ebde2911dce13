//! The clients of a server: how many there are, and their end.

use super::connection::{self, End};
use super::handshake::{self, Offer};
use super::watch::Bell;
use crate::nbd::stream::Stream;
use crate::serve::{Notice, Notify};
use rustix::net::Shutdown;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Being cut off takes no longer, unless the disk hangs.
const CUT: Duration = Duration::from_millis(200);

/// Clients that misbehave are told of once in so long.
const HUSH: Duration = Duration::from_secs(10);

/// All clients, and what they are offered.
pub struct Clients {
    offer: Offer,
    bell: Bell,
    most: usize,
    notify: Notify,
    draining: Arc<AtomicBool>,
    present: Mutex<Present>,
    left: Condvar,
    said: Mutex<Said>,
}

/// When a client was last told of, and how many were not since.
#[derive(Default)]
struct Said {
    last: Option<Instant>,
    untold: u64,
}

impl Said {
    /// `warning`, with the number of those that were left out, unless there was one less than [`HUSH`] before `now`.
    fn at(&mut self, now: Instant, warning: String) -> Option<String> {
        if self.last.is_some_and(|last| now.saturating_duration_since(last) < HUSH) {
            self.untold += 1;
            return None;
        }
        self.last = Some(now);
        match std::mem::take(&mut self.untold) {
            0 => Some(warning),
            untold => {
                Some(format!("{warning}; clients that misbehaved and were not told of since the last one: {untold}"))
            }
        }
    }
}

#[derive(Default)]
struct Present {
    places: usize,
    /// Their sockets, to be shut down.
    sockets: Vec<(u64, OwnedFd)>,
    next: u64,
    /// It was said that there are too many, and that still holds.
    told_full: bool,
}

/// One client's place; given back when dropped.
pub struct Place {
    clients: Arc<Clients>,
    number: Option<u64>,
}

impl Clients {
    /// At most `most` at once.
    pub fn new(offer: Offer, bell: Bell, most: u32, notify: Notify) -> Self {
        let draining = Arc::new(AtomicBool::new(false));
        let (present, left, said) = (Mutex::default(), Condvar::new(), Mutex::default());
        Self { offer, bell, most: most as usize, notify, draining, present, left, said }
    }

    /// Clients must use TLS.
    pub fn is_encrypted(&self) -> bool {
        self.offer.tls.is_some()
    }

    /// Tells whoever started the server.
    pub fn notify(&self, notice: Notice) {
        (self.notify)(notice);
    }

    /// Warns of a client, unless there was a warning just now.
    fn warn(&self, warning: String) {
        let warning = self.said.lock().unwrap_or_else(PoisonError::into_inner).at(Instant::now(), warning);
        if let Some(warning) = warning {
            self.notify(Notice::Warning(warning));
        }
    }

    fn lock(&self) -> MutexGuard<'_, Present> {
        self.present.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// New requests are refused, those in flight end, and the connections; what lasts beyond `deadline` is cut off.
    /// True: nothing was.
    pub fn drain(&self, deadline: Instant) -> bool {
        self.draining.store(true, Ordering::SeqCst);
        // Who waits for a request sees the end; what was received before is answered.
        self.shut(Shutdown::Read);
        if self.wait(deadline) {
            return true;
        }
        self.shut(Shutdown::Both);
        self.wait(Instant::now() + CUT);
        false
    }

    fn shut(&self, how: Shutdown) {
        for (_, socket) in &self.lock().sockets {
            // It fails when the client has hung up.
            let _ = rustix::net::shutdown(socket, how);
        }
    }

    /// True: everybody has left.
    fn wait(&self, deadline: Instant) -> bool {
        let mut present = self.lock();
        while present.places > 0 {
            let rest = deadline.saturating_duration_since(Instant::now());
            if rest.is_zero() {
                return false;
            }
            present = self.left.wait_timeout(present, rest).unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }
}

impl Place {
    /// `None`: there are too many, or the server is going down.
    pub fn take(clients: &Arc<Clients>) -> Option<Self> {
        let mut present = clients.lock();
        if present.places >= clients.most {
            let first = !std::mem::replace(&mut present.told_full, true);
            drop(present);
            if first {
                let most = clients.most;
                clients
                    .warn(format!("an NBD client was turned away: {most} are connected already (--max-connections)"));
            }
            return None;
        }
        present.places += 1;
        Some(Self { clients: clients.clone(), number: None })
    }

    /// Its socket can be shut down from now on.
    pub fn hold(mut self, stream: &Stream) -> io::Result<Self> {
        let socket = stream.as_fd().try_clone_to_owned()?;
        let mut present = self.clients.lock();
        let number = present.next;
        present.next += 1;
        present.sockets.push((number, socket));
        drop(present);
        self.number = Some(number);
        // The server may have begun to go down before the socket was known.
        if self.clients.draining.load(Ordering::SeqCst) {
            Err(io::ErrorKind::ConnectionAborted.into())
        } else {
            Ok(self)
        }
    }

    /// Serves the client to its end.
    pub fn serve(&self, stream: Stream) -> End {
        let clients = &self.clients;
        match handshake::negotiate(stream, &clients.offer) {
            Ok((stream, session)) => connection::serve(stream, session, clients.draining.clone(), clients.bell.clone()),
            Err(end) => end,
        }
    }

    /// Says why, where that is of interest.
    pub fn leave(self, end: End) {
        if let End::Broken(error) = end {
            // Whoever hangs up in the middle, as a killed client does, has no secret to tell.
            let hung_up = matches!(
                error.kind(),
                io::ErrorKind::UnexpectedEof | io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
            );
            if !hung_up {
                let why = crate::error::reason(&error);
                self.clients.warn(format!("an NBD client was hung up on: {why}"));
            }
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut present = self.clients.lock();
        present.places -= 1;
        present.told_full = false;
        let number = self.number;
        present.sockets.retain(|(other, _)| Some(*other) != number);
        drop(present);
        self.clients.left.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_clients_that_misbehave_make_one_warning_and_then_a_count() {
        let (mut said, begin) = (Said::default(), Instant::now());
        let mut after = |seconds| said.at(begin + Duration::from_secs(seconds), "bad".into());
        assert_eq!(after(0).as_deref(), Some("bad"));
        assert!((0..10).all(|second| after(second).is_none()));
        let later = after(10).unwrap();
        assert!(later.starts_with("bad; ") && later.ends_with(": 10"), "{later}");
        assert_eq!(after(20).as_deref(), Some("bad"));
    }
}
