use super::*;
use crate::image::fixture::{LoopDevice, Mount, run, sparse_file, text};
use std::os::unix::fs::symlink;

fn refused(target: &Path, source: &Path) -> bool {
    match refuse_same(target, &[source]) {
        Ok(()) => false,
        Err(e) => {
            assert_eq!(e.kind(), Kind::Usage);
            assert!(e.to_string().starts_with("source and target cannot be the same: "), "{e}");
            true
        }
    }
}

fn assert_same(one: &Path, other: &Path) {
    assert!(refused(one, other) && refused(other, one), "{} is {}", one.display(), other.display());
}

fn assert_apart(one: &Path, other: &Path) {
    assert!(!refused(one, other) && !refused(other, one), "{} is not {}", one.display(), other.display());
}

#[test]
fn a_file_is_itself_by_every_link_and_bind_mount() {
    let folder = tempfile::tempdir().unwrap();
    let name = |n: &str| folder.path().join(n);
    sparse_file(&name("disk"), 4096);
    sparse_file(&name("other"), 4096);
    symlink("disk", name("link")).unwrap();
    std::fs::hard_link(name("disk"), name("hard")).unwrap();
    for alias in ["disk", "link", "hard", "../disk"] {
        let alias = match alias {
            "../disk" => name("..").join(folder.path().file_name().unwrap()).join("disk"),
            alias => name(alias),
        };
        assert_same(&alias, &name("disk"));
    }
    assert_apart(&name("other"), &name("disk"));
    let bound = Mount::bind(folder.path());
    assert_same(&bound.join("disk"), &name("disk"));
    assert_apart(&bound.join("other"), &name("disk"));
}

#[test]
fn a_target_that_does_not_exist_is_no_source() {
    let folder = tempfile::tempdir().unwrap();
    sparse_file(&folder.path().join("disk"), 4096);
    refuse_same(&folder.path().join("new"), &[&folder.path().join("disk")]).unwrap();
    refuse_in_use(&folder.path().join("new"), Side::Target).unwrap();
}

#[test]
fn every_file_of_the_chain_counts() {
    let folder = tempfile::tempdir().unwrap();
    let name = |n: &str| folder.path().join(n);
    for n in ["top", "base"] {
        sparse_file(&name(n), 4096);
    }
    let error = refuse_same(&name("base"), &[&name("top"), &name("base")]).unwrap_err();
    let base = name("base");
    let expected = format!("source and target cannot be the same: '{0}' holds bytes of '{0}'", base.display());
    assert_eq!(error.to_string(), expected);
}

#[test]
fn a_loop_device_is_the_file_behind_it() {
    let folder = tempfile::tempdir().unwrap();
    let name = |n: &str| folder.path().join(n);
    sparse_file(&name("disk"), 1 << 20);
    sparse_file(&name("other"), 1 << 20);
    let device = LoopDevice::over(&name("disk"), &[]);
    let twin = LoopDevice::over(&name("disk"), &[]);
    let nested = LoopDevice::over(device.path(), &[]);
    let other = LoopDevice::over(&name("other"), &[]);
    for alias in [&name("disk"), device.path(), twin.path(), nested.path()] {
        assert_same(alias, device.path());
        assert_same(alias, &name("disk"));
        assert_apart(alias, other.path());
        assert_apart(alias, &name("other"));
    }
}

#[test]
fn two_windows_of_one_file_are_the_same_only_where_they_overlap() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("disk");
    sparse_file(&path, 1 << 20);
    let window = |offset: &str, size: &str| LoopDevice::over(&path, &["--offset", offset, "--sizelimit", size]);
    let (first, second, both) = (window("0", "524288"), window("524288", "524288"), window("262144", "524288"));
    assert_apart(first.path(), second.path());
    assert_same(both.path(), first.path());
    assert_same(both.path(), second.path());
    assert_same(second.path(), &path);
}

/// A loop device with two partitions of 1 MiB each, at 1 MiB and 2 MiB. They go with the device, which `-P` is for.
fn partitioned(folder: &Path) -> LoopDevice {
    let path = folder.join("partitioned");
    sparse_file(&path, 4 << 20);
    let device = LoopDevice::over(&path, &["-P"]);
    for (number, start) in [("1", "2048"), ("2", "4096")] {
        run("addpart", &[text(device.path()), number, start, "2048"]);
    }
    device
}

fn part(device: &LoopDevice, number: u32) -> PathBuf {
    format!("{}p{number}", text(device.path())).into()
}

#[test]
fn a_partition_is_its_disk_and_not_its_neighbour() {
    let folder = tempfile::tempdir().unwrap();
    let device = partitioned(folder.path());
    assert_same(&part(&device, 1), device.path());
    assert_same(&part(&device, 1), &folder.path().join("partitioned"));
    assert_apart(&part(&device, 1), &part(&device, 2));
}

#[test]
fn a_mounted_partition_makes_its_disk_busy_and_not_its_neighbour() {
    let folder = tempfile::tempdir().unwrap();
    let device = partitioned(folder.path());
    run("mkfs.ext4", &["-q", text(&part(&device, 1))]);
    let mount = Mount::device(&part(&device, 1));
    for target in [&part(&device, 1), device.path(), &folder.path().join("partitioned")] {
        let error = refuse_in_use(target, Side::Target).unwrap_err();
        assert_eq!(error.kind(), Kind::Busy);
        assert_eq!(
            error.to_string(),
            format!("target '{}' is mounted at '{}'", target.display(), mount.path().display())
        );
        assert_eq!(mounted_writable(target).unwrap().as_deref(), Some(mount.path()));
    }
    refuse_in_use(&part(&device, 2), Side::Target).unwrap();
    run("mount", &["-o", "remount,ro", text(mount.path())]);
    assert_eq!(mounted_writable(device.path()).unwrap(), None);
    assert!(refuse_in_use(device.path(), Side::Target).is_err());
}

