//! What only QEMU can open, through a private qemu-nbd: the formats of [`Foreign`], and storage that is a [`Remote`].
//!
//! QEMU parses such an image, and opens whatever other files it names. The child has our rights, so that images of people
//! who are not trusted need confinement around all of drive-backup.

mod child;
mod node;
mod process;
mod remote;
mod scratch;

pub use node::Node;
pub use remote::Remote;

use super::format::Foreign;
use super::nbd::{Nbd, Use};
use super::secret::Secret;
use super::{Image, Properties};
use crate::error::{Error, Kind, Result, Side};
use crate::ground::range::{ByteRange, Extent};
use crate::job::Job;
use child::Child;
use scratch::Scratch;
use std::ffi::{OsStr, OsString};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// The Debian package of QEMU's tools.
const PACKAGE: &str = "qemu-utils";
/// For qemu-img, which may have to reach what is behind a network: as long as a qemu-nbd has to open its image.
const IMG_TIMEOUT: Duration = Duration::from_secs(60);
/// Bytes of a read where QEMU's driver has to be asked for one at a time.
const SINGLE_READ: usize = 256 << 10;

/// How it is opened.
#[derive(Clone, Copy)]
pub struct Terms<'a> {
    /// Source: it is read; target: it is written.
    pub side: Side,
    /// What opens an encrypted image.
    pub secret: Option<&'a Secret>,
    /// Past the page cache.
    pub direct: bool,
    /// A target is flushed before success.
    pub flushes: bool,
    /// Others may write it meanwhile, and the copy be torn.
    pub shared: bool,
    /// It may have a backing file; else such an image is refused.
    pub backing: bool,
    /// Cancelled, it waits for nothing here; `None`: each wait has its bound alone.
    pub job: Option<&'a Job>,
}

impl Terms<'_> {
    /// `error`, unless it only comes of a cancelled job.
    fn unless_cancelled(&self, error: Error) -> Error {
        if self.job.is_some_and(Job::is_cancelled) { Error::new(Kind::Cancelled, "cancelled") } else { error }
    }
}

/// An image that a private qemu-nbd has open. Dropped, it kills it.
pub struct Qemu {
    /// Before the child: its connections are gone then.
    nbd: Nbd,
    child: Child,
    name: PathBuf,
    side: Side,
    /// Held during a read, where the driver loses reads that are under way at once.
    reading: Option<Mutex<()>>,
    /// Held during a change, where the driver fails when several are under way at once.
    changing: Option<Mutex<()>>,
}

impl Qemu {
    /// Starts a qemu-nbd on `node` and connects. Blocks up to a bound, or until the job is cancelled. [`Kind::Busy`] when
    /// another QEMU has the image; an error that names the package when there is no qemu-nbd.
    pub fn open(node: &Node<'_>, terms: Terms<'_>) -> Result<Self> {
        let program = tool("qemu-nbd", terms.side, &node.need())?;
        let image = node.argument(&terms)?;
        if !terms.backing {
            node.refuse_backing(&terms)?;
        }
        let failed = |error: io::Error| terms.unless_cancelled(node.failed(terms.side, "open", error));
        let mut arguments: Vec<OsString> = ["--persistent", "--shared=0", "--discard=unmap"].map(Into::into).into();
        arguments.push(format!("--cache={}", cache(&terms)).into());
        if terms.side != Side::Target {
            arguments.push("--read-only".into());
        }
        if terms.secret.is_some() {
            arguments.extend(node::secret_object("/dev/fd/4"));
        }
        arguments.extend(image);
        let child = Child::start(&program, &arguments, terms.secret).map_err(failed)?;
        let usage = Use { side: terms.side, flushes: terms.flushes, reconnect: Duration::ZERO };
        let nbd = child.unless_cancelled(terms.job, || Nbd::open_private(&child.address(), usage));
        let nbd = nbd.map_err(|error| failed(child.explain(error)))?;
        let reading = node.reads_one_by_one().then(Mutex::default);
        let changing = node.changes_one_by_one().then(Mutex::default);
        Ok(Self { nbd, child, name: node.name().to_owned(), side: terms.side, reading, changing })
    }

    /// The image was made a moment ago, and reads as zeroes: not every driver of QEMU says so.
    pub fn of_zeroes(self) -> Self {
        Self { nbd: self.nbd.of_zeroes(), ..self }
    }

    /// The files and devices that the image is made of, itself among them: extents, backing files. What leads to each as long as
    /// this lives, and its name.
    pub fn files(&self) -> io::Result<Vec<(PathBuf, PathBuf)>> {
        self.child.files()
    }

    /// Ends qemu-nbd, which closes the image: only then is all of it in the file. After a flush; blocks. The image is of no
    /// use afterwards.
    pub fn end(&self) -> Result<()> {
        self.child.end().map_err(|error| Error::file(self.side, "close", &self.name, error))
    }

