//! man/ and completions/ are what the flags say. `UPDATE=1 cargo test --test manual` writes them anew.

#![cfg(feature = "cli")]

use drive_backup::cli::manual::{completions, ctl_page, page, restore_page, serve_page, verify_page};
use std::path::Path;
use std::process::Command;
use std::{env, fs};

fn check(path: &str, expected: &[u8]) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    if env::var_os("UPDATE").is_some_and(|value| value == "1") {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(&path, expected).unwrap();
    }
    let found = fs::read(&path).unwrap_or_default();
    assert!(found == expected, "{} is stale: UPDATE=1 cargo test --test manual", path.display());
}

#[test]
fn the_manual_pages_are_up_to_date() {
    check("man/drive-backup.1", &page().unwrap());
    check("man/drive-backup-serve.1", &serve_page().unwrap());
    check("man/drive-backup-verify.1", &verify_page().unwrap());
    check("man/drive-backup-restore.1", &restore_page().unwrap());
    check("man/drive-backup-ctl.1", &ctl_page().unwrap());
}

#[test]
fn the_completions_are_up_to_date() {
    for (name, script) in completions() {
        check(&format!("completions/{name}"), &script);
    }
}

#[test]
fn bash_can_read_its_completions() {
    let output = Command::new("bash").args(["-n", "completions/drive-backup.bash"]).output().unwrap();
    assert!(output.status.success() && output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn bash_completes_flags_and_subcommands() {
    let cases: [(&[&str], &str); 5] = [
        (&["--tar"], "--target"),
        (&["restore", "--tar"], "--target"),
        (&["serve", "--read"], "--read-only"),
        (&["ctl", "pau"], "pause"),
        (&["ctl", "status", "--js"], "--json"),
    ];
    for (words, completed) in cases {
        let (before, last) = (["drive-backup"].iter().chain(&words[..words.len() - 1]), words.last().unwrap());
        let before: Vec<&str> = before.copied().collect();
        let previous = before.last().unwrap();
        let script = format!(
            "source completions/drive-backup.bash; COMP_WORDS=({} {last}); COMP_CWORD={}; \
             _drive__backup drive-backup {last} {previous}; echo \"${{COMPREPLY[@]}}\"",
            before.join(" "),
            words.len()
        );
        let output = Command::new("bash").args(["-c", &script]).output().unwrap();
        let told = String::from_utf8(output.stdout).unwrap();
        assert!(told.split_whitespace().any(|word| word == completed), "{words:?}: {told}");
    }
}

/// As `man` shows it.
fn rendered(page: &[u8]) -> String {
    let file = tempfile::Builder::new().suffix(".1").tempfile().unwrap();
    fs::write(file.path(), page).unwrap();
    let mut man = Command::new("man");
    man.args(["--warnings", "--encoding=utf8", "-l"]).arg(file.path());
    let output = man.env("MANWIDTH", "100").env("LC_ALL", "C.UTF-8").output().expect("man is installed");
    assert!(output.status.success() && output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn the_manual_pages_render_without_a_warning() {
    let text = rendered(&page().unwrap());
    for section in ["NAME", "OPTIONS", "EXAMPLES", "EXIT STATUS", "SIGNALS", "JSON", "WHAT EXIT 0 PROMISES"] {
        assert!(text.lines().any(|line| line == section), "{section} is missing");
    }
    for page in [verify_page(), restore_page()] {
        let text = rendered(&page.unwrap());
        for section in ["NAME", "OPTIONS", "EXAMPLES", "SEE ALSO"] {
            assert!(text.lines().any(|line| line == section), "{section} is missing");
        }
    }
    let text = rendered(&ctl_page().unwrap());
    for section in ["NAME", "OPTIONS", "COMMANDS", "EXAMPLES", "FILES", "EXIT STATUS", "SEE ALSO"] {
        assert!(text.lines().any(|line| line == section), "{section} is missing");
    }
    let text = rendered(&serve_page().unwrap());
    for section in ["NAME", "OPTIONS", "EXAMPLES", "EXIT STATUS", "SIGNALS", "BACKUPS", "JSON", "SEE ALSO"] {
        assert!(text.lines().any(|line| line == section), "{section} is missing");
    }
}

#[test]
fn every_flag_of_the_help_is_in_the_manual_and_the_completions() {
    every_flag_is_in(&["--help"], &page().unwrap(), 20);
    every_flag_is_in(&["serve", "--help"], &serve_page().unwrap(), 10);
    every_flag_is_in(&["ctl", "--help"], &ctl_page().unwrap(), 3);
}

fn every_flag_is_in(arguments: &[&str], page: &[u8], at_least: usize) {
    let help = Command::new(env!("CARGO_BIN_EXE_drive-backup")).args(arguments).output().unwrap();
    let help = String::from_utf8(help.stdout).unwrap();
    let is_flag = |word: &&str| word.starts_with("--") && word.len() > 4;
    let flags: Vec<&str> = help.split(|c: char| !c.is_ascii_alphanumeric() && c != '-').filter(is_flag).collect();
    assert!(flags.len() > at_least, "{help}");
    let page = std::str::from_utf8(page).unwrap().replace("\\-", "-");
    for flag in flags {
        assert!(page.contains(flag), "{flag} is not in the manual");
        for (name, script) in completions() {
            let script = String::from_utf8(script).unwrap();
            let word = if name.ends_with("fish") { flag.trim_start_matches('-') } else { flag };
            assert!(script.contains(word), "{flag} is not in {name}");
        }
    }
}
