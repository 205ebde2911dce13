//! Real faults: every system call about the target fails or kills, disks are full, sectors are bad. What was under the
//! target's name is there still, or the copy is, whole.
#![cfg(feature = "cli")]

mod support;

use nix::sys::signal::Signal;
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use support::bytes::{identical, noise, read, same, scribble, sound};
use support::fault::{Export, Watched, watched};
use support::{Ended, LoopDevice, Mount, Running, copy, folder, names, sparse_file, text};

const MIB: u64 = 1 << 20;
const OLD: &[u8] = b"what was there before";

/// A source, and a folder of its own for the target.
struct Lab {
    folder: tempfile::TempDir,
    source: PathBuf,
    out: PathBuf,
    target: PathBuf,
    flags: Vec<String>,
}

impl Lab {
    /// The target is named `name`; the command has `flags` beside source and target.
    fn new(name: &str, flags: &[&str]) -> Self {
        let folder = folder();
        let (source, out) = (folder.path().join("disk.raw"), folder.path().join("out"));
        sparse_file(&source, 6 * MIB);
        scribble(&source, 0, 2 << 20);
        scribble(&source, 5 * MIB, 1 << 20);
        std::fs::create_dir(&out).unwrap();
        let target = out.join(name);
        Self { folder, source, target, out, flags: flags.iter().map(|&flag| flag.to_owned()).collect() }
    }

    fn arguments(&self) -> Vec<&str> {
        let ends = ["--device", text(&self.source), "--target", text(&self.target)];
        ends.into_iter().chain(self.flags.iter().map(String::as_str)).collect()
    }

    fn partial(&self) -> PathBuf {
        self.out.join(format!(".{}.drive-backup-partial", self.target.file_name().unwrap().to_str().unwrap()))
    }

    /// The paths that the target's system calls are about.
    fn paths(&self) -> [PathBuf; 3] {
        [self.out.clone(), self.target.clone(), self.partial()]
    }

    fn run(&self) -> Ended {
        Running::drive_backup(&self.arguments()).ended()
    }

    /// Runs the command; `options` are strace's, for the calls about the target.
    fn watched(&self, options: &[&str]) -> Watched {
        watched(options, &self.paths().each_ref().map(PathBuf::as_path), &self.arguments())
    }

    /// Runs the command with `injection`: strace's `syscall:error=…:when=…`.
    fn inject(&self, injection: &str) -> Watched {
        self.watched(&["-e", &format!("inject={injection}")])
    }

    /// How often each system call about the target is made in a good run.
    fn calls(&self) -> BTreeMap<String, usize> {
        self.reset(true);
        let Watched { ended, calls, .. } = self.watched(&[]);
        ended.succeeds();
        let mut counts = BTreeMap::new();
        calls.into_iter().for_each(|name| *counts.entry(name).or_default() += 1);
        counts
    }

    /// Makes the target what it was at first.
    fn reset(&self, is_there: bool) {
        for name in names(&self.out) {
            std::fs::remove_file(self.out.join(name)).unwrap();
        }
        if is_there {
            std::fs::write(&self.target, OLD).unwrap();
        }
    }

    fn is_old(&self) -> bool {
        std::fs::metadata(&self.target).is_ok_and(|m| m.len() == OLD.len() as u64) && read(&self.target) == OLD
    }

    #[track_caller]
    fn holds_the_copy(&self) {
        if self.target.extension().unwrap() == "qcow2" {
            sound(&self.target);
            same(("raw", &self.source), ("qcow2", &self.target));
        } else {
            identical(&self.source, &self.target);
        }
    }

    /// The target is what it was before a failure, and nothing else is there.
    #[track_caller]
    fn is_untouched(&self) {
        assert!(self.is_old(), "the old target is gone: {:?}", names(&self.out));
        assert_eq!(names(&self.out).len(), 1, "{:?}", names(&self.out));
    }
}

