//! The file beside the target: its name, its lock, and what to do with one that a killed backup left.

use crate::error::{Error, Kind, Result, Side};
use crate::image::lock::{self, Mark};
use crate::image::medium::Identity;
use rustix::fs::{AtFlags, FileType, Mode, OFlags};
use rustix::io::{Errno, retry_on_intr};
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

const SUFFIX: &str = ".drive-backup-partial";

/// An empty file that is ours.
pub struct Partial {
    pub file: File,
    pub name: OsString,
}

/// Where names are looked up, and the path of it for messages.
struct Folder<'a> {
    folder: &'a File,
    path: &'a Path,
}

impl Partial {
    /// Creates the partial file of `target`, a name in `folder`, with `mode` less the umask.
    pub fn create(folder: &File, folder_path: &Path, target: &OsStr, mode: u32) -> Result<Self> {
        /// Others may take the name away between two steps; nobody does so for ever.
        const TRIES: usize = 100;
        let name = name_beside(target, name_max(folder));
        let folder = Folder { folder, path: folder_path };
        for _ in 0..TRIES {
            match folder.create(&name, mode)? {
                Created::Ours(file) => return Ok(Self { file, name }),
                Created::Unlocked => return folder.create_unlocked(&name, mode),
                Created::Exists => folder.sweep(&name)?,
                Created::Lost => {}
            }
        }
        Err(folder.busy(&name))
    }
}

enum Created {
    Ours(File),
    /// Somebody took it for a leftover before it was locked.
    Lost,
    /// The name is taken.
    Exists,
    /// The file system has no locks.
    Unlocked,
}

impl Folder<'_> {
    fn create(&self, name: &OsStr, mode: u32) -> Result<Created> {
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match retry_on_intr(|| rustix::fs::openat(self.folder, name, flags, Mode::from_raw_mode(mode))) {
            Ok(fd) => self.claim(name, File::from(fd)),
            Err(Errno::EXIST) => Ok(Created::Exists),
            Err(errno) => Err(self.failed(name, errno.into())),
        }
    }

    /// Locks a file that was just created under `name`, unless somebody swept it as a leftover in between.
    fn claim(&self, name: &OsStr, file: File) -> Result<Created> {
        match lock::mark(&file, Mark::Exclusive) {
            Ok(true) => match self.leads_to(name, &file) {
                Ok(true) => Ok(Created::Ours(file)),
                Ok(false) => Ok(Created::Lost),
                Err(error) => Err(self.without(name, &file, error)),
            },
            Ok(false) => Ok(Created::Lost),
            Err(e) if e.kind() == io::ErrorKind::Unsupported => {
                self.unlink(name)?;
                Ok(Created::Unlocked)
            }
            Err(e) => Err(self.without(name, &file, self.failed(name, e))),
        }
    }

    /// Removes a `file` that was just created, and of which nothing comes for `error`, if it is seen to have its `name`: else
    /// that may be another backup's.
    fn without(&self, name: &OsStr, file: &File, error: Error) -> Error {
        if matches!(self.leads_to(name, file), Ok(true)) {
            let _ = self.unlink(name);
        }
        error
    }

    /// Without locks nobody can tell a leftover from a backup that runs: a name of this process alone.
    fn create_unlocked(&self, name: &OsStr, mode: u32) -> Result<Partial> {
        let mut name = name.to_owned();
        name.push(format!("-{}", std::process::id()));
        let flags = OFlags::CREATE | OFlags::EXCL | OFlags::RDWR | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match retry_on_intr(|| rustix::fs::openat(self.folder, &name, flags, Mode::from_raw_mode(mode))) {
            Ok(fd) => Ok(Partial { file: File::from(fd), name }),
            Err(errno) => Err(self.failed(&name, errno.into())),
        }
    }

    /// Removes what a killed backup left. Removed, not truncated: the file may have other names, or another owner.
    fn sweep(&self, name: &OsStr) -> Result<()> {
        let found = match rustix::fs::statat(self.folder, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(found) => FileType::from_raw_mode(found.st_mode),
            Err(Errno::NOENT) => return Ok(()),
            Err(errno) => return Err(self.failed(name, errno.into())),
        };
        match found {
            FileType::RegularFile => self.sweep_file(name),
            FileType::Symlink => self.unlink(name),
            _ => {
                let taken = io::Error::new(io::ErrorKind::AlreadyExists, "the name is taken by something else");
                Err(self.failed(name, taken))
            }
        }
    }

    fn sweep_file(&self, name: &OsStr) -> Result<()> {
        let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        match retry_on_intr(|| rustix::fs::openat(self.folder, name, flags, Mode::empty())) {
            Ok(fd) => self.sweep_opened(name, &File::from(fd)),
            // Gone or replaced since the look: look again.
            Err(Errno::NOENT | Errno::LOOP) => Ok(()),
            Err(errno) => Err(self.failed(name, errno.into())),
        }
    }

    /// Removes `name` if it still leads to `file` and nobody has that; by now it may be the next backup's.
    fn sweep_opened(&self, name: &OsStr, file: &File) -> Result<()> {
        match lock::mark(file, Mark::Exclusive) {
            Ok(false) => Err(self.busy(name)),
            Ok(true) if self.leads_to(name, file)? => self.unlink(name),
            Ok(true) => Ok(()),
            Err(e) => Err(self.failed(name, e)),
        }
    }

    fn leads_to(&self, name: &OsStr, file: &File) -> Result<bool> {
        let ours = Identity::of(&file.metadata().map_err(|e| self.failed(name, e))?);
        match rustix::fs::statat(self.folder, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(found) => Ok(Identity { device: found.st_dev, inode: found.st_ino } == ours),
            Err(Errno::NOENT) => Ok(false),
            Err(errno) => Err(self.failed(name, errno.into())),
        }
    }

    fn unlink(&self, name: &OsStr) -> Result<()> {
        match rustix::fs::unlinkat(self.folder, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(errno) => Err(self.failed(name, errno.into())),
        }
    }

    fn busy(&self, name: &OsStr) -> Error {
        let path = self.path.join(name);
        Error::new(Kind::Busy, format!("another backup writes this target: '{}' is locked", path.display()))
    }

    fn failed(&self, name: &OsStr, error: io::Error) -> Error {
        Error::file(Side::Target, "create", &self.path.join(name), error)
    }
}

