//! One of QEMU's tools while it runs. It dies when we do.

use super::super::secret::Secret;
use crate::job::Job;
use rustix::io::retry_on_intr;
use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek};
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Bytes of what the tools say that are kept.
const SAID_LIMIT: u64 = 64 << 10;
/// For one that was killed. One that hangs in the kernel is left to it.
const KILL_TIMEOUT: Duration = Duration::from_millis(500);
/// For a process to end whose connection has.
const END_TIMEOUT: Duration = Duration::from_millis(500);
/// For what a process that has ended said: it is in the pipe, unless what it started holds that.
const SAID_TIMEOUT: Duration = Duration::from_secs(2);
/// Between looks at a process, and at a job.
const STEP: Duration = Duration::from_millis(2);

/// A running tool. Dropped, it is killed.
#[derive(Debug)]
pub struct Process {
    name: &'static str,
    child: Mutex<Child>,
    said: Arc<Said>,
}

/// What it writes to standard error.
#[derive(Debug, Default)]
struct Said {
    last: Mutex<(String, bool)>,
    ended: Condvar,
}

impl Process {
    /// Starts `command`, which `name` is the tool of. A terminal's Ctrl-C is for us, not for it. Does not wait.
    pub fn start(name: &'static str, mut command: Command) -> io::Result<Self> {
        command.stderr(Stdio::piped()).env("LC_ALL", "C").process_group(0);
        super::super::sys::die_with_us(&mut command);
        let said = Arc::new(Said::default());
        let (theirs, (started, child)) = (said.clone(), channel());
        std::thread::Builder::new().name(name.to_owned()).spawn(move || live_beside(command, &started, &theirs))?;
        let child = child.recv().map_err(io::Error::other)??;
        Ok(Self { name, child: Mutex::new(child), said })
    }

    // A panic elsewhere must not keep it alive.
    fn child(&self) -> MutexGuard<'_, Child> {
        self.child.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Of the system.
    pub fn id(&self) -> u32 {
        self.child().id()
    }

    /// Ends it at once.
    pub fn kill(&self) {
        // It may have ended, and then there is nothing to kill.
        let _ = self.child().kill();
        let _ = self.wait(KILL_TIMEOUT);
    }

    /// Until it has ended; `None`: it has not within `timeout`.
    pub fn wait(&self, timeout: Duration) -> io::Result<Option<ExitStatus>> {
        self.wait_unless(timeout, || false)
    }

    fn wait_unless(&self, timeout: Duration, is_over: impl Fn() -> bool) -> io::Result<Option<ExitStatus>> {
        let deadline = Instant::now() + timeout;
        loop {
            let status = self.child().try_wait()?;
            if status.is_some() || Instant::now() >= deadline || is_over() {
                return Ok(status);
            }
            std::thread::sleep(STEP);
        }
    }

    /// Until it has ended; killed after `timeout`, or when `job` is cancelled.
    fn finish(&self, timeout: Duration, job: Option<&Job>) -> io::Result<ExitStatus> {
        let is_cancelled = || job.is_some_and(Job::is_cancelled);
        if let Some(status) = self.wait_unless(timeout, is_cancelled)? {
            return Ok(status);
        }
        self.kill();
        let why = match is_cancelled() {
            true => "cancelled".to_owned(),
            false => format!("{} did not end within {} s", self.name, timeout.as_secs_f64()),
        };
        Err(io::Error::new(io::ErrorKind::TimedOut, why))
    }

    /// Does `work`, which needs this process; kills it when `job` is cancelled meanwhile.
    pub fn unless_cancelled<T>(&self, job: Option<&Job>, work: impl FnOnce() -> T) -> T {
        let Some(job) = job else { return work() };
        let (done, is_done) = std::sync::mpsc::channel::<()>();
        std::thread::scope(|scope| {
            // Dropped when `work` has ended, however it does.
            let _done = done;
            let look = move || {
                while is_done.recv_timeout(STEP * 5) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
                    if job.is_cancelled() {
                        return self.kill();
                    }
                }
            };
            // Without a thread only the work's own bound holds.
            let _ = std::thread::Builder::new().name("cancel".to_owned()).spawn_scoped(scope, look);
            work()
        })
    }

    /// The last line that it said, or how it ended.
    pub fn last_words(&self, status: ExitStatus) -> String {
        let how = match (status.code(), status.signal()) {
            (Some(code), _) => format!("with exit status {code}"),
            (None, Some(signal)) => format!("by signal {signal}"),
            (None, None) => "somehow".to_owned(),
        };
        let said = self.said.line();
        if said.is_empty() { format!("{} was ended {how}", self.name) } else { said }
    }

    /// `error`, or what the process said of it if it has ended, or does so within a moment: its connections end before it.
    pub fn explain(&self, error: io::Error) -> io::Error {
        match self.wait(END_TIMEOUT) {
            Ok(Some(status)) => io::Error::new(error.kind(), self.last_words(status)),
            _ => error,
        }
    }
}

