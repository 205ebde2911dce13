//! A disk that describes itself, and the proof that a copy of it shows one moment. It knows nothing of the code under test.
//!
//! Each sector is written by one thread only, whichever process that one is in; it holds its own number, the write's
//! sequence, the thread and a checksum, or zeroes. Each thread keeps a journal: when a write was asked for, and when it had
//! ended, by one clock. What a sector of the copy holds says between which moments it was taken; there must be a moment
//! that all sectors have in common.

use crate::kit::{SECTOR, scramble};
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::path::Path;

/// Of a write whose process was killed in its midst: it may never have happened, or at any time.
pub const NEVER: u64 = u64::MAX;

/// Words of a record. A page holds a whole number of them, so that a kill leaves no half one; nor half a sector.
const RECORD: usize = 8;

const ASKED: u64 = 1;
const ENDED: u64 = 2;
const FAILED: u64 = 3;

/// CLOCK_MONOTONIC in nanoseconds: one clock for all processes.
pub fn now() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// Whose sectors are whose.
#[derive(Clone, Copy, Debug)]
pub struct Layout {
    pub seed: u64,
    /// Bytes; what is left of whole sectors at the end is never written.
    pub length: u64,
    /// Sectors that have one owner, at least.
    pub stripe: u64,
    pub threads: u64,
}

impl Layout {
    pub fn sectors(&self) -> u64 {
        self.length / SECTOR
    }

    pub fn owner(&self, sector: u64) -> u64 {
        scramble(self.seed ^ (sector / self.stripe)) % self.threads
    }

    /// The disk before the first write.
    pub fn fresh(&self) -> Vec<u8> {
        let mut bytes = contents(0, self.sectors(), 0, 0);
        bytes.resize(self.length as usize, 0xA5);
        bytes
    }
}

/// What write `sequence` of thread `writer` puts into sectors.
pub fn contents(first: u64, count: u64, sequence: u64, writer: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity((count * SECTOR) as usize);
    for sector in first..first + count {
        let sum = scramble(sequence ^ scramble(sector ^ scramble(writer))) | 1;
        [sector, sequence, writer].iter().for_each(|word| bytes.extend(word.to_le_bytes()));
        (3..SECTOR / 8).for_each(|word| bytes.extend(sum.wrapping_mul(word * 2 + 1).to_le_bytes()));
    }
    bytes
}

/// A write, as its thread remembers it.
#[derive(Clone, Copy, Debug)]
pub struct Entry {
    pub sequence: u64,
    first: u64,
    count: u64,
    is_zero: bool,
    asked: u64,
    ended: u64,
}

/// Writes a thread's journal.
pub struct Scribe {
    file: File,
    pub sequence: u64,
}

impl Scribe {
    /// Goes on where an earlier process ended.
    pub fn open(path: &Path) -> Self {
        let sequence = read(path).iter().map(|entry| entry.sequence).max().unwrap_or(0);
        let file = OpenOptions::new().append(true).create(true).open(path).unwrap();
        Self { file, sequence }
    }

    pub fn asks(&mut self, first: u64, count: u64, is_zero: bool) {
        self.sequence += 1;
        self.put([ASKED, self.sequence, first, count, is_zero.into(), now()]);
    }

    pub fn ended(&mut self) {
        self.put([ENDED, self.sequence, 0, 0, 0, now()]);
    }

    pub fn failed(&mut self) {
        self.put([FAILED, self.sequence, 0, 0, 0, now()]);
    }

    fn put(&mut self, words: [u64; 6]) {
        let mut record = [0; RECORD * 8];
        words.iter().zip(record.chunks_exact_mut(8)).for_each(|(word, at)| at.copy_from_slice(&word.to_le_bytes()));
        self.file.write_all(&record).unwrap();
    }
}

/// The writes of a journal that did not fail, in order.
pub fn read(path: &Path) -> Vec<Entry> {
    let bytes = std::fs::read(path).unwrap_or_default();
    let mut entries: Vec<Entry> = Vec::new();
    for record in bytes.chunks_exact(RECORD * 8) {
        let word = |at: usize| u64::from_le_bytes(record[at * 8..][..8].try_into().unwrap());
        let (kind, sequence, time) = (word(0), word(1), word(5));
        match kind {
            ASKED => {
                let (first, count, is_zero) = (word(2), word(3), word(4) == 1);
                entries.push(Entry { sequence, first, count, is_zero, asked: time, ended: NEVER });
            }
            ENDED => entries.last_mut().filter(|entry| entry.sequence == sequence).unwrap().ended = time,
            FAILED => assert_eq!(entries.pop().unwrap().sequence, sequence),
            _ => panic!("record {kind} of {}", path.display()),
        }
    }
    entries
}

/// Moments from, to; sorted, none touches another: so what many sectors have in common stays short.
type Moments = Vec<(u64, u64)>;

