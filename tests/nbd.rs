//! Sources and targets over NBD, with servers that are not ours: nbdkit, qemu-nbd, qemu-storage-daemon.

#[path = "support/mod.rs"]
mod support;

use nix::sys::signal::Signal;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use support::bytes::{allocated, allocated_now};
use support::*;

const MIB: u64 = 1 << 20;

/// A server on a Unix socket.
struct Server {
    _process: Running,
    socket: PathBuf,
}

impl Server {
    fn uri(&self) -> String {
        self.named("")
    }

    fn named(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket.display())
    }
}

fn quiet(program: &str) -> Command {
    let mut command = Command::new(program);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command
}

/// Starts it, and waits until it listens: a lone connection and a greeting tell.
fn serve(mut command: Command, socket: &Path) -> Server {
    let process = Running::start(&mut command);
    wait_for("a server that listens", || {
        use std::io::Read;
        let mut stream = std::os::unix::net::UnixStream::connect(socket).ok()?;
        stream.read_exact(&mut [0; 18]).ok()
    });
    Server { _process: process, socket: socket.to_owned() }
}

fn nbdkit(folder: &Path, name: &str, arguments: &str) -> Server {
    let socket = folder.join(name);
    let _ = std::fs::remove_file(&socket);
    let mut command = quiet("nbdkit");
    command.current_dir(folder).args(["-f", "-U", text(&socket)]).args(arguments.split_whitespace());
    serve(command, &socket)
}

fn qemu_nbd(folder: &Path, name: &str, arguments: &str) -> Server {
    let socket = folder.join(name);
    let mut command = quiet("qemu-nbd");
    let shared = ["-t", "-e", "16", "-k", text(&socket)];
    command.current_dir(folder).args(shared).args(arguments.split_whitespace());
    serve(command, &socket)
}

#[track_caller]
fn same_bytes(one: &Path, other: &Path) {
    assert!(bytes::read(one) == bytes::read(other), "{} and {} differ", one.display(), other.display());
}

fn backup(device: &str, target: &str, more: &[&str]) -> Ended {
    let arguments = [&["--device", device, "--target", target][..], more].concat();
    drive_backup(&arguments)
}

