//! Whether two paths are the same bytes, under whatever names, and who else uses a device.
//!
//! A path stands for storage: a file, or a disk and a range of it. A symbolic link, a hard link and a bind mount lead
//! to one inode; a loop device is its backing file; a partition is a range of its disk; a device-mapper or md device
//! lies above its slaves. Two paths overlap when one of them, or what lies below it, has a byte of the other.

use super::medium::{self, Identity};
use super::sys::{self, LoopBacking};
use crate::error::{Error, Kind, Result, Side};
use crate::ground::range::ByteRange;
use rustix::fs::{Mode, OFlags, major, makedev};
use std::ffi::OsStr;
use std::fs::{File, Metadata};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Refuses a target that is one of `sources`, or overlaps with it: the source and every file of its backing chain. A
/// target that does not exist yet is none of them. [`Kind::Usage`].
pub fn refuse_same(target: &Path, sources: &[&Path]) -> Result<()> {
    let Some(target_storage) = existing(target, Side::Target)? else { return Ok(()) };
    for source in sources {
        let source_storage = Storage::of(source).map_err(|e| Error::file(Side::Source, "open", source, e))?;
        if target_storage.overlaps(&source_storage) {
            let (source, target) = (source.display(), target.display());
            let what = format!("source and target cannot be the same: '{target}' holds bytes of '{source}'");
            return Err(Error::new(Kind::Usage, what));
        }
    }
    Ok(())
}

/// Are they the same bytes, neither more nor less? False where one of them can't be looked at.
pub fn is_same(one: &Path, other: &Path) -> bool {
    Storage::of(one).is_ok_and(|one| Storage::of(other).is_ok_and(|other| one == other))
}

/// Has one a byte of the other? False where one of them can't be looked at.
pub fn is_overlapping(one: &Path, other: &Path) -> bool {
    Storage::of(one).is_ok_and(|one| Storage::of(other).is_ok_and(|other| one.overlaps(&other)))
}

/// Refuses a target that is mounted or swapped to, it or a partition of it or anything that lies above it. A target
/// that does not exist yet is neither. [`Kind::Busy`]. `side` is for the message.
pub fn refuse_in_use(target: &Path, side: Side) -> Result<()> {
    let failed = |e| Error::file(side, "find who uses", target, e);
    let Some(storage) = existing(target, side)? else { return Ok(()) };
    match storage.uses().map_err(failed)?.first() {
        Some(found) => Err(Error::new(Kind::Busy, format!("{side} '{}' {found}", target.display()))),
        None => Ok(()),
    }
}

/// Where a device, or something that has bytes of it, is mounted so that it may be written; `None` if nowhere.
pub fn mounted_writable(path: &Path) -> io::Result<Option<PathBuf>> {
    let uses = Storage::of(path)?.uses()?;
    Ok(uses.into_iter().find_map(|found| match found {
        Use::Mounted { at, is_writable: true } => Some(at),
        _ => None,
    }))
}

/// The file behind a loop device, by its path; `None` for any other device, or when the path leads nowhere from here.
pub fn loop_file(device: u64) -> Option<Metadata> {
    let path = std::fs::read(Sysfs::system().folder(device).join("loop/backing_file")).ok()?;
    std::fs::metadata(Path::new(OsStr::from_bytes(path.trim_ascii_end()))).ok()
}

fn existing(path: &Path, side: Side) -> Result<Option<Storage>> {
    match Storage::of(path) {
        Ok(storage) => Ok(Some(storage)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::file(side, "open", path, e)),
    }
}

/// How a device is used.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Use {
    Mounted { at: PathBuf, is_writable: bool },
    Swap { path: PathBuf },
}

impl std::fmt::Display for Use {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Mounted { at, .. } => write!(f, "is mounted at '{}'", at.display()),
            Self::Swap { path } => write!(f, "is used as swap space '{}'", path.display()),
        }
    }
}

/// What holds bytes in the end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Base {
    File(Identity),
    /// A block device, by number.
    Disk(u64),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Part {
    base: Base,
    range: ByteRange,
}

const WHOLE: ByteRange = ByteRange { offset: 0, length: u64::MAX };

