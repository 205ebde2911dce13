//! Errors of the target, and instants that are lost.

use crate::kit::{Bench, Client, DISK, Guest};
use crate::support::{Mount, qemu_img, run, text};
use serde_json::json;
use std::fs;
use std::os::unix::fs::symlink;

const ROOM: u64 = 4 << 20;

#[test]
fn a_job_that_stopped_for_a_full_target_goes_on_when_there_is_room() {
    let bench = Bench::new();
    let small = Mount::tmpfs(ROOM);
    let (target, before) = (small.join("t.raw"), bench.disk());
    let server = bench.serve();
    let mut client = Client::connect(&bench.path("qmp"));
    let mut guest = Guest::of(&bench, "d0");
    for policy in ["stop", "enospc"] {
        // Of several workers another one might fail after the resume, for what there was before.
        let arguments = json!({
            "target": text(&target), "speed": 0, "on-target-error": policy, "auto-dismiss": false,
            "x-perf": {"max-workers": 1},
        });
        client.does("drive-backup", bench.backup(&arguments));
        let error = client.until_event("BLOCK_JOB_ERROR");
        assert_eq!(error["data"], json!({"device": "j", "operation": "write", "action": "stop"}));
        let job = client.wait_for_status("paused");
        assert_eq!((&job["io-status"], &job["paused"]), (&"nospace".into(), &true.into()));
        let refused = client.refused("block-job-cancel", json!({"device": "j"}));
        assert_eq!(refused, "The block job for device 'j' is currently paused");
        let refused = client.refused("block-job-dismiss", json!({"id": "j"}));
        assert_eq!(refused, "Job 'j' in state 'paused' cannot accept command verb 'dismiss'");
        if policy == "enospc" {
            client.does("block-job-cancel", json!({"device": "j", "force": true}));
            client.until_event("BLOCK_JOB_CANCELLED");
            client.until_status("concluded");
        } else {
            // Nobody waits for the target, and it gets what there was.
            guest.write(9, DISK - (1 << 20), 1 << 20);
            run("mount", &["-o", &format!("remount,size={}", 2 * DISK), text(small.path())]);
            client.does("block-job-resume", json!({"device": "j"}));
            let completed = client.until_event("BLOCK_JOB_COMPLETED");
            assert_eq!(completed["data"].get("error"), None, "{completed}");
            client.until_status("concluded");
            let job = client.job();
            assert_eq!((&job["io-status"], job.get("error")), (&"ok".into(), None));
            assert!(fs::read(&target).unwrap() == before);
            fs::remove_file(&target).unwrap();
            run("mount", &["-o", &format!("remount,size={ROOM}"), text(small.path())]);
        }
        client.does("job-dismiss", json!({"id": "j"}));
        assert_eq!(fs::read_dir(small.path()).unwrap().count(), 0, "nothing is left");
    }
    drop(guest);
    client.ask("quit", json!({}));
    assert_eq!(server.ended().code, 0);
}

#[test]
fn a_job_that_failed_says_why_and_is_dismissed() {
    let bench = Bench::new();
    let small = Mount::tmpfs(ROOM);
    let server = bench.serve();
    let mut client = Client::connect(&bench.path("qmp"));
    let arguments = json!({"target": text(&small.join("t.raw")), "speed": 0, "auto-dismiss": false});
    client.does("drive-backup", bench.backup(&arguments));
    let error = client.until_event("BLOCK_JOB_ERROR");
    assert_eq!(error["data"]["action"], "report");
    let completed = client.until_event("BLOCK_JOB_COMPLETED");
    let why = completed["data"]["error"].as_str().unwrap();
    assert!(why.starts_with("write target at 0x") && why.ends_with("No space left on device"), "{why}");
    let job = client.wait_for_status("concluded");
    assert_eq!(job["error"], why);
    let again = client.refused("drive-backup", bench.backup(&json!({})));
    assert_eq!(again, "Job ID 'j' already in use");
    assert_eq!(fs::read_dir(small.path()).unwrap().count(), 0, "nothing is left");
    client.does("job-dismiss", json!({"id": "j"}));
    client.does("drive-backup", bench.backup(&json!({"speed": 0})));
    client.until_event("BLOCK_JOB_COMPLETED");
    client.ask("quit", json!({}));
    assert_eq!(server.ended().code, 0);
}

#[test]
fn what_can_not_be_saved_breaks_the_snapshot_or_the_write() {
    let bench = Bench::new();
    // A raw disk might be cloned, and nothing saved.
    let (disk, target) = (bench.path("disk.qcow2"), bench.path("t.raw"));
    qemu_img("convert -f raw -O qcow2", &[&bench.path("disk.raw"), &disk]);
    let overlays = Mount::tmpfs(256 << 10);
    symlink(overlays.path(), bench.path("overlays")).unwrap();
    let server = bench.serve_disks(&["d0=disk.qcow2"], &[]);
    let mut client = Client::connect(&bench.path("qmp"));
    let mut guest = Guest::of(&bench, "d0");
    client.does("drive-backup", bench.backup(&json!({"on-cbw-error": "break-guest-write", "speed": 1})));
    let said = guest.ask("write -P 9 4M 2M");
    assert!(said.contains("No space left on device"), "{said}");
    client.does("block-job-set-speed", json!({"device": "j", "speed": 0}));
    let completed = client.until_event("BLOCK_JOB_COMPLETED");
    assert_eq!(completed["data"].get("error"), None, "{completed}");
    client.until_status("null");
    bench.assert_copied();
    fs::remove_file(&target).unwrap();
    for sync in ["full", "none"] {
        let arguments = json!({
            "on-cbw-error": "break-snapshot", "speed": 1, "sync": sync, "format": "qcow2", "auto-dismiss": false,
        });
        client.does("drive-backup", bench.backup(&arguments));
        guest.write(9, 4 << 20, 2 << 20);
        let completed = client.until_event("BLOCK_JOB_COMPLETED");
        let why = completed["data"]["error"].as_str().unwrap_or_else(|| panic!("{completed}")).to_owned();
        assert!(why.contains("No space left on device"), "{sync}: {why}");
        let job = client.wait_for_status("concluded");
        assert_eq!(job["error"], why);
        assert!(!target.exists(), "{sync}: a torn copy is none");
        client.does("job-dismiss", json!({"id": "j"}));
        client.events.clear();
    }
    drop(guest);
    client.ask("quit", json!({}));
    assert_eq!(server.ended().code, 0);
}
