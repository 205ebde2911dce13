use super::*;
use crate::ground::cluster::ClusterSize;
use crate::ground::range::Allocation;
use crate::image::fixture::{LoopDevice, Mount, run, sparse_file, text};
use crate::ring::server::{OnCbwError, Options, Writers};
use std::os::unix::fs::MetadataExt;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};
use tempfile::TempDir;

fn options(folder: &TempDir, path: &Path) -> DiskOptions {
    DiskOptions {
        name: String::new(),
        path: path.to_owned(),
        format: None,
        read_only: false,
        secret: None,
        writer_dir: Some(folder.path().join("writers")),
    }
}

fn errno(result: io::Result<()>) -> Option<i32> {
    result.err().and_then(|error| error.raw_os_error())
}

fn code(errno: Errno) -> Option<i32> {
    Some(errno.raw_os_error())
}

/// A raw file of 1 MiB and 100 bytes, and an empty qcow2 of 1 MiB over a raw backing file of a's.
fn images(folder: &TempDir) -> [PathBuf; 2] {
    let [raw, qcow2, base] = ["disk.raw", "disk.qcow2", "base.raw"].map(|name| folder.path().join(name));
    sparse_file(&raw, (1 << 20) + 100);
    std::fs::write(&base, vec![b'a'; 1 << 20]).unwrap();
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-F", "raw", "-b", text(&base), text(&qcow2)]);
    [raw, qcow2]
}

#[test]
fn what_is_written_is_read_back_and_is_in_the_image_after_a_flush() {
    let folder = tempfile::tempdir().unwrap();
    for path in images(&folder) {
        let disk = Disk::open(&options(&folder, &path)).unwrap();
        disk.write(b"some bytes", 70_001).unwrap();
        disk.write_zeroes(ByteRange::new(131_072, 65_536), true).unwrap();
        disk.discard(ByteRange::new(196_608, 65_536)).unwrap();
        disk.flush().unwrap();
        let mut bytes = [0; 10];
        disk.read(&mut bytes, 70_001).unwrap();
        assert_eq!(&bytes, b"some bytes");
        drop(disk);
        let copy = folder.path().join("copy");
        run("qemu-img", &["convert", "-O", "raw", text(&path), text(&copy)]);
        let copy = std::fs::read(&copy).unwrap();
        assert_eq!(&copy[70_001..70_011], b"some bytes");
        assert!(copy[131_072..196_608].iter().all(|byte| *byte == 0));
        if path.extension().unwrap() == "qcow2" {
            assert_eq!((copy[70_000], copy[131_071]), (b'a', b'a'));
            run("qemu-img", &["check", "-q", text(&path)]);
        }
    }
}

#[test]
fn requests_past_the_end_are_refused_and_the_image_does_not_grow() {
    let folder = tempfile::tempdir().unwrap();
    for path in images(&folder) {
        let disk = Disk::open(&options(&folder, &path)).unwrap();
        let end = disk.length();
        for offset in [end - 3, end, end + 1, u64::MAX - 1, u64::MAX] {
            assert_eq!(errno(disk.write(b"four", offset)), code(Errno::NOSPC));
            assert_eq!(errno(disk.read(&mut [0; 4], offset)), code(Errno::INVAL));
            if let Some(range) = ByteRange::checked(offset, 4) {
                assert_eq!(errno(disk.write_zeroes(range, true)), code(Errno::NOSPC));
                assert_eq!(errno(disk.discard(range)), code(Errno::INVAL));
                assert_eq!(errno(disk.block_status(range).map(drop)), code(Errno::INVAL));
            }
        }
        disk.write(b"four", end - 4).unwrap();
        disk.write(b"", end).unwrap();
        assert_eq!(errno(disk.block_status(ByteRange::new(0, 0)).map(drop)), code(Errno::INVAL));
    }
    assert_eq!(folder.path().join("disk.raw").metadata().unwrap().len(), (1 << 20) + 100);
}

#[test]
fn zeroes_complete_no_header_of_another_format() {
    let folder = tempfile::tempdir().unwrap();
    let [raw, _] = images(&folder);
    let disk = Disk::open(&options(&folder, &raw)).unwrap();
    disk.write(b"QEDx", 0).unwrap();
    // The fourth of QED's magic bytes is zero.
    let missing = ByteRange::new(3, 1);
    assert_eq!(errno(disk.write(b"\0", 3)), code(Errno::PERM));
    assert_eq!(errno(disk.write_zeroes(missing, true)), code(Errno::PERM));
    assert_eq!(errno(disk.write_zeroes(missing, false)), code(Errno::PERM));
    assert_eq!(errno(disk.write_zeroes_fast(missing, true)), code(Errno::PERM));
    assert_eq!(errno(disk.discard(ByteRange::new(3, 65_536))), code(Errno::PERM));
    let mut start = [0; 4];
    disk.read(&mut start, 0).unwrap();
    assert_eq!(&start, b"QEDx");
    disk.write_zeroes(ByteRange::new(2, 2), true).unwrap();
    disk.discard(ByteRange::new(0, 65_536)).unwrap();
}

