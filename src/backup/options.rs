//! What a backup is asked to do: resolved, checked for itself, free of flags and defaults.

use crate::error::{Error, Kind, Result};
use crate::ground::policy::OnError;
use crate::hook::Hook;
use crate::image::format::Format;
use crate::image::location::Location;
use crate::image::qcow2::CompressOptions;
use crate::image::secret::Secret;
use crate::ring::server::OnCbwError;
use std::path::PathBuf;
use std::time::Duration;

/// QEMU's NewImageMode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Make a new image; what was under the name stays whole until the new one is complete.
    AbsolutePaths,
    /// Write into an image that is there.
    Existing,
}

/// QEMU's MirrorSyncMode, as far as no bitmap takes part.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SyncMode {
    /// Everything that the disk holds.
    #[default]
    Full,
    /// What the image itself holds, without its backing file; a new target names the same one. Without a backing file: all.
    Top,
    /// What writers overwrite, from the instant until the job is cancelled, which is its only good end. A new target is backed
    /// by the source: both together are the disk as of the instant, for as long as nobody writes the source untrapped.
    None,
}

/// Where the copy goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// A file, a block device, or elsewhere.
    At(Location),
    /// A raw stream to standard output.
    Stdout,
    /// Nothing is written: the source is read and compared with a manifest.
    Nowhere,
}

impl Target {
    /// Something is written.
    pub fn is_somewhere(&self) -> bool {
        *self != Self::Nowhere
    }
}

/// What is asked for to prove a copy.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ProofOptions {
    /// The target is read back from its medium and compared with what was written.
    pub verify: bool,
    /// Where to write a manifest of the copy, published after it.
    pub manifest: Option<PathBuf>,
    /// The manifest that the source must agree with.
    pub expected: Option<PathBuf>,
}

impl ProofOptions {
    /// The copy's bytes must have been in our hands: a clone shares its blocks with the source, and proves nothing.
    pub fn needs_bytes(&self) -> bool {
        self.verify || self.expected.is_some()
    }
}

/// What is done with a target that is there already.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Restoring {
    /// It may be larger than the source: what follows stays as it is.
    pub onto_larger: bool,
    /// It is read first, and written where it differs.
    pub only_changed: bool,
}

/// Whether a cooperating writer takes part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WriterChoice {
    /// If there is one.
    Auto,
    /// Without one the backup does not start.
    Required,
    /// Nobody is looked for.
    None,
}

/// What keeps the instant.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SnapshotChoice {
    /// A clone where the file system can, else the overlay.
    Auto,
    /// The overlay.
    Overlay,
    /// A clone, or the backup does not start.
    Reflink,
}

/// Where clusters are saved that a writer is about to overwrite.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OverlayPlace {
    /// An unlinked file in this folder.
    Folder(PathBuf),
    /// Memory.
    Memory,
}

impl OverlayPlace {
    /// TMPDIR, else /var/tmp: it may grow large and hot, and /tmp is often memory.
    pub fn of_environment() -> Self {
        let folder = std::env::var_os("TMPDIR").filter(|folder| !folder.is_empty());
        Self::Folder(folder.map_or_else(|| "/var/tmp".into(), PathBuf::from))
    }
}

/// Everything that a backup needs to know.
#[derive(Clone, Debug)]
pub struct Options {
    /// The disk image or block device to copy.
    pub device: Location,
    /// `None`: by its content.
    pub source_format: Option<Format>,
    /// What opens an encrypted source.
    pub secret: Option<Secret>,
    /// What is copied.
    pub sync: SyncMode,
    /// Follow the source's backing chain; otherwise a chain is refused.
    pub backing: bool,
    /// Where to.
    pub target: Target,
    /// `None`: mode `Existing` probes; else by the target's extension; else the source's.
    pub format: Option<Format>,
    /// What will open the target, which is to be encrypted; `None`: what opens the source, if the target is encrypted.
    pub target_secret: Option<Secret>,
    /// New image or existing one.
    pub mode: Mode,
    /// In place.
    pub restoring: Restoring,
    /// What proves the copy.
    pub proof: ProofOptions,
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
    /// Whether a cooperating writer takes part.
    pub writer: WriterChoice,
    /// Where writers are found; `None`: the user's default folder.
    pub writer_dir: Option<PathBuf>,
    /// What keeps the instant.
    pub snapshot: SnapshotChoice,
    /// Where overwritten clusters are saved.
    pub overlay: OverlayPlace,
    /// Bytes that may be saved at once; `None`: no limit.
    pub overlay_limit: Option<u64>,
    /// Runs while they are frozen.
    pub hook_frozen: Option<Hook>,
    /// In which all writers must be frozen, and that hook have ended.
    pub freeze_timeout: Duration,
    /// In which a trapped write must have been captured.
    pub cbw_timeout: Duration,
    /// When it can't be.
    pub on_cbw_error: OnCbwError,
    /// In which a lost server of an end that is reached over a network must be back.
    pub reconnect: Duration,
    /// When background reads fail.
    pub on_source_error: OnError,
    /// When background writes fail.
    pub on_target_error: OnError,
}

impl Options {
    /// What opens an encrypted target.
    pub(super) fn secret_of_target(&self) -> Option<&Secret> {
        self.target_secret.as_ref().or(self.secret.as_ref())
    }

    /// A target that holds a part of the disk can't be compared with all of it, and has to be an image.
    pub(super) fn check_sync(&self) -> Result<()> {
        let is_proven = self.proof != ProofOptions::default() || self.restoring != Restoring::default();
        if self.sync != SyncMode::Full && (is_proven || !matches!(self.target, Target::At(_))) {
            return Err(Error::new(
                Kind::Usage,
                "a part of a disk is neither verified nor restored, and goes into an image",
            ));
        }
        Ok(())
    }
}
