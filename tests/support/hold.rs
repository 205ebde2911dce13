//! Processes that are held at a named place of their work: see `src/hold.rs`.

use super::{Running, text, wait_for};
use std::io::Read;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

/// A socket at which a process is held.
pub struct Hold {
    listener: UnixListener,
    variable: String,
}

impl Hold {
    /// `place` is a name of `src/hold.rs`; the socket is in `folder`.
    pub fn at(place: &str, folder: &Path) -> Self {
        let path = folder.join("hold");
        let _ = std::fs::remove_file(&path);
        let listener = UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        let variable = format!("{place}:{}", text(&path));
        Self { listener, variable }
    }

    /// What `DRIVE_BACKUP_HOLD` has to be.
    pub fn variable(&self) -> &str {
        &self.variable
    }

    /// Waits until `held` has come there. It goes on when the socket is dropped.
    #[track_caller]
    pub fn reached(&self, held: &mut Running) -> UnixStream {
        let has_ended = |held: &mut Running| {
            if held.has_ended() {
                let stderr = held.child().stderr.take().map(|stderr| std::io::read_to_string(stderr).unwrap());
                panic!("it never came to {}: {stderr:?}", self.variable);
            }
        };
        let (mut socket, _) = wait_for("the process", || {
            has_ended(held);
            self.listener.accept().ok()
        });
        socket.set_nonblocking(true).unwrap();
        wait_for("the place", || {
            has_ended(held);
            socket.read_exact(&mut [0]).ok()
        });
        socket
    }
}
