//! The whole path, from a program that writes to a published copy: writers, the ring, the freeze, the overlay, the copier.
//!
//! Random runs have seeds, from 0 on; [`kit::each_seed`] says which variables choose others.

#![cfg(feature = "cli")]

mod choices;
mod crowd;
mod death;
mod instant;
mod kit;
#[cfg(debug_assertions)]
mod meanwhile;
mod overlay;
#[cfg(debug_assertions)]
mod phases;
mod qcow2;
mod several;
mod starts;
#[path = "../support/mod.rs"]
mod support;
mod trail;
