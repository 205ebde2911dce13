//! Each verb in each status, asked of qemu-storage-daemon, of us, and of the table.

use crate::kit::{Bench, Client};
use crate::support::{Running, sparse_file, text, wait_for};
use drive_backup::ground::life::{Status, Verb};
use serde_json::{Value, json};
use std::process::{Command, Stdio};

/// Those in which a backup can be found from outside. The others pass too fast.
const OF_BACKUPS: [Status; 5] = [Status::Running, Status::Paused, Status::Waiting, Status::Pending, Status::Concluded];

fn status(client: &mut Client) -> Option<String> {
    let jobs = client.ask("query-jobs", json!({}));
    let job = jobs["return"].as_array().unwrap().iter().find(|job| job["id"] == "j")?.clone();
    Some(job["status"].as_str().unwrap().to_owned())
}

fn until(client: &mut Client, wanted: Status) {
    wait_for(wanted.name(), || (status(client).as_deref() == Some(wanted.name())).then_some(()));
}

/// Brings job `j` into a status: `start` makes the arguments of a backup of the first or second disk.
fn reach(client: &mut Client, wanted: Status, command: &str, start: &dyn Fn(usize, &str) -> Value) {
    let with = |name: &str, value: Value| {
        let mut arguments = start(0, "j");
        arguments[name] = value;
        arguments
    };
    let action = |data: Value| json!({"type": command, "data": data});
    match wanted {
        Status::Running | Status::Paused => client.does(command, with("speed", 1.into())),
        Status::Pending => client.does(command, with("auto-finalize", false.into())),
        Status::Concluded => client.does(command, with("auto-dismiss", false.into())),
        Status::Waiting => {
            let mut slow = start(1, "k");
            slow["speed"] = 1.into();
            let actions = [action(start(0, "j")), action(slow)];
            client.does("transaction", json!({"actions": actions, "properties": {"completion-mode": "grouped"}}));
        }
        // A backup never is.
        _ => client.does("blockdev-mirror", start(0, "j")),
    }
    match wanted {
        Status::Paused => client.does("job-pause", json!({"id": "j"})),
        Status::Standby => {
            until(client, Status::Ready);
            client.does("job-pause", json!({"id": "j"}));
        }
        _ => {}
    }
    until(client, wanted);
}

/// What was said to `verb`: nothing, or why not.
fn say(client: &mut Client, verb: Verb) -> String {
    let answer = match verb {
        Verb::SetSpeed => client.ask("block-job-set-speed", json!({"device": "j", "speed": 5})),
        Verb::Change => {
            client.ask("block-job-change", json!({"id": "j", "type": "mirror", "copy-mode": "write-blocking"}))
        }
        verb => client.ask(&format!("job-{}", verb.name()), json!({"id": "j"})),
    };
    answer["error"]["desc"].as_str().unwrap_or_default().to_owned()
}

fn clear(client: &mut Client) {
    wait_for("the end of all jobs", || {
        let jobs = client.ask("query-jobs", json!({}))["return"].take();
        for job in jobs.as_array().unwrap() {
            // What can't be done in its status is refused.
            client.ask("job-cancel", json!({"id": job["id"]}));
            client.ask("job-dismiss", json!({"id": job["id"]}));
        }
        (jobs == json!([])).then_some(())
    });
    client.events.clear();
}

/// What each verb is answered in this status, each time by another job.
fn row(client: &mut Client, of: Status, command: &str, start: &dyn Fn(usize, &str) -> Value) -> Vec<(Verb, String)> {
    let verbs = Verb::ALL.into_iter();
    verbs
        .map(|verb| {
            reach(client, of, command, start);
            let said = say(client, verb);
            clear(client);
            (verb, said)
        })
        .collect()
}

#[test]
fn every_verb_in_every_status_is_answered_as_by_qemu_and_as_the_table_says() {
    let (theirs, ours) = (Bench::new(), Bench::new());
    let mut daemon = Command::new("qemu-storage-daemon");
    daemon.args(["--chardev", &format!("socket,id=c,path={},server=on,wait=off", text(&theirs.path("qmp")))]);
    daemon.args(["--monitor", "chardev=c,mode=control"]).stdout(Stdio::null()).stderr(Stdio::null());
    for node in 0..4 {
        daemon.args(["--blockdev", &format!("null-co,size={},read-zeroes=off,node-name=n{node}", 8 << 20)]);
    }
    let _qemu = Running::start(&mut daemon);
    let mut qemu = Client::connect(&theirs.path("qmp"));
    let of_qemu = |disk: usize, id: &str| {
        let (device, target) = (format!("n{}", 2 * disk), format!("n{}", 2 * disk + 1));
        json!({"device": device, "target": target, "sync": "full", "job-id": id})
    };
    for disk in ["a.raw", "b.raw"] {
        sparse_file(&ours.path(disk), 1 << 20);
        crate::support::bytes::scribble(&ours.path(disk), 0, 1 << 20);
    }
    let _server = ours.serve_disks(&["d0=a.raw", "d1=b.raw"], &[]);
    let mut us = Client::connect(&ours.path("qmp"));
    let of_us = |disk: usize, id: &str| {
        let target = ours.path(&format!("t{disk}.raw"));
        json!({"device": format!("d{disk}"), "target": text(&target), "sync": "full", "job-id": id})
    };
    for status in OF_BACKUPS.into_iter().chain([Status::Ready, Status::Standby]) {
        let theirs = row(&mut qemu, status, "blockdev-backup", &of_qemu);
        for (verb, said) in &theirs {
            // Says nothing of the status.
            if said != "Can't resume a job that was not paused" {
                let accepts = !said.contains("cannot accept command verb");
                assert_eq!(accepts, status.accepts(*verb), "{} in {}: {said}", verb.name(), status.name());
            }
        }
        if OF_BACKUPS.contains(&status) {
            let ours = row(&mut us, status, "drive-backup", &of_us);
            for (ours, theirs) in ours.into_iter().zip(theirs).filter(|((verb, _), _)| *verb != Verb::Change) {
                assert_eq!(ours, theirs, "in {}", status.name());
            }
        }
    }
}
