//! `sync`: parts of a disk.

use crate::kit::{Bench, Client, Guest};
use crate::support::bytes::{noise, same, sound};
use crate::support::{Running, qemu_img, qemu_io, text, wait_for};
use serde_json::{Value, json};
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

const TARGET_CLUSTER: u64 = 64 << 10;

/// `top.qcow2` with a bit here and there, zeroes among it, over a `base.raw` full of noise; the disk is in `disk.raw`, too.
fn layered(cluster_size: u64) -> Bench {
    let bench = Bench::new();
    let (base, top, disk) = (bench.path("base.raw"), bench.path("top.qcow2"), bench.path("disk.raw"));
    fs::write(&base, noise(1, 4 << 20)).unwrap();
    qemu_img(&format!("create -q -f qcow2 -o cluster_size={cluster_size} -F raw -b base.raw"), &[&top]);
    let writes = [
        "write -P 65 0 512",
        "write -P 213 1M 32k",
        "write -z 1536k 128k",
        "write -P 220 3M 124k",
        "write -P 51 4032k 64k",
    ];
    qemu_io(&["-f", "qcow2"], &top, &writes);
    qemu_img("convert -f qcow2 -O raw", &[&top, &disk]);
    bench
}

/// For each cluster of a target, whether the image itself holds it.
fn held(image: &Path) -> Vec<bool> {
    let map = qemu_img("map -U -f qcow2 --output=json", &[image]);
    let map: Value = serde_json::from_str(&map).unwrap();
    let number = |extent: &Value, name: &str| extent[name].as_u64().unwrap();
    let extents: Vec<&Value> = map.as_array().unwrap().iter().collect();
    let length = extents.iter().map(|extent| number(extent, "start") + number(extent, "length")).max().unwrap();
    let mut held = vec![false; length.div_ceil(TARGET_CLUSTER) as usize];
    for extent in extents.into_iter().filter(|extent| extent["depth"] == 0) {
        let (start, length) = (number(extent, "start"), number(extent, "length"));
        let clusters = start / TARGET_CLUSTER..(start + length).div_ceil(TARGET_CLUSTER);
        clusters.for_each(|cluster| held[cluster as usize] = true);
    }
    held
}

fn backing_of(image: &Path) -> (String, String) {
    let info: Value = serde_json::from_str(&qemu_img("info -U --output=json", &[image])).unwrap();
    let word = |name: &str| info[name].as_str().unwrap_or_default().to_owned();
    (word("backing-filename"), word("backing-filename-format"))
}

fn top(bench: &Bench, target: &str, speed: u64) -> Value {
    json!({"device": "d0", "job-id": "j", "target": text(&bench.path(target)), "sync": "top", "speed": speed})
}

fn quit(mut client: Client, server: Running) {
    client.ask("quit", json!({}));
    assert_eq!(server.ended().code, 0);
}

#[test]
fn top_copies_what_the_image_holds_as_qemu_does() {
    let bench = layered(TARGET_CLUSTER);
    let source = held(&bench.path("top.qcow2"));
    assert_eq!(source.iter().filter(|held| **held).count(), 7);
    let server = bench.serve_disks(&["d0=top.qcow2"], &[]);
    let mut client = Client::connect(&bench.path("qmp"));
    let raw = json!({"device": "d0", "target": text(&bench.path("t.raw")), "sync": "top", "format": "raw"});
    assert_eq!(client.refused("drive-backup", raw), "Backing file not supported for file format 'raw'");
    assert!(!bench.path("t.raw").exists());
    client.does("drive-backup", top(&bench, "t.qcow2", 0));
    client.until_status("null");
    quit(client, server);
    let qemus = bench.path("qemus");
    fs::create_dir(&qemus).unwrap();
    let mut daemon = Command::new("qemu-storage-daemon");
    daemon.args(["--chardev", &format!("socket,id=c,path={},server=on,wait=off", text(&qemus.join("qmp")))]);
    daemon.args(["--monitor", "chardev=c,mode=control"]).stdout(Stdio::null());
    daemon.args(["--blockdev", &format!("file,filename={},node-name=f0", text(&bench.path("top.qcow2")))]);
    let _qemu = Running::start(daemon.args(["--blockdev", "qcow2,file=f0,node-name=d0"]));
    let mut client = Client::connect(&qemus.join("qmp"));
    let mut theirs = top(&bench, "qemus/t.qcow2", 0);
    theirs["format"] = "qcow2".into();
    client.does("drive-backup", theirs);
    client.until_status("null");
    let ours = bench.path("t.qcow2");
    for target in [&ours, &qemus.join("t.qcow2")] {
        assert_eq!(backing_of(target), (text(&bench.path("base.raw")).to_owned(), "raw".to_owned()));
        assert_eq!(held(target), source, "{}", target.display());
        same(("qcow2", target), ("raw", &bench.path("disk.raw")));
    }
    sound(&ours);
}

