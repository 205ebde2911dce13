//! Storage that QEMU's block drivers reach, as QEMU writes it.

use crate::image::location::{RBD, without_password};
use std::fmt;
use std::path::{Path, PathBuf};

/// A disk behind one of QEMU's protocols: `rbd:pool/image`, `ssh://host/path`, `https://…`, `iscsi://…`.
#[derive(Clone, PartialEq, Eq)]
pub struct Remote {
    word: String,
    scheme: &'static str,
    shown: PathBuf,
}

/// Scheme, and whether what it leads to is a file: something whose format its content tells, unlike a volume.
const SCHEMES: [(&str, bool); 11] = [
    ("ssh", true),
    ("http", true),
    ("https", true),
    ("ftp", true),
    ("ftps", true),
    ("nfs", true),
    ("gluster", true),
    ("gluster+tcp", true),
    ("gluster+unix", true),
    ("iscsi", false),
    ("iser", false),
];

impl Remote {
    /// `None`: it is a path.
    pub fn parse(word: &str) -> Option<Self> {
        let scheme = match word.split_once("://") {
            _ if word.starts_with(RBD) => "rbd",
            Some((scheme, _)) => SCHEMES.iter().find(|(known, _)| scheme.eq_ignore_ascii_case(known))?.0,
            None => return None,
        };
        Some(Self { word: word.to_owned(), scheme, shown: without_password(word).into() })
    }

    /// For QEMU. It may have a password in it.
    pub fn word(&self) -> &str {
        &self.word
    }

    /// For people: a password in it is left out.
    pub fn name(&self) -> &Path {
        &self.shown
    }

    /// In lower case.
    pub fn scheme(&self) -> &'static str {
        self.scheme
    }

    /// Its content may tell its format. A volume is the disk itself unless somebody says otherwise.
    pub fn is_file(&self) -> bool {
        SCHEMES.contains(&(self.scheme, true))
    }

    /// QEMU only reads there.
    pub fn is_read_only(&self) -> bool {
        self.is_by_curl()
    }

    /// It is QEMU's curl driver that reaches it.
    pub fn is_by_curl(&self) -> bool {
        ["http", "https", "ftp", "ftps"].contains(&self.scheme)
    }

    /// `text`, in which QEMU repeats the word, without its password.
    pub fn hidden_in(&self, text: &str) -> String {
        text.replace(&self.word, &self.shown.to_string_lossy())
    }
}

impl fmt::Debug for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Remote({})", self.shown.display())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_a_scheme_of_qemu_is_no_path() {
        for (word, scheme, is_file, is_read_only) in [
            ("rbd:pool/image", "rbd", false, false),
            ("ssh://host/x", "ssh", true, false),
            ("HTTPS://host/x", "https", true, true),
            ("iscsi://h/iqn.x/0", "iscsi", false, false),
        ] {
            let found = Remote::parse(word).unwrap();
            let seen = (found.scheme(), found.is_file(), found.is_read_only(), found.word());
            assert_eq!(seen, (scheme, is_file, is_read_only, word));
        }
        for path in ["disk", "./rbd:x", "/a/ssh://x", "x:y", "json:{}", "file:x", "fat:rw:/etc", "nbd://h", "ssh:x"] {
            assert_eq!(Remote::parse(path), None, "{path}");
        }
    }

    #[test]
    fn a_password_is_not_shown() {
        for (word, expected) in [
            ("https://alice:hunter2@h/x", "https://alice:…@h/x"),
            ("https://alice:hunt@er2@h/x@y", "https://alice:…@h/x@y"),
            ("iscsi://alice%hunter2@h/t/0", "iscsi://alice%…@h/t/0"),
            ("ssh://alice@h/x:y@z", "ssh://alice@h/x:y@z"),
            ("rbd:p/i:id=a:key=hunter2:conf=/c", "rbd:p/i:id=a:key=…:conf=/c"),
            ("https://h/x", "https://h/x"),
        ] {
            let remote = Remote::parse(word).unwrap();
            assert_eq!(remote.name(), Path::new(expected));
            assert!(!format!("{remote:?}").contains("hunter2"));
            assert_eq!(remote.hidden_in(&format!("open {word}: no")), format!("open {expected}: no"));
        }
    }
}
