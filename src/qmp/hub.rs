//! The clients' queues: whoever has something to tell pushes and goes on.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Bytes that wait for a client.
const MOST_WAITING: usize = 1 << 20;

/// What waits for one client.
#[derive(Debug, Default)]
pub struct Queue {
    waiting: Mutex<Waiting>,
    wake: Condvar,
}

#[derive(Debug, Default)]
struct Waiting {
    lines: VecDeque<Vec<u8>>,
    bytes: usize,
    /// The client gets events: it has negotiated.
    listens: bool,
    closed: bool,
    /// A command is being done: its reply goes out, whatever the command ends.
    owes: bool,
}

impl Queue {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A reply will follow.
    pub fn owe(&self) {
        self.waiting().owes = true;
    }

    /// A reply. False: the client does not read, and has to go.
    #[must_use]
    pub fn reply(&self, line: Vec<u8>) -> bool {
        let mut waiting = self.waiting();
        let fits = (waiting.owes || !waiting.closed) && waiting.push(line);
        waiting.owes = false;
        if !fits {
            waiting.closed = true;
        }
        self.wake.notify_one();
        fits
    }

    /// From now on it gets events.
    pub fn listen(&self) {
        self.waiting().listens = true;
    }

    /// The next line; `None`: there will be none. Blocks.
    pub fn next(&self) -> Option<Vec<u8>> {
        let idle = |waiting: &mut Waiting| waiting.lines.is_empty() && (waiting.owes || !waiting.closed);
        let mut waiting = self.wake.wait_while(self.waiting(), idle).unwrap_or_else(PoisonError::into_inner);
        let line = waiting.lines.pop_front()?;
        waiting.bytes -= line.len();
        Some(line)
    }

    /// Nothing more comes but a reply that is owed; what waits is still given.
    pub fn close(&self) {
        self.waiting().closed = true;
        self.wake.notify_one();
    }
}

impl Waiting {
    fn push(&mut self, line: Vec<u8>) -> bool {
        let fits = self.bytes + line.len() <= MOST_WAITING;
        if fits {
            self.bytes += line.len();
            self.lines.push_back(line);
        }
        fits
    }
}

/// All queues.
#[derive(Debug, Default)]
pub struct Hub {
    queues: Mutex<Vec<Arc<Queue>>>,
}

impl Hub {
    /// One more client, if there are fewer than `most`.
    pub fn join(&self, most: usize) -> Option<Arc<Queue>> {
        let mut queues = self.queues();
        if queues.len() >= most {
            return None;
        }
        let queue = Arc::new(Queue::default());
        queues.push(Arc::clone(&queue));
        Some(queue)
    }

    /// It is gone.
    pub fn leave(&self, queue: &Arc<Queue>) {
        self.queues().retain(|other| !Arc::ptr_eq(other, queue));
    }

    /// Tells every client that listens; one that does not read loses it. Never blocks.
    pub fn event(&self, name: &str, data: serde_json::Value) {
        let line = super::wire::event(name, data);
        for queue in self.queues().iter() {
            let mut waiting = queue.waiting();
            if waiting.listens && !waiting.closed {
                waiting.push(line.clone());
                queue.wake.notify_one();
            }
        }
    }

    /// Is nobody here?
    pub fn is_empty(&self) -> bool {
        self.queues().is_empty()
    }

    /// Nothing more comes for anybody.
    pub fn close(&self) {
        self.queues().iter().for_each(|queue| queue.close());
    }

    fn queues(&self) -> MutexGuard<'_, Vec<Arc<Queue>>> {
        self.queues.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_does_not_read_loses_events_and_its_place() {
        let hub = Hub::default();
        let queue = hub.join(1).unwrap();
        assert!(hub.join(1).is_none());
        hub.event("EARLY", serde_json::Value::Null);
        queue.listen();
        (0..100_000).for_each(|_| hub.event("JOB_STATUS_CHANGE", "x".repeat(100).into()));
        assert!(queue.waiting().bytes <= MOST_WAITING);
        assert!(!queue.reply(vec![0; 1000]), "cut off");
        let mut lines = 0;
        while let Some(line) = queue.next() {
            assert!(!String::from_utf8(line).unwrap().contains("EARLY"));
            lines += 1;
        }
        assert!(lines > 1000);
        hub.leave(&queue);
        assert!(hub.join(1).is_some());
    }

    #[test]
    fn a_reply_that_is_owed_goes_out_after_the_end() {
        let queue = Queue::default();
        queue.owe();
        queue.close();
        assert!(queue.reply(b"done".to_vec()));
        assert_eq!((queue.next(), queue.next()), (Some(b"done".to_vec()), None));
        assert!(!queue.reply(b"more".to_vec()), "nothing else does");
    }
}