    fn change(&self, change: impl FnOnce(&Nbd) -> io::Result<()>) -> io::Result<()> {
        let _one = self.changing.as_ref().map(lock);
        self.explain(change(&self.nbd))
    }

    fn explain<T>(&self, result: io::Result<T>) -> io::Result<T> {
        result.map_err(|error| if error.raw_os_error().is_some() { error } else { self.child.explain(error) })
    }
}

fn lock(one: &Mutex<()>) -> MutexGuard<'_, ()> {
    one.lock().unwrap_or_else(PoisonError::into_inner)
}

/// QEMU's cache mode.
fn cache(terms: &Terms<'_>) -> &'static str {
    match (terms.side, terms.direct, terms.flushes) {
        (_, true, _) => "none",
        (Side::Target, false, false) => "unsafe",
        _ => "writeback",
    }
}

impl Image for Qemu {
    fn length(&self) -> u64 {
        self.nbd.length()
    }

    fn block_status(&self, range: ByteRange) -> io::Result<Extent> {
        self.explain(self.nbd.block_status(range))
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let Some(reading) = &self.reading else { return self.explain(self.nbd.read_at(buf, offset)) };
        let _one = lock(reading);
        for (piece, offset) in buf.chunks_mut(SINGLE_READ).zip((offset..).step_by(SINGLE_READ)) {
            self.explain(self.nbd.read_at(piece, offset))?;
        }
        Ok(())
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.change(|nbd| nbd.write_at(buf, offset))
    }

    fn write_zeroes(&self, range: ByteRange) -> io::Result<()> {
        self.change(|nbd| nbd.write_zeroes(range))
    }

    fn discard(&self, range: ByteRange) -> io::Result<()> {
        self.change(|nbd| nbd.discard(range))
    }

    fn flush(&self) -> io::Result<()> {
        self.explain(self.nbd.flush())
    }

    fn properties(&self) -> Properties {
        self.nbd.properties()
    }

    fn abandon(&self) {
        self.child.kill();
    }
}

/// Makes an empty image of `length` bytes, under the name that it will have, in the file `partial`, which exists.
///
/// VMDK writes its own name into itself: that is why it is made through a link.
pub fn create_file(partial: &Path, name: &Path, format: Foreign, length: u64, terms: &Terms<'_>) -> Result<()> {
    let failed = |error| Error::file(Side::Target, "create", name, error);
    let folder = Scratch::new().map_err(failed)?;
    let link = folder.join(name.file_name().unwrap_or("image".as_ref()));
    std::path::absolute(partial)
        .and_then(|partial| std::os::unix::fs::symlink(partial, &link))
        .map_err(failed)
        .and_then(|()| create(&Node::File { path: &link, name, format }, length, terms))
}

/// Makes an empty image of `length` bytes where `node` is. [`Kind::Target`]. Blocks up to a bound, or until the job is
/// cancelled.
pub fn create(node: &Node<'_>, length: u64, terms: &Terms<'_>) -> Result<()> {
    let program = tool("qemu-img", Side::Target, &node.need())?;
    let mut arguments = words([&"create", &"-q"]);
    if terms.secret.is_some() {
        arguments.extend(node::secret_object("/dev/stdin"));
    }
    arguments.extend(node.create_options());
    arguments.push(node.place());
    arguments.push(length.to_string().into());
    let made = process::run(&program, &arguments, terms.secret, IMG_TIMEOUT, terms.job);
    made.map(drop).map_err(|error| terms.unless_cancelled(node.failed(Side::Target, "create", error)))
}

/// Refuses a format that takes a secret without one. [`Kind::Usage`].
pub fn check_secret(format: Foreign, secret: Option<&Secret>, name: &Path) -> Result<()> {
    if format.is_encrypted() && secret.is_none() {
        let what = format!("'{}': {} needs a --secret", name.display(), format.name());
        return Err(Error::new(Kind::Usage, what));
    }
    Ok(())
}

/// The path of one of QEMU's tools; without it an error of `side` that names the package.
fn tool(name: &str, side: Side, what: &str) -> Result<PathBuf> {
    let folders = std::env::var_os("PATH").unwrap_or_else(|| "/usr/sbin:/usr/bin:/sbin:/bin".into());
    let is_program = |path: &PathBuf| rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok() && path.is_file();
    std::env::split_paths(&folders).map(|folder| folder.join(name)).find(is_program).ok_or_else(|| {
        let raw = if side == Side::Source { "; with --source-format raw its bytes are copied as they are" } else { "" };
        let why = format!("{side} {what} needs {name}, which is not installed: it is in the package {PACKAGE}{raw}");
        Error::new(kind_of(side), why)
    })
}

/// What a failure of one end is.
fn kind_of(side: Side) -> Kind {
    if side == Side::Target { Kind::Target } else { Kind::Source }
}

/// Arguments from words.
fn words<const N: usize>(words: [&dyn AsRef<OsStr>; N]) -> Vec<OsString> {
    words.iter().map(|word| word.as_ref().to_owned()).collect()
}
