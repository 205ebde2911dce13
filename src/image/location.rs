//! Where a disk is: a path of this machine, or something that is reached otherwise.

use crate::error::{Error, Kind, Result};
#[cfg(feature = "nbd")]
use crate::image::qemu::Remote;
#[cfg(feature = "nbd")]
use crate::nbd::uri::Uri;
use std::fmt;
use std::path::{Path, PathBuf};

/// A source or a target, as it was named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Location {
    /// A file or a block device.
    Path(PathBuf),
    /// An export of an NBD server.
    #[cfg(feature = "nbd")]
    Nbd(Uri),
    /// Something that QEMU reaches.
    #[cfg(feature = "nbd")]
    Qemu(Remote),
}

impl Location {
    /// From a command line's word. What has no scheme of ours is a path; one that looks like a scheme is written `./x:y`.
    pub fn parse(word: &Path) -> Result<Self> {
        match word.to_str().filter(|word| is_nbd(word)) {
            Some(word) => Self::of_nbd(word),
            None => Ok(Self::of_qemu(word).unwrap_or_else(|| Self::Path(word.to_owned()))),
        }
    }

    #[cfg(feature = "nbd")]
    fn of_qemu(word: &Path) -> Option<Self> {
        word.to_str().and_then(Remote::parse).map(Self::Qemu)
    }

    #[cfg(not(feature = "nbd"))]
    fn of_qemu(_: &Path) -> Option<Self> {
        None
    }

    #[cfg(feature = "nbd")]
    fn of_nbd(word: &str) -> Result<Self> {
        word.parse().map(Self::Nbd)
    }

    #[cfg(not(feature = "nbd"))]
    fn of_nbd(_: &str) -> Result<Self> {
        Err(Error::new(Kind::Usage, "this drive-backup was built without NBD"))
    }

    /// The path, if it is one.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Path(path) => Some(path),
            #[cfg(feature = "nbd")]
            Self::Nbd(_) | Self::Qemu(_) => None,
        }
    }

    /// As messages and records name it, whatever it is: for a path the path. Never to be opened.
    pub fn name(&self) -> &Path {
        match self {
            Self::Path(path) => path,
            #[cfg(feature = "nbd")]
            Self::Nbd(uri) => Path::new(uri.text()),
            #[cfg(feature = "nbd")]
            Self::Qemu(remote) => remote.name(),
        }
    }

    /// Refuses a target that is the source by name. What two names of one disk have in common is for the files' own
    /// identity to say, or for a server that we can't ask. [`Kind::Usage`].
    pub fn refuse_as_target(&self, target: &Self) -> Result<()> {
        let is_same = match (self, target) {
            #[cfg(feature = "nbd")]
            (Self::Nbd(one), Self::Nbd(other)) => one.address == other.address && one.export == other.export,
            #[cfg(feature = "nbd")]
            (Self::Qemu(one), Self::Qemu(other)) => one == other,
            _ => false,
        };
        if is_same {
            let what = format!("source and target cannot be the same: '{target}' is '{self}'");
            return Err(Error::new(Kind::Usage, what));
        }
        Ok(())
    }
}

/// Without the feature too: a URI is not a path then either.
fn is_nbd(word: &str) -> bool {
    let scheme = word.split_once("://").map_or("", |(scheme, _)| scheme).to_ascii_lowercase();
    ["nbd", "nbds", "nbd+unix", "nbds+unix", "nbd+vsock", "nbds+vsock"].contains(&scheme.as_str())
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.name().display().fmt(f)
    }
}

impl<P: Into<PathBuf>> From<P> for Location {
    /// A path, whatever it looks like.
    fn from(path: P) -> Self {
        Self::Path(path.into())
    }
}
