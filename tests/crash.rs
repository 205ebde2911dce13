//! The power fails after each write that a file system made: its journal is replayed, and the target's name shows the
//! old target or the whole copy; after success it shows the copy.
#![cfg(feature = "cli")]

mod support;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use support::bytes::{read, scribble};
use support::fault::Export;
use support::{LoopDevice, Mount, Running, folder, run, sparse_file, text};

const MIB: u64 = 1 << 20;
const OLD: &[u8] = b"what was there before";
/// The log's unit, and the size of its header and of an entry's head.
const SECTOR: u64 = 512;

/// One write, discard or flush of a dm-log-writes log.
struct Entry {
    offset: u64,
    data: Vec<u8>,
}

/// Discarded sectors, as the log's flags have it.
const DISCARD: u64 = 4;

/// The entries of the log in order, each with the offset in the log where it ends.
fn entries(log: &Path) -> Vec<(u64, Entry)> {
    let file = File::open(log).unwrap();
    let length = file.metadata().unwrap().len();
    let mut found = Vec::new();
    let mut at = SECTOR;
    while at + SECTOR <= length {
        let mut head = [0; 32];
        file.read_exact_at(&mut head, at).unwrap();
        let word = |index: usize| u64::from_le_bytes(head[8 * index..][..8].try_into().unwrap());
        let (sector, sectors, flags) = (word(0), word(1), word(2));
        at += SECTOR;
        let mut data = vec![0; (sectors * SECTOR) as usize];
        if flags & DISCARD == 0 {
            // Zeroes at the end of the log may be a hole beyond its end.
            let there = length.saturating_sub(at).min(sectors * SECTOR);
            file.read_exact_at(&mut data[..there as usize], at).unwrap();
            at += sectors * SECTOR;
        }
        found.push((at, Entry { offset: sector * SECTOR, data }));
    }
    found
}

/// Formats a disk, makes an old target on it, copies over that while every write is logged, and looks at the disk as it
/// was after each of them.
fn a_crash_leaves_old_or_new(kind: &str) {
    let folder = folder();
    let name = |name: &str| folder.path().join(name);
    let (disk, before, source) = (name("disk"), name("before"), name("source.raw"));
    sparse_file(&source, 3 * MIB);
    scribble(&source, 0, 1 << 20);
    scribble(&source, 2 * MIB, 1 << 20);
    sparse_file(&disk, 320 * MIB);
    run(&format!("mkfs.{kind}"), &["-q", text(&disk)]);
    {
        let device = LoopDevice::over(&disk, &[]);
        let mount = Mount::device(device.path());
        std::fs::write(mount.join("copy.raw"), OLD).unwrap();
    }
    run("cp", &["--sparse=always", text(&disk), text(&before)]);

    sparse_file(&name("log"), 0);
    let succeeded_at = {
        let export = Export::logged(&disk, &name("export"), &name("log"));
        let device = LoopDevice::over(export.path(), &[]);
        let mount = Mount::device(device.path());
        let target = mount.join("copy.raw");
        let backup = ["--device", text(&source), "--target", text(&target)];
        Running::drive_backup(&backup).ended().succeeds();
        let written = std::fs::metadata(name("log")).unwrap().len();
        assert!(read(&target) == read(&source));
        written
    };

    let copy = read(&source);
    let replayed = OpenOptions::new().write(true).open(&before).unwrap();
    let (mut old, mut new) = (0, 0);
    for (end, entry) in entries(&name("log")) {
        replayed.write_all_at(&entry.data, entry.offset).unwrap();
        // Mounting replays the journal, that is, writes: into a copy.
        run("cp", &["--sparse=always", text(&before), text(&name("crashed"))]);
        let device = LoopDevice::over(&name("crashed"), &[]);
        let found = read(&Mount::device(device.path()).join("copy.raw"));
        match () {
            () if found == OLD && end < succeeded_at => old += 1,
            () if found == copy => new += 1,
            () => panic!(
                "{kind}: {} bytes under the target's name after {end} of {succeeded_at} bytes of log",
                found.len()
            ),
        }
    }
    // The crashes came before and after the rename, or nothing was proved.
    assert!(old > 2 && new > 0, "{kind}: {old} old, {new} new");
}

#[test]
fn a_crash_leaves_old_or_new_on_ext4() {
    a_crash_leaves_old_or_new("ext4");
}

#[test]
fn a_crash_leaves_old_or_new_on_xfs() {
    a_crash_leaves_old_or_new("xfs");
}

#[test]
fn a_crash_leaves_old_or_new_on_btrfs() {
    a_crash_leaves_old_or_new("btrfs");
}
