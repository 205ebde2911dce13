//! Formats and places that only QEMU knows, through its private qemu-nbd. QEMU's other tools are the independent readers.

mod remote;
#[path = "../support/mod.rs"]
mod support;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;
use support::*;

const SIZE: u64 = 24 << 20;

/// A folder with a raw disk `disk.raw` of data, zeroes and holes, and a folder `tmp` for temporary files.
struct Bench {
    folder: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        Self::of(SIZE)
    }

    fn of(size: u64) -> Self {
        let bench = Self { folder: folder() };
        fs::create_dir(bench.at("tmp")).unwrap();
        sparse_file(&bench.at("disk.raw"), size);
        let last = format!("write -P 3 {} 512", size / 512 * 512 - 512);
        let commands = ["write -P 1 0 70000", "write -P 2 5M 3M", "write -z 12M 1M", &last];
        qemu_io(&["-f", "raw"], &bench.at("disk.raw"), &commands);
        bench
    }

    fn at(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn command(&self, device: &str, target: &str, more: &[&str]) -> Command {
        let mut command = command(&[&["--device", device, "--target", target], more].concat());
        command.env("TMPDIR", self.at("tmp")).current_dir(self.folder.path());
        command
    }

    fn copy(&self, device: &str, target: &str, more: &[&str]) -> Ended {
        let ended = Ended::of(self.command(device, target, more).output().unwrap());
        assert_eq!(names(&self.at("tmp")), [""; 0], "{ended:?}");
        assert!(!names(self.folder.path()).iter().any(|name| name.contains("partial")), "{ended:?}");
        ended
    }

    /// Where a `tool` comes first.
    fn path(&self) -> String {
        format!("{}:{}", text(&self.at("tools")), std::env::var("PATH").unwrap())
    }

    fn is_disk(&self, raw: &str) {
        assert!(fs::read(self.at(raw)).unwrap() == fs::read(self.at("disk.raw")).unwrap(), "{raw} differs");
    }

    /// A copy that takes long, and the qemu-nbd that it uses.
    fn slow(&self, device: &str, target: &str) -> (Running, Pid) {
        let mut command = self.command(device, target, &["--speed", "256K", "--workers", "2"]);
        let running = Running::start(&mut command);
        let child = wait_for("qemu-nbd", || child_of(running.id()));
        // It has begun to copy when there is something in the target.
        let partial = self.at(&format!(".{target}.drive-backup-partial"));
        wait_for("data", || fs::metadata(&partial).ok().filter(|found| blocks(found) > 256));
        (running, child)
    }
}

fn blocks(metadata: &fs::Metadata) -> u64 {
    std::os::unix::fs::MetadataExt::blocks(metadata)
}

/// The qemu-nbd that a process started.
fn child_of(parent: u32) -> Option<Pid> {
    let tasks = fs::read_dir(format!("/proc/{parent}/task")).ok()?;
    let children = tasks.filter_map(|task| fs::read_to_string(task.ok()?.path().join("children")).ok());
    let children: Vec<i32> =
        children.flat_map(|line| line.split(' ').filter_map(|id| id.parse().ok()).collect::<Vec<_>>()).collect();
    let is_qemu = |id: &i32| fs::read_to_string(format!("/proc/{id}/comm")).is_ok_and(|name| name.trim() == "qemu-nbd");
    children.into_iter().find(is_qemu).map(Pid::from_raw)
}

fn is_gone(child: Pid) -> Option<()> {
    // A zombie waits for whoever adopts it.
    let stat = fs::read_to_string(format!("/proc/{child}/stat")).unwrap_or_default();
    (stat.is_empty() || stat.contains(") Z ")).then_some(())
}

