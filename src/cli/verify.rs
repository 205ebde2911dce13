//! `drive-backup verify`: an image beside a manifest.

use super::args::{ImageFormat, Limit, limit};
use super::resolve::{self, Plan, Secrets};
use super::sight::Sight;
use crate::backup::{Options, ProofOptions, Target};
use crate::error::Result;
use crate::ground::policy::OnError;
use crate::image::secret::SecretPlace;
use clap::{Args, ValueHint};
use std::path::PathBuf;

/// Check that an image holds what a manifest says
///
/// Reads the image, whatever its format, and compares what its guest would see with the manifest that a backup wrote with
/// --manifest. Holes need not be read. Exit status 0: not a bit differs; 7: it differs, and in which ranges; 2: the manifest
/// can't be read; 4: the image can't be opened, or it changes meanwhile; 8: somebody writes it.
#[derive(Args, Clone, Debug)]
#[command(max_term_width = 100)]
pub struct VerifyArgs {
    /// The disk image or block device
    #[arg(value_name = "IMAGE", required = true, value_hint = ValueHint::FilePath)]
    pub image: Option<PathBuf>,

    /// What it should hold
    #[arg(long, value_name = "FILE", required = true, value_hint = ValueHint::FilePath)]
    pub manifest: Option<PathBuf>,

    /// The image's format; by default its content tells
    #[arg(long, value_name = "FORMAT")]
    pub source_format: Option<ImageFormat>,

    /// Where the secret is that opens an encrypted image: file:PATH, fd:N or env:NAME
    ///
    /// One newline at its end is not part of it. Needed where the copied disk was read decrypted.
    #[arg(long, value_name = "PLACE")]
    pub secret: Option<SecretPlace>,

    /// Limit in bytes a second, such as 50M; holes are not charged
    #[arg(long, value_name = "RATE", allow_hyphen_values = true, value_parser = limit, default_value = "off")]
    pub speed: Limit,

    /// Number of reading threads; by default one for each core
    #[arg(long, value_name = "N", allow_hyphen_values = true, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub workers: Option<u16>,

    /// Bypass the page cache: what the medium holds counts
    #[arg(long)]
    pub direct: bool,

    #[command(flatten)]
    pub sight: Sight,
}

/// What the engine is asked for: to read everything, and to write nothing.
pub fn plan(args: VerifyArgs) -> Result<Plan> {
    let image = args.image.unwrap_or_default();
    let disk = Options {
        source_format: args.source_format.map(Into::into),
        secret: Secrets::read(args.secret.as_ref(), None)?.source,
        direct: args.direct,
        workers: resolve::workers(args.workers),
        // One bad sector is not all that there is to know.
        on_source_error: OnError::Ignore,
        proof: ProofOptions { expected: args.manifest, ..ProofOptions::default() },
        ..resolve::reading(&image, Target::Nowhere)?
    };
    Ok(Plan::of_one(disk, args.speed.0, args.sight.view(false, false)))
}
