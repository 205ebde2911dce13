//! What a guest asks: a chain of descriptors, looked at before anything is done. virtio 1.2, 2.7 and 5.2.6.
//!
//! The guest is distrusted. Addresses may point anywhere, lengths may be anything below 4 GiB together, chains may loop or break
//! off, and the memory may change while we look: each byte that decides something is copied once, then checked.

use virtio_bindings::virtio_blk as blk;
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Address, Bytes, GuestAddress, GuestMemory, GuestMemoryMmap, Permissions, VolatileSlice};

/// Unit of positions and lengths in requests, whatever the disk's block size.
pub const SECTOR: u64 = 512;
/// Descriptors of one chain; the guest is told of fewer.
const MOST_PIECES: usize = 1024;
/// Bytes before the data: type, reserved, sector.
const HEADER: u64 = 16;

/// The guest's memory.
pub type Memory = GuestMemoryMmap<()>;

/// The chain makes no sense, or is not in the guest's memory: there is no place for an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Malformed;

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// VIRTIO_BLK_T_IN.
    Read,
    /// VIRTIO_BLK_T_OUT.
    Write,
    /// VIRTIO_BLK_T_FLUSH.
    Flush,
    /// VIRTIO_BLK_T_GET_ID.
    Identify,
    /// VIRTIO_BLK_T_DISCARD.
    Discard,
    /// VIRTIO_BLK_T_WRITE_ZEROES.
    WriteZeroes,
    /// Something that we did not offer.
    Other,
}

impl Operation {
    fn of(kind: u32) -> Self {
        match kind {
            blk::VIRTIO_BLK_T_IN => Self::Read,
            blk::VIRTIO_BLK_T_OUT => Self::Write,
            blk::VIRTIO_BLK_T_FLUSH => Self::Flush,
            blk::VIRTIO_BLK_T_GET_ID => Self::Identify,
            blk::VIRTIO_BLK_T_DISCARD => Self::Discard,
            blk::VIRTIO_BLK_T_WRITE_ZEROES => Self::WriteZeroes,
            _ => Self::Other,
        }
    }
}

/// Bytes of the guest's memory, in pieces. They may lie outside of it: whoever touches them finds out.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stream {
    pieces: Vec<(GuestAddress, u32)>,
    length: u64,
}

impl Stream {
    fn push(&mut self, address: GuestAddress, length: u32) {
        // Fewer than 2^32 bytes in a chain, so this does not overflow.
        self.length += u64::from(length);
        self.pieces.push((address, length));
    }

    /// In bytes.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Cuts off all but the first `count` bytes, of which it has at least so many.
    fn keep_first(&mut self, count: u64) {
        let mut left = count;
        for (_, length) in &mut self.pieces {
            *length = (*length).min(u32::try_from(left).unwrap_or(u32::MAX));
            left -= u64::from(*length);
        }
        self.length = count;
    }

    /// Cuts off the first `count` bytes.
    fn skip(&mut self, count: u64) {
        self.pieces = self.part(count, self.length.saturating_sub(count)).collect();
        self.length = self.length.saturating_sub(count);
    }

    /// Where the bytes from `from` are, `length` of them or as many as there are.
    fn part(&self, from: u64, length: u64) -> impl Iterator<Item = (GuestAddress, u32)> {
        let (mut skip, mut left) = (from, length);
        self.pieces.iter().filter_map(move |&(address, size)| {
            let skipped = skip.min(u64::from(size));
            let taken = (u64::from(size) - skipped).min(left);
            skip -= skipped;
            left -= taken;
            // Past the end of addresses: nothing is there, and nobody is told of another place.
            let address = address.checked_add(skipped).unwrap_or(GuestAddress(u64::MAX));
            (taken > 0).then_some((address, taken as u32))
        })
    }

    /// Fills `buf` with what is at `from`.
    pub fn copy_to(&self, memory: &Memory, from: u64, buf: &mut [u8]) -> Result<(), Malformed> {
        let mut done = 0;
        for (address, length) in self.part(from, buf.len() as u64) {
            let part = &mut buf[done..done + length as usize];
            memory.read_slice(part, address).map_err(|_| Malformed)?;
            done += length as usize;
        }
        if done == buf.len() { Ok(()) } else { Err(Malformed) }
    }

