//! Disks that are written while they are copied.

use crate::kit::{Bench, Client, Guest};
use crate::support::{Running, text, wait_for};
use serde_json::json;
use std::fs;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;

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

const BLOCK: u64 = 64 << 10;
/// Of each of the two disks.
const BLOCKS: u64 = 64;

/// Writes block after block, round by round, now on one disk and then on the other, each when the last has been answered: write
/// `n` puts `n / BLOCKS / 2 + 1` into block `n / 2 % BLOCKS` of disk `n % 2`. Counts them.
fn write_in_turn(guests: &mut [Guest; 2], written: &AtomicU64, stop: &AtomicBool) {
    for number in 0.. {
        if stop.load(Relaxed) {
            return;
        }
        let (disk, turn) = (number % 2, number / 2);
        guests[disk as usize].write(turn / BLOCKS % 250 + 1, turn % BLOCKS * BLOCK, BLOCK);
        written.store(number + 1, Relaxed);
    }
}

/// The number of writes to one disk that a copy shows: blocks of this round, then blocks of the last one.
fn writes_in(copy: &[u8]) -> u64 {
    let rounds: Vec<u64> = copy.chunks(BLOCK as usize).map(|block| u64::from(block[0])).collect();
    assert_eq!(rounds.len() as u64, BLOCKS);
    assert!(copy.chunks(BLOCK as usize).all(|block| block.iter().all(|byte| *byte == block[0])), "a block is whole");
    let newest = rounds.iter().take_while(|round| **round == rounds[0]).count();
    assert!(rounds[newest..].iter().all(|round| *round + 1 == rounds[0]), "one row of writes: {rounds:?}");
    (rounds[0] - 1) * BLOCKS + newest as u64
}

#[test]
fn a_transaction_copies_disks_that_are_written_as_of_one_instant_and_completes_them_together() {
    let bench = Bench::new();
    for disk in ["a.raw", "b.raw"] {
        fs::write(bench.path(disk), vec![0; (BLOCKS * BLOCK) as usize]).unwrap();
    }
    let server = bench.serve_disks(&["d0=a.raw", "d1=b.raw"], &[]);
    let mut client = Client::connect(&bench.path("qmp"));
    let mut guests = [Guest::of(&bench, "d0"), Guest::of(&bench, "d1")];
    let (written, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    thread::scope(|scope| {
        scope.spawn(|| write_in_turn(&mut guests, &written, &stop));
        let stopper = Stopper(&stop);
        wait_for("two rounds", || (written.load(Relaxed) > 4 * BLOCKS).then_some(()));
        let action = |device: &str, speed: u64| {
            let target = bench.path(&format!("{device}.copy"));
            let data =
                json!({"device": device, "target": text(&target), "format": "raw", "sync": "full", "speed": speed});
            json!({"type": "drive-backup", "data": data})
        };
        let before = written.load(Relaxed);
        let grouped = json!({"completion-mode": "grouped"});
        client.does("transaction", json!({"actions": [action("d0", 0), action("d1", 1)], "properties": grouped}));
        let after = written.load(Relaxed);
        // The one is ready long before the other, and waits.
        wait_for("the first", || (status_of(&mut client, "d0") == "waiting").then_some(()));
        assert_eq!(status_of(&mut client, "d1"), "running");
        assert!(!bench.path("d0.copy").exists(), "it has no name yet");
        wait_for("a round after the instant", || (written.load(Relaxed) > after + 2 * BLOCKS).then_some(()));
        client.does("block-job-set-speed", json!({"device": "d1", "speed": 0}));
        for _ in 0..2 {
            let completed = client.until_event("BLOCK_JOB_COMPLETED");
            assert_eq!(completed["data"].get("error"), None, "{completed}");
        }
        drop(stopper);
        let copies = ["d0", "d1"].map(|device| writes_in(&fs::read(bench.path(&format!("{device}.copy"))).unwrap()));
        let both = copies[0] + copies[1];
        assert!(copies[0] == copies[1] || copies[0] == copies[1] + 1, "one instant: {copies:?}");
        // One may have been in the server and not been counted yet.
        assert!((before..=after + 1).contains(&both), "{both} writes, of {before} to {after}");
    });
    drop(guests);
    client.ask("quit", json!({}));
    assert_eq!(server.ended().code, 0);
}

/// Stops the writing, also when a test fails.
struct Stopper<'a>(&'a AtomicBool);

impl Drop for Stopper<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

fn status_of(client: &mut Client, id: &str) -> String {
    let jobs = client.ask("query-block-jobs", json!({}));
    let job = jobs["return"].as_array().unwrap().iter().find(|job| job["device"] == id).cloned();
    job.map_or_else(String::new, |job| job["status"].as_str().unwrap().to_owned())
}
