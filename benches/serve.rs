//! The NBD server beside qemu-nbd and qemu-storage-daemon on the same raw image, page cache warm.
//!
//! ```text
//! cargo bench --bench serve -- [--mib N] [--rounds N] [--seconds N] [--folder DIR]
//! ```
//!
//! fio's nbd engine over a Unix socket; the servers alternate, each run has a fresh one, and a row shows medians. Then what
//! one client feels that writes 4 KiB at random, one write at a time, without a backup and during one at 20 MiB/s.

use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const OURS: &str = env!("CARGO_BIN_EXE_drive-backup");
const BOUND: Duration = Duration::from_secs(30);
const SERVERS: [&str; 3] = ["drive-backup", "qemu-nbd", "qemu-storage-daemon"];
const BLOCK: u64 = 4096;

struct Options {
    mib: u64,
    rounds: usize,
    seconds: u64,
    folder: PathBuf,
}

impl Options {
    fn of_command_line() -> Self {
        let mut options = Self { mib: 512, rounds: 5, seconds: 2, folder: std::env::temp_dir() };
        let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
        while let Some(flag) = arguments.next() {
            let value = arguments.next().unwrap_or_else(|| panic!("{flag} wants a value"));
            match flag.as_str() {
                "--mib" => options.mib = value.parse().unwrap(),
                "--rounds" => options.rounds = value.parse().unwrap(),
                "--seconds" => options.seconds = value.parse().unwrap(),
                "--folder" => options.folder = value.into(),
                _ => panic!("unknown: {flag}"),
            }
        }
        options
    }
}

/// A server that ends with its owner.
struct Server(Child);

impl Server {
    fn start(name: &str, image: &Path, socket: &Path) -> Self {
        let _ = fs::remove_file(socket);
        let (image, socket_name) = (image.display(), socket.display());
        let line = match name {
            "drive-backup" => format!("{OURS} serve -q --device {image} --format raw --nbd unix:{socket_name}"),
            "qemu-nbd" => format!("qemu-nbd -f raw -t -e 16 --cache=writeback -k {socket_name} {image}"),
            _ => format!(
                "{name} --blockdev driver=file,node-name=f,filename={image} --blockdev driver=raw,node-name=d,file=f \
                 --nbd-server addr.type=unix,addr.path={socket_name},max-connections=16 \
                 --export type=nbd,id=e,node-name=d,name=,writable=on"
            ),
        };
        let words: Vec<&str> = line.split_whitespace().collect();
        let child = Command::new(words[0]).args(&words[1..]).stdout(Stdio::null()).spawn();
        let server = Self(child.unwrap_or_else(|e| panic!("{name}: {e}")));
        let begin = Instant::now();
        while UnixStream::connect(socket).is_err() {
            assert!(begin.elapsed() < BOUND, "{name} does not listen");
            std::thread::sleep(Duration::from_millis(10));
        }
        server
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let pid = nix::unistd::Pid::from_raw(self.0.id() as i32);
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let _ = self.0.wait();
    }
}

