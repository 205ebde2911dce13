//! Tests hold a process at a named place of its work, to kill, stop or interrupt it there.
//!
//! `DRIVE_BACKUP_HOLD=PLACE:SOCKET`: the process connects to SOCKET when it comes to its first place, sends a byte at PLACE, and
//! goes on when the other end is closed. Only builds with debug assertions look at that; in others [`at`] is nothing.

/// Where a process can be held.
#[derive(Clone, Copy, Debug)]
#[allow(dead_code)] // each storey has its part
pub enum Place {
    /// A backup has opened its ends and taken no instant.
    Opened,
    /// Its writers are frozen.
    Frozen,
    /// A disk's instant is kept, that of the next one is not.
    Kept,
    /// A trapped write waits to be captured.
    Capturing,
    /// A piece is in memory, and not on the target.
    Copying,
    /// Everything is written, nothing is flushed.
    Flushing,
    /// Flushed, and to be read back.
    Verifying,
    /// No verb is in time any more; the target's name has what it had.
    Publishing,
    /// The name leads to the copy; its folder is not flushed.
    Renamed,
    /// Everything is done, nobody has been told.
    Published,
    /// A backup attaches to a writer, and has no answer.
    Attaching,
    /// A writer lets nobody begin, and has not said that nothing is in flight.
    Draining,
    /// A writer is frozen, and has been asked to go on.
    Thawing,
    /// A writer's write is about to ask.
    Asking,
    /// It has asked, and waits for its grant.
    Waiting,
    /// It has its grant, and has written nothing.
    Granted,
    /// A server has nothing open yet.
    Opening,
    /// A server's clients can come, and it has told nobody.
    Reachable,
    /// A client's write is in its bracket.
    Writing,
    /// A server was asked to end.
    Stopping,
}

/// Holds this thread here if that is asked for.
#[cfg(debug_assertions)]
pub fn at(place: Place) {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicBool, Ordering};
    static WANTED: OnceLock<Option<(String, UnixStream)>> = OnceLock::new();
    static HELD: AtomicBool = AtomicBool::new(false);
    // At once: later, a process that has confined itself may not open anything.
    let wanted = || {
        let wanted = std::env::var("DRIVE_BACKUP_HOLD").ok()?;
        let (name, socket) = wanted.split_once(':')?;
        Some((name.to_owned(), UnixStream::connect(socket).ok()?))
    };
    let Some((name, mut socket)) = WANTED.get_or_init(wanted).as_ref().map(|(name, socket)| (name, socket)) else {
        return;
    };
    if *name == format!("{place:?}") && !HELD.swap(true, Ordering::Relaxed) {
        // Without the other end there is nobody to wait for.
        let _ = socket.write_all(b"!").and_then(|()| socket.read_to_end(&mut Vec::new()));
    }
}

/// Nothing.
#[cfg(not(debug_assertions))]
#[cfg_attr(not(feature = "engine"), allow(dead_code))]
#[inline]
pub fn at(_: Place) {}
