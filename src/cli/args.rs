//! The one definition of the flags: parser, help, man page and completions come from it.

use super::ctl::CtlArgs;
use super::hooks::HookFlags;
use super::remote;
use super::restore::RestoreArgs;
use super::serve::args::ServeArgs;
use super::sight::Sight;
use super::verify::VerifyArgs;
use crate::ground::size::{NotASize, parse_rate, parse_size};
use crate::ground::speed::Schedule;
use crate::image::qcow2::header::Compression;
use crate::image::secret::SecretPlace;
use crate::ring::server::{LONGEST_CAPTURE, LONGEST_FREEZE};
use clap::{Parser, Subcommand, ValueEnum, ValueHint};
use std::path::PathBuf;
use std::time::Duration;

const COPY: &str = "What to copy";
const TARGET: &str = "Where to";
const PACE: &str = "How";
const INSTANT: &str = "The instant";
const HOOKS: &str = "Commands of your own";
const FAILURE: &str = "When something fails";
const SIGHT: &str = "What you see";

/// Point-in-time backup of a disk image or block device
///
/// Copies a disk image (raw, qcow2) or a block device to a file, a block device or standard output, whole, sparse and
/// durable. The copy appears under its name only when it is complete and on stable storage; what was there before stays
/// until then.
///
/// Sizes: K, M, G, T are powers of 1024, as are KiB, MiB, ...; kB, MB, ... are powers of 1000. 1.5G is fine.
#[derive(Clone, Debug, Parser)]
#[command(name = "drive-backup", version, max_term_width = 100, args_override_self = false)]
#[command(args_conflicts_with_subcommands = true, subcommand_negates_reqs = true, disable_help_subcommand = true)]
#[command(
    after_help = "Exit status: 0 complete and durable, 2 bad arguments, 3 complete but for unreadable ranges, 4 source, \
    5 target, 6 point in time lost, 7 verification, 8 busy, 9 hook, 10 out of time, 128+N signal N, 1 anything else. See drive-backup(1)."
)]
pub struct Args {
    /// Something other than a backup.
    #[command(subcommand)]
    pub verb: Option<Verb>,

    /// The disk image or block device to copy; give it again, with a --target each, for several disks at one instant
    ///
    /// All or nothing until the instant is taken; from then on each copy is on its own. The other options hold for each
    /// of the disks. What no writer can be asked to stop for must not be written while the instant is taken, which is milliseconds: the
    /// backup fails then. What is no file here is said under PLACES in the manual.
    #[arg(long, value_name = "PATH", required = true, help_heading = COPY, value_hint = ValueHint::FilePath)]
    pub device: Vec<PathBuf>,

    /// Its format; by default its content tells
    #[arg(long, value_name = "FORMAT", help_heading = COPY)]
    pub source_format: Option<ImageFormat>,

    /// Where the secret is that opens an encrypted source: file:PATH, fd:N or env:NAME
    ///
    /// One newline at its end is not part of it. With it, a source that is LUKS (version 1; 2 is refused) or encrypted qcow2 is
    /// read decrypted; without it, a disk that begins with LUKS is copied as it is, encrypted.
    #[arg(long, value_name = "PLACE", help_heading = COPY)]
    pub secret: Option<SecretPlace>,

    /// Refuse a source that has a backing file
    #[arg(long, help_heading = COPY)]
    pub no_backing: bool,

    /// Open, lock and check everything, say what the backup would take, and stop before its first byte
    ///
    /// Says how much data there is, how long it takes at the asked speed or as fast as the source can be read, how much room
    /// there is, and, watching the writers for a second, how much the overlay will need. Hooks do not run.
    #[arg(long, help_heading = COPY)]
    pub dry_run: bool,

    /// Accept a source that changes while it is copied; the copy may then be torn, and the summary says so
    ///
    /// Without it such a source is an error: exit status 4, no target.
    #[arg(long, help_heading = COPY)]
    pub allow_inconsistent: bool,

