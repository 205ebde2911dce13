//! Served disks, and real programs that write them while they are backed up.

#![cfg(all(feature = "cli", feature = "fuse", feature = "nbd"))]

mod ends;
mod fuse;
mod kit;
mod proof;
#[path = "../support/mod.rs"]
mod support;
