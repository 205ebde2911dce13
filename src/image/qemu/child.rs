//! A qemu-nbd of our own. It listens on a socket that we made and that has no name any more, so that nobody else finds it
//! and nothing has to be cleared away; and it dies when we do.

use super::super::secret::Secret;
use super::process::Process;
use super::scratch::Scratch;
use crate::job::Job;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::fs::{Mode, OFlags};
use std::ffi::OsString;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

/// For a child that was told to end: its caches are on the disk by then.
const END_TIMEOUT: Duration = Duration::from_secs(60);
/// Turns the standard streams into what systemd's socket activation and qemu's secrets expect. `$0` is the tool.
const ACTIVATE: &str = r#"export LISTEN_PID=$$ LISTEN_FDS=1; exec "$0" "$@" 3<&0 4<&1 0</dev/null 1>&2"#;

/// A running qemu-nbd. Dropped, it is killed.
#[derive(Debug)]
pub struct Child {
    process: Process,
    /// The socket's, by which it is found though its name is gone.
    socket: OwnedFd,
}

impl Child {
    /// Starts `program` with `arguments`, which must not hold the secret. Does not wait for it.
    pub fn start(program: &Path, arguments: &[OsString], secret: Option<&Secret>) -> io::Result<Self> {
        let (listener, socket) = listen()?;
        let mut command = Command::new("/bin/sh");
        command.arg("-c").arg(ACTIVATE).arg(program).args(arguments).stdin(OwnedFd::from(listener));
        match secret {
            Some(secret) => command.stdout(secret.pipe()?),
            None => command.stdout(Stdio::null()),
        };
        Ok(Self { process: Process::start("qemu-nbd", command)?, socket })
    }

    /// Where it listens.
    pub fn address(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.socket.as_raw_fd()).into()
    }

    /// The regular files and block devices that it has open: what leads to each as long as the child lives, and its name.
    pub fn files(&self) -> io::Result<Vec<(PathBuf, PathBuf)>> {
        let mut found = Vec::new();
        for entry in std::fs::read_dir(format!("/proc/{}/fd", self.process.id()))? {
            let through = entry?.path();
            // It may have closed one meanwhile.
            let Ok(metadata) = std::fs::metadata(&through) else { continue };
            let file_type = metadata.file_type();
            if file_type.is_file() || file_type.is_block_device() {
                let name = std::fs::read_link(&through)?;
                found.push((through, name));
            }
        }
        Ok(found)
    }

    /// `error`, or what the child said of it if it has ended.
    pub fn explain(&self, error: io::Error) -> io::Error {
        self.process.explain(error)
    }

    /// Does `work`, which waits for the child; kills it when `job` is cancelled meanwhile.
    pub fn unless_cancelled<T>(&self, job: Option<&Job>, work: impl FnOnce() -> T) -> T {
        self.process.unless_cancelled(job, work)
    }

    /// Ends it after everything is flushed, and waits. An error when it fails then, or does not end.
    pub fn end(&self) -> io::Result<()> {
        if self.process.wait(Duration::ZERO)?.is_none() {
            kill(Pid::from_raw(self.process.id() as i32), Signal::SIGTERM)?;
        }
        match self.process.wait(END_TIMEOUT)? {
            Some(status) if status.success() => Ok(()),
            Some(status) => Err(io::Error::other(self.process.last_words(status))),
            None => {
                self.kill();
                let seconds = END_TIMEOUT.as_secs();
                Err(io::Error::new(io::ErrorKind::TimedOut, format!("qemu-nbd did not end within {seconds} s")))
            }
        }
    }

    /// Ends it at once; requests under way fail.
    pub fn kill(&self) {
        self.process.kill();
    }
}

/// A listening socket without a name, and what leads to it.
fn listen() -> io::Result<(UnixListener, OwnedFd)> {
    let folder = Scratch::new()?;
    let path = folder.join("s");
    let listener = UnixListener::bind(&path)?;
    // Without the name only we can connect.
    let socket = rustix::fs::open(&path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    Ok((listener, socket))
}
