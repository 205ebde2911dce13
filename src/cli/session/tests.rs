use super::*;
use crate::ground::policy::Action;
use crate::ground::range::ByteRange;
use crate::ground::status::Phase;
use crate::job::Gate;
use crate::monitor::{self, Event, Monitor, Started};
use serde_json::Value;
use signal_hook::consts::{SIGINT, SIGTERM};
use std::io::{self, PipeReader, Read};
use std::path::PathBuf;
use std::sync::mpsc;
use std::time::SystemTime;

const BOUND: Duration = Duration::from_secs(20);
/// What hangs is waited for so long.
const SHORT: Duration = Duration::from_millis(50);
/// Nothing is late, however busy the machine is.
const PATIENT: Bounds = Bounds { grace: BOUND, undo: BOUND, signal: BOUND, last_record: BOUND, impatient: BOUND };
const TOTAL: u64 = 4 << 20;

/// Within a second of a signal, with a moment for what nobody waits for.
const _: () = assert!(BOUNDS.grace.as_millis() + BOUNDS.undo.as_millis() < BOUNDS.signal.as_millis());
const _: () = assert!(BOUNDS.signal.as_millis() < 1000 && BOUNDS.impatient.as_millis() < 1000);

fn options() -> Options {
    use clap::Parser;
    let flags = ["drive-backup", "--device", "d", "--target", "t"];
    super::super::resolve::plan(super::super::args::Args::parse_from(flags)).unwrap().disks.remove(0)
}

fn view() -> View {
    View {
        json: None,
        status_interval: Duration::from_millis(100),
        style: Style::None,
        quiet: false,
        verbose: false,
        dry_run: false,
    }
}

/// A session, and what its readers would read.
fn session(view: View) -> (Session, PipeReader, PipeReader) {
    let ((json, json_end), (people, people_end)) = (io::pipe().unwrap(), io::pipe().unwrap());
    let ends = Ends { json: Some(Box::new(json_end)), people: People::at(people_end), files: Files::default() };
    let session = Session::start(view, None, &[options()], ends).unwrap();
    (Session { bounds: PATIENT, ..session }, json, people)
}

/// Runs `engine` and reads everything.
fn run<E>(view: View, engine: E) -> (Ending, Vec<Value>, String)
where
    E: FnOnce(&Options, &Arc<Job>, &dyn Monitor) -> Result<Summary, Failure> + Send + 'static,
{
    let (session, json, people) = session(view);
    let [json, people] = [json, people].map(reading);
    let ending = run_one(session, engine);
    (ending, records_of(&all_of(&json)), all_of(&people))
}

/// Runs `engine` as one that knows one disk.
fn run_one<E>(session: Session, engine: E) -> Ending
where
    E: FnOnce(&Options, &Arc<Job>, &dyn Monitor) -> Result<Summary, Failure> + Send + 'static,
{
    session.run(vec![options()], Hooks::default(), move |disks, ended| {
        let Disk { options, job, monitor } = disks[0];
        ended(0, engine(options, job, monitor));
    })
}

/// Reads everything up to the end, on a thread.
fn reading(mut end: PipeReader) -> mpsc::Receiver<String> {
    let (send, text) = mpsc::channel();
    thread::spawn(move || {
        let mut text = String::new();
        end.read_to_string(&mut text).unwrap();
        send.send(text)
    });
    text
}

fn all_of(read: &mpsc::Receiver<String>) -> String {
    read.recv_timeout(BOUND).expect("the end of the stream")
}

fn text(end: PipeReader) -> String {
    all_of(&reading(end))
}

fn records(end: PipeReader) -> Vec<Value> {
    records_of(&text(end))
}

fn records_of(text: &str) -> Vec<Value> {
    let records: Vec<Value> = text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let is_last = |record: &&Value| ["summary", "exit_error"].contains(&record["message_type"].as_str().unwrap());
    assert_eq!(records.iter().filter(is_last).count(), 1, "exactly one last record: {records:?}");
    assert!(records.last().as_ref().is_some_and(is_last), "the last record is the last: {records:?}");
    records
}

