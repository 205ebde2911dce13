//! What proves a copy: sums of what went by, the target read back, the manifest.

use super::Disk;
use super::destination::Destination;
use super::instant::Moment;
use super::origin::Origin;
use super::reach;
use crate::copier::{Hashing, Losses};
use crate::digest::{BLOCK, Digest, Found, Summed, Sums, ranges};
use crate::error::{Error, Kind, Result, Side};
use crate::ground::range::ByteRange;
use crate::ground::size::Bytes;
use crate::ground::status::Phase;
use crate::hold::{self, Place};
use crate::job::Gate;
use crate::manifest::{Contents, End, Manifest, PathName, Story, Taken, rfc3339};
use crate::monitor::Instant;
use crate::scan::{Scan, Scanned};
use std::path::Path;
use std::sync::Arc;
use std::thread;

/// Pieces of blocks that may wait for the flush: 64 MiB of them.
const MOST_DEFERRED: usize = 1 << 20;

/// What is proved of a copy, and how.
pub struct Proof {
    /// `None`: nothing is asked for.
    sums: Option<Sums>,
    /// What a manifest says of the source.
    expected: Option<Contents>,
    stops: bool,
}

/// What the copy holds.
pub struct Proven {
    digest: Option<Arc<Digest>>,
    /// BLAKE3 of the whole; `None`: nobody asked.
    pub whole: Option<blake3::Hash>,
}

impl Proof {
    /// For a disk that begins, whose manifest, if it is to have one, said `expected`.
    pub fn of(disk: Disk<'_>, length: u64, expected: Option<Contents>, moment: &Moment) -> Self {
        let proof = &disk.options.proof;
        let is_wanted = proof.verify || proof.manifest.is_some() || expected.is_some();
        // What the file system has cloned is read later.
        let sums = (is_wanted && !moment.is_on_target()).then(|| match &expected {
            Some(contents) => Sums::new(length, Some(Arc::new(contents.digest.clone()))),
            // The processors are idle while the target is flushed: zeroes can be hashed then.
            None if disk.options.fsync => Sums::deferring(length, MOST_DEFERRED),
            None => Sums::new(length, None),
        });
        // Who only compares wants to know all that differs; who writes must not go on with it.
        Self { sums, expected, stops: disk.options.target.is_somewhere() }
    }

    /// For the copier.
    pub fn hashing(&self) -> Option<Hashing<'_>> {
        self.sums.as_ref().map(|sums| Hashing { sums, stops: self.stops })
    }

    /// After the copy: the sums as they should be, on stable storage, and read back from there.
    pub fn complete(self, disk: Disk<'_>, destination: &Destination, losses: &Losses) -> Result<Proven> {
        let Disk { options, .. } = disk;
        let wants_whole = options.proof.manifest.is_some();
        let summed = self.sums.map(|sums| sums.finish().ok_or_else(|| Error::new(Kind::Other, "a block has no sum")));
        let summed = summed.transpose()?;
        if let (Some(summed), Some(expected)) = (&summed, &self.expected) {
            compare(disk, summed, losses)?;
            debug_assert_eq!(summed.length(), expected.digest.length());
        }
        // The processors are idle while the disk works.
        let (flushed, found) = thread::scope(|scope| {
            let found = scope.spawn(|| summed.map(|summed| hash_rest(disk, summed, wants_whole)));
            (destination.flush(), found.join())
        });
        flushed?;
        let found = found.map_err(|_| Error::new(Kind::Other, "a hashing thread panicked"))?;
        let (mut digest, mut whole) = found.transpose()?.map_or((None, None), |(digest, whole)| (Some(digest), whole));
        if options.proof.verify {
            let expected = digest.clone().ok_or_else(|| Error::new(Kind::Other, "nothing was summed up"))?;
            read_back(disk, destination, expected, losses)?;
        } else if wants_whole && digest.is_none() {
            let found = of_clone(disk, destination)?;
            whole = Some(whole_of(disk, &found).ok_or_else(cancelled)?);
            digest = Some(Arc::new(found.digest));
        }
        Ok(Proven { digest, whole: whole.or(self.expected.map(|expected| expected.whole)) })
    }
}

/// What was put off, and BLAKE3 of the whole if it is wanted.
fn hash_rest(disk: Disk<'_>, summed: Summed, wants_whole: bool) -> Result<(Arc<Digest>, Option<blake3::Hash>)> {
    let go_on = || disk.job.gate() == Gate::Go;
    let found = summed.found(disk.options.workers, &go_on).ok_or_else(cancelled)?;
    let whole = wants_whole.then(|| whole_of(disk, &found).ok_or_else(cancelled)).transpose()?;
    Ok((Arc::new(found.digest), whole))
}

fn cancelled() -> Error {
    Error::new(Kind::Cancelled, "cancelled")
}

/// BLAKE3 of the whole; `None` when the job was cancelled.
fn whole_of(disk: Disk<'_>, found: &Found) -> Option<blake3::Hash> {
    let go_on = || disk.job.gate() == Gate::Go;
    found.whole.or_else(|| found.digest.whole(disk.options.workers, &go_on))
}

