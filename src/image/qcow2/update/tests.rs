use super::super::Cache;
use super::super::fixture::{
    MemoryDisk, Operation, assert_clean, assert_reads, check, contents, counted_well, qemu_img,
};
use super::*;
use crate::error::Kind;
use crate::image::chain::Chain;
use crate::image::fixture::text;
use proptest::prelude::*;
use std::fs;
use std::path::PathBuf;

/// How the image under test begins.
#[derive(Clone, Debug)]
struct Shape {
    cluster_bits: u32,
    /// More options of qemu-img create.
    options: &'static str,
    base: Base,
    length: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Base {
    Empty,
    Plain,
    Compressed,
    /// Above a raw file that is shorter than the disk.
    Backing,
}

/// An image made by qemu-img, changed by us, beside a model of its contents.
struct Bench {
    folder: tempfile::TempDir,
    start: Vec<u8>,
    disk: Arc<MemoryDisk>,
    backing: Option<Arc<dyn Image>>,
    image: ExistingQcow2,
    model: Vec<u8>,
    shape: Shape,
}

fn made(arguments: &[&str]) {
    let (code, output) = qemu_img(arguments);
    assert_eq!(code, 0, "qemu-img {arguments:?}: {output}");
}

impl Bench {
    fn new(shape: Shape) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (raw, path) = (folder.path().join("base.raw"), folder.path().join("start.qcow2"));
        let mut model = contents(shape.length, shape.length as usize, 3000);
        let options = format!("cluster_size={},{}", 1u64 << shape.cluster_bits, shape.options);
        match shape.base {
            Base::Empty => {
                model.fill(0);
                made(&["create", "-q", "-f", "qcow2", "-o", &options, text(&path), &shape.length.to_string()]);
            }
            Base::Plain | Base::Compressed => {
                fs::write(&raw, &model).unwrap();
                let compress: &[&str] = if shape.base == Base::Compressed { &["-c"] } else { &[] };
                let convert = ["convert", "-f", "raw", "-O", "qcow2", "-o", &options, text(&raw), text(&path)];
                made(&[&convert[..1], compress, &convert[1..]].concat());
            }
            Base::Backing => {
                let shorter = model.len() * 2 / 3 / 512 * 512;
                model[shorter..].fill(0);
                fs::write(&raw, &model[..shorter]).unwrap();
                let backing = ["-b", text(&raw), "-F", "raw", text(&path)];
                let create = ["create", "-q", "-f", "qcow2", "-o", &options];
                made(&[&create[..], &backing, &[&shape.length.to_string()]].concat());
            }
        }
        let start = fs::read(&path).unwrap();
        let disk = Arc::new(MemoryDisk::of(start.clone()));
        let backing =
            (shape.base == Base::Backing).then(|| Arc::new(MemoryDisk::of(fs::read(&raw).unwrap())) as Arc<dyn Image>);
        let image = ExistingQcow2::open(&path, disk.clone(), backing.clone()).unwrap();
        Self { folder, start, disk, backing, image, model, shape }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn range(&self, offset: u64, length: u64) -> ByteRange {
        ByteRange::new(offset % self.shape.length, length).intersect(ByteRange::new(0, self.shape.length))
    }

    fn part(&mut self, range: ByteRange) -> &mut [u8] {
        &mut self.model[range.offset as usize..range.end() as usize]
    }

    fn write(&mut self, range: ByteRange, seed: u64) {
        let bytes = contents(seed, range.length as usize, 700);
        self.part(range).copy_from_slice(&bytes);
        self.image.write_at(&bytes, range.offset).unwrap();
    }

    fn zero(&mut self, range: ByteRange) {
        self.part(range).fill(0);
        self.image.write_zeroes(range).unwrap();
    }

    fn discard(&mut self, range: ByteRange) {
        let size = 1u64 << self.shape.cluster_bits;
        let end = if range.end() == self.shape.length { range.end() } else { range.end() / size * size };
        let start = range.offset.next_multiple_of(size);
        let keeps = self.shape.base == Base::Backing && self.shape.options.contains("compat=0.10");
        if start < end && !keeps {
            self.part(ByteRange::between(start, end)).fill(0);
        }
        self.image.discard(range).unwrap();
    }