#[test]
fn a_qcow2_export_is_copied_with_its_backing_file_and_stays_sparse() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    bytes::disk(&at("base.raw"), 8 * MIB);
    qemu_img("create -q -f qcow2 -F raw -b", &[&at("base.raw"), &at("top.qcow2")]);
    qemu_io(&["-f", "qcow2"], &at("top.qcow2"), &["write -P 7 5M 100k", "write -z 64k 64k"]);
    let server = qemu_nbd(folder.path(), "s", "-r -f qcow2 top.qcow2");
    let ended = backup(&server.uri(), text(&at("copy.raw")), &["--json"]);
    assert!(String::from_utf8_lossy(&ended.stdout).contains(r#""instant":"unwatched""#), "{ended:?}");
    ended.succeeds();
    qemu_img("convert -U -f qcow2 -O raw", &[&at("top.qcow2"), &at("expected.raw")]);
    same_bytes(&at("copy.raw"), &at("expected.raw"));
    assert!(allocated(&at("copy.raw")) < 2 * MIB, "{}", allocated(&at("copy.raw")));
}

#[test]
fn a_copy_into_an_export_is_the_disk_and_stays_sparse() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    bytes::disk(&at("disk.raw"), 8 * MIB);
    sparse_file(&at("target.raw"), 8 * MIB);
    let server = qemu_nbd(folder.path(), "s", "-f raw --discard=unmap target.raw");
    for mode in ["absolute-paths", "existing"] {
        let ended = backup(text(&at("disk.raw")), &server.uri(), &["--mode", mode, "--json"]);
        assert_eq!(ended.code, 0, "{ended:?}");
        let records = String::from_utf8_lossy(&ended.stdout).into_owned();
        assert!(records.contains(&format!(r#""path":"{}""#, server.uri())), "{records}");
        assert!(records.contains(r#""kind":"nbd""#), "{records}");
        same_bytes(&at("disk.raw"), &at("target.raw"));
        assert!(allocated(&at("target.raw")) < 2 * MIB, "{}", allocated(&at("target.raw")));
        // The second time there are old bytes that must become zeroes.
        bytes::scribble(&at("target.raw"), 3 * MIB, MIB as usize);
    }
}

#[test]
fn a_qcow2_inside_an_export_is_read_when_asked_for_and_raw_otherwise() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    bytes::disk(&at("disk.raw"), 2 * MIB);
    qemu_img("convert -f raw -O qcow2", &[&at("disk.raw"), &at("disk.qcow2")]);
    let server = nbdkit(folder.path(), "s", "-r file disk.qcow2");
    backup(&server.uri(), text(&at("copy.raw")), &["--source-format", "qcow2", "--format", "raw"]).succeeds();
    same_bytes(&at("disk.raw"), &at("copy.raw"));
    backup(&server.uri(), text(&at("image.raw")), &[]).succeeds();
    same_bytes(&at("disk.qcow2"), &at("image.raw"));
    // Its file names would be opened on this machine.
    qemu_img("create -q -f qcow2 -F raw -b /etc/passwd", &[&at("top.qcow2")]);
    let server = nbdkit(folder.path(), "t", "-r file top.qcow2");
    backup(&server.uri(), text(&at("no.raw")), &["--source-format", "qcow2"])
        .fails(4, "names other files, which are not to be had from here");
}

#[test]
fn a_qcow2_is_made_in_an_export_and_written_again() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    bytes::disk(&at("disk.raw"), 8 * MIB);
    // What was there before is not taken for a part of the new image.
    bytes::disk(&at("target"), 12 * MIB);
    let server = nbdkit(folder.path(), "s", "file target");
    let compare = || qemu_img("compare -f raw -F qcow2", &[&at("disk.raw"), &at("target")]);
    for more in
        [&["--format", "qcow2", "--verify"][..], &["--format", "qcow2", "--compress", "zstd", "--cluster-size", "32K"]]
    {
        backup(text(&at("disk.raw")), &server.uri(), more).succeeds();
        assert_eq!(compare(), "Images are identical.");
        qemu_img("check -q -f qcow2", &[&at("target")]);
    }
    qemu_io(&["-f", "qcow2"], &at("target"), &["write -P 9 1M 100k"]);
    backup(text(&at("disk.raw")), &server.uri(), &["--format", "qcow2", "--mode", "existing"]).succeeds();
    assert_eq!(compare(), "Images are identical.");
    sparse_file(&at("small"), 4 * MIB);
    let small = nbdkit(folder.path(), "t", "file small");
    bytes::disk(&at("full.raw"), 8 * MIB);
    run("sh", &["-c", &format!("head -c 8M /dev/urandom >{}", text(&at("full.raw")))]);
    let full = backup(text(&at("full.raw")), &small.uri(), &["--format", "qcow2"]);
    full.fails(5, "No space left on device");
}

#[test]
fn block_sizes_are_kept_to() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    bytes::disk(&at("disk.raw"), 8 * MIB - 4096);
    sparse_file(&at("target.raw"), 8 * MIB - 4096);
    let policy = "--filter=blocksize-policy blocksize-minimum=4096 blocksize-preferred=4096 blocksize-maximum=64K \
        blocksize-error-policy=error";
    let source = nbdkit(folder.path(), "s", &format!("-r file disk.raw {policy}"));
    let target = nbdkit(folder.path(), "t", &format!("file target.raw {policy}"));
    backup(&source.uri(), &target.uri(), &[]).succeeds();
    same_bytes(&at("disk.raw"), &at("target.raw"));
    backup(&target.uri(), text(&at("copy.qcow2")), &[]).succeeds();
    qemu_img("compare", &[&at("disk.raw"), &at("copy.qcow2")]);
}

#[test]
fn servers_that_can_do_little_are_served_all_the_same() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    bytes::disk(&at("disk.raw"), 4 * MIB);
    for (number, poor) in
        ["--no-sr", "-o", "--mask-handshake=0", "--mask-handshake=1", "--filter=noextents"].into_iter().enumerate()
    {
        // An oldstyle server has no handshake to speak of: refused by name.
        let source = nbdkit(folder.path(), &format!("s{number}"), &format!("-r {poor} file disk.raw"));
        let copy = at("copy.raw");
        let ended = backup(&source.uri(), text(&copy), &[]);
        if poor == "-o" {
            ended.fails(4, "this is no newstyle NBD server");
        } else {
            ended.succeeds();
            same_bytes(&at("disk.raw"), &copy);
        }
    }
    for (number, filters) in
        ["--filter=nozero", "--filter=nozero --filter=noparallel", "--filter=multi-conn multi-conn-mode=disable"]
            .into_iter()
            .enumerate()
    {
        std::fs::write(at("target.raw"), bytes::noise(9, 4 * MIB as usize)).unwrap();
        let target = nbdkit(folder.path(), &format!("t{number}"), &format!("file target.raw {filters}"));
        backup(text(&at("disk.raw")), &target.uri(), &[]).succeeds();
        same_bytes(&at("disk.raw"), &at("target.raw"));
    }
}

#[test]
fn what_can_not_be_is_refused_in_one_line_and_touches_nothing() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    bytes::disk(&at("disk.raw"), MIB);
    sparse_file(&at("target.raw"), MIB);
    let server = qemu_nbd(folder.path(), "s", "-f raw target.raw -x disk");
    let reader = nbdkit(folder.path(), "r", "-r file target.raw");
    let before = fingerprint(folder.path());
    let disk = at("disk.raw");
    let (good, disk) = (server.named("disk"), text(&disk));
    let copy = |device: &str, target: &str, more: &[&str]| backup(device, target, more);
    copy(disk, &server.named("other"), &[]).fails(5, "the server has no export 'other'");
    copy(&server.named("other"), text(&at("no")), &[]).fails(4, "the server has no export 'other'");
    copy(disk, &reader.uri(), &[]).fails(5, "the export is read-only");
    copy(disk, &good, &["--format", "vmdk"]).fails(2, "gets the disk's own bytes, or qcow2");
    copy(disk, &good, &["--compress", "zstd"]).fails(2, "for qcow2 say --format qcow2");
    copy(disk, &good, &["--format", "qcow2", "--mode", "existing"]).fails(5, "not a qcow2 image");
    copy(&good, &good, &[]).fails(2, "source and target cannot be the same");
    copy(&good, text(&at("no")), &["--writer", "required"]).fails(4, "no cooperating writer");
    copy(disk, "nbd+vsock://2/x", &[]).fails(2, "vsock is not supported");
    copy(disk, "nbd://h/x?speed=9", &[]).fails(2, "unknown parameter 'speed'");
    let secret = copy(disk, "nbds://alice:secret@h/x", &[]);
    assert!(secret.code == 2 && !secret.stderr.contains("secret"), "{secret:?}");
    copy(disk, "nbd://127.0.0.1:1/x", &[]).fails(5, "Connection refused");
    copy(disk, &format!("nbd+unix:///?socket={}", at("none").display()), &[]).fails(5, "No such file or directory");
    sparse_file(&at("larger.raw"), 2 * MIB);
    copy(text(&at("larger.raw")), &good, &[]).fails(2, "is too small with 1048576 bytes, the source has 2097152");
    std::fs::remove_file(at("larger.raw")).unwrap();
    assert_eq!(fingerprint(folder.path()), before);
}

