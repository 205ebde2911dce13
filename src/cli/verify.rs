//! `drive-backup verify`: an image beside a manifest.

use super::args::{ImageFormat, Limit, Progress, limit, seconds};
use super::hooks::Hooks;
use super::resolve::{self, Plan, Shown};
use super::signs::Files;
use super::steer::{Course, Steering};
use crate::backup::{Options, ProofOptions, Target};
use crate::error::Result;
use crate::ground::policy::OnError;
use clap::builder::ArgPredicate;
use clap::{Args, ValueHint};
use std::path::PathBuf;
use std::time::Duration;

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

    /// Limit in bytes a second, such as 50M; holes are not charged
    #[arg(long, value_name = "RATE", allow_hyphen_values = true, value_parser = limit, default_value = "off")]
    pub speed: Limit,

    /// Number of reading threads; by default one for each core
    #[arg(long, value_name = "N", allow_hyphen_values = true, value_parser = clap::value_parser!(u16).range(1..=256))]
    pub workers: Option<u16>,

    /// Bypass the page cache: what the medium holds counts
    #[arg(long)]
    pub direct: bool,

    /// Write JSON lines to standard output
    #[arg(long)]
    pub json: bool,

    /// How progress is shown on standard error
    #[arg(
        long,
        value_name = "STYLE",
        default_value = "auto",
        default_value_if("quiet", ArgPredicate::IsPresent, "none")
    )]
    pub progress: Progress,

    /// Time between JSON status records (1 by default) and between plain lines (30 by default)
    #[arg(long, value_name = "SECONDS", allow_hyphen_values = true, value_parser = seconds)]
    pub progress_interval: Option<Duration>,

    /// Only errors: no progress, no warnings
    #[arg(short, long)]
    pub quiet: bool,

    /// Also say what was found and done, on success too
    #[arg(short, long, conflicts_with = "quiet")]
    pub verbose: bool,
}

/// What the engine is asked for: to read everything, and to write nothing.
pub fn plan(args: VerifyArgs) -> Result<Plan> {
    let image = args.image.unwrap_or_default();
    let disk = Options {
        source_format: args.source_format.map(Into::into),
        direct: args.direct,
        workers: resolve::workers(args.workers),
        // One bad sector is not all that there is to know.
        on_source_error: OnError::Ignore,
        proof: ProofOptions { expected: args.manifest, ..ProofOptions::default() },
        ..resolve::reading(&image, Target::Nowhere)?
    };
    let shown = Shown {
        json: args.json,
        progress: args.progress,
        interval: args.progress_interval,
        quiet: args.quiet,
        verbose: args.verbose,
        dry_run: false,
    };
    Ok(Plan {
        disks: vec![disk],
        steering: Steering { course: Course::Steady(args.speed.0), timeout: None },
        hooks: Hooks::default(),
        view: shown.view(false),
        files: Files::default(),
        qmp: None,
    })
}
