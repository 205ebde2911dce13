//! Loop devices and mounted file systems for tests; root only. Torn down when dropped.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

/// Runs `program` to its end and gives its stdout without the last newline; panics with its stderr when it fails.
pub fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap_or_else(|e| panic!("{program}: {e}"));
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {stderr}");
    String::from_utf8(output.stdout).unwrap().trim_end().to_owned()
}

/// A path as an argument.
pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
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
    /// Over `file`, with more arguments of losetup.
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
        run("losetup", &["-d", text(&self.path)]);
    }
}

/// A mounted file system.
pub struct Mount {
    folder: tempfile::TempDir,
    // The image file of the file system, deleted last.
    _home: Option<tempfile::TempDir>,
}

impl Mount {
    /// A fresh xfs (with reflinks), btrfs or ext4 in a sparse file.
    pub fn fresh(kind: &str) -> Self {
        let home = tempfile::tempdir().unwrap();
        let image = home.path().join("image");
        sparse_file(&image, 320 << 20);
        run(&format!("mkfs.{kind}"), &["-q", text(&image)]);
        let folder = tempfile::tempdir().unwrap();
        run("mount", &["-o", "loop", text(&image), text(folder.path())]);
        Self { folder, _home: Some(home) }
    }

    /// The file system on `device`.
    pub fn of(device: &Path) -> Self {
        let folder = tempfile::tempdir().unwrap();
        run("mount", &[text(device), text(folder.path())]);
        Self { folder, _home: None }
    }

    /// `source` under another path.
    pub fn bind(source: &Path) -> Self {
        let folder = tempfile::tempdir().unwrap();
        run("mount", &["--bind", text(source), text(folder.path())]);
        Self { folder, _home: None }
    }

    /// A tmpfs that holds `size` bytes.
    pub fn tmpfs(size: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        run("mount", &["-t", "tmpfs", "-o", &format!("size={size}"), "tmpfs", text(folder.path())]);
        Self { folder, _home: None }
    }

    /// A ramfs, which has neither direct I/O nor holes.
    pub fn ramfs() -> Self {
        let folder = tempfile::tempdir().unwrap();
        run("mount", &["-t", "ramfs", "ramfs", text(folder.path())]);
        Self { folder, _home: None }
    }

    /// A path inside.
    pub fn join(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        // Lazily: a child that another test just forked has our descriptors until it executes its program.
        run("umount", &["-l", text(self.folder.path())]);
    }
}

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
