//! The speed limit, without a clock that could be wrong: no more than the allowance is ever written, and zeroes are free.
//! How exact it is over ten seconds is a figure: `cargo bench --bench throttle`.
#![cfg(feature = "cli")]

mod support;

use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::time::{Duration, Instant};
use support::bytes::{identical, noise};
use support::{Running, copy, folder, sparse_file, text, wait_for};

const MIB: u64 = 1 << 20;

/// Bytes of the partial file beside `target` that are written.
fn written(folder: &Path) -> Option<u64> {
    Some(std::fs::metadata(folder.join(".copy.raw.drive-backup-partial")).ok()?.blocks() * 512)
}

#[test]
fn no_more_than_the_allowance_is_written() {
    const RATE: u64 = 2 * MIB;
    let folder = folder();
    let raw = folder.path().join("disk.raw");
    std::fs::write(&raw, noise(1, 6 << 20)).unwrap();
    for workers in ["1", "4"] {
        let target = folder.path().join("copy.raw");
        let started = Instant::now();
        let mut backup = Running::drive_backup(&[
            "--device",
            text(&raw),
            "--target",
            text(&target),
            "--speed",
            "2M",
            "--workers",
            workers,
        ]);
        // What is in flight is charged when it is done: a chunk (a sixteenth of a second's worth) for each worker, and
        // the blocks of its file that the file system counts beside them.
        let slack = RATE / 16 * (workers.parse::<u64>().unwrap() + 1) + MIB / 4;
        while !backup.has_ended() {
            if let Some(written) = written(folder.path()) {
                let allowed = RATE as f64 * started.elapsed().as_secs_f64();
                assert!(written as f64 <= allowed + slack as f64, "{written} bytes after {:?}", started.elapsed());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        // Six mebibytes at two a second; the last charge need not be waited for.
        assert!(started.elapsed() > Duration::from_millis(2500), "{:?}", started.elapsed());
        backup.ended().succeeds();
        identical(&raw, &target);
    }
}

#[test]
fn holes_and_zeroes_are_not_charged() {
    let folder = folder();
    let (holes, zeroes) = (folder.path().join("holes.raw"), folder.path().join("zeroes.raw"));
    sparse_file(&holes, 4 << 30);
    std::fs::write(&zeroes, vec![0; 24 << 20]).unwrap();
    for source in [&holes, &zeroes] {
        let started = Instant::now();
        copy(source, &folder.path().join("copy.raw"), &["--speed", "1M"]).succeeds();
        // Charged, they would take 24 seconds and more than an hour.
        assert!(started.elapsed() < Duration::from_secs(12), "{:?}", started.elapsed());
    }
}

#[test]
fn a_backup_that_was_stopped_does_not_catch_up_in_a_burst() {
    use nix::sys::signal::Signal;
    const RATE: u64 = MIB;
    let folder = folder();
    let raw = folder.path().join("disk.raw");
    std::fs::write(&raw, noise(2, 64 << 20)).unwrap();
    let target = folder.path().join("copy.raw");
    let backup =
        Running::drive_backup(&["--device", text(&raw), "--target", text(&target), "--speed", "1M", "--workers", "1"]);
    wait_for("the first bytes", || written(folder.path()).filter(|&written| written > 0));
    backup.signal(Signal::SIGSTOP);
    let stopped = Instant::now();
    let before = written(folder.path()).unwrap();
    // The stall itself, long enough that a burst would stand out.
    std::thread::sleep(Duration::from_secs(3));
    let resumed = Instant::now();
    backup.signal(Signal::SIGCONT);
    wait_for("more bytes", || written(folder.path()).filter(|&written| written > before));
    let seen =
        wait_for("half a mebibyte more", || written(folder.path()).filter(|&written| written >= before + MIB / 2));
    let allowed = RATE as f64 * resumed.elapsed().as_secs_f64() + RATE as f64 / 4.0 + (MIB / 4) as f64;
    assert!(
        (seen - before) as f64 <= allowed,
        "{} bytes {:?} after a stall of {:?}",
        seen - before,
        resumed.elapsed(),
        resumed - stopped
    );
}
