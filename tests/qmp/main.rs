//! QMP from outside: beside qemu-storage-daemon, with PyPI's qemu.qmp, and with clients that mean harm.

#![cfg(all(feature = "cli", feature = "nbd"))]

#[path = "../support/mod.rs"]
mod support;

mod beside_qemu;
mod cases;
mod clients;
mod ctl;
mod faults;
mod kit;
mod live;
mod pairs;
mod parts;
