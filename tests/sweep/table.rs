//! The table in docs/TESTING.md.

use crate::inject::Fault;
use crate::rule::{Place, Policy, Promise, Writes, promised};
use std::collections::BTreeMap;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Row {
    pub place: Place,
    pub call: &'static str,
    pub policy: Policy,
    pub fault: Fault,
}

/// Faults of one call that end alike are in one line.
#[derive(Default)]
pub struct Table(BTreeMap<Key, (Vec<Fault>, u32)>);

type Key = (Place, &'static str, Policy, Promise);

const DOCUMENT: &str = "docs/TESTING.md";
const BEGIN: &str = "<!-- The fault sweep's table: UPDATE=1 DRIVE_BACKUP_SWEEP=all cargo test --test sweep -->\n";
const END: &str = "<!-- The end of the fault sweep's table. -->\n";

impl Table {
    /// A row that held so many `times`.
    pub fn add(&mut self, row: Row, times: u32) {
        let promise = promised(row.place, row.call, row.fault, row.policy);
        let (faults, sum) = self.0.entry((row.place, row.call, row.policy, promise)).or_default();
        faults.push(row.fault);
        *sum += times;
    }

    fn lines(&self) -> Vec<[String; 6]> {
        let line = |(&(place, call, policy, promise), (faults, times)): (&Key, &(Vec<Fault>, u32))| {
            let Promise { code, name, writes } = promise;
            let mut faults = faults.clone();
            faults.sort();
            faults.dedup();
            let faults: Vec<&str> = faults.into_iter().map(Fault::name).collect();
            let flags = policy.flags().join(" ");
            let flags = if flags.is_empty() { String::new() } else { format!("; `{flags}`") };
            let writes = if writes == Writes::Refused { ", some writes fail" } else { "" };
            [
                Place::name(place).to_owned(),
                format!("{call}{flags}"),
                faults.join(", "),
                code.to_string(),
                format!("{}{writes}", name.text()),
                times.to_string(),
            ]
        };
        self.0.iter().map(line).collect()
    }

    /// Panics unless the document says the same; the number of runs is that of the last that wrote it.
    pub fn check(&self) {
        let document = std::fs::read_to_string(DOCUMENT).unwrap();
        let (before, rest) = document.split_once(BEGIN).expect("the mark before the table");
        let (found, after) = rest.split_once(END).expect("the mark after the table");
        let head = "| where | call | fault | exit code | the target's name | runs |\n|---|---|---|---|---|---|\n";
        let lines: String = self.lines().into_iter().map(|cells| format!("| {} |\n", cells.join(" | "))).collect();
        let wanted = format!("{head}{lines}");
        if std::env::var("UPDATE").is_ok_and(|value| value == "1") {
            std::fs::write(DOCUMENT, format!("{before}{BEGIN}{wanted}{END}{after}")).unwrap();
            return;
        }
        let without_runs = |text: &str| {
            let cut = |line: &str| line.trim_end_matches(" |").rsplit_once(" | ").map(|(rest, _)| rest.to_owned());
            text.lines().map(cut).collect::<Vec<_>>()
        };
        let is_same = without_runs(found) == without_runs(&wanted);
        assert!(is_same, "{DOCUMENT} is stale: UPDATE=1 DRIVE_BACKUP_SWEEP=all cargo test --test sweep\n{wanted}");
    }
}
