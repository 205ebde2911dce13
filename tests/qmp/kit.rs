//! Clients of a server: of QMP, and of NBD.

use crate::support::{PATIENCE, Running, command, text, wait_for};
use serde_json::{Value, json};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

pub const DISK: u64 = 16 << 20;

/// A client that keeps replies and events apart.
pub struct Client {
    pub stream: UnixStream,
    lines: BufReader<UnixStream>,
    pub events: Vec<Value>,
}

impl Client {
    pub fn connect(path: &Path) -> Self {
        let stream = wait_for("the socket", || UnixStream::connect(path).ok());
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        let lines = BufReader::new(stream.try_clone().unwrap());
        let mut client = Self { stream, lines, events: Vec::new() };
        assert!(client.receive()["QMP"]["version"]["qemu"]["major"].is_u64());
        assert_eq!(client.ask("qmp_capabilities", json!({})), json!({"return": {}}));
        client
    }

    pub fn receive(&mut self) -> Value {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line:?}"))
    }

    pub fn send(&mut self, text: &[u8]) -> Value {
        // In one piece: a server that quits may be gone before a second one.
        self.stream.write_all(&[text, b"\n"].concat()).unwrap();
        loop {
            let message = self.receive();
            if message.get("event").is_none() {
                return message;
            }
            self.events.push(message);
        }
    }

    pub fn ask(&mut self, command: &str, arguments: Value) -> Value {
        self.send(json!({"execute": command, "arguments": arguments}).to_string().as_bytes())
    }

    pub fn job(&mut self) -> Value {
        self.ask("query-block-jobs", json!({}))["return"][0].take()
    }

    /// Asks for what has to succeed.
    #[track_caller]
    pub fn does(&mut self, command: &str, arguments: Value) {
        assert_eq!(self.ask(command, arguments), json!({"return": {}}), "{command}");
    }

    /// The text of the error with which `command` is refused.
    #[track_caller]
    pub fn refused(&mut self, command: &str, arguments: Value) -> String {
        let answer = self.ask(command, arguments);
        answer["error"]["desc"].as_str().unwrap_or_else(|| panic!("{command}: {answer}")).to_owned()
    }

    /// Looks until the only job has this status.
    #[track_caller]
    pub fn wait_for_status(&mut self, status: &str) -> Value {
        wait_for(status, || Some(self.job()).filter(|job| job["status"] == status))
    }

    /// Reads on until this event; it, and all before it are gone.
    pub fn until_event(&mut self, name: &str) -> Value {
        while !self.events.iter().any(|event| event["event"] == name) {
            let event = self.receive();
            self.events.push(event);
        }
        let at = self.events.iter().position(|event| event["event"] == name).unwrap();
        self.events.drain(..=at).next_back().unwrap()
    }

    /// Reads on until a job has this status; all events up to there, in words.
    pub fn until_status(&mut self, status: &str) -> Vec<String> {
        let is_it = |event: &Value| event["data"]["status"] == status;
        while !self.events.iter().any(is_it) {
            let event = self.receive();
            self.events.push(event);
        }
        let end = self.events.iter().position(is_it).unwrap();
        self.events.drain(..=end).map(|event| words(&event)).collect()
    }
}

pub fn words(event: &Value) -> String {
    assert!(event["timestamp"]["seconds"].as_u64() > Some(1_600_000_000), "{event}");
    assert!(event["timestamp"]["microseconds"].as_u64() < Some(1_000_000), "{event}");
    let name = event["event"].as_str().unwrap();
    event["data"]["status"].as_str().unwrap_or(name).to_owned()
}

/// A disk without zeroes, served by us.
pub struct Bench {
    home: tempfile::TempDir,
}

