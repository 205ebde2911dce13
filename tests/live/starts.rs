//! Writers that start while a backup ends.

use crate::kit::{self, SECTOR, contents};
use crate::support::fault::Halted;
use crate::support::{names, text};
use drive_backup::writer::Writer;
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;

/// The backup stands still when it has withdrawn its announcement: what starts now is not trapped, and was not read.
#[test]
fn a_writer_that_starts_after_the_last_read_of_a_resting_disk_changes_nothing() {
    let folder = kit::memory_folder();
    let path = |name: &str| folder.path().join(name);
    let before = contents(1, 0, 64 * SECTOR);
    std::fs::write(path("disk"), &before).unwrap();
    let (disk, copy, meet) = (path("disk"), path("copy"), path("meet"));
    let ends = ["--device", text(&disk), "--target", text(&copy), "--writer-dir", text(&meet)];
    std::fs::create_dir(&meet).unwrap();
    std::fs::set_permissions(&meet, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    let backup = Halted::after("unlinkat", &["-P", text(&meet)], &[&ends[..], &["--overlay", "memory"]].concat());
    assert!(!names(&meet).iter().any(|name| name.starts_with("backup-")), "the announcement is gone");
    assert!(!copy.exists());
    let writer = Writer::open_in(&disk, &meet).unwrap();
    let bracket = writer.begin(0, SECTOR).unwrap();
    OpenOptions::new().write(true).open(&disk).unwrap().write_all_at(&contents(2, 0, SECTOR), 0).unwrap();
    drop(bracket);
    backup.goes_on().succeeds();
    kit::same("the copy", &std::fs::read(&copy).unwrap(), &before);
}