#[test]
fn errors_of_a_server_come_with_side_and_range() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    bytes::disk(&at("disk.raw"), 4 * MIB);
    let bad = nbdkit(folder.path(), "s", "-r file disk.raw --filter=error error=EIO error-pread-rate=100%");
    backup(&bad.uri(), text(&at("copy")), &[]).fails(4, "read source at 0x");
    let full = nbdkit(folder.path(), "t", "memory 4M --filter=error error=ENOSPC error-pwrite-rate=100%");
    let ended = backup(text(&at("disk.raw")), &full.uri(), &[]);
    ended.fails(5, "No space left on device");
    assert!(ended.stderr.contains("write target at 0x"), "{ended:?}");
}

#[test]
fn a_flush_that_fails_is_a_failure() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    bytes::disk(&at("disk.raw"), MIB);
    let socket = at("s");
    let mut command = quiet("nbdkit");
    command.args(["-f", "-U", text(&socket), "eval", "get_size=echo 1M", "pread=exit 1", "can_write=exit 0"]);
    command.args(["pwrite=cat >/dev/null", "can_flush=exit 0", "flush=echo EIO >&2; exit 1"]);
    let server = serve(command, &socket);
    backup(text(&at("disk.raw")), &server.uri(), &[]).fails(5, "flush target");
    backup(text(&at("disk.raw")), &server.uri(), &["--no-fsync"]).succeeds();

    let socket = at("t");
    let mut command = quiet("nbdkit");
    command.args(["-f", "-U", text(&socket), "eval", "get_size=echo 1M", "pread=exit 1", "can_write=exit 0"]);
    command.args(["pwrite=cat >/dev/null", "can_flush=exit 3"]);
    let server = serve(command, &socket);
    let ended = backup(text(&at("disk.raw")), &server.uri(), &["--progress", "plain"]);
    let (warned, told) = (ended.stderr.contains("can't flush"), ended.stderr.contains("NOT flushed to stable storage"));
    assert!(ended.code == 0 && warned && told, "{ended:?}");
    let ended = backup(text(&at("disk.raw")), &server.uri(), &["--json"]);
    let records = String::from_utf8_lossy(&ended.stdout).into_owned();
    assert!(ended.code == 0 && records.contains(r#""durable":false"#), "{ended:?}");
}

/// Runs a backup at a pace that leaves time to kill its server, and kills it once bytes are in the file `moved`.
fn with_server_killed(server: Server, arguments: &[&str], moved: &Path, then: impl FnOnce(&Running)) -> Ended {
    let running = Running::start(&mut piped(command(arguments)));
    wait_for("bytes that moved", || (allocated_now(moved) > MIB / 2).then_some(()));
    drop(server);
    then(&running);
    running.ended()
}

#[test]
fn a_server_that_is_gone_ends_the_copy_on_its_side_within_the_bound() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    std::fs::write(at("disk.raw"), bytes::noise(1, 8 * MIB as usize)).unwrap();
    sparse_file(&at("target.raw"), 8 * MIB);
    let pace = ["--speed", "1M", "--reconnect-delay", "0.3"];

    let server = nbdkit(folder.path(), "s", "-r file disk.raw");
    let (uri, copy) = (server.uri(), at("copy"));
    let arguments = [&["--device", &uri, "--target", text(&copy)][..], &pace].concat();
    let partial = at(".copy.drive-backup-partial");
    let ended = with_server_killed(server, &arguments, &partial, |_| {});
    ended.fails(4, "not reconnected within 0.3 s");
    assert!(ended.stderr.contains("read source at 0x") && !copy.exists(), "{ended:?}");

    let server = nbdkit(folder.path(), "t", "file target.raw");
    let (uri, disk) = (server.uri(), at("disk.raw"));
    let arguments = [&["--device", text(&disk), "--target", &uri][..], &pace].concat();
    let target = at("target.raw");
    let ended = with_server_killed(server, &arguments, &target, |_| {});
    ended.fails(5, "not reconnected within 0.3 s");
    assert!(
        ended.stderr.contains("write target at 0x") && ended.stderr.contains("is INCOMPLETE, do not use it"),
        "{ended:?}"
    );
}

