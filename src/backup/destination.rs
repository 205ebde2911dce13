//! Where the copy goes, and what becomes of it: a new file, an image in place, a device, a stream.

use super::Disk;
#[cfg(feature = "nbd")]
use super::foreign::{self, Unmade};
use super::options::{Mode, Options, Target};
use super::origin::Origin;
use super::outcome::TargetState;
use super::target_format::{
    as_source, foreign_in_place, format_of_content, refuse_qcow2_options, refuse_without_backing,
};
use crate::error::{Error, Kind, Result, Side, reason};
use crate::image::Image;
use crate::image::changed::Changed;
use crate::image::format::{Foreign, Format};
use crate::image::identity;
use crate::image::location::Location;
use crate::image::lock::{self, ImageLock, Protection, Terms};
use crate::image::medium;
#[cfg(feature = "nbd")]
use crate::image::nbd::{Nbd, Use};
use crate::image::null::Null;
#[cfg(feature = "nbd")]
use crate::image::open::open_elsewhere;
use crate::image::open::{SourceOptions, open_backing, open_source};
use crate::image::qcow2::{CreateOptions, ExistingQcow2, NewQcow2};
#[cfg(feature = "nbd")]
use crate::image::qemu::{Qemu, Remote};
use crate::image::raw::{Raw, WRITEBACK_STEP};
use crate::image::stream::Stream;
use crate::image::target::{InPlace, open_in_place, refuse_other_size};
use crate::job::Job;
use crate::monitor::{TargetKind, Warning};
#[cfg(feature = "nbd")]
use crate::nbd::uri::Uri;
use crate::publish::Publish;
use std::io::Write;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// An opened target. Nothing that was there before is touched until something is written.
pub struct Destination {
    image: Arc<dyn Image>,
    format: Format,
    kind: TargetKind,
    path: Option<PathBuf>,
    publish: Option<Publish>,
    /// The file itself, where it is one, for the kernel to clone into.
    raw: Option<Arc<Raw>>,
    /// Over the image, where only that is written which differs.
    changed: Option<Arc<Changed>>,
    /// Beside the copy.
    manifest: Option<Publish>,
    warnings: Vec<Warning>,
    /// A flush reaches stable storage: no server said that it has none.
    can_flush: bool,
    /// An NBD server's, with the image in it.
    #[cfg(feature = "nbd")]
    export: Option<Arc<dyn Image>>,
    /// To be ended before it is published.
    #[cfg(feature = "nbd")]
    qemu: Option<Arc<Qemu>>,
    /// Where the image is to be made once the instant is taken.
    #[cfg(feature = "nbd")]
    unmade: Option<Remote>,
    /// The target's, and those of the files behind it.
    _locks: Vec<ImageLock>,
}

impl Destination {
    /// Opens, locks and checks. Refusals come before anything is touched.
    pub fn open(disk: Disk<'_>, origin: &Origin) -> Result<Self> {
        let options = disk.options;
        let opened = match &options.target {
            Target::Nowhere => return Ok(Self::nowhere(origin.length())),
            Target::Stdout if options.proof.verify => {
                return Err(Error::new(Kind::Usage, "a stream can't be read back: verify needs a file or a device"));
            }
            Target::Stdout => Self::stream(origin.length())?.with_manifest(options, origin),
            Target::At(location) => Self::at(disk, location, origin)?.with_manifest(options, origin),
        };
        let destination = opened?;
        destination.refuse_idle_secret(options)?;
        match options.restoring.only_changed {
            false => Ok(destination),
            true if destination.is_there() => Ok(destination.only_changed()),
            true => {
                Err(Error::new(Kind::Usage, "a new file has nothing that could be kept: write into one that is there"))
            }
        }
    }

