//! The power fails after each write that a file system made: its journal is replayed, and the target's name shows what was
//! there before or the whole copy; after success it shows the copy. That a disk loses what was not flushed, all of it or
//! some, changes nothing.
//!
//! A few of those moments, most of them around the success, of some copies; `DRIVE_BACKUP_CRASH=all` asks for every one.
#![cfg(feature = "cli")]

mod log;
#[path = "../support/mod.rs"]
mod support;

use log::{Disk, Log, Loss};
use nix::sys::signal::Signal;
use std::fs::File;
use std::path::{Path, PathBuf};
use support::bytes::{allocated_now, read, same, scribble, sound};
use support::fault::Export;
use support::{LoopDevice, Mount, Running, names, run, sparse_file, text, wait_for};

const MIB: u64 = 1 << 20;
const OLD: &[u8] = b"what was there before";

/// What is copied onto the file system.
#[derive(Clone, Copy, Debug)]
struct Scenario {
    /// The file system.
    kind: &'static str,
    /// The copy's.
    format: &'static str,
    /// The target's name leads to something already.
    replaces: bool,
}

/// All that a file system wrote during a backup.
struct Recorded {
    scenario: Scenario,
    folder: tempfile::TempDir,
    log: Log,
    /// So many entries came before the backup's success.
    succeeded: usize,
    copy: Vec<u8>,
}

/// What the target's name shows after the crashes, how often.
#[derive(Debug, Default)]
struct Seen {
    old: usize,
    new: usize,
    /// Crashes after which there is more than with everything flushed.
    with_losses: usize,
    last_old: Option<(usize, Loss)>,
}

impl Scenario {
    fn name(self) -> String {
        format!("copy.{}", self.format)
    }

    /// Formats a disk, then copies to it while every write is logged.
    fn record(self) -> Recorded {
        let folder = tempfile::tempdir_in("/dev/shm").unwrap();
        let path = |name: &str| folder.path().join(name);
        sparse_file(&path("source.raw"), 3 * MIB);
        scribble(&path("source.raw"), 0, 1 << 20);
        scribble(&path("source.raw"), 2 * MIB, 1 << 20);
        sparse_file(&path("disk"), 320 * MIB);
        run(&format!("mkfs.{}", self.kind), &["-q", text(&path("disk"))]);
        if self.replaces {
            let device = LoopDevice::over(&path("disk"), &[]);
            std::fs::write(Mount::device(device.path()).join(&self.name()), OLD).unwrap();
        }
        run("cp", &["--sparse=always", text(&path("disk")), text(&path("before"))]);
        sparse_file(&path("log"), 0);
        let export = Export::logged(&path("disk"), &path("export"), &path("log"));
        let device = LoopDevice::over(export.path(), &[]);
        let mount = Mount::device(device.path());
        back_up(&path("source.raw"), &mount, &self.name());
        let succeeded = Log::read(&path("log")).len();
        let target = mount.join(&self.name());
        same(("raw", &path("source.raw")), (self.format, &target));
        if self.format == "qcow2" {
            sound(&target);
        }
        let copy = read(&target);
        drop((mount, device, export));
        let log = Log::read(&path("log"));
        Recorded { scenario: self, folder, log, succeeded, copy }
    }
}

/// Others have the journal written meanwhile, twice: what the backup has so far is on the disk, too.
fn back_up(source: &Path, mount: &Mount, name: &str) {
    let target = mount.join(name);
    let written = || names(mount.path()).iter().map(|name| allocated_now(&mount.join(name))).sum::<u64>();
    let before = written();
    let slowly = ["--device", text(source), "--target", text(&target), "--speed", "256K"];
    let backup = Running::drive_backup(&slowly);
    for bytes in [1, 128 << 10] {
        wait_for("some of the copy", || (written() >= before + bytes).then_some(()));
        rustix::fs::syncfs(File::open(mount.path()).unwrap()).unwrap();
    }
    assert!(written() < before + 2 * MIB, "it was to be in the midst of it");
    // Without the limit.
    backup.signal(Signal::SIGUSR2);
    let ended = backup.ended();
    assert_eq!(ended.code, 0, "{ended:?}");
}

