use super::*;
use crate::image::fixture::{Mount, QemuIo, run, sparse_file, text};
use std::io::Write;
use std::os::unix::fs::{chown, symlink};
use std::sync::{Barrier, Mutex};

const PARTIAL: &str = ".out.drive-backup-partial";

/// Names in `folder`, sorted.
fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(folder).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn content(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|_| "nothing".to_owned())
}

fn write_new(publish: &Publish) {
    publish.file().unwrap().write_all(b"new").unwrap();
}

/// Passes every step on to the kernel, unless it is the one that fails; notes it, and what the target has before it.
struct Watched {
    target: PathBuf,
    log: Arc<Mutex<Vec<String>>>,
    failing: Vec<(&'static str, i32)>,
}

impl Watched {
    fn step(&self, name: &str, what: String) -> io::Result<()> {
        let is_first = !self.log.lock().unwrap().iter().any(|line| line.contains(name));
        self.log.lock().unwrap().push(format!("{}: {name} {what}", content(&self.target)));
        match self.failing.iter().find(|(failing, _)| *failing == name) {
            Some((_, errno)) if is_first => Err(io::Error::from_raw_os_error(*errno)),
            _ => Ok(()),
        }
    }
}

fn shown(file: &File) -> String {
    use std::os::fd::AsRawFd;
    let path = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).unwrap();
    let mode = file.metadata().unwrap().mode() & 0o7777;
    format!("{} {mode:o}", path.file_name().unwrap().display())
}

impl Steps for Watched {
    fn flush(&self, file: &File) -> io::Result<()> {
        self.step("flush", shown(file))?;
        Kernel.flush(file)
    }

    fn close(&self, file: File) -> io::Result<()> {
        self.step("close", shown(&file))?;
        Kernel.close(file)
    }

    fn exchange(&self, folder: &File, one: &OsStr, other: &OsStr) -> io::Result<()> {
        self.step("exchange", format!("{} {}", one.display(), other.display()))?;
        Kernel.exchange(folder, one, other)
    }

    fn rename(&self, folder: &File, from: &OsStr, to: &OsStr) -> io::Result<()> {
        self.step("rename", format!("{} {}", from.display(), to.display()))?;
        Kernel.rename(folder, from, to)
    }

    fn unlink(&self, folder: &File, name: &OsStr) -> io::Result<()> {
        self.step("unlink", name.display().to_string())?;
        Kernel.unlink(folder, name)
    }

    fn flush_folder(&self, folder: &File) -> io::Result<()> {
        let target = self.target.parent().unwrap().metadata().unwrap();
        assert_eq!(Identity::of(&folder.metadata().unwrap()), Identity::of(&target));
        self.step("sync", "folder".to_owned())?;
        Kernel.flush_folder(folder)
    }
}

/// A commit over `old`, watched: its result and its log.
struct Run {
    folder: tempfile::TempDir,
    log: Vec<String>,
    result: Result<Vec<String>>,
    is_removed: bool,
}