#[test]
fn a_btrfs_that_hides_its_device_number_is_found() {
    let mount = Mount::fresh("btrfs");
    let device = run("findmnt", &["-n", "-o", "SOURCE", text(mount.path())]);
    assert_eq!(mounted_writable(Path::new(&device)).unwrap().as_deref(), Some(mount.path()));
}

#[test]
fn swap_space_is_in_use() {
    let folder = tempfile::tempdir().unwrap();
    sparse_file(&folder.path().join("swap"), 1 << 20);
    let device = LoopDevice::over(&folder.path().join("swap"), &[]);
    run("mkswap", &["-q", text(device.path())]);
    refuse_in_use(device.path(), Side::Target).unwrap();
    run("swapon", &[text(device.path())]);
    let error = refuse_in_use(device.path(), Side::Target).map_err(|e| e.to_string());
    run("swapoff", &[text(device.path())]);
    let shown = device.path().display();
    assert_eq!(error.unwrap_err(), format!("target '{shown}' is used as swap space '{shown}'"));
}

/// A made-up /sys/dev/block: disk 8:0 with partitions 8:1 and 8:2, mappings 253:0 and 253:1 on 8:1, 253:2 on 253:0.
fn made_up() -> (tempfile::TempDir, Sysfs) {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("block");
    let devices = folder.path().join("devices");
    std::fs::create_dir(&root).unwrap();
    let device = |path: &str, number: &str, slaves: &[&str]| {
        let path = devices.join(path);
        std::fs::create_dir_all(path.join("slaves")).unwrap();
        std::fs::write(path.join("dev"), number).unwrap();
        for slave in slaves {
            symlink(root.join(slave), path.join("slaves").join(slave)).unwrap();
        }
        symlink(&path, root.join(number)).unwrap();
    };
    device("sda", "8:0", &[]);
    for (number, start) in [(1, "2048"), (2, "4096")] {
        let name = format!("sda/sda{number}");
        device(&name, &format!("8:{number}"), &[]);
        std::fs::write(devices.join(&name).join("partition"), number.to_string()).unwrap();
        std::fs::write(devices.join(&name).join("start"), start).unwrap();
        std::fs::write(devices.join(&name).join("size"), "2048").unwrap();
    }
    device("dm-0", "253:0", &["8:1"]);
    device("dm-1", "253:1", &["8:1"]);
    device("dm-2", "253:2", &["253:0"]);
    (folder, Sysfs { root })
}

#[test]
fn a_mapping_overlaps_what_lies_below_it_and_no_sibling() {
    let (_folder, sysfs) = made_up();
    let storage = |major: u32, minor: u32| sysfs.storage(makedev(major, minor));
    let overlap = |one: (u32, u32), other: (u32, u32)| {
        let (one, other) = (storage(one.0, one.1), storage(other.0, other.1));
        assert_eq!(one.overlaps(&other), other.overlaps(&one));
        one.overlaps(&other)
    };
    let (disk, first, second, lower, sibling, upper) = ((8, 0), (8, 1), (8, 2), (253, 0), (253, 1), (253, 2));
    for above in [lower, sibling, upper] {
        assert!(overlap(above, disk) && overlap(above, first) && overlap(above, above));
        assert!(!overlap(above, second));
    }
    assert!(overlap(upper, lower) && overlap(disk, first) && !overlap(first, second));
    assert!(!overlap(lower, sibling) && !overlap(upper, sibling));
}

#[test]
fn devices_that_lie_on_each_other_in_a_circle_end() {
    let (folder, sysfs) = made_up();
    symlink(folder.path().join("block/253:2"), folder.path().join("devices/dm-0/slaves/253:2")).unwrap();
    assert!(sysfs.storage(makedev(253, 0)).overlaps(&sysfs.storage(makedev(253, 2))));
}

#[test]
fn lines_of_mountinfo_are_understood() {
    let text = b"36 35 8:1 / /mnt/with\\040space ro,noatime shared:1 - ext4 /dev/sda1 rw,errors=continue\n\
        37 35 0:50 / /ro rw - btrfs /dev/sdb ro\nnonsense\n\n";
    let mounts = parse_mounts(text);
    let expected = [
        Mounted { number: makedev(8, 1), source: "/dev/sda1".into(), at: "/mnt/with space".into(), is_writable: true },
        Mounted { number: makedev(0, 50), source: "/dev/sdb".into(), at: "/ro".into(), is_writable: false },
    ];
    assert_eq!(mounts, expected);
    assert_eq!(unescape(b"a\\134b\\9\\777\\"), PathBuf::from(OsStr::from_bytes(b"a\\b\\9\\777\\")));
    let swaps = b"Filename\t\tType\n/dev/sda2  partition 1\n/swap\\040file file 2\n";
    assert_eq!(parse_swaps(swaps), [PathBuf::from("/dev/sda2"), PathBuf::from("/swap file")]);
}
