//! A backup that stops before its first byte: everything is opened, locked and checked, and what it would take is told.

use super::destination::Destination;
use super::instant::{Gathered, Moment, Ready};
use super::options::{Options, OverlayPlace};
use super::{Disk, Ended, Failure, Summary, TargetState, open_all, refuse_all};
use crate::error::{Error, Kind, Result};
use crate::ground::bitmap::Bitmap;
use crate::ground::cluster::ClusterSize;
use crate::ground::range::{Allocation, ByteRange};
use crate::image::Image;
use crate::job::Job;
use crate::monitor::{Event, Rehearsal, TargetKind};
use crate::publish;
use crate::ring::server::{Frozen, Trap, Writers};
use crate::snapshot::tracker::FreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// For so long the writers are watched.
const WATCH: Duration = Duration::from_secs(1);
/// For so long the source is read, to know how fast it is.
const READ: Duration = Duration::from_millis(500);
/// Bytes of one read.
const STEP: u64 = 1 << 20;

/// Opens and checks disks as [`super::run_all`] does, says what it would take ([`Event::Rehearsed`]), and lets everything go
/// again. Nothing is written but the file beside a new target, which is removed at once: empty, or a clone where the file
/// system makes one. Blocks for some seconds.
pub fn rehearse_all(disks: &[Disk<'_>], ended: &Ended<'_>) {
    let ended: &Ended<'_> = &|place, result| {
        // As at the end of a backup.
        disks[place].job.end(true);
        ended(place, result);
    };
    let ready = match open_all(disks) {
        Ok(ready) => ready,
        Err(refusal) => return refuse_all(disks.len(), *refusal, ended),
    };
    for (place, (disk, ready)) in disks.iter().zip(ready).enumerate() {
        let rehearsed = rehearse(disk, &ready).map(|rehearsal| {
            disk.monitor.event(Event::Rehearsed(&rehearsal));
            planned(rehearsal.virtual_size)
        });
        // Whoever hears of the end may end the process: until then the empty file is to be gone.
        drop(ready);
        ended(place, rehearsed.map_err(|error| Failure { error, target: TargetState::Untouched }));
    }
}

fn planned(total: u64) -> Summary {
    Summary {
        total,
        data: 0,
        zero: 0,
        durable: false,
        consistent: true,
        verified: None,
        hash: None,
        written: None,
        unreadable: Vec::new(),
        skipped: Vec::new(),
    }
}

fn rehearse(disk: &Disk<'_>, ready: &Ready<'_>) -> Result<Rehearsal> {
    let Ready { options, origin, destination, .. } = ready;
    let image = origin.image();
    let length = image.length();
    let data = data_of(&*image, disk.job);
    let read_speed = read_speed(&*image, &data, disk.job);
    // What was found until then is no plan.
    go_on(disk.job)?;
    let data = data.iter().map(|range| range.length).sum();
    let (writers, write_rate) = take_instant(disk, ready)?;
    go_on(disk.job)?;
    let speed = disk.job.speed().map_or(read_speed, |asked| Some(read_speed.map_or(asked, |read| read.min(asked))));
    let duration = speed.filter(|speed| *speed > 0).map(|speed| Duration::from_secs_f64(data as f64 / speed as f64));
    let overlay_most =
        write_rate.zip(duration).map(|(rate, time)| length.min((rate as f64 * time.as_secs_f64()) as u64));
    Ok(Rehearsal {
        device: options.device.name().to_owned(),
        source_format: origin.format().name(),
        virtual_size: length,
        data,
        target: destination.path().map(ToOwned::to_owned),
        target_format: destination.format().name(),
        target_kind: destination.kind(),
        target_free: room_for(destination),
        read_speed,
        duration,
        writers,
        write_rate,
        overlay_most,
        overlay_free: overlay_free(options),
        overlay_limit: options.overlay_limit,
    })
}