impl Recorded {
    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// When the power fails, in order: after how many entries, and what it takes.
    fn crashes(&self) -> Vec<(usize, Loss)> {
        let end = self.log.len();
        let all = is_whole();
        let around = self.succeeded.saturating_sub(4)..=self.succeeded;
        let mut crashes = Vec::new();
        for count in 0..=end {
            if all || around.contains(&count) || count % end.div_ceil(3) == 0 || count == end {
                crashes.push((count, Loss::Nothing));
            }
            // A crash later than the last before a flush, or earlier, loses the same or is judged more mildly.
            let last = self.log.is_flush(count);
            if last && (all || count + 8 >= self.succeeded) {
                crashes.push((count, Loss::All));
            }
            if all || around.contains(&count) && count % 2 == 0 {
                crashes.push((count, Loss::Some(log::scramble(count as u64))));
            }
        }
        crashes
    }

    /// What the name shows on a disk, after its journal is replayed.
    fn look(&self, disk: &Path) -> Option<Vec<u8>> {
        let device = LoopDevice::over(disk, &[]);
        let mount = Mount::device(device.path());
        let target = mount.join(&self.scenario.name());
        target.exists().then(|| read(&target))
    }

    fn judge(&self, (count, loss): (usize, Loss), found: Option<&[u8]>, seen: &mut Seen) {
        let old = self.scenario.replaces.then_some(OLD);
        if found == Some(&self.copy) {
            seen.new += 1;
        } else if found == old && count < self.succeeded {
            seen.old += 1;
            seen.last_old = Some((count, loss));
        } else {
            let (length, of) = (found.map(<[u8]>::len), self.succeeded);
            panic!(
                "{:?}: {length:?} bytes under the target's name after {count} writes of {of}, {loss:?} lost",
                self.scenario
            );
        }
    }

    fn replay(&self) {
        run("cp", &["--sparse=always", text(&self.path("before")), text(&self.path("flushed"))]);
        let mut disk = Disk::new(&self.log, &self.path("flushed"));
        let (crashed, mut seen) = (self.path("crashed"), Seen::default());
        for (count, loss) in self.crashes() {
            if disk.fail(count, loss, &crashed) {
                seen.with_losses += usize::from(loss != Loss::Nothing);
                self.judge((count, loss), self.look(&crashed).as_deref(), &mut seen);
            }
        }
        eprintln!("{:?}: {} writes, {} before the success: {seen:?}", self.scenario, self.log.len(), self.succeeded);
        // The crashes came before and after the rename and lost something, or nothing was proved.
        assert!(seen.old > 2 && seen.new > 0 && seen.with_losses > 0, "{:?}: {seen:?}", self.scenario);
        self.try_again(seen.last_old.unwrap());
    }

    /// What the crash left beside the target is in nobody's way.
    fn try_again(&self, (count, loss): (usize, Loss)) {
        run("cp", &["--sparse=always", text(&self.path("before")), text(&self.path("flushed"))]);
        let crashed = self.path("crashed");
        Disk::new(&self.log, &self.path("flushed")).fail(count, loss, &crashed);
        let device = LoopDevice::over(&crashed, &[]);
        let mount = Mount::device(device.path());
        let target = mount.join(&self.scenario.name());
        support::copy(&self.path("source.raw"), &target, &[]).succeeds();
        same(("raw", &self.path("source.raw")), (self.scenario.format, &target));
        let left: Vec<_> = names(mount.path()).into_iter().filter(|name| name != "lost+found").collect();
        assert_eq!(left, [self.scenario.name()]);
    }
}

fn is_whole() -> bool {
    std::env::var("DRIVE_BACKUP_CRASH").is_ok_and(|which| which == "all")
}

fn a_crash_leaves_old_or_new(kind: &'static str) {
    let scenarios = [("raw", true), ("qcow2", false), ("raw", false), ("qcow2", true)];
    for &(format, replaces) in if is_whole() { &scenarios[..] } else { &scenarios[..2] } {
        Scenario { kind, format, replaces }.record().replay();
    }
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
