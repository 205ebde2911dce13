//! A disk as a file: what programs may do with it, what they may not, and backups meanwhile.

use crate::kit::{Served, sparse_disk};
use crate::support::{LoopDevice, Mount, PATIENCE, folder, qemu_img, qemu_io, run, text, wait_for};
use nix::fcntl::{FallocateFlags, fallocate};
use nix::libc;
use nix::sys::signal::Signal;
use nix::unistd::{Whence, lseek};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::mpsc::channel;
use std::thread;

const MIB: u64 = 1 << 20;

fn open(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).open(path).unwrap()
}

fn errno<T>(result: std::io::Result<T>) -> Option<i32> {
    result.err().and_then(|e| e.raw_os_error())
}

/// Bytes that differ everywhere.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(2).wrapping_add(1);
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u8
    };
    (0..length).map(|_| next()).collect()
}

#[test]
fn programs_use_the_file_like_any_other() {
    let mut served = Served::over_itself(sparse_disk(16 * MIB), "disk.raw", &[]);
    let (disk, other, back) = (served.path().to_owned(), served.join("other"), served.join("back"));
    let mut expected = vec![0; 16 << 20];
    expected[1 << 20..4 << 20].copy_from_slice(&noise(1, 3 << 20));
    std::fs::write(&other, &expected).unwrap();
    run(
        "dd",
        &["status=none", "conv=notrunc", "bs=1M", &format!("if={}", text(&other)), &format!("of={}", text(&disk))],
    );
    run(
        "dd",
        &[
            "status=none",
            "conv=notrunc,fsync",
            "oflag=direct",
            "bs=64k",
            &format!("if={}", text(&other)),
            &format!("of={}", text(&disk)),
        ],
    );
    run("cmp", &[text(&other), text(&disk)]);
    run("cp", &[text(&disk), text(&back)]);
    run("cmp", &[text(&other), text(&back)]);
    qemu_io(
        &["-f", "raw"],
        &disk,
        &["write -P 7 5M 64k", "write -z 1M 64k", "discard 2M 64k", "read -P 7 5M 64k", "read -P 0 1M 64k", "flush"],
    );
    expected[5 << 20..(5 << 20) + (64 << 10)].fill(7);
    expected[1 << 20..(1 << 20) + (64 << 10)].fill(0);
    expected[2 << 20..(2 << 20) + (64 << 10)].fill(0);
    assert_eq!(served.end(Signal::SIGTERM).code, 0);
    assert!(!served.is_mounted());
    assert!(std::fs::read(&disk).unwrap() == expected, "the image is not what was written");
}

#[test]
fn what_nobody_would_see_is_refused() {
    let served = Served::over_itself(sparse_disk(MIB), "disk.raw", &[]);
    let file = open(served.path());
    // Python maps it shared and writable, then private.
    let map = "import mmap,os,sys; f=os.open(sys.argv[1],os.O_RDWR); mmap.mmap(f,4096,*eval(sys.argv[2]))";
    let mapped =
        |how: &str| std::process::Command::new("python3").args(["-c", map, text(served.path()), how]).output().unwrap();
    let shared = mapped("(mmap.MAP_SHARED,)");
    assert!(String::from_utf8_lossy(&shared.stderr).contains("[Errno 19]"), "{shared:?}");
    assert!(mapped("(mmap.MAP_PRIVATE,mmap.PROT_READ)").status.success());
    assert_eq!(errno(file.set_len(5)), Some(libc::EPERM));
    assert_eq!(errno(file.set_len(2 * MIB)), Some(libc::EPERM));
    assert!(file.set_len(MIB).is_ok(), "the size that it has");
    assert_eq!(errno(file.write_at(&[1; 9], MIB)), Some(libc::ENOSPC));
    assert_eq!(file.write_at(&[1; 9], MIB - 4).unwrap(), 4, "a short write ends at the end");
    assert_eq!(file.read_at(&mut [0; 9], MIB - 4).unwrap(), 4);
    assert_eq!(file.read_at(&mut [0; 9], MIB).unwrap(), 0);
    assert_eq!(file.read_at(&mut [0; 9], MIB + 5000).unwrap(), 0);
    assert_eq!(errno(OpenOptions::new().write(true).truncate(true).open(served.path())), Some(libc::EPERM));
    assert_eq!(served.path().metadata().unwrap().len(), MIB);
}

