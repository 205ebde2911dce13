//! Faults from outside the process: strace's injection, and disks that fail at an exact offset.

use super::{BINARY, Ended, Running, piped, text, wait_for};
use std::path::{Path, PathBuf};
use std::process::Command;

/// A run under strace.
pub struct Watched {
    pub ended: Ended,
    /// The names of the system calls, in order.
    pub calls: Vec<String>,
    /// A fault was injected. Calls are counted for each thread, so that a rare one may not be reached.
    pub injected: bool,
}

/// Runs the command and watches its system calls about `paths`. `options` are strace's own.
pub fn watched(options: &[&str], paths: &[&Path], arguments: &[&str]) -> Watched {
    let log = tempfile::NamedTempFile::new().unwrap();
    let mut command = Command::new("strace");
    command.args(["-f", "-qq", "-o", text(log.path())]).args(options);
    for path in paths {
        command.args(["-P", text(path)]);
    }
    command.arg(BINARY).args(arguments);
    let ended = Running::start(&mut piped(command)).ended();
    let log = std::fs::read_to_string(log.path()).unwrap();
    // "1234 pwrite64(5, …) = 4096"; the end of an interrupted call, "<... pwrite64 resumed>", is no second one, and a
    // thread that is killed leaves "???( <unfinished ...>".
    let name = |line: &str| Some(line.split_whitespace().nth(1)?.split_once('(')?.0.to_owned());
    let calls = log.lines().filter_map(name).filter(|name| name != "???").collect();
    Watched { ended, calls, injected: log.contains("INJECTED") }
}

/// The command under strace, standing still.
pub struct Halted {
    strace: Running,
    child: i32,
    _log: tempfile::NamedTempFile,
}

impl Halted {
    /// Stopped when it has made the system call `call` for the first time. `options` are strace's own: which calls count.
    pub fn after(call: &str, options: &[&str], arguments: &[&str]) -> Self {
        let log = tempfile::NamedTempFile::new().unwrap();
        let mut strace = Command::new("strace");
        strace.args(["-f", "-qq", "-o", text(log.path()), "-e", &format!("trace={call}")]).args(options);
        strace.args(["-e", &format!("inject={call}:signal=STOP:when=1"), BINARY]).args(arguments);
        let mut strace = Running::start(&mut piped(strace));
        let stopped = |log: String| log.contains("--- stopped by SIGSTOP ---").then_some(());
        wait_for("the stop", || stopped(std::fs::read_to_string(log.path()).unwrap()));
        let id = strace.id();
        assert!(!strace.has_ended());
        let children = std::fs::read_to_string(format!("/proc/{id}/task/{id}/children")).unwrap();
        let child = children.split_whitespace().next().unwrap().parse().unwrap();
        Self { strace, child, _log: log }
    }

    pub fn goes_on(self) -> Ended {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(self.child), nix::sys::signal::Signal::SIGCONT).unwrap();
        self.strace.ended()
    }
}

/// A raw file seen through nodes of qemu-storage-daemon: blkdebug, which fails where it is told to, or blklogwrites,
/// which remembers every write. A file again, by FUSE.
pub struct Export {
    _daemon: Running,
    path: PathBuf,
}

impl Export {
    /// `image` under the name `path`, failing by `rules`: the JSON list of blkdebug's `inject-error`.
    pub fn faulty(image: &Path, path: &Path, rules: &str) -> Self {
        let file = format!(r#"{{"driver":"file","filename":"{}"}}"#, text(image));
        Self::start(
            path,
            &format!(r#"{{"driver":"blkdebug","node-name":"disk","image":{file},"inject-error":{rules}}}"#),
        )
    }

    /// `image` under the name `path`, every write and flush logged in the existing file `log`, as dm-log-writes does it.
    pub fn logged(image: &Path, path: &Path, log: &Path) -> Self {
        let file = |path| format!(r#"{{"driver":"file","filename":"{}"}}"#, text(path));
        let (disk, log) = (file(image), file(log));
        Self::start(path, &format!(r#"{{"driver":"blklogwrites","node-name":"disk","file":{disk},"log":{log}}}"#))
    }

    fn start(path: &Path, node: &str) -> Self {
        std::fs::File::create(path).unwrap();
        let export = format!("type=fuse,id=export,node-name=disk,mountpoint={},writable=on", text(path));
        let mut daemon = Command::new("qemu-storage-daemon");
        daemon.args(["--blockdev", node, "--export", &export]).stdin(std::process::Stdio::null());
        let mut daemon = Running::start(&mut daemon);
        wait_for("the FUSE export", || {
            assert!(!daemon.has_ended(), "qemu-storage-daemon has ended");
            let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
            mounts.lines().any(|line| line.split(' ').nth(4) == Some(text(path))).then_some(())
        });
        Self { _daemon: daemon, path: path.to_owned() }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Export {
    fn drop(&mut self) {
        // Lazily: the daemon, which serves it, ends next.
        super::undo("umount", &["-l", text(&self.path)]);
    }
}
