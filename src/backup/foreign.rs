//! Ends of a copy that QEMU opens for us.

use super::Disk;
use super::options::Mode;
use super::outcome::TargetState;
use crate::error::{Error, Kind, Result, Side};
use crate::ground::range::{ByteRange, Extent};
use crate::image::format::{Foreign, Format};
use crate::image::open::{Source, SourceOptions, open_elsewhere};
use crate::image::probe;
use crate::image::qemu::{self, Node, Qemu, Remote, Terms};
use crate::image::target::{open_in_place, refuse_other_size};
use crate::image::{Image, Properties};
use crate::job::Job;
use crate::monitor::Warning;
use std::io;
use std::path::Path;
use std::sync::Arc;

/// A source behind one of QEMU's protocols. Opening it ends with the job.
pub fn source(remote: &Remote, how: &SourceOptions, job: &Job) -> Result<Source> {
    let open = |format: Option<Foreign>| {
        let secret = how.secret.as_ref().filter(|_| format.is_some_and(Foreign::is_encrypted));
        if let Some(format) = format {
            qemu::check_secret(format, secret, remote.name())?;
        }
        let (direct, shared, backing) = (how.direct, how.shared, how.backing || format.is_none());
        let terms = Terms { side: Side::Source, secret, direct, flushes: false, shared, backing, job: Some(job) };
        Qemu::open(&Node::Remote { place: remote, format }, terms)
    };
    let format = match how.format {
        Some(format) => format,
        None if remote.is_file() => how.look(&start(&open(None)?, remote)?),
        None => Format::Raw,
    };
    let Format::Foreign(foreign) = format else {
        return open_elsewhere(Arc::new(open(None)?), remote.name(), format);
    };
    let image = open(Some(foreign))?;
    let (virtual_size, files, warnings) = (image.length(), Vec::new(), Vec::new());
    Ok(Source { virtual_size, image: Arc::new(image), format, files, warnings, top: None, opened: Vec::new() })
}

fn start(image: &Qemu, remote: &Remote) -> Result<Vec<u8>> {
    let mut start = vec![0; image.length().min(probe::LENGTH as u64) as usize];
    image.read_at(&mut start, 0).map_err(|e| Error::file(Side::Source, "read", remote.name(), e))?;
    Ok(start)
}

/// A new image of a disk of `length` bytes in the file `partial`, which will be `name`.
pub fn new_file(disk: Disk<'_>, format: Foreign, partial: &Path, name: &Path, length: u64) -> Result<Arc<Qemu>> {
    let terms = target_terms(disk, Some(format), name)?;
    qemu::create_file(partial, name, format, length, &terms)?;
    let image = Qemu::open(&Node::File { path: partial, name, format }, terms)?;
    // What nobody has encrypted is noise when it is decrypted.
    Ok(Arc::new(if format.is_encrypted() { image } else { image.of_zeroes() }))
}

/// An image that is there, of a disk of `length` bytes.
pub fn existing_file(disk: Disk<'_>, format: Foreign, path: &Path, length: u64) -> Result<Arc<Qemu>> {
    let terms = target_terms(disk, Some(format), path)?;
    // QEMU takes locks of its own.
    drop(open_in_place(path)?);
    let image = Qemu::open(&Node::File { path, name: path, format }, terms)?;
    refuse_other_size(length, path, image.length())?;
    Ok(Arc::new(image))
}

/// An image or a volume elsewhere, which is written in place: with mode `existing` the one that is there. `None`: a new
/// one, which is still missing, and for [`make_remote`] to make.
pub fn remote(disk: Disk<'_>, remote: &Remote, length: u64) -> Result<(Option<Arc<Qemu>>, Format)> {
    let options = disk.options;
    let name = remote.name();
    let refuse = |what: &str| Err(Error::new(Kind::Usage, format!("target '{}' {what}", name.display())));
    if remote.is_read_only() {
        return refuse("can only be read");
    }
    if options.compression.is_some() || options.cluster_size.is_some() {
        return refuse("is written by QEMU: --compress and --cluster-size are for qcow2 files here");
    }
    let format = options.format.unwrap_or(Format::Raw);
    let foreign = match format {
        Format::Raw => None,
        Format::Qcow2 => return refuse("gets raw or a format of QEMU's: qcow2 is written to files and devices here"),
        Format::Foreign(foreign) => Some(foreign),
    };
    let terms = target_terms(disk, foreign, name)?;
    if options.mode == Mode::AbsolutePaths {
        refuse_what_is_there(remote, terms)?;
        return Ok((None, format));
    }
    let image = Qemu::open(&Node::Remote { place: remote, format: foreign }, terms)?;
    refuse_other_size(length, name, image.length())?;
    Ok((Some(Arc::new(image)), format))
}

