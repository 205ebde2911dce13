//! Bad input: one clear line on stderr, the right code, nothing touched.
#![cfg(feature = "cli")]

mod support;

use nix::sys::signal::Signal;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use support::bytes::{allocated_now, disk, identical, noise, read};
use support::cost::cost;
use support::{
    BINARY, Ended, LoopDevice, Mount, Running, code, copy, drive_backup, fingerprint, folder, names, piped, qemu_img,
    run, sparse_file, text, wait_for,
};

const MIB: u64 = 1 << 20;

/// A folder with a raw disk and a qcow2 of it, and an old target: what bad input must leave alone.
struct Lab {
    folder: tempfile::TempDir,
}

impl Lab {
    fn new() -> Self {
        let lab = Self { folder: folder() };
        disk(&lab.path("disk.raw"), MIB);
        qemu_img("convert -f raw -O qcow2 -o cluster_size=4k", &[&lab.path("disk.raw"), &lab.path("disk.qcow2")]);
        std::fs::write(lab.path("old.raw"), noise(9, 4096)).unwrap();
        lab
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// `device` can't be copied to `target`: fails with `code`, says `reason`, and nothing in the folder is touched.
    #[track_caller]
    fn refuses(&self, device: &Path, target: &Path, flags: &[&str], code: i32, reason: &str) {
        let before = fingerprint(self.folder.path());
        copy(device, target, flags).fails(code, reason);
        assert_eq!(fingerprint(self.folder.path()), before, "touched");
    }

    /// `device` can't be read, whatever the target.
    #[track_caller]
    fn refuses_source(&self, device: &Path, flags: &[&str], reason: &str) {
        for target in ["old.raw", "new.raw", "new.qcow2"] {
            self.refuses(device, &self.path(target), flags, 4, reason);
        }
    }

    #[track_caller]
    fn refuses_target(&self, target: &Path, flags: &[&str], code: i32, reason: &str) {
        self.refuses(&self.path("disk.raw"), target, flags, code, reason);
        let raw: &[&str] = if flags.contains(&"--format") { &[] } else { &["--format", "raw"] };
        self.refuses(&self.path("disk.qcow2"), target, &[raw, flags].concat(), code, reason);
    }
}

#[test]
fn no_such_device() {
    let lab = Lab::new();
    let absent = lab.path("absent");
    lab.refuses_source(&absent, &[], &format!("open source '{}': No such file or directory", text(&absent)));
    lab.refuses_source(&lab.path("disk.raw/below"), &[], "Not a directory");
    lab.refuses(Path::new(""), &lab.path("old.raw"), &[], 2, "--device");
}

#[test]
fn what_is_no_disk() {
    let lab = Lab::new();
    let shown = |path: &Path| format!("open source '{}'", path.display());
    lab.refuses_source(lab.folder.path(), &[], &format!("{}: is a directory", shown(lab.folder.path())));
    let _listener = std::os::unix::net::UnixListener::bind(lab.path("socket")).unwrap();
    lab.refuses_source(&lab.path("socket"), &[], &format!("{}: is a socket", shown(&lab.path("socket"))));
    nix::unistd::mkfifo(&lab.path("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    lab.refuses_source(&lab.path("fifo"), &[], &format!("{}: is a fifo", shown(&lab.path("fifo"))));
    lab.refuses_source(Path::new("/dev/zero"), &[], "open source '/dev/zero': is a character device");
    for (target, what) in
        [(lab.folder.path(), "directory"), (&lab.path("socket"), "socket"), (&lab.path("fifo"), "fifo")]
    {
        for mode in ["absolute-paths", "existing"] {
            lab.refuses_target(target, &["--mode", mode], 5, &format!("'{}': is a {what}", target.display()));
        }
    }
    lab.refuses_target(Path::new("/dev/full"), &[], 5, "'/dev/full': is ");
}

/// Root without the right to pass over permissions.
fn as_a_mortal(arguments: &[&str]) -> Ended {
    without(&["--bounding-set=-dac_override,-dac_read_search"], arguments)
}

/// Root without what setpriv takes.
fn without(taken: &[&str], arguments: &[&str]) -> Ended {
    let mut command = Command::new("setpriv");
    command.args(taken).arg(BINARY).args(arguments);
    Ended::of(piped(command).output().expect("setpriv runs"))
}

/// What the old file's group may do with it, its group and no other may do with the new one.
#[test]
fn a_group_that_can_not_be_kept_takes_its_rights_with_it() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    const GROUP: u32 = 12345;
    for (groups, group, mode) in [("--groups=12345", GROUP, 0o640), ("--clear-groups", 0, 0o600)] {
        let lab = Lab::new();
        let (device, target) = (lab.path("disk.raw"), lab.path("old.raw"));
        std::os::unix::fs::chown(&target, Some(1234), Some(GROUP)).unwrap();
        std::fs::set_permissions(&target, PermissionsExt::from_mode(0o640)).unwrap();
        let ended =
            without(&["--bounding-set=-chown", groups], &["--device", text(&device), "--target", text(&target)]);
        assert_eq!(ended.code, 0, "{ended:?}");
        assert!(ended.stderr.contains("owner 1234:12345 of"), "{ended:?}");
        let new = target.metadata().unwrap();
        assert_eq!((new.uid(), new.gid(), new.mode() & 0o7777), (0, group, mode), "{groups}");
    }
}

/// It fails like any other write that there is no room for.
#[test]
fn a_limit_of_a_files_size_is_an_error_and_no_death() {
    let lab = Lab::new();
    let (device, target) = (lab.path("disk.raw"), lab.path("new.raw"));
    let copy = r#"ulimit -f 8; exec "$0" --device "$1" --target "$2" --sparse=never"#;
    let mut command = Command::new("bash");
    command.args(["-c", copy, BINARY, text(&device), text(&target)]);
    Ended::of(piped(command).output().unwrap()).fails(5, "File too large");
    assert!(!target.exists() && !names(lab.folder.path()).iter().any(|name| name.contains("partial")));
}

#[test]
fn unreadable_and_unwritable_files() {
    use std::os::unix::fs::PermissionsExt;
    let lab = Lab::new();
    let forbid = |path: &Path, mode| std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
    let (device, target) = (lab.path("disk.raw"), lab.path("old.raw"));
    let flags = |target: &Path| ["--device".to_owned(), text(&device).into(), "--target".into(), text(target).into()];
    let tried = |target: &Path, more: &[&str]| {
        let flags = flags(target);
        as_a_mortal(&[&flags.each_ref().map(String::as_str)[..], more].concat())
    };
    forbid(&device, 0o000);
    let before = fingerprint(lab.folder.path());
    tried(&target, &[]).fails(4, &format!("open source '{}': Permission denied", text(&device)));
    assert_eq!(fingerprint(lab.folder.path()), before);
    forbid(&device, 0o400);
    forbid(&target, 0o400);
    let before = fingerprint(lab.folder.path());
    tried(&target, &["--mode", "existing"]).fails(5, "Permission denied");
    assert_eq!(fingerprint(lab.folder.path()), before);
    std::fs::create_dir(lab.path("locked")).unwrap();
    forbid(&lab.path("locked"), 0o500);
    tried(&lab.path("locked/new.raw"), &[]).fails(5, "Permission denied");
    assert!(names(&lab.path("locked")).is_empty());
}

#[test]
fn an_empty_file_is_no_image() {
    let lab = Lab::new();
    sparse_file(&lab.path("empty"), 0);
    lab.refuses_source(&lab.path("empty"), &[], "is empty");
    lab.refuses_source(&lab.path("empty"), &["--source-format", "qcow2"], "qcow2");
}

#[test]
fn truncated_qcow2() {
    let lab = Lab::new();
    let whole = read(&lab.path("disk.qcow2"));
    for length in [4, 71, 72, 100, 4096, 8192, 12 << 10, whole.len() / 2, whole.len() - 4096] {
        let cut = lab.path("cut.qcow2");
        std::fs::write(&cut, &whole[..length]).unwrap();
        let before = fingerprint(lab.folder.path());
        let ended = copy(&cut, &lab.path("old.raw"), &["--source-format", "qcow2"]);
        assert_eq!((ended.code, ended.stderr.lines().count()), (4, 1), "cut at {length}: {ended:?}");
        assert!(ended.stderr.contains("cut.qcow2") || ended.stderr.contains("source at 0x"), "{ended:?}");
        assert_eq!(fingerprint(lab.folder.path()), before, "touched");
    }
}

#[test]
fn a_backing_file_that_is_missing() {
    let lab = Lab::new();
    run(
        "qemu-img",
        &["create", "-q", "-u", "-f", "qcow2", "-b", "gone.raw", "-F", "raw", text(&lab.path("top.qcow2")), "1M"],
    );
    let reason = format!("{}': No such file or directory", text(&lab.path("gone.raw")));
    lab.refuses_source(&lab.path("top.qcow2"), &[], &reason);
    std::fs::create_dir(lab.path("gone.raw")).unwrap();
    lab.refuses_source(&lab.path("top.qcow2"), &[], "is a directory");
}

#[test]
fn a_backing_chain_with_a_loop() {
    let lab = Lab::new();
    for (name, backing) in [("a", "b"), ("b", "c"), ("c", "a"), ("self", "self")] {
        run(
            "qemu-img",
            &["create", "-q", "-u", "-f", "qcow2", "-b", backing, "-F", "qcow2", text(&lab.path(name)), "1M"],
        );
    }
    lab.refuses_source(&lab.path("a"), &[], "it is a loop");
    lab.refuses_source(&lab.path("self"), &[], "it is a loop");
    // Under another name it is the same file.
    std::os::unix::fs::symlink("self", lab.path("alias")).unwrap();
    lab.refuses_source(&lab.path("alias"), &[], "it is a loop");
}

#[test]
fn a_backing_chain_without_an_end() {
    let lab = Lab::new();
    for level in 0..1500 {
        let name = |level: i32| lab.path(&format!("{level}.qcow2"));
        match level {
            0 => run("qemu-img", &["create", "-q", "-f", "qcow2", text(&name(0)), "1M"]),
            // The name is patched into a copy: qemu-img would walk the chain each time.
            1 => run(
                "qemu-img",
                &["create", "-q", "-u", "-f", "qcow2", "-b", "0000.qcow2", "-F", "qcow2", text(&name(1)), "1M"],
            ),
            _ => {
                std::fs::copy(name(1), name(level)).unwrap();
                String::new()
            }
        };
        if level > 0 {
            let file = std::fs::OpenOptions::new().read(true).write(true).open(name(level)).unwrap();
            let bytes = read(&name(level));
            let offset = u64::from_be_bytes(bytes[8..16].try_into().unwrap());
            let backing = format!("{}.qcow2", level - 1);
            file.write_all_at(backing.as_bytes(), offset).unwrap();
            file.write_all_at(&(backing.len() as u32).to_be_bytes(), 16).unwrap();
        }
    }
    lab.refuses(&lab.path("1499.qcow2"), &lab.path("new.raw"), &[], 4, "the chain has more than");
}

#[test]
fn encryption_is_refused_by_name() {
    let lab = Lab::new();
    for (method, words) in [("luks", "it is encrypted with LUKS"), ("aes", "it is encrypted with AES")] {
        let image = lab.path(&format!("{method}.qcow2"));
        let options = format!(
            "encrypt.format={method},encrypt.key-secret=s,{}",
            match method {
                "luks" => "encrypt.iter-time=10",
                _ => "compat=1.1",
            }
        );
        run(
            "qemu-img",
            &["create", "-q", "-f", "qcow2", "--object", "secret,id=s,data=word", "-o", &options, text(&image), "1M"],
        );
        lab.refuses_source(&image, &[], words);
        run(
            "qemu-img",
            &[
                "create",
                "-q",
                "-u",
                "-f",
                "qcow2",
                "-b",
                text(&image),
                "-F",
                "qcow2",
                text(&lab.path("top.qcow2")),
                "1M",
            ],
        );
        lab.refuses_source(&lab.path("top.qcow2"), &[], words);
    }
}

/// Overwrites bytes of a copy of the qcow2 and gives its path.
fn patched(lab: &Lab, offset: u64, bytes: &[u8]) -> PathBuf {
    let image = lab.path("patched.qcow2");
    std::fs::copy(lab.path("disk.qcow2"), &image).unwrap();
    std::fs::OpenOptions::new().write(true).open(&image).unwrap().write_all_at(bytes, offset).unwrap();
    image
}

#[test]
fn unknown_features_are_refused_by_name() {
    let lab = Lab::new();
    for bit in [5, 17, 63] {
        let image = patched(&lab, 72, &(1u64 << bit).to_be_bytes());
        lab.refuses_source(&image, &[], &format!("bit {bit}"));
    }
    // The image's own table gives the bit a name: here over the entry for the dirty bit.
    qemu_img("convert -f raw -O qcow2", &[&lab.path("disk.raw"), &lab.path("disk.qcow2")]);
    let bytes = read(&lab.path("disk.qcow2"));
    let entry = bytes.windows(9).position(|w| w == b"dirty bit").expect("qemu-img writes a feature name table");
    let image = patched(&lab, entry as u64 - 2, b"\x00\x2atime travel\0");
    std::fs::OpenOptions::new()
        .write(true)
        .open(&image)
        .unwrap()
        .write_all_at(&(1u64 << 42).to_be_bytes(), 72)
        .unwrap();
    lab.refuses_source(&image, &[], "time travel");
    lab.refuses_source(&patched(&lab, 4, &[0, 0, 0, 4]), &[], "qcow version 4 is not supported");
}

#[test]
fn backing_files_behind_protocols_are_refused() {
    let lab = Lab::new();
    for name in [
        "nbd://127.0.0.1:1/x",
        "http://127.0.0.1/x",
        "ssh://h/x",
        "fat:rw:/etc",
        "rbd:pool/x",
        r#"json:{"driver":"file","filename":"/etc/hostname"}"#,
        "nbd+unix:///x?socket=/s",
    ] {
        let top = lab.path("top.qcow2");
        run("qemu-img", &["create", "-q", "-u", "-f", "qcow2", "-b", name, "-F", "raw", text(&top), "1M"]);
        lab.refuses_source(&top, &[], &format!("'{name}' is not the name of a file here"));
    }
}

#[test]
fn a_qcow2_that_a_guest_wrote_into_its_raw_disk_is_data() {
    let lab = Lab::new();
    // What the guest wants to read: a file of the host.
    std::fs::write(lab.path("secret"), noise(99, MIB as usize)).unwrap();
    let guest = lab.path("guest.raw");
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", text(&lab.path("secret")), "-F", "raw", text(&guest)]);
    std::fs::OpenOptions::new().write(true).open(&guest).unwrap().set_len(MIB).unwrap();
    let copied = lab.path("copy.raw");
    copy(&guest, &copied, &["--source-format", "raw"]).succeeds();
    identical(&guest, &copied);
    for version in ["compat=0.10", "compat=1.1"] {
        let top = lab.path("top.qcow2");
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", version, "-b", text(&guest), "-F", "raw", text(&top)]);
        copy(&top, &copied, &[]).succeeds();
        identical(&guest, &copied);
        // Without the recorded format: the type of its header extension becomes an unknown one.
        let bytes = read(&top);
        let recorded = bytes.windows(4).position(|w| w == [0xe2, 0x79, 0x2a, 0xca]).unwrap();
        std::fs::OpenOptions::new().write(true).open(&top).unwrap().write_all_at(b"none", recorded as u64).unwrap();
        let ended = copy(&top, &copied, &[]);
        assert_eq!(ended.code, 0, "{ended:?}");
        assert!(ended.stderr.contains("which is therefore read as raw"), "{ended:?}");
        identical(&guest, &copied);
    }
}

#[test]
fn a_target_folder_that_is_missing_or_read_only() {
    let lab = Lab::new();
    lab.refuses_target(&lab.path("none/new.raw"), &[], 5, "No such file or directory");
    lab.refuses_target(&lab.path("old.raw/new.raw"), &[], 5, "Not a directory");
    let mount = Mount::tmpfs(4 * MIB);
    std::fs::write(mount.join("old.raw"), "old").unwrap();
    mount.make_read_only();
    lab.refuses_target(&mount.join("new.raw"), &[], 5, "Read-only file system");
    lab.refuses_target(&mount.join("old.raw"), &[], 5, "Read-only file system");
    assert_eq!(read(&mount.join("old.raw")), b"old");
}

#[test]
fn an_existing_target_must_exist_and_fit() {
    let lab = Lab::new();
    let existing = &["--mode", "existing"];
    lab.refuses_target(&lab.path("none.raw"), existing, 5, "No such file or directory");
    for length in [0, MIB - 1, MIB + 1, MIB - 512, 2 * MIB] {
        sparse_file(&lab.path("other.raw"), length);
        lab.refuses_target(&lab.path("other.raw"), &["--mode", "existing", "--format", "raw"], 2, "different sizes");
    }
    run("qemu-img", &["create", "-q", "-f", "qcow2", text(&lab.path("other.qcow2")), "2M"]);
    lab.refuses(&lab.path("disk.raw"), &lab.path("other.qcow2"), existing, 2, "different sizes");
    let device = LoopDevice::over(&lab.path("other.raw"), &["--sizelimit", "524288"]);
    lab.refuses_target(device.path(), &["--format", "raw"], 2, "sizes");
}

#[test]
fn an_existing_qcow2_that_cannot_be_written_is_left_alone() {
    let lab = Lab::new();
    let (target, existing) = (lab.path("target.qcow2"), &["--mode", "existing"]);
    qemu_img("create -q -f qcow2", &[&target, Path::new("1M")]);
    qemu_img("snapshot -c before", &[&target]);
    lab.refuses(&lab.path("disk.raw"), &target, existing, 5, "snapshot");
    qemu_img("create -q -f qcow2 -o extended_l2=on", &[&target, Path::new("1M")]);
    lab.refuses(&lab.path("disk.raw"), &target, existing, 5, "extended L2");
    let options = format!("data_file={}", text(&lab.path("data")));
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &options, text(&target), "1M"]);
    lab.refuses(&lab.path("disk.raw"), &target, existing, 5, "external data file");
    std::fs::write(&target, &read(&lab.path("disk.qcow2"))[..5000]).unwrap();
    lab.refuses(&lab.path("disk.raw"), &target, &["--mode", "existing", "--format", "qcow2"], 5, "target");
}

