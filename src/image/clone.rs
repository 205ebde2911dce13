//! A point-in-time clone of a file in one system call, where the file system shares extents (xfs, btrfs, …).

use rustix::fs::{Mode, OFlags};
use rustix::io::{Errno, retry_on_intr};
use std::fs::File;
use std::io;
use std::path::Path;

/// A clone of `source` in a file without a name in `folder`, which must be of the same file system: it is gone with
/// its last descriptor, and costs space only for what `source` changes afterwards. Open for reading and writing.
///
/// `None` where file system, space or permissions don't allow it. Blocks while dirty pages of `source` are written.
pub fn clone_unlinked(source: &File, folder: &Path) -> io::Result<Option<File>> {
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let clone = match retry_on_intr(|| rustix::fs::open(folder, flags, Mode::RUSR | Mode::WUSR)) {
        Ok(fd) => File::from(fd),
        // A kernel or file system without O_TMPFILE takes the call for an attempt to write the folder.
        Err(errno) if is_refusal(errno) || matches!(errno, Errno::ISDIR | Errno::NOENT) => return Ok(None),
        Err(errno) => return Err(errno.into()),
    };
    Ok(clone_into(source, &clone)?.then_some(clone))
}

/// Makes the fresh file `target`, which reads as zeroes, a clone of `source`. False, with `target` as it was, where file
/// system, space or permissions don't allow it; such as when the two are not on one file system.
pub fn clone_into(source: &File, target: &File) -> io::Result<bool> {
    loop {
        match rustix::fs::ioctl_ficlone(target, source) {
            Ok(()) => return Ok(true),
            Err(Errno::INTR) => {}
            Err(errno) if is_refusal(errno) => {
                if matches!(errno, Errno::NOSPC | Errno::DQUOT | Errno::IO) {
                    // What was cloned before the disk was full must not be taken for zeroes.
                    let length = target.metadata()?.len();
                    target.set_len(0)?;
                    target.set_len(length)?;
                }
                return Ok(false);
            }
            Err(errno) => return Err(errno.into()),
        }
    }
}

fn is_refusal(errno: Errno) -> bool {
    let unable = matches!(errno, Errno::OPNOTSUPP | Errno::XDEV | Errno::INVAL | Errno::NOTTY | Errno::NOSYS);
    let forbidden = matches!(errno, Errno::PERM | Errno::ACCESS | Errno::ROFS | Errno::TXTBSY);
    // What an I/O error was about, reading and writing will tell.
    unable || forbidden || matches!(errno, Errno::NOSPC | Errno::DQUOT | Errno::IO)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::fixture::{Mount, run, text};
    use std::io::{Read, Seek, Write};
    use std::os::unix::fs::{FileExt, MetadataExt};

    fn content(file: &mut File) -> Vec<u8> {
        let mut all = Vec::new();
        file.rewind().unwrap();
        file.read_to_end(&mut all).unwrap();
        all
    }

    /// Pseudo-random bytes, a length that no block divides.
    fn sample() -> Vec<u8> {
        (0..1_000_003u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
    }

    #[test]
    fn a_clone_keeps_the_instant_on_xfs_and_btrfs() {
        for kind in ["xfs", "btrfs"] {
            let mount = Mount::fresh(kind);
            let path = mount.join("disk.raw");
            std::fs::write(&path, sample()).unwrap();
            let source = File::options().read(true).write(true).open(&path).unwrap();
            let mut clone = clone_unlinked(&source, mount.path()).unwrap().expect(kind);
            source.write_all_at(&[0xff; 100_000], 5000).unwrap();
            source.set_len(10).unwrap();
            assert!(content(&mut clone) == sample(), "{kind}");
            let names: Vec<_> = std::fs::read_dir(mount.path()).unwrap().flatten().map(|e| e.file_name()).collect();
            assert_eq!((names, clone.metadata().unwrap().nlink()), (vec!["disk.raw".into()], 0));
            assert_eq!(clone.metadata().unwrap().mode() & 0o77, 0);
        }
    }

    #[test]
    fn a_clone_shares_its_extents() {
        for kind in ["xfs", "btrfs"] {
            let mount = Mount::fresh(kind);
            let paths = [mount.join("disk.raw"), mount.join("copy.raw")];
            std::fs::write(&paths[0], sample()).unwrap();
            let target = File::create_new(&paths[1]).unwrap();
            assert!(clone_into(&File::open(&paths[0]).unwrap(), &target).unwrap());
            assert!(std::fs::read(&paths[1]).unwrap() == sample());
            target.sync_all().unwrap();
            let map = run("filefrag", &["-v", text(&paths[1])]);
            assert!(map.contains("shared"), "{kind}: {map}");
        }
    }

    #[test]
    fn what_cannot_be_cloned_is_left_alone() {
        let (xfs, other) = (Mount::fresh("xfs"), Mount::fresh("xfs"));
        std::fs::write(xfs.join("disk.raw"), sample()).unwrap();
        let source = File::open(xfs.join("disk.raw")).unwrap();
        assert!(clone_unlinked(&source, other.path()).unwrap().is_none());
        assert!(clone_unlinked(&source, &xfs.join("no folder")).unwrap().is_none());
        run("mount", &["-o", "remount,ro", text(xfs.path())]);
        assert!(clone_unlinked(&source, xfs.path()).unwrap().is_none());
        let memory = Mount::tmpfs(4 << 20);
        let mut file = File::create_new(memory.join("disk.raw")).unwrap();
        file.write_all(b"abc").unwrap();
        let source = File::open(memory.join("disk.raw")).unwrap();
        assert!(clone_unlinked(&source, memory.path()).unwrap().is_none());
        let target = File::create_new(memory.join("copy.raw")).unwrap();
        assert!(!clone_into(&source, &target).unwrap());
        assert_eq!(target.metadata().unwrap().len(), 0);
    }
}
