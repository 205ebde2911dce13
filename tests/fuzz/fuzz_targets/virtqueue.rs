//! What a guest puts into its memory for a virtqueue: chains of descriptors, indirect tables, headers. Each chain is taken from a
//! queue, done on a disk and answered. Whatever it is, it comes to an end, the disk keeps its size, and no byte of the guest's
//! memory changes that no descriptor offers for that.
//!
//! The bytes: choices; 16 descriptors of the table, 16 of an indirect one, 7 bytes each; 16 heads; what lies from `CONTENT` on.
#![no_main]

use drive_backup::ground::range::{ByteRange, Extent};
use drive_backup::image::raw::Raw;
use drive_backup::image::{Image, Properties};
use drive_backup::serve::disk::{Disk, DiskOptions};
use drive_backup::serve::vhost_user::perform::{changes, perform};
use drive_backup::serve::vhost_user::request::{Memory, Request};
use libfuzzer_sys::fuzz_target;
use std::io;
use std::sync::{Arc, Mutex, OnceLock};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress};

const SIZE: u16 = 16;
/// Of a descriptor among the bytes.
const PACKED: usize = 7;
const LENGTH: u64 = 70_000;
const AVAILABLE: u64 = 0x400;
const USED: u64 = 0x600;
const INDIRECT: u64 = 0x800;
const CONTENT: u64 = 0x1000;
/// Two regions that meet, and one behind a hole.
const REGIONS: [(u64, usize); 3] = [(0, 0x2000), (0x2000, 0x2000), (0x6000, 0x2000)];

/// A disk that is no file.
struct Buffer(Mutex<Vec<u8>>);

impl Image for Buffer {
    fn length(&self) -> u64 {
        LENGTH
    }

    fn block_status(&self, range: ByteRange) -> io::Result<Extent> {
        Ok(Extent::data(range))
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        buf.copy_from_slice(&self.0.lock().unwrap()[offset as usize..][..buf.len()]);
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.0.lock().unwrap()[offset as usize..][..buf.len()].copy_from_slice(buf);
        Ok(())
    }

    fn write_zeroes(&self, range: ByteRange) -> io::Result<()> {
        self.write_at(&vec![0; range.length as usize], range.offset)
    }

    fn discard(&self, range: ByteRange) -> io::Result<()> {
        self.write_zeroes(range)
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn properties(&self) -> Properties {
        Properties { cluster_size: 1, alignment: 1, reads_zero: false, sequential: false }
    }
}

/// A file, and what is none.
fn disks() -> &'static [Disk; 2] {
    static DISKS: OnceLock<[Disk; 2]> = OnceLock::new();
    DISKS.get_or_init(|| {
        let raw = Raw::fresh(tempfile::tempfile().unwrap(), LENGTH).unwrap();
        let images: [Arc<dyn Image>; 2] = [Arc::new(raw), Arc::new(Buffer(Mutex::new(vec![b'd'; LENGTH as usize])))];
        let options = DiskOptions {
            name: "d".into(),
            path: "d".into(),
            format: None,
            read_only: false,
            secret: None,
            writer_dir: None,
        };
        images.map(|image| Disk::over(&options, image))
    })
}

/// A descriptor as it lies in memory. Most addresses are in memory, most lengths short.
fn unpacked(packed: &[u8]) -> [u8; 16] {
    let word = |at: usize| u64::from(u16::from_le_bytes([packed[at], packed[at + 1]]));
    let (near, length) = (word(1), word(3) as u32);
    let address = match packed[0] & 7 {
        0 => u64::MAX - near,
        1 => near << 48,
        _ => near & 0x7FFF,
    };
    let length = match packed[0] >> 3 & 7 {
        0 => u32::MAX - length,
        1 => length << 16,
        2 => length & 0x3F,
        _ => length & 0xFFF,
    };
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&address.to_le_bytes());
    bytes[8..12].copy_from_slice(&length.to_le_bytes());
    bytes[12..14].copy_from_slice(&u16::from(packed[5] & 7).to_le_bytes());
    bytes[14..].copy_from_slice(&u16::from(packed[6] & 0x1F).to_le_bytes());
    bytes
}