#[test]
fn a_read_only_disk_refuses_every_change_and_lets_others_read() {
    let folder = tempfile::tempdir().unwrap();
    for path in images(&folder) {
        let read_only = DiskOptions { read_only: true, ..options(&folder, &path) };
        let disk = Disk::open(&read_only).unwrap();
        let range = ByteRange::new(0, 4);
        assert_eq!(errno(disk.write(b"four", 0)), code(Errno::PERM));
        assert_eq!(errno(disk.write_zeroes(range, true)), code(Errno::PERM));
        assert_eq!(errno(disk.discard(range)), code(Errno::PERM));
        disk.flush().unwrap();
        disk.read(&mut [0; 4], 0).unwrap();
        let other = Disk::open(&read_only).unwrap();
        assert_eq!(Disk::open(&options(&folder, &path)).err().unwrap().kind(), Kind::Busy);
        drop((disk, other));
        let disk = Disk::open(&options(&folder, &path)).unwrap();
        assert_eq!(Disk::open(&read_only).err().unwrap().kind(), Kind::Busy);
        drop(disk);
    }
}

#[test]
fn a_disk_is_served_once_and_its_backing_file_is_nobodys_to_write() {
    let folder = tempfile::tempdir().unwrap();
    for path in images(&folder) {
        let _disk = Disk::open(&options(&folder, &path)).unwrap();
        let error = Disk::open(&options(&folder, &path)).err().unwrap();
        assert_eq!(error.kind(), Kind::Busy);
        let expected = format!("disk '{}' is in use by another program", path.display());
        assert!(error.to_string().starts_with(&expected), "{error}");
        if path.extension().unwrap() == "qcow2" {
            let base = options(&folder, &folder.path().join("base.raw"));
            assert_eq!(Disk::open(&base).err().unwrap().kind(), Kind::Busy);
            Disk::open(&DiskOptions { read_only: true, ..base }).unwrap();
        }
    }
}

#[test]
fn a_device_is_served_unless_somebody_else_holds_it() {
    let folder = tempfile::tempdir().unwrap();
    let [raw, _] = images(&folder);
    let device = LoopDevice::over(&raw, &[]);
    let disk = Disk::open(&options(&folder, device.path())).unwrap();
    assert_eq!(disk.length(), 1 << 20);
    disk.write(b"bytes", 1000).unwrap();
    disk.write_zeroes(ByteRange::new(4096, 8192), false).unwrap();
    disk.flush().unwrap();
    assert_eq!(Disk::open(&options(&folder, device.path())).err().unwrap().kind(), Kind::Busy);
    drop(disk);
    let mount = Mount::fresh("ext4");
    let device = run("findmnt", &["-n", "-o", "SOURCE", text(mount.path())]);
    for read_only in [false, true] {
        let error = Disk::open(&DiskOptions { read_only, ..options(&folder, Path::new(&device)) }).err().unwrap();
        let expected = format!("disk '{device}' is mounted at '{}'", mount.path().display());
        assert_eq!((error.kind(), error.to_string()), (Kind::Busy, expected));
    }
}

#[test]
fn a_guest_cannot_make_its_raw_disk_another_format_unless_raw_was_asked_for() {
    let folder = tempfile::tempdir().unwrap();
    let [raw, _] = images(&folder);
    let disk = Disk::open(&options(&folder, &raw)).unwrap();
    assert_eq!(disk.format(), Format::Raw);
    assert_eq!(errno(disk.write(b"QFI\xfb\0\0\0\x03", 0)), code(Errno::PERM));
    // Half by half, and by one write that reaches in.
    disk.write(b"QF", 0).unwrap();
    assert_eq!(errno(disk.write(b"I\xfb", 2)), code(Errno::PERM));
    disk.write(b"I", 2).unwrap();
    assert_eq!(errno(disk.write(&[0xfb; 4096], 3)), code(Errno::PERM));
    disk.write(b"anything else", 0).unwrap();
    disk.write(b"QFI\xfb", 512).unwrap();
    drop(disk);
    let disk = Disk::open(&DiskOptions { format: Some(Format::Raw), ..options(&folder, &raw) }).unwrap();
    disk.write(b"QFI\xfb", 0).unwrap();
}

