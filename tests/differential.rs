//! The same writes through QEMU's copy-before-write and through this program, the instant at the same place among them:
//! the two copies compare equal. QEMU's side is qemu-storage-daemon, on Unix sockets.

#![cfg(feature = "cli")]

mod support;

use drive_backup::writer::Writer;
use serde_json::{Value, json};
use std::fs::OpenOptions;
use std::io::{BufRead, BufReader, Read as _, Write as _};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use support::{Running, bytes, command, folder, qemu_io, text, wait_for};

const LENGTH: u64 = 3 << 20;

/// A write of one byte value, or of zeroes.
#[derive(Clone, Copy, Debug)]
struct Write {
    offset: u64,
    length: u64,
    /// `None`: zeroes that may be a hole.
    value: Option<u8>,
}

/// splitmix64: looks random and follows from the seed.
fn next(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let z = (*state ^ (*state >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

/// Whole sectors, as a guest writes; overlapping, across clusters, the first and the last.
fn trace(seed: u64, writes: usize) -> Vec<Write> {
    let mut state = seed;
    let mut write = |_| {
        let mut below = |end: u64| next(&mut state) % end;
        let sectors = LENGTH / 512;
        let offset = [0, sectors - 1, below(sectors), below(sectors), below(sectors / 128) * 128][below(5) as usize];
        let length = [1, 1 + below(8), 128, 1 + below(400)][below(4) as usize].min(sectors - offset);
        let value = (below(8) > 0).then_some(below(255) as u8 + 1);
        Write { offset: offset * 512, length: length * 512, value }
    };
    (0..writes).map(&mut write).collect()
}

/// QEMU: a disk behind NBD, jobs by QMP.
struct Qemu {
    _daemon: Running,
    uri: String,
    monitor: BufReader<UnixStream>,
}

impl Qemu {
    fn start(folder: &Path, disk: &Path, target: &Path) -> Self {
        let (monitor, nbd) = (folder.join("qmp"), folder.join("nbd"));
        let node = |name: &str, path: &Path| {
            json!({"driver": "raw", "node-name": name, "file": {"driver": "file", "filename": text(path)}}).to_string()
        };
        let mut daemon = Command::new("qemu-storage-daemon");
        daemon.args(["--blockdev", &node("disk", disk), "--blockdev", &node("target", target)]);
        daemon.args(["--chardev", &format!("socket,id=m,server=on,wait=off,path={}", text(&monitor))]);
        daemon.args(["--monitor", "chardev=m"]);
        daemon.args(["--nbd-server", &format!("addr.type=unix,addr.path={}", text(&nbd))]);
        daemon.args(["--export", "type=nbd,id=e,node-name=disk,name=disk,writable=on"]);
        let daemon = Running::start(daemon.stdin(Stdio::null()));
        let stream = wait_for("QMP", || UnixStream::connect(&monitor).ok());
        stream.set_read_timeout(Some(support::PATIENCE)).unwrap();
        let uri = format!("nbd+unix:///disk?socket={}", text(&nbd));
        let mut qemu = Self { _daemon: daemon, uri, monitor: BufReader::new(stream) };
        qemu.until(|answer| answer.get("QMP").is_some());
        qemu.execute("qmp_capabilities", json!({}));
        qemu
    }

    /// Reads until an answer or event is the one.
    fn until(&mut self, is_it: impl Fn(&Value) -> bool) -> Value {
        loop {
            let mut line = String::new();
            assert!(self.monitor.read_line(&mut line).unwrap() > 0, "qemu-storage-daemon has hung up");
            let answer: Value = serde_json::from_str(&line).unwrap();
            assert!(answer.get("error").is_none(), "{answer}");
            if is_it(&answer) {
                return answer;
            }
        }
    }

    fn execute(&mut self, verb: &str, arguments: Value) -> Value {
        let command = json!({"execute": verb, "arguments": arguments});
        writeln!(self.monitor.get_mut(), "{command}").unwrap();
        self.until(|answer| answer.get("return").is_some())["return"].take()
    }

    fn write(&self, writes: &[Write]) {
        let commands = writes.iter().map(|Write { offset, length, value }| match value {
            Some(value) => format!("write -P {value} {offset} {length}"),
            None => format!("write -z -u {offset} {length}"),
        });
        let commands: Vec<_> = commands.collect();
        qemu_io(&["-f", "raw"], Path::new(&self.uri), &commands.iter().map(String::as_str).collect::<Vec<_>>());
    }

    /// Its instant is when this returns: the job has put its filter above the disk.
    fn begin_backup(&mut self) {
        let job = json!({"job-id": "j", "device": "disk", "target": "target", "sync": "full", "speed": 65536,
            "auto-dismiss": false});
        self.execute("blockdev-backup", job);
    }

    fn end_backup(&mut self) {
        self.execute("block-job-set-speed", json!({"device": "j", "speed": 0}));
        let jobs = |qemu: &mut Self| qemu.execute("query-jobs", json!({}))[0].take();
        wait_for("the end of QEMU's job", || (jobs(self)["status"] == "concluded").then_some(()));
        let job = jobs(self);
        assert!(job.get("error").is_none(), "{job}");
        self.execute("block-job-dismiss", json!({"id": "j"}));
        self.execute("quit", json!({}));
        wait_for("the end of qemu-storage-daemon", || self._daemon.has_ended().then_some(()));
    }
}

/// A program that brackets its writes.
struct Ours {
    writer: Writer,
    disk: std::fs::File,
}

impl Ours {
    fn write(&self, writes: &[Write]) {
        for Write { offset, length, value } in writes {
            let _bracket = self.writer.begin(*offset, *length).unwrap();
            self.disk.write_all_at(&vec![value.unwrap_or(0); *length as usize], *offset).unwrap();
        }
    }
}

fn compare(seed: u64, format: &str) {
    let folder = folder();
    let path = |name: &str| -> PathBuf { folder.path().join(name) };
    bytes::disk(&path("qemu's disk"), LENGTH);
    bytes::disk(&path("our disk"), LENGTH);
    support::sparse_file(&path("qemu's copy"), LENGTH);
    let trace = trace(seed, 90);
    let (before, after) = trace.split_at(30);

    let mut qemu = Qemu::start(folder.path(), &path("qemu's disk"), &path("qemu's copy"));
    qemu.write(before);
    qemu.begin_backup();
    qemu.write(after);
    qemu.end_backup();

    let disk = OpenOptions::new().write(true).open(path("our disk")).unwrap();
    let ours = Ours { writer: Writer::open_in(path("our disk"), path("meet")).unwrap(), disk };
    ours.write(before);
    let (device, target, meet) = (path("our disk"), path("our copy"), path("meet"));
    let ends = ["--device", text(&device), "--target", text(&target), "--writer-dir", text(&meet)];
    // So slow that it has copied little when the last write is there.
    let how = ["--source-format", "raw", "--format", format, "--snapshot", "overlay", "--overlay", "memory"];
    let pace = ["--speed", "64K", "--freeze-timeout", "60", "--cbw-timeout", "60", "--json"];
    let mut backup = Running::start(&mut command(&[&ends[..], &how, &pace].concat()));
    let mut records = BufReader::new(backup.child().stdout.take().unwrap());
    let start = support::start_of(records.by_ref().lines().map(Result::unwrap));
    assert!(start.contains(r#""instant":"frozen""#), "{start}");
    ours.write(after);
    let last = std::thread::spawn(move || records.lines().map(Result::unwrap).last().unwrap());
    backup.signal(nix::sys::signal::Signal::SIGUSR2);
    backup.ended().succeeds_unlimited();
    let last: Value = serde_json::from_str(&last.join().unwrap()).unwrap();
    assert!(last["writer"]["trapped"].as_u64().unwrap() > 0, "writes came before the copier: {last}");

    bytes::same(("raw", &path("qemu's disk")), ("raw", &path("our disk")));
    bytes::same(("raw", &path("qemu's copy")), (format, &path("our copy")));
    let moved = bytes::read(&path("our disk")) != bytes::read(&path("qemu's copy"));
    assert!(moved, "the writes after the instant changed the disk");
}

#[test]
fn qemu_and_we_copy_the_same_instant_to_raw() {
    (0..2).for_each(|seed| compare(seed, "raw"));
}

#[test]
fn qemu_and_we_copy_the_same_instant_to_qcow2() {
    (2..4).for_each(|seed| compare(seed, "qcow2"));
}
