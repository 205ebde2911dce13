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

/// Panics if `model` does in one of the orders that loom finds with at most `preemptions` switches of a thread that could have
/// gone on, or in one of those that shuttle draws, so many as `draws`; or if its threads wait for each other in one.
#[cfg(all(test, any(loom, shuttle)))]
#[allow(unused_variables)]
pub fn check_model(preemptions: usize, draws: usize, model: impl Fn() + Send + Sync + 'static) {
    #[cfg(loom)]
    {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(preemptions);
        builder.check(model);
    }
    #[cfg(shuttle)]
    shuttle::check_random(model, draws);
}
