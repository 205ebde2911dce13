//! Disks full of bytes that can be told apart, and ways to look at them.

use super::{qemu_img, run, text};
use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

/// `length` bytes that depend on `seed` alone; every second KiB repeats one byte, so that it compresses.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        // xorshift64
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        match bytes.len() / 1024 % 2 {
            0 => bytes.extend(state.to_le_bytes()),
            // Never zero: a run of zeroes is a thing of its own.
            _ => bytes.extend([state as u8 | 1; 8]),
        }
    }
    bytes.truncate(length);
    bytes
}

/// Writes `length` bytes of noise at `offset` of an existing file or device.
pub fn scribble(path: &Path, offset: u64, length: usize) {
    let file = OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(&noise(offset + 1, length), offset).unwrap();
}

/// A raw disk of `size` bytes: data at its start, across cluster borders, up to its last byte; runs of stored zeroes; holes.
pub fn disk(path: &Path, size: u64) {
    super::sparse_file(path, size);
    let file = OpenOptions::new().write(true).open(path).unwrap();
    let put = |offset: u64, bytes: &[u8]| {
        let room = size.saturating_sub(offset).min(bytes.len() as u64) as usize;
        file.write_all_at(&bytes[..room], offset).unwrap();
    };
    put(0, &noise(1, 5000));
    put((64 << 10) - 700, &noise(2, 1400));
    put(128 << 10, &vec![0; 200 << 10]);
    put((512 << 10) + 512, &noise(3, 300 << 10));
    put((1 << 20) - 1, &noise(4, 2));
    put((2 << 20) - (64 << 10), &noise(5, 128 << 10));
    let tail = size.min(3000);
    put(size - tail, &noise(6, tail as usize));
}

/// The bytes of a file or device.
pub fn read(path: &Path) -> Vec<u8> {
    let mut bytes = Vec::new();
    File::open(path).unwrap().read_to_end(&mut bytes).unwrap();
    bytes
}

/// A number that changes when the bytes do.
pub fn digest(path: &Path) -> u64 {
    // FNV-1a, over words: fast enough without optimisation.
    let mut bytes = read(path);
    let length = bytes.len() as u64;
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes
        .chunks_exact(8)
        .map(|word| u64::from_le_bytes(word.try_into().unwrap()))
        .fold(0xcbf2_9ce4_8422_2325 ^ length, |hash, word| (hash ^ word).wrapping_mul(0x0100_0000_01b3).rotate_left(31))
}

/// Bytes that a file occupies.
pub fn allocated(path: &Path) -> u64 {
    std::fs::metadata(path).unwrap().blocks() * 512
}

/// Bytes that a file occupies, which may not be there yet.
pub fn allocated_now(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |metadata| metadata.blocks() * 512)
}

/// Panics unless two images hold the same disk, of the same size, as qemu-img reads them.
#[track_caller]
pub fn same(one: (&str, &Path), other: (&str, &Path)) {
    let answer = run("qemu-img", &["compare", "-f", one.0, "-F", other.0, text(one.1), text(other.1)]);
    assert_eq!(answer, "Images are identical.");
}

/// Panics unless `image` is a qcow2 without errors and leaks.
#[track_caller]
pub fn sound(image: &Path) {
    let report = qemu_img("check -f qcow2", &[image]);
    assert!(report.contains("No errors were found on the image."), "{report}");
}

/// Panics unless raw files or devices hold the same bytes, saying where they differ.
#[track_caller]
pub fn identical(one: &Path, other: &Path) {
    let (a, b) = (read(one), read(other));
    assert_eq!(a.len(), b.len(), "{} and {}", one.display(), other.display());
    if a != b {
        let at = a.iter().zip(&b).position(|(a, b)| a != b).unwrap();
        panic!("{} and {} differ at {at:#x}", one.display(), other.display());
    }
}
