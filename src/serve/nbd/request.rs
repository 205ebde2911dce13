//! One request: whether it makes sense, how long it may take, and its reply.

use super::replies::Replies;
use crate::error::reason;
use crate::ground::range::{Allocation, ByteRange, Extent};
use crate::ground::zero::is_zero;
use crate::nbd::payload::encode_descriptor;
use crate::nbd::protocol::{ErrorValue, Request, allocation, chunk, command, command_flag as flag};
use crate::serve::disk::Disk;
use std::io;
use std::sync::Arc;

/// Number of `base:allocation`, the only metadata context.
pub const CONTEXT: u32 = 1;
/// Extents of one reply at most: to a read, and to a block status.
const READ_EXTENTS: usize = 64;
const STATUS_EXTENTS: usize = 2048;
/// Bytes that are read at once to fill the cache.
const CACHE_PIECE: u64 = 1 << 20;

/// What the handshake ended with.
#[derive(Clone)]
pub struct Session {
    /// The export.
    pub disk: Arc<Disk>,
    /// Structured replies.
    pub structured: bool,
    /// `base:allocation` was chosen for this export.
    pub allocation: bool,
}

/// How to go about a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pace {
    /// It never waits, if the page cache has its bytes.
    Cached,
    /// It hardly ever waits: no other thread is woken for the next request at once.
    Short,
    /// It waits for the disk, or for a backup: another thread goes on meanwhile.
    Long,
}

