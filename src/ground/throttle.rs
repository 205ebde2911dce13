//! A rate limit: work is charged when its size is known, and who comes next sleeps the debt off.

use std::time::Duration;

/// Credit and the advised size of a step are this long at the rate: a wake-up that is late by less loses nothing, and
/// a stall is not made up for by more.
const SLICE: Duration = Duration::from_millis(100);
/// Bytes. Smaller steps cost more than they smooth.
const SMALLEST_STEP: u64 = 4 << 10;
const NANOS_PER_SECOND: i128 = 1_000_000_000;

/// A bucket with debt. Pure: time is passed in, as the time since any fixed moment, and nobody sleeps here.
#[derive(Clone, Debug)]
pub struct Throttle {
    /// Bytes per second; `None` is no limit.
    rate: Option<u64>,
    /// In bytes times nanoseconds per second, so that nothing is rounded while it lasts. Below zero it is a debt.
    balance: i128,
    /// Up to when the balance is reckoned; nothing before the first question.
    reckoned: Option<Duration>,
}

impl Throttle {
    /// `rate` in bytes per second; `None` and 0 are no limit.
    pub fn new(rate: Option<u64>) -> Self {
        Self { rate: limit(rate), balance: 0, reckoned: None }
    }

    /// `bytes` were moved, or are about to be.
    pub fn charge(&mut self, bytes: u64) {
        if self.rate.is_some() {
            self.balance = self.balance.saturating_sub(i128::from(bytes) * NANOS_PER_SECOND);
        }
    }

    /// How long to sleep before the next step; zero: go. Ask again after the sleep, however long it was.
    pub fn delay(&mut self, now: Duration) -> Duration {
        self.reckon(now);
        let Some(rate) = self.rate else { return Duration::ZERO };
        let debt = self.balance.min(0).unsigned_abs();
        Duration::from_nanos(u64::try_from(debt.div_ceil(u128::from(rate))).unwrap_or(u64::MAX))
    }

    /// Changes the rate. Wake sleepers afterwards: a debt in bytes is sooner paid at a higher rate, and at a lower one
    /// it takes no longer than it would have.
    pub fn set_rate(&mut self, rate: Option<u64>, now: Duration) {
        self.reckon(now);
        let before = self.rate;
        self.rate = limit(rate);
        self.balance = match (before, self.rate) {
            // Divided first: it can't overflow, and is off by less than a nanosecond.
            (Some(before), Some(rate)) => self.balance / i128::from(before) * i128::from(rate.min(before)),
            _ => 0,
        };
    }

    /// Bytes that one step should move at most, with `workers` at work: steps much longer than that keep the average, but
    /// not an even flow, and `workers` of them at once are a burst.
    pub fn step(&self, workers: usize) -> u64 {
        match self.rate {
            Some(rate) => (worth(rate) / workers.max(1) as u64).max(SMALLEST_STEP),
            None => u64::MAX,
        }
    }

    fn reckon(&mut self, now: Duration) {
        let elapsed = now.saturating_sub(self.reckoned.unwrap_or(now));
        self.reckoned = Some(now.max(self.reckoned.unwrap_or(now)));
        let Some(rate) = self.rate else { return };
        let earned = i128::from(rate).saturating_mul(i128::try_from(elapsed.as_nanos()).unwrap_or(i128::MAX));
        let most = i128::from(worth(rate)) * NANOS_PER_SECOND;
        self.balance = self.balance.saturating_add(earned).min(most);
    }
}

fn limit(rate: Option<u64>) -> Option<u64> {
    // Half the range is no limit in practice, and the products of two of them fit 128 bits.
    rate.filter(|&rate| rate > 0).map(|rate| rate.min(u64::MAX / 2))
}

