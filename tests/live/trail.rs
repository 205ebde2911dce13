//! A disk that is written in an order that its contents tell: write N goes to a block that follows from N alone. So the
//! highest number in a copy says what every other block must hold, if the copy is the disk of one instant.

use crate::kit::{HANGS, contents, scramble};
use drive_backup::writer::Writer;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Bytes that are written at once; the cluster of a disk of this size.
pub const BLOCK: u64 = 4096;
/// On the disk.
pub const BLOCKS: u64 = 128;

fn place(number: u64) -> u64 {
    scramble(number) % BLOCKS * BLOCK
}

fn block(number: u64) -> Vec<u8> {
    contents(number, place(number), BLOCK)
}

/// Makes the disk, written by nobody yet.
pub fn create(disk: &Path) {
    std::fs::write(disk, vec![0; (BLOCKS * BLOCK) as usize]).unwrap();
}

/// The last write on a disk; panics unless it is as it was after that one and before the next.
#[track_caller]
pub fn check(disk: &[u8]) -> u64 {
    assert_eq!(disk.len() as u64, BLOCKS * BLOCK);
    let number = |at: usize| u64::from_le_bytes(disk[at..at + 8].try_into().unwrap());
    let numbers: Vec<u64> = (0..BLOCKS).map(|at| number((at * BLOCK) as usize)).collect();
    for (at, &number) in (0_u64..).zip(&numbers) {
        let bytes = &disk[(at * BLOCK) as usize..][..BLOCK as usize];
        let expected = if number == 0 { vec![0; BLOCK as usize] } else { block(number) };
        assert!(bytes == expected, "block {at} is torn, or not where it was written: it begins with {number}");
    }
    let last = numbers.iter().copied().max().unwrap();
    let (mut expected, mut left) = (vec![0; BLOCKS as usize], BLOCKS);
    for number in (1..=last).rev() {
        let block = &mut expected[(place(number) / BLOCK) as usize];
        if *block == 0 {
            *block = number;
            left -= 1;
        }
        if left == 0 {
            break;
        }
    }
    assert_eq!(numbers, expected, "not the disk after write {last}");
    last
}

/// The last write on a disk that nobody writes.
pub fn last(disk: &File) -> u64 {
    let mut word = [0; 8];
    let numbers = (0..BLOCKS).map(|at| {
        disk.read_exact_at(&mut word, at * BLOCK).unwrap();
        u64::from_le_bytes(word)
    });
    numbers.max().unwrap()
}

/// Writes number `number` in a bracket.
pub fn write(writer: &Writer, disk: &File, number: u64) -> std::io::Result<()> {
    let _bracket = writer.begin(place(number), BLOCK)?;
    disk.write_all_at(&block(number), place(number))
}

/// Someone who writes as fast as he can, and tries again what fails.
pub struct Typist {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Shared {
    written: AtomicU64,
    stop: AtomicBool,
    failures: Mutex<Vec<i32>>,
    /// Milliseconds.
    longest: AtomicU64,
}

impl Typist {
    /// On the disk at `disk`, found in `folder`.
    pub fn start(disk: &Path, folder: &Path) -> Self {
        let writer = Writer::open_in(disk, folder).unwrap();
        Self::with(writer, disk)
    }

    pub fn with(writer: Writer, disk: &Path) -> Self {
        let disk = OpenOptions::new().read(true).write(true).open(disk).unwrap();
        let shared = Arc::new(Shared::default());
        shared.written.store(last(&disk), SeqCst);
        let theirs = shared.clone();
        let thread = std::thread::spawn(move || {
            while !theirs.stop.load(SeqCst) {
                let since = Instant::now();
                let done = write(&writer, &disk, theirs.written.load(SeqCst) + 1);
                theirs.longest.fetch_max(since.elapsed().as_millis() as u64, SeqCst);
                match done {
                    Ok(()) => drop(theirs.written.fetch_add(1, SeqCst)),
                    Err(error) => theirs.failures.lock().unwrap().push(error.raw_os_error().unwrap_or(0)),
                }
            }
        });
        let typist = Self { shared, thread: Some(thread) };
        typist.goes_on(10);
        typist
    }

    /// The last write that was done.
    pub fn written(&self) -> u64 {
        self.shared.written.load(SeqCst)
    }

    /// Waits until `writes` more are done.
    #[track_caller]
    pub fn goes_on(&self, writes: u64) {
        let (from, since) = (self.written(), Instant::now());
        while self.written() < from + writes {
            assert!(since.elapsed() < HANGS, "the writer does not go on");
            std::thread::yield_now();
        }
    }

    /// How long a write took at most.
    #[allow(dead_code)] // for the fault sweep
    pub fn longest(&self) -> Duration {
        Duration::from_millis(self.shared.longest.load(SeqCst))
    }

    /// Ends it; the last write that was done.
    #[allow(dead_code)] // for the fault sweep
    pub fn end(self) -> u64 {
        let shared = self.shared.clone();
        drop(self);
        shared.written.load(SeqCst)
    }

    /// The errors of writes that failed so far.
    pub fn failures(&self) -> Vec<i32> {
        self.shared.failures.lock().unwrap().clone()
    }
}

impl Drop for Typist {
    fn drop(&mut self) {
        self.shared.stop.store(true, SeqCst);
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
            && !std::thread::panicking()
        {
            panic!("the writer panicked");
        }
    }
}
