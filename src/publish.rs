//! A new file under the target's name, all of it or none: written beside it, flushed, then put in its place.
//!
//! | a crash, a kill or a failure | what is under the target's name |
//! |---|---|
//! | before the rename | what was there before, or nothing |
//! | between the rename and the folder's flush | the old or the new, each of them whole |
//! | the folder's flush fails | the old again, or nothing; the new over an old one where names can't be exchanged |
//!
//! The file beside it has one fixed name per target, `.NAME.drive-backup-partial`, and is locked while a backup writes
//! it: a second backup of the same target is refused, and what a killed one left is unlocked and swept by the next.

pub(crate) mod attributes;
mod partial;

use crate::error::{Error, Kind, Result, Side};
use crate::hold::{self, Place as At};
use crate::image::lock::{self, Mark};
use crate::image::medium::{self, Identity};
use partial::Partial;
use rustix::fs::{AtFlags, Mode, OFlags, RenameFlags};
use rustix::io::{Errno, retry_on_intr};
use std::ffi::{OsStr, OsString};
use std::fs::{File, Metadata, Permissions};
use std::io;
use std::os::fd::{AsRawFd, IntoRawFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

/// A target that is being written beside its name. Dropped without [`Publish::commit`] it is removed.
pub struct Publish {
    place: Arc<Place>,
    file: File,
    old: Option<Old>,
    steps: Box<dyn Steps>,
}

/// What the target's name leads to already.
struct Old {
    metadata: Metadata,
    /// Open and marked as in use, so that a backup that starts while the names are exchanged doesn't sweep it.
    held: Option<File>,
}

/// Where it is, and how far: all that removing it from another thread takes.
struct Place {
    folder: File,
    partial: OsString,
    name: OsString,
    /// The target, its symbolic links followed.
    target: PathBuf,
    phase: AtomicU8,
}

/// The partial file is there and may be removed.
const WRITING: u8 = 0;
/// The names are changing hands: too late to remove anything.
const PUBLISHING: u8 = 1;
const PUBLISHED: u8 = 2;
const REMOVED: u8 = 3;

/// Removes the partial file from any thread, by its name: it needs no descriptor of a file that hangs.
#[derive(Clone)]
pub struct Remover {
    place: Arc<Place>,
}

/// The steps that decide what a crash leaves: a test watches their order and lets each of them fail.
trait Steps: Send {
    fn flush(&self, file: &File) -> io::Result<()>;
    fn close(&self, file: File) -> io::Result<()>;
    fn exchange(&self, folder: &File, one: &OsStr, other: &OsStr) -> io::Result<()>;
    fn rename(&self, folder: &File, from: &OsStr, to: &OsStr) -> io::Result<()>;
    fn unlink(&self, folder: &File, name: &OsStr) -> io::Result<()>;
    fn flush_folder(&self, folder: &File) -> io::Result<()>;
}

struct Kernel;

impl Steps for Kernel {
    fn flush(&self, file: &File) -> io::Result<()> {
        file.sync_all()
    }

    fn close(&self, file: File) -> io::Result<()> {
        Ok(nix::unistd::close(file.into_raw_fd())?)
    }

    fn exchange(&self, folder: &File, one: &OsStr, other: &OsStr) -> io::Result<()> {
        Ok(rustix::fs::renameat_with(folder, one, folder, other, RenameFlags::EXCHANGE)?)
    }

    fn rename(&self, folder: &File, from: &OsStr, to: &OsStr) -> io::Result<()> {
        Ok(rustix::fs::renameat(folder, from, folder, to)?)
    }

    fn unlink(&self, folder: &File, name: &OsStr) -> io::Result<()> {
        Ok(rustix::fs::unlinkat(folder, name, AtFlags::empty())?)
    }

    fn flush_folder(&self, folder: &File) -> io::Result<()> {
        folder.sync_all()
    }
}

impl Publish {
    /// Makes an empty file beside `target`, or beside what it links to. Nothing else is touched.
    ///
    /// [`Kind::Busy`] when another backup writes this target or a QEMU has the old one open for writing;
    /// [`Kind::Target`] when it can't be: no such folder, or something other than a regular file in its place.
    pub fn begin(target: &Path) -> Result<Self> {
        Self::begin_with(target, Box::new(Kernel))
    }

    fn begin_with(target: &Path, steps: Box<dyn Steps>) -> Result<Self> {
        let target = follow_links(target).map_err(|e| Error::file(Side::Target, "create", target, e))?;
        let failed = |e: io::Error| Error::file(Side::Target, "create", &target, e);
        let (folder_path, name) = split(&target).map_err(failed)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = retry_on_intr(|| rustix::fs::open(folder_path, flags, Mode::empty()))
            .map_err(|e| Error::file(Side::Target, "open the folder of", &target, e.into()))?;
        let folder = File::from(folder);
        let old = Old::find(&folder, name, &target)?;
        // The old target may be a secret: until the new one has its mode and owner, it is for us alone.
        let mode = if old.is_some() { 0o600 } else { 0o666 };
        let Partial { file, name: partial } = Partial::create(&folder, folder_path, name, mode)?;
        let name = name.to_owned();
        let place = Place { folder, partial, name, target, phase: AtomicU8::new(WRITING) };
        Ok(Self { place: Arc::new(place), file, old, steps })
    }

    /// The file to write, empty at first: one more descriptor of it.
    pub fn file(&self) -> Result<File> {
        self.file.try_clone().map_err(|e| self.failed("open", e))
    }

    /// The target's path, its symbolic links followed.
    pub fn target(&self) -> &Path {
        &self.place.target
    }

    /// Where the file is until then. Others may exchange what is there.
    pub fn partial_path(&self) -> PathBuf {
        self.place.target.with_file_name(&self.place.partial)
    }

    /// The partial file, as long as this process has it: to be opened once more.
    pub fn opened_path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.file.as_raw_fd()))
    }

    /// What removes the partial file from another thread.
    pub fn remover(&self) -> Remover {
        Remover { place: Arc::clone(&self.place) }
    }

    /// Puts the file under the target's name, with the mode, owner and attributes of what it replaces. With `fsync`, file and
    /// folder are on stable storage afterwards; a flush that failed earlier must not come here. Blocks.
    ///
    /// Returns warnings, one line each. After an error the partial file is gone and the target's name has what it
    /// had before; where that is not possible the error says so, and [`Remover::is_removed`] is false.
    /// [`Kind::Cancelled`] when it was removed meanwhile.
    pub fn commit(self, fsync: bool) -> Result<Vec<String>> {
        let mut warnings = self.prepare(fsync)?;
        warnings.extend(self.take_name(fsync)?);
        Ok(warnings)
    }

    /// The first half of [`Publish::commit`], which changes no name: mode, owner and attributes, the flush, the close.
    pub fn prepare(&self, fsync: bool) -> Result<Vec<String>> {
        let warnings = self.take_over_mode().map_err(|e| self.failed("set the mode of", e))?;
        if fsync {
            self.steps.flush(&self.file).map_err(|e| self.failed("flush", e))?;
        }
        // A network file system reports at the close what it could not write; the lock stays with the other descriptor.
        let descriptor = self.file()?;
        self.steps.close(descriptor).map_err(|e| self.failed("close", e))?;
        Ok(warnings)
    }

    /// The second half of [`Publish::commit`]: the name.
    pub fn take_name(self, fsync: bool) -> Result<Vec<String>> {
        let mut warnings = Vec::new();
        self.place.pass(WRITING, PUBLISHING)?;
        if fsync { self.put_durably(&mut warnings) } else { self.put() }?;
        self.place.phase.store(PUBLISHED, Ordering::Release);
        Ok(warnings)
    }

    /// Keeps a copy that must not be published, under a name of its own beside the target, in place of an older one of the
    /// kind. Returns its path. Nothing is flushed.
    pub fn set_aside(self) -> Result<PathBuf> {
        self.place.pass(WRITING, PUBLISHING)?;
        let Place { folder, partial, name, target, .. } = &*self.place;
        let bad = partial::name_of_bad(partial, name);
        self.steps.rename(folder, partial, &bad).map_err(|e| self.give_up("set aside", e))?;
        self.place.phase.store(PUBLISHED, Ordering::Release);
        Ok(target.with_file_name(bad))
    }

    /// Removes the partial file. Dropping does the same, and says nothing when it fails.
    pub fn abort(self) -> Result<()> {
        self.remover().remove().map(|_| ()).map_err(|e| self.failed("remove the partial file of", e))
    }

    fn put(&self) -> Result<()> {
        let Place { folder, partial, name, .. } = &*self.place;
        self.steps.rename(folder, partial, name).map_err(|e| self.give_up("rename", e))
    }

    fn put_durably(&self, warnings: &mut Vec<String>) -> Result<()> {
        let Place { folder, partial, name, .. } = &*self.place;
        let is_exchanged = self.old_is_held() && self.exchange()?;
        if !is_exchanged {
            self.put()?;
        }
        hold::at(At::Renamed);
        if let Err(e) = self.steps.flush_folder(folder) {
            return Err(self.take_back(is_exchanged, e));
        }
        if is_exchanged && let Err(e) = self.steps.unlink(folder, partial) {
            let (partial, name) = (partial.display(), name.display());
            warnings.push(format!("what '{name}' was before is left as '{partial}': {}", crate::error::reason(&e)));
        }
        Ok(())
    }

    /// False where the file system can't.
    fn exchange(&self) -> Result<bool> {
        let Place { folder, partial, name, .. } = &*self.place;
        match self.steps.exchange(folder, partial, name) {
            Ok(()) => Ok(true),
            Err(e) if cannot_exchange(&e) => Ok(false),
            Err(e) => Err(self.give_up("rename", e)),
        }
    }

    /// The folder's flush failed: whether the new name would survive a crash is unknown, so the old state returns.
    fn take_back(&self, is_exchanged: bool, error: io::Error) -> Error {
        let Place { folder, partial, name, .. } = &*self.place;
        let is_back = if is_exchanged {
            let is_back = self.steps.exchange(folder, partial, name).is_ok();
            // A partial file that stays is swept by the next backup; unless they are exchanged it is the old one.
            is_back.then(|| self.steps.unlink(folder, partial)).is_some()
        } else {
            self.old.is_none() && self.steps.unlink(folder, name).is_ok()
        };
        self.place.phase.store(if is_back { REMOVED } else { PUBLISHED }, Ordering::Release);
        if is_back {
            return self.failed("flush the folder of", error);
        }
        self.failed("flush the folder (the new copy is complete under its name, yet may not survive a crash) of", error)
    }

    /// Whether the target's name still leads to the old file that is held.
    fn old_is_held(&self) -> bool {
        let Some(Old { metadata, held: Some(_) }) = &self.old else { return false };
        let now = rustix::fs::statat(&self.place.folder, &self.place.name, AtFlags::SYMLINK_NOFOLLOW);
        now.is_ok_and(|now| Identity { device: now.st_dev, inode: now.st_ino } == Identity::of(metadata))
    }

    fn give_up(&self, during: &'static str, error: io::Error) -> Error {
        // The rename's error is the one to tell; a partial file that stays is swept by the next backup.
        let _ = self.steps.unlink(&self.place.folder, &self.place.partial);
        self.place.phase.store(REMOVED, Ordering::Release);
        self.failed(during, error)
    }

    fn take_over_mode(&self) -> io::Result<Vec<String>> {
        let Some(Old { metadata: old, held }) = &self.old else { return Ok(Vec::new()) };
        let new = self.file.metadata()?;
        let mut warnings = Vec::new();
        let mut lost = |what: String, error: &io::Error| {
            let why = crate::error::reason(error);
            warnings.push(format!("{what} of '{}' was not kept: {why}", self.place.target.display()));
        };
        let mut mode = old.mode() & 0o7777;
        if (new.uid(), new.gid()) != (old.uid(), old.gid())
            && let Err(e) = std::os::unix::fs::fchown(&self.file, Some(old.uid()), Some(old.gid()))
        {
            lost(format!("owner {}:{}", old.uid(), old.gid()), &e);
            // Under another owner these bits would give rights that nobody granted, and to another group the group's.
            mode &= 0o777;
            if new.gid() != old.gid() && std::os::unix::fs::fchown(&self.file, None, Some(old.gid())).is_err() {
                mode &= 0o707;
            }
        }
        for (name, errno) in held.iter().flat_map(|old| attributes::keep(old, &self.file)) {
            // With a list these bits are no group's rights, but the most that anybody on the list has.
            if name == attributes::ACCESS_LIST {
                mode &= !0o070;
            }
            lost(format!("attribute {name}"), &errno.into());
        }
        self.file.set_permissions(Permissions::from_mode(mode))?;
        Ok(warnings)
    }

    fn failed(&self, during: &'static str, error: io::Error) -> Error {
        Error::file(Side::Target, during, &self.place.target, error)
    }
}