#[test]
fn a_server_that_comes_back_is_gone_on_with() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    std::fs::write(at("disk.raw"), bytes::noise(1, 8 * MIB as usize)).unwrap();
    let restarted = std::cell::RefCell::new(None);

    let server = nbdkit(folder.path(), "s", "-r file disk.raw");
    let (uri, copy) = (server.uri(), at("copy"));
    let arguments = ["--device", &uri, "--target", text(&copy), "--speed", "1M"];
    let partial = at(".copy.drive-backup-partial");
    let again = |backup: &Running| {
        restarted.replace(Some(nbdkit(folder.path(), "s", "-r file disk.raw")));
        backup.signal(Signal::SIGUSR2);
    };
    with_server_killed(server, &arguments, &partial, again).succeeds_unlimited();
    same_bytes(&copy, &at("disk.raw"));

    // The one that comes back has lost everything that nobody flushed: a new, empty file.
    sparse_file(&at("target.raw"), 8 * MIB);
    let (target, disk) = (at("target.raw"), at("disk.raw"));
    let server = nbdkit(folder.path(), "t", "file target.raw");
    let uri = server.uri();
    let arguments = ["--device", text(&disk), "--target", &uri, "--speed", "1M"];
    let lose = |backup: &Running| {
        sparse_file(&target, 0);
        sparse_file(&target, 8 * MIB);
        restarted.replace(Some(nbdkit(folder.path(), "t", "file target.raw")));
        backup.signal(Signal::SIGUSR2);
    };
    with_server_killed(server, &arguments, &target, lose).succeeds_unlimited();
    same_bytes(&target, &disk);

    // Without flushes nothing is kept: what may be lost must not be called good.
    sparse_file(&target, 8 * MIB);
    sparse_file(&target, 0);
    sparse_file(&target, 8 * MIB);
    let server = nbdkit(folder.path(), "u", "file target.raw");
    let uri = server.uri();
    let arguments = ["--device", text(&disk), "--target", &uri, "--speed", "1M", "--no-fsync"];
    let again = |_: &Running| drop(restarted.replace(Some(nbdkit(folder.path(), "u", "file target.raw"))));
    with_server_killed(server, &arguments, &target, again)
        .fails(5, "the connection was lost after writes that no flush covers");
}

