//! What strangers can't do: to the process that reads their images, with its memory and time, and through what it is built of.
#![cfg(feature = "cli")]

mod dependencies;
mod document;
mod hostile;
mod sandbox;
#[path = "../support/mod.rs"]
mod support;
