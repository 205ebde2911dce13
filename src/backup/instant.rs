//! The instant that a copy shows: of a clone that the file system made, of a source whose writers were frozen and are
//! trapped since, or of a source that does not change.

use super::destination::Destination;
use super::guard::{Gauge, Guard};
use super::options::{Options, OverlayPlace, SnapshotChoice, SyncMode, WriterChoice};
use super::origin::Origin;
use super::reach;
use super::vigil::Vigil;
use crate::error::{Error, Kind, Result, Side};
use crate::ground::cluster::ClusterSize;
use crate::hold::{self, Place};
use crate::image::Image;
use crate::image::clone;
use crate::image::format::Format;
use crate::image::lock::{self, ImageLock, Protection, Terms};
use crate::image::medium::Medium;
use crate::image::open::SourceFile;
use crate::image::raw::Raw;
use crate::job::Job;
use crate::manifest::Contents;
use crate::monitor::{Instant, TargetKind, Warning};
use crate::ring::folder::{self, Disk};
use crate::ring::server::{self, Frozen, Writers};
use crate::sandbox::Reach;
use crate::snapshot::copy_state::{CopyState, Plan};
use crate::snapshot::overlay::Overlay;
use crate::snapshot::preserve::Preserver;
use crate::snapshot::tracker::Tracker;
use crate::snapshot::unallocated::Unallocated;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant as Clock, SystemTime};

/// Threads for each writer: so many of its trapped writes may be captured at once.
const PRESERVING_THREADS: usize = 2;

/// A disk whose ends are open, before its instant.
pub struct Ready<'a> {
    /// What is asked for.
    pub options: &'a Options,
    /// Its job.
    pub job: &'a Arc<Job>,
    /// Where from.
    pub origin: Origin,
    /// Where to.
    pub destination: Destination,
    /// What its manifest says of the source, where it is to be compared.
    pub expected: Option<Contents>,
}

/// The disk as of one instant.
pub struct Moment {
    image: Arc<dyn Image>,
    how: Instant,
    time: Clocks,
    on_target: bool,
    /// Of several disks it shows another moment than the others, and the user allows it.
    is_apart: bool,
    frozen: Option<Duration>,
    /// Over the source's files, where nothing else keeps the instant.
    vigil: Option<Arc<Vigil>>,
    warnings: Vec<Warning>,
    granule: u64,
    tracker: Arc<Tracker>,
    overlay: Option<Arc<Overlay>>,
    /// Where only that is copied which is allocated.
    unallocated: Option<Arc<Unallocated>>,
    writers: Option<Arc<Writers>>,
    locks: Vec<ImageLock>,
    reach: Reach,
}

/// One moment on two clocks.
#[derive(Clone, Copy)]
struct Clocks {
    wall: SystemTime,
    /// CLOCK_MONOTONIC.
    monotonic: Duration,
}

impl Clocks {
    fn now() -> Self {
        let monotonic = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        Self { wall: SystemTime::now(), monotonic: Duration::new(monotonic.tv_sec as u64, monotonic.tv_nsec as u32) }
    }
}

/// The writers of one disk, attached; `None`: none may be.
pub(super) struct Gathered {
    pub writers: Option<Writers>,
    pub cluster_size: ClusterSize,
    warnings: Vec<Warning>,
}

