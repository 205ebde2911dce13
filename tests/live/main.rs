//! The whole path, from a program that writes to a published copy: writers, the ring, the freeze, the overlay, the copier.
//!
//! `DRIVE_BACKUP_RUNS` is the number of random runs of each such test, `DRIVE_BACKUP_SEED` replays one.

#![cfg(feature = "cli")]

mod choices;
mod death;
mod instant;
mod kit;
mod overlay;
mod qcow2;
mod several;
#[path = "../support/mod.rs"]
mod support;
mod trail;