    fn at(disk: Disk<'_>, path: &Location, origin: &Origin) -> Result<Self> {
        let options = disk.options;
        options.device.refuse_as_target(path)?;
        let path = match path {
            Location::Path(path) => path.as_path(),
            #[cfg(feature = "nbd")]
            Location::Nbd(uri) => return Self::nbd(options, uri, origin),
            #[cfg(feature = "nbd")]
            Location::Qemu(remote) => {
                let (image, format) = foreign::remote(disk, remote, origin.length())?;
                return Ok(match image {
                    Some(image) => Self::qemu(image, format, TargetKind::Remote, remote.name(), origin),
                    None => Self::unmade(remote, format, origin),
                });
            }
        };
        origin.refuse_as_target(path)?;
        refuse_without_backing(options, path, origin)?;
        let is_device = path.metadata().is_ok_and(|found| found.file_type().is_block_device());
        match options.mode {
            _ if is_device => Self::in_place(disk, path, origin, TargetKind::Device),
            Mode::Existing => Self::in_place(disk, path, origin, TargetKind::Existing),
            Mode::AbsolutePaths => Self::new_file(disk, path, origin),
        }
    }

    /// The disk's own bytes, in place.
    fn raw_disk(image: Arc<dyn Image>, kind: TargetKind) -> Self {
        Self {
            image,
            format: Format::Raw,
            kind,
            path: None,
            publish: None,
            raw: None,
            changed: None,
            manifest: None,
            warnings: Vec::new(),
            can_flush: true,
            #[cfg(feature = "nbd")]
            export: None,
            #[cfg(feature = "nbd")]
            qemu: None,
            #[cfg(feature = "nbd")]
            unmade: None,
            _locks: Vec::new(),
        }
    }

    /// Whoever asks for a secret believes that the copy is encrypted.
    fn refuse_idle_secret(&self, options: &Options) -> Result<()> {
        let is_encrypted = matches!(self.format, Format::Foreign(format) if format.is_encrypted());
        if options.target_secret.is_none() || is_encrypted {
            return Ok(());
        }
        let (target, format) = (self.name().display(), self.format);
        let what =
            format!("target '{target}' is to be {format}, which is not encrypted: use --format luks or qcow2-luks");
        Err(Error::new(Kind::Usage, what))
    }

    /// Whether there is something before the copy.
    fn is_there(&self) -> bool {
        #[cfg(feature = "nbd")]
        let is_unmade = self.unmade.is_some();
        #[cfg(not(feature = "nbd"))]
        let is_unmade = false;
        !is_unmade && self.publish.is_none() && self.kind != TargetKind::Stdout
    }

    fn only_changed(self) -> Self {
        let changed = Arc::new(Changed::of(self.image));
        Self { image: changed.clone(), changed: Some(changed), ..self }
    }

    /// Begins the manifest, under no name yet.
    fn with_manifest(self, options: &Options, origin: &Origin) -> Result<Self> {
        let Some(path) = &options.proof.manifest else { return Ok(self) };
        origin.refuse_as_target(path).map_err(of_manifest)?;
        Ok(Self { manifest: Some(Publish::begin(path).map_err(of_manifest)?), ..self })
    }

    fn nowhere(length: u64) -> Self {
        Self { can_flush: false, ..Self::raw_disk(Arc::new(Null::new(length)), TargetKind::Nowhere) }
    }

    fn stream(length: u64) -> Result<Self> {
        let stream = Stream::stdout(length)?;
        let can_flush = stream.can_flush().map_err(|e| Error::file(Side::Target, "stat", Path::new("-"), e))?;
        Ok(Self { can_flush, ..Self::raw_disk(Arc::new(stream), TargetKind::Stdout) })
    }

