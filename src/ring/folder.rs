//! How writers and backups of one disk find each other: names in a folder.
//!
//! | name | what | there while |
//! |---|---|---|
//! | `writer-DISK-N` | a socket; a writer listens | the writer lives: a connection is accepted |
//! | `backup-DISK-N` | a file; a backup announces itself | the backup lives: it holds a lock (flock) on it |
//! | `unattached-DISK-N` | a file; a writer began without being attached to backup N | backup N lives |
//! | `image-DISK-N` | a file, see [`shown`]; DISK is a view of an image that is served | the server lives: it holds a lock on it |
//! | `new-N` | one of these, not ready yet | a moment |
//!
//! DISK is `f` and device and inode of a file, or `b` and the number of a block device. N is a random number. A name
//! appears by a rename, when what it names is ready: a socket listens, an announcement is locked. Both sides announce
//! themselves first and look for the other then, so one of them at least sees the other. What a dead process left is
//! removed by whoever finds it.

pub mod shown;

pub use super::meeting::Announced;
use super::socket;
use rustix::fs::{AtFlags, Dir, FileType, FlockOperation, Mode, OFlags, Stat};
use rustix::io::Errno;
use rustix::rand::GetRandomFlags;
use std::ffi::OsStr;
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

/// The environment variable that names the folder.
pub const DIR_VARIABLE: &str = "DRIVE_BACKUP_DIR";
/// A `new-N` that is older belongs to nobody.
const LONGEST_BIRTH: Duration = Duration::from_secs(60);
/// How often a name is made anew when somebody swept it away.
const TRIES: usize = 3;
/// Longest that an announcement may ask a writer to wait for it.
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// Which disk: the same for every path, link and mount that leads to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Disk {
    /// A regular file.
    File {
        /// st_dev.
        device: u64,
        /// st_ino.
        inode: u64,
    },
    /// A block device, by st_rdev.
    Block(u64),
}

impl fmt::Display for Disk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File { device, inode } => write!(f, "f{device:x}.{inode:x}"),
            Self::Block(number) => write!(f, "b{number:x}"),
        }
    }
}

impl Disk {
    /// The disk at `path`; links are followed. Anything but a regular file or a block device is refused.
    pub fn at(path: &Path) -> io::Result<Self> {
        Self::of(&rustix::fs::stat(path)?)
    }

    /// The disk that is open as `file`.
    pub fn open(file: impl std::os::fd::AsFd) -> io::Result<Self> {
        Self::of(&rustix::fs::fstat(file)?)
    }

    fn of(stat: &Stat) -> io::Result<Self> {
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::RegularFile => Ok(Self::File { device: stat.st_dev, inode: stat.st_ino }),
            FileType::BlockDevice => Ok(Self::Block(stat.st_rdev)),
            _ => Err(io::Error::new(io::ErrorKind::InvalidInput, "neither a regular file nor a block device")),
        }
    }
}

/// The folder. Every access goes through one descriptor, whose owner and mode have been checked.
#[derive(Debug)]
pub struct Folder {
    descriptor: OwnedFd,
    path: PathBuf,
    owner: u32,
}

/// A name in the folder that is removed when this is dropped.
#[derive(Debug)]
pub struct Entry {
    folder: Arc<Folder>,
    name: String,
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.folder.remove(&self.name);
    }
}

/// The kernel's: what a process draws by itself, its forks draw too, and one would take another one's name.
fn random() -> io::Result<u64> {
    let mut bytes = [0; 8];
    rustix::io::retry_on_intr(|| rustix::rand::getrandom(&mut bytes, GetRandomFlags::empty()))?;
    Ok(u64::from_ne_bytes(bytes))
}

fn name(kind: &str, disk: Disk, number: u64) -> String {
    format!("{kind}-{disk}-{number:016x}")
}

/// The number in a name of this kind and disk.
fn number_in(name: &str, kind: &str, disk: Disk) -> Option<u64> {
    let digits = name.strip_prefix(kind)?.strip_prefix('-')?.strip_prefix(&disk.to_string())?.strip_prefix('-')?;
    (digits.len() == 16).then(|| u64::from_str_radix(digits, 16).ok())?
}

