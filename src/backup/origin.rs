//! Where the copy comes from: the source with every file that it is made of.

#[cfg(feature = "nbd")]
use super::foreign;
use super::options::{Options, SyncMode};
use super::view;
use crate::error::{Error, Kind, Result, Side};
use crate::ground::range::ByteRange;
use crate::ground::zero;
use crate::image::Image;
use crate::image::format::Format;
use crate::image::identity;
use crate::image::location::Location;
use crate::image::medium::Identity;
#[cfg(feature = "nbd")]
use crate::image::nbd::{Nbd, Use};
#[cfg(feature = "nbd")]
use crate::image::open::open_elsewhere;
use crate::image::open::{Source, SourceFile, SourceOptions, open_source};
use crate::image::prefix::Prefix;
use crate::image::qcow2::header::Backing;
use crate::image::top::Top;
use crate::job::Job;
use crate::monitor::Warning;
#[cfg(feature = "nbd")]
use crate::nbd::uri::Uri;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// An opened source.
pub struct Origin {
    name: PathBuf,
    source: Source,
    /// For [`SyncMode::Top`] of an image that has a backing file, and [`SyncMode::None`].
    backing: Option<Backing>,
    only_allocated: bool,
    /// Bytes that are left of the disk, where some were cut off.
    trimmed: Option<u64>,
}

impl Origin {
    /// Opens the image and its backing chain, unless `job` is cancelled meanwhile. Nothing is locked yet.
    pub fn open(options: &Options, job: &Job) -> Result<Self> {
        let mut source = Self::source(options, job)?;
        let only_allocated = Self::narrow(&mut source, options.sync);
        let backing = match options.sync {
            SyncMode::Full => None,
            SyncMode::Top => source.top.as_ref().map(|top| top.backing.clone()),
            SyncMode::None => Some(Self::as_backing(options, source.format)?),
        };
        Ok(Self { name: options.device.name().to_owned(), source, backing, only_allocated, trimmed: None })
    }

    /// Leaves what only the backing file holds unallocated, if that is asked for and there is one.
    fn narrow(source: &mut Source, sync: SyncMode) -> bool {
        let Some(top) = source.top.as_ref().filter(|_| sync == SyncMode::Top) else { return false };
        source.image = Arc::new(Top::of(top.image.clone(), source.image.clone()));
        true
    }

    /// The source as a backing file of the target.
    fn as_backing(options: &Options, format: Format) -> Result<Backing> {
        let Some(path) = options.device.path() else {
            let what = format!("a target can't be backed by '{}': only by a file or a device", options.device);
            return Err(Error::new(Kind::Usage, what));
        };
        if let Format::Foreign(foreign) = format {
            let what = format!("'{}' is {}, of which nobody traps writes", path.display(), foreign.name());
            return Err(Error::new(Kind::Usage, what));
        }
        let path = path.canonicalize().map_err(|e| Error::file(Side::Source, "open", path, e))?;
        Ok(Backing { name: path.into_os_string(), format: Some(format.name().to_owned()) })
    }

    /// What a new target names as its backing file.
    pub fn backing(&self) -> Option<&Backing> {
        self.backing.as_ref()
    }

    /// Is only that to be copied which is allocated?
    pub fn only_allocated(&self) -> bool {
        self.only_allocated
    }

    #[cfg_attr(not(feature = "nbd"), allow(unused_variables))]
    fn source(options: &Options, job: &Job) -> Result<Source> {
        let how = SourceOptions {
            format: options.source_format,
            backing: options.backing,
            direct: options.direct,
            secret: options.secret.clone(),
            shared: options.allow_inconsistent,
        };
        let path = match &options.device {
            Location::Path(path) => path,
            #[cfg(feature = "nbd")]
            Location::Nbd(uri) => return Self::of_nbd(options, uri),
            #[cfg(feature = "nbd")]
            Location::Qemu(remote) => return foreign::source(remote, &how, job),
        };
        match view::image_behind(options, path)? {
            Some(shown) => view::open(path, &shown, how),
            None => open_source(path, &how),
        }
    }

    /// An export is the disk itself, unless somebody says otherwise: its guest may have written any header.
    #[cfg(feature = "nbd")]
    fn of_nbd(options: &Options, uri: &Uri) -> Result<Source> {
        let usage = Use { side: Side::Source, flushes: false, reconnect: options.reconnect };
        let image = Arc::new(Nbd::open(uri, usage)?);
        open_elsewhere(image, options.device.name(), options.source_format.unwrap_or(Format::Raw))
    }

