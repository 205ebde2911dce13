//! A disk as a front-end sees it. Every change is bracketed, so that a backup may be taken at any time.
//!
//! # The format
//!
//! It is decided once, when the disk is opened: by the flag, else by the first bytes. A guest may write what it likes, the first
//! bytes of another format too; at the next start, or in a backup of the image, such bytes would be taken for a header, whose
//! backing file may be any file of this host. So where the format was found to be raw by looking, a write that would make the
//! disk look like another format fails with EPERM. With `--format raw` there is nothing to be mistaken: all may be written.

use crate::error::{Error, Kind, Result, Side};
use crate::ground::range::{ByteRange, Extent};
use crate::hold::{self, Place};
use crate::image::format::{Foreign, Format};
use crate::image::identity;
use crate::image::lock::{self, ImageLock, Protection, Terms};
use crate::image::medium::Medium;
use crate::image::open::{SourceFile, SourceOptions, open_backing, open_source};
use crate::image::probe::{self, Probe, probe};
use crate::image::qcow2::{ExistingQcow2, Qcow2};
use crate::image::raw::Raw;
use crate::image::secret::Secret;
use crate::image::target::{InPlace, open_alone};
use crate::image::{Image, Properties};
use crate::ring::folder::shown::Sign;
use crate::ring::folder::{self, Folder};
use crate::writer::{Write, Writer};
use rustix::io::{Errno, ReadWriteFlags};
use std::fs::File;
use std::io::{self, IoSliceMut};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Bytes: what most file systems and guests like.
const PREFERRED: u32 = 4096;
/// Bytes of one request.
const MAXIMUM: u32 = 32 << 20;
/// Bytes of zeroes that are written at once where there is no other way.
const ZEROES: u64 = 1 << 20;
/// Bytes that are zeroed or discarded in one bracket, and a multiple of what any image calls a cluster.
const STRETCH: u64 = 32 << 20;

/// How to open a disk for serving.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DiskOptions {
    /// What clients call it; may be empty.
    pub name: String,
    /// A raw file, a block device, or a qcow2 image.
    pub path: PathBuf,
    /// `None`: its first bytes tell. An image given as raw is raw, whatever it holds.
    pub format: Option<Format>,
    /// Nobody writes it: every change is refused, and others may read it too.
    pub read_only: bool,
    /// What opens an encrypted disk, which can only be read.
    pub secret: Option<Secret>,
    /// Where backups find this writer; `None`: [`folder::default_path`].
    pub writer_dir: Option<PathBuf>,
}

/// Sizes of requests in bytes, as NBD announces them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Offsets and lengths are multiples of it.
    pub minimum: u32,
    /// Requests that are whole multiples of it cost no more than they move.
    pub preferred: u32,
    /// No request moves more.
    pub maximum: u32,
}

/// See the module. Requests may come from many threads at once; two that overlap in time and place may take effect in any order.
///
/// Every error is an errno for the client: EINVAL and ENOSPC past the end, EPERM for a change of a read-only disk, what the
/// system says else; and what a backup with `--on-cbw-error break-guest-write` answers to a write that it can't save.
pub struct Disk {
    name: String,
    path: PathBuf,
    format: Format,
    length: u64,
    read_only: bool,
    /// Dropped first: a backup that freezes us needs the image.
    writer: Option<Writer>,
    image: Arc<dyn Image>,
    /// The image itself, where its bytes are the disk's.
    raw: Option<Arc<Raw>>,
    /// The image's own file or device.
    container: Option<Arc<Raw>>,
    writer_dir: Option<PathBuf>,
    /// What the first sector looked like, where that decided the format.
    guess: Option<Mutex<Probe>>,
    warnings: Vec<String>,
    _locks: Vec<ImageLock>,
}