#[test]
fn every_format_is_read_and_written_as_qemu_does() {
    let bench = Bench::new();
    for format in ["vmdk", "vdi", "vhdx", "vpc", "qed", "parallels"] {
        let extension = if format == "parallels" { "hdd" } else { format };
        let (source, copy) = (format!("source.{format}"), format!("copy.{extension}"));
        let options = if format == "vpc" { "-o force_size=on" } else { "" };
        let convert = format!("convert -f raw -O {format} {options}");
        qemu_img(&convert, &[&bench.at("disk.raw"), &bench.at(&source)]);
        bench.copy(&source, "from.raw", &[]).succeeds();
        bench.is_disk("from.raw");

        bench.copy("disk.raw", &copy, &["--format", format]).succeeds();
        let compare = format!("compare -f raw -F {format}");
        assert_eq!(qemu_img(&compare, &[&bench.at("disk.raw"), &bench.at(&copy)]), "Images are identical.", "{format}");
        if format != "vpc" {
            qemu_img(&format!("check -f {format}"), &[&bench.at(&copy)]);
        }
        // Holes stay holes: 4 MiB of data, not 24. VHDX allocates 8 MiB at once.
        assert!(format == "vhdx" || blocks(&fs::metadata(bench.at(&copy)).unwrap()) * 512 < 12 << 20, "{format}");
        // Into what is there, found by its content and its name.
        qemu_io(&["-f", format], &bench.at(&copy), &["write -P 9 12M 64k"]);
        bench.copy("disk.raw", &copy, &["--mode", "existing"]).succeeds();
        assert_eq!(qemu_img(&compare, &[&bench.at("disk.raw"), &bench.at(&copy)]), "Images are identical.", "{format}");
    }
    // VMDK keeps its own name, by which VMware finds its bytes.
    let head = fs::read(bench.at("copy.vmdk")).unwrap();
    assert!(head[..4096].windows(11).any(|bytes| bytes == b"\"copy.vmdk\""));
}

/// QEMU's driver for QED aborts when several changes that allocate clusters meet, as these would: 20 of 20 copies failed.
#[test]
fn a_qed_image_gets_one_change_at_a_time() {
    const SIZE: u64 = 64 << 20;
    let bench = Bench::of(SIZE);
    let disk = fs::OpenOptions::new().write(true).open(bench.at("disk.raw")).unwrap();
    for offset in (0..SIZE).step_by(128 << 10) {
        disk.write_all_at(&[5; 8 << 10], offset).unwrap();
    }
    for _ in 0..3 {
        qemu_img(&format!("create -q -f qed {} {SIZE}", text(&bench.at("copy.qed"))), &[]);
        // Else it reads as zeroes, and gets none.
        qemu_io(&["-f", "qed"], &bench.at("copy.qed"), &["write -P 9 12M 64k"]);
        bench.copy("disk.raw", "copy.qed", &["--mode", "existing", "--workers", "8"]).succeeds();
        let compared = qemu_img("compare -f raw -F qed", &[&bench.at("disk.raw"), &bench.at("copy.qed")]);
        assert_eq!(compared, "Images are identical.");
    }
}

#[test]
fn a_size_that_the_format_cannot_have_is_rounded_and_said() {
    let bench = Bench::of((20 << 20) + 700);
    let ended = bench.copy("disk.raw", "copy.vhdx", &[]);
    assert_eq!(ended.code, 0, "{ended:?}");
    assert!(ended.stderr.contains("'copy.vhdx' is 324 bytes larger than the source"), "{ended:?}");
    let compared = qemu_img("compare -f raw -F vhdx", &[&bench.at("disk.raw"), &bench.at("copy.vhdx")]);
    assert!(compared.contains("Images are identical"), "{compared}");
    bench.copy("disk.raw", "copy.vhdx", &["--mode", "existing"]).fails(2, "too large");
}

#[test]
fn a_secret_opens_what_is_encrypted_and_shows_nowhere() {
    let bench = Bench::new();
    fs::write(bench.at("key"), "hunter2\n").unwrap();
    fs::write(bench.at("raw key"), "hunter2").unwrap();
    fs::write(bench.at("wrong"), "letmein").unwrap();
    let object = format!("secret,id=s,file={}", text(&bench.at("raw key")));
    for (format, options) in [
        ("luks", "iter-time=10,key-secret=s"),
        ("qcow2", "encrypt.format=luks,encrypt.iter-time=10,encrypt.key-secret=s"),
    ] {
        let arguments = ["create", "-q", "--object", &object, "-f", format];
        let image = bench.at("encrypted");
        run("qemu-img", &[&arguments[..], &["-o", options, text(&image), "24M"]].concat());
        bench.copy("disk.raw", "encrypted", &["--mode", "existing", "--target-secret", "file:key"]).succeeds();
        let ciphertext = fs::read(&image).unwrap();
        assert!(!ciphertext.windows(4096).step_by(512).any(|bytes| bytes == [2; 4096]));
        bench.copy("encrypted", "plain.raw", &["--secret", "file:key"]).succeeds();
        bench.is_disk("plain.raw");
        let wrong = bench.copy("encrypted", "wrong.raw", &["--secret", "file:wrong"]);
        wrong.fails(4, "open source 'encrypted': ");
        assert!(!wrong.stderr.contains("letmein") && !wrong.stderr.contains("json"), "{wrong:?}");
        assert!(!bench.at("wrong.raw").exists());
    }
    let (image, manifest) = (bench.at("encrypted"), bench.at("m.json"));
    bench.copy("plain.raw", "again.raw", &["--manifest", "m.json"]).succeeds();
    let verify = ["verify", text(&image), "--manifest", text(&manifest)];
    let key = format!("file:{}", text(&bench.at("key")));
    drive_backup(&[&verify[..], &["--secret", &key]].concat()).succeeds();
    assert_eq!(drive_backup(&verify).code, 4, "a ciphertext that nobody opens");
    let back = bench.at("back.raw");
    drive_backup(&["restore", text(&image), "--target", text(&back), "--secret", &key]).succeeds();
    bench.is_disk("back.raw");
    bench.copy("encrypted", "x.raw", &["--source-format", "luks"]).fails(2, "luks needs a --secret");
    let refused = bench.copy("encrypted", "x.raw", &["--secret", "env:NO_SUCH"]);
    refused.fails(2, "there is no variable 'NO_SUCH'");
}

