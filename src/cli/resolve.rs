//! From flags to what they ask for: defaults filled in, contradictions refused before anything is opened.

use super::args::{
    Args, CbwPolicy, Compress, ImageFormat, NewImageMode, Policy, Snapshot, Sparse, Speed, WriterPolicy,
};
use super::hooks::{self, Hooks};
use super::pairs;
use super::progress::Style;
use super::signs::Files;
use super::steer::{Course, Steering};
use crate::backup::{
    Mode, OnCbwError, Options, OverlayPlace, ProofOptions, Restoring, SnapshotChoice, SyncMode, Target, WriterChoice,
};
use crate::error::{Error, Kind, Result};
use crate::ground::policy::OnError;
use crate::hook::{Hook, When};
use crate::image::format::{Foreign, Format};
use crate::image::location::Location;
use crate::image::qcow2::CompressOptions;
use crate::image::secret::{Secret, SecretPlace};
use jiff::Zoned;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::time::Duration;

const CLUSTER_SIZES: std::ops::RangeInclusive<u64> = 512..=2 << 20;
/// As the backup's --reconnect-delay.
const RECONNECT: Duration = Duration::from_secs(10);

/// What a run is asked to do and to show.
#[derive(Clone, Debug)]
pub struct Plan {
    /// For the engine, of each disk.
    pub disks: Vec<Options>,
    /// What decides the speed, and when it is too late.
    pub steering: Steering,
    /// What runs around it.
    pub hooks: Hooks,
    /// For people and programs.
    pub view: View,
    /// For monitors.
    pub files: Files,
    /// Where QMP clients come in.
    pub qmp: Option<PathBuf>,
}

impl Plan {
    /// One disk at one speed, in bytes a second, with nothing around it.
    pub fn of_one(disk: Options, speed: Option<u64>, view: View) -> Self {
        Self {
            disks: vec![disk],
            steering: Steering { course: Course::Steady(speed), timeout: None },
            hooks: Hooks::default(),
            view,
            files: Files::default(),
            qmp: None,
        }
    }
}

/// What a run shows.
#[derive(Clone, Copy, Debug)]
pub struct View {
    /// JSON lines, and where.
    pub json: Option<JsonEnd>,
    /// Between status records.
    pub status_interval: Duration,
    /// For people.
    pub style: Style,
    /// Errors only.
    pub quiet: bool,
    /// What was found and done, on success too.
    pub verbose: bool,
    /// Nothing is copied.
    pub dry_run: bool,
}

/// Where JSON lines go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JsonEnd {
    /// Standard output.
    Stdout,
    /// Standard error, because standard output is the target. People's lines are left out there.
    Stderr,
}

/// A plan, or what is wrong with the flags, in one line with a hint.
pub fn plan(args: Args) -> Result<Plan> {
    check(&args)?;
    let view = args.sight.view(args.target.iter().any(|target| is_dash(target)), args.dry_run);
    let ends = args.device.iter().zip(&args.target).enumerate();
    let secrets = Secrets::read(args.secret.as_ref(), args.target_secret.as_ref())?;
    let disk = |(place, (device, target)): (usize, (&PathBuf, &PathBuf))| {
        let manifest = args.manifest.get(place).cloned();
        let proof = ProofOptions { verify: args.verify, manifest, expected: None };
        Ok(Options { proof, ..options(&args, &secrets, device, target)? })
    };
    let disks = ends.map(disk).collect::<Result<_>>()?;
    let steering = Steering { course: course(&args)?, timeout: args.timeout };
    let files = Files { status: args.status_file, metrics: args.metrics_file, ..Files::default() };
    Ok(Plan { qmp: args.qmp, disks, steering, hooks: args.hooks.into(), view, files })
}

fn course(args: &Args) -> Result<Course> {
    Ok(match (&args.finish_by, &args.speed_schedule, args.speed) {
        (Some(time), _, _) => Course::finish_by(time, &Zoned::now(), args.verify)?,
        (None, Some(schedule), _) => Course::Schedule(schedule.clone()),
        (None, None, Speed::Auto) => Course::Auto,
        (None, None, Speed::Limit(rate)) => Course::Steady(rate),
    })
}

/// Is it the `-` that means a standard stream?
pub fn is_dash(path: &Path) -> bool {
    path.as_os_str() == "-"
}

/// Is it another name of standard output?
pub fn is_stdout(path: &Path) -> bool {
    ["/dev/stdout", "/dev/fd/1", "/proc/self/fd/1"].iter().any(|name| path == Path::new(name))
}

/// Of all disks.
pub struct Secrets {
    pub source: Option<Secret>,
    pub target: Option<Secret>,
}

