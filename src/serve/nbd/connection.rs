//! The transmission phase: requests of one client, several at once.
//!
//! The threads of a connection take turns. Who has the turn receives requests. What it can do without waiting it does
//! itself, and collects the replies until it would wait for more requests. Before a request that waits it passes the
//! turn on and wakes another thread; before one that is short it lays the turn down, wakes nobody, and takes it up
//! again, unless [`super::watch`] found that it was not short after all and woke somebody who took it.

use super::input::{AHEAD, Input, shrink};
use super::replies::Replies;
use super::request::{Pace, Session};
use super::watch::{Bell, Watched};
use super::wire::Wire;
use crate::nbd::protocol::{ErrorValue, Request, command};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;

/// Threads, and so requests that wait at once, of one connection.
const MOST_THREADS: usize = 16;
/// Bytes of long requests in flight of one connection: two of the longest.
const BUDGET: usize = 64 << 20;
/// Replies are sent when there are more bytes of them, even though requests are waiting.
const BATCH: usize = 128 << 10;
/// Of a thread: the longest way down is a few kilobytes.
const STACK: usize = 512 << 10;

/// How a connection ended.
#[derive(Debug)]
pub enum End {
    /// The client said so, or hung up between two requests.
    Bye,
    /// It sent nonsense, hung up in the middle, or could not be reached any more.
    Broken(io::Error),
}

/// What the one who has the turn has.
#[derive(Debug)]
struct Turn {
    input: Input,
    replies: Replies,
}

struct State {
    turn: Option<Box<Turn>>,
    /// Counts how often the turn was laid down; and as of the last look of the watch.
    rounds: u64,
    seen: u64,
    waiting: usize,
    threads: usize,
    end: Option<End>,
    /// Bytes of long requests that may still begin.
    budget: usize,
}

struct Connection<W> {
    wire: W,
    session: Session,
    draining: Arc<AtomicBool>,
    bell: Bell,
    state: Mutex<State>,
    /// The turn is free, the end has come, or a thread is gone.
    turned: Condvar,
    /// A long request is over.
    freed: Condvar,
    sending: Mutex<()>,
    this: Weak<Self>,
}

/// Serves the requests of `session` on `wire` until it ends; every request has ended then. Once `draining` is set new
/// requests are refused with `ESHUTDOWN`. Blocks.
pub fn serve<W: Wire>(wire: W, session: Session, draining: Arc<AtomicBool>, bell: Bell) -> End {
    let turn = Turn { input: Input::default(), replies: Replies::new(session.structured) };
    let connection = Arc::new_cyclic(|this: &Weak<Connection<W>>| Connection {
        wire,
        session,
        draining,
        bell,
        state: Mutex::new(State {
            turn: Some(Box::new(turn)),
            rounds: 0,
            seen: 0,
            waiting: 0,
            threads: 1,
            end: None,
            budget: BUDGET,
        }),
        turned: Condvar::new(),
        freed: Condvar::new(),
        sending: Mutex::new(()),
        this: this.clone(),
    });
    let watched: Weak<Connection<W>> = connection.this.clone();
    connection.bell.enlist(watched);
    connection.work();
    let end = connection.wait_for_all();
    connection.wire.shutdown();
    end
}

/// A thread of a connection. One that panics ends the connection, not the server.
struct Member<'a, W: Wire>(&'a Connection<W>);

impl<W: Wire> Drop for Member<'_, W> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.0.finish(End::Broken(io::Error::other("internal error")));
        }
        let mut state = self.0.lock();
        state.threads -= 1;
        drop(state);
        self.0.turned.notify_all();
    }
}

/// A long request's part of the budget.
struct Permit<'a, W: Wire> {
    connection: &'a Connection<W>,
    bytes: usize,
}

impl<W: Wire> Drop for Permit<'_, W> {
    fn drop(&mut self) {
        self.connection.lock().budget += self.bytes;
        self.connection.freed.notify_all();
    }
}

/// What a thread keeps from one request to the next.
struct Own {
    /// A write's payload.
    payload: Vec<u8>,
    replies: Replies,
}

impl<W: Wire> Connection<W> {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn work(&self) {
        let _member = Member(self);
        let mut own = Own { payload: Vec::new(), replies: Replies::new(self.session.structured) };
        while let Some(turn) = self.wait_for_turn() {
            if let Err(end) = self.lead(turn, &mut own) {
                self.finish(end);
            }
        }
    }

