//! Proof of a copy: `--verify`, `--manifest`, `drive-backup verify` and `drive-backup restore`, beside b3sum's own tree and
//! with bits that flip below the file system.

#![cfg(feature = "cli")]

mod support;

use serde_json::Value;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use support::bytes::{allocated, disk, identical, noise, read, same, scribble, sound};
use support::fault::Halted;
use support::hold::Hold;
use support::{
    Ended, LoopDevice, Mount, Running, command, copy, drive_backup, fingerprint, folder, names, qemu_img, run,
    sparse_file, text, wait_for,
};

const MIB: u64 = 1 << 20;

fn json(path: &Path) -> Value {
    serde_json::from_slice(&read(path)).unwrap()
}

fn verify(image: &Path, manifest: &Path, arguments: &[&str]) -> Ended {
    drive_backup(&[&["verify", text(image), "--manifest", text(manifest)], arguments].concat())
}

fn restore(image: &Path, target: &Path, arguments: &[&str]) -> Ended {
    drive_backup(&[&["restore", text(image), "--target", text(target)], arguments].concat())
}

/// The last JSON record of a run.
fn last_record(ended: &Ended) -> Value {
    serde_json::from_slice(ended.stdout.trim_ascii_end().split(|byte| *byte == b'\n').next_back().unwrap()).unwrap()
}

fn flip(path: &Path, offset: u64) {
    let file = OpenOptions::new().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, offset).unwrap();
    byte[0] ^= 1 << (offset % 8);
    file.write_all_at(&byte, offset).unwrap();
}

/// A disk of 21 MiB and a bit: data, stored zeroes, holes, a last block that is short.
fn sample(folder: &Path) -> PathBuf {
    let path = folder.join("disk.raw");
    disk(&path, 21 * MIB + 3000);
    scribble(&path, 9 * MIB + 4096, 5 << 20);
    path
}

#[test]
fn the_same_content_has_the_hash_of_b3sum_whatever_the_format() {
    let folder = folder();
    let source = sample(folder.path());
    let expected = blake3::hash(&read(&source)).to_string();
    let at = |name: &str| folder.path().join(name);
    let manifest = at("m.json");
    let kinds: [(&str, &[&str]); 5] = [
        ("copy.raw", &[]),
        ("full.raw", &["--sparse=never", "--workers", "1"]),
        ("copy.qcow2", &["--cluster-size", "2M"]),
        ("zstd.qcow2", &["--compress", "zstd"]),
        ("small.qcow2", &["--cluster-size", "512"]),
    ];
    let mut blocks = Vec::new();
    for (name, arguments) in kinds {
        let arguments = [&["--verify", "--manifest", text(&manifest), "--json"], arguments].concat();
        let ended = copy(&source, &at(name), &arguments);
        ended.succeeds();
        let summary = last_record(&ended);
        assert_eq!((summary["verified"].as_bool(), summary["hash"].as_str()), (Some(true), Some(&*expected)), "{name}");
        let found = json(&manifest);
        assert_eq!(found["blake3"], *expected, "{name}");
        assert_eq!((&found["source"]["format"], &found["instant"]["how"]), (&"raw".into(), &"unchanging".into()));
        blocks.push(found["blocks"].clone());
        for (image, _) in kinds.iter().filter(|(image, _)| at(image).exists()) {
            verify(&at(image), &manifest, &[]).succeeds();
        }
        verify(&source, &manifest, &["--direct", "--workers", "1"]).succeeds();
    }
    assert!(blocks.iter().all(|other| *other == blocks[0]), "blocks too");
    sound(&at("copy.qcow2"));
    same(("raw", &source), ("qcow2", &at("zstd.qcow2")));
    // A qcow2 source, of which a backing file holds the most.
    qemu_img("create -q -f qcow2 -F qcow2 -b", &[&at("copy.qcow2"), &at("top.qcow2")]);
    copy(&at("top.qcow2"), &at("again.raw"), &["--manifest", text(&manifest)]).succeeds();
    // Its guest sees whole sectors.
    let mut padded = read(&source);
    padded.resize(padded.len().next_multiple_of(512), 0);
    assert_eq!(json(&manifest)["blake3"], *blake3::hash(&padded).to_string());
}