/// Why a request is refused, with words for people.
pub type Refusal = (ErrorValue, &'static str);

impl Session {
    /// Flags that the request may have.
    fn flags_of(&self, command: u16) -> u16 {
        // Legal, and without meaning, where nothing is written.
        flag::FUA
            | match command {
                command::READ if self.structured => flag::DF,
                command::WRITE_ZEROES => flag::NO_HOLE | flag::FAST_ZERO,
                command::BLOCK_STATUS => flag::REQ_ONE,
                _ => 0,
            }
    }

    /// Sections "Request types" and "Error values".
    pub fn check(&self, request: &Request) -> Result<(), Refusal> {
        let invalid = |why| Err((ErrorValue::Invalid, why));
        if !(command::READ..=command::BLOCK_STATUS).contains(&request.command) {
            return invalid("unknown command");
        }
        if request.flags & !self.flags_of(request.command) != 0 {
            return invalid("flags that this command does not have");
        }
        let changes = matches!(request.command, command::WRITE | command::TRIM | command::WRITE_ZEROES);
        if changes && self.disk.is_read_only() {
            return Err((ErrorValue::Perm, "the export is read-only"));
        }
        let inside = request.range().is_some_and(|range| range.end() <= self.disk.length());
        match request.command {
            command::FLUSH if request.offset != 0 || request.length != 0 => invalid("a flush has no range"),
            command::BLOCK_STATUS if !self.allocation => invalid("no metadata context was negotiated"),
            command::BLOCK_STATUS if request.length == 0 => invalid("block status of no bytes"),
            command::READ if request.length > self.disk.sizes().maximum => invalid("longer than the largest request"),
            command::WRITE | command::WRITE_ZEROES if !inside => Err((ErrorValue::NoSpace, "past the end of the disk")),
            _ if !inside => invalid("past the end of the disk"),
            _ => Ok(()),
        }
    }

    /// Of a request that makes sense.
    pub fn pace(&self, request: &Request) -> Pace {
        let soon = self.disk.is_plain() && !request.has(flag::FUA);
        match request.command {
            command::READ if self.disk.is_plain() => Pace::Cached,
            command::BLOCK_STATUS if self.disk.is_plain() => Pace::Short,
            command::WRITE | command::TRIM | command::WRITE_ZEROES if soon => {
                let range = ByteRange::new(request.offset, request.length.into());
                if self.disk.would_wait(range) { Pace::Long } else { Pace::Short }
            }
            _ => Pace::Long,
        }
    }

    /// Reads what the page cache has. False, and no reply, if it has not all of it.
    pub fn read_cached(&self, request: &Request, replies: &mut Replies) -> bool {
        let room = replies.make_room(request.length as usize);
        match self.disk.read_cached(replies.room(room), request.offset) {
            Ok(true) if request.length > 0 => {}
            // Errors are told by the read that waits.
            _ => return false,
        }
        if self.structured && is_zero(replies.room(room)) {
            replies.hole(request, ByteRange::new(request.offset, request.length.into()), true);
        } else {
            replies.keep(room, request, request.offset, true);
        }
        true
    }

    /// Does it, and adds its reply. Blocks. `payload` is a write's.
    pub fn perform(&self, request: &Request, payload: &[u8], replies: &mut Replies) {
        let before = replies.bytes().len();
        let result = match request.command {
            command::READ => self.read(request, replies),
            command::BLOCK_STATUS => self.block_status(request, replies),
            _ => self.change(request, payload).map(|()| replies.done(request)),
        };
        if let Err(error) = result {
            replies.truncate(before);
            replies.failed(request, ErrorValue::of_error(&error), &reason(&error));
        }
    }

    fn change(&self, request: &Request, payload: &[u8]) -> io::Result<()> {
        let range = ByteRange::new(request.offset, request.length.into());
        let may_unmap = !request.has(flag::NO_HOLE);
        match request.command {
            command::WRITE => self.disk.write(payload, request.offset)?,
            command::TRIM => self.disk.discard(range)?,
            command::WRITE_ZEROES if request.has(flag::FAST_ZERO) => self.disk.write_zeroes_fast(range, may_unmap)?,
            command::WRITE_ZEROES => self.disk.write_zeroes(range, may_unmap)?,
            command::CACHE => return self.cache(range),
            _ => return self.disk.flush(),
        }
        if request.has(flag::FUA) { self.disk.flush() } else { Ok(()) }
    }

    fn cache(&self, range: ByteRange) -> io::Result<()> {
        let mut bytes = vec![0; range.length.min(CACHE_PIECE) as usize];
        let mut rest = range;
        while !rest.is_empty() {
            let piece = rest.prefix(CACHE_PIECE);
            self.disk.read(&mut bytes[..piece.length as usize], piece.offset)?;
            rest = ByteRange::between(piece.end(), rest.end());
        }
        Ok(())
    }

    fn read(&self, request: &Request, replies: &mut Replies) -> io::Result<()> {
        let mut rest = ByteRange::new(request.offset, request.length.into());
        if !self.structured {
            return self.read_data(request, rest, true, replies);
        }
        if rest.is_empty() {
            replies.chunk(request, chunk::NONE, &[]);
        }
        let mut extents = if request.has(flag::DF) { 1 } else { READ_EXTENTS };
        while !rest.is_empty() {
            let extent = self.disk.block_status(rest)?;
            extents -= 1;
            let whole = extent.range.end() == rest.end();
            if is_hole(&extent) && (whole || extents > 0) {
                replies.hole(request, extent.range, whole);
            } else {
                // The last one that is allowed takes all that is left.
                let range = if extents == 0 { rest } else { extent.range };
                self.read_data(request, range, range.end() == rest.end(), replies)?;
                if extents == 0 {
                    return Ok(());
                }
            }
            rest = ByteRange::between(extent.range.end(), rest.end());
        }
        Ok(())
    }

    fn read_data(&self, request: &Request, range: ByteRange, last: bool, replies: &mut Replies) -> io::Result<()> {
        let room = replies.make_room(range.length as usize);
        self.disk.read(replies.room(room), range.offset)?;
        replies.keep(room, request, range.offset, last);
        Ok(())
    }

    fn block_status(&self, request: &Request, replies: &mut Replies) -> io::Result<()> {
        let most = if request.has(flag::REQ_ONE) { 1 } else { STATUS_EXTENTS };
        let mut rest = ByteRange::new(request.offset, request.length.into());
        let mut found: Vec<(u32, u32)> = Vec::new();
        while !rest.is_empty() {
            let extent = self.disk.block_status(rest)?;
            let flags = if is_hole(&extent) { allocation::HOLE | allocation::ZERO } else { 0 };
            let length = extent.range.length as u32;
            let full = found.len() == most;
            match found.last_mut() {
                Some((before, same)) if *same == flags => *before += length,
                _ if full => break,
                _ => found.push((length, flags)),
            }
            rest = ByteRange::between(extent.range.end(), rest.end());
        }
        let mut payload = CONTEXT.to_be_bytes().to_vec();
        found.iter().for_each(|&(length, flags)| encode_descriptor(&mut payload, length, flags));
        replies.chunk(request, chunk::BLOCK_STATUS, &payload);
        Ok(())
    }
}

/// A whole image's unallocated bytes read as zeroes.
fn is_hole(extent: &Extent) -> bool {
    extent.allocation != Allocation::Data
}