/// Takes the instant as a backup would, and lets it go again: how many writers there are, and how fast they are.
fn take_instant(disk: &Disk<'_>, ready: &Ready<'_>) -> Result<(usize, Option<u64>)> {
    let gathered = Gathered::of(ready)?;
    let size = gathered.cluster_size;
    let frozen = gathered.writers.as_ref().map(Writers::freeze).transpose()?;
    let moment = Moment::rehearse(ready, gathered)?;
    moment.warnings().for_each(|warning| disk.monitor.event(Event::Warning(warning)));
    match moment.cooperating().zip(frozen) {
        Some((writers, frozen)) => watch(writers, frozen, size, ready.origin.length(), disk.job),
        None => Ok((0, None)),
    }
}

fn go_on(job: &Job) -> Result<()> {
    if job.is_cancelled() { Err(Error::new(Kind::Cancelled, "cancelled")) } else { Ok(()) }
}

/// What would be read. Of an image whose tables can't be read, everything.
fn data_of(image: &dyn Image, job: &Job) -> Vec<ByteRange> {
    let mut rest = ByteRange::new(0, image.length());
    let mut data: Vec<ByteRange> = Vec::new();
    while !rest.is_empty() && !job.is_cancelled() {
        let Ok(extent) = image.block_status(rest) else {
            data.push(rest);
            break;
        };
        if extent.allocation == Allocation::Data {
            data.push(extent.range);
        }
        rest = ByteRange::between(extent.range.end(), rest.end());
    }
    data
}

/// Bytes a second, from the first of it; `None`: nothing to read, or it can't be.
fn read_speed(image: &dyn Image, data: &[ByteRange], job: &Job) -> Option<u64> {
    let steps = |range: &ByteRange| {
        let range = *range;
        (range.offset..range.end())
            .step_by(STEP as usize)
            .map(move |at| ByteRange::between(at, range.end()).prefix(STEP))
    };
    let mut buffer = vec![0; STEP as usize];
    let (begin, mut read) = (Instant::now(), 0);
    for step in data.iter().flat_map(steps) {
        image.read_at(&mut buffer[..step.length as usize], step.offset).ok()?;
        read += step.length;
        if begin.elapsed() >= READ || job.is_cancelled() {
            break;
        }
    }
    (read > 0).then(|| (read as f64 / begin.elapsed().as_secs_f64().max(1e-6)) as u64)
}

/// Lets them go on. How many they are, and how many bytes a second they make the overlay grow by: each cluster counts once.
fn watch(writers: &Writers, frozen: Frozen, size: ClusterSize, length: u64, job: &Job) -> Result<(usize, Option<u64>)> {
    let attached = writers.attached();
    if attached == 0 {
        return frozen.release().map(|_| (0, None));
    }
    let counted = Mutex::new(Bitmap::new(size.count(length)));
    let count = Arc::new(Count { map: writers.free_map(), size, counted });
    frozen.thaw(count.clone())?;
    let begin = Instant::now();
    // A cancel is the caller's to notice: first the writers are let go.
    job.sleep(WATCH);
    let clusters = count.counted.lock().unwrap_or_else(PoisonError::into_inner).count_ones();
    let rate = clusters as f64 * size.bytes() as f64 / begin.elapsed().as_secs_f64();
    writers.finish()?;
    Ok((attached, Some(rate as u64)))
}

/// Lets every write go, and remembers where.
struct Count {
    map: Arc<dyn FreeMap>,
    size: ClusterSize,
    counted: Mutex<Bitmap>,
}

impl Trap for Count {
    fn before_write(&self, range: ByteRange) -> Result<()> {
        let clusters = self.size.covering(range);
        self.counted.lock().unwrap_or_else(PoisonError::into_inner).set(clusters.clone());
        self.map.free(clusters);
        Ok(())
    }

    fn lost(&self, _why: &Error) {}
}

/// Of a file: a device or an export has its size.
fn room_for(destination: &Destination) -> Option<u64> {
    let is_file = matches!(destination.kind(), TargetKind::File | TargetKind::Existing);
    let place = destination.path().filter(|_| is_file).and_then(publish::place)?;
    free_in(place.parent()?)
}

/// Bytes that we may still write there.
fn free_in(folder: &Path) -> Option<u64> {
    let found = rustix::fs::statvfs(folder).ok()?;
    found.f_bavail.checked_mul(found.f_frsize)
}

fn overlay_free(options: &Options) -> Option<u64> {
    match &options.overlay {
        OverlayPlace::Folder(folder) => free_in(folder),
        OverlayPlace::Memory => None,
    }
}
