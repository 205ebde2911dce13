//! Backing off while writers wait longer than they do beside a slow copy.

use std::time::Duration;

/// Waits below it nobody minds, whatever they were before.
const TOLERABLE: Duration = Duration::from_micros(200);
/// Waits of so many times the shortest seen are the copy's doing.
const WORSE: u32 = 2;
/// Fewer waits in one look say nothing.
const ENOUGH: u64 = 8;
/// The slowest: a backup that never ends helps nobody. Bytes a second.
const SLOWEST: f64 = (1 << 20) as f64;
/// What a job begins with that is yet to find its speed; beside it the waits are taken that others are compared with. Bytes
/// a second.
pub const FIRST: u64 = 8 << 20;

/// What was seen since the look before.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Sample {
    /// How long it was.
    pub elapsed: Duration,
    /// Bytes that were copied.
    pub copied: u64,
    /// Is there a writer?
    pub has_writers: bool,
    /// Writes that waited.
    pub waits: u64,
    /// How long they waited, added up.
    pub waited: Duration,
}

/// It begins slowly and doubles until writers feel it; then it is a third less whenever they do, and a twentieth more at
/// each look while they don't.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Courtesy {
    rate: Option<f64>,
    was_felt: bool,
    /// The shortest wait on average; rises slowly, so that a disk that became slower is not blamed for ever.
    shortest: Option<Duration>,
}

impl Courtesy {
    /// Bytes a second from now on; `None`: no limit, for nobody writes.
    pub fn look(&mut self, sample: Sample) -> Option<u64> {
        if !sample.has_writers {
            *self = Self::default();
            return None;
        }
        let is_felt = sample.waits >= ENOUGH && {
            let wait = sample.waited / u32::try_from(sample.waits).unwrap_or(u32::MAX);
            let shortest = self.shortest.map_or(wait, |shortest| wait.min(shortest.saturating_add(shortest / 1000)));
            self.shortest = Some(shortest);
            wait > TOLERABLE.max(shortest.saturating_mul(WORSE))
        };
        let speed = sample.copied as f64 / sample.elapsed.as_secs_f64().max(1e-3);
        let rate = match self.rate {
            None => FIRST as f64,
            Some(rate) if is_felt => (rate.min(speed) * 0.67).max(SLOWEST),
            // A limit that is not used is raised no further, lest it takes long to be felt again.
            Some(rate) if speed < rate / 2.0 => rate,
            Some(rate) => rate * if self.was_felt { 1.05 } else { 2.0 },
        };
        self.was_felt |= is_felt;
        self.rate = Some(rate);
        Some(rate as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: f64 = (1 << 20) as f64;
    const LOOK: Duration = Duration::from_millis(250);

    fn sample(speed: f64, waits: u64, wait: Duration) -> Sample {
        let copied = (speed * LOOK.as_secs_f64()) as u64;
        Sample { elapsed: LOOK, copied, has_writers: true, waits, waited: wait * waits as u32 }
    }

    /// A disk that serves 200 MiB/s: up to half of it a writer's waits are `shortest`, then they grow as in a queue.
    /// Returns the speed in MiB/s, and the average wait, of each look.
    fn simulate(looks: usize, shortest: Duration, waits: impl Fn(usize) -> u64) -> Vec<(f64, Duration)> {
        let mut courtesy = Courtesy::default();
        let mut rate = Some(0);
        let mut seen = Vec::new();
        for look in 0..looks {
            let speed = rate.map_or(190.0 * MIB, |rate: u64| (rate as f64).min(190.0 * MIB));
            let wait = shortest.mul_f64((0.5 / (1.0 - speed / (200.0 * MIB))).max(1.0));
            rate = courtesy.look(sample(speed, waits(look), wait));
            seen.push((speed / MIB, wait));
        }
        seen
    }

    #[test]
    fn it_settles_where_writers_hardly_feel_it() {
        let settled = &simulate(600, Duration::from_millis(1), |_| 200)[100..];
        let average = settled.iter().map(|(speed, _)| speed).sum::<f64>() / settled.len() as f64;
        assert!((90.0..160.0).contains(&average), "{average} MiB/s");
        let felt = settled.iter().filter(|(_, wait)| *wait > Duration::from_millis(2)).count();
        assert!(felt * 5 < settled.len(), "{felt} looks of {}", settled.len());
    }

    #[test]
    fn writers_that_suffer_get_a_third_back_at_once() {
        let mut courtesy = Courtesy::default();
        let well = Duration::from_millis(1);
        for speed in [0.0, 8.0, 16.0, 32.0] {
            assert_eq!(
                courtesy.look(sample(speed * MIB, 100, well)),
                Some((speed * 2.0 * MIB).max(FIRST as f64) as u64)
            );
        }
        assert_eq!(courtesy.look(sample(64.0 * MIB, 100, well * 3)), Some((64.0 * 0.67 * MIB) as u64));
        assert_eq!(courtesy.look(sample(42.88 * MIB, 100, well)), Some((64.0 * 0.67 * 1.05 * MIB) as u64));
    }

    #[test]
    fn twice_the_shortest_wait_is_not_felt_yet() {
        let mut courtesy = Courtesy::default();
        courtesy.look(sample(MIB, 100, Duration::from_millis(1)));
        // The shortest has risen by a thousandth.
        let rate = courtesy.look(sample(8.0 * MIB, 100, Duration::from_micros(2002)));
        assert_eq!(rate, Some(2 * FIRST));
    }

    #[test]
    fn a_limit_of_which_less_than_half_is_used_is_not_raised() {
        let mut courtesy = Courtesy::default();
        let used = [8.0, 3.99, 4.0].map(|speed| courtesy.look(sample(speed * MIB, 0, LOOK)));
        assert_eq!(used, [Some(FIRST), Some(FIRST), Some(2 * FIRST)]);
    }

    #[test]
    fn waits_that_nobody_minds_and_few_of_them_cost_no_speed() {
        for (wait, waits) in [(Duration::from_micros(10), 1000), (Duration::from_millis(1), ENOUGH - 1)] {
            assert!(simulate(100, wait, |_| waits)[20..].iter().all(|(speed, _)| *speed > 189.0));
        }
    }

    #[test]
    fn what_was_taken_is_given_back_when_writers_rest_or_leave() {
        let waits = |look| if look < 50 { 500 } else { 0 };
        assert!(simulate(400, Duration::from_millis(5), waits)[399].0 > 189.0);
        let mut courtesy = Courtesy::default();
        assert!(courtesy.look(sample(MIB, 100, LOOK)).is_some());
        assert_eq!(courtesy.look(Sample { has_writers: false, ..sample(MIB, 0, LOOK) }), None);
    }

    #[test]
    fn it_never_stops_the_copy_whatever_a_writer_says_of_itself() {
        let mut courtesy = Courtesy::default();
        let all = |elapsed, copied, waits, waited| Sample { elapsed, copied, has_writers: true, waits, waited };
        for sample in [
            all(LOOK, 1, 1000, Duration::from_micros(1)),
            all(LOOK, 1, 1000, Duration::MAX),
            all(Duration::ZERO, u64::MAX, u64::MAX, Duration::MAX),
            all(Duration::MAX, u64::MAX, 8, Duration::MAX),
            all(Duration::ZERO, 0, u64::MAX, Duration::ZERO),
        ] {
            for _ in 0..100 {
                assert!(courtesy.look(sample).is_some_and(|rate| rate >= SLOWEST as u64), "{sample:?}");
            }
        }
    }
}
