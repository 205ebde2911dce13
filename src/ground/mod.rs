//! Floor 0: values and their arithmetic. No clock, no I/O, no locks.

pub mod bitmap;
pub mod cluster;
pub mod life;
pub mod policy;
pub mod range;
pub mod size;
pub mod speed;
pub mod status;
pub mod throttle;
pub mod zero;

/// Settings of property tests: `cases` of them, few under Miri, which is a hundred times slower and has no files.
#[cfg(test)]
pub(crate) fn cases(cases: u32) -> proptest::test_runner::Config {
    let cases = if cfg!(miri) { 5 } else { cases };
    proptest::test_runner::Config { cases, failure_persistence: None, ..Default::default() }
}
