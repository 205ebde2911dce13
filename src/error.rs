//! What can end a backup: `{kind, what, where, why}`. Match on the kind, never on the text.

use crate::ground::range::ByteRange;
use std::path::{Path, PathBuf};
use std::{fmt, io};

/// Which promise failed. The command line turns it into an exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The request makes no sense; nothing was touched.
    Usage,
    /// The source cannot be opened, read or understood, or it changed while it was copied.
    Source,
    /// The target cannot be created, written, flushed or renamed.
    Target,
    /// The point in time was lost: overlay full, capture failed or timed out, a writer broke away.
    InstantLost,
    /// Verification found a difference.
    Differs,
    /// Source or target is locked, the target is mounted, or another backup of it runs; nothing was touched.
    Busy,
    /// A command of the user failed.
    Hook,
    /// A deadline passed before the copy was complete.
    Deadline,
    /// Cancelled on request.
    Cancelled,
    /// Anything else.
    Other,
}

/// Which end of the copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// What is read.
    Source,
    /// What is written.
    Target,
    /// Where overwritten clusters are saved.
    Overlay,
    /// What is served.
    Disk,
}

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Source => "source",
            Self::Target => "target",
            Self::Overlay => "overlay",
            Self::Disk => "disk",
        })
    }
}

/// Where an I/O error happened.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Place {
    /// Which end.
    pub side: Side,
    /// What was being done: a verb, such as "open", "read", "write", "flush", "rename".
    pub during: &'static str,
    /// The file or device, where one name says more than the side alone.
    pub path: Option<PathBuf>,
    /// The bytes, where it was about bytes.
    pub range: Option<ByteRange>,
}

/// An error of the backup, whole: what, where, which side, why.
#[derive(Debug)]
pub struct Error {
    kind: Kind,
    what: String,
    place: Option<Box<Place>>,
    source: Option<io::Error>,
    differences: Vec<ByteRange>,
}

/// The result of everything that can end a backup.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// A refusal or a finding that is not an I/O error. `what` is one full line, without a full stop.
    pub fn new(kind: Kind, what: impl Into<String>) -> Self {
        Self { kind, what: what.into(), place: None, source: None, differences: Vec::new() }
    }

    /// A comparison that failed: `what` was compared, in one line, and where it differs, ascending.
    pub fn differs(what: impl Into<String>, differences: Vec<ByteRange>) -> Self {
        Self { differences, ..Self::new(Kind::Differs, what) }
    }

    /// An I/O error on bytes of one side: `write target at 0x40000+65536: No space left on device`.
    pub fn io(side: Side, during: &'static str, range: ByteRange, source: io::Error) -> Self {
        let what = format!("{during} {side} at {range}");
        Self::at(Place { side, during, path: None, range: Some(range) }, what, source)
    }

    /// An I/O error on a file as a whole: `open source 'disk.raw': No such file or directory`.
    pub fn file(side: Side, during: &'static str, path: &Path, source: io::Error) -> Self {
        let what = format!("{during} {side} '{}'", path.display());
        Self::at(Place { side, during, path: Some(path.to_owned()), range: None }, what, source)
    }

    /// An error of the system that is not about one side's bytes: `open writer folder '/run/x': Permission denied`.
    pub fn system(kind: Kind, what: impl Into<String>, source: io::Error) -> Self {
        Self { kind, what: what.into(), place: None, source: Some(source), differences: Vec::new() }
    }

    fn at(place: Place, what: String, source: io::Error) -> Self {
        let kind = match place.side {
            Side::Source | Side::Disk => Kind::Source,
            Side::Target => Kind::Target,
            Side::Overlay => Kind::InstantLost,
        };
        Self { kind, what, place: Some(Box::new(place)), source: Some(source), differences: Vec::new() }
    }

    /// The same error under another kind, where the side alone decides wrongly.
    pub fn with_kind(self, kind: Kind) -> Self {
        Self { kind, ..self }
    }

    /// The same error, with what was done about it.
    pub fn with_note(mut self, note: &str) -> Self {
        self.what = format!("{}; {note}", self.what);
        self
    }

    /// Which promise failed.
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// Where, for an I/O error.
    pub fn place(&self) -> Option<&Place> {
        self.place.as_deref()
    }

    /// The ranges that differ, where a comparison failed.
    pub fn differences(&self) -> &[ByteRange] {
        &self.differences
    }

    /// What sort of I/O error it was, where it was one.
    pub fn io_kind(&self) -> Option<io::ErrorKind> {
        self.source.as_ref().map(io::Error::kind)
    }

    /// The system's error number, for an I/O error that has one. A limit of our own that is reached is ENOSPC.
    pub fn errno(&self) -> Option<i32> {
        let source = self.source.as_ref()?;
        let full = || (source.kind() == io::ErrorKind::StorageFull).then_some(nix::libc::ENOSPC);
        source.raw_os_error().or_else(full)
    }
}