fn commit(old: Option<&str>, fsync: bool, failing: impl IntoIterator<Item = (&'static str, i32)>) -> Run {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("out");
    if let Some(old) = old {
        std::fs::write(&target, old).unwrap();
        std::fs::set_permissions(&target, Permissions::from_mode(0o640)).unwrap();
    }
    let log = Arc::default();
    let failing = failing.into_iter().collect();
    let watched = Watched { target: target.clone(), log: Arc::clone(&log), failing };
    let publish = Publish::begin_with(&target, Box::new(watched)).unwrap();
    write_new(&publish);
    let remover = publish.remover();
    let result = publish.commit(fsync);
    let log = log.lock().unwrap().clone();
    Run { folder, log, result, is_removed: remover.is_removed() }
}

#[test]
fn a_new_target_is_flushed_then_renamed_then_its_folder_is_flushed() {
    let run = commit(None, true, None);
    let mode = run.folder.path().join("out").metadata().unwrap().mode() & 0o7777;
    let expected = [
        format!("nothing: flush {PARTIAL} {mode:o}"),
        format!("nothing: close {PARTIAL} {mode:o}"),
        format!("nothing: rename {PARTIAL} out"),
        "new: sync folder".to_owned(),
    ];
    assert_eq!(run.log, expected);
    assert_eq!(run.result.unwrap(), Vec::<String>::new());
    assert_eq!(names(run.folder.path()), ["out"]);
}

#[test]
fn a_replaced_target_stays_within_reach_until_the_folder_is_flushed() {
    let run = commit(Some("old"), true, None);
    let expected = [
        format!("old: flush {PARTIAL} 640"),
        format!("old: close {PARTIAL} 640"),
        format!("old: exchange {PARTIAL} out"),
        "new: sync folder".to_owned(),
        format!("new: unlink {PARTIAL}"),
    ];
    assert_eq!(run.log, expected);
    assert_eq!(names(run.folder.path()), ["out"]);
    assert_eq!(content(&run.folder.path().join("out")), "new");
}

#[test]
fn without_fsync_there_is_a_rename_alone() {
    let run = commit(Some("old"), false, None);
    let expected = [format!("old: close {PARTIAL} 640"), format!("old: rename {PARTIAL} out")];
    assert_eq!(run.log, expected);
    assert_eq!(content(&run.folder.path().join("out")), "new");
}

#[test]
fn a_step_that_fails_leaves_the_old_content_and_nothing_else() {
    const EIO: i32 = 5;
    let cases = [("flush", "flush"), ("close", "close"), ("exchange", "rename"), ("sync", "flush the folder of")];
    for (step, during) in cases {
        let run = commit(Some("old"), true, Some((step, EIO)));
        let target = run.folder.path().join("out");
        let error = run.result.unwrap_err();
        assert_eq!(error.to_string(), format!("{during} target '{}': Input/output error", target.display()));
        assert_eq!((error.kind(), content(&target).as_str()), (Kind::Target, "old"), "{step}");
        assert_eq!(names(run.folder.path()), ["out"], "{step}");
    }
    for (step, during) in [("flush", "flush"), ("rename", "rename"), ("sync", "flush the folder of")] {
        let run = commit(None, true, Some((step, EIO)));
        let target = run.folder.path().join("out");
        assert_eq!(
            run.result.unwrap_err().to_string(),
            format!("{during} target '{}': Input/output error", target.display())
        );
        assert_eq!(names(run.folder.path()), Vec::<String>::new(), "{step}");
    }
}

#[test]
fn a_file_system_that_exchanges_no_names_renames() {
    const EINVAL: i32 = 22;
    let run = commit(Some("old"), true, Some(("exchange", EINVAL)));
    assert_eq!(run.log[3..], [format!("old: rename {PARTIAL} out"), "new: sync folder".to_owned()]);
    assert_eq!(run.result.unwrap(), Vec::<String>::new());
    assert_eq!(names(run.folder.path()), ["out"]);
}

#[test]
fn what_cannot_be_taken_back_is_said_and_does_not_pass_for_removed() {
    const EIO: i32 = 5;
    const EINVAL: i32 = 22;
    let run = commit(Some("old"), true, [("exchange", EINVAL), ("sync", EIO)]);
    let error = run.result.unwrap_err().to_string();
    assert!(error.contains("the new copy is complete under its name, yet may not survive a crash"), "{error}");
    assert_eq!((content(&run.folder.path().join("out")).as_str(), run.is_removed), ("new", false));

    let run = commit(Some("old"), true, [("sync", EIO), ("unlink", EIO)]);
    let error = run.result.unwrap_err().to_string();
    assert!(error.starts_with("flush the folder of target"), "{error}");
    assert_eq!((content(&run.folder.path().join("out")).as_str(), run.is_removed), ("old", true));
}

#[test]
fn an_old_file_that_stays_is_a_warning() {
    let run = commit(Some("old"), true, Some(("unlink", 5)));
    let expected = format!("what 'out' was before is left as '{PARTIAL}': Input/output error");
    assert_eq!(run.result.unwrap(), [expected]);
    assert_eq!(content(&run.folder.path().join("out")), "new");
}

#[test]
fn dropped_or_aborted_it_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("out");
    let publish = Publish::begin(&target).unwrap();
    assert_eq!(names(folder.path()), [PARTIAL]);
    drop(publish);
    assert!(names(folder.path()).is_empty());
    std::fs::write(&target, "old").unwrap();
    Publish::begin(&target).unwrap().abort().unwrap();
    assert_eq!((names(folder.path()), content(&target).as_str()), (vec!["out".to_owned()], "old"));
}

