//! Flags, terminal, exit codes.

mod args;
mod cause;
mod ctl;
mod environment;
mod exit;
mod hooks;
mod json;
mod keys;
pub mod manual;
mod pairs;
mod progress;
mod records;
mod remote;
mod resolve;
mod restore;
mod serve;
mod session;
mod sight;
mod signals;
mod signs;
mod steer;
mod stream;
mod sys;
mod systemd;
mod usage;
mod verify;
mod watch;

use crate::backup::{Disk, Ended, rehearse_all};
use crate::error::{Error, Kind};
use args::Verb;
use hooks::Hooks;
use progress::People;
use resolve::{JsonEnd, View};
use session::{Ends, Session};
use signs::Files;
use std::ffi::OsString;
use std::io::{self, Write};
use stream::Stream;

/// How the process ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[must_use]
pub struct Ending {
    code: u8,
    /// What ended it, to be raised again.
    signal: Option<i32>,
    /// A thread hangs in an I/O call for ever.
    abandoned: bool,
}

impl Ending {
    const fn with_code(code: u8) -> Self {
        Self { code, signal: None, abandoned: false }
    }

    /// Ends the process: by the signal that ended the run, if one did, so that shells see it.
    pub fn exit(self) -> ! {
        if self.abandoned {
            sys::leave_open_files_behind();
        }
        if let Some(signal) = self.signal {
            signals::die_of(signal);
        }
        std::process::exit(self.code.into())
    }
}

/// The whole command: reads the arguments, runs `engine` (that is `backup::run_all`), shows what it does. Returns in bounded
/// time after a signal, whatever the engine does.
pub fn run<E>(engine: E) -> Ending
where
    E: FnOnce(&[Disk<'_>], &Ended<'_>) + Send + 'static,
{
    let arguments: Vec<OsString> = std::env::args_os().collect();
    run_with(&arguments, engine).unwrap_or_else(|error| {
        // The threads that write could not be started; that is all that is left.
        let _ = writeln!(io::stderr(), "drive-backup: {error:#}");
        Ending::with_code(exit::OTHER)
    })
}

fn run_with<E>(arguments: &[OsString], engine: E) -> anyhow::Result<Ending>
where
    E: FnOnce(&[Disk<'_>], &Ended<'_>) + Send + 'static,
{
    let args = match environment::parse(arguments) {
        Ok(args) => args,
        Err(shown) if !shown.use_stderr() => {
            // A reader who closed early (`--help | head -1`) has what he wanted.
            let _ = shown.print();
            return Ok(Ending::with_code(exit::COMPLETE));
        }
        Err(error) => return refuse(arguments, usage::error_of(&error, arguments)),
    };
    let plan = match args.verb {
        Some(Verb::Serve(args)) => return serve::run(&args, usage::view(arguments)),
        Some(Verb::Ctl(args)) => return Ok(ctl::run(&args)),
        Some(Verb::Verify(args)) => verify::plan(*args),
        Some(Verb::Restore(args)) => restore::plan(*args),
        None => resolve::plan(args),
    };
    let plan = match plan {
        Ok(plan) => plan,
        Err(error) => return refuse(arguments, error),
    };
    let steering = &plan.steering;
    let speed = if plan.view.dry_run { steering.rehearsed_speed() } else { steering.first_speed() };
    let mut session = Session::start(plan.view, speed, &plan.disks, Ends { files: plan.files, ..ends(plan.view) })?;
    if let Err(error) = session.listen(&plan.disks, plan.qmp.as_deref()) {
        return Ok(session.refuse(&error));
    }
    match session.own_process().and_then(|()| session.steer(plan.steering, speed)) {
        Ok(()) if plan.view.dry_run => Ok(session.run(plan.disks, Hooks::default(), rehearse_all)),
        Ok(()) => Ok(session.run(plan.disks, plan.hooks, engine)),
        Err(error) => Ok(session.refuse(&Error::new(Kind::Other, format!("{error:#}")))),
    }
}

fn refuse(arguments: &[OsString], error: Error) -> anyhow::Result<Ending> {
    let view = usage::view(arguments);
    let files = usage::files(arguments);
    Ok(Session::start(view, None, &[], Ends { files, ..ends(view) })?.refuse(&error))
}

fn ends(view: View) -> Ends {
    let (json, people): (Option<Box<dyn Write + Send>>, _) = match view.json {
        None => (None, People::on_stderr()),
        Some(JsonEnd::Stdout) => (Some(Box::new(Stream::out())), People::on_stderr()),
        Some(JsonEnd::Stderr) => (Some(Box::new(Stream::err())), People::at(io::sink())),
    };
    Ends { json, people, files: Files::default() }
}
