//! What a disk may hold when the power fails, by the log of all that it was asked to write (dm-log-writes' format).

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// The log's unit, and the size of its header and of an entry's head.
const SECTOR: u64 = 512;

/// All that was written before is on stable storage.
const FLUSH: u64 = 1;
/// This is on stable storage itself.
const FUA: u64 = 2;
/// Has no data in the log; what is read there afterwards is zeroes at best.
const DISCARD: u64 = 4;

/// One write, discard or flush.
struct Entry {
    offset: u64,
    data: Vec<u8>,
    flags: u64,
}

/// What the power's failure takes of the writes that were not flushed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    Nothing,
    All,
    /// Each of them by chance.
    Some(u64),
}

/// The whole log.
pub struct Log(Vec<Entry>);

impl Log {
    pub fn read(path: &Path) -> Self {
        let file = File::open(path).unwrap();
        let length = file.metadata().unwrap().len();
        let mut found = Vec::new();
        let mut at = SECTOR;
        while at + SECTOR <= length {
            let mut head = [0; 32];
            file.read_exact_at(&mut head, at).unwrap();
            let word = |index: usize| u64::from_le_bytes(head[8 * index..][..8].try_into().unwrap());
            let (sector, sectors, flags) = (word(0), word(1), word(2));
            at += SECTOR;
            let mut data = vec![0; (sectors * SECTOR) as usize];
            if flags & DISCARD == 0 {
                // Zeroes at the end of the log may be a hole beyond its end.
                let there = length.saturating_sub(at).min(sectors * SECTOR);
                file.read_exact_at(&mut data[..there as usize], at).unwrap();
                at += sectors * SECTOR;
            }
            found.push(Entry { offset: sector * SECTOR, data, flags });
        }
        Self(found)
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Is entry `at` one after which what was before it can't be lost? So is the end.
    pub fn is_flush(&self, at: usize) -> bool {
        self.0.get(at).is_none_or(|entry| entry.flags & FLUSH != 0)
    }
}

/// A disk to which the log happens. It only goes forward.
pub struct Disk<'a> {
    log: &'a Log,
    /// What is on stable storage: the entries before `flushed`.
    path: PathBuf,
    file: File,
    flushed: usize,
}

impl<'a> Disk<'a> {
    /// The image at `path` is as it was before the first entry.
    pub fn new(log: &'a Log, path: &Path) -> Self {
        let file = OpenOptions::new().write(true).open(path).unwrap();
        Self { log, path: path.to_owned(), file, flushed: 0 }
    }

    /// Makes at `copy` the disk on which the power failed after the first `count` entries. False: that is no other disk
    /// than with [`Loss::Nothing`].
    pub fn fail(&mut self, count: usize, loss: Loss, copy: &Path) -> bool {
        if let Some(flush) = (self.flushed..count).rev().find(|&at| self.log.is_flush(at)) {
            self.log.0[self.flushed..flush].iter().for_each(|entry| put(&self.file, entry));
            self.flushed = flush;
            // Its own data, if it has any, comes after the flush.
            if self.log.0[flush].data.is_empty() {
                self.flushed += 1;
            }
        }
        let mut lost = false;
        let mut kept = Vec::new();
        for (at, entry) in self.log.0.iter().enumerate().take(count).skip(self.flushed) {
            let keeps = entry.flags & FUA != 0
                || match loss {
                    Loss::Nothing => true,
                    Loss::All => false,
                    Loss::Some(seed) => scramble(seed ^ at as u64) & 1 == 0,
                };
            if keeps { kept.push(entry) } else { lost |= !entry.data.is_empty() }
        }
        if !lost && loss != Loss::Nothing {
            return false;
        }
        super::run("cp", &["--sparse=always", "--remove-destination", super::text(&self.path), super::text(copy)]);
        let copy = OpenOptions::new().write(true).open(copy).unwrap();
        kept.into_iter().for_each(|entry| put(&copy, entry));
        true
    }
}

fn put(file: &File, entry: &Entry) {
    file.write_all_at(&entry.data, entry.offset).unwrap();
}

/// splitmix64: looks random and follows from the seed.
pub fn scramble(seed: u64) -> u64 {
    let mut z = seed.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}
