//! JSON lines on their way to a reader who may be slow, stopped or gone: none of these slows, blocks or ends a backup.
//!
//! Whoever has a record puts it into a bounded queue and goes on; a thread writes. When too many wait the oldest status
//! makes room, and where there is none the oldest event. `seq` is given out on the way in, so that a reader sees every
//! loss as a gap.

use super::json::{self, Body, Dropped, Record, SCHEMA};
use std::collections::VecDeque;
use std::io::Write;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::SystemTime;

/// A reader that wakes up wants to know how it stands, not how it stood.
const MOST_STATUSES: usize = 64;
/// A dying disk tells of thousands of bad ranges at once; so many wait, a few MiB.
const CAPACITY: usize = 16 << 10;

/// Where the lines of several jobs meet: each has a queue of its own, and lines never mix.
#[derive(Clone)]
pub struct Lines(Arc<Mutex<Box<dyn Write + Send>>>);

impl Lines {
    /// Ends at `out`.
    pub fn to(out: Box<dyn Write + Send>) -> Self {
        Self(Arc::new(Mutex::new(out)))
    }
}

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.write_all(bytes).map(|()| bytes.len())
    }

    /// Whole, before anybody else's. Blocks as long as the reader does.
    fn write_all(&mut self, bytes: &[u8]) -> std::io::Result<()> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).write_all(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).flush()
    }
}

/// The way in, for one job. Clones share one queue.
#[derive(Clone)]
pub struct Records(Arc<Shared>);

struct Shared {
    queue: Mutex<Queue>,
    wake: Condvar,
}

struct Entry {
    seq: u64,
    time: SystemTime,
    body: Body,
}

#[derive(Default)]
struct Queue {
    entries: VecDeque<Entry>,
    /// How many of them are statuses.
    statuses: usize,
    next_seq: u64,
    dropped: Dropped,
    /// The last record is in: no other may follow.
    closed: bool,
}

impl Records {
    /// Starts the thread that writes the records of `job` to `out`. It calls `written` once: after the last record, or as
    /// soon as `out` fails.
    pub fn to(
        job: String,
        out: impl Write + Send + 'static,
        written: impl FnOnce() + Send + 'static,
    ) -> std::io::Result<Self> {
        let shared = Arc::new(Shared { queue: Mutex::default(), wake: Condvar::new() });
        let records = Self(Arc::clone(&shared));
        let write = move || {
            write_all(&shared, &job, out);
            written();
        };
        thread::Builder::new().name("json".to_owned()).spawn(write)?;
        Ok(records)
    }

    /// Never blocks. Its `seq`; none after the last record.
    pub fn push(&self, body: Body) -> Option<u64> {
        let seq = self.0.queue().push(body);
        self.0.wake.notify_one();
        seq
    }

    /// The last record. Statuses that still wait, except the newest, give way, so that a slow reader gets it in time.
    /// Its `seq`.
    pub fn finish(&self, body: Body) -> Option<u64> {
        let seq = self.0.queue().finish(body);
        self.0.wake.notify_one();
        seq
    }
}

