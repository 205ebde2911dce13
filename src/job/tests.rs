use super::*;
use std::sync::atomic::AtomicBool;
use std::sync::mpsc;
use std::thread;

/// Longer than any test takes: who sleeps for it has not been woken.
const EVER: Duration = Duration::from_secs(3600);

fn running() -> Job {
    let job = Job::new(None);
    job.enter(Phase::Copy);
    job
}

/// Hears each status of `job` from now on.
fn heard(job: &Job) -> mpsc::Receiver<Status> {
    let (tell, heard) = mpsc::channel();
    job.observe(Box::new(move |status| tell.send(status).unwrap()));
    heard
}

/// Sees that `wait` goes on waiting until `wake`, however long that takes: what it returns then. `wait` begins before
/// `wake` as a rule, and must end when it begins after it, too.
fn woken<T: Send>(wait: impl FnOnce() -> T + Send, wake: impl FnOnce()) -> T {
    thread::scope(|scope| {
        let (begins, begun) = mpsc::channel();
        let waiter = scope.spawn(move || {
            begins.send(()).unwrap();
            wait()
        });
        begun.recv().unwrap();
        wake();
        waiter.join().unwrap()
    })
}

#[test]
fn a_status_is_told_once_each_from_created_to_committed() {
    let job = Job::new(None);
    let heard = heard(&job);
    job.enter(Phase::Copy);
    job.enter(Phase::Flush);
    job.pause();
    job.pause();
    job.resume();
    assert!(!job.is_committed());
    assert_eq!(job.complete(), Gate::Go);
    assert!(job.is_committed());
    let told: Vec<_> = heard.try_iter().collect();
    use Status::{Created, Paused, Pending, Running, Waiting};
    assert_eq!(told, [Created, Running, Paused, Running, Waiting, Pending]);
    // The target is getting its name: too late.
    job.cancel();
    assert_eq!(job.status(), Pending);
    assert_eq!(heard.try_iter().count(), 0);
}

#[test]
fn who_observes_late_hears_where_the_job_is() {
    let job = running();
    assert_eq!(heard(&job).try_iter().collect::<Vec<_>>(), [Status::Running]);
    assert_eq!(heard(&job).try_iter().collect::<Vec<_>>(), [Status::Running]);
}

#[test]
fn the_status_is_what_befell_the_job_last() {
    for end in [Job::cancel, Job::interrupt] {
        let job = Job::new(None);
        assert_eq!(job.status(), Status::Created);
        job.enter(Phase::Copy);
        assert_eq!(job.status(), Status::Running);
        job.pause();
        assert_eq!(job.status(), Status::Paused);
        end(&job);
        assert_eq!(job.status(), Status::Aborting);
        assert_eq!((job.gate(), job.complete()), (Gate::Cancelled, Gate::Cancelled));
        assert_eq!(job.stop_for_error(|| {}), Gate::Cancelled);
    }
}

#[test]
fn an_interrupted_job_was_not_cancelled_and_a_cancelled_one_stays_in_its_phase() {
    let (cancelled, interrupted) = (running(), running());
    cancelled.cancel();
    interrupted.interrupt();
    assert_eq!((cancelled.is_cancelled(), interrupted.is_cancelled()), (true, false));
    for job in [&cancelled, &interrupted] {
        job.enter(Phase::Publish);
    }
    assert_eq!((cancelled.snapshot().phase, interrupted.snapshot().phase), (Phase::Cancel, Phase::Publish));
}

#[test]
fn a_paused_job_goes_on_when_it_is_resumed_or_cancelled() {
    for (wake, expected) in
        [(Job::resume as fn(&Job), Gate::Go), (Job::cancel, Gate::Cancelled), (Job::interrupt, Gate::Cancelled)]
    {
        let job = running();
        job.pause();
        assert_eq!(woken(|| job.gate(), || wake(&job)), expected);
    }
}

