//! Whole backups: options in, published copies or failures out.

mod destination;
#[cfg(feature = "nbd")]
mod foreign;
mod guard;
mod instant;
mod options;
mod origin;
mod outcome;
mod proof;
mod reach;
mod rehearsal;
mod target_format;
mod view;
mod vigil;

pub use crate::ring::server::OnCbwError;
pub use options::{
    Mode, Options, OverlayPlace, ProofOptions, Restoring, SnapshotChoice, SyncMode, Target, WriterChoice,
};
pub use outcome::{Failure, Summary, TargetState};
pub use rehearsal::rehearse_all;

use crate::copier::{Copier, Ends, Hashing, Losses, Rules};
use crate::error::{Error, Kind, Result};
use crate::ground::status::Phase;
use crate::hold::{self, Place};
use crate::job::{Gate, Job};
use crate::manifest::Contents;
use crate::monitor::{Event, Monitor, Started};
use destination::Destination;
use instant::{Moment, Ready};
use origin::Origin;
use proof::Proof;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::thread;

/// Bytes: blocks shorter than this are not worth a hole; it is the page of the file systems' caches.
const SMALLEST_HOLE: u64 = 4 << 10;

/// One disk to back up, and who steers and watches it.
#[derive(Clone, Copy)]
pub struct Disk<'a> {
    /// What is asked for.
    pub options: &'a Options,
    /// Steers and counts.
    pub job: &'a Arc<Job>,
    /// Hears.
    pub monitor: &'a dyn Monitor,
}

/// Hears how each disk ended, by its place among the disks. Called once for each, from the engine's threads.
pub type Ended<'a> = dyn Fn(usize, Result<Summary, Failure>) + Sync + 'a;

/// Backs up one disk; see [`run_all`].
pub fn run(options: &Options, job: &Arc<Job>, monitor: &dyn Monitor) -> Result<Summary, Failure> {
    let ended = OnceLock::new();
    run_all(&[Disk { options, job, monitor }], &|_, result| drop(ended.set(result)));
    ended.into_inner().expect("one disk ends once")
}

/// Backs up disks as of one instant, a job each. Blocks until all copies are published, have failed or were cancelled
/// through their jobs; may hang as long as the storage does ([`Job::abandon`] undoes for whoever can't wait).
///
/// All or nothing until the instant is taken: one disk that can't start fails all of them. From then on each is on its
/// own, and `ended` hears of each as soon as it has, its ends closed.
pub fn run_all(disks: &[Disk<'_>], ended: &Ended<'_>) {
    let ended: &Ended<'_> = &|place, result| {
        // Whoever hears of the end may use both ends at once, or begin the next backup.
        disks[place].job.end(result.as_ref().is_err_and(|failure| failure.target != TargetState::Complete));
        ended(place, result);
    };
    let started = match start(disks) {
        Ok(started) => started,
        Err(refusal) => return refuse_all(disks.len(), *refusal, ended),
    };
    thread::scope(|scope| {
        let copies = disks.iter().zip(started).enumerate().map(|(place, (&disk, (ready, moment)))| {
            scope.spawn(move || {
                let result = back_up(disk, ready, &moment);
                drop(moment);
                ended(place, result);
            })
        });
        let copies: Vec<_> = copies.collect();
        copies.into_iter().for_each(|copy| copy.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
    });
}

/// Why nothing was started, and the place of the disk at fault, if it is one's.
struct Refusal {
    culprit: Option<usize>,
    error: Error,
}

/// Opens all ends, takes the one instant.
fn start<'a>(disks: &[Disk<'a>]) -> Result<Vec<(Ready<'a>, Moment)>, Box<Refusal>> {
    let ready = open_all(disks)?;
    hold::at(Place::Opened);
    let programs = ready.iter().any(reach::runs_programs);
    disks.iter().for_each(|disk| disk.monitor.event(Event::Opened { programs }));
    let moments = Moment::take_all(&ready).map_err(|error| Refusal { culprit: None, error })?;
    Ok(ready.into_iter().zip(moments).collect())
}