/// A server that stands still as soon as it is told to: what it has begun it ends, nothing else.
fn nbdkit_with_pause(folder: &Path, name: &str, arguments: &str) -> (Server, impl FnOnce() + use<>) {
    let control = folder.join(format!("{name}.control"));
    let pause = format!("--filter=pause {arguments} pause-control={}", control.display());
    let server = nbdkit(folder, name, &pause);
    let stop = move || {
        use std::io::{Read, Write};
        let mut control = std::os::unix::net::UnixStream::connect(control).unwrap();
        control.write_all(b"p").unwrap();
        let mut answer = [0];
        control.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"P");
    };
    (server, stop)
}

/// Starts a copy, calls `stop` once bytes have moved, and interrupts it when it has stalled: it must end within a second.
fn interrupted_when_stalled(device: &str, target: &str, moved: impl Fn() -> bool, stop: impl FnOnce()) {
    use std::io::{BufRead, BufReader, Read};
    let options = ["--speed", "8M", "--reconnect-delay", "60", "--json", "--progress-interval", "0.1"];
    let mut running = Running::drive_backup(&[&["--device", device, "--target", target][..], &options].concat());
    wait_for("bytes that moved", || moved().then_some(()));
    stop();
    let mut records = BufReader::new(running.child().stdout.take().unwrap());
    let has_stalled =
        |line: &String| line.contains(r#""seconds_stalled":"#) && !line.contains(r#""seconds_stalled":0"#);
    records.by_ref().lines().map(Result::unwrap).find(has_stalled).expect("it stalls");
    let began = std::time::Instant::now();
    running.signal(Signal::SIGINT);
    let ended = running.ended();
    assert_eq!(ended.code, 130, "{ended:?}");
    assert!(began.elapsed() < PATIENCE / 3, "{:?}", began.elapsed());
}

#[test]
fn an_interrupt_ends_the_wait_for_a_server_that_stands_still_or_is_gone() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    std::fs::write(at("disk.raw"), bytes::noise(1, 32 * MIB as usize)).unwrap();
    let (disk, target, partial) = (at("disk.raw"), at("target.raw"), at(".copy.drive-backup-partial"));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (server, stop) = nbdkit_with_pause(folder.path(), "s", "-r file disk.raw");
            let moved = || allocated_now(&partial) > MIB;
            interrupted_when_stalled(&server.uri(), text(&at("copy")), moved, stop);
            assert!(!partial.exists() && !at("copy").exists());
        });
        scope.spawn(|| {
            sparse_file(&target, 32 * MIB);
            let (server, stop) = nbdkit_with_pause(folder.path(), "t", "file target.raw");
            interrupted_when_stalled(text(&disk), &server.uri(), || allocated(&target) > MIB, stop);
        });
        scope.spawn(|| {
            let lost = at("lost.raw");
            sparse_file(&lost, 32 * MIB);
            let server = nbdkit(folder.path(), "u", "file lost.raw");
            let uri = server.uri();
            interrupted_when_stalled(text(&disk), &uri, || allocated(&lost) > MIB, || drop(server));
        });
    });
}

