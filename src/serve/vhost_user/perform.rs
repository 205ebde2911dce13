//! Does what a request asks, on the disk. virtio 1.2, 5.2.6.

use super::request::{Malformed, Memory, Operation, Request, SECTOR};
use super::transfer::Places;
use crate::ground::range::ByteRange;
use crate::serve::disk::Disk;
use std::cell::RefCell;
use std::io;
use virtio_bindings::virtio_blk as blk;

/// Bytes that are moved at once; no guest's request makes us hold more. Small enough to stay in a processor's own cache
/// between its two copies.
const PIECE: u64 = 128 << 10;
/// Ranges of one discard or write-zeroes.
pub const MOST_RANGES: u32 = 32;
/// Sectors of one such range.
pub const MOST_SECTORS: u32 = 1 << 22;
/// Bytes of a range: sector, count of sectors, flags.
const RANGE: usize = 16;
/// Of a range: what it held may be given back.
const UNMAP: u32 = blk::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;

/// How a request went, for the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// Done.
    Ok,
    /// Not done, or not all of it.
    Failed,
    /// Nothing that this disk does.
    Unsupported,
}

impl Status {
    /// As in the chain's last byte.
    pub fn byte(self) -> u8 {
        let status = match self {
            Self::Ok => blk::VIRTIO_BLK_S_OK,
            Self::Failed => blk::VIRTIO_BLK_S_IOERR,
            Self::Unsupported => blk::VIRTIO_BLK_S_UNSUPP,
        };
        status as u8
    }
}

impl From<io::Error> for Status {
    fn from(_: io::Error) -> Self {
        Self::Failed
    }
}

impl From<Malformed> for Status {
    fn from(_: Malformed) -> Self {
        Self::Failed
    }
}