#[test]
fn a_target_that_is_mounted() {
    let lab = Lab::new();
    let image = lab.path("filesystem");
    sparse_file(&image, 4 * MIB);
    run("mkfs.ext4", &["-q", text(&image)]);
    disk(&lab.path("fits.raw"), 4 * MIB);
    let device = LoopDevice::over(&image, &[]);
    let mount = Mount::device(device.path());
    std::fs::write(mount.join("file"), "kept").unwrap();
    for target in [device.path(), &image] {
        let ended = copy(&lab.path("fits.raw"), target, &["--format", "raw"]);
        ended.fails(8, &format!("target '{}' is mounted at '{}'", text(target), text(mount.path())));
    }
    run("sync", &["-f", text(mount.path())]);
    drop(mount);
    let again = Mount::device(device.path());
    assert_eq!(read(&again.join("file")), b"kept");
}

#[test]
fn sizes_and_rates_that_make_no_sense() {
    let lab = Lab::new();
    for (speed, hint) in [
        ("-1", "negative"),
        ("50Mb", "50M"),
        ("50Mbit", "50M"),
        ("50M/s", "50M"),
        ("1e99", ""),
        ("", ""),
        ("fast", ""),
        ("99999999999T", ""),
    ] {
        lab.refuses_target(&lab.path("old.raw"), &["--speed", speed], 2, hint);
        lab.refuses_target(&lab.path("old.raw"), &[&format!("--speed={speed}")], 2, "--speed");
    }
    for size in ["0", "511", "1000", "4M", "-4K", "64Kb"] {
        lab.refuses(&lab.path("disk.raw"), &lab.path("new.qcow2"), &["--cluster-size", size], 2, "luster");
    }
}

