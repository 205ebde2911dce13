//! Speeds by the time of day.

use crate::ground::size::parse_rate;
use std::fmt;

const DAY: u32 = 24 * 60;

/// Why a text is no schedule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NotASchedule(String);

impl fmt::Display for NotASchedule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for NotASchedule {}

/// From each of its times on its speed holds, every day; before the first one, the last one's of the day before.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Schedule {
    /// Minutes after midnight, ascending, and bytes a second; `None`: no limit. Not empty.
    steps: Vec<(u32, Option<u64>)>,
}

impl Schedule {
    /// `HH:MM=RATE`, separated by blanks or commas, in any order; a rate is what [`parse_rate`] takes. A time that comes
    /// twice contradicts itself and is refused.
    pub fn parse(text: &str) -> Result<Self, NotASchedule> {
        let words = text.split([' ', '\t', ',']).filter(|word| !word.is_empty());
        let mut steps: Vec<(u32, Option<u64>)> = words.map(step).collect::<Result<_, _>>()?;
        steps.sort_by_key(|&(minute, _)| minute);
        if let Some(twice) = steps.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            let (hour, minute) = (twice[0].0 / 60, twice[0].0 % 60);
            return Err(NotASchedule(format!("{hour:02}:{minute:02} is given twice")));
        }
        if steps.is_empty() {
            return Err(NotASchedule("it is empty; write a time and a speed, as in '08:00=10M 20:00=off'".to_owned()));
        }
        Ok(Self { steps })
    }

    /// Bytes a second at `minute` after midnight; `None`: no limit.
    pub fn rate_at(&self, minute: u32) -> Option<u64> {
        let begun = self.steps.iter().rev().find(|&&(begin, _)| begin <= minute % DAY);
        begun.or(self.steps.last()).and_then(|&(_, rate)| rate)
    }
}

fn step(word: &str) -> Result<(u32, Option<u64>), NotASchedule> {
    let wrong = |why: String| NotASchedule(format!("'{word}': {why}"));
    let (time, rate) = word.split_once('=').ok_or_else(|| wrong("write a time and a speed, as in 08:00=10M".into()))?;
    let minute = minute_of_day(time).ok_or_else(|| wrong("the time is one from 00:00 to 23:59".into()))?;
    let rate = parse_rate(rate).map_err(|error| wrong(error.to_string()))?;
    Ok((minute, rate))
}

/// Minutes after midnight of `HH:MM`.
fn minute_of_day(text: &str) -> Option<u32> {
    let (hour, minute) = text.split_once(':')?;
    let number = |text: &str, end: u32| {
        let digits = (1..=2).contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_digit());
        text.parse::<u32>().ok().filter(|&number| digits && number < end)
    };
    Some(number(hour, 24)? * 60 + number(minute, 60).filter(|_| minute.len() == 2)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    fn at(hour: u32, minute: u32) -> u32 {
        hour * 60 + minute
    }

    #[test]
    fn a_speed_holds_until_the_next_one_and_over_midnight() {
        let schedule = Schedule::parse("08:00=10M 20:00=off").unwrap();
        assert_eq!(schedule.rate_at(at(8, 0)), Some(10 * MIB));
        assert_eq!(schedule.rate_at(at(19, 59)), Some(10 * MIB));
        assert_eq!(schedule.rate_at(at(20, 0)), None);
        assert_eq!(schedule.rate_at(at(7, 59)), None, "since yesterday");
        assert_eq!(Schedule::parse("12:00=5M").unwrap().rate_at(0), Some(5 * MIB));
    }

    #[test]
    fn order_and_separators_do_not_matter() {
        let one = Schedule::parse("08:00=10M 20:00=off").unwrap();
        assert_eq!(Schedule::parse(" 20:00=0,\t8:00=10M, ").unwrap(), one);
    }

    #[test]
    fn nonsense_is_refused_and_named() {
        for (text, why) in [
            ("", "empty"),
            (" , ", "empty"),
            ("08:00", "'08:00'"),
            ("24:00=1M", "23:59"),
            ("08:60=1M", "23:59"),
            ("8=1M", "23:59"),
            ("08:0=1M", "23:59"),
            ("+8:00=1M", "23:59"),
            ("08:00=fast", "'08:00=fast'"),
            ("08:00=-1", "negative"),
            ("08:00=1M 08:00=2M", "08:00 is given twice"),
            ("08:00=1M 8:00=1M", "08:00 is given twice"),
        ] {
            let error = Schedule::parse(text).expect_err(text).to_string();
            assert!(error.contains(why), "{text}: {error}");
        }
    }

    proptest! {
        #![proptest_config(crate::ground::cases(256))]

        #[test]
        fn any_text_is_read_or_refused(text in "[0-9:=MGof ,-]{0,40}") {
            let _ = Schedule::parse(&text);
        }

        #[test]
        fn each_minute_has_the_speed_of_the_latest_step(
            steps in prop::collection::btree_map(0..DAY, 1..1000_u64, 1..8),
            minute in 0..DAY,
        ) {
            let words: Vec<_> = steps.iter().map(|(m, rate)| format!("{}:{:02}={rate}", m / 60, m % 60)).collect();
            let expected = steps.range(..=minute).next_back().or(steps.iter().next_back()).map(|(_, &rate)| rate);
            prop_assert_eq!(Schedule::parse(&words.join(" ")).unwrap().rate_at(minute), expected);
        }
    }
}