/// Bytes of one slice.
fn worth(rate: u64) -> u64 {
    (u128::from(rate) * SLICE.as_nanos() / NANOS_PER_SECOND.unsigned_abs()) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    /// xorshift: the same jitter in every run.
    struct Jitter(u64);

    impl Jitter {
        fn below(&mut self, bound: u64) -> u64 {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0 % bound
        }
    }

    fn rates() -> &'static [u64] {
        if cfg!(miri) { &[MIB] } else { &[MIB, 50 * MIB, 500 * MIB] }
    }

    fn workers() -> &'static [usize] {
        if cfg!(miri) { &[2] } else { &[1, 2, 16] }
    }

    fn seconds(s: u64) -> Duration {
        Duration::from_secs(s)
    }

    /// `workers` gate, move at most `charge` bytes in no time, charge and gate again, with wake-ups that are late by up to
    /// `late` (or early by a tenth, as a verb may wake them). Returns the bytes that were let through before `end`.
    fn simulate(
        throttle: &mut Throttle,
        workers: usize,
        charge: u64,
        late: Duration,
        from: Duration,
        end: Duration,
    ) -> u64 {
        let mut jitter = Jitter(0x9e37_79b9_7f4a_7c15 ^ charge ^ workers as u64);
        let mut wake = vec![from; workers];
        let mut moved = 0;
        loop {
            let worker = (0..workers).min_by_key(|&worker| wake[worker]).unwrap();
            let now = wake[worker];
            if now >= end {
                return moved;
            }
            let delay = throttle.delay(now);
            if delay.is_zero() {
                let bytes = charge / 2 + jitter.below(charge / 2) + 1;
                throttle.charge(bytes);
                moved += bytes;
                wake[worker] = now + Duration::from_nanos(jitter.below(1_000_000));
            } else if jitter.below(10) == 0 {
                wake[worker] = now + delay * 9 / 10 + Duration::from_nanos(1);
            } else {
                wake[worker] = now + delay + Duration::from_nanos(jitter.below(late.as_nanos() as u64));
            }
        }
    }

    fn assert_within_5_percent(moved: u64, rate: u64, time: Duration) {
        let ratio = moved as f64 / (rate as f64 * time.as_secs_f64());
        assert!((0.95..=1.05).contains(&ratio), "{ratio} of {rate} bytes/s");
    }

    #[test]
    fn rate_is_kept_within_5_percent_over_10_seconds_with_late_sleepers() {
        for &rate in rates() {
            for &workers in workers() {
                for late in [1, 20, 90] {
                    let mut throttle = Throttle::new(Some(rate));
                    let charge = throttle.step(workers).min(MIB);
                    let late = Duration::from_millis(late);
                    let moved = simulate(&mut throttle, workers, charge, late, seconds(5), seconds(15));
                    assert_within_5_percent(moved, rate, seconds(10));
                }
            }
        }
    }

    #[test]
    fn rate_is_kept_with_steps_of_a_mebibyte_once_they_are_paid() {
        for &rate in rates() {
            for &workers in workers() {
                let mut throttle = Throttle::new(Some(rate));
                let late = Duration::from_millis(50);
                let moved = simulate(&mut throttle, workers, MIB, late, seconds(0), seconds(10));
                let paid = seconds(10) + throttle.delay(seconds(10));
                assert_within_5_percent(moved, rate, paid);
            }
        }
    }

    #[test]
    fn a_job_of_whole_mebibytes_takes_its_time_at_1_mib_per_second() {
        let mut throttle = Throttle::new(Some(MIB));
        let mut now = seconds(0);
        for _ in 0..10 {
            now += throttle.delay(now);
            throttle.charge(MIB);
        }
        now += throttle.delay(now);
        assert_eq!(now, seconds(10));
    }

    #[test]
    fn late_wake_ups_lose_nothing_up_to_a_slice() {
        let mut throttle = Throttle::new(Some(1000));
        throttle.charge(1000);
        assert_eq!(throttle.delay(seconds(0)), seconds(1));
        assert_eq!(throttle.delay(Duration::from_millis(1090)), Duration::ZERO);
        throttle.charge(1000);
        assert_eq!(throttle.delay(Duration::from_millis(1090)), Duration::from_millis(910));
    }

    #[test]
    fn a_stall_gives_no_burst() {
        let mut throttle = Throttle::new(Some(50 * MIB));
        simulate(&mut throttle, 4, MIB, Duration::from_millis(1), seconds(0), seconds(1));
        let moved = simulate(&mut throttle, 4, MIB, Duration::from_millis(1), seconds(3600), seconds(3601));
        assert!(moved <= 50 * MIB * 11 / 10 + 4 * MIB, "{moved} bytes in the second after a stall");
    }

    #[test]
    fn a_slice_is_shared_by_the_workers_down_to_the_smallest_step() {
        let throttle = Throttle::new(Some(100 * MIB));
        assert_eq!([0, 1, 4].map(|workers| throttle.step(workers)), [10 * MIB, 10 * MIB, 10 * MIB / 4]);
        assert_eq!(throttle.step(1 << 20), SMALLEST_STEP);
    }

    #[test]
    fn no_limit_never_delays() {
        for rate in [None, Some(0)] {
            let mut throttle = Throttle::new(rate);
            throttle.charge(u64::MAX);
            assert_eq!(throttle.delay(seconds(1)), Duration::ZERO);
            assert_eq!(throttle.step(1), u64::MAX);
        }
    }

    #[test]
    fn a_higher_rate_pays_the_debt_sooner_and_a_lower_one_not_later() {
        let mut throttle = Throttle::new(Some(1000));
        throttle.charge(10_000);
        assert_eq!(throttle.delay(seconds(0)), seconds(10));
        throttle.set_rate(Some(10_000), seconds(5));
        assert_eq!(throttle.delay(seconds(5)), Duration::from_millis(500));
        throttle.set_rate(Some(10), seconds(5));
        assert_eq!(throttle.delay(seconds(5)), Duration::from_millis(500));
        throttle.set_rate(None, seconds(5));
        assert_eq!(throttle.delay(seconds(5)), Duration::ZERO);
        throttle.set_rate(Some(10), seconds(6));
        assert_eq!(throttle.delay(seconds(6)), Duration::ZERO);
        throttle.charge(20);
        assert_eq!(throttle.delay(seconds(6)), seconds(2));
    }

    #[test]
    fn a_lower_rate_brings_no_credit_of_the_higher_one() {
        let mut throttle = Throttle::new(Some(1000));
        throttle.delay(seconds(0));
        throttle.delay(seconds(1));
        throttle.set_rate(Some(10), seconds(1));
        throttle.charge(11);
        assert_eq!(throttle.delay(seconds(1)), seconds(1));
    }

    #[test]
    fn extremes_neither_overflow_nor_panic() {
        for rate in [1, 7, u64::MAX - 1, u64::MAX] {
            let mut throttle = Throttle::new(Some(rate));
            for _ in 0..3 {
                throttle.charge(u64::MAX);
                throttle.delay(Duration::MAX);
            }
            assert!(throttle.delay(Duration::MAX) > Duration::ZERO);
            throttle.set_rate(Some(rate / 2 + 1), Duration::MAX);
            throttle.set_rate(Some(1), Duration::ZERO);
            assert!(throttle.step(0) >= SMALLEST_STEP);
        }
    }
}
