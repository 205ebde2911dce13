//! Whether a source changed while it was copied, where nothing keeps its instant: two looks, before and after.
//!
//! | source | what is compared | what it can't see |
//! |---|---|---|
//! | regular file | inode, size, mtime and ctime | on kernels before 6.13, a write in the same clock tick (1 to 10 ms) as the first look; stores through a shared mapping to pages that were dirty before it |
//! | block device | sectors that the device was given to write or discard, its size, and whether it is mounted writable; one whose sectors are not counted counts as changed | writes of others to the disk below (another host of a shared disk, the file below a remote device) |
//!
//! A device's dirty pages are written out before each look, so that whoever wrote through the page cache is counted.

use super::identity;
use super::medium::{self, Identity, Medium};
use std::fs::{File, Metadata};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// How a source looked at one moment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fingerprint {
    /// A regular file.
    File(Times),
    /// A block device.
    Device(Activity),
}

/// What tells that a file was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Times {
    identity: Identity,
    length: u64,
    /// Seconds and nanoseconds.
    modified: (i64, i64),
    changed: (i64, i64),
    attributes: Attributes,
}

/// What of a file changes its ctime, and not its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Attributes {
    mode: u32,
    user: u32,
    group: u32,
    links: u64,
}

/// What tells that a device was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Activity {
    length: u64,
    /// Written and discarded since the device appeared; `None` if nobody counts them.
    sectors: Option<u64>,
    mounted_at: Option<PathBuf>,
    /// Of the file behind a loop device, which may be written past the device.
    backing: Option<Times>,
}

impl Fingerprint {
    /// Of the open source `file`, which was opened from `path`. Blocks while a device's dirty pages are written.
    pub fn take(file: &File, path: &Path) -> io::Result<Self> {
        match Medium::of(file)? {
            Medium::File => Ok(Self::File(Times::of(&file.metadata()?))),
            medium @ Medium::Device { .. } => Ok(Self::Device(Activity::of(file, path, medium)?)),
        }
    }

    /// Why a copy made between the look `before` and this one may be torn; `None` if nothing changed.
    pub fn changed_since(&self, before: &Self) -> Option<String> {
        match (before, self) {
            (Self::File(before), Self::File(now)) => now.changed_since(before),
            (Self::Device(before), Self::Device(now)) => now.changed_since(before),
            _ => Some("it is no longer the same file".to_owned()),
        }
    }

    /// [`Fingerprint::changed_since`], but for a file that got another owner, mode or name: one that several disks share is lent
    /// from one virtual machine to the next.
    pub fn written_since(&self, before: &Self) -> Option<String> {
        match (before, self) {
            (Self::File(before), Self::File(now)) if now.attributes != before.attributes => {
                Times { changed: before.changed, ..*now }.changed_since(before)
            }
            _ => self.changed_since(before),
        }
    }
}

impl Times {
    fn of(metadata: &Metadata) -> Self {
        Self {
            identity: Identity::of(metadata),
            length: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
            attributes: Attributes {
                mode: metadata.mode(),
                user: metadata.uid(),
                group: metadata.gid(),
                links: metadata.nlink(),
            },
        }
    }

    fn changed_since(&self, before: &Self) -> Option<String> {
        if self.identity != before.identity {
            return Some("it is no longer the same file".to_owned());
        }
        if self.length != before.length {
            return Some(format!("its size went from {} to {} bytes", before.length, self.length));
        }
        if self.modified != before.modified {
            return Some("it was modified (mtime)".to_owned());
        }
        (self.changed != before.changed).then(|| "its inode was changed (ctime)".to_owned())
    }
}

