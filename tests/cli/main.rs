//! The command as users, cron, shells and monitors meet it.

#![cfg(feature = "cli")]

mod hooks;
mod hung;
mod json;
mod kit;
mod pace;
mod quiet;
mod rehearsal;
mod several;
mod signals;
mod signs;
mod streams;
mod terminal;
mod usage;