/// The first record of this kind.
fn told<'a>(records: &'a [Value], kind: &str) -> &'a Value {
    records.iter().find(|record| record["message_type"] == kind).unwrap_or_else(|| panic!("{kind}: {records:?}"))
}

fn begin(job: &Job, monitor: &dyn Monitor, target_kind: TargetKind) {
    job.set_total(TOTAL);
    job.enter(Phase::Copy);
    monitor.event(Event::Started(&Started {
        device: PathBuf::from("d"),
        source_format: "raw",
        virtual_size: TOTAL,
        target: Some(PathBuf::from("t")),
        target_format: "qcow2",
        target_kind,
        point_in_time: SystemTime::now(),
        instant: monitor::Instant::Unchanging,
        writers: 0,
        frozen: None,
    }));
}

fn summary(unreadable: Vec<ByteRange>) -> Summary {
    Summary {
        total: TOTAL,
        data: 3 << 20,
        zero: 1 << 20,
        durable: true,
        consistent: true,
        verified: None,
        hash: None,
        written: None,
        unreadable,
        skipped: Vec::new(),
    }
}

fn copy(job: &Job, monitor: &dyn Monitor) {
    begin(job, monitor, TargetKind::File);
    job.count_data(3 << 20);
    job.count_zero(1 << 20);
}

fn no_space() -> Error {
    let full = io::Error::from_raw_os_error(28);
    Error::io(crate::error::Side::Target, "write", ByteRange::new(65536, 4096), full)
}

/// Hangs as a write to a dead target does; nobody ever joins it.
fn hang() -> ! {
    loop {
        thread::park();
    }
}

#[test]
fn a_good_run_ends_with_a_summary_and_says_nothing() {
    let (ending, records, people) = run(view(), |options, job, monitor| {
        assert_eq!(options.device, "d".into());
        copy(job, monitor);
        Ok(summary(Vec::new()))
    });
    assert_eq!(ending, Ending::with_code(0));
    assert_eq!(people, "", "cron is silent on success");
    let start = told(&records, "start");
    assert_eq!((&start["target"]["path"], &start["target"]["format"]), (&"t".into(), &"qcow2".into()));
    let last = records.last().unwrap();
    assert_eq!((&last["result"], &last["exit_code"], &last["durable"]), (&"complete".into(), &0.into(), &true.into()));
    assert_eq!((&last["bytes_done"], &last["total_bytes"]), (&TOTAL.into(), &TOTAL.into()));
}

#[test]
fn verbose_says_what_was_done() {
    let (_, _, people) = run(View { verbose: true, ..view() }, |_, job, monitor| {
        copy(job, monitor);
        Ok(summary(Vec::new()))
    });
    let lines: Vec<&str> = people.lines().collect();
    assert!(lines[0].starts_with("drive-backup: copying 'd' (raw, 4.00 MiB) to 't' (qcow2, new file)"), "{people}");
    assert!(lines[1].starts_with("drive-backup: complete: 4.00 MiB, 3.00 MiB of it data"), "{people}");
}

#[test]
fn missing_ranges_are_exit_3_and_listed_for_everybody() {
    let (ending, records, people) = run(View { quiet: true, ..view() }, |_, job, monitor| {
        copy(job, monitor);
        Ok(summary(vec![ByteRange::new(4096, 512)]))
    });
    assert_eq!(ending, Ending::with_code(3));
    assert_eq!(people, "drive-backup: source range 0x1000+512 could not be read: it is zeroes in the copy\n");
    let last = records.last().unwrap();
    assert_eq!(last["unreadable"][0]["offset"], 4096);
    assert_eq!((&last["result"], &last["exit_code"]), (&"not_whole".into(), &3.into()));
}

#[test]
fn an_inconsistent_copy_is_called_so() {
    let (ending, records, people) =
        run(view(), |_, _, _| Ok(Summary { consistent: false, durable: false, ..summary(Vec::new()) }));
    assert_eq!(ending, Ending::with_code(0));
    assert!(people.contains("INCONSISTENT"), "{people}");
    let last = records.last().unwrap();
    assert_eq!((&last["consistent"], &last["durable"]), (&false.into(), &false.into()));
}

