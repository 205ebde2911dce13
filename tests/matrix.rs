//! Images made by qemu-img, copied to every kind of target, read back by qemu-img.
#![cfg(feature = "cli")]

mod support;

use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use support::bytes::{allocated, disk, identical, noise, read, same, scribble, sound};
use support::{
    BINARY, Ended, LoopDevice, Mount, command, copy, drive_backup, folder, names, qemu_img, qemu_io, run, sparse_file,
    text,
};

const MIB: u64 = 1 << 20;
/// No cluster of 64 KiB divides it.
const ODD: u64 = 3 * MIB + 512;

/// The kinds of target that every source is copied to: extension and flags.
const TARGETS: &[(&str, &[&str])] = &[
    ("raw", &[]),
    ("qcow2", &[]),
    ("qcow2", &["--compress", "zlib"]),
    ("qcow2", &["--compress", "zstd:1"]),
    ("qcow2", &["--cluster-size", "512"]),
    ("qcow2", &["--cluster-size", "4K", "--compress", "zstd"]),
    ("qcow2", &["--cluster-size", "2M", "--workers", "1"]),
    ("raw", &["--direct"]),
    ("raw", &["--no-fsync", "--sparse=never"]),
];

/// Copies `source` everywhere, and asks qemu-img whether it is the same.
#[track_caller]
fn copied_everywhere(format: &str, source: &Path) {
    let targets = folder();
    let before = std::fs::metadata(source).unwrap().modified().unwrap();
    for (index, (extension, flags)) in TARGETS.iter().enumerate() {
        let target = targets.path().join(format!("{index}.{extension}"));
        copy(source, &target, flags).succeeds();
        same((format, source), (extension, &target));
        if *extension == "qcow2" {
            sound(&target);
        }
    }
    let streamed = drive_backup(&["--device", text(source), "--target", "-"]);
    assert_eq!((streamed.code, streamed.stderr.as_str()), (0, ""));
    assert!(streamed.stdout == read(&targets.path().join("0.raw")), "the stream differs from the raw copy");
    assert_eq!(names(targets.path()).len(), TARGETS.len(), "{:?}", names(targets.path()));
    assert_eq!(std::fs::metadata(source).unwrap().modified().unwrap(), before, "the source was written");
}

/// A folder with a raw disk of `size` bytes named disk.raw.
fn lab(size: u64) -> (tempfile::TempDir, PathBuf) {
    let folder = folder();
    let raw = folder.path().join("disk.raw");
    disk(&raw, size);
    (folder, raw)
}

/// A qcow2 of the same disk, made by qemu-img with `options` (and `-c` for compressed ones).
fn converted(options: &str, size: u64) -> (tempfile::TempDir, PathBuf) {
    let (folder, raw) = lab(size);
    let image = folder.path().join("disk.qcow2");
    qemu_img(&format!("convert -f raw -O qcow2 {options}"), &[&raw, &image]);
    (folder, image)
}

#[track_caller]
fn converted_is_copied_everywhere(options: &str) {
    let (_folder, image) = converted(options, ODD);
    copied_everywhere("qcow2", &image);
}

#[test]
fn raw_disks_whose_size_no_cluster_divides() {
    for size in [512, 64 << 10, MIB + 512, ODD] {
        let (_folder, raw) = lab(size);
        copied_everywhere("raw", &raw);
    }
}

