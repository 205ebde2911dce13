//! QMP from outside: beside qemu-storage-daemon, with PyPI's qemu.qmp, and with clients that mean harm.

#![cfg(all(feature = "cli", feature = "nbd"))]

#[path = "../support/mod.rs"]
mod support;

use serde_json::{Value, json};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;
use support::{Running, drive_backup, folder, run, text, wait_for};

const DISK: u64 = 16 << 20;

/// A client that keeps replies and events apart.
struct Client {
    stream: UnixStream,
    lines: BufReader<UnixStream>,
    events: Vec<Value>,
}

impl Client {
    fn connect(path: &Path) -> Self {
        let stream = wait_for("the socket", || UnixStream::connect(path).ok());
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        let lines = BufReader::new(stream.try_clone().unwrap());
        let mut client = Self { stream, lines, events: Vec::new() };
        assert!(client.receive()["QMP"]["version"]["qemu"]["major"].is_u64());
        assert_eq!(client.ask("qmp_capabilities", json!({})), json!({"return": {}}));
        client
    }

    fn receive(&mut self) -> Value {
        let mut line = String::new();
        self.lines.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: {line:?}"))
    }

    fn send(&mut self, text: &[u8]) -> Value {
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

    fn ask(&mut self, command: &str, arguments: Value) -> Value {
        self.send(json!({"execute": command, "arguments": arguments}).to_string().as_bytes())
    }

    fn job(&mut self) -> Value {
        self.ask("query-block-jobs", json!({}))["return"][0].take()
    }

    /// Reads on until a job has this status; all events up to there, in words.
    fn until_status(&mut self, status: &str) -> Vec<String> {
        let is_it = |event: &Value| event["data"]["status"] == status;
        while !self.events.iter().any(is_it) {
            let event = self.receive();
            self.events.push(event);
        }
        let end = self.events.iter().position(is_it).unwrap();
        self.events.drain(..=end).map(|event| words(&event)).collect()
    }
}

fn words(event: &Value) -> String {
    assert!(event["timestamp"]["seconds"].as_u64() > Some(1_600_000_000), "{event}");
    assert!(event["timestamp"]["microseconds"].as_u64() < Some(1_000_000), "{event}");
    let name = event["event"].as_str().unwrap();
    event["data"]["status"].as_str().unwrap_or(name).to_owned()
}

/// A disk without zeroes, served by us.
struct Bench {
    home: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let home = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let bytes: Vec<u8> = (0..DISK).map(|at| (at % 251) as u8 | 1).collect();
        fs::write(home.path().join("disk.raw"), bytes).unwrap();
        Self { home }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.home.path().join(name)
    }

    fn unix(&self, name: &str) -> String {
        format!("unix:{}", text(&self.path(name)))
    }

    fn serve(&self) -> Running {
        let disk = format!("d0={}", text(&self.path("disk.raw")));
        let (nbd, qmp) = (self.unix("nbd"), self.unix("qmp"));
        let folder = self.path("w");
        let flags = ["serve", "-q", "--device", &disk, "--nbd", &nbd, "--qmp", &qmp, "--writer-dir", text(&folder)];
        Running::drive_backup(&flags)
    }

    fn qemu(&self) -> Running {
        let path = self.path("disk.raw");
        let mut daemon = Command::new("qemu-storage-daemon");
        daemon.args(["--chardev", &format!("socket,id=c,path={},server=on,wait=off", text(&self.path("qmp")))]);
        daemon.args(["--monitor", "chardev=c,mode=control"]);
        daemon.args(["--blockdev", &format!("file,filename={},node-name=f0", text(&path))]);
        daemon.args(["--blockdev", "raw,file=f0,node-name=d0"]).stdout(Stdio::null());
        Running::start(&mut daemon)
    }

    fn backup(&self, more: &Value) -> Value {
        let mut arguments = json!({
            "device": "d0", "job-id": "j", "target": text(&self.path("t.raw")), "format": "raw", "sync": "full",
            "speed": 1 << 20,
        });
        for (name, value) in more.as_object().unwrap() {
            arguments[name] = value.clone();
        }
        arguments
    }

    fn assert_copied(&self) {
        assert!(fs::read(self.path("disk.raw")).unwrap() == fs::read(self.path("t.raw")).unwrap());
    }
}