#[test]
fn what_was_removed_from_another_thread_is_never_published() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("out");
    std::fs::write(&target, "old").unwrap();
    let publish = Publish::begin(&target).unwrap();
    write_new(&publish);
    let remover = publish.remover();
    assert!(std::thread::spawn(move || remover.remove().unwrap()).join().unwrap());
    assert_eq!(names(folder.path()), ["out"]);
    assert_eq!(publish.commit(true).unwrap_err().kind(), Kind::Cancelled);
    assert_eq!((names(folder.path()), content(&target).as_str()), (vec!["out".to_owned()], "old"));
}

#[test]
fn a_remover_is_too_late_once_it_is_published() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("out");
    let publish = Publish::begin(&target).unwrap();
    let remover = publish.remover();
    publish.commit(true).unwrap();
    let next = Publish::begin(&target).unwrap();
    assert!(!remover.remove().unwrap());
    assert_eq!(names(folder.path()), [PARTIAL, "out"]);
    drop(next);
}

#[test]
fn a_second_backup_of_the_target_is_refused_whatever_name_it_uses() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("out");
    symlink("out", folder.path().join("link")).unwrap();
    let _first = Publish::begin(&target).unwrap();
    for name in ["out", "link", "../out", "./out"] {
        let path = match name {
            "../out" => folder.path().join("..").join(folder.path().file_name().unwrap()).join("out"),
            name => folder.path().join(name),
        };
        let error = Publish::begin(&path).err().unwrap();
        assert_eq!(error.kind(), Kind::Busy, "{name}");
        assert!(error.to_string().starts_with("another backup writes this target: "), "{error}");
    }
    Publish::begin(&folder.path().join("other")).unwrap();
}

#[test]
fn of_many_that_start_at_once_over_a_leftover_one_wins() {
    const RACERS: usize = 8;
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("out");
    for _ in 0..50 {
        std::fs::write(folder.path().join(PARTIAL), "left").unwrap();
        let barrier = Barrier::new(RACERS);
        let winners: Vec<Publish> = std::thread::scope(|scope| {
            let race = || {
                barrier.wait();
                match Publish::begin(&target) {
                    Ok(publish) => Some(publish),
                    Err(e) => {
                        assert_eq!(e.kind(), Kind::Busy, "{e}");
                        None
                    }
                }
            };
            let racers: Vec<_> = (0..RACERS).map(|_| scope.spawn(race)).collect();
            racers.into_iter().filter_map(|racer| racer.join().unwrap()).collect()
        });
        assert_eq!(winners.len(), 1);
        write_new(&winners[0]);
        assert_eq!(content(&folder.path().join(PARTIAL)), "new");
    }
}

#[test]
fn the_old_target_is_not_swept_as_a_leftover_while_the_names_are_exchanged() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("out");
    std::fs::write(&target, "old").unwrap();
    let publish = Publish::begin(&target).unwrap();
    let place = Arc::clone(&publish.place);
    Kernel.exchange(&place.folder, &place.partial, &place.name).unwrap();
    assert_eq!(Publish::begin(&target).err().unwrap().kind(), Kind::Busy);
    assert_eq!(content(&folder.path().join(PARTIAL)), "old");
}

