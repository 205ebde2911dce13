use super::super::fixture::{MemoryDisk, Operation, assert_clean, assert_reads, contents, qemu_img};
use super::super::header::{Header, MAGIC};
use super::*;
use crate::ground::range::Allocation;
use crate::image::fixture::{sparse_file, text};
use crate::image::raw::Raw;
use proptest::prelude::*;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

const ZLIB: CompressOptions = CompressOptions { kind: Compression::Zlib, level: 1 };
const ZSTD: CompressOptions = CompressOptions { kind: Compression::Zstd, level: 1 };

fn options(cluster_size: u64, compression: Option<CompressOptions>) -> CreateOptions {
    CreateOptions { cluster_size, compression }
}

/// A new image in a file, beside a raw file that holds what it should.
struct Pair {
    _folder: tempfile::TempDir,
    path: PathBuf,
    expected: PathBuf,
    model: fs::File,
    image: NewQcow2,
}

impl Pair {
    fn new(length: u64, options: CreateOptions) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (path, expected) = (folder.path().join("new.qcow2"), folder.path().join("expected.raw"));
        sparse_file(&expected, length);
        let model = fs::OpenOptions::new().write(true).open(&expected).unwrap();
        let file = fs::OpenOptions::new().read(true).write(true).create_new(true).open(&path).unwrap();
        let image = NewQcow2::create(Arc::new(Raw::fresh(file, 0).unwrap()), length, options).unwrap();
        Self { _folder: folder, path, expected, model, image }
    }

    fn write(&self, bytes: &[u8], offset: u64) {
        self.model.write_all_at(bytes, offset).unwrap();
        self.image.write_at(bytes, offset).unwrap();
    }

    fn zero(&self, range: ByteRange) {
        self.model.write_all_at(&vec![0; range.length as usize], range.offset).unwrap();
        self.image.write_zeroes(range).unwrap();
    }

    /// Clean and equal, in qemu-img's eyes.
    fn judge(&self) {
        self.image.flush().unwrap();
        assert_clean(&self.path);
        assert_reads(&self.path, &self.expected);
    }
}

#[test]
fn every_shape_reads_back_equal_and_checks_clean() {
    for cluster_size in [512, 4096, 65536, 2 << 20] {
        for compression in [None, Some(ZLIB), Some(ZSTD)] {
            let lengths = [0, cluster_size, 3 * cluster_size + 700, (1 << 20) + 12345];
            for length in lengths {
                let pair = Pair::new(length, options(cluster_size, compression));
                let chunk = (256u64 << 10).next_multiple_of(cluster_size);
                let bytes = contents(length ^ cluster_size, length as usize, cluster_size as usize / 2);
                for (piece, offset) in bytes.chunks(chunk as usize).zip((0..).step_by(chunk as usize)) {
                    pair.write(piece, offset);
                }
                pair.judge();
            }
        }
    }
}

#[test]
fn a_discard_of_less_than_a_cluster_changes_nothing() {
    let pair = Pair::new(4 * 65536, options(65536, None));
    pair.write(&contents(3, 4 * 65536, 4096), 0);
    for (offset, length) in [(70_000, 1000), (70_000, 0), (65536, 0), (60_000, 10_000)] {
        pair.image.discard(ByteRange::new(offset, length)).unwrap();
    }
    pair.judge();
}

