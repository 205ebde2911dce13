//! The house rules that a compiler does not know: floors, rooms, sizes.

use std::fs;
use std::path::{Path, PathBuf};

/// The floor of each module, the longest matching prefix decides. A module uses lower floors and its own folder.
const FLOORS: &[(&str, u8)] = &[
    ("ground", 0),
    ("sync", 0),
    ("hold", 0),
    ("ring::layout", 0),
    ("ring::packet", 1),
    ("ring::stall", 0),
    ("error", 1),
    ("digest", 1),
    ("snapshot::copy_state", 1),
    ("snapshot::tracker", 2),
    ("ring::bits", 2),
    ("ring::gate", 2),
    ("ring::meeting", 2),
    ("ring::queue", 2),
    ("job", 2),
    ("monitor", 2),
    ("snapshot", 3),
    ("snapshot::preserve", 4),
    ("nbd::payload", 1),
    ("nbd::protocol", 1),
    ("nbd", 2),
    ("hook", 3),
    ("image", 3),
    ("manifest", 3),
    ("ring", 3),
    ("sandbox", 3),
    ("ring::server", 4),
    ("unix_socket", 4),
    ("writer", 4),
    ("copier", 4),
    ("scan", 4),
    ("publish", 4),
    ("backup", 5),
    ("qmp", 6),
    ("serve", 6),
    ("cli", 7),
    ("main", 8),
];

/// Files where `unsafe` may stand, each block with its reason.
const UNSAFE_ROOMS: &[&str] = &[
    "src/image/sys.rs",
    "src/ring/shm.rs",
    "src/writer/capi.rs",
    "src/cli/sys.rs",
    "src/serve/vhost_user/transfer.rs",
];

const LONGEST_FILE: usize = 600;
const LONGEST_FUNCTION: usize = 70;

fn sources() -> Vec<(PathBuf, String)> {
    fn walk(folder: &Path, found: &mut Vec<(PathBuf, String)>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                walk(&path, found);
            } else if path.extension().is_some_and(|e| e == "rs") {
                found.push((path.clone(), fs::read_to_string(&path).unwrap()));
            }
        }
    }
    let mut found = Vec::new();
    walk(Path::new("src"), &mut found);
    assert!(found.len() > 20, "run from the package's root");
    found
}

/// Without its tests: a module's own tests may reach anywhere.
fn product(path: &Path, text: &str) -> String {
    let name = path.file_stem().and_then(|stem| stem.to_str()).unwrap();
    if ["tests", "models"].contains(&name) || path.iter().any(|part| part == "tests") {
        return String::new();
    }
    text.split("#[cfg(test)]\nmod tests {").next().unwrap().to_owned()
}

fn module_of(path: &Path) -> String {
    let relative = path.strip_prefix("src").unwrap().with_extension("");
    let parts: Vec<_> = relative.iter().map(|part| part.to_str().unwrap()).filter(|part| *part != "mod").collect();
    parts.join("::")
}

fn floor_of(module: &str) -> Option<u8> {
    let fits = |prefix: &str| module == prefix || module.starts_with(&format!("{prefix}::"));
    FLOORS.iter().filter(|(prefix, _)| fits(prefix)).max_by_key(|(prefix, _)| prefix.len()).map(|&(_, floor)| floor)
}

/// Every `crate::a::b` of the text.
fn uses(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    for line in text.lines().map(str::trim_start).filter(|line| !line.starts_with("//")) {
        for (at, _) in line.match_indices("crate::") {
            let rest = &line[at + "crate::".len()..];
            let path: String = rest.chars().take_while(|c| c.is_alphanumeric() || "_:".contains(*c)).collect();
            found.push(path.trim_end_matches(':').to_owned());
        }
    }
    found
}

#[test]
fn floors_point_downwards() {
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        let module = module_of(&path);
        if module == "lib" {
            continue;
        }
        let floor = floor_of(&module).unwrap_or_else(|| panic!("{module} has no floor"));
        let folder = module.split("::").next().unwrap();
        for used in uses(&product(&path, &text)) {
            let below = floor_of(&used).unwrap_or_else(|| panic!("{module} uses {used}, which has no floor"));
            if below >= floor && used.split("::").next().unwrap() != folder {
                wrong.push(format!("{module} (floor {floor}) uses {used} (floor {below})"));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn unsafe_stays_in_its_rooms() {
    for (path, text) in sources() {
        if UNSAFE_ROOMS.iter().any(|room| path == Path::new(room)) {
            let blocks = text.matches("unsafe {").count() + text.matches("unsafe impl").count();
            let reasons = text.matches("SAFETY:").count();
            assert!(reasons >= blocks, "{}: {blocks} unsafe blocks, {reasons} reasons", path.display());
        } else {
            assert!(!text.contains("allow(unsafe_code)"), "{} is no room for unsafe", path.display());
        }
    }
}

#[test]
fn the_engine_neither_prints_nor_exits() {
    for (path, text) in sources() {
        if floor_of(&module_of(&path)).is_some_and(|floor| floor < 6) {
            for word in ["println!", "eprintln!", "process::exit", "anyhow::", "indicatif::", "clap::", "dbg!"] {
                assert!(!product(&path, &text).contains(word), "{} has {word}", path.display());
            }
        }
    }
}

#[test]
fn files_and_functions_stay_readable() {
    let mut long = Vec::new();
    for (path, text) in sources() {
        let product = product(&path, &text);
        let lines = product.lines().count();
        if lines > LONGEST_FILE {
            long.push(format!("{}: {lines} lines", path.display()));
        }
        long.extend(long_functions(&product).into_iter().map(|f| format!("{}: {f}", path.display())));
    }
    assert!(long.is_empty(), "{long:#?}");
}

/// A function starts at a line with `fn name` and ends at the brace of the same indentation.
fn long_functions(text: &str) -> Vec<String> {
    let lines: Vec<&str> = text.lines().collect();
    let mut long = Vec::new();
    for (start, line) in lines.iter().enumerate() {
        let code = line.trim_start();
        if ["fn ", "pub fn ", "pub(crate) fn ", "pub(super) fn "].iter().any(|word| code.starts_with(word))
            && !code.ends_with(';')
        {
            let close = format!("{}}}", &line[..line.len() - code.len()]);
            let length = lines[start..].iter().position(|line| **line == close).map_or(1, |end| end + 1);
            if length > LONGEST_FUNCTION {
                long.push(format!("{code} is {length} lines"));
            }
        }
    }
    long
}
