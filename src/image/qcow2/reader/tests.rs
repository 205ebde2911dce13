//! What an image's file may say, true or not. `image/open/tests.rs` compares whole images with qemu-img's view.

use super::super::fixture::{MemoryDisk, contents};
use super::*;
use crate::image::fixture::{run, text};
use proptest::prelude::*;
use std::fs;
use std::sync::Mutex;
use std::sync::OnceLock;

/// The file of an image that qemu-img made with `options` of `disk`.
fn file_of(disk: &[u8], options: &str, compress: bool) -> Vec<u8> {
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (raw, path) = (folder.path().join("raw"), folder.path().join("image"));
    fs::write(&raw, disk).expect("writes");
    let flag: &[&str] = if compress { &["-c"] } else { &[] };
    run("qemu-img", &[&["convert", "-O", "qcow2", "-o", options], flag, &[text(&raw), text(&path)]].concat());
    fs::read(&path).expect("reads")
}

/// Small images of different kinds, with what they contain.
fn samples() -> &'static [(Vec<u8>, Vec<u8>)] {
    static SAMPLES: OnceLock<Vec<(Vec<u8>, Vec<u8>)>> = OnceLock::new();
    SAMPLES.get_or_init(|| {
        let disk = contents(7, 40_960, 1000);
        let kinds = [
            ("cluster_size=512", false),
            ("cluster_size=512", true),
            ("cluster_size=4k,compression_type=zstd", true),
            ("cluster_size=512,compat=0.10", false),
            ("cluster_size=16k,extended_l2=on", false),
        ];
        kinds.iter().map(|(options, compress)| (file_of(&disk, options, *compress), disk.clone())).collect()
    })
}

fn open(file: Arc<dyn Image>) -> io::Result<Qcow2> {
    let header = Qcow2::header_of(&*file)?;
    // The disk itself stands for its data file: every cluster of it is at some offset of it.
    let data = header.has(incompatible::DATA_FILE).then(|| file.clone());
    Qcow2::open(file, header, data, Cache::default())
}

fn open_bytes(bytes: &[u8]) -> io::Result<Qcow2> {
    open(Arc::new(MemoryDisk::of(bytes.to_vec())))
}

/// Every error is about the image, one line, and a read's says where: the guest's offset and, mostly, the host's.
fn check(error: &io::Error) {
    assert_eq!(error.kind(), io::ErrorKind::InvalidData, "{error}");
    let line = error.to_string();
    assert!(!line.is_empty() && !line.contains(char::is_control), "{line:?}");
}

/// Opens and reads whatever `bytes` are. Returns whether that went well.
fn survives(bytes: &[u8]) -> bool {
    let image = match open_bytes(bytes) {
        Ok(image) => image,
        Err(e) => {
            check(&e);
            return false;
        }
    };
    let mut all_well = true;
    let mut at = 0;
    let mut buf = vec![0; 8192];
    // A virtual size that was changed may be large, but only as large as the file has an L1 table for.
    while at < image.length() && at < 1 << 20 {
        let extent = image.block_status(ByteRange::between(at, image.length())).expect("tables are data or not");
        assert!(extent.range.offset == at && !extent.range.is_empty() && extent.range.end() <= image.length());
        at = extent.range.end();
    }
    for at in (0..image.length().min(1 << 18)).step_by(buf.len()) {
        let piece = &mut buf[..(image.length() - at).min(8192) as usize];
        if let Err(e) = image.read_at(piece, at) {
            check(&e);
            assert!(e.to_string().contains("0x"), "{e}");
            all_well = false;
        }
    }
    all_well
}

fn be64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// Host offsets of the words of the L1 table, and of those of the L2 tables that are not zero.
fn words(bytes: &[u8]) -> Vec<usize> {
    let header = Header::parse(bytes).expect("a good image");
    let l1 = header.l1_table_offset as usize;
    let l1: Vec<_> = (0..header.l1_needed() as usize).map(|index| l1 + index * 8).collect();
    let tables = l1.iter().map(|at| (be64(bytes, *at) & 0x00ff_ffff_ffff_fe00) as usize).filter(|table| *table != 0);
    let l2 = tables.flat_map(|table| (table..table + header.cluster_size() as usize).step_by(8));
    let l2: Vec<_> = l2.filter(|at| be64(bytes, *at) != 0).collect();
    [l1, l2].concat()
}

#[test]
fn the_samples_are_good_images() {
    for (bytes, disk) in samples() {
        let mut found = vec![0xee; disk.len()];
        open_bytes(bytes).expect("opens").read_at(&mut found, 0).expect("reads");
        assert!(found == *disk && survives(bytes));
    }
}

