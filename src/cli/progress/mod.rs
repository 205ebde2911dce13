//! What people see on standard error. One thread writes there, and it alone blocks when the terminal or the pipe does.

mod bar;
pub mod pace;
mod text;

pub use text::{BadEnd, GoodEnd, differing, held, one_line, rehearsed, started, status};

use super::args::Progress;
use super::stream::{Stream, in_foreground, is_journal};
use crate::job::Job;
use bar::{Bar, Bars};
use pace::{Pace, View};
use std::collections::VecDeque;
use std::io::{IsTerminal, Write};
use std::sync::atomic::{AtomicUsize, Ordering};
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

/// A job as people see it.
pub struct Row {
    /// Told with all that concerns it; `None` where it is the only one.
    pub name: Option<String>,
    /// Looked at.
    pub job: Arc<Job>,
}

/// Who reads the lines.
pub struct People {
    err: Box<dyn Write + Send>,
    /// The journal: each line begins with its priority.
    priorities: bool,
}

impl People {
    /// Who reads standard error: systemd's journal, or anybody.
    pub fn on_stderr() -> Self {
        let journal = std::env::var("JOURNAL_STREAM").ok();
        Self { err: Box::new(Stream::err()), priorities: is_journal(std::io::stderr(), journal.as_deref()) }
    }

    /// Who reads `err`.
    pub fn at(err: impl Write + Send + 'static) -> Self {
        Self { err: Box::new(err), priorities: false }
    }
}

/// How much a line matters: syslog's priorities.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Priority {
    Error = 3,
    Warning = 4,
    Info = 6,
}

/// A line that waits to be shown.
struct Line {
    priority: Priority,
    text: String,
}

/// The way to people. Clones lead to the same ones; nothing here blocks.
#[derive(Clone)]
pub struct Display {
    shared: Arc<Shared>,
    /// Whom its lines concern, where there are several.
    name: Option<String>,
}

struct Shared {
    waiting: Mutex<Waiting>,
    wake: Condvar,
    holds: AtomicUsize,
}

/// Somebody may have something to say when all rows are over: until it is dropped, the thread stays.
pub struct Hold(Arc<Shared>);

impl Drop for Hold {
    fn drop(&mut self) {
        // The lock: the thread looks at it only between two news.
        let mut waiting = self.0.waiting();
        self.0.holds.fetch_sub(1, Ordering::Relaxed);
        waiting.has_hold_ended = true;
        self.0.wake.notify_one();
    }
}

#[derive(Default)]
struct Waiting {
    lines: VecDeque<Line>,
    lost: u64,
    status_wanted: bool,
    has_hold_ended: bool,
    /// Rows that are over.
    over: Vec<usize>,
}

impl Display {
    /// Starts the thread that writes to `people`. It calls `shown` once, after the last line, when all `rows` are over.
    pub fn start(
        style: Style,
        rows: Vec<Row>,
        people: People,
        shown: impl FnOnce() + Send + 'static,
    ) -> std::io::Result<Self> {
        let shared = Arc::new(Shared { waiting: Mutex::default(), wake: Condvar::new(), holds: AtomicUsize::new(0) });
        let display = Self { shared: Arc::clone(&shared), name: None };
        let show = move || {
            Screen::new(style, rows, people).show(&shared);
            shown();
        };
        thread::Builder::new().name("progress".to_owned()).spawn(show)?;
        Ok(display)
    }

    /// The same way, for lines that concern `name`.
    pub fn about(&self, name: Option<String>) -> Self {
        Self { shared: Arc::clone(&self.shared), name }
    }

    /// A line, without prefix and line feed.
    pub fn say(&self, line: &str) {
        self.push(Priority::Info, line);
    }

    /// A warning, without that word.
    pub fn warn(&self, line: &str) {
        self.push(Priority::Warning, &format!("warning: {line}"));
    }

    /// An error.
    pub fn fail(&self, line: &str) {
        self.push(Priority::Error, line);
    }

    fn push(&self, priority: Priority, line: &str) {
        let mut waiting = self.shared.waiting();
        if waiting.lines.len() < MOST_WAITING {
            waiting.lines.push_back(Line { priority, text: one_line(&named(self.name.as_deref(), line)) });
        } else {
            waiting.lost += 1;
        }
        self.shared.wake.notify_one();
    }

    /// Keeps the way open, though all rows be over.
    pub fn hold(&self) -> Hold {
        self.shared.holds.fetch_add(1, Ordering::Relaxed);
        Hold(Arc::clone(&self.shared))
    }

    /// One status line of each row that is not over, now.
    pub fn show_status(&self) {
        self.shared.waiting().status_wanted = true;
        self.shared.wake.notify_one();
    }

