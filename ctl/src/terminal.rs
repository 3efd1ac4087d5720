//! The terminal in raw mode, and back.

use std::io::{self, Stdin};
use std::panic;
use std::sync::{Mutex, Once, PoisonError};

use rustix::termios::{OptionalActions, OutputModes, Termios, tcgetattr, tcsetattr};
use thiserror::Error;

/// The modes to return to; `Some` while the terminal is raw.
static ORIGINAL: Mutex<Option<Termios>> = Mutex::new(None);
static PANIC_HOOK: Once = Once::new();

/// Why the terminal's modes cannot be changed.
#[derive(Debug, Error)]
#[error("cannot set the terminal to raw mode")]
pub(crate) struct TerminalError(#[from] io::Error);

/// Keeps the terminal of standard input raw until it is dropped, or the process panics.
#[derive(Debug)]
pub(crate) struct RawTerminal(());

impl RawTerminal {
    /// Sets the terminal of standard input to raw mode: every key reaches the guest. What is printed is
    /// still processed, so that our own lines start at the left.
    ///
    /// # Errors
    ///
    /// When standard input is not a terminal.
    pub(crate) fn enter() -> Result<Self, TerminalError> {
        let stdin = io::stdin();
        let original = tcgetattr(&stdin).map_err(io::Error::from)?;
        // A panic aborts the release binary without running any destructor.
        PANIC_HOOK.call_once(|| {
            let previous = panic::take_hook();
            panic::set_hook(Box::new(move |info| {
                restore(&io::stdin());
                previous(info);
            }));
        });
        let mut raw = original.clone();
        raw.make_raw();
        raw.output_modes |= OutputModes::OPOST;
        *ORIGINAL.lock().unwrap_or_else(PoisonError::into_inner) = Some(original);
        let entered = Self(());
        tcsetattr(&stdin, OptionalActions::Now, &raw).map_err(io::Error::from)?;
        Ok(entered)
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore(&io::stdin());
    }
}

fn restore(stdin: &Stdin) {
    // Never waits: a panic while the lock is held must still end the process.
    let original = match ORIGINAL.try_lock() {
        Ok(mut original) => original.take(),
        Err(_) => None,
    };
    if let Some(original) = original {
        // A terminal that has hung up has no modes to restore.
        let _ = tcsetattr(stdin, OptionalActions::Now, &original);
    }
}