    /// The file or block device to write, or - for a raw stream to standard output
    ///
    /// A symbolic link is followed. What is no file here is said under PLACES in the manual. Of several disks the first --target is the
    /// first --device's, and so on.
    #[arg(long, value_name = "PATH|-", required = true, help_heading = TARGET, value_hint = ValueHint::FilePath, allow_hyphen_values = false)]
    pub target: Vec<PathBuf>,

    /// The target's format
    ///
    /// By default what --mode existing finds, unless the name says something else: the data of a raw disk may begin like an image;
    /// raw for a block device, an NBD export, QEMU's places and -; else what the target's extension says (.raw, .img, .qcow2, .vmdk,
    /// .vdi, .vhdx, .vhd, .vpc, .qed, .hdd, .luks); else the source's, or raw where that can only be read.
    #[arg(long, value_name = "FORMAT", help_heading = TARGET)]
    pub format: Option<ImageFormat>,

    /// Where the secret is that shall open an encrypted target (luks, qcow2-luks, else refused); by default that of --secret
    #[arg(long, value_name = "PLACE", help_heading = TARGET)]
    pub target_secret: Option<SecretPlace>,

    /// A new image, or one that is there
    #[arg(long, value_name = "MODE", default_value = "absolute-paths", help_heading = TARGET)]
    pub mode: NewImageMode,

    /// Cluster size of a new qcow2: a power of two from 512 to 2M; 64K by default
    #[arg(long, value_name = "SIZE", allow_hyphen_values = true, value_parser = size, help_heading = TARGET)]
    pub cluster_size: Option<u64>,

    /// Compress a new qcow2: zlib or zstd; with a level, 1 to 9 (3 by default) or 1 to 22 (1), as in zstd:9
    #[arg(long, value_name = "TYPE[:LEVEL]", value_parser = Compress::parse, help_heading = TARGET)]
    pub compress: Option<Compress>,

