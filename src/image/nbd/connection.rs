//! One connection with many requests in flight, from many threads, without a thread of its own.
//!
//! Whoever waits for a reply and finds nobody reading reads. It takes what is its own straight into its own buffer, marks
//! what is complete for others, and hands them the reading where bytes for their buffers come next. So a thread that is
//! alone here never waits for another one, and no byte is copied twice.
//!
//! A connection is lost as a whole: by an error, by silence, by a reply that makes no sense. Who waits hears why.

use super::handshake::{Export, negotiate};
use super::reply::{Covered, Head, Sink};
use crate::nbd::protocol::{CHUNK_MAGIC, Chunk, ErrorValue, Request, SimpleReply, command};
use crate::nbd::stream::Stream;
use std::collections::HashMap;
use std::io::{self, IoSlice};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// Data of one request: several of them keep both ends of the connection at work.
const PIECE: u64 = 256 << 10;
/// Bytes that a request without data is about at most.
const RANGE_PIECE: u64 = 1 << 30;
/// How many times its patience with silence a call may take as a whole: a peer that sends a byte now and then is left.
const SLOWNESS: u32 = 20;
/// A flush, or zeroes, may take the server so many times longer than data before it says a byte.
const SLOW_COMMANDS: u32 = 10;

/// An open export.
#[derive(Debug)]
pub struct Connection {
    stream: Stream,
    export: Export,
    /// With silence.
    patience: Duration,
    /// Of the target's server, as far as we know: grows when it may have been restarted.
    pub(super) epoch: u64,
    sending: Mutex<()>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    calls: HashMap<u64, Call>,
    last_call: u64,
    /// Somebody is reading, or was handed the reading.
    is_reading: bool,
    /// Bytes for this call come next.
    handed: Option<Head>,
    /// Why nothing works any more.
    lost: Option<(io::ErrorKind, String)>,
}

/// What somebody waits for.
#[derive(Debug)]
struct Call {
    /// By the piece: not yet answered.
    open: Vec<bool>,
    left: usize,
    /// The first error that the server told.
    error: Option<u32>,
    is_slow: bool,
    takes_bytes: bool,
    /// Its thread has nothing to send any more, and sleeps.
    is_asleep: bool,
    wake: Arc<Condvar>,
}