impl Drop for Publish {
    fn drop(&mut self) {
        // Nobody is left to tell; what stays is swept by the next backup.
        let _ = self.remover().remove();
    }
}

impl Remover {
    /// Removes the partial file, once; false when it is too late, for it is being published, or it is gone already.
    /// The writer's descriptor stays usable. May block as long as the folder's file system does.
    pub fn remove(&self) -> io::Result<bool> {
        if self.place.pass(WRITING, REMOVED).is_err() {
            return Ok(false);
        }
        match rustix::fs::unlinkat(&self.place.folder, &self.place.partial, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(true),
            Err(errno) => Err(errno.into()),
        }
    }

    /// The partial file is gone, and the target's name has what it had before.
    pub fn is_removed(&self) -> bool {
        self.place.phase.load(Ordering::Acquire) == REMOVED
    }
}

impl Place {
    /// Moves on if nobody else did.
    fn pass(&self, from: u8, to: u8) -> Result<()> {
        match self.phase.compare_exchange(from, to, Ordering::AcqRel, Ordering::Acquire) {
            Ok(_) => Ok(()),
            Err(_) => Err(Error::new(Kind::Cancelled, format!("target '{}' was cancelled", self.target.display()))),
        }
    }
}

impl Old {
    /// What is under `name`, if anything; an error when that is not a regular file, or a QEMU writes it.
    fn find(folder: &File, name: &OsStr, target: &Path) -> Result<Option<Self>> {
        let failed = |e: io::Error| Error::file(Side::Target, "create", target, e);
        let metadata = match std::fs::symlink_metadata(target) {
            Ok(metadata) => metadata,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(failed(e)),
        };
        if !metadata.is_file() {
            return Err(failed(medium::refusal(metadata.file_type())));
        }
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        // A file that can't be read is replaced like any other, without a way back.
        let held = retry_on_intr(|| rustix::fs::openat(folder, name, flags, Mode::empty())).ok().map(File::from);
        if let Some(file) = &held {
            lock::refuse_writer(file, target, Side::Target)?;
            // Unsupported marks are the partial file's business.
            let _ = lock::mark(file, Mark::Shared);
        }
        Ok(Some(Self { metadata, held }))
    }
}

