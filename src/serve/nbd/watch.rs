//! Notices requests that take longer than expected. While a thread is in a request that should be short nobody else
//! looks at its connection; if it lasts, another thread is woken to go on with the next request. So the usual request
//! needs no hand-over, and the unusual one does not stop the others.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::{self, JoinHandle, Thread};
use std::time::Duration;

/// A request that lasts longer, twice as long at most, is not short.
const TICK: Duration = Duration::from_millis(2);
/// Ticks without a request after which the watch sleeps until the next one.
const CALM: u32 = 100;

/// A connection that is looked after.
pub trait Watched: Send + Sync {
    /// Wakes somebody if the request of the last look is still going on. True: there was a request since then.
    fn look(&self) -> bool;
}

/// The thread that looks.
pub struct Watch {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

struct Shared {
    watched: Mutex<Vec<Weak<dyn Watched>>>,
    asleep: AtomicBool,
    over: AtomicBool,
}

/// Wakes the watch.
#[derive(Clone)]
pub struct Bell {
    shared: Arc<Shared>,
    thread: Thread,
}

impl Watch {
    /// Starts the thread; it ends when this is dropped.
    pub fn start() -> io::Result<Self> {
        let shared = Arc::new(Shared {
            watched: Mutex::default(),
            asleep: AtomicBool::new(false),
            over: AtomicBool::new(false),
        });
        let looking = shared.clone();
        let thread = thread::Builder::new().name("nbd watch".into()).spawn(move || looking.run())?;
        Ok(Self { shared, thread: Some(thread) })
    }

    /// For connections.
    pub fn bell(&self) -> Bell {
        let thread = self.thread.as_ref().expect("it runs until the drop").thread().clone();
        Bell { shared: self.shared.clone(), thread }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.shared.over.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            let _ = thread.join();
        }
    }
}

impl Bell {
    /// Looks after `connection` until it is gone.
    pub fn enlist(&self, connection: Weak<dyn Watched>) {
        self.shared.lock().push(connection);
    }

    /// A request has begun, and can be seen by [`Watched::look`].
    pub fn ring(&self) {
        // Either it sees that, or we see that it has fallen asleep: it looks once more after it said so.
        if self.shared.asleep.load(Ordering::SeqCst) {
            self.shared.asleep.store(false, Ordering::SeqCst);
            self.thread.unpark();
        }
    }
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, Vec<Weak<dyn Watched>>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self) {
        let mut calm = 0;
        while !self.over.load(Ordering::SeqCst) {
            calm = if self.look() { 0 } else { calm + 1 };
            if calm < CALM {
                thread::sleep(TICK);
                continue;
            }
            self.asleep.store(true, Ordering::SeqCst);
            if !self.look() {
                while self.asleep.load(Ordering::SeqCst) && !self.over.load(Ordering::SeqCst) {
                    thread::park();
                }
            }
            self.asleep.store(false, Ordering::SeqCst);
            calm = 0;
        }
    }

    fn look(&self) -> bool {
        let connections: Vec<_> = {
            let mut watched = self.lock();
            watched.retain(|connection| connection.strong_count() > 0);
            watched.iter().filter_map(Weak::upgrade).collect()
        };
        // Every one of them, not only up to the first.
        connections.iter().fold(false, |any, connection| connection.look() | any)
    }
}
