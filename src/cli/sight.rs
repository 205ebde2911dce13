//! The flags of what is seen of a run, which every verb has that moves bytes.

use super::args::{Progress, seconds};
use super::progress::Style;
use super::resolve::{JsonEnd, View};
use clap::Args;
use clap::builder::ArgPredicate;
use std::io::IsTerminal;
use std::time::Duration;

const SIGHT: &str = "What you see";
const STATUS_INTERVAL: Duration = Duration::from_secs(1);

// No doc comment: it would take the place of the command's own.
#[derive(Args, Clone, Debug)]
pub struct Sight {
    /// Write JSON lines to standard output; to standard error where the copy goes to standard output
    #[arg(long, help_heading = SIGHT)]
    pub json: bool,

    /// How progress is shown on standard error
    #[arg(long, value_name = "STYLE", default_value = "auto", default_value_if("quiet", ArgPredicate::IsPresent, "none"),
          help_heading = SIGHT)]
    pub progress: Progress,

    /// Time between JSON status records (1 by default) and between plain lines (30 by default)
    #[arg(long, value_name = "SECONDS", allow_hyphen_values = true, value_parser = seconds, help_heading = SIGHT)]
    pub progress_interval: Option<Duration>,

    /// Only errors: no progress, no warnings
    #[arg(short, long, help_heading = SIGHT)]
    pub quiet: bool,

    /// Also say what was found and done, on success too
    #[arg(short, long, conflicts_with = "quiet", help_heading = SIGHT)]
    pub verbose: bool,
}

impl Sight {
    /// What they ask for; `to_stdout`: standard output is the target.
    pub fn view(&self, to_stdout: bool, dry_run: bool) -> View {
        let style = Style::choose(self.progress, self.progress_interval);
        let json = self.json.then_some(if to_stdout { JsonEnd::Stderr } else { JsonEnd::Stdout });
        let style = match json {
            Some(JsonEnd::Stderr) => Style::None,
            // The bar would run through the lines.
            Some(JsonEnd::Stdout) if matches!(style, Style::Bar { .. }) && std::io::stdout().is_terminal() => {
                Style::None
            }
            _ => style,
        };
        let status_interval = self.progress_interval.unwrap_or(STATUS_INTERVAL);
        View { json, status_interval, style, quiet: self.quiet, verbose: self.verbose, dry_run }
    }
}
