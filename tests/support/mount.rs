//! Loop devices and mounted file systems for tests; root only. Torn down when dropped. The library's unit tests have them too.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

/// For a tool that takes something away.
const BOUND: Duration = Duration::from_secs(10);

/// Runs `program` to its end and gives its stdout without the last newline; panics with its stderr when it fails.
#[track_caller]
pub fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {stderr}{}", String::from_utf8_lossy(&output.stdout));
    String::from_utf8(output.stdout).unwrap().trim_end().to_owned()
}

/// A path as an argument.
pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A folder of the test's own, on the disk.
pub fn folder() -> tempfile::TempDir {
    tempfile::tempdir().unwrap()
}

/// A sparse file of `length` bytes.
pub fn sparse_file(path: &Path, length: u64) {
    File::create(path).unwrap().set_len(length).unwrap();
}

/// A loop device over a file.
pub struct LoopDevice {
    path: PathBuf,
}

impl LoopDevice {
    /// With more `arguments` of losetup.
    pub fn over(file: &Path, arguments: &[&str]) -> Self {
        let path = run("losetup", &[&["-f", "--show"], arguments, &[text(file)]].concat());
        Self { path: path.into() }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        undo("losetup", &["-d", text(&self.path)]);
    }
}

/// A mounted file system.
pub struct Mount {
    folder: tempfile::TempDir,
    // The image of the file system, deleted last.
    _home: Option<tempfile::TempDir>,
}

impl Mount {
    /// A tmpfs that holds `size` bytes.
    pub fn tmpfs(size: u64) -> Self {
        let folder = folder();
        run("mount", &["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs", text(folder.path())]);
        Self { folder, _home: None }
    }

    /// A ramfs, which has neither direct I/O nor holes.
    pub fn ramfs() -> Self {
        let folder = folder();
        run("mount", &["-t", "ramfs", "ramfs", text(folder.path())]);
        Self { folder, _home: None }
    }

    /// The kernel's list of FUSE connections.
    pub fn fusectl() -> Self {
        let folder = folder();
        run("mount", &["-t", "fusectl", "fusectl", text(folder.path())]);
        Self { folder, _home: None }
    }

    /// A fresh xfs (with reflinks), btrfs or ext4 in a sparse file.
    pub fn fresh(kind: &str) -> Self {
        let (home, folder) = (folder(), folder());
        let image = home.path().join("image");
        sparse_file(&image, 320 << 20);
        run(&format!("mkfs.{kind}"), &["-q", text(&image)]);
        run("mount", &["-o", "loop", text(&image), text(folder.path())]);
        Self { folder, _home: Some(home) }
    }

    /// Another name for `path`.
    pub fn bind(path: &Path) -> Self {
        let folder = folder();
        run("mount", &["--bind", text(path), text(folder.path())]);
        Self { folder, _home: None }
    }

    /// The file system of a block device.
    pub fn device(device: &Path) -> Self {
        let folder = folder();
        run("mount", &[text(device), text(folder.path())]);
        Self { folder, _home: None }
    }

    /// Nothing can be created or written from now on.
    pub fn make_read_only(&self) {
        run("mount", &["-o", "remount,ro", text(self.path())]);
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// A path inside.
    pub fn join(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        undo("umount", &[text(self.folder.path())]);
    }
}

/// Tears down: a panic here would hide the one that a test may be unwinding from. Tried again for a while: a child that
/// another thread has forked holds all open files for a moment, until it executes its program.
pub fn undo(program: &str, arguments: &[&str]) {
    let since = Instant::now();
    let mut output = Command::new(program).args(arguments).output();
    while !output.as_ref().is_ok_and(|output| output.status.success()) && since.elapsed() < BOUND {
        std::thread::sleep(Duration::from_millis(10));
        output = Command::new(program).args(arguments).output();
    }
    if !output.as_ref().is_ok_and(|output| output.status.success()) {
        eprintln!("{program} {arguments:?}: {output:?}");
    }
}