#[test]
fn a_new_vhdx_is_as_sparse_as_its_source() {
    let bench = Bench::new();
    let file = fs::OpenOptions::new().write(true).open(bench.at("disk.raw")).unwrap();
    file.set_len(1 << 30).unwrap();
    bench.copy("disk.raw", "copy.vhdx", &[]).succeeds();
    assert_eq!(qemu_img("compare", &[&bench.at("disk.raw"), &bench.at("copy.vhdx")]), "Images are identical.");
    let allocated = blocks(&fs::metadata(bench.at("copy.vhdx")).unwrap()) * 512;
    assert!(allocated < 100 << 20, "{allocated}");
}

/// QEMU's tools die with the thread that starts them, which must not be one that ends.
#[test]
fn what_qemu_reads_is_served_to_be_read() {
    let bench = Bench::new();
    qemu_img("convert -f raw -O vmdk", &[&bench.at("disk.raw"), &bench.at("disk.vmdk")]);
    let (socket, meet) = (bench.at("socket"), bench.at("meet"));
    let listen = format!("unix:{}", text(&socket));
    let disk = bench.at("disk.vmdk");
    let arguments = ["serve", "--device", text(&disk), "--read-only", "--nbd", &listen, "--writer-dir", text(&meet)];
    let server = Running::drive_backup(&arguments);
    wait_for("the socket", || socket.exists().then_some(()));
    let uri = format!("nbd+unix:///?socket={}", text(&socket));
    run("qemu-img", &["convert", "-f", "raw", "-O", "raw", &uri, text(&bench.at("served.raw"))]);
    bench.is_disk("served.raw");
    server.signal(Signal::SIGTERM);
    assert_eq!(server.ended().code, 0);
}

/// As when a guest has encrypted its disk, which is copied back over an older copy.
#[test]
fn a_raw_target_that_begins_like_luks_stays_what_was_said() {
    let bench = Bench::new();
    fs::write(bench.at("key"), "hunter2").unwrap();
    let object = format!("secret,id=s,file={}", text(&bench.at("key")));
    let options = ["-o", "iter-time=10,key-secret=s"];
    let create = ["create", "-q", "--object", &object, "-f", "luks"];
    run("qemu-img", &[&create[..], &options, &[text(&bench.at("disk.luks")), "24M"]].concat());
    bench.copy("disk.raw", "disk.luks", &["--mode", "existing", "--target-secret", "file:key"]).succeeds();
    for version in [1, 2] {
        let mut guests = vec![0; 24 << 20];
        guests[..8].copy_from_slice(&[b'L', b'U', b'K', b'S', 0xBA, 0xBE, 0, version]);
        fs::write(bench.at("old.img"), &guests).unwrap();
        let existing = ["--mode", "existing", "--secret", "file:key"];
        bench.copy("disk.luks", "old.img", &existing).fails(2, "say --format luks or --format raw");
        assert!(fs::read(bench.at("old.img")).unwrap() == guests);
        bench.copy("disk.luks", "old.img", &[&existing[..], &["--format", "raw"]].concat()).succeeds();
        bench.is_disk("old.img");
    }
}