impl Disk {
    /// Opens and locks a disk, and lets backups of it attach. Blocks; if a backup of it begins right now, some seconds.
    ///
    /// [`Kind::Busy`] when the disk is locked, mounted or claimed by somebody else; [`Kind::Source`] when it can't be opened or
    /// understood, or has features that are not written; [`Kind::Other`] when backups could not find it.
    pub fn open(options: &DiskOptions) -> Result<Self> {
        if options.read_only { Self::open_read_only(options) } else { Self::open_writable(options) }
    }

    fn open_writable(options: &DiskOptions) -> Result<Self> {
        let path = &options.path;
        let InPlace { image, protection } = open_alone(path, Side::Disk)?;
        let raw = Arc::new(image.with_data_flush());
        let mut locks = Locks::default();
        locks.keep(protection);
        let (format, guess) = match options.format {
            Some(format) => (format, None),
            None => locks.look(&raw, path)?,
        };
        let image: Arc<dyn Image> = match format {
            Format::Raw => raw.clone(),
            Format::Qcow2 => open_qcow2(&raw, path, &mut locks)?,
            Format::Foreign(foreign) => return Err(not_served(path, foreign)),
        };
        let writer_dir = options.writer_dir.clone().unwrap_or_else(folder::default_path);
        let writer = Writer::open_in(path, writer_dir)?;
        if format == Format::Qcow2 {
            // The backup reads the tables in the file. Raw bytes are there as soon as a write has returned.
            let image = image.clone();
            writer.on_freeze(move || image.flush());
        }
        let container = Some(raw.clone());
        let raw = (format == Format::Raw).then_some(raw);
        Ok(Self { writer: Some(writer), raw, guess, container, ..Self::of(options, format, image, locks) })
    }

    fn open_read_only(options: &DiskOptions) -> Result<Self> {
        let path = &options.path;
        let failed = |e| Error::file(Side::Disk, "open", path, e);
        if let Some(at) = identity::mounted_writable(path).map_err(failed)? {
            let what = format!("disk '{}' is mounted at '{}'", path.display(), at.display());
            return Err(Error::new(Kind::Busy, what));
        }
        let (format, secret) = (options.format, options.secret.clone());
        let how = SourceOptions { format, backing: true, direct: false, secret, shared: false };
        let source = open_source(path, &how)?;
        let mut locks = Locks { warnings: source.warnings, locks: Vec::new() };
        locks.read(&source.files)?;
        let container = source.files.first().map(|file| file.raw.clone());
        Ok(Self { container, ..Self::of(options, source.format, source.image, locks) })
    }

    fn of(options: &DiskOptions, format: Format, image: Arc<dyn Image>, locks: Locks) -> Self {
        Self {
            name: options.name.clone(),
            path: options.path.clone(),
            format,
            length: image.length(),
            read_only: options.read_only,
            writer: None,
            image,
            raw: None,
            container: None,
            writer_dir: options.writer_dir.clone(),
            guess: None,
            warnings: locks.warnings,
            _locks: locks.locks,
        }
    }

    /// An image that is open already: not locked, and no backup can attach.
    pub fn over(options: &DiskOptions, image: Arc<dyn Image>) -> Self {
        Self::of(options, options.format.unwrap_or(Format::Raw), image, Locks::default())
    }

    /// What clients call it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// As it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Of the image.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Bytes of the disk; does not change.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Every change is refused.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// What its user should know: full lines.
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// The image's own file or device, whatever covers its path; `None` where there is none.
    pub fn file(&self) -> Option<&File> {
        self.container.as_ref().map(|raw| raw.as_file())
    }

    /// Lets a backup of `view`, a file that a front-end makes of this disk, find the image, and with it this writer.
    /// `None`: no backup can attach anyhow.
    pub fn show_as(&self, view: folder::Disk) -> Result<Option<Sign>> {
        let (Some(_), Some(file)) = (&self.writer, self.file()) else { return Ok(None) };
        let path = self.writer_dir.clone().unwrap_or_else(folder::default_path);
        let shown = std::path::absolute(&self.path)
            .and_then(|image| Folder::open(&path)?.show(view, file, self.format.name(), &image))
            .map_err(|e| Error::system(Kind::Other, format!("use writer folder '{}'", path.display()), e))?;
        Ok(Some(shown))
    }

