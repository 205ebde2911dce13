//! Floor 0: values and their arithmetic. No clock, no I/O, no locks.

pub mod bitmap;
pub mod cluster;
pub mod policy;
pub mod range;
pub mod size;
pub mod status;
pub mod throttle;
pub mod zero;