/// One script of commands; what was answered, and the events of each job.
fn script(bench: &Bench) -> (Vec<String>, Vec<Vec<String>>) {
    let mut client = Client::connect(&bench.path("qmp"));
    let (mut answers, mut lives) = (Vec::new(), Vec::new());
    let mut note = |what: &str, answer: Value| {
        let said = match answer.get("error") {
            Some(error) => format!("{}: {}", error["class"].as_str().unwrap(), error["desc"].as_str().unwrap()),
            None => "ok".to_owned(),
        };
        answers.push(format!("{what}: {said}"));
    };
    for wrong in ["{}", "[]", "5", "{\"execute\":1}", "{\"execute\":\"nope\"}", "{'execute':'query-jobs','x':1}"] {
        note(wrong, client.send(wrong.as_bytes()));
    }
    note("twice", client.ask("qmp_capabilities", json!({})));
    for more in [
        json!({"foo": 1}),
        json!({"sync": "xx"}),
        json!({"speed": "1"}),
        json!({"mode": "x"}),
        json!({"format": "x"}),
        json!({"target": "/no/t.raw"}),
        json!({"target": "/no/t.raw", "mode": "existing"}),
        json!({"x-perf": {"max-workers": 0}}),
        json!({"x-perf": {"zz": 0}}),
        json!({"x-perf": {"max-chunk": 3}}),
        json!({"job-id": "1 bad"}),
    ] {
        note(&more.to_string(), client.ask("drive-backup", bench.backup(&more)));
    }
    let verbs = ["cancel", "pause", "resume", "complete"];
    for verb in verbs {
        note(verb, client.ask(&format!("block-job-{verb}"), json!({"device": "j"})));
        note(verb, client.ask(&format!("job-{verb}"), json!({"id": "j"})));
    }
    client.events.clear();
    let manual = bench.backup(&json!({"auto-finalize": false, "auto-dismiss": false}));
    note("start", client.ask("drive-backup", manual));
    for verb in ["complete", "finalize", "dismiss", "resume"] {
        note(&format!("running {verb}"), client.ask(&format!("job-{verb}"), json!({"id": "j"})));
    }
    note("running", client.ask("block-job-set-speed", json!({"device": "j", "speed": -1})));
    note("pause", client.ask("block-job-pause", json!({"device": "j"})));
    wait_for("the pause", || (client.job()["status"] == "paused").then_some(()));
    for verb in ["pause", "complete", "finalize", "dismiss"] {
        note(&format!("paused {verb}"), client.ask(&format!("job-{verb}"), json!({"id": "j"})));
    }
    note("paused cancel", client.ask("block-job-cancel", json!({"device": "j"})));
    note("paused speed", client.ask("block-job-set-speed", json!({"device": "j", "speed": 0})));
    note("paused resume", client.ask("job-resume", json!({"id": "j"})));
    lives.push(client.until_status("pending"));
    let shown = client.job();
    assert_eq!((&shown["offset"], &shown["len"]), (&DISK.into(), &DISK.into()));
    for verb in ["pause", "resume", "complete", "dismiss"] {
        note(&format!("pending {verb}"), client.ask(&format!("job-{verb}"), json!({"id": "j"})));
    }
    note("pending speed", client.ask("block-job-set-speed", json!({"device": "j", "speed": 5})));
    note("finalize", client.ask("block-job-finalize", json!({"id": "j"})));
    lives.push(client.until_status("concluded"));
    for verb in ["pause", "resume", "complete", "finalize", "cancel"] {
        note(&format!("concluded {verb}"), client.ask(&format!("job-{verb}"), json!({"id": "j"})));
    }
    note("dismiss", client.ask("job-dismiss", json!({"id": "j"})));
    lives.push(client.until_status("null"));
    bench.assert_copied();
    note("start", client.ask("drive-backup", bench.backup(&json!({}))));
    note("cancel", client.ask("block-job-cancel", json!({"device": "j"})));
    lives.push(client.until_status("null"));
    note("quit", client.ask("quit", json!({})));
    (answers, lives)
}

