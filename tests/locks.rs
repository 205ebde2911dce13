//! Locks: a QEMU on source or target, a second backup, and the target that is the source under another name.
#![cfg(feature = "cli")]

mod support;

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use support::bytes::{disk, identical, noise, read};
use support::{
    LoopDevice, Mount, Running, copy, fingerprint, folder, names, qemu_img, run, sparse_file, text, wait_for,
};

const MIB: u64 = 1 << 20;

fn lab() -> (tempfile::TempDir, PathBuf, PathBuf) {
    let folder = folder();
    let (raw, target) = (folder.path().join("disk.raw"), folder.path().join("target.raw"));
    disk(&raw, 2 * MIB);
    std::fs::write(&target, noise(3, 2 << 20)).unwrap();
    (folder, raw, target)
}

/// A qemu-io that has `image` open, until dropped.
fn qemu(image: &Path, format: &str, options: &[&str]) -> Running {
    let mut command = Command::new("qemu-io");
    command.args(options).args(["-f", format, text(image)]).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut running = Running::start(&mut command);
    // It prompts once the image is open.
    let stdout = running.child().stdout.as_mut().unwrap();
    let mut prompt = [0; 8];
    std::io::Read::read_exact(stdout, &mut prompt).unwrap();
    assert_eq!(&prompt, b"qemu-io>");
    running
}

/// A backup that goes on until it is dropped.
fn slow_backup(device: &Path, target: &Path, flags: &[&str]) -> Running {
    let arguments = ["--device", text(device), "--target", text(target), "--speed", "16K"];
    let running = Running::drive_backup(&[&arguments, flags].concat());
    wait_for("the backup's lock", || {
        let folder = format!("/proc/{}/fdinfo", running.id());
        let locks = |path: PathBuf| std::fs::read_to_string(path).is_ok_and(|text| text.contains("OFDLCK"));
        let locked = std::fs::read_dir(folder).unwrap().filter(|entry| locks(entry.as_ref().unwrap().path())).count();
        (locked >= 2).then_some(())
    });
    running
}

fn qemu_img_refuses(arguments: &str, paths: &[&Path]) {
    let output =
        Command::new("qemu-img").args(arguments.split_whitespace()).args(paths).output().expect("qemu-img runs");
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && stderr.contains("lock"), "{arguments} {paths:?}: {output:?}");
}

#[test]
fn an_image_that_a_qemu_writes_is_no_source() {
    let (folder, raw, target) = lab();
    let image = folder.path().join("disk.qcow2");
    qemu_img("convert -f raw -O qcow2", &[&raw, &image]);
    for (source, format) in [(&raw, "raw"), (&image, "qcow2")] {
        let writer = qemu(source, format, &[]);
        let before = fingerprint(folder.path());
        let reason = format!("source '{}' is being written by another program (pid {})", text(source), writer.id());
        copy(source, &target, &["--format", "raw"]).fails(8, &reason);
        copy(source, &folder.path().join("new.raw"), &[]).fails(8, &reason);
        copy(source, &folder.path().join("new.raw"), &["--dry-run"]).fails(8, &reason);
        assert_eq!(fingerprint(folder.path()), before, "touched");
    }
    // A reader is in nobody's way.
    let _reader = qemu(&raw, "raw", &["-r"]);
    copy(&raw, &target, &[]).succeeds();
    identical(&raw, &target);
}

#[test]
fn a_rehearsal_ends_as_the_backup_would() {
    let (folder, raw, _) = lab();
    let (ext4, xfs) = (Mount::fresh("ext4"), Mount::fresh("xfs"));
    let (kept, cloned, there) = (ext4.join("disk.raw"), xfs.join("disk.raw"), xfs.join("there.raw"));
    for copy in [&kept, &cloned] {
        std::fs::copy(&raw, copy).unwrap();
    }
    std::fs::write(&there, noise(3, 2 << 20)).unwrap();
    let image = folder.path().join("filesystem");
    sparse_file(&image, 8 * MIB);
    run("mkfs.ext4", &["-q", text(&image)]);
    let device = LoopDevice::over(&image, &[]);
    let _mounted = Mount::device(device.path());
    let _written = [&kept, &cloned].map(|image| qemu(image, "raw", &[]));
    let (away, beside) = (folder.path().join("new.raw"), xfs.join("new.raw"));
    for (source, target, flags, code) in [
        (device.path(), &away, &["--format", "raw"][..], 4),
        (device.path(), &away, &["--format", "raw", "--allow-inconsistent"], 0),
        (kept.as_path(), &away, &[], 8),
        (kept.as_path(), &away, &["--snapshot", "reflink"], 4),
        (kept.as_path(), &away, &["--allow-inconsistent"], 0),
        (cloned.as_path(), &away, &[], 0),
        (cloned.as_path(), &beside, &[], 0),
        (cloned.as_path(), &there, &["--mode", "existing"], 0),
        (cloned.as_path(), &away, &["--snapshot", "overlay"], 8),
        (raw.as_path(), &away, &["--overlay", "/missing", "--writer", "required"], 4),
    ] {
        let before = [folder.path(), xfs.path()].map(fingerprint);
        let rehearsed = copy(source, target, &[flags, &["--dry-run"]].concat());
        assert!([folder.path(), xfs.path()].map(fingerprint) == before, "{source:?} {flags:?}: touched");
        let ended = copy(source, target, flags);
        assert_eq!((rehearsed.code, ended.code), (code, code), "{source:?} {flags:?}: {rehearsed:?} {ended:?}");
        if code != 0 {
            assert_eq!(rehearsed.stderr, ended.stderr);
        }
    }
}