    /// An export that is there, written in place: it is the disk itself, or holds the qcow2 image that was asked for.
    #[cfg(feature = "nbd")]
    fn nbd(options: &Options, uri: &Uri, origin: &Origin) -> Result<Self> {
        let name = Path::new(uri.text());
        let refuse = |what: &str| Err(Error::new(Kind::Usage, format!("target '{uri}' {what}")));
        let format = options.format.unwrap_or(Format::Raw);
        let is_shaped = options.compression.is_some() || options.cluster_size.is_some();
        match (format, options.mode) {
            (Format::Foreign(_), _) => return refuse("gets the disk's own bytes, or qcow2"),
            (Format::Raw, _) if is_shaped => return refuse("gets the disk's own bytes: for qcow2 say --format qcow2"),
            (Format::Raw, Mode::AbsolutePaths) if origin.backing().is_some() => {
                return refuse("gets the disk's own bytes, which can't have a backing file");
            }
            (Format::Qcow2, Mode::Existing) if is_shaped => {
                return refuse("holds an image that has its own cluster size");
            }
            _ => {}
        }
        let usage = Use { side: Side::Target, flushes: options.fsync, reconnect: options.reconnect };
        let export = Arc::new(Nbd::open(uri, usage)?);
        let can_flush = export.can_flush();
        let image: Arc<dyn Image> = match (format, options.mode) {
            (Format::Qcow2, Mode::AbsolutePaths) => Arc::new(new_qcow2(export.clone(), options, origin)?),
            (Format::Qcow2, Mode::Existing) => Arc::new(ExistingQcow2::open(name, export.clone(), None)?),
            _ => export.clone(),
        };
        let mut warnings = Vec::new();
        if (format, options.mode) != (Format::Qcow2, Mode::AbsolutePaths) {
            warnings.extend(fitting(options, origin.length(), name, image.length())?);
        }
        if !can_flush && options.fsync {
            let what = format!("the server of target '{uri}' can't flush: what a success means is its own affair");
            warnings.push(Warning::general("no_flush", what));
        }
        let (path, export) = (Some(name.to_owned()), Some(export as Arc<dyn Image>));
        Ok(Self { format, path, warnings, can_flush, export, ..Self::raw_disk(image, TargetKind::Export) })
    }

    #[cfg(feature = "nbd")]
    fn qemu(image: Arc<Qemu>, format: Format, kind: TargetKind, path: &Path, origin: &Origin) -> Self {
        Self {
            format,
            path: Some(path.to_owned()),
            warnings: foreign::rounded(&image, path, origin.length()).into_iter().collect(),
            qemu: Some(image.clone()),
            ..Self::raw_disk(image, kind)
        }
    }

    #[cfg(feature = "nbd")]
    fn unmade(remote: &Remote, format: Format, origin: &Origin) -> Self {
        let (path, image) = (Some(remote.name().to_owned()), Arc::new(Unmade(origin.length())));
        Self { format, path, unmade: Some(remote.clone()), ..Self::raw_disk(image, TargetKind::Remote) }
    }

    /// Makes a new image elsewhere, which could not be taken away again: whatever refuses a backup comes before. Returns
    /// what the user should know of it. What is there after an error is said beside it.
    #[cfg(feature = "nbd")]
    pub fn make(&mut self, disk: Disk<'_>, origin: &Origin) -> Result<Vec<Warning>, (Error, TargetState)> {
        let Some(remote) = self.unmade.take() else { return Ok(Vec::new()) };
        let image = foreign::make_remote(disk, &remote, self.format, origin.length())?;
        let abandoned = image.clone();
        disk.job.on_abandon(move || abandoned.abandon());
        (self.image, self.qemu) = (image.clone(), Some(image.clone()));
        Ok(foreign::rounded(&image, remote.name(), origin.length()).into_iter().collect())
    }

    #[cfg(not(feature = "nbd"))]
    pub fn make(&mut self, _: Disk<'_>, _: &Origin) -> Result<Vec<Warning>, (Error, TargetState)> {
        Ok(Vec::new())
    }

    #[cfg(feature = "nbd")]
    fn new_foreign(disk: Disk<'_>, path: &Path, format: Foreign, origin: &Origin) -> Result<Self> {
        let publish = Publish::begin(path)?;
        let image = foreign::new_file(disk, format, &publish.partial_path(), path, origin.length())?;
        let this = Self::qemu(image, Format::Foreign(format), TargetKind::File, path, origin);
        Ok(Self { publish: Some(publish), ..this })
    }

    #[cfg(not(feature = "nbd"))]
    fn new_foreign(_: Disk<'_>, path: &Path, format: Foreign, _: &Origin) -> Result<Self> {
        Err(without_nbd(path, format))
    }

    #[cfg(feature = "nbd")]
    fn existing_foreign(disk: Disk<'_>, path: &Path, format: Foreign, origin: &Origin) -> Result<Self> {
        let image = foreign::existing_file(disk, format, path, origin.length())?;
        Ok(Self::qemu(image, Format::Foreign(format), TargetKind::Existing, path, origin))
    }

    #[cfg(not(feature = "nbd"))]
    fn existing_foreign(_: Disk<'_>, path: &Path, format: Foreign, _: &Origin) -> Result<Self> {
        Err(without_nbd(path, format))
    }

