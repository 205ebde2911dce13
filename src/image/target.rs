//! Targets that are written in place: a block device, or an image that exists.

use super::identity;
use super::lock::{self, Mark, Protection, Terms};
use super::medium::{self, Access};
use super::raw::Raw;
use crate::error::{Error, Kind, Result, Side};
use std::fs::File;
use std::io;
use std::path::Path;

/// An existing file or device, ours alone until it is dropped.
#[derive(Debug)]
pub struct InPlace {
    /// Its bytes.
    pub image: Raw,
    /// The locks that keep others out, or why there are none.
    pub protection: Protection,
}

/// Opens `path`, which exists, for writing in place, and changes nothing yet. What is read there then is what the medium has,
/// whatever became of earlier writes. Blocks while what others wrote is flushed.
///
/// [`Kind::Busy`] when it is mounted, swapped to, claimed, or locked by anybody, a reader too. Whether it is the
/// source is [`identity::refuse_same`]'s to say.
pub fn open_in_place(path: &Path) -> Result<InPlace> {
    open_alone(path, Side::Target)
}

/// [`open_in_place`] for whatever is written where it is; `side` says what it is called, and of which kind its errors are.
pub fn open_alone(path: &Path, side: Side) -> Result<InPlace> {
    identity::refuse_in_use(path, side)?;
    let (file, _) = medium::open(path, Access::Write, side)?;
    let protection = lock::acquire(&file, path, side, Terms::Write)?;
    refuse_published(&file, path, side)?;
    medium::settle(&file).map_err(|e| Error::file(side, "flush", path, e))?;
    let image = Raw::of(file).map_err(|e| Error::file(side, "open", path, e))?;
    Ok(InPlace { image, protection })
}

/// A backup that is about to publish under this name has marked the old file: what is written to that would be lost.
fn refuse_published(file: &File, path: &Path, side: Side) -> Result<()> {
    match lock::mark(file, Mark::Exclusive) {
        Ok(true) => Ok(()),
        Ok(false) => {
            Err(Error::new(Kind::Busy, format!("another backup is about to replace {side} '{}'", path.display())))
        }
        Err(e) if e.kind() == io::ErrorKind::Unsupported => Ok(()),
        Err(e) => Err(Error::file(side, "lock", path, e)),
    }
}

/// Refuses a target whose size in bytes differs from the source's: a smaller one can't hold it, and in a larger one
/// old bytes would follow the copy. [`Kind::Usage`].
pub fn refuse_other_size(source: u64, path: &Path, target: u64) -> Result<()> {
    if source == target {
        return Ok(());
    }
    let which = if target < source { "too small" } else { "too large" };
    let what = format!(
        "source and target image have different sizes: target '{}' is {which} with {target} bytes, the source has {source}",
        path.display()
    );
    Err(Error::new(Kind::Usage, what))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::Image;
    use crate::image::fixture::{LoopDevice, Mount, QemuIo, run, sparse_file, text};
    use std::os::unix::fs::FileExt;

    fn image(folder: &tempfile::TempDir) -> std::path::PathBuf {
        let path = folder.path().join("disk.raw");
        sparse_file(&path, 1 << 20);
        path
    }

    #[test]
    fn a_file_and_a_device_are_opened_once() {
        let folder = tempfile::tempdir().unwrap();
        let path = image(&folder);
        let first = open_in_place(&path).unwrap();
        assert!(matches!(first.protection, Protection::Locked(_)));
        assert_eq!(open_in_place(&path).unwrap_err().kind(), Kind::Busy);
        drop(first);
        let device = LoopDevice::over(&path, &[]);
        let first = open_in_place(device.path()).unwrap();
        assert_eq!(open_in_place(device.path()).unwrap_err().kind(), Kind::Busy);
        first.image.write_at(b"abc", 5).unwrap();
    }

    /// The kernel keeps what could not be written, takes it for written, and tells those alone who had it open.
    #[test]
    fn what_an_earlier_flush_lost_is_told_or_not_there() {
        let pool = Mount::tmpfs(4 << 20);
        sparse_file(&pool.join("disk"), 16 << 20);
        let device = LoopDevice::over(&pool.join("disk"), &[]);
        let earlier = File::options().write(true).open(device.path()).unwrap();
        earlier.write_all_at(&vec![7; 8 << 20], 0).unwrap();
        let error = open_in_place(device.path()).unwrap_err();
        let told = format!("flush target '{}': ", device.path().display());
        assert!(error.to_string().starts_with(&told), "{error}");
        let InPlace { image, .. } = open_in_place(device.path()).unwrap();
        let mut found = vec![1; 8 << 20];
        image.read_at(&mut found, 0).unwrap();
        let lost = found.iter().filter(|byte| **byte == 0).count();
        assert!(lost >= 4 << 20, "{lost} bytes are not there");
    }

    #[test]
    fn an_image_that_a_qemu_reads_is_busy() {
        let folder = tempfile::tempdir().unwrap();
        let path = image(&folder);
        let _qemu = QemuIo::open(&path, &["-r"]);
        assert_eq!(open_in_place(&path).unwrap_err().kind(), Kind::Busy);
    }

    #[test]
    fn a_mounted_device_is_busy_and_so_is_the_file_behind_it() {
        let mount = Mount::fresh("ext4");
        let device = run("findmnt", &["-n", "-o", "SOURCE", text(mount.path())]);
        let file = run("losetup", &["-n", "-O", "BACK-FILE", &device]);
        for path in [&device, &file] {
            let error = open_in_place(Path::new(path)).unwrap_err();
            assert_eq!(error.kind(), Kind::Busy);
            assert_eq!(error.to_string(), format!("target '{path}' is mounted at '{}'", mount.path().display()));
        }
    }

    #[test]
    fn another_size_is_refused_and_the_same_is_not() {
        for (source, which) in
            [(2, "too large with 3 bytes, the source has 2"), (4, "too small with 3 bytes, the source has 4")]
        {
            let error = refuse_other_size(source, Path::new("disk.raw"), 3).unwrap_err();
            let expected = format!("source and target image have different sizes: target 'disk.raw' is {which}");
            assert_eq!((error.kind(), error.to_string()), (Kind::Usage, expected));
        }
        refuse_other_size(3, Path::new("disk.raw"), 3).unwrap();
    }

    #[test]
    fn what_does_not_exist_is_not_created() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("none");
        let error = open_in_place(&path).unwrap_err();
        assert_eq!(error.to_string(), format!("open target '{}': No such file or directory", path.display()));
        assert!(!path.exists());
    }
}