impl Secrets {
    pub fn read(source: Option<&SecretPlace>, target: Option<&SecretPlace>) -> Result<Self> {
        let read = |place: Option<&SecretPlace>| place.map(SecretPlace::read).transpose();
        Ok(Self { source: read(source)?, target: read(target)? })
    }
}

fn options(args: &Args, secrets: &Secrets, device: &Path, target: &Path) -> Result<Options> {
    let to_stdout = is_dash(target);
    let device = Location::parse(device)?;
    let target = if to_stdout { Target::Stdout } else { Target::At(Location::parse(target)?) };
    let hook_frozen = args.hook_frozen.as_deref().map(|command| Hook::new(When::Frozen, command));
    Ok(Options {
        hook_frozen: hook_frozen.map(|hook| hooks::about(hook, &device, &target)),
        device,
        source_format: args.source_format.map(Format::from),
        secret: secrets.source.clone(),
        target_secret: secrets.target.clone(),
        backing: !args.no_backing,
        format: if to_stdout { Some(Format::Raw) } else { args.format.map(Format::from) },
        target,
        mode: match args.mode {
            NewImageMode::AbsolutePaths => Mode::AbsolutePaths,
            NewImageMode::Existing => Mode::Existing,
        },
        sync: SyncMode::Full,
        restoring: Restoring::default(),
        proof: ProofOptions::default(),
        cluster_size: args.cluster_size,
        compression: args.compress.map(CompressOptions::from),
        sparse: args.sparse == Sparse::Auto,
        direct: args.direct,
        fsync: !args.no_fsync,
        workers: workers(args.workers),
        allow_inconsistent: args.allow_inconsistent,
        writer: match args.writer {
            WriterPolicy::Auto => WriterChoice::Auto,
            WriterPolicy::Required => WriterChoice::Required,
            WriterPolicy::None => WriterChoice::None,
        },
        writer_dir: args.writer_dir.clone(),
        snapshot: match args.snapshot {
            Snapshot::Auto => SnapshotChoice::Auto,
            Snapshot::Overlay => SnapshotChoice::Overlay,
            Snapshot::Reflink => SnapshotChoice::Reflink,
        },
        overlay: overlay(args.overlay.as_deref()),
        overlay_limit: args.overlay_limit.0,
        freeze_timeout: args.freeze_timeout,
        cbw_timeout: args.cbw_timeout,
        on_cbw_error: match args.on_cbw_error {
            CbwPolicy::BreakSnapshot => OnCbwError::BreakSnapshot,
            CbwPolicy::BreakGuestWrite => OnCbwError::BreakGuestWrite,
        },
        reconnect: args.reconnect_delay,
        on_source_error: args.on_source_error.into(),
        on_target_error: args.on_target_error.into(),
    })
}

/// As asked for, else one for each core.
pub fn workers(given: Option<u16>) -> usize {
    given.map_or_else(|| std::thread::available_parallelism().map_or(1, usize::from), usize::from)
}

/// What all have in common that read an image to which nobody writes.
pub fn reading(image: &Path, target: Target) -> Result<Options> {
    if is_dash(image) {
        return Err(Error::new(
            Kind::Usage,
            "an image is read at any offset: - is not possible, name a file or a device",
        ));
    }
    Ok(Options {
        device: Location::parse(image)?,
        source_format: None,
        secret: None,
        target_secret: None,
        backing: true,
        target,
        format: None,
        mode: Mode::AbsolutePaths,
        sync: SyncMode::Full,
        restoring: Restoring::default(),
        proof: ProofOptions::default(),
        cluster_size: None,
        compression: None,
        sparse: true,
        direct: false,
        fsync: true,
        workers: 1,
        allow_inconsistent: false,
        writer: WriterChoice::None,
        writer_dir: None,
        snapshot: SnapshotChoice::Overlay,
        overlay: OverlayPlace::Memory,
        overlay_limit: None,
        hook_frozen: None,
        freeze_timeout: Duration::ZERO,
        cbw_timeout: Duration::ZERO,
        on_cbw_error: OnCbwError::BreakSnapshot,
        reconnect: RECONNECT,
        on_source_error: OnError::Report,
        on_target_error: OnError::Report,
    })
}

fn overlay(given: Option<&Path>) -> OverlayPlace {
    match given {
        Some(word) if word.as_os_str() == "memory" => OverlayPlace::Memory,
        Some(folder) => OverlayPlace::Folder(folder.to_owned()),
        None => OverlayPlace::of_environment(),
    }
}