/// qemu-img rounds such a disk up to whole sectors; the bytes say more.
#[test]
fn raw_disks_whose_size_no_sector_divides() {
    for size in [1, 511, 513, 3 * MIB + 1] {
        let (folder, raw) = lab(size);
        let name = |name: &str| folder.path().join(name);
        copy(&raw, &name("copy.raw"), &[]).succeeds();
        identical(&raw, &name("copy.raw"));
        copy(&raw, &name("direct.raw"), &["--direct"]).succeeds();
        identical(&raw, &name("direct.raw"));
        assert!(drive_backup(&["--device", text(&raw), "--target", "-"]).stdout == read(&raw));
        for flags in [&[][..], &["--compress", "zlib"]] {
            copy(&raw, &name("copy.qcow2"), flags).succeeds();
            sound(&name("copy.qcow2"));
            qemu_img("convert -f qcow2 -O raw", &[&name("copy.qcow2"), &name("back.raw")]);
            let (mut wanted, found) = (read(&raw), read(&name("back.raw")));
            wanted.resize(size.next_multiple_of(512) as usize, 0);
            assert!(found == wanted, "a disk of {size} bytes");
        }
    }
}

#[test]
fn a_disk_of_no_bytes() {
    let (folder, raw) = lab(0);
    copy(&raw, &folder.path().join("copy.raw"), &["--source-format", "raw"]).succeeds();
    assert_eq!(read(&folder.path().join("copy.raw")), b"");
    let image = folder.path().join("disk.qcow2");
    qemu_img("create -q -f qcow2", &[&image, Path::new("0")]);
    copied_everywhere("qcow2", &image);
}

#[test]
fn qcow2_version_2() {
    converted_is_copied_everywhere("-o compat=0.10");
}

#[test]
fn qcow2_of_the_smallest_clusters() {
    converted_is_copied_everywhere("-o cluster_size=512");
}

#[test]
fn qcow2_of_the_largest_clusters() {
    converted_is_copied_everywhere("-o cluster_size=2M");
}

#[test]
fn qcow2_of_4_kib_clusters() {
    converted_is_copied_everywhere("-o cluster_size=4k,refcount_bits=1");
}

#[test]
fn qcow2_compressed_with_zlib() {
    converted_is_copied_everywhere("-c");
    converted_is_copied_everywhere("-c -o compat=0.10,cluster_size=4k");
}

#[test]
fn qcow2_compressed_with_zstd() {
    converted_is_copied_everywhere("-c -o compression_type=zstd,cluster_size=4k");
    converted_is_copied_everywhere("-c -o compression_type=zstd,cluster_size=2M");
}

#[test]
fn qcow2_preallocated() {
    converted_is_copied_everywhere("-o preallocation=metadata");
    converted_is_copied_everywhere("-o preallocation=full");
}

#[test]
fn qcow2_with_an_external_data_file() {
    for raw_too in ["off", "on"] {
        let (folder, image) = converted("-o cluster_size=4k", ODD);
        let outside = folder.path().join("outside.qcow2");
        let data = folder.path().join("data");
        let options = format!("data_file={},data_file_raw={raw_too}", text(&data));
        run("qemu-img", &["create", "-q", "-f", "qcow2", "-o", &options, text(&outside), &ODD.to_string()]);
        qemu_img("convert -n -f qcow2 -O qcow2", &[&image, &outside]);
        assert!(allocated(&data) > 0);
        copied_everywhere("qcow2", &outside);
    }
}

/// Relative to the image; QEMU takes it as relative to wherever it was started.
#[test]
fn a_relative_name_of_a_data_file() {
    let (folder, raw) = lab(ODD);
    let shell = "qemu-img create -q -f qcow2 -o data_file=data outside.qcow2 $1 &&
        qemu-img convert -n -f raw -O qcow2 disk.raw outside.qcow2";
    run("sh", &["-c", &format!("cd $0 && {shell}"), text(folder.path()), &ODD.to_string()]);
    copy(&folder.path().join("outside.qcow2"), &folder.path().join("copy.raw"), &[]).succeeds();
    identical(&raw, &folder.path().join("copy.raw"));
}

