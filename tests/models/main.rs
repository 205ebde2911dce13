//! Every interleaving that loom finds, and many that shuttle draws, of what waits and wakes.
//!
//! `RUSTFLAGS="--cfg loom" cargo test --release --no-default-features --test models`, and the same with `shuttle`.
#![cfg(any(loom, shuttle))]

#[cfg(loom)]
use loom::{sync, thread};
#[cfg(shuttle)]
use shuttle::{sync, thread};

mod tracker;

/// Runs `model` under every schedule with at most three preemptions, or under thousands of random ones. A deadlock or
/// a panic of any thread in any of them fails.
fn check(model: impl Fn() + Send + Sync + 'static) {
    #[cfg(loom)]
    {
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = Some(3);
        builder.check(model);
    }
    #[cfg(shuttle)]
    {
        let model = std::sync::Arc::new(model);
        let again = model.clone();
        shuttle::check_random(move || model(), 5_000);
        shuttle::check_pct(move || again(), 5_000, 3);
    }
}