/// A log, or a lock, of the script that calls us.
#[test]
fn what_a_script_has_open_is_no_file_of_an_image() {
    let bench = Bench::new();
    qemu_img("convert -f raw -O vmdk", &[&bench.at("disk.raw"), &bench.at("disk.vmdk")]);
    let copy = format!("{} --device disk.vmdk --target copy.raw --writer-dir meet", support::BINARY);
    let script = format!("exec 9>>open; rm open; touch copy.raw; exec {copy}");
    let mut shell = Command::new("sh");
    shell.args(["-c", &script]).env("TMPDIR", bench.at("tmp")).current_dir(bench.folder.path());
    Ended::of(shell.output().unwrap()).succeeds();
    bench.is_disk("copy.raw");
}

#[test]
fn a_new_target_is_encrypted_and_qemu_opens_it() {
    let bench = Bench::new();
    fs::write(bench.at("key"), "hunter2").unwrap();
    let seen = bench.at("seen");
    for name in ["qemu-nbd", "qemu-img"] {
        let real = run("sh", &["-c", &format!("command -v {name}")]);
        tool(&bench, name, &format!("echo \"$0 $@\" >>{}; env >>{0}; exec {real} \"$@\"", text(&seen)));
    }
    let mut command = bench.command("disk.raw", "copy.luks", &["--secret", "file:key"]);
    Ended::of(command.env("PATH", bench.path()).output().unwrap()).succeeds();
    let seen = fs::read_to_string(&seen).unwrap();
    assert!(seen.contains("create -q --object") && seen.contains("tools/qemu-nbd --persistent"), "{seen}");
    assert!(!seen.contains("hunter2"), "{seen}");
    let image = format!("driver=luks,key-secret=s,file.filename={}", text(&bench.at("copy.luks")));
    let object = format!("secret,id=s,file={}", text(&bench.at("key")));
    let back = bench.at("back.raw");
    run("qemu-img", &["convert", "--object", &object, "--image-opts", &image, "-O", "raw", text(&back)]);
    bench.is_disk("back.raw");
}

#[test]
fn a_restore_to_a_new_file_has_the_format_that_its_name_says() {
    let bench = Bench::new();
    qemu_img("convert -f raw -O qcow2", &[&bench.at("disk.raw"), &bench.at("disk.qcow2")]);
    fs::write(bench.at("key"), "hunter2").unwrap();
    let restore = |target: &str, more: &[&str]| {
        let arguments = [&["restore", "disk.qcow2", "--target", target], more].concat();
        Ended::of(command(&arguments).current_dir(bench.folder.path()).output().unwrap())
    };
    for (target, format) in [("x.vmdk", "vmdk"), ("x.vhdx", "vhdx"), ("x.vhd", "vpc"), ("x.qcow2", "qcow2")] {
        restore(target, &[]).succeeds();
        let compare = format!("compare -f raw -F {format}");
        let compared = qemu_img(&compare, &[&bench.at("disk.raw"), &bench.at(target)]);
        assert_eq!(compared, "Images are identical.", "{target}");
    }
    for target in ["x.img", "x", "x.backup"] {
        restore(target, &[]).succeeds();
        bench.is_disk(target);
    }
    restore("x.luks", &[]).fails(2, "'x.luks': luks needs a --secret");
    assert!(!bench.at("x.luks").exists());
    restore("x.luks", &["--target-secret", "file:key"]).succeeds();
    assert!(fs::read(bench.at("x.luks")).unwrap().starts_with(b"LUKS"));
    bench.copy("x.luks", "back.raw", &["--secret", "file:key"]).succeeds();
    bench.is_disk("back.raw");
}

#[test]
fn without_qemu_nbd_the_package_is_named() {
    let bench = Bench::new();
    qemu_img("convert -f raw -O vhdx", &[&bench.at("disk.raw"), &bench.at("disk.vhdx")]);
    let without = |device: &str, target: &str, more: &[&str]| {
        Ended::of(bench.command(device, target, more).env("PATH", bench.at("tmp")).output().unwrap())
    };
    let said = without("disk.vhdx", "x.raw", &[]);
    said.fails(4, "needs qemu-nbd, which is not installed: it is in the package qemu-utils");
    assert!(said.stderr.contains("--source-format raw"), "{said:?}");
    without("rbd:pool/image", "x.raw", &[]).fails(4, "qemu-utils");
    for target in ["x.vmdk", "ssh://localhost/x"] {
        without("disk.raw", target, &[]).fails(5, "qemu-utils");
    }
    assert_eq!(names(bench.folder.path()), ["disk.raw", "disk.vhdx", "tmp"]);
    without("disk.vhdx", "x.raw", &["--source-format", "raw"]).succeeds();
    assert!(fs::read(bench.at("x.raw")).unwrap() == fs::read(bench.at("disk.vhdx")).unwrap());
}

