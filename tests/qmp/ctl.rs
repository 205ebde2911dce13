//! `drive-backup ctl`, and runs that are watched and steered.

use crate::kit::{Bench, Client};
use crate::support::bytes::noise;
use crate::support::{BINARY, PATIENCE, Running, drive_backup, run, sparse_file, text, wait_for};
use expectrl::process::unix::WaitStatus;
use expectrl::{Expect, Regex};
use serde_json::{Value, json};
use std::fs;
use std::io::{BufRead, BufReader};

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
    ctl(&["status"]).fails(1, "no such job runs");
    assert_eq!(ctl(&["status", "--json"]).succeeds().stdout, b"[]\n");
    let nothing = drive_backup(&[&["ctl"], &dir[..], &["status"]].concat());
    assert_eq!((nothing.code, nothing.stdout.len(), &*nothing.stderr), (0, 0, "drive-backup: no job runs\n"));
}

#[test]
fn a_path_names_the_job_of_its_disk_whatever_the_jobs_are_called() {
    let bench = Bench::new();
    for disk in ["a.raw", "b.raw"] {
        fs::copy(bench.path("disk.raw"), bench.path(disk)).unwrap();
    }
    let server = bench.serve_disks(&["d0=a.raw", "d1=b.raw"], &[]);
    let mut client = Client::connect(&bench.path("qmp"));
    let mut start = |device: &str, id: &str| {
        let target = bench.path(&format!("{device}.copy"));
        let more = json!({"device": device, "job-id": id, "target": text(&target)});
        client.does("drive-backup", bench.backup(&more));
    };
    // Called like the other disk, and like none.
    start("d0", "d1");
    start("d1", "nightly");
    let ctl = |path: &str, verb: &str| {
        let (folder, disk) = (bench.path("w"), bench.path(path));
        drive_backup(&["ctl", "--writer-dir", text(&folder), "--job", text(&disk), verb])
    };
    ctl("b.raw", "pause").succeeds();
    ctl("a.raw", "cancel").succeeds();
    client.until_event("BLOCK_JOB_CANCELLED");
    let job = wait_for("the other", || Some(client.job()).filter(|job| job["device"] == "nightly"));
    assert_eq!((&job["disk"], &job["paused"]), (&"d1".into(), &true.into()));
    let shown = ctl("b.raw", "status").succeeds().stdout.clone();
    let shown = String::from_utf8(shown).unwrap();
    assert!(shown.starts_with("nightly: paused") && shown.trim_end().ends_with(text(&bench.path("b.raw"))), "{shown}");
    client.ask("quit", json!({}));
    assert_eq!(server.ended().code, 0);
}

/// A run over `device`, of which QMP clients hear.
fn run_of(bench: &Bench, device: &str, more: &[&str]) -> Running {
    let (device, target, folder, qmp) = (bench.path(device), bench.path("t.raw"), bench.path("w"), bench.unix("qmp"));
    let flags = ["--device", text(&device), "--target", text(&target), "--writer-dir", text(&folder), "--qmp", &qmp];
    Running::drive_backup(&[&flags[..], more].concat())
}

/// Bytes.
const HOLES: u64 = 32 << 20;