#[test]
fn every_kind_of_failure_has_its_code_and_its_target_state() {
    for (kind, code, state) in [
        (Kind::Usage, 2, TargetState::Untouched),
        (Kind::Source, 4, TargetState::Removed),
        (Kind::Target, 5, TargetState::Incomplete),
        (Kind::InstantLost, 6, TargetState::Removed),
        (Kind::Busy, 8, TargetState::Untouched),
        (Kind::Other, 1, TargetState::Removed),
    ] {
        let (ending, records, people) = run(view(), move |_, job, monitor| {
            begin(job, monitor, TargetKind::File);
            Err(Failure { error: Error::new(kind, "it broke"), target: state })
        });
        assert_eq!(ending, Ending::with_code(code), "{kind:?}");
        let last = records.last().unwrap();
        assert_eq!((&last["exit_code"], &last["target_state"]), (&code.into(), &state.name().into()), "{kind:?}");
        assert!(people.starts_with("drive-backup: it broke"), "{people}");
        assert_eq!(people.contains("INCOMPLETE"), state == TargetState::Incomplete, "{people}");
        assert_eq!(people.lines().count(), 1, "{people}");
    }
}

#[test]
fn a_fault_is_told_with_its_place_and_once() {
    let (_, records, people) = run(view(), |_, job, monitor| {
        begin(job, monitor, TargetKind::File);
        monitor.event(Event::Fault { error: &no_space(), action: Action::Report });
        Err(Failure { error: no_space(), target: TargetState::Removed })
    });
    let fault = told(&records, "error");
    assert_eq!((&fault["errno"], &fault["errno_num"]), (&"ENOSPC".into(), &28.into()));
    assert_eq!((&fault["offset"], &fault["length"], &fault["fatal"]), (&65536.into(), &4096.into(), &true.into()));
    assert_eq!(
        (&fault["side"], &fault["during"], &fault["action"]),
        (&"target".into(), &"write".into(), &"report".into())
    );
    assert_eq!(fault["path"], "t");
    let line = "drive-backup: write target at 0x10000+4096: No space left on device; the partial copy was removed\n";
    assert_eq!(people, line);
}

#[test]
fn a_dying_disk_does_not_flood_people() {
    let (_, records, people) = run(view(), |_, job, monitor| {
        begin(job, monitor, TargetKind::File);
        let range = Some(ByteRange::new(65536, 4096));
        let skipped = monitor::Warning { code: "skipped_range", range, errno: None, message: "skipped".to_owned() };
        for _ in 0..150 {
            monitor.event(Event::Fault { error: &no_space(), action: Action::Ignore });
            monitor.event(Event::Warning(&skipped));
        }
        Ok(summary(Vec::new()))
    });
    assert_eq!(people.lines().count(), 101, "{people}");
    for told in ["error", "warning"] {
        assert_eq!(records.iter().filter(|record| record["message_type"] == told).count(), 150);
    }
}

#[test]
fn a_deadline_after_the_end_does_not_change_how_it_ended() {
    use TargetState::{Complete, Removed, Untouched};
    let (early, late) =
        ("the time of --timeout was up before the copy", "the time of --timeout was up during --hook-after");
    for (kind, state, code, message) in [
        (Kind::Cancelled, Removed, 10, early),
        (Kind::Cancelled, Complete, 10, late),
        (Kind::Source, Untouched, 4, "it broke"),
        (Kind::Hook, Complete, 9, "it broke"),
    ] {
        let (session, json, people) = session(view());
        session.wake.send(Wake::Late("--timeout")).unwrap();
        let ending = run_one(session, move |_, job, _| {
            // As a hook that was under way.
            while !job.is_cancelled() {
                thread::yield_now();
            }
            Err(Failure { error: Error::new(kind, "it broke"), target: state })
        });
        assert_eq!(ending, Ending::with_code(code), "{kind:?} {state:?}");
        assert_eq!(records(json).last().unwrap()["exit_code"], code);
        let people = text(people);
        assert!(people.starts_with(&format!("drive-backup: {message}")), "{people}");
    }
}

