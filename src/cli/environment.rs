//! An environment variable for each option: DRIVE_BACKUP_SPEED for `--speed`, DRIVE_BACKUP_SERVE_NBD for `serve --nbd`.

use super::args::Args;
use crate::ground::size::parse_rate;
use clap::builder::{FalseyValueParser, TypedValueParser};
use clap::{Arg, ArgAction, Command, CommandFactory, FromArgMatches};
use std::ffi::{OsStr, OsString};

const PREFIX: &str = "DRIVE_BACKUP";

/// The definition of the flags, with their variables. One that is empty, or off, is as if it were not set.
pub fn command() -> Command {
    twinned(Args::command(), PREFIX)
}

/// Reads the arguments, and the environment where they say nothing.
pub fn parse(arguments: &[OsString]) -> Result<Args, clap::Error> {
    Args::from_arg_matches(&command().try_get_matches_from(arguments)?)
}

/// What an option's variable says, if it says anything. Of the backup's own options.
pub fn value(option: &str) -> Option<OsString> {
    std::env::var_os(variable(PREFIX, option)).filter(|value| !value.is_empty())
}

/// Whether the variable of an option without a value turns it on; `verb` as in `serve --json`.
pub fn is_on(verb: Option<&str>, option: &str) -> bool {
    let prefix = verb.map_or_else(|| PREFIX.to_owned(), |verb| variable(PREFIX, verb));
    let said = std::env::var_os(variable(&prefix, option)).unwrap_or_default();
    is_truthy(&said).unwrap_or(false)
}

/// Off, no, false and 0 are not; everything else is. `None`: it is no text.
fn is_truthy(said: &OsStr) -> Option<bool> {
    // It makes no difference of what command it is read.
    FalseyValueParser::new().parse_ref(&Command::new(PREFIX), None, said).ok()
}

/// Whether `said` gives nothing to `arg`: were it given, it would contradict other flags.
fn is_off(arg: &Arg, said: &OsStr) -> bool {
    let is_limit = arg.get_default_values() == ["off"];
    said.is_empty()
        || (is_flag(arg) && is_truthy(said) == Some(false))
        || (is_limit && said.to_str().is_some_and(|text| parse_rate(text) == Ok(None)))
}

fn is_flag(arg: &Arg) -> bool {
    matches!(arg.get_action(), ArgAction::SetTrue)
}

fn twinned(command: Command, prefix: &str) -> Command {
    let command = command.mut_args(|arg| {
        let Some(name) = arg.get_long().map(|long| variable(prefix, long)) else { return arg };
        if std::env::var_os(&name).is_some_and(|value| is_off(&arg, &value)) {
            return arg;
        }
        let arg = if is_flag(&arg) { arg.value_parser(FalseyValueParser::new()) } else { arg };
        // Help and manual say the same on every machine.
        arg.env(name).hide_env_values(true)
    });
    command.mut_subcommands(|command| {
        let prefix = variable(prefix, command.get_name());
        twinned(command, &prefix)
    })
}

fn variable(prefix: &str, name: &str) -> String {
    format!("{prefix}_{}", name.to_uppercase().replace('-', "_"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_option_has_its_variable_and_no_two_have_the_same() {
        fn check(command: &Command, seen: &mut Vec<OsString>) {
            for arg in command.get_arguments().filter(|arg| arg.get_long().is_some()) {
                let name = arg.get_env().unwrap_or_else(|| panic!("{} has none", arg.get_id())).to_owned();
                assert!(!seen.contains(&name), "{name:?}");
                seen.push(name);
            }
            command.get_subcommands().for_each(|command| check(command, seen));
        }
        let mut seen = Vec::new();
        check(&command(), &mut seen);
        assert!(value("no-such-option").is_none() && !is_on(None, "json") && !is_on(Some("serve"), "json"));
        for name in ["DRIVE_BACKUP_SPEED", "DRIVE_BACKUP_ON_CBW_ERROR", "DRIVE_BACKUP_SERVE_NBD"] {
            assert!(seen.contains(&name.into()), "{name}");
        }
        // These have meanings of their own.
        for name in ["DRIVE_BACKUP_DIR", "DRIVE_BACKUP_HOOK", "DRIVE_BACKUP_HOOK_DEVICE", "DRIVE_BACKUP_HOOK_TARGET"] {
            assert!(!seen.contains(&name.into()), "{name}");
        }
        command().debug_assert();
    }
}
