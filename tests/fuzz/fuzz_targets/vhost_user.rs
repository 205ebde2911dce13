//! What a frontend sends before and beside its queues: vhost-user messages, with and without descriptors, to a whole server over
//! its socket. It may hang up on them, and then serves the next one.
//!
//! The bytes: for each message its request, its flags, which descriptor goes with it, how long its payload is, and that.
#![no_main]

use drive_backup::image::raw::Raw;
use drive_backup::serve::disk::{Disk, DiskOptions};
use drive_backup::serve::vhost_user::start;
use libfuzzer_sys::fuzz_target;
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown, sendmsg};
use std::io::{IoSlice, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};

const MEMORY: u64 = 64 << 10;
/// Requests of the specification, and one more.
const REQUESTS: u8 = 45;

/// The socket of a server that is never stopped.
fn socket() -> &'static PathBuf {
    static SOCKET: OnceLock<PathBuf> = OnceLock::new();
    SOCKET.get_or_init(|| {
        let path = tempfile::tempdir().unwrap().keep().join("socket");
        let raw = Raw::fresh(tempfile::tempfile().unwrap(), 70_000).unwrap();
        let options = DiskOptions {
            name: "d".into(),
            path: "d".into(),
            format: None,
            read_only: false,
            secret: None,
            writer_dir: None,
        };
        let disk = Arc::new(Disk::over(&options, Arc::new(raw)));
        Box::leak(Box::new(start(disk, &path, 2, Arc::new(|_| {})).unwrap()));
        path
    })
}

fn descriptors() -> [OwnedFd; 2] {
    let memory = memfd_create("guest", MemfdFlags::CLOEXEC).unwrap();
    ftruncate(&memory, MEMORY).unwrap();
    [memory, eventfd(0, EventfdFlags::CLOEXEC).unwrap()]
}

/// False: it hung up.
fn send(socket: &UnixStream, message: &[u8], descriptor: Option<BorrowedFd<'_>>) -> bool {
    let fds: Vec<_> = descriptor.into_iter().collect();
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut rights = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        rights.push(SendAncillaryMessage::ScmRights(&fds));
    }
    sendmsg(socket, &[IoSlice::new(message)], &mut rights, SendFlags::NOSIGNAL).is_ok()
}

fuzz_target!(|bytes: &[u8]| {
    let mut socket = UnixStream::connect(socket()).unwrap();
    let descriptors = descriptors();
    let mut rest = bytes;
    while let Some((&[request, flags, descriptor, length], more)) = rest.split_first_chunk::<4>() {
        let (payload, more) = more.split_at(more.len().min(length.into()));
        rest = more;
        // Version 1, unless it is not to be; bit 3: an answer is wanted.
        let flags = u32::from(flags & 8) | if flags & 0x80 == 0 { 1 } else { u32::from(flags) };
        let size = if descriptor & 0x40 == 0 { payload.len() as u32 } else { u32::from(length) << 4 };
        let header = [u32::from(request % REQUESTS), flags, size].map(u32::to_le_bytes).concat();
        let descriptor = descriptors.get(usize::from(descriptor & 3)).map(|fd| fd.as_fd());
        if !send(&socket, &[&header, payload].concat(), descriptor) {
            break;
        }
    }
    let _ = rustix::net::shutdown(&socket, Shutdown::Write);
    // It hangs up when it has read all of that, or no longer wants to.
    let _ = socket.read_to_end(&mut Vec::new());
});
