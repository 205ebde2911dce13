//! `serve --nbd` beside the clients that others wrote, beside qemu-nbd, and beside clients that do what they should not.

mod support;

use nix::sys::signal::Signal;
use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use support::{Running, command, drive_backup, folder, qemu_img, run, text, wait_for};
use tempfile::TempDir;

/// Bytes of the disk: data, a hole, data at the end.
const LENGTH: u64 = 8 << 20;

/// A server of `disk.raw` at a Unix socket, ended when dropped.
struct Served {
    folder: TempDir,
    server: Running,
}

fn disk(path: &Path) {
    let file = File::create(path).unwrap();
    file.set_len(LENGTH).unwrap();
    file.write_all_at(&[b'a'; 1 << 20], 0).unwrap();
    file.write_all_at(&[b'z'; 65_536], LENGTH - 65_536).unwrap();
}

impl Served {
    fn start(arguments: &[&str]) -> Self {
        let folder = folder();
        disk(&folder.path().join("disk.raw"));
        Self::start_in(folder, arguments)
    }

    fn start_in(folder: TempDir, arguments: &[&str]) -> Self {
        let [disk, socket, writers] = ["disk.raw", "socket", "writers"].map(|name| folder.path().join(name));
        let address = format!("unix:{}", text(&socket));
        let mut all = vec!["serve", "--device", text(&disk), "--format", "raw", "--nbd", &address];
        all.extend(["--writer-dir", text(&writers)]);
        all.extend(arguments);
        let server = Running::start(&mut command(&all));
        wait_for("the server", || UnixStream::connect(&socket).ok());
        Self { folder, server }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", text(&self.path("socket")))
    }

    fn connect(&self) -> UnixStream {
        let socket = UnixStream::connect(self.path("socket")).unwrap();
        socket.set_read_timeout(Some(support::PATIENCE)).unwrap();
        socket
    }

    /// In the transmission phase, with simple replies.
    fn begin(&self) -> UnixStream {
        self.try_begin().unwrap()
    }

    fn try_begin(&self) -> std::io::Result<UnixStream> {
        let mut socket = self.connect();
        socket.write_all(&3_u32.to_be_bytes())?;
        socket.write_all(b"IHAVEOPT\0\0\0\x01\0\0\0\0")?;
        let mut answer = [0; 18 + 10];
        socket.read_exact(&mut answer)?;
        assert_eq!(answer[18..26], LENGTH.to_be_bytes());
        Ok(socket)
    }

    /// A new client is served.
    #[track_caller]
    fn serves(&self) {
        assert_eq!(run("nbdinfo", &["--size", &self.uri()]), LENGTH.to_string());
    }

    /// Asks qemu-io; what it says, without times.
    fn qemu_io(&self, commands: &[&str]) -> String {
        let mut arguments = vec!["-f", "raw"];
        commands.iter().for_each(|command| arguments.extend(["-c", command]));
        let uri = self.uri();
        arguments.push(&uri);
        qemu_io(&arguments)
    }
}

fn qemu_io(arguments: &[&str]) -> String {
    let output = Command::new("qemu-io").args(arguments).output().unwrap();
    let all = [output.stdout, output.stderr].concat();
    let all = String::from_utf8(all).unwrap();
    all.lines().filter(|line| !line.contains("ops/sec")).map(|line| format!("{line}\n")).collect()
}

