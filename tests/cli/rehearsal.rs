//! `--dry-run`: everything is opened and checked, nothing is touched, and what is told is true.

use crate::kit::{Bench, DISK, Records, Running, code, first, records, wait_until};
use drive_backup::writer::Writer;
use nix::libc::SIGINT;
use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::os::unix::process::ExitStatusExt;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::time::Duration;

/// A speed that finds itself is not known before.
#[test]
fn it_reckons_with_no_speed_that_nobody_asked_for() {
    let bench = Bench::new();
    for speed in [["--speed", "auto"], ["--finish-by", "2100-01-01"]] {
        let output = bench.backup().args(["--dry-run", "--json"]).args(speed).output().unwrap();
        assert_eq!(code(output.status), 0);
        let records = records(&output.stdout);
        let plan = first(&records, "plan");
        let [read_speed, seconds] = ["read_speed", "seconds"].map(|name| plan[name].as_f64().unwrap());
        assert!((seconds * read_speed / DISK as f64 - 1.0).abs() < 1e-3, "{plan}");
        assert!(!String::from_utf8(output.stderr).unwrap().contains("; asked for"));
    }
}

#[test]
fn it_tells_what_a_backup_would_take_and_leaves_nothing() {
    let bench = Bench::new();
    File::options().write(true).open(bench.path("disk.raw")).unwrap().set_len(4 * DISK).unwrap();
    let before = fs::metadata(bench.path("disk.raw")).unwrap();
    let hook = ["--hook-before", "touch ran", "--hook-after", "touch ran"];
    let output = bench.backup().args(["--dry-run", "--json", "--speed", "1M"]).args(hook).output().unwrap();
    assert_eq!(code(output.status), 0);
    let records = records(&output.stdout);
    let plan = first(&records, "plan");
    assert_eq!(plan["device"]["virtual_size"], 4 * DISK);
    assert_eq!((&plan["bytes_data"], &plan["seconds"]), (&DISK.into(), &16.0.into()));
    assert_eq!((&plan["target"]["format"], &plan["target"]["kind"]), (&"raw".into(), &"file".into()));
    assert!(plan["target_free"].as_u64() > Some(0) && plan["read_speed"].as_u64() > Some(0));
    assert_eq!((&plan["writers"], &plan["overlay_most"]), (&0.into(), &serde_json::Value::Null));
    assert_eq!(records.last().unwrap()["result"], "planned");
    assert!(!records.iter().any(|record| record["message_type"] == "start"), "{records:?}");
    assert!(bench.leftovers().is_empty(), "{:?}", bench.leftovers());
    let after = fs::metadata(bench.path("disk.raw")).unwrap();
    assert_eq!((before.mtime_nsec(), before.ctime_nsec()), (after.mtime_nsec(), after.ctime_nsec()));
    let text = String::from_utf8(output.stderr).unwrap();
    for words in [
        "B free there",
        "of which 16.0 MiB is data",
        "time: 0:16 or more; asked for 1.00 MiB/s",
        "writers: none",
        "dry run",
    ] {
        assert!(text.contains(words), "{words} in {text}");
    }
}

#[test]
fn an_old_copy_stays_as_it_is() {
    let bench = Bench::new();
    fs::write(bench.path("out.raw"), "the old copy").unwrap();
    for flags in [&["--format", "qcow2"][..], &["--format", "raw"]] {
        assert_eq!(code(bench.backup().arg("--dry-run").args(flags).output().unwrap().status), 0);
        assert_eq!(fs::read_to_string(bench.path("out.raw")).unwrap(), "the old copy");
    }
    fs::write(bench.path("same"), vec![7; DISK as usize]).unwrap();
    let existing = ["--device", "disk.raw", "--target", "same", "--mode", "existing", "--dry-run"];
    assert_eq!(code(bench.bare().args(existing).output().unwrap().status), 0);
    assert!(fs::read(bench.path("same")).unwrap().iter().all(|byte| *byte == 7));
}