#[test]
fn one_script_gets_the_same_answers_from_qemu_and_from_us() {
    let (theirs, ours) = (Bench::new(), Bench::new());
    let qemu = theirs.qemu();
    let (their_answers, their_lives) = script(&theirs);
    drop(qemu);
    let server = ours.serve();
    let (our_answers, our_lives) = script(&ours);
    assert_eq!(server.ended().code, 0);
    assert_eq!(our_answers, their_answers);
    // QEMU pauses and resumes jobs on its own whenever its graph changes; for a user nothing happened (docs/QMP.md).
    let without_floods = |lives: Vec<Vec<String>>| -> Vec<Vec<String>> {
        lives
            .into_iter()
            .map(|life| life.into_iter().filter(|word| word != "paused" && word != "running").collect())
            .collect()
    };
    let of_users: Vec<&String> = our_lives[0].iter().collect();
    assert_eq!(of_users, ["created", "running", "paused", "running", "waiting", "pending"]);
    let (mut theirs, ours) = (without_floods(their_lives), without_floods(our_lives));
    // Its BLOCK_JOB_PENDING comes after the status, and so does ours.
    theirs.iter_mut().for_each(|life| life.dedup());
    assert_eq!(ours, theirs);
}

#[test]
fn a_client_that_never_reads_and_hostile_ones_stop_nothing() {
    let bench = Bench::new();
    let server = bench.serve();
    let mut client = Client::connect(&bench.path("qmp"));
    let mode = fs::metadata(bench.path("qmp")).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    // Connects, asks for more than its queue holds, and reads nothing.
    let mut silent = Client::connect(&bench.path("qmp"));
    let many = b"{\"execute\":\"query-qmp-schema\"}".repeat(200);
    let _ = silent.stream.write_all(&many);
    for bad in
        [&[b'['; 4096][..], b"\0\0\0{\"execute\":\"x\0\"}\n", b"{\"a\":\"\xff\xfe\"}\n", b"{\"half", b"1e99999 \n"]
    {
        let mut hostile = Client::connect(&bench.path("qmp"));
        let _ = hostile.stream.write_all(bad);
    }
    let mut bomb = Client::connect(&bench.path("qmp"));
    let megabyte = vec![b'"'; 1].into_iter().chain(std::iter::repeat_n(b'x', 1 << 20)).collect::<Vec<u8>>();
    let sent = (0..64).try_for_each(|_| bomb.stream.write_all(&megabyte));
    assert!(sent.is_err(), "it was cut off");
    let answer = client.ask("drive-backup", bench.backup(&json!({"speed": 0})));
    assert_eq!(answer, json!({"return": {}}));
    client.until_status("null");
    bench.assert_copied();
    client.ask("quit", json!({}));
    assert_eq!(server.ended().code, 0);
}

#[test]
fn a_transaction_is_all_or_nothing_and_a_failure_leaves_no_target() {
    let bench = Bench::new();
    fs::copy(bench.path("disk.raw"), bench.path("other.raw")).unwrap();
    let (one, other) =
        (format!("d0={}", text(&bench.path("disk.raw"))), format!("d1={}", text(&bench.path("other.raw"))));
    let (nbd, qmp, folder) = (bench.unix("nbd"), bench.unix("qmp"), bench.path("w"));
    let flags = ["serve", "-q", "--device", &one, "--device", &other, "--nbd", &nbd, "--qmp", &qmp];
    let server = Running::drive_backup(&[&flags[..], &["--writer-dir", text(&folder)]].concat());
    let mut client = Client::connect(&bench.path("qmp"));
    let action = |device: &str, target: &Path| {
        let data = json!({"device": device, "target": text(target), "format": "raw", "speed": 1 << 20});
        json!({"type": "drive-backup", "data": data})
    };
    let grouped = json!({"completion-mode": "grouped"});
    let (first, second) = (bench.path("t.raw"), bench.path("t1.raw"));
    let both = |second: &Path| json!({"actions": [action("d0", &first), action("d1", second)], "properties": grouped});
    let answer = client.ask("transaction", both(Path::new("/no/t.raw")));
    assert_eq!(
        answer["error"]["desc"].as_str().unwrap().split(':').next(),
        Some("Could not create '/no/t.raw'"),
        "{answer}"
    );
    assert_eq!(client.ask("query-jobs", json!({}))["return"], json!([]));
    assert!(!first.exists());
    // One is cancelled: so is the other.
    assert_eq!(client.ask("transaction", both(&second)), json!({"return": {}}));
    client.ask("job-cancel", json!({"id": "d1"}));
    wait_for("the end of both", || (client.ask("query-jobs", json!({}))["return"] == json!([])).then_some(()));
    assert!(!first.exists() && !second.exists());
    // Together.
    assert_eq!(client.ask("transaction", both(&second)), json!({"return": {}}));
    for id in ["d0", "d1"] {
        client.ask("block-job-set-speed", json!({"device": id, "speed": 0}));
    }
    wait_for("the end of both", || (client.ask("query-jobs", json!({}))["return"] == json!([])).then_some(()));
    bench.assert_copied();
    assert!(fs::read(bench.path("other.raw")).unwrap() == fs::read(second).unwrap());
    client.ask("quit", json!({}));
    assert_eq!(server.ended().code, 0);
}