    /// The disk's contents, from tables that are read again. A disk whose bytes are all there is of it has none; those that
    /// QEMU has read must not have changed.
    pub fn as_of_now(&self, options: &Options, job: &Job) -> Result<Arc<dyn Image>> {
        if self.format() == Format::Qcow2 && self.is_watched() {
            return self.reopen(options, job);
        }
        for (file, opened) in self.files().iter().zip(&self.source.opened).filter(|_| !options.allow_inconsistent) {
            if let Some(change) = file.look()?.changed_since(opened) {
                return Err(self.while_opened(&format!("was changed: {change}")));
            }
        }
        Ok(self.image())
    }

    fn reopen(&self, options: &Options, job: &Job) -> Result<Arc<dyn Image>> {
        let mut again = Self::source(options, job)?;
        Self::narrow(&mut again, options.sync);
        let identity = |file: &SourceFile| file.raw.as_file().metadata().map(|metadata| Identity::of(&metadata)).ok();
        let are_same = again.files.iter().map(identity).eq(self.files().iter().map(identity));
        if let Some(length) = self.trimmed.filter(|length| *length < again.image.length()) {
            again.image = Arc::new(Prefix::of(again.image, length));
        }
        if !are_same || again.format != self.format() || again.image.length() != self.length() {
            return Err(self.while_opened("was replaced"));
        }
        Ok(again.image)
    }

    /// Fails when a disk whose bytes are all there is of it has not the size any more with which it was opened.
    pub fn refuse_resized(&self) -> Result<()> {
        let Some(SourceFile { path, raw, .. }) = self.files().first().filter(|_| self.format() == Format::Raw) else {
            return Ok(());
        };
        let now = raw.medium().length(raw.as_file()).map_err(|e| Error::file(Side::Source, "stat", path, e))?;
        if now == raw.length() { Ok(()) } else { Err(self.while_opened(&format!("was resized to {now} bytes"))) }
    }

    fn while_opened(&self, what: &str) -> Error {
        Error::new(Kind::Source, format!("source '{}' {what} while it was opened", self.name.display()))
    }

    /// As it was named.
    pub fn name(&self) -> &Path {
        &self.name
    }

    /// Size of the disk in bytes.
    pub fn length(&self) -> u64 {
        self.source.image.length()
    }

    /// Cuts off the zero bytes from `length` on that a format of whole sectors has added. [`Kind::Differs`] when they are not.
    pub fn trim(&mut self, length: u64) -> Result<()> {
        let tail = ByteRange::between(length, self.length());
        if tail.is_empty() {
            return Ok(());
        }
        let mut bytes = vec![0; tail.length as usize];
        self.source.image.read_at(&mut bytes, length).map_err(|e| Error::io(Side::Source, "read", tail, e))?;
        if !zero::is_zero(&bytes) {
            let what = format!(
                "'{}' holds something at {tail}, after the end of the disk of its manifest",
                self.name.display()
            );
            return Err(Error::differs(what, vec![tail]));
        }
        self.source.image = Arc::new(Prefix::of(self.source.image.clone(), length));
        self.trimmed = Some(length);
        Ok(())
    }

    /// Of the image itself.
    pub fn format(&self) -> Format {
        self.source.format
    }

    /// The disk's contents.
    pub fn image(&self) -> Arc<dyn Image> {
        self.source.image.clone()
    }

    /// The image, its backing files, their data files.
    pub fn files(&self) -> &[SourceFile] {
        &self.source.files
    }

    /// What the user should know of it.
    pub fn warnings(&self) -> impl Iterator<Item = Warning> {
        self.source.warnings.iter().map(|message| Warning::general("source", message.clone()))
    }

    /// Fails when writing `target` would write one of the source's files, under whatever name.
    pub fn refuse_as_target(&self, target: &Path) -> Result<()> {
        let files: Vec<&Path> = self.files().iter().map(|file| file.path.as_path()).collect();
        identity::refuse_same(target, &files)
    }

    /// An abandoned job waits for no read of it.
    pub fn undo_with(&self, job: &Job) {
        let image = self.image();
        job.on_abandon(move || image.abandon());
    }

    /// Whether anybody can tell if it changes: nobody sees who writes behind a server.
    pub fn is_watched(&self) -> bool {
        !self.files().is_empty()
    }
}
