//! The manual page and the completions, from the one definition of the flags.

use super::args::Args;
use clap::CommandFactory;
use clap_complete::Shell;
use std::io;

/// What the flags do not say: EXAMPLES, EXIT STATUS, SIGNALS, JSON, WHAT EXIT 0 PROMISES.
const SECTIONS: &str = include_str!("manual.roff");

const SYNOPSIS: &str = "drive-backup [OPTION]... --device PATH --target PATH|-";

/// drive-backup(1), in roff.
pub fn page() -> io::Result<Vec<u8>> {
    let man = clap_mangen::Man::new(Args::command().override_usage(SYNOPSIS)).manual("User Commands");
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    page.extend_from_slice(SECTIONS.as_bytes());
    Ok(page)
}

/// Completions: the name under which each shell looks for them, and the script.
pub fn completions() -> [(&'static str, Vec<u8>); 3] {
    [("drive-backup.bash", Shell::Bash), ("_drive-backup", Shell::Zsh), ("drive-backup.fish", Shell::Fish)].map(
        |(name, shell)| {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Args::command(), "drive-backup", &mut script);
            (name, script)
        },
    )
}