#[test]
fn what_a_backup_would_refuse_it_refuses() {
    let bench = Bench::new();
    fs::write(bench.path("small"), "x").unwrap();
    for (flags, status) in [
        (&["--device", "missing", "--target", "o"][..], 4),
        (&["--device", "disk.raw", "--target", "missing/o"], 5),
        (&["--device", "disk.raw", "--target", "small", "--mode", "existing"], 2),
        (&["--device", "disk.raw", "--target", "disk.raw"], 2),
        (&["--device", "disk.raw", "--source-format", "qcow2", "--target", "o"], 4),
        (&["--device", "disk.raw", "--target", "o", "--writer", "required"], 4),
    ] {
        let output = bench.bare().args(flags).args(["--dry-run", "--writer-dir", "meet"]).output().unwrap();
        assert_eq!(code(output.status), status, "{flags:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

#[test]
fn of_several_disks_it_names_the_one_at_fault() {
    let bench = Bench::new();
    let ends = ["--device", "disk.raw", "--target", "o", "--device", "missing", "--target", "p"];
    let [real, dry] = [&[][..], &["--dry-run"]].map(|flag| bench.bare().args(ends).args(flag).output().unwrap());
    assert_eq!((code(real.status), code(dry.status)), (4, 4));
    let [real, dry] = [real.stderr, dry.stderr].map(|text| String::from_utf8(text).unwrap());
    let mut lines = [&real, &dry].map(|text| text.lines().collect::<Vec<_>>());
    lines.iter_mut().for_each(|lines| lines.sort_unstable());
    assert_eq!(lines[0], lines[1]);
    assert!(dry.contains("disk.raw: not started, since another disk"), "{dry}");
}

#[test]
fn writers_are_counted_and_their_rate_is_measured() {
    let bench = Bench::new();
    let (disk, meet) = (bench.path("disk.raw"), bench.path("meet"));
    let writer = Writer::open_in(&disk, &meet).unwrap();
    let file = File::options().write(true).open(&disk).unwrap();
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            // Sixteen clusters, over and over: the overlay would hold each once.
            for number in (0..16).cycle().take_while(|_| !is_over.load(Relaxed)) {
                let _write = writer.begin(number * 4096, 512).unwrap();
                file.write_all_at(&[7; 512], number * 4096).unwrap();
                std::thread::sleep(Duration::from_millis(1));
            }
        });
        let mut command = bench.backup();
        command.args(["--dry-run", "--json", "--speed", "1M", "--writer-dir"]).arg(&meet);
        let output = command.output().unwrap();
        is_over.store(true, Relaxed);
        assert_eq!(code(output.status), 0, "{}", String::from_utf8_lossy(&output.stderr));
        let mut records = records(&output.stdout).into_iter();
        let plan = records.find(|record| record["message_type"] == "plan").unwrap();
        assert_eq!(plan["writers"], 1);
        let rate = plan["write_rate"].as_u64().unwrap();
        assert!((16 << 10..=64 << 10).contains(&rate), "64 KiB in a good second: {rate}");
        let most = plan["overlay_most"].as_u64().unwrap();
        assert!((15 * rate..=17 * rate).contains(&most), "16 s of it: {most}");
    });
    drop(writer);
    assert_eq!(bench.leftovers(), ["meet"]);
}

/// Interrupts one while it watches its writers. Did it come back by itself before that was over?
fn is_cancelled() -> bool {
    let bench = Bench::new();
    let (disk, meet) = (bench.path("disk.raw"), bench.path("meet"));
    let writer = Writer::open_in(&disk, &meet).unwrap();
    let mut command = bench.backup();
    command.args(["--dry-run", "--json", "--writer-dir"]).arg(&meet);
    let mut rehearsal = Running::start(command.stdout(Stdio::piped()).stderr(Stdio::piped()));
    // Its writers are watched for a second from here on.
    wait_until("the writer is watched", || writer.would_wait(0, 512));
    rehearsal.signal(SIGINT);
    let records: Vec<_> = Records::of(&mut rehearsal).collect();
    let status = rehearsal.wait();
    wait_until("the writer was let go", || !writer.would_wait(0, 512));
    assert_eq!(bench.leftovers(), ["meet"]);
    let last = records.last().unwrap();
    println!("{status}, {last}");
    if last["result"] == "planned" {
        return false;
    }
    assert_eq!(status.signal(), Some(SIGINT));
    assert_eq!((&last["message_type"], &last["reason"]), (&"exit_error".into(), &"signal".into()));
    assert_eq!((&last["exit_code"], &last["target_state"]), (&130.into(), &"untouched".into()));
    assert!(!records.iter().any(|record| record["message_type"] == "plan"), "{records:?}");
    last["message"].as_str().unwrap().starts_with("ended by SIGINT: cancelled")
}

/// A busy machine may be late with the signal, or give it up, but not each time.
#[test]
fn one_that_is_cancelled_ends_as_cancelled_and_plans_nothing() {
    assert!((0..5).any(|_| is_cancelled()), "it plans all the same, or hangs");
}

#[test]
fn a_restore_is_rehearsed_too() {
    let bench = Bench::new();
    fs::write(bench.path("there"), vec![7; DISK as usize]).unwrap();
    let restore = ["restore", "disk.raw", "--target"];
    for (target, flags) in [("new", &[][..]), ("there", &["--mode", "existing", "--only-changed"])] {
        let mut command = bench.bare();
        let hook = ["--hook-before", "touch ran", "--hook-after", "touch ran"];
        let output = command.args(restore).arg(target).args(flags).args(hook).args(["--dry-run", "--json"]).output();
        let output = output.unwrap();
        assert_eq!(code(output.status), 0, "{}", String::from_utf8_lossy(&output.stderr));
        let records = records(&output.stdout);
        assert_eq!(first(&records, "plan")["bytes_data"], DISK);
        assert_eq!(records.last().unwrap()["result"], "planned");
        assert_eq!(bench.leftovers(), ["there"]);
        assert!(fs::read(bench.path("there")).unwrap().iter().all(|byte| *byte == 7));
    }
    fs::write(bench.path("small"), "x").unwrap();
    let refused = [&restore[..], &["small", "--mode", "existing", "--dry-run"]].concat();
    assert_eq!(code(bench.bare().args(refused).output().unwrap().status), 2);
}