    /// Turn runs of zero bytes into holes
    #[arg(long, value_name = "WHEN", default_value = "auto", default_missing_value = "auto", num_args = 0..=1,
          require_equals = true, help_heading = TARGET)]
    pub sparse: Sparse,

    /// Read the target back from its medium after the flush, and compare it with what was written
    ///
    /// Costs one more read of the target, and none of the source. A copy that differs is not published but kept beside the
    /// target under the name NAME.drive-backup-bad; exit status 7. The file system makes no clone for the target then: one that
    /// shares its blocks with the source would be compared with itself.
    #[arg(long, conflicts_with = "no_fsync", help_heading = TARGET)]
    pub verify: bool,

    /// Write a manifest of the copy: its instant, and hashes by which drive-backup-verify(1) can check it at any time
    ///
    /// JSON; it appears under its name when the copy has appeared under its own. Of several disks the first --manifest is of
    /// the first --device, and so on.
    #[arg(long, value_name = "FILE", help_heading = TARGET, value_hint = ValueHint::FilePath)]
    pub manifest: Vec<PathBuf>,

    /// Do not flush the target; a success then promises nothing about a power cut
    #[arg(long, help_heading = TARGET)]
    pub no_fsync: bool,

    /// Limit in bytes a second, such as 50M; 0, off and unlimited mean none; auto backs off while writers wait longer
    ///
    /// Holes and zeroes are not charged. SIGUSR2 turns the limit off and on again. With auto the copy begins slowly and
    /// doubles its speed until the cooperating writers' waits grow, as the ring's own figures show; without a writer there
    /// is no limit.
    #[arg(long, value_name = "RATE|auto", allow_hyphen_values = true, value_parser = speed, default_value = "off", help_heading = PACE)]
    pub speed: Speed,

    /// As slow as still arrives in time; when the time is over and the copy is not complete, exit status 10
    ///
    /// A time of day, HH:MM, is the next such time here; a date and time, such as 2030-01-31T06:00, may have a zone. The
    /// speed is planned anew as the copy goes on. With --verify the read-back has its part of the time.
    #[arg(long, value_name = "TIME", conflicts_with_all = ["speed", "speed_schedule"], help_heading = PACE)]
    pub finish_by: Option<String>,

    /// Speeds by the time of day, as in '08:00=10M 20:00=off'
    ///
    /// Each holds from its time on, here, until the next one's.
    #[arg(long, value_name = "HH:MM=RATE ...", conflicts_with = "speed", value_parser = Schedule::parse, help_heading = PACE)]
    pub speed_schedule: Option<Schedule>,

    /// Give up when the backup has taken so long: seconds, or with a unit, as in 90m or 8h; exit status 10
    #[arg(long, value_name = "TIME", allow_negative_numbers = true, value_parser = timeout, help_heading = PACE)]
    pub timeout: Option<Duration>,

    /// Number of copying threads; by default one for each core
    #[arg(long, value_name = "N", allow_hyphen_values = true, value_parser = clap::value_parser!(u16).range(1..=256), help_heading = PACE)]
    pub workers: Option<u16>,

    /// Bypass the page cache
    #[arg(long, help_heading = PACE)]
    pub direct: bool,

    /// Whether a cooperating writer takes part
    ///
    /// It waits for what the backup reads, and longer if that runs under nice(1) or ionice(1) on a busy machine; --speed spares
    /// it.
    #[arg(long, value_name = "WHEN", default_value = "auto", help_heading = INSTANT)]
    pub writer: WriterPolicy,

    /// Where writers and backups find each other
    ///
    /// By default DRIVE_BACKUP_DIR, else /run/drive-backup for root, $XDG_RUNTIME_DIR/drive-backup, or
    /// /tmp/drive-backup-UID.
    #[arg(long, value_name = "DIR", help_heading = INSTANT, value_hint = ValueHint::DirPath)]
    pub writer_dir: Option<PathBuf>,

    /// What keeps the instant
    #[arg(long, value_name = "HOW", default_value = "auto", help_heading = INSTANT)]
    pub snapshot: Snapshot,

    /// Folder for what writers are about to overwrite, or memory; by default TMPDIR, else /var/tmp
    #[arg(long, value_name = "DIR|memory", help_heading = INSTANT, value_hint = ValueHint::DirPath)]
    pub overlay: Option<PathBuf>,

    /// The most that the overlay may hold; 0, off and unlimited mean no limit
    ///
    /// When it is full, --on-cbw-error decides.
    #[arg(long, value_name = "SIZE", allow_negative_numbers = true, value_parser = limit, default_value = "off", help_heading = INSTANT)]
    pub overlay_limit: Limit,

    /// In how many seconds all writers must be frozen; 60 at most
    #[arg(long, value_name = "SECONDS", allow_negative_numbers = true, value_parser = of_freeze, default_value = "5", help_heading = INSTANT)]
    pub freeze_timeout: Duration,

    /// In how many seconds the old contents must be saved for a waiting write; 298 at most
    #[arg(long, value_name = "SECONDS", allow_negative_numbers = true, value_parser = of_capture, default_value = "30", help_heading = INSTANT)]
    pub cbw_timeout: Duration,

    /// What happens when they can't be
    #[arg(long, value_name = "POLICY", default_value = "break-snapshot", help_heading = INSTANT)]
    pub on_cbw_error: CbwPolicy,

    /// In how many seconds a lost NBD server must be back
    ///
    /// Until then requests wait, and what was under way is done again. A target's writes that no flush covers yet are
    /// written again too, since a server that was restarted may have lost them.
    #[arg(long, value_name = "SECONDS", allow_negative_numbers = true, value_parser = seconds, default_value = "10", help_heading = FAILURE)]
    pub reconnect_delay: Duration,

    #[command(flatten)]
    pub hooks: HookFlags,

    /// A shell command that runs while the writers are frozen, in what is left of --freeze-timeout
    ///
    /// It must not write to the disk through a writer: that one is frozen.
    #[arg(long, value_name = "COMMAND", help_heading = HOOKS)]
    pub hook_frozen: Option<String>,

    /// What a read error of the source does
    #[arg(long, value_name = "POLICY", default_value = "report", help_heading = FAILURE)]
    pub on_source_error: Policy,

    /// What a write error of the target does
    #[arg(long, value_name = "POLICY", default_value = "report", help_heading = FAILURE)]
    pub on_target_error: Policy,

    #[command(flatten)]
    pub sight: Sight,

    /// Keep the newest JSON record in a file, replaced as a whole; of several disks, a line for each
    ///
    /// A file that can't be written is a warning and never the backup's end.
    #[arg(long, value_name = "FILE", help_heading = SIGHT, value_hint = ValueHint::FilePath)]
    pub status_file: Option<PathBuf>,

    /// When the run ends, however it does, write how it went for Prometheus's node_exporter (FILE.prom in its folder)
    ///
    /// The time of the last success is kept from the file that is there. Give each backup a file of its own. A --dry-run
    /// writes none.
    #[arg(long, value_name = "FILE", help_heading = SIGHT, value_hint = ValueHint::FilePath)]
    pub metrics_file: Option<PathBuf>,

    /// Let QMP clients, such as qmp-shell, watch and steer the run at this socket; see docs/QMP.md
    ///
    /// Without it `drive-backup ctl` finds the run all the same.
    #[arg(long, value_name = "unix:PATH", value_parser = remote::socket, help_heading = SIGHT)]
    pub qmp: Option<PathBuf>,
}