    /// Limits of requests.
    pub fn sizes(&self) -> Sizes {
        let sector = match self.raw.as_ref().map(|raw| raw.medium()) {
            Some(Medium::Device { sector }) => u32::try_from(sector).unwrap_or(PREFERRED),
            _ => 1,
        };
        Sizes { minimum: 1, preferred: sector.max(PREFERRED), maximum: MAXIMUM }
    }

    /// What the image says of itself.
    pub fn properties(&self) -> Properties {
        self.image.properties()
    }

    /// The first extent of `range`, data or zeroes: starts at its offset, ends at its end at the latest. A `range` that is empty
    /// or past the end is EINVAL. May read tables.
    pub fn block_status(&self, range: ByteRange) -> io::Result<Extent> {
        self.check(range, Errno::INVAL)?;
        if range.is_empty() {
            return Err(Errno::INVAL.into());
        }
        self.image.block_status(range)
    }

    /// Fills `buf` from byte `offset`. Blocks. Never short.
    pub fn read(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.checked(offset, buf.len(), Errno::INVAL)?;
        if buf.is_empty() { Ok(()) } else { self.image.read_at(buf, offset) }
    }

    /// The disk's bytes are a file's or a device's, so that requests hardly ever wait where the page cache has them.
    pub fn is_plain(&self) -> bool {
        self.image.file().is_some()
    }

    /// [`Disk::read`] without waiting. False, with any bytes in `buf`, where the page cache has not all of them, or can't say.
    pub fn read_cached(&self, buf: &mut [u8], offset: u64) -> io::Result<bool> {
        self.checked(offset, buf.len(), Errno::INVAL)?;
        let Some(file) = self.image.file() else { return Ok(false) };
        let length = buf.len();
        match rustix::io::preadv2(file, &mut [IoSliceMut::new(buf)], offset, ReadWriteFlags::NOWAIT) {
            Ok(read) => Ok(read == length),
            Err(Errno::AGAIN | Errno::OPNOTSUPP | Errno::INTR) => Ok(false),
            Err(errno) => Err(errno.into()),
        }
    }

    /// Writes all of `buf` at byte `offset`. Blocks; not durable before [`Disk::flush`].
    pub fn write(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let range = self.checked(offset, buf.len(), Errno::NOSPC)?;
        let Some(_bracket) = self.change(range)? else { return Ok(()) };
        let _turn = self.refuse_header(buf, offset)?;
        hold::at(Place::Writing);
        self.image.write_at(buf, offset)
    }

    /// The file whose bytes are the disk's, for who reads them into memory that is not ours; `None`: [`Disk::read`] knows.
    pub fn plain_file(&self) -> Option<&File> {
        self.image.file()
    }

    /// [`Disk::write`] of bytes that are not in our memory: `write` puts them at `range` of the file. False, with nothing done,
    /// where the disk's bytes are not a file's, and where they have to be looked at first. Blocks.
    pub fn write_by(&self, range: ByteRange, write: impl FnOnce(&File) -> io::Result<()>) -> io::Result<bool> {
        self.check(range, Errno::NOSPC)?;
        let looked_at = self.guess.is_some() && range.offset < probe::LENGTH as u64;
        let Some(file) = self.image.file().filter(|_| !looked_at) else { return Ok(false) };
        let Some(_bracket) = self.change(range)? else { return Ok(true) };
        hold::at(Place::Writing);
        write(file).map(|()| true)
    }

    /// Makes `range` read as zeroes. Without `may_unmap` its space stays, or becomes, allocated. Blocks.
    pub fn write_zeroes(&self, range: ByteRange, may_unmap: bool) -> io::Result<()> {
        self.check(range, Errno::NOSPC)?;
        self.in_stretches(range, |stretch| match &self.raw {
            _ if may_unmap => self.image.write_zeroes(stretch),
            Some(raw) => raw.write_zeroes_allocated(stretch),
            None => self.write_zero_bytes(stretch),
        })
    }