#[test]
fn a_disk_of_any_small_size_has_the_hash_of_b3sum() {
    let folder = folder();
    let (source, target, manifest) =
        (folder.path().join("s.raw"), folder.path().join("t.raw"), folder.path().join("m.json"));
    for size in [0, 1, 1024, 1025, 4 << 20, (4 << 20) + 1, 8 << 20] {
        std::fs::write(&source, noise(size, size as usize)).unwrap();
        let arguments = ["--source-format", "raw", "--verify", "--manifest", text(&manifest)];
        copy(&source, &target, &arguments).succeeds();
        assert_eq!(json(&manifest)["blake3"], *blake3::hash(&read(&source)).to_string(), "{size}");
        verify(&target, &manifest, &["--source-format", "raw"]).succeeds();
    }
}

#[test]
fn a_bit_that_flips_in_any_block_of_any_format_is_found_by_verify() {
    let folder = folder();
    let source = sample(folder.path());
    let at = |name: &str| folder.path().join(name);
    let manifest = at("m.json");
    for (name, format) in [("copy.raw", "raw"), ("copy.qcow2", "qcow2")] {
        copy(&source, &at(name), &["--manifest", text(&manifest)]).succeeds();
        // A bit of data, of a hole, of the last byte.
        for offset in [100, 3 * MIB + 77, 9 * MIB + 5000, 17 * MIB, 21 * MIB + 2999] {
            let image = at("bad");
            run("cp", &[text(&at(name)), text(&image)]);
            if format == "raw" {
                flip(&image, offset);
            } else {
                let pattern = format!("write -P 0x5a {offset} 1");
                support::qemu_io(&["-f", "qcow2"], &image, &[&pattern]);
            }
            let block = offset >> 22 << 22;
            let length = (21 * MIB + 3000 - block).min(4 << 20);
            let ended = verify(&image, &manifest, &["--json"]);
            ended.fails(7, &format!("differs from manifest '{}' at {block:#x}+{length}", manifest.display()));
            let record = last_record(&ended);
            assert_eq!(record["differs"], serde_json::json!([{"offset": block, "length": length}]));
            assert_eq!((&record["reason"], &record["target_state"]), (&"differs".into(), &"untouched".into()));
        }
    }
    // Several: each range is named.
    flip(&at("copy.raw"), 0);
    flip(&at("copy.raw"), 4 * MIB);
    flip(&at("copy.raw"), 20 * MIB);
    let ended = verify(&at("copy.raw"), &manifest, &[]);
    assert_eq!(ended.code, 7, "{ended:?}");
    for line in ["range 0x0+8388608 differs\n", "range 0x1400000+1051576 differs\n", "in 2 ranges"] {
        assert!(ended.stderr.contains(line), "{ended:?}");
    }
}

/// A file system on a loop device, and the file behind it.
struct Below {
    mount: Mount,
    device: LoopDevice,
    backing: PathBuf,
    _home: tempfile::TempDir,
}

impl Below {
    fn new(kind: &str) -> Self {
        let home = folder();
        let backing = home.path().join("fs");
        sparse_file(&backing, 400 << 20);
        let device = LoopDevice::over(&backing, &[]);
        run(&format!("mkfs.{kind}"), &["-q", text(device.path())]);
        let mount = Mount::device(device.path());
        Self { mount, device, backing, _home: home }
    }
}

/// Stands still at the first fadvise, which drops the cache of the target that is on stable storage.
fn before_reading_back(arguments: &[&str]) -> Halted {
    Halted::after("fadvise64", &[], arguments)
}

/// Flips a bit of `what` in the file behind a device.
fn corrupt(backing: &Path, what: &[u8]) {
    let bytes = read(backing);
    let found = memchr(&bytes, what).expect("it is on the medium");
    flip(backing, found as u64 + 3);
}

/// Where `what` begins, which starts on a sector.
fn memchr(bytes: &[u8], what: &[u8]) -> Option<usize> {
    (0..bytes.len().saturating_sub(what.len())).step_by(512).find(|at| bytes[*at..].starts_with(what))
}

