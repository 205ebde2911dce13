//! Sources that change beside a backup, by programs that ask nobody: between its opening and its instant, before a writer
//! starts that asks, and below an image whose writer asks.

use crate::kit;
use crate::support::hold::Hold;
use crate::support::{self, Ended, Mount, Running, bytes, qemu_img, qemu_io, text};
use drive_backup::writer::Writer;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use tempfile::TempDir;

/// A source in a folder of its own.
struct Scene {
    folder: TempDir,
    source: &'static str,
}

impl Scene {
    fn of(source: &'static str, create: &str) -> Self {
        let scene = Self { folder: kit::memory_folder(), source };
        qemu_img(create, &[&scene.path(source)]);
        scene
    }

    /// A raw disk that is full.
    fn raw() -> Self {
        let scene = Self { folder: kit::memory_folder(), source: "disk.raw" };
        std::fs::write(scene.path("disk.raw"), bytes::noise(1, LENGTH as usize)).unwrap();
        scene
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// How a backup ends while which `meanwhile` is done at `place`.
    #[track_caller]
    fn copy(&self, place: &str, arguments: &[&str], meanwhile: impl FnOnce()) -> Ended {
        let hold = Hold::at(place, self.folder.path());
        let [source, copy, meet] = [self.source, "copy.raw", "meet"].map(|name| self.path(name));
        let mut command = support::command(&["--device", text(&source), "--target", text(&copy), "--workers", "1"]);
        command.args(["--overlay", "memory", "--writer-dir", text(&meet)]).args(arguments);
        let mut running = Running::start(command.env("DRIVE_BACKUP_HOLD", hold.variable()));
        let held = hold.reached(&mut running);
        meanwhile();
        drop(held);
        running.ended()
    }

    /// It failed for `file`, and left no copy, if that `is_changed`; else it succeeded.
    #[track_caller]
    fn is_noticed(&self, ended: &Ended, file: &str, is_changed: bool) {
        if is_changed {
            ended.fails(4, &format!("{file}' is not consistent"));
            self.has_no_copy();
        } else {
            ended.succeeds();
        }
    }

    fn has_no_copy(&self) {
        assert!(!self.path("copy.raw").exists());
    }

    fn overwrite(&self, name: &str, offset: u64) {
        File::options().write(true).open(self.path(name)).unwrap().write_all_at(b"meanwhile", offset).unwrap();
    }
}

const QCOW2: &str = "create -q -f qcow2 -o size=2G";
const LENGTH: u64 = 8 << 20;

/// Tables that were read at the opening know nothing of what was written then.
#[test]
fn what_is_written_to_an_image_before_the_instant_is_in_its_copy() {
    let scene = Scene::of("disk.qcow2", QCOW2);
    let source = scene.path(scene.source);
    qemu_io(&["-f", "qcow2"], &source, &["write -P 1 0 64k"]);
    // In a part of the disk that had no table yet.
    let meanwhile = || qemu_io(&["-f", "qcow2"], &source, &["write -P 2 1G 64k"]);
    scene.copy("Opened", &[], meanwhile).succeeds();
    qemu_img("compare -q", &[&source, &scene.path("copy.raw")]);
}

#[test]
fn an_image_that_another_one_replaces_before_the_instant_is_refused() {
    let scene = Scene::of("disk.qcow2", QCOW2);
    let source = scene.path(scene.source);
    let replace = || {
        qemu_img(QCOW2, &[&scene.path("new")]);
        std::fs::rename(scene.path("new"), &source).unwrap();
    };
    scene.copy("Opened", &[], replace).fails(4, "was replaced while it was opened");
    scene.has_no_copy();
}

#[test]
fn a_disk_that_grows_before_the_instant_is_refused_rather_than_cut() {
    for arguments in [&[][..], &["--writer", "none"], &["--allow-inconsistent"]] {
        let scene = Scene::raw();
        let grow = || File::options().write(true).open(scene.path(scene.source)).unwrap().set_len(9 << 20).unwrap();
        scene.copy("Opened", arguments, grow).fails(4, "was resized to 9437184 bytes while it was opened");
        scene.has_no_copy();
    }
}

#[test]
fn an_image_that_qemu_reads_and_that_changes_before_the_instant_is_refused() {
    let scene = Scene::of("disk.vdi", "create -q -f vdi -o size=8M");
    let change = || File::options().append(true).open(scene.path(scene.source)).unwrap().set_len(8 << 20).unwrap();
    scene.copy("Opened", &[], change).fails(4, "was changed: its size went from");
    scene.has_no_copy();
}

/// From its first write on a writer that starts late is trapped; what another program wrote before is not excused by it.
#[test]
fn a_change_before_a_writer_starts_is_noticed() {
    for is_changed in [false, true] {
        let scene = Scene::raw();
        let mut writer = None;
        let ended = scene.copy("Copying", &[], || {
            if is_changed {
                scene.overwrite("disk.raw", 0);
            }
            let late = Writer::open_in(scene.path("disk.raw"), scene.path("meet")).unwrap();
            let bracket = late.begin(LENGTH / 2, 9).unwrap();
            scene.overwrite("disk.raw", LENGTH / 2);
            drop(bracket);
            writer = Some(late);
        });
        scene.is_noticed(&ended, "disk.raw", is_changed);
    }
}

/// Its writer asks for what it writes to the image, and nobody for what is below.
#[test]
fn a_backing_file_that_changes_below_a_writer_is_noticed() {
    for is_changed in [false, true] {
        let scene = Scene::raw();
        let top = Scene { source: "top.qcow2", ..scene };
        let over = format!("create -q -f qcow2 -F raw -b {}", text(&top.path("disk.raw")));
        qemu_img(&over, &[&top.path("top.qcow2")]);
        let writer = Writer::open_in(top.path("top.qcow2"), top.path("meet")).unwrap();
        let ended = top.copy("Copying", &["--writer", "required"], || {
            if is_changed {
                top.overwrite("disk.raw", LENGTH / 2);
            }
        });
        top.is_noticed(&ended, "disk.raw", is_changed);
        drop(writer);
    }
}

/// A disk in several files, of which QEMU alone knows.
#[test]
fn each_file_of_an_image_that_qemu_reads_is_watched_and_no_target() {
    for is_changed in [false, true] {
        let scene = Scene::raw();
        let vmdk = Scene { source: "disk.vmdk", ..scene };
        let convert = "convert -O vmdk -o subformat=monolithicFlat -f raw";
        qemu_img(convert, &[&vmdk.path("disk.raw"), &vmdk.path("disk.vmdk")]);
        let ended = vmdk.copy("Copying", &[], || {
            if is_changed {
                vmdk.overwrite("disk-flat.vmdk", LENGTH / 2);
            }
        });
        vmdk.is_noticed(&ended, "disk-flat.vmdk", is_changed);
        let [vmdk, flat] = ["disk.vmdk", "disk-flat.vmdk"].map(|name| vmdk.path(name));
        support::copy(&vmdk, &flat, &[]).fails(2, "disk-flat.vmdk");
    }
    let folder = kit::memory_folder();
    let [base, top] = ["base.qed", "top.qed"].map(|name| folder.path().join(name));
    qemu_img("create -q -f qed -o size=8M", &[&base]);
    qemu_img(&format!("create -q -f qed -F qed -b {}", text(&base)), &[&top]);
    support::copy(&top, &base, &[]).fails(2, "base.qed");
}

/// Each is kept at a moment of its own, so that no two of them are one unless nobody writes in between.
#[test]
fn disks_that_change_while_the_instant_of_several_is_taken_are_refused() {
    let xfs = Mount::fresh("xfs");
    let memory = kit::memory_folder();
    for (home, changed) in
        [xfs.path(), memory.path()].into_iter().flat_map(|home| ["", "a", "b"].map(|name| (home, name)))
    {
        for allowed in [false, true] {
            let at = |name: &str| home.join(name);
            ["a", "b"].iter().for_each(|name| std::fs::write(at(name), bytes::noise(1, 1 << 20)).unwrap());
            let hold = Hold::at("Kept", home);
            let mut command = support::command(&["--json", "--writer-dir", text(&at("meet")), "--overlay", "memory"]);
            for (disk, copy) in [("a", "copy of a"), ("b", "copy of b")] {
                command.args(["--device", text(&at(disk)), "--target", text(&at(copy))]);
            }
            command.args(allowed.then_some("--allow-inconsistent")).env("DRIVE_BACKUP_HOLD", hold.variable());
            let mut running = Running::start(&mut command);
            let held = hold.reached(&mut running);
            if !changed.is_empty() {
                File::options().write(true).open(at(changed)).unwrap().write_all_at(b"meanwhile", 0).unwrap();
            }
            drop(held);
            let ended = running.ended();
            let is_refused = !changed.is_empty() && !allowed;
            if is_refused {
                let why = format!("{changed}' is not consistent: while the instant of several disks was taken");
                assert!(ended.code == 4 && ended.stderr.contains(&why), "{ended:?}");
            } else {
                assert_eq!(ended.code, 0, "{ended:?}");
                let consistent = format!("\"consistent\":{}", changed.is_empty());
                assert_eq!(String::from_utf8_lossy(&ended.stdout).matches(&consistent).count(), 2, "{ended:?}");
            }
            for copy in ["copy of a", "copy of b"] {
                assert_eq!(std::fs::remove_file(at(copy)).is_err(), is_refused, "{changed} {copy}");
            }
        }
    }
}

/// Nobody is trapped any more.
#[test]
fn a_change_after_the_last_writer_has_left_is_noticed() {
    for is_changed in [false, true] {
        let scene = Scene::raw();
        let writer = Writer::open_in(scene.path("disk.raw"), scene.path("meet")).unwrap();
        let ended = scene.copy("Copying", &["--writer", "required"], || {
            drop(writer);
            // It is seen to be gone within milliseconds.
            for _ in 0..if is_changed { 100 } else { 0 } {
                std::thread::sleep(std::time::Duration::from_millis(20));
                scene.overwrite("disk.raw", LENGTH / 2);
            }
        });
        scene.is_noticed(&ended, "disk.raw", is_changed);
    }
}

#[test]
fn a_backing_images_data_file_that_changes_below_a_writer_is_noticed() {
    for is_changed in [false, true] {
        let scene = Scene { folder: kit::memory_folder(), source: "top.qcow2" };
        let [base, data, top] = ["base.qcow2", "data.raw", "top.qcow2"].map(|name| scene.path(name));
        qemu_img(&format!("create -q -f qcow2 -o data_file={},data_file_raw=on,size=8M", text(&data)), &[&base]);
        qemu_img(&format!("create -q -f qcow2 -F qcow2 -b {}", text(&base)), &[&top]);
        let writer = Writer::open_in(&top, scene.path("meet")).unwrap();
        let ended = scene.copy("Copying", &["--writer", "required"], || {
            if is_changed {
                scene.overwrite("data.raw", LENGTH / 2);
            }
        });
        scene.is_noticed(&ended, "data.raw", is_changed);
        drop(writer);
    }
}

/// Its tables are read before the writers of the other disk are frozen, who would wait for that.
#[test]
fn an_image_without_writers_is_looked_at_before_the_writers_of_another_disk_are_frozen() {
    for is_changed in [false, true] {
        let scene = Scene::of("disk.qcow2", QCOW2);
        let other = scene.path("other.raw");
        std::fs::write(&other, bytes::noise(1, 1 << 20)).unwrap();
        let writer = Writer::open_in(&other, scene.path("meet")).unwrap();
        let more = scene.path("copy of other");
        let ended = scene.copy("Frozen", &["--device", text(&other), "--target", text(&more)], || {
            if is_changed {
                File::options().append(true).open(scene.path("disk.qcow2")).unwrap().set_len(8 << 20).unwrap();
            }
        });
        let is_told = ended.stderr.contains("disk.qcow2' is not consistent: its size went from");
        assert_eq!((ended.code, is_told), if is_changed { (4, true) } else { (0, false) }, "{ended:?}");
        assert!(more.exists(), "each copy is on its own");
        drop(writer);
    }
}
