//! Who comes while somebody is served. It may have come to take the place of one that has gone without our knowing yet, so it has
//! some patience. Then it is sent away, and told of: a guest whose start fails is understood sooner than one that hangs.

use crate::serve::{Notice, Notify};
use crate::unix_socket::Bound;
use nix::sys::socket::getsockopt;
use nix::sys::socket::sockopt::PeerCredentials;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

/// How long one may wait for the one that is served to go. No more than one is sent away in that time.
const PATIENCE: Timespec = Timespec { tv_sec: 2, tv_nsec: 0 };

/// The socket, for those who are not served.
pub struct Door<'a> {
    pub socket: &'a Bound,
    /// It rings when nobody is to be served any more.
    pub bell: &'a OwnedFd,
    pub notify: &'a Notify,
}

/// Waits until one of `fds` can be read, for `patience` or for ever. False: none.
pub fn wait(fds: &[BorrowedFd<'_>], patience: Option<&Timespec>) -> io::Result<bool> {
    let mut polled: Vec<_> = fds.iter().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
    loop {
        match poll(&mut polled, patience) {
            Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
            Ok(ready) => return Ok(ready > 0),
        }
    }
}

impl Door<'_> {
    /// Keeps it shut until `gone` rings: the one that is served has gone, and what it had in flight has ended. While it
    /// `is_leaving`, the next one waits for that.
    pub fn keep_shut(&self, gone: &OwnedFd, is_leaving: impl Fn() -> bool) -> io::Result<()> {
        let over = [gone.as_fd(), self.bell.as_fd()];
        let mut is_told = false;
        loop {
            wait(&[self.socket.listener().as_fd(), over[0], over[1]], None)?;
            if wait(&over, Some(&PATIENCE))? {
                return Ok(());
            }
            let trouble = if is_leaving() {
                Some("another waits until its requests in flight have ended".to_owned())
            } else {
                self.refuse().err().map(|e| format!("another waits, and can't be refused: {e}"))
            };
            if let Some(trouble) = trouble.filter(|_| !is_told) {
                self.warn(&trouble);
                is_told = true;
            }
        }
    }

    /// Sends one away that waits, and those before it that have gone.
    fn refuse(&self) -> io::Result<()> {
        let now = Timespec::default();
        while wait(&[self.socket.listener().as_fd()], Some(&now))? {
            let (socket, _) = self.socket.listener().accept()?;
            // Whoever only looked whether we live has gone.
            if poll(&mut [PollFd::new(&socket, PollFlags::RDHUP)], Some(&now))? == 0 {
                self.warn(&format!("{} was refused: another is served, and there is one at a time", process(&socket)));
                break;
            }
        }
        Ok(())
    }

    fn warn(&self, what: &str) {
        (self.notify)(Notice::Warning(format!("frontend at '{}': {what}", self.socket.path().display())));
    }
}

/// Who is at the other end.
fn process(socket: &UnixStream) -> String {
    // 0, or an error: it is in a container that we don't see into.
    match getsockopt(socket, PeerCredentials).map_or(0, |peer| peer.pid()) {
        0 => "a process elsewhere".into(),
        pid => format!("process {pid}"),
    }
}