/// What the command does beside backups. None of their flags holds for it.
#[derive(Clone, Debug, Subcommand)]
pub enum Verb {
    Serve(Box<ServeArgs>),
    Verify(Box<VerifyArgs>),
    Restore(Box<RestoreArgs>),
    Ctl(Box<CtlArgs>),
}

/// A format that can be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ImageFormat {
    /// The disk's bytes and nothing else
    Raw,
    /// QEMU's image format, versions 2 and 3; written as 3
    Qcow2,
    /// VMware's; this and all below by qemu-nbd
    Vmdk,
    /// VirtualBox's
    Vdi,
    /// Hyper-V's
    Vhdx,
    /// Virtual PC's, VHD
    #[value(alias = "vhd")]
    Vpc,
    /// QEMU's former enhanced disk
    Qed,
    /// Parallels'
    Parallels,
    /// An encrypted raw disk; needs --secret
    Luks,
    /// An encrypted qcow2; needs --secret
    Qcow2Luks,
    /// Apple's; only as a source
    Dmg,
    /// A compressed loop device; only as a source
    Cloop,
    /// Bochs'; only as a source
    Bochs,
}

/// QEMU's words for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum NewImageMode {
    /// Make a new image beside the target and put it in the target's place when it is complete; a device is written in place
    AbsolutePaths,
    /// Write into the image that is there, in place
    Existing,
}

/// Zeroes to holes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Sparse {
    /// Wherever the target can have holes
    Auto,
    /// Write every byte
    Never,
}

/// Error policies, in QEMU's words.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Policy {
    /// End with the error
    Report,
    /// Go on: an unreadable source range becomes zeroes, an unwritable target range is skipped; exit status 3
    Ignore,
    /// Stop when the target is full, else report
    Enospc,
    /// Pause, and try again after Enter on the terminal or SIGCONT
    Stop,
}

/// Cooperating writers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum WriterPolicy {
    /// If there is one
    Auto,
    /// Without one the backup does not start
    Required,
    /// Nobody is looked for
    None,
}

/// What keeps the instant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Snapshot {
    /// A clone where the file system can, else the overlay
    Auto,
    /// The overlay: what writers are about to overwrite is saved first
    Overlay,
    /// A clone of the file system, or the backup does not start
    Reflink,
}

