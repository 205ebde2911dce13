//! Bad arguments: one line with a hint, and a JSON record where JSON was asked for, readable or not.

use super::args::Args;
use super::environment;
use super::pairs;
use super::progress::Style;
use super::resolve::{JsonEnd, View};
use super::signs::Files;
use crate::error::{Error, Kind};
use crate::image::location::{Location, without_password};
use clap::CommandFactory;
use clap::error::ErrorKind;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// clap's findings, without its usage lines, in one line with a hint.
pub fn error_of(error: &clap::Error, arguments: &[OsString]) -> Error {
    let verb = verb(arguments);
    let line = match (error.kind(), verb) {
        // There clap shows the help.
        (ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand, Some(verb)) => {
            format!("{verb} needs one of {}", verbs_of(&verb_definition(verb)).join(", "))
        }
        (ErrorKind::InvalidSubcommand, None) => {
            format!("{}; a disk is named by --device, its copy by --target", found(error))
        }
        _ => found(error),
    };
    let line = hide_passwords(line, arguments);
    let name = verb.map_or_else(String::new, |verb| format!(" {verb}"));
    Error::new(Kind::Usage, format!("{line}; try 'drive-backup{name} --help'"))
}

/// What is not understood is quoted, be it the value of another option.
fn hide_passwords(line: String, arguments: &[OsString]) -> String {
    let whole = arguments.iter().filter_map(|argument| argument.to_str());
    let words = whole.flat_map(|word| [Some(word), word.split_once('=').map(|(_, value)| value)]).flatten();
    words.fold(line, |line, word| line.replace(word, &without_password(word)))
}

fn verb_definition(verb: &str) -> clap::Command {
    Args::command().find_subcommand(verb).cloned().unwrap_or_default()
}

fn verbs_of(command: &clap::Command) -> Vec<&str> {
    command.get_subcommands().map(clap::Command::get_name).collect()
}

/// `serve`, say: a verb comes before all else.
fn verb(arguments: &[OsString]) -> Option<&str> {
    let first = arguments.get(1)?.to_str()?;
    verbs_of(&Args::command()).contains(&first).then_some(first)
}

fn found(error: &clap::Error) -> String {
    let text = error.render().to_string();
    let words = text.strip_prefix("error: ").unwrap_or(&text);
    let parts =
        words.lines().take_while(|line| !line.starts_with("Usage:") && !line.starts_with("For more information"));
    let mut line = String::new();
    for part in parts.map(str::trim).filter(|part| !part.is_empty()) {
        let joint = match line.chars().last() {
            None => "",
            Some(':') => " ",
            Some(_) if part.starts_with("--") => ", ",
            Some(_) => "; ",
        };
        line.push_str(joint);
        line.push_str(part);
    }
    line
}

/// What is shown of arguments that could not be read.
pub fn view(arguments: &[OsString]) -> View {
    let verb = verb(arguments);
    let is_on = |option: &str| {
        arguments.iter().any(|argument| argument.as_bytes().strip_prefix(b"--") == Some(option.as_bytes()))
            || environment::is_on(verb, option)
    };
    let stream = verb.is_none() && all_of_backup(arguments, "target").iter().any(|target| target == "-");
    let end = if stream { JsonEnd::Stderr } else { JsonEnd::Stdout };
    View {
        json: is_on("json").then_some(end),
        status_interval: Duration::MAX,
        style: Style::None,
        quiet: false,
        verbose: false,
        dry_run: is_on("dry-run"),
    }
}

/// The files that arguments ask for which could not be read, or not followed; none that is something else of the run too.
pub fn files(arguments: &[OsString]) -> Files {
    if verb(arguments).is_some() {
        return Files::default();
    }
    let value = |option: &str| of_backup(arguments, option);
    // As a run names them that is not refused.
    let name = |option: &str| value(option).map(|word| Location::shown(Path::new(&word))).unwrap_or_default();
    let [status, metrics] = ["status-file", "metrics-file"].map(|option| value(option).map(PathBuf::from));
    let named = ["device", "target", "manifest"].map(|option| all_of_backup(arguments, option));
    let named: Vec<PathBuf> = named.into_iter().flatten().map(Into::into).collect();
    let alone = |file: &Option<PathBuf>, other: &Option<PathBuf>| {
        file.clone().filter(|file| pairs::check_file("", file, named.iter().chain(other)).is_ok())
    };
    Files {
        status: alone(&status, &metrics),
        metrics: alone(&metrics, &status),
        refused: Some([name("device"), name("target")]),
    }
}