    /// Until the end of all other threads.
    fn wait_for_all(&self) -> End {
        let mut state = self.lock();
        while state.threads > 0 {
            state = self.turned.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.end.take().unwrap_or(End::Bye)
    }

    fn wait_for_turn(&self) -> Option<Box<Turn>> {
        let mut state = self.lock();
        loop {
            if state.end.is_some() {
                return None;
            }
            if let Some(turn) = state.turn.take() {
                return Some(turn);
            }
            state.waiting += 1;
            state = self.turned.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.waiting -= 1;
        }
    }

    /// The first reason counts. A broken connection is hung up at once, so that nobody goes on sending.
    fn finish(&self, end: End) {
        let end = match end {
            // It was we who ended it in the middle of a request; those before it are answered.
            End::Broken(error) if error.kind() == io::ErrorKind::UnexpectedEof && self.is_draining() => End::Bye,
            other => other,
        };
        let broken = matches!(end, End::Broken(_));
        self.lock().end.get_or_insert(end);
        self.turned.notify_all();
        if broken {
            self.wire.shutdown();
        }
    }

    /// Lays the turn down for a request that is short: the watch may give it to somebody.
    fn lay_down(&self, turn: Box<Turn>) {
        let mut state = self.lock();
        state.turn = Some(turn);
        state.rounds += 1;
        drop(state);
        self.bell.ring();
    }

    fn take_up(&self) -> Option<Box<Turn>> {
        self.lock().turn.take()
    }

    /// Passes the turn to somebody who goes on at once.
    fn pass(&self, turn: Box<Turn>) {
        let mut state = self.lock();
        state.turn = Some(turn);
        self.wake(state);
    }

    /// Sees to it that somebody takes the turn, soon: one who waits, or a new thread. Where there are enough, the first
    /// to end its request does.
    fn wake(&self, mut state: MutexGuard<'_, State>) {
        if state.waiting > 0 {
            drop(state);
            return self.turned.notify_one();
        }
        let Some(connection) = self.this.upgrade().filter(|_| state.threads < MOST_THREADS) else { return };
        state.threads += 1;
        drop(state);
        let started =
            thread::Builder::new().name("nbd request".into()).stack_size(STACK).spawn(move || connection.work());
        if started.is_err() {
            // Then those that there are go on in turn.
            self.lock().threads -= 1;
        }
    }

    /// Waits until the bytes of a long request fit; a short one costs nothing. Nobody waits for `replies` meanwhile.
    fn permit(&self, bytes: usize, replies: &mut Replies) -> Result<Option<Permit<'_, W>>, End> {
        if bytes <= AHEAD {
            return Ok(None);
        }
        let mut state = self.lock();
        if state.budget < bytes {
            drop(state);
            self.send(replies)?;
            state = self.lock();
        }
        while state.budget < bytes {
            state = self.freed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.budget -= bytes;
        Ok(Some(Permit { connection: self, bytes }))
    }

    /// Sends replies. Nobody else sends meanwhile.
    fn send(&self, replies: &mut Replies) -> Result<(), End> {
        if replies.bytes().is_empty() {
            return Ok(());
        }
        let sending = self.sending.lock().unwrap_or_else(PoisonError::into_inner);
        let sent = self.wire.write_all(replies.bytes());
        drop(sending);
        replies.clear();
        sent.map_err(|error| {
            let stalled = matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut);
            End::Broken(if stalled { io::Error::new(io::ErrorKind::TimedOut, "it takes no replies") } else { error })
        })
    }

    /// Serves requests as long as this thread has the turn.
    fn lead(&self, mut turn: Box<Turn>, own: &mut Own) -> Result<(), End> {
        loop {
            if !turn.input.has(Request::LENGTH) || turn.replies.bytes().len() > BATCH {
                self.send(&mut turn.replies)?;
            }
            let header = turn.input.header(&self.wire).map_err(End::Broken)?;
            let request = Request::decode(&header.ok_or(End::Bye)?).map_err(|e| End::Broken(e.into()))?;
            if request.command == command::DISC {
                self.send(&mut turn.replies)?;
                return Err(End::Bye);
            }
            match self.serve_one(turn, &request, own)? {
                Some(same) => turn = same,
                None => return Ok(()),
            }
        }
    }

    /// `None`: somebody else has the turn now.
    fn serve_one(&self, mut turn: Box<Turn>, request: &Request, own: &mut Own) -> Result<Option<Box<Turn>>, End> {
        let payload = if request.command == command::WRITE { request.length as usize } else { 0 };
        if payload > self.session.disk.sizes().maximum as usize {
            let what = format!("a write of {payload} bytes is longer than the largest request");
            return Err(End::Broken(io::Error::new(io::ErrorKind::InvalidData, what)));
        }
        if !turn.input.has(payload) {
            self.send(&mut turn.replies)?;
        }
        let answered = if request.command == command::READ { request.length as usize } else { 0 };
        let legal = self.legal(request);
        let bytes = if legal.is_ok() { payload + answered } else { payload };
        let permit = self.permit(bytes, &mut turn.replies)?;
        let at = turn.input.payload(&self.wire, payload, &mut own.payload).map_err(End::Broken)?;
        if let Err((error, why)) = legal {
            turn.replies.failed(request, error, why);
            shrink(&mut own.payload);
            return Ok(Some(turn));
        }
        let pace = self.session.pace(request);
        if pace == Pace::Cached && self.session.read_cached(request, &mut turn.replies) {
            if permit.is_some() {
                self.send(&mut turn.replies)?;
            }
            return Ok(Some(turn));
        }
        if pace == Pace::Short {
            self.lay_down(turn);
        } else {
            self.send(&mut turn.replies)?;
            self.pass(turn);
        }
        self.session.perform(request, &own.payload[at..at + payload], &mut own.replies);
        shrink(&mut own.payload);
        let turn = if pace == Pace::Short { self.take_up() } else { None };
        self.reply(turn, own)
    }

    /// With the replies before it, if this thread still has the turn.
    fn reply(&self, turn: Option<Box<Turn>>, own: &mut Own) -> Result<Option<Box<Turn>>, End> {
        match turn {
            Some(mut turn) => {
                turn.replies.append(&own.replies);
                own.replies.clear();
                Ok(Some(turn))
            }
            None => self.send(&mut own.replies).map(|()| None),
        }
    }

    fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    fn legal(&self, request: &Request) -> Result<(), super::request::Refusal> {
        if self.is_draining() {
            return Err((ErrorValue::Shutdown, "the server is going down"));
        }
        self.session.check(request)
    }
}

impl<W: Wire> Watched for Connection<W> {
    fn look(&self) -> bool {
        let mut state = self.lock();
        let moved = state.rounds != state.seen;
        state.seen = state.rounds;
        let stuck = !moved && state.turn.is_some() && state.end.is_none();
        if stuck {
            self.wake(state);
        }
        moved || stuck
    }
}
