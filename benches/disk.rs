//! What a served disk can do without any front-end, beside `qemu-img bench` on the same image: requests a second.
//!
//! ```text
//! cargo bench --bench disk -- [--mib N] [--requests N] [--folder DIR]
//! ```
//!
//! Requests of 4 KiB in the page cache, their places scattered by a constant stride as `qemu-img bench -S` does it; four
//! threads beside a queue depth of four.

use drive_backup::serve::disk::{Disk, DiskOptions};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

const KIB4: u64 = 4096;
/// Odd, so that all places of a disk of a power of two are visited.
const STRIDE: u64 = 4099 * KIB4;
const THREADS: u64 = 4;

struct Settings {
    mib: u64,
    requests: u64,
    folder: PathBuf,
}

impl Settings {
    fn read() -> Self {
        let mut settings = Self { mib: 1024, requests: 200_000, folder: std::env::temp_dir() };
        let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
        while let Some(flag) = arguments.next() {
            let value = arguments.next().unwrap_or_else(|| panic!("{flag} needs a value"));
            match &*flag {
                "--mib" => settings.mib = value.parse().expect("a number"),
                "--requests" => settings.requests = value.parse().expect("a number"),
                "--folder" => settings.folder = value.into(),
                _ => panic!("unknown flag {flag}"),
            }
        }
        settings
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Work {
    Read,
    Write,
    /// With a flush after each 1024 requests.
    WriteAndFlush,
}

const FLUSH_INTERVAL: u64 = 1024;

fn main() {
    let settings = Settings::read();
    let folder = tempfile::tempdir_in(&settings.folder).expect("a folder");
    println!("| image | 4 KiB | ours, requests/s | qemu-img bench | ratio |\n|---|---|---|---|---|");
    for format in ["raw", "qcow2"] {
        for (what, is_full, work) in [
            ("reads", true, Work::Read),
            ("overwrites", true, Work::Write),
            ("overwrites, flushes", true, Work::WriteAndFlush),
            ("allocating writes", false, Work::Write),
            ("allocating writes, flushes", false, Work::WriteAndFlush),
        ] {
            let path = folder.path().join("disk");
            make(&path, format, settings.mib, is_full);
            let peer = qemu(&path, format, work, &settings);
            make(&path, format, settings.mib, is_full);
            let ours = ours(&path, folder.path(), work, &settings);
            println!("| {format} | {what} | {ours:.0} | {peer:.0} | {:.2} |", ours / peer);
        }
    }
}

fn make(path: &Path, format: &str, mib: u64, is_full: bool) {
    let _ = std::fs::remove_file(path);
    run(Command::new("qemu-img").args(["create", "-q", "-f", format]).arg(path).arg(format!("{mib}M")));
    if is_full {
        let write = format!("write -q -P 7 0 {mib}M");
        run(Command::new("qemu-io").args(["-f", format, "-c", &write]).arg(path));
    }
    run(&mut Command::new("sync"));
}

fn run(command: &mut Command) {
    let output = command.output().expect("it runs");
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn qemu(path: &Path, format: &str, work: Work, settings: &Settings) -> f64 {
    let mut command = Command::new("qemu-img");
    command.args(["bench", "-t", "writeback", "-f", format, "-s", "4096", "-d", &THREADS.to_string()]);
    command.args(["-c", &settings.requests.to_string(), "-S", &STRIDE.to_string()]);
    match work {
        Work::Read => {}
        Work::Write => drop(command.arg("-w")),
        Work::WriteAndFlush => drop(command.args(["-w", "--flush-interval", &FLUSH_INTERVAL.to_string()])),
    }
    let started = Instant::now();
    run(command.arg(path));
    settings.requests as f64 / started.elapsed().as_secs_f64()
}

fn ours(path: &Path, folder: &Path, work: Work, settings: &Settings) -> f64 {
    let options = DiskOptions {
        name: String::new(),
        path: path.to_owned(),
        format: None,
        read_only: false,
        secret: None,
        writer_dir: Some(folder.join("writers")),
    };
    let disk = Disk::open(&options).expect("it opens");
    let length = disk.length();
    let started = Instant::now();
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let disk = &disk;
            scope.spawn(move || {
                let mut buffer = [9; KIB4 as usize];
                for number in (thread..settings.requests).step_by(THREADS as usize) {
                    let offset = number * STRIDE % length;
                    match work {
                        Work::Read => disk.read(&mut buffer, offset).expect("read"),
                        _ => disk.write(&buffer, offset).expect("written"),
                    }
                    if work == Work::WriteAndFlush && number % FLUSH_INTERVAL == 0 {
                        disk.flush().expect("flushed");
                    }
                }
            });
        }
    });
    settings.requests as f64 / started.elapsed().as_secs_f64()
}