/// What the arguments say of an option first, else its variable.
fn of_backup(arguments: &[OsString], option: &str) -> Option<OsString> {
    all_of_backup(arguments, option).into_iter().next()
}

fn all_of_backup(arguments: &[OsString], option: &str) -> Vec<OsString> {
    let given = values(arguments, option);
    if given.is_empty() { environment::value(option).into_iter().collect() } else { given }
}

/// What follows each `--option`, after a blank or a `=`.
fn values(arguments: &[OsString], option: &str) -> Vec<OsString> {
    let of = |(at, argument): (usize, &OsString)| {
        let rest = argument.as_bytes().strip_prefix(b"--")?.strip_prefix(option.as_bytes())?;
        match rest.strip_prefix(b"=") {
            Some(value) => Some(OsStr::from_bytes(value).to_owned()),
            None if rest.is_empty() => arguments.get(at + 1).cloned(),
            None => None,
        }
    };
    arguments.iter().enumerate().filter_map(of).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    fn message(flags: &str) -> String {
        let line = format!("drive-backup {flags}");
        let error = Args::try_parse_from(line.split_whitespace()).expect_err(flags);
        let arguments: Vec<OsString> = line.split_whitespace().map(Into::into).collect();
        error_of(&error, &arguments).to_string()
    }

    #[test]
    fn clap_speaks_in_one_line_with_a_hint() {
        for (flags, parts) in [
            ("", &["required arguments were not provided: --device <PATH>, --target"][..]),
            (
                "--device d --target t --spede 5",
                &["unexpected argument '--spede'", "a similar argument exists: '--speed'"],
            ),
            ("--device d --target t --speed 50Mb", &["'50Mb' for '--speed", "bits", "50MB"]),
            ("--device d --target t --speed -1", &["'-1' for '--speed", "negative"]),
            ("--device d --target t --speed 1e99", &["'1e99' for '--speed", "units are"]),
            ("--device d --target t --format tar", &["'tar' for '--format <FORMAT>'", "possible values: raw, qcow2"]),
            ("--device d --target t --speed 1 --speed 2", &["'--speed <RATE|auto>' cannot be used multiple times"]),
            ("--device d --target t -q -v", &["cannot be used with"]),
            ("a.raw b.raw", &["'a.raw'", "a disk is named by --device, its copy by --target; try 'drive-backup --"]),
            ("serve --bogus", &["unexpected argument '--bogus'", "; try 'drive-backup serve --help'"]),
            ("verify", &["--manifest <FILE>", "; try 'drive-backup verify --help'"]),
            ("ctl", &["ctl needs one of status, speed, pause, resume, cancel, watch; try 'drive-backup ctl --help'"]),
            ("https://alice:hunter2@h/x out", &["'https://alice:…@h/x'"]),
            ("--device d --target t --speed=s3://alice:hunter2@h/x", &["'s3://alice:…@h/x'"]),
            ("ctl stop", &["'stop'; try 'drive-backup ctl --help'"]),
        ] {
            let message = message(flags);
            assert!(!message.contains('\n'), "{message}");
            assert!(message.ends_with(" --help'"), "{message}");
            parts.iter().for_each(|part| assert!(message.contains(part), "{flags}: {message}"));
        }
    }

    #[test]
    fn json_is_found_wherever_it_stands() {
        let view_of = |line: &str| view(&line.split_whitespace().map(OsString::from).collect::<Vec<_>>()).json;
        assert_eq!(view_of("drive-backup --bogus"), None);
        assert_eq!(view_of("drive-backup --bogus --json"), Some(JsonEnd::Stdout));
        assert_eq!(view_of("drive-backup --json --target - --bogus"), Some(JsonEnd::Stderr));
        assert_eq!(view_of("drive-backup --target=- --bogus --json"), Some(JsonEnd::Stderr));
    }
}
