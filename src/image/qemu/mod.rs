//! What only QEMU can open, through a private qemu-nbd: the formats of [`Foreign`], and storage that is a [`Remote`].
//!
//! QEMU parses such an image, and opens whatever other files it names. The child has our rights, so that images of people
//! who are not trusted need confinement around all of drive-backup.

mod child;
mod node;
mod remote;

pub use node::Node;
pub use remote::Remote;

use super::format::Foreign;
use super::nbd::{Nbd, Use};
use super::secret::Secret;
use super::{Image, Properties};
use crate::error::{Error, Kind, Result, Side};
use crate::ground::range::{ByteRange, Extent};
use child::Child;
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

/// How it is opened.
#[derive(Clone, Copy, Debug)]
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
}

/// An image that a private qemu-nbd has open. Dropped, it kills it.
pub struct Qemu {
    /// Before the child: its connections are gone then.
    nbd: Nbd,
    child: Child,
    name: PathBuf,
    side: Side,
}

impl Qemu {
    /// Starts a qemu-nbd on `node` and connects. Blocks up to a bound. [`Kind::Busy`] when another QEMU has the image;
    /// an error that names the package when there is no qemu-nbd.
    pub fn open(node: &Node<'_>, terms: Terms<'_>) -> Result<Self> {
        let program = child::tool("qemu-nbd", terms.side, &node.need())?;
        let image = node.argument(&terms)?;
        if !terms.backing {
            node.refuse_backing(&terms)?;
        }
        let failed = |error: io::Error| node.failed(terms.side, "open", error);
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
        let nbd = Nbd::open_private(&child.address(), usage).map_err(|error| failed(child.explain(error)))?;
        Ok(Self { nbd, child, name: node.name().to_owned(), side: terms.side })
    }

    /// Ends qemu-nbd, which closes the image: only then is all of it in the file. After a flush; blocks. The image is of no
    /// use afterwards.
    pub fn end(&self) -> Result<()> {
        self.child.end().map_err(|error| Error::file(self.side, "close", &self.name, error))
    }

    fn explain<T>(&self, result: io::Result<T>) -> io::Result<T> {
        result.map_err(|error| if error.raw_os_error().is_some() { error } else { self.child.explain(error) })
    }
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
        self.explain(self.nbd.read_at(buf, offset))
    }

    fn write_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.explain(self.nbd.write_at(buf, offset))
    }

    fn write_zeroes(&self, range: ByteRange) -> io::Result<()> {
        self.explain(self.nbd.write_zeroes(range))
    }

    fn discard(&self, range: ByteRange) -> io::Result<()> {
        self.explain(self.nbd.discard(range))
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
pub fn create_file(partial: &Path, name: &Path, format: Foreign, length: u64, secret: Option<&Secret>) -> Result<()> {
    let failed = |error| Error::file(Side::Target, "create", name, error);
    let folder = nix::unistd::mkdtemp(&std::env::temp_dir().join("drive-backup-XXXXXX"));
    let folder = folder.map_err(|errno| failed(errno.into()))?;
    let link = folder.join(name.file_name().unwrap_or("image".as_ref()));
    let made = std::path::absolute(partial)
        .and_then(|partial| std::os::unix::fs::symlink(partial, &link))
        .map_err(failed)
        .and_then(|()| create(&Node::File { path: &link, name, format }, length, secret));
    // What can't be removed is a link in a folder for temporary files.
    let _ = std::fs::remove_file(&link);
    let _ = std::fs::remove_dir(&folder);
    made
}

/// Makes an empty image of `length` bytes where `node` is. [`Kind::Target`].
pub fn create(node: &Node<'_>, length: u64, secret: Option<&Secret>) -> Result<()> {
    let program = child::tool("qemu-img", Side::Target, &node.need())?;
    let mut arguments = child::words([&"create", &"-q"]);
    if secret.is_some() {
        arguments.extend(node::secret_object("/dev/stdin"));
    }
    arguments.extend(node.create_options());
    arguments.push(node.place());
    arguments.push(length.to_string().into());
    let made = child::run(&program, &arguments, secret);
    made.map(drop).map_err(|error| node.failed(Side::Target, "create", error))
}

/// Refuses a format that takes a secret without one. [`Kind::Usage`].
pub fn check_secret(format: Foreign, secret: Option<&Secret>, name: &Path) -> Result<()> {
    if format.is_encrypted() && secret.is_none() {
        let what = format!("'{}': {} needs a --secret", name.display(), format.name());
        return Err(Error::new(Kind::Usage, what));
    }
    Ok(())
}
