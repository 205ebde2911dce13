//! The writer's own thread: it listens for a backup and does what the backup asks for. It never touches the disk.
//!
//! | phase | packet or event | what happens | phase |
//! |---|---|---|---|
//! | none | a connection | | pending |
//! | pending | Attach | the session is there; answers Attached | idle, or trapping when the instant has passed |
//! | idle | Freeze | | admitting |
//! | admitting | no write waits for the end of an earlier freeze | the gate freezes | draining |
//! | draining | nothing is in flight | the quiesce callback starts | quiescing |
//! | quiescing | it succeeded, and nothing is in flight | answers Frozen | frozen |
//! | quiescing | it failed | answers Refused; opens the gate | none |
//! | frozen | Thaw with trap | the gate traps; answers Thawed | trapping |
//! | idle to frozen | Thaw without trap | the gate opens; answers Thawed | none |
//! | any | Detach | the gate opens | none |
//! | any | hang-up, anything else | marks the ring; the gate opens | none |
//! | draining to frozen | the time agreed for a freeze is over | marks the ring; the gate opens | none |

use super::session::Session;
use super::{QUIESCING, Shared, lock};
use crate::hold::{self, Place};
use crate::ring::folder::Folder;
use crate::ring::layout::Breach;
use crate::ring::meeting;
use crate::ring::packet::{Attach, Malformed, Packet};
use crate::ring::shm::{Bits, Ring};
use crate::ring::socket::{self, Received};
use nix::sys::signal::SigSet;
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::Errno;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// How long a connection may take to say what it wants.
const PENDING: Duration = Duration::from_secs(2);
/// After a connection could not be accepted, which stays there as long as the program may open nothing more. A thread that
/// tried all the time would take a processor from the writer.
const BREATHER: Duration = Duration::from_millis(10);

/// What the callback's thread leaves behind.
type Outcome = Arc<Mutex<Option<io::Result<()>>>>;

enum Phase {
    Idle,
    /// Whom an earlier freeze has held comes in first.
    Admitting,
    Draining,
    Quiescing(Outcome),
    /// The callback has succeeded; its own writes may still be in flight.
    Settling,
    Frozen,
    Trapping,
}

enum Link {
    None,
    Pending(OwnedFd, Instant),
    Attached(Arc<Session>, Phase),
}

struct Service {
    shared: Arc<Shared>,
    listener: OwnedFd,
    folder: Arc<Folder>,
    link: Link,
    /// Until then nobody is accepted.
    closed_until: Option<Instant>,
    /// The signals that are blocked in the program's thread which has started this one.
    programs_mask: SigSet,
}

/// What a packet or an event leads to, for the one who is attached.
enum Step {
    Stay,
    Phase(Phase),
    /// The connection is over: with a mark, or without since nothing was promised any more.
    End(Option<Breach>),
}

/// Starts the thread. It ends after [`Shared::stop`] is set and the bell rings.
pub fn start(shared: Arc<Shared>, listener: OwnedFd, folder: Arc<Folder>) -> io::Result<JoinHandle<()>> {
    let programs_mask = SigSet::thread_get_mask()?;
    let mut service = Service { shared, listener, folder, link: Link::None, closed_until: None, programs_mask };
    thread::Builder::new().name("drive-backup".into()).spawn(move || {
        // The program's signals are for the program's threads.
        let _ = SigSet::all().thread_block();
        while !service.shared.stop.load(Ordering::SeqCst) {
            service.turn();
        }
        service.end(None);
    })
}

impl Drop for Service {
    fn drop(&mut self) {
        // After an orderly end there is no link left.
        self.end(Some(Breach::Fault));
    }
}

/// Who does not read it finds the connection closed. False: it could not be sent.
fn refuse(socket: impl AsFd, errno: Errno) -> bool {
    socket::send(socket, &Packet::Refused { errno: errno.raw_os_error() as u32 }, &[]).is_ok()
}

