//! A source that changes while it is copied is an error, never a torn copy that looks good; a clone keeps its instant.
#![cfg(feature = "cli")]

mod support;

use nix::sys::signal::Signal;
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use support::bytes::{allocated_now, identical, noise, read, scribble};
use support::{Ended, LoopDevice, Mount, Running, copy, folder, names, qemu_io, run, sparse_file, text, wait_for};

const MIB: u64 = 1 << 20;

/// A disk full of data in a folder, and an old target in one of its own.
struct Lab {
    folder: tempfile::TempDir,
    raw: PathBuf,
    out: PathBuf,
    target: PathBuf,
}

impl Lab {
    fn new() -> Self {
        let folder = folder();
        let (raw, out) = (folder.path().join("disk.raw"), folder.path().join("out"));
        std::fs::write(&raw, noise(1, 4 << 20)).unwrap();
        std::fs::create_dir(&out).unwrap();
        let target = out.join("copy.raw");
        std::fs::write(&target, "old").unwrap();
        Self { folder, raw, out, target }
    }

    /// Copies `device`, slowly, until `change` has happened in the midst of it.
    fn copied_during(&self, device: &Path, flags: &[&str], change: impl FnOnce()) -> Ended {
        let partial = self.out.join(".copy.raw.drive-backup-partial");
        let arguments = ["--device", text(device), "--target", text(&self.target), "--speed", "64K"];
        let backup = Running::drive_backup(&[&arguments, flags].concat());
        wait_for("the first bytes of the copy", || (allocated_now(&partial) > 0).then_some(()));
        change();
        // The speed limit is off.
        backup.signal(Signal::SIGUSR2);
        backup.ended()
    }

    #[track_caller]
    fn is_refused(&self, ended: &Ended, reason: &str) {
        assert_eq!(ended.code, 4, "{ended:?}");
        let last = ended.stderr.lines().last().unwrap();
        assert!(last.contains("is not consistent") && last.contains(reason), "{ended:?}");
        assert_eq!((names(&self.out), read(&self.target)), (vec!["copy.raw".to_owned()], b"old".to_vec()));
    }
}

/// Writes a sector of a disk's end: long before it is read.
fn write_end(path: &Path) {
    let length = std::fs::File::open(path).unwrap().metadata().unwrap().len();
    let file = OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(&[7; 512], length.max(4 * MIB) - 512).unwrap();
}

#[test]
fn a_file_that_is_written_meanwhile() {
    let lab = Lab::new();
    let ended = lab.copied_during(&lab.raw, &[], || write_end(&lab.raw));
    lab.is_refused(&ended, "it was modified");
    // What is copied already counts as much as what is not.
    let ended = lab.copied_during(&lab.raw, &[], || scribble(&lab.raw, 0, 1));
    lab.is_refused(&ended, "it was modified");
}

#[test]
fn a_file_that_is_cut_off_meanwhile() {
    let lab = Lab::new();
    let cut = || OpenOptions::new().write(true).open(&lab.raw).unwrap().set_len(2 * MIB).unwrap();
    let ended = lab.copied_during(&lab.raw, &[], cut);
    assert_eq!(ended.code, 4, "{ended:?}");
    assert_eq!((names(&lab.out), read(&lab.target)), (vec!["copy.raw".to_owned()], b"old".to_vec()));
}

#[test]
fn a_file_that_changes_and_may() {
    let lab = Lab::new();
    let ended = lab.copied_during(&lab.raw, &["--allow-inconsistent", "--json"], || write_end(&lab.raw));
    assert_eq!(ended.code, 0, "{ended:?}");
    assert!(ended.stderr.contains("warning: the copy may be INCONSISTENT"), "{ended:?}");
    let records = String::from_utf8(ended.stdout).unwrap();
    assert!(records.lines().last().unwrap().contains(r#""consistent":false"#), "{records}");
    // Without a change it says nothing.
    copy(&lab.raw, &lab.target, &["--allow-inconsistent"]).succeeds();
}

#[test]
fn a_backing_file_that_is_written_meanwhile() {
    let lab = Lab::new();
    let top = lab.folder.path().join("top.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "disk.raw", "-F", "raw", text(&top)]);
    qemu_io(&["-f", "qcow2"], &top, &["write -P 1 1M 64k"]);
    let ended = lab.copied_during(&top, &[], || write_end(&lab.raw));
    lab.is_refused(&ended, "disk.raw");
}

#[test]
fn a_device_that_is_written_meanwhile() {
    let lab = Lab::new();
    let device = LoopDevice::over(&lab.raw, &[]);
    let ended = lab.copied_during(device.path(), &[], || write_end(device.path()));
    lab.is_refused(&ended, text(device.path()));
    let ended = lab.copied_during(device.path(), &[], || write_end(&lab.raw));
    lab.is_refused(&ended, text(device.path()));
    copy(device.path(), &lab.target, &[]).succeeds();
    identical(&lab.raw, &lab.target);
}

#[test]
fn a_device_that_is_mounted_for_writing() {
    let lab = Lab::new();
    let image = lab.folder.path().join("filesystem");
    sparse_file(&image, 8 * MIB);
    run("mkfs.ext4", &["-q", text(&image)]);
    let device = LoopDevice::over(&image, &[]);
    let mount = Mount::device(device.path());
    let ended = copy(device.path(), &lab.target, &["--format", "raw"]);
    lab.is_refused(&ended, text(mount.path()));
    mount.make_read_only();
    copy(device.path(), &lab.target, &["--format", "raw"]).succeeds();
}

#[test]
fn a_clone_keeps_the_instant() {
    for kind in ["xfs", "btrfs"] {
        let lab = Lab::new();
        let mount = Mount::fresh(kind);
        let raw = mount.join("disk.raw");
        std::fs::write(&raw, noise(1, 4 << 20)).unwrap();
        // The target is elsewhere: the clone has to be copied, and the source changes while it is.
        let ended = lab.copied_during(&raw, &[], || {
            write_end(&raw);
            OpenOptions::new().write(true).open(&raw).unwrap().set_len(MIB).unwrap();
        });
        assert_eq!(ended.code, 0, "{ended:?}");
        identical(&lab.raw, &lab.target);
        assert_eq!(names(mount.path()).iter().filter(|name| *name != "lost+found").count(), 1, "{kind}");
    }
}