#[test]
fn top_is_of_the_instant_whatever_is_written_later() {
    for cluster_size in [4 << 10, TARGET_CLUSTER] {
        let bench = layered(cluster_size);
        let source = held(&bench.path("top.qcow2"));
        let server = bench.serve_disks(&["d0=top.qcow2"], &[]);
        let mut client = Client::connect(&bench.path("qmp"));
        let mut guest = Guest::of(&bench, "d0");
        client.does("drive-backup", top(&bench, "t.qcow2", 1));
        // In what is unallocated, whole and in part; in zeroes; in data; over the borders of all of them.
        for (offset, length) in [
            (2 << 20, 64 << 10),
            ((2560 << 10) + 4096, 512),
            (1536 << 10, 4096),
            (3 << 20, 512),
            (960 << 10, 256 << 10),
        ] {
            guest.write(9, offset, length);
        }
        client.does("block-job-set-speed", json!({"device": "j", "speed": 0}));
        client.until_status("null");
        assert_eq!(held(&bench.path("t.qcow2")), source, "with clusters of {cluster_size}");
        drop(guest);
        quit(client, server);
        same(("qcow2", &bench.path("t.qcow2")), ("raw", &bench.path("disk.raw")));
    }
}

#[test]
fn an_image_without_a_backing_file_is_its_own_top() {
    let bench = Bench::new();
    let server = bench.serve();
    let mut client = Client::connect(&bench.path("qmp"));
    client.does("drive-backup", bench.backup(&json!({"sync": "top", "speed": 0})));
    client.until_status("null");
    bench.assert_copied();
    quit(client, server);
}

#[test]
fn none_keeps_what_is_overwritten_until_it_is_cancelled() {
    for mode in ["absolute-paths", "existing"] {
        let bench = Bench::new();
        let (target, before) = (bench.path("t.qcow2"), bench.disk());
        if mode == "existing" {
            qemu_img("create -q -f qcow2 -F raw -b disk.raw", &[&target]);
        }
        let server = bench.serve();
        let mut client = Client::connect(&bench.path("qmp"));
        let mut guest = Guest::of(&bench, "d0");
        let refused = client.refused("drive-backup", bench.backup(&json!({"sync": "none"})));
        assert_eq!(refused, "Backing file not supported for file format 'raw'");
        assert!(!bench.path("t.raw").exists());
        let none = json!({"sync": "none", "format": "qcow2", "target": text(&target), "mode": mode, "speed": 0});
        client.does("drive-backup", bench.backup(&none));
        guest.write(9, 1 << 20, 64 << 10);
        guest.write(10, (1 << 20) + 512, 1024);
        guest.write(11, (5 << 20) + 512, 1024);
        let moved = |client: &mut Client| client.job()["offset"].as_u64() >= Some(2 * TARGET_CLUSTER);
        wait_for("both clusters", || moved(&mut client).then_some(()));
        client.does("job-pause", json!({"id": "j"}));
        client.wait_for_status("paused");
        guest.write(12, 9 << 20, 512);
        // What was saved until now is still moved.
        client.does("block-job-cancel", json!({"device": "j", "force": true}));
        let life = client.until_status("null");
        assert_eq!(life[life.len() - 4..], ["aborting", "BLOCK_JOB_CANCELLED", "concluded", "null"]);
        drop(guest);
        quit(client, server);
        let kept: Vec<usize> = held(&target).iter().enumerate().filter_map(|(n, held)| held.then_some(n)).collect();
        assert_eq!(kept, [16, 80, 144], "{mode}");
        sound(&target);
        let together = bench.path("together.raw");
        qemu_img("convert -f qcow2 -O raw", &[&target, &together]);
        assert!(fs::read(&together).unwrap() == before, "{mode}");
        let named = if mode == "existing" { "disk.raw".to_owned() } else { text(&bench.path("disk.raw")).to_owned() };
        assert_eq!(backing_of(&target), (named, "raw".to_owned()));
    }
}
