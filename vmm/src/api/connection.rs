//! One client of the API: from its bytes to a verb, and from the answer to its bytes.
//!
//! ```text
//!            request is a verb                  answer
//! Reading ─────────────────────► Awaiting ────────────────► Reading
//!    │ bytes are no request     │ a line                       │ client wants to close
//!    │                          └──► Telling ──the last line──┐   │
//!    └─────────────────► Closing ◄────────────────────────────┴───┘
//!                           │ everything written
//!                           └──► Discarding ──client closes, or time is up──► gone
//! ```
//!
//! What a client sends after an error is read and thrown away for a while: to close at once would
//! take the answer away from a client that is still sending.

use std::io::{self, ErrorKind, Read as _, Write as _};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use super::http::{CONTINUE, Content, Decoder, Event, HttpError, Request, Response, encode_open};
use super::verbs::Fault;

/// Most bytes taken from a client before others get their turn.
const READ_BYTES_MAX: usize = 16 * 1024;
/// How long nothing new is asked for after a line.
const LINE_PERIOD: Duration = Duration::from_millis(50);

/// A client, between two of its events.
#[derive(Debug)]
pub(super) struct Connection {
    stream: UnixStream,
    decoder: Decoder,
    state: State,
    output: Vec<u8>,
    written: usize,
    deadline: Option<Instant>,
    request_ms_max: u64,
    idle_since: Instant,
    /// The line that was told last.
    told: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Reading,
    Awaiting {
        keep_alive: bool,
    },
    /// Line after line is told. The next one is asked for at `next`, or was already.
    Telling {
        next: Option<Instant>,
    },
    Closing,
    Discarding,
}

/// What a connection wants to be woken for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Interest {
    /// The client has sent something.
    Input,
    /// The client has room for more.
    Output,
    /// Only that the client has gone.
    Hangup,
}

/// What is to be done with a connection after it advanced.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Progress {
    /// Wait for [`Connection::interest`].
    Wait,
    /// Find the answer to this and bring it to [`Connection::answer`].
    Request(Request),
    /// Drop the connection.
    Gone,
}

impl Connection {
    /// A client that has just connected. `stream` must be nonblocking.
    pub(super) fn new(stream: UnixStream, decoder: Decoder, request_ms_max: u64, now: Instant) -> Self {
        Self {
            stream,
            decoder,
            state: State::Reading,
            output: Vec::new(),
            written: 0,
            deadline: None,
            request_ms_max,
            idle_since: now,
            told: String::new(),
        }
    }

    pub(super) fn stream(&self) -> &UnixStream {
        &self.stream
    }

    pub(super) fn interest(&self) -> Interest {
        match self.state {
            _ if self.has_output() => Interest::Output,
            State::Awaiting { .. } | State::Telling { .. } => Interest::Hangup,
            State::Reading | State::Closing | State::Discarding => Interest::Input,
        }
    }

    /// When the client's time is up, if it is short of something.
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// When the next line is to be asked for: once the client has taken the one before.
    pub(super) fn next_line(&self) -> Option<Instant> {
        match self.state {
            State::Telling { next } if !self.has_output() => next,
            _ => None,
        }
    }

    /// Takes note that the next line is asked for.
    pub(super) fn asks_for_line(&mut self) {
        self.state = State::Telling { next: None };
    }

    /// Whether lines are told.
    pub(super) fn is_telling(&self) -> bool {
        matches!(self.state, State::Telling { .. })
    }

    /// Takes a line, which goes to the client unless it says what the one before did; after the last one the client has all.
    pub(super) fn tell(&mut self, line: &str, is_last: bool, now: Instant) {
        if !self.is_telling() {
            self.output.extend_from_slice(&encode_open(Content::JsonLines));
        }
        if self.told != line {
            self.output.extend_from_slice(line.as_bytes());
            self.output.push(b'\n');
            line.clone_into(&mut self.told);
        }
        self.state = if is_last {
            State::Closing
        } else {
            State::Telling {
                next: Some(now + LINE_PERIOD),
            }
        };
        self.deadline = None;
    }

    /// There are no more lines.
    pub(super) fn end_telling(&mut self) {
        self.state = State::Closing;
    }

    /// Since when the client has nothing going on; `None` while it has.
    pub(super) fn idle_since(&self) -> Option<Instant> {
        let is_idle = self.state == State::Reading && !self.has_output() && !self.decoder.is_in_request();
        is_idle.then_some(self.idle_since)
    }

