//! What the tests of this folder share: a disk in memory with faults and a log, test contents, and qemu-img as judge.

use crate::ground::range::{ByteRange, Extent};
use crate::image::fixture::text;
use crate::image::{Image, Properties};
use std::collections::HashMap;
use std::io;
use std::path::Path;
use std::process::Command;
use std::sync::{Condvar, Mutex};

/// One call that changed a [`MemoryDisk`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Operation {
    Write { offset: u64, bytes: Vec<u8> },
    Flush,
}

/// A growing file in memory. It logs what changes it, and fails when told to.
#[derive(Default)]
pub struct MemoryDisk {
    state: Mutex<MemoryState>,
    opened: Condvar,
}

#[derive(Default)]
struct MemoryState {
    bytes: Vec<u8>,
    log: Vec<Operation>,
    /// The operation with this number in the log, and each one after it, fails.
    fail_from: Option<usize>,
    /// Writes to this offset wait.
    gate: Option<u64>,
}

impl MemoryDisk {
    pub fn of(bytes: Vec<u8>) -> Self {
        Self { state: Mutex::new(MemoryState { bytes, ..MemoryState::default() }), opened: Condvar::new() }
    }

    pub fn fail_from(&self, operation: Option<usize>) {
        self.state.lock().unwrap().fail_from = operation;
    }

    /// From now on writes to offset `gate` wait until there is another gate, or none.
    pub fn set_gate(&self, gate: Option<u64>) {
        self.state.lock().unwrap().gate = gate;
        self.opened.notify_all();
    }

    pub fn bytes(&self) -> Vec<u8> {
        self.state.lock().unwrap().bytes.clone()
    }

    pub fn log(&self) -> Vec<Operation> {
        self.state.lock().unwrap().log.clone()
    }

    fn change(&self, operation: Operation) -> io::Result<()> {
        let mut state = self.state.lock().unwrap();
        while let (Some(gate), Operation::Write { offset, .. }) = (state.gate, &operation) {
            if gate != *offset {
                break;
            }
            state = self.opened.wait(state).unwrap();
        }
        if state.fail_from.is_some_and(|number| state.log.len() >= number) {
            return Err(io::Error::from_raw_os_error(5));
        }
        operation.apply(&mut state.bytes);
        state.log.push(operation);
        Ok(())
    }
}

impl Operation {
    /// Does it to a file's contents.
    pub fn apply(&self, file: &mut Vec<u8>) {
        if let Self::Write { offset, bytes } = self {
            let end = *offset as usize + bytes.len();
            if file.len() < end {
                file.resize(end, 0);
            }
            file[*offset as usize..end].copy_from_slice(bytes);
        }
    }
}

impl Image for MemoryDisk {
    fn length(&self) -> u64 {
        self.state.lock().unwrap().bytes.len() as u64
    }

    fn block_status(&self, range: ByteRange) -> io::Result<Extent> {
        Ok(Extent::data(range))
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let state = self.state.lock().unwrap();
        let found = state.bytes.get(offset as usize..offset as usize + buf.len());
        buf.copy_from_slice(found.ok_or(io::ErrorKind::UnexpectedEof)?);
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.change(Operation::Write { offset, bytes: buf.to_vec() })
    }

    fn write_zeroes(&self, range: ByteRange) -> io::Result<()> {
        self.write_at(&vec![0; range.length as usize], range.offset)
    }

    fn discard(&self, _range: ByteRange) -> io::Result<()> {
        Ok(())
    }

    fn flush(&self) -> io::Result<()> {
        self.change(Operation::Flush)
    }

    fn properties(&self) -> Properties {
        Properties { cluster_size: 1, alignment: 1, reads_zero: true, sequential: false }
    }
}

/// `length` bytes that follow from `seed`: stretches of words, of noise and of zeroes, of `piece` bytes each.
pub fn contents(seed: u64, length: usize, piece: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut random = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state
    };
    let mut all = Vec::with_capacity(length + piece);
    while all.len() < length {
        let end = all.len() + piece;
        match random() % 8 {
            0 => all.resize(end, 0),
            1..=3 => {
                while all.len() < end {
                    all.extend(random().to_le_bytes());
                }
            }
            _ => {
                while all.len() < end {
                    all.extend_from_slice(
                        [&b"the disk "[..], b"cluster ", b"of a run ", b"is "][(random() % 4) as usize],
                    );
                }
            }
        }
        all.truncate(end);
    }
    all.truncate(length);
    all
}