/// Operations in a second.
fn fio(options: &Options, socket: &Path, pattern: &str, block: &str, depth: u32) -> f64 {
    let output = Command::new("fio")
        .args(["--name=x", "--ioengine=nbd", "--time_based", "--norandommap", "--output-format=json"])
        .arg(format!("--uri=nbd+unix:///?socket={}", socket.display()))
        .args([format!("--rw={pattern}"), format!("--bs={block}"), format!("--iodepth={depth}")])
        .args([format!("--size={}M", options.mib), format!("--runtime={}", options.seconds)])
        .output()
        .expect("fio");
    let text = String::from_utf8(output.stdout).unwrap();
    let report: serde_json::Value =
        serde_json::from_str(&text[text.find('{').unwrap_or_else(|| panic!("fio: {text}"))..]).unwrap();
    let direction = if pattern.contains("read") { "read" } else { "write" };
    report["jobs"][0][direction]["iops"].as_f64().unwrap()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn throughput(options: &Options, image: &Path) {
    println!("| operations a second | {} | {} | {} | ours : best |", SERVERS[0], SERVERS[1], SERVERS[2]);
    println!("|---|---|---|---|---|");
    let socket = options.folder.join("bench.sock");
    for (pattern, block) in [("randread", "4k"), ("randwrite", "4k"), ("read", "1M"), ("write", "1M")] {
        for depth in [1, 16] {
            let mut found = [const { Vec::new() }; 3];
            for _ in 0..options.rounds {
                for (name, found) in SERVERS.iter().zip(&mut found) {
                    let _server = Server::start(name, image, &socket);
                    found.push(fio(options, &socket, pattern, block, depth));
                }
            }
            let [ours, nbd, daemon] = found.map(median);
            let ratio = ours / nbd.max(daemon);
            println!("| {pattern} {block}, {depth} at once | {ours:.0} | {nbd:.0} | {daemon:.0} | {ratio:.2} |");
        }
    }
}

/// The smallest NBD client that can write.
fn connect(socket: &Path) -> UnixStream {
    let mut stream = UnixStream::connect(socket).unwrap();
    stream.write_all(&[&3_u32.to_be_bytes()[..], b"IHAVEOPT\0\0\0\x01\0\0\0\0"].concat()).unwrap();
    stream.read_exact(&mut [0; 28]).unwrap();
    stream
}

fn write(stream: &mut UnixStream, offset: u64) -> Duration {
    let begin = Instant::now();
    let mut request = vec![0x25, 0x60, 0x95, 0x13, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0];
    request.extend(offset.to_be_bytes());
    request.extend((BLOCK as u32).to_be_bytes());
    request.extend([7; BLOCK as usize]);
    stream.write_all(&request).unwrap();
    let mut reply = [0; 16];
    stream.read_exact(&mut reply).unwrap();
    assert_eq!(reply[4..8], [0; 4], "the server reports an error");
    begin.elapsed()
}

/// Random writes while `goes_on`; a row of the table.
fn latencies(what: &str, socket: &Path, blocks: u64, mut goes_on: impl FnMut(usize) -> bool) {
    let mut stream = connect(socket);
    let (mut times, mut random) = (Vec::new(), 1_u64);
    while goes_on(times.len()) {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        times.push(write(&mut stream, (random >> 33) % blocks * BLOCK));
    }
    times.sort();
    let at = |part: f64| times[((times.len() - 1) as f64 * part) as usize].as_secs_f64() * 1e3;
    println!("| {what} | {} | {:.3} | {:.3} | {:.3} |", times.len(), at(0.5), at(0.99), at(1.0));
}

fn backup(options: &Options, image: &Path) {
    println!("\n| 4 KiB writes | count | p50 ms | p99 ms | most ms |\n|---|---|---|---|---|");
    let socket = options.folder.join("bench.sock");
    let blocks = options.mib * 256;
    let _server = Server::start("drive-backup", image, &socket);
    latencies("without a backup", &socket, blocks, |count| count < 20_000);
    let target = options.folder.join("bench.copy");
    let mut backup = Command::new(OURS);
    backup.args(["-q", "--speed", "20M", "--device"]).arg(image).arg("--target").arg(&target);
    let mut backup = Server(backup.spawn().unwrap());
    let partial = options.folder.join(".bench.copy.drive-backup-partial");
    while !partial.exists() {
        assert!(backup.0.try_wait().unwrap().is_none(), "the backup ended");
    }
    let end = Instant::now() + Duration::from_secs(5 * options.seconds);
    latencies("during a backup at 20 MiB/s", &socket, blocks, |_| Instant::now() < end);
    assert!(backup.0.try_wait().unwrap().is_none(), "the backup ended before the writes did: choose a larger --mib");
    drop(backup);
    let _ = fs::remove_file(target);
}

fn main() {
    let options = Options::of_command_line();
    let image = options.folder.join("bench.raw");
    let mut file = File::create(&image).unwrap();
    (0..options.mib).for_each(|number| file.write_all(&vec![number as u8 | 1; 1 << 20]).unwrap());
    file.sync_all().unwrap();
    drop(file);
    throughput(&options, &image);
    backup(&options, &image);
    fs::remove_file(image).unwrap();
}
