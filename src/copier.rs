//! The worker loop: gate, claim, read, release the writers, write, finish.

use crate::digest::Sums;
use crate::error::{Error, Kind, Result, Side};
use crate::ground::policy::{Action, OnError};
use crate::ground::range::{Allocation, ByteRange, Extent};
use crate::ground::zero;
use crate::hold::{self, Place};
use crate::image::Image;
use crate::job::{Gate, Job};
use crate::monitor::{Event, Monitor, Warning};
use crate::sandbox::{self, Reach};
use crate::snapshot::copy_state::Holder;
use crate::snapshot::overlay::Overlay;
use crate::snapshot::tracker::{Claim, Tracker};
use crate::snapshot::unallocated::Unallocated;
use memmap2::MmapMut;
use std::io;
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Bytes moved at once: large enough that system calls don't count, small enough to stay in a core's cache.
pub const CHUNK: u64 = 1 << 20;
/// Bytes looked at once for what needs no copying.
const SCAN: u64 = 1 << 30;
/// A chunk takes at most this part of a second at the asked speed: progress is even, a change of speed soon felt.
const CHUNKS_PER_SECOND: u64 = 16;
/// The least that the policy `ignore` gives up around a bad sector.
const SALVAGE: u64 = 4 << 10;

/// Between two looks for what writers have overwritten, where nothing else is copied.
const IDLE: Duration = Duration::from_millis(50);

/// How long after a trapped write a thread still rests, to leave a processor to those who write.
const REST: Duration = Duration::from_millis(20);
/// How often a thread that rests looks whether it is needed.
const LOOK: Duration = Duration::from_millis(2);

/// What is copied, and to where.
#[derive(Clone, Copy)]
pub struct Ends<'a> {
    /// Read from.
    pub source: &'a dyn Image,
    /// Read from where a writer came first; `None`: nobody writes.
    pub overlay: Option<&'a Overlay>,
    /// Written to.
    pub target: &'a dyn Image,
    /// Only what the source has allocated is copied; what of the overlay it had not at the instant is known here. `None`: all.
    pub unallocated: Option<&'a Unallocated>,
}

/// What stays the same during a copy.
#[derive(Clone, Copy, Debug)]
pub struct Rules {
    /// Bytes, the tracker's: claims start and end on multiples of it.
    pub granule: u64,
    /// Blocks of zero bytes of this size become holes; `None`: every byte is written.
    pub hole: Option<u64>,
    /// When a read fails.
    pub on_source_error: OnError,
    /// When a write fails.
    pub on_target_error: OnError,
    /// How long the end of `sync=none` waits for a capture under way: what was saved beside it in a granule is claimed with it.
    pub capture: Duration,
}

/// What the policy `ignore` let pass, in ascending order.
#[derive(Debug, Default)]
pub struct Losses {
    /// Source ranges that are zeroes on the target.
    pub unreadable: Vec<ByteRange>,
    /// Target ranges that were not written.
    pub skipped: Vec<ByteRange>,
}

/// What is added up while the bytes are in memory.
#[derive(Clone, Copy)]
pub struct Hashing<'a> {
    /// Gets every byte of the disk once.
    pub sums: &'a Sums,
    /// The copy ends at the first block that is not as the sums expect.
    pub stops: bool,
}

/// Moves everything that the tracker calls dirty.
pub struct Copier<'a> {
    job: &'a Job,
    monitor: &'a dyn Monitor,
    tracker: &'a Tracker,
    ends: Ends<'a>,
    rules: Rules,
    hashing: Option<Hashing<'a>>,
    reach: Reach,
    losses: Mutex<Losses>,
}

/// What a copying thread does for writers on the same machine. A low priority is none of it: a write may wait for a read that
/// a thread has begun, and on a machine that others keep busy it would wait with it.
struct Manners {
    /// One of those that rest while writes are trapped: so many others go on that a processor is left to those who
    /// write, and to those who capture for them.
    is_spare: bool,
    trapped: u64,
    rests_until: Instant,
}

impl Manners {
    fn of_thread(number: usize, processors: usize) -> Self {
        Self { is_spare: number > 0 && number + 1 >= processors, trapped: 0, rests_until: Instant::now() }
    }