    /// Says what waits; shows no more of this row. After the last one the thread ends, unless somebody holds it.
    pub fn finish(&self, row: usize) {
        self.shared.waiting().over.push(row);
        self.shared.wake.notify_one();
    }
}

impl Shared {
    fn waiting(&self) -> MutexGuard<'_, Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Blocks until there is something to say, for `tick` at most. With it, whether somebody held the way when it was taken:
    /// if not, there is no more.
    fn next(&self, tick: Duration) -> (Waiting, bool) {
        let idle = |waiting: &mut Waiting| {
            let is_asked = waiting.status_wanted || waiting.has_hold_ended;
            waiting.lines.is_empty() && waiting.over.is_empty() && !is_asked
        };
        let waiting = self.wake.wait_timeout_while(self.waiting(), tick, idle);
        let mut waiting = waiting.unwrap_or_else(PoisonError::into_inner).0;
        (std::mem::take(&mut *waiting), self.holds.load(Ordering::Relaxed) > 0)
    }
}

fn named(name: Option<&str>, line: &str) -> String {
    name.map_or_else(|| line.to_owned(), |name| format!("{name}: {line}"))
}

struct Screen {
    shape: Shape,
    shown: Vec<Shown>,
    began: Instant,
    people: People,
}

/// A row that is not over.
struct Shown {
    place: usize,
    row: Row,
    pace: Pace,
    bar: Option<Bar>,
}

enum Shape {
    /// `turn` counts draws: the rows take turns, so that many are not drawn more often than one.
    Bars {
        bars: Bars,
        next: Duration,
        turn: usize,
    },
    Plain {
        interval: Duration,
        next: Duration,
    },
    None,
}

impl Screen {
    fn new(style: Style, rows: Vec<Row>, people: People) -> Self {
        let shape = match style {
            Style::Bar { .. } => Shape::Bars { bars: Bars::new(), next: Duration::ZERO, turn: 0 },
            Style::Plain { interval } => Shape::Plain { interval, next: interval },
            Style::None => Shape::None,
        };
        let show = |(place, row): (usize, Row)| {
            let bar = match (&shape, style) {
                (Shape::Bars { bars, .. }, Style::Bar { colour }) => Some(Bar::new(bars, colour, row.name.as_deref())),
                _ => None,
            };
            Shown { place, row, pace: Pace::default(), bar }
        };
        let shown = rows.into_iter().enumerate().map(show).collect();
        Self { shape, shown, began: Instant::now(), people }
    }

    fn show(mut self, shared: &Shared) {
        let tick = match &self.shape {
            Shape::Bars { .. } => BAR_TICK,
            Shape::Plain { interval, .. } => PLAIN_TICK.min(*interval),
            Shape::None => PLAIN_TICK,
        };
        loop {
            let (waiting, is_held) = shared.next(tick);
            let views = self.look();
            let mut lines: Vec<Line> = waiting.lines.into();
            if waiting.lost > 0 {
                let text = format!("{} lines were lost: nobody read them", waiting.lost);
                lines.push(Line { priority: Priority::Warning, text });
            }
            if waiting.status_wanted {
                lines.extend(self.statuses(&views));
            }
            for gone in self.shown.extract_if(.., |shown| waiting.over.contains(&shown.place)) {
                gone.bar.iter().for_each(Bar::clear);
            }
            self.print(&lines);
            match self.shown.is_empty() {
                true if !is_held => return,
                true => {}
                false => self.draw(),
            }
        }
    }

    fn look(&mut self) -> Vec<View> {
        let elapsed = self.began.elapsed();
        self.shown.iter_mut().map(|shown| shown.look(elapsed)).collect()
    }

    /// A line for each row.
    fn statuses(&self, views: &[View]) -> Vec<Line> {
        let line = |(shown, view): (&Shown, &View)| {
            let text = one_line(&named(shown.row.name.as_deref(), &text::status(view)));
            Line { priority: Priority::Info, text }
        };
        self.shown.iter().zip(views).map(line).collect()
    }

    fn print(&mut self, lines: &[Line]) {
        if lines.is_empty() {
            return;
        }
        let People { err, priorities } = &mut self.people;
        let line = |Line { priority, text }: &Line| match *priorities {
            true => format!("<{}>{text}\n", *priority as u8),
            false => format!("drive-backup: {text}\n"),
        };
        let text: String = lines.iter().map(line).collect();
        // People who closed their end are no reason to end.
        let mut write = || drop(err.write_all(text.as_bytes()));
        match &self.shape {
            Shape::Bars { bars, .. } => bars.aside(write),
            _ => write(),
        }
    }

