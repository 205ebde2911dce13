//! Shared memory: the one room of the ring where memory of two processes is given a type.
//!
//! Both memories are memfds whose size is sealed, so that no peer can make an access fault by shrinking them, and both
//! are only ever seen as atomics, for which every bit pattern is a value. The backup makes them; a writer checks what
//! it is handed. The bitmap is sealed against writing once the backup has mapped it: a writer can only read it.
#![allow(unsafe_code)]

use super::bits;
use super::layout::at;
use super::queue::Region;
use crate::ground::cluster::Clusters;
use memmap2::{MmapOptions, MmapRaw};
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags};
use rustix::io::retry_on_intr;
use std::io;
use std::ops::Deref;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::AtomicU64;

const SIZE_SEALS: SealFlags = SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::SEAL);

/// The ring of one writer and one backup.
#[derive(Debug)]
pub struct Ring {
    map: MmapRaw,
}

/// The bitmap of the clusters that are free to overwrite.
#[derive(Debug)]
pub struct Bits {
    map: MmapRaw,
    writable: bool,
}

fn memory(name: &str, bytes: u64) -> io::Result<OwnedFd> {
    let fd = rustix::fs::memfd_create(name, MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING)?;
    retry_on_intr(|| rustix::fs::ftruncate(&fd, bytes))?;
    Ok(fd)
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

/// Is this a memfd of exactly `bytes`, and will it stay one?
fn check(fd: &OwnedFd, bytes: u64) -> io::Result<()> {
    let seals = rustix::fs::fcntl_get_seals(fd).map_err(|_| invalid("the shared memory is no memfd"))?;
    if !seals.contains(SIZE_SEALS) {
        return Err(invalid("the size of the shared memory is not sealed"));
    }
    match rustix::fs::fstat(fd)?.st_size {
        size if u64::try_from(size) == Ok(bytes) => Ok(()),
        size => Err(invalid(&format!("the shared memory has {size} bytes, not {bytes}"))),
    }
}

impl Ring {
    /// A fresh ring, and the descriptor to pass to the writer.
    pub fn create() -> io::Result<(Self, OwnedFd)> {
        let fd = memory("drive-backup-ring", at::END as u64)?;
        // Its pages exist from now on: no access can fail for want of memory.
        retry_on_intr(|| rustix::fs::fallocate(&fd, FallocateFlags::empty(), 0, at::END as u64))?;
        rustix::fs::fcntl_add_seals(&fd, SIZE_SEALS)?;
        let ring = Self { map: MmapOptions::new().len(at::END).map_raw(&fd)? };
        ring.label();
        Ok((ring, fd))
    }

    /// The ring that a backup passed.
    pub fn receive(fd: OwnedFd) -> io::Result<Self> {
        check(&fd, at::END as u64)?;
        let ring = Self { map: MmapOptions::new().len(at::END).map_raw(&fd)? };
        if ring.is_labelled() { Ok(ring) } else { Err(invalid("the ring is not of this version")) }
    }
}

impl Deref for Ring {
    type Target = Region;

    fn deref(&self) -> &Region {
        const { assert!(size_of::<Region>() == at::END && align_of::<Region>() <= 4096) };
        // SAFETY: the mapping is page-aligned, `at::END` bytes long, writable, and lives as long as `self`; its file
        // can't shrink (sealed). Region consists of atomics and padding alone, which are valid for any bytes and may
        // be changed by others at any time.
        unsafe { &*self.map.as_ptr().cast::<Region>() }
    }
}

impl Bits {
    /// A bitmap of `bytes`, all clear, and the descriptor to pass to writers, through which nobody can write.
    pub fn create(bytes: u64) -> io::Result<(Self, OwnedFd)> {
        let fd = memory("drive-backup-free", bytes)?;
        let bits = Self { map: MmapOptions::new().len(bytes as usize).map_raw(&fd)?, writable: true };
        rustix::fs::fcntl_add_seals(&fd, SIZE_SEALS | SealFlags::FUTURE_WRITE)?;
        Ok((bits, fd))
    }

    /// The bitmap that a backup passed.
    pub fn receive(fd: impl AsFd, bytes: u64) -> io::Result<Self> {
        let fd = fd.as_fd().try_clone_to_owned()?;
        check(&fd, bytes)?;
        let length = usize::try_from(bytes).map_err(|_| invalid("the bitmap does not fit into memory"))?;
        Ok(Self { map: MmapOptions::new().len(length).map_raw_read_only(&fd)?, writable: false })
    }

    fn words(&self) -> &[AtomicU64] {
        // SAFETY: the mapping is page-aligned, a multiple of 8 bytes long (whole pages), and lives as long as `self`;
        // its file can't shrink (sealed). Any bytes are valid atomics. Where it is mapped read-only only loads are
        // done: `free` refuses.
        unsafe { std::slice::from_raw_parts(self.map.as_ptr().cast(), self.map.len() / size_of::<AtomicU64>()) }
    }

    /// Sets the bits of `clusters`, for every writer to see. Only on the side that created it.
    pub fn free(&self, clusters: Clusters) {
        assert!(self.writable, "the backup's own bitmap");
        bits::free(self.words(), clusters);
    }

    /// The first of `clusters` that a writer has to ask for.
    pub fn first_held(&self, clusters: Clusters) -> Option<u64> {
        bits::first_held(self.words(), clusters)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::mm::{MapFlags, ProtFlags};

    #[test]
    fn both_sides_see_one_ring() {
        let (backup, fd) = Ring::create().unwrap();
        let writer = Ring::receive(fd).unwrap();
        writer.count_write(0);
        writer.mark_broken(super::super::layout::Breach::NoAnswer);
        assert_eq!((backup.counted().0, backup.broken()), (1, 1));
    }

    #[test]
    fn both_sides_see_one_bitmap() {
        let (backup, fd) = Bits::create(8192).unwrap();
        let writer = Bits::receive(&fd, 8192).unwrap();
        backup.free(3..40_000);
        assert_eq!(writer.first_held(3..40_000), None);
        assert_eq!(writer.first_held(2..40_001), Some(2));
        assert_eq!(writer.first_held(3..40_001), Some(40_000));
    }

    #[test]
    fn nobody_can_write_through_the_bitmaps_descriptor() {
        let (_backup, fd) = Bits::create(4096).unwrap();
        assert!(MmapOptions::new().map_raw(&fd).is_err());
        assert_eq!(rustix::io::pwrite(&fd, b"x", 0), Err(rustix::io::Errno::PERM));
        let reopened = std::fs::OpenOptions::new()
            .write(true)
            .open(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd)));
        assert!(reopened.is_err_and(|e| e.raw_os_error() == Some(1)) || MmapOptions::new().map_raw(&fd).is_err());
        // SAFETY: a mapping that nobody uses.
        let shared = unsafe {
            let flags = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED);
            rustix::mm::mmap(std::ptr::null_mut(), 4096, flags.0, flags.1, &fd, 0)
        };
        assert_eq!(shared.err(), Some(rustix::io::Errno::PERM));
    }

    #[test]
    fn memory_that_could_shrink_or_has_another_size_is_refused() {
        let refused = |fd| Ring::receive(fd).unwrap_err().to_string();
        assert!(refused(memory("unsealed", 8192).unwrap()).contains("not sealed"));
        let short = memory("short", 4096).unwrap();
        rustix::fs::fcntl_add_seals(&short, SIZE_SEALS).unwrap();
        assert!(refused(short).contains("4096 bytes, not 8192"));
        let foreign = memory("foreign", 8192).unwrap();
        rustix::fs::fcntl_add_seals(&foreign, SIZE_SEALS).unwrap();
        assert!(refused(foreign).contains("version"));
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        assert!(refused(file.into()).contains("no memfd"));
        let (_, fd) = Bits::create(4096).unwrap();
        assert!(Bits::receive(&fd, 8192).is_err());
    }
}
