//! docs/TESTING.md is true: its promises are the README's, the tests that it names are there, and so are the deliberate
//! bugs; and each bug of tests/mutants still applies.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;

/// A row of the table of promises.
struct Row {
    promise: String,
    tests: Vec<String>,
    bugs: Vec<String>,
}

/// Words with one space between them, as a reader sees them.
fn flowing(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// What stands between backticks.
fn code(cell: &str) -> Vec<String> {
    cell.split('`').skip(1).step_by(2).map(str::to_owned).collect()
}

fn rows() -> Vec<Row> {
    let document = fs::read_to_string("docs/TESTING.md").unwrap();
    let table = document.split("\n| promise | the tests that fail | a bug that they catch |\n").nth(1).unwrap();
    let lines = table.lines().skip(1).take_while(|line| line.starts_with('|'));
    let rows = lines.map(|line| {
        let cells: Vec<&str> = line.trim_matches('|').split(" | ").map(str::trim).collect();
        let [promise, tests, bugs] = cells[..] else { panic!("{line}") };
        Row { promise: promise.to_owned(), tests: code(tests), bugs: code(bugs) }
    });
    rows.collect()
}

/// The section of the README under `title`.
fn section(title: &str) -> String {
    let readme = fs::read_to_string("README.md").unwrap();
    let section = readme.split(&format!("\n## {title}\n")).nth(1).unwrap();
    section.split("\n## ").next().unwrap().to_owned()
}

fn mutations(arguments: &[&str]) -> (bool, String) {
    let output = Command::new("tests/mutations").args(arguments).output().unwrap();
    let said = [output.stdout, output.stderr].map(|bytes| String::from_utf8(bytes).unwrap()).concat();
    (output.status.success(), said)
}

#[test]
fn each_promise_is_in_the_readme() {
    let readme = flowing(&fs::read_to_string("README.md").unwrap());
    for row in rows() {
        assert!(readme.contains(&row.promise), "README.md does not say: {}", row.promise);
        assert!(!row.tests.is_empty(), "no test: {}", row.promise);
        assert!(!row.bugs.is_empty(), "no bug that breaks it: {}", row.promise);
    }
}

#[test]
fn each_section_of_the_readme_has_a_promise() {
    let readme = fs::read_to_string("README.md").unwrap();
    for section in readme.split("\n## ").skip(1) {
        let (title, text) = section.split_once('\n').unwrap();
        let is_promised = rows().iter().any(|row| flowing(text).contains(&row.promise));
        assert!(is_promised || ["Two commands", "Licence"].contains(&title), "no promise of: {title}");
    }
}

#[test]
fn each_test_of_a_promise_is_there() {
    for test in rows().into_iter().flat_map(|row| row.tests) {
        let (file, name) = test.split_once("::").unwrap_or_else(|| panic!("{test} has no file"));
        let text = fs::read_to_string(file).unwrap_or_else(|error| panic!("{file}: {error}"));
        let (before, _) = text.split_once(&format!("fn {name}(")).unwrap_or_else(|| panic!("no {test}"));
        assert!(before.trim_end().ends_with(']'), "{test} has no attribute that makes it a test");
    }
}

#[test]
fn what_exit_codes_promise_is_in_the_table() {
    let promises: Vec<String> = rows().into_iter().map(|row| row.promise).collect();
    let listed =
        |words: &str| promises.iter().any(|promise| promise.contains(words) || words.contains(promise.as_str()));
    for bullet in section("What exit 0 promises").split("\n- **").skip(1) {
        let bullet = flowing(&bullet.replacen("**", "", 1));
        assert!(promises.iter().any(|promise| bullet.contains(promise.as_str())), "no promise of: {bullet}");
    }
    for line in section("Exit codes").lines().filter(|line| line.starts_with('|')).skip(2) {
        let meaning = line.split('|').nth(2).unwrap().trim();
        assert!(listed(meaning), "no promise of: {meaning}");
    }
}

#[test]
fn each_bug_of_a_promise_is_caught_by_a_test_of_its_row() {
    let (_, all) = mutations(&["--names"]);
    let caught_by =
        |bug: &str| all.lines().find_map(|line| line.strip_prefix(bug)?.strip_prefix(' ')).map(str::to_owned);
    let mut tried = BTreeSet::new();
    for row in rows() {
        for bug in row.bugs {
            let test = caught_by(&bug).unwrap_or_else(|| panic!("no bug {bug} in tests/mutants"));
            assert!(row.tests.iter().any(|name| name.contains(&test)), "{bug} is caught by {test}, of another row");
            tried.insert(bug);
        }
    }
    assert!(tried.len() > 40, "{tried:?}");
}

#[test]
fn the_document_lists_each_deliberate_bug() {
    let document = fs::read_to_string("docs/TESTING.md").unwrap();
    let mark = "<!-- The deliberate bugs: UPDATE=1 cargo test --test testing -->\n";
    let (before, written) = document.split_once(mark).unwrap();
    let (_, listed) = mutations(&["--list"]);
    if std::env::var_os("UPDATE").is_some() {
        fs::write("docs/TESTING.md", format!("{before}{mark}\n{}\n", listed.trim())).unwrap();
    } else {
        assert_eq!(written.trim(), listed.trim(), "to write it anew: UPDATE=1 cargo test --test testing");
    }
}

#[test]
fn each_deliberate_bug_applies_and_its_test_is_there() {
    let (good, said) = mutations(&["--check"]);
    assert!(good, "{said}");
}