fn common(one: &Moments, other: &Moments) -> Moments {
    let pairs = one.iter().flat_map(|a| other.iter().map(move |b| (a.0.max(b.0), a.1.min(b.1))));
    pairs.filter(|(from, to)| from <= to).collect()
}

/// When the sector's bytes may have been these: after the beginning of a write that left them, before the end of any later
/// one. `history`: all writes of it.
fn moments_of(sector: u64, bytes: &[u8], history: &[Entry], writer: u64) -> Moments {
    let is_zero = bytes.iter().all(|&byte| byte == 0);
    let sequence = u64::from_le_bytes(bytes[8..16].try_into().unwrap());
    let is_whole = bytes == contents(sector, 1, sequence, if sequence == 0 { 0 } else { writer });
    let mut moments = Moments::new();
    let mut earlier = |from, until| match moments.last_mut() {
        Some(later) if later.0 <= until => later.0 = from,
        _ if from <= until => moments.push((from, until)),
        _ => {}
    };
    let mut until = NEVER;
    for entry in history.iter().rev() {
        let fits = if entry.is_zero { is_zero } else { is_whole && entry.sequence == sequence };
        if fits {
            earlier(entry.asked, until);
        }
        until = until.min(entry.ended);
    }
    if is_whole && sequence == 0 {
        earlier(0, until);
    }
    moments.reverse();
    moments
}

/// Panics unless there is a moment between `from` and `to` at which the disk may have been `disk`.
pub fn prove(what: &str, disk: &[u8], layout: &Layout, journals: &[Vec<Entry>], (from, to): (u64, u64)) {
    assert_eq!(disk.len() as u64, layout.length, "{what}: length");
    let mut histories = vec![Vec::new(); layout.sectors() as usize];
    for entry in journals.iter().flatten() {
        (entry.first..entry.first + entry.count).for_each(|sector| histories[sector as usize].push(*entry));
    }
    let mut moments = vec![(from, to)];
    for (sector, bytes) in (0..layout.sectors()).zip(disk.chunks_exact(SECTOR as usize)) {
        let history = &histories[sector as usize];
        let writer = layout.owner(sector);
        let here = moments_of(sector, bytes, history, writer);
        let left = common(&moments, &here);
        if left.is_empty() {
            let words: Vec<u64> =
                bytes.chunks_exact(8).take(4).map(|w| u64::from_le_bytes(w.try_into().unwrap())).collect();
            let tail = &history[history.len().saturating_sub(8)..];
            panic!(
                "{what}: sector {sector} of writer {writer} holds {words:?}, as at {here:?}; those before it are as at \
                 {moments:?}; its last writes: {tail:?}"
            );
        }
        moments = left;
    }
    let tail = (layout.sectors() * SECTOR) as usize;
    assert!(disk[tail..].iter().all(|&byte| byte == 0xA5), "{what}: the end");
}

#[test]
fn the_proof_tells_one_moment_from_two() {
    let layout = Layout { seed: 1, length: 2 * SECTOR, stripe: 1, threads: 1 };
    let entry = |sequence, first, asked, ended| Entry { sequence, first, count: 1, is_zero: false, asked, ended };
    let journals = [vec![entry(1, 0, 10, 20), entry(2, 1, 30, 40)]];
    let disk = |a, b| [contents(0, 1, a, 0), contents(1, 1, b, 0)].concat();
    let holds = |disk: Vec<u8>, within| {
        std::panic::catch_unwind(|| prove("the copy", &disk, &layout, &journals, within)).is_ok()
    };
    for good in [disk(0, 0), disk(1, 0), disk(1, 2)] {
        assert!(holds(good, (0, 50)));
    }
    // The second write without the first; what was there before after its end; what comes later before its beginning.
    assert!(!holds(disk(0, 2), (0, 50)));
    assert!(!holds(disk(0, 0), (25, 50)));
    assert!(!holds(disk(1, 2), (0, 25)));
    let mut torn = disk(1, 2);
    torn[SECTOR as usize - 1] ^= 1;
    assert!(!holds(torn, (0, 50)));
}

#[test]
fn moments_that_touch_are_one() {
    let zeroed = |asked, ended| Entry { sequence: 1, first: 0, count: 1, is_zero: true, asked, ended };
    let written = Entry { sequence: 2, first: 0, count: 1, is_zero: false, asked: 50, ended: 60 };
    let zeroes = [0; SECTOR as usize];
    let moments = |history: &[Entry]| moments_of(0, &zeroes, history, 0);
    assert_eq!(moments(&[zeroed(10, 20), zeroed(30, 40), written]), [(10, 60)]);
    assert_eq!(moments(&[zeroed(10, 20), zeroed(30, NEVER), zeroed(35, 40)]), [(10, NEVER)]);
    assert_eq!(moments(&[zeroed(10, 20), written, zeroed(70, 80)]), [(10, 60), (70, NEVER)]);
}
