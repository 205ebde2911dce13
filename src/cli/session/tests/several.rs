//! Several disks in one run: a job each, all or none abandoned, one exit code.

use super::*;

fn disks() -> Vec<Options> {
    use clap::Parser;
    let flags = ["drive-backup", "--device", "a", "--target", "x", "--device", "b", "--target", "y"];
    crate::cli::resolve::plan(crate::cli::args::Args::parse_from(flags)).unwrap().disks
}

fn session(view: View) -> (Session, PipeReader, PipeReader) {
    let ((json, json_end), (people, people_end)) = (io::pipe().unwrap(), io::pipe().unwrap());
    let ends = Ends { json: Some(Box::new(json_end)), people: People::at(people_end), files: Files::default() };
    let session = Session::start(view, Some(1 << 20), &disks(), ends).unwrap();
    (Session { bounds: PATIENT, ..session }, json, people)
}

/// The records of each job, in the order in which they begin, each with its own count and one end.
fn by_job(end: PipeReader) -> Vec<Vec<Value>> {
    let mut jobs: Vec<Vec<Value>> = Vec::new();
    for line in text(end).lines() {
        let record: Value = serde_json::from_str(line).unwrap();
        match jobs.iter_mut().find(|records| records[0]["job"] == record["job"]) {
            Some(records) => records.push(record),
            None => jobs.push(vec![record]),
        }
    }
    for records in &jobs {
        let is_last = |record: &&Value| ["summary", "exit_error"].contains(&record["message_type"].as_str().unwrap());
        assert_eq!(records.iter().filter(is_last).count(), 1, "exactly one last record: {records:?}");
        assert!(records.last().as_ref().is_some_and(is_last), "{records:?}");
        assert!(records.is_sorted_by(|one, next| one["seq"].as_u64() < next["seq"].as_u64()), "{records:?}");
    }
    jobs
}

fn failure(kind: Kind, what: &str) -> Result<Summary, Failure> {
    Err(Failure { error: Error::new(kind, what), target: TargetState::Removed })
}

#[test]
fn each_disk_has_its_job_and_success_is_silent() {
    let (session, json, people) = session(view());
    let ending = session.run(disks(), Hooks::default(), |disks, ended| {
        assert_eq!((disks[0].options.device.clone(), disks[1].options.device.clone()), ("a".into(), "b".into()));
        disks.iter().for_each(|disk| copy(disk.job, disk.monitor));
        (0..2).rev().for_each(|place| ended(place, Ok(summary(Vec::new()))));
    });
    assert_eq!(ending, Ending::with_code(0));
    assert_eq!(text(people), "", "cron is silent on success");
    let jobs = by_job(json);
    assert_eq!(jobs.len(), 2);
    assert!(jobs.iter().all(|records| told(records, "start")["seq"].is_u64()));
}

#[test]
fn lines_name_the_disk_and_the_first_failure_is_the_exit_code() {
    let (session, json, people) = session(View { verbose: true, ..view() });
    let ending = session.run(disks(), Hooks::default(), |disks, ended| {
        begin(disks[0].job, disks[0].monitor, TargetKind::File);
        copy(disks[1].job, disks[1].monitor);
        ended(1, Ok(summary(vec![ByteRange::new(4096, 512)])));
        ended(0, failure(Kind::Target, "it broke"));
    });
    assert_eq!(ending, Ending::with_code(5));
    let codes: Vec<_> = by_job(json).iter().map(|records| records.last().unwrap()["exit_code"].clone()).collect();
    assert!(codes.contains(&5.into()) && codes.contains(&3.into()), "{codes:?}");
    let text = text(people);
    let lines: Vec<&str> = text.lines().collect();
    for part in ["a: copying ", "b: copying ", "b: source range 0x1000+512", "b: complete", "a: it broke"] {
        let found = lines.iter().filter(|line| line.starts_with(&format!("drive-backup: {part}"))).count();
        assert_eq!(found, 1, "{part}: {text}");
    }
}

#[test]
fn a_signal_cancels_all_and_what_was_published_stays_a_success() {
    let (session, json, people) = session(view());
    let wake = session.wake.clone();
    let ending = session.run(disks(), Hooks::default(), move |disks, ended| {
        disks.iter().for_each(|disk| copy(disk.job, disk.monitor));
        ended(0, Ok(summary(Vec::new())));
        wake.send(Wake::Signal(SIGTERM)).unwrap();
        disks.iter().for_each(|disk| {
            disk.job.pause();
            assert_eq!(disk.job.gate(), Gate::Cancelled);
        });
        ended(1, failure(Kind::Cancelled, "cancelled"));
    });
    assert_eq!(ending, Ending { code: 143, signal: Some(SIGTERM), abandoned: false });
    assert_eq!(text(people), "drive-backup: b: ended by SIGTERM: cancelled; the partial copy was removed\n");
    let mut ends: Vec<_> =
        by_job(json).iter().map(|records| records.last().unwrap()["message_type"].to_string()).collect();
    ends.sort();
    assert_eq!(ends, ["\"exit_error\"", "\"summary\""]);
}

#[test]
fn all_that_hang_are_undone_even_where_the_undoing_of_one_hangs() {
    let (session, json, _people) = session(view());
    // All of it goes by for the first; that of the second must be over by then.
    let undo = Duration::from_secs(3);
    let session = Session { bounds: Bounds { grace: SHORT, undo, ..PATIENT }, ..session };
    let wake = session.wake.clone();
    let (sent, at) = mpsc::channel();
    let ending = session.run(disks(), Hooks::default(), move |disks, _| {
        disks.iter().for_each(|disk| begin(disk.job, disk.monitor, TargetKind::File));
        disks[0].job.on_abandon(|| hang());
        sent.send(Instant::now()).unwrap();
        wake.send(Wake::Signal(SIGINT)).unwrap();
        hang()
    });
    let took = at.recv().unwrap().elapsed();
    assert!(took >= undo && took < BOUND, "{took:?}");
    assert_eq!(ending, Ending { code: 130, signal: Some(SIGINT), abandoned: true });
    let mut states: Vec<_> =
        by_job(json).iter().map(|records| records.last().unwrap()["target_state"].to_string()).collect();
    states.sort();
    assert_eq!(states, ["\"old_or_complete\"", "\"removed\""]);
}

#[test]
fn a_panic_fails_only_what_had_not_ended() {
    let (session, json, _people) = session(view());
    let ending = session.run(disks(), Hooks::default(), |disks, ended| {
        disks.iter().for_each(|disk| copy(disk.job, disk.monitor));
        ended(0, Ok(summary(Vec::new())));
        panic!("a bug");
    });
    assert_eq!(ending, Ending::with_code(1));
    let codes: Vec<_> = by_job(json).iter().map(|records| records.last().unwrap()["exit_code"].clone()).collect();
    assert!(codes.contains(&0.into()) && codes.contains(&1.into()), "{codes:?}");
}

#[test]
fn bad_arguments_are_one_line_and_one_record() {
    let ((json, json_end), (people, people_end)) = (io::pipe().unwrap(), io::pipe().unwrap());
    let ends = Ends { json: Some(Box::new(json_end)), people: People::at(people_end), files: Files::default() };
    let ending = Session::start(view(), None, &[], ends).unwrap().refuse(&Error::new(Kind::Usage, "no"));
    assert_eq!((ending, text(people)), (Ending::with_code(2), "drive-backup: no\n".to_owned()));
    assert_eq!(records(json).len(), 1);
}