#[test]
fn zeroes_without_holes_keep_their_space() {
    let folder = tempfile::tempdir().unwrap();
    let [raw, _] = images(&folder);
    let disk = Disk::open(&options(&folder, &raw)).unwrap();
    disk.write(&[1; 65536], 0).unwrap();
    disk.flush().unwrap();
    let blocks = || raw.metadata().unwrap().blocks();
    let before = blocks();
    disk.write_zeroes(ByteRange::new(0, 65536), false).unwrap();
    assert!(blocks() >= before, "{} of {before}", blocks());
    disk.write_zeroes(ByteRange::new(0, 65536), true).unwrap();
    disk.flush().unwrap();
    assert!(blocks() < before);
    assert_eq!(disk.block_status(ByteRange::new(0, 65536)).unwrap().allocation, Allocation::Zero);
    let mut bytes = [1; 65536];
    disk.read(&mut bytes, 0).unwrap();
    assert_eq!(bytes, [0; 65536]);
}

/// An image that takes zeroes and discards, tells of each, and waits to be allowed it.
struct Told {
    tell: Sender<ByteRange>,
    allowed: Mutex<Receiver<()>>,
}

impl Told {
    fn change(&self, range: ByteRange) -> io::Result<()> {
        self.tell.send(range).unwrap();
        self.allowed.lock().unwrap().recv_timeout(HANGS).map_err(io::Error::other)
    }
}

impl Image for Told {
    fn length(&self) -> u64 {
        4 * STRETCH
    }

    fn block_status(&self, range: ByteRange) -> io::Result<Extent> {
        Ok(Extent::data(range))
    }

    fn read_at(&self, buf: &mut [u8], _: u64) -> io::Result<()> {
        buf.fill(0);
        Ok(())
    }

    fn write_at(&self, _: &[u8], _: u64) -> io::Result<()> {
        unreachable!("nobody writes")
    }

    fn write_zeroes(&self, range: ByteRange) -> io::Result<()> {
        self.change(range)
    }

    fn discard(&self, range: ByteRange) -> io::Result<()> {
        self.change(range)
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn properties(&self) -> Properties {
        Properties { cluster_size: 1, alignment: 1, reads_zero: false, sequential: false }
    }
}

/// No event takes longer.
const HANGS: Duration = Duration::from_secs(20);

/// A backup of the disk at `path` comes.
fn attach(folder: &TempDir, path: &Path, length: u64) -> Writers {
    let terms = Options {
        length,
        cluster_size: ClusterSize::new(4096),
        freeze_timeout: HANGS,
        cbw_timeout: HANGS,
        on_cbw_error: OnCbwError::BreakSnapshot,
        threads: 1,
    };
    Writers::attach(folder::Disk::at(path).unwrap(), &folder.path().join("writers"), terms).unwrap()
}

/// Freezes in the midst of a long `change`: the backup waits for what is done just now, and the change for the backup.
fn freezes_between_stretches(change: impl Fn(&Disk, ByteRange) -> io::Result<()> + Sync) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk.raw");
    sparse_file(&path, 4 * STRETCH);
    let (tell, told) = channel();
    let (allow, allowed) = channel();
    let image = Arc::new(Told { tell, allowed: Mutex::new(allowed) });
    let disk = Disk { image, ..Disk::open(&options(&folder, &path)).unwrap() };
    let writers = attach(&folder, &path, 4 * STRETCH);
    let range = ByteRange::between(STRETCH - 100, 2 * STRETCH + 100);
    thread::scope(|scope| {
        let changed = scope.spawn(|| change(&disk, range));
        assert_eq!(told.recv_timeout(HANGS).unwrap(), ByteRange::between(range.offset, STRETCH));
        let frozen = scope.spawn(|| writers.freeze());
        let since = Instant::now();
        while !disk.would_wait(range) {
            assert!(since.elapsed() < HANGS, "it does not freeze");
            thread::yield_now();
        }
        allow.send(()).unwrap();
        let frozen = frozen.join().unwrap().unwrap();
        assert!(told.try_recv().is_err(), "it goes on while it is frozen");
        frozen.release().unwrap();
        for rest in [ByteRange::between(STRETCH, 2 * STRETCH), ByteRange::between(2 * STRETCH, range.end())] {
            assert_eq!(told.recv_timeout(HANGS).unwrap(), rest);
            allow.send(()).unwrap();
        }
        changed.join().unwrap().unwrap();
    });
}

#[test]
fn a_backup_waits_for_a_stretch_of_zeroes_or_of_a_discard_and_not_for_all() {
    freezes_between_stretches(|disk, range| disk.write_zeroes(range, true));
    freezes_between_stretches(|disk, range| disk.discard(range));
}

#[test]
fn zeroes_that_can_not_be_fast_wait_for_no_backup() {
    let folder = tempfile::tempdir().unwrap();
    let [_, qcow2] = images(&folder);
    let disk = Disk::open(&options(&folder, &qcow2)).unwrap();
    let writers = attach(&folder, &qcow2, disk.length());
    let frozen = writers.freeze().unwrap();
    assert_eq!(errno(disk.write_zeroes_fast(ByteRange::new(0, 65_536), true)), code(Errno::OPNOTSUPP));
    frozen.release().expect("it has waited for the end of the freeze");
}
