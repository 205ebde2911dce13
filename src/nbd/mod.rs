//! NBD: what client and server share.
//!
//! Section names refer to `doc/proto.md` of the NBD project, "The NBD protocol".

pub mod payload;
pub mod protocol;
pub mod stream;
pub mod tls;
pub mod uri;
