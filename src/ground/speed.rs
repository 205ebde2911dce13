//! What decides the speed of a job while it runs: a schedule, a time to arrive at, or how its writers fare.

mod courtesy;
mod schedule;

pub use courtesy::{Courtesy, FIRST, Sample};
pub use schedule::{NotASchedule, Schedule};

use std::time::Duration;

/// How much of a time of `window` is kept for the flush, and for what can't be foreseen: a twentieth, ten minutes at most.
pub fn reserve(window: Duration) -> Duration {
    (window / 20).min(Duration::from_secs(600))
}

/// The lowest speed in bytes a second that moves `remaining` bytes in `left`; `None`: as fast as it goes, since it is
/// late already.
pub fn to_arrive_in(left: Duration, remaining: u64) -> Option<u64> {
    let rate = (remaining as f64 / left.as_secs_f64()).ceil();
    // Above 2^53 no disk moves, and an empty time is infinitely fast.
    (rate < 9e15).then_some((rate as u64).max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_left_is_spread_over_the_time() {
        assert_eq!(to_arrive_in(Duration::from_secs(100), 100_000), Some(1000));
        assert_eq!(to_arrive_in(Duration::from_secs(3600), 1), Some(1));
        assert_eq!(to_arrive_in(Duration::from_secs(3600), 0), Some(1), "0 would be no limit");
        assert_eq!(to_arrive_in(Duration::ZERO, 1000), None);
        assert_eq!(to_arrive_in(Duration::ZERO, 0), None);
        assert!(to_arrive_in(Duration::from_secs(u64::MAX), u64::MAX).is_some());
        let second = Duration::from_secs(1);
        assert_eq!(to_arrive_in(second, 9_000_000_000_000_000), None, "no disk is that fast");
        assert_eq!(to_arrive_in(second, 8_999_999_999_999_999), Some(8_999_999_999_999_999));
    }

    #[test]
    fn a_twentieth_is_kept_in_reserve_and_ten_minutes_at_most() {
        assert_eq!(reserve(Duration::from_secs(1000)), Duration::from_secs(50));
        assert_eq!(reserve(Duration::from_secs(86400)), Duration::from_secs(600));
    }

    #[test]
    fn asking_again_on_the_way_arrives_in_time_though_half_the_disk_turns_out_to_be_empty() {
        let total = 100_000_000_u64;
        let window = 1000 - reserve(Duration::from_secs(1000)).as_secs();
        let (mut done, mut highest) = (0.0, 0_u64);
        for second in 0..window {
            let rate = to_arrive_in(Duration::from_secs(window - second), total - done as u64).unwrap();
            highest = highest.max(rate);
            // Zeroes cost nothing: in the first half, every second byte.
            done += rate as f64 * if done < total as f64 / 2.0 { 2.0 } else { 1.0 };
            if done as u64 >= total {
                assert!(second > 900, "as slow as still arrives: {second} s");
                assert!(highest <= 105_264, "never faster than at first: {highest}");
                return;
            }
        }
        panic!("late: {done}");
    }
}
