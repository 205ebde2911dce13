//! The one thing of the command line that needs `unsafe`: leaving open files behind.
#![allow(unsafe_code)]

use nix::sched::{CloneFlags, clone};
use nix::unistd::close;
use rustix::process::{getpid, getppid};
use rustix::thread::nanosleep;
use rustix::time::Timespec;

const STACK_BYTES: usize = 64 << 10;
const LOOK: Timespec = Timespec { tv_sec: 0, tv_nsec: 20_000_000 };
/// For a second, all told.
const LOOKS: usize = 50;
/// Standard output comes last: it may be the file that hangs.
const STANDARD_STREAMS: [i32; 3] = [2, 0, 1];

/// Lets this process end although a file hangs: closing a file on a hung FUSE mount blocks, uninterruptibly, and whoever
/// waits for the process with it. The last process that shares the table of open files closes them, so a child that
/// shares it outlives us for a moment, and is the one that blocks. Does nothing when it can't be made.
pub fn leave_open_files_behind() {
    let this_process = Some(getpid());
    let linger = move || {
        for _ in 0..LOOKS {
            if getppid() != this_process {
                break;
            }
            // Cut short it only looks sooner.
            let _ = nanosleep(&LOOK);
        }
        // Readers of these must see the end of the file now: whatever comes after may block.
        for stream in STANDARD_STREAMS {
            let _ = close(stream);
        }
        0
    };
    let mut stack = vec![0; STACK_BYTES];
    // SAFETY: without CLONE_VM the child has its own copy of this memory, its stack and the closure included, so that
    // neither can be freed under it. The child is the only thread there: it takes no lock and allocates nothing, since
    // `linger` makes system calls only.
    let _ = unsafe { clone(Box::new(linger), &mut stack, CloneFlags::CLONE_FILES, None) };
}
