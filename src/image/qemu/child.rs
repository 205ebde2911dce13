//! A qemu-nbd of our own. It listens on a socket that we made and that has no name any more, so that nobody else finds it
//! and nothing has to be cleared away; and it dies when we do.

use super::super::secret::Secret;
use crate::error::{Error, Kind, Result, Side, reason};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::fs::{Mode, OFlags};
use std::ffi::{OsStr, OsString};
use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child as Process, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// The Debian package of QEMU's tools.
const PACKAGE: &str = "qemu-utils";
/// Bytes of what the tools say that are kept.
const SAID_LIMIT: u64 = 64 << 10;
/// For a child that was told to end: its caches are on the disk by then.
const END_TIMEOUT: Duration = Duration::from_secs(60);
/// For one that was killed. One that hangs in the kernel is left to it.
const KILL_TIMEOUT: Duration = Duration::from_millis(500);
/// For what a child that has ended said.
const SAID_TIMEOUT: Duration = Duration::from_millis(500);
/// Turns the standard streams into what systemd's socket activation and qemu's secrets expect. `$0` is the tool.
const ACTIVATE: &str = r#"export LISTEN_PID=$$ LISTEN_FDS=1; exec "$0" "$@" 3<&0 4<&1 0</dev/null 1>&2"#;

/// The path of one of QEMU's tools; without it an error of `side` that names the package.
pub fn tool(name: &str, side: Side, what: &str) -> Result<PathBuf> {
    let folders = std::env::var_os("PATH").unwrap_or_else(|| "/usr/sbin:/usr/bin:/sbin:/bin".into());
    let is_program = |path: &PathBuf| rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok() && path.is_file();
    std::env::split_paths(&folders).map(|folder| folder.join(name)).find(is_program).ok_or_else(|| {
        let raw = if side == Side::Source { "; with --source-format raw its bytes are copied as they are" } else { "" };
        let why = format!("{side} {what} needs {name}, which is not installed: it is in the package {PACKAGE}{raw}");
        Error::new(kind_of(side), why)
    })
}

/// What a failure of one end is.
pub fn kind_of(side: Side) -> Kind {
    if side == Side::Target { Kind::Target } else { Kind::Source }
}

/// A running qemu-nbd. Dropped, it is killed.
#[derive(Debug)]
pub struct Child {
    process: Mutex<Process>,
    said: Arc<Said>,
    /// The socket's, by which it is found though its name is gone.
    socket: OwnedFd,
}

/// What it writes to standard error.
#[derive(Debug, Default)]
struct Said {
    last: Mutex<(String, bool)>,
    ended: Condvar,
}

impl Child {
    /// Starts `program` with `arguments`, which must not hold the secret. Does not wait for it.
    pub fn start(program: &Path, arguments: &[OsString], secret: Option<&Secret>) -> io::Result<Self> {
        let (listener, socket) = listen()?;
        let mut command = Command::new("/bin/sh");
        command.arg("-c").arg(ACTIVATE).arg(program).args(arguments);
        command.stdin(OwnedFd::from(listener)).stderr(Stdio::piped()).env("LC_ALL", "C");
        match secret {
            Some(secret) => command.stdout(secret.pipe()?),
            None => command.stdout(Stdio::null()),
        };
        // A terminal's Ctrl-C is for us: the child ends after its data is safe.
        command.process_group(0);
        super::super::sys::die_with_us(&mut command);
        let mut process = command.spawn()?;
        // It holds our descriptors of the listener and the secret: without it, a dead child's listener would be open.
        drop(command);
        let said = Arc::new(Said::default());
        if let Some(stderr) = process.stderr.take() {
            let said = said.clone();
            std::thread::Builder::new().name("qemu-nbd".to_owned()).spawn(move || said.listen(stderr))?;
        }
        Ok(Self { process: Mutex::new(process), said, socket })
    }

    /// Where it listens.
    pub fn address(&self) -> PathBuf {
        format!("/proc/self/fd/{}", self.socket.as_raw_fd()).into()
    }

    // A panic elsewhere must not keep it alive.
    fn process(&self) -> MutexGuard<'_, Process> {
        self.process.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// `error`, or what the child said of it if it has ended, or does so within a moment: its connections end before it.
    pub fn explain(&self, error: io::Error) -> io::Error {
        match self.wait(SAID_TIMEOUT) {
            Ok(Some(status)) => io::Error::new(error.kind(), self.last_words(status)),
            _ => error,
        }
    }