#[test]
fn any_header_byte_may_be_anything() {
    for (bytes, _) in samples() {
        let mut refused = 0;
        for at in 0..256 {
            let random = (at as u8).wrapping_mul(151) ^ 0x6d;
            for value in [0, 0xff, 0x80, 1, bytes[at] ^ 1, bytes[at] ^ 0x40, random] {
                let mut bytes = bytes.clone();
                bytes[at] = value;
                refused += u32::from(!survives(&bytes));
            }
        }
        assert!(refused > 100, "{refused}");
    }
}

#[test]
fn any_table_entry_may_be_anything() {
    for (bytes, disk) in samples() {
        for at in words(bytes) {
            let entry = be64(bytes, at);
            let end = bytes.len() as u64;
            let flips = (0..64).map(|bit| entry ^ 1 << bit);
            let others =
                [0, u64::MAX, 1 << 63, end, end & !511, (end - 1) & !511, 1 << 62 | (end - 1), i64::MAX as u64];
            for value in flips.chain(others) {
                let mut bytes = bytes.clone();
                bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
                survives(&bytes);
                assert_eq!(Qcow2::header_of(&MemoryDisk::of(bytes)).expect("is whole").size, disk.len() as u64);
            }
        }
    }
}

#[test]
fn a_truncated_image_is_an_error_and_never_silent() {
    for (bytes, disk) in samples() {
        for length in (0..bytes.len()).step_by(509) {
            if survives(&bytes[..length]) {
                // Of compressed data's last sector only the part that is needed must be there.
                let mut found = vec![0xee; disk.len()];
                open_bytes(&bytes[..length]).expect("opens").read_at(&mut found, 0).expect("reads");
                assert!(found == *disk, "cut at {length}");
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn many_bytes_may_be_anything(
        sample in 0..5usize,
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..40),
        near in 0..3u32,
        cut in prop::option::weighted(0.1, any::<prop::sample::Index>()),
    ) {
        let mut bytes = samples()[sample].0.clone();
        // Most changes go where the header and the first tables are.
        let length = bytes.len() >> (2 * near);
        changes.iter().for_each(|(at, value)| bytes[at.index(length)] = *value);
        if let Some(cut) = cut {
            bytes.truncate(cut.index(length));
        }
        survives(&bytes);
    }
}

/// Opens `bytes` and gives the error of reading the 512 bytes at `offset`.
fn read_error(bytes: &[u8], offset: u64) -> String {
    let image = open_bytes(bytes).expect("opens");
    image.read_at(&mut [0; 512], offset).expect_err("fails").to_string()
}

#[test]
fn an_error_says_which_guest_bytes_and_where_in_the_file() {
    let (bytes, _) = &samples()[0];
    let l1 = words(bytes)[0];
    let with = |at: usize, value: u64| {
        let mut bytes = bytes.clone();
        bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
        bytes
    };
    let end = bytes.len() as u64;
    let past = read_error(&with(l1, 1 << 30), 0);
    assert_eq!(
        past,
        format!("the L2 table for 0x0, at host offset 0x40000000+512, is past the end of the file at {end:#x}")
    );
    let odd = read_error(&with(l1, 0x4100), 512);
    assert!(
        odd.contains("guest offset 0x200 is damaged: reserved bits") && odd.contains("0x0000000000004100"),
        "{odd}"
    );

    let l2 = (be64(bytes, l1) & 0x00ff_ffff_ffff_fe00) as usize;
    let past = read_error(&with(l2 + 8, 1 << 40), 512);
    assert!(past.contains("guest offset 0x200, at host offset 0x10000000000+512, is past the end"), "{past}");

    let (bytes, _) = &samples()[1];
    let l2 = (be64(bytes, words(bytes)[0]) & 0x00ff_ffff_ffff_fe00) as usize;
    let compressed = (l2..l2 + 512).step_by(8).find(|at| be64(bytes, *at) >> 62 == 1).expect("compressed");
    let guest = (compressed - l2) as u64 / 8 * 512;
    let mut garbled = bytes.clone();
    garbled[compressed..compressed + 8].copy_from_slice(&(1u64 << 62 | 40).to_be_bytes());
    let error = read_error(&garbled, guest);
    assert!(error.starts_with(&format!("the compressed cluster for guest offset {guest:#x}, at host offset 0x28+472")));
}

#[test]
fn only_what_is_damaged_fails() {
    let (bytes, disk) = &samples()[0];
    let l2 = (be64(bytes, words(bytes)[0]) & 0x00ff_ffff_ffff_fe00) as usize;
    let mut bytes = bytes.clone();
    bytes[l2 + 8..l2 + 16].copy_from_slice(&0x200_u64.wrapping_add(1 << 8).to_be_bytes());
    let image = open_bytes(&bytes).expect("opens");
    assert!(image.read_at(&mut [0; 1536], 0).is_err());
    let mut found = [0; 512];
    for at in [0, 1024] {
        image.read_at(&mut found, at).expect("reads");
        assert_eq!(found, disk[at as usize..][..512]);
    }
    let extent = image.block_status(ByteRange::new(512, 512)).expect("asks");
    assert_eq!(extent.allocation, Allocation::Data, "so that it is read, and fails under the caller's policy");
}

/// A disk that logs what is read of it.
struct Logged {
    disk: MemoryDisk,
    reads: Mutex<Vec<(u64, usize)>>,
}

impl Image for Logged {
    fn length(&self) -> u64 {
        self.disk.length()
    }

    fn block_status(&self, range: ByteRange) -> io::Result<Extent> {
        self.disk.block_status(range)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.reads.lock().unwrap().push((offset, buf.len()));
        self.disk.read_at(buf, offset)
    }

    fn write_at(&self, _buf: &[u8], _offset: u64) -> io::Result<()> {
        Err(read_only())
    }

    fn write_zeroes(&self, _range: ByteRange) -> io::Result<()> {
        Err(read_only())
    }

    fn discard(&self, _range: ByteRange) -> io::Result<()> {
        Err(read_only())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn properties(&self) -> Properties {
        self.disk.properties()
    }
}

/// The reads that reading `length` bytes of an image twice takes, first and second time.
fn reads(bytes: &[u8], length: usize) -> [Vec<(u64, usize)>; 2] {
    let disk = Arc::new(Logged { disk: MemoryDisk::of(bytes.to_vec()), reads: Mutex::default() });
    let image = open(disk.clone()).expect("opens");
    [(); 2].map(|()| {
        disk.reads.lock().unwrap().clear();
        image.read_at(&mut vec![0; length], 0).expect("reads");
        disk.reads.lock().unwrap().clone()
    })
}

#[test]
fn clusters_that_lie_together_are_read_together() {
    let noise: Vec<u8> = (0..1 << 20).map(|at: usize| (at * at / 3) as u8 | 1).collect();
    let [first, second] = reads(&file_of(&noise, "cluster_size=4k", false), 1 << 20);
    assert_eq!(first, [(16384, 4096), (20480, 1 << 20)], "the L2 table, then all of the data");
    assert_eq!(second, [(20480, 1 << 20)]);

    let [_, compressed] = reads(&file_of(&noise, "cluster_size=64k", true), 1 << 20);
    assert!(compressed.len() <= 3, "{compressed:?}");
}

#[test]
fn part_of_a_compressed_cluster_is_inflated_once() {
    let noise: Vec<u8> = (0..1 << 18).map(|at: usize| (at / 5) as u8).collect();
    let bytes = file_of(&noise, "cluster_size=64k", true);
    let disk = Arc::new(Logged { disk: MemoryDisk::of(bytes), reads: Mutex::default() });
    let image = open(disk.clone()).expect("opens");
    let mut found = [0; 512];
    image.read_at(&mut found, 0).expect("reads");
    disk.reads.lock().unwrap().clear();
    for at in (0..65536).step_by(512) {
        image.read_at(&mut found, at as u64).expect("reads");
        assert_eq!(found, noise[at..at + 512]);
    }
    assert_eq!(*disk.reads.lock().unwrap(), [], "from memory");
}

#[test]
fn one_call_looks_at_a_bounded_number_of_clusters() {
    let mut header = Header::parse(&samples()[0].0).expect("a good image");
    let entries = 1 << 16;
    (header.l1_size, header.l1_table_offset, header.size) = (entries, 1024, u64::from(entries) << 15);
    let mut bytes = header.encode().expect("fits");
    // The L2 table at 512 is of zero clusters alone, and every L1 entry names it.
    bytes.resize(512, 0);
    bytes.extend(1u64.to_be_bytes().repeat(64));
    bytes.extend(512u64.to_be_bytes().repeat(entries as usize));
    let image = open_bytes(&bytes).expect("opens");
    let whole = ByteRange::new(0, image.length());
    let extent = image.block_status(whole).expect("asks");
    assert_eq!(extent, Extent::zero(whole.prefix((STATUS_LIMIT as u64) << 9)));
}
