//! Sizes, rates, schedules and NBD URIs: what people write. What is taken must mean something, what is refused is said in
//! one line.
#![no_main]

use drive_backup::ground::size::{Bytes, parse_rate, parse_size};
use drive_backup::ground::speed::Schedule;
use drive_backup::nbd::uri::Uri;
use libfuzzer_sys::fuzz_target;

fn one_line(text: &str, refusal: &str) {
    assert!(!refusal.is_empty());
    assert!(!refusal.contains('\n') || text.contains('\n'), "{refusal:?} of {text:?}");
}

fuzz_target!(|text: &str| {
    match parse_size(text) {
        Ok(size) => drop(Bytes(size).to_string()),
        Err(error) => one_line(text, &error.to_string()),
    }
    assert_ne!(parse_rate(text), Ok(Some(0)), "no limit is None");
    match Schedule::parse(text) {
        Ok(schedule) => (0..24 * 60).for_each(|minute| assert_ne!(schedule.rate_at(minute), Some(0))),
        Err(error) => one_line(text, &error.to_string()),
    }
    if let Err(error) = text.parse::<Uri>() {
        one_line(text, &error.to_string());
    }
});