#[test]
fn qcow2_with_subclusters() {
    let (folder, base) = lab(ODD);
    let image = folder.path().join("overlay.qcow2");
    run(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            "extended_l2=on,cluster_size=128k",
            "-b",
            "disk.raw",
            "-F",
            "raw",
            text(&image),
        ],
    );
    // Data, zeroes and holes side by side in one cluster, over a backing file; a cluster of zeroes; one of data.
    qemu_io(
        &["-f", "qcow2"],
        &image,
        &[
            "write -P 1 4k 4k",
            "write -P 2 12k 512",
            "write -z 20k 8k",
            "write -P 3 127k 2k",
            "write -z 512k 128k",
            "write -P 4 1M 128k",
            "discard 2M 64k",
            "write -P 5 3M 512",
        ],
    );
    copied_everywhere("qcow2", &image);
    let compressed = folder.path().join("compressed.qcow2");
    qemu_img("convert -c -f raw -O qcow2 -o extended_l2=on", &[&base, &compressed]);
    copied_everywhere("qcow2", &compressed);
}

#[test]
fn qcow2_with_zero_clusters_of_both_kinds() {
    let (_folder, image) = converted("-o cluster_size=4k", ODD);
    qemu_io(
        &["-f", "qcow2"],
        &image,
        &["write -z 0 64k", "write -z -u 512k 100k", "write -P 9 520k 4k", "discard 2M 8k"],
    );
    copied_everywhere("qcow2", &image);
}

#[test]
fn a_chain_of_three_with_relative_names() {
    let (folder, base) = lab(2 * MIB + 512);
    std::fs::create_dir(folder.path().join("base")).unwrap();
    std::fs::rename(&base, folder.path().join("base/disk.raw")).unwrap();
    let create = |options: &str, backing: &str, format: &str, name: &str, size: u64| {
        run(
            "qemu-img",
            &[
                "create",
                "-q",
                "-f",
                "qcow2",
                "-o",
                options,
                "-b",
                backing,
                "-F",
                format,
                text(&folder.path().join(name)),
                &size.to_string(),
            ],
        );
    };
    // Each as large as its own; a longer top reads zeroes past its backing file's end.
    create("compat=0.10,cluster_size=512", "disk.raw", "raw", "base/middle.qcow2", 3 * MIB - 512);
    create("cluster_size=64k", "base/middle.qcow2", "qcow2", "top.qcow2", ODD);
    let (middle, top) = (folder.path().join("base/middle.qcow2"), folder.path().join("top.qcow2"));
    qemu_io(&["-f", "qcow2"], &middle, &["write -P 1 10k 3k", "write -P 2 1M 70k", "write -P 3 2500k 10k"]);
    qemu_io(&["-f", "qcow2"], &top, &["write -P 4 11k 512", "write -z 1M 64k", "write -P 5 3M 512"]);
    copied_everywhere("qcow2", &top);
    let refused = copy(&top, &folder.path().join("copy.raw"), &["--no-backing"]);
    refused.fails(4, "has a backing file");
    copy(&folder.path().join("base/disk.raw"), &folder.path().join("copy.raw"), &["--no-backing"]).succeeds();
}

#[test]
fn internal_snapshots_do_not_show() {
    let (_folder, image) = converted("", ODD);
    qemu_img("snapshot -c before", &[&image]);
    qemu_io(&["-f", "qcow2"], &image, &["write -P 7 0 100k", "write -P 8 2M 1000k"]);
    copied_everywhere("qcow2", &image);
}

/// Sets bits of a qcow2 header's incompatible features.
fn set_incompatible(image: &Path, bits: u64) {
    let file = OpenOptions::new().read(true).write(true).open(image).unwrap();
    let mut field = [0; 8];
    file.read_exact_at(&mut field, 72).unwrap();
    file.write_all_at(&(u64::from_be_bytes(field) | bits).to_be_bytes(), 72).unwrap();
}

#[test]
fn lazy_refcounts_and_the_dirty_bit() {
    let (_folder, image) = converted("-o lazy_refcounts=on", ODD);
    set_incompatible(&image, 1);
    copied_everywhere("qcow2", &image);
}