#[test]
fn a_panic_of_the_engine_is_an_ordinary_failure() {
    let (ending, records, _) = run(view(), |_, job, monitor| {
        begin(job, monitor, TargetKind::File);
        panic!("a bug");
    });
    assert_eq!(ending, Ending::with_code(1));
    let last = records.last().unwrap();
    assert_eq!((&last["reason"], &last["target_state"]), (&"other".into(), &"removed".into()));
}

#[test]
fn statuses_come_by_the_clock_and_with_every_pause() {
    let (session, json, _people) = session(view());
    let job = Arc::clone(&session.disks[0].job);
    let (seen, done) = mpsc::channel();
    let read = thread::spawn(move || {
        let mut statuses = Vec::new();
        for line in io::BufRead::lines(io::BufReader::new(json)) {
            let record: Value = serde_json::from_str(&line.unwrap()).unwrap();
            if record["message_type"] == "status" {
                let paused = record["status"] == "paused";
                statuses.push(record);
                if paused {
                    job.resume();
                    let _ = seen.send(());
                }
            } else if record["message_type"] == "summary" {
                break;
            }
        }
        statuses
    });
    let ending = run_one(session, move |_, job, monitor| {
        begin(job, monitor, TargetKind::File);
        job.count_data(TOTAL / 2);
        let tell = || monitor.event(Event::Fault { error: &no_space(), action: Action::Stop });
        assert_eq!(job.stop_for_error(tell), Gate::Go);
        done.recv_timeout(BOUND).unwrap();
        Ok(summary(Vec::new()))
    });
    assert_eq!(ending, Ending::with_code(0));
    let statuses = read.join().unwrap();
    let paused = statuses.iter().find(|status| status["status"] == "paused").unwrap();
    assert_eq!((&paused["percent_done"], &paused["phase"]), (&0.5.into(), &"copy".into()));
}

#[test]
fn a_cancelled_engine_undoes_its_work_and_the_signal_is_what_ended_it() {
    let (session, json, people) = session(view());
    let wake = session.wake.clone();
    let ending = run_one(session, move |_, job, monitor| {
        begin(job, monitor, TargetKind::File);
        wake.send(Wake::Signal(SIGTERM)).unwrap();
        job.pause();
        assert_eq!(job.gate(), Gate::Cancelled);
        Err(Failure { error: Error::new(Kind::Cancelled, "cancelled"), target: TargetState::Removed })
    });
    assert_eq!(ending, Ending { code: 143, signal: Some(SIGTERM), abandoned: false });
    let records = records(json);
    let last = records.last().unwrap();
    assert_eq!(
        (&last["signal"], &last["reason"], &last["exit_code"]),
        (&"SIGTERM".into(), &"signal".into(), &143.into())
    );
    assert_eq!(text(people), "drive-backup: ended by SIGTERM: cancelled; the partial copy was removed\n");
}

#[test]
fn a_publish_that_was_faster_than_the_signal_is_a_success() {
    let (session, json, _people) = session(view());
    let wake = session.wake.clone();
    let ending = run_one(session, move |_, job, monitor| {
        copy(job, monitor);
        wake.send(Wake::Signal(SIGINT)).unwrap();
        Ok(summary(Vec::new()))
    });
    assert_eq!(ending, Ending::with_code(0));
    assert_eq!(records(json).last().unwrap()["message_type"], "summary");
}

#[test]
fn an_engine_that_hangs_is_abandoned_after_the_grace() {
    let (session, json, people) = session(view());
    let session = Session { bounds: Bounds { grace: SHORT, ..PATIENT }, ..session };
    let (wake, (undone, was_undone)) = (session.wake.clone(), mpsc::channel());
    let (sent, at) = mpsc::channel();
    let ending = run_one(session, move |_, job, monitor| {
        begin(job, monitor, TargetKind::File);
        job.on_abandon(move || undone.send(()).unwrap());
        sent.send(Instant::now()).unwrap();
        wake.send(Wake::Signal(SIGINT)).unwrap();
        hang()
    });
    let took = at.recv().unwrap().elapsed();
    assert!(took >= SHORT && took < BOUND, "{took:?}");
    was_undone.recv_timeout(BOUND).unwrap();
    assert_eq!(ending, Ending { code: 130, signal: Some(SIGINT), abandoned: true });
    assert_eq!(records(json).pop().unwrap()["target_state"], "removed");
    let line = "drive-backup: ended by SIGINT: the job hangs and was abandoned; the partial copy was removed\n";
    assert_eq!(text(people), line);
}