#[test]
fn a_bit_that_flips_below_the_file_system_is_found_before_the_copy_is_published_and_later() {
    for kind in ["ext4", "xfs"] {
        let below = Below::new(kind);
        let folder = folder();
        let source = folder.path().join("disk.raw");
        sparse_file(&source, 12 * MIB);
        let bytes = noise(4711, 3 << 20);
        OpenOptions::new().write(true).open(&source).unwrap().write_all_at(&bytes, 5 * MIB).unwrap();
        let marker = &bytes[1 << 20..(1 << 20) + 64];
        let manifest = below.mount.join("m.json");
        for name in ["copy.raw", "copy.qcow2"] {
            let target = below.mount.join(name);
            std::fs::write(&target, "old").unwrap();
            let ends = ["--device", text(&source), "--target", text(&target)];
            let proof = ["--verify", "--manifest", text(&manifest)];
            let halted = before_reading_back(&[&ends[..], &proof].concat());
            corrupt(&below.backing, marker);
            let ended = halted.goes_on();
            let bad = below.mount.join(&format!("{name}.drive-backup-bad"));
            ended.fails(7, "read back differs from what was written to it at 0x400000+4194304");
            assert!(ended.stderr.contains(&format!("the copy is kept as '{}'", bad.display())), "{ended:?}");
            assert_eq!(std::fs::read(&target).unwrap(), b"old", "{kind}");
            assert!(!manifest.exists(), "a manifest without its copy");
            std::fs::remove_file(&bad).unwrap();
            // The same without a fault.
            copy(&source, &target, &["--verify", "--manifest", text(&manifest)]).succeeds();
            verify(&target, &manifest, &[]).succeeds();
            // Rot sets in when nobody looks any more.
            corrupt(&below.backing, marker);
            let differs = format!("differs from manifest '{}' at 0x400000+4194304", text(&manifest));
            verify(&target, &manifest, &["--direct"]).fails(7, &differs);
            std::fs::remove_file(&manifest).unwrap();
            std::fs::remove_file(&target).unwrap();
            run("sync", &["-f", text(below.mount.path())]);
            // The next round must find its own bytes.
            run("fstrim", &[text(below.mount.path())]);
        }
        assert!(below.device.path().exists());
        assert!(!names(below.mount.path()).iter().any(|name| name.contains("drive-backup")), "nothing else is left");
    }
}

#[test]
fn a_device_that_holds_something_else_afterwards_is_incomplete() {
    let folder = folder();
    let source = folder.path().join("disk.raw");
    let bytes = noise(9, 8 << 20);
    std::fs::write(&source, &bytes).unwrap();
    let backing = folder.path().join("device");
    sparse_file(&backing, 8 * MIB);
    let device = LoopDevice::over(&backing, &[]);
    copy(&source, device.path(), &["--verify"]).succeeds();
    let hold = Hold::at("Verifying", folder.path());
    let mut backup = command(&["--device", text(&source), "--target", text(device.path()), "--verify"]);
    let mut backup = Running::start(backup.env("DRIVE_BACKUP_HOLD", hold.variable()));
    let held = hold.reached(&mut backup);
    flip(&backing, MIB + 3);
    drop(held);
    let ended = backup.ended();
    ended.fails(7, "read back differs from what was written to it at 0x0+4194304");
    assert!(ended.stderr.contains("is INCOMPLETE"), "{ended:?}");
}