#[test]
fn an_image_marked_corrupt_is_copied_with_a_warning() {
    let (folder, image) = converted("", ODD);
    set_incompatible(&image, 2);
    let target = folder.path().join("copy.raw");
    let ended = copy(&image, &target, &[]);
    assert_eq!(ended.code, 0, "{ended:?}");
    assert_eq!(ended.stderr.lines().count(), 1, "{ended:?}");
    assert!(ended.stderr.starts_with("drive-backup: warning: ") && ended.stderr.contains("corrupt"), "{ended:?}");
    identical(&folder.path().join("disk.raw"), &target);
}

#[test]
fn formats_come_from_flag_then_extension_then_source() {
    let (folder, image) = converted("", ODD);
    let name = |name: &str| folder.path().join(name);
    let format = |path: &Path| {
        let described = qemu_img("info --output=json", &[path]);
        ["qcow2", "raw"].into_iter().find(|f| described.contains(&format!("\"format\": \"{f}\""))).unwrap()
    };
    copy(&image, &name("like-its-source"), &[]).succeeds();
    assert_eq!(format(&name("like-its-source")), "qcow2");
    copy(&image, &name("a.img"), &[]).succeeds();
    assert_eq!(format(&name("a.img")), "raw");
    copy(&image, &name("flag.qcow2"), &["--format", "raw"]).succeeds();
    assert_eq!(format(&name("flag.qcow2")), "raw");
    // An image that is called raw is raw: the qcow2's own bytes are the disk.
    copy(&image, &name("bytes.raw"), &["--source-format", "raw"]).succeeds();
    identical(&image, &name("bytes.raw"));
}

#[test]
fn new_images_have_the_geometry_that_was_asked_for() {
    let (folder, raw) = lab(ODD);
    let target = folder.path().join("copy.qcow2");
    for (flags, wanted) in [
        (&[][..], &["\"cluster-size\": 65536", "\"compression-type\": \"zlib\"", "\"compat\": \"1.1\""][..]),
        (&["--cluster-size", "4K"], &["\"cluster-size\": 4096"]),
        (
            &["--cluster-size", "2M", "--compress", "zstd"],
            &["\"cluster-size\": 2097152", "\"compression-type\": \"zstd\""],
        ),
    ] {
        copy(&raw, &target, flags).succeeds();
        let described = qemu_img("info --output=json", &[&target]);
        wanted.iter().for_each(|field| assert!(described.contains(field), "{field}: {described}"));
    }
    copy(&raw, &target, &["--compress", "zstd"]).succeeds();
    let map = qemu_img("map --output=json", &[&target]);
    assert!(map.contains("\"compressed\": true"), "{map}");
}

#[test]
fn a_replaced_file_keeps_its_mode_and_owner_and_a_symlink_its_place() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
    let (folder, raw) = lab(ODD);
    let (target, link) = (folder.path().join("old.raw"), folder.path().join("link.raw"));
    std::fs::write(&target, "old").unwrap();
    std::fs::set_permissions(&target, PermissionsExt::from_mode(0o640)).unwrap();
    chown(&target, Some(12), Some(34)).unwrap();
    std::os::unix::fs::symlink("old.raw", &link).unwrap();
    copy(&raw, &link, &[]).succeeds();
    identical(&raw, &target);
    assert!(std::fs::symlink_metadata(&link).unwrap().is_symlink());
    let kept = std::fs::metadata(&target).unwrap();
    assert_eq!((kept.mode() & 0o7777, kept.uid(), kept.gid()), (0o640, 12, 34));
}

#[test]
fn an_existing_raw_file_is_overwritten_in_place_zeroes_too() {
    let (folder, raw) = lab(ODD);
    let target = folder.path().join("existing.raw");
    for flags in
        [&["--mode", "existing"][..], &["--mode", "existing", "--sparse=never"], &["--mode", "existing", "--direct"]]
    {
        std::fs::write(&target, noise(7, ODD as usize)).unwrap();
        let inode = inode(&target);
        copy(&raw, &target, flags).succeeds();
        identical(&raw, &target);
        assert_eq!(self::inode(&target), inode, "in place");
    }
}