    fn step(&mut self, step: &Step) {
        match *step {
            Step::Write(offset, length, seed) => self.write(self.range(offset, length), seed),
            Step::Zero(offset, length) => self.zero(self.range(offset, length)),
            Step::Discard(offset, length) => self.discard(self.range(offset, length)),
            Step::Flush => self.image.flush().unwrap(),
        }
    }

    fn assert_reads_as_model(&self) {
        let mut bytes = vec![0xaa; self.model.len()];
        self.image.read_at(&mut bytes, 0).unwrap();
        assert!(bytes == self.model, "read back");
        let mut at = 0;
        while at < self.shape.length {
            let extent = self.image.block_status(ByteRange::between(at, self.shape.length)).unwrap();
            assert_eq!(extent.range.offset, at);
            let part = &self.model[at as usize..extent.range.end() as usize];
            assert!(extent == Extent::data(extent.range) || part.iter().all(|&byte| byte == 0), "status {extent:?}");
            at = extent.range.end();
        }
    }

    /// Flushed, clean and equal, in our eyes and in those of qemu-img.
    fn judge(&self) {
        self.assert_reads_as_model();
        self.image.flush().unwrap();
        let (path, expected) = (self.path("end.qcow2"), self.path("expected.raw"));
        fs::write(&path, self.disk.bytes()).unwrap();
        fs::write(&expected, &self.model).unwrap();
        assert_clean(&path);
        assert_reads(&path, &expected);
        assert_eq!(counted_well(&self.disk.bytes()), Ok(()));
    }

    /// Contents of a file with the image, as the reader sees them.
    fn read_all(&self, file: Vec<u8>) -> Vec<u8> {
        let file: Arc<dyn Image> = Arc::new(MemoryDisk::of(file));
        let header = Qcow2::header_of(&*file).unwrap();
        let mut layers: Vec<Arc<dyn Image>> =
            vec![Arc::new(Qcow2::open(file, header, None, Cache::default()).unwrap())];
        layers.extend(self.backing.clone());
        let mut bytes = vec![0; self.model.len()];
        Chain::new(layers).read_at(&mut bytes, 0).unwrap();
        bytes
    }
}

#[derive(Clone, Debug)]
enum Step {
    Write(u64, u64, u64),
    Zero(u64, u64),
    Discard(u64, u64),
    Flush,
}

impl Step {
    fn touched(&self, bench: &Bench) -> ByteRange {
        match *self {
            Self::Write(offset, length, _) | Self::Zero(offset, length) | Self::Discard(offset, length) => {
                bench.range(offset, length)
            }
            Self::Flush => ByteRange::default(),
        }
    }
}

fn steps(most: usize) -> impl Strategy<Value = Vec<Step>> {
    let offset = any::<u32>().prop_map(u64::from);
    let length = prop_oneof![1u64..600, 1u64..40_000, Just(65536), Just(8192)];
    let aligned = (0u64..64).prop_map(|n| n << 12);
    let place = prop_oneof![(offset, length), (aligned, Just(16384u64))];
    let step = prop_oneof![
        5 => (place.clone(), any::<u64>()).prop_map(|((offset, length), seed)| Step::Write(offset, length, seed)),
        2 => place.clone().prop_map(|(offset, length)| Step::Zero(offset, length)),
        1 => place.prop_map(|(offset, length)| Step::Discard(offset, length)),
        1 => Just(Step::Flush),
    ];
    prop::collection::vec(step, 1..most)
}

fn shapes() -> impl Strategy<Value = Shape> {
    let options = prop::sample::select(vec![
        "compat=1.1",
        "compat=0.10",
        "compression_type=zstd",
        "refcount_bits=1",
        "refcount_bits=4",
        "refcount_bits=64",
    ]);
    let base = prop::sample::select(vec![Base::Empty, Base::Plain, Base::Compressed, Base::Backing]);
    (9u32..18, options, base, 1u64..600).prop_map(|(cluster_bits, options, base, sectors)| {
        // Compressed clusters share clusters of the file, which takes more than one or four bits to count.
        let narrow = options.ends_with("bits=1") || options.ends_with("bits=4");
        let base = if narrow && base == Base::Compressed { Base::Plain } else { base };
        Shape { cluster_bits, options, base, length: sectors * 512 }
    })
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 60, ..ProptestConfig::with_cases(48) })]

    #[test]
    fn any_changes_read_back_equal_and_check_clean(shape in shapes(), steps in steps(40)) {
        let mut bench = Bench::new(shape);
        steps.iter().for_each(|step| bench.step(step));
        bench.judge();
    }
}

