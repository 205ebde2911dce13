//! The bar. Drawn by the display's thread only: a terminal that is stopped (Ctrl-S) blocks the draw.

use super::pace::View;
use super::text;
use crate::ground::status::Phase;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::cell::Cell;

const DRAWS_A_SECOND: u8 = 10;
const STEPS: u64 = 1000;
const COPY: &str = "[{bar:24}] {wide_msg}";
const COPY_IN_COLOUR: &str = "[{bar:24.cyan/blue}] {wide_msg}";
const OTHER: &str = "{spinner} {wide_msg}";

/// A bar while bytes are copied, a spinner in every other phase: a full bar would look like the end.
pub struct Bar {
    bar: ProgressBar,
    colour: bool,
    copying: Cell<Option<bool>>,
}

impl Bar {
    /// Shows nothing before the first draw.
    pub fn new(colour: bool) -> Self {
        let target = ProgressDrawTarget::stderr_with_hz(DRAWS_A_SECOND);
        Self { bar: ProgressBar::with_draw_target(Some(STEPS), target), colour, copying: Cell::new(None) }
    }

    /// Blocks as long as the terminal does.
    pub fn draw(&self, view: &View) {
        let copying = view.job.phase == Phase::Copy;
        if self.copying.replace(Some(copying)) != Some(copying) {
            let template = match (copying, self.colour) {
                (true, true) => COPY_IN_COLOUR,
                (true, false) => COPY,
                (false, _) => OTHER,
            };
            let style = ProgressStyle::with_template(template).expect("a constant template");
            self.bar.set_style(style.progress_chars("=> "));
        }
        // Each of these may draw; what the terminal gets is limited by the target's rate.
        self.bar.set_message(text::status(view));
        self.bar.set_position((view.percent * STEPS as f64) as u64);
        self.bar.tick();
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