/// Loop devices, partitions and mappings that may lie on each other; the kernel allows fewer.
const DEPTH_MAX: usize = 16;

impl Part {
    fn overlaps(self, other: Self) -> bool {
        self.base == other.base && !self.range.intersect(other.range).is_empty()
    }
}

/// What a path stands for, and everything that lies below it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Storage {
    itself: Part,
    below: Vec<Part>,
}

impl Storage {
    fn of(path: &Path) -> io::Result<Self> {
        let metadata = std::fs::metadata(path)?;
        if metadata.file_type().is_block_device() {
            return Ok(Sysfs::system().storage(metadata.rdev()));
        }
        let itself = Part { base: Base::File(Identity::of(&metadata)), range: WHOLE };
        Ok(Self { itself, below: Vec::new() })
    }

    /// Siblings above one disk, such as two logical volumes, don't overlap.
    fn overlaps(&self, other: &Self) -> bool {
        self.itself.overlaps(other.itself) || self.lies_above(other.itself) || other.lies_above(self.itself)
    }

    fn lies_above(&self, part: Part) -> bool {
        self.below.iter().any(|below| below.overlaps(part))
    }

    fn uses(&self) -> io::Result<Vec<Use>> {
        let mounts = parse_mounts(&std::fs::read("/proc/self/mountinfo")?);
        let sysfs = Sysfs::system();
        let mut uses = Vec::new();
        for mount in mounts {
            let Some(device) = mount.device() else { continue };
            if sysfs.storage(device).overlaps(self) {
                uses.push(Use::Mounted { at: mount.at, is_writable: mount.is_writable });
            }
        }
        // A kernel without swap has no such file.
        let swaps = std::fs::read("/proc/swaps").unwrap_or_default();
        for path in parse_swaps(&swaps) {
            if Self::of(&path).is_ok_and(|swap| swap.overlaps(self)) {
                uses.push(Use::Swap { path });
            }
        }
        Ok(uses)
    }
}

/// What the kernel tells of its block devices.
struct Sysfs {
    root: PathBuf,
}

impl Sysfs {
    fn system() -> Self {
        Self { root: medium::SYS_BLOCK.into() }
    }

    fn folder(&self, device: u64) -> PathBuf {
        self.root.join(medium::number(device))
    }

    fn storage(&self, device: u64) -> Storage {
        let itself = self.locate(device, WHOLE, DEPTH_MAX);
        let mut below = Vec::new();
        self.add_below(itself, &mut below, DEPTH_MAX);
        Storage { itself, below }
    }

    /// The bytes `range` of `device`, as bytes of what the device is a window on.
    fn locate(&self, device: u64, range: ByteRange, depth: usize) -> Part {
        let folder = self.folder(device);
        if depth == 0 {
            return Part { base: Base::Disk(device), range };
        }
        if let Some((whole, window)) = partition(&folder) {
            return self.locate(whole, inside(window, range), depth - 1);
        }
        let Some(backing) = loop_backing(&folder) else { return Part { base: Base::Disk(device), range } };
        let range =
            inside(ByteRange::new(backing.offset, backing.size_limit.unwrap_or(u64::MAX - backing.offset)), range);
        match backing.block_device {
            Some(device) => self.locate(device, range, depth - 1),
            None => Part { base: Base::File(backing.identity), range },
        }
    }

    fn add_below(&self, part: Part, below: &mut Vec<Part>, depth: usize) {
        let Base::Disk(device) = part.base else { return };
        let Ok(slaves) = std::fs::read_dir(self.folder(device).join("slaves")) else { return };
        for slave in slaves.flatten().filter(|_| depth > 0) {
            let Some(device) = read_device(&slave.path().join("dev")) else { continue };
            let part = self.locate(device, WHOLE, DEPTH_MAX);
            if !below.contains(&part) {
                below.push(part);
                self.add_below(part, below, depth - 1);
            }
        }
    }
}

/// `range` of a window, as a range of what it is a window on.
fn inside(window: ByteRange, range: ByteRange) -> ByteRange {
    let offset = window.offset.saturating_add(range.offset).min(window.end());
    ByteRange::new(offset, range.length.min(window.end() - offset))
}