/// When the old contents can't be saved for a waiting write.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CbwPolicy {
    /// The write goes on, the backup fails: exit status 6
    BreakSnapshot,
    /// The write fails, the backup goes on
    BreakGuestWrite,
}

/// How progress is shown.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Progress {
    /// A bar on a terminal, plain lines under systemd's journal, else none
    Auto,
    /// A bar; plain lines where standard error is no terminal
    Bar,
    /// A line every 30 seconds and one at the end
    Plain,
    /// None
    None,
}

/// Compression of a new qcow2: what, and at which level if one was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Compress {
    pub kind: Compression,
    pub level: Option<i32>,
}

impl Compress {
    fn parse(text: &str) -> Result<Self, String> {
        let (name, level) = text.split_once(':').map_or((text, None), |(name, level)| (name, Some(level)));
        let (kind, highest) = match name {
            "zlib" => (Compression::Zlib, 9),
            "zstd" => (Compression::Zstd, 22),
            _ => return Err("use zlib, zstd, or a level with it: zstd:9".to_owned()),
        };
        let in_range = |level: &str| level.parse().ok().filter(|level| (1..=highest).contains(level));
        let level = match level.map(in_range) {
            None => None,
            Some(Some(level)) => Some(level),
            Some(None) => return Err(format!("a level of {name} is a number from 1 to {highest}")),
        };
        Ok(Self { kind, level })
    }
}

/// What is asked of the speed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Speed {
    /// Bytes a second; `None`: no limit.
    Limit(Option<u64>),
    /// As writers bear it.
    Auto,
}

fn size(text: &str) -> Result<u64, NotASize> {
    parse_size(text)
}

fn speed(text: &str) -> Result<Speed, NotASize> {
    if text.trim().eq_ignore_ascii_case("auto") { Ok(Speed::Auto) } else { parse_rate(text).map(Speed::Limit) }
}

/// Bytes; `None`: no limit. A type of its own: clap reads `Option` as "may be absent".
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit(pub Option<u64>);

pub fn limit(text: &str) -> Result<Limit, NotASize> {
    parse_rate(text).map(Limit)
}

pub fn seconds(text: &str) -> Result<Duration, &'static str> {
    match text.parse::<f64>() {
        Ok(seconds) if (0.1..=86400.0).contains(&seconds) => Ok(Duration::from_secs_f64(seconds)),
        _ => Err("it is a number of seconds from 0.1 to 86400"),
    }
}

fn of_freeze(text: &str) -> Result<Duration, String> {
    writers_bound(text, LONGEST_FREEZE)
}

fn of_capture(text: &str) -> Result<Duration, String> {
    writers_bound(text, LONGEST_CAPTURE)
}

/// Seconds, no more than writers agree to.
fn writers_bound(text: &str, most: Duration) -> Result<Duration, String> {
    let refusal = || format!("it is a number of seconds from 0.1 to {}: writers wait no longer", most.as_secs());
    seconds(text).ok().filter(|asked| *asked <= most).ok_or_else(refusal)
}

