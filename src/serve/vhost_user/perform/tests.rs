use super::super::request::Request;
use super::*;
use crate::ground::range::Extent;
use crate::image::{Image, Properties};
use crate::serve::disk::DiskOptions;
use std::path::Path;
use std::sync::{Arc, Mutex};
use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress};

/// Sectors of the disk, which has 100 bytes more.
const SECTORS: u64 = 64;
const DATA: u64 = 0x1_0000;
const ANSWER: u64 = 0x8_0000;
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const GET_ID: u32 = 8;
const DISCARD: u32 = 11;
const ZEROES: u32 = 13;

/// Of the guest's memory: address, length.
type Piece = (u64, u32);

struct Scene {
    folder: tempfile::TempDir,
    disk: Disk,
    memory: Memory,
}

fn options(folder: &Path, read_only: bool) -> DiskOptions {
    DiskOptions {
        name: "a name that is longer than that".into(),
        path: folder.join("disk.raw"),
        format: Some(crate::image::format::Format::Raw),
        read_only,
        secret: None,
        writer_dir: Some(folder.join("writers")),
    }
}

fn open(folder: &Path, read_only: bool) -> Disk {
    Disk::open(&options(folder, read_only)).unwrap()
}

/// A disk that is no file, and what was done to it.
#[derive(Default)]
struct Logged {
    bytes: Mutex<Vec<u8>>,
    log: Mutex<Vec<&'static str>>,
}

impl Logged {
    fn log(&self, what: &'static str) -> io::Result<()> {
        self.log.lock().unwrap().push(what);
        Ok(())
    }
}

impl Image for Logged {
    fn length(&self) -> u64 {
        1 << 20
    }

    fn block_status(&self, range: ByteRange) -> io::Result<Extent> {
        Ok(Extent::data(range))
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        buf.copy_from_slice(&self.bytes.lock().unwrap()[offset as usize..][..buf.len()]);
        self.log("read")
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.bytes.lock().unwrap()[offset as usize..][..buf.len()].copy_from_slice(buf);
        self.log("write")
    }

    fn write_zeroes(&self, _: ByteRange) -> io::Result<()> {
        self.log("zeroes")
    }

    fn discard(&self, _: ByteRange) -> io::Result<()> {
        self.log("discard")
    }

    fn flush(&self) -> io::Result<()> {
        self.log("flush")
    }

    fn properties(&self) -> Properties {
        Properties { cluster_size: 1, alignment: 1, reads_zero: false, sequential: false }
    }
}

impl Scene {
    fn new(read_only: bool) -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("disk.raw"), vec![b'd'; (SECTORS * SECTOR + 100) as usize]).unwrap();
        let disk = open(folder.path(), read_only);
        let memory = Memory::from_ranges(&[(GuestAddress(0), 0x8_0000), (GuestAddress(0x8_0000), 0x8_0000)]).unwrap();
        Self { folder, disk, memory }
    }

    /// On a disk that is no file.
    fn logged() -> (Self, Arc<Logged>) {
        let scene = Self::new(false);
        let image = Arc::new(Logged { bytes: Mutex::new(vec![b'd'; 1 << 20]), ..Logged::default() });
        let disk = Disk::over(&options(scene.folder.path(), false), image.clone());
        (Self { disk, ..scene }, image)
    }

    /// The status of a request with `input` bytes at `DATA` and `output` bytes at `ANSWER`, neither necessarily in memory.
    fn ask(&self, kind: u32, sector: u64, input: u32, output: u32) -> Status {
        self.ask_in_pieces(kind, sector, &[(DATA, input)], &[(ANSWER, output)], false)
    }

    fn ask_in_pieces(&self, kind: u32, sector: u64, input: &[Piece], output: &[Piece], through: bool) -> Status {
        self.memory.write_obj(kind, GuestAddress(0)).unwrap();
        self.memory.write_obj(sector, GuestAddress(8)).unwrap();
        let descriptors = |pieces: &[Piece], flags| -> Vec<_> {
            pieces.iter().map(|&(address, length)| Descriptor::new(address, length, flags, 1)).collect()
        };
        let header = [Descriptor::new(0, 16, 1, 1)];
        let status = [Descriptor::new(32, 1, 2, 0)];
        let chain = [&header[..], &descriptors(input, 1), &descriptors(output, 3), &status].concat();
        let request = Request::parse(chain.into_iter(), &self.memory).unwrap();
        perform(&self.disk, &request, &self.memory, through)
    }

    fn put(&self, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(DATA)).unwrap();
    }

    fn answer(&self, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        self.memory.read_slice(&mut bytes, GuestAddress(ANSWER)).unwrap();
        bytes
    }

    fn range(&self, kind: u32, sector: u64, sectors: u32, flags: u32) -> Status {
        self.put(&[&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat());
        self.ask(kind, 0, 16, 0)
    }

    fn bytes(&self) -> Vec<u8> {
        std::fs::read(self.folder.path().join("disk.raw")).unwrap()
    }
}