/// Until the file at `path` has a line.
fn wait_for_line(path: &Path) {
    let began = Instant::now();
    while !std::fs::read(path).is_ok_and(|text| text.ends_with(b"\n")) {
        assert!(began.elapsed() < BOUND, "nothing is in {}", path.display());
        thread::yield_now();
    }
}

/// It may have to undo what the command before the backup has made, wherever the engine hangs.
#[test]
fn the_hook_of_a_failure_is_started_once_when_the_engine_hangs_panics_or_comes_late() {
    let folder = tempfile::tempdir().unwrap();
    let told = |name: &str, engine: fn(&Path) -> Result<Summary, Failure>, cause: fn(i32) -> Wake| {
        let (session, _json, _people) = session(view());
        let session = Session { bounds: Bounds { grace: SHORT, ..PATIENT }, ..session };
        let (wake, path, (ends, has_ended)) = (session.wake.clone(), folder.path().join(name), mpsc::channel());
        let command = "echo $DRIVE_BACKUP_HOOK_EXIT_CODE $DRIVE_BACKUP_HOOK_REASON $DRIVE_BACKUP_HOOK_TARGET_STATE \
            $DRIVE_BACKUP_HOOK_MESSAGE";
        let command = format!("{command} >> {}", path.display());
        let hooks = Hooks { failed: Some(command), ..Hooks::default() };
        let theirs = path.clone();
        let ending = session.run(vec![options()], hooks, move |disks, ended| {
            begin(disks[0].job, disks[0].monitor, TargetKind::File);
            wake.send(cause(SIGTERM)).unwrap();
            ended(0, engine(&theirs));
            ends.send(()).unwrap();
        });
        wait_for_line(&path);
        // One that is started again then needs a moment.
        if has_ended.recv_timeout(10 * SHORT).is_ok() {
            thread::sleep(2 * SHORT);
        }
        (ending.code, std::fs::read_to_string(&path).unwrap())
    };
    let hangs = |_: &Path| hang();
    let (signal, late) = (Wake::Signal, |_| Wake::Late("--timeout"));
    let abandoned = "the job hangs and was abandoned\n";
    assert_eq!(told("signal", hangs, signal), (143, format!("143 signal removed ended by SIGTERM: {abandoned}")));
    let up = "the time of --timeout was up before the copy was complete\n";
    assert_eq!(told("deadline", hangs, late), (10, format!("10 deadline removed {up}")));
    let panics = |_: &Path| panic!("a bug");
    assert_eq!(told("panic", panics, |_| Wake::Served), (1, "1 other removed internal error\n".to_owned()));
    let comes_late = |told: &Path| {
        wait_for_line(told);
        Err(Failure { error: Error::new(Kind::Cancelled, "cancelled"), target: TargetState::Removed })
    };
    assert_eq!(told("late", comes_late, late), (10, format!("10 deadline removed {up}")));
}

#[test]
fn a_second_interrupt_does_not_wait_for_the_grace() {
    let (session, json, _people) = session(view());
    let wake = session.wake.clone();
    let (sent, at) = mpsc::channel();
    let ending = run_one(session, move |_, job, monitor| {
        begin(job, monitor, TargetKind::Device);
        sent.send(Instant::now()).unwrap();
        wake.send(Wake::Signal(SIGINT)).unwrap();
        wake.send(Wake::Signal(SIGINT)).unwrap();
        hang()
    });
    let took = at.recv().unwrap().elapsed();
    assert!(took < BOUND, "{took:?}");
    assert_eq!(ending.signal, Some(SIGINT));
    assert_eq!(records(json).pop().unwrap()["target_state"], "incomplete");
}