/// All sources first: none of their files may be what another disk's backup writes.
fn open_all<'a>(disks: &[Disk<'a>]) -> Result<Vec<Ready<'a>>, Box<Refusal>> {
    let of = |place| move |error| Box::new(Refusal { culprit: Some(place), error });
    let mut sources = Vec::new();
    for (place, &disk) in disks.iter().enumerate() {
        sources.push(open_source(disk).map_err(of(place))?);
    }
    for (place, disk) in disks.iter().enumerate() {
        let others = disks.iter().zip(&sources).enumerate().filter(|(other, _)| *other != place);
        for (_, (other, (origin, _))) in others {
            refuse_source_of_another(disk.options, other.options, origin).map_err(of(place))?;
        }
    }
    let mut ready = Vec::new();
    for (place, (&disk, (origin, expected))) in disks.iter().zip(sources).enumerate() {
        ready.push(open_target(disk, origin, expected).map_err(of(place))?);
    }
    Ok(ready)
}

/// Neither the copy nor its manifest may be a file of another disk's source, nor the export that it is.
fn refuse_source_of_another(options: &Options, other: &Options, origin: &Origin) -> Result<()> {
    if let Target::At(target) = &options.target {
        other.device.refuse_as_target(target)?;
        target.path().map_or(Ok(()), |path| origin.refuse_as_target(path))?;
    }
    options.proof.manifest.as_ref().map_or(Ok(()), |path| origin.refuse_as_target(path))
}

fn open_source(disk: Disk<'_>) -> Result<(Origin, Option<Contents>)> {
    let Disk { options, job, monitor } = disk;
    options.check_sync()?;
    let mut origin = Origin::open(options, job)?;
    let read = |path: &PathBuf| Contents::read(path, origin.length());
    let expected = options.proof.expected.as_ref().map(read).transpose()?;
    if let Some(contents) = &expected {
        origin.trim(contents.digest.length())?;
    }
    origin.warnings().for_each(|warning| monitor.event(Event::Warning(&warning)));
    origin.undo_with(job);
    Ok((origin, expected))
}

