//! A manifest of a disk of any size: refused in one line, or taken for what it says. The first byte chooses the disk's size.
#![no_main]

use drive_backup::manifest::Contents;
use libfuzzer_sys::fuzz_target;
use std::fs;
use std::path::Path;
use std::sync::OnceLock;
use tempfile::TempDir;

const LENGTHS: [u64; 6] = [0, 1, 512, 100_000, 9 << 20, u64::MAX];

fn folder() -> &'static Path {
    static FOLDER: OnceLock<TempDir> = OnceLock::new();
    FOLDER.get_or_init(|| tempfile::tempdir_in("/dev/shm").unwrap()).path()
}

fuzz_target!(|bytes: &[u8]| {
    let Some((&first, rest)) = bytes.split_first() else { return };
    let length = LENGTHS[usize::from(first) % LENGTHS.len()];
    let path = folder().join("manifest");
    fs::write(&path, rest).unwrap();
    match Contents::read(&path, length) {
        Ok(contents) => assert!(contents.digest.length() <= length),
        Err(error) => assert!(!error.to_string().contains('\n')),
    }
});
