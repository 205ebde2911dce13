//! Files that are a view of an image which somebody serves: a backup of the view is one of the image.
//!
//! The view can't be copied itself: its server may answer a read only after a write that waits for that very backup. Whoever
//! shows an image says so in a file `image-DISK-N`, DISK being the view; it is locked while the server lives, and holds one
//! line: the server's process, its descriptor of the image, the image's DISK, its format and its path.

use super::{Disk, Entry, Folder, is_held, name, number_in, random};
use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::io::Errno;
use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Bytes of a line; a path has at most 4096.
const LONGEST: usize = 8192;

/// An image, as its server knows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shown {
    /// Which it is.
    pub image: Disk,
    /// Its format, by name.
    pub format: String,
    /// As the server opened it; the view may cover it.
    pub path: PathBuf,
    /// Leads to it, also when it is covered.
    pub through: PathBuf,
}

/// Says what a view shows until it is dropped.
#[derive(Debug)]
pub struct Sign {
    _name: Entry,
    _lock: OwnedFd,
}

impl Folder {
    /// Says that `view` shows `image`, which this process has open, in the named format.
    pub fn show(self: &Arc<Self>, view: Disk, image: impl AsFd, format: &str, path: &Path) -> io::Result<Sign> {
        let which = Disk::open(&image)?;
        let mut line = format!("{} {} {which} {format} ", std::process::id(), image.as_fd().as_raw_fd()).into_bytes();
        line.extend(path.as_os_str().as_bytes());
        let last = name("image", view, random()?);
        let lock = self.born(&last, |first| {
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let file = rustix::fs::openat(&self.descriptor, first, flags, Mode::RUSR | Mode::WUSR)?;
            rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)?;
            match rustix::io::write(&file, &line)? {
                written if written == line.len() && written <= LONGEST => Ok(file),
                _ => Err(Errno::NAMETOOLONG.into()),
            }
        })?;
        Ok(Sign { _name: Entry { folder: self.clone(), name: last }, _lock: lock })
    }

    /// What `view` shows, if a live server has said so. What dead ones left is removed.
    pub fn image_behind(&self, view: Disk) -> io::Result<Option<Shown>> {
        for number in self.names()?.iter().filter_map(|found| number_in(found, "image", view)) {
            let name = name("image", view, number);
            let file = match self.open_announcement(&name) {
                Ok(file) => file,
                Err(Errno::NOENT) => continue,
                Err(e) => return Err(e.into()),
            };
            if !is_held(&file)? {
                self.remove(&name);
                continue;
            }
            // Root looks into folders of others, too: they may not name files for it.
            let (user, maker) = (rustix::process::geteuid(), rustix::fs::fstat(&file)?.st_uid);
            if maker != user.as_raw() && maker != 0 {
                return Err(io::Error::new(io::ErrorKind::PermissionDenied, format!("user {maker} serves it")));
            }
            let mut line = vec![0; LONGEST];
            let read = rustix::io::read(&file, &mut line)?;
            let wrong = || io::Error::new(io::ErrorKind::InvalidData, format!("'{name}' makes no sense"));
            return parse(&line[..read]).map(Some).ok_or_else(wrong);
        }
        Ok(None)
    }
}

fn parse(line: &[u8]) -> Option<Shown> {
    let mut parts = line.splitn(5, |byte| *byte == b' ');
    let mut word = || std::str::from_utf8(parts.next()?).ok();
    let (process, descriptor) = (word()?.parse::<u32>().ok()?, word()?.parse::<u32>().ok()?);
    let (image, format) = (word()?.parse().ok()?, word()?.to_owned());
    let path = PathBuf::from(OsStr::from_bytes(parts.next()?));
    Some(Shown { image, format, path, through: format!("/proc/{process}/fd/{descriptor}").into() })
}

impl std::str::FromStr for Disk {
    type Err = ();

    /// As [`Disk`] is displayed.
    fn from_str(text: &str) -> Result<Self, ()> {
        let number = |digits: &str| u64::from_str_radix(digits, 16).map_err(drop);
        match text.strip_prefix('b') {
            Some(digits) => Ok(Self::Block(number(digits)?)),
            None => {
                let (device, inode) = text.strip_prefix('f').and_then(|rest| rest.split_once('.')).ok_or(())?;
                Ok(Self::File { device: number(device)?, inode: number(inode)? })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    const VIEW: Disk = Disk::File { device: 0x2f, inode: 1 };

    fn folder() -> (tempfile::TempDir, Arc<Folder>) {
        let temp = tempfile::tempdir().unwrap();
        std::fs::set_permissions(temp.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
        let folder = Folder::open(temp.path()).unwrap();
        (temp, folder)
    }

    #[test]
    fn a_view_leads_to_its_image_even_when_the_path_does_not() {
        let (temp, folder) = folder();
        let path = temp.path().join("a disk.raw");
        std::fs::write(&path, b"image").unwrap();
        let image = std::fs::File::open(&path).unwrap();
        let sign = folder.show(VIEW, &image, "raw", &path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let shown = folder.image_behind(VIEW).unwrap().unwrap();
        assert_eq!((&*shown.format, &shown.path), ("raw", &path));
        assert_eq!(shown.image, Disk::open(&image).unwrap());
        assert_eq!(std::fs::read(&shown.through).unwrap(), b"image");
        assert_eq!(folder.image_behind(Disk::Block(0x2f)).unwrap(), None);
        drop(sign);
        assert_eq!(folder.image_behind(VIEW).unwrap(), None);
    }

    #[test]
    fn what_a_dead_server_said_is_not_believed() {
        let (temp, folder) = folder();
        let left = name("image", VIEW, 7);
        std::fs::write(temp.path().join(&left), "1 2 f1.2 raw /etc/shadow").unwrap();
        assert_eq!(folder.image_behind(VIEW).unwrap(), None);
        assert!(!temp.path().join(left).exists());
    }

    #[test]
    fn lines_that_make_no_sense_are_no_images() {
        assert!(parse(b"1 2 f1.2 raw /disk with spaces").is_some());
        for line in [
            &b""[..],
            b"1 2 f1.2 raw",
            b"-1 2 f1.2 raw /a",
            b"1 2 g1.2 raw /a",
            b"1 2 f1 raw /a",
            b"\xff 2 f1.2 raw /a",
        ] {
            assert_eq!(parse(line), None, "{line:?}");
        }
    }
}
