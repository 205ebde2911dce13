//! Disks behind interfaces that programs already speak: each a cooperating writer, so that a backup may be taken meanwhile.
//!
//! ```text
//! NBD clients ──▶ nbd ────────┐
//! a guest ──────▶ vhost_user ─┼──▶ Disk ──bracket──▶ raw file, block device, qcow2
//! any program ──▶ fuse ───────┘       └──── writer ◀──ring──▶ backup
//! ```
//!
//! # What a front-end is
//!
//! A module beside [`disk`] with a function `start` that takes the disks (`&[Arc<Disk>]` or one `Arc<Disk>`), an address with
//! its options, and a [`Notify`], and returns a [`FrontEnd`] once it can be reached.
//!
//! - **Start.** Whatever can be refused is refused by `start`: [`crate::error::Kind::Usage`] for an address that makes no
//!   sense, `Busy` for one that somebody else serves, else `Other`. Unix sockets are made by [`crate::unix_socket::Bound`]: what a dead
//!   server left is replaced. The front-end runs on threads of its own; nothing blocks the caller.
//! - **Requests.** They go to the [`disk::Disk`] from as many threads as wanted. Its errors are errnos for the client, never
//!   a reason to end. FUA is the write and a flush after it. A client that breaks the protocol, or is gone, costs its own
//!   connection and at most a [`Notice::Warning`].
//! - **Fault.** A front-end that can't go on by itself (its mount is gone, `accept` fails for good) says [`Notice::Failed`] once;
//!   the server then stops all of them, and fails.
//! - **Stop.** [`FrontEnd::stop`] lets nobody in, lets requests in flight end and their answers leave until the deadline,
//!   then hangs up; after it nothing touches the disk any more, sockets are removed and mounts undone. Whoever asked for the
//!   stop flushes the disks.

pub mod disk;
#[cfg(feature = "fuse")]
pub mod fuse;
#[cfg(feature = "nbd")]
pub mod nbd;
#[cfg(feature = "vhost-user")]
pub mod vhost_user;

use crate::error::Error;
use std::sync::Arc;
use std::time::Instant;

/// A front-end that runs. Dropped without [`FrontEnd::stop`] it stops at once.
pub trait FrontEnd: Send {
    /// Where its clients find it: `nbd+unix:///?socket=/run/disk.sock`, `/run/vhost.sock`, `/mnt/disk.raw`.
    fn address(&self) -> String;

    /// See the module. Blocks until `deadline` at the latest, give or take what closing takes. False: requests were cut off.
    fn stop(self: Box<Self>, deadline: Instant) -> bool;
}

/// What a front-end has to tell while it runs.
#[derive(Debug)]
pub enum Notice {
    /// One line that its user should know.
    Warning(String),
    /// It can't go on.
    Failed(Error),
}

/// Takes notices, from any thread, without blocking for long.
pub type Notify = Arc<dyn Fn(Notice) + Send + Sync>;
