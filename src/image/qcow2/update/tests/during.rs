//! Changes while a flush waits for the disk.

use super::*;
use std::sync::{OnceLock, Weak};

/// A disk in memory on which, whenever a flush waits without the image's lock, the image is changed meanwhile.
struct Meddled<M> {
    disk: MemoryDisk,
    image: OnceLock<Weak<ExistingQcow2>>,
    /// `None` while it is in use: changes may flush, too.
    meddler: Mutex<Option<M>>,
}

trait Meddler: Send {
    fn meddle(&mut self, image: &ExistingQcow2, disk: &MemoryDisk);
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

impl Meddler for Guest {
    fn meddle(&mut self, image: &ExistingQcow2, disk: &MemoryDisk) {
        for _ in 0..self.below(4) {
            self.change(image, disk.log().len());
        }
        if self.random.coin() {
            // As when the tables in memory are too many.
            image.state().commit().unwrap();
            (0..self.below(3)).for_each(|_| self.change(image, disk.log().len()));
        }
    }
}

/// While the first flush waits it changes something else, and a commit that needs room fails.
struct Full {
    is_over: bool,
}

impl Meddler for Full {
    fn meddle(&mut self, image: &ExistingQcow2, disk: &MemoryDisk) {
        if !std::mem::replace(&mut self.is_over, true) {
            image.write_at(&[2; 512], 40 << 10).unwrap();
            disk.fail_from(Some(disk.log().len()));
            assert!(image.state().commit().is_err());
            disk.fail_from(None);
        }
    }
}

impl<M: Meddler> Meddled<M> {
    /// And the image on it.
    fn beside(bench: &Bench, meddler: M) -> (Arc<ExistingQcow2>, Arc<Self>)
    where
        M: 'static,
    {
        let (disk, meddler) = (MemoryDisk::of(bench.start.clone()), Mutex::new(Some(meddler)));
        let meddled = Arc::new(Self { disk, image: OnceLock::new(), meddler });
        let image = Arc::new(ExistingQcow2::load(meddled.clone(), bench.backing.clone()).unwrap());
        meddled.image.set(Arc::downgrade(&image)).unwrap();
        (image, meddled)
    }

    fn meddle(&self) {
        let Some(image) = self.image.get().and_then(Weak::upgrade) else { return };
        // Held, it is a commit: nobody else gets in.
        let is_free = image.state.try_lock().is_ok();
        let Some(mut meddler) = self.meddler.lock().unwrap().take_if(|_| is_free) else { return };
        meddler.meddle(&image, &self.disk);
        *self.meddler.lock().unwrap() = Some(meddler);
    }
}

impl<M: Meddler> Image for Meddled<M> {
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

/// The commit has taken the tables of the flush for its own, and has not written them.
#[test]
fn a_flush_beside_a_commit_that_fails_still_holds() {
    let bench = Bench::new(Shape { cluster_bits: 9, options: "compat=1.1", base: Base::Empty, length: 60 << 10 });
    let (image, full) = Meddled::beside(&bench, Full { is_over: false });
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

fn run(seed: u64, bench: &Bench) -> (Vec<Operation>, Vec<Flushed>, Guest, Arc<Meddled<Guest>>) {
    let guest = Guest { random: Random(seed), model: bench.model.clone(), changes: Vec::new() };
    let (image, meddled) = Meddled::beside(bench, guest);
    let mut flushed = vec![(0, bench.model.clone(), 0)];
    for _ in 0..6 {
        meddled.meddle();
        let (model, changes) = {
            let guest = meddled.meddler.lock().unwrap();
            let guest = guest.as_ref().unwrap();
            (guest.model.clone(), guest.changes.len())
        };
        image.flush().unwrap();
        flushed.push((meddled.disk.log().len(), model, changes));
    }
    let guest = meddled.meddler.lock().unwrap().take().unwrap();
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
