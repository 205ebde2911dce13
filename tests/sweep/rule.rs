//! What is promised when a call fails: by README.md's exit codes and the flags, not by what was seen.

use crate::inject::Fault;
use Fault::*;

/// Whose calls fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// The disk, as the copier and the opening read it.
    Source,
    /// The disk, as captures for waiting writes read it.
    Capture,
    /// The new target, before it has its name.
    Target,
    /// The folder of the new target.
    Folder,
    /// The file that it replaces, under the final name.
    Old,
    /// The new target when it is read back.
    ReadBack,
    /// The manifest, before and after it has its name.
    Manifest,
    /// The folder of the manifest.
    ManifestFolder,
    /// A target that is written in place.
    Existing,
    /// The overlay in a folder.
    Overlay,
    /// The overlay in memory.
    Memory,
    /// The ring that is passed to a writer.
    Ring,
    /// The bitmap that is passed to writers.
    Bitmap,
}

impl Place {
    pub const ALL: [Self; 13] = [
        Self::Source,
        Self::Capture,
        Self::Target,
        Self::Folder,
        Self::Old,
        Self::ReadBack,
        Self::Manifest,
        Self::ManifestFolder,
        Self::Existing,
        Self::Overlay,
        Self::Memory,
        Self::Ring,
        Self::Bitmap,
    ];

    pub fn name(self) -> &'static str {
        match self {
            Self::Source => "source",
            Self::Capture => "source, in a capture",
            Self::Target => "new target",
            Self::Folder => "target's folder",
            Self::Old => "target that is replaced",
            Self::ReadBack => "new target, read back",
            Self::Manifest => "manifest",
            Self::ManifestFolder => "manifest's folder",
            Self::Existing => "existing target",
            Self::Overlay => "overlay in a folder",
            Self::Memory => "overlay in memory",
            Self::Ring => "a writer's ring",
            Self::Bitmap => "the writers' bitmap",
        }
    }
}

/// The flags that decide what an error does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Policy {
    Default,
    SourceIgnore,
    SourceStop,
    TargetIgnore,
    TargetStop,
    TargetEnospc,
    GuestWrite,
}

impl Policy {
    pub fn flags(self) -> &'static [&'static str] {
        match self {
            Self::Default => &[],
            Self::SourceIgnore => &["--on-source-error", "ignore"],
            Self::SourceStop => &["--on-source-error", "stop"],
            Self::TargetIgnore => &["--on-target-error", "ignore"],
            Self::TargetStop => &["--on-target-error", "stop"],
            Self::TargetEnospc => &["--on-target-error", "enospc"],
            Self::GuestWrite => &["--on-cbw-error", "break-guest-write"],
        }
    }
}

/// What the target's name leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Name {
    /// What was there before, and nothing is beside it.
    Old,
    /// The whole copy of one instant, and nothing is beside it.
    Copy,
    /// The same, but for ranges that are listed.
    CopyBut,
    /// The same, without its manifest.
    CopyAlone,
    /// The same, and the old target beside it, of which is warned.
    CopyBesideOld,
    /// What was there before, and the copy under its bad name.
    OldBesideBad,
    /// Written in place, and said to be incomplete.
    Incomplete,
}

impl Name {
    pub fn text(self) -> &'static str {
        match self {
            Self::Old => "what it had",
            Self::Copy => "the copy",
            Self::CopyBut => "the copy but for listed ranges",
            Self::CopyAlone => "the copy, without a manifest",
            Self::CopyBesideOld => "the copy, and a warning that the old one is beside it",
            Self::OldBesideBad => "what it had, the copy under its bad name",
            Self::Incomplete => "incomplete",
        }
    }
}

/// What writers notice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Writes {
    Done,
    /// Some fail; they are not carried out.
    Refused,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Promise {
    pub code: i32,
    pub name: Name,
    pub writes: Writes,
}

const fn ends(code: i32, name: Name) -> Promise {
    Promise { code, name, writes: Writes::Done }
}

pub const COMPLETE: Promise = ends(0, Name::Copy);
const REFUSED_BY_ARGUMENTS: Promise = ends(2, Name::Old);
const SOURCE_FAILED: Promise = ends(4, Name::Old);
const TARGET_FAILED: Promise = ends(5, Name::Old);
const INSTANT_LOST: Promise = ends(6, Name::Old);
const DIFFERS: Promise = ends(7, Name::OldBesideBad);
const BUSY: Promise = ends(8, Name::Old);

/// The one outcome of a fault of one call of this kind.
pub fn promised(place: Place, call: &str, fault: Fault, policy: Policy) -> Promise {
    // Interrupted, late or short is not failed; what a file system can't do is done in another way.
    if matches!(fault, Eintr | Late | Half | Least | Eopnotsupp) {
        return COMPLETE;
    }
    // Somebody else has it open.
    if fault == Eagain {
        return BUSY;
    }
    match (place, call) {
        // A clone would save work, and there are other ways.
        (_, "clone") => COMPLETE,
        // Where nobody can say what is a hole, all is read.
        (Place::Source, "seek") => COMPLETE,
        (Place::Source, "read") => match policy {
            Policy::SourceIgnore => ends(3, Name::CopyBut),
            // The test resumes it.
            Policy::SourceStop => COMPLETE,
            _ => SOURCE_FAILED,
        },
        (Place::Source, _) => SOURCE_FAILED,
        (Place::Existing, "write" | "fallocate") => match policy {
            Policy::TargetIgnore => ends(3, Name::CopyBut),
            Policy::TargetStop => COMPLETE,
            Policy::TargetEnospc if fault == Enospc => COMPLETE,
            _ => ends(5, Name::Incomplete),
        },
        // What could not be opened was not touched.
        (Place::Existing, "open" | "duplicate" | "look" | "lock-look" | "flush" | "advice") => TARGET_FAILED,
        (Place::Existing, _) => ends(5, Name::Incomplete),
        (Place::Target, "write") => match policy {
            Policy::TargetIgnore => ends(3, Name::CopyBut),
            Policy::TargetStop => COMPLETE,
            Policy::TargetEnospc if fault == Enospc => COMPLETE,
            _ => TARGET_FAILED,
        },
        (Place::Target, "unlink") => ends(0, Name::CopyBesideOld),
        (Place::Target | Place::Folder, _) => TARGET_FAILED,
        // It is replaced like any other, without a way back.
        (Place::Old, "open") => COMPLETE,
        (Place::Old, _) => TARGET_FAILED,
        // What can't say its holes is read whole.
        (Place::ReadBack, "seek") => COMPLETE,
        (Place::ReadBack, _) => DIFFERS,
        // By then the copy has its name.
        (Place::Manifest, "rename") | (Place::ManifestFolder, "sync") => ends(5, Name::CopyAlone),
        (Place::Manifest | Place::ManifestFolder, _) => TARGET_FAILED,
        // Another folder may do; nothing was touched.
        (Place::Overlay | Place::Memory, "open" | "create" | "resize") => REFUSED_BY_ARGUMENTS,
        // Its space stays used.
        (Place::Overlay | Place::Memory, "fallocate") => COMPLETE,
        (Place::Capture, "read") | (Place::Overlay | Place::Memory, "write") => match policy {
            Policy::GuestWrite => Promise { writes: Writes::Refused, ..COMPLETE },
            _ => INSTANT_LOST,
        },
        (Place::Capture | Place::Overlay | Place::Memory, _) => INSTANT_LOST,
        // No writer can be told when it may write: there is no instant.
        (Place::Ring | Place::Bitmap, _) => INSTANT_LOST,
    }
}