#[test]
fn arguments_that_contradict_each_other() {
    let lab = Lab::new();
    let old = lab.path("old.raw");
    lab.refuses_target(&old, &["--compress", "zlib"], 2, "raw");
    lab.refuses_target(&old, &["--cluster-size", "64K"], 2, "raw");
    // Raw as the source is, and as a device is.
    let wanted = "is to be raw: --compress and --cluster-size are for qcow2; use --format qcow2";
    lab.refuses(&lab.path("disk.raw"), &lab.path("copy"), &["--compress", "zstd"], 2, wanted);
    sparse_file(&lab.path("below"), MIB);
    let device = LoopDevice::over(&lab.path("below"), &[]);
    lab.refuses_target(device.path(), &["--compress", "zstd"], 2, wanted);
    lab.refuses_target(&lab.path("new.qcow2"), &["--mode", "existing", "--compress", "zstd"], 2, "existing");
    lab.refuses(&lab.path("disk.raw"), Path::new("-"), &["--format", "qcow2"], 2, "raw");
    lab.refuses(&lab.path("disk.raw"), Path::new("-"), &["--compress", "zlib"], 2, "raw");
    lab.refuses(&lab.path("disk.raw"), Path::new("-"), &["--mode", "existing"], 2, "existing");
}

#[test]
fn formats_that_nobody_knows() {
    let lab = Lab::new();
    let old = lab.path("old.raw");
    for format in ["tar", "QCOW2", ""] {
        lab.refuses(&lab.path("disk.raw"), &old, &["--format", format], 2, "qcow2");
        lab.refuses(&lab.path("disk.raw"), &old, &["--source-format", format], 2, "qcow2");
    }
    lab.refuses(&lab.path("disk.raw"), &old, &["--compress", "lzo"], 2, "zstd");
    lab.refuses(&lab.path("disk.raw"), &old, &["--source-format", "qcow2"], 4, "qcow2");
    lab.refuses(&lab.path("disk.raw"), &old, &["--mode", "existing", "--format", "qcow2"], 5, "qcow2");
}