    /// Writes, reads and decodes as far as that goes without waiting. After a request, nothing more
    /// is read from this client until it has its answer.
    pub(super) fn advance(&mut self, now: Instant) -> Progress {
        let progress = self.step(now).unwrap_or(Progress::Gone);
        let is_short_of_something = match self.state {
            State::Reading => self.has_output() || self.decoder.is_in_request(),
            State::Awaiting { .. } | State::Telling { .. } => self.has_output(),
            State::Closing | State::Discarding => true,
        };
        if !is_short_of_something {
            self.deadline = None;
        } else if self.deadline.is_none() {
            self.deadline = Some(now + Duration::from_millis(self.request_ms_max));
        }
        progress
    }

    /// Takes the answer to the request that was given out last.
    pub(super) fn answer(&mut self, response: &Response, now: Instant) {
        let State::Awaiting { keep_alive } = self.state else {
            unreachable!("an answer comes only to a request, and a request is given out only in Awaiting");
        };
        self.output.extend_from_slice(&response.encode(keep_alive));
        self.state = if keep_alive {
            State::Reading
        } else {
            State::Closing
        };
        self.idle_since = now;
        self.deadline = None;
    }

    /// Acts on a deadline that has passed: a client that did not finish its request is told so, any
    /// other is dropped.
    pub(super) fn expire(&mut self, now: Instant) -> Progress {
        if self.state != State::Reading || self.has_output() {
            return Progress::Gone;
        }
        self.deadline = None;
        self.refuse(&HttpError::TooSlow {
            ms_max: self.request_ms_max,
        });
        self.advance(now)
    }

    fn step(&mut self, now: Instant) -> io::Result<Progress> {
        let mut may_read = true;
        loop {
            if !self.flush()? {
                return Ok(Progress::Wait);
            }
            match self.state {
                State::Awaiting { .. } | State::Telling { .. } => return Ok(Progress::Wait),
                State::Closing => {
                    self.stream.shutdown(Shutdown::Write)?;
                    self.state = State::Discarding;
                }
                State::Discarding => return self.discard(),
                State::Reading => match self.decoder.next_event() {
                    Ok(Some(Event::Continue)) => self.output.extend_from_slice(CONTINUE),
                    Ok(Some(Event::Request(request))) => {
                        self.state = State::Awaiting {
                            keep_alive: request.keep_alive,
                        };
                        self.idle_since = now;
                        self.deadline = None;
                        return Ok(Progress::Request(request));
                    }
                    Ok(None) if may_read => {
                        may_read = false;
                        if self.read()? == Some(0) {
                            return Ok(Progress::Gone);
                        }
                    }
                    Ok(None) => return Ok(Progress::Wait),
                    Err(error) => self.refuse(&error),
                },
            }
        }
    }

    fn refuse(&mut self, error: &HttpError) {
        let fault = Fault::bad_request(error.to_string());
        self.output.extend_from_slice(&fault.response().encode(false));
        self.state = State::Closing;
    }

    /// Writes what there is; gives whether everything is written.
    fn flush(&mut self) -> io::Result<bool> {
        while let Some(rest @ [_, ..]) = self.output.get(self.written..) {
            match self.stream.write(rest) {
                Ok(bytes) => self.written += bytes,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(false),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        self.output.clear();
        self.written = 0;
        Ok(true)
    }

    /// Reads once and feeds the decoder; gives the length, zero at the end, or `None` if there is
    /// nothing now.
    fn read(&mut self) -> io::Result<Option<usize>> {
        let mut bytes = [0; READ_BYTES_MAX];
        let length = read_once(&mut self.stream, &mut bytes)?;
        self.decoder
            .feed(bytes.get(..length.unwrap_or(0)).unwrap_or_default());
        Ok(length)
    }

    fn discard(&mut self) -> io::Result<Progress> {
        let mut bytes = [0; READ_BYTES_MAX];
        match read_once(&mut self.stream, &mut bytes)? {
            Some(0) => Ok(Progress::Gone),
            _ => Ok(Progress::Wait),
        }
    }

    fn has_output(&self) -> bool {
        self.written < self.output.len()
    }
}

fn read_once(stream: &mut UnixStream, bytes: &mut [u8]) -> io::Result<Option<usize>> {
    match stream.read(bytes) {
        Ok(length) => Ok(Some(length)),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(None),
        Err(error) => Err(error),
    }
}
