//! Replies as they come from a server that nobody trusts: each length is bounded before it is used, each byte is asked for.

use super::connection::wrong;
use crate::ground::range::ByteRange;
use crate::nbd::protocol::{Chunk, LONGEST_STRING, SimpleReply, chunk};
use std::io;

/// Extents of one reply at most, as the protocol advises servers (section "Structured reply types").
const EXTENTS_LIMIT: u32 = 1 << 20;
/// Chunks of one reply that tell an error and do not end it.
const ERRORS_LIMIT: u32 = 64;

/// The fixed part of a reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Head {
    /// The whole reply, but for the data of a read.
    Simple(SimpleReply),
    /// One of several chunks.
    Chunk(Chunk),
}

impl Head {
    /// The request's.
    pub fn cookie(&self) -> u64 {
        match self {
            Self::Simple(reply) => reply.cookie,
            Self::Chunk(chunk) => chunk.cookie,
        }
    }

    /// Which piece of its call.
    pub fn index(&self) -> usize {
        (self.cookie() & 0xffff) as usize
    }

    /// Nothing comes after it for this request.
    pub fn is_last(&self) -> bool {
        match self {
            Self::Simple(_) => true,
            Self::Chunk(head) => head.flags & chunk::DONE != 0,
        }
    }

    /// The error that a simple reply tells.
    pub fn simple_error(&self) -> Option<u32> {
        match self {
            Self::Simple(reply) => Some(reply.error).filter(|error| *error != 0),
            Self::Chunk(_) => None,
        }
    }

    /// Must it be taken by its own call: do bytes follow, or does it not end the request? `is_read` asks of a call that
    /// takes bytes.
    pub fn has_payload(&self, is_read: bool) -> bool {
        match self {
            Self::Simple(reply) => is_read && reply.error == 0,
            Self::Chunk(head) => head.length > 0 || !self.is_last() || is_read || head.kind != chunk::NONE,
        }
    }
}

/// Which bytes of a piece have come.
#[derive(Debug, Default)]
pub struct Covered {
    /// Runs, joined where they came in order.
    runs: Vec<ByteRange>,
    bytes: u64,
    errors: u32,
}

impl Covered {
    /// A chunk has brought `range` of a piece of `length` bytes.
    fn add(&mut self, range: ByteRange, length: u64) -> io::Result<()> {
        self.bytes += range.length;
        if range.is_empty() || self.bytes > length {
            return Err(wrong(format!("a chunk with {range}, which it has sent or which is empty")));
        }
        match self.runs.last_mut() {
            Some(last) if last.end() == range.offset => last.length += range.length,
            _ => self.runs.push(range),
        }
        Ok(())
    }

    /// All of `piece`, each byte once.
    fn is_whole(&mut self, piece: ByteRange) -> bool {
        self.runs.sort_unstable_by_key(|run| run.offset);
        let joined = self.runs.iter().try_fold(piece.offset, |at, run| (run.offset == at).then_some(run.end()));
        joined == Some(piece.end())
    }
}

/// Where the bytes of a call's replies go.
#[derive(Debug)]
pub enum Sink<'a> {
    /// No reply has any.
    Nothing,
    /// Into a buffer, whose first byte is at `offset` of the disk, a request for each `step` bytes.
    Data {
        /// To be filled.
        buf: &'a mut [u8],
        /// Byte of the disk.
        offset: u64,
        /// Bytes of a request.
        step: u64,
        /// For each request, what has come.
        covered: Vec<Covered>,
    },
    /// Extents: lengths and flags.
    Extents {
        /// To be filled.
        extents: &'a mut Vec<(u32, u32)>,
        /// The number of `base:allocation`.
        context: Option<u32>,
        /// Bytes that were asked for.
        limit: u64,
    },
}

/// Fills a buffer from the connection.
pub type Fill<'a> = dyn FnMut(&mut [u8]) -> io::Result<()> + 'a;

