//! What is left of QEMU's iotests 055 and 056: docs/QMP.md has the list.

use crate::kit::{Bench, Client, DISK};
use crate::support::bytes::{noise, same, sound};
use crate::support::{Running, sparse_file, text, wait_for};
use serde_json::{Value, json};
use std::fs;

/// Bytes of a disk that is soon compressed.
const SMALL: usize = 2 << 20;

/// A client of a new server.
fn served(bench: &Bench) -> (Running, Client) {
    (bench.serve(), Client::connect(&bench.path("qmp")))
}

fn quit(mut client: Client, server: Running) {
    client.ask("quit", json!({}));
    assert_eq!(server.ended().code, 0);
}

/// Pauses the only job in the midst of its copy, sees it stand still at its new speed, and lets it go on to its end.
fn pause_and_complete(client: &mut Client) {
    wait_for("the copy", || (client.job()["offset"].as_u64() > Some(0)).then_some(()));
    client.does("block-job-pause", json!({"device": "j"}));
    client.does("block-job-set-speed", json!({"device": "j", "speed": 0}));
    let job = client.wait_for_status("paused");
    assert_eq!((&job["paused"], &job["busy"]), (&true.into(), &false.into()));
    assert!(job["offset"].as_u64() < job["len"].as_u64(), "it stands still: {job}");
    client.does("block-job-resume", json!({"device": "j"}));
    let completed = client.until_event("BLOCK_JOB_COMPLETED");
    assert_eq!((completed["data"].get("error"), &completed["data"]["offset"]), (None, &job["len"]));
    client.until_status("null");
}

fn cancel(client: &mut Client) {
    client.does("block-job-cancel", json!({"device": "j"}));
    assert_eq!(client.until_event("BLOCK_JOB_CANCELLED")["data"]["type"], "backup");
    client.until_status("null");
}

#[test]
fn sizes_differ_and_the_target_is_untouched() {
    let bench = Bench::new();
    let (server, mut client) = served(&bench);
    let (target, link) = (bench.path("t.raw"), bench.path("link.raw"));
    for length in [DISK / 2, DISK * 2] {
        sparse_file(&target, length);
        let refused = client.refused("drive-backup", bench.backup(&json!({"mode": "existing"})));
        assert!(refused.to_lowercase().contains("source and target image have different sizes"), "{refused}");
        assert_eq!(fs::metadata(&target).unwrap().len(), length);
    }
    let before = bench.disk();
    fs::hard_link(bench.path("disk.raw"), &link).unwrap();
    for (name, mode) in [("disk.raw", "absolute-paths"), ("link.raw", "existing"), ("link.raw", "absolute-paths")] {
        let arguments = bench.backup(&json!({"target": text(&bench.path(name)), "mode": mode}));
        assert_eq!(client.refused("drive-backup", arguments), "Source and target cannot be the same");
    }
    assert!(bench.disk() == before);
    assert_eq!(client.ask("query-jobs", json!({}))["return"], json!([]));
    quit(client, server);
}

#[test]
fn an_unknown_disk_is_told_by_its_class() {
    let bench = Bench::new();
    let (server, mut client) = served(&bench);
    let data = bench.backup(&json!({"device": "nobody"}));
    let transaction = json!({"actions": [{"type": "drive-backup", "data": data}]});
    for answer in [client.ask("drive-backup", data.clone()), client.ask("transaction", transaction)] {
        let text = "Cannot find device='nobody' nor node-name='nobody'";
        assert_eq!(answer["error"], json!({"class": "DeviceNotFound", "desc": text}));
    }
    quit(client, server);
}

#[test]
fn a_speed_is_what_was_asked_for_at_the_start_and_later() {
    let bench = Bench::new();
    let (server, mut client) = served(&bench);
    let negative = "Parameter 'speed' expects a non-negative value";
    assert_eq!(client.refused("drive-backup", bench.backup(&json!({"speed": -1}))), negative);
    assert!(!bench.path("t.raw").exists());
    let mut without = bench.backup(&json!({"auto-finalize": false}));
    without.as_object_mut().unwrap().remove("speed");
    client.does("drive-backup", without);
    assert_eq!(client.job()["speed"], 0);
    cancel(&mut client);
    client.does("drive-backup", bench.backup(&json!({"speed": 4 << 10})));
    assert_eq!(client.job()["speed"], 4 << 10);
    assert_eq!(client.refused("block-job-set-speed", json!({"device": "j", "speed": -1})), negative);
    client.does("block-job-set-speed", json!({"device": "j", "speed": 8 << 10}));
    assert_eq!(client.job()["speed"], 8 << 10);
    cancel(&mut client);
    quit(client, server);
}

#[test]
fn a_transaction_of_one_is_paused_and_completes() {
    let bench = Bench::new();
    let (server, mut client) = served(&bench);
    let action = |more: Value| json!({"type": "drive-backup", "data": bench.backup(&more)});
    client.does("transaction", json!({"actions": [action(json!({}))]}));
    pause_and_complete(&mut client);
    bench.assert_copied();
    fs::remove_file(bench.path("t.raw")).unwrap();
    let abort = json!({"type": "Abort", "data": {}});
    for (actions, expected) in [
        (vec![action(json!({"mode": "existing"}))], "Could not open '"),
        (vec![action(json!({"target": text(&bench.path("disk.raw"))}))], "Source and target cannot be the same"),
        (vec![action(json!({})), abort], "Parameter 'type' does not accept value 'Abort'"),
        (vec![action(json!({})), action(json!({}))], "Target '"),
    ] {
        let refused = client.refused("transaction", json!({"actions": actions}));
        assert!(refused.starts_with(expected), "{refused}");
        assert_eq!(client.ask("query-jobs", json!({}))["return"], json!([]));
        assert!(!bench.path("t.raw").exists());
    }
    quit(client, server);
}

#[test]
fn a_compressed_copy_is_paused_cancelled_and_completed() {
    let bench = Bench::new();
    let (disk, target) = (bench.path("small.raw"), bench.path("t.qcow2"));
    fs::write(&disk, noise(7, SMALL)).unwrap();
    let server = bench.serve_disks(&["d0=small.raw"], &[]);
    let mut client = Client::connect(&bench.path("qmp"));
    let backup =
        bench.backup(&json!({"compress": true, "format": "qcow2", "target": text(&target), "speed": 64 << 10}));
    client.does("drive-backup", backup.clone());
    cancel(&mut client);
    assert!(!target.exists());
    client.does("drive-backup", backup);
    pause_and_complete(&mut client);
    quit(client, server);
    same(("qcow2", &target), ("raw", &disk));
    sound(&target);
    assert!(fs::metadata(&target).unwrap().len() < SMALL as u64, "it is compressed");
}
