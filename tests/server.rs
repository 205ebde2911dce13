//! A server's life: locks, sockets, signals and death; and backups of what it serves while that is written.
#![cfg(all(feature = "cli", feature = "nbd"))]

mod support;

use drive_backup::error::Side;
use drive_backup::ground::range::ByteRange;
use drive_backup::image::Image;
use drive_backup::image::nbd::{Nbd, Use};
use drive_backup::nbd::uri::Uri;
use nix::sys::signal::Signal;
use std::io::{BufRead, BufReader, Write as _};
use std::os::unix::net::{UnixDatagram, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};
use std::thread;
use std::time::Duration;
use support::hold::Hold;
use support::{
    BINARY, Ended, LoopDevice, Mount, Running, command, drive_backup, folder, piped, qemu_img, qemu_io, run, text,
    wait_for,
};

const MIB: u64 = 1 << 20;
const BLOCK: usize = 4096;
const DISK: u64 = 8 * MIB;

/// A folder with a server's disk, socket and writers' folder.
struct Lab {
    folder: tempfile::TempDir,
    disk: PathBuf,
}

impl Lab {
    fn new(format: &str) -> Self {
        let folder = folder();
        let disk = folder.path().join(format!("disk.{format}"));
        qemu_img(&format!("create -q -f {format}"), &[&disk, Path::new(&DISK.to_string())]);
        Self { folder, disk }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn arguments(&self, device: &Path, socket: &str) -> Vec<String> {
        let address = format!("unix:{}", text(&self.path(socket)));
        let writers = self.path("writers");
        ["serve", "--json", "--device", text(device), "--nbd", &address, "--writer-dir", text(&writers)]
            .map(str::to_owned)
            .to_vec()
    }

    fn command(&self) -> Command {
        let arguments = self.arguments(&self.disk, "socket");
        command(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// A server that is ready.
    fn serve(&self) -> Running {
        let running = Running::start(&mut self.command());
        wait_for("the server", || std::os::unix::net::UnixStream::connect(self.path("socket")).ok());
        running
    }

    /// How a server ends that is refused.
    fn refused(&self, device: &Path, socket: &str) -> Ended {
        let arguments = self.arguments(device, socket);
        drive_backup(&arguments.iter().map(String::as_str).collect::<Vec<_>>())
    }

    fn uri(&self) -> String {
        format!("nbd+unix:///?socket={}", text(&self.path("socket")))
    }

    /// A client that gives a lost server up at once.
    fn client(&self) -> Nbd {
        let usage = Use { side: Side::Target, flushes: true, reconnect: Duration::from_millis(1) };
        Nbd::open(&self.uri().parse::<Uri>().unwrap(), usage).unwrap()
    }

    fn back_up(&self, copy: &Path) -> Ended {
        let writers = self.path("writers");
        let device = ["--device", text(&self.disk), "--target", text(copy), "--writer-dir", text(&writers)];
        drive_backup(&[&device[..], &["--writer", "required", "--no-fsync"]].concat())
    }

    /// The image's contents.
    fn contents(&self, image: &Path) -> Vec<u8> {
        let raw = self.path("contents");
        qemu_img("convert -O raw", &[image, &raw]);
        std::fs::read(raw).unwrap()
    }
}

/// The record of this kind among the JSON lines.
fn record(ended: &Ended, kind: &str) -> serde_json::Value {
    let lines = String::from_utf8_lossy(&ended.stdout).into_owned();
    let records = lines.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    records
        .into_iter()
        .find(|record| record["message_type"] == kind)
        .unwrap_or_else(|| panic!("no {kind} in {ended:?}"))
}

#[test]
fn a_disk_is_served_once_and_a_socket_by_one() {
    for format in ["raw", "qcow2"] {
        let lab = Lab::new(format);
        let server = lab.serve();
        let held = lab.refused(&lab.disk, "other");
        held.fails(8, &format!("disk '{}' is in use by another program (pid {})", text(&lab.disk), server.id()));
        assert_eq!(record(&held, "exit_error")["reason"], "busy");
        let other = lab.path("other.raw");
        std::fs::write(&other, [0; 4096]).unwrap();
        lab.refused(&other, "socket").fails(8, "another server listens");
        let qemu = Command::new("qemu-io").args(["-f", format, "-c", "write 0 4k"]).arg(&lab.disk).output().unwrap();
        assert!(String::from_utf8_lossy(&qemu.stderr).contains("lock"), "{qemu:?}");
        // What was refused has hurt nobody.
        lab.client().write_at(b"fine", 100).unwrap();
        drop(server);
        // Killed: its socket is there, and nobody behind it.
        assert!(lab.path("socket").exists());
        drop(lab.serve());
    }
}

#[test]
fn a_server_in_a_container_is_backed_up_from_outside_though_it_sees_no_process_there() {
    let lab = Lab::new("raw");
    let mut unshare = piped(Command::new("unshare"));
    unshare.args(["--pid", "--fork", "--kill-child", BINARY]).args(lab.arguments(&lab.disk, "socket"));
    let _server = Running::start(&mut unshare);
    wait_for("the server", || std::os::unix::net::UnixStream::connect(lab.path("socket")).ok());
    lab.client().write_at(b"in a container", 100).unwrap();
    let copy = lab.path("copy.raw");
    lab.back_up(&copy).succeeds();
    assert_eq!(lab.contents(&copy)[100..114], *b"in a container");
}

#[test]
fn a_device_that_somebody_else_holds_is_busy_and_nonsense_is_told() {
    let lab = Lab::new("raw");
    let mount = Mount::fresh("ext4");
    let device = run("findmnt", &["-n", "-o", "SOURCE", text(mount.path())]);
    lab.refused(Path::new(&device), "socket").fails(8, "is mounted at");
    let held = LoopDevice::over(&lab.disk, &[]);
    let _holder = open_exclusively(held.path());
    lab.refused(held.path(), "socket").fails(8, "is mounted or in use");
    lab.refused(&lab.path("none"), "socket").fails(4, "No such file or directory");
    lab.refused(&lab.disk, "no/such/folder").fails(2, "No such file or directory");
    let damaged = lab.path("damaged.qcow2");
    std::fs::write(&damaged, b"QFI\xfb\0\0\0\x09 and so on").unwrap();
    lab.refused(&damaged, "socket").fails(4, "open disk");
    assert!(!lab.path("socket").exists());
}

/// As whoever mounts or partitions a device opens it.
fn open_exclusively(device: &Path) -> std::fs::File {
    use std::os::unix::fs::OpenOptionsExt;
    let exclusive = nix::libc::O_EXCL;
    std::fs::File::options().read(true).write(true).custom_flags(exclusive).open(device).unwrap()
}

/// Writes blocks one after the other until the server is gone; the last number that was acknowledged for each block.
fn write_until_gone(client: &Nbd, thread: u64, acknowledged: &AtomicU64) -> Vec<u64> {
    let mut last = vec![0; (DISK / BLOCK as u64 / 2) as usize];
    for number in 1.. {
        let place = scatter(number) % last.len() as u64;
        if client.write_at(&block(number), (thread * last.len() as u64 + place) * BLOCK as u64).is_err() {
            break;
        }
        last[place as usize] = number;
        acknowledged.fetch_add(1, SeqCst);
    }
    last
}

fn scatter(number: u64) -> u64 {
    number.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 20
}

fn block(number: u64) -> Vec<u8> {
    number.to_le_bytes().repeat(BLOCK / 8)
}

/// The number that a block says; 0 for one that was never written. Panics for a torn one.
fn number_of(bytes: &[u8]) -> u64 {
    let number = u64::from_le_bytes(bytes[..8].try_into().unwrap());
    assert!(bytes == block(number), "torn: it begins with write {number}");
    number
}

#[test]
fn sigterm_answers_what_is_in_flight_and_keeps_all_that_was_acknowledged() {
    for format in ["raw", "qcow2"] {
        let lab = Lab::new(format);
        let server = lab.serve();
        let acknowledged = AtomicU64::new(0);
        let last: Vec<Vec<u64>> = thread::scope(|scope| {
            let clients: Vec<_> = (0..2)
                .map(|thread| {
                    scope.spawn({
                        let (lab, acknowledged) = (&lab, &acknowledged);
                        move || write_until_gone(&lab.client(), thread, acknowledged)
                    })
                })
                .collect();
            wait_for("writes", || (acknowledged.load(SeqCst) > 500).then_some(()));
            server.signal(Signal::SIGTERM);
            clients.into_iter().map(|client| client.join().unwrap()).collect()
        });
        let ended = server.ended();
        assert_eq!(ended.code, 0, "{ended:?}");
        assert_eq!(
            (&record(&ended, "stopped")["drained"], &record(&ended, "ready")["disks"][0]["format"]),
            (&true.into(), &format.into())
        );
        assert!(!lab.path("socket").exists());
        if format == "qcow2" {
            qemu_img("check -q", &[&lab.disk]);
        }
        let found = lab.contents(&lab.disk);
        for (at, last) in last.concat().into_iter().enumerate() {
            let number = number_of(&found[at * BLOCK..(at + 1) * BLOCK]);
            // The next one may have been written without its answer.
            assert!(number >= last, "block {at} says {number}, {last} was acknowledged");
        }
    }
}

#[test]
fn quit_twice_ends_a_server_as_once_and_nothing_that_follows_it_is_obeyed() {
    let lab = Lab::new("qcow2");
    let (hold, qmp) = (Hold::at("Stopping", lab.folder.path()), lab.path("qmp"));
    let mut server = Running::start(
        lab.command().args(["--qmp", &format!("unix:{}", text(&qmp))]).env("DRIVE_BACKUP_HOLD", hold.variable()),
    );
    let clients = [(); 2].map(|()| wait_for("the socket", || UnixStream::connect(&qmp).ok()));
    let disk = lab.client();
    (0..32).for_each(|at| disk.write_at(&block(at + 1), at * 65536).unwrap());
    let quit = br#"{"execute":"qmp_capabilities"}{"execute":"quit"}{"execute":"quit"}{"execute":"query-jobs"}"#;
    (&clients[0]).write_all(quit).unwrap();
    let held = hold.reached(&mut server);
    (&clients[1]).write_all(quit).unwrap();
    let mut second = BufReader::new(&clients[1]);
    // The greeting, and two answers.
    (0..3).for_each(|_| assert!(second.read_line(&mut String::new()).unwrap() > 0));
    drop(held);
    let ended = server.ended();
    assert_eq!(ended.code, 0, "{ended:?}");
    assert_eq!(record(&ended, "stopped")["signal"], "SIGTERM");
    let said = std::io::read_to_string(&clients[0]).unwrap();
    assert_eq!((said.matches("return").count(), said.matches("SHUTDOWN").count()), (2, 1), "{said}");
    let found = lab.contents(&lab.disk);
    (0..32).for_each(|at| assert_eq!(number_of(&found[at * 65536..at * 65536 + BLOCK]), at as u64 + 1));
}

#[test]
fn a_server_that_is_refused_halfway_keeps_what_it_has_answered_already() {
    let lab = Lab::new("qcow2");
    let (hold, taken) = (Hold::at("Reachable", lab.folder.path()), lab.path("qmp"));
    let _other = std::os::unix::net::UnixListener::bind(&taken).unwrap();
    let mut server = Running::start(
        lab.command().args(["--qmp", &format!("unix:{}", text(&taken))]).env("DRIVE_BACKUP_HOLD", hold.variable()),
    );
    let held = hold.reached(&mut server);
    lab.client().write_at(&block(7), 0).unwrap();
    drop(held);
    server.ended().fails(8, "another server listens");
    qemu_img("check -q", &[&lab.disk]);
    assert_eq!(number_of(&lab.contents(&lab.disk)[..BLOCK]), 7);
    assert!(!lab.path("socket").exists());
}

#[test]
fn a_server_that_is_killed_while_it_writes_leaves_at_worst_leaks_and_all_that_was_flushed() {
    for round in 0..4 {
        let lab = Lab::new("qcow2");
        let server = lab.serve();
        let acknowledged = AtomicU64::new(0);
        thread::scope(|scope| {
            let client = lab.client();
            client.write_at(&block(7), DISK - BLOCK as u64).unwrap();
            client.flush().unwrap();
            scope.spawn(|| {
                // Its last block would be the other one.
                let client = lab.client();
                for number in 1.. {
                    let offset = scatter(number) % (DISK / 512 - 8) * 512;
                    let done = match number % 7 {
                        // Whole clusters, but for the last one.
                        0 => client.write_zeroes(ByteRange::new(scatter(number) % (DISK / 65536 - 1) * 65536, 65536)),
                        3 if number % 5 == 0 => client.flush(),
                        _ => client.write_at(&block(number), offset),
                    };
                    if done.is_err() {
                        return;
                    }
                    acknowledged.fetch_add(1, SeqCst);
                }
            });
            wait_for("writes", || (acknowledged.load(SeqCst) > 20 + round * 150).then_some(()));
            server.signal(Signal::SIGKILL);
        });
        assert_eq!(server.ended().code, 137);
        let check = Command::new("qemu-img").args(["check", "-q"]).arg(&lab.disk).output().unwrap();
        assert!(matches!(check.status.code(), Some(0 | 3)), "{check:?}");
        qemu_io(&["-r", "-f", "qcow2"], &lab.disk, &[&format!("read -P 7 {} 1", DISK - BLOCK as u64)]);
        // It is served again as it is.
        let server = lab.serve();
        let mut last = vec![0; BLOCK];
        lab.client().read_at(&mut last, DISK - BLOCK as u64).unwrap();
        assert_eq!(number_of(&last), 7);
        server.signal(Signal::SIGTERM);
        assert_eq!(server.ended().code, 0);
    }
}

/// When a write began and when it had ended, on one clock.
type Write = (u64, u64);

/// Writes the blocks of its half of the disk for as long as it may; when each write began and ended.
fn write_on(client: &Nbd, thread: u64, clock: &AtomicU64, stop: &AtomicBool, written: &AtomicU64) -> Vec<Write> {
    let blocks = DISK / BLOCK as u64 / 2;
    let mut writes = vec![(0, 0)];
    while !stop.load(SeqCst) {
        let number = writes.len() as u64;
        let began = clock.fetch_add(1, SeqCst);
        client.write_at(&block(number), (thread * blocks + scatter(number) % blocks) * BLOCK as u64).unwrap();
        writes.push((began, clock.fetch_add(1, SeqCst)));
        written.fetch_add(1, SeqCst);
    }
    writes
}

/// How many writes of a thread its half of a copy has: all up to that one, and none after it.
fn writes_in(half: &[u8]) -> usize {
    let blocks = (half.len() / BLOCK) as u64;
    let found: Vec<u64> = half.chunks(BLOCK).map(number_of).collect();
    let newest = found.iter().copied().max().unwrap();
    let mut expected = vec![0; found.len()];
    (1..=newest).for_each(|number| expected[(scatter(number) % blocks) as usize] = number);
    assert!(found == expected, "it is not the disk after write {newest}, nor after any other");
    newest as usize
}

#[test]
fn each_backup_of_a_served_disk_that_is_written_is_one_instant() {
    for format in ["raw", "qcow2"] {
        let lab = Lab::new(format);
        let server = lab.serve();
        let (clock, stop, written) = (AtomicU64::new(1), AtomicBool::new(false), AtomicU64::new(0));
        let copies = Mutex::new(Vec::new());
        let writes: Vec<Vec<Write>> = thread::scope(|scope| {
            let threads: Vec<_> = (0..2)
                .map(|thread| {
                    scope.spawn({
                        let (lab, clock, stop, written) = (&lab, &clock, &stop, &written);
                        move || write_on(&lab.client(), thread, clock, stop, written)
                    })
                })
                .collect();
            for backup in 0..3 {
                let so_far = written.load(SeqCst);
                wait_for("writes", || (written.load(SeqCst) > so_far + 300).then_some(()));
                let (copy, began) = (lab.path(&format!("copy{backup}.raw")), clock.load(SeqCst));
                let ended = lab.back_up(&copy);
                if ended.code != 0 {
                    stop.store(true, SeqCst);
                }
                ended.succeeds();
                copies.lock().unwrap().push((copy, began, clock.load(SeqCst)));
            }
            stop.store(true, SeqCst);
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        server.signal(Signal::SIGTERM);
        assert_eq!(server.ended().code, 0);
        for (copy, began, ended) in copies.into_inner().unwrap() {
            let bytes = lab.contents(&copy);
            let has: Vec<usize> = bytes.chunks(bytes.len() / 2).map(writes_in).collect();
            // There is a moment after all that it has had begun, and before any that it lacks had ended.
            let newest = writes.iter().zip(&has).map(|(writes, has)| writes[*has].0).max().unwrap();
            let lacking = writes.iter().zip(&has).filter_map(|(writes, has)| Some(writes.get(has + 1)?.1)).min();
            assert!(newest < lacking.unwrap_or(u64::MAX), "it has a write that began when one that it lacks had ended");
            assert!(newest < ended && lacking.is_none_or(|lacking| lacking > began), "it is of another time");
        }
        if format == "qcow2" {
            qemu_img("check -q", &[&lab.disk]);
        }
    }
}

#[test]
fn systemd_hears_that_it_is_ready_and_that_it_ends() {
    let lab = Lab::new("raw");
    let manager = UnixDatagram::bind(lab.path("notify")).unwrap();
    manager.set_read_timeout(Some(support::PATIENCE)).unwrap();
    let server = Running::start(lab.command().env("NOTIFY_SOCKET", lab.path("notify")));
    let mut heard = [0; 32];
    let hear = |heard: &mut [u8]| {
        let length = manager.recv(heard).unwrap();
        String::from_utf8(heard[..length].to_vec()).unwrap()
    };
    assert_eq!(hear(&mut heard), "READY=1");
    // It may be used now.
    lab.client().write_at(b"fine", 0).unwrap();
    server.signal(Signal::SIGTERM);
    assert_eq!(hear(&mut heard), "STOPPING=1");
    assert_eq!(server.ended().code, 0);
}

#[test]
fn a_backup_that_would_rather_fail_writes_fails_those_of_clients_with_the_errno() {
    let lab = Lab::new("raw");
    std::fs::write(&lab.disk, vec![1; DISK as usize]).unwrap();
    let server = lab.serve();
    let client = lab.client();
    let (copy, writers) = (lab.path("copy.raw"), lab.path("writers"));
    let ends = ["--device", text(&lab.disk), "--target", text(&copy), "--writer-dir", text(&writers)];
    let how =
        ["--on-cbw-error", "break-guest-write", "--snapshot", "overlay", "--overlay-limit", "64K", "--speed", "64K"];
    let backup = Running::drive_backup(&[&ends[..], &how].concat());
    // From the end, where the copy comes last.
    let mut at = DISK;
    let error = wait_for("a write that is refused", || {
        at -= BLOCK as u64;
        client.write_at(&block(1), at).err()
    });
    assert_eq!(error.raw_os_error(), Some(nix::libc::ENOSPC), "{error}");
    let mut refused = vec![0; BLOCK];
    client.read_at(&mut refused, at).unwrap();
    assert_eq!(refused, [1; BLOCK]);
    drop(backup);
    wait_for("writes after the backup", || client.write_at(&block(1), at).ok());
    server.signal(Signal::SIGTERM);
    assert_eq!(server.ended().code, 0);
}
