//! The manual pages and the completions, from the one definition of the flags.

use super::environment;
use clap_complete::Shell;
use std::io;

/// What the flags do not say: EXAMPLES, EXIT STATUS, SIGNALS, JSON, WHAT EXIT 0 PROMISES.
const SECTIONS: &str = include_str!("manual.roff");

const SYNOPSIS: &str = "drive-backup [OPTION]... --device PATH --target PATH|-";

/// drive-backup(1), in roff.
pub fn page() -> io::Result<Vec<u8>> {
    render(environment::command().override_usage(SYNOPSIS), SECTIONS)
}

fn render(command: clap::Command, sections: &str) -> io::Result<Vec<u8>> {
    let man = clap_mangen::Man::new(command).manual("User Commands");
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    man.render_synopsis_section(&mut page)?;
    man.render_description_section(&mut page)?;
    man.render_options_section(&mut page)?;
    page.extend_from_slice(sections.as_bytes());
    Ok(page)
}

/// Its sections beside the flags: EXAMPLES, EXIT STATUS, SIGNALS, BACKUPS, JSON.
const SERVE_SECTIONS: &str = include_str!("serve/manual.roff");

const SERVE_SYNOPSIS: &str =
    "drive-backup serve --device [NAME=]PATH [--nbd ADDRESS] [--vhost-user PATH] [--fuse PATH] [OPTION]...";

/// drive-backup-serve(1), in roff.
pub fn serve_page() -> io::Result<Vec<u8>> {
    subcommand_page("serve", SERVE_SYNOPSIS, SERVE_SECTIONS)
}

/// Its sections beside the flags: EXAMPLES, SEE ALSO.
const VERIFY_SECTIONS: &str = include_str!("manual/verify.roff");
/// Its sections beside the flags: EXAMPLES, SEE ALSO.
const RESTORE_SECTIONS: &str = include_str!("manual/restore.roff");

/// drive-backup-verify(1), in roff.
pub fn verify_page() -> io::Result<Vec<u8>> {
    subcommand_page("verify", "drive-backup verify [OPTION]... --manifest FILE IMAGE", VERIFY_SECTIONS)
}

/// drive-backup-restore(1), in roff.
pub fn restore_page() -> io::Result<Vec<u8>> {
    subcommand_page("restore", "drive-backup restore [OPTION]... --target PATH IMAGE", RESTORE_SECTIONS)
}

/// Its sections beside the flags: COMMANDS, EXAMPLES, FILES, EXIT STATUS, SEE ALSO.
const CTL_SECTIONS: &str = include_str!("manual/ctl.roff");

/// drive-backup-ctl(1), in roff.
pub fn ctl_page() -> io::Result<Vec<u8>> {
    subcommand_page("ctl", "drive-backup ctl [OPTION]... status|speed RATE|pause|resume|cancel|watch", CTL_SECTIONS)
}

fn subcommand_page(name: &str, synopsis: &'static str, sections: &str) -> io::Result<Vec<u8>> {
    let command = environment::command();
    let found = command.find_subcommand(name).expect("it is defined").clone().name(format!("drive-backup-{name}"));
    render(found.override_usage(synopsis).version(env!("CARGO_PKG_VERSION")), sections)
}

/// Completions: the name under which each shell looks for them, and the script.
pub fn completions() -> [(&'static str, Vec<u8>); 3] {
    [("drive-backup.bash", Shell::Bash), ("_drive-backup", Shell::Zsh), ("drive-backup.fish", Shell::Fish)].map(
        |(name, shell)| {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut environment::command(), "drive-backup", &mut script);
            // The hyphen of our name is taken for that of a subcommand, in one of two places of the script.
            let script = String::from_utf8_lossy(&script).replace("drive__subcmd__backup", "drive__backup");
            (name, script.into_bytes())
        },
    )
}