#[test]
fn a_real_file_system_survives_backup_verify_and_restore() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    let (source, backup, manifest) = (at("disk.raw"), at("backup.qcow2"), at("m.json"));
    sparse_file(&source, 64 * MIB);
    run("mkfs.ext4", &["-q", "-d", "src", text(&source)]);
    copy(&source, &backup, &["--verify", "--manifest", text(&manifest), "--compress", "zstd"]).succeeds();
    verify(&backup, &manifest, &[]).succeeds();

    // Onto a larger device that holds something else: what follows stays.
    sparse_file(&at("device"), 66 * MIB);
    scribble(&at("device"), 0, 66 << 20);
    let tail = read(&at("device"))[64 << 20..].to_vec();
    let device = LoopDevice::over(&at("device"), &[]);
    let ended = restore(&backup, device.path(), &["--manifest", text(&manifest), "--verify"]);
    assert_eq!(ended.code, 0, "{ended:?}");
    assert!(
        ended.stderr.contains("is 2097152 bytes larger than the disk") && ended.stderr.lines().count() == 1,
        "{ended:?}"
    );
    let restored = read(device.path());
    assert!(restored[..64 << 20] == read(&source) && restored[64 << 20..] == tail);
    let mount = Mount::device(device.path());
    run("diff", &["-r", "--exclude=lost+found", "src", text(mount.path())]);

    // While it is mounted it is nobody's target.
    restore(&backup, device.path(), &[]).fails(8, "is mounted at");
    drop(mount);

    // Only what has changed since.
    flip(device.path(), 10 * MIB);
    flip(device.path(), 40 * MIB + 5);
    let before = fingerprint(folder.path());
    let ended = restore(&backup, device.path(), &["--only-changed", "--manifest", text(&manifest), "--json", "-q"]);
    assert_eq!(ended.code, 0, "{ended:?}");
    let written = last_record(&ended)["bytes_written"].as_u64().unwrap();
    assert!(written > 0 && written < 4 * MIB, "{written}");
    assert!(read(device.path())[..64 << 20] == read(&source));
    assert_ne!(before, fingerprint(folder.path()));
    let ended = restore(&backup, device.path(), &["--only-changed", "--json", "-q"]);
    assert!(last_record(&ended)["bytes_written"].as_u64().unwrap() < MIB, "the mount's own marks are back: {ended:?}");

    let ended = restore(&backup, device.path(), &["--only-changed", "-v"]);
    assert!(ended.code == 0 && ended.stderr.contains("; 0 B differed and was written\n"), "{ended:?}");
    let ended = restore(&backup, device.path(), &["--dry-run"]);
    assert!(ended.code == 0 && !ended.stderr.contains("free there"), "a device has its size, and no room: {ended:?}");

    // A hook may have the device at once, and the folder of a new file.
    let use_it = |device: &Path, folder: &Path| format!("mount {0} {1} && umount {1}", text(device), text(folder));
    let there = at("there");
    std::fs::create_dir(&there).unwrap();
    restore(&backup, device.path(), &["--hook-after", &use_it(device.path(), &there), "-q"]).succeeds();
    let again =
        format!("losetup -d {0} && ! losetup {0} 2>&- && losetup {0} {1}", text(device.path()), text(&at("device")));
    copy(device.path(), &at("of-device.raw"), &["--hook-after", &again]).succeeds();
    let disk = Mount::tmpfs(128 * MIB);
    let unmount = format!("umount {0} && mount -t tmpfs tmpfs {0}", text(disk.path()));
    copy(&source, &disk.join("copy.raw"), &["--manifest", text(&disk.join("m.json")), "--hook-after", &unmount])
        .succeeds();

    // Onto a new file, as raw, and into one that is there.
    restore(&backup, &at("new.img"), &[]).succeeds();
    identical(&source, &at("new.img"));
    flip(&at("new.img"), 3 * MIB);
    restore(&backup, &at("new.img"), &["--mode", "existing", "--only-changed", "--verify"]).succeeds();
    identical(&source, &at("new.img"));
}

#[test]
fn a_restore_of_a_damaged_image_ends_before_it_has_gone_far() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    let (source, manifest) = (at("disk.raw"), at("m.json"));
    std::fs::write(&source, noise(3, 64 << 20)).unwrap();
    copy(&source, &at("backup.raw"), &["--manifest", text(&manifest)]).succeeds();
    flip(&at("backup.raw"), 9 * MIB);
    sparse_file(&at("device"), 64 * MIB);
    let device = LoopDevice::over(&at("device"), &[]);
    let ended = restore(&at("backup.raw"), device.path(), &["--manifest", text(&manifest)]);
    ended.fails(7, "the source differs from its manifest at 0x800000+4194304");
    assert!(ended.stderr.contains("is INCOMPLETE"), "{ended:?}");
    run("sync", &[]);
    assert!(allocated(&at("device")) < 32 * MIB, "{}", allocated(&at("device")));
    let ended = restore(&at("backup.raw"), &at("new.raw"), &["--manifest", text(&manifest)]);
    ended.fails(7, "the partial copy was removed");
    assert!(!names(folder.path()).iter().any(|name| name.contains("new")), "{:?}", names(folder.path()));
}

