//! From looks at a job to what people want to know: how much, how fast, how long. Takes the time as an argument.

use crate::ground::status::{Phase, Snapshot};
use std::collections::VecDeque;
use std::time::Duration;

/// `rate` looks this far back.
const RATE_WINDOW: Duration = Duration::from_secs(5);
/// The remaining time is guessed from this much: a guess that jumps about is worse than a late one.
const REMAINING_WINDOW: Duration = Duration::from_secs(30);
/// Samples are at least this far apart, so that a window holds a bounded number.
const SPACING: Duration = Duration::from_millis(250);
/// A guess from less would be noise.
const SHORTEST_GUESS: Duration = Duration::from_secs(1);
/// Shown as stalled from here on.
pub const STALLED: Duration = Duration::from_secs(5);
/// Copying may be done; the job is not before the target is flushed and published.
const MOST_BEFORE_THE_END: f64 = 0.999;

/// Remembers the last looks.
#[derive(Debug, Default)]
pub struct Pace {
    samples: VecDeque<Sample>,
    last_look: Option<Sample>,
    percent: f64,
    phase: Option<(Phase, Duration)>,
    copying_since: Option<Duration>,
    /// When `done` last grew, and to what.
    progress: Option<(Duration, u64)>,
}

#[derive(Clone, Copy, Debug)]
struct Sample {
    at: Duration,
    data: u64,
    done: u64,
}

/// What people want to know.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct View {
    /// The job itself.
    pub job: Snapshot,
    /// Of copying, 0 to 1; never falls, below 1 until the end.
    pub percent: f64,
    /// Data bytes a second over the last seconds.
    pub rate: u64,
    /// Data bytes a second since copying began.
    pub rate_avg: u64,
    /// Since the job began.
    pub elapsed: Duration,
    /// Since it entered its phase.
    pub in_phase: Duration,
    /// `None`: nobody knows.
    pub remaining: Option<Duration>,
    /// Since a running copy last got anywhere.
    pub stalled: Duration,
}

impl Pace {
    /// `now` counts from the start of the job and never falls.
    pub fn look(&mut self, now: Duration, job: Snapshot) -> View {
        let since = match self.phase {
            Some((phase, since)) if phase == job.phase => since,
            _ => now,
        };
        self.phase = Some((job.phase, since));
        if job.phase == Phase::Copy && self.copying_since.is_none() {
            // What was copied by now was copied since the last look.
            self.copying_since = Some(self.last_look.map_or(now, |look| look.at));
        }
        let running = job.phase == Phase::Copy && job.paused.is_none();
        let stalled = self.stalled(now, &job, running);
        self.sample(now, &job, running);
        View {
            job,
            percent: self.percent_of(&job),
            rate: self.data_rate(now),
            rate_avg: self.copying_since.map_or(0, |since| per_second(job.data, now - since)),
            elapsed: now,
            in_phase: now - since,
            remaining: self.remaining(now, &job),
            stalled,
        }
    }

    fn percent_of(&mut self, job: &Snapshot) -> f64 {
        let share = if job.total == 0 { 0.0 } else { job.done() as f64 / job.total as f64 };
        self.percent = self.percent.max(share.min(MOST_BEFORE_THE_END));
        self.percent
    }

    fn stalled(&mut self, now: Duration, job: &Snapshot, running: bool) -> Duration {
        match self.progress {
            Some((at, done)) if running && done == job.done() => now - at,
            _ => {
                self.progress = Some((now, job.done()));
                Duration::ZERO
            }
        }
    }

    fn sample(&mut self, now: Duration, job: &Snapshot, running: bool) {
        let look = Sample { at: now, data: job.data, done: job.done() };
        let before = self.last_look.replace(look);
        if !running {
            // A pause is not slowness: the rates start anew after it.
            self.samples.clear();
            return;
        }
        if self.samples.is_empty() {
            self.samples.extend(before);
        }
        if self.samples.back().is_none_or(|last| now >= last.at + SPACING) {
            self.samples.push_back(look);
        }
        while self.samples.front().is_some_and(|first| first.at + REMAINING_WINDOW < now) {
            self.samples.pop_front();
        }
    }

    fn data_rate(&self, now: Duration) -> u64 {
        let window = now.saturating_sub(RATE_WINDOW);
        let first = self.samples.iter().find(|sample| sample.at >= window);
        match (first, self.samples.back()) {
            (Some(first), Some(last)) => per_second(last.data - first.data, last.at - first.at),
            _ => 0,
        }
    }

    fn remaining(&self, now: Duration, job: &Snapshot) -> Option<Duration> {
        let first = self.samples.front()?;
        let last = self.samples.back()?;
        let seconds = last.at.checked_sub(first.at).filter(|span| *span >= SHORTEST_GUESS)?.as_secs_f64();
        let done_per_second = (last.done - first.done) as f64 / seconds;
        let left = job.total.saturating_sub(job.done()) as f64 / done_per_second - (now - last.at).as_secs_f64();
        // Nothing done makes it infinite, or not a number.
        Duration::try_from_secs_f64(left.max(0.0)).ok().filter(|_| done_per_second > 0.0)
    }
}

fn per_second(bytes: u64, span: Duration) -> u64 {
    if span.is_zero() { 0 } else { (bytes as f64 / span.as_secs_f64()) as u64 }
}

impl View {
    /// As in JSON: running, paused.
    pub fn status(&self) -> &'static str {
        if self.job.paused.is_some() { "paused" } else { "running" }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ground::status::Pause;

    const MIB: u64 = 1 << 20;

