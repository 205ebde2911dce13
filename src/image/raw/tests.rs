use super::*;
use crate::image::fixture::{LoopDevice, Mount, run, sparse_file, text};
use std::fs::OpenOptions;
use std::time::{Duration, Instant};

const MIB: u64 = 1 << 20;

fn range(offset: u64, length: u64) -> ByteRange {
    ByteRange::new(offset, length)
}

fn read_write(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).open(path).unwrap()
}

/// For writing in place.
fn open_target(path: &Path) -> Result<Raw> {
    Raw::open_for(path, Access::Write, Side::Target)
}

/// What `block_status` says of the whole image, one call after the other.
fn map(image: &Raw) -> Vec<Extent> {
    let mut extents = Vec::new();
    let mut rest = range(0, image.length());
    while !rest.is_empty() {
        let extent = image.block_status(rest).unwrap();
        assert_eq!(extent.range.offset, rest.offset);
        assert!(!extent.range.is_empty() && extent.range.end() <= rest.end());
        rest = ByteRange::between(extent.range.end(), rest.end());
        extents.push(extent);
    }
    extents
}

/// A small generator of numbers, the same for every run.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

/// Writes, zeroes and reads at random, unaligned places, and compares with plain memory.
fn follows_a_byte_model(image: &Raw, mut model: Vec<u8>) {
    let length = model.len() as u64;
    let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
    for step in 0..200u64 {
        let offset = numbers.below(length);
        let length = 1 + numbers.below((length - offset).min(40_000));
        let part = offset as usize..(offset + length) as usize;
        match numbers.below(3) {
            0 => {
                model[part.clone()].fill(0);
                image.write_zeroes(range(offset, length)).unwrap();
            }
            _ => {
                model[part.clone()].fill(step as u8 | 1);
                image.write_at(&model[part.clone()], offset).unwrap();
            }
        }
        let mut read = vec![0xee; part.len()];
        image.read_at(&mut read, offset).unwrap();
        assert!(read == model[part], "step {step} at {offset:#x}+{length}");
    }
    image.flush().unwrap();
    let mut all = vec![0; model.len()];
    image.read_at(&mut all, 0).unwrap();
    assert!(all == model);
}

#[test]
fn files_and_devices_keep_every_byte_whatever_they_can_punch() {
    let length = 300_000 + 512 - 300_000 % 512;
    let old = vec![0x55; length];
    let folder = tempfile::tempdir().unwrap();
    // tmpfs punches and has no ZERO_RANGE; ramfs has neither.
    let (tmpfs, ramfs) = (Mount::tmpfs(8 * MIB), Mount::ramfs());
    let name = |n: &str| folder.path().join(n);
    let paths = [name("file"), name("disk"), name("4k"), tmpfs.join("file"), ramfs.join("file")];
    for path in &paths {
        std::fs::write(path, &old).unwrap();
    }
    std::fs::write(&paths[2], vec![0x55; length.next_multiple_of(4096)]).unwrap();
    let device = LoopDevice::over(&paths[1], &[]);
    let big_sectors = LoopDevice::over(&paths[2], &["--sector-size", "4096"]);
    for path in [&paths[0], device.path(), big_sectors.path(), &paths[3], &paths[4]] {
        let image = open_target(path).unwrap();
        let model = vec![0x55; image.length() as usize];
        follows_a_byte_model(&image, model);
    }
}

#[test]
fn direct_io_keeps_every_byte_aligned_or_not() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("file");
    for length in [300_001, 4096, 1, 2 << 20] {
        std::fs::write(&path, vec![0x55; length]).unwrap();
        let image = open_target(&path).unwrap().with_direct().unwrap();
        assert!(image.properties().alignment >= 4096);
        follows_a_byte_model(&image, vec![0x55; length]);
    }
    let device = LoopDevice::over(&path, &[]);
    let image = open_target(device.path()).unwrap().with_direct().unwrap();
    let mut buffer = AlignedBuffer::new(1 << 20, image.properties().alignment as usize);
    buffer.fill(0x77);
    image.write_at(&buffer, MIB).unwrap();
    image.flush().unwrap();
    assert!(std::fs::read(&path).unwrap()[1 << 20..].iter().all(|&b| b == 0x77));
}

