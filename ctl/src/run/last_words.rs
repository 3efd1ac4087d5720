//! What a monitor writes to its standard error: passed on as it comes, its last line remembered.

use std::io::{self, Read, Write};
use std::process::ChildStderr;
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::Duration;

/// A line longer than this is none of the monitor's last ones; its beginning is forgotten.
const LINE_BYTES_MAX: usize = 4096;
const READ_BYTES: usize = 4096;
/// How long the pipe may stay open after the monitor has ended: what it has started may hold it.
const CLOSE_WAIT: Duration = Duration::from_secs(1);

/// A monitor's standard error while it is passed on.
#[derive(Debug)]
pub(super) struct LastWords {
    line: Receiver<String>,
}

impl LastWords {
    /// Passes on what comes from `pipe` until it is closed.
    pub(super) fn listen(pipe: ChildStderr) -> Self {
        let (teller, line) = mpsc::channel();
        thread::spawn(move || {
            // Nobody hears it when the pipe was closed too late.
            let _ = teller.send(pass_on(pipe, io::stderr()));
        });
        Self { line }
    }

    /// The last line, once everything was passed on; `None` when the pipe stays open.
    pub(super) fn wait(self) -> Option<String> {
        self.line.recv_timeout(CLOSE_WAIT).ok()
    }
}

/// Copies `from` to `to` and returns the last line.
fn pass_on(mut from: impl Read, mut to: impl Write) -> String {
    let mut buffer = [0; READ_BYTES];
    let mut tail = Vec::new();
    loop {
        let piece = match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(count) => buffer.get(..count).expect("a read fits into its buffer"),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => break,
        };
        // The monitor must not wait for a pipe because nobody reads what it is copied to.
        let _ = to.write_all(piece);
        tail.extend_from_slice(piece);
        let excess = tail.len().saturating_sub(LINE_BYTES_MAX);
        tail.drain(..excess);
    }
    let text = String::from_utf8_lossy(&tail);
    text.lines().last().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_is_passed_on_and_the_last_line_remembered() {
        let long = [vec![b'x'; 3 * READ_BYTES], b"\nlast\n".to_vec()].concat();
        for (text, line) in [
            (&b""[..], ""),
            (b"a\nb", "b"),
            (b"a\nb\n", "b"),
            (b"a\n\xff\n", "\u{fffd}"),
            (&long, "last"),
        ] {
            let mut copy = Vec::new();
            assert_eq!((pass_on(text, &mut copy).as_str(), copy.as_slice()), (line, text));
        }
    }

    #[test]
    fn a_reader_that_has_gone_away_does_not_stop_the_copy() {
        let full: &mut [u8] = &mut [];
        assert_eq!(pass_on(&b"a\nb\n"[..], full), "b");
    }
}