/// The ways to a target that the sweeps go.
fn ways() -> Vec<Lab> {
    vec![
        Lab::new("copy.raw", &["--workers", "1"]),
        Lab::new("copy.raw", &["--workers", "2", "--sparse=never", "--direct"]),
        Lab::new("copy.qcow2", &["--workers", "1", "--cluster-size", "4K"]),
        Lab::new("copy.qcow2", &["--workers", "2", "--compress", "zstd"]),
    ]
}

/// The first, a middle and the last of `count`.
fn picked(count: usize) -> Vec<usize> {
    let mut picked = vec![1, count.div_ceil(2), count];
    picked.dedup();
    picked
}

/// System calls without which there is no durable copy.
const VITAL: &[&str] = &["pwrite64", "ftruncate", "fsync", "write", "pwritev", "fdatasync"];

#[test]
fn any_failing_system_call_leaves_the_old_target_or_the_whole_copy() {
    for lab in ways() {
        for (call, count) in lab.calls() {
            for when in picked(count) {
                for errno in ["EIO", "ENOSPC"] {
                    lab.reset(true);
                    let what = format!("{call} {when}/{count} {errno} {:?}", lab.flags);
                    let Watched { ended, injected, .. } = lab.inject(&format!("{call}:error={errno}:when={when}"));
                    match ended.code {
                        0 => {
                            assert!(
                                !injected || !VITAL.contains(&call.as_str()),
                                "{what}: a failure passed for success"
                            );
                            lab.holds_the_copy();
                        }
                        5 => {
                            assert_eq!(ended.stderr.lines().count(), 1, "{what}: {ended:?}");
                            assert!(lab.is_old(), "{what}: the old target is gone");
                        }
                        _ => panic!("{what}: {ended:?}"),
                    }
                    // What can't be unlinked, or told to be ours, stays for the next run to sweep.
                    let may_stay = call.starts_with("unlink") || call.contains("stat");
                    assert!(names(&lab.out).len() <= 1 + usize::from(may_stay), "{what}: {:?}", names(&lab.out));
                    if names(&lab.out).len() > 1 {
                        lab.run().succeeds();
                        assert_eq!(names(&lab.out).len(), 1, "{what}");
                    }
                }
            }
        }
    }
}

#[test]
fn failures_say_what_and_why() {
    let lab = Lab::new("copy.raw", &["--workers", "1"]);
    let calls = lab.calls();
    for (call, errno, reasons) in [
        ("pwrite64", "EIO", ["write target at 0x", "Input/output error"]),
        ("pwrite64", "ENOSPC", ["write target at 0x", "No space left on device"]),
        ("pwrite64", "EDQUOT", ["write target at 0x", "quota"]),
        ("fsync", "EIO", ["flush target", "Input/output error"]),
        ("ftruncate", "EFBIG", ["target", "File too large"]),
    ] {
        lab.reset(true);
        assert!(calls.contains_key(call), "{calls:?}");
        let ended = lab.inject(&format!("{call}:error={errno}:when=1")).ended;
        reasons.iter().for_each(|reason| _ = ended.fails(5, reason));
        lab.is_untouched();
    }
    lab.reset(true);
    lab.inject("/^rename:error=EACCES").ended.fails(5, "Permission denied");
    lab.is_untouched();
    lab.reset(true);
    lab.inject("close:error=EIO:when=1+").ended.fails(5, "Input/output error");
    lab.is_untouched();
}

#[test]
fn a_manifest_that_cannot_be_flushed_fails_before_the_copy_has_its_name() {
    let mut lab = Lab::new("copy.raw", &[]);
    lab.reset(true);
    let manifest = lab.folder.path().join("m.json");
    lab.flags = vec!["--manifest".to_owned(), text(&manifest).to_owned()];
    let partial = lab.folder.path().join(".m.json.drive-backup-partial");
    let watched = watched(&["-e", "inject=fsync:error=EIO:when=1"], &[&partial], &lab.arguments());
    let why = format!("flush target '{}': Input/output error; the partial copy was removed", manifest.display());
    watched.ended.fails(5, &why);
    lab.is_untouched();
    assert!(!manifest.exists());
}