/// qemu-img finds neither an error nor a leak.
pub fn assert_clean(image: &Path) {
    let (code, output) = check(image);
    assert_eq!(code, 0, "qemu-img check: {output}");
}

/// Exit code of `qemu-img check` (2: corruptions, 3: leaks) and all that it said.
pub fn check(image: &Path) -> (i32, String) {
    qemu_img(&["check", "-f", "qcow2", text(image)])
}

/// The qcow2 image reads as `expected` does, byte by byte; beyond it, as zeroes.
pub fn assert_reads(image: &Path, expected: &Path) {
    let (code, output) = qemu_img(&["compare", "-f", "qcow2", "-F", "raw", text(image), text(expected)]);
    assert_eq!(code, 0, "qemu-img compare: {output}");
}

/// Runs qemu-img; its exit code and all that it said.
pub fn qemu_img(arguments: &[&str]) -> (i32, String) {
    let output = Command::new("qemu-img").args(arguments).output().expect("qemu-img can be run");
    let said = [output.stdout, output.stderr].concat();
    (output.status.code().expect("qemu-img was not killed"), String::from_utf8_lossy(&said).into_owned())
}

/// Every cluster that the image in `file` refers to is within the file and counted at least so often, and no two
/// entries share one, unless compressed. Written apart from what it checks.
pub fn counted_well(file: &[u8]) -> Result<(), String> {
    let word = |at: u64| {
        let bytes = file.get(at as usize..at as usize + 8).ok_or(format!("{at:#x} is past the end"))?;
        Ok::<_, String>(u64::from_be_bytes(bytes.try_into().unwrap()))
    };
    let offset = |entry: u64| entry & 0x00ff_ffff_ffff_fe00;
    let size = 1u64 << file[23];
    let width = if file[7] == 2 { 16 } else { 1u64 << file[99] };
    let mut references = HashMap::<u64, (u64, u64)>::new();
    let mut refer = |from: u64, to: u64, exclusive: u64| {
        for cluster in from / size..to.div_ceil(size) {
            let found = references.entry(cluster).or_default();
            *found = (found.0 + 1, found.1 + exclusive);
        }
    };
    refer(0, 1, 1);
    let (l1, l1_length) = (word(40)?, u64::from(u32::from_be_bytes(file[36..40].try_into().unwrap())) * 8);
    refer(l1, l1 + l1_length, 1);
    let (table, table_length) = (word(48)?, u64::from(u32::from_be_bytes(file[56..60].try_into().unwrap())) * size);
    refer(table, table + table_length, 1);
    for at in (table..table + table_length).step_by(8) {
        let block = word(at)?;
        refer(block, block + u64::from(block != 0), 1);
    }
    for l1_at in (l1..l1 + l1_length).step_by(8) {
        let l2 = offset(word(l1_at)?);
        refer(l2, l2 + u64::from(l2 != 0), 1);
        for at in (l2..l2 + size).step_by(8).filter(|_| l2 != 0) {
            let entry = word(at)?;
            if entry >> 62 & 1 == 1 {
                let bits = 62 - (u32::from(file[23]) - 8);
                let start = entry & ((1 << bits) - 1);
                let sectors = (entry & ((1 << 62) - 1)) >> bits;
                refer(start, (start / 512 + sectors + 1) * 512, 0);
            } else if offset(entry) != 0 {
                word(offset(entry) + size - 8)?;
                refer(offset(entry), offset(entry) + 1, 1);
            }
        }
    }
    for (cluster, (all, exclusive)) in references {
        let block = word(table + cluster / (size * 8 / width) * 8)?;
        let index = cluster % (size * 8 / width);
        let count = match width {
            _ if block == 0 => 0,
            1..=4 => u64::from(file[(block + index * width / 8) as usize] >> (index * width % 8)) & ((1 << width) - 1),
            _ => {
                (0..width / 8).fold(0, |n, byte| n << 8 | u64::from(file[(block + index * width / 8 + byte) as usize]))
            }
        };
        if count < all || exclusive > 1 || exclusive == 1 && all > 1 {
            return Err(format!("cluster {cluster}: counted {count}, {all} references, {exclusive} want it alone"));
        }
    }
    Ok(())
}
