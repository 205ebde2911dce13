//! The shared-memory ring between a writer and a backup, and how the two find each other.
//!
//! docs/RING.md specifies it byte by byte; [`layout`] and [`packet`] are its source. Floors: `layout`, `packet` and
//! `stall` 0, `bits`, `gate`, `meeting` and `queue` 2, `shm`, `socket` and `folder` 3, `server` 4.

pub mod bits;
pub mod gate;
pub mod layout;
pub mod meeting;
pub mod packet;
pub mod queue;
pub mod stall;

// What follows lives in memory that is really shared, which no model checker can stand in for.
#[cfg(not(any(loom, shuttle)))]
pub mod folder;
#[cfg(not(any(loom, shuttle)))]
pub mod futex;
#[cfg(all(feature = "engine", not(any(loom, shuttle))))]
pub mod server;
#[cfg(not(any(loom, shuttle)))]
pub mod shm;
#[cfg(not(any(loom, shuttle)))]
pub mod socket;

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests;