#[test]
fn over_a_backing_file_zeroes_hide_it_and_what_is_left_out_shows_it() {
    let cluster = 65536;
    let pair = Pair::new(6 * cluster + 700, options(cluster, None));
    let base = pair.path.with_file_name("base.raw");
    let bytes = contents(5, 6 * cluster as usize + 700, 4096);
    fs::write(&base, &bytes).unwrap();
    pair.model.write_all_at(&bytes, 0).unwrap();
    let name = base.into_os_string();
    let image = pair.image.over(Backing { name: name.clone(), format: Some("raw".to_owned()) }).unwrap();
    let pair = Pair { image, ..pair };
    assert!(!pair.image.properties().reads_zero);
    pair.write(&vec![7; cluster as usize], cluster);
    // Whole clusters only: of the others the backing file's bytes would be lost.
    assert!(pair.image.write_zeroes(ByteRange::new(3 * cluster + 512, cluster)).is_err());
    pair.zero(ByteRange::new(2 * cluster, 2 * cluster));
    pair.zero(ByteRange::between(6 * cluster, pair.image.length()));
    let status = |at| pair.image.block_status(ByteRange::between(at, pair.image.length())).unwrap();
    assert_eq!(status(0), Extent::unallocated(ByteRange::new(0, cluster)));
    assert_eq!(status(2 * cluster), Extent::zero(ByteRange::new(2 * cluster, 2 * cluster)));
    pair.judge();
    let header = Header::parse(&fs::read(&pair.path).unwrap()).unwrap();
    assert_eq!(header.backing.unwrap().name, name);
    let long = Pair::new(cluster, options(512, None));
    let name = "x".repeat(300).into();
    assert!(long.image.over(Backing { name, format: None }).is_err_and(|error| error.to_string().contains("too long")));
}

#[test]
fn the_virtual_size_is_rounded_up_to_512_as_by_qemu_img() {
    let pair = Pair::new(1000, options(65536, None));
    pair.image.flush().unwrap();
    assert_eq!(pair.image.length(), 1000);
    assert_eq!(Header::parse(&fs::read(&pair.path).unwrap()).unwrap().size, 1024);
    let theirs = pair.path.with_extension("theirs");
    qemu_img(&["convert", "-f", "raw", "-O", "qcow2", text(&pair.expected), text(&theirs)]);
    assert_eq!(Header::parse(&fs::read(&theirs).unwrap()).unwrap().size, 1024);
}

#[test]
fn fifteen_tebibytes_with_scattered_data_stay_small() {
    // ext4 holds no sparse file of 16 TiB to compare with.
    let length = 15 << 40;
    for compression in [None, Some(ZSTD)] {
        let pair = Pair::new(length, options(65536, compression));
        let bytes = contents(7, 128 << 10, 20000);
        for n in 0..200u64 {
            pair.write(&bytes, n * (length / 200) / 65536 * 65536);
        }
        pair.write(&bytes[..65536], length - 65536);
        pair.image.flush().unwrap();
        assert_clean(&pair.path);
        assert!(fs::metadata(&pair.path).unwrap().len() < 48 << 20);
        // The places that were written, and their neighbours; qemu-img compare would look at each of 16 TiB.
        let reader = qemu_img(&["map", "--output=json", "-f", "qcow2", text(&pair.path)]).1;
        assert_eq!(reader.matches("\"data\": true").count(), 201);
        let (code, _) = qemu_img(&["compare", "-f", "qcow2", "-F", "raw", text(&pair.path), text(&pair.expected)]);
        assert_eq!(code, 0);
    }
}

#[test]
fn what_was_zeroed_or_never_written_takes_no_space_in_tables() {
    let pair = Pair::new(10 << 16, options(65536, None));
    pair.write(&contents(1, 4 << 16, 999), 2 << 16);
    pair.zero(ByteRange::new(3 << 16, 1 << 16));
    pair.zero(ByteRange::new(8 << 16, 2 << 16));
    pair.zero(ByteRange::new(100, 100));
    let status = |cluster: u64| pair.image.block_status(ByteRange::new(cluster << 16, (10 - cluster) << 16)).unwrap();
    assert_eq!(status(0), Extent::zero(ByteRange::new(0, 2 << 16)));
    assert_eq!(status(2), Extent::data(ByteRange::new(2 << 16, 1 << 16)));
    assert_eq!(status(3).allocation, Allocation::Zero);
    assert_eq!(status(6), Extent::zero(ByteRange::new(6 << 16, 4 << 16)));
    pair.judge();
}

#[test]
fn requests_that_are_not_whole_clusters_are_refused() {
    let image = NewQcow2::create(Arc::new(MemoryDisk::default()), 1 << 20, options(65536, None)).unwrap();
    let kind = |result: io::Result<()>| result.unwrap_err().kind();
    assert_eq!(kind(image.write_at(&[1; 65536], 512)), io::ErrorKind::InvalidInput);
    assert_eq!(kind(image.write_at(&[1; 512], 0)), io::ErrorKind::InvalidInput);
    assert_eq!(kind(image.write_at(&[1; 65536], 1 << 20)), io::ErrorKind::InvalidInput);
    image.write_at(&[1; 65536], 0).unwrap();
    assert_eq!(kind(image.write_zeroes(ByteRange::new(512, 512))), io::ErrorKind::InvalidInput);
    image.discard(ByteRange::new(512, 512)).unwrap();
}