#[test]
fn direct_io_of_a_fresh_file_goes_past_the_cache() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let image = Raw::fresh(read_write(file.path()), MIB).unwrap().with_direct().unwrap();
    image.write_at(&vec![7; 1 << 20], 0).unwrap();
    let mut read = vec![0; 1 << 20];
    image.read_at(&mut read, 0).unwrap();
    assert!(read.iter().all(|&b| b == 7));
    assert_eq!(run("fincore", &["-n", "-o", "PAGES", text(file.path())]).trim(), "0");
}

#[test]
fn direct_io_is_refused_where_there_is_none() {
    let memory = Mount::ramfs();
    let error = Raw::fresh(File::create_new(memory.join("file")).unwrap(), MIB).unwrap().with_direct().unwrap_err();
    assert_eq!(error.to_string(), "the file system has no direct I/O (O_DIRECT)");
}

#[test]
fn holes_are_zero_and_the_rest_is_data() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let image = Raw::fresh(read_write(file.path()), 8 * MIB).unwrap();
    assert_eq!(map(&image), [Extent::zero(range(0, 8 * MIB))]);
    image.write_at(&[1; 65536], 2 * MIB).unwrap();
    image.write_at(&[1; 65536], 2 * MIB + 65536).unwrap();
    let expected = [
        Extent::zero(range(0, 2 * MIB)),
        Extent::data(range(2 * MIB, 131_072)),
        Extent::zero(ByteRange::between(2 * MIB + 131_072, 8 * MIB)),
    ];
    assert_eq!(map(&image), expected);
    assert_eq!(image.block_status(range(2 * MIB + 512, 1024)).unwrap(), Extent::data(range(2 * MIB + 512, 1024)));
    image.write_zeroes(range(2 * MIB, 131_072)).unwrap();
    assert_eq!(image.block_status(range(2 * MIB + 512, 1024)).unwrap(), Extent::zero(range(2 * MIB + 512, 1024)));
    assert_eq!(map(&image), [Extent::zero(range(0, 8 * MIB))]);
}

#[test]
fn a_discard_frees_the_space_of_a_file() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let image = Raw::fresh(read_write(file.path()), MIB).unwrap();
    image.write_at(&vec![1; 1 << 20], 0).unwrap();
    image.discard(range(0, MIB)).unwrap();
    assert_eq!(map(&image), [Extent::zero(range(0, MIB))]);
    assert_eq!(image.length(), MIB);
}

#[test]
fn a_discard_on_a_device_reaches_what_is_below() {
    use std::os::unix::fs::MetadataExt;
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), vec![1; 1 << 20]).unwrap();
    let device = LoopDevice::over(file.path(), &[]);
    let image = open_target(device.path()).unwrap();
    image.discard(range(100, MIB - 200)).unwrap();
    assert!(file.as_file().metadata().unwrap().blocks() <= 16);
}

#[test]
fn a_file_that_shrinks_is_an_error_that_says_where() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(MIB).unwrap();
    let image = Raw::open(file.path(), Side::Source).unwrap();
    file.as_file().set_len(4096).unwrap();
    let error = image.read_at(&mut [0; 512], 8192).unwrap_err();
    assert_eq!((error.kind(), error.to_string().as_str()), (io::ErrorKind::UnexpectedEof, "the file ended at 0x1000"));
    assert_eq!(image.block_status(range(8192, 512)).unwrap_err().to_string(), "the file ended at 0x1000");
    assert_eq!(image.block_status(range(0, MIB)).unwrap(), Extent::zero(range(0, 4096)));
}

#[test]
fn a_file_grows_by_bytes_and_by_zeroes_written_past_its_end() {
    let image = Raw::fresh(tempfile::tempfile().unwrap(), 0).unwrap();
    image.write_at(b"abc", 10).unwrap();
    assert_eq!(image.length(), 13);
    image.write_zeroes(range(11, 100)).unwrap();
    assert_eq!(image.length(), 111);
    let mut all = vec![1; 111];
    image.read_at(&mut all, 0).unwrap();
    assert!(all[10] == b'a' && all[..10].iter().chain(&all[11..]).all(|&b| b == 0));
}