    fn job(data: u64, zero: u64, total: u64) -> Snapshot {
        Snapshot {
            phase: Phase::Copy,
            paused: None,
            total,
            data,
            zero,
            verified: 0,
            errors: 0,
            speed_limit: None,
            overlay: None,
            writers: None,
        }
    }

    fn at(tenths: u64) -> Duration {
        Duration::from_millis(tenths * 100)
    }

    /// Copies at `rate` a second from one time to another, looking ten times a second.
    fn copy(pace: &mut Pace, tenths: std::ops::Range<u64>, mut data: u64, rate: u64, total: u64) -> (u64, View) {
        let mut view = None;
        for tenth in tenths {
            data += rate / 10;
            view = Some(pace.look(at(tenth), job(data, 0, total)));
        }
        (data, view.unwrap())
    }

    #[test]
    fn a_steady_copy_shows_its_rate_and_its_end() {
        let mut pace = Pace::default();
        let (data, view) = copy(&mut pace, 0..200, 0, 50 * MIB, 3000 * MIB);
        assert_eq!((view.rate / MIB, view.rate_avg / MIB), (50, 50));
        let left = (3000 * MIB - data) / (50 * MIB);
        assert!(view.remaining.unwrap().as_secs().abs_diff(left) <= 1, "{:?}", view.remaining);
        assert_eq!(view.stalled, Duration::ZERO);
    }

    #[test]
    fn the_first_look_at_a_copy_knows_its_rate() {
        let mut pace = Pace::default();
        pace.look(at(0), Snapshot { phase: Phase::Prepare, ..job(0, 0, 0) });
        let view = pace.look(at(10), job(20 * MIB, 0, 100 * MIB));
        assert_eq!((view.rate, view.rate_avg, view.remaining), (20 * MIB, 20 * MIB, Some(at(40))));
    }

    #[test]
    fn the_rate_follows_within_its_window_and_the_average_does_not() {
        let mut pace = Pace::default();
        let (data, _) = copy(&mut pace, 0..100, 0, 100 * MIB, 9000 * MIB);
        let (_, view) = copy(&mut pace, 100..160, data, 10 * MIB, 9000 * MIB);
        assert_eq!(view.rate / MIB, 10);
        assert!((60..70).contains(&(view.rate_avg / MIB)), "{}", view.rate_avg / MIB);
    }

    #[test]
    fn the_percentage_never_falls_and_keeps_the_last_bit_for_the_end() {
        let mut pace = Pace::default();
        assert_eq!(pace.look(at(0), job(0, 0, 0)).percent, 0.0);
        assert_eq!(pace.look(at(1), job(50, 0, 100)).percent, 0.5);
        assert_eq!(pace.look(at(2), job(30, 0, 100)).percent, 0.5, "a claim that went back to dirty");
        for phase in [Phase::Copy, Phase::Flush, Phase::Publish] {
            let view = pace.look(at(3), Snapshot { phase, ..job(60, 40, 100) });
            assert_eq!(view.percent, 0.999, "{phase:?}");
        }
    }

    #[test]
    fn a_stall_is_counted_and_ends_with_the_next_byte() {
        let mut pace = Pace::default();
        let (data, _) = copy(&mut pace, 0..20, 0, MIB, 9000 * MIB);
        let (_, view) = copy(&mut pace, 20..120, data, 0, 9000 * MIB);
        assert_eq!(view.stalled, at(100));
        assert_eq!(view.rate, 0);
        assert_eq!(pace.look(at(120), job(data + 1, 0, 9000 * MIB)).stalled, Duration::ZERO);
    }

    #[test]
    fn long_stalls_leave_no_guess() {
        let mut pace = Pace::default();
        let (data, _) = copy(&mut pace, 0..20, 0, MIB, 9000 * MIB);
        let (_, view) = copy(&mut pace, 20..500, data, 0, 9000 * MIB);
        assert_eq!(view.remaining, None);
    }

    #[test]
    fn a_pause_is_no_stall_and_no_slowness() {
        let mut pace = Pace::default();
        let (data, _) = copy(&mut pace, 0..50, 0, 50 * MIB, 9000 * MIB);
        let stopped = Snapshot { paused: Some(Pause::Error), ..job(data, 0, 9000 * MIB) };
        let view = pace.look(at(800), stopped);
        assert_eq!((view.stalled, view.rate, view.remaining, view.status()), (Duration::ZERO, 0, None, "paused"));
        let (_, view) = copy(&mut pace, 801..821, data, 50 * MIB, 9000 * MIB);
        assert_eq!(view.rate / MIB, 50);
    }

    #[test]
    fn zeroes_count_as_done_but_not_as_data() {
        let mut pace = Pace::default();
        pace.look(at(0), job(0, 0, 100 * MIB));
        let view = pace.look(at(20), job(0, 50 * MIB, 100 * MIB));
        assert_eq!((view.rate, view.percent), (0, 0.5));
        assert_eq!(view.remaining, Some(at(20)));
    }

    #[test]
    fn each_phase_has_its_own_clock() {
        let mut pace = Pace::default();
        pace.look(at(0), job(0, 0, 10));
        let flush = Snapshot { phase: Phase::Flush, ..job(10, 0, 10) };
        assert_eq!(pace.look(at(50), flush).in_phase, Duration::ZERO);
        assert_eq!(pace.look(at(80), flush).in_phase, at(30));
    }

    #[test]
    fn looking_for_days_takes_no_memory() {
        let mut pace = Pace::default();
        for tenth in 0..20_000 {
            pace.look(at(tenth), job(tenth, 0, u64::MAX));
        }
        assert!(pace.samples.len() <= 130, "{}", pace.samples.len());
    }
}