#[test]
fn no_arguments_and_unknown_ones() {
    let lab = Lab::new();
    for arguments in
        [&[][..], &["--device", "x"], &["--target", "x"], &["--device", "x", "--target", "y", "--frobnicate"]]
    {
        let ended = drive_backup(arguments);
        assert_eq!((ended.code, ended.stdout.len()), (2, 0), "{ended:?}");
        assert!(ended.stderr.starts_with("drive-backup: "), "{ended:?}");
    }
    lab.refuses_target(&lab.path("old.raw"), &["stray"], 2, "stray");
}

#[test]
fn two_instances_on_one_target() {
    let lab = Lab::new();
    let big = lab.path("big.raw");
    std::fs::write(&big, noise(5, 8 << 20)).unwrap();
    std::fs::create_dir(lab.path("out")).unwrap();
    let target = lab.path("out/copy.raw");
    std::fs::write(&target, "old").unwrap();
    let first = Running::drive_backup(&["--device", text(&big), "--target", text(&target), "--speed", "256K"]);
    let partial = lab.path("out/.copy.raw.drive-backup-partial");
    wait_for("the first bytes of its copy", || (allocated_now(&partial) > 0).then_some(()));
    copy(&lab.path("disk.raw"), &target, &[]).fails(8, "another");
    assert!(names(&lab.path("out")).len() == 2, "the first one's partial file is gone");
    assert_eq!(read(&target), b"old");
    first.signal(Signal::SIGKILL);
    assert_eq!(first.ended().code, 137);
    copy(&lab.path("disk.raw"), &target, &[]).succeeds();
    assert_eq!(names(&lab.path("out")), ["copy.raw"], "what the killed one left is gone");
    identical(&lab.path("disk.raw"), &target);
}