/// Refuses a freeze. A backup that does not hear it takes a writer that hung up for dead, unless the mark says otherwise.
fn refuse_freeze(session: &Session, errno: Errno) -> Step {
    let heard = refuse(&session.socket, errno);
    Step::End((!heard).then_some(Breach::Fault))
}

impl Service {
    /// Waits for one thing to happen and does what follows from it.
    fn turn(&mut self) {
        let none = PollFlags::empty();
        let (connection, deadline): (Option<BorrowedFd<'_>>, _) = match &self.link {
            Link::None => (None, None),
            Link::Pending(socket, until) => (Some(socket.as_fd()), Some(*until)),
            Link::Attached(session, _) => (Some(session.socket.as_fd()), self.shared.control().frozen_until),
        };
        self.closed_until.take_if(|until| Instant::now() >= *until);
        let awaited = if self.closed_until.is_some() { none } else { PollFlags::IN };
        let mut fds = vec![PollFd::new(&self.shared.bell, PollFlags::IN), PollFd::new(&self.listener, awaited)];
        fds.extend(connection.iter().map(|fd| PollFd::new(fd, PollFlags::IN)));
        let timeout = deadline.into_iter().chain(self.closed_until).min().map(|until| {
            let remaining = until.saturating_duration_since(Instant::now());
            // A nanosecond later, so that it has passed.
            Timespec { tv_sec: remaining.as_secs() as i64, tv_nsec: i64::from(remaining.subsec_nanos()) }
        });
        // EINTR can't be, since signals are blocked; of memory or files there may be enough in the next turn.
        if rustix::event::poll(&mut fds, timeout.as_ref()).is_err() {
            thread::sleep(BREATHER);
        }
        let [bell, connecting] = [0, 1].map(|at| fds[at].revents() != none);
        let readable = fds.get(2).is_some_and(|fd| fd.revents() != none);
        drop(fds);
        if bell {
            let _ = rustix::io::read(&self.shared.bell, &mut [0; 8]);
        }
        if readable {
            self.receive();
        }
        if deadline.is_some_and(|until| Instant::now() >= until) {
            self.time_is_up();
        }
        self.progress();
        if connecting {
            self.accept();
        }
    }

    fn accept(&mut self) {
        let Ok(socket) = socket::accept(&self.listener) else {
            self.closed_until = Some(Instant::now() + BREATHER);
            return;
        };
        let is_trusted = socket::peer(&socket).is_ok_and(|peer| self.folder.trusts(peer.uid()));
        match self.link {
            _ if !is_trusted => _ = refuse(socket, Errno::PERM),
            Link::None => self.link = Link::Pending(socket, Instant::now() + PENDING),
            _ => _ = refuse(socket, Errno::BUSY),
        }
    }

    fn receive(&mut self) {
        match std::mem::replace(&mut self.link, Link::None) {
            Link::None => {}
            Link::Pending(socket, _) => self.attach(socket),
            Link::Attached(session, phase) => {
                let step = match socket::receive(&session.socket) {
                    Ok(Received::Packet(packet, _)) => self.obey(&session, &phase, packet),
                    Ok(Received::HungUp) => Step::End(Some(Breach::HungUp)),
                    Ok(Received::Malformed(_)) => nonsense(&session),
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => Step::Stay,
                    Err(_) => Step::End(Some(Breach::HungUp)),
                };
                self.link = Link::Attached(session, phase);
                self.step(step);
            }
        }
    }

    fn attach(&mut self, socket: OwnedFd) {
        let refusal = match socket::receive(&socket) {
            Ok(Received::Packet(Packet::Attach(terms), fds)) => match self.open_session(terms, fds, &socket) {
                Ok(session) => return self.begin_session(session),
                Err(errno) => errno,
            },
            Ok(Received::Malformed(Malformed::Version(_))) => Errno::PROTONOSUPPORT,
            Ok(Received::HungUp) => return,
            _ => Errno::PROTO,
        };
        refuse(&socket, refusal);
    }