fn check(args: &Args) -> Result<()> {
    let refuse = |what: &str| Err(Error::new(Kind::Usage, what));
    if args.device.iter().any(|device| is_dash(device)) {
        return refuse("--device - is not possible: a backup reads at any offset; name a file or a device");
    }
    if let Some(target) = args.target.iter().find(|target| is_stdout(target)) {
        let what = format!("--target {}: write --target - for a raw stream to standard output", target.display());
        return refuse(&what);
    }
    if let Some(size) = args.cluster_size
        && !(size.is_power_of_two() && CLUSTER_SIZES.contains(&size))
    {
        return refuse("--cluster-size is a power of two from 512 to 2M");
    }
    pairs::check(&args.device, &args.target)?;
    pairs::check_manifests(&args.device, &args.target, &args.manifest)?;
    let written = || args.device.iter().chain(&args.target).chain(&args.manifest);
    if let Some(file) = &args.status_file {
        pairs::check_file("--status-file", file, written())?;
    }
    if let Some(file) = &args.metrics_file {
        pairs::check_file("--metrics-file", file, written().chain(&args.status_file))?;
    }
    if args.target.iter().any(|target| is_dash(target)) {
        return check_stream(args);
    }
    let of_new_images = [("--compress", args.compress.is_some()), ("--cluster-size", args.cluster_size.is_some())];
    match of_new_images.into_iter().find(|(_, given)| *given) {
        Some((flag, _)) if args.mode == NewImageMode::Existing => {
            refuse(&format!("{flag} is for new images: --mode existing keeps the image's own; leave one out"))
        }
        _ => Ok(()),
    }
}

fn check_stream(args: &Args) -> Result<()> {
    let wrong = [
        (args.format == Some(ImageFormat::Qcow2), "--format qcow2"),
        (args.format.is_some_and(|format| format != ImageFormat::Raw), "--format (but raw)"),
        (args.compress.is_some(), "--compress"),
        (args.cluster_size.is_some(), "--cluster-size"),
        (args.mode == NewImageMode::Existing, "--mode existing"),
        (args.verify, "--verify"),
    ];
    if let Some((_, flag)) = wrong.into_iter().find(|(given, _)| *given) {
        let what = format!(
            "{flag} is not possible with --target -: a stream is raw and can't be read back; leave it out, or write to a file"
        );
        return Err(Error::new(Kind::Usage, what));
    }
    if std::io::stdout().is_terminal() {
        return Err(Error::new(Kind::Usage, "--target - would write the disk to a terminal; redirect standard output"));
    }
    Ok(())
}

/// The target as it was given, but for a password.
pub fn target_word(target: &Target) -> &Path {
    match target {
        Target::Stdout => Path::new("-"),
        Target::Nowhere => Path::new(""),
        Target::At(location) => location.name(),
    }
}

/// The target as messages name it.
pub fn target_name(target: &Target) -> String {
    match target {
        Target::At(location) => format!("'{location}'"),
        Target::Stdout => "the copy on standard output".to_owned(),
        Target::Nowhere => "nothing".to_owned(),
    }
}

impl From<ImageFormat> for Format {
    fn from(format: ImageFormat) -> Self {
        match format {
            ImageFormat::Raw => Self::Raw,
            ImageFormat::Qcow2 => Self::Qcow2,
            ImageFormat::Vmdk => Self::Foreign(Foreign::Vmdk),
            ImageFormat::Vdi => Self::Foreign(Foreign::Vdi),
            ImageFormat::Vhdx => Self::Foreign(Foreign::Vhdx),
            ImageFormat::Vpc => Self::Foreign(Foreign::Vpc),
            ImageFormat::Qed => Self::Foreign(Foreign::Qed),
            ImageFormat::Parallels => Self::Foreign(Foreign::Parallels),
            ImageFormat::Luks => Self::Foreign(Foreign::Luks),
            ImageFormat::Qcow2Luks => Self::Foreign(Foreign::EncryptedQcow2),
            ImageFormat::Dmg => Self::Foreign(Foreign::Dmg),
            ImageFormat::Cloop => Self::Foreign(Foreign::Cloop),
            ImageFormat::Bochs => Self::Foreign(Foreign::Bochs),
        }
    }
}

impl From<Policy> for OnError {
    fn from(policy: Policy) -> Self {
        match policy {
            Policy::Report => Self::Report,
            Policy::Ignore => Self::Ignore,
            Policy::Enospc => Self::Enospc,
            Policy::Stop => Self::Stop,
        }
    }
}