#[test]
fn a_new_name_that_may_not_survive_a_crash_is_not_called_removed() {
    let lab = Lab::new("copy.raw", &[]);
    lab.reset(true);
    let options = ["-e", "inject=renameat2:error=EINVAL:when=1", "-e", "inject=fsync:error=EIO"];
    let ended = watched(&options, &[&lab.out], &lab.arguments()).ended;
    ended.fails(5, "yet may not survive a crash");
    ended.fails(5, "is what it was before or the complete copy");
    assert!(!ended.stderr.contains("removed"), "{ended:?}");
    lab.holds_the_copy();
}

#[test]
fn a_failed_flush_is_not_tried_again() {
    let lab = Lab::new("copy.raw", &[]);
    lab.reset(true);
    let Watched { ended, calls, .. } = watched(
        &["-e", "inject=fsync,fdatasync,syncfs,sync:error=EIO:when=1", "-e", "trace=fsync,fdatasync,syncfs,sync"],
        &[&lab.partial()],
        &lab.arguments(),
    );
    ended.fails(5, "Input/output error");
    assert_eq!(calls.len(), 1, "{calls:?}");
    lab.is_untouched();
}

#[test]
fn success_means_that_file_and_folder_were_flushed() {
    for lab in ways() {
        lab.reset(false);
        let flushes = |path: &Path| {
            let Watched { ended, calls, .. } = watched(&["-e", "trace=fsync,fdatasync"], &[path], &lab.arguments());
            ended.succeeds();
            calls.len()
        };
        assert!(flushes(&lab.partial()) >= 1);
        assert!(flushes(&lab.out) >= 1);
    }
    let lab = Lab::new("copy.raw", &["--no-fsync"]);
    lab.reset(false);
    let Watched { ended, calls, .. } = lab.watched(&["-e", "trace=fsync,fdatasync,sync,syncfs"]);
    ended.succeeds();
    assert!(calls.is_empty(), "{calls:?}");
}

#[test]
fn killed_at_any_moment_only_old_or_whole_and_the_next_run_sweeps() {
    for (index, lab) in ways().into_iter().enumerate() {
        let calls = lab.calls();
        for (call, count) in calls {
            // The calls that put things in place are all tried, the many alike are sampled.
            let moments = if call.starts_with("pwrite") { picked(count) } else { (1..=count.min(6)).collect() };
            for when in moments {
                let is_there = (when + index) % 2 == 0;
                lab.reset(is_there);
                let what = format!("killed at {call} {when}/{count}, {:?}", lab.flags);
                let ended = lab.inject(&format!("{call}:signal=KILL:when={when}")).ended;
                // A call that the other thread makes this time is not reached.
                assert!([0, 137].contains(&ended.code), "{what}: {ended:?}");
                let nothing = !lab.target.exists();
                if !(if is_there { lab.is_old() } else { nothing }) {
                    assert!(!nothing, "{what}: the old target is gone");
                    lab.holds_the_copy();
                }
                let left = names(&lab.out);
                assert!(left.len() <= 2, "{what}: {left:?}");
                lab.run().succeeds();
                assert_eq!(names(&lab.out).len(), 1, "{what}: {left:?} was not swept");
                lab.holds_the_copy();
            }
        }
    }
}

#[test]
fn killed_at_any_time_only_old_or_whole() {
    use std::time::Duration;
    let lab = Lab::new("copy.raw", &["--workers", "2"]);
    for delay in 0..40 {
        lab.reset(true);
        let running = Running::drive_backup(&lab.arguments());
        std::thread::sleep(Duration::from_micros(400 * delay));
        running.signal(Signal::SIGKILL);
        let ended = running.ended();
        assert!([0, 137].contains(&ended.code), "{ended:?}");
        if !lab.is_old() {
            lab.holds_the_copy();
        }
    }
    lab.run().succeeds();
    assert_eq!(names(&lab.out), ["copy.raw"]);
}

