//! Served disks, and real programs that write them while they are backed up.

#![cfg(all(feature = "cli", feature = "fuse", feature = "nbd"))]

mod ends;
#[cfg(feature = "vhost-user")]
#[path = "../support/frontend.rs"]
mod frontend;
mod fuse;
mod kit;
#[cfg(all(debug_assertions, feature = "vhost-user"))]
mod phases;
mod proof;
#[path = "../support/mod.rs"]
mod support;
