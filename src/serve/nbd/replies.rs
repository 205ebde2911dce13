//! Replies, encoded one after the other, to be sent at once.

use super::input::KEEP;
use crate::ground::range::ByteRange;
use crate::nbd::payload::ErrorChunk;
use crate::nbd::protocol::{Chunk, ErrorValue, Request, SimpleReply, chunk};

/// Bytes before the data of a chunk of kind `OFFSET_DATA`.
const DATA_HEAD: usize = Chunk::LENGTH + 8;

/// Encoded replies.
#[derive(Debug)]
pub struct Replies {
    /// Stays as long as it ever was, so that room for data needs no clearing.
    buf: Vec<u8>,
    filled: usize,
    structured: bool,
}

/// Room for the data of a read, behind a header that is written when the data are there.
#[must_use]
#[derive(Clone, Copy, Debug)]
pub struct Room {
    start: usize,
    head: usize,
    length: usize,
}

impl Replies {
    /// For a connection that has negotiated structured replies, or not.
    pub fn new(structured: bool) -> Self {
        Self { buf: Vec::new(), filled: 0, structured }
    }

    /// What is to be sent.
    pub fn bytes(&self) -> &[u8] {
        &self.buf[..self.filled]
    }

    /// It has been sent.
    pub fn clear(&mut self) {
        self.filled = 0;
        if self.buf.len() > KEEP {
            self.buf = Vec::new();
        }
    }

    /// Goes back to where [`Replies::bytes`] was `length` long.
    pub fn truncate(&mut self, length: usize) {
        self.filled = self.filled.min(length);
    }

    fn reserve(&mut self, length: usize) {
        let needed = self.filled + length;
        if self.buf.len() < needed {
            self.buf.resize(needed.next_multiple_of(4096), 0);
        }
    }

    fn push(&mut self, bytes: &[u8]) {
        self.reserve(bytes.len());
        self.buf[self.filled..self.filled + bytes.len()].copy_from_slice(bytes);
        self.filled += bytes.len();
    }

    /// Others' replies, whole.
    pub fn append(&mut self, other: &Self) {
        self.push(other.bytes());
    }

    /// Room for `length` bytes of data; [`Replies::room`] is it. Nothing counts before [`Replies::keep`].
    pub fn make_room(&mut self, length: usize) -> Room {
        let head = if self.structured { DATA_HEAD } else { SimpleReply::LENGTH };
        self.reserve(head + length);
        Room { start: self.filled, head, length }
    }

    /// Where the data go.
    pub fn room(&mut self, room: Room) -> &mut [u8] {
        let data = room.start + room.head;
        &mut self.buf[data..data + room.length]
    }

    /// The data are there: those of the whole request in a simple reply, else a chunk of those at `offset`.
    pub fn keep(&mut self, room: Room, request: &Request, offset: u64, last: bool) {
        let head = &mut self.buf[room.start..room.start + room.head];
        if self.structured {
            let flags = if last { chunk::DONE } else { 0 };
            let length = room.length as u32 + 8;
            let header = Chunk { flags, kind: chunk::OFFSET_DATA, cookie: request.cookie, length };
            head[..Chunk::LENGTH].copy_from_slice(&header.encode());
            head[Chunk::LENGTH..].copy_from_slice(&offset.to_be_bytes());
        } else {
            head.copy_from_slice(&SimpleReply { error: 0, cookie: request.cookie }.encode());
        }
        self.filled = room.start + room.head + room.length;
    }

    /// A chunk of zeroes.
    pub fn hole(&mut self, request: &Request, range: ByteRange, last: bool) {
        let flags = if last { chunk::DONE } else { 0 };
        self.push(&Chunk { flags, kind: chunk::OFFSET_HOLE, cookie: request.cookie, length: 12 }.encode());
        self.push(&range.offset.to_be_bytes());
        self.push(&(range.length as u32).to_be_bytes());
    }

    /// The only chunk of a reply, with this payload.
    pub fn chunk(&mut self, request: &Request, kind: u16, payload: &[u8]) {
        let length = payload.len() as u32;
        self.push(&Chunk { flags: chunk::DONE, kind, cookie: request.cookie, length }.encode());
        self.push(payload);
    }

    /// It is done. A read without data has an empty structured reply.
    pub fn done(&mut self, request: &Request) {
        self.push(&SimpleReply { error: 0, cookie: request.cookie }.encode());
    }

    /// It failed; `message` is for people.
    pub fn failed(&mut self, request: &Request, error: ErrorValue, message: &str) {
        if self.structured {
            let mut payload = Vec::new();
            ErrorChunk { error, message, offset: None }.encode(&mut payload);
            self.chunk(request, chunk::ERROR, &payload);
        } else {
            self.push(&SimpleReply { error: error.to_wire(), cookie: request.cookie }.encode());
        }
    }
}
