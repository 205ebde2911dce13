//! The system calls that neither rustix nor nix wraps safely. The only unsafe code below the ring.
#![allow(unsafe_code)]

use super::medium::Identity;
use crate::ground::range::ByteRange;
use nix::libc;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;

mod raw {
    use nix::libc;

    // linux/fs.h: _IO(0x12, 119), with a pointer to {start, length} in bytes.
    nix::ioctl_write_ptr_bad!(blkdiscard, nix::request_code_none!(0x12, 119), [u64; 2]);
    // linux/loop.h: LOOP_GET_STATUS64.
    nix::ioctl_read_bad!(loop_get_status64, 0x4C05, LoopStatus);

    /// `struct loop_info64` of linux/loop.h: 232 bytes, of which the first 40 matter here.
    #[repr(C)]
    pub struct LoopStatus {
        pub device: u64,
        pub inode: u64,
        pub rdevice: u64,
        pub offset: u64,
        pub size_limit: u64,
        pub rest: [u64; 24],
    }
    const _: () = assert!(size_of::<LoopStatus>() == 232);
    const _: () = assert!(size_of::<libc::off64_t>() == 8);
}

/// Starts writing out dirty pages of the whole file without waiting for them. May block while the device's queue is
/// full.
pub fn start_writeback(file: &File) -> io::Result<()> {
    // SAFETY: takes no pointer; `file` keeps the descriptor open during the call.
    match unsafe { libc::sync_file_range(file.as_raw_fd(), 0, 0, libc::SYNC_FILE_RANGE_WRITE) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Tells a block device that `range` is no longer needed. Blocks. `range` must be whole sectors.
pub fn discard_device(file: &File, range: ByteRange) -> io::Result<()> {
    // SAFETY: BLKDISCARD reads two u64 from the pointer, which is to an array of two that outlives the call.
    unsafe { raw::blkdiscard(file.as_raw_fd(), &[range.offset, range.length]) }?;
    Ok(())
}

/// What a loop device is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoopBacking {
    /// The file's own.
    pub identity: Identity,
    /// The device number, when the backing file is a block device.
    pub block_device: Option<u64>,
    /// First byte of the file that the device shows.
    pub offset: u64,
    /// Bytes of the file that it shows at most; `None`: up to the file's end.
    pub size_limit: Option<u64>,
}

/// The file behind a loop device; `ENXIO` when it has none, `ENOTTY` when `file` is no loop device.
pub fn loop_backing(file: &File) -> io::Result<LoopBacking> {
    let mut status = raw::LoopStatus { device: 0, inode: 0, rdevice: 0, offset: 0, size_limit: 0, rest: [0; 24] };
    // SAFETY: LOOP_GET_STATUS64 fills a struct loop_info64, whose size LoopStatus has (asserted above); every bit
    // pattern is a valid LoopStatus.
    unsafe { raw::loop_get_status64(file.as_raw_fd(), &mut status) }?;
    Ok(LoopBacking {
        identity: Identity { device: decode_device(status.device), inode: status.inode },
        block_device: Some(decode_device(status.rdevice)).filter(|&device| device != 0),
        offset: status.offset,
        size_limit: Some(status.size_limit).filter(|&limit| limit != 0),
    })
}

/// The loop driver gives device numbers in the kernel's old wide encoding, stat gives glibc's.
fn decode_device(encoded: u64) -> u64 {
    let major = (encoded & 0xfff00) >> 8;
    let minor = (encoded & 0xff) | ((encoded >> 12) & 0xfff00);
    libc::makedev(major as u32, minor as u32)
}

/// The child that `command` starts gets SIGKILL when the thread that starts it ends, however the process ends. It has its standard
/// streams, and nothing else of what we were started with.
#[cfg(feature = "nbd")]
pub fn die_with_us(command: &mut std::process::Command) {
    use std::os::unix::process::CommandExt;
    let parent = rustix::process::getpid();
    let in_child = move || {
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
        close_others_on_exec();
        // The parent may have died before.
        if rustix::process::getppid() == Some(parent) { Ok(()) } else { Err(io::ErrorKind::BrokenPipe.into()) }
    };
    // SAFETY: between fork and exec the closure makes three system calls, and none of them allocates or locks: an `io::Error` of an
    // errno or of a kind is a plain value.
    unsafe { command.pre_exec(in_child) };
}

/// Descriptors from 3 on. Kernels before 5.11 can't: they stay as they are.
#[cfg(feature = "nbd")]
fn close_others_on_exec() {
    const CLOEXEC: libc::c_uint = 1 << 2; // CLOSE_RANGE_CLOEXEC of linux/close_range.h
    // SAFETY: takes no pointer, and closes nothing in this process.
    unsafe { libc::syscall(libc::SYS_close_range, 3 as libc::c_uint, libc::c_uint::MAX, CLOEXEC) };
}
