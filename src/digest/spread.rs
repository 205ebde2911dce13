//! Work that is cut into numbered parts, spread over threads.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::thread;

/// Does the parts below `count`, each once, with `threads` threads, this one among them. False: `go_on`, which is asked before
/// each, said no.
pub fn spread(count: u64, threads: usize, go_on: &(dyn Fn() -> bool + Sync), work: &(dyn Fn(u64) + Sync)) -> bool {
    let (next, stopped) = (AtomicU64::new(0), AtomicBool::new(false));
    let run = || {
        while !stopped.load(Relaxed) {
            let number = next.fetch_add(1, Relaxed);
            if number >= count {
                return;
            }
            if !go_on() {
                stopped.store(true, Relaxed);
                return;
            }
            work(number);
        }
    };
    let others = threads.saturating_sub(1).min(count.saturating_sub(1) as usize);
    thread::scope(|scope| {
        (0..others).for_each(|_| drop(scope.spawn(run)));
        run();
    });
    !stopped.load(Relaxed)
}