    /// Whether this thread is to rest now; `trapped` writes were trapped so far.
    fn rests(&mut self, trapped: u64, now: Instant) -> bool {
        if trapped > self.trapped {
            self.trapped = trapped;
            self.rests_until = now + REST;
        }
        self.is_spare && now < self.rests_until
    }
}

fn processors() -> usize {
    thread::available_parallelism().map_or(1, usize::from)
}

/// Ends the copy, of all threads, when one of them fails or panics.
struct StopWhenDropped<'t>(&'t Tracker);

impl Drop for StopWhenDropped<'_> {
    fn drop(&mut self) {
        self.0.stop();
    }
}

/// What a claim turned out to be.
enum Found<'t> {
    Data(Claim<'t>),
    Zero(Claim<'t>),
    /// Not to be copied.
    Unallocated(Claim<'t>),
}

impl<'a> Copier<'a> {
    /// Nothing moves before [`Copier::run`].
    pub fn new(job: &'a Job, monitor: &'a dyn Monitor, tracker: &'a Tracker, ends: Ends<'a>, rules: Rules) -> Self {
        let (hashing, reach) = (None, Reach::Servers);
        Self { job, monitor, tracker, ends, rules, hashing, reach, losses: Mutex::default() }
    }

    /// The same, with sums of what is copied.
    pub fn hashing(self, hashing: Option<Hashing<'a>>) -> Self {
        Self { hashing, ..self }
    }

    /// The same, by threads that get no further than `reach`; as far as servers by default.
    pub fn within(self, reach: Reach) -> Self {
        Self { reach, ..self }
    }

    /// Copies with `workers` threads and blocks until everything is on the target, or until the first error, or
    /// until the job is cancelled. Nothing is flushed yet.
    pub fn run(self, workers: usize) -> Result<Losses> {
        let workers = if self.ends.target.properties().sequential { 1 } else { workers.max(1) };
        let copier = &self;
        let results = thread::scope(|scope| {
            // None of them is the caller's: what they give up it may need again.
            let threads: Vec<_> = (0..workers).map(|number| scope.spawn(move || copier.work(number))).collect();
            let threads = threads.into_iter().map(|thread| {
                thread.join().unwrap_or_else(|_| Err(Error::new(Kind::Other, "a copying thread panicked")))
            });
            threads.collect::<Vec<_>>()
        });
        results.into_iter().collect::<Result<()>>()?;
        self.refuse_lost()?;
        if !self.tracker.is_done() {
            return Err(Error::new(Kind::InstantLost, "the instant was given up before everything was copied"));
        }
        Ok(self.losses())
    }

    /// Moves what writers overwrite, until the job is cancelled. Then `release` lets the writers go, and what was saved for them
    /// is moved. Blocks; an error leaves the target without some of it. Nothing is flushed yet.
    pub fn run_until_cancelled(mut self, release: impl FnOnce() -> Result<()>) -> Result<Losses> {
        let moved = self.move_saved(true).and_then(|()| release()).and_then(|()| {
            // Nobody is there any more to resume it.
            self.rules.on_target_error = self.rules.on_target_error.without_stop();
            self.rules.on_source_error = self.rules.on_source_error.without_stop();
            self.move_saved(false)
        });
        moved.inspect_err(|_| self.tracker.stop())?;
        Ok(self.losses())
    }

    /// What is saved, and what will be as long as the job `waits`.
    fn move_saved(&self, waits: bool) -> Result<()> {
        let mut buffer = self.buffer()?;
        let mut since = Instant::now();
        while !waits || self.job.gate() == Gate::Go {
            match self.tracker.claim_saved(self.chunk()) {
                Some(claim) => {
                    self.copy(claim, &mut buffer)?;
                    since = Instant::now();
                }
                None if waits && !self.tracker.is_stopped() => self.job.rest(IDLE),
                None if !waits && self.tracker.keeps_saved() && since.elapsed() < self.rules.capture => {
                    thread::sleep(LOOK)
                }
                None => break,
            }
        }
        self.refuse_lost()?;
        if !waits && self.tracker.keeps_saved() {
            let what = "a capture hangs, and with it what was saved beside it can't be copied";
            return Err(Error::new(Kind::InstantLost, what));
        }
        match self.tracker.is_stopped() || waits && !self.job.is_cancelled() {
            true => Err(Error::new(Kind::InstantLost, "the instant was given up")),
            false => Ok(()),
        }
    }

    fn refuse_lost(&self) -> Result<()> {
        match self.tracker.is_lost() {
            true => Err(Error::new(Kind::InstantLost, "a copy failed after its source had been released to a writer")),
            false => Ok(()),
        }
    }

    fn losses(self) -> Losses {
        let mut losses = self.losses.into_inner().unwrap_or_else(PoisonError::into_inner);
        merge(&mut losses.unreadable);
        merge(&mut losses.skipped);
        losses
    }

    fn work(&self, number: usize) -> Result<()> {
        // The number of processors stands in files.
        let manners = Manners::of_thread(number, processors());
        sandbox::enter(self.reach);
        let stop = StopWhenDropped(self.tracker);
        self.work_until_done(manners).inspect(|()| std::mem::forget(stop))
    }

    fn work_until_done(&self, mut manners: Manners) -> Result<()> {
        let mut buffer = self.buffer()?;
        loop {
            if self.job.gate() == Gate::Cancelled {
                return Err(cancelled());
            }
            if manners.rests(self.tracker.trapped(), Instant::now()) && self.tracker.dirty_bytes() > 0 {
                thread::sleep(LOOK);
                continue;
            }
            match self.next() {
                Some(Found::Zero(claim)) => self.skip(claim, &buffer)?,
                Some(Found::Data(claim)) => self.copy(claim, &mut buffer)?,
                Some(Found::Unallocated(claim)) => self.pass(claim),
                None => return Ok(()),
            }
        }
    }

    fn buffer(&self) -> Result<MmapMut> {
        MmapMut::map_anon(CHUNK.max(self.rules.granule) as usize)
            .map_err(|error| Error::new(Kind::Other, format!("no memory for a copy buffer: {error}")))
    }

    /// Claims the next run of one kind: a chunk of data, or any length of zeroes.
    fn next(&self) -> Option<Found<'a>> {
        let mut claim = self.tracker.claim_next(self.chunk())?;
        let mut extent = self.extent(&claim);
        if extent.allocation != Allocation::Data && extent.range.length == claim.range().length {
            // Nobody waits for a run of zeroes for long, so it may be large.
            claim.grow(SCAN);
            let (first, holder) = claim.first_piece();
            let grown = self.status(first, holder);
            // Whoever writes there, with or without our leave, may have made it data meanwhile.
            if grown.allocation == extent.allocation && grown.range.length > extent.range.length {
                extent = grown;
            }
        }
        let whole = extent.range.length / self.rules.granule * self.rules.granule;
        let is_all = extent.range.end() == claim.range().end();
        if extent.allocation == Allocation::Data || !is_all && whole == 0 {
            return Some(Found::Data(self.cut(claim, extent.range.length)));
        }
        if !is_all {
            claim.shrink(whole);
        }
        match (extent.allocation, self.ends.unallocated) {
            (Allocation::Unallocated, Some(_)) => Some(Found::Unallocated(claim)),
            _ => Some(Found::Zero(claim)),
        }
    }

    /// The first extent of a claim. What is not to be copied goes on from holder to holder, since one granule may have both.
    fn extent(&self, claim: &Claim<'_>) -> Extent {
        let (first, holder) = claim.first_piece();
        let mut extent = self.status(first, holder);
        let passes = extent.allocation == Allocation::Unallocated && self.ends.unallocated.is_some();
        if !passes || extent.range.end() < first.end() {
            return extent;
        }
        for (piece, holder) in claim.pieces().into_iter().skip(1) {
            let next = self.status(piece, holder);
            if next.allocation != Allocation::Unallocated {
                break;
            }
            extent.range.length += next.range.length;
            if next.range.end() < piece.end() {
                break;
            }
        }
        extent
    }

    /// Keeps `length` bytes of a claim, rounded up to whole granules.
    fn cut<'t>(&self, mut claim: Claim<'t>, length: u64) -> Claim<'t> {
        let length = length.next_multiple_of(self.rules.granule);
        if length < claim.range().length {
            claim.shrink(length);
        }
        claim
    }

    /// Where the status can't be told, reading will tell what is wrong.
    fn status(&self, range: ByteRange, holder: Holder) -> Extent {
        if holder == Holder::Overlay {
            return self.ends.unallocated.map_or(Extent::data(range), |unallocated| unallocated.status(range));
        }
        self.ends.source.block_status(range).unwrap_or(Extent::data(range.prefix(self.rules.granule)))
    }

    /// Bytes to move at once, at the speed asked for now.
    fn chunk(&self) -> u64 {
        let granule = self.rules.granule;
        let most = self.job.speed().map_or(CHUNK, |rate| CHUNK.min(rate / CHUNKS_PER_SECOND));
        (most / granule * granule).max(granule)
    }

    /// A run that reads as zeroes on the source.
    fn skip(&self, mut claim: Claim<'_>, zeroes: &MmapMut) -> Result<()> {
        let range = claim.range();
        claim.source_read();
        self.hash(range, |sums| sums.add_zeroes(range))?;
        if self.rules.hole.is_some() {
            self.write_zeroes(range)?;
        } else {
            // The buffer may hold old data: zeroes are written from a fresh one, whose pages cost nothing.
            let fresh = MmapMut::map_anon(zeroes.len()).map_err(|e| Error::io(Side::Target, "write", range, e))?;
            let mut at = range;
            while !at.is_empty() {
                let piece = at.prefix(fresh.len() as u64);
                self.write(&fresh[..piece.length as usize], piece)?;
                at = ByteRange::between(piece.end(), range.end());
            }
        }
        self.land(claim);
        self.job.count_zero(range.length);
        Ok(())
    }

    /// A run that the target's backing file answers for.
    fn pass(&self, mut claim: Claim<'_>) {
        let range = claim.range();
        claim.source_read();
        self.land(claim);
        self.job.count_zero(range.length);
    }

    fn copy(&self, mut claim: Claim<'_>, buffer: &mut [u8]) -> Result<()> {
        let range = claim.range();
        let bytes = &mut buffer[..range.length as usize];
        for (piece, holder) in claim.pieces() {
            let at = (piece.offset - range.offset) as usize;
            let bytes = &mut bytes[at..at + piece.length as usize];
            match (holder, self.ends.overlay) {
                // What the overlay loses is lost, whatever the policy: the source has moved on.
                (Holder::Overlay, Some(overlay)) => {
                    overlay.read_at(bytes, piece.offset).map_err(|e| Error::io(Side::Overlay, "read", piece, e))?;
                }
                _ => {
                    if let Some(error) = self.read(bytes, piece)? {
                        // Given back: nobody's write waits for whoever resumes the job.
                        return self.stop_for(&error, || drop(claim));
                    }
                }
            }
        }
        claim.source_read();
        hold::at(Place::Copying);
        self.hash(range, |sums| sums.add(range.offset, bytes))?;
        let (mut data, mut zero) = (0, 0);
        let block = self.rules.hole.unwrap_or(range.length) as usize;
        for (run, is_zero) in zero::runs(bytes, block) {
            let at = ByteRange::new(range.offset + run.start as u64, run.len() as u64);
            if is_zero && self.rules.hole.is_some() {
                self.write_zeroes(at)?;
                zero += at.length;
            } else {
                self.write(&bytes[run], at)?;
                data += at.length;
            }
        }
        self.land(claim);
        self.job.charge(data);
        self.job.count_data(data);
        self.job.count_zero(zero);
        Ok(())
    }

    /// Before the target gets the bytes: what is known to be wrong need not go there.
    fn hash(&self, range: ByteRange, add: impl FnOnce(&Sums) -> bool) -> Result<()> {
        let Some(Hashing { sums, stops }) = self.hashing else { return Ok(()) };
        if add(sums) || !stops {
            return Ok(());
        }
        let differing = sums.differences();
        let first = differing.first().copied().unwrap_or(range);
        Err(Error::differs(format!("the source differs from its manifest at {first}"), differing))
    }

    /// The target has it; the overlay need not keep it.
    fn land(&self, claim: Claim<'_>) {
        let saved = claim.finish(true);
        if let Some(overlay) = self.ends.overlay {
            saved.into_iter().for_each(|range| overlay.drop_range(range));
        }
    }

    /// `Some`: for what the job is to stop.
    fn read(&self, bytes: &mut [u8], range: ByteRange) -> Result<Option<Error>> {
        self.with_policy(Side::Source, "read", self.rules.on_source_error, range, |piece| {
            let at = (piece.offset - range.offset) as usize;
            let bytes = &mut bytes[at..at + piece.length as usize];
            // What is ignored reads as zeroes, whatever a failed read has left in the buffer.
            self.ends.source.read_at(bytes, piece.offset).inspect_err(|_| bytes.fill(0))
        })
    }

    fn write(&self, bytes: &[u8], range: ByteRange) -> Result<()> {
        self.with_policy(Side::Target, "write", self.rules.on_target_error, range, |piece| {
            let at = (piece.offset - range.offset) as usize;
            self.ends.target.write_at(&bytes[at..at + piece.length as usize], piece.offset)
        })?;
        Ok(())
    }

    fn write_zeroes(&self, range: ByteRange) -> Result<()> {
        if self.ends.target.properties().reads_zero {
            return Ok(());
        }
        self.with_policy(Side::Target, "write zeroes to", self.rules.on_target_error, range, |piece| {
            self.ends.target.write_zeroes(piece)
        })?;
        Ok(())
    }

    /// Until somebody resumes the job; `stopped` is called when the others stand still too.
    fn stop_for(&self, error: &Error, stopped: impl FnOnce()) -> Result<()> {
        let tell = || {
            stopped();
            self.monitor.event(Event::Fault { error, action: Action::Stop });
        };
        match self.job.stop_for_error(tell) {
            Gate::Cancelled => Err(cancelled()),
            Gate::Go => Ok(()),
        }
    }

    /// Does I/O on `range`, again while the policy says so. The one place that decides about a background error. A job that is
    /// to stop for one of the target does so here, with the bytes that nobody else may hold any more; for one of the source it is
    /// returned, since the claim is to be given back first.
    fn with_policy(
        &self,
        side: Side,
        during: &'static str,
        policy: OnError,
        range: ByteRange,
        mut io: impl FnMut(ByteRange) -> io::Result<()>,
    ) -> Result<Option<Error>> {
        let salvage = SALVAGE.max(if side == Side::Target { self.rules.granule } else { 0 });
        let mut left = range;
        // Whole first; once it failed under `ignore`, bit by bit, to give up no more than is bad.
        let mut step = range.length;
        while !left.is_empty() {
            let piece = left.prefix(step);
            if let Err(error) = io(piece) {
                let full = error.raw_os_error() == Some(nix::libc::ENOSPC);
                let action = policy.action(full);
                if action == Action::Ignore && step > salvage {
                    step = salvage;
                    continue;
                }
                let error = Error::io(side, during, piece, error);
                self.job.count_error();
                let tell = || self.monitor.event(Event::Fault { error: &error, action });
                match action {
                    Action::Stop if side == Side::Source => return Ok(Some(error)),
                    Action::Stop => {
                        self.stop_for(&error, || {})?;
                        continue;
                    }
                    Action::Report => {
                        tell();
                        return Err(error);
                    }
                    Action::Ignore => {
                        tell();
                        self.give_up(side, piece, &error);
                    }
                }
            }
            left = ByteRange::between(piece.end(), range.end());
        }
        Ok(None)
    }

    fn give_up(&self, side: Side, range: ByteRange, error: &Error) {
        let mut losses = self.losses.lock().unwrap_or_else(PoisonError::into_inner);
        let (code, list, message) = match side {
            Side::Target => ("skipped_range", &mut losses.skipped, format!("target range {range} was skipped")),
            _ => ("unreadable_range", &mut losses.unreadable, format!("source range {range} was zero-filled")),
        };
        list.push(range);
        drop(losses);
        self.monitor.event(Event::Warning(&Warning { code, range: Some(range), errno: error.errno(), message }));
    }
}

fn cancelled() -> Error {
    Error::new(Kind::Cancelled, "cancelled")
}

/// Sorts ranges and joins neighbours.
fn merge(ranges: &mut Vec<ByteRange>) {
    ranges.sort_by_key(|range| range.offset);
    ranges.dedup_by(|next, before| {
        let adjacent = before.end() == next.offset;
        if adjacent {
            before.length += next.length;
        }
        adjacent
    });
}

#[cfg(test)]
mod tests;
