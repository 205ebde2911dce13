//! Real guests, whose disk is backed up while they write it. Each wants QEMU and a kernel, which `prepare` brings.

#[path = "../support/mod.rs"]
mod support;

mod lvm;
mod machine;
mod trail;

use machine::{Machine, nbd, vhost_user};
use nix::sys::signal::Signal;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use support::{LoopDevice, Mount, Running, drive_backup, folder, run, sparse_file, text, wait_for};
use tempfile::TempDir;

const LENGTH: u64 = 64 << 20;

/// A disk that is served.
struct Served {
    folder: TempDir,
    server: Running,
}

impl Served {
    /// A sparse raw disk at `flag` and the address that `address` makes of its socket.
    fn start(flag: &str, address: impl Fn(&Path) -> String, make: impl Fn(&Path)) -> Self {
        let folder = folder();
        let [disk, socket, writers] = ["disk.raw", "socket", "writers"].map(|name| folder.path().join(name));
        sparse_file(&disk, LENGTH);
        make(&disk);
        let address = address(&socket);
        let server = Running::drive_backup(&[
            "serve",
            "--device",
            text(&disk),
            "--format",
            "raw",
            flag,
            &address,
            "--writer-dir",
            text(&writers),
        ]);
        wait_for("the server's socket", || socket.exists().then_some(()));
        Self { folder, server }
    }

    fn vhost_user(make: impl Fn(&Path)) -> Self {
        Self::start("--vhost-user", |socket| text(socket).to_owned(), make)
    }

    fn nbd() -> Self {
        Self::start("--nbd", |socket| format!("unix:{}", text(socket)), |_| {})
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn boot(&self, job: &str) -> Machine {
        Machine::start(job, &vhost_user(&self.path("socket")))
    }

    /// Backs it up, at a speed that lets the guest write a lot meanwhile.
    #[track_caller]
    fn back_up(&self, target: &Path, speed: &str) {
        let writers = self.path("writers");
        let arguments =
            ["--writer-dir", text(&writers), "--writer", "required", "--speed", speed, "--cbw-timeout", "60"];
        let disk = self.path("disk.raw");
        drive_backup(&[&["--device", text(&disk), "--target", text(target)], &arguments[..]].concat()).succeeds();
    }

    #[track_caller]
    fn stop(self) -> TempDir {
        self.server.signal(Signal::SIGTERM);
        assert_eq!(self.server.ended().code, 0);
        self.folder
    }
}

/// Waits until each thread of the guest has written more on its disk `number` than any had `before`; how much that is.
fn writes_more(machine: &Machine, number: usize, before: [u64; trail::THREADS]) -> u64 {
    let least = |line: &str| line.split_whitespace().nth(number).unwrap().parse::<u64>().unwrap();
    least(&machine.hear_such("WROTE", |line| before.iter().all(|before| least(line) > *before)))
}

/// Three backups, one after the other, of the guest's disk `number`, which it writes all the time: each is the disk of an
/// instant of its own, with all that was written before it began. What the last of them shows.
fn three_instants(served: &Served, machine: &Machine, number: usize) -> [u64; trail::THREADS] {
    let mut before = [0; trail::THREADS];
    for name in ["1.raw", "2.raw", "3.raw"] {
        let written = writes_more(machine, number, before);
        let target = served.path(name);
        served.back_up(&target, "12M");
        before = trail::check(&std::fs::read(&target).unwrap());
        assert!(before.iter().all(|last| *last >= written), "{name}: after {written} by each it shows {before:?}");
    }
    writes_more(machine, number, before);
    before
}

#[test]
fn a_guest_writes_on_vhost_user_and_nbd_while_three_backups_of_each_disk_are_each_their_instant() {
    let served = Served::vhost_user(|_| {});
    // One that was there before: it discards, and reads what that left.
    assert_eq!(served.boot("scrap").ends(), [LENGTH]);
    let allocated = served.path("disk.raw").metadata().unwrap().blocks() * 512;
    // 16 MiB and a block at the end, less the 8 MiB that were discarded. The guest wants zeroes to stay allocated.
    assert!((8 << 20..9 << 20).contains(&allocated), "{allocated}");
    std::fs::OpenOptions::new()
        .write(true)
        .open(served.path("disk.raw"))
        .unwrap()
        .write_all_at(&vec![0; 16 << 20], 0)
        .unwrap();
    let both = [served, Served::nbd()];
    let arguments = [vhost_user(&both[0].path("socket")), nbd(&both[1].path("socket"))].concat();
    let machine = Machine::start("trail disks=2", &arguments);
    let before = std::thread::scope(|scope| {
        let (both, machine) = (&both, &machine);
        let spawn = |number: usize| scope.spawn(move || three_instants(&both[number], machine, number));
        [spawn(0), spawn(1)].map(|thread| thread.join().unwrap())
    });
    let verified = machine.stop();
    assert_eq!(verified.len(), 2);
    for ((served, before), verified) in both.into_iter().zip(before).zip(verified) {
        let folder = served.stop();
        let last = trail::check(&std::fs::read(folder.path().join("disk.raw")).unwrap());
        assert!(last.iter().sum::<u64>() >= verified && verified > before.iter().sum());
    }
}

#[test]
fn a_file_system_of_a_guest_that_writes_is_whole_in_the_copy() {
    let served = Served::vhost_user(|disk| drop(run("mkfs.ext4", &["-q", "-F", text(disk)])));
    let machine = served.boot("ext4");
    machine.hear("SYNCED 20");
    let synced: u64 = machine.heard("SYNCED").last().unwrap().parse().unwrap();
    let copy = served.path("copy.raw");
    served.back_up(&copy, "0");
    let then: u64 = machine.heard("SYNCED").last().unwrap().parse().unwrap();
    let all = machine.stop()[0];
    assert!(synced < all);
    served.server.signal(Signal::SIGTERM);
    let device = LoopDevice::over(&copy, &[]);
    let mounted = Mount::device(device.path());
    // Those that were synced before it began and not deleted by its end.
    let oldest = then.saturating_sub(1998).max(1);
    assert!(oldest <= synced, "{oldest}, {synced}");
    for number in oldest..=synced {
        let bytes = std::fs::read(mounted.join(&number.to_string())).unwrap_or_else(|e| panic!("file {number}: {e}"));
        assert!(bytes == file(number), "file {number}");
    }
    drop(mounted);
    run("e2fsck", &["-f", "-n", text(device.path())]);
}

/// As the guest writes it.
fn file(number: u64) -> Vec<u8> {
    let first = trail::scramble(number);
    (0..1024_u64).flat_map(|word| first.wrapping_mul(word * 2 + 1).to_le_bytes()).collect()
}