/// What was read, with what its manifest says.
fn compare(disk: Disk<'_>, summed: &Summed, losses: &Losses) -> Result<()> {
    let lost = losses.unreadable.iter().flat_map(|range| range.offset / BLOCK..range.end().div_ceil(BLOCK));
    let differing = ranges(summed.length(), summed.differing().iter().copied().chain(lost));
    if differing.is_empty() {
        return Ok(());
    }
    let manifest = disk.options.proof.expected.as_deref().unwrap_or(Path::new(""));
    let what = format!("'{}' differs from manifest '{}'", disk.options.device, manifest.display());
    Err(differs(&what, differing))
}

/// Reads the target from its medium, and compares it with what was written.
fn read_back(disk: Disk<'_>, destination: &Destination, expected: Arc<Digest>, losses: &Losses) -> Result<()> {
    let Disk { options, job, monitor } = disk;
    job.enter(Phase::Verify);
    hold::at(Place::Verifying);
    let what = format!("target '{}' read back differs from what was written to it", destination.name().display());
    let length = expected.length();
    let image = destination.read_back(disk).map_err(|error| match error.kind() {
        Kind::Cancelled => error,
        _ => Error::differs(format!("{what}: {error}"), Vec::new()),
    })?;
    if image.length() < length {
        let what = format!("{what}: it has {} bytes, not {length}", image.length());
        return Err(Error::differs(what, Vec::new()));
    }
    let reach = reach::of_target(destination);
    let scan = Scan { job, monitor, image: image.as_ref(), side: Side::Target, reach };
    let Scanned { found, unreadable } = scan.run(length, Some(expected), options.workers)?;
    // What was given up is known not to be there, and told of otherwise.
    let skipped = |block: &u64| {
        let block = ByteRange::between(block * BLOCK, (block * BLOCK).saturating_add(BLOCK).min(length));
        losses.skipped.iter().any(|range| !range.intersect(block).is_empty())
    };
    let bad = found.differing.into_iter().chain(unreadable).filter(|block| !skipped(block));
    let differing = ranges(length, bad);
    if differing.is_empty() { Ok(()) } else { Err(differs(&what, differing)) }
}

/// A clone's bytes were never in our hands: what the file system made is read.
fn of_clone(disk: Disk<'_>, destination: &Destination) -> Result<Found> {
    let Disk { options, job, monitor } = disk;
    job.enter(Phase::Verify);
    let image = destination.image();
    let scan = Scan { job, monitor, image, side: Side::Target, reach: reach::of_target(destination) };
    let Scanned { found, unreadable } = scan.run(image.length(), None, options.workers)?;
    match ranges(image.length(), unreadable).first() {
        None => Ok(found),
        Some(first) => Err(Error::new(Kind::Target, format!("target can't be read for its manifest at {first}"))),
    }
}

/// In one line; the ranges are in the error.
fn differs(what: &str, differing: Vec<ByteRange>) -> Error {
    let bytes = Bytes(differing.iter().map(|range| range.length).sum());
    let line = match differing.as_slice() {
        [range] => format!("{what} at {range}"),
        [first, ..] => format!("{what} in {} ranges, {bytes}, first at {first}", differing.len()),
        [] => what.to_owned(),
    };
    Error::differs(line, differing)
}

impl Proven {
    /// The manifest's bytes.
    pub fn manifest(&self, story: Story) -> Result<Vec<u8>> {
        let (Some(digest), Some(whole)) = (&self.digest, self.whole) else {
            return Err(Error::new(Kind::Other, "a manifest without sums"));
        };
        let manifest = Manifest::new(story, Digest::clone(digest), whole);
        manifest.bytes().map_err(|error| Error::new(Kind::Other, format!("write the manifest: {error}")))
    }
}

/// How the instant was taken, as long as its writers are there.
pub fn taken(moment: &Moment) -> Taken {
    let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok().map(|id| id.trim().to_owned());
    Taken {
        time: rfc3339(moment.time()),
        monotonic_ns: moment.monotonic().as_nanos() as u64,
        boot_id,
        how: match moment.how() {
            Instant::Unchanging => "unchanging",
            Instant::Reflink => "reflink",
            Instant::Frozen => "frozen",
            Instant::Unchecked => "unchecked",
            Instant::Unwatched => "unwatched",
        },
        writers: moment.writers() as u64,
        frozen_ms: moment.frozen().map(|duration| duration.as_secs_f64() * 1e3),
        consistent: false,
    }
}

/// How the copy came to be.
pub fn story(instant: Taken, origin: &Origin, destination: &Destination, losses: &Losses) -> Story {
    Story {
        instant,
        source: End { name: PathName::of(origin.name()), format: origin.format().name() },
        target: End { name: PathName::of(destination.name()), format: destination.format().name() },
        unreadable: losses.unreadable.clone(),
        skipped: losses.skipped.clone(),
    }
}
