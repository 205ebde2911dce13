//! One attached writer, as the backup sees it. Everything that comes from it is copied out first and checked then.

use super::{Hub, OnCbwError, WriterCounts, errno_of, is_timeout, lock, seconds};
use crate::error::{Error, Kind, Result};
use crate::ground::range::ByteRange;
use crate::ring::futex::{Futex, WAKER};
use crate::ring::layout::{MAX_ENTRY, SLOTS};
use crate::ring::packet::{Attach, Packet};
use crate::ring::queue::Answer;
use crate::ring::shm::Ring;
use crate::ring::socket::{self, Received};
use rustix::io::Errno;
use rustix::net::sockopt::{self, Timeout};
use std::fmt;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

/// How long a writer may take to answer on the socket, except to a freeze.
pub const ANSWER: Duration = Duration::from_secs(2);
/// How long until one that hung up is tried again.
const AGAIN: Duration = Duration::from_millis(2);
/// How long a serving thread stays awake after an entry: a writer that writes one block after another finds it so.
const AWAKE: Duration = Duration::from_micros(100);
/// How long it sleeps at most.
const ASLEEP: Duration = Duration::from_millis(500);

/// An entry that is being served. Who takes it out answers it.
#[derive(Clone, Copy)]
struct Taken {
    ticket: u64,
    range: ByteRange,
    since: Instant,
}

/// What is known of a slot on our side, where no writer can reach.
#[derive(Clone, Copy, Default)]
struct Place {
    taken: Option<Taken>,
    /// Number of entries ever taken.
    tickets: u64,
    /// An entry that nobody has taken was seen then, after so many tickets.
    seen: Option<(u64, Instant)>,
}

/// See the module.
pub struct Link {
    /// In the name of its socket.
    pub number: u64,
    pub ring: Arc<Ring>,
    pub socket: OwnedFd,
    pub pid: i32,
    places: Mutex<[Place; SLOTS]>,
    cursor: AtomicUsize,
    over: AtomicBool,
}

impl fmt::Display for Link {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "writer (pid {})", self.pid)
    }
}