#[test]
fn a_plain_run_is_found_watched_and_steered() {
    let bench = Bench::new();
    let (disk, target, folder, qmp) = (bench.path("disk.raw"), bench.path("t.raw"), bench.path("w"), bench.unix("qmp"));
    let dir = ["--writer-dir", text(&folder)];
    let flags =
        ["--device", text(&disk), "--target", text(&target), "--speed", "1M", "--snapshot=overlay", "--qmp", &qmp];
    let backup = Running::drive_backup(&[&flags[..], &dir].concat());
    let mut client = Client::connect(&bench.path("qmp"));
    wait_for("the copy", || (client.job()["offset"].as_u64() > Some(0)).then_some(()));
    let ctl = |words: &[&str]| drive_backup(&[&["ctl", "--job", text(&disk)], &dir[..], words].concat());
    ctl(&["pause"]).succeeds();
    let shown = ctl(&["status", "--json"]).succeeds().stdout.clone();
    let shown: Value = serde_json::from_slice(&shown).unwrap();
    assert_eq!((&shown[0]["status"], &shown[0]["device"]), (&"paused".into(), &"disk".into()));
    ctl(&["pause"]).fails(1, "Job is already paused");
    ctl(&["resume"]).succeeds();
    ctl(&["speed", "2M"]).succeeds();
    assert_eq!(client.job()["speed"], 2 << 20);
    let second = drive_backup(&[&flags[..], &dir].concat());
    assert_eq!(second.code, 8, "{second:?}");
    ctl(&["cancel"]).succeeds();
    let life = client.until_status("null");
    assert_eq!(life.last().map(String::as_str), Some("null"));
    assert!(life.contains(&"BLOCK_JOB_CANCELLED".to_owned()), "{life:?}");
    assert_eq!(backup.ended().code, 1);
    assert!(!target.exists() && !bench.path("qmp").exists());
    ctl(&["cancel"]).fails(1, "no such job runs");
}

#[test]
fn pypis_client_lists_starts_steers_and_hears() {
    let venv = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/qmp-venv");
    if !venv.join("bin/qmp-shell").exists() {
        run("python3", &["-m", "venv", text(&venv)]);
        run(text(&venv.join("bin/pip")), &["install", "-q", "qemu.qmp"]);
    }
    let bench = Bench::new();
    let server = bench.serve();
    drop(Client::connect(&bench.path("qmp")));
    let (target, home) = (bench.path("t.raw"), folder());
    let commands = format!(
        "query-block\ndrive-backup device=d0 target={} speed=1048576\nquery-block-jobs\nblock-job-set-speed device=d0 \
         speed=2097152\nblock-job-pause device=d0\nblock-job-resume device=d0\nblock-job-cancel device=d0\nquery-jobs\nquit\n",
        text(&target)
    );
    let mut shell = Command::new(venv.join("bin/qmp-shell"));
    shell.arg(bench.path("qmp")).env("HOME", home.path()).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut shell = Running::start(shell.stderr(Stdio::piped()));
    shell.child().stdin.take().unwrap().write_all(commands.as_bytes()).unwrap();
    let ended = shell.ended();
    let said = String::from_utf8_lossy(&ended.stdout).into_owned();
    assert!(said.contains("Connected to QEMU 0.") && said.contains("disk.raw"), "{said} {}", ended.stderr);
    assert!(said.contains("\"speed\": 1048576") && !said.contains("\"error\": {"), "{said}");
    assert!(!target.exists());
    assert_eq!(server.ended().code, 0);
}
