//! Where a disk is: a path of this machine, or something that is reached otherwise.

use crate::error::Result;
use std::fmt;
use std::path::{Path, PathBuf};

/// A source or a target, as it was named.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Location {
    /// A file or a block device.
    Path(PathBuf),
}

impl Location {
    /// From a command line's word. What has no scheme of ours is a path; one that looks like a scheme is written `./x:y`.
    pub fn parse(word: &Path) -> Result<Self> {
        Ok(Self::Path(word.to_owned()))
    }

    /// The path, if it is one.
    pub fn path(&self) -> Option<&Path> {
        match self {
            Self::Path(path) => Some(path),
        }
    }

    /// As messages and records name it, whatever it is: for a path the path. Never to be opened.
    pub fn name(&self) -> &Path {
        match self {
            Self::Path(path) => path,
        }
    }
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
