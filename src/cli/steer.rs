//! Sets the speed of running jobs as a schedule, a deadline or their writers ask for it, and says when time is up.

use crate::error::{Error, Kind, Result};
use crate::ground::speed::{self, Courtesy, Sample, Schedule};
use crate::ground::status::{Phase, Snapshot};
use crate::job::Job;
use jiff::civil::{DateTime, Time};
use jiff::{Timestamp, Zoned};
use std::io;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

/// Between two looks.
const LOOK: Duration = Duration::from_millis(250);
/// Until the copy begins: soon after that the speed is the right one.
const FIRST_LOOK: Duration = Duration::from_millis(10);

/// What decides the speed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Course {
    /// Bytes a second; `None`: no limit.
    Steady(Option<u64>),
    /// As writers bear it.
    Auto,
    /// By the time of day.
    Schedule(Schedule),
    /// As slow as is ready then.
    FinishBy {
        /// Then.
        end: Timestamp,
        /// The copy is read back before it is ready.
        reads_back: bool,
    },
}

impl Course {
    /// Reads the time of `--finish-by`, as of `now` and in its zone. One in the past is refused.
    pub fn finish_by(text: &str, now: &Zoned, reads_back: bool) -> Result<Self> {
        let refuse = |why: String| Error::new(Kind::Usage, format!("--finish-by {text}: {why}"));
        let wrong = || {
            let dated = "a date and time, as 2030-01-31T06:00, which may have a zone";
            refuse(format!("write a time of day here, as 06:00, or {dated}"))
        };
        // The parsers pass over what they have no use for: a date beside a time, a zone beside either.
        let is_time = text.bytes().all(|byte| byte.is_ascii_digit() || b":.".contains(&byte));
        let end = if is_time {
            let time = text.parse::<Time>().map_err(|_| wrong())?;
            let today = now.with().time(time).build().map_err(|error| refuse(error.to_string()))?;
            let tomorrow = || now.tomorrow().and_then(|day| day.with().time(time).build());
            if today > *now { today } else { tomorrow().map_err(|error| refuse(error.to_string()))? }.timestamp()
        } else if text.contains('[') {
            text.parse::<Zoned>().map_err(|error| refuse(error.to_string()))?.timestamp()
        } else if let Ok(time) = text.parse::<Timestamp>() {
            time
        } else {
            let time = text.parse::<DateTime>().map_err(|_| wrong())?;
            time.to_zoned(now.time_zone().clone()).map_err(|error| refuse(error.to_string()))?.timestamp()
        };
        let is_to_come = end > now.timestamp();
        is_to_come
            .then_some(Self::FinishBy { end, reads_back })
            .ok_or_else(|| refuse("that time has passed".to_owned()))
    }
}

/// What decides the speed, and when it is too late.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Steering {
    /// The speed.
    pub course: Course,
    /// From the start of the command.
    pub timeout: Option<Duration>,
}

impl Steering {
    /// What a job begins with, in bytes a second.
    pub fn first_speed(&self) -> Option<u64> {
        match &self.course {
            Course::Steady(rate) => *rate,
            // Until the first look.
            Course::Auto | Course::FinishBy { .. } => Some(speed::FIRST),
            Course::Schedule(schedule) => schedule.rate_at(minute(&Zoned::now())),
        }
    }

    /// What a rehearsal reckons with: speeds that find themselves are not known before.
    pub fn rehearsed_speed(&self) -> Option<u64> {
        match &self.course {
            Course::Auto | Course::FinishBy { .. } => None,
            Course::Steady(_) | Course::Schedule(_) => self.first_speed(),
        }
    }
}

/// Starts a thread that looks at `jobs`, which have begun with the speed `first`, until the process ends. Calls `late` once, with
/// the flag, when time is up.
pub fn start(
    steering: Steering,
    first: Option<u64>,
    jobs: Vec<Arc<Job>>,
    late: impl Fn(&'static str) + Send + 'static,
) -> io::Result<()> {
    if matches!(steering, Steering { course: Course::Steady(_), timeout: None }) {
        return Ok(());
    }
    let began = Instant::now();
    let mut helms: Vec<Helm> = jobs.iter().map(|_| Helm::new(&steering, first)).collect();
    let work = move || {
        let mut before = Duration::ZERO;
        loop {
            let (now, elapsed) = (Zoned::now(), began.elapsed());
            let mut is_beginning = false;
            for (job, helm) in jobs.iter().zip(&mut helms) {
                // Who lifts the limit for a while sets no other.
                let job_now = Snapshot { speed_limit: job.steered_speed(), ..job.snapshot() };
                let look = Look { now: &now, elapsed: elapsed - before, job: job_now };
                is_beginning |= look.job.phase == Phase::Prepare;
                if let Some(rate) = helm.look(&look) {
                    job.steer(rate);
                }
            }
            before = elapsed;
            if let Some(flag) = too_late(&steering, &now, elapsed) {
                return late(flag);
            }
            thread::sleep(if is_beginning { FIRST_LOOK } else { LOOK });
        }
    };
    thread::Builder::new().name("steer".to_owned()).spawn(work).map(drop)
}

fn too_late(steering: &Steering, now: &Zoned, elapsed: Duration) -> Option<&'static str> {
    match (&steering.course, steering.timeout) {
        // By the wall clock: a machine that slept is late too.
        (Course::FinishBy { end, .. }, _) if now.timestamp() >= *end => Some("--finish-by"),
        (_, Some(timeout)) if elapsed >= timeout => Some("--timeout"),
        _ => None,
    }
}