    fn last_words(&self, status: ExitStatus) -> String {
        let how = match (status.code(), status.signal()) {
            (Some(code), _) => format!("with exit status {code}"),
            (None, Some(signal)) => format!("by signal {signal}"),
            (None, None) => "somehow".to_owned(),
        };
        let said = self.said.line();
        if said.is_empty() { format!("qemu-nbd was ended {how}") } else { said }
    }

    /// Ends it after everything is flushed, and waits. An error when it fails then, or does not end.
    pub fn end(&self) -> io::Result<()> {
        let pid = Pid::from_raw(self.process().id() as i32);
        if self.wait(Duration::ZERO)?.is_none() {
            kill(pid, Signal::SIGTERM)?;
        }
        match self.wait(END_TIMEOUT)? {
            Some(status) if status.success() => Ok(()),
            Some(status) => Err(io::Error::other(self.last_words(status))),
            None => {
                self.kill();
                let seconds = END_TIMEOUT.as_secs();
                Err(io::Error::new(io::ErrorKind::TimedOut, format!("qemu-nbd did not end within {seconds} s")))
            }
        }
    }

    /// Ends it at once; requests under way fail.
    pub fn kill(&self) {
        let mut process = self.process();
        // It may have ended, and then there is nothing to kill.
        let _ = process.kill();
        drop(process);
        let _ = self.wait(KILL_TIMEOUT);
    }

    fn wait(&self, timeout: Duration) -> io::Result<Option<ExitStatus>> {
        const STEP: Duration = Duration::from_millis(2);
        let deadline = Instant::now() + timeout;
        loop {
            let status = self.process().try_wait()?;
            if status.is_some() || Instant::now() >= deadline {
                return Ok(status);
            }
            std::thread::sleep(STEP);
        }
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Said {
    fn listen(&self, stderr: ChildStderr) {
        let mut lines = BufReader::new(stderr);
        let mut line = Vec::new();
        // What is too long for a line is two lines; what can't be read has ended.
        while matches!(
            (&mut lines).take(SAID_LIMIT).read_until(b'\n', {
                line.clear();
                &mut line
            }),
            Ok(1..)
        ) {
            let text = one_line(&line);
            if !text.is_empty() && !text.contains("warning: ") {
                self.last().0 = text;
            }
        }
        self.last().1 = true;
        self.ended.notify_all();
    }

    fn last(&self) -> MutexGuard<'_, (String, bool)> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The last line of a child that has ended.
    fn line(&self) -> String {
        let last = self.ended.wait_timeout_while(self.last(), SAID_TIMEOUT, |(_, ended)| !*ended);
        last.map_or_else(|_| String::new(), |(last, _)| last.0.clone())
    }
}

/// What a tool wrote, for a terminal.
pub fn one_line(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim().replace(char::is_control, " ")
}

/// A listening socket without a name, and what leads to it.
fn listen() -> io::Result<(UnixListener, OwnedFd)> {
    let template = std::env::temp_dir().join("drive-backup-XXXXXX");
    let folder = nix::unistd::mkdtemp(&template)?;
    let path = folder.join("s");
    let bound = UnixListener::bind(&path).and_then(|listener| {
        let socket = rustix::fs::open(&path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
        Ok((listener, socket))
    });
    // Without the name only we can connect; what can't be removed is an empty folder.
    let _ = std::fs::remove_file(&path);
    let _ = std::fs::remove_dir(&folder);
    bound
}

/// Runs one of QEMU's tools to its end. Its last line, when it fails.
pub fn run(program: &Path, arguments: &[OsString], secret: Option<&Secret>) -> io::Result<Vec<u8>> {
    let mut command = Command::new(program);
    command.args(arguments).env("LC_ALL", "C").process_group(0);
    match secret {
        Some(secret) => command.stdin(secret.pipe()?),
        None => command.stdin(Stdio::null()),
    };
    super::super::sys::die_with_us(&mut command);
    let output = command.output()?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let stderr = String::from_utf8_lossy(&output.stderr);
    let last = stderr.lines().rfind(|line| !line.trim().is_empty()).unwrap_or("it failed and did not say why");
    Err(io::Error::other(one_line(last.as_bytes())))
}

/// Another process has the image: QEMU says that in words alone.
pub fn is_lock(error: &io::Error) -> bool {
    let text = reason(error);
    text.contains("Is another process using the image") || (text.contains("Failed to") && text.contains(" lock"))
}

/// Arguments from words.
pub fn words<const N: usize>(words: [&dyn AsRef<OsStr>; N]) -> Vec<OsString> {
    words.iter().map(|word| word.as_ref().to_owned()).collect()
}
