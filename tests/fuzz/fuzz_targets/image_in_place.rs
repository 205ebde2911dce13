//! A whole qcow2 file that is written in place: refused, or written, in bounded time and memory. The corpus is that of
//! `image`.
#![no_main]

use drive_backup::ground::range::{ByteRange, Extent};
use drive_backup::image::qcow2::ExistingQcow2;
use drive_backup::image::{Image, Properties};
use libfuzzer_sys::fuzz_target;
use std::io;
use std::sync::{Arc, Mutex};

/// Bytes of the largest file.
const ROOM: u64 = 32 << 20;

/// A file in memory that grows, of bounded size.
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
        let end = offset.checked_add(buf.len() as u64).filter(|end| *end <= ROOM).ok_or(io::ErrorKind::StorageFull)?;
        let length = bytes.len().max(end as usize);
        bytes.resize(length, 0);
        bytes[offset as usize..end as usize].copy_from_slice(buf);
        Ok(())
    }

    fn write_zeroes(&self, range: ByteRange) -> io::Result<()> {
        if range.length > ROOM {
            return Err(io::ErrorKind::StorageFull.into());
        }
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

fn change(image: &ExistingQcow2) {
    let whole = ByteRange::new(0, image.length());
    if whole.length < 4 {
        return;
    }
    let step = whole.length.min(9000);
    for (at, length) in [(0, step), (whole.length / 3, 700), (whole.length / 2, step), (whole.length - 3, 3)] {
        let range = ByteRange::between(at, whole.end()).prefix(length);
        let _ = image.write_at(&vec![0x5a; range.length as usize], range.offset);
        let mut found = vec![0; range.length as usize];
        let _ = image.read_at(&mut found, range.offset);
    }
    let _ = image.write_zeroes(whole.prefix(step * 2));
    let _ = image.discard(ByteRange::between(whole.length / 2, whole.end()).prefix(1 << 20));
    let _ = image.flush();
}

fuzz_target!(|bytes: &[u8]| {
    let file = Arc::new(Memory(Mutex::new(bytes.to_vec())));
    match ExistingQcow2::load(file, None) {
        Ok(image) => change(&image),
        Err(error) => assert!(!error.to_string().contains('\n')),
    }
});