impl Shared {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Blocks for the next record; with it, how many were dropped and whether it is the last.
    fn next(&self) -> (Entry, Dropped, bool) {
        let mut queue = self.queue();
        loop {
            if let Some(entry) = queue.take(0) {
                return (entry, queue.dropped, queue.closed && queue.entries.is_empty());
            }
            queue = self.wake.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Queue {
    fn push(&mut self, body: Body) -> Option<u64> {
        if self.closed {
            return None;
        }
        if self.entries.len() >= CAPACITY || self.statuses >= MOST_STATUSES {
            let oldest_status = self.entries.iter().position(Entry::is_status);
            self.drop_at(oldest_status.unwrap_or(0));
        }
        self.statuses += usize::from(matches!(body, Body::Status(_)));
        self.entries.push_back(Entry { seq: self.next_seq, time: SystemTime::now(), body });
        self.next_seq += 1;
        Some(self.next_seq - 1)
    }

    fn finish(&mut self, body: Body) -> Option<u64> {
        let newest = self.entries.iter().rposition(Entry::is_status);
        for at in (0..newest.unwrap_or(0)).rev() {
            if self.entries[at].is_status() {
                self.drop_at(at);
            }
        }
        let seq = self.push(body);
        self.closed = true;
        seq
    }

    fn take(&mut self, at: usize) -> Option<Entry> {
        let entry = self.entries.remove(at)?;
        self.statuses -= usize::from(entry.is_status());
        Some(entry)
    }

    fn drop_at(&mut self, at: usize) {
        match self.take(at) {
            Some(entry) if entry.is_status() => self.dropped.status_dropped += 1,
            Some(_) => self.dropped.events_dropped += 1,
            None => {}
        }
    }
}

impl Entry {
    fn is_status(&self) -> bool {
        matches!(self.body, Body::Status(_))
    }
}

fn write_all(shared: &Shared, job: &str, mut out: impl Write) {
    loop {
        let (mut entry, dropped, last) = shared.next();
        match &mut entry.body {
            Body::Summary(summary) => summary.dropped = dropped,
            Body::Stopped(stopped) => stopped.dropped = dropped,
            Body::ExitError(error) => error.dropped = dropped,
            _ => {}
        }
        // One call for a line, so that no other process's output ends up inside it.
        let written = line(job, &entry).and_then(|line| out.write_all(&line)).and_then(|()| out.flush());
        if last || written.is_err() {
            return;
        }
    }
}

fn line(job: &str, entry: &Entry) -> std::io::Result<Vec<u8>> {
    let record = Record { body: &entry.body, schema: SCHEMA, time: json::time(entry.time), job, seq: entry.seq };
    let mut line = serde_json::to_vec(&record)?;
    line.push(b'\n');
    Ok(line)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::json::{ExitError, Status, Warning};
    use std::io::{self, BufRead, BufReader, Read};
    use std::sync::mpsc;
    use std::time::Duration;

    const BOUND: Duration = Duration::from_secs(20);

    fn status() -> Body {
        Body::Status(Box::new(Status {
            phase: "copy",
            status: "running",
            percent_done: 0.5,
            total_bytes: 2,
            bytes_done: 1,
            bytes_data: 1,
            bytes_zero: 0,
            bytes_verified: 0,
            rate: 0,
            rate_avg: 0,
            speed_limit: None,
            seconds_elapsed: 0,
            seconds_remaining: None,
            seconds_stalled: 0,
            error_count: 0,
            overlay: None,
            writer: None,
        }))
    }

    fn warning() -> Body {
        Body::Warning(Warning { code: "test", offset: None, length: None, errno: None, message: String::new() })
    }

    fn last() -> Body {
        Body::ExitError(Box::new(ExitError {
            exit_code: 1,
            reason: "other",
            signal: None,
            message: String::new(),
            target_state: Some("untouched"),
            differs: Vec::new(),
            writer_released: None,
            seconds_elapsed: 0,
            dropped: Dropped::default(),
        }))
    }

    /// Up to the end of the stream, within the bound.
    fn lines(read: impl Read + Send + 'static) -> Vec<serde_json::Value> {
        let (send, lines) = mpsc::channel();
        let parse = |line: io::Result<String>| serde_json::from_str(&line.unwrap()).unwrap();
        thread::spawn(move || send.send(BufReader::new(read).lines().map(parse).collect()));
        lines.recv_timeout(BOUND).expect("the end of the stream")
    }

    #[test]
    fn every_record_arrives_at_a_prompt_reader() {
        let (read, write) = io::pipe().unwrap();
        let (done, written) = mpsc::channel();
        let records = Records::to(json::new_job(), write, move || done.send(()).unwrap()).unwrap();
        records.push(warning());
        records.push(status());
        records.finish(last());
        written.recv_timeout(BOUND).unwrap();
        let lines = lines(read);
        let types: Vec<_> = lines.iter().map(|line| line["message_type"].as_str().unwrap()).collect();
        assert_eq!(types, ["warning", "status", "exit_error"]);
        assert_eq!(lines.iter().map(|line| line["seq"].as_u64().unwrap()).collect::<Vec<_>>(), [0, 1, 2]);
        assert!(lines.iter().all(|line| line["job"] == lines[0]["job"]));
    }

    #[test]
    fn a_stopped_reader_loses_the_oldest_statuses_and_sees_the_gap() {
        let (read, write) = io::pipe().unwrap();
        let (done, written) = mpsc::channel();
        let records = Records::to(json::new_job(), write, move || done.send(()).unwrap()).unwrap();
        let total = 16 * MOST_STATUSES as u64;
        for _ in 0..total {
            records.push(status());
        }
        records.push(warning());
        records.finish(last());
        assert!(written.try_recv().is_err(), "the pipe is full");
        let lines = lines(read);
        written.recv_timeout(BOUND).unwrap();
        let (end, warning) = (lines.last().unwrap(), &lines[lines.len() - 2]);
        assert_eq!((&end["message_type"], &warning["message_type"]), (&"exit_error".into(), &"warning".into()));
        assert_eq!(end["seq"], total + 1);
        let dropped = end["status_dropped"].as_u64().unwrap();
        assert_eq!(dropped, total + 2 - lines.len() as u64, "every gap is counted");
        assert!(dropped >= total / 2, "{dropped}");
        assert_eq!(end["events_dropped"], 0);
    }

    #[test]
    fn statuses_make_room_first_and_the_queue_is_bounded() {
        let mut queue = Queue::default();
        (0..CAPACITY - MOST_STATUSES).for_each(|_| assert!(queue.push(warning()).is_some()));
        (0..MOST_STATUSES * 2).for_each(|_| assert!(queue.push(status()).is_some()));
        assert_eq!((queue.entries.len(), queue.statuses), (CAPACITY, MOST_STATUSES));
        assert_eq!(queue.dropped, Dropped { status_dropped: MOST_STATUSES as u64, events_dropped: 0 });
        (0..MOST_STATUSES).for_each(|_| assert!(queue.push(warning()).is_some()));
        assert_eq!((queue.entries.len(), queue.statuses), (CAPACITY, 0));
        assert_eq!(queue.dropped.events_dropped, 0);
        (0..3).for_each(|_| assert!(queue.push(warning()).is_some()));
        assert_eq!((queue.entries.len(), queue.dropped.events_dropped), (CAPACITY, 3));
        assert_eq!(queue.entries[0].seq, 3, "the oldest");
    }

    #[test]
    fn the_last_record_overtakes_old_statuses() {
        let mut queue = Queue::default();
        queue.push(warning());
        (0..MOST_STATUSES).for_each(|_| assert!(queue.push(status()).is_some()));
        queue.push(warning());
        queue.finish(last());
        let left: Vec<u64> = queue.entries.iter().map(|entry| entry.seq).collect();
        let newest = MOST_STATUSES as u64;
        assert_eq!(left, [0, newest, newest + 1, newest + 2], "both events, the newest status, the last record");
        assert_eq!((queue.statuses, queue.dropped.status_dropped), (1, newest - 1));
    }

    #[test]
    fn nothing_follows_the_last_record() {
        let mut queue = Queue::default();
        queue.finish(last());
        queue.push(status());
        queue.finish(last());
        assert_eq!(queue.entries.len(), 1);
    }

    #[test]
    fn a_reader_that_is_gone_is_no_error() {
        let (read, write) = io::pipe().unwrap();
        drop(read);
        let (done, written) = mpsc::channel();
        let records = Records::to(json::new_job(), write, move || done.send(()).unwrap()).unwrap();
        records.push(status());
        written.recv_timeout(BOUND).unwrap();
        records.push(status());
        records.finish(last());
    }
}