#[test]
fn a_restore_that_does_not_fit_is_refused() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    std::fs::write(at("backup.raw"), noise(3, 2 << 20)).unwrap();
    sparse_file(&at("device"), MIB);
    let device = LoopDevice::over(&at("device"), &[]);
    restore(&at("backup.raw"), device.path(), &[]).fails(2, "is too small with 1048576 bytes, the source has 2097152");
    restore(&at("backup.raw"), &at("new.raw"), &["--only-changed"])
        .fails(2, "a new file has nothing that could be kept");
    restore(&at("backup.raw"), &at("backup.raw"), &[]).fails(2, "cannot be the same");
    restore(&at("none.raw"), &at("new.raw"), &[]).fails(4, "No such file");
    for stream in ["-", "/dev/stdout"] {
        restore(&at("backup.raw"), Path::new(stream), &[]).fails(2, &format!("any offset: {stream} is not possible"));
    }
    assert_eq!(names(folder.path()), ["backup.raw", "device"]);
    let manifest = at("m.json");
    copy(&at("backup.raw"), &at("copy.raw"), &["--manifest", text(&manifest)]).succeeds();
    let before = std::fs::read(&manifest).unwrap();
    restore(&at("copy.raw"), &manifest, &["--manifest", text(&manifest)]).fails(2, "m.json' is '");
    assert_eq!(std::fs::read(&manifest).unwrap(), before);
}

#[test]
fn a_device_is_as_it_was_until_the_first_byte_is_written() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    std::fs::write(at("backup.raw"), noise(3, 2 << 20)).unwrap();
    let before = noise(4, 2 << 20);
    std::fs::write(at("device"), &before).unwrap();
    let device = LoopDevice::over(&at("device"), &[]);
    let (image, target, none) = (at("backup.raw"), device.path(), at("none"));
    for format in ["raw", "qcow2"] {
        let rehearsed = restore(&image, target, &["--format", format, "--dry-run", "-q"]);
        assert_eq!(rehearsed.code, 0, "{rehearsed:?}");
        // A disk that can't be opened ends the one before it.
        let ends = ["--device", text(&image), "--target", text(target), "--device", text(&none), "--target", "x"];
        let refused = drive_backup(&[&ends[..], &["--format", format]].concat());
        assert!(refused.code == 4 && refused.stderr.contains("No such file"), "{refused:?}");
        assert!(read(target) == before, "{format}");
    }
    assert_eq!(names(folder.path()), ["backup.raw", "device"]);
}

#[test]
fn a_clone_has_a_manifest_and_a_verified_copy_is_none() {
    let below = Below::new("xfs");
    let source = below.mount.join("disk.raw");
    std::fs::write(&source, noise(5, 9 << 20)).unwrap();
    let (target, manifest) = (below.mount.join("copy.raw"), below.mount.join("m.json"));
    let expected = blake3::hash(&read(&source)).to_string();
    let shared = |path: &Path| run("filefrag", &["-v", text(path)]).contains("shared");
    copy(&source, &target, &["--manifest", text(&manifest)]).succeeds();
    assert_eq!(
        (&json(&manifest)["blake3"], &json(&manifest)["instant"]["how"]),
        (&(*expected).into(), &"reflink".into())
    );
    assert!(shared(&target), "a clone");
    copy(&source, &target, &["--verify", "--manifest", text(&manifest)]).succeeds();
    assert_eq!(json(&manifest)["blake3"], *expected);
    assert!(!shared(&target), "bytes of its own");
}

