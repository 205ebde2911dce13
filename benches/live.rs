//! What a writer feels while its disk is backed up: ours beside QEMU's drive-backup and its fleecing graph.
//!
//! ```text
//! cargo bench --bench live -- [--mib N] [--folder DIR]
//! ```
//!
//! The writer writes 4 KiB at queue depth 1, through the library here and over NBD to qemu-storage-daemon there: first
//! each write to a new 64 KiB cluster beside a target that takes 20 MiB/s (a throttled FUSE export), then at random
//! beside a fast one. Each row has its own "without a backup" before it, in the same process, page cache warm. Last,
//! whole copies beside a writer that is attached and idle, and without one.

use drive_backup::writer::Writer;
use std::fs::{self, File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

const OURS: &str = env!("CARGO_BIN_EXE_drive-backup");
const MIB: u64 = 1 << 20;
const BLOCK: usize = 4096;
/// Each write to a new one.
const STRIDE: u64 = 64 << 10;
const BOUND: Duration = Duration::from_secs(60);
/// Of one row of QEMU's.
const QEMU_BOUND: Duration = Duration::from_secs(8);
/// Copies of each kind where whole copies are compared.
const ROUNDS: usize = 9;

/// What writes 4 KiB, and waits until it is written.
trait Disk {
    fn write(&mut self, offset: u64);
}

struct Bracketed {
    writer: Writer,
    file: File,
}

impl Disk for Bracketed {
    fn write(&mut self, offset: u64) {
        let _write = self.writer.begin(offset, BLOCK as u64).unwrap();
        self.file.write_all_at(&[7; BLOCK], offset).unwrap();
    }
}

/// Works for 60 microseconds before each write.
struct Paced(Bracketed);

impl Disk for Paced {
    fn write(&mut self, offset: u64) {
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_micros(60) {
            std::hint::spin_loop();
        }
        self.0.write(offset);
    }
}

/// The smallest NBD client that can write.
struct Nbd(UnixStream);

impl Nbd {
    fn connect(socket: &Path, export: &str) -> Self {
        let mut stream = connect(socket);
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting).unwrap();
        let mut ask = 3u32.to_be_bytes().to_vec();
        ask.extend(b"IHAVEOPT");
        ask.extend(1u32.to_be_bytes());
        ask.extend((export.len() as u32).to_be_bytes());
        ask.extend(export.as_bytes());
        stream.write_all(&ask).unwrap();
        stream.read_exact(&mut [0; 10]).unwrap();
        Self(stream)
    }
}

impl Disk for Nbd {
    fn write(&mut self, offset: u64) {
        let mut request = vec![0x25, 0x60, 0x95, 0x13, 0, 0, 0, 1];
        request.extend(offset.to_be_bytes());
        request.extend(offset.to_be_bytes());
        request.extend((BLOCK as u32).to_be_bytes());
        request.extend([7; BLOCK]);
        self.0.write_all(&request).unwrap();
        let mut reply = [0; 16];
        self.0.read_exact(&mut reply).unwrap();
        assert_eq!(reply[4..8], [0; 4], "the server reports an error");
    }
}

fn connect(socket: &Path) -> UnixStream {
    let begin = Instant::now();
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return stream,
            Err(error) => assert!(begin.elapsed() < BOUND, "{}: {error}", socket.display()),
        }
    }
}

/// A child that ends with its owner.
struct Owned(Child);

