//! The library that is preloaded into the command: `inject.c`, compiled by the test.

use crate::support::{self, BINARY, text};
use std::path::{Path, PathBuf};
use std::process::Command;

/// What a system call is answered with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    Eio,
    Enospc,
    /// No descriptor or no memory is left.
    Emfile,
    Enomem,
    /// Somebody else has the lock.
    Eagain,
    /// The file system can't do that.
    Eopnotsupp,
    Eintr,
    /// A call takes a moment longer.
    Late,
    /// A call takes longer than a writer waits.
    TooLate,
    /// Half of the bytes, whole sectors where there are some.
    Half,
    /// One byte, or with O_DIRECT a sector.
    Least,
}

/// How long a call is late, in milliseconds.
const LATE: u64 = 40;
pub const TOO_LATE: u64 = 6000;

impl Fault {
    pub fn name(self) -> &'static str {
        match self {
            Self::Eio => "EIO",
            Self::Enospc => "ENOSPC",
            Self::Emfile => "EMFILE",
            Self::Enomem => "ENOMEM",
            Self::Eagain => "EAGAIN",
            Self::Eopnotsupp => "EOPNOTSUPP",
            Self::Eintr => "EINTR",
            Self::Late => "late",
            Self::TooLate => "later than `--cbw-timeout`",
            Self::Half => "half of it",
            Self::Least => "a byte of it",
        }
    }

    /// Of those that are errors.
    pub fn errno(self) -> Option<i32> {
        use nix::libc;
        match self {
            Self::Eio => Some(libc::EIO),
            Self::Enospc => Some(libc::ENOSPC),
            Self::Emfile => Some(libc::EMFILE),
            Self::Enomem => Some(libc::ENOMEM),
            Self::Eagain => Some(libc::EAGAIN),
            Self::Eopnotsupp => Some(libc::EOPNOTSUPP),
            Self::Eintr => Some(libc::EINTR),
            Self::Late | Self::TooLate | Self::Half | Self::Least => None,
        }
    }

    fn order(self) -> String {
        match (self, self.errno()) {
            (_, Some(errno)) => format!("error={errno}"),
            (Self::Late, _) => format!("delay={LATE}"),
            (Self::TooLate, _) => format!("delay={TOO_LATE}"),
            (Self::Half, _) => "short=half".to_owned(),
            _ => "short=least".to_owned(),
        }
    }
}

/// Calls of one kind about one place.
#[derive(Clone, Debug)]
pub struct Calls {
    pub kind: &'static str,
    /// Of the file; with `*` at its end, whatever begins so.
    pub path: String,
    /// The thread's name; with `!` before it, any other.
    pub thread: Option<&'static str>,
}

impl Calls {
    /// How many of the lines of a trace are such calls.
    pub fn count(&self, trace: &str) -> u64 {
        let is_one = |line: &&str| {
            let mut words = line.splitn(3, ' ');
            let (kind, thread, path) = (words.next(), words.next().unwrap_or(""), words.next().unwrap_or(""));
            let is_there = match self.path.strip_suffix('*') {
                Some(prefix) => path.starts_with(prefix),
                None => path == self.path,
            };
            let is_by = match self.thread.map(|name| name.strip_prefix('!').ok_or(name)) {
                None => true,
                Some(Ok(other)) => thread != other,
                Some(Err(name)) => thread == name,
            };
            kind == Some(self.kind) && is_there && is_by
        };
        trace.lines().filter(is_one).count() as u64
    }
}

/// From the first to the last of the calls, counted from 1, in the order of the whole process.
pub type When = (u64, u64);

/// The compiled library.
pub struct Library {
    folder: tempfile::TempDir,
}

/// A command that runs with the library.
pub struct Prepared {
    pub command: Command,
    counts: PathBuf,
    trace: PathBuf,
}

impl Library {
    pub fn compile() -> Self {
        let folder = support::folder();
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/sweep/inject.c");
        let flags = "-std=c17 -Wall -Wextra -Wno-missing-field-initializers -Werror -O1 -fPIC -shared -o".split(' ');
        let gcc = Command::new("gcc").args(flags).arg(folder.path().join("inject.so")).arg(source).output().unwrap();
        assert!(gcc.status.success(), "{}", String::from_utf8_lossy(&gcc.stderr));
        Self { folder }
    }

    /// The command with `arguments`; its notes are in `folder`, which has none yet.
    pub fn command(&self, arguments: &[String], folder: &Path) -> Prepared {
        let (counts, trace) = (folder.join("counts"), folder.join("trace"));
        support::sparse_file(&counts, 16);
        let preload = format!("LD_PRELOAD={}", text(&self.folder.path().join("inject.so")));
        let mut command = Command::new("/usr/bin/env");
        command.args(["--default-signal", &preload, BINARY]).args(arguments).env("SWEEP_COUNTS", &counts);
        Prepared { command: support::piped(command), counts, trace }
    }
}

impl Prepared {
    /// Notes every call.
    pub fn tracing(mut self) -> Self {
        self.command.env("SWEEP_TRACE", &self.trace);
        self
    }

    pub fn with(mut self, calls: &Calls, fault: Fault, (first, last): When) -> Self {
        self.command.env("SWEEP_KIND", calls.kind).env("SWEEP_PATH", &calls.path).env("SWEEP_FAULT", fault.order());
        self.command.env("SWEEP_WHEN", format!("{first}-{last}"));
        if let Some(thread) = calls.thread {
            self.command.env("SWEEP_THREAD", thread);
        }
        self
    }

    /// What was noted.
    pub fn trace(&self) -> String {
        std::fs::read_to_string(&self.trace).unwrap()
    }

    /// How often the fault happened.
    pub fn injected(&self) -> u64 {
        u64::from_ne_bytes(std::fs::read(&self.counts).unwrap()[8..16].try_into().unwrap())
    }
}
