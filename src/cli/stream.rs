//! Standard output and standard error as this process writes them: whole lines, from threads that may block.

use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::fstat;
use rustix::io::Errno;
use rustix::process::getpgrp;
use rustix::termios::tcgetpgrp;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};

/// Standard output or standard error, without the standard library's lock: a write that blocks must not hold it.
pub struct Stream(BorrowedFd<'static>);

impl Stream {
    /// Standard output.
    pub fn out() -> Self {
        Self(rustix::stdio::stdout())
    }

    /// Standard error.
    pub fn err() -> Self {
        Self(rustix::stdio::stderr())
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match rustix::io::write(self.0, bytes) {
                // Another process may have made the shared description non-blocking.
                Err(Errno::AGAIN) => drop(poll(&mut [PollFd::new(&self.0, PollFlags::OUT)], None)?),
                done => return Ok(done?),
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Is this process in the terminal's foreground? One in the background must not read from it, nor draw on it. A terminal
/// that is not the session's own has no background.
pub fn in_foreground(terminal: impl AsFd) -> bool {
    match tcgetpgrp(terminal) {
        Ok(group) => group == getpgrp(),
        Err(error) => error == Errno::NOTTY,
    }
}

/// Does `end` lead to systemd's journal, as `JOURNAL_STREAM` says? It does not where it was redirected since.
pub fn is_journal(end: impl AsFd, journal_stream: Option<&str>) -> bool {
    let named = || {
        let (device, inode) = journal_stream?.split_once(':')?;
        Some((device.parse::<u64>().ok()?, inode.parse::<u64>().ok()?))
    };
    named().is_some_and(|(device, inode)| fstat(end).is_ok_and(|found| (found.st_dev, found.st_ino) == (device, inode)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt;

    #[test]
    fn the_journal_is_known_by_device_and_inode() {
        let file = tempfile::tempfile().unwrap();
        let found = file.metadata().unwrap();
        let name = format!("{}:{}", found.dev(), found.ino());
        assert!(is_journal(&file, Some(&name)));
        for other in [None, Some(""), Some("1"), Some("x:y"), Some(&*format!("{}:{}", found.dev(), found.ino() + 1))] {
            assert!(!is_journal(&file, other), "{other:?}");
        }
    }
}