/// What is asked for.
pub enum Ask<'a> {
    /// Fills the buffer.
    Read(&'a mut [u8]),
    /// Writes it.
    Write(&'a [u8]),
    /// A command with a range and no data, of [`command`].
    Plain(u16),
    /// What the range's bytes are: lengths and flags of extents, as the server says them.
    Status(&'a mut Vec<(u32, u32)>),
}

/// Why an ask failed.
#[derive(Debug)]
pub enum Fault {
    /// The connection is lost; another one may do better.
    Lost(io::Error),
    /// The server said no.
    Refused(io::Error),
}

impl Connection {
    /// Negotiates on `stream` and is ready. Blocks as [`negotiate`].
    pub fn begin(stream: Stream, ask: &super::handshake::Ask, patience: Duration) -> io::Result<Self> {
        let (stream, export) = negotiate(stream, ask)?;
        stream.set_read_timeout(Some(patience))?;
        stream.set_write_timeout(Some(patience))?;
        Ok(Self { stream, export, patience, epoch: 0, sending: Mutex::default(), state: Mutex::default() })
    }

    /// What the server said of the export.
    pub fn export(&self) -> &Export {
        &self.export
    }

    /// Asks for `length` bytes from `offset` and waits for the answer. Offset and length are whole blocks of the export.
    pub fn ask(&self, ask: Ask<'_>, offset: u64, length: u64) -> Result<(), Fault> {
        let step = match &ask {
            Ask::Read(_) | Ask::Write(_) => PIECE.min(self.export.maximum.into()),
            Ask::Plain(_) => RANGE_PIECE,
            Ask::Status(_) => length.max(1),
        };
        let (command, is_slow) = match &ask {
            Ask::Read(_) => (command::READ, false),
            Ask::Write(_) => (command::WRITE, false),
            Ask::Plain(command) => (*command, true),
            Ask::Status(_) => (command::BLOCK_STATUS, true),
        };
        let count = length.div_ceil(step).max(1);
        let takes_bytes = matches!(ask, Ask::Read(_) | Ask::Status(_));
        let id = self.enter(count as usize, is_slow, takes_bytes)?;
        let requests = (0..count).map(|index| {
            let start = index * step;
            let length = step.min(length - start) as u32;
            Request { flags: 0, command, cookie: id << 16 | index, offset: offset + start, length }
        });
        let heads: Vec<[u8; Request::LENGTH]> = requests.map(Request::encode).collect();
        let data: &[u8] = if let Ask::Write(data) = &ask { data } else { &[] };
        if let Err(error) = self.send(&heads, data, step as usize) {
            self.lose(&mut self.lock(), error);
        }
        let mut covered = Vec::new();
        covered.resize_with(count as usize, Covered::default);
        let sink = match ask {
            Ask::Read(buf) => Sink::Data { buf, offset, step, covered },
            Ask::Status(extents) => Sink::Extents { extents, context: self.export.context, limit: length },
            Ask::Write(_) | Ask::Plain(_) => Sink::Nothing,
        };
        self.receive(id, sink)
    }

    /// Says farewell and hangs up; whoever waits loses.
    pub fn close(&self) {
        let request = Request { flags: 0, command: command::DISC, cookie: 0, offset: 0, length: 0 };
        if let Ok(_guard) = self.sending.try_lock() {
            // A peer that does not read must not hold up the end.
            let _ = self.stream.set_write_timeout(Some(Duration::from_millis(1)));
            let _ = self.stream.write_all(&request.encode());
        }
        self.stream.shutdown();
    }

    /// Makes all who wait here lose.
    pub(super) fn give_up(&self, why: &str) {
        self.lose(&mut self.lock(), io::Error::other(why.to_owned()));
    }

    fn enter(&self, count: usize, is_slow: bool, takes_bytes: bool) -> Result<u64, Fault> {
        debug_assert!(count <= 1 << 16, "the pieces of a call are counted in 16 bits");
        let mut state = self.lock();
        if let Some(lost) = &state.lost {
            return Err(Fault::Lost(again(lost)));
        }
        state.last_call += 1;
        let id = state.last_call;
        let (open, wake) = (vec![true; count], Arc::default());
        let call = Call { open, left: count, error: None, is_slow, takes_bytes, is_asleep: false, wake };
        state.calls.insert(id, call);
        Ok(id)
    }

    fn send(&self, heads: &[[u8; Request::LENGTH]], data: &[u8], step: usize) -> io::Result<()> {
        let mut parts: Vec<IoSlice<'_>> = Vec::with_capacity(heads.len() * 2);
        let mut data = data.chunks(step);
        for head in heads {
            parts.push(IoSlice::new(head));
            parts.extend(data.next().map(IoSlice::new));
        }
        let _guard = self.sending.lock().expect("nothing panics under this lock");
        self.stream.write_all_vectored(&mut parts)
    }

    fn receive(&self, id: u64, mut sink: Sink<'_>) -> Result<(), Fault> {
        let deadline = Instant::now() + self.patience * SLOWNESS;
        let mut state = self.lock();
        loop {
            if let Some(lost) = &state.lost {
                let error = again(lost);
                state.calls.remove(&id);
                return Err(Fault::Lost(error));
            }
            let head = state.handed.take_if(|head| head.cookie() >> 16 == id);
            let may_read = head.is_some() || !state.is_reading;
            let call = state.calls.get_mut(&id).expect("entered");
            if call.left == 0 {
                let call = state.calls.remove(&id).expect("just seen");
                return match call.error {
                    // The next connection may be one to the server that comes after this one.
                    Some(error) if ErrorValue::of_wire(error) == Some(ErrorValue::Shutdown) => {
                        Err(Fault::Lost(server_error(error)))
                    }
                    Some(error) => Err(Fault::Refused(server_error(error))),
                    None => Ok(()),
                };
            }
            call.is_asleep = !may_read;
            if !may_read {
                let wake = Arc::clone(&call.wake);
                state = wake.wait(state).expect("nothing panics under this lock");
                continue;
            }
            state.is_reading = true;
            drop(state);
            let result = self.read(id, head, &mut sink, deadline);
            state = self.lock();
            match result {
                Ok(()) => {}
                Err(error) => self.lose(&mut state, error),
            }
        }
    }

    /// Reads until this call is complete, or somebody else has been handed the reading.
    fn read(&self, id: u64, handed: Option<Head>, sink: &mut Sink<'_>, deadline: Instant) -> io::Result<()> {
        let mut next = handed;
        loop {
            let head = match next.take() {
                Some(head) => head,
                None => self.read_head()?,
            };
            let owner = head.cookie() >> 16;
            let mut is_done = head.is_last();
            let mut error = head.simple_error();
            if owner == id {
                self.check_open(&head)?;
                let mut fill = |buf: &mut [u8]| self.fill(buf, Some(deadline), false);
                if let Some(told) = sink.take(&head, self.export.structured, &mut fill)? {
                    error = Some(told);
                }
            } else {
                let mut state = self.lock();
                let call = open_call(&mut state, &head)?;
                if call.takes_bytes && head.has_payload(true) || head.has_payload(false) {
                    let wake = Arc::clone(&call.wake);
                    state.handed = Some(head);
                    wake.notify_one();
                    return Ok(());
                }
                is_done = true;
            }
            let mut state = self.lock();
            let call = open_call(&mut state, &head)?;
            call.error = call.error.or(error);
            if is_done {
                if owner == id && call.error.is_none() {
                    sink.check_whole(head.index())?;
                }
                call.open[head.index()] = false;
                call.left -= 1;
                if call.left == 0 && owner != id {
                    call.wake.notify_one();
                }
            }
            if state.calls[&id].left == 0 {
                state.is_reading = false;
                // One that still sends would not hear it, and may wait for a server that wants to be read first.
                let waiting = state.calls.values().find(|call| call.left > 0 && call.is_asleep);
                waiting.inspect(|call| call.wake.notify_one());
                return Ok(());
            }
        }
    }

    fn check_open(&self, head: &Head) -> io::Result<()> {
        open_call(&mut self.lock(), head).map(drop)
    }

    fn read_head(&self) -> io::Result<Head> {
        let mut bytes = [0; Chunk::LENGTH];
        let (simple, rest) = bytes.split_at_mut(SimpleReply::LENGTH);
        self.fill(simple, None, true)?;
        if simple[..4] != CHUNK_MAGIC.to_be_bytes() {
            return Ok(Head::Simple(SimpleReply::decode(simple.first_chunk().expect("16 bytes"))?));
        }
        if !self.export.structured {
            return Err(wrong("a structured reply, which was not negotiated"));
        }
        self.fill(rest, None, false)?;
        Ok(Head::Chunk(Chunk::decode(&bytes)?))
    }

    /// Fills `buf`. Silence is borne for the connection's patience, before a head longer when a flush is under way.
    fn fill(&self, buf: &mut [u8], deadline: Option<Instant>, is_head: bool) -> io::Result<()> {
        let began = Instant::now();
        let mut filled = 0;
        while filled < buf.len() {
            match self.stream.read(&mut buf[filled..]) {
                Ok(0) => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the server hung up")),
                Ok(length) => filled += length,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let is_slow = is_head && filled == 0 && self.lock().calls.values().any(|call| call.is_slow);
                    if !is_slow || began.elapsed() > self.patience * SLOW_COMMANDS {
                        let seconds = began.elapsed().as_secs();
                        let why = format!("the server has not answered for {seconds} s");
                        return Err(io::Error::new(io::ErrorKind::TimedOut, why));
                    }
                }
                Err(error) => return Err(error),
            }
            if filled < buf.len() && deadline.is_some_and(|deadline| Instant::now() > deadline) {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "the server answers too slowly"));
            }
        }
        Ok(())
    }

    fn lose(&self, state: &mut State, error: io::Error) {
        if state.lost.is_none() {
            state.lost = Some((error.kind(), crate::error::reason(&error)));
        }
        self.stream.shutdown();
        state.calls.values().for_each(|call| call.wake.notify_one());
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("nothing panics under this lock")
    }
}

/// The call that `head` answers a piece of; an error when nobody asked.
fn open_call<'s>(state: &'s mut State, head: &Head) -> io::Result<&'s mut Call> {
    let cookie = head.cookie();
    let unknown = || wrong(format!("a reply to a request that was not made, {cookie:#x}"));
    let call = state.calls.get_mut(&(cookie >> 16)).ok_or_else(unknown)?;
    if call.open.get(head.index()) == Some(&true) { Ok(call) } else { Err(unknown()) }
}

fn again((kind, why): &(io::ErrorKind, String)) -> io::Error {
    io::Error::new(*kind, why.clone())
}

fn server_error(value: u32) -> io::Error {
    ErrorValue::of_wire(value).unwrap_or(ErrorValue::Io).into()
}

pub(super) fn wrong(why: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the server sent {}", why.into()))
}