thread_local! {
    /// Guests may change their memory at any time, so what is read or written is a copy.
    static BUFFER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Does what `request` asks. Blocks. `through`: what was changed is on stable
/// storage before the guest hears of it.
pub fn perform(disk: &Disk, request: &Request, memory: &Memory, through: bool) -> Status {
    let done = match request.operation {
        Operation::Read => read(disk, request, memory),
        Operation::Write => write(disk, request, memory),
        Operation::Flush => disk.flush().map_err(Status::from),
        Operation::Identify => identify(disk, request, memory),
        Operation::Discard | Operation::WriteZeroes => change_ranges(disk, request, memory),
        Operation::Other => Err(Status::Unsupported),
    };
    let changes = matches!(request.operation, Operation::Write | Operation::Discard | Operation::WriteZeroes);
    let done = done.and_then(|()| if through && changes { disk.flush().map_err(Status::from) } else { Ok(()) });
    done.err().unwrap_or(Status::Ok)
}

/// What a request would change, as far as it makes sense.
pub fn changes(request: &Request, memory: &Memory) -> Vec<ByteRange> {
    let range = |sector: u64, length| ByteRange::checked(sector.checked_mul(SECTOR)?, length);
    match request.operation {
        Operation::Write => range(request.sector, request.input.length()).into_iter().collect(),
        Operation::Discard | Operation::WriteZeroes => {
            let ranges = ranges(request, memory).unwrap_or_default();
            ranges.iter().filter_map(|asked| range(asked.sector, u64::from(asked.sectors) * SECTOR)).collect()
        }
        _ => Vec::new(),
    }
}

/// Where `length` bytes from `sector` on are, if they are on the disk and whole sectors.
fn place(disk: &Disk, sector: u64, length: u64) -> Result<ByteRange, Status> {
    let offset = sector.checked_mul(SECTOR).ok_or(Status::Failed)?;
    let range = ByteRange::checked(offset, length).ok_or(Status::Failed)?;
    // A last part of a sector is not seen by the guest.
    if length.is_multiple_of(SECTOR) && range.end() <= disk.length() / SECTOR * SECTOR {
        Ok(range)
    } else {
        Err(Status::Failed)
    }
}

/// Calls `step` with a buffer for each piece of `range`, and where in the range it begins.
fn in_pieces(range: ByteRange, mut step: impl FnMut(&mut [u8], u64, u64) -> Result<(), Status>) -> Result<(), Status> {
    BUFFER.with_borrow_mut(|buffer| {
        let mut done = 0;
        while done < range.length {
            let length = (range.length - done).min(PIECE) as usize;
            if buffer.len() < length {
                buffer.resize(length, 0);
            }
            step(&mut buffer[..length], range.offset + done, done)?;
            done += length as u64;
        }
        Ok(())
    })
}

fn read(disk: &Disk, request: &Request, memory: &Memory) -> Result<(), Status> {
    let range = place(disk, request.sector, request.output.length())?;
    if request.input.length() > 0 {
        return Err(Status::Failed);
    }
    if let Some(file) = disk.plain_file() {
        return Ok(Places::of(&request.output, memory)?.read(file, range.offset)?);
    }
    in_pieces(range, |buffer, offset, done| {
        disk.read(buffer, offset)?;
        Ok(request.output.copy_from(memory, done, buffer)?)
    })
}

fn write(disk: &Disk, request: &Request, memory: &Memory) -> Result<(), Status> {
    let range = place(disk, request.sector, request.input.length())?;
    // Half of a write is not done for a guest that does not have the other half.
    let places = Places::of(&request.input, memory)?;
    if request.output.length() > 0 {
        return Err(Status::Failed);
    }
    if disk.write_by(range, |file| places.write(file, range.offset))? {
        return Ok(());
    }
    in_pieces(range, |buffer, offset, done| {
        request.input.copy_to(memory, done, buffer)?;
        Ok(disk.write(buffer, offset)?)
    })
}

/// 20 bytes that say which disk it is, filled up with zeroes.
fn identify(disk: &Disk, request: &Request, memory: &Memory) -> Result<(), Status> {
    let mut name = [0; blk::VIRTIO_BLK_ID_BYTES as usize];
    let length = disk.name().len().min(name.len());
    name[..length].copy_from_slice(&disk.name().as_bytes()[..length]);
    let length = request.output.length().min(name.len() as u64) as usize;
    Ok(request.output.copy_from(memory, 0, &name[..length])?)
}

/// Of a discard or write-zeroes.
struct Range {
    sector: u64,
    sectors: u32,
    flags: u32,
}

fn ranges(request: &Request, memory: &Memory) -> Result<Vec<Range>, Status> {
    let length = request.input.length();
    if length == 0 || !length.is_multiple_of(RANGE as u64) || length > u64::from(MOST_RANGES) * RANGE as u64 {
        return Err(Status::Failed);
    }
    let mut bytes = vec![0; length as usize];
    request.input.copy_to(memory, 0, &mut bytes)?;
    let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    let range = |at: usize| Range {
        sector: u64::from(word(at + 4)) << 32 | u64::from(word(at)),
        sectors: word(at + 8),
        flags: word(at + 12),
    };
    Ok((0..bytes.len()).step_by(RANGE).map(range).collect())
}

/// Either all ranges make sense, or nothing is changed.
fn change_ranges(disk: &Disk, request: &Request, memory: &Memory) -> Result<(), Status> {
    let zeroes = request.operation == Operation::WriteZeroes;
    let allowed = if zeroes { UNMAP } else { 0 };
    let mut checked = Vec::new();
    for range in ranges(request, memory)? {
        if range.flags & !allowed != 0 {
            return Err(Status::Unsupported);
        }
        if range.sectors > MOST_SECTORS {
            return Err(Status::Failed);
        }
        let place = place(disk, range.sector, u64::from(range.sectors) * SECTOR)?;
        checked.push((place, range.flags & UNMAP != 0));
    }
    for (range, unmap) in checked {
        if zeroes { disk.write_zeroes(range, unmap) } else { disk.discard(range) }?;
    }
    Ok(())
}

#[cfg(test)]
mod tests;