fn minute(now: &Zoned) -> u32 {
    u32::try_from(i32::from(now.hour()) * 60 + i32::from(now.minute())).unwrap_or(0)
}

/// What is seen of a job.
struct Look<'a> {
    now: &'a Zoned,
    /// Since the look before.
    elapsed: Duration,
    job: Snapshot,
}

/// Steers one job.
struct Helm {
    course: Course,
    courtesy: Courtesy,
    /// What the job's speed is unless somebody else has set it.
    set: Option<u64>,
    before: Option<Snapshot>,
    /// When the copy should be complete; known with the first look.
    arrival: Option<Timestamp>,
}

impl Helm {
    fn new(steering: &Steering, first: Option<u64>) -> Self {
        Self { course: steering.course.clone(), courtesy: Courtesy::default(), set: first, before: None, arrival: None }
    }

    /// The speed from now on, if it is to change.
    fn look(&mut self, look: &Look<'_>) -> Option<Option<u64>> {
        let before = self.before.replace(look.job);
        let is_moving = match self.course {
            // What is read back has its part of the time.
            Course::FinishBy { .. } => matches!(look.job.phase, Phase::Copy | Phase::Verify),
            _ => look.job.phase == Phase::Copy,
        };
        if !is_moving {
            return None;
        }
        if look.job.speed_limit != self.set {
            // Somebody has set it by hand, who knows better.
            self.course = Course::Steady(look.job.speed_limit);
            self.set = look.job.speed_limit;
        }
        let rate = match &self.course {
            Course::Steady(rate) => *rate,
            Course::Auto => self.courtesy.look(sample(look, before.as_ref())),
            Course::Schedule(schedule) => schedule.rate_at(minute(look.now)),
            Course::FinishBy { end, reads_back } => {
                let now = look.now.timestamp();
                let until = |end: Timestamp| Duration::try_from(end.duration_since(now)).unwrap_or_default();
                let arrival = *self.arrival.get_or_insert_with(|| *end - speed::reserve(until(*end)));
                speed::to_arrive_in(until(arrival), left_of(&look.job, *reads_back))
            }
        };
        (rate != self.set).then(|| {
            self.set = rate;
            rate
        })
    }
}

/// Bytes to be copied and, if the copy is read back, to be read: the data of it, and what may turn out to be data.
fn left_of(job: &Snapshot, reads_back: bool) -> u64 {
    if job.phase == Phase::Verify {
        // Holes of the target cost nothing, so what is left of it is at most as much as there is data.
        return job.total.saturating_sub(job.verified).min(job.data);
    }
    let to_copy = job.total.saturating_sub(job.done());
    to_copy.saturating_add(if reads_back { job.data.saturating_add(to_copy) } else { 0 })
}

