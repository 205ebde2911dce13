//! The flags of `drive-backup serve`.

use crate::cli::args::ImageFormat;
use crate::image::secret::SecretPlace;
use clap::{Args, ValueHint};
use std::ffi::OsString;
use std::path::PathBuf;

const DISK: &str = "What to serve";
const WHERE: &str = "Where";
const SIGHT: &str = "What you see";

/// Serve a disk to programs that know nothing of backups, so that it can be backed up while they write
///
/// Puts raw files, block devices and qcow2 images behind NBD, vhost-user-blk or FUSE. `drive-backup --device PATH --target ...`,
/// from cron for example, finds the server by the disk's path, and copies the disk as of one instant while it is written. The
/// disk is locked against every other program that writes, QEMU too.
///
/// SIGTERM, SIGINT and SIGHUP end it: nobody is let in any more, requests in flight are answered, the disks are flushed. A
/// killed server leaves a qcow2 image that is whole, and at worst leaky.
#[derive(Args, Clone, Debug)]
#[command(max_term_width = 100)]
pub struct ServeArgs {
    /// The disk image or block device to serve; give it again for more disks
    ///
    /// NAME is what clients ask for. Without it a single disk has the empty name, which clients ask for who ask for none; of
    /// several disks each has its file's name without the extension. A path that has a = before the first / needs ./ before it.
    #[arg(long, value_name = "[NAME=]PATH", required = true, help_heading = DISK, value_hint = ValueHint::FilePath)]
    pub device: Vec<OsString>,

    /// The format of the disks; by default their content tells
    ///
    /// A disk that was found to be raw by its content can't be given the first bytes of another format by its guest: such a
    /// write fails, since whoever opens the image next would be deceived. With raw given here, everything may be written.
    #[arg(long, value_name = "FORMAT", help_heading = DISK)]
    pub format: Option<ImageFormat>,

    /// Refuse every change; others may read the disks too
    #[arg(long, help_heading = DISK)]
    pub read_only: bool,

    /// Where the secret is that opens encrypted disks, which can only be read: file:PATH, fd:N or env:NAME
    #[arg(long, value_name = "PLACE", requires = "read_only", help_heading = DISK)]
    pub secret: Option<SecretPlace>,

    /// Where backups find this server
    ///
    /// By default DRIVE_BACKUP_DIR, else /run/drive-backup for root, $XDG_RUNTIME_DIR/drive-backup, or
    /// /tmp/drive-backup-UID.
    #[arg(long, value_name = "DIR", help_heading = DISK, value_hint = ValueHint::DirPath)]
    pub writer_dir: Option<PathBuf>,

    /// Serve NBD at unix:PATH or HOST:PORT; without a HOST on the loopback only. May be given again
    #[arg(long, value_name = "unix:PATH|HOST:PORT", help_heading = WHERE)]
    pub nbd: Vec<String>,

    /// Require TLS of NBD clients, with server-cert.pem and server-key.pem from this folder
    ///
    /// With ca-cert.pem there, clients need a certificate of that authority too.
    #[arg(long, value_name = "DIR", requires = "nbd", help_heading = WHERE, value_hint = ValueHint::DirPath)]
    pub tls_dir: Option<PathBuf>,

    /// The most NBD clients at once
    #[arg(long, value_name = "N", requires = "nbd", default_value = "64", help_heading = WHERE,
          value_parser = clap::value_parser!(u32).range(1..=65536))]
    pub max_connections: u32,

    /// Serve a virtual machine as vhost-user-blk at this socket; give it once for each disk to be served so
    ///
    /// NAME says which disk, where there are several. One guest at a time: another that connects is refused, with a warning,
    /// unless the first goes within two seconds.
    #[arg(long, value_name = "[NAME=]PATH", help_heading = WHERE, value_hint = ValueHint::FilePath)]
    pub vhost_user: Vec<OsString>,

    /// Show a disk as a file: mounted over PATH, a regular file, which may be the image itself
    ///
    /// NAME says which disk, where there are several.
    #[arg(long, value_name = "[NAME=]PATH", help_heading = WHERE, value_hint = ValueHint::FilePath)]
    pub fuse: Vec<OsString>,

    /// Let QMP clients, such as qmp-shell, start and steer backups of the disks at this socket; see docs/QMP.md
    ///
    /// There a disk has its NAME; one without a name has its file's, without the extension.
    #[arg(long, value_name = "unix:PATH", value_parser = crate::cli::remote::socket, help_heading = WHERE)]
    pub qmp: Option<PathBuf>,

    /// Write JSON lines to standard output: when it is ready, what goes wrong, how it ended
    #[arg(long, help_heading = SIGHT)]
    pub json: bool,

    /// Only errors
    #[arg(short, long, help_heading = SIGHT)]
    pub quiet: bool,
}
