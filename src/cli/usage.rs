//! Bad arguments: one line with a hint, and a JSON record where JSON was asked for, readable or not.

use super::progress::Style;
use super::resolve::{JsonEnd, View};
use super::signs::Files;
use crate::error::{Error, Kind};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::time::Duration;

const HINT: &str = "try 'drive-backup --help'";

/// clap's findings, without its usage lines, in one line.
pub fn error_of(error: &clap::Error) -> Error {
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
    Error::new(Kind::Usage, format!("{line}; {HINT}"))
}

/// What is shown of arguments that could not be read.
pub fn view(arguments: &[OsString]) -> View {
    let is = |wanted: &str| arguments.iter().any(|argument| argument == wanted);
    let stream = is("--target=-") || arguments.windows(2).any(|pair| pair[0] == "--target" && pair[1] == "-");
    let end = if stream { JsonEnd::Stderr } else { JsonEnd::Stdout };
    View {
        json: is("--json").then_some(end),
        status_interval: Duration::MAX,
        style: Style::None,
        quiet: false,
        verbose: false,
        dry_run: false,
    }
}

/// The files that arguments ask for which could not be read, or not followed.
pub fn files(arguments: &[OsString]) -> Files {
    let value = |flag: &str| value(arguments, flag);
    let name = |flag: &str| value(flag).map(|value| value.to_string_lossy().into_owned()).unwrap_or_default();
    Files {
        status: value("--status-file").map(Into::into),
        metrics: value("--metrics-file").map(Into::into),
        refused: [name("--device"), name("--target")],
    }
}

/// What follows `flag`, after a blank or a `=`.
fn value(arguments: &[OsString], flag: &str) -> Option<OsString> {
    arguments.iter().enumerate().find_map(|(at, argument)| {
        let rest = argument.as_bytes().strip_prefix(flag.as_bytes())?;
        match rest.strip_prefix(b"=") {
            Some(value) => Some(OsStr::from_bytes(value).to_owned()),
            None if rest.is_empty() => arguments.get(at + 1).cloned(),
            None => None,
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::args::Args;
    use clap::Parser;

    fn message(flags: &str) -> String {
        let line = format!("drive-backup {flags}");
        let error = Args::try_parse_from(line.split_whitespace()).expect_err(flags);
        error_of(&error).to_string()
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
        ] {
            let message = message(flags);
            assert!(!message.contains('\n'), "{message}");
            assert!(message.ends_with(HINT), "{message}");
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
