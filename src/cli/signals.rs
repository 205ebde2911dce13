//! Signals: INT, TERM and HUP cancel, USR1 asks for a status, USR2 turns the speed limit off and on, CONT goes on after
//! a stop. What was ignored when the process began (nohup, `cmd &`) stays ignored, for INT and HUP.

use anyhow::Context;
use signal_hook::consts::{SIGCONT, SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2, SIGXFSZ};
use signal_hook::iterator::Signals;
use std::fs;
use std::sync::Arc;
use std::thread;

/// What a signal asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// End the run; the signal ends the process afterwards.
    End(i32),
    /// Say how it stands, once.
    Status,
    /// Turn the speed limit off, or on again.
    ToggleSpeed,
    /// Go on after an error that stopped the job.
    GoOn,
}

/// Calls `act` for every signal, from threads that may do anything, for as long as the process lives.
pub fn listen(act: impl Fn(Request) + Clone + Send + 'static) -> anyhow::Result<()> {
    let on_interrupt = act.clone();
    // It refuses where INT is ignored, which is then to stay.
    match ctrlc::try_set_handler(move || on_interrupt(Request::End(SIGINT))) {
        Err(ctrlc::Error::MultipleHandlers) => {}
        set => set.context("install the handler of SIGINT")?,
    }
    // A write past the limit of a file's size (ulimit -f) is to fail, and not to kill; what we start inherits no handler.
    signal_hook::flag::register(SIGXFSZ, Arc::default()).context("install the handler of SIGXFSZ")?;
    let mut numbers = vec![SIGTERM, SIGUSR1, SIGUSR2, SIGCONT];
    if !is_ignored(SIGHUP) {
        numbers.push(SIGHUP);
    }
    let mut signals = Signals::new(&numbers).context("install the signal handlers")?;
    let wait = move || signals.forever().filter_map(request_of).for_each(act);
    thread::Builder::new().name("signals".to_owned()).spawn(wait).context("start the signal thread")?;
    Ok(())
}

fn request_of(signal: i32) -> Option<Request> {
    match signal {
        SIGTERM | SIGHUP => Some(Request::End(signal)),
        SIGUSR1 => Some(Request::Status),
        SIGUSR2 => Some(Request::ToggleSpeed),
        SIGCONT => Some(Request::GoOn),
        _ => None,
    }
}

fn is_ignored(signal: i32) -> bool {
    fs::read_to_string("/proc/self/status").is_ok_and(|status| ignored_in(&status, signal))
}

fn ignored_in(status: &str, signal: i32) -> bool {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).is_some_and(|mask| mask >> (signal - 1) & 1 == 1)
}

/// As `kill -l` names it, with SIG.
pub fn name(signal: i32) -> &'static str {
    signal_hook::low_level::signal_name(signal).unwrap_or("a signal")
}

/// Ends this process as if `signal` had never been caught, so that shells see what ended it.
pub fn die_of(signal: i32) {
    // It fails for numbers that are no signals; the caller then exits with a code.
    let _ = signal_hook::low_level::emulate_default_handler(signal);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ignored_signals_are_read_from_the_mask() {
        let status = "Name:\tx\nSigIgn:\t0000000000001001\nSigCgt:\tffffffffffffffff\n";
        assert!(ignored_in(status, SIGHUP));
        assert!(!ignored_in(status, SIGINT));
        assert!(!ignored_in("", SIGHUP));
        assert!(is_ignored(signal_hook::consts::SIGPIPE), "as every Rust program begins");
        assert!(!is_ignored(SIGTERM));
    }

    #[test]
    fn signals_have_names() {
        assert_eq!((name(SIGINT), name(SIGTERM), name(SIGHUP)), ("SIGINT", "SIGTERM", "SIGHUP"));
    }
}