impl Activity {
    fn of(file: &File, path: &Path, medium: Medium) -> io::Result<Self> {
        file.sync_all()?;
        let device = file.metadata()?.rdev();
        let home = medium::sys_folder(device);
        let stat = std::fs::read_to_string(home.join("stat"))?;
        let sectors = sectors_changed(&stat).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidData, "the kernel's statistics of the device are not understood")
        })?;
        let sectors = is_counted(&home).then_some(sectors);
        let mounted_at = identity::mounted_writable(path)?;
        let backing = identity::loop_file(device).map(|metadata| Times::of(&metadata));
        Ok(Self { length: medium.length(file)?, sectors, mounted_at, backing })
    }

    fn changed_since(&self, before: &Self) -> Option<String> {
        if let Some(at) = before.mounted_at.as_ref().or(self.mounted_at.as_ref()) {
            return Some(format!("it is mounted at '{}' and may be written", at.display()));
        }
        if self.length != before.length {
            return Some(format!("its size went from {} to {} bytes", before.length, self.length));
        }
        let (Some(sectors), Some(sectors_before)) = (self.sectors, before.sectors) else {
            return Some("the kernel does not count what is written to it (queue/iostats is 0)".to_owned());
        };
        if sectors != sectors_before {
            let count = sectors.wrapping_sub(sectors_before);
            return Some(format!("{count} sectors of it were written or discarded"));
        }
        match (&before.backing, &self.backing) {
            (None, None) => None,
            (Some(before), Some(now)) => now.changed_since(before).map(|why| format!("the file behind it: {why}")),
            _ => Some("it is no longer the same loop device".to_owned()),
        }
    }
}

/// Whether the kernel counts what is written to the device whose folder in /sys is `home`, as queue/iostats says of the whole
/// disk (Documentation/ABI/stable/sysfs-block). Drivers without request queues, such as zram and device-mapper, count all the same.
fn is_counted(home: &Path) -> bool {
    // Of a partition the folder above is the disk's.
    let of_disk = |name: &str| [home.join(name), home.join("..").join(name)].into_iter().find(|path| path.exists());
    let told = of_disk("queue/iostats").and_then(|path| std::fs::read_to_string(path).ok());
    of_disk("mq").is_none() || told.is_none_or(|told| told.trim() != "0")
}

