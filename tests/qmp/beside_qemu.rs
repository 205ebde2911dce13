//! One script for qemu-storage-daemon and for us.

use crate::kit::{Bench, Client, DISK};
use crate::support::wait_for;
use serde_json::{Value, json};

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
