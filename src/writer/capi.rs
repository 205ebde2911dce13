//! The writer for programs in C: include/drive_backup.h is made from this file, and a test compares the two.
//!
//! Unsafe because C promises what Rust would check: each function's text says what. No panic leaves a function: one
//! that would is a bug here, and is answered with -EIO.
#![allow(unsafe_code)]

use super::Writer;
use rustix::io::Errno;
use std::ffi::{CStr, OsStr, c_char, c_int, c_void};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

/// A disk that this process writes.
#[derive(Debug)]
#[allow(non_camel_case_types)]
pub struct drive_backup_writer {
    writer: Writer,
}

/// The callback's argument crosses to the thread that runs it; the header says so.
struct Argument(*mut c_void);

// SAFETY: the pointer is only handed back to the program's callback, which the program made for being called from
// another thread.
unsafe impl Send for Argument {}

/// The errno of an error that has one, or the nearest.
fn errno(raw: Option<i32>, kind: Option<io::ErrorKind>) -> c_int {
    let nearest = match kind {
        Some(io::ErrorKind::InvalidInput) => Errno::INVAL,
        Some(io::ErrorKind::PermissionDenied) => Errno::PERM,
        _ => Errno::IO,
    };
    raw.unwrap_or(nearest.raw_os_error())
}

fn guarded(body: impl FnOnce() -> c_int) -> c_int {
    catch_unwind(AssertUnwindSafe(body)).unwrap_or(-Errno::IO.raw_os_error())
}

/// Lets backups of `device`, a file or a block device, attach to this process. Call it before the first write; if a
/// backup of it runs right now, this waits until that one has attached, some seconds, 60 at most. `socket_dir` is the
/// folder in which writers and backups meet, NULL for the default one. On success `*out` is the writer, of this process:
/// fork only to exec, or before. Returns 0 or a negative errno.
///
/// # Safety
/// `out` and `device` are not NULL; `device` and `socket_dir` end with a zero byte.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drive_backup_writer_open(
    out: *mut *mut drive_backup_writer,
    device: *const c_char,
    socket_dir: *const c_char,
) -> c_int {
    if out.is_null() || device.is_null() {
        return -Errno::INVAL.raw_os_error();
    }
    // SAFETY: not null; the caller promises strings that end with a zero byte.
    let path = |text: *const c_char| unsafe { Path::new(OsStr::from_bytes(CStr::from_ptr(text).to_bytes())) };
    guarded(|| {
        let opened = match socket_dir.is_null() {
            true => Writer::open(path(device)),
            false => Writer::open_in(path(device), path(socket_dir)),
        };
        match opened {
            // SAFETY: not null; the caller promises a place for a pointer.
            Ok(writer) => unsafe {
                *out = Box::into_raw(Box::new(drive_backup_writer { writer }));
                0
            },
            Err(e) => -errno(e.errno(), e.io_kind()),
        }
    })
}

/// Begins a write of `length` bytes at `offset`; a discard or write-zeroes is one too. Blocks a bounded time while the
/// writer is frozen, and until a backup has saved what the write is about to overwrite. Returns 0: write now, then
/// call drive_backup_writer_end. Or a negative errno: do not write, and do not call it.
///
/// # Safety
/// `writer` comes from drive_backup_writer_open and is not closed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drive_backup_writer_begin(
    writer: *mut drive_backup_writer,
    offset: u64,
    length: u64,
) -> c_int {
    // SAFETY: the caller promises a live writer; all its methods take it shared.
    let writer = unsafe { &(*writer).writer };
    guarded(|| match writer.enter(offset, length) {
        Ok(()) => 0,
        Err(e) => -errno(e.raw_os_error(), Some(e.kind())),
    })
}

/// Ends a write that drive_backup_writer_begin allowed, after its system call has returned. May be called from another
/// thread than the beginning was.
///
/// # Safety
/// `writer` comes from drive_backup_writer_open and is not closed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drive_backup_writer_end(writer: *mut drive_backup_writer, offset: u64, length: u64) {
    let _ = (offset, length);
    // SAFETY: the caller promises a live writer; all its methods take it shared.
    let writer = unsafe { &(*writer).writer };
    guarded(|| {
        writer.leave();
        0
    });
}

/// During a freeze, when no write is in flight, `quiesce(argument)` is called on a thread of its own to bring what the
/// program has buffered to the disk. It returns 0, or a negative errno, which makes the backup fail. It may begin and
/// end writes on its own thread. NULL: no callback any more; waits for one that is running.
///
/// # Safety
/// `writer` comes from drive_backup_writer_open and is not closed. `quiesce` may be called with `argument` from another
/// thread until it is replaced or the writer is closed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drive_backup_writer_on_freeze(
    writer: *mut drive_backup_writer,
    quiesce: Option<unsafe extern "C" fn(*mut c_void) -> c_int>,
    argument: *mut c_void,
) {
    // SAFETY: the caller promises a live writer; all its methods take it shared.
    let writer = unsafe { &(*writer).writer };
    let argument = Argument(argument);
    guarded(|| {
        match quiesce {
            None => writer.on_freeze(|| Ok(())),
            Some(quiesce) => writer.on_freeze(move || {
                // Captures the whole of it, which may cross threads, and not the bare pointer in it.
                let argument = &argument;
                // SAFETY: the caller promises that it may be called from here.
                match unsafe { quiesce(argument.0) } {
                    0 => Ok(()),
                    code => Err(io::Error::from_raw_os_error(code.unsigned_abs().clamp(1, 4095) as i32)),
                }
            }),
        }
        0
    });
}

/// The end: no backup may attach any more, and an attached one goes on with what it has. No other call on this writer
/// may be running, no write may be in flight, and none may follow. Waits for a quiesce callback that is running.
///
/// # Safety
/// `writer` comes from drive_backup_writer_open or is NULL, and is not used again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn drive_backup_writer_close(writer: *mut drive_backup_writer) {
    if !writer.is_null() {
        guarded(|| {
            // SAFETY: it came out of a Box in open, and the caller gives it up.
            drop(unsafe { Box::from_raw(writer) });
            0
        });
    }
}

#[cfg(test)]
#[path = "capi/header.rs"]
mod header;
