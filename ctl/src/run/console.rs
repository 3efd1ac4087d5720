//! The keyboard: from the terminal to the pipe that is the monitor's standard input.
//!
//! The guest's output needs nobody: the monitor writes to the same standard output.

use std::collections::VecDeque;
use std::io::{self, IsTerminal, Stdin};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::{ChildStdin, Stdio};

use rustix::io::Errno;
use rustix::termios::tcgetpgrp;

use super::escape::Escape;
use super::monitor::is_own_group;
use crate::output::note;
use crate::terminal::{RawTerminal, TerminalError};

/// What a guest that does not read may have waiting; what is typed beyond it is lost, as on a
/// serial line.
const WAITING_BYTES_MAX: usize = 4096;
const READ_BYTES: usize = 1024;

/// Where the monitor's standard input comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Input {
    /// It is ours: a file, a pipe.
    Inherited,
    /// A terminal that belongs to another job now: reading it would stop us.
    Nothing,
    /// A terminal, in the modes that it has: the output goes elsewhere.
    Lines,
    /// A terminal that is the guest's console.
    Keys,
}

impl Input {
    /// What this process has been started with.
    pub(crate) fn of_this_process() -> Self {
        let stdin = io::stdin();
        if !stdin.is_terminal() {
            return Self::Inherited;
        }
        let in_foreground = tcgetpgrp(&stdin).is_ok_and(is_own_group);
        match (in_foreground, io::stdout().is_terminal()) {
            (false, _) => Self::Nothing,
            (true, false) => Self::Lines,
            (true, true) => Self::Keys,
        }
    }

    /// What the monitor is started with.
    pub(super) fn stdio(self) -> Stdio {
        match self {
            Self::Inherited => Stdio::inherit(),
            Self::Nothing => Stdio::null(),
            Self::Lines | Self::Keys => Stdio::piped(),
        }
    }
}

/// The keyboard of a machine that has a terminal.
#[derive(Debug)]
pub(super) struct Console {
    stdin: Stdin,
    pipe: OwnedFd,
    waiting: VecDeque<u8>,
    escape: Escape,
    _raw: Option<RawTerminal>,
}

/// Whether a console goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Pumped {
    /// There may be more; the user has asked this often to stop the machine.
    Open {
        /// How often.
        stops: usize,
    },
    /// The terminal has hung up, or the monitor has closed its input.
    Closed,
}

impl Console {
    /// Connects the terminal to `pipe`, and says how to get out of it.
    ///
    /// # Errors
    ///
    /// When the terminal's modes or the pipe's cannot be set.
    pub(super) fn open(pipe: ChildStdin, input: Input) -> Result<Self, TerminalError> {
        let pipe = OwnedFd::from(pipe);
        rustix::io::ioctl_fionbio(&pipe, true).map_err(io::Error::from)?;
        let raw = match input {
            Input::Keys => {
                note("Ctrl-A x stops the machine, Ctrl-A Ctrl-A types Ctrl-A");
                Some(RawTerminal::enter()?)
            }
            _ => None,
        };
        Ok(Self {
            stdin: io::stdin(),
            pipe,
            waiting: VecDeque::new(),
            escape: Escape::default(),
            _raw: raw,
        })
    }

    /// Readable when a key was pressed.
    pub(super) fn keyboard(&self) -> BorrowedFd<'_> {
        self.stdin.as_fd()
    }

    /// Writable when the monitor takes more; `None` while nothing waits for it.
    pub(super) fn blocked_pipe(&self) -> Option<BorrowedFd<'_>> {
        (!self.waiting.is_empty()).then(|| self.pipe.as_fd())
    }

    /// Reads what was typed and sends it on.
    ///
    /// # Errors
    ///
    /// When the terminal or the pipe fails for a reason other than its end.
    pub(super) fn read(&mut self) -> io::Result<Pumped> {
        let mut input = [0; READ_BYTES];
        let count = match rustix::io::read(&self.stdin, &mut input) {
            // EIO is how a terminal says that it has hung up.
            Ok(0) | Err(Errno::IO) => return Ok(Pumped::Closed),
            Ok(count) => count,
            Err(Errno::INTR | Errno::AGAIN) => return Ok(Pumped::Open { stops: 0 }),
            Err(errno) => return Err(errno.into()),
        };
        let (typed, _) = input.split_at(count);
        let keys = self.escape.sort(typed);
        let room = WAITING_BYTES_MAX - self.waiting.len();
        self.waiting.extend(keys.for_guest.into_iter().take(room));
        match self.flush()? {
            Pumped::Open { .. } => Ok(Pumped::Open { stops: keys.stops }),
            Pumped::Closed => Ok(Pumped::Closed),
        }
    }

    /// Sends what waits, as much as the monitor takes.
    ///
    /// # Errors
    ///
    /// When the pipe fails for a reason other than its end.
    pub(super) fn flush(&mut self) -> io::Result<Pumped> {
        while !self.waiting.is_empty() {
            match rustix::io::write(&self.pipe, self.waiting.make_contiguous()) {
                Ok(count) => drop(self.waiting.drain(..count)),
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                Err(Errno::PIPE) => return Ok(Pumped::Closed),
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(Pumped::Open { stops: 0 })
    }
}
