//! A program that writes a disk at full speed and lets backups attach to it; and the proof that a copy is an instant.
//!
//! ```text
//! cargo run --release --example writer -- run disk.raw     # in one terminal, until Ctrl-C
//! drive-backup --device disk.raw --target copy.raw         # in another
//! cargo run --release --example writer -- check copy.raw   # the proof
//! ```
//!
//! Write number N goes to a block that follows from N alone, and says N in every part of the block. So the highest
//! number in a copy says what all other blocks must hold if the copy is the disk of one instant: each the last number
//! up to that one which went there. examples/writer.c writes the same disk.

use drive_backup::writer::Writer;
use std::error::Error;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::{Duration, Instant};

const BLOCK: usize = 4096;
const DEFAULT_BLOCKS: u64 = 16 << 10;

type Block = [u8; BLOCK];

/// splitmix64: a number that looks random and follows from `seed`.
fn scramble(seed: u64) -> u64 {
    let mut z = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Where write `number` goes.
fn place(number: u64, blocks: u64) -> u64 {
    scramble(number) % blocks
}

/// What write `number` writes: its number, then words that follow from it. Number 0 is a block never written.
fn contents(number: u64) -> Block {
    let mut block = [0; BLOCK];
    if number > 0 {
        for (at, word) in block.chunks_exact_mut(8).enumerate() {
            let value = if at == 0 { number } else { scramble(number ^ (at as u64) << 48) };
            word.copy_from_slice(&value.to_le_bytes());
        }
    }
    block
}

/// The number that each block of a disk says; an error if a block is not whole.
fn read_numbers(disk: &File) -> Result<Vec<u64>, Box<dyn Error>> {
    let mut block = [0; BLOCK];
    let mut numbers = Vec::new();
    for at in 0..disk.metadata()?.len() / BLOCK as u64 {
        disk.read_exact_at(&mut block, at * BLOCK as u64)?;
        let number = block.first_chunk().map_or(0, |word| u64::from_le_bytes(*word));
        if block != contents(number) {
            return Err(format!("block {at} is torn: it begins with write {number}").into());
        }
        numbers.push(number);
    }
    Ok(numbers)
}

/// Proves that `path` is the disk of one instant: returns the last write before it.
pub fn check(path: &Path) -> Result<u64, Box<dyn Error>> {
    let numbers = read_numbers(&File::open(path)?)?;
    let instant = numbers.iter().copied().max().ok_or("an empty disk")?;
    let mut expected = vec![0; numbers.len()];
    for number in 1..=instant {
        expected[place(number, numbers.len() as u64) as usize] = number;
    }
    match (0..numbers.len()).find(|&at| numbers[at] != expected[at]) {
        None => Ok(instant),
        Some(at) => {
            let (found, expected) = (numbers[at], expected[at]);
            Err(format!("block {at} holds write {found}; after write {instant} it held write {expected}").into())
        }
    }
}

/// Writes the disk at `path`, made with `blocks` if it is missing, until it has done `writes`. Returns how long the
/// slowest took.
pub fn run(path: &Path, folder: Option<&Path>, blocks: u64, writes: u64) -> Result<Duration, Box<dyn Error>> {
    let disk = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)?;
    if disk.metadata()?.len() == 0 {
        disk.set_len(blocks * BLOCK as u64)?;
    }
    let blocks = disk.metadata()?.len() / BLOCK as u64;
    let last = read_numbers(&disk)?.into_iter().max().unwrap_or(0);

    // Before the first write; a backup that is running attaches here.
    let writer = match folder {
        Some(folder) => Writer::open_in(path, folder)?,
        None => Writer::open(path)?,
    };
    // This program buffers nothing; one that does writes it out here.
    let flushed = disk.try_clone()?;
    writer.on_freeze(move || flushed.sync_data());

    let (mut slowest, mut slowest_lately) = (Duration::ZERO, Duration::ZERO);
    let mut report = Instant::now();
    for number in (last + 1..).take(usize::try_from(writes)?) {
        let (block, offset) = (contents(number), place(number, blocks) * BLOCK as u64);
        let began = Instant::now();
        {
            let _write = writer.begin(offset, BLOCK as u64)?;
            disk.write_all_at(&block, offset)?;
        }
        slowest_lately = slowest_lately.max(began.elapsed());
        if report.elapsed() >= Duration::from_secs(1) {
            eprintln!("write {number}, the slowest of the last second took {slowest_lately:?}");
            slowest = slowest.max(slowest_lately);
            (slowest_lately, report) = (Duration::ZERO, Instant::now());
        }
    }
    Ok(slowest.max(slowest_lately))
}

#[allow(dead_code)] // Not the entry of a test that includes this file.
fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["run", path] => run(Path::new(path), None, DEFAULT_BLOCKS, u64::MAX).map(drop),
        ["run", path, writes] => {
            let slowest = run(Path::new(path), None, DEFAULT_BLOCKS, writes.parse()?)?;
            println!("the slowest write took {slowest:?}");
            Ok(())
        }
        ["check", path] => {
            println!("{path} is the disk as it was after write {} and before the next", check(Path::new(path))?);
            Ok(())
        }
        _ => Err("usage: writer run FILE [WRITES] | writer check FILE".into()),
    }
}