impl Moment {
    /// One instant of several disks: all their writers are frozen, then it is kept for each of them, then all go on.
    /// All or nothing: after an error no writer is trapped.
    pub fn take_all(disks: &[Ready<'_>]) -> Result<Vec<Self>> {
        let gathered: Vec<Gathered> = disks.iter().map(Gathered::of).collect::<Result<_>>()?;
        let mut moments: Vec<Self> = disks.iter().zip(gathered).map(|(disk, one)| Self::prepare(disk, one)).collect();
        Self::keep_early(disks, &mut moments)?;
        let with_writers: Vec<&Writers> = moments.iter().filter_map(Self::cooperating).collect();
        let freezing = Clock::now();
        let mut frozen = Writers::freeze_all(&with_writers)?.into_iter();
        hold::at(Place::Frozen);
        for Ready { options, job, .. } in disks {
            if let Some(hook) = &options.hook_frozen {
                hook.run(options.freeze_timeout.saturating_sub(freezing.elapsed()), || job.is_cancelled())?;
            }
        }
        let frozen: Vec<Option<Frozen>> =
            moments.iter().map(|moment| moment.writers.as_ref().and_then(|_| frozen.next())).collect();
        let time = Clocks::now();
        Self::keep_all(disks, &mut moments, time)?;
        for (moment, (disk, frozen)) in moments.iter_mut().zip(disks.iter().zip(frozen)) {
            moment.thaw(disk, frozen)?;
        }
        Ok(moments)
    }

    /// Images without writers, whose tables are read once more: that can take long, and must not while the writers of another
    /// disk are frozen. They must not change until the end, and so show any instant until then; a hook may still change them.
    fn keep_early(disks: &[Ready<'_>], moments: &mut [Self]) -> Result<()> {
        if disks.len() == 1 || disks.iter().any(|disk| disk.options.hook_frozen.is_some()) {
            return Ok(());
        }
        for (moment, disk) in moments.iter_mut().zip(disks) {
            if moment.writers() == 0 && disk.origin.format() != Format::Raw {
                moment.keep(disk, None)?;
            }
        }
        Ok(())
    }

    /// Keeps each disk, one after the other. Whom nobody froze must not write between the first and the last of them.
    fn keep_all(disks: &[Ready<'_>], moments: &mut [Self], time: Clocks) -> Result<()> {
        let unfrozen =
            |(_, moment): &(&Ready<'_>, &Self)| disks.len() > 1 && moment.writers() == 0 && moment.vigil.is_none();
        let files = disks.iter().zip(&*moments).filter(unfrozen).flat_map(|(disk, _)| disk.origin.files());
        let between = Vigil::begin(&files.cloned().collect::<Vec<_>>(), false)?;
        for (moment, disk) in moments.iter_mut().zip(disks) {
            moment.time = time;
            if moment.vigil.is_none() {
                moment.keep(disk, disk.destination.clonable())?;
            }
            hold::at(Place::Kept);
        }
        let Some((path, change)) = between.change(&between.look()?)? else { return Ok(()) };
        if !disks.iter().all(|disk| disk.options.allow_inconsistent) {
            return Err(inconsistent(path, &format!("while the instant of several disks was taken, {change}")));
        }
        moments.iter_mut().for_each(|moment| moment.is_apart = true);
        Ok(())
    }

    /// As [`Moment::take_all`] takes it of one disk whose writers are frozen, to be dropped again. Nothing that is there is
    /// written: a clone is made in a file that is to be removed.
    pub(super) fn rehearse(disk: &Ready<'_>, gathered: Gathered) -> Result<Self> {
        let removed = disk.destination.clonable().filter(|_| disk.destination.kind() == TargetKind::File);
        let mut moment = Self::prepare(disk, gathered);
        moment.keep(disk, removed)?;
        Ok(moment)
    }

    /// What takes time for a large disk, before anybody is frozen.
    fn prepare(disk: &Ready<'_>, gathered: Gathered) -> Self {
        let Gathered { writers, cluster_size, warnings } = gathered;
        let properties = disk.destination.image().properties();
        let granule = cluster_size.bytes().max(properties.cluster_size);
        let plan = Plan { granule, ascending: properties.sequential };
        let length = disk.origin.length();
        let tracker = Arc::new(Tracker::new(CopyState::new(length, cluster_size, plan)));
        Self {
            image: disk.origin.image(),
            how: Instant::Unchanging,
            time: Clocks::now(),
            on_target: false,
            is_apart: false,
            frozen: None,
            vigil: None,
            warnings,
            granule,
            tracker,
            overlay: None,
            unallocated: disk.origin.only_allocated().then(|| Arc::new(Unallocated::new(length, cluster_size))),
            writers: writers.map(Arc::new),
            locks: Vec::new(),
            reach: reach::of(disk),
        }
    }

    /// Everything that keeps the instant, while the writers are still frozen. `clonable` may become the clone.
    fn keep(&mut self, disk: &Ready<'_>, clonable: Option<&Raw>) -> Result<()> {
        let attached = self.writers();
        // A clone would not tell what its writers overwrite.
        let may_clone = disk.options.snapshot != SnapshotChoice::Overlay && disk.options.sync != SyncMode::None;
        if may_clone && self.clone_from(disk, clonable)? {
            self.how = Instant::Reflink;
        } else if disk.options.snapshot == SnapshotChoice::Reflink {
            let path = &disk.options.device;
            return Err(Error::new(
                Kind::Source,
                format!("source '{path}' can't be cloned here, and --snapshot=reflink asks for it"),
            ));
        } else {
            if attached > 0 {
                self.how = Instant::Frozen;
            } else if disk.options.allow_inconsistent {
                self.how = Instant::Unchecked;
            } else if !disk.origin.is_watched() {
                self.how = Instant::Unwatched;
            }
            self.watch(disk)?;
            // Locked and looked at: what was read before may be out of date, of writers that were frozen it is.
            self.image = disk.origin.as_of_now(disk.options, disk.job)?;
            self.guard(disk)?;
        }
        disk.origin.refuse_resized()
    }

    /// Of a raw file: one call, atomic against every writer. False where it can't be.
    fn clone_from(&mut self, disk: &Ready<'_>, clonable: Option<&Raw>) -> Result<bool> {
        let [SourceFile { path, raw, .. }] = disk.origin.files() else { return Ok(false) };
        if disk.origin.format() != Format::Raw || raw.medium() != Medium::File {
            return Ok(false);
        }
        let failed = |e| Error::file(Side::Source, "clone", path, e);
        if let Some(target) = clonable.filter(|_| disk.options.sparse && !disk.options.proof.needs_bytes())
            && clone::clone_into(raw.as_file(), target.as_file()).map_err(failed)?
        {
            self.on_target = true;
            return Ok(true);
        }
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let Some(clone) = clone::clone_unlinked(raw.as_file(), folder).map_err(failed)? else { return Ok(false) };
        let clone = Raw::of(clone).map_err(failed)?;
        self.image = Arc::new(if disk.options.direct { clone.with_direct().map_err(failed)? } else { clone });
        Ok(true)
    }

    /// Locks the source's files, and looks at those for [`Moment::check`] that no writer was frozen for.
    fn watch(&mut self, disk: &Ready<'_>) -> Result<()> {
        let terms = if self.how == Instant::Unchanging { Terms::Read } else { Terms::ReadShared };
        for file in disk.origin.files() {
            match lock::acquire(file.raw.as_file(), &file.path, Side::Source, terms)? {
                Protection::Locked(lock) => self.locks.push(lock),
                Protection::Unsupported(message) => self.warnings.push(Warning::general("no_locks", message)),
            }
        }
        let vigil = Vigil::begin(disk.origin.files(), self.how == Instant::Frozen)?;
        // What can be told at once must not cost a whole copy first.
        self.judge(vigil.change_at_once())?;
        self.vigil = Some(Arc::new(vigil));
        Ok(())
    }

    /// Makes the overlay for what writers are about to overwrite, those too that start later.
    fn guard(&mut self, disk: &Ready<'_>) -> Result<()> {
        if self.writers.is_none() {
            return Ok(());
        }
        let (length, limit) = (self.image.length(), disk.options.overlay_limit);
        let overlay = match &disk.options.overlay {
            OverlayPlace::Folder(folder) => Overlay::in_folder(folder, length, limit),
            OverlayPlace::Memory => Overlay::in_memory(length, limit),
        };
        match overlay {
            Ok(overlay) => self.overlay = Some(Arc::new(overlay)),
            // Nobody writes, and one who starts later will be noticed, at the latest at the end: nothing to warn of,
            // and the rule for a disk that is larger than the file system's largest file.
            Err(_) if self.how != Instant::Frozen && disk.options.writer == WriterChoice::Auto => self.writers = None,
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Lets the writers go on: for good, or into trapping.
    fn thaw(&mut self, disk: &Ready<'_>, frozen: Option<Frozen>) -> Result<()> {
        let (Some(frozen), Some(writers)) = (frozen, &self.writers) else { return Ok(()) };
        let attached = writers.attached() > 0;
        let duration = match &self.overlay {
            None => frozen.release()?,
            Some(overlay) => {
                self.tracker.attach_free_map(writers.free_map());
                let preserver = Preserver::new(self.tracker.clone(), self.image.clone(), overlay.clone());
                let preserver = preserver.noting(self.unallocated.clone());
                let guard = Guard::new(preserver, disk.job, self.reach, self.vigil.clone());
                let gauge = Gauge::new(overlay.clone(), writers.clone());
                disk.job.set_gauges(Arc::new(gauge));
                let released = writers.clone();
                disk.job.on_abandon(move || drop(released.finish()));
                frozen.thaw(Arc::new(guard))?
            }
        };
        self.frozen = attached.then_some(duration);
        if self.overlay.is_none() {
            self.writers = None;
        }
        Ok(())
    }

    /// The disk's contents as of the instant, or as they are now and must not change.
    pub fn image(&self) -> &dyn Image {
        self.image.as_ref()
    }

    /// Those that may be attached.
    pub(super) fn cooperating(&self) -> Option<&Writers> {
        self.writers.as_deref()
    }

    /// Who holds what.
    pub fn tracker(&self) -> &Tracker {
        &self.tracker
    }

    /// Bytes: claims are multiples of it.
    pub fn granule(&self) -> u64 {
        self.granule
    }

    /// What those need who copy and capture.
    pub fn reach(&self) -> Reach {
        self.reach
    }

    /// Where overwritten clusters are, if there can be writers.
    pub fn overlay(&self) -> Option<&Overlay> {
        self.overlay.as_deref()
    }

    /// After the last read of it: [`Overlay::check`].
    pub fn check_overlay(&self) -> Result<()> {
        self.overlay().map_or(Ok(()), Overlay::check)
    }

    /// What the overlay holds though it was not allocated; `None`: that makes no difference.
    pub fn unallocated(&self) -> Option<&Unallocated> {
        self.unallocated.as_deref()
    }

    /// How it was taken.
    pub fn how(&self) -> Instant {
        self.how
    }

    /// When.
    pub fn time(&self) -> SystemTime {
        self.time.wall
    }

    /// When, by CLOCK_MONOTONIC.
    pub fn monotonic(&self) -> Duration {
        self.time.monotonic
    }

    /// For how long writers were frozen, if there were any.
    pub fn frozen(&self) -> Option<Duration> {
        self.frozen
    }

    /// Number of writers attached now.
    pub fn writers(&self) -> usize {
        self.writers.as_ref().map_or(0, |writers| writers.attached())
    }

    /// The target has it already: it was cloned there.
    pub fn is_on_target(&self) -> bool {
        self.on_target
    }

    /// What the user should know of it.
    pub fn warnings(&self) -> impl Iterator<Item = &Warning> {
        self.warnings.iter()
    }

    /// Why the instant is lost, if it is known to be. Says more than a copier that was stopped for it.
    pub fn lost(&self) -> Option<Error> {
        self.writers.as_ref().and_then(|writers| writers.lost())
    }

    /// After the last read: is the copy as of the instant? Lets the writers go, whatever the answer. False: the source
    /// changed, and the user allows it.
    pub fn check(&self) -> Result<bool> {
        // While writers that start are still attached: what those change that start later was not read.
        let now = self.vigil.as_ref().map(|vigil| vigil.look()).transpose();
        if let Some(writers) = &self.writers {
            writers.finish()?;
        }
        match self.vigil.as_ref().zip(now?) {
            Some((vigil, now)) => Ok(self.judge(vigil.change(&now)?)? && !self.is_apart),
            None => Ok(!self.is_apart),
        }
    }

    fn judge(&self, change: Option<(&Path, String)>) -> Result<bool> {
        match change {
            None => Ok(true),
            Some(_) if self.how == Instant::Unchecked => Ok(false),
            Some((path, change)) => Err(inconsistent(path, &change)),
        }
    }
}

impl Drop for Moment {
    fn drop(&mut self) {
        // However the copy ended, nobody has to wait for it any more.
        if let Some(writers) = &self.writers {
            let _ = writers.finish();
        }
    }
}

impl Gathered {
    /// Attaches to the writers of a disk's image.
    pub fn of(disk: &Ready<'_>) -> Result<Self> {
        let options = disk.options;
        let natural = ClusterSize::for_device(disk.origin.length());
        let of_image = disk.origin.image().properties().cluster_size.max(natural.bytes());
        let mut gathered = Self { writers: None, cluster_size: ClusterSize::new(of_image), warnings: Vec::new() };
        if options.writer == WriterChoice::None {
            return Ok(gathered);
        }
        let terms = server::Options {
            length: disk.origin.length(),
            cluster_size: gathered.cluster_size,
            freeze_timeout: options.freeze_timeout,
            cbw_timeout: options.cbw_timeout,
            on_cbw_error: options.on_cbw_error,
            threads: PRESERVING_THREADS,
        };
        let Some(file) = disk.origin.files().first() else {
            // Writers of an export are their server's.
            return if options.writer == WriterChoice::Required { Err(no_writer(options)) } else { Ok(gathered) };
        };
        let file = file.raw.as_file();
        let folder: PathBuf = options.writer_dir.clone().unwrap_or_else(folder::default_path);
        let attached = Disk::open(file)
            .map_err(|e| Error::file(Side::Source, "stat", options.device.name(), e))
            .and_then(|disk| Writers::attach(disk, &folder, terms));
        match attached {
            Ok(writers) if options.writer == WriterChoice::Required && writers.attached() == 0 => {
                Err(no_writer(options))
            }
            Ok(writers) if matches!(disk.origin.format(), Format::Foreign(_)) => {
                // Nobody traps what QEMU reads here; a source that changes will be noticed.
                if writers.attached() == 0 { Ok(gathered) } else { Err(no_live(options, disk.origin.format())) }
            }
            Ok(writers) => Ok(Self { writers: Some(writers), ..gathered }),
            // Without the folder there are no writers to be found, and a source that changes will be noticed.
            Err(error) if error.kind() == Kind::Other && options.writer == WriterChoice::Auto => {
                // A folder that can't be made is an ordinary sight; one that can't be trusted is not.
                if error.errno().is_none() {
                    gathered.warnings.push(Warning::general("no_writer_folder", error.to_string()));
                }
                Ok(gathered)
            }
            Err(error) => Err(error),
        }
    }
}

fn inconsistent(path: &Path, change: &str) -> Error {
    Error::new(Kind::Source, format!("source '{}' is not consistent: {change}", path.display()))
}

fn no_live(options: &Options, format: Format) -> Error {
    let what = format!(
        "a cooperating writer has '{}' open, and of {format} there are no live backups: only of raw and qcow2",
        options.device
    );
    Error::new(Kind::Source, what)
}

fn no_writer(options: &Options) -> Error {
    Error::new(Kind::Source, format!("no cooperating writer of '{}' is running", options.device))
}