#[test]
fn holes_are_punched_zeroed_and_found() {
    let folder = sparse_disk(8 * MIB);
    let image = File::open(folder.path().join("disk.raw")).unwrap();
    let served = Served::over_itself(folder, "disk.raw", &[]);
    let file = open(served.path());
    file.write_all_at(&noise(2, 2 << 20), MIB).unwrap();
    let seek = |offset: u64, whence| lseek(&file, offset as i64, whence);
    assert_eq!((seek(0, Whence::SeekData), seek(MIB, Whence::SeekHole)), (Ok(MIB as i64), Ok(3 * MIB as i64)));
    assert_eq!(seek(3 * MIB, Whence::SeekData), Err(nix::errno::Errno::ENXIO));
    assert_eq!(seek(7 * MIB, Whence::SeekHole), Ok(7 * MIB as i64));
    let allocated = || image.metadata().unwrap().blocks();
    let (keep, punch, zero) = (
        FallocateFlags::FALLOC_FL_KEEP_SIZE,
        FallocateFlags::FALLOC_FL_PUNCH_HOLE,
        FallocateFlags::FALLOC_FL_ZERO_RANGE,
    );
    let before = allocated();
    fallocate(&file, zero, MIB as i64, 65536).unwrap();
    assert_eq!(allocated(), before, "zeroed space is kept");
    fallocate(&file, punch | keep, MIB as i64 + 65536, MIB as i64).unwrap();
    assert!(allocated() < before, "punched space is given back");
    let mut found = vec![1; 3 << 20];
    file.read_exact_at(&mut found, MIB).unwrap();
    assert!(found[..65536 + (1 << 20)].iter().all(|byte| *byte == 0));
    assert!(found[65536 + (1 << 20)..2 << 20] == noise(2, 2 << 20)[65536 + (1 << 20)..]);
    // Over the end: only what is there.
    fallocate(&file, punch | keep, 7 * MIB as i64, 9 * MIB as i64).unwrap();
    fallocate(&file, punch | keep, 9 * MIB as i64, MIB as i64).unwrap();
    fallocate(&file, zero | keep, 9 * MIB as i64, MIB as i64).unwrap();
    assert_eq!(fallocate(&file, zero, 9 * MIB as i64, MIB as i64), Err(nix::errno::Errno::EFBIG));
    assert_eq!(fallocate(&file, FallocateFlags::empty(), 0, MIB as i64), Err(nix::errno::Errno::EOPNOTSUPP));
    assert_eq!(served.path().metadata().unwrap().blocks(), allocated());
}

#[test]
fn a_read_only_disk_is_a_read_only_file() {
    let served = Served::over_itself(sparse_disk(MIB), "disk.raw", &["--read-only"]);
    assert_eq!(errno(OpenOptions::new().write(true).open(served.path())), Some(libc::EROFS));
    assert_eq!(std::fs::read(served.path()).unwrap(), vec![0; MIB as usize]);
}

#[test]
fn fio_verifies_what_it_wrote_by_every_engine() {
    let served = Served::over_itself(sparse_disk(32 * MIB), "disk.raw", &[]);
    let engines = [
        "--ioengine=psync",
        "--ioengine=libaio --direct=1 --iodepth=16",
        "--ioengine=io_uring --iodepth=16 --direct=1 --numjobs=2 --size=16M --offset_increment=16M",
    ];
    for engine in engines {
        let job = "--name=v --rw=randrw --bsrange=4k-256k --bs_unaligned=0 --size=32M --io_size=24M --verify=crc32c --verify_fatal=1 --fsync=64 --verify_state_save=0";
        let file = format!("--filename={}", text(served.path()));
        let arguments: Vec<&str> = job.split(' ').chain(engine.split(' ')).chain([&*file]).collect();
        let said = run("fio", &arguments);
        assert!(said.contains("err= 0"), "{said}");
    }
}

/// Files are written one after the other, each synced before the next: what the copy holds of them is a beginning of the row.
#[test]
fn a_file_system_on_a_loop_device_on_the_file_is_backed_up_as_of_one_instant() {
    let served = Served::over_itself(sparse_disk(64 * MIB), "disk.raw", &[]);
    let device = LoopDevice::over(served.path(), &["--direct-io=on"]);
    run("mkfs.ext4", &["-q", "-E", "lazy_itable_init=0", text(device.path())]);
    let mount = Mount::device(device.path());
    let (stop, synced) = (AtomicBool::new(false), AtomicU64::new(0));
    let contents = |number: u64| noise(number, 5000 + (number as usize * 977) % 60_000);
    let bounds: Vec<(u64, u64)> = thread::scope(|scope| {
        scope.spawn(|| {
            for number in 0..400 {
                if stop.load(SeqCst) {
                    return;
                }
                let file = File::create(mount.join(&format!("{number}"))).unwrap();
                file.write_all_at(&contents(number), 0).unwrap();
                file.sync_all().unwrap();
                synced.store(number + 1, SeqCst);
            }
        });
        let bounds = (0..2).map(|copy| {
            let before = wait_for("files", || Some(synced.load(SeqCst)).filter(|files| *files > 3 + copy * 20));
            served.backup(&format!("copy{copy}.raw"), &["--speed=40M"]).succeeds();
            (before, synced.load(SeqCst))
        });
        let bounds = bounds.collect();
        stop.store(true, SeqCst);
        bounds
    });
    for (copy, (before, after)) in bounds.into_iter().enumerate() {
        let copied = LoopDevice::over(&served.join(&format!("copy{copy}.raw")), &[]);
        // Replays the journal, as after a power cut, and repairs nothing else: 0 or 1.
        let fsck = std::process::Command::new("e2fsck").args(["-fp", text(copied.path())]).output().unwrap();
        assert!(matches!(fsck.status.code(), Some(0 | 1)), "{fsck:?}");
        let copied = Mount::device(copied.path());
        let whole = (0..)
            .take_while(|n| std::fs::read(copied.join(&n.to_string())).is_ok_and(|found| found == contents(*n)))
            .count() as u64;
        assert!(
            before <= whole && whole <= after + 1,
            "{whole} files, where {before} were synced before and {after} after"
        );
        // Of later ones none has been synced, so at most one, the next, has begun.
        let later = (whole + 1..400).find(|number| copied.join(&number.to_string()).exists());
        assert_eq!(later, None, "after {whole} files");
    }
}