    fn open_session(&self, terms: Attach, fds: Vec<OwnedFd>, socket: &OwnedFd) -> Result<Arc<Session>, Errno> {
        let Ok([ring, bits]) = <[OwnedFd; 2]>::try_from(fds) else { return Err(Errno::PROTO) };
        let ring = Ring::receive(ring).map_err(|_| Errno::INVAL)?;
        let bits = Bits::receive(&bits, terms.bitmap_bytes()).map_err(|_| Errno::INVAL)?;
        let socket = socket.try_clone().map_err(|_| Errno::MFILE)?;
        let session = Arc::new(Session::new(terms, ring, bits, socket));
        let mut control = self.shared.control_mut();
        if !meeting::admits(control.opening, terms.trap_at_once) {
            return Err(Errno::STALE);
        }
        control.session = Some(session.clone());
        if control.opening {
            lock(&self.shared.attached).push(terms.announcement);
            self.shared.arrived.notify_all();
        }
        if terms.trap_at_once {
            self.shared.gate.trap();
        }
        Ok(session)
    }

    fn begin_session(&mut self, session: Arc<Session>) {
        hold::at(Place::Attaching);
        let sent = socket::send(&session.socket, &Packet::Attached, &[]);
        let phase = if session.terms.trap_at_once { Phase::Trapping } else { Phase::Idle };
        self.link = Link::Attached(session, phase);
        if sent.is_err() {
            self.end(Some(Breach::HungUp));
        }
    }

    fn obey(&self, session: &Arc<Session>, phase: &Phase, packet: Packet) -> Step {
        match (packet, phase) {
            (Packet::Freeze, Phase::Idle) => Step::Phase(Phase::Admitting),
            (Packet::Thaw { trap: true }, Phase::Frozen) => self.thaw(session),
            (Packet::Thaw { trap: false }, phase) if !matches!(phase, Phase::Trapping) => {
                let held = self.shared.let_go(session, None) && matches!(phase, Phase::Frozen);
                // Who does not get it takes the freeze for lost.
                let _ = socket::send(&session.socket, &Packet::Thawed { held }, &[]);
                Step::End(None)
            }
            (Packet::Detach, _) => Step::End(None),
            _ => nonsense(session),
        }
    }

    fn freeze(&self, session: &Arc<Session>) -> Step {
        let mut control = self.shared.control_mut();
        control.frozen_until = Some(Instant::now() + session.terms.freeze_timeout);
        self.shared.gate.freeze();
        drop(control);
        hold::at(Place::Draining);
        Step::Phase(Phase::Draining)
    }

    /// Into trapping, unless the freeze did not hold until now.
    fn thaw(&self, session: &Arc<Session>) -> Step {
        hold::at(Place::Thawing);
        let mut control = self.shared.control_mut();
        let held = control.is(session) && control.frozen_until.take().is_some_and(|until| Instant::now() < until);
        if held {
            session.trap();
            self.shared.gate.trap();
        }
        drop(control);
        let sent = socket::send(&session.socket, &Packet::Thawed { held }, &[]);
        match (held, sent) {
            (true, Ok(())) => Step::Phase(Phase::Trapping),
            (true, Err(_)) => Step::End(Some(Breach::HungUp)),
            (false, _) => Step::End(Some(Breach::FrozenTooLong)),
        }
    }

    fn time_is_up(&mut self) {
        match &self.link {
            Link::Pending(socket, until) if Instant::now() >= *until => {
                refuse(socket, Errno::TIMEDOUT);
                self.link = Link::None;
            }
            Link::Attached(session, Phase::Draining | Phase::Quiescing(_) | Phase::Settling | Phase::Frozen) => {
                refuse(&session.socket, Errno::TIMEDOUT);
                self.end(Some(Breach::FrozenTooLong));
            }
            _ => {}
        }
    }

