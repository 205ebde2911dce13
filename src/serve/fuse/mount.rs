//! Where a file is mounted: the point, what a killed server left there, and the end of the mount.

use crate::error::{Error, Kind, Result};
use crate::ring::folder::Disk;
use nix::errno::Errno;
use nix::mount::{MntFlags, umount2};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, StatxFlags, makedev};
use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// What the mount table calls our mounts.
pub const NAME: &str = "drive-backup";

/// A regular file to mount over.
#[derive(Debug)]
pub struct Point {
    path: PathBuf,
    is_ours: bool,
}

impl Point {
    /// `path`, made if it is missing. Anything but a regular file is [`Kind::Usage`].
    pub fn at(path: &Path) -> Result<Self> {
        let failed = |kind| move |e| Error::system(kind, format!("mount over '{}'", path.display()), e);
        let made = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
        let is_ours = match made {
            Ok(_) => true,
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => false,
            Err(e) => return Err(failed(Kind::Usage)(e)),
        };
        let point = Self { path: path.canonicalize().map_err(failed(Kind::Other))?, is_ours };
        match std::fs::metadata(path).map_err(failed(Kind::Other))?.is_file() {
            true => Ok(point),
            false => Err(Error::new(Kind::Usage, format!("mount over '{}': not a regular file", path.display()))),
        }
    }

    /// Absolute, without links.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Point {
    fn drop(&mut self) {
        if self.is_ours {
            // At worst an empty file stays.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// A mount over a point; undone by [`Mount::undo`], not by dropping.
#[derive(Debug)]
pub struct Mount {
    point: Point,
}

impl Mount {
    /// The one that has just been made.
    pub fn over(point: Point) -> Self {
        Self { point }
    }

    pub fn path(&self) -> &Path {
        self.point.path()
    }

    /// Of the mounted file. Asks its server nothing.
    pub fn identity(&self) -> io::Result<Disk> {
        let file = rustix::fs::open(self.path(), OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
        let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
        let found = rustix::fs::statx(&file, "", flags, StatxFlags::INO | StatxFlags::TYPE)?;
        match FileType::from_raw_mode(found.stx_mode.into()) {
            FileType::RegularFile => {
                let device = makedev(found.stx_dev_major, found.stx_dev_minor);
                Ok(Disk::File { device, inode: found.stx_ino })
            }
            _ => Err(io::Error::other("it is not a file")),
        }
    }

    /// Ends it, also for programs that have the file open. False: it could not be undone.
    pub fn undo(&self) -> bool {
        match umount2(self.path(), MntFlags::empty()) {
            // EINVAL: somebody has undone it already.
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => true,
            // Force ends requests and later ones of whoever has it open, detach the mount.
            Err(Errno::EBUSY) => umount2(self.path(), MntFlags::MNT_FORCE | MntFlags::MNT_DETACH).is_ok(),
            Err(_) => fusermount(self.path()),
        }
    }
}

/// For users who may not unmount themselves.
fn fusermount(path: &Path) -> bool {
    let mut command = Command::new("fusermount3");
    command.args(["-u", "-q", "-z", "--"]).arg(path).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

/// Undoes the mount that a killed server left at `path`: without that nothing at the path can be opened, the image neither. True:
/// there was one. Somebody else's dead mount is [`Kind::Busy`].
pub fn clear_stale(path: &Path) -> Result<bool> {
    if rustix::fs::stat(path).err() != Some(rustix::io::Errno::NOTCONN) {
        return Ok(false);
    }
    let point =
        parent_canonical(path).map_err(|e| Error::system(Kind::Other, format!("find '{}'", path.display()), e))?;
    let ours = std::fs::read("/proc/self/mountinfo").is_ok_and(|table| is_ours(&table, &point));
    if ours && (umount2(&point, MntFlags::MNT_DETACH).is_ok() || fusermount(&point)) {
        return Ok(true);
    }
    let path = path.display();
    let what = format!("the server of the FUSE mount at '{path}' is dead; undo it with: fusermount3 -u '{path}'");
    Err(Error::new(Kind::Busy, what))
}

/// The path of a file that can't be looked at.
fn parent_canonical(path: &Path) -> io::Result<PathBuf> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    Ok(folder.canonicalize()?.join(name))
}

/// Whether the last mount at `point` is one of ours (proc_pid_mountinfo(5)).
fn is_ours(table: &[u8], point: &Path) -> bool {
    let mut lines = table.split(|byte| *byte == b'\n').filter_map(|line| {
        let fields: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
        let dash = fields.iter().position(|field| *field == b"-")?;
        Some((unescape(fields.get(4)?), *fields.get(dash + 1)?, *fields.get(dash + 2)?))
    });
    let last = lines.rfind(|(at, ..)| at.as_bytes() == point.as_os_str().as_bytes());
    last.is_some_and(|(_, kind, source)| kind.starts_with(b"fuse") && source == NAME.as_bytes())
}

/// Spaces and the like are octal there.
fn unescape(field: &[u8]) -> OsString {
    let mut plain = Vec::with_capacity(field.len());
    let mut rest = field;
    while let [first, tail @ ..] = rest {
        let code = tail.get(..3).filter(|_| *first == b'\\').and_then(|digits| std::str::from_utf8(digits).ok());
        match code.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) => {
                plain.push(byte);
                rest = &tail[3..];
            }
            None => {
                plain.push(*first);
                rest = tail;
            }
        }
    }
    OsString::from_vec(plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &[u8] = b"36 35 98:0 / /mnt rw - ext4 /dev/sda rw\n\
        40 36 0:50 / /mnt/a\\040b rw shared:1 - fuse drive-backup rw\n\
        41 36 0:51 / /mnt/c rw - fuse.drive-backup drive-backup rw\n\
        42 36 0:52 / /mnt/c rw - fuse sshfs rw\n";

    #[test]
    fn only_the_topmost_mount_counts_and_only_ours_is_ours() {
        assert!(is_ours(TABLE, Path::new("/mnt/a b")));
        assert!(!is_ours(TABLE, Path::new("/mnt/c")));
        assert!(!is_ours(TABLE, Path::new("/mnt")));
        assert!(!is_ours(b"", Path::new("/mnt")));
    }

    #[test]
    fn a_point_that_was_made_is_removed_and_one_that_was_there_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let (made, there) = (folder.path().join("made"), folder.path().join("there"));
        std::fs::write(&there, "").unwrap();
        drop((Point::at(&made).unwrap(), Point::at(&there).unwrap()));
        assert!(!made.exists() && there.exists());
        assert_eq!(Point::at(folder.path()).unwrap_err().kind(), Kind::Usage);
        assert_eq!(Point::at(Path::new("/dev/null")).unwrap_err().kind(), Kind::Usage);
    }

    #[test]
    fn what_answers_is_not_stale() {
        let folder = tempfile::tempdir().unwrap();
        assert!(!clear_stale(folder.path()).unwrap());
        assert!(!clear_stale(&folder.path().join("missing")).unwrap());
    }
}
