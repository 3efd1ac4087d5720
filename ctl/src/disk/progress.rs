//! How far a copy is, for who sits at a terminal.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};

/// A line on standard error that says how far a copy is; nothing where that is no terminal.
pub(crate) struct Progress(ProgressBar);

/// Often enough to be seen to move.
const REDRAW: Duration = Duration::from_millis(100);

impl Progress {
    /// A bar for `total_bytes` of `what`.
    pub(crate) fn new(what: &'static str, total_bytes: u64) -> Self {
        let bar = ProgressBar::with_draw_target(Some(total_bytes), ProgressDrawTarget::stderr());
        let style = ProgressStyle::with_template("{msg} {wide_bar} {bytes} of {total_bytes}, {eta} left")
            .expect("the template is one");
        bar.set_style(style);
        bar.set_message(what);
        bar.enable_steady_tick(REDRAW);
        Self(bar)
    }

    /// So many more bytes are through.
    pub(crate) fn add(&self, bytes: u64) {
        self.0.inc(bytes);
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        // The line is gone before a result, or an error, is printed.
        self.0.finish_and_clear();
    }
}