impl Sink<'_> {
    /// Takes what follows `head`. Returns the error that it tells.
    pub fn take(&mut self, head: &Head, structured: bool, fill: &mut Fill<'_>) -> io::Result<Option<u32>> {
        let head = match head {
            Head::Simple(reply) if reply.error != 0 => return Ok(Some(reply.error)),
            Head::Simple(_) => return self.take_simple(head.index(), structured, fill).map(|()| None),
            Head::Chunk(head) => head,
        };
        let index = (head.cookie & 0xffff) as usize;
        match head.kind {
            chunk::NONE if head.length == 0 && head.flags & chunk::DONE != 0 => Ok(None),
            chunk::OFFSET_DATA => self.take_data(index, head.length, fill).map(|()| None),
            chunk::OFFSET_HOLE => self.take_hole(index, head.length, fill).map(|()| None),
            chunk::BLOCK_STATUS => self.take_extents(head.length, fill).map(|()| None),
            kind if kind & chunk::IS_ERROR != 0 => self.take_error(index, head, fill).map(Some),
            kind => Err(wrong(format!("a chunk of kind {kind} with {} bytes", head.length))),
        }
    }

    /// After the last chunk of a request without an error: has everything come?
    pub fn check_whole(&mut self, index: usize) -> io::Result<()> {
        let piece = self.piece(index);
        match self {
            Self::Nothing => Ok(()),
            Self::Data { covered, .. } => match covered[index].is_whole(piece) {
                true => Ok(()),
                false => Err(wrong(format!("less than {piece}, which was asked for"))),
            },
            Self::Extents { extents, .. } if extents.is_empty() => Err(wrong("no extents")),
            Self::Extents { .. } => Ok(()),
        }
    }

    /// The bytes of the disk that request number `index` reads.
    fn piece(&self, index: usize) -> ByteRange {
        match self {
            Self::Data { buf, offset, step, .. } => {
                let start = index as u64 * step;
                ByteRange::new(offset + start, (*step).min(buf.len() as u64 - start))
            }
            _ => ByteRange::default(),
        }
    }

    fn take_simple(&mut self, index: usize, structured: bool, fill: &mut Fill<'_>) -> io::Result<()> {
        let piece = self.piece(index);
        match self {
            Self::Nothing => Ok(()),
            // Section "Structured reply chunk message": a read must then be answered in chunks.
            Self::Data { .. } if structured => Err(wrong("data in a simple reply")),
            Self::Data { .. } => fill(self.part(index, piece)?),
            Self::Extents { .. } => Err(wrong("a simple reply to a block status")),
        }
    }

    fn take_data(&mut self, index: usize, length: u32, fill: &mut Fill<'_>) -> io::Result<()> {
        let offset = u64::from_be_bytes(fixed(fill)?);
        let length = u64::from(length).checked_sub(8).ok_or_else(|| wrong("a data chunk without an offset"))?;
        fill(self.part(index, checked(offset, length)?)?)
    }

    fn take_hole(&mut self, index: usize, length: u32, fill: &mut Fill<'_>) -> io::Result<()> {
        if length != 12 {
            return Err(wrong(format!("a hole's chunk of {length} bytes")));
        }
        let offset = u64::from_be_bytes(fixed(fill)?);
        let length = u32::from_be_bytes(fixed(fill)?);
        self.part(index, checked(offset, length.into())?)?.fill(0);
        Ok(())
    }

    /// The part of the buffer for `range`, which counts as filled from now on.
    fn part(&mut self, index: usize, range: ByteRange) -> io::Result<&mut [u8]> {
        let piece = self.piece(index);
        let Self::Data { buf, offset, covered, .. } = self else {
            return Err(wrong("data that was not asked for"));
        };
        if range.offset < piece.offset || range.end() > piece.end() {
            return Err(wrong(format!("{range} where {piece} was asked for")));
        }
        covered[index].add(range, piece.length)?;
        let start = (range.offset - *offset) as usize;
        Ok(&mut buf[start..start + range.length as usize])
    }

    fn take_extents(&mut self, length: u32, fill: &mut Fill<'_>) -> io::Result<()> {
        let Self::Extents { extents, context, limit } = self else {
            return Err(wrong("extents that were not asked for"));
        };
        let count = length.saturating_sub(4) / 8;
        if length != 4 + count * 8 || !(1..=EXTENTS_LIMIT).contains(&count) || !extents.is_empty() {
            return Err(wrong(format!("extents in a chunk of {length} bytes")));
        }
        if Some(u32::from_be_bytes(fixed(fill)?)) != *context {
            return Err(wrong("extents of another metadata context"));
        }
        let mut bytes = vec![0; count as usize * 8];
        fill(&mut bytes)?;
        let mut total = 0u64;
        for descriptor in bytes.chunks_exact(8) {
            let number = |at: usize| u32::from_be_bytes(descriptor[at..at + 4].try_into().expect("4 bytes"));
            let (length, flags) = (number(0), number(4));
            // Only the last one may go on past what was asked for.
            if length == 0 || total >= *limit {
                return Err(wrong(format!("an extent of {length} bytes, {total} after the first")));
            }
            total += u64::from(length);
            extents.push((length, flags));
        }
        Ok(())
    }

    fn take_error(&mut self, index: usize, head: &Chunk, fill: &mut Fill<'_>) -> io::Result<u32> {
        if !(6..=6 + LONGEST_STRING as u32 + 8).contains(&head.length) {
            return Err(wrong(format!("an error's chunk of {} bytes", head.length)));
        }
        if let Self::Data { covered, .. } = self {
            covered[index].errors += 1;
            if covered[index].errors > ERRORS_LIMIT {
                return Err(wrong("more errors than one request can have"));
            }
        } else if head.flags & chunk::DONE == 0 {
            return Err(wrong("an error that does not end its reply"));
        }
        let error = u32::from_be_bytes(fixed(fill)?);
        let mut rest = vec![0; head.length as usize - 4];
        fill(&mut rest)?;
        if error == 0 { Err(wrong("an error without a number")) } else { Ok(error) }
    }
}

fn fixed<const N: usize>(fill: &mut Fill<'_>) -> io::Result<[u8; N]> {
    let mut bytes = [0; N];
    fill(&mut bytes)?;
    Ok(bytes)
}

fn checked(offset: u64, length: u64) -> io::Result<ByteRange> {
    ByteRange::checked(offset, length).ok_or_else(|| wrong("a range past the end of all numbers"))
}