#[test]
fn bad_options_are_refused_by_name() {
    let refused = |length, options| {
        let file = Arc::new(MemoryDisk::default());
        let error = NewQcow2::create(file, length, options).map(|_| ()).unwrap_err();
        assert_eq!(error.kind(), Kind::Usage);
        error.to_string()
    };
    for cluster_size in [0, 256, 1000, 4 << 20] {
        assert!(refused(1 << 20, options(cluster_size, None)).contains(&format!("cluster size {cluster_size} ")));
    }
    assert!(refused(129 << 30, options(512, None)).contains("too large"));
    assert!(refused(u64::MAX, options(2 << 20, None)).contains("too large"));
    let level = |kind, level| options(65536, Some(CompressOptions { kind, level }));
    assert!(refused(1 << 20, level(Compression::Zlib, 10)).contains("level 10 of zlib"));
    assert!(refused(1 << 20, level(Compression::Zstd, 23)).contains("level 23 of zstd"));
    assert!(refused(1 << 20, level(Compression::Zlib, 0)).contains("level 0"));
}

#[test]
fn a_finished_image_takes_no_more_writes_and_a_second_flush_does_nothing() {
    let disk = Arc::new(MemoryDisk::default());
    let image = NewQcow2::create(disk.clone(), 1 << 20, options(65536, None)).unwrap();
    image.write_at(&[1; 65536], 0).unwrap();
    image.flush().unwrap();
    let log = disk.log().len();
    image.flush().unwrap();
    assert_eq!(disk.log().len(), log);
    assert!(image.write_at(&[2; 65536], 0).is_err());
    assert!(image.write_zeroes(ByteRange::new(0, 65536)).is_err());
}

/// Does a reader take it for an image?
fn is_image(bytes: &[u8]) -> bool {
    bytes.starts_with(&MAGIC)
}

#[test]
fn until_the_last_write_there_is_no_header_and_all_else_is_flushed_before_it() {
    let old = [&MAGIC[..], &[7; 5000]].concat();
    let disk = Arc::new(MemoryDisk::of(old.clone()));
    let image = NewQcow2::create(disk.clone(), 1 << 20, options(4096, Some(ZLIB))).unwrap();
    image.write_at(&contents(3, 1 << 20, 3000), 0).unwrap();
    image.flush().unwrap();
    let log = disk.log();
    let mut bytes = old;
    for (number, operation) in log.iter().enumerate() {
        operation.apply(&mut bytes);
        assert_eq!(is_image(&bytes), number >= log.len() - 2, "after {number} of {}", log.len());
    }
    assert_eq!(log[1], Operation::Flush, "the old header is gone before anything is overwritten");
    assert_eq!(log[log.len() - 3], Operation::Flush);
    assert_eq!(log[log.len() - 1], Operation::Flush);
}

#[test]
fn until_the_first_write_the_file_is_as_it_was() {
    let old = [&MAGIC[..], &[7; 5000]].concat();
    let disk = Arc::new(MemoryDisk::of(old.clone()));
    let image = NewQcow2::create(disk.clone(), 1 << 20, options(4096, None)).unwrap();
    image.write_zeroes(ByteRange::new(0, 1 << 20)).unwrap();
    image.discard(ByteRange::new(0, 4096)).unwrap();
    drop(image);
    assert!(disk.log().is_empty() && disk.bytes() == old);
    // Nothing but zeroes is an image too.
    NewQcow2::create(disk.clone(), 1 << 20, options(4096, None)).unwrap().flush().unwrap();
    assert_eq!(disk.log()[1], Operation::Flush, "the old header is gone first");
    assert!(is_image(&disk.bytes()));
}