/// Copies a hostile image for little time and memory. It may be copied where the damage does not matter, and then as
/// qemu-img reads it; else it is a source error of one line.
#[track_caller]
fn survives(lab: &Lab, image: &Path, what: &str) {
    let target = lab.path("hostile.raw");
    let arguments = ["--device", text(image), "--source-format", "qcow2", "--target", text(&target), "--workers", "2"];
    let cost = cost(lab.folder.path(), &arguments);
    cost.assert_cheap(&[0, 4], what);
    if cost.ended.code == 4 {
        assert_eq!(cost.ended.stderr.lines().count(), 1, "{what}: {:?}", cost.ended);
        assert!(!target.exists(), "{what}: half a copy");
        return;
    }
    // A size that is no multiple of 512 QEMU cuts off; what is cut off is copied here.
    let mut size = [0; 8];
    std::fs::File::open(image).unwrap().read_exact_at(&mut size, 24).unwrap();
    let whole_sectors = u64::from_be_bytes(size) % 512 == 0;
    let judge =
        Command::new("qemu-img").args(["compare", "-f", "qcow2", "-F", "raw", text(image), text(&target)]).output();
    // 1: they differ. 2 and more: qemu-img does not read it.
    assert!(!whole_sectors || code(judge.unwrap().status) != 1, "{what}: not what qemu-img reads");
    std::fs::remove_file(&target).unwrap();
}