#[test]
fn a_full_file_system_keeps_its_old_target() {
    for flags in [&[][..], &["--direct"], &["--workers", "4"]] {
        for name in ["copy.raw", "copy.qcow2"] {
            let lab = Lab::new(name, flags);
            let mount = Mount::tmpfs(MIB);
            std::fs::write(mount.join(name), OLD).unwrap();
            copy(&lab.source, &mount.join(name), flags).fails(5, "No space left on device");
            assert_eq!(read(&mount.join(name)), OLD);
            assert_eq!(names(mount.path()), [name], "the space is not given back");
        }
    }
}

#[test]
fn a_full_file_system_stops_the_job_until_there_is_room() {
    for policy in ["enospc", "stop"] {
        let lab = Lab::new("copy.raw", &[]);
        let mount = Mount::tmpfs(4 * MIB);
        std::fs::write(mount.join("ballast"), noise(1, 3 << 20)).unwrap();
        let target = mount.join("copy.raw");
        let mut running = Running::drive_backup(&[
            "--device",
            text(&lab.source),
            "--target",
            text(&target),
            "--on-target-error",
            policy,
            "--workers",
            "1",
        ]);
        let stopped = said(&mut running, "No space left on device");
        assert!(stopped.contains("write target at 0x"), "{stopped}");
        assert_eq!(names(mount.path()), [".copy.raw.drive-backup-partial", "ballast"]);
        std::fs::remove_file(mount.join("ballast")).unwrap();
        running.signal(Signal::SIGCONT);
        assert_eq!(running.ended().code, 0);
        identical(&lab.source, &target);
    }
}

/// Waits for a line of its stderr that contains `words`.
#[track_caller]
fn said(running: &mut Running, words: &str) -> String {
    let stderr = running.child().stderr.as_mut().unwrap();
    // One byte at a time: what follows the line is still to be read by others.
    let mut lines = BufReader::with_capacity(1, stderr).lines();
    lines.find_map(|line| line.ok().filter(|line| line.contains(words))).expect("it ended without a word")
}

/// Buffered writes succeed there; only the flush finds out that nothing can be kept.
#[test]
fn a_device_whose_flush_fails_is_incomplete() {
    let lab = Lab::new("copy.raw", &[]);
    let mount = Mount::tmpfs(MIB);
    let behind = mount.join("behind");
    sparse_file(&behind, 6 * MIB);
    let device = LoopDevice::over(&behind, &[]);
    let ended = copy(&lab.source, device.path(), &["--format", "raw"]);
    ended.fails(5, "INCOMPLETE");
    assert!(ended.stderr.contains("flush target"), "{ended:?}");
}

#[test]
fn an_existing_target_that_fails_is_called_incomplete() {
    let lab = Lab::new("copy.raw", &["--mode", "existing", "--workers", "1"]);
    sparse_file(&lab.target, 6 * MIB);
    for call in ["pwrite64", "fsync"] {
        let ended = lab.inject(&format!("{call}:error=EIO:when=1")).ended;
        ended.fails(5, "INCOMPLETE");
        assert!(ended.stderr.contains("Input/output error"), "{ended:?}");
    }
    lab.run().succeeds();
    identical(&lab.source, &lab.target);
}

