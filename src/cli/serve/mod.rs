//! `drive-backup serve`.

pub mod args;
mod front_ends;
mod plan;
mod session;

use super::resolve::View;
use super::{Ending, ends};
use crate::error::{Error, Kind};
use args::ServeArgs;
use session::Session;

/// Serves until a signal or a fault ends it.
pub fn run(args: &ServeArgs, view: View) -> anyhow::Result<Ending> {
    let session = Session::start(ends(view), args.quiet)?;
    let plan = match plan::plan(args) {
        Ok(plan) => plan,
        Err(error) => return Ok(session.refuse(&error)),
    };
    match session.own_process() {
        Ok(()) => Ok(session.run(plan)),
        Err(error) => Ok(session.refuse(&Error::new(Kind::Other, format!("{error:#}")))),
    }
}