fn cannot_exchange(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw_os_error);
    matches!(errno, Some(Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP | Errno::NOENT))
}

/// Where a copy that is published as `target` appears: links are followed, and its folder has one name. `None` where it
/// can't be published.
pub fn place(target: &Path) -> Option<PathBuf> {
    let path = follow_links(target).ok()?;
    let (folder, name) = split(&path).ok()?;
    Some(folder.canonicalize().ok()?.join(name))
}

/// The path that `target` leads to, which need not exist.
fn follow_links(target: &Path) -> io::Result<PathBuf> {
    const LINKS_MAX: usize = 40;
    let mut path = target.to_owned();
    for _ in 0..LINKS_MAX {
        match std::fs::read_link(&path) {
            Ok(link) => path = path.parent().unwrap_or(Path::new("")).join(link),
            // Not a link, or nothing yet.
            Err(_) => return Ok(path),
        }
    }
    Err(Errno::LOOP.into())
}

fn split(target: &Path) -> io::Result<(&Path, &OsStr)> {
    let is_folder = target.as_os_str().as_bytes().ends_with(b"/");
    match target.file_name().filter(|_| !is_folder) {
        Some(name) => {
            let folder = target.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
            Ok((folder, name))
        }
        None if target.as_os_str().is_empty() => Err(Errno::NOENT.into()),
        None => Err(io::Error::new(io::ErrorKind::IsADirectory, "is a directory")),
    }
}

#[cfg(test)]
mod tests;