/// Where writers and backups meet unless told otherwise: `DRIVE_BACKUP_DIR`; for root `/run/drive-backup`; else
/// `$XDG_RUNTIME_DIR/drive-backup`; else `/tmp/drive-backup-UID`.
pub fn default_path() -> PathBuf {
    let variable = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let user = rustix::process::geteuid();
    variable(DIR_VARIABLE).unwrap_or_else(|| match variable("XDG_RUNTIME_DIR") {
        _ if user.is_root() => PathBuf::from("/run/drive-backup"),
        Some(runtime) => runtime.join("drive-backup"),
        None => PathBuf::from(format!("/tmp/drive-backup-{}", user.as_raw())),
    })
}

impl Folder {
    /// Opens `path`, and makes it if it is missing. It must be a folder of this user alone: mode 0700. Root may use
    /// anybody's.
    pub fn open(path: &Path) -> io::Result<Arc<Self>> {
        match rustix::fs::mkdir(path, Mode::RWXU) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(e) => return Err(e.into()),
        }
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let descriptor = rustix::fs::open(path, flags, Mode::empty())?;
        let stat = rustix::fs::fstat(&descriptor)?;
        let user = rustix::process::geteuid();
        let refusal = if stat.st_uid != user.as_raw() && !user.is_root() {
            Some(format!("it belongs to user {}, not to {}", stat.st_uid, user.as_raw()))
        } else if stat.st_mode & 0o077 != 0 {
            Some(format!("its mode is {:o}, not 700", stat.st_mode & 0o7777))
        } else {
            None
        };
        match refusal {
            Some(why) => Err(io::Error::new(io::ErrorKind::PermissionDenied, why)),
            None => Ok(Arc::new(Self { descriptor, path: path.to_owned(), owner: stat.st_uid })),
        }
    }

    /// As it was asked for.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// May a peer of this user be talked to? Ourselves, root, and for root the folder's owner.
    pub fn trusts(&self, user: u32) -> bool {
        let own = rustix::process::geteuid();
        user == own.as_raw() || user == 0 || own.is_root() && user == self.owner
    }

    /// A path to `name` that is short enough for a socket's address and leads to no other folder.
    fn through(&self, name: &str) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}/{name}", self.descriptor.as_raw_fd()))
    }

    fn remove(&self, name: &str) {
        // Nothing to be done when it fails: whoever finds it later tries again.
        let _ = rustix::fs::unlinkat(&self.descriptor, name, AtFlags::empty());
    }

    /// Makes something under a name of its own, then gives it its final name, at once and ready.
    fn born<T>(&self, last: &str, make: impl Fn(&str) -> io::Result<T>) -> io::Result<T> {
        let mut tries = 0;
        loop {
            let first = format!("new-{:016x}", random()?);
            let made = make(&first).inspect_err(|_| self.remove(&first))?;
            match rustix::fs::renameat(&self.descriptor, &first, &self.descriptor, last) {
                Ok(()) => return Ok(made),
                // Somebody took it for an orphan.
                Err(Errno::NOENT) if tries < TRIES => tries += 1,
                Err(e) => {
                    self.remove(&first);
                    return Err(e.into());
                }
            }
        }
    }

    /// A writer's socket, listening, for `disk`.
    pub fn listen(self: &Arc<Self>, disk: Disk) -> io::Result<(OwnedFd, Entry)> {
        let name = name("writer", disk, random()?);
        let socket = self.born(&name, |first| socket::listen(&self.through(first)))?;
        Ok((socket, Entry { folder: self.clone(), name }))
    }

    /// The numbers of the writers' sockets of `disk`, dead ones among them. Sweeps orphans.
    pub fn writers(&self, disk: Disk) -> io::Result<Vec<u64>> {
        self.sweep()?;
        Ok(self.names()?.iter().filter_map(|name| number_in(name, "writer", disk)).collect())
    }

    /// Connects to a writer. `None`: it is dead, and its socket is removed.
    pub fn connect(&self, disk: Disk, number: u64, timeout: Duration) -> io::Result<Option<OwnedFd>> {
        let name = name("writer", disk, number);
        match socket::connect(&self.through(&name), timeout) {
            Ok(socket) => Ok(Some(socket)),
            Err(e) if e.raw_os_error() == Some(Errno::NOENT.raw_os_error()) => Ok(None),
            // A socket has its final name only while it listens, so nobody ever will on this one.
            Err(e) if e.raw_os_error() == Some(Errno::CONNREFUSED.raw_os_error()) => {
                self.remove(&name);
                Ok(None)
            }
            Err(e) => Err(e),
        }
    }

    /// Announces a backup of `disk`. The descriptor holds the lock: it lives as long as the announcement.
    pub fn announce(self: &Arc<Self>, disk: Disk, patience: Duration) -> io::Result<(u64, OwnedFd, Entry)> {
        let number = random()?;
        let name = name("backup", disk, number);
        let text = format!("{}\n", patience.as_millis());
        let file = self.born(&name, |first| {
            let flags = OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
            let file = rustix::fs::openat(&self.descriptor, first, flags, Mode::RUSR | Mode::WUSR)?;
            // A writer of the folder's owner must be able to look at the lock, also when this is root.
            rustix::fs::fchmod(&file, Mode::from_raw_mode(0o644))?;
            rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive)?;
            rustix::io::write(&file, text.as_bytes())?;
            Ok(file)
        })?;
        Ok((number, file, Entry { folder: self.clone(), name }))
    }

    /// Backups of `disk` that live. What dead ones left is removed.
    pub fn backups(&self, disk: Disk) -> io::Result<Vec<Announced>> {
        let numbers = self.names()?.into_iter().filter_map(|name| number_in(&name, "backup", disk));
        let mut live = Vec::new();
        for number in numbers {
            live.extend(self.backup(disk, number)?);
        }
        Ok(live)
    }

    fn backup(&self, disk: Disk, number: u64) -> io::Result<Option<Announced>> {
        let name = name("backup", disk, number);
        let file = match self.open_announcement(&name) {
            Ok(file) => file,
            Err(Errno::NOENT) => return Ok(None),
            Err(e) => return Err(e.into()),
        };
        if !is_held(&file)? {
            self.remove(&name);
            self.remove(&self::name("unattached", disk, number));
            return Ok(None);
        }
        let mut text = [0; 20];
        let read = rustix::io::read(&file, &mut text)?;
        let millis = std::str::from_utf8(&text[..read]).ok().and_then(|text| text.trim().parse().ok());
        let patience = millis.map_or(LONGEST_WAIT, Duration::from_millis).min(LONGEST_WAIT);
        Ok(Some(Announced { number, patience }))
    }

    fn open_announcement(&self, name: &str) -> Result<OwnedFd, Errno> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        rustix::fs::openat(&self.descriptor, name, flags, Mode::empty())
    }

    /// Leaves a sign for backup `number`: a writer began without it.
    pub fn mark_unattached(&self, disk: Disk, number: u64) -> io::Result<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        rustix::fs::openat(&self.descriptor, name("unattached", disk, number), flags, Mode::RUSR | Mode::WUSR)?;
        Ok(())
    }

    /// Has a writer left that sign for backup `number`?
    pub fn is_marked_unattached(&self, disk: Disk, number: u64) -> io::Result<bool> {
        let name = name("unattached", disk, number);
        match rustix::fs::statat(&self.descriptor, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(_) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(e) => Err(e.into()),
        }
    }

    /// Removes the sign.
    pub fn clear_mark(&self, disk: Disk, number: u64) {
        self.remove(&name("unattached", disk, number));
    }

    /// An inotify descriptor that becomes readable when a name appears.
    pub fn watch(&self) -> io::Result<OwnedFd> {
        use rustix::fs::inotify;
        let descriptor = inotify::init(inotify::CreateFlags::CLOEXEC | inotify::CreateFlags::NONBLOCK)?;
        inotify::add_watch(&descriptor, self.through("."), inotify::WatchFlags::MOVED_TO)?;
        Ok(descriptor)
    }

    fn names(&self) -> io::Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in Dir::read_from(&self.descriptor)? {
            let entry = entry?;
            names.extend(OsStr::from_bytes(entry.file_name().to_bytes()).to_str().map(str::to_owned));
        }
        Ok(names)
    }

    /// Removes what died before it got its name, what killed backups of any disk left, and signs for those.
    fn sweep(&self) -> io::Result<()> {
        for name in self.names()?.iter().filter(|name| name.starts_with("backup-")) {
            // What can't be looked at is somebody else's business.
            if self.open_announcement(name).is_ok_and(|file| is_held(&file) == Ok(false)) {
                self.remove(name);
            }
        }
        let names = self.names()?;
        for name in &names {
            let backup = name.strip_prefix("unattached").map(|rest| format!("backup{rest}"));
            if backup.is_some_and(|backup| !names.contains(&backup)) {
                self.remove(name);
            }
        }
        for name in names.iter().filter(|name| name.starts_with("new-")) {
            let Ok(stat) = rustix::fs::statat(&self.descriptor, name, AtFlags::SYMLINK_NOFOLLOW) else { continue };
            let made = SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(stat.st_mtime).unwrap_or(0));
            if made.elapsed().is_ok_and(|age| age > LONGEST_BIRTH) {
                self.remove(name);
            }
        }
        Ok(())
    }
}