fn inode(path: &Path) -> u64 {
    std::os::unix::fs::MetadataExt::ino(&std::fs::metadata(path).unwrap())
}

#[test]
fn an_existing_qcow2_is_overwritten_in_place_and_keeps_its_geometry() {
    let (folder, raw) = lab(ODD);
    let target = folder.path().join("existing.qcow2");
    for options in ["cluster_size=4k", "cluster_size=2M", "compat=0.10", "lazy_refcounts=on", "refcount_bits=64"] {
        let old = folder.path().join("old.raw");
        std::fs::write(&old, noise(8, ODD as usize)).unwrap();
        qemu_img(&format!("convert -f raw -O qcow2 -o {options}"), &[&old, &target]);
        let inode = inode(&target);
        copy(&raw, &target, &["--mode", "existing"]).succeeds();
        same(("raw", &raw), ("qcow2", &target));
        sound(&target);
        assert_eq!(self::inode(&target), inode, "in place");
        let described = qemu_img("info", &[&target]);
        let kept = if options == "compat=0.10" { "compat: 0.10".to_owned() } else { options.replace(['_', '='], " ") };
        let kept =
            kept.replace("cluster size 4k", "cluster_size: 4096").replace("cluster size 2M", "cluster_size: 2097152");
        let kept =
            kept.replace("lazy refcounts on", "lazy refcounts: true").replace("refcount bits 64", "refcount bits: 64");
        assert!(described.contains(&kept), "{kept}: {described}");
    }
}

#[test]
fn an_existing_overlay_keeps_its_backing_file_and_shows_the_copy() {
    let (folder, raw) = lab(ODD);
    let (base, target) = (folder.path().join("base.raw"), folder.path().join("overlay.qcow2"));
    std::fs::write(&base, noise(9, ODD as usize)).unwrap();
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", text(&target)]);
    qemu_io(&["-f", "qcow2"], &target, &["write -P 1 100k 300k"]);
    let before = support::fingerprint(folder.path()).into_iter().filter(|l| l.contains("base.raw")).collect::<Vec<_>>();
    copy(&raw, &target, &["--mode", "existing"]).succeeds();
    same(("raw", &raw), ("qcow2", &target));
    sound(&target);
    assert!(qemu_img("info", &[&target]).contains("backing file: base.raw"));
    let after = support::fingerprint(folder.path()).into_iter().filter(|l| l.contains("base.raw")).collect::<Vec<_>>();
    assert_eq!(before, after, "the backing file was touched");
}

/// What a guest wrote at the beginning of its raw disk is at the beginning of its copy.
#[test]
fn a_copy_that_begins_like_an_image_is_overwritten_as_what_was_said() {
    let (folder, raw) = lab(ODD);
    let name = |name: &str| folder.path().join(name);
    let image = |path: &Path| {
        let length = ODD.to_string();
        run("qemu-img", &["create", "-q", "-f", "qcow2", text(path), &length]);
    };
    let existing = ["--mode", "existing", "--source-format", "raw"];
    for target in ["copy.raw", "copy.img", "copy"] {
        image(&name(target));
        let file = std::fs::OpenOptions::new().write(true).open(name(target)).unwrap();
        file.set_len(ODD).unwrap();
        copy(&raw, &name(target), &existing).fails(2, "begins like qcow2, which the data of a raw disk may do too");
        copy(&raw, &name(target), &[&existing[..], &["--format", "raw"]].concat()).succeeds();
        identical(&raw, &name(target));
    }
    image(&name("image"));
    copy(&raw, &name("image"), &[&existing[..], &["--format", "qcow2"]].concat()).succeeds();
    same(("raw", &raw), ("qcow2", &name("image")));
    // Its name says so, or its source is one.
    image(&name("image.qcow2"));
    copy(&raw, &name("image.qcow2"), &existing).succeeds();
    copy(&name("image.qcow2"), &name("image"), &["--mode", "existing"]).succeeds();
    same(("raw", &raw), ("qcow2", &name("image")));
}