#[test]
fn what_a_killed_backup_left_is_swept_and_not_written_through() {
    let folder = tempfile::tempdir().unwrap();
    let name = |n: &str| folder.path().join(n);
    std::fs::write(name("precious"), "precious").unwrap();
    std::fs::hard_link(name("precious"), name(PARTIAL)).unwrap();
    let publish = Publish::begin(&name("out")).unwrap();
    write_new(&publish);
    publish.commit(true).unwrap();
    symlink("precious", name(PARTIAL)).unwrap();
    let publish = Publish::begin(&name("out")).unwrap();
    write_new(&publish);
    publish.commit(true).unwrap();
    assert_eq!((content(&name("precious")).as_str(), content(&name("out")).as_str()), ("precious", "new"));
    assert_eq!(names(folder.path()), ["out", "precious"]);
    std::fs::create_dir(name(PARTIAL)).unwrap();
    let error = Publish::begin(&name("out")).err().unwrap();
    let expected = format!("create target '{}': the name is taken by something else", name(PARTIAL).display());
    assert_eq!(error.to_string(), expected);
}

#[test]
fn mode_and_owner_are_kept_and_nobody_reads_it_before() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("out");
    std::fs::write(&target, "old").unwrap();
    chown(&target, Some(1234), Some(5678)).unwrap();
    std::fs::set_permissions(&target, Permissions::from_mode(0o2750)).unwrap();
    let publish = Publish::begin(&target).unwrap();
    assert_eq!(folder.path().join(PARTIAL).metadata().unwrap().mode() & 0o77, 0);
    assert_eq!(publish.commit(true).unwrap(), Vec::<String>::new());
    let new = target.metadata().unwrap();
    assert_eq!((new.uid(), new.gid(), new.mode() & 0o7777), (1234, 5678, 0o2750));
}

#[test]
fn a_new_target_has_the_mode_that_the_umask_gives() {
    let folder = tempfile::tempdir().unwrap();
    let usual = File::create(folder.path().join("usual")).unwrap().metadata().unwrap().mode();
    Publish::begin(&folder.path().join("out")).unwrap().commit(true).unwrap();
    assert_eq!(folder.path().join("out").metadata().unwrap().mode(), usual);
}

#[test]
fn a_link_is_followed_and_stays_a_link() {
    let folder = tempfile::tempdir().unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    let link = folder.path().join("link");
    symlink(elsewhere.path().join("next"), &link).unwrap();
    symlink("out", elsewhere.path().join("next")).unwrap();
    let publish = Publish::begin(&link).unwrap();
    assert_eq!(publish.target(), elsewhere.path().join("out"));
    assert_eq!(names(elsewhere.path()), [PARTIAL, "next"]);
    write_new(&publish);
    publish.commit(true).unwrap();
    assert!(link.symlink_metadata().unwrap().is_symlink());
    assert_eq!(content(&elsewhere.path().join("out")), "new");
    symlink("circle", folder.path().join("circle")).unwrap();
    let error = Publish::begin(&folder.path().join("circle")).err().unwrap().to_string();
    assert!(error.ends_with("Too many levels of symbolic links"), "{error}");
}

fn attribute(path: &Path, name: &str) -> Option<Vec<u8>> {
    let mut value = vec![0; 1000];
    let length = rustix::fs::lgetxattr(path, name, &mut value[..]).ok()?;
    value.truncate(length);
    Some(value)
}

fn set_attribute(path: &Path, name: &str, value: &[u8]) {
    rustix::fs::lsetxattr(path, name, value, rustix::fs::XattrFlags::empty()).unwrap();
}

/// An access control list: the owner may read and write, user 1234 may read, nobody else may anything.
fn list_of_readers() -> Vec<u8> {
    let entries: [(u16, u16, u32); 5] =
        [(1, 6, u32::MAX), (2, 4, 1234), (4, 0, u32::MAX), (0x10, 4, u32::MAX), (0x20, 0, u32::MAX)];
    let bytes = entries
        .iter()
        .flat_map(|(tag, rights, id)| [&tag.to_le_bytes()[..], &rights.to_le_bytes(), &id.to_le_bytes()].concat());
    2_u32.to_le_bytes().into_iter().chain(bytes).collect()
}