#[test]
fn what_cannot_be_proved_is_refused_before_anything_is_touched() {
    let folder = folder();
    let source = sample(folder.path());
    let at = |name: &str| folder.path().join(name);
    std::fs::write(at("old.raw"), "old").unwrap();
    let before = fingerprint(folder.path());
    let here = text(folder.path());
    let target = at("t.raw");
    for (arguments, code, reason) in [
        (&["--verify", "--no-fsync"][..], 2, "cannot be used with"),
        (&["--manifest", "-"], 2, "it is published as a file"),
        (&["--manifest", text(&source)], 2, "name another file"),
        (&["--manifest", text(&target)], 2, "name another file"),
        (&["--manifest", "a.json", "--manifest", "b.json"], 2, "1 --device and 2 --manifest"),
        (&["--manifest", "/no folder/m.json"], 5, "No such file or directory"),
        (&["--manifest", here], 5, "is a directory"),
    ] {
        copy(&source, &target, arguments).fails(code, reason);
    }
    let stream = Ended::of(command(&["--device", text(&source), "--target", "-", "--verify"]).output().unwrap());
    stream.fails(2, "--verify is not possible with --target -");
    assert_eq!(fingerprint(folder.path()), before);
}

#[test]
fn a_stream_has_a_manifest_of_what_was_sent() {
    let folder = folder();
    let source = sample(folder.path());
    let manifest = folder.path().join("m.json");
    let arguments = ["--device", text(&source), "--target", "-", "--manifest", text(&manifest)];
    let ended = Ended::of(command(&arguments).output().unwrap());
    assert_eq!((ended.code, ended.stderr.as_str()), (0, ""));
    assert!(ended.stdout == read(&source));
    assert_eq!(json(&manifest)["blake3"], *blake3::hash(&ended.stdout).to_string());
    verify(&source, &manifest, &[]).succeeds();
}

#[test]
fn manifests_that_are_of_others_or_hostile_end_in_one_line_and_little_memory() {
    let folder = folder();
    let source = sample(folder.path());
    let at = |name: &str| folder.path().join(name);
    let manifest = at("m.json");
    copy(&source, &at("t.raw"), &["--manifest", text(&manifest)]).succeeds();
    sparse_file(&at("other.raw"), 21 * MIB + 3000);
    sparse_file(&at("long.raw"), 22 * MIB);
    let ended = verify(&at("other.raw"), &manifest, &[]);
    assert!(ended.code == 7 && ended.stderr.contains("in 3 ranges, 13.0 MiB, first at 0x0+4194304\n"), "{ended:?}");
    verify(&at("long.raw"), &manifest, &[]).fails(7, "is of another disk");
    verify(&at("none.raw"), &manifest, &[]).fails(4, "No such file");
    verify(&source, &at("none.json"), &[]).fails(2, "No such file");
    verify(&source, &source, &[]).fails(2, "manifest");
    let whole = std::fs::read_to_string(&manifest).unwrap();
    let damaged = |content: &str| {
        std::fs::write(at("bad.json"), content).unwrap();
        let mut limited = Command::new("prlimit");
        limited.args(["--as=600000000", support::BINARY, "verify", text(&source), "--manifest", text(&at("bad.json"))]);
        Ended::of(support::piped(limited).output().unwrap())
    };
    damaged(&whole[..whole.len() / 2]).fails(2, "it ends too early");
    damaged(&whole.replacen("\"blocks\": [", "\"blocks\": [4611686018427387904,", 1))
        .fails(2, "not those of its length");
    damaged(&whole.replacen(&format!("\"length\": {}", 21 * MIB + 3000), "\"length\": 18446744073709551615", 1))
        .fails(2, "not those of its length");
    let huge = format!("{{\"type\": \"drive-backup manifest\", \"blocks\": [{}1", "1,".repeat(5 << 20));
    damaged(&huge).fails(2, "manifest");
    File::create(at("bad.json")).unwrap().set_len(1 << 40).unwrap();
    verify(&source, &at("bad.json"), &[]).fails(2, "more than a manifest of a disk of this size");
}