#[test]
fn a_qcow2_over_itself_shows_its_disk_and_is_backed_up_as_a_qcow2() {
    let folder = folder();
    let image = folder.path().join("disk.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", text(&image), "8M"]);
    let served = Served::over_itself(folder, "disk.qcow2", &[]);
    let file = open(served.path());
    file.write_all_at(&noise(3, 1 << 20), MIB).unwrap();
    // The first bytes of a qcow2 with a backing file, as a hostile guest would write them.
    let evil = served.join("evil.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "/etc/passwd", "-u", text(&evil), "1M"]);
    file.write_all_at(&std::fs::read(&evil).unwrap()[..4096], 0).unwrap();
    served.backup("copy.qcow2", &[]).succeeds();
    let raw = served.join("copy.raw");
    run("qemu-img", &["convert", "-f", "qcow2", "-O", "raw", text(&served.join("copy.qcow2")), text(&raw)]);
    run("cmp", &[text(served.path()), text(&raw)]);
}

#[test]
fn a_raw_disk_of_a_server_stays_raw_whatever_its_guest_writes() {
    let served = Served::over_itself(sparse_disk(MIB), "disk.raw", &["--format=raw"]);
    let evil = served.join("evil.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-F", "raw", "-b", "/etc/passwd", "-u", text(&evil), "1M"]);
    open(served.path()).write_all_at(&std::fs::read(&evil).unwrap()[..4096], 0).unwrap();
    served.backup("copy.raw", &[]).succeeds();
    run("cmp", &[text(served.path()), text(&served.join("copy.raw"))]);
}

#[test]
fn writes_that_wait_for_a_backup_hold_nobody_else() {
    let served = Served::over_itself(sparse_disk(16 * MIB), "disk.raw", &[]);
    open(served.path()).write_all_at(&noise(4, 16 << 20), 0).unwrap();
    let target = served.join("copy.raw");
    let backup = served.start_backup(&target, &["--speed=1M", "--cbw-timeout=60"]);
    let partial = served.join(".copy.raw.drive-backup-partial");
    wait_for("the copy to begin", || partial.metadata().ok().filter(|found| found.blocks() > 0));
    backup.signal(Signal::SIGSTOP);
    let (written, fusectl) = (AtomicU64::new(0), Mount::fusectl());
    thread::scope(|scope| {
        for number in 0..24 {
            let (path, written) = (served.path(), &written);
            scope.spawn(move || {
                open(path).write_all_at(&[9; 4096], (32 + number) * MIB / 4).unwrap();
                written.fetch_add(1, SeqCst);
            });
        }
        wait_for("writes that wait", || (served.waiting(fusectl.path()) >= 24).then_some(()));
        let (read, is_read) = channel();
        let file = File::open(served.path()).unwrap();
        let reader = scope.spawn(move || {
            let mut found = vec![0; 1 << 20];
            file.read_exact_at(&mut found, 14 * MIB + 4096).unwrap();
            read.send(found).unwrap();
        });
        let found = is_read.recv_timeout(PATIENCE / 3);
        let waited = written.load(SeqCst) == 0;
        backup.signal(Signal::SIGCONT);
        reader.join().unwrap();
        assert!(waited, "a write went on without the backup");
        assert!(found.expect("reads wait for writes") == noise(4, 16 << 20)[(14 << 20) + 4096..(15 << 20) + 4096]);
    });
    backup.signal(Signal::SIGTERM);
    backup.ended();
    assert_eq!(written.load(SeqCst), 24);
}