#[test]
fn a_backing_file_that_a_qemu_writes_is_no_source() {
    let (folder, raw, target) = lab();
    let top = folder.path().join("top.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "disk.raw", "-F", "raw", text(&top)]);
    let _writer = qemu(&raw, "raw", &[]);
    let before = fingerprint(folder.path());
    copy(&top, &target, &["--format", "raw"]).fails(8, "is being written by another program");
    assert_eq!(fingerprint(folder.path()), before, "touched");
}

/// A part of the target is what its backing file shows.
#[test]
fn a_backing_file_of_a_target_that_a_qemu_writes_is_refused() {
    let (folder, raw, target) = lab();
    let top = folder.path().join("top.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "disk.raw", "-F", "raw", text(&top)]);
    let arguments = ["restore", text(&target), "--target", text(&top), "--mode", "existing", "--only-changed"];
    let restore = || support::drive_backup(&arguments);
    let writer = qemu(&raw, "raw", &[]);
    let before = fingerprint(folder.path());
    restore().fails(8, "disk.raw' is being written by another program");
    assert_eq!(fingerprint(folder.path()), before, "touched");
    drop(writer);
    restore().succeeds();
}

#[test]
fn an_image_that_a_qemu_uses_is_no_target() {
    let (folder, raw, target) = lab();
    for options in [&[][..], &["-r"]] {
        let _user = qemu(&target, "raw", options);
        let before = fingerprint(folder.path());
        copy(&raw, &target, &["--mode", "existing"]).fails(8, "by another program");
        assert_eq!(fingerprint(folder.path()), before, "touched");
    }
    let writer = qemu(&target, "raw", &[]);
    let before = fingerprint(folder.path());
    copy(&raw, &target, &[]).fails(8, "by another program");
    assert_eq!(fingerprint(folder.path()), before, "touched");
    drop(writer);
    copy(&raw, &target, &[]).succeeds();
    identical(&raw, &target);
}

#[test]
fn qemu_keeps_off_what_a_backup_writes() {
    let (folder, raw, target) = lab();
    let image = folder.path().join("target.qcow2");
    qemu_img("create -q -f qcow2", &[&image, Path::new("2M")]);
    for (target, format) in [(&target, "raw"), (&image, "qcow2")] {
        let _backup = slow_backup(&raw, target, &["--mode", "existing"]);
        qemu_img_refuses(&format!("convert -f {format} -O raw"), &[target, &folder.path().join("stolen")]);
        qemu_img_refuses(&format!("resize -f {format}"), &[target, Path::new("3M")]);
        // And reads what is being read, but does not write it.
        qemu_img("convert -f raw -O raw", &[&raw, &folder.path().join("shared")]);
        qemu_img_refuses("resize -f raw", &[&raw, Path::new("3M")]);
    }
}

#[test]
fn qemu_keeps_off_a_partial_file() {
    let (folder, raw, _) = lab();
    let out = folder.path().join("out");
    std::fs::create_dir(&out).unwrap();
    let _backup = slow_backup(&raw, &out.join("copy.raw"), &[]);
    let partial = out.join(&names(&out)[0]);
    assert_eq!(partial, out.join(".copy.raw.drive-backup-partial"));
    qemu_img_refuses("convert -f raw -O raw", &[&partial, &folder.path().join("stolen")]);
}

#[test]
fn one_target_takes_one_backup() {
    let (folder, raw, target) = lab();
    let link = folder.path().join("link.raw");
    std::os::unix::fs::symlink(&target, &link).unwrap();
    for mode in ["existing", "absolute-paths"] {
        let first = slow_backup(&raw, &target, &["--mode", mode]);
        for name in [&target, &link] {
            copy(&raw, name, &["--mode", mode]).fails(8, "");
        }
        drop(first);
        copy(&raw, &target, &["--mode", mode]).succeeds();
        identical(&raw, &target);
    }
}

#[test]
fn a_device_that_is_read_only_is_refused_before_anything_is_touched() {
    let folder = folder();
    let [disk, file] = ["disk.raw", "file"].map(|name| folder.path().join(name));
    [&disk, &file].iter().for_each(|path| support::sparse_file(path, 1 << 20));
    let device = LoopDevice::over(&file, &["-r"]);
    for more in [&["--dry-run"][..], &[]] {
        let ended = copy(&disk, device.path(), more);
        ended.fails(5, "the device is read-only");
        assert!(!ended.stderr.contains("INCOMPLETE"), "{ended:?}");
    }
}

#[test]
fn a_device_takes_one_backup() {
    let (_folder, raw, target) = lab();
    let device = LoopDevice::over(&target, &[]);
    let first = slow_backup(&raw, device.path(), &["--format", "raw"]);
    copy(&raw, device.path(), &["--format", "raw"]).fails(8, "mounted or in use");
    drop(first);
    copy(&raw, device.path(), &["--format", "raw"]).succeeds();
}

#[test]
fn what_a_backup_writes_no_other_reads() {
    let (folder, raw, target) = lab();
    let _first = slow_backup(&raw, &target, &["--mode", "existing"]);
    copy(&target, &folder.path().join("second.raw"), &[]).fails(8, "by another program");
    // One source may go to many targets at a time.
    copy(&raw, &folder.path().join("second.raw"), &[]).succeeds();
}

/// `target` is the same disk as `device`: refused in both modes, nothing touched.
#[track_caller]
fn is_the_source(folder: &Path, device: &Path, target: &Path) {
    for mode in ["absolute-paths", "existing"] {
        let before = fingerprint(folder);
        let bytes = read(device);
        let flags = ["--mode", mode, "--format", "raw", "--source-format", "raw"];
        copy(device, target, &flags).fails(2, "source and target cannot be the same");
        assert_eq!(fingerprint(folder), before, "touched");
        assert!(read(device) == bytes, "touched");
    }
}

#[test]
fn the_source_under_any_name_is_no_target() {
    let (folder, raw, _) = lab();
    let (soft, hard) = (folder.path().join("soft.raw"), folder.path().join("hard.raw"));
    std::os::unix::fs::symlink("disk.raw", &soft).unwrap();
    std::fs::hard_link(&raw, &hard).unwrap();
    let bind = Mount::bind(folder.path());
    let dotted = folder.path().join("../").join(folder.path().file_name().unwrap()).join("disk.raw");
    for alias in [&raw, &soft, &hard, &bind.join("disk.raw"), &bind.join("hard.raw"), &dotted] {
        is_the_source(folder.path(), &raw, alias);
        is_the_source(folder.path(), alias, &raw);
    }
}

#[test]
fn the_file_behind_a_loop_device_is_that_device() {
    let (folder, raw, _) = lab();
    let device = LoopDevice::over(&raw, &[]);
    is_the_source(folder.path(), &raw, device.path());
    is_the_source(folder.path(), device.path(), &raw);
    is_the_source(folder.path(), device.path(), device.path());
    let second = LoopDevice::over(&raw, &[]);
    is_the_source(folder.path(), device.path(), second.path());
    let stacked = LoopDevice::over(device.path(), &[]);
    is_the_source(folder.path(), stacked.path(), &raw);
    is_the_source(folder.path(), &raw, stacked.path());
}

#[test]
fn a_file_that_the_source_is_made_of_is_no_target() {
    let (folder, raw, _) = lab();
    let top = folder.path().join("top.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "disk.raw", "-F", "raw", text(&top)]);
    for mode in ["absolute-paths", "existing"] {
        let before = fingerprint(folder.path());
        copy(&top, &raw, &["--mode", mode]).fails(2, "source and target cannot be the same");
        assert_eq!(fingerprint(folder.path()), before, "touched");
    }
    let outside = folder.path().join("outside.qcow2");
    let options = format!("data_file={}", text(&folder.path().join("data")));
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &options, text(&outside), "2M"]);
    let before = fingerprint(folder.path());
    copy(&outside, &folder.path().join("data"), &["--format", "raw"]).fails(2, "source and target cannot be the same");
    assert_eq!(fingerprint(folder.path()), before, "touched");
}

#[test]
fn the_sources_backing_file_is_no_existing_targets_either() {
    // The target's own backing file may be the source: that is how an overlay is filled from its base.
    let (folder, raw, _) = lab();
    let overlay = folder.path().join("overlay.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "disk.raw", "-F", "raw", text(&overlay)]);
    copy(&raw, &overlay, &["--mode", "existing"]).succeeds();
    support::bytes::same(("raw", &raw), ("qcow2", &overlay));
}
