//! Where the copy goes, and what becomes of it: a new file, an image in place, a device, a stream.

use super::options::{Mode, Options, Target};
use super::origin::Origin;
use super::outcome::TargetState;
use crate::error::{Error, Kind, Result, Side};
use crate::image::Image;
use crate::image::format::Format;
use crate::image::location::Location;
use crate::image::lock::{self, ImageLock, Protection, Terms};
#[cfg(feature = "nbd")]
use crate::image::nbd::{Nbd, Use};
use crate::image::open::open_backing;
use crate::image::probe::{self, probe};
use crate::image::qcow2::{CreateOptions, ExistingQcow2, NewQcow2};
use crate::image::raw::{Raw, WRITEBACK_STEP};
use crate::image::stream::Stream;
use crate::image::target::{InPlace, open_in_place, refuse_other_size};
use crate::job::Job;
use crate::monitor::{TargetKind, Warning};
#[cfg(feature = "nbd")]
use crate::nbd::uri::Uri;
use crate::publish::Publish;
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
    warnings: Vec<Warning>,
    _lock: Option<ImageLock>,
}

impl Destination {
    /// Opens, locks and checks. Refusals come before anything is touched.
    pub fn open(options: &Options, origin: &Origin) -> Result<Self> {
        let path = match &options.target {
            Target::Stdout => return Self::stream(origin.length()),
            Target::At(location) => location,
        };
        options.device.refuse_as_target(path)?;
        let path = match path {
            Location::Path(path) => path.as_path(),
            #[cfg(feature = "nbd")]
            Location::Nbd(uri) => return Self::nbd(options, uri, origin),
        };
        origin.refuse_as_target(path)?;
        let is_device = path.metadata().is_ok_and(|found| found.file_type().is_block_device());
        match options.mode {
            _ if is_device => Self::in_place(options, path, origin, TargetKind::Device),
            Mode::Existing => Self::in_place(options, path, origin, TargetKind::Existing),
            Mode::AbsolutePaths => Self::new_file(options, path, origin),
        }
    }

    fn stream(length: u64) -> Result<Self> {
        Ok(Self {
            image: Arc::new(Stream::stdout(length)?),
            format: Format::Raw,
            kind: TargetKind::Stdout,
            path: None,
            publish: None,
            raw: None,
            warnings: Vec::new(),
            _lock: None,
        })
    }

    /// An export that is there, written in place: it is the disk itself.
    #[cfg(feature = "nbd")]
    fn nbd(options: &Options, uri: &Uri, origin: &Origin) -> Result<Self> {
        let name = Path::new(uri.text());
        let is_qcow2 = options.format == Some(Format::Qcow2);
        if is_qcow2 || options.compression.is_some() || options.cluster_size.is_some() {
            let what = format!("target '{uri}' gets the disk's own bytes: qcow2 is not possible over NBD");
            return Err(Error::new(Kind::Usage, what));
        }
        let usage = Use { side: Side::Target, flushes: options.fsync, reconnect: options.reconnect };
        let image = Nbd::open(uri, usage)?;
        refuse_other_size(origin.length(), name, image.length())?;
        let mut warnings = Vec::new();
        if options.fsync && !image.can_flush() {
            let what = format!("the server of target '{uri}' can't flush: what a success means is its own affair");
            warnings.push(Warning::general("no_flush", what));
        }
        Ok(Self {
            image: Arc::new(image),
            format: Format::Raw,
            kind: TargetKind::Export,
            path: Some(name.to_owned()),
            publish: None,
            raw: None,
            warnings,
            _lock: None,
        })
    }

