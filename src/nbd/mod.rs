//! NBD: what client and server share.

pub mod stream;
pub mod tls;
pub mod uri;
