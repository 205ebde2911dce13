//! A whole backup: options in, a published copy or a failure out.

mod destination;
mod instant;
mod options;
mod origin;
mod outcome;

pub use options::{Mode, Options, Target};
pub use outcome::{Failure, Summary, TargetState};

use crate::copier::{Copier, Ends, Losses, Rules};
use crate::error::{Error, Kind, Result};
use crate::ground::cluster::ClusterSize;
use crate::ground::status::Phase;
use crate::job::Job;
use crate::monitor::{Event, Monitor, Started};
use crate::snapshot::copy_state::{CopyState, Plan};
use crate::snapshot::tracker::Tracker;
use destination::Destination;
use instant::Moment;
use origin::Origin;
use std::sync::Arc;

/// Blocks less than this are not worth a hole: it is the page of the file systems' caches.
const SMALLEST_HOLE: u64 = 4 << 10;

/// Backs up one disk. Blocks until the copy is published, or has failed, or was cancelled through `job`; may hang as
/// long as the source's or the target's storage does ([`Job::abandon`] undoes for whoever can't wait).
pub fn run(options: &Options, job: &Arc<Job>, monitor: &dyn Monitor) -> Result<Summary, Failure> {
    let mut target = TargetState::Untouched;
    back_up(options, job, monitor, &mut target).map_err(|error| Failure { error, target })
}

fn back_up(options: &Options, job: &Job, monitor: &dyn Monitor, state: &mut TargetState) -> Result<Summary> {
    let origin = Origin::open(options)?;
    origin.warnings().for_each(|warning| monitor.event(Event::Warning(&warning)));
    let destination = Destination::open(options, &origin)?;
    destination.warnings().for_each(|warning| monitor.event(Event::Warning(warning)));
    destination.undo_with(job);
    let moment = Moment::take(options, &origin, &destination)?;
    moment.warnings().for_each(|warning| monitor.event(Event::Warning(warning)));

    let total = origin.length();
    job.set_total(total);
    *state = destination.state_if_failed();
    monitor.event(Event::Started(&Started {
        device: options.device.clone(),
        source_format: origin.format().name(),
        virtual_size: total,
        target: destination.path().map(ToOwned::to_owned),
        target_format: destination.format().name(),
        target_kind: destination.kind(),
        point_in_time: moment.time(),
        instant: moment.how(),
    }));

    job.enter(Phase::Copy);
    let losses = if moment.is_on_target() {
        job.count_data(total);
        Losses::default()
    } else {
        copy(options, job, monitor, &moment, &destination)?
    };
    let consistent = moment.check(&origin)?;

    job.enter(Phase::Flush);
    destination.flush()?;
    if job.is_cancelled() {
        return Err(Error::new(Kind::Cancelled, "cancelled"));
    }
    job.enter(Phase::Publish);
    destination.publish(options.fsync)?.iter().for_each(|warning| monitor.event(Event::Warning(warning)));
    let now = job.snapshot();
    Ok(Summary {
        total,
        data: now.data,
        zero: now.zero,
        durable: options.fsync,
        consistent,
        unreadable: losses.unreadable,
        skipped: losses.skipped,
    })
}

/// Moves every byte of the moment to the destination.
fn copy(
    options: &Options,
    job: &Job,
    monitor: &dyn Monitor,
    moment: &Moment,
    destination: &Destination,
) -> Result<Losses> {
    let (source, target) = (moment.image(), destination.image());
    let size = ClusterSize::for_device(source.length());
    let properties = target.properties();
    let granule = size.bytes().max(properties.cluster_size);
    let plan = Plan { granule, ascending: properties.sequential };
    let tracker = Tracker::new(CopyState::new(source.length(), size, plan));
    let rules = Rules {
        granule,
        hole: options.sparse.then(|| SMALLEST_HOLE.max(properties.cluster_size)),
        on_source_error: options.on_source_error,
        on_target_error: options.on_target_error,
    };
    let ends = Ends { source, overlay: None, target };
    Copier::new(job, monitor, &tracker, ends, rules).run(options.workers)
}