    fn new_file(disk: Disk<'_>, path: &Path, origin: &Origin) -> Result<Self> {
        let options = disk.options;
        let format = options.format.or_else(|| Format::of_extension(path)).unwrap_or_else(|| as_source(origin));
        refuse_qcow2_options(options, path, format)?;
        // Of a file system in the old file the new name would be no part.
        identity::refuse_in_use(path, Side::Target)?;
        if let Format::Foreign(foreign) = format {
            return Self::new_foreign(disk, path, foreign, origin);
        }
        let publish = Publish::begin(path)?;
        let length = if format == Format::Raw { origin.length() } else { 0 };
        let failed = |error| Error::file(Side::Target, "create", path, error);
        let raw = finish_raw(Raw::fresh(publish.file()?, length).map_err(failed)?, options, path)?;
        let (lock, warnings) = split(lock::acquire(raw.as_file(), path, Side::Target, Terms::Write)?);
        let image = match format {
            Format::Raw => raw.clone() as Arc<dyn Image>,
            Format::Qcow2 => Arc::new(new_qcow2(raw.clone(), options, origin)?),
            Format::Foreign(_) => unreachable!("returned above"),
        };
        Ok(Self {
            image,
            format,
            kind: TargetKind::File,
            path: Some(path.to_owned()),
            publish: Some(publish),
            raw: Some(raw),
            changed: None,
            manifest: None,
            warnings,
            can_flush: true,
            #[cfg(feature = "nbd")]
            export: None,
            #[cfg(feature = "nbd")]
            qemu: None,
            #[cfg(feature = "nbd")]
            unmade: None,
            _locks: lock.into_iter().collect(),
        })
    }

    fn in_place(disk: Disk<'_>, path: &Path, origin: &Origin, kind: TargetKind) -> Result<Self> {
        let options = disk.options;
        if let Some(foreign) = foreign_in_place(options, path, origin)? {
            return Self::existing_foreign(disk, path, foreign, origin);
        }
        let InPlace { image, protection } = open_in_place(path)?;
        let raw = finish_raw(image, options, path)?;
        let (lock, mut warnings) = split(protection);
        let mut locks: Vec<ImageLock> = lock.into_iter().collect();
        let format = match (options.format, options.mode) {
            (Some(format), _) => format,
            (None, Mode::Existing) => format_of_content(&raw, path, origin)?,
            // A device gets the disk itself unless a format is asked for.
            (None, Mode::AbsolutePaths) => Format::Raw,
        };
        refuse_qcow2_options(options, path, format)?;
        let image: Arc<dyn Image> = match (format, options.mode) {
            (Format::Raw, _) => raw.clone(),
            (Format::Qcow2, Mode::Existing) => {
                let backing = open_backing(path).map_err(|error| error.with_kind(Kind::Target))?;
                // What it shows is a part of the target, if only that is written which differs from it.
                let behind = backing.as_ref().filter(|_| options.restoring.only_changed);
                for file in behind.iter().flat_map(|backing| &backing.files) {
                    let kept = lock::acquire(file.raw.as_file(), &file.path, Side::Target, Terms::Read)?;
                    let (lock, unlocked) = split(kept);
                    locks.extend(lock);
                    warnings.extend(unlocked);
                }
                for warning in backing.iter().flat_map(|backing| &backing.warnings) {
                    warnings.push(Warning::general("target", warning.clone()));
                }
                Arc::new(ExistingQcow2::open(path, raw.clone(), backing.map(|backing| backing.image))?)
            }
            (Format::Qcow2, Mode::AbsolutePaths) => Arc::new(new_qcow2(raw.clone(), options, origin)?),
            (Format::Foreign(foreign), _) => {
                let (path, name) = (path.display(), foreign.name());
                return Err(Error::new(Kind::Target, format!("target '{path}' became {name} while it was opened")));
            }
        };
        if (format, options.mode) != (Format::Qcow2, Mode::AbsolutePaths) {
            warnings.extend(fitting(options, origin.length(), path, image.length())?);
        }
        let path = Some(path.to_owned());
        Ok(Self { format, path, warnings, _locks: locks, ..Self::raw_disk(image, kind) })
    }

