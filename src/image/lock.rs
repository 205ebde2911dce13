//! Locks that QEMU and qemu-img respect and hold: open-file-description locks on single bytes of the image.
//!
//! Byte 100 + p is locked by whoever uses permission p, byte 200 + p by whoever does not share it; all are shared
//! locks. Whoever comes takes its own bytes first and then looks for a byte that contradicts them, so that of two
//! who come at once one at least sees the other.

use super::medium::Identity;
use crate::error::{Error, Kind, Result, Side};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;
use std::fs::File;
use std::io;
use std::path::Path;

/// QEMU's permissions that matter for a copy, by their bit.
const CONSISTENT_READ: u8 = 0;
const WRITE: u8 = 1;
const WRITE_UNCHANGED: u8 = 2;
const RESIZE: u8 = 3;

const USED: i64 = 100;
const UNSHARED: i64 = 200;
/// Ours alone, exclusive: two backups that would write one file. QEMU does not look at it.
const OWN: i64 = 300;

/// What is wanted of an image while the lock is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Terms {
    /// Read; nobody may write or resize it. For an offline copy.
    Read,
    /// Read, and let others write: a clone or a cooperating writer keeps the instant. Holds nothing, refuses nothing.
    ReadShared,
    /// Write and resize; nobody else may use it.
    Write,
}

impl Terms {
    fn used(self) -> &'static [u8] {
        match self {
            Self::Read => &[CONSISTENT_READ],
            Self::ReadShared => &[],
            Self::Write => &[CONSISTENT_READ, WRITE, RESIZE],
        }
    }

    fn unshared(self) -> &'static [u8] {
        match self {
            Self::Read => &[WRITE, RESIZE],
            Self::ReadShared => &[],
            Self::Write => &[CONSISTENT_READ, WRITE, WRITE_UNCHANGED, RESIZE],
        }
    }

    fn bytes(self) -> impl Iterator<Item = i64> {
        let used = self.used().iter().map(|&p| USED + i64::from(p));
        used.chain(self.unshared().iter().map(|&p| UNSHARED + i64::from(p)))
    }

    /// The bytes that nobody else may have locked.
    fn contradictions(self) -> impl Iterator<Item = i64> {
        let used = self.used().iter().map(|&p| UNSHARED + i64::from(p));
        used.chain(self.unshared().iter().map(|&p| USED + i64::from(p)))
    }
}

/// Whether the image is protected.
#[derive(Debug)]
pub enum Protection {
    /// Until the lock is dropped.
    Locked(ImageLock),
    /// The file system has no such locks: a warning, one line.
    Unsupported(String),
}

/// Locked bytes of an open file. Dropping it unlocks them.
#[must_use = "dropping it unlocks the image"]
#[derive(Debug)]
pub struct ImageLock {
    file: File,
    terms: Terms,
}

impl Drop for ImageLock {
    fn drop(&mut self) {
        for byte in self.terms.bytes() {
            // Closing the last descriptor unlocks it too.
            let _ = set(&self.file, libc::F_UNLCK, byte);
        }
    }
}

/// Locks the open image `file`, which has been opened from `path`, for reading at least. Does not wait: an image that
/// somebody uses in a way that `terms` don't allow is [`Kind::Busy`].
///
/// The lock belongs to the open file description of `file`: it does not conflict with another lock taken through the
/// same one.
pub fn acquire(file: &File, path: &Path, side: Side, terms: Terms) -> Result<Protection> {
    let failed = |e: io::Error| Error::file(side, "lock", path, e);
    let lock = ImageLock { file: file.try_clone().map_err(failed)?, terms };
    match take(&lock) {
        Ok(None) => Ok(Protection::Locked(lock)),
        Ok(Some(other)) => Err(busy(file, path, side, other)),
        Err(errno) if is_unsupported(errno) => Ok(Protection::Unsupported(format!(
            "{side} '{}' can't be locked against other programs: {}",
            path.display(),
            errno.desc()
        ))),
        Err(errno) => Err(failed(errno.into())),
    }
}

/// Fails with [`Kind::Busy`] when a QEMU writes or resizes the open image `file`. Holds nothing afterwards.
pub fn refuse_writer(file: &File, path: &Path, side: Side) -> Result<()> {
    for byte in [USED + i64::from(WRITE), USED + i64::from(RESIZE)] {
        match find_lock(file, libc::F_WRLCK, byte) {
            Ok(Some(other)) => return Err(busy(file, path, side, other)),
            Ok(None) => {}
            Err(errno) if is_unsupported(errno) => return Ok(()),
            Err(errno) => return Err(Error::file(side, "lock", path, errno.into())),
        }
    }
    Ok(())
}