/// Does the backup of this announcement live? The lock is taken before the announcement gets its name.
fn is_held(announcement: &OwnedFd) -> Result<bool, Errno> {
    match rustix::fs::flock(announcement, FlockOperation::NonBlockingLockShared) {
        Err(Errno::WOULDBLOCK) => Ok(true),
        Err(errno) => Err(errno),
        Ok(()) => Ok(false),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    const DISK: Disk = Disk::File { device: 1, inode: 2 };
    const SECOND: Duration = Duration::from_secs(1);

    fn folder() -> (tempfile::TempDir, Arc<Folder>) {
        let temp = tempfile::tempdir().unwrap();
        let folder = Folder::open(&temp.path().join("meet")).unwrap();
        (temp, folder)
    }

    #[test]
    fn a_writer_is_found_while_it_lives() {
        let (_temp, folder) = folder();
        let (listener, entry) = folder.listen(DISK).unwrap();
        let found = folder.writers(DISK).unwrap();
        assert_eq!(found.len(), 1);
        let path = folder.path().join(name("writer", DISK, found[0]));
        assert_eq!(std::fs::metadata(path).unwrap().permissions().mode() & 0o1000, 0o1000, "nobody takes it for old");
        assert_eq!(folder.writers(Disk::File { device: 1, inode: 0x22 }).unwrap().len(), 0);
        assert!(folder.connect(DISK, found[0], SECOND).unwrap().is_some());
        let accepted = socket::accept(&listener).unwrap();
        assert_eq!(socket::peer(&accepted).unwrap().uid(), rustix::process::geteuid().as_raw());
        drop(listener);
        assert!(folder.connect(DISK, found[0], SECOND).unwrap().is_none(), "dead, and swept");
        assert_eq!(folder.writers(DISK).unwrap().len(), 0);
        drop(entry);
    }

    #[test]
    fn a_backup_is_found_while_it_holds_its_lock() {
        let (_temp, folder) = folder();
        let (number, lock, entry) = folder.announce(DISK, SECOND * 7).unwrap();
        assert_eq!(folder.backups(DISK).unwrap(), [Announced { number, patience: SECOND * 7 }]);
        folder.mark_unattached(DISK, number).unwrap();
        assert!(folder.is_marked_unattached(DISK, number).unwrap());
        drop(lock);
        assert!(folder.backups(DISK).unwrap().is_empty(), "dead, and swept");
        assert!(!folder.is_marked_unattached(DISK, number).unwrap());
        assert_eq!(folder.names().unwrap().iter().filter(|name| name.starts_with("backup")).count(), 0);
        drop(entry);
    }

    #[test]
    fn names_go_with_their_owners() {
        let (_temp, folder) = folder();
        let (_listener, entry) = folder.listen(DISK).unwrap();
        let (_, _lock, announcement) = folder.announce(DISK, SECOND).unwrap();
        drop((entry, announcement));
        let left: Vec<_> = folder.names().unwrap().into_iter().filter(|name| !name.starts_with('.')).collect();
        assert_eq!(left, Vec::<String>::new());
    }

    #[test]
    fn a_folder_that_others_may_enter_is_refused() {
        let temp = tempfile::tempdir().unwrap();
        let path = temp.path().join("open");
        std::fs::create_dir(&path).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o710)).unwrap();
        let refused = Folder::open(&path).unwrap_err();
        assert_eq!(refused.to_string(), "its mode is 710, not 700");
        let link = temp.path().join("link");
        symlink(temp.path(), &link).unwrap();
        assert!(Folder::open(&link).is_err(), "a link may lead anywhere");
    }

    #[test]
    fn a_disk_is_one_whatever_leads_to_it() {
        let temp = tempfile::tempdir().unwrap();
        let [disk, link, hard, other] = ["disk", "link", "hard", "other"].map(|name| temp.path().join(name));
        std::fs::write(&disk, b"x").unwrap();
        std::fs::write(&other, b"x").unwrap();
        symlink(&disk, &link).unwrap();
        std::fs::hard_link(&disk, &hard).unwrap();
        let one = Disk::at(&disk).unwrap();
        assert_eq!((Disk::at(&link).unwrap(), Disk::at(&hard).unwrap()), (one, one));
        assert_ne!(Disk::at(&other).unwrap(), one);
        assert_eq!(Disk::open(std::fs::File::open(&disk).unwrap()).unwrap(), one);
        assert!(Disk::at(temp.path()).is_err());
        assert!(Disk::at(Path::new("/dev/null")).is_err());
    }

    #[test]
    fn what_killed_backups_of_other_disks_left_is_swept() {
        let (_dir, folder) = folder();
        let other = Disk::File { device: 1, inode: 3 };
        let (_, lock, killed) = folder.announce(other, SECOND).unwrap();
        let (_, _held, _alive) = folder.announce(other, SECOND).unwrap();
        // A killed process drops its lock and not its name.
        drop(lock);
        std::mem::forget(killed);
        folder.writers(DISK).unwrap();
        assert_eq!(folder.names().unwrap().iter().filter(|name| name.starts_with("backup-")).count(), 1);
        assert_eq!(folder.backups(other).unwrap().len(), 1, "the one that lives");
    }

    #[test]
    fn an_orphan_is_swept_and_a_newborn_is_not() {
        let (temp, folder) = folder();
        let path = |name: &str| temp.path().join("meet").join(name);
        std::fs::write(path("new-0000000000000001"), b"").unwrap();
        let old = std::fs::File::create(path("new-0000000000000002")).unwrap();
        old.set_modified(SystemTime::now() - LONGEST_BIRTH * 2).unwrap();
        folder.writers(DISK).unwrap();
        assert!(path("new-0000000000000001").exists() && !path("new-0000000000000002").exists());
    }

    #[test]
    fn a_deep_folder_is_no_obstacle() {
        let temp = tempfile::tempdir().unwrap();
        let deep = temp.path().join("d".repeat(200));
        std::fs::create_dir(&deep).unwrap();
        let folder = Folder::open(&deep.join("meet")).unwrap();
        let (_listener, _entry) = folder.listen(DISK).unwrap();
        let found = folder.writers(DISK).unwrap();
        assert!(folder.connect(DISK, found[0], SECOND).unwrap().is_some());
    }

    #[test]
    fn a_new_name_is_noticed() {
        let (_temp, folder) = folder();
        let watch = folder.watch().unwrap();
        let mut bytes = [0; 512];
        assert_eq!(rustix::io::read(&watch, &mut bytes), Err(Errno::AGAIN));
        let _writer = folder.listen(DISK).unwrap();
        assert!(rustix::io::read(&watch, &mut bytes).unwrap() > 0);
    }
}