/// A writer that lives and that we are not attached to.
#[derive(Debug, thiserror::Error)]
pub enum Unattached {
    #[error("another backup is attached to the writer (pid {0})")]
    Busy(i32),
    #[error("the writer (pid {0}) may have written before we could attach to it")]
    Late(i32),
    #[error("the writer (pid {0}) speaks another version of the protocol")]
    Version(i32),
    #[error("the writer (pid {0}) refused us: {1}")]
    Refused(i32, Errno),
    #[error("a writer's socket belongs to user {0}")]
    Foreign(u32),
    #[error("the writer (pid {0}) does not answer")]
    Silent(i32),
    #[error("the writer (pid {0}) hung up on us")]
    HungUp(i32),
    #[error("the writer (pid {0}) sent {1}")]
    Nonsense(i32, &'static str),
    #[error("attach to a writer: {}", crate::error::reason(.0))]
    System(#[from] io::Error),
}

impl Link {
    /// Attaches to writer `number`. `None`: it is dead.
    pub fn attach(hub: &Hub, number: u64, terms: Attach) -> Result<Option<Arc<Self>>, Unattached> {
        let since = Instant::now();
        loop {
            match Self::try_attach(hub, number, terms) {
                // It may be ending: soon nobody accepts a connection. Until then its sockets are closed in any order.
                Err(Unattached::HungUp(_)) if since.elapsed() < ANSWER => thread::sleep(AGAIN),
                other => return other,
            }
        }
    }

    fn try_attach(hub: &Hub, number: u64, terms: Attach) -> Result<Option<Arc<Self>>, Unattached> {
        let connected = match hub.folder.connect(hub.disk, number, ANSWER) {
            Err(e) if is_timeout(&e) => return Err(Unattached::Silent(0)),
            other => other?,
        };
        let Some(socket) = connected else { return Ok(None) };
        let peer = socket::peer(&socket)?;
        let (pid, user) = (peer.pid(), peer.uid());
        if !hub.folder.trusts(user) {
            return Err(Unattached::Foreign(user));
        }
        let (ring, descriptor) = Ring::create()?;
        let descriptors = [descriptor.as_fd(), hub.map_descriptor.as_fd()];
        // A writer that refused us at once, or died, has closed the connection already; what it said is still there.
        let sent = socket::send(&socket, &Packet::Attach(terms), &descriptors);
        match socket::receive(&socket) {
            Ok(Received::Packet(Packet::Attached, _)) => {}
            Ok(Received::Packet(Packet::Refused { errno }, _)) => {
                return Err(match Errno::from_raw_os_error(errno as i32) {
                    Errno::BUSY => Unattached::Busy(pid),
                    Errno::STALE => Unattached::Late(pid),
                    Errno::PROTONOSUPPORT => Unattached::Version(pid),
                    errno => Unattached::Refused(pid, errno),
                });
            }
            Ok(Received::Packet(..)) => return Err(Unattached::Nonsense(pid, "an answer to another question")),
            Ok(Received::Malformed(_)) => return Err(Unattached::Nonsense(pid, "something that is no packet")),
            Ok(Received::HungUp) => return Err(Unattached::HungUp(pid)),
            Err(e) if is_timeout(&e) => return Err(Unattached::Silent(pid)),
            Err(e) => return Err(e.into()),
        }
        sent?;
        let places = Mutex::new([Place::default(); SLOTS]);
        let (cursor, over) = (AtomicUsize::new(0), AtomicBool::new(false));
        Ok(Some(Arc::new(Self { number, ring: Arc::new(ring), socket, pid, places, cursor, over })))
    }

    /// Sends a packet. False: the writer is gone, or has not read for long.
    pub fn send(&self, packet: Packet) -> bool {
        socket::send(&self.socket, &packet, &[]).is_ok()
    }

    /// What it answers, until `deadline`. `None`: it is gone.
    pub fn answer(&self, deadline: Instant) -> Result<Option<Packet>> {
        let remaining = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
        let failed = |e: io::Error| Error::system(Kind::InstantLost, format!("hear from {self}"), e);
        sockopt::set_socket_timeout(&self.socket, Timeout::Recv, Some(remaining)).map_err(|e| failed(e.into()))?;
        match socket::receive(&self.socket) {
            Ok(Received::Packet(packet, _)) => Ok(Some(packet)),
            Ok(Received::HungUp) => Ok(None),
            Ok(Received::Malformed(what)) => Err(Error::new(Kind::InstantLost, format!("{self} sent {what}"))),
            Err(e) if is_timeout(&e) => Err(Error::new(Kind::InstantLost, format!("{self} does not answer"))),
            Err(e) => Err(failed(e)),
        }
    }

    /// Has the connection ended, for us?
    pub fn is_over(&self) -> bool {
        self.over.load(Ordering::SeqCst)
    }

    /// Nobody is to wait for us any more: hangs up, which releases every write of the writer. What is being served is
    /// not granted: it was not captured, and the writer has to mark its ring before it goes on.
    pub fn let_go(&self) {
        if !self.over.swap(true, Ordering::SeqCst) {
            self.ring.wake_servers(&WAKER);
            socket::hang_up(&self.socket);
        }
    }

    /// The orderly end: nothing that the writer does matters any more.
    pub fn detach(&self) {
        if !self.is_over() {
            self.send(Packet::Detach);
        }
    }

    /// Adds what the writer counted.
    pub fn count_into(&self, counts: &mut WriterCounts) {
        let (writes, trapped) = self.ring.counted();
        counts.writes = counts.writes.saturating_add(writes);
        counts.trapped = counts.trapped.saturating_add(trapped);
        counts.stalls.merge(&self.ring.stalls());
    }

    /// Notes an entry that was taken.
    fn take_note(&self, slot: usize, length: u64, most: u64) -> Option<Taken> {
        self.note(slot, &mut lock(&self.places)[slot], length, most)
    }

    /// Copies an entry out, then checks it: `None` if it makes no sense.
    fn note(&self, slot: usize, place: &mut Place, length: u64, most: u64) -> Option<Taken> {
        let (offset, bytes) = self.ring.entry(slot);
        let range = ByteRange::checked(offset, bytes)?;
        if range.is_empty() || range.end() > length || range.length > most {
            return None;
        }
        // Its time began when it was seen waiting, for the writer has counted from there too.
        let seen = place.seen.filter(|(tickets, _)| *tickets == place.tickets);
        place.tickets += 1;
        let taken = Taken { ticket: place.tickets, range, since: seen.map_or_else(Instant::now, |(_, since)| since) };
        // Posted again while it is being served: no writer of ours does that.
        match place.taken.replace(taken) {
            None => Some(taken),
            Some(earlier) => {
                place.taken = Some(earlier);
                None
            }
        }
    }

    /// Answers an entry unless somebody has. False: the writer does not keep to the protocol.
    fn answer_entry(&self, slot: usize, ticket: u64, answer: Answer) -> bool {
        {
            let mut places = lock(&self.places);
            // Another ticket: this one was answered when its time was up, and the slot serves another write by now.
            if places[slot].taken.is_none_or(|taken| taken.ticket != ticket) {
                return true;
            }
            places[slot].taken = None;
        }
        self.ring.answer(slot, answer, &WAKER).is_ok()
    }

    /// Entries whose time is up: those that are being served, and those that nobody has taken, which are taken now.
    fn overdue(&self, limit: Duration, length: u64, most: u64) -> Vec<(usize, Option<Taken>)> {
        let now = Instant::now();
        let posted = self.ring.posted();
        let mut overdue = Vec::new();
        for slot in 0..SLOTS {
            let place = &mut lock(&self.places)[slot];
            if let Some(taken) = place.taken.filter(|taken| now.duration_since(taken.since) >= limit) {
                overdue.push((slot, Some(taken)));
            }
            place.seen = match place.seen {
                _ if posted >> slot & 1 == 0 => None,
                Some((tickets, since)) if tickets == place.tickets => Some((tickets, since)),
                _ => Some((place.tickets, now)),
            };
        }
        for slot in 0..SLOTS {
            let place = &mut lock(&self.places)[slot];
            // The one that was seen: another thread may have served it since, and the slot be another write's.
            let seen = place.seen.filter(|(tickets, _)| *tickets == place.tickets);
            let late = seen.is_some_and(|(_, since)| now.duration_since(since) >= limit);
            if late && self.ring.take_slot(slot) {
                overdue.push((slot, self.note(slot, place, length, most)));
            }
        }
        overdue
    }
}

impl Hub {
    /// Bytes of the longest entry that a writer of ours posts.
    fn longest_entry(&self) -> u64 {
        MAX_ENTRY.max(self.options.cluster_size.bytes())
    }

    fn serve(&self, link: &Link, slot: usize) {
        let (Some(taken), Some(trap)) =
            (link.take_note(slot, self.options.length, self.longest_entry()), self.trap.get())
        else {
            return self.nonsense(link);
        };
        let captured = catch_unwind(AssertUnwindSafe(|| trap.before_write(taken.range)));
        let captured = captured.unwrap_or_else(|_| {
            Err(Error::new(Kind::InstantLost, format!("a fault in the capture at {}", taken.range)))
        });
        let answer = match captured {
            Ok(()) => Answer::Granted,
            Err(error) => self.failed(&error),
        };
        if !link.answer_entry(slot, taken.ticket, answer) {
            self.nonsense(link);
        }
    }

    /// A capture failed: who has to bear it? When it is the backup, the instant is given up before the write is granted.
    pub(super) fn failed(&self, error: &Error) -> Answer {
        match self.options.on_cbw_error {
            // There is nothing left for which a write should fail.
            _ if self.lost.get().is_some() => Answer::Granted,
            OnCbwError::BreakGuestWrite => Answer::Refused(errno_of(error)),
            OnCbwError::BreakSnapshot => {
                self.lose(error.to_string());
                Answer::Granted
            }
        }
    }

    fn nonsense(&self, link: &Link) {
        self.lose(format!("what {link} put on the ring makes no sense"));
    }

    /// Answers entries whose time is up; the threads that serve them may hang.
    pub(super) fn expire(&self, link: &Link) {
        let limit = self.options.cbw_timeout;
        for (slot, taken) in link.overdue(limit, self.options.length, self.longest_entry()) {
            let Some(taken) = taken else { return self.nonsense(link) };
            let text = format!("a capture at {} took longer than {}", taken.range, seconds(limit));
            let error = Error::system(Kind::InstantLost, text, Errno::TIMEDOUT.into());
            let answer = self.failed(&error);
            if !link.answer_entry(slot, taken.ticket, answer) {
                self.nonsense(link);
            }
        }
    }
}

/// A thread that serves one writer until it is over.
pub fn serve(hub: &Hub, link: &Link) {
    let alone = thread::available_parallelism().is_ok_and(|cpus| cpus.get() == 1);
    let awake = if alone { Duration::ZERO } else { AWAKE };
    while !link.is_over() {
        let mut patience = Futex::new(awake, ASLEEP);
        if let Some(slot) = link.ring.next(link.cursor.load(Ordering::Relaxed), &link.over, &mut patience) {
            link.cursor.store(slot + 1, Ordering::Relaxed);
            hub.serve(link, slot);
        }
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;

    pub fn late_answers_are_dropped(ring: Ring, socket: OwnedFd) {
        let link = Link {
            number: 0,
            ring: Arc::new(ring),
            socket,
            pid: 1,
            places: Mutex::new([Place::default(); SLOTS]),
            cursor: AtomicUsize::new(0),
            over: AtomicBool::new(false),
        };
        let never = AtomicBool::new(false);
        let soon = || Futex::new(Duration::ZERO, Duration::from_millis(1));
        link.ring.post(7, ByteRange::new(0, 1), &WAKER);
        assert!(link.overdue(Duration::from_secs(3600), 100, 100).is_empty(), "nobody has taken it yet");
        let seen = lock(&link.places)[7].seen.map(|(_, since)| since);
        assert_eq!(link.ring.take(0), Some(7));
        let first = link.take_note(7, 100, 100).unwrap();
        assert_eq!(Some(first.since), seen, "the writer has waited since then");
        assert!(link.answer_entry(7, first.ticket, Answer::Refused(5)), "its time was up");
        assert_eq!(link.ring.await_answer(7, &never, &mut soon()), Answer::Refused(5));
        link.ring.post(7, ByteRange::new(50, 1), &WAKER);
        assert_eq!(link.ring.take(0), Some(7));
        let second = link.take_note(7, 100, 100).unwrap();
        assert!(link.answer_entry(7, first.ticket, Answer::Granted), "the late end of the first capture");
        assert!(lock(&link.places)[7].taken.is_some(), "the second is not answered by it");
        assert!(link.answer_entry(7, second.ticket, Answer::Granted));
        assert_eq!(link.ring.await_answer(7, &never, &mut soon()), Answer::Granted);
    }
}