impl From<Compress> for CompressOptions {
    fn from(compress: Compress) -> Self {
        let default = Self::default_of(compress.kind);
        Self { level: compress.level.unwrap_or(default.level), ..default }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    fn resolve(flags: &str) -> Result<Plan> {
        let device = if flags.contains("--device") { "" } else { "--device d " };
        let target = if flags.contains("--target") { "" } else { "--target t " };
        let line = format!("drive-backup {device}{target}{flags}");
        plan(Args::try_parse_from(line.split_whitespace()).unwrap_or_else(|error| panic!("{flags}: {error}")))
    }

    fn one(flags: &str) -> (Options, Plan) {
        let mut plan = resolve(flags).unwrap();
        assert_eq!(plan.disks.len(), 1);
        (plan.disks.remove(0), plan)
    }

    #[test]
    fn several_disks_are_paired_in_order_and_share_the_other_flags() {
        let plan = resolve("--device a --device b --target x --direct --target y.raw --format qcow2").unwrap();
        let ends: Vec<_> = plan.disks.iter().map(|disk| (disk.device.clone(), disk.target.clone())).collect();
        let pair = |device: &str, target: &str| (Location::from(device), Target::At(target.into()));
        assert_eq!(ends, [pair("a", "x"), pair("b", "y.raw")]);
        assert!(plan.disks.iter().all(|disk| disk.direct && disk.format == Some(Format::Qcow2)));
    }

    #[test]
    fn defaults_leave_the_formats_to_the_engine() {
        let (options, Plan { steering, view, .. }) = one("");
        assert_eq!((options.format, options.source_format, options.mode), (None, None, Mode::AbsolutePaths));
        assert!(options.backing && options.sparse && options.fsync && options.workers >= 1);
        assert!(!options.direct && !options.allow_inconsistent);
        assert_eq!((steering, view.json), (Steering { course: Course::Steady(None), timeout: None }, None));
    }

    #[test]
    fn every_flag_arrives() {
        let flags = "--source-format qcow2 --no-backing --format qcow2 --cluster-size 4K --compress zstd:7 --speed 1M \
            --workers 3 --direct --sparse=never --no-fsync --allow-inconsistent --on-source-error stop \
            --on-target-error enospc --json -v --progress-interval 5";
        let (options, Plan { steering, view, .. }) = one(flags);
        assert_eq!((options.source_format, options.format), (Some(Format::Qcow2), Some(Format::Qcow2)));
        assert_eq!((options.cluster_size, options.compression.unwrap().level), (Some(4096), 7));
        assert_eq!((steering.course, options.workers), (Course::Steady(Some(1 << 20)), 3));
        assert!(!options.backing && options.direct && !options.sparse && !options.fsync && options.allow_inconsistent);
        assert_eq!((options.on_source_error, options.on_target_error), (OnError::Stop, OnError::Enospc));
        assert_eq!((view.json, view.status_interval), (Some(JsonEnd::Stdout), Duration::from_secs(5)));
        assert!(view.verbose && !view.quiet);
    }

    #[test]
    fn a_stream_is_raw_and_sends_json_to_standard_error() {
        let (options, Plan { view, .. }) = one("--target - --json");
        assert_eq!((options.target, options.format), (Target::Stdout, Some(Format::Raw)));
        assert_eq!((view.json, view.style), (Some(JsonEnd::Stderr), Style::None));
    }

    #[test]
    fn a_hook_is_told_of_a_uri_without_its_password() {
        let (options, _) = one("--target rbd:p/i:key=hunter2 --hook-frozen c");
        let hook = Hook::new(When::Frozen, "c").telling("DEVICE", "d").telling("TARGET", "rbd:p/i:key=…");
        assert_eq!(options.hook_frozen, Some(hook));
    }

    #[test]
    fn contradictions_are_refused_with_the_flag_and_a_hint() {
        for (flags, flag, hint) in [
            ("--device - ", "--device -", "name a file"),
            ("--target /dev/stdout", "--target /dev/stdout", "write --target -"),
            ("--target /dev/fd/1", "--target /dev/fd/1", "write --target -"),
            ("--device a --device b --target x", "2 --device and 1 --target", "one --target for each"),
            ("--device a --target x --target -", "1 --device and 2 --target", "one --target for each"),
            ("--device a --device b --target x --target -", "--target -", "takes one disk"),
            ("--target - --format qcow2", "--format qcow2", "leave it out"),
            ("--target - --compress zlib", "--compress", "leave it out"),
            ("--target - --mode existing", "--mode existing", "leave it out"),
            ("--target - --cluster-size 4K", "--cluster-size", "leave it out"),
            ("--mode existing --compress zlib", "--compress", "leave one out"),
            ("--mode existing --cluster-size 64K", "--cluster-size", "leave one out"),
            ("--cluster-size 3000", "--cluster-size", "power of two"),
            ("--cluster-size 256", "--cluster-size", "power of two"),
            ("--cluster-size 4M", "--cluster-size", "power of two"),
        ] {
            let error = resolve(flags).expect_err(flags);
            let text = error.to_string();
            assert_eq!(error.kind(), Kind::Usage, "{flags}");
            assert!(text.contains(flag) && text.contains(hint), "{flags}: {text}");
        }
    }
}