fn request(flags: u16, command: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
    bytes.extend(flags.to_be_bytes());
    bytes.extend(command.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes
}

fn is_hung_up_on(mut socket: UnixStream) {
    let mut rest = Vec::new();
    // A reset is an end, too; a time-out is not.
    if let Err(e) = socket.read_to_end(&mut rest) {
        assert_eq!(e.kind(), std::io::ErrorKind::ConnectionReset);
    }
}

#[test]
fn clients_of_others_get_from_us_what_they_get_from_qemu_nbd() {
    let ours = Served::start(&[]);
    let folder = folder();
    let [image, socket] = ["disk.raw", "socket"].map(|name| folder.path().join(name));
    disk(&image);
    let mut qemu_nbd = Command::new("qemu-nbd");
    qemu_nbd
        .args(["-f", "raw", "-t", "-e", "8", "--discard=unmap", "--detect-zeroes=off", "-k"])
        .args([&socket, &image]);
    let _qemu_nbd = Running::start(&mut qemu_nbd);
    wait_for("qemu-nbd's socket", || socket.exists().then_some(()));
    let theirs = format!("nbd+unix:///?socket={}", text(&socket));
    let commands = [
        "read -P 97 0 1M",
        "read -P 0 1M 4M",
        "write -P 1 3M 1M",
        "write -f -P 2 123 4567",
        "read -P 2 123 4567",
        "aio_write -P 3 4M 64k",
        "aio_flush",
        "aio_read -P 1 3M 64k",
        "aio_flush",
        "write -z -u 3200k 64k",
        "read -P 0 3200k 64k",
        "discard 5M 1M",
        "flush",
        "length",
        "read 7M 2M",
        "write 7M 2M",
        "discard 7M 2M",
        "write -P 9 8388600 8",
    ];
    let mut with: Vec<&str> = vec!["-f", "raw"];
    commands.iter().for_each(|command| with.extend(["-c", command]));
    let (our_uri, mut again) = (ours.uri(), with.clone());
    with.push(&theirs);
    again.push(&our_uri);
    assert_eq!(qemu_io(&again), qemu_io(&with));
    for uri in [&our_uri, &theirs] {
        run("nbdinfo", &[uri]);
    }
    let map = |uri: &str| run("nbdinfo", &["--map", "--json", uri]);
    assert_eq!(map(&our_uri), map(&theirs));
    assert_eq!(qemu_map(&our_uri), qemu_map(&theirs));
    for can in ["flush", "fua", "trim", "zero", "df", "multi-conn", "cache", "fast-zero"] {
        run("nbdinfo", &["--can", can, &our_uri]);
    }
    // Zeroes that keep their space: whether they are shown as data depends on the page cache.
    let zeroes = "wrote 65536/65536 bytes at offset 3145728\n";
    let read = "read 65536/65536 bytes at offset 3145728\n";
    assert_eq!(ours.qemu_io(&["write -z 3M 64k", "read -P 0 3M 64k"]), format!("{zeroes}{read}"));
    assert_eq!(qemu_io(&["-f", "raw", "-c", "write -z 3M 64k", &theirs]), zeroes);
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", &our_uri, &theirs]);
}

fn qemu_map(uri: &str) -> String {
    run("qemu-img", &["map", "--output=json", "-f", "raw", uri])
}

#[test]
fn copies_of_others_both_ways_are_the_disk() {
    let served = Served::start(&[]);
    let (disk, uri) = (served.path("disk.raw"), served.uri());
    let copy = served.path("copy.raw");
    run("nbdcopy", &[&uri, text(&copy)]);
    assert_eq!(std::fs::read(&copy).unwrap(), std::fs::read(&disk).unwrap());
    let converted = served.path("converted.qcow2");
    run("qemu-img", &["convert", "-f", "raw", "-O", "qcow2", &uri, text(&converted)]);
    qemu_img("compare -f raw -F qcow2", &[&copy, &converted]);
    let other: Vec<u8> = (0..LENGTH).map(|at| (at / 4096 % 3) as u8).collect();
    std::fs::write(&copy, &other).unwrap();
    run("nbdcopy", &["--flush", text(&copy), &uri]);
    assert_eq!(std::fs::read(&disk).unwrap(), other);
    run("qemu-img", &["convert", "-n", "-f", "qcow2", "-O", "raw", text(&converted), &uri]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", &uri, text(&converted)]);
}

#[test]
fn fio_finds_what_it_wrote() {
    let served = Served::start(&[]);
    let uri = format!("--uri={}", served.uri());
    let job = ["--name=x", "--ioengine=nbd", "--rw=randwrite", "--bsrange=512-64k", "--iodepth=16", "--size=8M"];
    let verify =
        ["--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--randrepeat=0", "--output-format=terse"];
    run("fio", &[&job[..], &verify, &[&uri]].concat());
}

#[test]
fn every_disk_has_its_name_and_no_other_is_there() {
    let served = Served::start(&[]);
    let [one, two, socket, writers] = ["one.raw", "two.raw", "socket2", "writers2"].map(|name| served.path(name));
    disk(&one);
    std::fs::write(&two, vec![b't'; 4096]).unwrap();
    let (address, second) = (format!("unix:{}", text(&socket)), format!("2nd={}", text(&two)));
    let arguments = ["serve", "--device", text(&one), "--device", &second, "--read-only", "--nbd", &address];
    let _server = Running::start(&mut command(&[&arguments[..], &["--writer-dir", text(&writers)]].concat()));
    wait_for("the server", || UnixStream::connect(&socket).ok());
    let uri = |name: &str| format!("nbd+unix:///{name}?socket={}", text(&socket));
    let list = run("nbdinfo", &["--list", "--json", &uri("")]);
    for name in ["\"one\"", "\"2nd\""] {
        assert!(list.contains(name), "{list}");
    }
    assert_eq!(run("nbdinfo", &["--size", &uri("2nd")]), "4096");
    run("nbdinfo", &["--is", "read-only", &uri("one")]);
    for unknown in ["three", ""] {
        let output = Command::new("nbdinfo").args(["--size", &uri(unknown)]).output().unwrap();
        assert!(!output.status.success());
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(stderr.contains("has no export named"), "{stderr}");
    }
    let refused = qemu_io(&["-f", "raw", "-c", "write 0 512", &uri("one")]);
    assert!(refused.contains("read-only") || refused.contains("Permission denied"), "{refused}");
    assert!(std::fs::read(&one).unwrap()[..512].iter().all(|byte| *byte == b'a'));
}

#[test]
fn nonsense_ends_its_own_connection_alone() {
    let served = Served::start(&[]);
    let bystander = served.begin();
    let mut garbage = served.connect();
    garbage.write_all(&[0x55; 5000]).unwrap();
    is_hung_up_on(garbage);
    for nonsense in [
        vec![0xff; 28],
        request(0, 1, 7, 0, (32 << 20) + 1),
        [request(0, 0, 7, 0, 512), b"GET / HTTP/1.1\r\n\r\nxxxxxxxxxx".to_vec()].concat(),
    ] {
        let mut socket = served.begin();
        socket.write_all(&nonsense).unwrap();
        is_hung_up_on(socket);
    }
    // Half a request, half a write, and an option that never ends.
    for half in [&request(0, 0, 7, 0, 512)[..13], &[request(0, 1, 7, 0, 512), vec![1; 100]].concat()] {
        let mut socket = served.begin();
        socket.write_all(half).unwrap();
        drop(socket);
    }
    let mut option = served.connect();
    option.write_all(&[&3_u32.to_be_bytes()[..], b"IHAVEOPT\0\0\0\x07\xff\xff\xff\xff"].concat()).unwrap();
    is_hung_up_on(option);
    served.serves();
    let mut bystander = bystander;
    bystander.write_all(&request(0, 0, 9, LENGTH - 4, 4)).unwrap();
    let mut answer = [0; 20];
    bystander.read_exact(&mut answer).unwrap();
    assert_eq!((&answer[4..8], &answer[16..]), (&[0; 4][..], &b"zzzz"[..]));
}

#[test]
fn who_does_not_read_holds_neither_others_nor_much_memory() {
    let served = Served::start(&[]);
    let mut greedy: Vec<UnixStream> = (0..4).map(|_| served.begin()).collect();
    for socket in &mut greedy {
        for cookie in 0..60 {
            socket.write_all(&request(0, 0, cookie, 0, LENGTH as u32)).unwrap();
        }
    }
    served.serves();
    run("nbdcopy", &[&served.uri(), "null:"]);
    let status = std::fs::read_to_string(format!("/proc/{}/status", served.server.id())).unwrap();
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).unwrap();
    let peak: u64 = peak.trim().trim_end_matches(" kB").parse().unwrap();
    // 240 requests of 8 MiB would be 2 GiB; a connection may hold 64 MiB of them, and one more reply.
    assert!(peak < 400 << 10, "{peak} KiB");
}

#[test]
fn a_client_that_vanishes_leaves_nothing_behind() {
    let served = Served::start(&[]);
    let count = |what: &str| std::fs::read_dir(format!("/proc/{}/{what}", served.server.id())).unwrap().count();
    served.serves();
    let before = wait_for("the calm", || Some(count("fd")));
    for _ in 0..20 {
        let mut socket = served.begin();
        for cookie in 0..30 {
            socket.write_all(&request(0, 0, cookie, 0, 1 << 20)).unwrap();
        }
        socket.write_all(&request(0, 3, 99, 0, 0)).unwrap();
    }
    wait_for("the end of all connections", || (count("fd") <= before && count("task") < 12).then_some(()));
    served.serves();
}

#[test]
fn there_is_room_for_so_many_clients() {
    let served = Served::start(&["--max-connections", "3"]);
    // Who looked whether it listens may have a place for a moment still.
    let clients: Vec<_> = (0..3).map(|_| wait_for("a place", || served.try_begin().ok())).collect();
    // One after the other, since the place of who looked would be another's.
    for _ in 0..50 {
        let mut one_more = served.connect();
        one_more.set_read_timeout(Some(support::PATIENCE)).unwrap();
        // Before it is greeted: one that is let in and says nothing is hung up on, too.
        let mut greeting = [0];
        assert!(!matches!(one_more.read(&mut greeting), Ok(1..)), "it was let in");
    }
    drop(clients);
    wait_for("a free place", || {
        Command::new("nbdinfo").args(["--size", &served.uri()]).output().unwrap().status.success().then_some(())
    });
}

#[test]
fn a_server_that_is_asked_to_end_answers_what_it_has_begun() {
    let served = Served::start(&[]);
    let mut socket = served.begin();
    let idle = served.begin();
    for cookie in 0..8 {
        socket.write_all(&request(0, 1, cookie, 2 << 20, 4)).unwrap();
        socket.write_all(b"last").unwrap();
    }
    let mut answers = [0; 8 * 16];
    socket.read_exact(&mut answers).unwrap();
    let Served { folder, server } = served;
    server.signal(Signal::SIGTERM);
    is_hung_up_on(idle);
    is_hung_up_on(socket);
    let ended = server.ended();
    assert_eq!(ended.code, 0, "{ended:?}");
    assert!(!folder.path().join("socket").exists());
    assert_eq!(std::fs::read(folder.path().join("disk.raw")).unwrap()[2 << 20..][..4], *b"last");
}

/// The error and the cookie of the next simple reply, to a request without data.
fn reply(socket: &mut UnixStream) -> (u32, u64) {
    let mut answer = [0; 16];
    socket.read_exact(&mut answer).unwrap();
    (u32::from_be_bytes(answer[4..8].try_into().unwrap()), u64::from_be_bytes(answer[8..].try_into().unwrap()))
}

/// A backup of what is served that takes long, has begun, and is stopped: it saves nothing of what a write changes.
fn stopped_backup(served: &Served) -> Running {
    let [disk, writers, copy, partial] =
        ["disk.raw", "writers", "copy.raw", ".copy.raw.drive-backup-partial"].map(|name| served.path(name));
    let ends = ["--device", text(&disk), "--target", text(&copy), "--writer-dir", text(&writers), "--writer=required"];
    let backup = Running::drive_backup(&[&ends[..], &["--snapshot", "overlay", "--speed", "64K"]].concat());
    wait_for("what is copied after the instant", || {
        std::fs::metadata(&partial).is_ok_and(|partial| partial.blocks() > 0).then_some(())
    });
    backup.signal(Signal::SIGSTOP);
    // Its threads stop one after the other.
    let is_stopped = |task: std::fs::DirEntry| {
        std::fs::read_to_string(task.path().join("stat")).is_ok_and(|stat| stat.contains(") T "))
    };
    let tasks = format!("/proc/{}/task", backup.id());
    wait_for("all its threads to stop", || {
        std::fs::read_dir(&tasks).unwrap().map(Result::unwrap).all(is_stopped).then_some(())
    });
    backup
}

#[test]
fn while_a_write_waits_for_a_backup_others_go_on_and_a_server_that_ends_answers_it() {
    let served = Served::start(&[]);
    let mut socket = served.begin();
    let backup = stopped_backup(&served);
    socket.write_all(&[request(0, 1, 1, LENGTH - 4, 4), b"last".to_vec()].concat()).unwrap();
    // The same connection goes on meanwhile, and its neighbours.
    for cookie in 2..5 {
        socket.write_all(&request(0, 3, cookie, 0, 0)).unwrap();
        assert_eq!(reply(&mut socket), (0, cookie));
    }
    served.serves();
    let Served { folder, server } = served;
    server.signal(Signal::SIGTERM);
    wait_for("the end of listening", || (!folder.path().join("socket").exists()).then_some(()));
    backup.signal(Signal::SIGCONT);
    assert_eq!(reply(&mut socket), (0, 1));
    is_hung_up_on(socket);
    let ended = server.ended();
    assert_eq!(ended.code, 0, "{ended:?}");
    assert!(std::fs::read(folder.path().join("disk.raw")).unwrap().ends_with(b"zlast"));
}

/// What libnbd, which keeps to the protocol strictly, finds. Its arguments: the URI, the length.
const LIBNBD: &str = r#"
import errno, nbd, sys
uri, length, said = sys.argv[1], int(sys.argv[2]), []
h = nbd.NBD()
h.add_meta_context("base:allocation")
h.set_debug(True)
h.set_debug_callback(lambda where, what: said.append(what))
h.connect_uri(uri)
assert h.get_structured_replies_negotiated() and h.get_size() == length
hole = length - (1 << 20) - 65536

def read(count, offset, flags=0):
    chunks = []
    data = h.pread_structured(count, offset, lambda data, at, kind, e: chunks.append((at, len(data), kind)), flags)
    return bytes(data), sorted(chunks)

data, chunks = read(length, 0)
assert data == b"a" * (1 << 20) + bytes(hole) + b"z" * 65536
assert chunks[0][0] == 0 and all(a[0] + a[1] == b[0] for a, b in zip(chunks, chunks[1:])), chunks
assert read(1 << 20, 2 << 20) == (bytes(1 << 20), [(2 << 20, 1 << 20, nbd.READ_HOLE)])
assert read(4096, (1 << 20) - 1024, nbd.CMD_FLAG_DF) == (
    b"a" * 1024 + bytes(3072), [((1 << 20) - 1024, 4096, nbd.READ_DATA)])

def status(flags=0):
    found = []
    h.block_status(length, 0, lambda context, at, entries, e: found.extend(entries), flags)
    return found

both = nbd.STATE_HOLE | nbd.STATE_ZERO
assert status() == [1 << 20, 0, hole, both, 65536, 0], status()
assert status(nbd.CMD_FLAG_REQ_ONE) == [1 << 20, 0], status(nbd.CMD_FLAG_REQ_ONE)

h.set_strict_mode(0)
for call, number, why in [
    (lambda: h.pread(512, length), errno.EINVAL, "past the end of the disk"),
    (lambda: h.pwrite(b"x", length), errno.ENOSPC, "past the end of the disk"),
    (lambda: h.pread(512, 0, 1 << 9), errno.EINVAL, "flags that this command does not have"),
]:
    said.clear()
    try:
        call()
    except nbd.Error as e:
        assert e.errnum == number, e
    else:
        raise AssertionError("no error")
    assert any(why in line for line in said), said
h.shutdown()
print("fine")
"#;

#[test]
fn libnbd_sees_chunks_holes_and_reasons() {
    let served = Served::start(&[]);
    // The Python that the bindings were made for, wherever another one is in front.
    assert_eq!(run("/usr/bin/python3", &["-c", LIBNBD, &served.uri(), &LENGTH.to_string()]), "fine");
}

#[test]
fn the_socket_is_its_owners_and_addresses_that_make_no_sense_are_refused() {
    let served = Served::start(&[]);
    let mode = std::fs::metadata(served.path("socket")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let other = served.path("other.raw");
    disk(&other);
    let serve = |address: &str| drive_backup(&["serve", "--device", text(&other), "--format", "raw", "--nbd", address]);
    serve("nowhere").fails(2, "none of unix:PATH, HOST:PORT and :PORT");
    serve(&format!("unix:{}", text(&other))).fails(2, "is no socket");
    serve(&format!("unix:{}", text(&served.path("socket")))).fails(8, "another server listens");
}

/// A certificate authority, and certificates of it, in `folder`.
fn certificates(folder: &Path, server_days: &str, client_days: &str) {
    let openssl = |arguments: &[&str]| {
        let output = Command::new("openssl").args(arguments).current_dir(folder).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    };
    let key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"];
    openssl(
        &[&["req", "-x509", "-subj", "/CN=authority", "-keyout", "ca-key.pem", "-out", "ca-cert.pem"], &key[..]]
            .concat(),
    );
    std::fs::write(folder.join("extensions"), "subjectAltName=DNS:localhost\nbasicConstraints=CA:FALSE\n").unwrap();
    for (who, days) in [("server", server_days), ("client", client_days)] {
        let [subject, key_file, request, certificate] =
            [format!("/CN={who}"), format!("{who}-key.pem"), format!("{who}.csr"), format!("{who}-cert.pem")];
        openssl(&[&["req", "-subj", &subject, "-keyout", &key_file, "-out", &request], &key[..]].concat());
        let sign = ["x509", "-req", "-in", &request, "-CA", "ca-cert.pem", "-CAkey", "ca-key.pem", "-CAcreateserial"];
        openssl(&[&sign[..], &["-days", days, "-extfile", "extensions", "-out", &certificate]].concat());
    }
}

/// A client of QEMU's that connects with the certificates in `folder`; what it says.
fn qemu_tls(served: &Served, folder: &Path) -> String {
    let tls = format!("tls-creds-x509,id=t,endpoint=client,dir={}", text(folder));
    let socket = served.path("socket");
    let options =
        format!("driver=nbd,server.type=unix,server.path={},tls-creds=t,tls-hostname=localhost", text(&socket));
    qemu_io(&[
        "--object",
        &tls,
        "--image-opts",
        "-c",
        "write -P 5 0 1M",
        "-c",
        "read -P 5 0 1M",
        "-c",
        "length",
        &options,
    ])
}

#[test]
fn with_certificates_only_tls_is_served_and_only_to_those_with_the_right_one() {
    let [right, wrong] = [folder(), folder()];
    certificates(right.path(), "30", "30");
    certificates(wrong.path(), "30", "30");
    let served = Served::start(&["--tls-dir", text(right.path())]);
    let done = "wrote 1048576/1048576 bytes at offset 0\nread 1048576/1048576 bytes at offset 0\n8 MiB\n";
    assert_eq!(qemu_tls(&served, right.path()), done);
    assert_eq!(std::fs::read(served.path("disk.raw")).unwrap()[..1 << 20], vec![5; 1 << 20]);
    let refused = qemu_tls(&served, wrong.path());
    assert!(!refused.contains("8 MiB"), "{refused}");
    let plain = served.qemu_io(&["length"]);
    assert!(plain.contains("TLS"), "{plain}");
    // An export by name, past the demand.
    let mut socket = served.connect();
    socket.write_all(&[&3_u32.to_be_bytes()[..], b"IHAVEOPT\0\0\0\x01\0\0\0\0"].concat()).unwrap();
    is_hung_up_on(socket);
    assert_eq!(qemu_tls(&served, right.path()), done);
}

#[test]
fn certificates_that_have_expired_are_refused() {
    let [expired, old_client] = [folder(), folder()];
    certificates(expired.path(), "-1", "30");
    let served = Served::start(&["--tls-dir", text(expired.path())]);
    let refused = qemu_tls(&served, expired.path());
    assert!(refused.contains("certificate"), "{refused}");

    certificates(old_client.path(), "30", "-1");
    let served = Served::start(&["--tls-dir", text(old_client.path())]);
    let certificates = text(old_client.path());
    let uri = format!("nbds+unix://localhost/?socket={}&tls-certificates={certificates}", text(&served.path("socket")));
    assert!(!Command::new("nbdinfo").args(["--size", &uri]).output().unwrap().status.success());
    let Served { folder: _folder, server } = served;
    server.signal(Signal::SIGTERM);
    let ended = server.ended();
    assert!(ended.stderr.contains("the peer's certificate has expired"), "{ended:?}");
}

#[test]
fn a_folder_without_certificates_is_refused_before_anything_is_served() {
    let folder = folder();
    let path = folder.path().join("disk.raw");
    disk(&path);
    let arguments =
        ["serve", "--device", text(&path), "--format", "raw", "--nbd", ":0", "--tls-dir", text(folder.path())];
    drive_backup(&arguments).fails(2, "server-cert.pem");
}
