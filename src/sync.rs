//! The primitives that the model checkers replace: loom under `cfg(loom)`, shuttle under `cfg(shuttle)`, else std.

#[cfg(loom)]
#[allow(unused_imports)]
pub use loom::sync::{Arc, Condvar, Mutex, MutexGuard, atomic};
#[cfg(shuttle)]
#[allow(unused_imports)]
pub use shuttle::sync::{Arc, Condvar, Mutex, MutexGuard, atomic};
#[cfg(not(any(loom, shuttle)))]
#[allow(unused_imports)]
pub use std::sync::{Arc, Condvar, Mutex, MutexGuard, atomic};