struct Random(u64);

impl Random {
    fn coin(&mut self) -> bool {
        self.0 = self.0.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        self.0 >> 63 == 0
    }
}

/// What a disk holds after a crash: all that was flushed before operation `cut`, and of the rest before it any sectors.
fn crashed(start: &[u8], log: &[Operation], cut: usize, mut random: impl FnMut() -> bool) -> Vec<u8> {
    let flushed = log[..cut].iter().rposition(|operation| *operation == Operation::Flush).unwrap_or(0);
    let mut file = start.to_vec();
    log[..flushed].iter().for_each(|operation| operation.apply(&mut file));
    for operation in &log[flushed..cut] {
        let Operation::Write { offset, bytes } = operation else { continue };
        if random() {
            operation.apply(&mut file);
            continue;
        }
        let mut at = 0;
        while at < bytes.len() {
            let sector = 512 - (*offset as usize + at) % 512;
            let end = bytes.len().min(at + sector);
            if random() {
                Operation::Write { offset: offset + at as u64, bytes: bytes[at..end].to_vec() }.apply(&mut file);
            }
            at = end;
        }
    }
    file
}

/// The image as it was at the end of a flush, and what was changed from then on.
struct Milestone {
    log_length: usize,
    model: Vec<u8>,
    changes: Vec<(usize, ByteRange)>,
}

fn judge_crash(bench: &Bench, milestones: &[Milestone], cut: usize, file: &[u8]) {
    assert_eq!(counted_well(file), Ok(()), "crash at {cut}");
    let last = milestones.iter().rev().find(|milestone| milestone.log_length <= cut).unwrap();
    let mut untouched = vec![true; last.model.len()];
    // A change that began by the time of the crash may be there in part.
    for (_, range) in last.changes.iter().filter(|(began, _)| *began <= cut) {
        untouched[range.offset as usize..range.end() as usize].fill(false);
    }
    let found = bench.read_all(file.to_vec());
    let wrong = (0..found.len()).find(|&at| untouched[at] && found[at] != last.model[at]);
    assert_eq!(wrong, None, "crash at {cut}: flushed bytes changed");
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 60, ..ProptestConfig::with_cases(24) })]

    #[test]
    fn a_crash_at_any_moment_leaves_at_worst_leaks(shape in shapes(), steps in steps(24), seed in any::<u64>()) {
        let mut bench = Bench::new(shape);
        let mut milestones =
            vec![Milestone { log_length: 0, model: bench.model.clone(), changes: Vec::new() }];
        for step in &steps {
            let began = bench.disk.log().len();
            milestones.last_mut().unwrap().changes.push((began, step.touched(&bench)));
            bench.step(step);
            if matches!(step, Step::Flush) {
                let (log_length, model) = (bench.disk.log().len(), bench.model.clone());
                milestones.push(Milestone { log_length, model, changes: Vec::new() });
            }
        }
        bench.image.flush().unwrap();
        let log = bench.disk.log();
        let mut random = Random(seed);
        for cut in 0..=log.len() {
            let file = crashed(&bench.start, &log, cut, || random.coin());
            judge_crash(&bench, &milestones, cut, &file);
            if cut % (log.len() / 3 + 1) == 1 {
                let path = bench.path("crashed.qcow2");
                fs::write(&path, &file).unwrap();
                let (code, output) = check(&path);
                prop_assert!(code == 0 || code == 3, "crash at {}: {}", cut, output);
            }
        }
    }
}

const PLAIN: Shape = Shape { cluster_bits: 12, options: "compat=1.1", base: Base::Plain, length: 1 << 20 };