    /// Puts `bytes` there, at `from`.
    pub fn copy_from(&self, memory: &Memory, from: u64, bytes: &[u8]) -> Result<(), Malformed> {
        let mut done = 0;
        for (address, length) in self.part(from, bytes.len() as u64) {
            memory.write_slice(&bytes[done..done + length as usize], address).map_err(|_| Malformed)?;
            done += length as usize;
        }
        if done == bytes.len() { Ok(()) } else { Err(Malformed) }
    }

    /// Where all of it is in our memory; [`Malformed`] if a part is not in the guest's.
    pub fn slices<'a>(&self, memory: &'a Memory) -> Result<Vec<VolatileSlice<'a>>, Malformed> {
        let mut slices = Vec::with_capacity(self.pieces.len());
        for &(address, length) in self.pieces.iter().filter(|(_, length)| *length > 0) {
            // Of one piece there are several where regions of memory meet.
            for slice in GuestMemory::get_slices(memory, address, length as usize, Permissions::ReadWrite)
                .map_err(|_| Malformed)?
            {
                slices.push(slice.map_err(|_| Malformed)?);
            }
        }
        let found: u64 = slices.iter().map(|slice| slice.len() as u64).sum();
        if found == self.length { Ok(slices) } else { Err(Malformed) }
    }
}

/// A request, looked at but for its bounds on the disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// What is to be done.
    pub operation: Operation,
    /// Where, in sectors.
    pub sector: u64,
    /// From the guest: data to write, or ranges.
    pub input: Stream,
    /// For the guest: data that was read.
    pub output: Stream,
    status: GuestAddress,
}

impl Request {
    /// Takes a chain to pieces: what the device reads, 16 bytes of header first, then what it writes, the status last. How
    /// these are cut into descriptors means nothing (virtio 1.2, 2.7.4.2).
    pub fn parse(chain: impl Iterator<Item = Descriptor>, memory: &Memory) -> Result<Self, Malformed> {
        let (mut input, mut output) = (Stream::default(), Stream::default());
        let mut more = true;
        for descriptor in chain.take(MOST_PIECES) {
            more = descriptor.has_next();
            if descriptor.is_write_only() {
                output.push(descriptor.addr(), descriptor.len());
            } else if output.pieces.is_empty() {
                input.push(descriptor.addr(), descriptor.len());
            } else {
                return Err(Malformed);
            }
        }
        // The iterator stops at what it can't follow, and so does a loop.
        if more || input.length < HEADER || output.length == 0 {
            return Err(Malformed);
        }
        let (kind, sector) = header(&input, memory)?;
        input.skip(HEADER);
        let (status, _) = output.part(output.length - 1, 1).next().ok_or(Malformed)?;
        if !GuestMemory::check_range(memory, status, 1, Permissions::Write) {
            return Err(Malformed);
        }
        output.keep_first(output.length - 1);
        Ok(Self { operation: Operation::of(kind), sector, input, output, status })
    }

    /// Bytes that it moves, at most.
    pub fn length(&self) -> u64 {
        self.input.length() + self.output.length()
    }

    /// Tells the guest how it went, and returns how many bytes it was given in all, counted from the first.
    pub fn answer(&self, memory: &Memory, status: u8) -> u32 {
        // Its memory was there when the request was looked at; if it has gone meanwhile, nobody waits for the answer.
        let _ = memory.write_obj(status, self.status);
        let filled =
            self.output.length == 0 || self.operation == Operation::Read && u32::from(status) == blk::VIRTIO_BLK_S_OK;
        if filled { self.output.length as u32 + 1 } else { 0 }
    }
}

fn header(input: &Stream, memory: &Memory) -> Result<(u32, u64), Malformed> {
    let mut bytes = [0; HEADER as usize];
    input.copy_to(memory, 0, &mut bytes)?;
    let [kind, _, low, high] = std::array::from_fn(|word| {
        let at = word * 4;
        u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
    });
    Ok((kind, u64::from(high) << 32 | u64::from(low)))
}

#[cfg(test)]
mod tests;
