//! What the tests of the command share: running it, the independent tools beside it, and devices, mounts and daemons
//! that are torn down when dropped. Root only.
#![allow(dead_code)] // each test program uses its part

pub mod bytes;
pub mod cost;
pub mod fault;
pub mod hold;
mod mount;

use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::time::{Duration, Instant};

pub use mount::*;

/// The command under test.
pub const BINARY: &str = env!("CARGO_BIN_EXE_drive-backup");
/// No event that a test waits for takes longer; far more than it should take, for machines under load.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// How a run of the command ended.
#[derive(Debug)]
pub struct Ended {
    /// As a shell shows it: 128 + N for signal N.
    pub code: i32,
    pub stdout: Vec<u8>,
    pub stderr: String,
}

impl Ended {
    pub fn of(output: Output) -> Self {
        Self {
            code: code(output.status),
            stdout: output.stdout,
            stderr: String::from_utf8_lossy(&output.stderr).into_owned(),
        }
    }

    /// Success, silent as cron wants it.
    #[track_caller]
    pub fn succeeds(&self) -> &Self {
        assert_eq!((self.code, self.stderr.as_str()), (0, ""), "{self:?}");
        self
    }

    /// Success of one whose speed limit was lifted, which it says, and nothing else.
    #[track_caller]
    pub fn succeeds_unlimited(&self) -> &Self {
        let line = "drive-backup: speed limit off; SIGUSR2 turns it on again\n";
        assert_eq!((self.code, self.stderr.as_str()), (0, line), "{self:?}");
        self
    }

    /// A failure with this code that says `reason` on stderr, in one line.
    #[track_caller]
    pub fn fails(&self, code: i32, reason: &str) -> &Self {
        assert_eq!(self.code, code, "{self:?}");
        assert!(self.stderr.contains(reason), "no {reason:?} in {self:?}");
        assert_eq!(self.stderr.lines().count(), 1, "{}", self.stderr);
        assert!(self.stderr.starts_with("drive-backup: ") && self.stderr.ends_with('\n'), "{}", self.stderr);
        self
    }
}

/// As a shell shows it.
pub fn code(status: ExitStatus) -> i32 {
    status.code().unwrap_or_else(|| 128 + status.signal().expect("it has ended"))
}

/// The command with `arguments`, its streams piped; signals that this process was started to ignore (`cargo test &`) are as by
/// default.
pub fn command(arguments: &[&str]) -> Command {
    let mut command = Command::new("/usr/bin/env");
    command.args(["--default-signal", BINARY]).args(arguments);
    piped(command)
}

/// `command` with no input, its output to be read, and an environment that does not change what it shows.
pub fn piped(mut command: Command) -> Command {
    command.env_remove("JOURNAL_STREAM").stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command
}

/// Runs the command to its end.
pub fn drive_backup(arguments: &[&str]) -> Ended {
    Ended::of(command(arguments).output().expect("the binary under test runs"))
}

/// Copies `device` to `target` with more `arguments`.
pub fn copy(device: &Path, target: &Path, arguments: &[&str]) -> Ended {
    drive_backup(&[&["--device", text(device), "--target", text(target)], arguments].concat())
}

/// `qemu-img` with `arguments`, separated by spaces, then `paths`.
#[track_caller]
pub fn qemu_img(arguments: &str, paths: &[&Path]) -> String {
    let arguments: Vec<_> = arguments.split_whitespace().chain(paths.iter().map(|p| text(p))).collect();
    run("qemu-img", &arguments)
}

/// Runs `commands` of qemu-io on an image; `options` are qemu-io's own.
#[track_caller]
pub fn qemu_io(options: &[&str], image: &Path, commands: &[&str]) {
    let mut arguments = options.to_vec();
    commands.iter().for_each(|command| arguments.extend(["-c", command]));
    arguments.push(text(image));
    let output = run("qemu-io", &arguments);
    // qemu-io answers 0 after some failed commands.
    assert!(!output.to_lowercase().contains("fail") && !output.contains("error"), "{arguments:?}: {output}");
}

/// The JSON line that tells of a backup's start; a slow one has told of its status before.
#[track_caller]
pub fn start_of(mut lines: impl Iterator<Item = String>) -> String {
    lines.find(|line| line.contains(r#""message_type":"start""#)).expect("it never starts")
}

/// Looks until `look` sees something; panics when `what` does not happen.
#[track_caller]
pub fn wait_for<T>(what: &str, mut look: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(seen) = look() {
            return seen;
        }
        assert!(start.elapsed() < PATIENCE, "waited in vain for {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// What must not change: name, inode, length, time and bytes of every file below `folder`.
pub fn fingerprint(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).unwrap().map(Result::unwrap) {
        let path = entry.path();
        let metadata = entry.metadata().unwrap();
        let mut line = format!("{} {} {}", path.display(), metadata.ino(), metadata.len());
        if metadata.is_file() {
            let digest = bytes::digest(&path);
            line += &format!(" {}.{:09} {digest:x} {:o}", metadata.mtime(), metadata.mtime_nsec(), metadata.mode());
        }
        found.push(line);
        if metadata.is_dir() {
            found.extend(fingerprint(&path));
        }
    }
    found.sort();
    found
}

/// The names in a folder, sorted.
pub fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

/// A process that is ended, by its own id, when dropped.
pub struct Running {
    child: Child,
}

impl Running {
    pub fn start(command: &mut Command) -> Self {
        Self { child: command.spawn().unwrap_or_else(|e| panic!("{command:?}: {e}")) }
    }

    /// Starts the command with `arguments`.
    pub fn drive_backup(arguments: &[&str]) -> Self {
        Self::start(&mut command(arguments))
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Has it ended by itself?
    pub fn has_ended(&mut self) -> bool {
        self.child.try_wait().unwrap().is_some()
    }

    /// Sends a signal to it alone. After SIGSTOP it stands still: none of its threads is still under way.
    #[track_caller]
    pub fn signal(&self, signal: nix::sys::signal::Signal) {
        use nix::sys::wait::{Id, WaitPidFlag, WaitStatus, waitid};
        let pid = nix::unistd::Pid::from_raw(self.child.id() as i32);
        nix::sys::signal::kill(pid, signal).unwrap();
        if signal == nix::sys::signal::Signal::SIGSTOP {
            let looks = WaitPidFlag::WSTOPPED | WaitPidFlag::WEXITED | WaitPidFlag::WNOWAIT | WaitPidFlag::WNOHANG;
            let stopped = || waitid(Id::Pid(pid), looks).unwrap();
            wait_for("the end of its last step", || (stopped() != WaitStatus::StillAlive).then_some(()));
        }
    }

    /// Waits, bounded, until it has ended, and gives what is left in its pipes.
    #[track_caller]
    pub fn ended(mut self) -> Ended {
        let stdout = self.child.stdout.take().map(collect);
        let stderr = self.child.stderr.take().map(collect);
        let status = wait_for("the end of the process", || self.child.try_wait().unwrap());
        let read = |pipe: Option<std::thread::JoinHandle<Vec<u8>>>| pipe.map_or(Vec::new(), |t| t.join().unwrap());
        Ended { code: code(status), stdout: read(stdout), stderr: String::from_utf8(read(stderr)).unwrap() }
    }
}

fn collect(mut pipe: impl Read + Send + 'static) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        pipe.read_to_end(&mut bytes).unwrap();
        bytes
    })
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