/// Name, offset and bytes of every field of the header.
const FIELDS: &[(&str, u64, usize)] = &[
    ("magic", 0, 4),
    ("version", 4, 4),
    ("backing_file_offset", 8, 8),
    ("backing_file_size", 16, 4),
    ("cluster_bits", 20, 4),
    ("size", 24, 8),
    ("crypt_method", 32, 4),
    ("l1_size", 36, 4),
    ("l1_table_offset", 40, 8),
    ("refcount_table_offset", 48, 8),
    ("refcount_table_clusters", 56, 4),
    ("nb_snapshots", 60, 4),
    ("snapshots_offset", 64, 8),
    ("incompatible", 72, 8),
    ("compatible", 80, 8),
    ("autoclear", 88, 8),
    ("refcount_order", 96, 4),
    ("header_length", 100, 4),
    ("compression_type", 104, 1),
];

#[test]
fn every_header_field_out_of_range() {
    let lab = Lab::new();
    for &(name, offset, width) in FIELDS {
        for value in
            [0, 1, 3, 9, 22, 64, 0x1001, 0x7fff_ffff, 0xffff_ffff, 1 << 40, (1 << 56) - 512, 1 << 62, 1 << 63, u64::MAX]
        {
            let image = patched(&lab, offset, &value.to_be_bytes()[8 - width..]);
            survives(&lab, &image, &format!("{name} = {value:#x}"));
        }
    }
}