    /// What is written to.
    pub fn image(&self) -> &dyn Image {
        self.image.as_ref()
    }

    /// Of the image.
    pub fn format(&self) -> Format {
        self.format
    }

    /// What kind of end it is.
    pub fn kind(&self) -> TargetKind {
        self.kind
    }

    /// As given; `None`: standard output.
    pub fn path(&self) -> Option<&Path> {
        self.path.as_deref()
    }

    /// A new raw file, into which the kernel may clone the source whole.
    pub fn clonable(&self) -> Option<&Raw> {
        self.raw.as_deref().filter(|_| self.format == Format::Raw)
    }

    /// What the user should know of it.
    pub fn warnings(&self) -> impl Iterator<Item = &Warning> {
        self.warnings.iter()
    }

    /// As given; `-`: standard output.
    pub fn name(&self) -> &Path {
        self.path.as_deref().unwrap_or(Path::new("-"))
    }

    /// Bytes that differed and were written; `None`: all were.
    pub fn written(&self) -> Option<u64> {
        self.changed.as_ref().map(|changed| changed.written())
    }

    /// The target after a flush, opened anew and read from its medium, as far as the system lets us: past the page cache,
    /// or at least with nothing of it there. Of an export that is its server's business.
    pub fn read_back(&self, disk: Disk<'_>) -> Result<Arc<dyn Image>> {
        let options = disk.options;
        let how = |direct| SourceOptions {
            format: Some(self.format),
            backing: true,
            direct,
            secret: options.secret_of_target().cloned(),
            shared: false,
        };
        #[cfg(feature = "nbd")]
        if let Target::At(Location::Qemu(remote)) = &options.target {
            return foreign::source(remote, &how(false), disk.job).map(|source| source.image);
        }
        #[cfg(feature = "nbd")]
        if let Some(export) = &self.export {
            return open_elsewhere(export.clone(), self.name(), self.format).map(|source| source.image);
        }
        let path = match (&self.publish, &self.path, self.kind) {
            (_, None, _) => return Ok(self.image.clone()),
            // Another process opens it.
            (Some(publish), ..) if matches!(self.format, Format::Foreign(_)) => publish.partial_path(),
            (Some(publish), ..) => publish.opened_path(),
            (None, Some(path), _) => path.clone(),
        };
        let failed = |e| Error::file(Side::Target, "read back", self.name(), e);
        medium::drop_cache(&std::fs::File::open(&path).map_err(failed)?).map_err(failed)?;
        let open = |direct| open_source(&path, &how(direct));
        let named = |error: Error| {
            let text = error.to_string().replace(&*path.to_string_lossy(), &self.name().to_string_lossy());
            Error::new(error.kind(), text)
        };
        open(true).or_else(|_| open(false)).map(|source| source.image).map_err(named)
    }

    /// What a failure leaves once something was written.
    pub fn state_if_failed(&self) -> TargetState {
        match self.publish {
            Some(_) => TargetState::Removed,
            None if self.kind == TargetKind::Nowhere => TargetState::Untouched,
            None => TargetState::Incomplete,
        }
    }

    /// An abandoned job removes the partial files, if this made any.
    pub fn undo_with(&self, job: &Job) {
        let image = self.image.clone();
        job.on_abandon(move || image.abandon());
        for publish in [&self.publish, &self.manifest].into_iter().flatten() {
            let remover = publish.remover();
            job.on_abandon_in_time(move || remover.remove().is_ok_and(|_| remover.is_removed()));
        }
    }

    /// Whether what [`Destination::flush`] completed is on stable storage.
    pub fn is_durable(&self, options: &Options) -> bool {
        options.fsync && self.can_flush
    }

    /// Completes the image; with `fsync` it is on stable storage afterwards.
    pub fn flush(&self) -> Result<()> {
        self.image.flush().map_err(|error| Error::file(Side::Target, "flush", self.name(), error))?;
        #[cfg(feature = "nbd")]
        self.qemu.as_ref().map_or(Ok(()), |qemu| qemu.end())?;
        Ok(())
    }

