//! A server over one disk, and what is true of it.

use crate::support::{Ended, Running, command, folder, sparse_file, text, wait_for};
use nix::sys::signal::Signal;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Stdio;

/// `drive-backup serve`, with a folder for everything. Killed, and its mount undone, when dropped.
pub struct Served {
    running: Option<Running>,
    path: PathBuf,
    folder: tempfile::TempDir,
}

/// A folder with a sparse `disk.raw` of `length` bytes.
pub fn sparse_disk(length: u64) -> tempfile::TempDir {
    let folder = folder();
    sparse_file(&folder.path().join("disk.raw"), length);
    folder
}

impl Served {
    /// `--fuse` over the image `name` itself.
    pub fn over_itself(folder: tempfile::TempDir, name: &str, more: &[&str]) -> Self {
        let path = folder.path().join(name);
        let mut served = Self { running: None, path, folder };
        let path = text(&served.path).to_owned();
        served.start(&[&["--device", &path, "--fuse", &path], more].concat());
        served
    }

    /// `disk.raw` at an NBD socket.
    pub fn nbd(folder: tempfile::TempDir) -> Self {
        let path = folder.path().join("disk.raw");
        let mut served = Self { running: None, path, folder };
        let (path, address) = (text(&served.path).to_owned(), format!("unix:{}", text(&served.join("nbd"))));
        served.start(&["--device", &path, "--nbd", &address]);
        served
    }

    /// `device` as the file `shown`, which is made for that.
    pub fn as_file(device: &Path) -> Self {
        let folder = folder();
        let mut served = Self { running: None, path: folder.path().join("shown"), folder };
        let path = text(&served.path).to_owned();
        served.start(&["--device", text(device), "--fuse", &path]);
        served
    }

    fn start(&mut self, arguments: &[&str]) {
        let (said, writers) = (self.join("said"), self.join("writers"));
        let mut serve = command(&[&["serve", "--writer-dir", text(&writers)], arguments].concat());
        serve.stdout(Stdio::null()).stderr(File::create(&said).unwrap());
        let mut running = Running::start(&mut serve);
        wait_for("the server", || {
            let said = std::fs::read_to_string(&said).unwrap();
            assert!(!running.has_ended(), "{said}");
            said.contains("ready: ").then_some(())
        });
        self.running = Some(running);
    }

    /// Once more, with the same folder, after it has ended.
    pub fn again(&mut self) {
        let path = self.path.clone();
        self.start(&["--device", text(&path), "--fuse", text(&path)]);
    }

    /// The image, and what covers it.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// A path in the folder.
    pub fn join(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// A backup of the disk to `name`, with a writer.
    pub fn backup(&self, name: &str, more: &[&str]) -> Ended {
        self.start_backup(&self.join(name), more).ended()
    }

    /// Starts one.
    pub fn start_backup(&self, target: &Path, more: &[&str]) -> Running {
        let mut backup = command(&["--device", text(&self.path), "--target", text(target), "--writer=required"]);
        Running::start(backup.args(["--no-fsync", "--writer-dir", text(&self.join("writers"))]).args(more))
    }

    /// Kills it by `signal`, and waits.
    pub fn end(&mut self, signal: Signal) -> Ended {
        self.signal(signal);
        self.ended()
    }

    /// Sends a signal to it alone.
    pub fn signal(&self, signal: Signal) {
        self.running.as_ref().unwrap().signal(signal);
    }

    /// Waits until it has ended.
    pub fn ended(&mut self) -> Ended {
        self.running.take().unwrap().ended()
    }

    /// What it has told people.
    pub fn said(&self) -> String {
        std::fs::read_to_string(self.join("said")).unwrap()
    }

    /// Is something mounted over the image?
    pub fn is_mounted(&self) -> bool {
        std::fs::read_to_string("/proc/self/mountinfo").unwrap().contains(text(&self.path))
    }

    /// Requests that the server has not answered, as the kernel counts them in the file system `fusectl`.
    pub fn waiting(&self, fusectl: &Path) -> usize {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let line = mounts.lines().find(|line| line.contains(text(&self.path))).unwrap();
        let number = line.split(' ').nth(2).unwrap().split_once(':').unwrap().1.to_owned();
        let waiting = std::fs::read_to_string(fusectl.join(number).join("waiting")).unwrap();
        waiting.trim().parse().unwrap()
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        drop(self.running.take());
        if self.is_mounted() {
            let _ = nix::mount::umount2(&self.path, nix::mount::MntFlags::MNT_DETACH);
        }
    }
}
