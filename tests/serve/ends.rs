//! How a server of a file ends when something is in its way, and disks that are block devices.

use crate::kit::{Served, sparse_disk};
use crate::support::{Ended, LoopDevice, Mount, Running, folder, run, text, wait_for};
use nix::libc;
use nix::sys::signal::Signal;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::thread;

const MIB: u64 = 1 << 20;

fn write(path: &Path, byte: u8, offset: u64) -> std::io::Result<()> {
    OpenOptions::new().write(true).open(path)?.write_all_at(&[byte; 65536], offset)
}

fn byte_at(path: &Path, offset: u64) -> u8 {
    let mut byte = [0];
    File::open(path).unwrap().read_exact_at(&mut byte, offset).unwrap();
    byte[0]
}

/// A backup that has begun, and is stopped before it has got far.
fn stopped_backup(served: &Served) -> Running {
    for at in 0..128 {
        write(served.path(), 1, at * 65536).unwrap();
    }
    let backup = served.start_backup(&served.join("copy.raw"), &["--speed=1M", "--cbw-timeout=60"]);
    let partial = served.join(".copy.raw.drive-backup-partial");
    wait_for("the copy to begin", || partial.metadata().ok().filter(|found| found.blocks() > 0));
    backup.signal(Signal::SIGSTOP);
    backup
}

/// Ends a server, by `end`, while a write waits for a backup that does not go on; the write's error is checked.
fn end_with_a_write_that_waits(served: &mut Served, end: impl FnOnce(&mut Served) -> Ended) -> Ended {
    let (_backup, fusectl) = (stopped_backup(served), Mount::fusectl());
    let file = OpenOptions::new().write(true).open(served.path()).unwrap();
    let writer = thread::spawn(move || file.write_all_at(&[2; 65536], 7 * MIB));
    wait_for("a write that waits", || (served.waiting(fusectl.path()) > 0).then_some(()));
    // Requests are taken in their order: after this one is answered, the write is no longer on its way to the server.
    assert_eq!(byte_at(served.path(), MIB), 1);
    let ended = end(served);
    let error = writer.join().unwrap().expect_err("nobody has carried it out");
    assert!(matches!(error.raw_os_error(), Some(libc::ECONNABORTED | libc::ENOTCONN)), "{error}");
    ended
}

#[test]
fn a_write_that_waits_for_a_backup_is_cut_off_at_the_deadline_of_the_end() {
    let mut served = Served::over_itself(sparse_disk(8 * MIB), "disk.raw", &[]);
    let ended = end_with_a_write_that_waits(&mut served, |served| served.end(Signal::SIGTERM));
    assert_eq!(ended.code, 0);
    assert!(served.said().contains("requests were cut off, 5 seconds after"), "{}", served.said());
    assert!(!served.is_mounted());
    assert_eq!((byte_at(served.path(), 7 * MIB), byte_at(served.path(), MIB)), (1, 1));
}

#[test]
fn a_second_signal_ends_a_server_that_waits_for_requests_at_once() {
    let mut served = Served::over_itself(sparse_disk(8 * MIB), "disk.raw", &[]);
    let ended = end_with_a_write_that_waits(&mut served, |served| {
        served.signal(Signal::SIGTERM);
        wait_for("nobody to be let in", || File::open(served.path()).err());
        served.end(Signal::SIGINT)
    });
    assert_eq!(ended.code, 128 + Signal::SIGINT as i32);
    assert!(served.said().contains("ended by SIGINT before its disks were flushed"), "{}", served.said());
}

#[test]
fn who_unmounts_the_file_ends_its_server_with_an_error_after_a_flush() {
    let folder = folder();
    let image = folder.path().join("disk.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", text(&image), "8M"]);
    let mut served = Served::over_itself(folder, "disk.qcow2", &[]);
    write(served.path(), 3, MIB).unwrap();
    run("umount", &[text(served.path())]);
    assert_eq!(served.ended().code, 1);
    let expected = format!("the mount at '{}' is gone", served.path().display());
    assert!(served.said().contains(&expected), "{}", served.said());
    run("qemu-img", &["check", "-q", text(served.path())]);
    let raw = served.join("raw");
    run("qemu-img", &["convert", "-O", "raw", text(served.path()), text(&raw)]);
    assert_eq!((byte_at(&raw, MIB), byte_at(&raw, MIB + 65535), byte_at(&raw, MIB + 65536)), (3, 3, 0));
}

#[test]
fn a_loop_device_with_a_cache_of_its_own_writes_through_the_file() {
    let served = Served::over_itself(sparse_disk(8 * MIB), "disk.raw", &[]);
    let device = LoopDevice::over(served.path(), &["--direct-io=off"]);
    write(device.path(), 4, 3 * MIB).unwrap();
    run("blockdev", &["--flushbufs", text(device.path())]);
    assert_eq!(byte_at(served.path(), 3 * MIB + 65535), 4);
    served.backup("copy.raw", &[]).succeeds();
    run("cmp", &[text(served.path()), text(&served.join("copy.raw"))]);
    drop(device);
}

#[test]
fn a_block_device_is_served_as_a_file_and_backed_up_by_it() {
    let home = sparse_disk(8 * MIB);
    let device = LoopDevice::over(&home.path().join("disk.raw"), &[]);
    let mut served = Served::as_file(device.path());
    assert_eq!(served.path().metadata().unwrap().len(), 8 * MIB);
    write(served.path(), 5, 2 * MIB).unwrap();
    served.backup("copy.raw", &[]).succeeds();
    run("cmp", &[text(served.path()), text(&served.join("copy.raw"))]);
    write(served.path(), 6, 2 * MIB).unwrap();
    assert_eq!(served.end(Signal::SIGTERM).code, 0);
    assert!(!served.path().exists(), "a file that was made for the mount is removed");
    assert_eq!((byte_at(device.path(), 2 * MIB), byte_at(&served.join("copy.raw"), 2 * MIB)), (6, 5));
}
