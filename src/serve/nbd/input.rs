//! What was received and not yet looked at. A header and a small payload, or many requests, cost one system call.

use super::wire::Wire;
use std::io;

/// Bytes that may be received beyond what is needed.
pub const AHEAD: usize = 64 << 10;
/// A buffer that became longer is given back after use.
pub const KEEP: usize = 2 << 20;

/// `buf[start..end]` is there.
#[derive(Debug)]
pub struct Input {
    buf: Vec<u8>,
    start: usize,
    end: usize,
}

impl Default for Input {
    fn default() -> Self {
        Self { buf: vec![0; AHEAD], start: 0, end: 0 }
    }
}

impl Input {
    /// Are `length` bytes there?
    pub fn has(&self, length: usize) -> bool {
        self.end - self.start >= length
    }

    /// Receives until `N` bytes are there, and takes them. `None`: the peer ended before the first. `UnexpectedEof`: in
    /// the middle.
    pub fn header<const N: usize>(&mut self, wire: &impl Wire) -> io::Result<Option<[u8; N]>> {
        if !self.fill(wire, N)? {
            return Ok(None);
        }
        let header = self.buf[self.start..self.start + N].try_into().expect("N bytes");
        self.start += N;
        Ok(Some(header))
    }

    /// Receives a payload of `length` bytes; it is in `into` afterwards, from the place that is returned. A long one is
    /// not copied: the buffers change places.
    pub fn payload(&mut self, wire: &impl Wire, length: usize, into: &mut Vec<u8>) -> io::Result<usize> {
        if !self.fill(wire, length)? && length > 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if length <= AHEAD {
            if into.len() < length {
                into.resize(AHEAD, 0);
            }
            into[..length].copy_from_slice(&self.buf[self.start..self.start + length]);
            self.start += length;
            return Ok(0);
        }
        // No more than AHEAD was received beyond a header, so nothing follows so long a payload yet.
        debug_assert_eq!(self.end, self.start + length);
        std::mem::swap(&mut self.buf, into);
        let start = self.start;
        (self.start, self.end) = (0, 0);
        if self.buf.len() < AHEAD {
            self.buf.resize(AHEAD, 0);
        }
        Ok(start)
    }

    /// Receives until `length` bytes are there. False: the peer ended and nothing is there.
    fn fill(&mut self, wire: &impl Wire, length: usize) -> io::Result<bool> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        }
        if self.start + length > self.buf.len() {
            if length <= AHEAD {
                self.buf.copy_within(self.start..self.end, 0);
                (self.start, self.end) = (0, self.end - self.start);
            } else {
                self.buf.resize(self.start + length, 0);
            }
        }
        while !self.has(length) {
            let ahead = if length <= AHEAD { self.start + AHEAD } else { 0 };
            let limit = ahead.max(self.start + length).min(self.buf.len());
            match wire.read(&mut self.buf[self.end..limit])? {
                0 if self.start == self.end => return Ok(false),
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                received => self.end += received,
            }
        }
        Ok(true)
    }
}

/// Gives back a buffer's memory after an unusually long request.
pub fn shrink(buf: &mut Vec<u8>) {
    if buf.len() > KEEP {
        *buf = Vec::new();
    }
}