/// A blkdebug rule: I/O of one kind fails at a sector; everywhere without one.
fn rule(iotype: &str, sector: Option<u64>, errno: i32, once: bool) -> String {
    let sector = sector.map_or(String::new(), |sector| format!(r#""sector":{sector},"#));
    format!(r#"{{"event":"none","iotype":"{iotype}",{sector}"errno":{errno},"once":{once},"immediately":true}}"#)
}

const EIO: i32 = 5;
const ENOSPC: i32 = 28;
/// Where sectors are bad: in the first and the second run of data.
const BAD: [u64; 2] = [MIB + 8192, 5 * MIB + 4096];

fn bad_sectors(iotype: &str, errno: i32, once: bool) -> String {
    format!("[{}]", BAD.map(|offset| rule(iotype, Some(offset / 512), errno, once)).join(","))
}

#[test]
fn an_unreadable_source_is_reported() {
    for policy in ["report", "enospc"] {
        for name in ["copy.raw", "copy.qcow2"] {
            let lab = Lab::new(name, &[]);
            lab.reset(true);
            let source = Export::faulty(&lab.source, &lab.folder.path().join("bad"), &bad_sectors("read", EIO, false));
            let ended = copy(source.path(), &lab.target, &["--source-format", "raw", "--on-source-error", policy]);
            ended.fails(4, "read source at 0x");
            assert!(ended.stderr.contains("Input/output error"), "{ended:?}");
            lab.is_untouched();
        }
    }
}

#[test]
fn an_unreadable_source_range_is_zero_filled_under_ignore_and_listed() {
    for (name, workers) in [("copy.raw", "1"), ("copy.qcow2", "2")] {
        let lab = Lab::new(name, &[]);
        let source = Export::faulty(&lab.source, &lab.folder.path().join("bad"), &bad_sectors("read", EIO, false));
        // The export's times are those of the moment that they are asked for.
        let flags =
            ["--source-format", "raw", "--on-source-error", "ignore", "--workers", workers, "--allow-inconsistent"];
        let ended = copy(source.path(), &lab.target, &flags);
        assert_eq!(ended.code, 3, "{ended:?}");
        drop(source);
        let mut wanted = read(&lab.source);
        for offset in BAD {
            // No more than a page around the bad sector is given up.
            let page = offset / 4096 * 4096;
            wanted[page as usize..][..4096].fill(0);
            assert!(
                ended
                    .stderr
                    .contains(&format!("source range {page:#x}+4096 could not be read: it is zeroes in the copy")),
                "{ended:?}"
            );
        }
        let expected = lab.folder.path().join("expected.raw");
        std::fs::write(&expected, wanted).unwrap();
        same(("raw", &expected), (name.split_once('.').unwrap().1, &lab.target));
    }
}

#[test]
fn a_source_that_recovers_is_read_again_after_a_stop() {
    let lab = Lab::new("copy.raw", &[]);
    let source = Export::faulty(&lab.source, &lab.folder.path().join("bad"), &bad_sectors("read", EIO, true));
    let mut running = Running::drive_backup(&[
        "--device",
        text(source.path()),
        "--source-format",
        "raw",
        "--target",
        text(&lab.target),
        "--on-source-error",
        "stop",
        "--workers",
        "1",
        // The page cache would read ahead, and meet the error on its own.
        "--direct",
        // The export's times are those of the moment that they are asked for.
        "--allow-inconsistent",
    ]);
    for _ in BAD {
        let line = said(&mut running, "Input/output error");
        assert!(line.contains("read source at 0x"), "{line}");
        assert!(!lab.target.exists());
        running.signal(Signal::SIGCONT);
    }
    assert_eq!(running.ended().code, 0);
    drop(source);
    identical(&lab.source, &lab.target);
}

#[test]
fn a_stopped_job_can_be_ended() {
    let lab = Lab::new("copy.raw", &[]);
    lab.reset(true);
    let source = Export::faulty(&lab.source, &lab.folder.path().join("bad"), &bad_sectors("read", EIO, false));
    let mut running = Running::drive_backup(&[
        "--device",
        text(source.path()),
        "--source-format",
        "raw",
        "--target",
        text(&lab.target),
        "--on-source-error",
        "stop",
    ]);
    said(&mut running, "Input/output error");
    running.signal(Signal::SIGTERM);
    assert_eq!(running.ended().code, 143);
    lab.is_untouched();
}

#[test]
fn an_unwritable_target_is_reported_or_skipped() {
    let lab = Lab::new("copy.raw", &[]);
    let behind = lab.folder.path().join("behind");
    for (policy, code) in [("report", 5), ("ignore", 3), ("enospc", 5)] {
        std::fs::write(&behind, noise(3, 6 << 20)).unwrap();
        let target = Export::faulty(&behind, &lab.folder.path().join("bad"), &bad_sectors("write", EIO, false));
        let flags = ["--mode", "existing", "--format", "raw", "--on-target-error", policy, "--workers", "1"];
        let ended = copy(&lab.source, target.path(), &flags);
        assert_eq!(ended.code, code, "{ended:?}");
        drop(target);
        if code == 5 {
            ended.fails(5, "INCOMPLETE");
            assert!(ended.stderr.contains("write target at 0x"), "{ended:?}");
            continue;
        }
        let (mut wanted, old) = (read(&lab.source), noise(3, 6 << 20));
        for offset in BAD {
            let page = offset as usize / 4096 * 4096;
            wanted[page..page + 4096].copy_from_slice(&old[page..page + 4096]);
            assert!(
                ended.stderr.contains(&format!(
                    "target range {page:#x}+4096 could not be written: it holds what it held before"
                )),
                "{ended:?}"
            );
        }
        let expected = lab.folder.path().join("expected.raw");
        std::fs::write(&expected, wanted).unwrap();
        identical(&expected, &behind);
    }
}

#[test]
fn a_target_that_recovers_is_written_again_after_a_stop() {
    let lab = Lab::new("copy.raw", &[]);
    let behind = lab.folder.path().join("behind");
    for (policy, errno, words) in [("stop", EIO, "Input/output error"), ("enospc", ENOSPC, "No space left on device")] {
        std::fs::write(&behind, noise(3, 6 << 20)).unwrap();
        let target = Export::faulty(&behind, &lab.folder.path().join("bad"), &bad_sectors("write", errno, true));
        let mut running = Running::drive_backup(&[
            "--device",
            text(&lab.source),
            "--target",
            text(target.path()),
            "--mode",
            "existing",
            "--format",
            "raw",
            "--on-target-error",
            policy,
            "--workers",
            "1",
        ]);
        for _ in BAD {
            said(&mut running, words);
            running.signal(Signal::SIGCONT);
        }
        assert_eq!(running.ended().code, 0);
        drop(target);
        identical(&lab.source, &behind);
    }
}

#[test]
fn a_target_whose_flush_fails_is_no_success_under_any_policy() {
    let lab = Lab::new("copy.raw", &[]);
    let behind = lab.folder.path().join("behind");
    for policy in ["report", "ignore"] {
        sparse_file(&behind, 6 * MIB);
        let rules = format!("[{}]", rule("flush", None, EIO, false));
        let target = Export::faulty(&behind, &lab.folder.path().join("bad"), &rules);
        let flags = ["--mode", "existing", "--format", "raw", "--on-target-error", policy];
        let ended = copy(&lab.source, target.path(), &flags);
        ended.fails(5, "flush target");
        assert!(ended.stderr.contains("INCOMPLETE"), "{ended:?}");
    }
}

#[test]
fn a_target_that_cannot_punch_holes_gets_zeroes() {
    let lab = Lab::new("copy.raw", &[]);
    let behind = lab.folder.path().join("behind");
    std::fs::write(&behind, noise(3, 6 << 20)).unwrap();
    let rules = format!("[{},{}]", rule("write-zeroes", None, 95, false), rule("discard", None, 95, false));
    let target = Export::faulty(&behind, &lab.folder.path().join("bad"), &rules);
    copy(&lab.source, target.path(), &["--mode", "existing", "--format", "raw"]).succeeds();
    drop(target);
    identical(&lab.source, &behind);
}