#[test]
fn data_goes_where_the_sector_says_and_comes_back() {
    let scene = Scene::new(false);
    scene.put(&[b'w'; 1024]);
    assert_eq!(scene.ask(OUT, 62, 1024, 0), Status::Ok);
    assert_eq!(scene.ask(FLUSH, 0, 0, 0), Status::Ok);
    assert_eq!(scene.ask(IN, 61, 0, 1024), Status::Ok);
    assert_eq!(scene.answer(1024), [[b'd'; 512], [b'w'; 512]].concat());
    let bytes = scene.bytes();
    assert!(bytes[62 * 512..64 * 512].iter().all(|byte| *byte == b'w'));
    assert!(bytes[64 * 512..].iter().all(|byte| *byte == b'd') && bytes.len() == 64 * 512 + 100);
}

#[test]
fn data_in_pieces_is_moved_in_their_order_and_all_of_it() {
    // Backwards, one of no bytes, and the last where two regions of memory meet.
    let pieces: &[Piece] = &[(0x9_0000, 100), (0x2_0000, 412), (0x3_0000, 0), (0x8_0000 - 200, 512)];
    let data: Vec<u8> = (0..1024).map(|at| (at % 251) as u8).collect();
    for scene in [Scene::new(false), Scene::logged().0] {
        let mut rest = &data[..];
        for &(address, length) in pieces {
            let (piece, others) = rest.split_at(length as usize);
            scene.memory.write_slice(piece, GuestAddress(address)).unwrap();
            rest = others;
        }
        assert_eq!(scene.ask_in_pieces(OUT, 3, pieces, &[], false), Status::Ok);
        let mut on_disk = vec![0; 3 * 512];
        scene.disk.read(&mut on_disk, 2 * 512).unwrap();
        assert!(on_disk[..512].iter().all(|byte| *byte == b'd') && on_disk[512..] == data);
        for &(address, length) in pieces {
            scene.memory.write_slice(&vec![0; length as usize], GuestAddress(address)).unwrap();
        }
        assert_eq!(scene.ask_in_pieces(IN, 3, &[], pieces, false), Status::Ok);
        let mut found = Vec::new();
        for &(address, length) in pieces {
            let mut piece = vec![0; length as usize];
            scene.memory.read_slice(&mut piece, GuestAddress(address)).unwrap();
            found.extend(piece);
        }
        assert_eq!(found, data);
    }
}

#[test]
fn a_disk_that_is_no_file_is_read_and_written_through_a_small_buffer() {
    let (scene, image) = Scene::logged();
    let data: Vec<u8> = (0..300 << 10).map(|at| (at / 509) as u8).collect();
    scene.put(&data);
    assert_eq!(scene.ask(OUT, 5, 300 << 10, 0), Status::Ok);
    assert_eq!(scene.ask(IN, 5, 0, 300 << 10), Status::Ok);
    assert!(image.bytes.lock().unwrap()[5 * 512..][..300 << 10] == data && scene.answer(300 << 10) == data);
    assert_eq!(*image.log.lock().unwrap(), ["write", "write", "write", "read", "read", "read"]);
}

#[test]
fn what_goes_through_the_cache_is_flushed_before_it_is_answered_and_nothing_else_is() {
    let (scene, image) = Scene::logged();
    let ask = |kind, input, output, through| {
        scene.ask_in_pieces(kind, 0, &[(DATA, input)], &[(ANSWER, output)], through);
        std::mem::take(&mut *image.log.lock().unwrap())
    };
    scene.put(&[&0_u64.to_le_bytes()[..], &8_u32.to_le_bytes(), &1_u32.to_le_bytes()].concat());
    assert_eq!(ask(OUT, 512, 0, true), ["write", "flush"]);
    assert_eq!(ask(ZEROES, 16, 0, true), ["zeroes", "flush"]);
    assert_eq!(ask(IN, 0, 512, true), ["read"]);
    // What failed is not on the disk, and needs no flush.
    assert_eq!(ask(OUT, 511, 0, true), [""; 0]);
    assert_eq!(ask(OUT, 512, 0, false), ["write"]);
    assert_eq!(ask(FLUSH, 0, 0, false), ["flush"]);
}

#[test]
fn what_is_not_on_the_disk_fails_and_changes_nothing() {
    let scene = Scene::new(false);
    scene.put(&[b'w'; 1024]);
    for kind in [IN, OUT] {
        let (input, output) = if kind == OUT { (1, 0) } else { (0, 1) };
        let ask = |sector, length: u32| scene.ask(kind, sector, length * input, length * output);
        // The last one's end would be 0 again.
        for sector in [SECTORS - 1, SECTORS, u64::MAX / 512, u64::MAX / 512 - 1, u64::MAX] {
            assert_eq!(ask(sector, 1024), Status::Failed, "{sector}");
        }
        assert_eq!(ask(0, 511), Status::Failed);
        assert_eq!(ask(0, 513), Status::Failed);
        assert_eq!(ask(SECTORS, 0), Status::Ok);
        assert_eq!(ask(SECTORS + 1, 0), Status::Failed);
    }
    // Data that goes the wrong way.
    assert_eq!(scene.ask(IN, 0, 512, 512), Status::Failed);
    assert_eq!(scene.ask(OUT, 0, 512, 512), Status::Failed);
    assert!(scene.bytes().iter().all(|byte| *byte == b'd'));
    // Of a long write that ends past the end, the pieces before it neither.
    let (scene, image) = Scene::logged();
    assert_eq!(scene.ask(OUT, (1 << 20) / 512 - 512, 300 << 10, 0), Status::Failed);
    assert!(image.log.lock().unwrap().is_empty());
}

