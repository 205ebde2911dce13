//! Sizes, rates and durations as people write and read them.

use std::fmt;
use std::time::Duration;

const KIB: u64 = 1 << 10;
/// More digits after the point than any unit can use.
const FRACTION_DIGITS: usize = 18;

/// A text that is no size: what was wrong, with a hint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NotASize {
    text: String,
    why: &'static str,
}

impl fmt::Display for NotASize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} is not a size: {}", self.text, self.why)
    }
}

impl std::error::Error for NotASize {}

/// Bytes. `K M G T` in any case, `KiB MiB GiB TiB`: powers of 1024; `kB MB GB TB`: powers of 1000; none, or `B`: bytes.
/// Fractions are cut to whole bytes, and refused where less than one byte is left.
pub fn parse_size(text: &str) -> Result<u64, NotASize> {
    parse(text.trim()).map_err(|why| NotASize { text: text.to_owned(), why })
}

/// Bytes a second, as [`parse_size`]; `0`, `off` and `unlimited` are `None`: no limit.
pub fn parse_rate(text: &str) -> Result<Option<u64>, NotASize> {
    if ["off", "unlimited"].iter().any(|word| text.trim().eq_ignore_ascii_case(word)) {
        return Ok(None);
    }
    parse_size(text).map(|rate| (rate > 0).then_some(rate))
}

fn parse(text: &str) -> Result<u64, &'static str> {
    if text.starts_with('-') {
        return Err("it is negative");
    }
    let number_end = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(number_end);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
    let digits = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
    if !digits(whole) || !digits(fraction) {
        return Err("write digits and a unit, as in 50M, 1.5G or 64KiB");
    }
    let unit = unit_bytes(unit.trim_start())?;
    if unit == 1 && number.contains('.') {
        return Err("a fraction needs a unit, as in 1.5G");
    }
    scale(whole, fraction, unit)
}

fn unit_bytes(unit: &str) -> Result<u64, &'static str> {
    if matches!(unit, "" | "B") {
        return Ok(1);
    }
    if unit.contains("/s") || unit.to_ascii_lowercase().ends_with("ps") {
        return Err("a rate is per second without saying so: write 50M");
    }
    let mut letters = unit.chars();
    let power = letters.next().and_then(|letter| "kmgt".find(letter.to_ascii_lowercase()));
    let power = power.ok_or("units are K, M, G, T (1024), KiB, MiB, ... and kB, MB, ... (1000)")? as u32 + 1;
    match letters.as_str() {
        "" | "iB" => Ok(KIB.pow(power)),
        "B" => Ok(1000_u64.pow(power)),
        "b" | "ib" | "bit" | "ibit" | "bits" => {
            Err("'b' may mean bits: write 50M (or MiB), or 50MB for powers of 1000")
        }
        _ => Err("units are K, M, G, T (1024), KiB, MiB, ... and kB, MB, ... (1000)"),
    }
}

/// Exact: no floating point, so that 2^53 + 1 stays what it is.
fn scale(whole: &str, fraction: &str, unit: u64) -> Result<u64, &'static str> {
    let too_large = "it is larger than 16 EiB";
    let whole: u64 = whole.parse().map_err(|_| too_large)?;
    let has_fraction = fraction.bytes().any(|digit| digit != b'0');
    let fraction = &fraction[..fraction.len().min(FRACTION_DIGITS)];
    let parts = fraction.parse::<u128>().expect("at most 18 digits");
    let part_bytes = parts * u128::from(unit) / 10_u128.pow(fraction.len() as u32);
    let bytes = u128::from(whole) * u128::from(unit) + part_bytes;
    if bytes == 0 && has_fraction {
        return Err("it is less than one byte");
    }
    u64::try_from(bytes).map_err(|_| too_large)
}

/// Bytes for people: `512 B`, `1.50 GiB`; three digits that count.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Bytes(pub u64);

impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0 < KIB {
            return f.pad(&format!("{} B", self.0));
        }
        let mut units = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"].into_iter();
        let mut unit = units.next().expect("not empty");
        let mut value = self.0 as f64 / KIB as f64;
        // From here on it would print as 1024.
        while value >= 1023.5 {
            let Some(larger) = units.next() else { break };
            unit = larger;
            value /= KIB as f64;
        }
        let decimals = match value {
            99.95.. => 0,
            9.995.. => 1,
            _ => 2,
        };
        f.pad(&format!("{value:.decimals$} {unit}"))
    }
}

/// Bytes a second for people: `51.2 MiB/s`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate(pub u64);

impl fmt::Display for Rate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{}/s", Bytes(self.0)))
    }
}

/// A time span for people: `0:07`, `12:34`, `2:03:04`, `3d 04:05:06`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Clock(pub Duration);