    /// What the bell may have been about.
    fn progress(&mut self) {
        let Link::Attached(session, phase) = &self.link else { return };
        let drained = || self.shared.gate.in_flight() == 0;
        let step = match phase {
            Phase::Admitting if self.shared.waiting.load(Ordering::SeqCst) == 0 => self.freeze(session),
            Phase::Draining if drained() => self.quiesce(session),
            Phase::Quiescing(outcome) => match lock(outcome).take() {
                None => Step::Stay,
                Some(Err(e)) => {
                    let errno = e.raw_os_error().filter(|errno| (1..4096).contains(errno));
                    refuse_freeze(session, errno.map_or(Errno::IO, Errno::from_raw_os_error))
                }
                Some(Ok(())) if drained() => frozen(session),
                Some(Ok(())) => Step::Phase(Phase::Settling),
            },
            Phase::Settling if drained() => frozen(session),
            _ => Step::Stay,
        };
        self.step(step);
    }

    /// Starts the program's callback on a thread of its own, so that it may hang without holding anybody.
    fn quiesce(&self, session: &Arc<Session>) -> Step {
        let mut running = lock(&self.shared.quiescing);
        if *running {
            // The last freeze's callback.
            return refuse_freeze(session, Errno::BUSY);
        }
        if lock(&self.shared.quiesce).is_none() {
            return frozen(session);
        }
        *running = true;
        drop(running);
        let outcome = Outcome::default();
        let (left, shared, mask) = (outcome.clone(), self.shared.clone(), self.programs_mask);
        let started = thread::Builder::new().name("drive-backup-qui".into()).spawn(move || {
            QUIESCING.set(true);
            // It is the program's code; what it starts would be deaf to every signal.
            let _ = mask.thread_set_mask();
            let called = || lock(&shared.quiesce).as_mut().map_or(Ok(()), |quiesce| quiesce());
            // A panic of the callback is a failure of it.
            let result =
                std::panic::catch_unwind(std::panic::AssertUnwindSafe(called)).unwrap_or(Err(Errno::IO.into()));
            // Before the outcome can be seen: the next freeze may follow at once.
            shared.has_quiesced();
            *lock(&left) = Some(result);
            shared.ring_bell();
        });
        match started {
            Ok(_) => Step::Phase(Phase::Quiescing(outcome)),
            Err(_) => {
                self.shared.has_quiesced();
                refuse_freeze(session, Errno::AGAIN)
            }
        }
    }

    fn step(&mut self, step: Step) {
        match (step, &mut self.link) {
            (Step::Phase(next), Link::Attached(_, phase)) => {
                *phase = next;
                self.progress();
            }
            (Step::End(breach), _) => self.end(breach),
            (Step::Stay | Step::Phase(_), _) => {}
        }
    }

    fn end(&mut self, breach: Option<Breach>) {
        if let Link::Attached(session, _) = std::mem::replace(&mut self.link, Link::None) {
            self.shared.end(&session, breach);
        }
    }
}

fn frozen(session: &Arc<Session>) -> Step {
    match socket::send(&session.socket, &Packet::Frozen, &[]) {
        Ok(()) => Step::Phase(Phase::Frozen),
        Err(_) => Step::End(Some(Breach::HungUp)),
    }
}

fn nonsense(session: &Arc<Session>) -> Step {
    refuse(&session.socket, Errno::PROTO);
    Step::End(Some(Breach::Nonsense))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::writer::tests::attached;

    #[test]
    fn a_refusal_that_nobody_hears_leaves_a_mark() {
        let (_shared, session, _ring, backup) = attached();
        assert!(matches!(refuse_freeze(&session, Errno::BUSY), Step::End(None)));
        drop(backup);
        assert!(matches!(refuse_freeze(&session, Errno::BUSY), Step::End(Some(Breach::Fault))));
    }
}