/// All regions, at their places.
fn snapshot(memory: &Memory) -> Vec<u8> {
    let mut bytes = vec![0; 0x8000];
    for (start, length) in REGIONS {
        memory.read_slice(&mut bytes[start as usize..][..length], GuestAddress(start)).unwrap();
    }
    bytes
}

/// Is a byte changed that no descriptor, of the table or of an indirect one, lets the device write?
fn trespass(before: &[u8], after: &[u8]) -> Option<usize> {
    let mut allowed = vec![false; before.len()];
    let mut indirect = Vec::new();
    let mut allow = |at: usize, indirect: Option<&mut Vec<(u64, u64)>>| {
        let Some(bytes) = before.get(at..at + 16) else { return };
        let address = u64::from_le_bytes(bytes[..8].try_into().unwrap());
        let length = u64::from(u32::from_le_bytes(bytes[8..12].try_into().unwrap()));
        let end = address.saturating_add(length).min(before.len() as u64);
        if bytes[12] & 2 != 0 && address < end {
            allowed[address as usize..end as usize].fill(true);
        }
        if let Some(tables) = indirect.filter(|_| bytes[12] & 4 != 0) {
            tables.push((address, end));
        }
    };
    (0..usize::from(SIZE)).for_each(|number| allow(number * 16, Some(&mut indirect)));
    for (start, end) in indirect {
        (start..end).step_by(16).for_each(|at| allow(at as usize, None));
    }
    (0..before.len()).find(|&at| before[at] != after[at] && !allowed[at])
}

/// Takes one chain and does it; false: there is none.
fn turn(queue: &mut Queue, memory: &Memory, disk: &Disk, through: bool) -> bool {
    let Ok(mut chains) = queue.iter(memory) else { return false };
    let Some(chain) = chains.next() else { return false };
    let (head, before) = (chain.head_index(), snapshot(memory));
    let mut written = 0;
    if let Ok(request) = Request::parse(chain, memory) {
        let [input, output] = [request.input.length(), request.output.length()];
        assert!(input + output < 1 << 32);
        changes(&request, memory);
        let status = perform(disk, &request, memory, through);
        written = request.answer(memory, status.byte());
        assert!(u64::from(written) <= output + 1);
    }
    if let Some(at) = trespass(&before, &snapshot(memory)) {
        panic!("byte {at:#x} of the guest was not ours to write");
    }
    let _ = queue.add_used(memory, head, written);
    true
}

fuzz_target!(|bytes: &[u8]| {
    let table = PACKED * usize::from(SIZE);
    let Some((&choices, rest)) = bytes.split_first() else { return };
    let Some((tables, rest)) = rest.split_at_checked(2 * table) else { return };
    let Some((heads, content)) = rest.split_at_checked(SIZE.into()) else { return };
    let memory = Memory::from_ranges(&REGIONS.map(|(start, length)| (GuestAddress(start), length))).unwrap();
    for (packed, base) in tables.chunks_exact(table).zip([0, INDIRECT]) {
        for (at, packed) in (base..).step_by(16).zip(packed.chunks_exact(PACKED)) {
            memory.write_slice(&unpacked(packed), GuestAddress(at)).unwrap();
        }
    }
    let chains = u16::from(choices >> 2) % SIZE + 1;
    memory.write_obj(chains, GuestAddress(AVAILABLE + 2)).unwrap();
    for (at, head) in (AVAILABLE + 4..).step_by(2).zip(heads) {
        memory.write_obj(u16::from(head & 0x1F), GuestAddress(at)).unwrap();
    }
    let content = &content[..content.len().min(0x3000)];
    memory.write_slice(content, GuestAddress(CONTENT)).unwrap();
    let disk = &disks()[usize::from(choices & 1)];
    let mut queue = Queue::new(SIZE).unwrap();
    queue.set_avail_ring_address(Some(AVAILABLE as u32), None);
    queue.set_used_ring_address(Some(USED as u32), None);
    queue.set_ready(true);
    // The guest's ring may be written by what it asks for, so that it never ends.
    for _ in 0..chains {
        if !turn(&mut queue, &memory, disk, choices & 2 != 0) {
            break;
        }
    }
    let length = disk.plain_file().map_or(LENGTH, |file| file.metadata().unwrap().len());
    assert_eq!(length, LENGTH);
});