#[test]
fn tables_that_do_not_fit_in_memory_are_written_in_order() {
    // An L2 table of 64 KiB describes 512 MiB, and 256 of them are in memory.
    let (disk, image) = opened(&["create -q -f qcow2 IMAGE 160G"], |_| ()).unwrap();
    let piece = |n: u64| contents(n, 700, 100);
    (0..300).for_each(|n| image.write_at(&piece(n), (n << 29) + n * 999).unwrap());
    let log = disk.log();
    assert!(log.contains(&Operation::Flush), "it was committed on the way");
    assert_eq!(counted_well(&disk.bytes()), Ok(()));
    for n in (0..300).rev() {
        let mut back = vec![0; 700];
        image.read_at(&mut back, (n << 29) + n * 999).unwrap();
        assert!(back == piece(n), "piece {n}");
    }
    image.flush().unwrap();
    let folder = tempfile::tempdir().unwrap();
    fs::write(folder.path().join("end.qcow2"), disk.bytes()).unwrap();
    assert_clean(&folder.path().join("end.qcow2"));
}

#[test]
fn the_refcount_table_moves_when_the_file_outgrows_it() {
    // With 64 bits for each count, one cluster of table counts 2 MiB of file.
    let shape = Shape { cluster_bits: 9, options: "refcount_bits=64", base: Base::Empty, length: 7 << 20 };
    let mut bench = Bench::new(shape);
    for n in 0..7 {
        bench.write(ByteRange::new(n << 20, 1 << 20), n);
    }
    bench.judge();
    let header = Header::parse(&bench.disk.bytes()).unwrap();
    assert!(header.refcount_table_clusters >= 5, "{header:?}");
    let log = bench.disk.log();
    let moves: Vec<usize> = (0..log.len()).filter(|&n| matches!(log[n], Operation::Write { offset: 48, .. })).collect();
    assert!(moves.len() >= 3);
    for &at in &moves {
        assert_eq!(log[at - 1], Operation::Flush, "the new table is there before the header names it");
        assert_eq!(log[at + 1], Operation::Flush, "the header names it before the old one is free");
    }
    let mut random = Random(1);
    for cut in moves.into_iter().flat_map(|at| (at - 1..at + 2).flat_map(|cut| [cut; 4])) {
        let file = crashed(&bench.start, &log, cut, || random.coin());
        assert_eq!(counted_well(&file), Ok(()), "crash at {cut}");
    }
}

#[test]
fn released_space_is_used_again_after_a_flush() {
    let mut bench = Bench::new(PLAIN);
    let whole = ByteRange::new(0, 1 << 20);
    bench.write(whole, 0);
    bench.image.flush().unwrap();
    let before = bench.disk.length();
    for round in 1..5 {
        bench.discard(whole);
        bench.image.flush().unwrap();
        bench.write(whole, round);
    }
    bench.judge();
    assert_eq!(bench.disk.length(), before);
}

#[test]
fn whole_aligned_writes_keep_their_clusters() {
    let mut bench = Bench::new(PLAIN);
    let whole = ByteRange::new(0, 1 << 20);
    bench.write(whole, 77);
    bench.image.flush().unwrap();
    let operations = bench.disk.log().len();
    bench.write(whole, 78);
    bench.write(ByteRange::new(777, 100_000), 79);
    bench.image.flush().unwrap();
    let log = bench.disk.log().split_off(operations);
    let written: usize =
        log.iter().map(|op| if let Operation::Write { bytes, .. } = op { bytes.len() } else { 0 }).sum();
    assert_eq!(written, (1 << 20) + 100_000, "data, and no table");
    bench.judge();
}

#[test]
fn threads_that_share_clusters_lose_nothing() {
    for base in [Base::Compressed, Base::Backing] {
        let mut bench = Bench::new(Shape { cluster_bits: 16, base, ..PLAIN });
        let bytes = contents(99, 1 << 20, 500);
        std::thread::scope(|scope| {
            for thread in 0..4usize {
                let (image, bytes) = (&bench.image, &bytes);
                scope.spawn(move || {
                    for at in (thread * 1000..1 << 20).step_by(4000) {
                        let piece = &bytes[at..(at + 1000).min(1 << 20)];
                        image.write_at(piece, at as u64).unwrap();
                        let mut back = vec![0; piece.len()];
                        image.read_at(&mut back, at as u64).unwrap();
                        assert!(back == piece, "at {at}");
                        if at % 50_000 < 4000 {
                            image.flush().unwrap();
                        }
                    }
                });
            }
        });
        bench.model.copy_from_slice(&bytes);
        bench.judge();
    }
}