/// How two backups keep out of one file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// Only one may have it. The file must be open for writing.
    Exclusive,
    /// Several may have it, and nobody the exclusive one. The file must be open for reading.
    Shared,
}

/// Marks `file` as ours until its last descriptor is closed, apart from QEMU's locks. False when another backup has
/// it; [`io::ErrorKind::Unsupported`] where the file system has no locks.
pub fn mark(file: &File, mark: Mark) -> io::Result<bool> {
    let kind = match mark {
        Mark::Exclusive => libc::F_WRLCK,
        Mark::Shared => libc::F_RDLCK,
    };
    match set(file, kind, OWN) {
        Ok(()) => Ok(true),
        Err(Errno::EAGAIN | Errno::EACCES) => Ok(false),
        Err(errno) if is_unsupported(errno) => Err(io::ErrorKind::Unsupported.into()),
        Err(errno) => Err(errno.into()),
    }
}

/// Somebody else's lock.
struct Other {
    byte: i64,
    pid: Option<i32>,
}

fn take(lock: &ImageLock) -> Result<Option<Other>, Errno> {
    for byte in lock.terms.bytes() {
        if let Some(other) = take_byte(&lock.file, byte)? {
            return Ok(Some(other));
        }
    }
    for byte in lock.terms.contradictions() {
        if let Some(other) = find_lock(&lock.file, libc::F_WRLCK, byte)? {
            return Ok(Some(other));
        }
    }
    Ok(None)
}

/// So often it may be let go between a refusal and the look at whose lock was in the way.
const TRIES: u32 = 100;

fn take_byte(file: &File, byte: i64) -> Result<Option<Other>, Errno> {
    for _ in 0..TRIES {
        match set(file, libc::F_RDLCK, byte) {
            // Not QEMU's way, yet somebody has it for himself.
            Err(Errno::EAGAIN | Errno::EACCES) => {
                if let Some(other) = find_lock(file, libc::F_RDLCK, byte)? {
                    return Ok(Some(other));
                }
            }
            other => return other.map(|()| None),
        }
    }
    Ok(Some(Other { byte, pid: None }))
}

fn request(kind: i32, byte: i64) -> libc::flock {
    libc::flock { l_type: kind as i16, l_whence: libc::SEEK_SET as i16, l_start: byte, l_len: 1, l_pid: 0 }
}

fn set(file: &File, kind: i32, byte: i64) -> Result<(), Errno> {
    loop {
        match fcntl(file, FcntlArg::F_OFD_SETLK(&request(kind, byte))) {
            // It does not wait for the other's lock; a file system's server may.
            Err(Errno::EINTR) => {}
            other => return other.map(drop),
        }
    }
}

/// The lock that would be in the way of ours.
fn find_lock(file: &File, kind: i32, byte: i64) -> Result<Option<Other>, Errno> {
    let mut answer = request(kind, byte);
    while let Err(errno) = fcntl(file, FcntlArg::F_OFD_GETLK(&mut answer)) {
        // As in `set`: some file systems ask a server.
        if errno != Errno::EINTR {
            return Err(errno);
        }
    }
    let is_free = i32::from(answer.l_type) == libc::F_UNLCK;
    Ok((!is_free).then(|| Other { byte, pid: Some(answer.l_pid).filter(|&pid| pid > 0) }))
}

fn is_unsupported(errno: Errno) -> bool {
    matches!(errno, Errno::EINVAL | Errno::ENOLCK | Errno::EOPNOTSUPP | Errno::ENOSYS)
}

fn busy(file: &File, path: &Path, side: Side, other: Other) -> Error {
    let is_write = [USED + i64::from(WRITE), USED + i64::from(RESIZE)].contains(&other.byte);
    let what = if is_write { "is being written by another program" } else { "is in use by another program" };
    let pid = match other.pid.or_else(|| holder(file, other.byte)) {
        Some(pid) => format!(" (pid {pid})"),
        None => String::new(),
    };
    Error::new(Kind::Busy, format!("{side} '{}' {what}{pid}", path.display()))
}