    /// [`Disk::write_zeroes`] where that takes no bytes; else ENOTSUP, and nothing has changed but parts of `range` to zeroes.
    pub fn write_zeroes_fast(&self, range: ByteRange, may_unmap: bool) -> io::Result<()> {
        self.check(range, Errno::NOSPC)?;
        let raw = match &self.raw {
            Some(raw) if raw.medium() == Medium::File => raw,
            _ if self.read_only => return Err(Errno::PERM.into()),
            // Before a backup has to save anything for it.
            _ => return Err(Errno::OPNOTSUPP.into()),
        };
        self.in_stretches(range, |stretch| match raw.write_zeroes_fast(stretch, may_unmap)? {
            true => Ok(()),
            false => Err(Errno::OPNOTSUPP.into()),
        })
    }

    /// `range` is no longer needed; what it reads as afterwards is undefined. Blocks.
    pub fn discard(&self, range: ByteRange) -> io::Result<()> {
        self.check(range, Errno::INVAL)?;
        self.in_stretches(range, |stretch| self.image.discard(stretch))
    }

    /// Every write that has returned is on stable storage afterwards. Blocks. A failure is final: the next one fails, too.
    pub fn flush(&self) -> io::Result<()> {
        if self.read_only { Ok(()) } else { self.image.flush() }
    }

    /// Would a change of `range` wait for a backup just now? A hint: it may be otherwise when it begins. Does not block.
    pub fn would_wait(&self, range: ByteRange) -> bool {
        self.writer.as_ref().is_some_and(|writer| writer.would_wait(range.offset, range.length))
    }

    fn checked(&self, offset: u64, length: usize, past_end: Errno) -> io::Result<ByteRange> {
        let range = ByteRange::checked(offset, length as u64).ok_or(past_end)?;
        self.check(range, past_end)?;
        Ok(range)
    }

    fn check(&self, range: ByteRange, past_end: Errno) -> io::Result<()> {
        if range.end() <= self.length { Ok(()) } else { Err(past_end.into()) }
    }

    /// The bracket of a change; `None` when there is nothing to change.
    fn change(&self, range: ByteRange) -> io::Result<Option<Bracket<'_>>> {
        if self.read_only {
            return Err(Errno::PERM.into());
        }
        if range.is_empty() {
            return Ok(None);
        }
        self.writer.as_ref().map(|writer| writer.begin(range.offset, range.length)).transpose().map(Some)
    }

    /// Makes a range of any length zeroes or unneeded, each stretch in a bracket of its own: a freeze waits for one
    /// stretch alone. No protocol promises that so long a change is atomic.
    fn in_stretches(&self, range: ByteRange, change: impl Fn(ByteRange) -> io::Result<()>) -> io::Result<()> {
        let mut rest = range;
        loop {
            // They meet where clusters do, so that none is changed by halves.
            let stretch = rest.prefix(STRETCH - rest.offset % STRETCH);
            let Some(_bracket) = self.change(stretch)? else { return Ok(()) };
            let _turn = self.refuse_zeroed_header(stretch)?;
            change(stretch)?;
            rest = ByteRange::between(stretch.end(), rest.end());
        }
    }

    /// See the module. Writes of the first sector take turns until the guard is dropped: two halves of a header must not pass.
    fn refuse_header(&self, buf: &[u8], offset: u64) -> io::Result<Option<MutexGuard<'_, Probe>>> {
        let range = ByteRange::new(offset, buf.len() as u64);
        self.refuse_start(range, |start| start.copy_from_slice(&buf[..start.len()]))
    }

    /// The same of zeroes: they may be what a header lacks, since some magic bytes end with one.
    fn refuse_zeroed_header(&self, range: ByteRange) -> io::Result<Option<MutexGuard<'_, Probe>>> {
        self.refuse_start(range, |start| start.fill(0))
    }

    fn refuse_start(
        &self,
        range: ByteRange,
        change: impl FnOnce(&mut [u8]),
    ) -> io::Result<Option<MutexGuard<'_, Probe>>> {
        let Some(guess) = self.guess.as_ref().filter(|_| range.offset < probe::LENGTH as u64) else { return Ok(None) };
        let turn = guess.lock().unwrap_or_else(PoisonError::into_inner);
        let mut start = vec![0; self.length.min(probe::LENGTH as u64) as usize];
        self.image.read_at(&mut start, 0)?;
        let end = range.end().min(start.len() as u64) as usize;
        change(&mut start[range.offset as usize..end]);
        let looks = probe(&start);
        match looks.format == Format::Raw && looks.foreign.is_none() || looks == *turn {
            true => Ok(Some(turn)),
            false => Err(Errno::PERM.into()),
        }
    }

    fn write_zero_bytes(&self, range: ByteRange) -> io::Result<()> {
        let zeroes = vec![0; range.length.min(ZEROES) as usize];
        let mut rest = range;
        while !rest.is_empty() {
            let piece = rest.prefix(ZEROES);
            self.image.write_at(&zeroes[..piece.length as usize], piece.offset)?;
            rest = ByteRange::between(piece.end(), rest.end());
        }
        Ok(())
    }
}