    fn draw(&mut self) {
        let elapsed = self.began.elapsed();
        match &mut self.shape {
            Shape::Bars { next, turn, .. } if elapsed >= *next => {
                *next = elapsed + BAR_TICK;
                let drawn = *turn % self.shown.len();
                *turn = drawn + 1;
                // In the background the terminal is somebody else's.
                let view = self.shown[drawn].look(elapsed);
                if let Some(bar) = self.shown[drawn].bar.as_mut().filter(|_| in_foreground(std::io::stderr())) {
                    bar.draw(&view);
                }
            }
            Shape::Plain { interval, next } if elapsed >= *next => {
                *next = elapsed + *interval;
                let views = self.look();
                self.print(&self.statuses(&views));
            }
            _ => {}
        }
    }
}

impl Shown {
    fn look(&mut self, elapsed: Duration) -> View {
        self.pace.look(elapsed, self.row.job.snapshot())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{self, BufRead, BufReader, Read};
    use std::sync::mpsc;

    const BOUND: Duration = Duration::from_secs(20);

    fn display(style: Style) -> (Display, BufReader<io::PipeReader>, mpsc::Receiver<()>) {
        display_of(style, &[None])
    }

    fn display_of(style: Style, names: &[Option<&str>]) -> (Display, BufReader<io::PipeReader>, mpsc::Receiver<()>) {
        let (read, write) = io::pipe().unwrap();
        let (done, shown) = mpsc::channel();
        let row = |name: &Option<&str>| Row { name: name.map(str::to_owned), job: Arc::new(Job::new(None)) };
        let rows = names.iter().map(row).collect();
        let display = Display::start(style, rows, People::at(write), move || done.send(()).unwrap()).unwrap();
        (display, BufReader::new(read), shown)
    }

    #[test]
    fn of_several_each_line_names_its_own_until_it_is_over() {
        let (display, mut read, shown) = display_of(Style::None, &[Some("a"), Some("b\n")]);
        display.show_status();
        let mut text = String::new();
        let mut two_lines = |text: &mut String| (0..2).for_each(|_| assert!(read.read_line(text).unwrap() > 0));
        two_lines(&mut text);
        assert_eq!(text, "drive-backup: a: preparing\ndrive-backup: b\\n: preparing\n");
        text.clear();
        display.about(Some("a".to_owned())).say("done");
        display.finish(0);
        display.say("all");
        two_lines(&mut text);
        assert_eq!(text, "drive-backup: a: done\ndrive-backup: all\n");
        assert!(shown.try_recv().is_err(), "b is not over");
        display.show_status();
        display.finish(1);
        shown.recv_timeout(BOUND).unwrap();
        text.clear();
        read.read_to_string(&mut text).unwrap();
        assert_eq!(text, "drive-backup: b\\n: preparing\n");
    }

    #[test]
    fn without_progress_only_what_was_said_is_shown() {
        let (display, mut read, shown) = display(Style::None);
        display.say("one\nline \u{1b}[31m");
        display.finish(0);
        shown.recv_timeout(BOUND).unwrap();
        let mut text = String::new();
        read.read_to_string(&mut text).unwrap();
        assert_eq!(text, "drive-backup: one\\nline \\u{1b}[31m\n");
    }

    #[test]
    fn the_journal_is_told_how_much_a_line_matters() {
        let (mut read, write) = io::pipe().unwrap();
        let row = Row { name: None, job: Arc::new(Job::new(None)) };
        let people = People { priorities: true, ..People::at(write) };
        let display = Display::start(Style::None, vec![row], people, || ()).unwrap();
        display.say("done");
        display.warn("late");
        display.fail("lost");
        display.finish(0);
        let mut text = String::new();
        read.read_to_string(&mut text).unwrap();
        assert_eq!(text, "<6>done\n<4>warning: late\n<3>lost\n");
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
        display.finish(0);
    }

    #[test]
    fn a_reader_that_stopped_blocks_nobody_and_takes_no_memory() {
        let (display, read, shown) = display(Style::None);
        let long = "x".repeat(4000);
        (0..10 * MOST_WAITING).for_each(|_| display.say(&long));
        assert!(display.shared.waiting().lines.len() <= MOST_WAITING);
        display.finish(0);
        assert!(shown.try_recv().is_err(), "the pipe is full");
        let lines: Vec<String> = read.lines().map(Result::unwrap).collect();
        assert!(lines.iter().any(|line| line.ends_with("lines were lost: nobody read them")));
    }

    #[test]
    fn a_reader_that_is_gone_is_no_error() {
        let (display, read, shown) = display(Style::None);
        drop(read);
        display.say("anything");
        display.finish(0);
        shown.recv_timeout(BOUND).unwrap();
    }
}
