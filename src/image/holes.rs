//! Zeroes and holes without sending bytes: what the file system or the device offers, found out once and remembered.

use super::medium::Medium;
use super::sys;
use crate::ground::range::ByteRange;
use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

/// What one file or device turned out not to support.
#[derive(Debug, Default)]
pub struct Holes {
    no_punch: AtomicBool,
    no_zero_range: AtomicBool,
    no_discard: AtomicBool,
}

impl Holes {
    /// Makes `range` read as zeroes, a hole if that is possible. False when it takes bytes. On a device `range` must
    /// be whole sectors; a file is not made longer.
    pub fn zero(&self, file: &File, range: ByteRange) -> io::Result<bool> {
        // On a device the kernel punches only where the device itself can; ZERO_RANGE may make the kernel write.
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let zero = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        Ok(try_once(&self.no_punch, || rustix::fs::fallocate(file, punch, range.offset, range.length))?
            || try_once(&self.no_zero_range, || rustix::fs::fallocate(file, zero, range.offset, range.length))?)
    }

    /// Makes `range` of a file, which is not made longer, read as zeroes with its space allocated. False when it takes bytes.
    pub fn zero_allocated(&self, file: &File, range: ByteRange) -> io::Result<bool> {
        let zero = FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE;
        try_once(&self.no_zero_range, || rustix::fs::fallocate(file, zero, range.offset, range.length))
    }

    /// Gives up the contents of `range`; whole sectors on a device. Nothing happens where that is not supported.
    pub fn discard(&self, file: &File, medium: Medium, range: ByteRange) -> io::Result<()> {
        let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match medium {
            Medium::File => try_once(&self.no_punch, || rustix::fs::fallocate(file, punch, range.offset, range.length)),
            Medium::Device { .. } => try_once(&self.no_discard, || {
                sys::discard_device(file, range).map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))
            }),
        }
        .map(|_| ())
    }
}

/// False, now and from now on, when the call is not supported here.
fn try_once(unsupported: &AtomicBool, call: impl Fn() -> rustix::io::Result<()>) -> io::Result<bool> {
    if unsupported.load(Relaxed) {
        return Ok(false);
    }
    loop {
        match call() {
            Ok(()) => return Ok(true),
            Err(Errno::INTR) => {}
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::NOTTY | Errno::INVAL | Errno::NODEV) => {
                unsupported.store(true, Relaxed);
                return Ok(false);
            }
            Err(errno) => return Err(errno.into()),
        }
    }
}
