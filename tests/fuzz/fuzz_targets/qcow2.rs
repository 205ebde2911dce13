//! A damaged qcow2 image, opened and read: refused or read, in bounded time and memory. The first byte chooses a good image; the
//! rest are changes of it, ten bytes each: a place, in words of four bytes, and the eight bytes that go there.
#![no_main]

use drive_backup::ground::range::{ByteRange, Extent};
use drive_backup::image::format::Format;
use drive_backup::image::open::open_elsewhere;
use drive_backup::image::qcow2::header::Compression;
use drive_backup::image::qcow2::{CompressOptions, CreateOptions, NewQcow2};
use drive_backup::image::{Image, Properties};
use libfuzzer_sys::fuzz_target;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock};

/// Of the disk in a good image.
const LENGTH: u64 = 256 << 10;
const CLUSTER: u64 = 4 << 10;
/// Bytes to read of a disk, which may say that it is huge.
const READ_LIMIT: u64 = 1 << 20;
/// Extents to ask for.
const EXTENTS_LIMIT: usize = 256;

/// A file in memory that grows, of bounded size.
#[derive(Default)]
struct Memory(Mutex<Vec<u8>>);

impl Image for Memory {
    fn length(&self) -> u64 {
        self.0.lock().unwrap().len() as u64
    }

    fn block_status(&self, range: ByteRange) -> io::Result<Extent> {
        Ok(Extent::data(range))
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let bytes = self.0.lock().unwrap();
        let range = usize::try_from(offset).ok().and_then(|start| bytes.get(start..start.checked_add(buf.len())?));
        buf.copy_from_slice(range.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let mut bytes = self.0.lock().unwrap();
        let (start, end) = (offset as usize, offset as usize + buf.len());
        let length = bytes.len().max(end);
        bytes.resize(length, 0);
        bytes[start..end].copy_from_slice(buf);
        Ok(())
    }

    fn write_zeroes(&self, range: ByteRange) -> io::Result<()> {
        self.write_at(&vec![0; range.length as usize], range.offset)
    }

    fn discard(&self, _: ByteRange) -> io::Result<()> {
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn properties(&self) -> Properties {
        Properties { cluster_size: 1, alignment: 1, reads_zero: true, sequential: false }
    }
}

/// Images with data, holes and zeroes: plain, and compressed in both ways.
fn good() -> &'static [Vec<u8>; 3] {
    static GOOD: OnceLock<[Vec<u8>; 3]> = OnceLock::new();
    GOOD.get_or_init(|| {
        let kinds = [None, Some(Compression::Zlib), Some(Compression::Zstd)];
        kinds.map(|kind| {
            let file = Arc::new(Memory::default());
            let compression = kind.map(CompressOptions::default_of);
            let image =
                NewQcow2::create(file.clone(), LENGTH, CreateOptions { cluster_size: CLUSTER, compression }).unwrap();
            for cluster in (0..LENGTH / CLUSTER).filter(|cluster| cluster % 4 < 2) {
                let bytes: Vec<u8> = (0..CLUSTER).map(|byte| (byte * cluster / 7) as u8).collect();
                image.write_at(&bytes, cluster * CLUSTER).unwrap();
            }
            image.flush().unwrap();
            drop(image);
            Arc::into_inner(file).unwrap().0.into_inner().unwrap()
        })
    })
}

fn read(image: &dyn Image) {
    let whole = ByteRange::new(0, image.length());
    let mut rest = whole;
    for _ in 0..EXTENTS_LIMIT {
        if rest.is_empty() {
            break;
        }
        let Ok(extent) = image.block_status(rest) else { break };
        assert!(extent.range.offset == rest.offset && !extent.range.is_empty() && extent.range.end() <= rest.end());
        rest = ByteRange::between(extent.range.end(), rest.end());
    }
    let mut buf = vec![0; 64 << 10];
    let last = whole.length.saturating_sub(buf.len() as u64);
    for offset in (0..whole.length.min(READ_LIMIT)).step_by(buf.len()).chain([last]) {
        let length = (whole.length - offset).min(buf.len() as u64) as usize;
        let _ = image.read_at(&mut buf[..length], offset);
    }
}

fuzz_target!(|bytes: &[u8]| {
    let Some((&first, rest)) = bytes.split_first() else { return };
    let good = good();
    let mut damaged = good[usize::from(first) % good.len()].clone();
    for change in rest.chunks_exact(10) {
        let at = usize::from(u16::from_be_bytes([change[0], change[1]])) * 4 % (damaged.len() - 8);
        damaged[at..at + 8].copy_from_slice(&change[2..]);
    }
    let file = Arc::new(Memory(Mutex::new(damaged)));
    match open_elsewhere(file, Path::new("damaged"), Format::Qcow2) {
        Ok(source) => read(&*source.image),
        Err(error) => assert!(!error.to_string().contains('\n')),
    }
});
