//! What the tests of this folder share: a disk in memory with faults and a log, test contents, and qemu-img as judge.

use crate::ground::range::{ByteRange, Extent};
use crate::image::fixture::text;
use crate::image::{Image, Properties};
use std::io;
use std::path::Path;
use std::process::Command;
use std::sync::Mutex;

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
}

#[derive(Default)]
struct MemoryState {
    bytes: Vec<u8>,
    log: Vec<Operation>,
    /// The operation with this number in the log, and each one after it, fails.
    fail_from: Option<usize>,
}

impl MemoryDisk {
    pub fn of(bytes: Vec<u8>) -> Self {
        Self { state: Mutex::new(MemoryState { bytes, ..MemoryState::default() }) }
    }

    pub fn fail_from(&self, operation: Option<usize>) {
        self.state.lock().unwrap().fail_from = operation;
    }

    pub fn bytes(&self) -> Vec<u8> {
        self.state.lock().unwrap().bytes.clone()
    }

    pub fn log(&self) -> Vec<Operation> {
        self.state.lock().unwrap().log.clone()
    }

    fn change(&self, operation: Operation) -> io::Result<()> {
        let mut state = self.state.lock().unwrap();
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