/// Bytes that a name in `folder` may have.
fn name_max(folder: &File) -> usize {
    const USUAL: usize = 255;
    rustix::fs::fstatvfs(folder).map_or(USUAL, |s| s.f_namemax as usize)
}

/// `.NAME.drive-backup-partial`, or a hash for NAME where that is too long.
fn name_beside(target: &OsStr, name_max: usize) -> OsString {
    let mut name = OsString::from(".");
    if 1 + target.len() + SUFFIX.len() <= name_max {
        name.push(target);
    } else {
        name.push(format!("{:016x}", fnv1a(target.as_bytes())));
    }
    name.push(SUFFIX);
    name
}

/// The name of a bad copy of `target` that was written as `partial`.
pub fn name_of_bad(partial: &OsStr, target: &OsStr) -> OsString {
    let name = partial.as_bytes();
    let end = name.windows(SUFFIX.len()).rposition(|part| part == SUFFIX.as_bytes()).unwrap_or(name.len());
    let mut bad = OsStr::from_bytes(name.get(1..end).unwrap_or(target.as_bytes())).to_owned();
    bad.push(".drive-backup-bad");
    bad
}

/// A hash that is the same in every version of the program: two of them must agree on the name.
fn fnv1a(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |hash, &byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_says_whose_it_is_unless_it_is_too_long() {
        assert_eq!(name_beside(OsStr::new("out.raw"), 255), ".out.raw.drive-backup-partial");
        let long = "x".repeat(234);
        assert_eq!(name_beside(OsStr::new(&long[..233]), 255).len(), 255);
        assert_eq!(
            name_beside(OsStr::new(&long), 255),
            format!(".{:016x}.drive-backup-partial", fnv1a(long.as_bytes())).as_str()
        );
        // The published check value of FNV-1a.
        assert_eq!(fnv1a(b"foobar"), 0x8594_4171_f739_67e8);
    }

    const NAME: &str = ".out.drive-backup-partial";

    fn with_folder(test: impl Fn(&Folder<'_>, &OsStr)) {
        let path = tempfile::tempdir().unwrap();
        let folder = File::open(path.path()).unwrap();
        test(&Folder { folder: &folder, path: path.path() }, OsStr::new(NAME));
    }

    #[test]
    fn a_file_that_was_swept_before_it_was_locked_is_lost() {
        with_folder(|folder, name| {
            let ours = File::create_new(folder.path.join(name)).unwrap();
            folder.unlink(name).unwrap();
            assert!(matches!(folder.claim(name, ours.try_clone().unwrap()), Ok(Created::Lost)));
            File::create_new(folder.path.join(name)).unwrap();
            assert!(matches!(folder.claim(name, ours), Ok(Created::Lost)));
        });
    }

    #[test]
    fn a_file_that_cannot_be_locked_is_not_left() {
        with_folder(|folder, name| {
            File::create_new(folder.path.join(name)).unwrap();
            // Not open for writing.
            let ours = File::open(folder.path.join(name)).unwrap();
            assert!(folder.claim(name, ours).is_err());
            assert!(!folder.path.join(name).exists());
        });
    }

    #[test]
    fn a_leftover_that_another_backup_replaced_meanwhile_is_not_its_file() {
        with_folder(|folder, name| {
            let leftover = File::create_new(folder.path.join(name)).unwrap();
            folder.unlink(name).unwrap();
            File::create_new(folder.path.join(name)).unwrap();
            folder.sweep_opened(name, &leftover).unwrap();
            assert!(folder.path.join(name).exists());
        });
    }

    #[test]
    fn without_locks_the_name_is_the_processes_own() {
        with_folder(|folder, name| {
            let partial = folder.create_unlocked(name, 0o600).unwrap();
            assert_eq!(partial.name, OsStr::new(&format!("{NAME}-{}", std::process::id())));
            assert!(folder.create_unlocked(name, 0o600).is_err());
        });
    }
}
