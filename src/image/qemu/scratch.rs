//! A folder for what only one of QEMU's tools is to find.

use std::io;
use std::path::{Path, PathBuf};

/// Removed, with what is in it, when dropped.
#[derive(Debug)]
pub struct Scratch(PathBuf);

impl Scratch {
    /// An empty one that only we can enter.
    pub fn new() -> io::Result<Self> {
        Ok(Self(nix::unistd::mkdtemp(&std::env::temp_dir().join("drive-backup-XXXXXX"))?))
    }

    /// Inside it.
    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // What can't be removed is a folder for temporary files, with a name in it.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
