//! Clients: PyPI's, and hostile ones.

use crate::kit::{Bench, Client};
use crate::support::{PATIENCE, Running, folder, run, text};
use serde_json::json;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

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
    let mut nested = Client::connect(&bench.path("qmp"));
    let brackets = b"{\"execute\":".repeat(1 << 17);
    let sent = (0..64).try_for_each(|_| nested.stream.write_all(&brackets));
    assert!(sent.is_err(), "it was cut off");
    // A request may come in pieces, while others are served.
    let mut slow = Client::connect(&bench.path("qmp"));
    slow.stream.write_all(b"{\"execute\":\"query-").unwrap();
    client.does("drive-backup", bench.backup(&json!({"speed": 0})));
    assert_eq!(slow.send(b"jobs\",\"id\":7}")["id"], 7);
    // There is a place for each of so many, and a word for the next one.
    let guests: Vec<UnixStream> = (0..16).map(|_| UnixStream::connect(bench.path("qmp")).unwrap()).collect();
    let said = guests.iter().map(|guest| {
        guest.set_read_timeout(Some(PATIENCE)).unwrap();
        let mut line = String::new();
        BufReader::new(guest).read_line(&mut line).unwrap();
        line
    });
    assert!(said.collect::<Vec<_>>().iter().any(|line| line.contains("too many clients: 16 at most")));
    drop(guests);
    client.until_status("null");
    bench.assert_copied();
    client.ask("quit", json!({}));
    assert_eq!(server.ended().code, 0);
}

#[test]
fn a_server_that_has_no_file_left_lets_clients_in_when_it_has() {
    let bench = Bench::new();
    let server = bench.serve();
    drop(Client::connect(&bench.path("qmp")));
    let id = server.id().to_string();
    let files = |most: &str| run("prlimit", &["--pid", &id, &format!("--nofile={most}:")]);
    files("3");
    // A server that waits for a client has a file for it already; more it has not.
    let first = UnixStream::connect(bench.path("qmp")).unwrap();
    first.set_read_timeout(Some(PATIENCE)).unwrap();
    assert_eq!(BufReader::new(&first).read_line(&mut String::new()).unwrap(), 0);
    let waits = UnixStream::connect(bench.path("qmp")).unwrap();
    waits.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
    assert!(BufReader::new(&waits).read_line(&mut String::new()).is_err(), "it has no file for this client");
    files("1024");
    waits.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut greeting = String::new();
    BufReader::new(&waits).read_line(&mut greeting).unwrap();
    assert!(greeting.contains("QMP"), "{greeting}");
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
         speed=2097152\nblock-job-pause device=d0\nblock-job-resume device=d0\n\nblock-job-cancel device=d0\nquery-jobs\nquit\n",
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
    // At the empty line.
    let heard: Vec<&str> = ["created", "running", "paused"]
        .into_iter()
        .filter(|word| said.contains(&format!("'status': '{word}'")))
        .collect();
    assert_eq!(heard, ["created", "running", "paused"], "{said}");
    assert!(!target.exists());
    assert_eq!(server.ended().code, 0);
}