/// Starts `command`, and listens to it. The child dies with this thread, which therefore lives as long.
fn live_beside(mut command: Command, started: &Sender<io::Result<Child>>, said: &Said) {
    let child = command.spawn().map(|mut child| (child.id(), child.stderr.take(), child));
    // It holds our descriptors of what the child has: without it, a dead child's listener would be open.
    drop(command);
    match child {
        Ok((id, stderr, child)) => {
            if started.send(Ok(child)).is_err() {
                return;
            }
            stderr.into_iter().for_each(|stderr| said.listen(stderr));
            let ended = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
            // It fails when its owner has heard of its end first.
            let _ =
                retry_on_intr(|| waitid(WaitId::Pid(Pid::from_raw(id as i32).expect("no child is number 0")), ended));
        }
        Err(error) => _ = started.send(Err(error)),
    }
}

impl Drop for Process {
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

    /// The last line of a process that has ended.
    fn line(&self) -> String {
        let last = self.ended.wait_timeout_while(self.last(), SAID_TIMEOUT, |(_, ended)| !*ended);
        last.map_or_else(|_| String::new(), |(last, _)| last.0.clone())
    }
}

/// What a tool wrote, for a terminal.
fn one_line(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim().replace(char::is_control, " ")
}

/// Runs qemu-img, which is `program`, to its end and gives what it wrote. It has `timeout`, or until `job` is cancelled; its
/// last line, when it fails.
pub fn run(
    program: &Path,
    arguments: &[OsString],
    secret: Option<&Secret>,
    timeout: Duration,
    job: Option<&Job>,
) -> io::Result<Vec<u8>> {
    let mut command = Command::new(program);
    command.args(arguments);
    match secret {
        Some(secret) => command.stdin(secret.pipe()?),
        None => command.stdin(Stdio::null()),
    };
    // Not a pipe, which it could fill, and others hold open.
    let mut output: File = rustix::fs::memfd_create("output", rustix::fs::MemfdFlags::CLOEXEC)?.into();
    command.stdout(output.try_clone()?);
    let process = Process::start("qemu-img", command)?;
    let status = process.finish(timeout, job)?;
    if !status.success() {
        return Err(io::Error::other(process.last_words(status)));
    }
    let mut written = Vec::new();
    output.rewind()?;
    output.take(SAID_LIMIT << 8).read_to_end(&mut written)?;
    Ok(written)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::qemu::words;

    /// No event takes longer.
    const HANGS: Duration = Duration::from_secs(20);

    fn sh(script: &str, timeout: Duration, job: Option<&Job>) -> io::Result<Vec<u8>> {
        run(Path::new("/bin/sh"), &words([&"-c", &script]), None, timeout, job)
    }

    #[test]
    fn what_a_tool_wrote_comes_back_and_how_it_failed_in_one_line() {
        assert_eq!(sh("printf out; echo why >&2", HANGS, None).unwrap(), b"out");
        let failed = |script| sh(script, HANGS, None).unwrap_err().to_string();
        assert_eq!(failed("echo one >&2; echo 'two\tthree' >&2; exit 1"), "two three");
        assert_eq!(failed("exit 7"), "qemu-img was ended with exit status 7");
        assert_eq!(failed("kill -9 $$"), "qemu-img was ended by signal 9");
    }

    #[test]
    fn a_tool_that_does_not_end_is_killed_at_its_bound() {
        let began = Instant::now();
        let error = sh("exec sleep 60", Duration::from_millis(30), None).unwrap_err();
        assert_eq!(error.to_string(), "qemu-img did not end within 0.03 s");
        assert!(began.elapsed() < HANGS);
    }

    #[test]
    fn a_cancelled_job_waits_for_no_tool() {
        let job = Job::new(None);
        job.cancel();
        assert_eq!(sh("exec sleep 60", HANGS * 3, Some(&job)).unwrap_err().to_string(), "cancelled");
        let mut sleep = Command::new("/bin/sleep");
        sleep.arg("60");
        let process = Process::start("sleep", sleep).unwrap();
        let ended = process.unless_cancelled(Some(&job), || process.wait(HANGS).unwrap());
        assert_eq!(ended.and_then(|status| status.signal()), Some(9));
    }
}