#[test]
fn the_new_file_has_the_access_list_and_the_attributes_of_the_old_one() {
    let mount = Mount::fresh("ext4");
    let target = mount.join("out");
    std::fs::write(&target, "old").unwrap();
    let kept = [("user.note", b"a note".to_vec()), (attributes::ACCESS_LIST, list_of_readers())];
    let labels = [("security.label", b"a label".to_vec()), ("trusted.mark", vec![0, 255])];
    let kept = [kept, labels].concat();
    kept.iter().for_each(|(name, value)| set_attribute(&target, name, value));
    // A capability of version 2, of a program that is no more.
    set_attribute(&target, "security.capability", &[&[0, 0, 0, 2][..], &[0; 16]].concat());
    for round in 0..2 {
        let publish = Publish::begin(&target).unwrap();
        write_new(&publish);
        assert_eq!(publish.commit(true).unwrap(), [""; 0], "{round}");
        for (name, value) in &kept {
            assert_eq!(attribute(&target, name).as_ref(), Some(value), "{name}");
        }
        assert_eq!(attribute(&target, "security.capability"), None);
        assert_eq!(target.metadata().unwrap().mode() & 0o7777, 0o640, "the list's mask");
        assert_eq!(content(&target), "new");
    }
}

#[test]
fn a_list_that_only_the_folder_would_give_is_not_the_new_file_s() {
    let mount = Mount::fresh("ext4");
    let (old, new) = (mount.join("old"), mount.join("new"));
    std::fs::write(&old, "old").unwrap();
    std::fs::set_permissions(&old, Permissions::from_mode(0o640)).unwrap();
    set_attribute(mount.path(), "system.posix_acl_default", &list_of_readers());
    for (target, has_list) in [(&old, false), (&new, true)] {
        let publish = Publish::begin(target).unwrap();
        write_new(&publish);
        publish.commit(true).unwrap();
        assert_eq!(attribute(target, attributes::ACCESS_LIST).is_some(), has_list);
        assert_eq!(target.metadata().unwrap().mode() & 0o7777, 0o640);
    }
}

#[test]
fn names_up_to_the_limit_work() {
    let folder = tempfile::tempdir().unwrap();
    for length in [233, 234, 255] {
        let target = folder.path().join("x".repeat(length));
        let publish = Publish::begin(&target).unwrap();
        write_new(&publish);
        publish.commit(true).unwrap();
        assert_eq!(content(&target), "new");
    }
    assert_eq!(names(folder.path()).len(), 3);
    let error = Publish::begin(&folder.path().join("x".repeat(256))).err().unwrap();
    assert!(error.to_string().ends_with("File name too long"), "{error}");
}

