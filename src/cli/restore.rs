//! `drive-backup restore`: an image back onto a device.

use super::args::{ImageFormat, Limit, NewImageMode, Policy, limit};
use super::hooks::HookFlags;
use super::pairs;
use super::resolve::{self, Plan, Secrets, is_dash, is_stdout};
use super::sight::Sight;
use crate::backup::{Mode, Options, ProofOptions, Restoring, SyncMode, Target};
use crate::error::{Error, Kind, Result};
use crate::image::format::Format;
use crate::image::location::Location;
use crate::image::secret::SecretPlace;
use clap::{Args, ValueHint};
use std::path::PathBuf;

const RESTORE: &str = "What and where to";
const PACE: &str = "How";

/// Write an image back to a block device, or to a file
///
/// The device must be at least as large as the disk in the image; of a larger one the rest stays as it is, and a warning says
/// so. A device that is mounted, swapped to or claimed is refused. With --manifest each part of the image is compared before
/// it is written, and the restore ends at the first that differs: exit status 7.
#[derive(Args, Clone, Debug)]
#[command(max_term_width = 100)]
pub struct RestoreArgs {
    /// The image to restore
    #[arg(value_name = "IMAGE", required = true, help_heading = RESTORE, value_hint = ValueHint::FilePath)]
    pub image: Option<PathBuf>,

    /// The block device or file to write
    #[arg(long, value_name = "PATH", required = true, help_heading = RESTORE, value_hint = ValueHint::FilePath)]
    pub target: Option<PathBuf>,

    /// What the image should hold, as a backup with --manifest wrote it
    #[arg(long, value_name = "FILE", help_heading = RESTORE, value_hint = ValueHint::FilePath)]
    pub manifest: Option<PathBuf>,

    /// Read the target first, and write only what differs: onto a device, or with --mode existing
    #[arg(long, help_heading = RESTORE)]
    pub only_changed: bool,

    /// Read the target back from its medium, and compare it with what was written; a difference is exit status 7
    #[arg(long, conflicts_with = "no_fsync", help_heading = RESTORE)]
    pub verify: bool,

    /// The image's format; by default its content tells
    #[arg(long, value_name = "FORMAT", help_heading = RESTORE)]
    pub source_format: Option<ImageFormat>,

    /// Where the secret is that opens an encrypted image: file:PATH, fd:N or env:NAME
    ///
    /// One newline at its end is not part of it. With it, an image that is LUKS or encrypted qcow2 is read decrypted; without
    /// it, one that begins with LUKS is restored as it is.
    #[arg(long, value_name = "PLACE", help_heading = RESTORE)]
    pub secret: Option<SecretPlace>,

    /// Where the secret is that shall open an encrypted target (luks, qcow2-luks, else refused); by default that of --secret
    #[arg(long, value_name = "PLACE", help_heading = RESTORE)]
    pub target_secret: Option<SecretPlace>,

    /// Open, lock and check everything, say what the restore would take, and stop before its first byte
    ///
    /// Hooks do not run.
    #[arg(long, help_heading = RESTORE)]
    pub dry_run: bool,

    /// The target's format; by default raw, but what --mode existing finds, or what a new file's extension says
    #[arg(long, value_name = "FORMAT", help_heading = RESTORE)]
    pub format: Option<ImageFormat>,

    /// A new image, or one that is there; a device is written in place
    #[arg(long, value_name = "MODE", default_value = "absolute-paths", help_heading = RESTORE)]
    pub mode: NewImageMode,

    /// Do not flush the target; a success then promises nothing about a power cut
    #[arg(long, help_heading = PACE)]
    pub no_fsync: bool,

    /// Limit in bytes a second, such as 50M; holes are not charged
    #[arg(long, value_name = "RATE", allow_hyphen_values = true, value_parser = limit, default_value = "off", help_heading = PACE)]
    pub speed: Limit,

    /// Number of copying threads; by default one for each core
    #[arg(long, value_name = "N", allow_hyphen_values = true, value_parser = clap::value_parser!(u16).range(1..=256), help_heading = PACE)]
    pub workers: Option<u16>,

    /// Bypass the page cache
    #[arg(long, help_heading = PACE)]
    pub direct: bool,

    /// What a read error of the image does
    #[arg(long, value_name = "POLICY", default_value = "report", help_heading = PACE)]
    pub on_source_error: Policy,

    /// What a write error of the target does
    #[arg(long, value_name = "POLICY", default_value = "report", help_heading = PACE)]
    pub on_target_error: Policy,

    #[command(flatten)]
    pub hooks: HookFlags,

    #[command(flatten)]
    pub sight: Sight,
}

/// What the engine is asked for: a backup the other way.
pub fn plan(args: RestoreArgs) -> Result<Plan> {
    let (image, target) = (args.image.unwrap_or_default(), args.target.unwrap_or_default());
    if let Some(stream) = [&image, &target].into_iter().find(|path| is_dash(path) || is_stdout(path)) {
        let what = format!("restore reads and writes at any offset: {} is not possible", stream.display());
        return Err(Error::new(Kind::Usage, what));
    }
    pairs::check(std::slice::from_ref(&image), std::slice::from_ref(&target))?;
    if let Some(manifest) = &args.manifest {
        pairs::check_file("--manifest", manifest, [&image, &target])?;
    }
    let mode = match args.mode {
        NewImageMode::AbsolutePaths => Mode::AbsolutePaths,
        NewImageMode::Existing => Mode::Existing,
    };
    let format = match (args.format, mode) {
        (Some(format), _) => Some(format.into()),
        // Not as the image is: what is restored is a disk.
        (None, Mode::AbsolutePaths) if Format::of_extension(&target).is_none() => Some(Format::Raw),
        (None, _) => None,
    };
    let secrets = Secrets::read(args.secret.as_ref(), args.target_secret.as_ref())?;
    let disk = Options {
        secret: secrets.source,
        target_secret: secrets.target,
        source_format: args.source_format.map(Into::into),
        format,
        mode,
        sync: SyncMode::Full,
        restoring: Restoring { onto_larger: true, only_changed: args.only_changed },
        proof: ProofOptions { verify: args.verify, manifest: None, expected: args.manifest },
        direct: args.direct,
        fsync: !args.no_fsync,
        workers: resolve::workers(args.workers),
        on_source_error: args.on_source_error.into(),
        on_target_error: args.on_target_error.into(),
        ..resolve::reading(&image, Target::At(Location::parse(&target)?))?
    };
    let plan = Plan::of_one(disk, args.speed.0, args.sight.view(false, args.dry_run));
    Ok(Plan { hooks: args.hooks.into(), ..plan })
}
