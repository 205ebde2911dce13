//! What unit tests have beside the product: loop devices, mounted file systems, a qemu-io. Root only; torn down when dropped.

#[allow(dead_code)] // the tests of the command use the rest
#[path = "../../tests/support/mount.rs"]
mod mount;

pub use mount::{LoopDevice, Mount, run, sparse_file, text};

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// A qemu-io that has a raw image open, and its locks, until it is dropped.
pub struct QemuIo {
    child: Child,
}

impl QemuIo {
    /// Returns once the image is open.
    pub fn open(path: &Path, arguments: &[&str]) -> Self {
        let mut command = Command::new("qemu-io");
        command.args(arguments).args(["-f", "raw"]).arg(path).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().expect("qemu-io");
        writeln!(child.stdin.as_mut().unwrap(), "length").unwrap();
        let mut answer = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut answer).unwrap();
        assert!(!answer.is_empty(), "qemu-io did not open {}", path.display());
        Self { child }
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for QemuIo {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
