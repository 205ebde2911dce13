//! Changes while a flush waits for the disk.

use super::*;
use std::sync::atomic::{AtomicBool, Ordering::SeqCst};
use std::sync::{OnceLock, Weak};

/// A disk in memory on which, whenever a flush waits without the image's lock, the image is changed meanwhile.
struct Meddled {
    disk: MemoryDisk,
    image: OnceLock<Weak<ExistingQcow2>>,
    /// `None` while it is in use: changes may flush, too.
    guest: Mutex<Option<Guest>>,
}

/// What is changed, and what it must be then.
struct Guest {
    random: Random,
    model: Vec<u8>,
    /// The length of the log before each change.
    changes: Vec<(usize, ByteRange)>,
}

impl Guest {
    fn below(&mut self, end: u64) -> u64 {
        (0..20).fold(0, |bits, _| bits << 1 | u64::from(self.random.coin())) % end
    }

    fn change(&mut self, image: &ExistingQcow2, began: usize) {
        let length = self.model.len() as u64;
        let offset = self.below(length);
        let range = ByteRange::new(offset, 1 + self.below(4000)).intersect(ByteRange::new(0, length));
        self.changes.push((began, range));
        let part = &mut self.model[range.offset as usize..range.end() as usize];
        if self.random.coin() && self.random.coin() {
            part.fill(0);
            image.write_zeroes(range).unwrap();
        } else {
            part.copy_from_slice(&contents(began as u64, range.length as usize, 700));
            image.write_at(part, range.offset).unwrap();
        }
    }
}

impl Meddled {
    fn meddle(&self) {
        let Some(image) = self.image.get().and_then(Weak::upgrade) else { return };
        // Held, it is a commit: nobody else gets in.
        let is_free = image.state.try_lock().is_ok();
        let Some(mut guest) = self.guest.lock().unwrap().take_if(|_| is_free) else { return };
        for _ in 0..guest.below(4) {
            guest.change(&image, self.disk.log().len());
        }
        if guest.random.coin() {
            // As when the tables in memory are too many.
            image.state().commit().unwrap();
            (0..guest.below(3)).for_each(|_| guest.change(&image, self.disk.log().len()));
        }
        *self.guest.lock().unwrap() = Some(guest);
    }
}

impl Image for Meddled {
    fn length(&self) -> u64 {
        self.disk.length()
    }

    fn block_status(&self, range: ByteRange) -> io::Result<Extent> {
        self.disk.block_status(range)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.disk.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.disk.write_at(buf, offset)
    }

    fn write_zeroes(&self, range: ByteRange) -> io::Result<()> {
        self.disk.write_zeroes(range)
    }

    fn discard(&self, range: ByteRange) -> io::Result<()> {
        self.disk.discard(range)
    }

    fn flush(&self) -> io::Result<()> {
        self.meddle();
        self.disk.flush()?;
        self.meddle();
        Ok(())
    }

    fn properties(&self) -> Properties {
        self.disk.properties()
    }
}

/// A disk in memory on which, while the first flush waits, another change needs room, and a commit for it fails.
struct Full {
    disk: MemoryDisk,
    image: OnceLock<Weak<ExistingQcow2>>,
    is_full: AtomicBool,
}

impl Full {
    fn fill(&self) {
        let Some(image) = self.image.get().and_then(Weak::upgrade) else { return };
        if self.is_full.load(SeqCst) || image.state.try_lock().is_err() {
            return;
        }
        image.write_at(&[2; 512], 40 << 10).unwrap();
        self.is_full.store(true, SeqCst);
        assert!(image.state().commit().is_err());
        self.is_full.store(false, SeqCst);
    }
}

impl Image for Full {
    fn length(&self) -> u64 {
        self.disk.length()
    }

    fn block_status(&self, range: ByteRange) -> io::Result<Extent> {
        self.disk.block_status(range)
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.disk.read_at(buf, offset)
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        if self.is_full.load(SeqCst) { Err(io::ErrorKind::StorageFull.into()) } else { self.disk.write_at(buf, offset) }
    }

    fn write_zeroes(&self, range: ByteRange) -> io::Result<()> {
        self.disk.write_zeroes(range)
    }