#[test]
fn the_reading_back_is_paused_slowed_down_and_cancelled_as_copying_is() {
    let bench = Bench::new();
    // Holes cost nothing until they were written and are read back.
    sparse_file(&bench.path("holes.raw"), HOLES);
    for end in ["resume", "cancel"] {
        let mut backup = run_of(&bench, "holes.raw", &["--verify", "--sparse=never", "--speed", "1M", "--json"]);
        let mut records = BufReader::new(backup.child().stdout.take().unwrap()).lines();
        let mut record_where = |name: &str, value: &str| {
            let records = records.by_ref().map(|line| serde_json::from_str::<Value>(&line.unwrap()).unwrap());
            records.into_iter().find(|record| record[name] == value).unwrap_or_else(|| panic!("no {name} {value}"))
        };
        let mut client = Client::connect(&bench.path("qmp"));
        record_where("phase", "verify");
        let job = client.job();
        assert_eq!((&job["status"], &job["offset"], &job["len"]), (&"running".into(), &HOLES.into(), &HOLES.into()));
        client.does("block-job-pause", json!({"device": "holes"}));
        assert_eq!(client.wait_for_status("paused")["io-status"], "ok");
        // It does not go on, however fast it might.
        client.does("block-job-set-speed", json!({"device": "holes", "speed": 0}));
        let paused = record_where("status", "paused");
        assert!(paused["phase"] == "verify" && paused["bytes_verified"].as_u64() < Some(HOLES), "{paused}");
        assert!(!bench.path("t.raw").exists() && client.job()["status"] == "paused");
        client.does(&format!("job-{end}"), json!({"id": "holes"}));
        let life = client.until_status("null");
        let event = if end == "resume" { "BLOCK_JOB_COMPLETED" } else { "BLOCK_JOB_CANCELLED" };
        assert!(life.iter().any(|word| word == event), "{life:?}");
        let last = record_where("message_type", if end == "resume" { "summary" } else { "exit_error" });
        assert_eq!(last["exit_code"], i32::from(end == "cancel"));
        drop(records);
        assert_eq!(backup.ended().code, i32::from(end == "cancel"));
        assert_eq!(bench.path("t.raw").exists(), end == "resume");
        let _ = fs::remove_file(bench.path("t.raw"));
    }
}

#[test]
fn watch_shows_all_jobs_on_a_terminal_until_they_are_over() {
    let bench = Bench::new();
    let folder = bench.path("w");
    let backup = run_of(&bench, "disk.raw", &["--speed", "1M", "--snapshot=overlay"]);
    let mut client = Client::connect(&bench.path("qmp"));
    wait_for("the copy", || (client.job()["offset"].as_u64() > Some(0)).then_some(()));
    let said = drive_backup(&["ctl", "--writer-dir", text(&folder), "status"]).succeeds().stdout.clone();
    let said = String::from_utf8(said).unwrap();
    let disk = text(&bench.path("disk.raw")).to_owned();
    assert!(said.starts_with("disk: running, ") && said.ends_with(&format!(" MiB/s, {disk}\n")), "{said}");
    let mut command = std::process::Command::new(BINARY);
    command.args(["ctl", "--writer-dir", text(&folder), "watch"]).env("TERM", "xterm");
    let mut terminal = expectrl::Session::spawn(command).unwrap();
    terminal.get_process_mut().set_window_size(120, 24).unwrap();
    terminal.set_expect_timeout(Some(PATIENCE));
    terminal.expect(Regex(r"disk .*/16\.00 MiB .*/s running")).unwrap();
    client.does("job-pause", json!({"id": "disk"}));
    terminal.expect(Regex(r"disk .*/16\.00 MiB .*paused")).unwrap();
    client.does("job-cancel", json!({"id": "disk"}));
    terminal.expect(expectrl::Eof).unwrap();
    let ended = wait_for("its end", || match terminal.get_process().status().unwrap() {
        WaitStatus::StillAlive => None,
        status => Some(status),
    });
    assert!(matches!(ended, WaitStatus::Exited(_, 0)), "{ended:?}");
    assert_eq!(backup.ended().code, 1);
}

/// Nobody has dismissed it: it stays for ever.
#[test]
fn a_job_that_is_over_is_shown_and_neither_watched_nor_steered() {
    let bench = Bench::new();
    let server = bench.serve();
    let mut client = Client::connect(&bench.path("qmp"));
    client.does("drive-backup", bench.backup(&json!({"speed": 0, "auto-dismiss": false})));
    client.until_status("concluded");
    let folder = bench.path("w");
    let ctl = |verb: &str| drive_backup(&["ctl", "--writer-dir", text(&folder), verb]);
    let shown = String::from_utf8(ctl("status").succeeds().stdout.clone()).unwrap();
    assert!(shown.starts_with("j: concluded, 100 %"), "{shown}");
    ctl("pause").fails(1, "no such job runs");
    ctl("watch").succeeds();
    client.ask("quit", json!({}));
    assert_eq!(server.ended().code, 0);
}

const SECRET: &str = "Sesam-oeffne-dich";

