//! `serve --vhost-user` beside a frontend that does what guests don't: writes that wait for a backup beside others, hanging
//! up, nonsense.

#[path = "support/frontend.rs"]
mod frontend;
mod support;

use frontend::*;
use nix::sys::signal::Signal;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;
use support::hold::Hold;
use support::{Running, command, folder, text, wait_for};
use tempfile::TempDir;

const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;
const WRITE_ZEROES: u32 = 13;
/// Bytes of the disk, all of them data.
const LENGTH: usize = 4 << 20;
/// A sector that a slow copy comes to last.
const LAST: u64 = LENGTH as u64 / 512 - 8;

struct Served {
    folder: TempDir,
    server: Running,
}

impl Served {
    fn start() -> Self {
        Self::start_in(folder(), None)
    }

    fn start_in(folder: TempDir, hold: Option<&Hold>) -> Self {
        std::fs::write(folder.path().join("disk.raw"), vec![b'd'; LENGTH]).unwrap();
        let [disk, socket, writers] = ["disk.raw", "socket", "writers"].map(|name| folder.path().join(name));
        let mut serve = command(&["serve", "--device", text(&disk), "--format", "raw", "--vhost-user", text(&socket)]);
        let said = File::create(folder.path().join("said")).unwrap();
        if let Some(hold) = hold {
            serve.env("DRIVE_BACKUP_HOLD", hold.variable());
        }
        let server = Running::start(serve.args(["--writer-dir", text(&writers)]).stderr(said));
        let served = Self { folder, server };
        served.says("ready: ");
        served
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// With so many queues.
    fn connect(&self, queues: usize) -> Frontend {
        let mut frontend = Frontend::connect(&self.path("socket")).unwrap();
        (0..queues).for_each(|_| frontend.start_queue().unwrap());
        frontend
    }

    /// Waits until it tells people of that.
    fn says(&self, what: &str) {
        wait_for(what, || std::fs::read_to_string(self.path("said")).unwrap().contains(what).then_some(()));
    }

    /// A new frontend is served.
    #[track_caller]
    fn serves(&self) {
        let mut frontend = self.connect(1);
        assert_eq!(frontend.ask(0, IN, 8, 4096), 0);
    }

    /// A backup that has taken its instant, and stands still: whoever writes what it has not copied waits.
    fn stopped_backup(&self) -> Running {
        let [disk, copy, writers] = ["disk.raw", "copy.raw", "writers"].map(|name| self.path(name));
        let backup = Running::drive_backup(&[
            "--device",
            text(&disk),
            "--target",
            text(&copy),
            "--writer-dir",
            text(&writers),
            "--speed",
            "64k",
            "--cbw-timeout",
            "60",
        ]);
        let partial = self.path(".copy.raw.drive-backup-partial");
        wait_for("the first bytes", || partial.metadata().is_ok_and(|found| found.blocks() > 0).then_some(()));
        backup.signal(Signal::SIGSTOP);
        backup
    }

    fn byte_at(&self, name: &str, sector: u64) -> u8 {
        let mut byte = [0];
        File::open(self.path(name)).unwrap().read_exact_at(&mut byte, sector * 512).unwrap();
        byte[0]
    }

    fn count(&self, what: &str) -> usize {
        std::fs::read_dir(format!("/proc/{}/{what}", self.server.id())).unwrap().count()
    }
}

/// Ends a backup that was stopped; its speed takes a minute.
fn go_on(backup: &Running) {
    backup.signal(Signal::SIGCONT);
    backup.signal(Signal::SIGUSR2);
}

#[test]
fn the_disk_is_described_read_and_written() {
    let served = Served::start();
    let mut frontend = served.connect(2);
    let config = frontend.config(0, 60).unwrap();
    assert_eq!(u64::from_le_bytes(config[..8].try_into().unwrap()), LENGTH as u64 / 512);
    assert_eq!(
        (config[20..24].to_vec(), config[34..36].to_vec()),
        (512_u32.to_le_bytes().into(), 16_u16.to_le_bytes().into())
    );
    let data = Frontend::data(1, 0);
    vm_memory::Bytes::write_slice(&frontend.memory, &[b'w'; 4096], vm_memory::GuestAddress(data)).unwrap();
    assert_eq!((frontend.ask(1, OUT, LAST, 4096), frontend.ask(0, FLUSH, 0, 0)), (0, 0));
    assert_eq!(frontend.ask(0, OUT, LAST + 1, 4096), 1);
    assert_eq!((served.byte_at("disk.raw", LAST), served.byte_at("disk.raw", LAST - 1)), (b'w', b'd'));
}

#[test]
fn a_write_that_waits_for_a_backup_keeps_nobody_waiting() {
    let served = Served::start();
    let mut frontend = served.connect(1);
    let backup = served.stopped_backup();
    // No more than the pool has threads.
    for slot in 0..7 {
        frontend.submit(0, slot, OUT, LAST - 8 * u64::from(slot), 4096, true);
    }
    // Of its ranges the first has been copied.
    let ranges = [0, LAST - 8 * 7].map(|sector| [sector.to_le_bytes(), 8_u64.to_le_bytes()].concat()).concat();
    let data = vm_memory::GuestAddress(Frontend::data(0, 7));
    vm_memory::Bytes::write_slice(&frontend.memory, &ranges, data).unwrap();
    frontend.submit(0, 7, WRITE_ZEROES, 0, ranges.len() as u32, true);
    for _ in 0..100 {
        frontend.submit(0, 8, IN, LAST, 4096, false);
        assert_eq!(frontend.wait(0), [8]);
        assert_eq!(frontend.status(0, 8), 0);
    }
    assert_eq!(served.byte_at("disk.raw", LAST), b'd');
    go_on(&backup);
    let mut done = Vec::new();
    while done.len() < 8 {
        done.extend(frontend.wait(0));
    }
    assert!((0..8).all(|slot| frontend.status(0, slot) == 0));
    assert_eq!(backup.ended().code, 0);
    assert_eq!((served.byte_at("disk.raw", LAST), served.byte_at("copy.raw", LAST)), (0, b'd'));
}

#[test]
fn memory_that_is_added_while_a_queue_is_busy_is_known_to_the_next_request() {
    let folder = folder();
    let hold = Hold::at("Writing", folder.path());
    let mut served = Served::start_in(folder, Some(&hold));
    let mut frontend = served.connect(1);
    frontend.submit(0, 0, OUT, LAST, 4096, true);
    let held = hold.reached(&mut served.server);
    let added = frontend.add_memory(1 << 20).unwrap();
    added.write_all_at(&[b'n'; 4096], 8192).unwrap();
    frontend.submit_at(0, 1, IN, 8, (MEMORY, 4096), false);
    frontend.submit_at(0, 2, OUT, 16, (MEMORY + 8192, 4096), true);
    drop(held);
    let mut done = Vec::new();
    while done.len() < 3 {
        done.extend(frontend.wait(0));
    }
    assert_eq!([0, 1, 2].map(|slot| frontend.status(0, slot)), [0; 3]);
    let mut read = [0; 4096];
    added.read_exact_at(&mut read, 0).unwrap();
    assert_eq!((read, served.byte_at("disk.raw", 16)), ([b'd'; 4096], b'n'));
}

#[test]
fn what_is_in_flight_ends_before_the_next_frontend_is_served_and_before_the_server_ends() {
    let served = Served::start();
    let mut frontend = served.connect(1);
    let backup = served.stopped_backup();
    frontend.submit(0, 0, OUT, LAST, 4096, true);
    frontend.submit(0, 1, IN, 0, 4096, false);
    // The write was taken before it.
    assert_eq!(frontend.wait(0), [1]);
    drop(frontend);
    let early = UnixStream::connect(served.path("socket")).unwrap();
    served.says("socket': another waits until its requests in flight have ended");
    drop(early);
    go_on(&backup);
    let mut next = served.connect(1);
    assert_eq!(served.byte_at("disk.raw", LAST), 0);
    assert_eq!(backup.ended().code, 0);
    // A frontend that stops a queue hears of its end when nothing of it is in flight.
    let backup = served.stopped_backup();
    next.submit(0, 0, OUT, LAST - 8, 4096, true);
    next.submit(0, 1, IN, 0, 4096, false);
    assert_eq!(next.wait(0), [1]);
    next.send_pair(GET_VRING_BASE, 0, 0).unwrap();
    assert!(!next.is_answered_within(Duration::from_millis(200)));
    go_on(&backup);
    let base = next.receive().unwrap();
    assert_eq!((next.used(0), base[4]), (vec![0], 2));
    assert_eq!(backup.ended().code, 0);
    drop(next);
    // So does one that resets the device: its memory may be used otherwise from then on.
    let mut third = served.connect(1);
    let backup = served.stopped_backup();
    third.submit(0, 0, OUT, LAST - 16, 4096, true);
    third.submit(0, 1, IN, 0, 4096, false);
    assert_eq!(third.wait(0), [1]);
    third.reset().unwrap();
    assert!(!third.is_answered_within(Duration::from_millis(200)));
    go_on(&backup);
    assert_eq!((third.receive().unwrap(), third.used(0)), (vec![0; 8], vec![0]));
    assert_eq!(backup.ended().code, 0);
    served.server.signal(Signal::SIGTERM);
    assert_eq!(served.server.ended().code, 0);
}

#[test]
fn a_second_frontend_is_refused_and_told_of_and_the_first_goes_on() {
    let served = Served::start();
    let mut first = served.connect(1);
    // It does not want to be served.
    drop(UnixStream::connect(served.path("socket")).unwrap());
    let mut second = UnixStream::connect(served.path("socket")).unwrap();
    second.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    assert_eq!(second.read(&mut [0; 12]).unwrap(), 0);
    let what = format!("process {} was refused: another is served, and there is one at a time", std::process::id());
    served.says(&format!("frontend at '{}': {what}", served.path("socket").display()));
    assert_eq!(first.ask(0, IN, 8, 4096), 0);
    drop(first);
    served.serves();
    let said = std::fs::read_to_string(served.path("said")).unwrap();
    assert_eq!(said.matches("refused").count(), 1, "{said}");
}

#[test]
fn a_guest_that_starts_again_is_served_though_we_have_not_heard_of_its_end() {
    let served = Served::start();
    let before = served.connect(1);
    served.server.signal(Signal::SIGSTOP);
    let mut again = UnixStream::connect(served.path("socket")).unwrap();
    again.set_read_timeout(Some(Duration::from_secs(30))).unwrap();
    again.write_all(&[GET_FEATURES, 1, 0].map(u32::to_le_bytes).concat()).unwrap();
    drop(before);
    served.server.signal(Signal::SIGCONT);
    let mut answer = [0; 20];
    again.read_exact(&mut answer).unwrap();
    assert_eq!(answer[..4], GET_FEATURES.to_le_bytes());
}

/// Does something to a frontend's queue 0, or says something.
type Send = fn(&mut Frontend) -> std::io::Result<()>;

/// What a frontend may send that makes no sense; the server may hang up at any time.
fn nonsense() -> Vec<(&'static str, Send)> {
    vec![
        ("an unknown request", |f| f.send(999, &[0; 8], None)),
        ("half a message", |f| f.send(SET_VRING_NUM, &[0; 4], None)),
        ("a queue that is not there", |f| f.send_pair(SET_VRING_NUM, 99, 128)),
        ("a queue of no entries", |f| f.send_pair(SET_VRING_NUM, 0, 0)),
        ("a queue of too many entries", |f| f.send_pair(SET_VRING_NUM, 0, 0xFFFF)),
        ("a queue whose size is no power of two", |f| f.send_pair(SET_VRING_NUM, 0, 100)),
        ("rings outside of memory", |f| f.send(SET_VRING_ADDR, &[0xFF; 40], None)),
        ("memory without a file", |f| f.send(SET_MEM_TABLE, &[1; 40], None)),
        ("features that were not offered", |f| f.send_u64(SET_FEATURES, u64::MAX)),
        ("a kick that is always ready", |f| {
            let zero = File::open("/dev/zero")?;
            f.send(SET_VRING_KICK, &0_u64.to_le_bytes(), Some(zero.as_fd()))
        }),
        ("a kick that can't be waited for", |f| {
            let file = File::open("Cargo.toml")?;
            f.send(SET_VRING_KICK, &0_u64.to_le_bytes(), Some(file.as_fd()))
        }),
        ("an index far ahead", |f| {
            f.set_available(0, 0x8000);
            f.ring(0);
            Ok(())
        }),
        ("a head outside of the table", |f| {
            f.offer(0, SIZE);
            f.offer(0, 0xFFFF);
            Ok(())
        }),
        ("a chain that loops", |f| {
            f.describe(0, 0, (0x10_0000, 16, 1, 0));
            f.offer(0, 0);
            assert_eq!(f.wait(0), [0]);
            Ok(())
        }),
        ("data outside of memory", |f| {
            f.submit(0, 0, OUT, 0, 4096, true);
            f.describe(0, 1, (MEMORY - 16, 4096, 1, 2));
            assert_eq!(f.wait(0), [0]);
            Ok(())
        }),
    ]
}

#[test]
fn nonsense_costs_its_own_connection_and_leaves_nothing_behind() {
    let served = Served::start();
    served.serves();
    let (files, threads) = (served.count("fd"), served.count("task"));
    for (what, send) in nonsense() {
        let mut frontend = served.connect(1);
        // It may hang up before all is said.
        let _ = send(&mut frontend);
        drop(frontend);
        eprintln!("after {what}");
        served.serves();
    }
    for bytes in [&[0xFF; 4096][..], b"GET / HTTP/1.0\r\n\r\n", &[1, 0, 0, 0], &[]] {
        let mut socket = UnixStream::connect(served.path("socket")).unwrap();
        let _ = socket.write_all(bytes);
        socket.shutdown(std::net::Shutdown::Write).unwrap();
        let _ = socket.read_to_end(&mut Vec::new());
        drop(socket);
        served.serves();
    }
    wait_for("files and threads to be gone", || {
        (served.count("fd") <= files && served.count("task") <= threads).then_some(())
    });
    let disk = std::fs::read(served.path("disk.raw")).unwrap();
    assert!(disk.len() == LENGTH && disk.iter().all(|byte| *byte == b'd'));
}

/// Before a queue runs: whoever touches such memory dies, and a queue's thread may be quicker than the look at it.
#[test]
fn memory_past_the_end_of_its_file_is_refused() {
    let served = Served::start();
    let mut frontend = served.connect(0);
    let file = tempfile::tempfile().unwrap();
    file.set_len(4096).unwrap();
    let table = [1, 0, MEMORY, OURS, 0].map(u64::to_le_bytes).concat();
    frontend.send(SET_MEM_TABLE, &table, Some(file.as_fd())).unwrap();
    assert!(frontend.get(GET_FEATURES).is_err(), "it goes on");
    served.says("memory past the end of its file");
    served.serves();
}

#[test]
fn random_chains_neither_end_the_server_nor_leave_the_disk() {
    let served = Served::start();
    let mut frontend = served.connect(1);
    let mut seed = 7_u64;
    let mut next = |end: u64| {
        seed = seed.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(0x1405_7B7E_F767_814F);
        (seed >> 33) % end
    };
    for _ in 0..2000 {
        for number in 0..SIZE {
            if next(4) == 0 {
                let address = [next(MEMORY), 0x10_0000, 0, u64::MAX - next(64), MEMORY - next(64)][next(5) as usize];
                let length = [next(64), 16, next(1 << 32), 512 * next(9)][next(4) as usize] as u32;
                frontend.describe(0, number, (address, length, next(8) as u16, next(130) as u16));
            }
        }
        let header = vm_memory::GuestAddress(0x10_0000);
        vm_memory::Bytes::write_obj(&frontend.memory, [next(15), next(1 << 14)], header).unwrap();
        frontend.offer(0, next(u64::from(SIZE)) as u16);
        frontend.wait(0);
    }
    drop(frontend);
    served.serves();
    assert_eq!(served.path("disk.raw").metadata().unwrap().len(), LENGTH as u64);
}