#[test]
fn a_slow_server_is_waited_for() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    bytes::disk(&at("disk.raw"), 4 * MIB);
    sparse_file(&at("target.raw"), 4 * MIB);
    let source = nbdkit(folder.path(), "s", "-r file disk.raw --filter=delay delay-read=50ms");
    let target = nbdkit(folder.path(), "t", "file target.raw --filter=delay delay-write=50ms");
    backup(&source.uri(), &target.uri(), &[]).succeeds();
    same_bytes(&at("disk.raw"), &at("target.raw"));
}

#[test]
fn qemu_storage_daemon_serves_both_ends() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    bytes::disk(&at("disk.raw"), 4 * MIB);
    sparse_file(&at("target.raw"), 4 * MIB);
    let socket = at("s");
    let mut command = quiet("qemu-storage-daemon");
    command.current_dir(folder.path());
    for (name, file, writable) in [("one", "disk.raw", "off"), ("two", "target.raw", "on")] {
        let read_only = if writable == "on" { "off" } else { "on" };
        command.args(["--blockdev", &format!("file,node-name={name},filename={file},read-only={read_only}")]);
        command.args(["--export", &format!("nbd,id={name},node-name={name},writable={writable},name={name}")]);
    }
    // The listener comes before the exports on the command line.
    let exports: Vec<_> = command.get_args().map(ToOwned::to_owned).collect();
    let mut command = quiet("qemu-storage-daemon");
    command.current_dir(folder.path());
    command.args(["--nbd-server", &format!("addr.type=unix,addr.path={},max-connections=0", socket.display())]);
    command.args(exports);
    let server = serve(command, &socket);
    backup(&server.named("one"), &server.named("two"), &[]).succeeds();
    same_bytes(&at("disk.raw"), &at("target.raw"));
}