/// Which process holds an open-file-description lock on `byte`: the lock itself has no owner, but every process
/// shows its descriptors' locks. `None` when it can't be told, for want of privilege for instance.
fn holder(file: &File, byte: i64) -> Option<i32> {
    let inode = Identity::of(&file.metadata().ok()?).inode;
    let processes = std::fs::read_dir("/proc").ok()?.flatten();
    let mut pids = processes.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    pids.find(|&pid| pid as u32 != std::process::id() && process_locks(pid, inode, byte))
}

fn process_locks(pid: i32, inode: u64, byte: i64) -> bool {
    let Ok(descriptors) = std::fs::read_dir(format!("/proc/{pid}/fdinfo")) else { return false };
    descriptors.flatten().any(|entry| {
        let shown = std::fs::read_to_string(entry.path()).unwrap_or_default();
        shown.lines().filter_map(|line| line.strip_prefix("lock:")).any(|lock| covers(lock, inode, byte))
    })
}

/// Whether a line such as `1: OFDLCK ADVISORY  READ -1 fe:00:10010766 100 101` is of `inode` and covers `byte`.
fn covers(line: &str, inode: u64, byte: i64) -> bool {
    let fields: Vec<&str> = line.split_whitespace().collect();
    let [_, "OFDLCK", _, _, _, place, first, last] = fields[..] else { return false };
    let same_inode = place.rsplit(':').next().and_then(|i| i.parse().ok()) == Some(inode);
    let first = first.parse::<i64>().unwrap_or(i64::MAX);
    let last = if last == "EOF" { i64::MAX } else { last.parse().unwrap_or(-1) };
    same_inode && (first..=last).contains(&byte)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::fixture::{LoopDevice, Mount, QemuIo, sparse_file, text};
    use std::fs::OpenOptions;
    use std::path::PathBuf;
    use std::process::Command;

    fn image(folder: &tempfile::TempDir) -> PathBuf {
        let path = folder.path().join("disk.raw");
        sparse_file(&path, 1 << 20);
        path
    }

    fn open(path: &Path) -> File {
        OpenOptions::new().read(true).write(true).open(path).unwrap()
    }

    fn lock(path: &Path, side: Side, terms: Terms) -> Result<Protection> {
        acquire(&open(path), path, side, terms)
    }

    /// Whether a qemu-io may open it; its complaint if not.
    fn qemu_io(path: &Path, mode: &[&str]) -> Result<(), String> {
        let output = Command::new("qemu-io").args(mode).args(["-f", "raw", "-c", "length"]).arg(path).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.success() { Ok(()) } else { Err(stderr) }
    }

    #[test]
    fn a_qemu_writer_makes_the_source_busy_and_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = image(&folder);
        let qemu = QemuIo::open(&path, &[]);
        let error = lock(&path, Side::Source, Terms::Read).unwrap_err();
        assert_eq!(error.kind(), Kind::Busy);
        let pid = qemu.id();
        let expected = format!("source '{}' is being written by another program (pid {pid})", text(&path));
        assert_eq!(error.to_string(), expected);
        assert!(refuse_writer(&open(&path), &path, Side::Target).is_err());
        assert!(matches!(lock(&path, Side::Source, Terms::ReadShared), Ok(Protection::Locked(_))));
        drop(qemu);
        assert!(matches!(lock(&path, Side::Source, Terms::Read), Ok(Protection::Locked(_))));
    }

    #[test]
    fn a_qemu_reader_shares_the_source_and_not_the_target() {
        let folder = tempfile::tempdir().unwrap();
        let path = image(&folder);
        let _qemu = QemuIo::open(&path, &["-r"]);
        assert!(matches!(lock(&path, Side::Source, Terms::Read), Ok(Protection::Locked(_))));
        refuse_writer(&open(&path), &path, Side::Target).unwrap();
        let error = lock(&path, Side::Target, Terms::Write).unwrap_err();
        assert_eq!(error.kind(), Kind::Busy);
        assert!(error.to_string().contains("is in use by another program (pid "), "{error}");
    }

    #[test]
    fn qemu_may_read_our_source_and_not_write_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = image(&folder);
        let held = lock(&path, Side::Source, Terms::Read).unwrap();
        qemu_io(&path, &["-r"]).unwrap();
        let complaint = qemu_io(&path, &[]).unwrap_err();
        assert!(complaint.contains("Failed to get \"write\" lock"), "{complaint}");
        drop(held);
        qemu_io(&path, &[]).unwrap();
    }

    #[test]
    fn a_shared_source_hinders_no_qemu() {
        let folder = tempfile::tempdir().unwrap();
        let path = image(&folder);
        let _held = lock(&path, Side::Source, Terms::ReadShared).unwrap();
        qemu_io(&path, &[]).unwrap();
    }

    #[test]
    fn qemu_and_qemu_img_refuse_our_target() {
        let folder = tempfile::tempdir().unwrap();
        let path = image(&folder);
        let _held = lock(&path, Side::Target, Terms::Write).unwrap();
        assert!(qemu_io(&path, &[]).is_err());
        assert!(qemu_io(&path, &["-r"]).unwrap_err().contains("lock"));
        let copy = folder.path().join("copy");
        let convert = Command::new("qemu-img").args(["convert", "-f", "raw"]).args([&path, &copy]).output().unwrap();
        assert!(String::from_utf8_lossy(&convert.stderr).contains("lock"));
    }

    #[test]
    fn a_device_is_locked_as_a_file_is() {
        let folder = tempfile::tempdir().unwrap();
        let device = LoopDevice::over(&image(&folder), &[]);
        let _qemu = QemuIo::open(device.path(), &[]);
        let error = lock(device.path(), Side::Source, Terms::Read).unwrap_err();
        assert_eq!(error.kind(), Kind::Busy);
    }

    #[test]
    fn two_readers_agree_and_a_writer_is_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = image(&folder);
        let readers =
            [lock(&path, Side::Source, Terms::Read).unwrap(), lock(&path, Side::Source, Terms::Read).unwrap()];
        assert_eq!(lock(&path, Side::Target, Terms::Write).unwrap_err().kind(), Kind::Busy);
        drop(readers);
        let _writer = lock(&path, Side::Target, Terms::Write).unwrap();
        for terms in [Terms::Read, Terms::Write] {
            assert_eq!(lock(&path, Side::Source, terms).unwrap_err().kind(), Kind::Busy);
        }
    }

    #[test]
    fn a_refused_lock_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        let path = image(&folder);
        let file = open(&path);
        let reader = lock(&path, Side::Source, Terms::Read).unwrap();
        assert!(acquire(&file, &path, Side::Target, Terms::Write).is_err());
        drop(reader);
        qemu_io(&path, &[]).unwrap();
    }

    #[test]
    fn our_own_mark_is_exclusive_or_shared() {
        let folder = tempfile::tempdir().unwrap();
        let path = image(&folder);
        let first = open(&path);
        assert!(mark(&first, Mark::Shared).unwrap());
        assert!(mark(&open(&path), Mark::Shared).unwrap());
        assert!(!mark(&open(&path), Mark::Exclusive).unwrap());
        let other = folder.path().join("other");
        sparse_file(&other, 1);
        let own = open(&other);
        assert!(mark(&own, Mark::Exclusive).unwrap());
        assert!(!mark(&open(&other), Mark::Shared).unwrap());
    }

    #[test]
    fn what_a_file_system_without_locks_answers_is_no_error() {
        for errno in [Errno::EINVAL, Errno::ENOLCK, Errno::EOPNOTSUPP] {
            assert!(is_unsupported(errno));
        }
        assert!(!is_unsupported(Errno::EAGAIN) && !is_unsupported(Errno::EIO));
    }

    #[test]
    fn a_line_of_fdinfo_is_understood() {
        let line = "\t1: OFDLCK ADVISORY  READ -1 fe:00:10010766 100 101";
        assert!(covers(line, 10_010_766, 101) && covers(line, 10_010_766, 100));
        assert!(!covers(line, 10_010_766, 102) && !covers(line, 7, 100));
        assert!(covers("2: OFDLCK ADVISORY  WRITE -1 fe:00:7 0 EOF", 7, 300));
        assert!(!covers("1: POSIX ADVISORY  WRITE 12 fe:00:7 0 EOF", 7, 300) && !covers("", 0, 0));
    }

    #[test]
    fn a_reader_on_tmpfs_is_seen_too() {
        let memory = Mount::tmpfs(4 << 20);
        let path = memory.join("disk");
        sparse_file(&path, 1 << 20);
        let _qemu = QemuIo::open(&path, &[]);
        assert_eq!(lock(&path, Side::Source, Terms::Read).unwrap_err().kind(), Kind::Busy);
    }
}