/// Waits, for a minute at most, until `is_so`.
fn eventually(what: &str, is_so: impl Fn() -> bool) {
    let start = std::time::Instant::now();
    while !is_so() {
        assert!(start.elapsed().as_secs() < 60, "{what}");
        std::thread::yield_now();
    }
}

#[test]
fn a_cluster_is_not_taken_away_under_a_write() {
    for takes in [ExistingQcow2::write_zeroes, ExistingQcow2::discard] {
        let mut bench = Bench::new(PLAIN);
        let range = ByteRange::new(0, 4096);
        bench.write(range, 5);
        let host = bench.disk.log().iter().find_map(|operation| match operation {
            Operation::Write { offset, bytes } if bytes.len() == 4096 => Some(*offset),
            _ => None,
        });
        bench.disk.set_gate(host);
        let taken = std::sync::atomic::AtomicBool::new(false);
        let is_taken = || taken.load(std::sync::atomic::Ordering::SeqCst);
        std::thread::scope(|scope| {
            let (bench, taken) = (&bench, &taken);
            scope.spawn(|| bench.image.write_at(&[1; 4096], 0).unwrap());
            eventually("the write waits at the gate", || bench.image.regions.queued() == 1);
            scope.spawn(move || {
                takes(&bench.image, range).unwrap();
                taken.store(true, std::sync::atomic::Ordering::SeqCst);
            });
            eventually("one waits, or went ahead", || bench.image.regions.queued() == 2 || is_taken());
            let went_ahead = is_taken();
            bench.disk.set_gate(None);
            assert!(!went_ahead);
        });
        bench.part(range).fill(0);
        bench.judge();
    }
}

/// An image whose only L2 table has another reference, as a deleted snapshot may leave one.
fn with_shared_table() -> Bench {
    let mut bench = Bench::new(PLAIN);
    let header = Header::parse(&bench.start).unwrap();
    let word = |bytes: &[u8], at: u64| u64::from_be_bytes(bytes[at as usize..at as usize + 8].try_into().unwrap());
    let table = word(&bench.start, header.l1_table_offset) & !COPIED;
    let block = word(&bench.start, header.refcount_table_offset);
    let count = block + table / 4096 * 2;
    bench.start[count as usize..count as usize + 2].copy_from_slice(&2u16.to_be_bytes());
    bench.start[header.l1_table_offset as usize] = 0;
    bench.disk = Arc::new(MemoryDisk::of(bench.start.clone()));
    bench.image = ExistingQcow2::open(&bench.path("start.qcow2"), bench.disk.clone(), None).unwrap();
    bench
}

#[test]
fn a_shared_table_is_copied_and_a_crash_keeps_what_the_old_one_says() {
    let mut bench = with_shared_table();
    let mut milestones = vec![Milestone { log_length: 0, model: bench.model.clone(), changes: Vec::new() }];
    let range = ByteRange::new(8192, 40960);
    milestones[0].changes.push((0, range));
    bench.zero(range);
    bench.image.flush().unwrap();
    let (log, mut random) = (bench.disk.log(), Random(7));
    for cut in (0..=log.len()).flat_map(|cut| [cut; 8]) {
        let file = crashed(&bench.start, &log, cut, || random.coin());
        judge_crash(&bench, &milestones, cut, &file);
    }
    bench.assert_reads_as_model();
    let path = bench.path("end.qcow2");
    fs::write(&path, bench.disk.bytes()).unwrap();
    let (code, output) = check(&path);
    assert_eq!((code, output.matches("refcount=1 reference=0").count()), (3, 1), "{output}");
}

#[test]
fn a_write_that_fails_leaks_nothing_and_may_be_tried_again() {
    for base in [Base::Empty, Base::Compressed] {
        for later in 0..12 {
            let mut bench = Bench::new(Shape { base, ..PLAIN });
            bench.write(ByteRange::new(100, 5000), 1);
            bench.disk.fail_from(Some(bench.disk.log().len() + later));
            let bytes = contents(2, 300_000, 999);
            let failed = bench.image.write_at(&bytes, 70_000).is_err();
            assert!(failed || later > 0);
            bench.disk.fail_from(None);
            let range = ByteRange::new(70_000, 300_000);
            bench.part(range).copy_from_slice(&bytes);
            bench.image.write_at(&bytes, range.offset).unwrap();
            bench.judge();
        }
    }
}

