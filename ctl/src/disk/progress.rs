//! How far a copy is, or whatever has an end, for who sits at a terminal.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A line on standard error that says how far something is; nothing where that is no terminal.
pub(crate) struct Progress(ProgressBar);

/// Often enough to be seen to move.
const REDRAW: Duration = Duration::from_millis(100);

impl Progress {
    /// A bar for `total_bytes` of `what`.
    pub(crate) fn new(what: &'static str, total_bytes: u64) -> Self {
        let template = "{msg} {wide_bar} {bytes} of {total_bytes}, {eta} left";
        Self::with_template(what, total_bytes, template)
    }

    /// A bar for so many of `what`.
    pub(crate) fn of_pieces(what: &'static str, total: u64) -> Self {
        Self::with_template(what, total, "{msg} {wide_bar} {pos} of {len}")
    }

    /// A line for as many bytes of `what` as there turn out to be.
    pub(crate) fn of_bytes(what: &'static str) -> Self {
        Self::with_template(what, 0, "{msg} {bytes}, {bytes_per_sec}")
    }

    fn with_template(what: &'static str, total: u64, template: &str) -> Self {
        let bar = ProgressBar::with_draw_target(Some(total), ProgressDrawTarget::stderr());
        let style = ProgressStyle::with_template(template).expect("the template is one");
        bar.set_style(style);
        bar.set_message(what);
        bar.enable_steady_tick(REDRAW);
        Self(bar)
    }

    /// It is of so many by now.
    pub(crate) fn is_of(&self, total: u64) {
        self.0.set_length(total);
    }

    /// So many more are through.
    pub(crate) fn add(&self, more: u64) {
        self.0.inc(more);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        // The line is gone before a result, or an error, is printed.
        self.0.finish_and_clear();
    }
}
