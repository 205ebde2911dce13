//! The bar. Drawn by the display's thread only: a terminal that is stopped (Ctrl-S) blocks the draw.

use super::pace::View;
use super::text;
use crate::ground::status::Phase;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};
use rustix::stdio::stderr;
use rustix::termios::tcgetwinsize;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

const DRAWS_A_SECOND: u8 = 10;
const STEPS: u64 = 1000;
const COPY: &str = "[{bar:24}] {text}";
const COPY_IN_COLOUR: &str = "[{bar:24.cyan/blue}] {text}";
const OTHER: &str = "{spinner} {text}";
/// Columns that the text does not have: the bar's, with its brackets and blanks.
const BAR_COLUMNS: usize = 28;
const USUAL_COLUMNS: u16 = 80;

/// A bar while bytes are copied, a spinner in every other phase: a full bar would look like the end.
pub struct Bar {
    bar: ProgressBar,
    colour: bool,
    copying: Option<bool>,
    /// Read by the bar as it draws: `set_message` would be a draw of its own.
    text: Arc<Mutex<String>>,
}

impl Bar {
    /// Shows nothing before the first draw.
    pub fn new(colour: bool) -> Self {
        let target = ProgressDrawTarget::stderr_with_hz(DRAWS_A_SECOND);
        let bar = ProgressBar::with_draw_target(Some(STEPS), target);
        Self { bar, colour, copying: None, text: Arc::default() }
    }

    /// One draw. Blocks as long as the terminal does.
    pub fn draw(&mut self, view: &View) {
        let copying = view.job.phase == Phase::Copy;
        if self.copying.replace(copying) != Some(copying) {
            self.bar.set_style(self.style(copying));
        }
        *self.text.lock().unwrap_or_else(PoisonError::into_inner) = fitting(text::status(view));
        self.bar.update(|state| state.set_pos((view.percent * STEPS as f64) as u64));
    }

    fn style(&self, copying: bool) -> ProgressStyle {
        let template = match (copying, self.colour) {
            (true, true) => COPY_IN_COLOUR,
            (true, false) => COPY,
            (false, _) => OTHER,
        };
        let text = Arc::clone(&self.text);
        let write = move |_: &ProgressState, to: &mut dyn fmt::Write| {
            // The buffer that it is drawn in takes everything.
            let _ = to.write_str(&text.lock().unwrap_or_else(PoisonError::into_inner));
        };
        let style = ProgressStyle::with_template(template).expect("a constant template");
        style.progress_chars("=> ").with_key("text", write)
    }

    /// Takes the bar away while `write` writes lines.
    pub fn aside(&self, write: impl FnOnce()) {
        self.bar.suspend(write);
    }

    /// Takes it away for good.
    pub fn clear(&self) {
        self.bar.finish_and_clear();
    }
}

/// Cut to the terminal: a line that wraps could not be drawn over.
fn fitting(mut text: String) -> String {
    let columns = tcgetwinsize(stderr()).map(|size| size.ws_col).ok().filter(|columns| *columns > 0);
    let room = usize::from(columns.unwrap_or(USUAL_COLUMNS)).saturating_sub(BAR_COLUMNS);
    // A status is ASCII.
    text.truncate(room);
    text
}