#[test]
fn a_failed_flush_is_final() {
    let mut bench = Bench::new(PLAIN);
    bench.discard(ByteRange::new(0, 8192));
    bench.disk.fail_from(Some(bench.disk.log().len()));
    bench.image.flush().unwrap_err();
    bench.disk.fail_from(None);
    bench.image.flush().unwrap_err();
    bench.image.write_at(&[1; 512], 0).unwrap_err();
    bench.image.write_zeroes(ByteRange::new(0, 4096)).unwrap_err();
}

#[test]
fn space_is_released_only_when_the_tables_that_let_go_are_on_stable_storage() {
    let mut bench = Bench::new(PLAIN);
    bench.discard(ByteRange::new(0, 8192));
    let mut state = bench.image.state();
    assert!(state.seal().unwrap());
    bench.disk.flush().unwrap();
    assert!(state.write_tables().unwrap());
    let before = bench.disk.log().len();
    state.commit().unwrap();
    let log = bench.disk.log().split_off(before);
    assert!(matches!(log[..], [Operation::Flush, Operation::Write { .. }]), "{log:?}");
}

/// Clusters that were written and not flushed.
fn unflushed() -> Bench {
    let mut bench = Bench::new(Shape { base: Base::Compressed, ..PLAIN });
    bench.write(ByteRange::new(0, 1 << 20), 3);
    bench
}

/// Likewise, and the refcount table has moved, and the header names its old place.
fn outgrown() -> Bench {
    // With 64 bits for each count, one cluster of table counts so much file.
    const COUNTED: u64 = 2 << 20;
    let shape = Shape { cluster_bits: 9, options: "refcount_bits=64", base: Base::Empty, length: COUNTED };
    let mut bench = Bench::new(shape);
    let mut at = COUNTED / 16 * 15;
    bench.write(ByteRange::new(0, at), 3);
    bench.image.flush().unwrap();
    while bench.disk.length() <= COUNTED {
        bench.write(ByteRange::new(at, 512), at);
        at += 512;
    }
    bench
}

#[test]
fn a_metadata_write_that_fails_is_repeated_by_the_next_flush() {
    for (begin, moves) in [(unflushed as fn() -> Bench, false), (outgrown, true)] {
        let operations = {
            let bench = begin();
            let before = bench.disk.log().len();
            bench.image.flush().unwrap();
            bench.disk.log()[before..].to_vec()
        };
        assert!(operations.len() >= 5, "{operations:?}");
        let names_table = |operation: &Operation| matches!(operation, Operation::Write { offset: 48, .. });
        assert_eq!(operations.iter().any(names_table), moves);
        for (later, operation) in operations.iter().enumerate() {
            let bench = begin();
            bench.disk.fail_from(Some(bench.disk.log().len() + later));
            bench.image.flush().unwrap_err();
            bench.disk.fail_from(None);
            match operation {
                Operation::Write { .. } => bench.judge(),
                Operation::Flush => assert!(bench.image.flush().is_err()),
            }
        }
    }
}

/// Opens an image that some steps of qemu-img made in a folder.
fn opened(steps: &[&str], change: impl FnOnce(&mut Vec<u8>)) -> Result<(Arc<MemoryDisk>, ExistingQcow2)> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("image.qcow2");
    for step in steps {
        let step = step.replace("IMAGE", text(&path)).replace("FOLDER", text(folder.path()));
        made(&step.split(' ').collect::<Vec<_>>());
    }
    let mut bytes = fs::read(&path).unwrap();
    change(&mut bytes);
    let disk = Arc::new(MemoryDisk::of(bytes));
    ExistingQcow2::open(&path, disk.clone(), None).map(|image| (disk, image))
}

const CREATE: &str = "create -q -f qcow2 IMAGE 1M";

