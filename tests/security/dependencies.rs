//! Licences, names and sources of dependencies, by tests/deny.

use crate::support::{Ended, folder, text};
use std::fs;
use std::process::Command;

fn deny(arguments: &[&str]) -> Ended {
    Ended::of(Command::new("tests/deny").args(arguments).output().expect("python3"))
}

#[test]
fn every_dependency_is_allowed() {
    let ended = deny(&[]);
    assert_eq!(ended.code, 0, "{}{}", String::from_utf8_lossy(&ended.stdout), ended.stderr);
}

#[test]
fn what_is_not_allowed_is_named() {
    let folder = folder();
    let rules = fs::read_to_string("deny.toml").unwrap();
    for (from, to, fault) in [
        ("\"MIT\", ", "", "memoffset"),
        ("\"MIT\", \"Apache-2.0\", ", "", "clap"),
        ("{ name = \"tokio\" }", "{ name = \"serde\" }", "serde"),
        ("/rust-lang/", "/somebody/", "clap"),
    ] {
        assert!(rules.contains(from), "{from}");
        let path = folder.path().join("deny.toml");
        fs::write(&path, rules.replace(from, to)).unwrap();
        let ended = deny(&[text(&path)]);
        let said = String::from_utf8(ended.stdout).unwrap();
        assert!(ended.code == 1 && said.lines().any(|line| line.starts_with(fault)), "without {from}: {said}");
    }
}