    fn discard(&self, range: ByteRange) -> io::Result<()> {
        self.disk.discard(range)
    }

    fn flush(&self) -> io::Result<()> {
        if self.disk.log().iter().all(|operation| *operation != Operation::Flush) {
            self.fill();
        }
        self.disk.flush()
    }

    fn properties(&self) -> Properties {
        self.disk.properties()
    }
}

/// The commit has taken the tables of the flush for its own, and has not written them.
#[test]
fn a_flush_beside_a_commit_that_fails_still_holds() {
    let bench = Bench::new(Shape { cluster_bits: 9, options: "compat=1.1", base: Base::Empty, length: 60 << 10 });
    let disk = MemoryDisk::of(bench.start.clone());
    let full = Arc::new(Full { disk, image: OnceLock::new(), is_full: AtomicBool::new(false) });
    let image = Arc::new(ExistingQcow2::load(full.clone(), None).unwrap());
    full.image.set(Arc::downgrade(&image)).unwrap();
    image.write_at(&[1; 1024], 0).unwrap();
    image.flush().unwrap();
    let log = full.disk.log();
    let file = crashed(&bench.start, &log, log.len(), || false);
    assert_eq!(counted_well(&file), Ok(()));
    let after = ExistingQcow2::load(Arc::new(MemoryDisk::of(file)), None).unwrap();
    let mut bytes = [0; 1024];
    after.read_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes, [1; 1024], "what was flushed");
}

/// How the image was when a flush began that ended when the log was so long, and how many changes there had been.
type Flushed = (usize, Vec<u8>, usize);

fn run(seed: u64, bench: &Bench) -> (Vec<Operation>, Vec<Flushed>, Guest, Arc<Meddled>) {
    let guest = Guest { random: Random(seed), model: bench.model.clone(), changes: Vec::new() };
    let disk = MemoryDisk::of(bench.start.clone());
    let meddled = Arc::new(Meddled { disk, image: OnceLock::new(), guest: Mutex::new(Some(guest)) });
    let image = Arc::new(ExistingQcow2::load(meddled.clone(), bench.backing.clone()).unwrap());
    meddled.image.set(Arc::downgrade(&image)).unwrap();
    let mut flushed = vec![(0, bench.model.clone(), 0)];
    for _ in 0..6 {
        meddled.meddle();
        let (model, changes) = {
            let guest = meddled.guest.lock().unwrap();
            let guest = guest.as_ref().unwrap();
            (guest.model.clone(), guest.changes.len())
        };
        image.flush().unwrap();
        flushed.push((meddled.disk.log().len(), model, changes));
    }
    let guest = meddled.guest.lock().unwrap().take().unwrap();
    image.flush().unwrap();
    (meddled.disk.log(), flushed, guest, meddled)
}

#[test]
fn a_crash_during_a_flush_that_others_write_beside_leaves_at_worst_leaks() {
    for base in [Base::Plain, Base::Compressed, Base::Backing, Base::Empty] {
        for seed in 0..4 {
            let shape = Shape { cluster_bits: 9, options: "compat=1.1", base, length: 60 << 10 };
            let bench = Bench::new(shape);
            let (log, flushed, guest, meddled) = run(seed * 7 + 1, &bench);
            let mut random = Random(seed);
            for cut in 0..=log.len() {
                let file = crashed(&bench.start, &log, cut, || random.coin());
                assert_eq!(counted_well(&file), Ok(()), "{base:?}, seed {seed}: crash at {cut}");
                if random.coin() {
                    continue;
                }
                let (_, model, changes) = flushed.iter().rev().find(|(length, ..)| *length <= cut).unwrap();
                let mut untouched = vec![true; model.len()];
                for (_, range) in guest.changes[*changes..].iter().filter(|(began, _)| *began <= cut) {
                    untouched[range.offset as usize..range.end() as usize].fill(false);
                }
                let found = bench.read_all(file);
                let wrong = (0..found.len()).find(|&at| untouched[at] && found[at] != model[at]);
                assert_eq!(wrong, None, "{base:?}, seed {seed}: crash at {cut}: flushed bytes changed");
            }
            assert!(bench.read_all(meddled.disk.bytes()) == guest.model, "{base:?}, seed {seed}");
        }
    }
}