#[test]
fn an_undoing_that_hangs_too_is_said_and_left() {
    let (session, json, people) = session(view());
    let session = Session { bounds: Bounds { grace: SHORT, undo: SHORT, ..PATIENT }, ..session };
    let wake = session.wake.clone();
    let (sent, at) = mpsc::channel();
    let ending = run_one(session, move |_, job, monitor| {
        begin(job, monitor, TargetKind::File);
        job.on_abandon(|| hang());
        sent.send(Instant::now()).unwrap();
        wake.send(Wake::Signal(SIGTERM)).unwrap();
        hang()
    });
    let took = at.recv().unwrap().elapsed();
    assert!(took >= 2 * SHORT && took < BOUND, "{took:?}");
    assert!(ending.abandoned);
    assert_eq!(records(json).pop().unwrap()["target_state"], "old_or_complete");
    assert!(text(people).contains("is what it was before or the complete copy"));
}

#[test]
fn readers_that_stopped_are_waited_for_and_left() {
    let (session, json, people) = session(view());
    let session = Session { bounds: Bounds { last_record: SHORT, ..PATIENT }, ..session };
    let began = Instant::now();
    let ending = run_one(session, |_, job, monitor| {
        begin(job, monitor, TargetKind::File);
        for _ in 0..2000 {
            monitor.event(Event::Fault { error: &no_space(), action: Action::Stop });
        }
        copy(job, monitor);
        Ok(summary(Vec::new()))
    });
    let took = began.elapsed();
    assert_eq!(ending, Ending::with_code(0));
    assert!(took >= SHORT && took < BOUND, "{took:?}");
    drop((json, people));
}

#[test]
fn a_signal_ends_the_wait_for_readers_that_stopped_but_not_the_outcome() {
    let (session, json, people) = session(view());
    let session = Session { bounds: Bounds { impatient: SHORT, ..PATIENT }, ..session };
    let wake = session.wake.clone();
    let began = Instant::now();
    let ending = run_one(session, move |_, job, monitor| {
        for _ in 0..2000 {
            monitor.event(Event::Fault { error: &no_space(), action: Action::Stop });
        }
        copy(job, monitor);
        // It is taken after the end, as one that comes while readers are waited for.
        wake.send(Wake::Ended(0, Box::new(Ok(summary(Vec::new()))))).unwrap();
        wake.send(Wake::Signal(SIGTERM)).unwrap();
        hang()
    });
    let took = began.elapsed();
    assert_eq!(ending, Ending::with_code(0));
    assert!(took >= SHORT && took < BOUND, "{took:?}");
    drop((json, people));
}

#[test]
fn readers_that_are_gone_cost_nothing() {
    let (session, json, people) = session(view());
    drop((json, people));
    let began = Instant::now();
    let ending = run_one(session, |_, job, monitor| {
        copy(job, monitor);
        monitor.event(Event::Fault { error: &no_space(), action: Action::Ignore });
        Ok(summary(Vec::new()))
    });
    assert_eq!(ending, Ending::with_code(0));
    assert!(began.elapsed() < BOUND, "{:?}", began.elapsed());
}

#[test]
fn the_speed_limit_goes_off_and_on_for_all() {
    let jobs = [50, 50].map(|mib| Arc::new(Job::new(Some(mib << 20))));
    assert!(toggle_speed(&jobs).contains("off"));
    assert!(jobs.iter().all(|job| job.speed().is_none()));
    assert!(toggle_speed(&jobs).contains("50.0 MiB/s again"));
    assert!(jobs.iter().all(|job| job.speed() == Some(50 << 20)));
    assert!(toggle_speed(&[Arc::new(Job::new(None))]).contains("no limit to turn off"));
    // What is found meanwhile holds afterwards.
    toggle_speed(&jobs);
    jobs.iter().for_each(|job| job.steer(Some(7 << 20)));
    assert!(jobs.iter().all(|job| job.speed().is_none()));
    assert!(toggle_speed(&jobs).contains("7.00 MiB/s again"));
    toggle_speed(&jobs);
    jobs.iter().for_each(|job| job.steer(None));
    assert!(toggle_speed(&jobs).contains("no speed limit is asked for"));
    assert!(toggle_speed(&jobs).contains("no limit to turn off"));
}

mod several;