#[test]
fn what_is_wrong_with_an_existing_targets_backing_file_is_told() {
    let (folder, base) = converted("", ODD);
    set_incompatible(&base, 2);
    let (raw, target) = (folder.path().join("disk.raw"), folder.path().join("overlay.qcow2"));
    run("qemu-img", &["create", "-q", "-f", "qcow2", "-b", text(&base), "-F", "qcow2", text(&target)]);
    let ended = copy(&raw, &target, &["--mode", "existing"]);
    assert_eq!((ended.code, ended.stderr.lines().count()), (0, 1), "{ended:?}");
    let name = text(&base);
    assert!(ended.stderr.contains(&format!("warning: '{name}' is marked corrupt")), "{ended:?}");
    same(("raw", &raw), ("qcow2", &target));
}

#[test]
fn a_block_device_as_source() {
    let (folder, raw) = lab(ODD);
    let device = LoopDevice::over(&raw, &["-r"]);
    copied_everywhere("raw", device.path());
    let image = folder.path().join("disk.qcow2");
    qemu_img("convert -f raw -O qcow2", &[&raw, &image]);
    let holder = folder.path().join("holder");
    std::fs::copy(&image, &holder).unwrap();
    let device = LoopDevice::over(&holder, &["-r"]);
    let target = folder.path().join("copy.raw");
    // What a device holds is probed like what a file holds.
    copy(device.path(), &target, &[]).succeeds();
    identical(&raw, &target);
}

#[test]
fn a_block_device_as_target_holds_nothing_of_its_old_data() {
    let (folder, raw) = lab(ODD);
    let behind = folder.path().join("behind");
    for flags in
        [&["--format", "raw"][..], &["--mode", "existing", "--format", "raw"], &["--direct", "--format", "raw"]]
    {
        std::fs::write(&behind, noise(10, ODD as usize)).unwrap();
        let device = LoopDevice::over(&behind, &[]);
        copy(&raw, device.path(), flags).succeeds();
        drop(device);
        identical(&raw, &behind);
    }
}

#[test]
fn holes_stay_holes_and_runs_of_zeroes_become_holes() {
    let folder = folder();
    let name = |name: &str| folder.path().join(name);
    let raw = name("disk.raw");
    sparse_file(&raw, 64 * MIB);
    scribble(&raw, 0, 100 << 10);
    scribble(&raw, 32 * MIB, 100 << 10);
    OpenOptions::new().write(true).open(&raw).unwrap().write_all_at(&vec![0; 8 << 20], 40 * MIB).unwrap();
    assert!(allocated(&raw) > 8 * MIB);
    copy(&raw, &name("sparse.raw"), &[]).succeeds();
    identical(&raw, &name("sparse.raw"));
    assert!(allocated(&name("sparse.raw")) < MIB, "{}", allocated(&name("sparse.raw")));
    copy(&raw, &name("copy.qcow2"), &[]).succeeds();
    assert!(allocated(&name("copy.qcow2")) < MIB + (512 << 10), "{}", allocated(&name("copy.qcow2")));
    copy(&raw, &name("full.raw"), &["--sparse=never"]).succeeds();
    identical(&raw, &name("full.raw"));
    assert!(allocated(&name("full.raw")) >= 64 * MIB, "{}", allocated(&name("full.raw")));
    // An old file's blocks are given back where the disk is zero.
    std::fs::write(name("old.raw"), noise(11, 64 << 20)).unwrap();
    copy(&raw, &name("old.raw"), &["--mode", "existing"]).succeeds();
    identical(&raw, &name("old.raw"));
    assert!(allocated(&name("old.raw")) < MIB, "{}", allocated(&name("old.raw")));
}

