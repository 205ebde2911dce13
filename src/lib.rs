//! Point-in-time backup of a disk image or block device while programs keep writing to it.
//!
//! For each cluster one question is asked: *who holds its contents as of the instant?* The source, the overlay or
//! the target. A writer may overwrite a cluster once the source is no longer its last holder and nobody reads it
//! there. Everything else is moving bytes and reporting.
//!
//! Modules stand on floors; each uses only lower floors and siblings in its own folder (`tests/tidy.rs` checks it):
//!
//! | floor | modules | |
//! |---|---|---|
//! | 0 | [`ground`], `sync` | values only |
//! | 1 | [`error`], [`digest`], `snapshot::copy_state` | |
//! | 2 | `snapshot::tracker`, [`job`] | waits, does no I/O |
//! | 3 | [`image`], [`manifest`], `snapshot::overlay`, [`hook`], [`sandbox`] | I/O |
//! | 4 | [`copier`], [`scan`], [`publish`] | the worker loops, the rename |
//! | 5 | [`backup`] | wires everything, joins everything |
//! | 6 | `qmp` | block jobs watched and steered over a socket |
//! | 6 | [`serve`] | disks behind NBD, vhost-user and FUSE |
//! | 7 | `cli` | flags, terminal, exit codes |

#[cfg(feature = "engine")]
pub mod backup;
#[cfg(feature = "cli")]
pub mod cli;
#[cfg(feature = "engine")]
pub mod copier;
#[cfg(feature = "engine")]
pub mod digest;
pub mod error;
pub mod ground;
mod hold;
#[cfg(feature = "engine")]
pub mod hook;
#[cfg(feature = "engine")]
pub mod image;
pub mod job;
#[cfg(feature = "engine")]
pub mod manifest;
pub mod monitor;
#[cfg(feature = "nbd")]
pub mod nbd;
#[cfg(feature = "engine")]
pub mod publish;
#[cfg(feature = "cli")]
pub mod qmp;
pub mod ring;
#[cfg(feature = "engine")]
pub mod sandbox;
#[cfg(feature = "engine")]
pub mod scan;
#[cfg(feature = "serve")]
pub mod serve;
pub mod snapshot;
mod sync;
#[cfg(feature = "serve")]
pub mod unix_socket;
#[cfg(not(any(loom, shuttle)))]
pub mod writer;
