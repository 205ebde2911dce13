//! A pool of threads for what a queue's own thread should not wait for. Made when they are wanted, kept until the end.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

/// At most so many at once; as many trapped writes wait side by side.
const MOST: usize = 32;

/// See the module. Dropped, it waits until all jobs are done.
pub struct Pool<J> {
    shared: Arc<Shared<J>>,
    run: Arc<dyn Fn(J) + Send + Sync>,
}

struct Shared<J> {
    state: Mutex<State<J>>,
    work: Condvar,
}

struct State<J> {
    jobs: VecDeque<J>,
    idle: usize,
    threads: Vec<JoinHandle<()>>,
    closing: bool,
}

impl<J> Shared<J> {
    fn lock(&self) -> MutexGuard<'_, State<J>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<J: Send + 'static> Pool<J> {
    /// No thread yet. `run` does a job.
    pub fn new(run: impl Fn(J) + Send + Sync + 'static) -> Self {
        let state = State { jobs: VecDeque::new(), idle: 0, threads: Vec::new(), closing: false };
        Self { shared: Arc::new(Shared { state: Mutex::new(state), work: Condvar::new() }), run: Arc::new(run) }
    }

    /// Has `job` done by another thread. Given back when there is none and none can be made.
    pub fn give(&self, job: J) -> Result<(), J> {
        let mut state = self.shared.lock();
        if state.idle <= state.jobs.len() && state.threads.len() < MOST {
            let (shared, run) = (self.shared.clone(), self.run.clone());
            let builder = std::thread::Builder::new().name("vhost-user pool".into());
            match builder.spawn(move || shared.serve(&*run)) {
                Ok(thread) => state.threads.push(thread),
                Err(_) if state.threads.is_empty() => return Err(job),
                // Then it has to wait for one that is there.
                Err(_) => {}
            }
        }
        state.jobs.push_back(job);
        drop(state);
        self.shared.work.notify_one();
        Ok(())
    }
}

impl<J> Shared<J> {
    fn serve(&self, run: &(dyn Fn(J) + Send + Sync)) {
        let mut state = self.lock();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                run(job);
                state = self.lock();
            } else if state.closing {
                return;
            } else {
                state.idle += 1;
                state = self.work.wait(state).unwrap_or_else(PoisonError::into_inner);
                state.idle -= 1;
            }
        }
    }
}

impl<J> Drop for Pool<J> {
    fn drop(&mut self) {
        let threads = {
            let mut state = self.shared.lock();
            state.closing = true;
            std::mem::take(&mut state.threads)
        };
        self.shared.work.notify_all();
        for thread in threads {
            // One that panicked has done what it could.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::time::Duration;

    #[test]
    fn a_job_that_waits_keeps_no_other_waiting_and_the_end_waits_for_all() {
        let (tell, told) = mpsc::channel();
        let pool = Pool::new(move |(wait, number): (Option<mpsc::Receiver<()>>, u32)| {
            if let Some(wait) = wait {
                wait.recv().unwrap();
            }
            tell.send(number).unwrap();
        });
        let (release, wait) = mpsc::channel();
        pool.give((Some(wait), 1)).ok().unwrap();
        pool.give((None, 2)).ok().unwrap();
        assert_eq!(told.recv_timeout(Duration::from_secs(30)), Ok(2));
        release.send(()).unwrap();
        drop(pool);
        assert_eq!(told.try_recv(), Ok(1));
    }
}