/// A certificate for `who`, signed by the authority in `folder`, there as `{role}-cert.pem`.
fn certificate(folder: &Path, role: &str, name: &str, days: &str) {
    let at = |file: &str| folder.join(file).display().to_string();
    let (key, request, cert) = (at(&format!("{role}-key.pem")), at("request.pem"), at(&format!("{role}-cert.pem")));
    std::fs::write(at("extensions"), format!("subjectAltName=DNS:{name},IP:127.0.0.1\nbasicConstraints=CA:FALSE\n"))
        .unwrap();
    let new_key = ["req", "-new", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-batch"];
    let subject = format!("/CN={name}");
    run("openssl", &[&new_key[..], &["-subj", &subject, "-keyout", &key, "-out", &request]].concat());
    let (ca, ca_key, extensions) = (at("ca-cert.pem"), at("ca-key.pem"), at("extensions"));
    let sign =
        ["x509", "-req", "-in", &request, "-CA", &ca, "-CAkey", &ca_key, "-CAcreateserial", "-extfile", &extensions];
    run("openssl", &[&sign[..], &["-days", days, "-out", &cert]].concat());
}

fn authority(folder: &Path) {
    std::fs::create_dir_all(folder).unwrap();
    let at = |file: &str| folder.join(file).display().to_string();
    let new = ["req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-batch"];
    let rest = ["-subj", "/CN=test authority", "-days", "2", "-keyout", &at("ca-key.pem"), "-out", &at("ca-cert.pem")];
    run("openssl", &[&new[..], &rest].concat());
}

#[test]
fn tls_needs_the_right_certificates_on_both_sides() {
    let folder = folder();
    let at = |name: &str| folder.path().join(name);
    bytes::disk(&at("disk.raw"), 2 * MIB);
    for name in ["good", "other"] {
        authority(&at(name));
        certificate(&at(name), "server", "localhost", "2");
        certificate(&at(name), "client", "client", "2");
    }
    std::fs::create_dir(at("expired")).unwrap();
    for file in ["ca-cert.pem", "ca-key.pem"] {
        std::fs::copy(at("good").join(file), at("expired").join(file)).unwrap();
    }
    certificate(&at("expired"), "server", "localhost", "-1");
    certificate(&at("expired"), "client", "client", "-1");
    std::fs::create_dir(at("anonymous")).unwrap();
    std::fs::copy(at("good/ca-cert.pem"), at("anonymous/ca-cert.pem")).unwrap();

    let with = |server: &Server, tls: &str, more: &str| {
        let uri =
            format!("nbds+unix:///?socket={}&tls-certificates={}{more}", server.socket.display(), at(tls).display());
        let _ = std::fs::remove_file(at("copy.raw"));
        backup(&uri, text(&at("copy.raw")), &[])
    };
    let server = |name: &str, tls: &str, verify: &str| {
        nbdkit(folder.path(), name, &format!("-r --tls=require --tls-certificates={tls} {verify} file disk.raw"))
    };
    let trusting = server("s", "good", "");
    with(&trusting, "good", "").succeeds();
    same_bytes(&at("disk.raw"), &at("copy.raw"));
    with(&trusting, "anonymous", "&tls-hostname=127.0.0.1").succeeds();
    with(&trusting, "other", "").fails(4, "the peer's certificate is not signed by the authority of ca-cert.pem");
    with(&trusting, "other", "&tls-verify-peer=false").succeeds();
    with(&trusting, "good", "&tls-hostname=elsewhere").fails(4, "the peer's certificate is not for 'elsewhere'");
    with(&trusting, "none", "").fails(4, "ca-cert.pem': No such file or directory");
    backup(&trusting.uri(), text(&at("no")), &[]).fails(4, "the server wants TLS: write nbds, with tls-certificates");
    with(&server("e", "expired", ""), "good", "").fails(4, "the peer's certificate has expired");
    let verifying = server("v", "good", "--tls-verify-peer");
    with(&verifying, "good", "").succeeds();
    with(&verifying, "other", "&tls-verify-peer=false").fails(4, "open source");
    with(&verifying, "expired", "").fails(4, "open source");
    with(&verifying, "anonymous", "").fails(4, "open source");
    let plain = nbdkit(folder.path(), "p", "-r file disk.raw");
    with(&plain, "good", "").fails(4, "the server has no TLS");
}
