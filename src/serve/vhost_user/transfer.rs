//! Between a file and the guest's memory, without a copy in between. The room of this module's unsafe code.
#![allow(unsafe_code)]

use super::request::{Malformed, Memory, Stream};
use nix::libc;
use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::os::fd::AsRawFd;
use vm_memory::volatile_memory::PtrGuardMut;

/// Where bytes of the guest's memory are in ours.
pub struct Places<'a> {
    places: Vec<libc::iovec>,
    /// Keep them there.
    _guards: Vec<PtrGuardMut>,
    _memory: PhantomData<&'a Memory>,
}

impl<'a> Places<'a> {
    /// Of all bytes of `stream`, in order; [`Malformed`] when not all are in the guest's memory.
    pub fn of(stream: &Stream, memory: &'a Memory) -> Result<Self, Malformed> {
        let guards: Vec<PtrGuardMut> = stream.slices(memory)?.iter().map(|slice| slice.ptr_guard_mut()).collect();
        let place = |guard: &PtrGuardMut| libc::iovec { iov_base: guard.as_ptr().cast(), iov_len: guard.len() };
        Ok(Self { places: guards.iter().map(place).collect(), _guards: guards, _memory: PhantomData })
    }

    /// Fills them from byte `offset` of `file`. Blocks. Never short.
    pub fn read(self, file: &File, offset: u64) -> io::Result<()> {
        // SAFETY: each place is in a mapping of the guest's memory, which is borrowed for as long as this is. Only the kernel
        // writes there, and nobody holds a reference: the memory is the guest's as well, and is used by raw pointers alone.
        self.each(offset, |places, count, at| unsafe { libc::preadv64(file.as_raw_fd(), places, count, at) })
    }

    /// Writes them at byte `offset` of `file`. Blocks. Never short.
    pub fn write(self, file: &File, offset: u64) -> io::Result<()> {
        // SAFETY: as for `read`; here the kernel only reads them.
        self.each(offset, |places, count, at| unsafe { libc::pwritev64(file.as_raw_fd(), places, count, at) })
    }

    /// Calls `step` until all is done.
    fn each(mut self, offset: u64, step: impl Fn(*const libc::iovec, libc::c_int, i64) -> isize) -> io::Result<()> {
        let (mut next, mut offset) = (0, offset);
        loop {
            while self.places.get(next).is_some_and(|place| place.iov_len == 0) {
                next += 1;
            }
            let left = &self.places[next..];
            if left.is_empty() {
                return Ok(());
            }
            let count = left.len().min(libc::UIO_MAXIOV as usize) as libc::c_int;
            let at = i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
            let moved = match step(left.as_ptr(), count, at) {
                0 => return Err(io::ErrorKind::UnexpectedEof.into()),
                moved if moved > 0 => moved as usize,
                _ => match io::Error::last_os_error() {
                    e if e.kind() == io::ErrorKind::Interrupted => continue,
                    e => return Err(e),
                },
            };
            offset += moved as u64;
            self.skip(next, moved);
        }
    }

    /// Takes `count` bytes away from the places from `next` on.
    fn skip(&mut self, next: usize, count: usize) {
        let mut left = count;
        for place in &mut self.places[next..] {
            let taken = left.min(place.iov_len);
            place.iov_base = place.iov_base.cast::<u8>().wrapping_add(taken).cast();
            place.iov_len -= taken;
            left -= taken;
        }
    }
}