#[test]
fn a_job_that_is_paused_completes_no_sooner_than_it_is_resumed() {
    let job = running();
    job.pause();
    let resumed = AtomicBool::new(false);
    let completed = || (job.complete(), resumed.load(Relaxed));
    let resume = || {
        resumed.store(true, Relaxed);
        job.resume();
    };
    assert_eq!(woken(completed, resume), (Gate::Go, true));
}

#[test]
fn a_job_is_published_when_its_transaction_and_its_user_let_it() {
    let job = running();
    job.hold();
    job.require_finalize();
    let heard = heard(&job);
    let until = |wanted| assert!(heard.iter().any(|status| status == wanted));
    let steer = || {
        until(Status::Waiting);
        assert_eq!(heard.try_recv(), Err(mpsc::TryRecvError::Empty), "held");
        job.release();
        until(Status::Pending);
        assert!(!job.is_committed());
        job.finalize();
    };
    assert_eq!(woken(|| job.complete(), steer), Gate::Go);
    assert!(job.is_committed());
}

#[test]
fn a_job_that_waits_to_be_published_can_be_cancelled() {
    for wait in [Job::pause, Job::hold, Job::require_finalize] {
        for end in [Job::cancel, Job::interrupt] {
            let job = running();
            wait(&job);
            assert_eq!(woken(|| job.complete(), || end(&job)), Gate::Cancelled);
            assert!(!job.is_committed());
        }
    }
}

#[test]
fn who_is_told_of_an_error_finds_the_job_stopped_and_may_resume_it_at_once() {
    let job = running();
    let heard = heard(&job);
    let told = || {
        assert_eq!(job.snapshot().paused, Some(Pause::Error));
        assert_eq!(job.status(), Status::Paused);
        job.pause();
        assert_eq!(job.snapshot().paused, Some(Pause::Error), "the error is what has to be seen to");
        job.resume();
    };
    assert_eq!(job.stop_for_error(told), Gate::Go);
    assert_eq!(job.snapshot().paused, None);
    assert_eq!(job.status(), Status::Running);
    assert_eq!(heard.try_iter().last(), Some(Status::Running));
}

#[test]
fn a_job_that_stopped_for_an_error_waits_for_resume_or_the_end() {
    for (wake, expected) in
        [(Job::resume as fn(&Job), Gate::Go), (Job::cancel, Gate::Cancelled), (Job::interrupt, Gate::Cancelled)]
    {
        let job = running();
        let heard = heard(&job);
        let stopped = || heard.iter().any(|status| status == Status::Paused);
        let result = woken(
            || job.stop_for_error(|| {}),
            || {
                assert!(stopped());
                wake(&job);
            },
        );
        assert_eq!(result, expected);
    }
}

#[test]
fn what_was_charged_has_to_be_waited_for_unless_the_speed_rises() {
    let job = Job::new(Some(1));
    assert_eq!((job.speed(), job.snapshot().speed_limit), (Some(1), Some(1)));
    assert_eq!(job.gate(), Gate::Go);
    // At this speed it takes weeks.
    job.charge(10 << 20);
    assert_eq!(woken(|| job.gate(), || job.set_speed(None)), Gate::Go);
    assert_eq!((job.speed(), job.snapshot().speed_limit), (None, None));
    job.set_speed(Some(7 << 20));
    assert_eq!((job.speed(), job.snapshot().speed_limit), (Some(7 << 20), Some(7 << 20)));
}

#[test]
fn a_limit_that_is_lifted_is_steered_on_and_holds_again() {
    let job = Job::new(Some(1));
    job.charge(10 << 20);
    assert_eq!(woken(|| job.gate(), || job.lift(true)), Gate::Go);
    job.steer(Some(2));
    assert_eq!((job.speed(), job.steered_speed(), job.is_lifted()), (None, Some(2), true));
    assert_eq!(job.snapshot().speed_limit, None);
    assert_eq!(job.gate(), Gate::Go);
    job.lift(false);
    assert_eq!((job.speed(), job.snapshot().speed_limit), (Some(2), Some(2)));
    job.lift(true);
    // By hand.
    job.set_speed(Some(3));
    assert_eq!((job.speed(), job.is_lifted()), (Some(3), false));
}