/// What happened since the look before.
fn sample(look: &Look<'_>, before: Option<&Snapshot>) -> Sample {
    let writers = |job: &Snapshot| job.writers.unwrap_or_default();
    let now = writers(&look.job);
    let then = before.map(writers).unwrap_or_default();
    Sample {
        elapsed: look.elapsed,
        copied: look.job.data - before.map_or(0, |before| before.data),
        has_writers: now.attached > 0,
        waits: now.trapped.saturating_sub(then.trapped),
        waited: now.stalled.saturating_sub(then.stalled),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ground::status::WriterStats;
    use jiff::ToSpan;

    const MIB: u64 = 1 << 20;

    fn time(text: &str) -> Zoned {
        text.parse().unwrap()
    }

    fn evening() -> Zoned {
        time("2026-11-22T22:00:00+01:00[+01:00]")
    }

    fn end(text: &str) -> String {
        match Course::finish_by(text, &evening(), false).unwrap() {
            Course::FinishBy { end, .. } => end.to_string(),
            other => panic!("{other:?}"),
        }
    }

    fn copying(total: u64, data: u64, speed_limit: Option<u64>) -> Snapshot {
        let (phase, paused, zero, errors) = (Phase::Copy, None, 0, 0);
        Snapshot { phase, paused, total, data, zero, verified: 0, errors, speed_limit, overlay: None, writers: None }
    }

    fn helm(course: Course) -> Helm {
        let steering = Steering { course, timeout: None };
        Helm::new(&steering, steering.first_speed())
    }

    #[test]
    fn a_time_of_day_is_the_next_one() {
        assert_eq!(end("06:00"), "2026-11-23T05:00:00Z");
        assert_eq!(end("23:30"), "2026-11-22T22:30:00Z");
        assert_eq!(end("22:00"), "2026-11-23T21:00:00Z", "now is tomorrow");
    }

    #[test]
    fn a_date_is_here_unless_it_says_where() {
        assert_eq!(end("2026-11-23T06:00"), "2026-11-23T05:00:00Z");
        assert_eq!(end("2026-11-23 06:00"), "2026-11-23T05:00:00Z");
        assert_eq!(end("2026-11-23T06:00Z"), "2026-11-23T06:00:00Z");
        assert_eq!(end("2026-11-23T06:00-05:00"), "2026-11-23T11:00:00Z");
        assert_eq!(end("2026-11-23T07:00[Asia/Tokyo]"), "2026-11-22T22:00:00Z");
        assert_eq!(end("2026-11-23T07:00+09:00[Asia/Tokyo]"), "2026-11-22T22:00:00Z");
        assert_eq!(end("20261124T0600"), "2026-11-24T05:00:00Z", "a date without dashes is one");
    }

    #[test]
    fn the_past_and_nonsense_are_refused() {
        for (text, why) in [
            ("2026-11-22T21:59", "has passed"),
            ("2020-01-01T00:00Z", "has passed"),
            ("25:00", "time of day"),
            ("soon", "time of day"),
            ("", "time of day"),
            ("23:40+09:00", "time of day here"),
            ("23:40-05:00", "time of day here"),
            ("23:40[Asia/Tokyo]", "[Asia/Tokyo]"),
            ("2026-11-23T06:00[Nowhere/Atall]", "Nowhere/Atall"),
            ("2026-11-23T06:00-05:00[Asia/Tokyo]", "-05:00"),
        ] {
            let error = Course::finish_by(text, &evening(), false).expect_err(text);
            assert_eq!(error.kind(), Kind::Usage);
            assert!(error.to_string().contains(why), "{text}: {error}");
        }
    }

    #[test]
    fn a_schedule_changes_the_speed_at_its_times() {
        let schedule = Course::Schedule(Schedule::parse("00:00=2M 23:00=off").unwrap());
        let mut helm = helm(schedule);
        helm.set = Some(2 * MIB);
        let look =
            |now: &Zoned, limit, helm: &mut Helm| helm.look(&Look { now, elapsed: LOOK, job: copying(MIB, 0, limit) });
        assert_eq!(look(&evening(), Some(2 * MIB), &mut helm), None);
        assert_eq!(look(&(&evening() + 1.hour()), Some(2 * MIB), &mut helm), Some(None));
        assert_eq!(look(&(&evening() + 1.hour()), None, &mut helm), None);
        assert_eq!(look(&(&evening() + 2.hours()), None, &mut helm), Some(Some(2 * MIB)));
    }

    #[test]
    fn a_deadline_sets_a_speed_that_is_planned_again() {
        let mut helm = helm(Course::finish_by("23:00", &evening(), false).unwrap());
        let look = |minutes: i64, data, limit, helm: &mut Helm| {
            helm.look(&Look {
                now: &(&evening() + minutes.minutes()),
                elapsed: LOOK,
                job: copying(3420 * MIB, data, limit),
            })
        };
        // 57 of the 60 minutes are for the copy.
        let first = look(0, 0, helm.set, &mut helm).unwrap();
        assert_eq!(first, Some(MIB));
        assert_eq!(look(10, 600 * MIB, first, &mut helm), None, "as planned");
        let behind = look(20, 600 * MIB, first, &mut helm).unwrap();
        assert_eq!(behind, Some((2820 * MIB).div_ceil(37 * 60)));
        assert_eq!(look(58, 3000 * MIB, behind, &mut helm), Some(None), "the reserve has begun");
    }

    #[test]
    fn the_time_of_a_copy_that_is_read_back_is_for_both() {
        let mut helm = helm(Course::finish_by("23:00", &evening(), true).unwrap());
        let (total, mut limit) = (1710 * MIB, helm.set);
        let mut look = |minutes: i64, job: Snapshot| {
            let job = Snapshot { speed_limit: limit, ..job };
            if let Some(rate) = helm.look(&Look { now: &(&evening() + minutes.minutes()), elapsed: LOOK, job }) {
                limit = rate;
            }
            limit
        };
        // Of 57 minutes half are for the copy.
        assert_eq!(look(0, copying(total, 0, None)), Some(MIB));
        assert_eq!(look(10, copying(total, 600 * MIB, None)), Some(MIB), "as planned");
        // A half is empty, so there is less to read back.
        let half = Snapshot { zero: total / 2, ..copying(total, 600 * MIB, None) };
        assert_eq!(look(10, half), Some((255 * MIB + 855 * MIB).div_ceil(47 * 60)));
        let verifying = |verified| Snapshot { phase: Phase::Verify, verified, ..copying(total, total, None) };
        assert_eq!(look(27, Snapshot { phase: Phase::Flush, ..verifying(0) }), look(10, half), "nothing moves");
        assert_eq!(look(37, verifying(510 * MIB)), Some(MIB));
        assert_eq!(look(47, verifying(510 * MIB)), Some(2 * MIB), "it has stood still");
        // Holes are read at once, and count.
        let sparse = Snapshot { zero: total - MIB, ..copying(total, MIB, None) };
        assert_eq!(look(47, Snapshot { phase: Phase::Verify, ..sparse }), Some(MIB.div_ceil(600)));
    }

    #[test]
    fn a_speed_that_is_set_by_hand_stays() {
        let mut helm = helm(Course::finish_by("23:00", &evening(), false).unwrap());
        let look = |limit, helm: &mut Helm| {
            helm.look(&Look { now: &evening(), elapsed: LOOK, job: copying(3420 * MIB, 0, limit) })
        };
        assert_eq!(look(helm.set, &mut helm), Some(Some(MIB)));
        assert_eq!(look(Some(7), &mut helm), None);
        assert_eq!(look(Some(7), &mut helm), None);
    }

    /// Off and on again is as if nothing had been.
    #[test]
    fn a_limit_that_is_lifted_for_a_while_is_planned_on() {
        let end = Timestamp::now() + 1.hour();
        let steering = Steering { course: Course::FinishBy { end, reads_back: false }, timeout: None };
        let job = Arc::new(Job::new(steering.first_speed()));
        job.set_total(3420 * MIB);
        job.enter(Phase::Copy);
        start(steering, job.speed(), vec![job.clone()], |_| {}).unwrap();
        let wait_for = |what: &str, done: &dyn Fn(Option<u64>) -> bool| {
            let since = Instant::now();
            while !done(job.steered_speed()) {
                assert!(since.elapsed() < Duration::from_secs(20), "{what}");
                thread::yield_now();
            }
        };
        wait_for("a plan", &|rate| rate.is_some_and(|rate| rate < 2 * MIB));
        job.lift(true);
        job.count_data(3000 * MIB);
        wait_for("another plan", &|rate| rate.is_some_and(|rate| rate < MIB / 2));
        assert_eq!(job.speed(), None);
        job.lift(false);
        job.count_data(400 * MIB);
        wait_for("a third plan", &|rate| rate.is_some_and(|rate| rate < MIB / 10));
    }

    #[test]
    fn what_writers_felt_since_the_look_before_decides() {
        let mut helm = helm(Course::Auto);
        let mut limit = helm.set;
        let mut seen = |data, trapped, milliseconds| {
            let stalled = Duration::from_millis(milliseconds);
            let writers = Some(WriterStats { attached: 1, trapped, stalled, ..WriterStats::default() });
            let job = Snapshot { writers, ..copying(1 << 40, data, limit) };
            if let Some(rate) = helm.look(&Look { now: &evening(), elapsed: LOOK, job }) {
                limit = rate;
            }
            limit.map(|rate| rate / MIB)
        };
        assert_eq!(seen(0, 0, 0), Some(8));
        assert_eq!(seen(2 * MIB, 100, 100), Some(16), "a millisecond each");
        assert_eq!(seen(6 * MIB, 200, 200), Some(32));
        assert_eq!(seen(14 * MIB, 300, 1200), Some(21), "ten");
        assert_eq!(seen(19 * MIB, 400, 1300), Some(22), "a twentieth more");
    }

    #[test]
    fn nothing_changes_before_the_copy_and_after_it() {
        let mut helm = helm(Course::finish_by("23:00", &evening(), false).unwrap());
        for phase in [Phase::Prepare, Phase::Flush, Phase::Publish, Phase::Cancel] {
            let job = Snapshot { phase, ..copying(3420 * MIB, 0, None) };
            assert_eq!(helm.look(&Look { now: &evening(), elapsed: LOOK, job }), None, "{phase:?}");
        }
    }

    #[test]
    fn time_is_up_by_the_wall_clock_or_by_what_has_passed() {
        let by = Steering { course: Course::finish_by("23:00", &evening(), false).unwrap(), timeout: Some(LOOK) };
        assert_eq!(too_late(&by, &(&evening() + 1.hour()), Duration::ZERO), Some("--finish-by"));
        assert_eq!(too_late(&by, &evening(), LOOK), Some("--timeout"));
        assert_eq!(too_late(&by, &evening(), Duration::ZERO), None);
    }
}