impl Bench {
    pub fn new() -> Self {
        let home = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let bytes: Vec<u8> = (0..DISK).map(|at| (at % 251) as u8 | 1).collect();
        fs::write(home.path().join("disk.raw"), bytes).unwrap();
        Self { home }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    pub fn unix(&self, name: &str) -> String {
        format!("unix:{}", text(&self.path(name)))
    }

    pub fn serve(&self) -> Running {
        self.serve_disks(&["d0=disk.raw"], &[])
    }

    /// Disks as NAME=FILE, with `more` flags. What it saves for writers is in the folder `overlays`, where that exists.
    pub fn serve_disks(&self, disks: &[&str], more: &[&str]) -> Running {
        let disk =
            |given: &&str| given.split_once('=').map(|(name, file)| format!("{name}={}", text(&self.path(file))));
        let disks: Vec<String> = disks.iter().filter_map(disk).collect();
        let (nbd, qmp, folder) = (self.unix("nbd"), self.unix("qmp"), self.path("w"));
        let mut flags = vec!["serve", "-q", "--nbd", &nbd, "--qmp", &qmp, "--writer-dir", text(&folder)];
        disks.iter().for_each(|disk| flags.extend(["--device", disk.as_str()]));
        let mut serve = command(&[&flags[..], more].concat());
        let overlays = self.path("overlays");
        if overlays.exists() {
            serve.env("TMPDIR", overlays);
        }
        Running::start(&mut serve)
    }

    /// The disk's bytes as they are now.
    pub fn disk(&self) -> Vec<u8> {
        fs::read(self.path("disk.raw")).unwrap()
    }

    pub fn qemu(&self) -> Running {
        let path = self.path("disk.raw");
        let mut daemon = Command::new("qemu-storage-daemon");
        daemon.args(["--chardev", &format!("socket,id=c,path={},server=on,wait=off", text(&self.path("qmp")))]);
        daemon.args(["--monitor", "chardev=c,mode=control"]);
        daemon.args(["--blockdev", &format!("file,filename={},node-name=f0", text(&path))]);
        daemon.args(["--blockdev", "raw,file=f0,node-name=d0"]).stdout(Stdio::null());
        Running::start(&mut daemon)
    }

    pub fn backup(&self, more: &Value) -> Value {
        let mut arguments = json!({
            "device": "d0", "job-id": "j", "target": text(&self.path("t.raw")), "format": "raw", "sync": "full",
            "speed": 1 << 20,
        });
        for (name, value) in more.as_object().unwrap() {
            arguments[name] = value.clone();
        }
        arguments
    }

    pub fn assert_copied(&self) {
        assert!(fs::read(self.path("disk.raw")).unwrap() == fs::read(self.path("t.raw")).unwrap());
    }
}

/// A program that writes a served disk: qemu-io, given one command at a time.
pub struct Guest {
    qemu_io: Running,
}

const PROMPT: &[u8] = b"qemu-io> ";

impl Guest {
    /// Connects to this disk.
    pub fn of(bench: &Bench, device: &str) -> Self {
        wait_for("the NBD server", || UnixStream::connect(bench.path("nbd")).ok());
        let uri = format!("nbd+unix:///{device}?socket={}", text(&bench.path("nbd")));
        let mut qemu_io = Command::new("qemu-io");
        qemu_io.args(["-f", "raw", &uri]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut guest = Self { qemu_io: Running::start(&mut qemu_io) };
        guest.read_prompt();
        guest
    }

    /// Does it; what was said of it.
    pub fn ask(&mut self, command: &str) -> String {
        writeln!(self.qemu_io.child().stdin.as_mut().unwrap(), "{command}").unwrap();
        self.read_prompt()
    }

    #[track_caller]
    pub fn write(&mut self, pattern: u64, offset: u64, length: u64) {
        let said = self.ask(&format!("write -P {pattern} {offset} {length}"));
        assert!(said.starts_with(&format!("wrote {length}/{length} bytes")), "{said}");
    }

    fn read_prompt(&mut self) -> String {
        let (mut said, mut byte) = (Vec::new(), [0]);
        while !said.ends_with(PROMPT) {
            self.qemu_io.child().stdout.as_mut().unwrap().read_exact(&mut byte).expect("qemu-io goes on");
            said.push(byte[0]);
        }
        said.truncate(said.len() - PROMPT.len());
        String::from_utf8(said).unwrap()
    }
}
