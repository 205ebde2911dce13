//! The bar. Drawn by the display's thread only: a terminal that is stopped (Ctrl-S) blocks the draw.

use super::pace::View;
use super::text;
use crate::ground::status::Phase;
use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};
use rustix::stdio::stderr;
use rustix::termios::tcgetwinsize;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

const DRAWS_A_SECOND: u8 = 10;
const STEPS: u64 = 1000;
const WORDS: &str = "{text}";
const OTHER: &str = "{spinner} {text}";
/// Of the spinner, the last one when it stands still: no more than every terminal has.
const TICKS: &str = "-\\|/ ";
/// A narrower terminal has room for the words alone.
const ROOM_FOR_A_BAR: usize = 72;
/// Of a bar that is alone, and of one that shares its line with a name.
const BAR_COLUMNS: usize = 24;
const NAMED_BAR_COLUMNS: usize = 12;
/// Its brackets and blanks.
const FRAME_COLUMNS: usize = 4;
/// The end of a longer name: it tells more than the beginning.
const NAME_COLUMNS: usize = 16;
const USUAL_COLUMNS: usize = 80;

/// Everything that is drawn, so that lines can be written above it.
pub struct Bars(MultiProgress);

impl Bars {
    /// Nothing yet.
    pub fn new() -> Self {
        Self(MultiProgress::with_draw_target(ProgressDrawTarget::stderr_with_hz(DRAWS_A_SECOND)))
    }

    /// Takes the bars away while `write` writes lines.
    pub fn aside(&self, write: impl FnOnce()) {
        self.0.suspend(write);
    }
}

/// What a line consists of beside its words.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Look {
    Bar,
    Words,
    Spinner,
}

/// A bar while bytes are copied, a spinner in every other phase: a full bar would look like the end.
pub struct Bar {
    bar: ProgressBar,
    /// Shown where it is not the only one.
    name: Option<String>,
    colour: bool,
    look: Option<Look>,
    /// Read by the bar as it draws: `set_message` would be a draw of its own.
    text: Arc<Mutex<String>>,
}

impl Bar {
    /// Below those that `bars` has. Shows nothing before the first draw.
    pub fn new(bars: &Bars, colour: bool, name: Option<&str>) -> Self {
        let bar = bars.0.add(ProgressBar::with_draw_target(Some(STEPS), ProgressDrawTarget::hidden()));
        Self { bar, name: name.map(short), colour, look: None, text: Arc::default() }
    }

    /// One draw of all bars, with this one's news. Blocks as long as the terminal does.
    pub fn draw(&mut self, view: &View) {
        let terminal = terminal_columns();
        let look = match view.job.phase {
            Phase::Copy if terminal >= ROOM_FOR_A_BAR => Look::Bar,
            Phase::Copy => Look::Words,
            _ => Look::Spinner,
        };
        if self.look.replace(look) != Some(look) {
            self.bar.set_style(self.style(look));
        }
        let room = terminal.saturating_sub(self.columns_before(look));
        *self.text.lock().unwrap_or_else(PoisonError::into_inner) = self.fitting(&text::status(view), room);
        self.bar.update(|state| state.set_pos((view.percent * STEPS as f64) as u64));
    }

    fn style(&self, look: Look) -> ProgressStyle {
        let columns = self.columns();
        let template = match (look, self.colour) {
            (Look::Bar, true) => format!("[{{bar:{columns}.cyan/blue}}] {{text}}"),
            (Look::Bar, false) => format!("[{{bar:{columns}}}] {{text}}"),
            (Look::Words, _) => WORDS.to_owned(),
            (Look::Spinner, _) => OTHER.to_owned(),
        };
        let text = Arc::clone(&self.text);
        let write = move |_: &ProgressState, to: &mut dyn fmt::Write| {
            // The buffer that it is drawn in takes everything.
            let _ = to.write_str(&text.lock().unwrap_or_else(PoisonError::into_inner));
        };
        let style = ProgressStyle::with_template(&template).expect("a constant template");
        style.progress_chars("=> ").tick_chars(TICKS).with_key("text", write)
    }

    fn columns(&self) -> usize {
        if self.name.is_some() { NAMED_BAR_COLUMNS } else { BAR_COLUMNS }
    }

    /// What a line has before its words.
    fn columns_before(&self, look: Look) -> usize {
        match look {
            Look::Bar => self.columns() + FRAME_COLUMNS,
            Look::Words => 1, // the cursor's
            Look::Spinner => FRAME_COLUMNS,
        }
    }

    /// Cut to the terminal: a line that wraps could not be drawn over.
    fn fitting(&self, status: &str, room: usize) -> String {
        let mut text = match &self.name {
            None => status.to_owned(),
            Some(name) => format!("{name}: {status}"),
        };
        // Name and status are ASCII.
        text.truncate(room);
        text
    }

    /// Takes it away for good.
    pub fn clear(&self) {
        self.bar.finish_and_clear();
    }
}

fn terminal_columns() -> usize {
    let columns = tcgetwinsize(stderr()).map(|size| usize::from(size.ws_col));
    columns.ok().filter(|columns| *columns > 0).unwrap_or(USUAL_COLUMNS)
}

/// As much of a name as has room. One character is one column: what may be wider is a question mark.
fn short(name: &str) -> String {
    let columns: Vec<char> = name.chars().map(|c| if c.is_ascii_graphic() || c == ' ' { c } else { '?' }).collect();
    columns[columns.len().saturating_sub(NAME_COLUMNS)..].iter().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_keeps_its_end_and_one_column_a_character() {
        assert_eq!(short("a b.raw"), "a b.raw");
        assert_eq!(short("/srv/machines/vm1/disk.raw"), "nes/vm1/disk.raw");
        assert_eq!(short("dïsk\u{1b}[31m\u{1f4be}"), "d?sk?[31m?");
    }
}
