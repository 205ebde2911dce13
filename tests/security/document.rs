//! docs/SECURITY.md: each promise names a test, and the test is there.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// The names of all tests.
fn tests() -> BTreeSet<String> {
    fn walk(folder: &Path, found: &mut BTreeSet<String>) {
        for path in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
            if path.is_dir() {
                walk(&path, found);
            } else if path.extension().is_some_and(|e| e == "rs") {
                found.extend(named(&fs::read_to_string(&path).unwrap()));
            }
        }
    }
    let mut found = BTreeSet::new();
    ["src", "tests"].iter().for_each(|folder| walk(Path::new(folder), &mut found));
    found
}

/// Functions that follow a `#[test]`, or stand in a `proptest!`.
fn named(text: &str) -> Vec<String> {
    let mut lines = text.lines().map(str::trim_start);
    let mut found = Vec::new();
    while lines.by_ref().any(|line| line == "#[test]") {
        let function = lines.by_ref().find_map(|line| line.strip_prefix("fn "));
        found.extend(function.and_then(|rest| rest.split('(').next()).map(str::to_owned));
    }
    found
}

/// The lines of tables in the document, as cells.
fn rows() -> Vec<Vec<String>> {
    let document = fs::read_to_string("docs/SECURITY.md").unwrap();
    let rows = document.lines().filter(|line| line.starts_with('|') && !line.starts_with("|---"));
    rows.map(|row| row.trim_matches('|').split('|').map(|cell| cell.trim().to_owned()).collect()).collect()
}

#[test]
fn every_promise_has_its_test() {
    let tests = tests();
    let promises: Vec<_> = rows().into_iter().filter(|row| row.last().unwrap() != "test").collect();
    assert!(promises.len() > 30 && tests.len() > 500, "{} promises, {} tests", promises.len(), tests.len());
    for row in promises {
        let named: Vec<&str> = row.last().unwrap().split('`').skip(1).step_by(2).collect();
        assert!(!named.is_empty(), "no test: {row:?}");
        for test in named {
            assert!(tests.contains(test), "there is no test {test}: {row:?}");
        }
    }
}