/// Sectors written and discarded, of a line of /sys/dev/block/M:m/stat (Documentation/admin-guide/iostats).
fn sectors_changed(stat: &str) -> Option<u64> {
    const WRITTEN: usize = 6;
    const DISCARDED: usize = 13;
    let fields: Vec<u64> = stat.split_whitespace().map_while(|field| field.parse().ok()).collect();
    // Kernels before 4.18 count no discards.
    Some(fields.get(WRITTEN)?.wrapping_add(fields.get(DISCARDED).copied().unwrap_or(0)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::fixture::{LoopDevice, Mount, run, sparse_file, text};
    use std::fs::OpenOptions;
    use std::os::unix::fs::FileExt;

    /// Why `path` counts as changed by `change`.
    fn change(path: &Path, change: impl FnOnce()) -> Option<String> {
        let file = File::open(path).unwrap();
        let before = Fingerprint::take(&file, path).unwrap();
        change();
        Fingerprint::take(&file, path).unwrap().changed_since(&before)
    }

    fn write(path: &Path, offset: u64) {
        OpenOptions::new().write(true).open(path).unwrap().write_all_at(b"x", offset).unwrap();
    }

    #[test]
    fn every_write_to_a_file_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let memory = Mount::tmpfs(4 << 20);
        for path in [folder.path().join("disk"), memory.join("disk")] {
            sparse_file(&path, 1 << 20);
            assert_eq!(change(&path, || drop(std::fs::read(&path).unwrap())), None);
            for _ in 0..100 {
                assert_eq!(change(&path, || write(&path, 4096)).unwrap(), "it was modified (mtime)");
            }
            assert_eq!(change(&path, || write(&path, 1 << 20)).unwrap(), "its size went from 1048576 to 1048577 bytes");
        }
    }

    #[test]
    fn another_owner_mode_or_name_is_no_write() {
        use std::os::unix::fs::PermissionsExt;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        sparse_file(&path, 4096);
        let changes: [(&str, &dyn Fn()); 3] = [
            ("owner", &|| std::os::unix::fs::chown(&path, Some(1), Some(1)).unwrap()),
            ("mode", &|| std::fs::set_permissions(&path, PermissionsExt::from_mode(0o640)).unwrap()),
            ("name", &|| std::fs::hard_link(&path, folder.path().join("link")).unwrap()),
        ];
        for (what, change) in changes {
            let file = File::open(&path).unwrap();
            let look = || Fingerprint::take(&file, &path).unwrap();
            let before = look();
            change();
            assert_eq!(look().changed_since(&before).unwrap(), "its inode was changed (ctime)", "{what}");
            assert_eq!(look().written_since(&before), None, "{what}");
            write(&path, 0);
            assert_eq!(look().written_since(&before).unwrap(), "it was modified (mtime)", "{what}");
        }
    }

    #[test]
    fn a_writer_that_turns_the_clock_back_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        sparse_file(&path, 4096);
        let turn_back = || {
            let modified = path.metadata().unwrap().modified().unwrap();
            write(&path, 0);
            OpenOptions::new().write(true).open(&path).unwrap().set_modified(modified).unwrap();
        };
        assert_eq!(change(&path, turn_back).unwrap(), "its inode was changed (ctime)");
    }

    #[test]
    fn a_write_to_a_device_is_noticed_even_before_it_leaves_the_cache() {
        let folder = tempfile::tempdir().unwrap();
        sparse_file(&folder.path().join("file"), 1 << 20);
        let device = LoopDevice::over(&folder.path().join("file"), &[]);
        let path = device.path();
        assert_eq!(change(path, || drop(std::fs::read(path).unwrap())), None);
        assert_eq!(change(path, || write(path, 4096)).unwrap(), "8 sectors of it were written or discarded");
        let discard = || drop(run("blkdiscard", &[text(path)]));
        assert_eq!(change(path, discard).unwrap(), "2048 sectors of it were written or discarded");
    }

    /// Of a device; counted again when dropped: the next one of that name inherits it.
    struct Uncounted(PathBuf);

    impl Uncounted {
        fn set(disk: &Path) -> Self {
            let setting = disk.join("queue/iostats");
            std::fs::write(&setting, "0").unwrap();
            Self(setting)
        }
    }

    impl Drop for Uncounted {
        fn drop(&mut self) {
            std::fs::write(&self.0, "1").unwrap();
        }
    }

    #[test]
    fn a_device_whose_writes_nobody_counts_counts_as_changed_though_nobody_wrote() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        sparse_file(&file, 4 << 20);
        let device = LoopDevice::over(&file, &[]);
        let name = device.path().file_name().unwrap().to_str().unwrap();
        let disk = PathBuf::from(format!("/sys/block/{name}"));
        // Partitions have their folders where this one is.
        let partition = disk.join("holders");
        assert!(is_counted(&disk) && is_counted(&partition));
        assert_eq!(change(device.path(), || ()), None);
        let _uncounted = Uncounted::set(&disk);
        assert!(!is_counted(&disk) && !is_counted(&partition));
        let why = change(device.path(), || ()).unwrap();
        assert_eq!(why, "the kernel does not count what is written to it (queue/iostats is 0)");
    }

    #[test]
    fn a_write_to_the_file_behind_a_loop_device_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("file");
        sparse_file(&file, 1 << 20);
        let device = LoopDevice::over(&file, &[]);
        let why = change(device.path(), || write(&file, 0)).unwrap();
        assert_eq!(why, "the file behind it: it was modified (mtime)");
    }

    #[test]
    fn a_device_mounted_writable_counts_as_changed_though_nobody_wrote() {
        let mount = Mount::fresh("ext4");
        let device = run("findmnt", &["-n", "-o", "SOURCE", text(mount.path())]);
        let why = change(Path::new(&device), || ()).unwrap();
        assert_eq!(why, format!("it is mounted at '{}' and may be written", mount.path().display()));
        run("mount", &["-o", "remount,ro", text(mount.path())]);
        assert_eq!(change(Path::new(&device), || ()), None);
    }

    #[test]
    fn the_kernels_statistics_are_understood() {
        assert_eq!(sectors_changed(" 1 2 3 4 5 6 70 8 9 10 11\n"), Some(70));
        assert_eq!(sectors_changed("1 2 3 4 5 6 70 8 9 10 11 12 13 500 15 16 17"), Some(570));
        assert_eq!(sectors_changed("1 2 3"), None);
    }
}
