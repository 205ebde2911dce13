//! Reads a whole disk with all cores and adds up what it holds. Holes are known by their status and not read.

use crate::digest::{BLOCK, Digest, Found, Sums};
use crate::error::{Error, Kind, Result, Side};
use crate::ground::policy::Action;
use crate::ground::range::{Allocation, ByteRange};
use crate::image::Image;
use crate::job::{Gate, Job};
use crate::monitor::{Event, Monitor};
use crate::sandbox::{self, Reach};
use memmap2::MmapMut;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;

/// Bytes read at once.
const CHUNK: u64 = 1 << 20;
/// Bytes looked at once for holes.
const LOOK: u64 = 1 << 30;

/// One reading of a disk.
pub struct Scan<'a> {
    /// Can pause, slow down and cancel it; counts what was read back.
    pub job: &'a Job,
    /// Hears of errors.
    pub monitor: &'a dyn Monitor,
    /// What is read, from its first byte on.
    pub image: &'a dyn Image,
    /// For messages.
    pub side: Side,
    /// What its reading threads need.
    pub reach: Reach,
}

/// What was found.
pub struct Scanned {
    /// What could be read; what could not counts as zeroes.
    pub found: Found,
    /// Blocks that could not be read, in no order.
    pub unreadable: Vec<u64>,
}

struct State {
    next: u64,
    unreadable: Vec<u64>,
}

struct Work<'a> {
    scan: &'a Scan<'a>,
    length: u64,
    sums: Sums,
    state: Mutex<State>,
}

enum Piece {
    Zeroes(ByteRange),
    /// A block.
    Data(ByteRange),
}

impl Scan<'_> {
    /// Reads the first `length` bytes with `workers` threads, and compares with what is `expected`, if anything. Goes on after
    /// errors: the monitor hears of each, and its block counts as unreadable. [`Kind::Cancelled`] when the job was.
    pub fn run(&self, length: u64, expected: Option<Arc<Digest>>, workers: usize) -> Result<Scanned> {
        let state = Mutex::new(State { next: 0, unreadable: Vec::new() });
        let work = Work { scan: self, length, sums: Sums::new(length, expected), state };
        let results = thread::scope(|scope| {
            // None of them is the caller's: what they give up it may need again.
            let threads: Vec<_> = (0..workers.max(1)).map(|_| scope.spawn(|| work.run())).collect();
            let panicked = |_| Err(Error::new(Kind::Other, "a reading thread panicked"));
            threads.into_iter().map(|thread| thread.join().unwrap_or_else(panicked)).collect::<Vec<_>>()
        });
        results.into_iter().collect::<Result<()>>()?;
        let unreadable = work.state.into_inner().unwrap_or_else(PoisonError::into_inner).unreadable;
        // Nothing was put off, so there is nothing to stop.
        let found = work.sums.finish().and_then(|summed| summed.found(1, &|| true));
        let found = found.ok_or_else(|| Error::new(Kind::Other, "not every block was read"))?;
        Ok(Scanned { found, unreadable })
    }
}

impl Work<'_> {
    fn run(&self) -> Result<()> {
        sandbox::enter(self.scan.reach);
        let mut buffer = MmapMut::map_anon(CHUNK as usize)
            .map_err(|error| Error::new(Kind::Other, format!("no memory for a buffer: {error}")))?;
        loop {
            if self.scan.job.gate() == Gate::Cancelled {
                return Err(Error::new(Kind::Cancelled, "cancelled"));
            }
            let range = match self.next() {
                None => return Ok(()),
                Some(Piece::Zeroes(range)) => {
                    self.sums.add_zeroes(range);
                    range
                }
                Some(Piece::Data(range)) => {
                    self.read(range, &mut buffer);
                    self.scan.job.charge(range.length);
                    range
                }
            };
            self.scan.job.count_verified(range.length);
        }
    }

    /// A block to read, or whole blocks that need not be.
    fn next(&self) -> Option<Piece> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let rest = ByteRange::between(state.next, self.length);
        if rest.is_empty() {
            return None;
        }
        let zeroes = match self.scan.image.block_status(rest.prefix(LOOK)) {
            Ok(extent) if extent.allocation != Allocation::Data => extent.range,
            // Where the status can't be told, reading will tell what is wrong.
            _ => rest.prefix(0),
        };
        let whole = if zeroes.end() == self.length { zeroes.length } else { zeroes.length / BLOCK * BLOCK };
        let piece = match whole {
            0 => Piece::Data(rest.prefix(BLOCK)),
            whole => Piece::Zeroes(rest.prefix(whole)),
        };
        let (Piece::Zeroes(range) | Piece::Data(range)) = piece;
        state.next = range.end();
        Some(piece)
    }

    fn read(&self, block: ByteRange, buffer: &mut [u8]) {
        let mut rest = block;
        while !rest.is_empty() {
            let piece = rest.prefix(buffer.len() as u64);
            let bytes = &mut buffer[..piece.length as usize];
            if let Err(error) = self.scan.image.read_at(bytes, piece.offset) {
                let error = Error::io(self.scan.side, "read back", piece, error);
                self.scan.job.count_error();
                self.scan.monitor.event(Event::Fault { error: &error, action: Action::Ignore });
                self.state.lock().unwrap_or_else(PoisonError::into_inner).unreadable.push(block.offset / BLOCK);
                self.sums.add_zeroes(rest);
                return;
            }
            self.sums.add(piece.offset, bytes);
            rest = ByteRange::between(piece.end(), block.end());
        }
    }
}