    fn new_file(options: &Options, path: &Path, origin: &Origin) -> Result<Self> {
        let format = options.format.or_else(|| format_of_extension(path)).unwrap_or(origin.format());
        let publish = Publish::begin(path)?;
        let length = if format == Format::Raw { origin.length() } else { 0 };
        let failed = |error| Error::file(Side::Target, "create", path, error);
        let raw = finish_raw(Raw::fresh(publish.file()?, length).map_err(failed)?, options, path)?;
        let (lock, warnings) = split(lock::acquire(raw.as_file(), path, Side::Target, Terms::Write)?);
        let image = match format {
            Format::Raw => raw.clone() as Arc<dyn Image>,
            Format::Qcow2 => Arc::new(new_qcow2(raw.clone(), options, origin)?),
        };
        Ok(Self {
            image,
            format,
            kind: TargetKind::File,
            path: Some(path.to_owned()),
            publish: Some(publish),
            raw: Some(raw),
            warnings,
            _lock: lock,
        })
    }

    fn in_place(options: &Options, path: &Path, origin: &Origin, kind: TargetKind) -> Result<Self> {
        let InPlace { image, protection } = open_in_place(path)?;
        let raw = finish_raw(image, options, path)?;
        let (lock, warnings) = split(protection);
        let format = match (options.format, options.mode) {
            (Some(format), _) => format,
            (None, Mode::Existing) => format_of_content(&raw, path)?,
            // A device gets the disk itself unless a format is asked for.
            (None, Mode::AbsolutePaths) => Format::Raw,
        };
        let image: Arc<dyn Image> = match (format, options.mode) {
            (Format::Raw, _) => raw.clone(),
            (Format::Qcow2, Mode::Existing) => {
                let backing = open_backing(path).map_err(|error| error.with_kind(Kind::Target))?;
                Arc::new(ExistingQcow2::open(path, raw.clone(), backing.map(|backing| backing.image))?)
            }
            (Format::Qcow2, Mode::AbsolutePaths) => Arc::new(new_qcow2(raw.clone(), options, origin)?),
        };
        if (format, options.mode) != (Format::Qcow2, Mode::AbsolutePaths) {
            refuse_other_size(origin.length(), path, image.length())?;
        }
        Ok(Self { image, format, kind, path: Some(path.to_owned()), publish: None, raw: None, warnings, _lock: lock })
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

    /// What a failure leaves once something was written.
    pub fn state_if_failed(&self) -> TargetState {
        match self.publish {
            Some(_) => TargetState::Removed,
            None => TargetState::Incomplete,
        }
    }

    /// An abandoned job removes the partial file, if this made one.
    pub fn undo_with(&self, job: &Job) {
        if let Some(publish) = &self.publish {
            let remover = publish.remover();
            job.on_abandon(move || drop(remover.remove()));
        }
    }

    /// Completes the image; with `fsync` it is on stable storage afterwards.
    pub fn flush(&self) -> Result<()> {
        let path = self.path.as_deref().unwrap_or(Path::new("-"));
        self.image.flush().map_err(|error| Error::file(Side::Target, "flush", path, error))
    }

    /// Gives the complete copy its name. Returns warnings.
    pub fn publish(self, fsync: bool) -> Result<Vec<Warning>> {
        let Some(publish) = self.publish else { return Ok(Vec::new()) };
        let warnings = publish.commit(fsync)?;
        Ok(warnings.into_iter().map(|message| Warning::general("publish", message)).collect())
    }
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

fn new_qcow2(file: Arc<Raw>, options: &Options, origin: &Origin) -> Result<NewQcow2> {
    let cluster_size = options.cluster_size.unwrap_or(CreateOptions::DEFAULT_CLUSTER_SIZE);
    NewQcow2::create(file, origin.length(), CreateOptions { cluster_size, compression: options.compression })
}

fn format_of_extension(path: &Path) -> Option<Format> {
    match path.extension()?.to_str()? {
        "raw" | "img" => Some(Format::Raw),
        "qcow2" => Some(Format::Qcow2),
        _ => None,
    }
}

fn format_of_content(raw: &Raw, path: &Path) -> Result<Format> {
    let mut start = vec![0; raw.length().min(probe::LENGTH as u64) as usize];
    raw.read_at(&mut start, 0).map_err(|error| Error::file(Side::Target, "read", path, error))?;
    Ok(probe(&start).format)
}