#[test]
fn every_kind_of_table_entry_out_of_range() {
    let lab = Lab::new();
    let bytes = read(&lab.path("disk.qcow2"));
    let word = |at: u64| u64::from_be_bytes(bytes[at as usize..at as usize + 8].try_into().unwrap());
    let l1 = word(40);
    let l2 = word(l1) & 0x00ff_ffff_ffff_fe00;
    for (name, table) in [("L1", l1), ("L2", l2)] {
        for value in [
            1,
            0x200,
            0x1000,
            1 << 40,
            (1 << 56) - 0x1000,
            1 << 56,
            1 << 61,
            1 << 62,
            (1 << 62) | 0xfff,
            (1 << 62) | (0xff << 54),
            (1 << 62) | (1 << 53),
            u64::MAX,
            u64::MAX >> 1,
            l1,
            l2,
            l2 | (1 << 63),
        ] {
            let image = patched(&lab, table, &value.to_be_bytes());
            survives(&lab, &image, &format!("{name} entry = {value:#x}"));
        }
    }
}

#[test]
fn compressed_clusters_that_do_not_inflate_to_a_cluster() {
    let lab = Lab::new();
    for kind in ["zlib", "zstd"] {
        let good = lab.path("good.qcow2");
        let options = format!("convert -c -f raw -O qcow2 -o cluster_size=4k,compression_type={kind}");
        qemu_img(&options, &[&lab.path("disk.raw"), &good]);
        let bytes = read(&good);
        let word = |at: u64| u64::from_be_bytes(bytes[at as usize..at as usize + 8].try_into().unwrap());
        let entry = word(word(word(40)) & 0x00ff_ffff_ffff_fe00);
        assert_eq!(entry >> 62 & 1, 1, "the first cluster is compressed");
        let data = entry & ((1 << 58) - 1);
        for at in 0..24 {
            std::fs::copy(&good, lab.path("patched.qcow2")).unwrap();
            let file = std::fs::OpenOptions::new().write(true).open(lab.path("patched.qcow2")).unwrap();
            file.write_all_at(&[bytes[data as usize + at] ^ 0xff], data + at as u64).unwrap();
            survives(&lab, &lab.path("patched.qcow2"), &format!("{kind} byte {at}"));
        }
    }
}

#[test]
fn random_damage_to_the_metadata() {
    let lab = Lab::new();
    let whole = read(&lab.path("disk.qcow2"));
    let damage = noise(4242, 8 * 150);
    for (round, dice) in damage.chunks_exact(8).enumerate() {
        let mut bytes = whole.clone();
        // Header, refcounts, L1 and L2 are within the first clusters.
        for pair in dice.chunks_exact(4) {
            let at = (u32::from_le_bytes(pair.try_into().unwrap()) >> 8) as usize % (24 << 10);
            bytes[at % 120 + if pair[0] % 2 == 0 { 0 } else { at / 120 * 120 }] = pair[0];
        }
        std::fs::write(lab.path("patched.qcow2"), &bytes).unwrap();
        survives(&lab, &lab.path("patched.qcow2"), &format!("round {round}"));
    }
}