#[test]
fn a_target_that_cannot_be_a_file_is_refused_untouched() {
    let folder = tempfile::tempdir().unwrap();
    let name = |n: &str| folder.path().join(n);
    std::fs::create_dir(name("folder")).unwrap();
    nix::unistd::mkfifo(&name("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    std::fs::write(name("file"), "").unwrap();
    let shown = |n: &str| name(n).display().to_string();
    let cases = [
        ("folder", format!("create target '{}': is a directory", shown("folder"))),
        ("new/", format!("create target '{}': is a directory", shown("new/"))),
        ("fifo", format!("create target '{}': is a fifo", shown("fifo"))),
        ("none/out", format!("open the folder of target '{}': No such file or directory", shown("none/out"))),
        ("file/out", format!("open the folder of target '{}': Not a directory", shown("file/out"))),
    ];
    let before = names(folder.path());
    for (path, expected) in cases {
        let error = Publish::begin(&name(path)).err().unwrap();
        assert_eq!((error.to_string(), error.kind()), (expected, Kind::Target));
    }
    for (path, why) in [("/", "is a directory"), ("..", "is a directory"), ("", "No such file or directory")] {
        let error = Publish::begin(Path::new(path)).err().unwrap().to_string();
        assert_eq!(error, format!("create target '{path}': {why}"));
    }
    assert_eq!(names(folder.path()), before);
}

#[test]
fn a_folder_that_cannot_be_written_is_an_error() {
    let mount = Mount::tmpfs(1 << 20);
    std::fs::write(mount.join("out"), "old").unwrap();
    run("mount", &["-o", "remount,ro", text(mount.path())]);
    let error = Publish::begin(&mount.join("out")).err().unwrap();
    assert_eq!(error.kind(), Kind::Target);
    let expected = format!("create target '{}': Read-only file system", mount.join(PARTIAL).display());
    assert_eq!(error.to_string(), expected);
    assert_eq!(content(&mount.join("out")), "old");
}

#[test]
fn a_full_disk_at_the_flush_keeps_the_old_content() {
    let mount = Mount::tmpfs(1 << 20);
    std::fs::write(mount.join("out"), "old").unwrap();
    let publish = Publish::begin(&mount.join("out")).unwrap();
    let error = publish.file().unwrap().write_all(&vec![1; 2 << 20]).unwrap_err();
    assert_eq!(error.kind(), io::ErrorKind::StorageFull);
    drop(publish);
    assert_eq!((names(mount.path()), content(&mount.join("out")).as_str()), (vec!["out".to_owned()], "old"));
}

#[test]
fn an_old_target_that_a_qemu_writes_is_busy() {
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("out");
    sparse_file(&target, 1 << 20);
    let qemu = QemuIo::open(&target, &[]);
    let error = Publish::begin(&target).err().unwrap();
    assert_eq!(error.kind(), Kind::Busy);
    assert!(error.to_string().contains("is being written by another program"), "{error}");
    assert_eq!(names(folder.path()), ["out"]);
    drop(qemu);
    let _reader = QemuIo::open(&target, &["-r"]);
    Publish::begin(&target).unwrap();
}

#[test]
fn a_target_is_either_replaced_or_written_in_place() {
    use crate::image::target::open_in_place;
    let folder = tempfile::tempdir().unwrap();
    let target = folder.path().join("out");
    std::fs::write(&target, "old").unwrap();
    let publish = Publish::begin(&target).unwrap();
    let error = open_in_place(&target).unwrap_err();
    assert_eq!(error.kind(), Kind::Busy);
    assert_eq!(error.to_string(), format!("another backup is about to replace target '{}'", target.display()));
    publish.commit(true).unwrap();
    let _in_place = open_in_place(&target).unwrap();
    assert_eq!(Publish::begin(&target).err().unwrap().kind(), Kind::Busy);
}

/// The system calls of another test, by strace: that the steps do what they are called.
#[test]
fn the_kernel_is_asked_in_that_order() {
    let log = tempfile::NamedTempFile::new().unwrap();
    let test = std::env::current_exe().unwrap();
    let calls = "trace=fsync,fdatasync,renameat,renameat2,unlinkat,fchmod";
    let traced = "publish::tests::mode_and_owner_are_kept_and_nobody_reads_it_before";
    run("strace", &["-f", "-y", "-o", text(log.path()), "-e", calls, text(&test), "--exact", traced]);
    let log = content(log.path());
    let shown = log.lines().filter(|line| line.contains("= 0")).filter_map(|line| {
        let (call, arguments) = line.split_once(' ')?.1.trim_start().split_once('(')?;
        let object = if arguments.contains("drive-backup-partial") { "partial" } else { "folder" };
        let exchange = if arguments.contains("RENAME_EXCHANGE") { " exchange" } else { "" };
        Some(format!("{call} {object}{exchange}"))
    });
    let shown: Vec<String> = shown.collect();
    let expected =
        ["fchmod partial", "fsync partial", "renameat2 partial exchange", "fsync folder", "unlinkat partial"];
    let at = shown.iter().position(|call| call == expected[0]).unwrap_or_else(|| panic!("{log}"));
    assert_eq!(shown[at..at + expected.len()], expected, "{log}");
}

#[test]
fn it_works_on_every_file_system() {
    for mount in [Mount::fresh("xfs"), Mount::fresh("btrfs"), Mount::tmpfs(1 << 20)] {
        let target = mount.join("out");
        std::fs::write(&target, "old").unwrap();
        let publish = Publish::begin(&target).unwrap();
        write_new(&publish);
        publish.commit(true).unwrap();
        assert_eq!((names(mount.path()), content(&target).as_str()), (vec!["out".to_owned()], "new"));
    }
}