#[test]
fn an_end_that_is_asked_for_loses_no_write_that_was_answered() {
    let mut served = Served::over_itself(sparse_disk(4 * MIB), "disk.raw", &[]);
    let file = open(served.path());
    let (done, answered) = (AtomicBool::new(false), AtomicU64::new(0));
    let failure = thread::scope(|scope| {
        let writer = scope.spawn(|| {
            for number in 1_u64.. {
                let begun_after = done.load(SeqCst);
                if let Err(e) = file.write_all_at(&number.to_le_bytes(), 512) {
                    return e.raw_os_error();
                }
                answered.store(number, SeqCst);
                if begun_after {
                    break;
                }
            }
            None
        });
        wait_for("writes", || (answered.load(SeqCst) > 100).then_some(()));
        let ended = served.end(Signal::SIGTERM);
        assert_eq!(ended.code, 0, "{ended:?}");
        done.store(true, SeqCst);
        writer.join().unwrap()
    });
    assert!(failure.is_some(), "the file outlives its server");
    assert!(!served.is_mounted());
    let mut last = [0; 8];
    File::open(served.path()).unwrap().read_exact_at(&mut last, 512).unwrap();
    let (last, answered) = (u64::from_le_bytes(last), answered.load(SeqCst));
    assert!(last >= answered && last <= answered + 1, "{last} on the disk, {answered} answered");
}

#[test]
fn a_killed_server_leaves_a_mount_that_the_next_one_undoes() {
    let mut served = Served::over_itself(sparse_disk(MIB), "disk.raw", &[]);
    open(served.path()).write_all_at(b"kept", 4096).unwrap();
    served.end(Signal::SIGKILL);
    assert_eq!(errno(File::open(served.path())), Some(libc::ENOTCONN));
    served.again();
    let mut found = [0; 4];
    open(served.path()).read_exact_at(&mut found, 4096).unwrap();
    assert_eq!(&found, b"kept");
    assert_eq!(served.end(Signal::SIGTERM).code, 0);
    assert!(!served.is_mounted());
}

/// No flush follows such a write, and of a qcow2 image the table that finds it is in the server's memory until then.
#[test]
fn a_write_that_is_to_be_durable_is_when_it_returns() {
    for flags in [libc::O_DSYNC, libc::O_SYNC, libc::O_DSYNC | libc::O_DIRECT] {
        let folder = folder();
        qemu_img("create -q -f qcow2 -o size=64M", &[&folder.path().join("disk.qcow2")]);
        let mut served = Served::over_itself(folder, "disk.qcow2", &[]);
        let file = OpenOptions::new().write(true).custom_flags(flags).open(served.path()).unwrap();
        let bytes = Aligned([7; 4096]);
        file.write_all_at(&bytes.0, 32 << 20).unwrap();
        served.end(Signal::SIGKILL);
        drop(file);
        run("umount", &["-l", text(served.path())]);
        qemu_io(&["-f", "qcow2", "-r"], served.path(), &["read -P 7 32M 4k", "read -P 0 0 4k"]);
    }
}

/// As O_DIRECT wants it.
#[repr(align(4096))]
struct Aligned([u8; 4096]);

/// The group's bits of such a file are not its group's rights.
#[test]
fn a_file_with_an_access_control_list_gives_its_group_nothing() {
    let folder = folder();
    let disk = folder.path().join("disk.raw");
    File::create(&disk).unwrap().set_len(MIB).unwrap();
    std::fs::set_permissions(&disk, std::os::unix::fs::PermissionsExt::from_mode(0o640)).unwrap();
    let mode = |path: &Path| path.metadata().unwrap().mode() & 0o777;
    let mut served = Served::over_itself(folder, "disk.raw", &[]);
    assert_eq!(mode(served.path()), 0o640);
    served.end(Signal::SIGTERM);
    // rw for its owner and user 1234, r for its group, and at most rw for both of these.
    let entries: [(u16, u16, u32); 5] =
        [(1, 6, u32::MAX), (2, 6, 1234), (4, 4, u32::MAX), (0x10, 6, u32::MAX), (0x20, 0, u32::MAX)];
    let bytes = |&(tag, rights, id): &(u16, u16, u32)| {
        [&tag.to_le_bytes()[..], &rights.to_le_bytes(), &id.to_le_bytes()].concat()
    };
    let list: Vec<u8> = 2_u32.to_le_bytes().into_iter().chain(entries.iter().flat_map(bytes)).collect();
    rustix::fs::setxattr(&disk, "system.posix_acl_access", &list, rustix::fs::XattrFlags::empty()).unwrap();
    assert_eq!(mode(&disk), 0o660, "as every file system shows it");
    served.again();
    assert_eq!(mode(served.path()), 0o600);
    assert_eq!(served.end(Signal::SIGTERM).code, 0);
}