impl fmt::Display for Clock {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = self.0.as_secs();
        let (days, hours, minutes, seconds) = (seconds / 86400, seconds / 3600 % 24, seconds / 60 % 60, seconds % 60);
        match (days, hours) {
            (0, 0) => write!(f, "{minutes}:{seconds:02}"),
            (0, _) => write!(f, "{hours}:{minutes:02}:{seconds:02}"),
            _ => write!(f, "{days}d {hours:02}:{minutes:02}:{seconds:02}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn letters_and_ib_are_powers_of_1024() {
        for (text, bytes) in [
            ("0", 0),
            ("1", 1),
            ("4096", 4096),
            ("7B", 7),
            ("10k", 10240),
            ("10K", 10240),
            ("10KiB", 10240),
            ("50M", 50 << 20),
            ("50m", 50 << 20),
            ("50 MiB", 50 << 20),
            ("1.5G", 3 << 29),
            ("2T", 2 << 40),
            ("0.1K", 102),
            ("9007199254740993", (1 << 53) + 1),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn b_alone_makes_powers_of_1000() {
        for (text, bytes) in [("1kB", 1000), ("1KB", 1000), ("50MB", 50_000_000), ("1.5GB", 1_500_000_000)] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        assert_eq!(parse_size("2TB"), Ok(2_000_000_000_000));
    }

    #[test]
    fn refusals_say_why() {
        for (text, hint) in [
            ("50Mb", "bits"),
            ("50mb", "bits"),
            ("50Mib", "bits"),
            ("50Mbit", "bits"),
            ("50M/s", "per second"),
            ("50Mbps", "per second"),
            ("50MBps", "per second"),
            ("-1", "negative"),
            ("-50M", "negative"),
            ("18446744073709551616", "16 EiB"),
            ("16777216T", "16 EiB"),
            ("99999999999999999999999999", "16 EiB"),
            ("1e99", "units are"),
            ("1e3", "units are"),
            ("50Mega", "units are"),
            ("50X", "units are"),
            ("50€", "units are"),
            ("nan", "digits"),
            ("inf", "digits"),
            ("", "digits"),
            ("M", "digits"),
            ("+5", "digits"),
            (".5G", "digits"),
            ("5.G", "digits"),
            ("1.2.3G", "digits"),
            ("0x10", "units are"),
            ("1.5", "fraction"),
            ("0.0001K", "less than one byte"),
        ] {
            let error = parse_size(text).expect_err(text).to_string();
            assert!(error.contains(hint), "{text}: {error}");
            assert!(error.contains(&format!("{text:?}")), "{text}: {error}");
        }
    }

    #[test]
    fn no_limit_has_three_names() {
        for text in ["0", "0M", "0.0G", "off", "OFF", "unlimited"] {
            assert_eq!(parse_rate(text), Ok(None), "{text}");
        }
        assert_eq!(parse_rate("50M"), Ok(Some(50 << 20)));
        assert!(parse_rate("none").is_err());
        assert!(parse_rate("0.1B").is_err(), "never silently unlimited");
        assert!(parse_rate("0.0000001K").is_err(), "never silently unlimited");
        assert!(parse_rate("0.0000000000000000000000001K").is_err(), "never silently unlimited");
    }

    #[test]
    fn people_read_three_digits() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1.00 KiB"),
            (10 << 10, "10.0 KiB"),
            (999 << 10, "999 KiB"),
            ((1 << 20) - 1, "1.00 MiB"),
            (50 << 20, "50.0 MiB"),
            (3 << 29, "1.50 GiB"),
            (16 << 40, "16.0 TiB"),
            (u64::MAX, "16.0 EiB"),
        ] {
            assert_eq!(Bytes(bytes).to_string(), text);
        }
        assert_eq!(Rate(51 << 20).to_string(), "51.0 MiB/s");
        assert_eq!(format!("{:>12}|", Rate(1)), "       1 B/s|");
    }

    #[test]
    fn clocks_grow_with_the_time() {
        for (seconds, text) in [(7, "0:07"), (754, "12:34"), (7384, "2:03:04"), (273_906, "3d 04:05:06")] {
            assert_eq!(Clock(Duration::from_secs(seconds)).to_string(), text);
        }
    }

    proptest! {
        #![proptest_config(crate::ground::cases(256))]

        #[test]
        fn no_text_panics(text in "\\PC{0,24}") {
            let _ = parse_rate(&text);
        }

        #[test]
        fn bytes_come_back(bytes: u64) {
            prop_assert_eq!(parse_size(&bytes.to_string()), Ok(bytes));
        }

        #[test]
        fn halves_are_exact(halves in 0..1_u64 << 32) {
            let text = format!("{}.{}K", halves / 2, halves % 2 * 5);
            prop_assert_eq!(parse_size(&text), Ok(halves * 512));
        }
    }
}