#[test]
fn a_clone_of_the_file_system_is_as_good() {
    for kind in ["xfs", "btrfs"] {
        let mount = Mount::fresh(kind);
        for size in [3 * MIB + 1, 4 * MIB] {
            let raw = mount.join("disk.raw");
            disk(&raw, size);
            copy(&raw, &mount.join("copy.raw"), &[]).succeeds();
            identical(&raw, &mount.join("copy.raw"));
            copy(&raw, &mount.join("copy.qcow2"), &["--compress", "zstd"]).succeeds();
            sound(&mount.join("copy.qcow2"));
            assert_eq!(
                names(mount.path()).iter().filter(|n| !n.starts_with("lost")).count(),
                3,
                "{:?}",
                names(mount.path())
            );
        }
    }
}

/// Ended, and the most memory that it had, in bytes.
fn measured(arguments: &[&str]) -> (Ended, u64) {
    let report = tempfile::NamedTempFile::new().unwrap();
    let mut timed = Command::new("/usr/bin/time");
    timed.args(["-q", "-f", "%M", "-o", text(report.path()), BINARY]).args(arguments);
    let ended = Ended::of(support::piped(timed).output().expect("GNU time (Debian's package time) runs"));
    let kib: u64 = std::fs::read_to_string(report.path()).unwrap().trim().parse().unwrap();
    (ended, kib << 10)
}

#[test]
fn sixteen_tebibytes_with_little_data_take_little_time_and_memory() {
    const HUGE: u64 = 16 << 40;
    // ext4's largest file is a block shorter.
    let mount = Mount::tmpfs(512 << 20);
    let raw = mount.join("huge.raw");
    sparse_file(&raw, HUGE);
    for island in 0..16 {
        scribble(&raw, island * (HUGE / 16) + island * 12_288, 1 << 20);
    }
    scribble(&raw, HUGE - 5000, 5000);
    let image = mount.join("huge.qcow2");
    run("qemu-img", &["create", "-q", "-f", "qcow2", text(&image), &HUGE.to_string()]);
    for island in 0..16u64 {
        let write = format!("write -P {} {} 1M", island + 1, island * (HUGE / 16) + island * 12_288);
        qemu_io(&["-f", "qcow2"], &image, &[&write]);
    }
    for (format, source) in [("raw", &raw), ("qcow2", &image)] {
        for (extension, flags) in [("raw", &[][..]), ("qcow2", &[]), ("qcow2", &["--compress", "zstd"])] {
            let target = mount.join(&format!("copy.{extension}"));
            let started = std::time::Instant::now();
            let (ended, peak) = measured(&[&["--device", text(source), "--target", text(&target)], flags].concat());
            ended.succeeds();
            // Both are far from the limits where they are right, and far beyond where holes are read.
            assert!(started.elapsed().as_secs() < 60, "{:?}", started.elapsed());
            assert!(peak < 128 << 20, "{peak} bytes at {format} to {extension} {flags:?}");
            same((format, source), (extension, &target));
            std::fs::remove_file(&target).unwrap();
        }
    }
}

#[test]
fn a_reader_of_the_stream_that_leaves_is_a_target_error() {
    let (_folder, raw) = lab(8 * MIB);
    let mut child = command(&["--device", text(&raw), "--target", "-", "--sparse=never"]).spawn().unwrap();
    drop(child.stdout.take());
    let ended = Ended::of(child.wait_with_output().unwrap());
    ended.fails(5, "Broken pipe");
}

#[test]
fn a_stream_may_be_a_file() {
    let (folder, raw) = lab(ODD);
    let path = folder.path().join("streamed");
    let mut file = std::fs::File::create(&path).unwrap();
    file.write_all(b"").unwrap();
    let status = command(&["--device", text(&raw), "--target", "-"]).stdout(file).status().unwrap();
    assert!(status.success());
    identical(&raw, &path);
}
