//! What people see on standard error. One thread writes there, and it alone blocks when the terminal or the pipe does.

mod bar;
pub mod pace;
mod text;

pub use text::{BadEnd, GoodEnd, one_line, started};

use super::args::Progress;
use super::stream::{in_foreground, is_journal};
use crate::job::Job;
use bar::Bar;
use pace::{Pace, View};
use std::collections::VecDeque;
use std::io::{IsTerminal, Write};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

/// Lines that wait for a blocked reader; more are counted.
const MOST_WAITING: usize = 1000;
const BAR_TICK: Duration = Duration::from_millis(100);
/// Often enough for the rates.
const PLAIN_TICK: Duration = Duration::from_secs(1);
const PLAIN_INTERVAL: Duration = Duration::from_secs(30);

/// How progress is shown, decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// An indicatif bar, in colours or without.
    Bar { colour: bool },
    /// A line at every interval and one at the end.
    Plain { interval: Duration },
    /// Nothing until the end.
    None,
}

impl Style {
    /// By what was asked for and what standard error is.
    pub fn choose(asked: Progress, interval: Option<Duration>) -> Self {
        let variable = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
        let err = std::io::stderr();
        let dumb = variable("TERM").is_none_or(|term| term == "dumb");
        let plain = Self::Plain { interval: interval.unwrap_or(PLAIN_INTERVAL) };
        let on_terminal = || match dumb {
            false => Self::Bar { colour: variable("NO_COLOR").is_none() },
            true => plain,
        };
        match asked {
            Progress::None => Self::None,
            Progress::Plain => plain,
            Progress::Auto | Progress::Bar if err.is_terminal() => on_terminal(),
            Progress::Bar => plain,
            Progress::Auto if is_journal(err, variable("JOURNAL_STREAM").as_deref()) => plain,
            Progress::Auto => Self::None,
        }
    }
}

/// The way to people. Clones lead to the same ones; nothing here blocks.
#[derive(Clone)]
pub struct Display(Arc<Shared>);

struct Shared {
    waiting: Mutex<Waiting>,
    wake: Condvar,
}

#[derive(Default)]
struct Waiting {
    lines: VecDeque<String>,
    lost: u64,
    status_wanted: bool,
    ending: bool,
}

impl Display {
    /// Starts the thread that writes to `err`. It calls `shown` once, after the last line.
    pub fn start(
        style: Style,
        job: Arc<Job>,
        err: Box<dyn Write + Send>,
        shown: impl FnOnce() + Send + 'static,
    ) -> std::io::Result<Self> {
        let shared = Arc::new(Shared { waiting: Mutex::default(), wake: Condvar::new() });
        let display = Self(Arc::clone(&shared));
        let show = move || {
            Screen::new(style, job, err).show(&shared);
            shown();
        };
        thread::Builder::new().name("progress".to_owned()).spawn(show)?;
        Ok(display)
    }

    /// A line, without prefix and line feed.
    pub fn say(&self, line: &str) {
        let mut waiting = self.0.waiting();
        if waiting.lines.len() < MOST_WAITING {
            waiting.lines.push_back(one_line(line));
        } else {
            waiting.lost += 1;
        }
        self.0.wake.notify_one();
    }

    /// One status line, now.
    pub fn show_status(&self) {
        self.0.waiting().status_wanted = true;
        self.0.wake.notify_one();
    }

    /// Says what waits and ends the thread.
    pub fn finish(&self) {
        self.0.waiting().ending = true;
        self.0.wake.notify_one();
    }
}

impl Shared {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Blocks until there is something to say, for `tick` at most.
    fn next(&self, tick: Duration) -> Waiting {
        let idle = |waiting: &mut Waiting| waiting.lines.is_empty() && !waiting.status_wanted && !waiting.ending;
        let waiting = self.wake.wait_timeout_while(self.waiting(), tick, idle);
        std::mem::take(&mut *waiting.unwrap_or_else(PoisonError::into_inner).0)
    }
}

struct Screen {
    shape: Shape,
    job: Arc<Job>,
    pace: Pace,
    began: Instant,
    err: Box<dyn Write + Send>,
}

enum Shape {
    Bar { bar: Bar, next: Duration },
    Plain { interval: Duration, next: Duration },
    None,
}

