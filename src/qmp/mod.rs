//! Block jobs watched and steered over QMP, QEMU's machine protocol (docs/interop/qmp-spec of QEMU; docs/QMP.md here).
//!
//! ```text
//! client ──▶ frame ──▶ command ──▶ jobs ──verbs──▶ Job
//!        ◀── queue ◀── replies, events ◀──status── Job, engine
//! ```
//!
//! Nothing here can hold a copy or a writer: who works only pushes into bounded queues (`hub`), and each client has its own.

mod arguments;
mod client;
mod command;
mod frame;
mod hub;
mod jobs;
pub mod peer;
mod schema;
mod server;
mod start;
mod wire;

pub use jobs::{Entry, Jobs, New, valid_id};
pub use server::{Node, Server, Setup};
