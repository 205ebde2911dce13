//! Who holds each cluster as of the instant, and who may overwrite it.

pub mod copy_state;
#[cfg(feature = "engine")]
pub mod overlay;
#[cfg(feature = "engine")]
pub mod preserve;
pub mod tracker;
#[cfg(feature = "engine")]
pub mod unallocated;