#[test]
fn an_encrypted_disk_is_copied_and_its_secret_never_shown() {
    let bench = Bench::new();
    let (plain, luks, secret) = (bench.path("plain.raw"), bench.path("disk.luks"), bench.path("secret"));
    fs::write(&plain, noise(3, 1 << 20)).unwrap();
    fs::write(&secret, SECRET).unwrap();
    let object = format!("secret,id=s,data={SECRET}");
    let keys = "key-secret=s,iter-time=10";
    run(
        "qemu-img",
        &["convert", "--object", &object, "-f", "raw", "-O", "luks", "-o", keys, text(&plain), text(&luks)],
    );
    let place = format!("file:{}", text(&secret));
    let server = bench.serve_disks(&["d0=disk.luks"], &["--read-only", "--format", "luks", "--secret", &place]);
    let mut client = Client::connect(&bench.path("qmp"));
    let mut shown = Vec::new();
    client.does("drive-backup", bench.backup(&json!({"speed": 0, "auto-dismiss": false})));
    shown.push(client.refused("drive-backup", bench.backup(&json!({"target": "/no/t.raw", "job-id": "k"}))));
    client.until_status("concluded");
    assert!(fs::read(bench.path("t.raw")).unwrap() == fs::read(&plain).unwrap());
    for question in ["query-block", "query-block-jobs", "query-jobs", "query-qmp-schema"] {
        shown.push(client.ask(question, json!({})).to_string());
    }
    shown.extend(client.events.iter().map(Value::to_string));
    assert!(shown[1].contains("\"drv\":\"luks\"") && !shown.iter().any(|said| said.contains(SECRET)), "{shown:?}");
    client.ask("quit", json!({}));
    assert_eq!(server.ended().code, 0);
}

#[test]
fn a_folder_that_is_not_ours_alone_is_not_asked() {
    let bench = Bench::new();
    let folder = bench.path("theirs");
    fs::create_dir(&folder).unwrap();
    fs::set_permissions(&folder, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let _theirs = std::os::unix::net::UnixListener::bind(folder.join("qmp-1-0")).unwrap();
    for verb in ["status", "watch", "cancel"] {
        drive_backup(&["ctl", "--writer-dir", text(&folder), verb]).fails(1, "its mode is 755, not 700");
    }
    let missing = bench.path("nobodys");
    drive_backup(&["ctl", "--writer-dir", text(&missing), "cancel"]).fails(1, "no such job runs");
    assert!(!missing.exists());
}

/// It may be the one that is meant.
#[test]
fn a_run_that_does_not_answer_is_not_taken_for_none() {
    let bench = Bench::new();
    let folder = bench.path("w");
    let runs = run_of(&bench, "disk.raw", &["--speed", "64K"]);
    let mut client = Client::connect(&bench.path("qmp"));
    wait_for("the copy", || (client.job()["offset"].as_u64() > Some(0)).then_some(()));
    let stands_still = std::os::unix::net::UnixListener::bind(folder.join("qmp-1-0")).unwrap();
    let ctl = |words: &[&str]| drive_backup(&[&["ctl", "--writer-dir", text(&folder)], words].concat());
    ctl(&["pause"]).fails(1, "does not answer; --job says which is meant");
    assert_eq!(client.job()["paused"], false);
    let shown = ctl(&["status"]);
    assert_eq!((shown.code, shown.stderr.lines().count()), (0, 1), "{shown:?}");
    assert!(String::from_utf8_lossy(&shown.stdout).starts_with("disk: running"), "{shown:?}");
    let mut follows = crate::support::command(&["ctl", "--writer-dir", text(&folder), "--job", "disk", "watch"]);
    let follows = Running::start(&mut follows);
    let connections = || fs::read_dir(format!("/proc/{}/fd", follows.id())).map_or(0, Iterator::count);
    // The three streams, and both runs; the one that stands still takes the longer to be given up.
    wait_for("the one that follows", || (connections() > 3).then_some(()));
    ctl(&["--job", "disk", "cancel"]).succeeds();
    assert_eq!(runs.ended().code, 1);
    follows.ended().succeeds();
    ctl(&["watch"]).fails(1, "does not answer");
    drop(stands_still);
    ctl(&["watch"]).succeeds();
}