impl Screen {
    fn new(style: Style, job: Arc<Job>, err: Box<dyn Write + Send>) -> Self {
        let shape = match style {
            Style::Bar { colour } => Shape::Bar { bar: Bar::new(colour), next: Duration::ZERO },
            Style::Plain { interval } => Shape::Plain { interval, next: interval },
            Style::None => Shape::None,
        };
        Self { shape, job, pace: Pace::default(), began: Instant::now(), err }
    }

    fn show(mut self, shared: &Shared) {
        let tick = match &self.shape {
            Shape::Bar { .. } => BAR_TICK,
            Shape::Plain { interval, .. } => PLAIN_TICK.min(*interval),
            Shape::None => PLAIN_TICK,
        };
        loop {
            let waiting = shared.next(tick);
            let view = self.pace.look(self.began.elapsed(), self.job.snapshot());
            let mut lines: Vec<String> = waiting.lines.into();
            if waiting.lost > 0 {
                lines.push(format!("{} lines were lost: nobody read them", waiting.lost));
            }
            if waiting.status_wanted {
                lines.push(text::status(&view));
            }
            if waiting.ending
                && let Shape::Bar { bar, .. } = &self.shape
            {
                bar.clear();
            }
            self.print(&lines);
            if waiting.ending {
                return;
            }
            self.draw(&view);
        }
    }

    fn print(&mut self, lines: &[String]) {
        if lines.is_empty() {
            return;
        }
        let text: String = lines.iter().map(|line| format!("drive-backup: {line}\n")).collect();
        let err = &mut self.err;
        // People who closed their end are no reason to end.
        let mut write = || drop(err.write_all(text.as_bytes()));
        match &self.shape {
            Shape::Bar { bar, .. } => bar.aside(write),
            _ => write(),
        }
    }

    fn draw(&mut self, view: &View) {
        match &mut self.shape {
            Shape::Bar { bar, next } if view.elapsed >= *next => {
                *next = view.elapsed + BAR_TICK;
                // In the background the terminal is somebody else's.
                if in_foreground(std::io::stderr()) {
                    bar.draw(view);
                }
            }
            Shape::Plain { interval, next } if view.elapsed >= *next => {
                *next = view.elapsed + *interval;
                self.print(&[text::status(view)]);
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{self, BufRead, BufReader, Read};
    use std::sync::mpsc;

    const BOUND: Duration = Duration::from_secs(20);

    fn display(style: Style) -> (Display, BufReader<io::PipeReader>, mpsc::Receiver<()>) {
        let (read, write) = io::pipe().unwrap();
        let (done, shown) = mpsc::channel();
        let job = Arc::new(Job::new(None));
        let display = Display::start(style, job, Box::new(write), move || done.send(()).unwrap()).unwrap();
        (display, BufReader::new(read), shown)
    }

    #[test]
    fn without_progress_only_what_was_said_is_shown() {
        let (display, mut read, shown) = display(Style::None);
        display.say("one\nline \u{1b}[31m");
        display.finish();
        shown.recv_timeout(BOUND).unwrap();
        let mut text = String::new();
        read.read_to_string(&mut text).unwrap();
        assert_eq!(text, "drive-backup: one\\nline \\u{1b}[31m\n");
    }

    #[test]
    fn plain_lines_come_by_themselves_and_on_request() {
        let (display, mut read, _shown) = display(Style::Plain { interval: Duration::from_millis(100) });
        let mut line = String::new();
        read.read_line(&mut line).unwrap();
        assert_eq!(line, "drive-backup: preparing\n");
        display.show_status();
        line.clear();
        read.read_line(&mut line).unwrap();
        assert_eq!(line, "drive-backup: preparing\n");
        display.finish();
    }

    #[test]
    fn a_reader_that_stopped_blocks_nobody_and_takes_no_memory() {
        let (display, read, shown) = display(Style::None);
        let long = "x".repeat(4000);
        (0..10 * MOST_WAITING).for_each(|_| display.say(&long));
        assert!(display.0.waiting().lines.len() <= MOST_WAITING);
        display.finish();
        assert!(shown.try_recv().is_err(), "the pipe is full");
        let lines: Vec<String> = read.lines().map(Result::unwrap).collect();
        assert!(lines.last().unwrap().ends_with("lines were lost: nobody read them"));
    }

    #[test]
    fn a_reader_that_is_gone_is_no_error() {
        let (display, read, shown) = display(Style::None);
        drop(read);
        display.say("anything");
        display.finish();
        shown.recv_timeout(BOUND).unwrap();
    }
}