fn read_device(path: &Path) -> Option<u64> {
    parse_device(std::fs::read_to_string(path).ok()?.trim())
}

fn parse_device(text: &str) -> Option<u64> {
    let (major, minor) = text.split_once(':')?;
    Some(makedev(major.parse().ok()?, minor.parse().ok()?))
}

fn read_number(path: &Path) -> Option<u64> {
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// The disk that a partition is on, and where.
fn partition(folder: &Path) -> Option<(u64, ByteRange)> {
    const SECTOR: u64 = 512;
    read_number(&folder.join("partition"))?;
    let folder = folder.canonicalize().ok()?;
    let bytes = |name: &str| read_number(&folder.join(name))?.checked_mul(SECTOR);
    Some((read_device(&folder.parent()?.join("dev"))?, ByteRange::checked(bytes("start")?, bytes("size")?)?))
}

/// The file of a loop device: asked of the device itself, or where that may not be opened, by the path that sysfs has.
fn loop_backing(folder: &Path) -> Option<LoopBacking> {
    let path = std::fs::read(folder.join("loop/backing_file")).ok()?;
    let name = folder.canonicalize().ok()?.file_name()?.to_owned();
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let device = rustix::fs::open(Path::new("/dev").join(name), flags, Mode::empty()).map(File::from);
    if let Some(backing) = device.ok().and_then(|device| sys::loop_backing(&device).ok()) {
        return Some(backing);
    }
    let metadata = std::fs::metadata(Path::new(OsStr::from_bytes(path.trim_ascii_end()))).ok()?;
    Some(LoopBacking {
        identity: Identity::of(&metadata),
        block_device: metadata.file_type().is_block_device().then(|| metadata.rdev()),
        offset: read_number(&folder.join("loop/offset"))?,
        size_limit: read_number(&folder.join("loop/sizelimit")).filter(|&limit| limit != 0),
    })
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Mounted {
    number: u64,
    source: PathBuf,
    at: PathBuf,
    is_writable: bool,
}

impl Mounted {
    /// Of the block device below; a file system with a number of its own, such as btrfs, names it as its source.
    fn device(&self) -> Option<u64> {
        if major(self.number) != 0 {
            return Some(self.number);
        }
        let metadata = self.source.is_absolute().then(|| std::fs::metadata(&self.source).ok())??;
        metadata.file_type().is_block_device().then(|| metadata.rdev())
    }
}

/// The lines of /proc/self/mountinfo: `id parent major:minor root mountpoint options [tags] - type source options`.
fn parse_mounts(text: &[u8]) -> Vec<Mounted> {
    text.split(|&b| b == b'\n').filter_map(parse_mount).collect()
}

fn parse_mount(line: &[u8]) -> Option<Mounted> {
    let fields: Vec<&[u8]> = line.split(|&b| b == b' ').collect();
    let dash = fields.iter().position(|&field| field == b"-")?;
    let options = fields.get(dash + 3)?;
    Some(Mounted {
        number: parse_device(std::str::from_utf8(fields.get(2)?).ok()?)?,
        source: unescape(fields.get(dash + 2)?),
        at: unescape(fields.get(4)?),
        // The file system's own, not the mount's: a read-only bind mount of it writes nothing, but another may.
        is_writable: options.split(|&b| b == b',').any(|option| option == b"rw"),
    })
}

/// The first column of /proc/swaps, below its heading.
fn parse_swaps(text: &[u8]) -> Vec<PathBuf> {
    let lines = text.split(|&b| b == b'\n').skip(1);
    let first = lines.filter_map(|line| line.split(|&b| b == b' ' || b == b'\t').next());
    first.filter(|path| !path.is_empty()).map(unescape).collect()
}

/// Undoes `\040` for a space, and the like.
fn unescape(text: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let [first, tail @ ..] = rest {
        let digits = tail.get(..3).filter(|digits| *first == b'\\' && digits.iter().all(u8::is_ascii_digit));
        let code = digits.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        bytes.push(code.unwrap_or(*first));
        rest = if code.is_some() { &tail[3..] } else { tail };
    }
    OsStr::from_bytes(&bytes).into()
}

#[cfg(test)]
mod tests;