#[test]
fn a_child_that_dies_fails_its_side_and_nothing_is_published() {
    let bench = Bench::new();
    qemu_img("convert -f raw -O vmdk", &[&bench.at("disk.raw"), &bench.at("disk.vmdk")]);
    for (device, target, code) in [("disk.vmdk", "x.raw", 4), ("disk.raw", "x.vmdk", 5)] {
        let (running, child) = bench.slow(device, target);
        kill(child, Signal::SIGKILL).unwrap();
        running.ended().fails(code, "qemu-nbd was ended by signal 9");
        assert_eq!(names(bench.folder.path()), ["disk.raw", "disk.vmdk", "tmp"]);
    }
}

#[test]
fn a_stopped_child_holds_no_one_up_and_none_is_left_behind() {
    let bench = Bench::new();
    qemu_img("convert -f raw -O vmdk", &[&bench.at("disk.raw"), &bench.at("disk.vmdk")]);
    for (device, target) in [("disk.vmdk", "x.raw"), ("disk.raw", "x.vmdk")] {
        let (running, child) = bench.slow(device, target);
        kill(child, Signal::SIGSTOP).unwrap();
        let cancelled = Instant::now();
        running.signal(Signal::SIGINT);
        let ended = running.ended();
        assert!(cancelled.elapsed() < PATIENCE / 3, "{:?}", cancelled.elapsed());
        assert_eq!(ended.code, 130, "{ended:?}");
        wait_for("the end of qemu-nbd", || is_gone(child));

        let (running, child) = bench.slow(device, target);
        running.signal(Signal::SIGKILL);
        running.ended();
        wait_for("the end of qemu-nbd", || is_gone(child));
        assert_eq!(names(&bench.at("tmp")), [""; 0]);
        let _ = fs::remove_file(bench.at(&format!(".{target}.drive-backup-partial")));
        assert_eq!(names(bench.folder.path()), ["disk.raw", "disk.vmdk", "tmp"]);
    }
}

/// An executable of that name in the folder `tools`.
fn tool(bench: &Bench, name: &str, script: &str) {
    fs::create_dir_all(bench.at("tools")).unwrap();
    // Written by another process: what others fork here could have it open, and it would be busy.
    let write = r#"printf '#!/bin/sh\n%s\n' "$1" > "$0" && chmod 755 "$0""#;
    run("sh", &["-c", write, text(&bench.at("tools").join(name)), script]);
}

/// Interrupts one whose tool stands still. Did it come back before it was given up?
fn ends_with_its_tool(hanging: &str, target: &str) -> bool {
    let bench = Bench::new();
    tool(&bench, "qemu-nbd", "echo 'x: No such file or directory' >&2; exit 1");
    tool(&bench, hanging, &format!("echo $$ >{}; exec sleep 60", text(&bench.at("pid"))));
    let mut command = bench.command("disk.raw", target, &[]);
    let running = Running::start(command.env("PATH", bench.path()));
    let line = wait_for("the tool", || fs::read_to_string(bench.at("pid")).ok().filter(|line| line.ends_with('\n')));
    running.signal(Signal::SIGINT);
    let ended = running.ended();
    println!("{ended:?}");
    assert_eq!(ended.code, 130, "{ended:?}");
    if ended.stderr.contains("hangs") {
        return false;
    }
    is_gone(Pid::from_raw(line.trim().parse().unwrap())).expect("its tool has ended before it");
    assert_eq!(names(&bench.at("tmp")), [""; 0]);
    assert_eq!(names(bench.folder.path()), ["disk.raw", "pid", "tmp", "tools"]);
    true
}

/// A busy machine may give it up too early, but not each time.
#[test]
fn an_interrupt_ends_the_wait_for_a_tool_that_stands_still() {
    for (hanging, target) in
        [("qemu-img", "ssh://localhost/x"), ("qemu-nbd", "ssh://localhost/x"), ("qemu-img", "x.vmdk")]
    {
        assert!((0..5).any(|_| ends_with_its_tool(hanging, target)), "{hanging} for {target}");
    }
}

