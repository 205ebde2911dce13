//! How long writes waited: a log-linear histogram, eight buckets an octave, so that a quantile is right to 12.5 %.

use std::time::Duration;

/// Number of buckets: from below 128 ns up to 36 minutes, and everything longer.
pub const BUCKETS: usize = 256;
/// Waits are counted in units of 128 ns.
const UNIT_BITS: u32 = 7;
/// Eight buckets an octave.
const STEP_BITS: u32 = 3;

/// The bucket of a wait.
pub fn bucket(wait: Duration) -> usize {
    let units = (wait.as_nanos() >> UNIT_BITS).min(u128::from(u64::MAX)) as u64;
    // What is left of `units` begins with the octave's own bit, which makes the number of the next octave.
    let shift = units.max(1).ilog2().saturating_sub(STEP_BITS);
    (((shift as usize) << STEP_BITS) + (units >> shift) as usize).min(BUCKETS - 1)
}

/// The longest wait that falls into a bucket.
fn longest(bucket: usize) -> Duration {
    let (octave, step) = (bucket as u32 >> STEP_BITS, bucket as u64 & ((1 << STEP_BITS) - 1));
    let next = match octave {
        0 => step + 1,
        _ => (step + 1 + (1 << STEP_BITS)) << (octave - 1),
    };
    Duration::from_nanos((next << UNIT_BITS) - 1)
}

/// Waits of one or several writers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stalls {
    buckets: [u64; BUCKETS],
    max: Duration,
}

impl Default for Stalls {
    fn default() -> Self {
        Self { buckets: [0; BUCKETS], max: Duration::ZERO }
    }
}

impl Stalls {
    /// Adds what a writer counted. The numbers are its own: any value is taken, none overflows.
    pub fn add(&mut self, counts: impl Iterator<Item = u64>, max: Duration) {
        for (bucket, count) in self.buckets.iter_mut().zip(counts) {
            *bucket = bucket.saturating_add(count);
        }
        self.max = self.max.max(max);
    }

    /// Adds what another has.
    pub fn merge(&mut self, other: &Self) {
        self.add(other.buckets.iter().copied(), other.max);
    }

    /// The wait that `percent` of a hundred did not exceed; zero if nobody waited.
    pub fn quantile(&self, percent: u64) -> Duration {
        let total = self.buckets.iter().fold(0_u64, |sum, &count| sum.saturating_add(count));
        if total == 0 {
            return Duration::ZERO;
        }
        let rank = (u128::from(total) * u128::from(percent)).div_ceil(100).max(1);
        let mut seen = 0_u128;
        for (bucket, &count) in self.buckets.iter().enumerate() {
            seen += u128::from(count);
            if seen >= rank {
                return longest(bucket).min(self.max);
            }
        }
        self.max
    }

    /// All waits added up, right to an eighth.
    pub fn sum(&self) -> Duration {
        let waits = self.buckets.iter().enumerate().map(|(bucket, &count)| {
            longest(bucket).min(self.max).saturating_mul(u32::try_from(count).unwrap_or(u32::MAX))
        });
        waits.fold(Duration::ZERO, Duration::saturating_add)
    }

    /// The longest wait.
    pub fn max(&self) -> Duration {
        self.max
    }
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    #[test]
    fn each_bucket_ends_where_the_next_begins() {
        for at in 0..BUCKETS - 1 {
            let end = longest(at);
            assert_eq!(bucket(end), at, "{end:?}");
            assert_eq!(bucket(end + Duration::from_nanos(1)), at + 1, "{end:?}");
        }
        assert_eq!(bucket(Duration::MAX), BUCKETS - 1);
    }

    #[test]
    fn quantiles_are_right_to_an_eighth() {
        let mut counts = [0_u64; BUCKETS];
        for micros in 1..=1000_u64 {
            counts[bucket(Duration::from_micros(micros))] += 1;
        }
        let mut stalls = Stalls::default();
        stalls.add(counts.into_iter(), Duration::from_micros(1000));
        for (percent, exact) in [(50, 500.0), (99, 990.0), (1, 10.0)] {
            let found = stalls.quantile(percent).as_secs_f64() * 1e6;
            assert!(found >= exact * 0.999 && found <= exact * 1.126, "p{percent}: {found}");
        }
        assert_eq!(stalls.quantile(100), Duration::from_micros(1000));
        assert_eq!(Stalls::default().quantile(50), Duration::ZERO);
        let sum = stalls.sum().as_secs_f64() * 1e6;
        assert!((500_500.0..500_500.0 * 1.126).contains(&sum), "{sum}");
    }

    #[test]
    fn the_waits_of_two_writers_are_added_up() {
        let waits = |micros: u64, count| {
            let (wait, mut stalls) = (Duration::from_micros(micros), Stalls::default());
            stalls.add((0..BUCKETS).map(|at| if at == bucket(wait) { count } else { 0 }), wait);
            stalls
        };
        let mut both = waits(10, 3);
        both.merge(&waits(1000, 1));
        assert_eq!(both.max(), Duration::from_micros(1000));
        assert!(both.quantile(75) < Duration::from_micros(12) && both.quantile(76) == both.max());
    }

    #[test]
    fn a_writers_numbers_never_overflow() {
        let mut stalls = Stalls::default();
        for _ in 0..3 {
            stalls.add(std::iter::repeat(u64::MAX), Duration::MAX);
        }
        assert!(stalls.quantile(99) > Duration::ZERO && stalls.sum() > Duration::ZERO);
    }
}