/// Of a change; `None` where no backup can attach.
type Bracket<'a> = Option<Write<'a>>;

/// What keeps others out, and what could not.
#[derive(Default)]
struct Locks {
    locks: Vec<ImageLock>,
    warnings: Vec<String>,
}

impl Locks {
    fn keep(&mut self, protection: Protection) {
        match protection {
            Protection::Locked(lock) => self.locks.push(lock),
            Protection::Unsupported(warning) => self.warnings.push(warning),
        }
    }

    /// Nobody may write these.
    fn read(&mut self, files: &[SourceFile]) -> Result<()> {
        for SourceFile { path, raw, .. } in files {
            self.keep(lock::acquire(raw.as_file(), path, Side::Disk, Terms::Read)?);
        }
        Ok(())
    }

    /// What the first bytes say.
    fn look(&mut self, raw: &Raw, path: &Path) -> Result<(Format, Option<Mutex<Probe>>)> {
        let path_name = path.display();
        if raw.length() == 0 {
            let what = format!("disk '{path_name}' is empty; if a disk of no bytes is meant, say raw");
            return Err(Error::new(Kind::Source, what));
        }
        let mut start = vec![0; raw.length().min(probe::LENGTH as u64) as usize];
        raw.read_at(&mut start, 0).map_err(|e| Error::file(Side::Disk, "read", path, e))?;
        let found = probe(&start);
        if let Some(foreign) = found.foreign {
            return Err(not_served(path, foreign));
        }
        Ok((found.format, (found.format == Format::Raw).then(|| Mutex::new(found))))
    }
}

fn not_served(path: &Path, foreign: Foreign) -> Error {
    let (path, name) = (path.display(), foreign.name());
    let what = format!("disk '{path}' is {name}, which can't be served to be written; its bytes as they are are raw");
    Error::new(Kind::Source, what)
}

/// The image in `raw`, to be written in place, with its backing chain, which nobody may write.
fn open_qcow2(raw: &Arc<Raw>, path: &Path, locks: &mut Locks) -> Result<Arc<dyn Image>> {
    let failed = |e| Error::file(Side::Disk, "open", path, e);
    let header = Qcow2::header_of(&**raw).map_err(failed)?;
    let backing = if header.backing.is_some() { open_backing(path)? } else { None };
    let behind = match backing {
        None => None,
        Some(backing) => {
            locks.read(&backing.files)?;
            locks.warnings.extend(backing.warnings);
            Some(backing.image)
        }
    };
    Ok(Arc::new(ExistingQcow2::load(raw.clone(), behind).map_err(failed)?))
}

#[cfg(test)]
mod tests;
