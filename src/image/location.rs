//! Where a disk is: a path of this machine, or something that is reached otherwise.

use crate::error::{Error, Kind, Result};
#[cfg(feature = "nbd")]
use crate::image::qemu::Remote;
#[cfg(feature = "nbd")]
use crate::nbd::uri::Uri;
use std::fmt;
use std::path::{Path, PathBuf};

/// What begins a word that names a volume of Ceph.
pub const RBD: &str = "rbd:";

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
            None => Self::of_qemu(word)?.map_or_else(|| Ok(Self::Path(word.to_owned())), Ok),
        }
    }

    /// A word as messages name it, be it a location or not.
    pub fn shown(word: &Path) -> String {
        Self::parse(word).map_or_else(|_| without_password(&word.to_string_lossy()), |location| location.to_string())
    }

    #[cfg(feature = "nbd")]
    fn of_qemu(word: &Path) -> Result<Option<Self>> {
        let Some(text) = word.to_str() else { return Ok(None) };
        let remote = Remote::parse(text);
        if let (None, Some(hint)) = (&remote, hint_of(text)) {
            return Err(Error::new(
                Kind::Usage,
                format!("'{}' is no place that is known: {hint}", without_password(text)),
            ));
        }
        Ok(remote.map(Self::Qemu))
    }

    #[cfg(not(feature = "nbd"))]
    fn of_qemu(_: &Path) -> Result<Option<Self>> {
        Ok(None)
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

/// A URI, or what may be one, for people: what follows `user:` or `user%` before the host, and rbd's `key=`, are left out.
pub fn without_password(word: &str) -> String {
    if word.starts_with(RBD) {
        let parts = word.split(':').map(|part| if part.starts_with("key=") { "key=…" } else { part });
        return parts.collect::<Vec<_>>().join(":");
    }
    let start = word.find("://").map_or(0, |at| at + 3);
    let host = &word[start..];
    let host = &host[..host.find('/').unwrap_or(host.len())];
    let Some(at) = host.rfind('@') else { return word.to_owned() };
    match host[..at].find([':', '%']) {
        Some(user) => format!("{}{}…{}", &word[..start], &host[..=user], &word[start + at..]),
        None => word.to_owned(),
    }
}

/// Without the feature too: a URI is not a path then either.
fn is_nbd(word: &str) -> bool {
    let scheme = word.split_once("://").map_or("", |(scheme, _)| scheme).to_ascii_lowercase();
    ["nbd", "nbds", "nbd+unix", "nbds+unix", "nbd+vsock", "nbds+vsock"].contains(&scheme.as_str())
}

/// What to write instead of a word that is no path, though nobody has its scheme.
#[cfg(feature = "nbd")]
fn hint_of(word: &str) -> Option<&'static str> {
    let is_scheme = |scheme: &str| {
        let is_of_one = |c: char| c.is_ascii_alphanumeric() || "+-.".contains(c);
        scheme.starts_with(|c: char| c.is_ascii_alphabetic()) && scheme.chars().all(is_of_one)
    };
    match word.split_once("://") {
        _ if word.starts_with("nbd:") => Some("write nbd://HOST:PORT/EXPORT or nbd+unix:///EXPORT?socket=PATH"),
        Some((scheme, _)) if scheme.eq_ignore_ascii_case("file") => Some("write the path alone"),
        Some((scheme, _)) if is_scheme(scheme) => Some(
            "schemes are nbd, nbds, nbd+unix, nbds+unix, ssh, http, https, ftp, ftps, nfs, gluster, iscsi, iser and rbd:",
        ),
        _ => None,
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

#[cfg(all(test, feature = "nbd"))]
mod tests {
    use super::*;

    #[test]
    fn a_scheme_that_nobody_has_is_refused_with_a_hint_and_a_path_is_a_path() {
        for (word, hint) in [
            ("nbd:localhost:10809", "write nbd://HOST:PORT"),
            ("file:///srv/disk.raw", "write the path alone"),
            ("s3://bucket/disk", "schemes are nbd, "),
            ("s3://alice:…@bucket/disk", "schemes are nbd, "),
        ] {
            let error = Location::parse(Path::new(&word.replace('…', "hunter2"))).unwrap_err();
            assert_eq!(error.kind(), Kind::Usage);
            assert!(error.to_string().starts_with(&format!("'{word}' is no place that is known: {hint}")), "{error}");
        }
        for word in ["a:b.raw", "./nbd:x", "./s3://x", "dir/x://y", "C:\\disk", "a//b"] {
            assert_eq!(Location::parse(Path::new(word)).unwrap(), Location::from(word));
        }
    }
}
