//! What a process prints, kept while it runs, and waited for.

use std::io::Read;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::Outcome;

/// A stream that a thread reads to its end; the text is kept whole.
#[derive(Debug)]
pub struct Console {
    shared: Arc<Shared>,
    reader: Option<JoinHandle<()>>,
}

#[derive(Debug, Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    bytes: Vec<u8>,
    is_closed: bool,
}

impl Console {
    /// Starts to read; the thread ends with the stream.
    pub fn read(mut stream: impl Read + Send + 'static) -> Self {
        let shared = Arc::new(Shared::default());
        let theirs = Arc::clone(&shared);
        let reader = std::thread::spawn(move || {
            let mut chunk = [0; 4096];
            while let Ok(count @ 1..) = stream.read(&mut chunk) {
                theirs.state().bytes.extend(chunk.iter().take(count));
                theirs.changed.notify_all();
            }
            theirs.state().is_closed = true;
            theirs.changed.notify_all();
        });
        Self {
            shared,
            reader: Some(reader),
        }
    }

    /// Everything so far.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.shared.state().bytes).into_owned()
    }

    /// Waits until the stream contains `pattern`, and returns the line that it is in.
    ///
    /// # Errors
    ///
    /// When the stream ends or the time is over first; the text so far is in the error.
    pub fn wait_for(&self, pattern: &str, limit: Duration) -> Outcome<String> {
        self.wait_until(&format!("'{pattern}'"), limit, |text| {
            let at = text.find(pattern)?;
            let start = text[..at].rfind('\n').map_or(0, |newline| newline + 1);
            let end = text[at..].find('\n')? + at;
            Some(text[start..end].trim_end_matches('\r').to_owned())
        })
    }

    /// Waits until `find` sees what it looks for in the text so far, and returns what it found.
    ///
    /// # Errors
    ///
    /// When the stream ends or the time is over first; the text so far is in the error.
    pub fn wait_until<T>(&self, what: &str, limit: Duration, find: impl Fn(&str) -> Option<T>) -> Outcome<T> {
        let deadline = Instant::now() + limit;
        let mut state = self.shared.state();
        loop {
            let text = String::from_utf8_lossy(&state.bytes).into_owned();
            if let Some(found) = find(&text) {
                return Ok(found);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if state.is_closed || left.is_zero() {
                let why = if state.is_closed {
                    "the stream ended"
                } else {
                    "the time was over"
                };
                return Err(format!("{why} before {what} was there; it says:\n{text}").into());
            }
            state = self
                .shared
                .changed
                .wait_timeout(state, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
    }

    /// Waits for the end of the stream and returns everything. Call it when the process has ended.
    pub fn finish(&mut self) -> String {
        if let Some(reader) = self.reader.take() {
            // The reader does nothing that can panic; if it did, what was read is still there.
            drop(reader.join());
        }
        self.text()
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