#[test]
fn a_file_that_fails_at_any_moment_holds_no_image_and_every_later_flush_fails() {
    let write_all = |disk: &Arc<MemoryDisk>| {
        let image = NewQcow2::create(disk.clone(), 1 << 20, options(65536, Some(ZSTD))).unwrap();
        let bytes = contents(5, 1 << 20, 100_000);
        let written = bytes.chunks(262144).zip(0..).all(|(piece, n)| image.write_at(piece, n * 262144).is_ok());
        let flushed = image.flush().is_ok();
        disk.fail_from(None);
        assert_eq!(image.flush().is_ok(), flushed, "a failed flush is final");
        written && flushed
    };
    let whole = Arc::new(MemoryDisk::default());
    assert!(write_all(&whole));
    let operations = whole.log().len();
    for number in 0..operations {
        let disk = Arc::new(MemoryDisk::default());
        disk.fail_from(Some(number));
        assert!(!write_all(&disk), "failure at {number}");
        // Whether the header's last flush failed only the caller knows: it fails, and the file is thrown away.
        assert_eq!(is_image(&disk.bytes()), number == operations - 1);
    }
}

#[test]
fn a_write_that_failed_leaves_no_leak() {
    for compression in [None, Some(ZLIB)] {
        let disk = Arc::new(MemoryDisk::default());
        let image = NewQcow2::create(disk.clone(), 1 << 20, options(4096, compression)).unwrap();
        let bytes = contents(11, 1 << 20, 5000);
        image.write_at(&bytes[..100 << 12], 0).unwrap();
        disk.fail_from(Some(disk.log().len()));
        image.write_at(&bytes[100 << 12..200 << 12], 100 << 12).unwrap_err();
        disk.fail_from(None);
        image.write_at(&bytes[120 << 12..], 120 << 12).unwrap();
        image.flush().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let (path, expected) = (folder.path().join("a"), folder.path().join("b"));
        fs::write(&path, disk.bytes()).unwrap();
        let mut model = bytes;
        model[100 << 12..120 << 12].fill(0);
        fs::write(&expected, model).unwrap();
        assert_clean(&path);
        assert_reads(&path, &expected);
    }
}

#[test]
fn compressed_clusters_take_64_bytes_at_least() {
    // At the largest cluster size fewer bytes each would let more share a cluster of the file than a refcount holds.
    let pair = Pair::new(9000 << 12, options(4096, Some(ZSTD)));
    pair.write(&vec![b'x'; 9000 << 12], 0);
    pair.judge();
    let length = fs::metadata(&pair.path).unwrap().len();
    assert!((9000 * 64..9000 * 64 + (256 << 10)).contains(&length), "{length}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Three threads write chunks of a random order, some of them twice.
    #[test]
    fn any_order_of_concurrent_writes_reads_back_equal(
        seed in any::<u64>(),
        cluster_bits in 9u32..17,
        compression in prop::sample::select(vec![None, Some(ZLIB), Some(ZSTD)]),
        tail in 0u64..3000,
        order in prop::collection::vec((0u64..40, 1u64..6, 0u8..5), 1..40),
    ) {
        let cluster = 1u64 << cluster_bits;
        let length = 45 * cluster + tail;
        let pair = Pair::new(length, options(cluster, compression));
        let mut taken = [false; 64];
        let mut rounds: Vec<Vec<_>> = vec![Vec::new()];
        for (first, count, kind) in order {
            // Writes that overlap go into different rounds.
            if (first..first + count).any(|n| taken[n as usize]) {
                taken.fill(false);
                rounds.push(Vec::new());
            }
            (first..first + count).for_each(|n| taken[n as usize] = true);
            rounds.last_mut().unwrap().push((first, count, kind));
        }
        for (round, jobs) in rounds.iter().enumerate() {
            std::thread::scope(|scope| {
                for thread in 0..3 {
                    let pair = &pair;
                    scope.spawn(move || {
                        for (first, count, kind) in jobs.iter().skip(thread).step_by(3) {
                            let range = ByteRange::between(first * cluster, ((first + count) * cluster).min(length));
                            if *kind == 0 {
                                pair.zero(range);
                            } else {
                                let seed = seed ^ (round as u64) << 32 ^ *first;
                                pair.write(&contents(seed, range.length as usize, cluster as usize * 2), range.offset);
                            }
                        }
                    });
                }
            });
        }
        pair.judge();
    }
}