#[test]
fn a_new_image_elsewhere_is_made_when_nothing_can_refuse_it_any_more() {
    let bench = Bench::new();
    let made = bench.at("made");
    tool(&bench, "qemu-nbd", "echo \"Failed to open 'nfs://h/x.raw': NFS3ERR_NOENT\" >&2; exit 1");
    tool(&bench, "qemu-img", &format!("echo \"$@\" >>{}", text(&made)));
    let copy = |more: &[&str]| {
        let mut command = bench.command("disk.raw", "nfs://h/x.raw", more);
        Ended::of(command.env("PATH", bench.path()).output().unwrap())
    };
    let rehearsed = copy(&["--dry-run"]);
    assert!(rehearsed.code == 0 && rehearsed.stderr.contains("dry run: nothing was copied"), "{rehearsed:?}");
    copy(&["--snapshot", "reflink"]).fails(4, "can't be cloned here");
    copy(&["--hook-frozen", "false"]).fails(9, "--hook-frozen");
    assert!(!made.exists(), "{:?}", fs::read_to_string(&made));

    // It is made, and can't be opened.
    copy(&[]).fails(5, "'nfs://h/x.raw' is INCOMPLETE, do not use it");
    assert_eq!(fs::read_to_string(&made).unwrap(), format!("create -q -f raw nfs://h/x.raw {SIZE}\n"));
    tool(&bench, "qemu-img", "echo 'no room' >&2; exit 1");
    let ended = copy(&[]);
    ended.fails(5, "create target 'nfs://h/x.raw': no room");
    assert!(!ended.stderr.contains("INCOMPLETE"), "{ended:?}");
}

#[test]
fn an_image_that_a_qemu_writes_is_busy() {
    let bench = Bench::new();
    qemu_img("convert -f raw -O vdi", &[&bench.at("disk.raw"), &bench.at("disk.vdi")]);
    let socket = bench.at("socket");
    let image = bench.at("disk.vdi");
    let arguments = ["-f", "vdi", "-t", "-k", text(&socket), text(&image)];
    let _qemu = Running::start(Command::new("qemu-nbd").args(arguments));
    wait_for("the socket", || socket.exists().then_some(()));
    bench.copy("disk.vdi", "x.raw", &[]).fails(8, "disk.vdi");
    bench.copy("disk.raw", "disk.vdi", &["--mode", "existing"]).fails(8, "disk.vdi");
    bench.copy("disk.vdi", "x.raw", &["--allow-inconsistent", "-q"]).succeeds();
    bench.is_disk("x.raw");
}

#[test]
fn no_backing_holds_for_qemu_s_formats_too() {
    let bench = Bench::new();
    let base = text(&bench.at("disk.raw")).to_owned();
    qemu_img(&format!("create -q -f qed -F raw -b {base}"), &[&bench.at("disk.qed")]);
    bench.copy("disk.qed", "x.raw", &["--no-backing"]).fails(4, "has a backing file, which was ruled out");
    bench.copy("disk.qed", "x.raw", &[]).succeeds();
    bench.is_disk("x.raw");
}

#[test]
fn a_place_that_can_only_be_read_is_no_target() {
    let bench = Bench::new();
    bench.copy("disk.raw", "https://localhost/x", &[]).fails(2, "can only be read");
}

#[test]
fn an_error_of_a_driver_is_quoted_without_passwords() {
    let bench = Bench::new();
    let place = "rbd:pool/image:conf=/nonexistent:key=hunter2";
    // As QEMU says it where it has the driver.
    let quotes =
        "for last; do :; done; echo \"qemu-nbd: Failed to blk_new_open '$last': Connection refused\" >&2; exit 1";
    tool(&bench, "qemu-nbd", quotes);
    for (device, target, code) in [(place, "x.raw", 4), ("disk.raw", place, 5)] {
        let mut quoted = bench.command(device, target, &[]);
        let quoted = Ended::of(quoted.env("PATH", bench.path()).output().unwrap());
        quoted.fails(code, "blk_new_open 'rbd:pool/image:conf=/nonexistent:key=…': Connection refused");
        for ended in [quoted, bench.copy(device, target, &[])] {
            ended.fails(code, "'rbd:pool/image:conf=/nonexistent:key=…'");
            assert!(!ended.stderr.contains("hunter2"), "{ended:?}");
        }
    }
}