/// Makes what [`remote`] found missing, for a disk of `length` bytes. What is there after an error is said beside it.
pub fn make_remote(
    disk: Disk<'_>,
    remote: &Remote,
    format: Format,
    length: u64,
) -> Result<Arc<Qemu>, (Error, TargetState)> {
    let untouched = |error| (error, TargetState::Untouched);
    let incomplete = |error| (error, TargetState::Incomplete);
    let foreign = if let Format::Foreign(foreign) = format { Some(foreign) } else { None };
    let terms = target_terms(disk, foreign, remote.name()).map_err(untouched)?;
    // Somebody may have made it since.
    refuse_what_is_there(remote, terms).map_err(untouched)?;
    let node = Node::Remote { place: remote, format: foreign };
    if let Err(error) = qemu::create(&node, length, &terms) {
        // It may have failed before it made anything, or after; what can't be seen may be there.
        let is_made = refuse_what_is_there(remote, terms).is_err();
        return Err(if is_made { incomplete(error) } else { untouched(error) });
    }
    let image = Qemu::open(&node, terms).map_err(incomplete)?;
    if image.length() < length {
        refuse_other_size(length, remote.name(), image.length()).map_err(incomplete)?;
    }
    Ok(Arc::new(image))
}

/// QEMU would truncate what is there: only what is certainly missing is made.
fn refuse_what_is_there(remote: &Remote, terms: Terms<'_>) -> Result<()> {
    let name = remote.name();
    match Qemu::open(&Node::Remote { place: remote, format: None }, Terms { secret: None, ..terms }) {
        Ok(_) => {
            let what = format!("target '{}' exists; to write into it, say --mode existing", name.display());
            Err(Error::new(Kind::Usage, what))
        }
        Err(error) if is_missing(&error, name) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Stands for an image of so many bytes until it is made: it takes nothing and gives nothing.
pub struct Unmade(pub u64);

impl Image for Unmade {
    fn length(&self) -> u64 {
        self.0
    }

    fn block_status(&self, _range: ByteRange) -> io::Result<Extent> {
        Err(not_made())
    }

    fn read_at(&self, _buf: &mut [u8], _offset: u64) -> io::Result<()> {
        Err(not_made())
    }

    fn write_at(&self, _buf: &[u8], _offset: u64) -> io::Result<()> {
        Err(not_made())
    }

    fn write_zeroes(&self, _range: ByteRange) -> io::Result<()> {
        Err(not_made())
    }

    fn discard(&self, _range: ByteRange) -> io::Result<()> {
        Err(not_made())
    }

    fn flush(&self) -> io::Result<()> {
        Err(not_made())
    }

    fn properties(&self) -> Properties {
        Properties { cluster_size: 1, alignment: 1, reads_zero: true, sequential: false }
    }
}

fn not_made() -> io::Error {
    io::Error::other("it is not made yet")
}

/// The driver says so, and not the system of something here, such as a folder for temporary files.
fn is_missing(error: &Error, name: &Path) -> bool {
    let said = error.to_string().replace(&name.display().to_string(), "");
    error.io_kind() != Some(std::io::ErrorKind::NotFound) && says_missing(&said)
}

/// Do the words of a driver of QEMU's mean that there is nothing under that name? They are all that it tells.
fn says_missing(error: &str) -> bool {
    ["No such file or directory", "sftp error code: 2)", "NFS3ERR_NOENT"].iter().any(|words| error.contains(words))
}

/// What the user should know of an image whose format has sizes of its own.
pub fn rounded(image: &Qemu, name: &Path, length: u64) -> Option<Warning> {
    let more = image.length().checked_sub(length).filter(|more| *more > 0)?;
    let what = format!("'{}' is {more} bytes larger than the source, for its format; they are zero", name.display());
    Some(Warning::general("rounded", what))
}

fn target_terms<'a>(disk: Disk<'a>, format: Option<Foreign>, name: &Path) -> Result<Terms<'a>> {
    let Disk { options, job, .. } = disk;
    let secret = options.secret_of_target().filter(|_| format.is_some_and(Foreign::is_encrypted));
    if let Some(format) = format {
        qemu::check_secret(format, secret, name)?;
        if !format.is_writable() {
            let what = format!("target '{}': {} can only be read", name.display(), format.name());
            return Err(Error::new(Kind::Usage, what));
        }
    }
    let (direct, flushes) = (options.direct, options.fsync);
    Ok(Terms { side: Side::Target, secret, direct, flushes, shared: false, backing: true, job: Some(job) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_certainly_missing_is_made() {
        for (error, is_missing) in [
            ("error reading header from disk: No such file or directory", true),
            ("Failed to open NFS file: NFS3ERR_NOENT", true),
            (
                "failed to open remote file '': SFTP server: No such file (libssh error code: 1, sftp error code: 2)",
                true,
            ),
            ("'': SFTP server: Permission denied (libssh error code: 1, sftp error code: 3)", false),
            ("Could not open 'ssh://host/x': Permission denied", false),
            ("Connection refused", false),
            ("no valid ssh host key found", false),
            ("Unknown protocol 'rbd'", false),
            ("Failed to get \"write\" lock", false),
        ] {
            assert_eq!(says_missing(error), is_missing, "{error}");
        }
        let place = Path::new("ssh://host/No such file or directory");
        let of = |error| is_missing(&Error::file(Side::Target, "open", place, error), place);
        assert!(of(std::io::Error::other("SFTP server: No such file (libssh error code: 1, sftp error code: 2)")));
        assert!(!of(std::io::Error::other("Connection refused")), "its name is not what is said of it");
        assert!(!of(std::io::Error::from_raw_os_error(2)), "no temporary folder here");
    }
}
