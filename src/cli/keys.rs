//! Enter on the terminal goes on after an error that stopped a job.

use super::stream::in_foreground;
use crate::ground::status::Pause;
use crate::job::Job;
use nix::sys::signal::{SigSet, Signal};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use std::io::{self, IsTerminal, stdin};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

const LOOK: Duration = Duration::from_millis(100);

/// Reads the keyboard while a job is stopped, and only then and in the foreground: otherwise it is the shell's.
pub fn resume_on_enter(jobs: Vec<Arc<Job>>) -> io::Result<()> {
    if !stdin().is_terminal() {
        return Ok(());
    }
    let watch = move || {
        // A read that loses the foreground meanwhile then fails; by default it would stop the whole process.
        let mut background_read = SigSet::empty();
        background_read.add(Signal::SIGTTIN);
        if background_read.thread_block().is_err() {
            return;
        }
        loop {
            thread::sleep(LOOK);
            while jobs.iter().any(|job| is_stopped(job)) {
                if enter_was_pressed() {
                    jobs.iter().filter(|job| is_stopped(job)).for_each(|job| job.resume());
                }
            }
        }
    };
    thread::Builder::new().name("keys".to_owned()).spawn(watch).map(drop)
}

fn is_stopped(job: &Job) -> bool {
    job.snapshot().paused == Some(Pause::Error) && !job.is_cancelled()
}

/// Blocks for a short while.
fn enter_was_pressed() -> bool {
    let bound = Timespec { tv_sec: 0, tv_nsec: LOOK.as_nanos() as i64 };
    let stdin = stdin();
    let ready = poll(&mut [PollFd::new(&stdin, PollFlags::IN)], Some(&bound)).is_ok_and(|ready| ready > 0);
    if !ready || !in_foreground(&stdin) {
        if ready {
            thread::sleep(LOOK);
        }
        return false;
    }
    let mut typed = [0_u8; 256];
    match rustix::io::read(&stdin, &mut typed) {
        Ok(length) if length > 0 => typed[..length].contains(&b'\n'),
        // End of file (Ctrl-D, a hang-up) and errors would come back at once.
        _ => {
            thread::sleep(LOOK);
            false
        }
    }
}