    /// Writes the manifest, to be published after the copy. With `fsync` it is on stable storage afterwards: what can fail
    /// of it fails before the copy has its name. Returns warnings.
    pub fn write_manifest(&self, bytes: &[u8], fsync: bool) -> Result<Vec<Warning>> {
        let Some(publish) = &self.manifest else { return Ok(Vec::new()) };
        let failed =
            |e| Error::new(Kind::Target, format!("write manifest '{}': {}", publish.target().display(), reason(&e)));
        publish.file()?.write_all(bytes).map_err(failed)?;
        Ok(publish_warnings(publish.prepare(fsync).map_err(of_manifest)?))
    }

    /// Gives the complete copy its name, and the manifest its own. Returns warnings. What is there after an error is said
    /// beside it.
    pub fn publish(self, fsync: bool) -> Result<Vec<Warning>, (Error, TargetState)> {
        let mut warnings = match self.publish {
            Some(publish) => {
                let remover = publish.remover();
                let state = || if remover.is_removed() { TargetState::Removed } else { TargetState::OldOrComplete };
                publish.commit(fsync).map_err(|error| (error, state()))?
            }
            None => Vec::new(),
        };
        if let Some(manifest) = self.manifest {
            let about =
                |error: Error| Error::new(error.kind(), format!("the copy is complete, its manifest is not: {error}"));
            warnings.extend(manifest.take_name(fsync).map_err(|error| (about(error), TargetState::Complete))?);
        }
        Ok(publish_warnings(warnings))
    }

    /// Ends a copy that failed with `error`; one that `is_bad`, since it is not what was written, is kept, under a name of
    /// its own.
    pub fn give_up(self, error: Error, is_bad: bool) -> (Error, TargetState) {
        let state = self.state_if_failed();
        match self.publish {
            Some(publish) if is_bad => match publish.set_aside() {
                Ok(bad) => (error.with_note(&format!("the copy is kept as '{}'", bad.display())), TargetState::KeptBad),
                Err(_) => (error, state),
            },
            _ => (error, state),
        }
    }
}

fn of_manifest(error: Error) -> Error {
    Error::new(error.kind(), format!("manifest: {error}"))
}

fn publish_warnings(messages: Vec<String>) -> Vec<Warning> {
    messages.into_iter().map(|message| Warning::general("publish", message)).collect()
}

/// Refuses a target of a size that does not fit; a warning where it is larger and may be.
fn fitting(options: &Options, source: u64, path: &Path, target: u64) -> Result<Option<Warning>> {
    if target <= source || !options.restoring.onto_larger {
        return refuse_other_size(source, path, target).map(|()| None);
    }
    let path = path.display();
    let rest = target - source;
    let what = format!("target '{path}' is {rest} bytes larger than the disk: what it holds from {source:#x} on stays");
    Ok(Some(Warning::general("larger_target", what)))
}

fn finish_raw(raw: Raw, options: &Options, path: &Path) -> Result<Arc<Raw>> {
    let raw = if options.fsync { raw.with_writeback(WRITEBACK_STEP) } else { raw.without_flush() };
    if !options.direct {
        return Ok(Arc::new(raw));
    }
    raw.with_direct().map(Arc::new).map_err(|e| Error::file(Side::Target, "open for direct I/O", path, e))
}

fn split(protection: Protection) -> (Option<ImageLock>, Vec<Warning>) {
    match protection {
        Protection::Locked(lock) => (Some(lock), Vec::new()),
        Protection::Unsupported(message) => (None, vec![Warning::general("no_locks", message)]),
    }
}

fn new_qcow2(file: Arc<dyn Image>, options: &Options, origin: &Origin) -> Result<NewQcow2> {
    let cluster_size = options.cluster_size.unwrap_or(CreateOptions::DEFAULT_CLUSTER_SIZE);
    let image =
        NewQcow2::create(file, origin.length(), CreateOptions { cluster_size, compression: options.compression })?;
    match origin.backing() {
        Some(backing) => image.over(backing.clone()),
        None => Ok(image),
    }
}

#[cfg(not(feature = "nbd"))]
fn without_nbd(path: &Path, format: Foreign) -> Error {
    let (path, name) = (path.display(), format.name());
    let what = format!("target '{path}': this drive-backup was built without NBD, which {name} needs");
    Error::new(Kind::Usage, what)
}
