//! What a backup is asked to do: resolved, checked for itself, free of flags and defaults.

use crate::ground::policy::OnError;
use crate::image::format::Format;
use crate::image::qcow2::CompressOptions;
use std::path::PathBuf;

/// QEMU's NewImageMode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Make a new image; what was under the name stays whole until the new one is complete.
    AbsolutePaths,
    /// Write into an image that is there.
    Existing,
}

/// Where the copy goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// A file or a block device.
    Path(PathBuf),
    /// A raw stream to standard output.
    Stdout,
}

/// Everything that a backup needs to know.
#[derive(Clone, Debug)]
pub struct Options {
    /// The disk image or block device to copy.
    pub device: PathBuf,
    /// `None`: by its content.
    pub source_format: Option<Format>,
    /// Follow the source's backing chain; otherwise a chain is refused.
    pub backing: bool,
    /// Where to.
    pub target: Target,
    /// `None`: mode `Existing` probes; else by the target's extension; else the source's.
    pub format: Option<Format>,
    /// New image or existing one.
    pub mode: Mode,
    /// Bytes, of a new qcow2; `None`: 64 KiB.
    pub cluster_size: Option<u64>,
    /// Of a new qcow2.
    pub compression: Option<CompressOptions>,
    /// Runs of zero bytes become holes.
    pub sparse: bool,
    /// Bypass the page cache.
    pub direct: bool,
    /// Success means stable storage.
    pub fsync: bool,
    /// Copier threads, one at least.
    pub workers: usize,
    /// A source that changes is reported, not refused.
    pub allow_inconsistent: bool,
    /// When background reads fail.
    pub on_source_error: OnError,
    /// When background writes fail.
    pub on_target_error: OnError,
}