#[test]
fn what_is_not_written_is_refused_by_name() {
    let refused = |steps: &[&str], change: fn(&mut Vec<u8>), named: &str| {
        let error = opened(steps, change).map(|_| ()).unwrap_err();
        assert_eq!(error.kind(), Kind::Target);
        let error = error.to_string();
        assert!(error.starts_with("open target '") && error.contains(named), "{error}");
    };
    let same = |_: &mut Vec<u8>| ();
    refused(&[CREATE, "snapshot -c one IMAGE"], same, "internal snapshots");
    refused(&["create -q -f qcow2 -o data_file=FOLDER/data,data_file_raw=on IMAGE 1M"], same, "external data file");
    refused(&["create -q -f qcow2 -o extended_l2=on IMAGE 1M"], same, "extended L2");
    refused(&["create -q -f raw FOLDER/b 1M", "create -q -f qcow2 -b FOLDER/b -F raw IMAGE"], same, "backing file");
    refused(&[CREATE], |bytes| bytes[79] |= 1, "dirty");
    refused(&[CREATE], |bytes| bytes[79] |= 2, "corrupt");
    refused(&[CREATE], |bytes| bytes[74] |= 1, "unsupported incompatible qcow2 feature");
    refused(&[CREATE], |bytes| bytes[35] = 2, "LUKS");
    refused(&[CREATE], |bytes| bytes.truncate(60), "truncated");
    // Offset of the refcount block to the refcount table's own.
    refused(&[CREATE], |bytes| bytes.copy_within(48..56, 0x10000), "two tables at host offset 0x10000");
}

/// An input that fuzzing found: the end of the block would be past all numbers.
#[test]
fn a_refcount_block_at_the_last_of_all_offsets_is_refused() {
    let last = |bytes: &mut Vec<u8>| bytes[0x10000..0x10008].copy_from_slice(&(u64::MAX << 16).to_be_bytes());
    let error = match opened(&[CREATE], last) {
        Ok((_, image)) => panic!("it was opened; a write: {:?}", image.write_at(&[1; 512], 0)),
        Err(error) => error.to_string(),
    };
    assert!(error.contains("the refcount table is damaged") && error.contains("0xffffffffffff0000"), "{error}");
}

#[test]
fn bitmaps_become_invalid_before_the_first_change() {
    let autoclear = |disk: &MemoryDisk| disk.bytes()[88..96].to_vec();
    let (disk, image) = opened(&[CREATE, "bitmap --add IMAGE one"], |_| ()).unwrap();
    assert_eq!(autoclear(&disk), [0, 0, 0, 0, 0, 0, 0, 1], "opening changes nothing");
    image.write_at(&[1; 512], 0).unwrap();
    let cleared = Operation::Write { offset: 88, bytes: vec![0; 8] };
    assert_eq!(disk.log()[..2], [cleared, Operation::Flush]);
    image.flush().unwrap();
    assert_eq!(autoclear(&disk), [0; 8]);
}

/// An image as qemu-img convert makes it (header, refcount table, refcount block, L1 table, L2 table, data), in which
/// the entry of cluster 1 is `entry`; cluster 0 is unallocated.
fn damaged_image(entry: u64) -> (Vec<u8>, Arc<MemoryDisk>, ExistingQcow2) {
    let folder = tempfile::tempdir().unwrap();
    let (raw, path) = (folder.path().join("raw"), folder.path().join("image.qcow2"));
    fs::write(&raw, [[0; 1 << 16], [5; 1 << 16], [6; 1 << 16]].concat()).unwrap();
    made(&["convert", "-f", "raw", "-O", "qcow2", text(&raw), text(&path)]);
    let mut bytes = fs::read(&path).unwrap();
    bytes[0x40008..0x40010].copy_from_slice(&entry.to_be_bytes());
    let disk = Arc::new(MemoryDisk::of(bytes.clone()));
    let image = ExistingQcow2::open(&path, disk.clone(), None).unwrap();
    (bytes, disk, image)
}

#[test]
fn a_damaged_image_is_refused_rather_than_destroyed() {
    let cases = [(0x30000 | COPIED, "where a table is"), (0x777_0000 | COPIED, "refcount 0"), (0x777, "reserved bits")];
    for (entry, named) in cases {
        let (bytes, disk, image) = damaged_image(entry);
        // In place, and, as cluster 0 has none, with space that was allocated when the damage was found.
        for offset in [0x10000, 0] {
            let error = image.write_at(&[1; 0x20000], offset).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidData);
            assert!(error.to_string().contains(named), "{error}");
        }
        image.flush().unwrap();
        assert!(disk.bytes() == bytes, "nothing was changed");
    }
}

mod during;