#[test]
fn a_job_at_its_speed_limit_hears_that_it_is_cancelled() {
    let job = Job::new(Some(1));
    job.charge(10 << 20);
    assert_eq!(woken(|| job.gate(), || job.cancel()), Gate::Cancelled);
}

#[test]
fn a_sleeper_is_woken_by_the_end_alone() {
    let job = running();
    let since = Instant::now();
    let sleep = Duration::from_millis(20);
    woken(|| job.sleep(sleep), || job.resume());
    assert!(since.elapsed() >= sleep, "resume is no end");
    for end in [Job::cancel, Job::interrupt] {
        let job = running();
        woken(|| job.sleep(EVER), || end(&job));
        job.sleep(EVER);
        job.rest(EVER);
    }
}

#[test]
fn who_rests_is_woken_by_any_verb() {
    let job = running();
    let since = Instant::now();
    let rest = Duration::from_millis(20);
    job.rest(rest);
    assert!(since.elapsed() >= rest, "nobody asked for anything");
    thread::scope(|scope| {
        let resting = scope.spawn(|| job.rest(EVER));
        while !resting.is_finished() {
            job.resume();
            thread::yield_now();
        }
    });
}

#[test]
fn a_look_has_what_was_counted() {
    struct Both;
    impl Gauges for Both {
        fn read(&self) -> (Option<OverlayUsage>, Option<WriterStats>) {
            (
                Some(OverlayUsage { used: 60, peak: 61, limit: None }),
                Some(WriterStats { attached: 2, ..Default::default() }),
            )
        }
    }
    let job = running();
    assert_eq!((job.snapshot().overlay, job.snapshot().writers), (None, None));
    let gauges = Arc::new(Both);
    job.set_gauges(gauges.clone());
    job.set_total(1000);
    for bytes in [1, 2] {
        job.count_data(100 * bytes);
        job.count_zero(10 * bytes);
        job.count_verified(bytes);
        job.count_error();
    }
    job.pause();
    let seen = job.snapshot();
    assert_eq!((seen.total, seen.data, seen.zero, seen.verified, seen.errors), (1000, 300, 30, 3, 2));
    assert_eq!((seen.phase, seen.paused), (Phase::Copy, Some(Pause::User)));
    assert_eq!((seen.overlay.unwrap().used, seen.writers.unwrap().attached), (60, 2));
    job.end(true);
    let last = job.snapshot();
    assert_eq!((last.overlay.unwrap().used, last.writers.unwrap().attached), (60, 2));
    assert_eq!(Arc::strong_count(&gauges), 1, "nothing is held open for watchers");
}

#[test]
fn what_was_begun_is_undone_once_the_newest_first() {
    let job = running();
    let (tell, undone) = mpsc::channel();
    for number in 1..=3 {
        let tell = tell.clone();
        job.on_abandon(move || tell.send(number).unwrap());
    }
    assert!(job.abandon());
    assert_eq!(undone.try_iter().collect::<Vec<_>>(), [3, 2, 1]);
    assert!(job.abandon());
    assert_eq!(undone.try_iter().count(), 0);
}

#[test]
fn one_thing_that_cannot_be_undone_any_more_is_told() {
    for too_late in 0..3 {
        let job = running();
        for number in 0..3 {
            job.on_abandon_in_time(move || number != too_late);
        }
        assert!(!job.abandon());
    }
}

#[test]
fn an_ended_job_undoes_nothing_and_says_whether_it_was_in_time() {
    for in_time in [false, true] {
        let job = running();
        job.on_abandon(|| panic!("it is over"));
        job.end(in_time);
        assert_eq!(job.abandon(), in_time);
    }
}