#[test]
fn data_outside_of_memory_fails_and_nothing_is_half_written() {
    let scene = Scene::new(false);
    let folder = tempfile::tempdir().unwrap();
    let length = 4 << 20;
    std::fs::write(folder.path().join("disk.raw"), vec![b'd'; length]).unwrap();
    let scene = Scene { disk: open(folder.path(), false), folder, memory: scene.memory };
    assert_eq!(scene.ask(OUT, 0, length as u32, 0), Status::Failed);
    assert_eq!(scene.ask(IN, 0, 0, length as u32), Status::Failed);
    assert!(scene.bytes().iter().all(|byte| *byte == b'd'));
}

#[test]
fn ranges_are_discarded_and_zeroed_within_their_limits() {
    let scene = Scene::new(false);
    assert_eq!(scene.range(ZEROES, 8, 8, 0), Status::Ok);
    assert_eq!(scene.range(ZEROES, 24, 8, 1), Status::Ok);
    assert_eq!(scene.range(DISCARD, 40, 8, 0), Status::Ok);
    let bytes = scene.bytes();
    for (sector, bytes) in bytes.chunks(512).enumerate().take(40) {
        let expected = if (8..16).contains(&sector) || (24..32).contains(&sector) { 0 } else { b'd' };
        assert!(bytes.iter().all(|byte| *byte == expected), "sector {sector}");
    }
    for kind in [ZEROES, DISCARD] {
        assert_eq!(scene.range(kind, 0, 8, 2), Status::Unsupported);
        assert_eq!(scene.range(kind, SECTORS - 1, 2, 0), Status::Failed);
        assert_eq!(scene.range(kind, u64::MAX, 1, 0), Status::Failed);
        assert_eq!(scene.range(kind, 0, MOST_SECTORS + 1, 0), Status::Failed);
        assert_eq!(scene.range(kind, 0, u32::MAX, 0), Status::Failed);
        assert_eq!(scene.ask(kind, 0, 0, 0), Status::Failed);
        assert_eq!(scene.ask(kind, 0, 24, 0), Status::Failed);
        assert_eq!(scene.ask(kind, 0, (MOST_RANGES + 1) * 16, 0), Status::Failed);
    }
    assert_eq!(scene.range(DISCARD, 0, 8, 1), Status::Unsupported);
    assert_eq!(scene.bytes()[..4096], bytes[..4096]);
}

#[test]
fn of_several_ranges_all_are_changed_or_none() {
    let scene = Scene::new(false);
    let range = |sector: u64, sectors: u32| [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &[0; 4]].concat();
    scene.put(&[range(0, 8), range(SECTORS, 8)].concat());
    assert_eq!(scene.ask(ZEROES, 0, 32, 0), Status::Failed);
    assert!(scene.bytes().iter().all(|byte| *byte == b'd'));
    scene.put(&[range(0, 8), range(56, 8)].concat());
    assert_eq!(scene.ask(ZEROES, 0, 32, 0), Status::Ok);
    let bytes = scene.bytes();
    assert!(bytes[..4096].iter().chain(&bytes[56 * 512..64 * 512]).all(|byte| *byte == 0));
    assert!(bytes[4096..56 * 512].iter().all(|byte| *byte == b'd'));
}

#[test]
fn a_read_only_disk_is_read_and_nothing_else() {
    let scene = Scene::new(true);
    assert_eq!(scene.ask(IN, 0, 0, 512), Status::Ok);
    assert_eq!(scene.ask(FLUSH, 0, 0, 0), Status::Ok);
    assert_eq!(scene.ask(OUT, 0, 512, 0), Status::Failed);
    assert_eq!(scene.range(ZEROES, 0, 1, 0), Status::Failed);
    assert_eq!(scene.range(DISCARD, 0, 1, 0), Status::Failed);
}

#[test]
fn a_name_is_cut_to_its_20_bytes_and_the_unknown_is_unsupported() {
    let scene = Scene::new(false);
    assert_eq!(scene.ask(GET_ID, 0, 0, 20), Status::Ok);
    assert_eq!(scene.answer(21), b"a name that is longe\0");
    assert_eq!(scene.ask(GET_ID, 0, 0, 4), Status::Ok);
    for kind in [2, 3, 5, 14, 15, 24, u32::MAX] {
        assert_eq!(scene.ask(kind, 0, 0, 512), Status::Unsupported, "{kind}");
    }
}