impl Drop for Owned {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// qemu-storage-daemon with a QMP socket.
struct Daemon {
    stream: UnixStream,
    lines: BufReader<UnixStream>,
    process: Owned,
}

impl Drop for Daemon {
    /// In order, so that its FUSE mounts are gone afterwards.
    fn drop(&mut self) {
        let _ = writeln!(self.stream, r#"{{"execute":"quit"}}"#);
        let _ = self.process.0.wait();
    }
}

impl Daemon {
    fn start(folder: &Path, name: &str) -> Self {
        let socket = folder.join(format!("{name}.qmp"));
        let chardev = format!("socket,id=c,path={},server=on,wait=off", socket.display());
        let process = Command::new("qemu-storage-daemon")
            .args(["--chardev", &chardev, "--monitor", "chardev=c"])
            .spawn()
            .unwrap();
        let process = Owned(process);
        let stream = connect(&socket);
        let lines = BufReader::new(stream.try_clone().unwrap());
        let mut daemon = Self { stream, lines, process };
        daemon.run(r#"{"execute":"qmp_capabilities"}"#);
        daemon
    }

    fn run(&mut self, command: &str) {
        let answer = self.ask(command);
        assert!(answer.contains("\"return\""), "{command}: {answer}");
    }

    fn ask(&mut self, command: &str) -> String {
        writeln!(self.stream, "{command}").unwrap();
        self.answer()
    }

    /// No job is left.
    fn has_ended(&mut self) -> bool {
        self.ask(r#"{"execute":"query-jobs"}"#).contains("[]")
    }

    /// The next line that answers a command.
    fn answer(&mut self) -> String {
        loop {
            let mut line = String::new();
            assert_ne!(self.lines.read_line(&mut line).unwrap(), 0, "qemu-storage-daemon has ended");
            if line.contains("\"return\"") || line.contains("\"error\"") {
                return line;
            }
        }
    }

    fn add_file(&mut self, node: &str, path: &Path) {
        self.run(&format!(
            r#"{{"execute":"blockdev-add","arguments":{{"driver":"raw","node-name":"{node}","file":{{"driver":"file","filename":"{}"}}}}}}"#,
            path.display()
        ));
    }

    /// Puts a limit of 20 MiB/s on `node`, as node `slow`.
    fn throttle(&mut self, node: &str) {
        self.run(r#"{"execute":"object-add","arguments":{"qom-type":"throttle-group","id":"g","limits":{"bps-write":20971520}}}"#);
        self.run(&format!(
            r#"{{"execute":"blockdev-add","arguments":{{"driver":"throttle","node-name":"slow","throttle-group":"g","file":"{node}"}}}}"#
        ));
    }

    fn serve(&mut self, socket: &Path) {
        self.run(&format!(
            r#"{{"execute":"nbd-server-start","arguments":{{"addr":{{"type":"unix","data":{{"path":"{}"}}}}}}}}"#,
            socket.display()
        ));
    }

    fn export(&mut self, node: &str, name: &str, writable: bool) {
        self.run(&format!(
            r#"{{"execute":"block-export-add","arguments":{{"type":"nbd","id":"{name}","node-name":"{node}","name":"{name}","writable":{writable}}}}}"#
        ));
    }
}

/// Microseconds of each write.
fn latencies(disk: &mut dyn Disk, offsets: impl Iterator<Item = u64>, bound: Duration) -> Vec<f64> {
    let begin = Instant::now();
    let mut times = Vec::new();
    for offset in offsets {
        if begin.elapsed() > bound {
            break;
        }
        let start = Instant::now();
        disk.write(offset);
        times.push(start.elapsed().as_secs_f64() * 1e6);
    }
    times
}

fn print(what: &str, mut times: Vec<f64>) {
    let rate = times.len() as f64 * 1e6 / times.iter().sum::<f64>();
    times.sort_by(f64::total_cmp);
    let at = |share: f64| times[((times.len() - 1) as f64 * share) as usize];
    println!("| {what} | {} | {rate:.0} | {:.1} | {:.1} | {:.1} |", times.len(), at(0.5), at(0.99), at(1.0));
}

/// Every 64 KiB once, from `first` on.
fn strides(bytes: u64, first: u64) -> impl Iterator<Item = u64> {
    (0..bytes / STRIDE).map(move |n| n * STRIDE + first)
}

fn random(bytes: u64) -> impl Iterator<Item = u64> {
    let mut state = 88172645463325252u64;
    std::iter::repeat_with(move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % (bytes / BLOCK as u64) * BLOCK as u64
    })
}

struct Bench {
    folder: PathBuf,
    bytes: u64,
}

impl Bench {
    fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// A disk full of data, in the page cache.
    fn disk(&self, name: &str) -> PathBuf {
        let path = self.path(name);
        let file = File::create(&path).unwrap();
        (0..self.bytes / MIB).for_each(|n| file.write_all_at(&vec![n as u8 | 1; MIB as usize], n * MIB).unwrap());
        path
    }

    fn ours(&self, source: &Path, target: &Path, more: &[&str]) -> Owned {
        let child = Command::new(OURS)
            .args(["--json", "--no-fsync", "--snapshot", "overlay", "--overlay", "memory"])
            .arg("--writer-dir")
            .arg(self.path("writers"))
            .arg("--device")
            .arg(source)
            .arg("--target")
            .arg(target)
            .args(more)
            .stdout(Stdio::piped())
            .spawn();
        let mut child = Owned(child.unwrap());
        // The first record says that the instant is taken.
        let mut line = String::new();
        BufReader::new(child.0.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        assert!(line.contains("\"start\""), "{line}");
        child
    }

    fn writer(&self, source: &Path) -> Bracketed {
        let writer = Writer::open_in(source, self.path("writers")).unwrap();
        Bracketed { writer, file: OpenOptions::new().write(true).open(source).unwrap() }
    }

    fn measure_ours(&self) {
        let source = self.disk("ours.raw");
        let mut disk = self.writer(&source);
        latencies(&mut disk, strides(self.bytes, 0), BOUND);
        print("writer's library, no backup", latencies(&mut disk, strides(self.bytes, 0), BOUND));

        let (daemon, slow) = self.slow_target();
        let backup = self.ours(&source, &slow, &["--mode", "existing", "--format", "raw"]);
        print("… backup to 20 MiB/s, new clusters", latencies(&mut disk, strides(self.bytes, 0), BOUND));
        print("… the same clusters again", latencies(&mut disk, strides(self.bytes, 0), BOUND));
        drop(backup);
        drop(daemon);

        let before = latencies(&mut disk, random(self.bytes), Duration::from_secs(2));
        print("writer's library, random, no backup", before);
        let backup = self.ours(&source, &self.path("fast.raw"), &[]);
        print("… backup to a fast target", self.until_done(backup, &mut disk));

        // A program that has something else to do between its writes, as often as one comes over NBD.
        let mut disk = Paced(disk);
        for _ in 0..3 {
            let before = latencies(&mut disk, random(self.bytes), Duration::from_secs(2));
            print("writer's library, random, paced, no backup", before);
            let backup = self.ours(&source, &self.path("fast.raw"), &[]);
            print("… backup to a fast target", self.until_done(backup, &mut disk));
        }
    }

    /// A target that takes 20 MiB/s, whoever writes it.
    fn slow_target(&self) -> (Daemon, PathBuf) {
        let (backing, slow) = (self.path("slow.raw"), self.path("slow.mount"));
        File::create(&backing).unwrap().set_len(self.bytes).unwrap();
        File::create(&slow).unwrap();
        let mut daemon = Daemon::start(&self.folder, "slow");
        daemon.add_file("plain", &backing);
        daemon.throttle("plain");
        daemon.run(&format!(
            r#"{{"execute":"block-export-add","arguments":{{"type":"fuse","id":"f","node-name":"slow","mountpoint":"{}","writable":true}}}}"#,
            slow.display()
        ));
        (daemon, slow)
    }

    /// A client that knows nothing of backups, of our own NBD server.
    fn measure_served(&self) {
        let (source, socket) = (self.disk("served.raw"), self.path("served.nbd"));
        let mut server = Command::new(OURS);
        server.args(["serve", "-q", "--format", "raw", "--device"]).arg(&source);
        server.arg("--writer-dir").arg(self.path("writers")).arg("--nbd").arg(format!("unix:{}", socket.display()));
        let _server = Owned(server.spawn().unwrap());
        let mut disk = Nbd::connect(&socket, "");
        latencies(&mut disk, strides(self.bytes, 0), BOUND);
        print("our server over NBD, no backup", latencies(&mut disk, strides(self.bytes, 0), BOUND));
        let (daemon, slow) = self.slow_target();
        let backup = self.ours(&source, &slow, &["--mode", "existing", "--format", "raw"]);
        print("… backup to 20 MiB/s, new clusters", latencies(&mut disk, strides(self.bytes, 0), BOUND));
        drop(backup);
        drop(daemon);
        let before = latencies(&mut disk, random(self.bytes), Duration::from_secs(2));
        print("our server over NBD, random, no backup", before);
        let backup = self.ours(&source, &self.path("fast.raw"), &[]);
        print("… backup to a fast target", self.until_done(backup, &mut disk));
    }

    fn until_done(&self, mut backup: Owned, disk: &mut dyn Disk) -> Vec<f64> {
        let mut offsets = random(self.bytes);
        let mut times = Vec::new();
        while backup.0.try_wait().unwrap().is_none() {
            times.extend(latencies(disk, offsets.by_ref().take(32), BOUND));
        }
        times
    }

    /// Whole copies beside a writer that is attached and writes nothing, and without one, in alternation.
    fn measure_idle(&self) {
        let source = self.disk("ours.raw");
        let mut seconds = [Vec::new(), Vec::new()];
        for round in 0..2 * ROUNDS {
            let attached = round % 2;
            let writer = (attached == 1).then(|| self.writer(&source));
            let begin = Instant::now();
            let more = ["--writer", if attached == 1 { "required" } else { "none" }];
            let ended = self.ours(&source, &self.path("fast.raw"), &more).0.wait().unwrap();
            assert!(ended.success());
            seconds[attached].push(begin.elapsed().as_secs_f64());
            drop(writer);
        }
        let [alone, beside] = seconds.map(|mut times| {
            times.sort_by(f64::total_cmp);
            times[times.len() / 2]
        });
        println!(
            "\nA copy beside an idle writer: {beside:.3} s, without one {alone:.3} s, ratio {:.2}",
            beside / alone
        );
    }

    /// `graph` starts what is measured, once the export of node `top` is there. What is measured ends with its job, if
    /// it has one, or with what `graph` returns.
    fn measure_qemu(
        &self,
        what: &str,
        offsets: &mut dyn Iterator<Item = u64>,
        graph: impl FnOnce(&mut Daemon, &Self) -> Option<Owned>,
    ) {
        let (source, socket) = (self.disk("qemu.raw"), self.path("qemu.nbd"));
        let mut daemon = Daemon::start(&self.folder, "qemu");
        daemon.add_file("disk", &source);
        daemon.run(r#"{"execute":"blockdev-add","arguments":{"driver":"raw","node-name":"top","file":"disk"}}"#);
        daemon.serve(&socket);
        daemon.export("top", "top", true);
        let mut disk = Nbd::connect(&socket, "top");
        latencies(&mut disk, strides(self.bytes, 0), Duration::from_secs(2));
        print(
            &format!("qemu over NBD, {what}: no backup"),
            latencies(&mut disk, strides(self.bytes, 0), Duration::from_secs(2)),
        );
        let mut reader = graph(&mut daemon, self);
        let begin = Instant::now();
        let mut times = Vec::new();
        while begin.elapsed() < QEMU_BOUND {
            let some = latencies(&mut disk, offsets.take(32), QEMU_BOUND);
            let is_over = match &mut reader {
                Some(reader) => reader.0.try_wait().unwrap().is_some(),
                None => daemon.has_ended(),
            };
            if some.is_empty() || is_over {
                break;
            }
            times.extend(some);
        }
        print("… during", times);
    }

    fn target(&self, daemon: &mut Daemon) {
        let path = self.path("qemu.target");
        File::create(&path).unwrap().set_len(self.bytes).unwrap();
        daemon.add_file("target", &path);
    }

    /// The copy-before-write filter, and a reader of the snapshot at `rate` MiB/s.
    fn fleece(&self, daemon: &mut Daemon, rate: &str) -> Owned {
        let overlay = self.path("fleece.qcow2");
        let size = self.bytes.to_string();
        let made = Command::new("qemu-img").args(["create", "-q", "-f", "qcow2"]).arg(&overlay).arg(size).status();
        assert!(made.unwrap().success());
        daemon.run(&format!(
            r#"{{"execute":"blockdev-add","arguments":{{"driver":"qcow2","node-name":"tmp","file":{{"driver":"file","filename":"{}"}}}}}}"#,
            overlay.display()
        ));
        daemon.run(r#"{"execute":"blockdev-add","arguments":{"driver":"copy-before-write","node-name":"cbw","file":"disk","target":"tmp"}}"#);
        daemon.run(r#"{"execute":"blockdev-reopen","arguments":{"options":[{"driver":"raw","node-name":"top","file":"cbw"}]}}"#);
        daemon.run(
            r#"{"execute":"blockdev-add","arguments":{"driver":"snapshot-access","node-name":"snap","file":"cbw"}}"#,
        );
        daemon.export("snap", "snap", false);
        let from = format!("nbd+unix:///snap?socket={}", self.path("qemu.nbd").display());
        let mut convert = Command::new("qemu-img");
        convert.args(["convert", "-n", "-r", rate, "-f", "raw", "-O", "raw", &from]);
        let target = self.path("fleece.target");
        File::create(&target).unwrap().set_len(self.bytes).unwrap();
        Owned(convert.arg(target).spawn().unwrap())
    }
}

const BACKUP: &str =
    r#"{"execute":"blockdev-backup","arguments":{"job-id":"j","device":"top","target":"TARGET","sync":"full"}}"#;

fn main() {
    let mut bench = Bench { folder: std::env::temp_dir(), bytes: 512 * MIB };
    let mut arguments = std::env::args().skip(1).filter(|argument| argument != "--bench");
    while let Some(flag) = arguments.next() {
        let value = arguments.next().unwrap_or_else(|| panic!("{flag} wants a value"));
        match flag.as_str() {
            "--mib" => bench.bytes = value.parse::<u64>().expect("a number") * MIB,
            "--folder" => bench.folder = value.into(),
            _ => panic!("unknown option {flag}"),
        }
    }
    bench.folder.push(format!("drive-backup-live-{}", std::process::id()));
    fs::create_dir_all(&bench.folder).unwrap();
    let bytes = bench.bytes;
    println!("{} MiB, 4 KiB writes, in {}\n", bytes / MIB, bench.folder.display());
    println!("| writer | writes | per second | median µs | p99 µs | longest µs |\n|---|---|---|---|---|---|");
    bench.measure_ours();
    bench.measure_served();
    bench.measure_qemu("drive-backup to 20 MiB/s", &mut strides(bytes, 0), |daemon, bench| {
        bench.target(daemon);
        daemon.throttle("target");
        daemon.run(&BACKUP.replace("TARGET", "slow"));
        None
    });
    bench.measure_qemu("fleecing at 20 MiB/s", &mut strides(bytes, 0), |daemon, bench| {
        Some(bench.fleece(daemon, "20M"))
    });
    bench.measure_qemu("drive-backup to a fast target, random", &mut random(bytes), |daemon, bench| {
        bench.target(daemon);
        daemon.run(&BACKUP.replace("TARGET", "target"));
        None
    });
    bench.measure_qemu("fleecing to a fast target, random", &mut random(bytes), |daemon, bench| {
        Some(bench.fleece(daemon, "100G"))
    });
    bench.measure_idle();
    fs::remove_dir_all(&bench.folder).unwrap();
}
