//! Exit codes: stable, for scripts and monitors. An unknown one is a failure.

use crate::error::Kind;

/// Complete as of the instant, flushed, published.
pub const COMPLETE: u8 = 0;
/// Anything that has no code of its own.
pub const OTHER: u8 = 1;
/// Complete, but with unreadable source ranges or skipped target ranges.
pub const NOT_WHOLE: u8 = 3;
/// A shell's code for a process that signal N ended is this and N.
const SIGNAL: i32 = 128;

/// The exit code and the reason's name in JSON.
pub fn of(kind: Kind) -> (u8, &'static str) {
    match kind {
        Kind::Other => (OTHER, "other"),
        Kind::Usage => (2, "usage"),
        Kind::Source => (4, "source"),
        Kind::Target => (5, "target"),
        Kind::InstantLost => (6, "instant_lost"),
        Kind::Differs => (7, "differs"),
        Kind::Busy => (8, "busy"),
        Kind::Hook => (9, "hook"),
        Kind::Deadline => (10, "deadline"),
        // By a client of QMP: a signal has a code of its own.
        Kind::Cancelled => (OTHER, "cancelled"),
    }
}

/// A copy was made, though ranges of it may be missing.
pub fn is_success(code: u8) -> bool {
    matches!(code, COMPLETE | NOT_WHOLE)
}

/// The code of several disks: of the first that failed; without one, [`NOT_WHOLE`] if ranges of any are missing.
pub fn of_all(codes: impl IntoIterator<Item = u8>) -> u8 {
    let worse = |code: u8, next| if is_success(code) && next != COMPLETE { next } else { code };
    codes.into_iter().fold(COMPLETE, worse)
}

/// The code that a shell shows for a process that `signal` ended.
pub fn of_signal(signal: i32) -> u8 {
    u8::try_from(SIGNAL + signal).unwrap_or(OTHER)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_is_the_promised_one() {
        for (kind, code) in [
            (Kind::Other, 1),
            (Kind::Usage, 2),
            (Kind::Source, 4),
            (Kind::Target, 5),
            (Kind::InstantLost, 6),
            (Kind::Differs, 7),
            (Kind::Busy, 8),
            (Kind::Hook, 9),
            (Kind::Deadline, 10),
        ] {
            assert_eq!(of(kind).0, code, "{kind:?}");
        }
        assert_eq!((of_signal(1), of_signal(2), of_signal(15)), (129, 130, 143));
    }

    #[test]
    fn of_several_the_first_failure_counts_and_missing_ranges_only_without_one() {
        for (codes, code) in
            [(&[0, 0][..], 0), (&[0, 3, 0], 3), (&[3, 5, 4], 5), (&[0, 4, 3, 5], 4), (&[5, 130], 5), (&[130, 0], 130)]
        {
            assert_eq!(of_all(codes.iter().copied()), code, "{codes:?}");
        }
    }
}
