//! What benches of whole copies share.
#![allow(dead_code)] // each bench uses its part

use std::path::PathBuf;

pub const MIB: u64 = 1 << 20;
/// The command under test.
pub const OURS: &str = env!("CARGO_BIN_EXE_drive-backup");

/// `[--mib N] [--runs N] [--folder DIR] [--only WORD]`.
pub struct Settings {
    /// Of a disk.
    pub mib: u64,
    /// Of each tool.
    pub runs: usize,
    pub folder: PathBuf,
    /// Only what has this in its name.
    pub only: String,
}

impl Settings {
    pub fn from_arguments() -> Self {
        let mut settings = Self { mib: 1024, runs: 7, folder: std::env::temp_dir(), only: String::new() };
        let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
        while let Some(flag) = arguments.next() {
            let value = arguments.next().unwrap_or_else(|| panic!("{flag} wants a value"));
            match flag.as_str() {
                "--mib" => settings.mib = value.parse().expect("a number"),
                "--runs" => settings.runs = value.parse().expect("a number"),
                "--folder" => settings.folder = value.into(),
                "--only" => settings.only = value,
                _ => panic!("unknown option {flag}"),
            }
        }
        settings
    }

    /// A new folder inside the one that was asked for.
    pub fn new_folder(&self) -> PathBuf {
        let folder = self.folder.join(format!("drive-backup-bench-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("a folder");
        folder
    }
}

/// A stream of numbers, the same each time.
pub struct Random(pub u64);

impl Random {
    pub fn number(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    pub fn noise(&mut self, bytes: &mut [u8]) {
        bytes.chunks_mut(8).for_each(|chunk| chunk.copy_from_slice(&self.number().to_le_bytes()[..chunk.len()]));
    }
}

pub fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