/// An NBD server of a raw file of which one sector can't be read.
fn serve_with_a_bad_sector(image: &Path, offset: u64, socket: &Path) -> Running {
    let bad = format!("inject-error.0.event=none,inject-error.0.iotype=read,inject-error.0.sector={}", offset / 512);
    let node = format!("driver=raw,file.driver=blkdebug,file.image.driver=file,file.image.filename={}", text(image));
    let node = format!("{node},file.{}", bad.replace(",inject", ",file.inject"));
    let mut server = Command::new("qemu-nbd");
    server.args(["-r", "-t", "-e", "64", "-k", text(socket), "--image-opts", &node]);
    let server = Running::start(&mut support::piped(server));
    wait_for("the server's socket", || socket.exists().then_some(()));
    server
}

#[test]
fn an_unreadable_sector_is_a_difference_even_where_zeroes_are_expected() {
    let folder = folder();
    let source = sample(folder.path());
    let at = |name: &str| folder.path().join(name);
    let manifest = at("m.json");
    copy(&source, &at("t.raw"), &["--sparse=never", "--manifest", text(&manifest)]).succeeds();
    for (offset, block) in [(10 * MIB, "0x800000"), (17 * MIB, "0x1000000")] {
        let socket = at(&format!("socket-{offset}"));
        let _server = serve_with_a_bad_sector(&at("t.raw"), offset, &socket);
        let uri = format!("nbd+unix:///?socket={}", text(&socket));
        let ended = verify(Path::new(&uri), &manifest, &["-q"]);
        assert_eq!(ended.code, 7, "{ended:?}");
        assert!(
            ended.stderr.contains(&format!("differs from manifest '{}' at {block}+4194304", text(&manifest))),
            "{ended:?}"
        );
    }
}

#[test]
fn images_that_only_qemu_knows_are_proved_like_any_other() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    let (source, manifest) = (at("disk.raw"), at("m.json"));
    disk(&source, 16 * MIB);
    let expected = blake3::hash(&read(&source)).to_string();
    for format in ["vmdk", "vdi", "vhdx", "qed"] {
        let image = at(&format!("copy.{format}"));
        let ended = copy(&source, &image, &["--format", format, "--verify", "--manifest", text(&manifest)]);
        assert_eq!(ended.code, 0, "{format}: {ended:?}");
        assert_eq!(json(&manifest)["blake3"], *expected, "{format}");
        let verified = verify(&image, &manifest, &["-q", "--source-format", format]);
        assert_eq!(verified.code, 0, "{format}: {verified:?}");
        // At the end nobody has it open any more.
        let write = format!("qemu-io -f {format} -c 'write -z 0 512' {}", text(&image));
        assert_eq!(copy(&image, &at("raw"), &["--hook-after", &write, "-q"]).code, 0);
        support::qemu_io(&["-f", format], &image, &["write -P 0x5a 1050000 1"]);
        let verified = verify(&image, &manifest, &["-q", "--source-format", format]);
        assert_eq!(verified.code, 7, "{format}: {verified:?}");
        assert!(verified.stderr.contains("at 0x0+4194304"), "{format}: {verified:?}");
    }
}

#[test]
fn an_export_is_read_back_from_its_server() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    let (source, manifest, socket) = (at("disk.raw"), at("m.json"), at("s"));
    disk(&source, 16 * MIB);
    sparse_file(&at("served"), 16 * MIB);
    let mut server = Command::new("qemu-nbd");
    server.args(["-t", "-e", "64", "-f", "raw", "-k", text(&socket), text(&at("served"))]);
    let _server = Running::start(&mut support::piped(server));
    wait_for("the server's socket", || socket.exists().then_some(()));
    let uri = format!("nbd+unix:///?socket={}", text(&socket));
    let arguments = ["--device", text(&source), "--target", &uri, "--verify", "--manifest", text(&manifest), "--json"];
    let ended = drive_backup(&arguments);
    assert_eq!(ended.code, 0, "{ended:?}");
    assert_eq!(last_record(&ended)["verified"], true);
    verify(Path::new(&uri), &manifest, &[]).succeeds();
    support::qemu_io(&["-f", "raw"], Path::new(&uri), &["write -P 0x5a 9000000 1"]);
    verify(Path::new(&uri), &manifest, &[]).fails(7, "at 0x800000+4194304");
    restore(&source, Path::new(&uri), &["--only-changed"]).succeeds();
    verify(Path::new(&uri), &manifest, &[]).succeeds();
}