fn open_target(disk: Disk<'_>, origin: Origin, expected: Option<Contents>) -> Result<Ready<'_>> {
    let Disk { options, job, monitor } = disk;
    let destination = Destination::open(disk, &origin)?;
    destination.warnings().for_each(|warning| monitor.event(Event::Warning(warning)));
    destination.undo_with(job);
    job.set_total(origin.length());
    Ok(Ready { options, job, origin, destination, expected })
}

/// Ends every disk with `error`, untouched.
pub fn fail_all(disks: usize, error: Error, ended: &Ended<'_>) {
    refuse_all(disks, Refusal { culprit: None, error }, ended);
}

/// The culprit's error is its own, the others hear of it.
fn refuse_all(disks: usize, Refusal { culprit, error }: Refusal, ended: &Ended<'_>) {
    let (kind, why) = (error.kind(), error.to_string());
    let mut error = Some(error);
    let of = |place: usize| match error.take_if(|_| culprit.is_none_or(|culprit| culprit == place)) {
        Some(error) => error,
        None => Error::new(kind, format!("not started, since another disk of this backup failed: {why}")),
    };
    for (place, error) in (0..disks).map(of).enumerate() {
        ended(place, Err(Failure { error, target: TargetState::Untouched }));
    }
}

fn back_up(disk: Disk<'_>, ready: Ready<'_>, moment: &Moment) -> Result<Summary, Failure> {
    let Disk { options, job, monitor } = disk;
    let Ready { origin, mut destination, expected, .. } = ready;
    let failure = |(error, target)| Failure { error, target };
    moment.warnings().for_each(|warning| monitor.event(Event::Warning(warning)));
    monitor.event(Event::Started(&started(options, &origin, &destination, moment)));
    let warnings = destination.make(disk, &origin).map_err(failure)?;
    warnings.iter().for_each(|warning| monitor.event(Event::Warning(warning)));
    if options.sync == SyncMode::None {
        return Err(keep_overwritten(disk, destination, moment));
    }
    let proof = Proof::of(disk, origin.length(), expected, moment);
    let copied = match proven_copy(disk, &origin, &destination, moment, proof) {
        Ok(copied) => copied,
        Err(error) => {
            let is_bad = error.kind() == Kind::Differs && job.snapshot().phase == Phase::Verify;
            return Err(failure(destination.give_up(error, is_bad)));
        }
    };
    if job.complete() == Gate::Cancelled {
        let error = moment.lost().unwrap_or_else(|| Error::new(Kind::Cancelled, "cancelled"));
        return Err(failure(destination.give_up(error, false)));
    }
    job.enter(Phase::Publish);
    hold::at(Place::Publishing);
    let (written, durable) = (destination.written(), destination.is_durable(options));
    let warnings = destination.publish(options.fsync).map_err(failure)?;
    hold::at(Place::Published);
    warnings.iter().for_each(|warning| monitor.event(Event::Warning(warning)));
    let now = job.snapshot();
    let Copied { losses, consistent, whole } = copied;
    Ok(Summary {
        total: origin.length(),
        data: now.data,
        zero: now.zero,
        durable,
        consistent,
        verified: (options.proof.verify || !options.target.is_somewhere()).then_some(true),
        hash: whole.map(|hash| hash.to_string()),
        written,
        unreadable: losses.unreadable,
        skipped: losses.skipped,
    })
}

/// Copies what writers overwrite until the job is cancelled, which keeps the target: that is no failure but for its name.
fn keep_overwritten(disk: Disk<'_>, destination: Destination, moment: &Moment) -> Failure {
    let Disk { options, job, monitor } = disk;
    job.enter(Phase::Copy);
    let copied = copier(disk, moment, &destination, None).run_until_cancelled(|| moment.check().map(drop));
    let copied = copied.map_err(|error| moment.lost().unwrap_or(error));
    let copied = copied.and_then(|_| moment.check_overlay()).and_then(|()| destination.flush());
    let published = match copied {
        Ok(()) => destination.publish(options.fsync),
        Err(error) => Err(destination.give_up(error, false)),
    };
    match published {
        Ok(warnings) => {
            warnings.iter().for_each(|warning| monitor.event(Event::Warning(warning)));
            Failure { error: Error::new(Kind::Cancelled, "cancelled"), target: TargetState::Complete }
        }
        Err((error, target)) => Failure { error, target },
    }
}

/// A copy that only lacks its name.
struct Copied {
    losses: Losses,
    consistent: bool,
    whole: Option<blake3::Hash>,
}

/// Copies, flushes and proves it, and writes its manifest.
fn proven_copy(
    disk: Disk<'_>,
    origin: &Origin,
    destination: &Destination,
    moment: &Moment,
    proof: Proof,
) -> Result<Copied> {
    let Disk { options, job, .. } = disk;
    let mut taken = proof::taken(moment);
    job.enter(Phase::Copy);
    let losses = copy(disk, moment, destination, proof.hashing()).map_err(|error| moment.lost().unwrap_or(error))?;
    let consistent = moment.check()?;
    moment.check_overlay()?;
    taken.consistent = consistent;
    job.enter(Phase::Flush);
    hold::at(Place::Flushing);
    let proven = proof.complete(disk, destination, &losses)?;
    if job.is_cancelled() {
        return Err(Error::new(Kind::Cancelled, "cancelled"));
    }
    if options.proof.manifest.is_some() {
        let story = proof::story(taken, origin, destination, &losses);
        let warnings = destination.write_manifest(&proven.manifest(story)?, options.fsync)?;
        warnings.iter().for_each(|warning| disk.monitor.event(Event::Warning(warning)));
    }
    Ok(Copied { losses, consistent, whole: proven.whole })
}

fn started(options: &Options, origin: &Origin, destination: &Destination, moment: &Moment) -> Started {
    Started {
        device: options.device.name().to_owned(),
        source_format: origin.format().name(),
        virtual_size: origin.length(),
        target: destination.path().map(ToOwned::to_owned),
        target_format: destination.format().name(),
        target_kind: destination.kind(),
        point_in_time: moment.time(),
        instant: moment.how(),
        writers: moment.writers(),
        frozen: moment.frozen(),
    }
}

/// Moves every byte of the moment to the destination.
fn copy(disk: Disk<'_>, moment: &Moment, destination: &Destination, hashing: Option<Hashing<'_>>) -> Result<Losses> {
    if moment.is_on_target() {
        disk.job.count_data(moment.image().length());
        return Ok(Losses::default());
    }
    copier(disk, moment, destination, hashing).run(disk.options.workers)
}

fn copier<'a>(
    Disk { options, job, monitor }: Disk<'a>,
    moment: &'a Moment,
    destination: &'a Destination,
    hashing: Option<Hashing<'a>>,
) -> Copier<'a> {
    let target = destination.image();
    let rules = Rules {
        granule: moment.granule(),
        hole: options.sparse.then(|| SMALLEST_HOLE.max(target.properties().cluster_size)),
        on_source_error: options.on_source_error,
        on_target_error: options.on_target_error,
        capture: options.cbw_timeout,
    };
    let (source, overlay, unallocated) = (moment.image(), moment.overlay(), moment.unallocated());
    let ends = Ends { source, overlay, target, unallocated };
    Copier::new(job, monitor, moment.tracker(), ends, rules).hashing(hashing).within(moment.reach())
}
