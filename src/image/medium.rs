//! What a path leads to: a regular file or a block device. Anything else is refused before it is opened.

use crate::error::{Error, Kind, Result, Side};
use rustix::fs::{Mode, OFlags, major, minor};
use rustix::io::retry_on_intr;
use std::fs::{File, FileType, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Where the bytes of a raw image are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Medium {
    /// A regular file: it grows, and its holes are known.
    File,
    /// A block device.
    Device {
        /// Bytes of a logical block, the least that the device reads or writes.
        sector: u64,
    },
}

/// What the bytes will be used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Reading.
    Read,
    /// Reading and writing; a block device is claimed, so that nobody mounts it meanwhile.
    Write,
}

/// What makes two paths one file: the device number and the inode number, as stat has them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Identity {
    /// `st_dev`.
    pub device: u64,
    /// `st_ino`.
    pub inode: u64,
}

impl Identity {
    /// Of what `metadata` describes.
    pub fn of(metadata: &Metadata) -> Self {
        Self { device: metadata.dev(), inode: metadata.ino() }
    }
}

impl Medium {
    /// Of an open file; `InvalidInput` when it is neither a regular file nor a block device.
    pub fn of(file: &File) -> io::Result<Self> {
        let file_type = file.metadata()?.file_type();
        check_type(file_type)?;
        if file_type.is_file() {
            return Ok(Self::File);
        }
        let sector = rustix::fs::ioctl_blksszget(file)?;
        Ok(Self::Device { sector: u64::from(sector.max(1)) })
    }

    /// Size of `file` in bytes now.
    pub fn length(self, file: &File) -> io::Result<u64> {
        match self {
            Self::File => Ok(file.metadata()?.len()),
            Self::Device { .. } => Ok(rustix::fs::seek(file, rustix::fs::SeekFrom::End(0))?),
        }
    }
}

/// Opens a regular file or a block device that exists. Never blocks on a fifo, and never opens one, nor a character
/// device, for which opening alone may have an effect. A device that is mounted or claimed by somebody else is
/// [`Kind::Busy`] for writing.
pub fn open(path: &Path, access: Access, side: Side) -> Result<(File, Medium)> {
    let refuse = |e| Error::file(side, "open", path, e);
    let metadata = std::fs::metadata(path).map_err(refuse)?;
    let file_type = metadata.file_type();
    check_type(file_type).map_err(refuse)?;
    if access == Access::Write && file_type.is_block_device() && is_read_only(metadata.rdev()) {
        return Err(refuse(io::Error::new(io::ErrorKind::ReadOnlyFilesystem, "the device is read-only")));
    }
    let mut flags = OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NONBLOCK;
    flags |= match access {
        Access::Read => OFlags::RDONLY,
        Access::Write if file_type.is_block_device() => OFlags::RDWR | OFlags::EXCL,
        Access::Write => OFlags::RDWR,
    };
    let file = match retry_on_intr(|| rustix::fs::open(path, flags, Mode::empty())) {
        Ok(fd) => File::from(fd),
        Err(rustix::io::Errno::BUSY) => {
            let what = format!("open {side} '{}': the device is mounted or in use", path.display());
            return Err(Error::new(Kind::Busy, what));
        }
        Err(errno) => return Err(refuse(errno.into())),
    };
    // O_NONBLOCK was for a fifo that took the path's place meanwhile; the bytes are wanted without it.
    let medium = Medium::of(&file).map_err(refuse)?;
    let kept = rustix::fs::fcntl_getfl(&file).map_err(|e| refuse(e.into()))? - OFlags::NONBLOCK;
    rustix::fs::fcntl_setfl(&file, kept).map_err(|e| refuse(e.into()))?;
    Ok((file, medium))
}

/// What the kernel tells of its block devices, each by its [`number`].
pub const SYS_BLOCK: &str = "/sys/dev/block";

/// A device's `st_rdev` as the kernel writes it: MAJOR:MINOR.
pub fn number(device: u64) -> String {
    format!("{}:{}", major(device), minor(device))
}

/// What the kernel tells of the block device with this `st_rdev`.
pub fn sys_folder(device: u64) -> PathBuf {
    Path::new(SYS_BLOCK).join(number(device))
}

/// As the kernel says; it opens such a device for writing all the same.
fn is_read_only(device: u64) -> bool {
    let told = std::fs::read_to_string(sys_folder(device).join("ro"));
    told.is_ok_and(|told| told.trim() == "1")
}

/// Makes what is read from now on what the medium has: what somebody wrote before is flushed, then the cache is dropped. After a
/// flush that failed, the kernel keeps pages that it takes for written; who opens the file later hears nothing of that. Blocks.
pub fn settle(file: &File) -> io::Result<()> {
    file.sync_data()?;
    drop_cache(file)
}

/// Drops what the system's cache holds of `file`, which is on stable storage: what is read next comes from the medium.
pub fn drop_cache(file: &File) -> io::Result<()> {
    Ok(rustix::fs::fadvise(file, 0, None, rustix::fs::Advice::DontNeed)?)
}

fn check_type(file_type: FileType) -> io::Result<()> {
    if file_type.is_file() || file_type.is_block_device() { Ok(()) } else { Err(refusal(file_type)) }
}

/// What is wrong with something that is no regular file.
pub fn refusal(file_type: FileType) -> io::Error {
    let (kind, what) = if file_type.is_dir() {
        (io::ErrorKind::IsADirectory, "is a directory")
    } else if file_type.is_fifo() {
        (io::ErrorKind::InvalidInput, "is a fifo")
    } else if file_type.is_socket() {
        (io::ErrorKind::InvalidInput, "is a socket")
    } else if file_type.is_char_device() {
        (io::ErrorKind::InvalidInput, "is a character device")
    } else if file_type.is_block_device() {
        (io::ErrorKind::InvalidInput, "is a block device")
    } else {
        (io::ErrorKind::InvalidInput, "is neither a regular file nor a block device")
    };
    io::Error::new(kind, what)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixListener;

    fn refusal(path: &Path, access: Access) -> String {
        open(path, access, Side::Source).unwrap_err().to_string()
    }

    #[test]
    fn whatever_is_no_disk_is_refused_in_one_line() {
        let dir = tempfile::tempdir().unwrap();
        let name = |n: &str| dir.path().join(n);
        nix::unistd::mkfifo(&name("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let _listener = UnixListener::bind(name("socket")).unwrap();
        std::os::unix::fs::symlink(name("fifo"), name("link")).unwrap();
        for access in [Access::Read, Access::Write] {
            let shown = |n: &str| format!("open source '{}'", name(n).display());
            assert_eq!(refusal(&name("fifo"), access), format!("{}: is a fifo", shown("fifo")));
            assert_eq!(refusal(&name("link"), access), format!("{}: is a fifo", shown("link")));
            assert_eq!(refusal(&name("socket"), access), format!("{}: is a socket", shown("socket")));
            assert_eq!(refusal(&name("none"), access), format!("{}: No such file or directory", shown("none")));
            assert_eq!(refusal(Path::new("/tmp"), access), "open source '/tmp': is a directory");
            assert_eq!(refusal(Path::new("/dev/null"), access), "open source '/dev/null': is a character device");
        }
    }

    #[test]
    fn an_opened_file_blocks_again() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (opened, medium) = open(file.path(), Access::Write, Side::Target).unwrap();
        assert_eq!(medium, Medium::File);
        assert!(!rustix::fs::fcntl_getfl(&opened).unwrap().contains(OFlags::NONBLOCK));
    }
}