/// Up to a year.
pub fn timeout(text: &str) -> Result<Duration, &'static str> {
    let (number, unit) = text.split_at(text.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(text.len()));
    let unit = match unit {
        "" | "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        "d" => 86400.0,
        _ => return Err("units are s, m, h and d, as in 90m"),
    };
    match number.parse::<f64>().map(|number| number * unit) {
        Ok(seconds) if (0.1..=365.0 * 86400.0).contains(&seconds) => Ok(Duration::from_secs_f64(seconds)),
        _ => Err("it is a time from 0.1 seconds to 365d"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn parse(flags: &[&str]) -> Result<Args, String> {
        let needed = ["drive-backup", "--device", "d", "--target", "t"];
        Args::try_parse_from(needed.iter().chain(flags)).map_err(|error| error.to_string())
    }

    #[test]
    fn the_definition_is_sound() {
        Args::command().debug_assert();
    }

    #[test]
    fn defaults_are_the_promised_ones() {
        let args = parse(&[]).unwrap();
        assert_eq!(
            (args.mode, args.sparse, args.sight.progress),
            (NewImageMode::AbsolutePaths, Sparse::Auto, Progress::Auto)
        );
        assert_eq!((args.on_source_error, args.on_target_error), (Policy::Report, Policy::Report));
        assert_eq!((args.speed, args.workers, args.format, args.source_format), (Speed::Limit(None), None, None, None));
        let sight = args.sight;
        assert!(!(args.no_fsync || args.direct || sight.json || sight.quiet || sight.verbose || args.no_backing));
    }

    #[test]
    fn values_are_read() {
        let args = parse(&["--speed", "50M", "--cluster-size", "2M", "--sparse=never", "--mode", "existing"]).unwrap();
        assert_eq!((args.speed, args.cluster_size), (Speed::Limit(Some(50 << 20)), Some(2 << 20)));
        assert_eq!((args.sparse, args.mode), (Sparse::Never, NewImageMode::Existing));
        assert_eq!(parse(&["--sparse"]).unwrap().sparse, Sparse::Auto);
        for (text, kind, level) in [
            ("zlib", Compression::Zlib, None),
            ("zlib:9", Compression::Zlib, Some(9)),
            ("zstd", Compression::Zstd, None),
            ("zstd:19", Compression::Zstd, Some(19)),
        ] {
            assert_eq!(parse(&["--compress", text]).unwrap().compress, Some(Compress { kind, level }));
        }
        assert_eq!(
            parse(&["--progress-interval", "0.5"]).unwrap().sight.progress_interval,
            Some(Duration::from_millis(500))
        );
        assert_eq!(parse(&["-q"]).unwrap().sight.progress, Progress::None);
        assert_eq!(parse(&["--speed", "auto"]).unwrap().speed, Speed::Auto);
        let longest = parse(&["--freeze-timeout", "60", "--cbw-timeout", "298"]).unwrap();
        assert_eq!((longest.freeze_timeout.as_secs(), longest.cbw_timeout.as_secs()), (60, 298));
        for (text, seconds) in [("10", 10.0), ("0.5", 0.5), ("90m", 5400.0), ("1.5h", 5400.0), ("2d", 172_800.0)] {
            assert_eq!(parse(&["--timeout", text]).unwrap().timeout, Some(Duration::from_secs_f64(seconds)), "{text}");
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for flags in [
            &["--speed", "-1"][..],
            &["--speed=-1"],
            &["--speed", "50Mb"],
            &["--speed", "1e99"],
            &["--speed", "auto", "--finish-by", "06:00"],
            &["--speed", "1M", "--speed-schedule", "08:00=1M"],
            &["--finish-by", "06:00", "--speed-schedule", "08:00=1M"],
            &["--speed-schedule", "08:00=1M 08:00=2M"],
            &["--timeout", "0"],
            &["--timeout", "-1"],
            &["--timeout", "1w"],
            &["--timeout", "nan"],
            &["--timeout", "1e9d"],
            &["--freeze-timeout", "60.1"],
            &["--cbw-timeout", "299"],
            &["--workers", "0"],
            &["--workers", "-2"],
            &["--compress", "zstd:23"],
            &["--compress", "zstd:0"],
            &["--compress", "zlib:10"],
            &["--compress", "zlib:"],
            &["--compress", "lzo"],
            &["--format", "tar"],
            &["--mode", "absolute"],
            &["--sparse=always"],
            &["--on-source-error", "retry"],
            &["--progress-interval", "0"],
            &["--progress-interval", "nan"],
            &["--speed", "1M", "--speed", "2M"],
            &["-q", "-v"],
            &["stray"],
        ] {
            assert!(parse(flags).is_err(), "{flags:?}");
        }
    }
}