#[test]
fn a_fresh_file_forgets_what_it_held() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), vec![1; 5000]).unwrap();
    let image = Raw::fresh(read_write(file.path()), 4096).unwrap();
    assert!(image.properties().reads_zero);
    assert_eq!(map(&image), [Extent::zero(range(0, 4096))]);
}

#[test]
fn a_device_has_its_size_and_is_data() {
    let file = tempfile::NamedTempFile::new().unwrap();
    sparse_file(file.path(), MIB + 512);
    let device = LoopDevice::over(file.path(), &[]);
    let image = Raw::open(device.path(), Side::Source).unwrap();
    assert_eq!(image.medium(), Medium::Device { sector: 512 });
    assert_eq!(map(&image), [Extent::data(range(0, MIB + 512))]);
}

#[test]
fn a_claimed_device_is_busy() {
    let file = tempfile::NamedTempFile::new().unwrap();
    sparse_file(file.path(), MIB);
    let device = LoopDevice::over(file.path(), &[]);
    let _first = open_target(device.path()).unwrap();
    let error = open_target(device.path()).unwrap_err();
    assert_eq!(error.kind(), crate::error::Kind::Busy);
    assert_eq!(
        error.to_string(),
        format!("open target '{}': the device is mounted or in use", device.path().display())
    );
}

/// Buffered writes to it succeed, and only the flush fails: a loop device over a sparse file on a full tmpfs.
fn device_that_loses_data() -> (Mount, LoopDevice) {
    let memory = Mount::tmpfs(MIB);
    sparse_file(&memory.join("disk"), 8 * MIB);
    let device = LoopDevice::over(&memory.join("disk"), &[]);
    (memory, device)
}

#[test]
fn a_failed_flush_is_final() {
    let (_memory, device) = device_that_loses_data();
    let image = open_target(device.path()).unwrap();
    image.write_at(&vec![1; 4 << 20], 0).unwrap();
    let first = image.flush().unwrap_err();
    let second = image.flush().unwrap_err();
    assert_eq!(first.raw_os_error(), second.raw_os_error());
    drop(image);
}

/// Sectors that the device has been given to write, as /sys has it.
fn sectors_written(device: &Path) -> u64 {
    let name = device.file_name().unwrap().to_str().unwrap();
    let stat = std::fs::read_to_string(format!("/sys/block/{name}/stat")).unwrap();
    stat.split_whitespace().nth(6).unwrap().parse().unwrap()
}

#[test]
fn writeback_begins_before_the_flush() {
    let file = tempfile::NamedTempFile::new().unwrap();
    sparse_file(file.path(), 8 * MIB);
    let device = LoopDevice::over(file.path(), &[]);
    let image = open_target(device.path()).unwrap().with_writeback(MIB);
    let before = sectors_written(device.path());
    for piece in 0..16 {
        image.write_at(&vec![1; 256 << 10], piece * (256 << 10)).unwrap();
    }
    // The kernel by itself begins after 30 s.
    let limit = Instant::now() + Duration::from_secs(10);
    while sectors_written(device.path()) == before {
        assert!(Instant::now() < limit, "nothing is being written");
        std::thread::yield_now();
    }
}

#[test]
fn of_two_flushes_at_once_both_hear_of_a_page_that_is_lost() {
    let folder = tempfile::tempdir().unwrap();
    sparse_file(&folder.path().join("disk"), MIB);
    let image = &open_target(&folder.path().join("disk")).unwrap();
    let (begun, has_begun) = std::sync::mpsc::channel();
    let (go_on, goes_on) = std::sync::mpsc::channel();
    let told = std::thread::scope(|scope| {
        let first = scope.spawn(move || {
            image.flush_by(|_| {
                begun.send(()).unwrap();
                goes_on.recv().unwrap();
                Err(Errno::IO.into())
            })
        });
        has_begun.recv().unwrap();
        // The kernel has told the first.
        let second = scope.spawn(move || image.flush_by(|_| Ok(())));
        while image.flushes.waiting() == 0 && !second.is_finished() {
            std::thread::yield_now();
        }
        go_on.send(()).unwrap();
        [first, second].map(|flush| flush.join().unwrap().map_err(|e| e.raw_os_error()))
    });
    assert_eq!(told, [Err(Some(Errno::IO.raw_os_error())); 2]);
}
