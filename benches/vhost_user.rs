//! A guest's disk without a backup: ours beside qemu-storage-daemon's vhost-user-blk, whole processes, by turns.
//!
//! ```text
//! cargo bench --bench vhost_user -- [--mib N] [--ms N] [--rounds N] [--folder DIR] [--only WORD]
//! ```
//!
//! The driver is a virtqueue in this process, with event indices as Linux has them, asleep until it is told; the page cache is
//! warm. Each row is the median of the rounds, in requests a second; the peer is the better one of its aio=threads and
//! aio=io_uring.

#[path = "../tests/support/frontend.rs"]
mod frontend;

use frontend::{Frontend, SLOTS};
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const OURS: &str = env!("CARGO_BIN_EXE_drive-backup");
const PEERS: [&str; 3] = ["ours", "threads", "io_uring"];
const BOUND: Duration = Duration::from_secs(20);

/// A server; ended by its own id.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

struct Pattern {
    name: &'static str,
    random: bool,
    length: u32,
    depth: u16,
    writes: bool,
}

struct Settings {
    mib: u64,
    time: Duration,
    rounds: usize,
    folder: PathBuf,
    only: String,
}

fn settings() -> Settings {
    let mut settings = Settings {
        mib: 256,
        time: Duration::from_millis(500),
        rounds: 5,
        folder: std::env::temp_dir(),
        only: String::new(),
    };
    let mut arguments = std::env::args().skip(1);
    while let Some(flag) = arguments.next() {
        let mut value = || arguments.next().unwrap_or_else(|| panic!("{flag} wants a value"));
        match flag.as_str() {
            "--mib" => settings.mib = value().parse().unwrap(),
            "--ms" => settings.time = Duration::from_millis(value().parse().unwrap()),
            "--rounds" => settings.rounds = value().parse().unwrap(),
            "--folder" => settings.folder = value().into(),
            "--only" => settings.only = value(),
            "--bench" => {}
            other => panic!("{other}?"),
        }
    }
    settings
}

/// Serves `disk` at `socket`.
fn start(which: &str, disk: &Path, socket: &Path) -> Server {
    let (disk, path) = (disk.to_str().unwrap(), socket.to_str().unwrap());
    let mut command;
    if which == "ours" {
        command = Command::new(OURS);
        command.args(["serve", "--quiet", "--device", disk, "--format", "raw", "--vhost-user", path]);
    } else {
        command = Command::new("qemu-storage-daemon");
        command
            .arg("--blockdev")
            .arg(format!("driver=file,node-name=disk,filename={disk},discard=unmap,locking=off,aio={which}"));
        let export = format!("type=vhost-user-blk,id=e,node-name=disk,addr.type=unix,addr.path={path},writable=on");
        command.args(["--export", &export]);
    }
    let server = Server(command.stdin(Stdio::null()).spawn().unwrap());
    let since = Instant::now();
    while !socket.exists() {
        assert!(since.elapsed() < BOUND, "{which} does not start");
        std::thread::sleep(Duration::from_millis(5));
    }
    server
}

/// Requests a second.
fn rate(socket: &Path, pattern: &Pattern, settings: &Settings) -> f64 {
    let since = Instant::now();
    let mut frontend = loop {
        match Frontend::connect(socket) {
            // It has the name, and does not listen yet.
            Err(e) if e.kind() == ErrorKind::ConnectionRefused && since.elapsed() < BOUND => std::thread::yield_now(),
            connected => break connected.unwrap(),
        }
    };
    frontend.start_queue().unwrap();
    let places = (settings.mib << 20) / u64::from(pattern.length);
    let mut seed = 1_u64;
    let mut next = 0;
    let mut sector = || {
        seed = seed.wrapping_mul(0x5851_F42D_4C95_7F2D).wrapping_add(0x1405_7B7E_F767_814F);
        next += 1;
        let place = if pattern.random { (seed >> 33) % places } else { next % places };
        place * u64::from(pattern.length) / 512
    };
    let mut submit = |frontend: &mut Frontend, slot| {
        frontend.submit(0, slot, u32::from(pattern.writes), sector(), pattern.length, pattern.writes)
    };
    (0..pattern.depth).for_each(|slot| submit(&mut frontend, slot));
    let (since, mut done) = (Instant::now(), 0_u64);
    while since.elapsed() < settings.time {
        for slot in frontend.wait(0) {
            assert_eq!(frontend.status(0, slot), 0);
            done += 1;
            submit(&mut frontend, slot);
        }
    }
    done as f64 / since.elapsed().as_secs_f64()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    let settings = settings();
    let folder = tempfile::tempdir_in(&settings.folder).unwrap();
    let mib: Vec<u8> = (0..1 << 20).map(|byte: u32| byte as u8).collect();
    // One for each: io_uring gives a file back some time after its process has ended.
    for which in PEERS {
        std::fs::write(folder.path().join(format!("{which}.raw")), mib.repeat(settings.mib as usize)).unwrap();
    }
    let mut patterns = Vec::new();
    for (name, random, length) in [("random 4 KiB", true, 4096), ("sequential 1 MiB", false, 1 << 20)] {
        for depth in [1, SLOTS] {
            patterns.extend([false, true].map(|writes| Pattern { name, random, length, depth, writes }));
        }
    }
    patterns.retain(|pattern| pattern.name.contains(&settings.only));
    println!("| requests | depth | ours a second | qemu-storage-daemon a second | ratio |\n|---|---|---|---|---|");
    for pattern in &patterns {
        let mut rates = [Vec::new(), Vec::new(), Vec::new()];
        for _ in 0..settings.rounds {
            for (which, rates) in PEERS.iter().zip(&mut rates) {
                let (socket, disk) = (folder.path().join(which), folder.path().join(format!("{which}.raw")));
                let server = start(which, &disk, &socket);
                rates.push(rate(&socket, pattern, &settings));
                drop(server);
                let _ = std::fs::remove_file(&socket);
            }
        }
        let [ours, threads, uring] = rates.map(median);
        let peer = threads.max(uring);
        let what = if pattern.writes { "writes" } else { "reads" };
        println!("| {} {what} | {} | {ours:.0} | {peer:.0} | {:.2} |", pattern.name, pattern.depth, ours / peer);
    }
}