/// The system's words for `error`, without Rust's "(os error N)".
pub fn reason(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(errno) => {
            let text = error.to_string();
            text.strip_suffix(&format!(" (os error {errno})")).unwrap_or(&text).to_owned()
        }
        None => error.to_string(),
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.source {
            Some(source) => write!(f, "{}: {}", self.what, reason(source)),
            None => f.write_str(&self.what),
        }
    }
}

impl std::error::Error for Error {}

#[cfg(test)]
mod tests {
    use super::*;

    fn system(errno: i32) -> io::Error {
        io::Error::from_raw_os_error(errno)
    }

    #[test]
    fn an_io_error_says_what_side_where_and_why() {
        let range = ByteRange::new(0x40000, 65536);
        for (side, name, kind) in [
            (Side::Source, "source", Kind::Source),
            (Side::Target, "target", Kind::Target),
            (Side::Overlay, "overlay", Kind::InstantLost),
            (Side::Disk, "disk", Kind::Source),
        ] {
            let error = Error::io(side, "write", range, system(nix::libc::ENOSPC));
            assert_eq!(error.to_string(), format!("write {name} at 0x40000+65536: No space left on device"));
            assert_eq!(error.kind(), kind);
            assert_eq!(error.place(), Some(&Place { side, during: "write", path: None, range: Some(range) }));
            assert_eq!((error.errno(), error.io_kind()), (Some(nix::libc::ENOSPC), Some(io::ErrorKind::StorageFull)));
        }
    }

    #[test]
    fn an_error_of_a_file_names_it() {
        let error = Error::file(Side::Source, "open", Path::new("disk.raw"), system(nix::libc::ENOENT));
        assert_eq!(error.to_string(), "open source 'disk.raw': No such file or directory");
        assert_eq!((error.kind(), error.errno()), (Kind::Source, Some(nix::libc::ENOENT)));
        let path = Some(PathBuf::from("disk.raw"));
        assert_eq!(error.place(), Some(&Place { side: Side::Source, during: "open", path, range: None }));
    }

    #[test]
    fn an_error_of_the_system_has_no_side() {
        let error = Error::system(Kind::Other, "open writer folder '/run/x'", system(nix::libc::EACCES));
        assert_eq!(error.to_string(), "open writer folder '/run/x': Permission denied");
        assert_eq!((error.kind(), error.place(), error.errno()), (Kind::Other, None, Some(nix::libc::EACCES)));
    }

    #[test]
    fn a_refusal_is_no_io_error() {
        let error = Error::new(Kind::Busy, "another backup of it runs");
        assert_eq!(error.to_string(), "another backup of it runs");
        assert_eq!((error.kind(), error.place(), error.errno(), error.io_kind()), (Kind::Busy, None, None, None));
        assert_eq!(error.differences(), []);
    }

    #[test]
    fn a_comparison_that_failed_knows_where() {
        let places = [ByteRange::new(0, 1), ByteRange::new(7, 2)];
        let error = Error::differs("the copy differs", places.to_vec());
        assert_eq!(
            (error.kind(), error.differences(), error.to_string()),
            (Kind::Differs, &places[..], "the copy differs".into())
        );
    }

    #[test]
    fn an_error_takes_another_kind_and_a_note() {
        let error = Error::file(Side::Target, "open", Path::new("copy"), system(nix::libc::EBUSY));
        let error = error.with_kind(Kind::Busy).with_note("the target is as it was");
        assert_eq!(error.kind(), Kind::Busy);
        assert_eq!(error.to_string(), "open target 'copy'; the target is as it was: Device or resource busy");
        assert_eq!(error.errno(), Some(nix::libc::EBUSY));
    }

    #[test]
    fn a_limit_of_our_own_that_is_reached_is_enospc() {
        let own =
            |kind| Error::io(Side::Overlay, "write", ByteRange::new(0, 1), io::Error::new(kind, "over its limit"));
        let full = own(io::ErrorKind::StorageFull);
        assert_eq!(
            (full.errno(), full.to_string()),
            (Some(nix::libc::ENOSPC), "write overlay at 0x0+1: over its limit".into())
        );
        assert_eq!(own(io::ErrorKind::InvalidData).errno(), None);
    }
}
