//! qcow2 images, by the format's specification: QEMU's `docs/interop/qcow2.rst`. "Section" below means a section there.
//!
//! A guest offset is looked up in two steps: the L1 table, which is in memory, names the host offset of an L2 table,
//! and an L2 table's entry says where a cluster's bytes are. All numbers are big-endian. Whatever is read from the
//! file is untrusted: it is checked where it is decoded, and nothing is allocated by a size that was not bounded.

mod batch;
mod block_cache;
mod bump;
mod cache;
mod compress;
mod create;
mod decompress;
mod finish;
pub mod header;
mod map;
mod metadata;
mod reader;
mod refcount;
mod region_lock;
mod run_map;
pub mod table;
mod update;

pub use cache::Cache;
pub use compress::CompressOptions;
pub use create::{CreateOptions, NewQcow2};
pub use reader::Qcow2;
pub use update::ExistingQcow2;

#[cfg(test)]
mod fixture;
