//! A small file that is always whole: its readers see the old contents or the new.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};

/// Puts `bytes` in the place of what `path` names. Not flushed: after a power cut the old contents are as good. A symbolic
/// link to a file is replaced; what else is there, such as a device, is not. On an error, in one line, the old contents stay.
pub fn replace(path: &Path, bytes: &[u8]) -> Result<(), String> {
    if is_no_file(path) {
        return Err(format!("write '{}': it is there, and is not a regular file", path.display()));
    }
    let beside = beside(path);
    // Never through a link that somebody else has put there.
    let create = || File::options().write(true).create_new(true).open(&beside);
    let created = match create() {
        Err(error) if error.kind() == ErrorKind::AlreadyExists => fs::remove_file(&beside).and_then(|()| create()),
        created => created,
    };
    let written = created.and_then(|mut file| file.write_all(bytes));
    written.and_then(|()| fs::rename(&beside, path)).map_err(|error| {
        // Whatever is there is ours.
        let _ = fs::remove_file(&beside);
        format!("write '{}': {error}", path.display())
    })
}

/// What there is can't be replaced without harm. That of a standard stream, a link into /proc, leads to a file now and then.
fn is_no_file(path: &Path) -> bool {
    let is_stream = fs::read_link(path).is_ok_and(|leads_to| leads_to.starts_with("/proc"));
    is_stream || fs::metadata(path).is_ok_and(|found| !found.is_file())
}

/// Hidden, and of no extension that a collector looks for.
fn beside(path: &Path) -> PathBuf {
    let mut name = OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(format!(".{}", std::process::id()));
    path.with_file_name(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn contents_are_replaced_and_nothing_else_is_left() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("status");
        for bytes in [&b"a long first one"[..], b"short", b""] {
            replace(&path, bytes).unwrap();
            assert_eq!(fs::read(&path).unwrap(), bytes);
        }
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_link_in_the_way_is_not_followed() {
        let folder = tempfile::tempdir().unwrap();
        let (path, precious) = (folder.path().join("status"), folder.path().join("precious"));
        fs::write(&precious, "precious").unwrap();
        std::os::unix::fs::symlink(&precious, beside(&path)).unwrap();
        replace(&path, b"news").unwrap();
        assert_eq!((fs::read(&path).unwrap(), fs::read(&precious).unwrap()), (b"news".to_vec(), b"precious".to_vec()));
    }

    #[test]
    fn only_a_regular_file_or_a_link_to_one_is_replaced() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        let _socket = std::os::unix::net::UnixListener::bind(at("socket")).unwrap();
        fs::write(at("file"), "old").unwrap();
        let links = [("null", "/dev/null"), ("to socket", "socket"), ("stderr", "/proc/self/fd/2")];
        for (name, leads_to) in links.into_iter().chain([("link", "file"), ("dangling", "missing")]) {
            std::os::unix::fs::symlink(leads_to, at(name)).unwrap();
        }
        for name in ["socket", "null", "to socket", "stderr"] {
            let before = fs::symlink_metadata(at(name)).unwrap().file_type();
            let why = replace(&at(name), b"news").expect_err(name);
            assert!(why.ends_with(&format!("{name}': it is there, and is not a regular file")), "{why}");
            assert_eq!(fs::symlink_metadata(at(name)).unwrap().file_type(), before, "{name}");
        }
        for name in ["link", "dangling"] {
            replace(&at(name), b"news").unwrap();
            assert!(fs::symlink_metadata(at(name)).unwrap().is_file(), "{name}");
        }
        assert_eq!(fs::read(at("file")).unwrap(), b"old");
    }

    #[test]
    fn what_can_not_be_written_is_named_and_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let missing = folder.path().join("missing/status");
        assert!(replace(&missing, b"x").unwrap_err().contains("missing/status': No such file"));
        fs::create_dir(folder.path().join("taken")).unwrap();
        assert!(replace(&folder.path().join("taken"), b"x").is_err());
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }
}
