//! `coraclectl exec`: a command in a guest, with its input, its outputs and its status.

use std::io::{self, IsTerminal};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use clap::Args;
use coracle_agent::wire::{self, DATA_BYTES, Encode, Exec, Exit, Size, ToGuest, ToHost, WINDOW_BYTES};
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::termios::tcgetwinsize;
use thiserror::Error;

use super::link::{Link, LinkArgs, LinkError};
use crate::deadline::{Deadline, wait_ready};
use crate::output::{Format, note, note_json};
use crate::run::Input;
use crate::signals::{Signals, status_of};
use crate::terminal::{RawTerminal, TerminalError};

/// As much as a pipe that polls as writable takes without blocking (POSIX's PIPE_BUF, as Linux has it).
const PIPE_BYTES: usize = 4096;
/// What a command ends with whose time was over, as with timeout(1).
pub(crate) const STATUS_LATE: u8 = 124;
/// How long nobody may read what a command writes after a signal that it has to be told of.
const UNREAD: Duration = Duration::from_secs(5);
/// How often it is looked whether the terminal has another size.
const LOOK: Duration = Duration::from_millis(250);

/// Run a command in a guest: its standard input, output and error are ours, and its status too
///
/// The guest has to run coracle-agent, and the machine to have a vsock device (`coraclectl run --vsock PATH`). SIGINT, SIGTERM,
/// SIGHUP and SIGQUIT go to the command; a second one ends coraclectl, and the command with it, as does one after which nobody
/// reads the output for five seconds. What the command has left running in the background stays when it has ended.
#[derive(Debug, Args)]
#[command(after_help = "\
Exit status:
  the command's, whatever it is; otherwise
  125      coraclectl itself has failed, or the guest's agent is not reached
  126      the command cannot be run
  127      there is no such command
  128 + N  signal N has ended the command, or coraclectl

  coraclectl exec web -- uname -r
  tar c src | coraclectl exec --directory /srv web -- tar x
  coraclectl exec --tty web -- sh -l")]
pub(crate) struct ExecArgs {
    #[command(flatten)]
    link: LinkArgs,
    #[command(flatten)]
    surroundings: Surroundings,
    /// A machine's name, or the path of its API socket
    vm: String,
    /// The command and its arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

/// What a command finds around it in its guest.
#[derive(Debug, Args)]
pub(crate) struct Surroundings {
    /// A variable for the command; the value of one without `=` is ours
    #[arg(long, short, value_name = "NAME[=VALUE]")]
    env: Vec<String>,
    /// Where the command runs
    #[arg(long, short = 'C', value_name = "PATH", default_value = "/")]
    directory: String,
    /// Give the command a terminal, and it ours
    #[arg(long, short)]
    tty: bool,
    /// Give the command no standard input
    #[arg(long, short, conflicts_with = "tty")]
    no_stdin: bool,
}

/// Why a command has no status.
#[derive(Debug, Error)]
pub(crate) enum ExecError {
    #[error(transparent)]
    Link(#[from] LinkError),
    #[error(transparent)]
    Terminal(#[from] TerminalError),
    #[error("--tty takes a terminal, and standard input is none: leave --tty out")]
    NoTerminal,
    #[error("the environment has no variable {0} whose value the command could be given")]
    NoVariable(String),
    #[error("cannot write what the command has written")]
    Write(#[source] io::Error),
}

impl From<io::Error> for ExecError {
    fn from(error: io::Error) -> Self {
        Self::Link(error.into())
    }
}

/// Runs a command in a guest; returns its status.
///
/// # Errors
///
/// When the guest's agent is not reached, or is lost.
pub(crate) fn exec(args: &ExecArgs, format: Format) -> Result<u8, ExecError> {
    let signals = Signals::watch().map_err(LinkError::from)?;
    let request = args.surroundings.of(&args.command)?;
    let ran = Link::open(&args.vm, &args.link, &signals)
        .map_err(ExecError::from)
        .and_then(|link| {
            let terms = Terms::of(args.surroundings.no_stdin, format);
            converse(link, &signals, request, terms)
        });
    match ran {
        Err(ExecError::Link(LinkError::Interrupted(signal))) => Ok(status_of(signal)),
        ran => ran.map(Ran::status),
    }
}

/// What has become of a command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ran {
    /// It has ended, or could not begin, with this status.
    Ended(u8),
    /// It was not waited for: this is our status.
    GivenUp(u8),
    /// Its time was over, and it was told to end, or given up if that was of no use.
    Late { has_ended: bool },
}

impl Ran {
    /// What a caller ends with.
    pub(crate) fn status(self) -> u8 {
        match self {
            Self::Ended(status) | Self::GivenUp(status) => status,
            Self::Late { .. } => STATUS_LATE,
        }
    }
}

/// What was heard of a command.
enum Heard {
    /// Nothing yet.
    Nothing,
    /// Something, and there is more to come.
    More,
    /// The last of it.
    Last(Ran),
}

impl Surroundings {
    /// What an agent is to be asked for.
    ///
    /// # Errors
    ///
    /// When something that the command is to have is not there.
    pub(crate) fn of(&self, command: &[String]) -> Result<Exec, ExecError> {
        if self.tty && !io::stdin().is_terminal() {
            return Err(ExecError::NoTerminal);
        }
        let environment = self.env.iter().map(|given| variable(given));
        Ok(Exec {
            command: command.to_owned(),
            environment: environment.collect::<Result<_, _>>()?,
            directory: Some(self.directory.clone()),
            terminal: self.tty.then(size),
        })
    }

    /// Whether the command gets none of our standard input.
    pub(crate) fn is_deaf(&self) -> bool {
        self.no_stdin
    }
}

/// How a command is stayed with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Terms {
    /// It gets none of our standard input.
    is_deaf: bool,
    format: Format,
    /// When it is told to end as by SIGTERM.
    until: Option<Deadline>,
    /// How long it is waited for after a signal; for ever if that is not said.
    patience: Option<Duration>,
}

impl Terms {
    pub(crate) fn of(is_deaf: bool, format: Format) -> Self {
        Self {
            is_deaf,
            format,
            until: None,
            patience: None,
        }
    }

    /// The same, with a limit to all of it, and one to what is done after a signal.
    pub(crate) fn limited(self, until: Option<Deadline>, patience: Duration) -> Self {
        Self {
            until,
            patience: Some(patience),
            ..self
        }
    }
}

/// Has the agent run a command, and stays between it and our own standard input, output and error until it has ended, or
/// is given up.
///
/// # Errors
///
/// When the guest's agent is lost.
pub(crate) fn converse(link: Link, signals: &Signals, request: Exec, terms: Terms) -> Result<Ran, ExecError> {
    let size = request.terminal;
    link.send(&ToGuest::Request(wire::Request::Exec(request)), signals)?;
    // Only now: until then Ctrl-C is for this program.
    let _raw = size.map(|_| RawTerminal::enter()).transpose()?;
    let mut pump = Pump {
        link,
        signals,
        credit: WINDOW_BYTES,
        outgoing: Vec::new(),
        reads: !terms.is_deaf && Input::of_this_process() != Input::Nothing,
        size,
        asked: None,
        is_late: false,
        terms,
    };
    if !pump.reads {
        ToGuest::End.encode(&mut pump.outgoing);
    }
    let ran = pump.run()?;
    Ok(match (pump.is_late, ran) {
        (false, ran) => ran,
        (true, Ran::Ended(_)) => Ran::Late { has_ended: true },
        (true, _) => Ran::Late { has_ended: false },
    })
}

fn variable(given: &str) -> Result<(String, String), ExecError> {
    if let Some((name, value)) = given.split_once('=') {
        return Ok((name.to_owned(), value.to_owned()));
    }
    match std::env::var(given) {
        Ok(value) => Ok((given.to_owned(), value)),
        Err(_) => Err(ExecError::NoVariable(given.to_owned())),
    }
}

/// That of our terminal.
fn size() -> Size {
    let size = tcgetwinsize(io::stdin());
    size.map_or(Size::default(), |size| Size {
        rows: size.ws_row,
        columns: size.ws_col,
    })
}

/// Between the connection and our own standard input, output and error.
struct Pump<'a> {
    link: Link,
    signals: &'a Signals,
    /// How much of standard input the agent takes now.
    credit: usize,
    /// What the connection has no room for yet.
    outgoing: Vec<u8>,
    /// Standard input has more.
    reads: bool,
    /// That of the terminal, if the command has one.
    size: Option<Size>,
    /// The signal that the command was sent, and when.
    asked: Option<(i32, Instant)>,
    /// Its time was over.
    is_late: bool,
    terms: Terms,
}

impl Pump<'_> {
    fn run(&mut self) -> Result<Ran, ExecError> {
        loop {
            loop {
                match self.hear()? {
                    Heard::Nothing => break,
                    Heard::More => {}
                    Heard::Last(ran) => return Ok(ran),
                }
            }
            self.send_some()?;
            let (comes, typed) = self.wait()?;
            if let Some(signal) = self.signals.take()
                && let Some(ran) = self.pass_on(signal)
            {
                return Ok(ran);
            }
            if let Some(ran) = self.look_at_clock() {
                return Ok(ran);
            }
            if comes {
                self.link.fill()?;
            }
            if typed {
                self.read()?;
            }
            if let Some(before) = &mut self.size {
                let now = size();
                if std::mem::replace(before, now) != now {
                    ToGuest::Resize(now).encode(&mut self.outgoing);
                }
            }
        }
    }

    /// Sends what waits. A command that has ended takes no more, and what it has said last is still to be heard.
    fn send_some(&mut self) -> Result<(), LinkError> {
        match self.link.send_some(&mut self.outgoing) {
            Err(LinkError::Closed) => {
                self.outgoing.clear();
                self.reads = false;
                Ok(())
            }
            sent => sent,
        }
    }

    /// Does what the next message says.
    fn hear(&mut self) -> Result<Heard, ExecError> {
        let Some(message) = self.link.take()? else {
            return Ok(Heard::Nothing);
        };
        let ran = match message {
            ToHost::Output(bytes) => {
                let bytes = bytes.to_vec();
                self.put(&io::stdout(), &bytes)?
            }
            ToHost::Errors(bytes) => {
                let bytes = bytes.to_vec();
                self.put(&io::stderr(), &bytes)?
            }
            ToHost::Taken(bytes) => {
                let taken = usize::try_from(bytes).unwrap_or(usize::MAX);
                self.credit = self.credit.saturating_add(taken).min(WINDOW_BYTES);
                None
            }
            ToHost::Exited(Exit::Code(code)) => Some(Ran::Ended(code)),
            ToHost::Exited(Exit::Signal(number)) => Some(Ran::Ended(number.saturating_add(128))),
            ToHost::Failed(status, why) => {
                match self.terms.format {
                    Format::Text => note(format_args!("the guest's agent: {why}")),
                    Format::Json => note_json(&serde_json::json!({ "error": why, "causes": [] })),
                }
                Some(Ran::Ended(status))
            }
            ToHost::Hello(_) | ToHost::Started | ToHost::Data(_) | ToHost::End => None,
        };
        Ok(ran.map_or(Heard::More, Heard::Last))
    }

    /// Writes what the command has written, and hears signals while nobody reads it.
    fn put(&mut self, to: &impl AsFd, bytes: &[u8]) -> Result<Option<Ran>, ExecError> {
        let mut left = bytes;
        let mut moved = Instant::now();
        while !left.is_empty() {
            let mut watched = [
                PollFd::new(to, PollFlags::OUT),
                PollFd::new(self.signals, PollFlags::IN),
            ];
            // The agent hears nothing while it waits for us to take more.
            let stuck = self
                .asked
                .map(|(_, at)| Deadline::after(UNREAD.saturating_sub(moved.max(at).elapsed())));
            let deadlines = [stuck, self.deadline()].into_iter().flatten();
            wait_ready(&mut watched, deadlines.min())?;
            if let Some(signal) = self.signals.take()
                && let Some(ran) = self.pass_on(signal)
            {
                return Ok(Some(ran));
            }
            if let Some(ran) = self.look_at_clock() {
                return Ok(Some(ran));
            }
            self.send_some()?;
            if watched.first().is_none_or(|to| to.revents().is_empty()) {
                match (self.asked, stuck) {
                    (Some((signal, _)), Some(stuck)) if stuck.passed() => {
                        return Ok(Some(Ran::GivenUp(status_of(signal))));
                    }
                    _ => continue,
                }
            }
            // A pipe that is ready takes so much without waiting.
            let (piece, _) = left.split_at(left.len().min(PIPE_BYTES));
            match rustix::io::write(to, piece) {
                Ok(written) => {
                    left = left.get(written..).unwrap_or_default();
                    moved = Instant::now();
                }
                Err(Errno::INTR | Errno::AGAIN) => {}
                // Nobody reads it any more: as if the command had written there itself.
                Err(Errno::PIPE) => return Ok(Some(Ran::GivenUp(status_of(libc::SIGPIPE)))),
                Err(errno) => return Err(ExecError::Write(errno.into())),
            }
        }
        Ok(None)
    }

    /// The first signal is the command's, and the next one ours.
    fn pass_on(&mut self, signal: i32) -> Option<Ran> {
        if self.asked.replace((signal, Instant::now())).is_some() {
            return Some(Ran::GivenUp(status_of(signal)));
        }
        ToGuest::Signal(u8::try_from(signal).unwrap_or_default()).encode(&mut self.outgoing);
        None
    }

    /// When the clock is to be looked at.
    fn deadline(&self) -> Option<Deadline> {
        match (self.asked, self.terms.patience) {
            (None, _) => self.terms.until,
            (Some((_, at)), Some(patience)) => Some(Deadline::after(patience.saturating_sub(at.elapsed()))),
            (Some(_), None) => None,
        }
    }

    /// Tells the command to end when its time is over, and gives it up when it has not for too long.
    fn look_at_clock(&mut self) -> Option<Ran> {
        match self.asked {
            Some((signal, at))
                if self
                    .terms
                    .patience
                    .is_some_and(|patience| at.elapsed() >= patience) =>
            {
                Some(Ran::GivenUp(status_of(signal)))
            }
            None if self.terms.until.is_some_and(Deadline::passed) => {
                self.is_late = true;
                self.pass_on(libc::SIGTERM)
            }
            _ => None,
        }
    }

    /// Whether something comes, and whether there is something to read.
    fn wait(&self) -> io::Result<(bool, bool)> {
        let stdin = io::stdin();
        let mut events = PollFlags::IN;
        events.set(PollFlags::OUT, !self.outgoing.is_empty());
        let mut watched = vec![
            PollFd::new(&self.link, events),
            PollFd::new(self.signals, PollFlags::IN),
        ];
        if self.reads && self.credit > 0 && self.outgoing.is_empty() {
            watched.push(PollFd::from_borrowed_fd(stdin.as_fd(), PollFlags::IN));
        }
        let look = self.size.map(|_| Deadline::after(LOOK));
        let deadlines = [look, self.deadline()].into_iter().flatten();
        wait_ready(&mut watched, deadlines.min())?;
        let found = |place: usize, but: PollFlags| {
            let watched = watched.get(place);
            watched.is_some_and(|watched| watched.revents().intersects(!but))
        };
        Ok((found(0, PollFlags::OUT), found(2, PollFlags::empty())))
    }

    /// Reads standard input, as much as the agent takes.
    fn read(&mut self) -> Result<(), ExecError> {
        let mut bytes = [0; DATA_BYTES];
        let room = self.credit.min(bytes.len());
        let read = rustix::io::read(io::stdin(), bytes.get_mut(..room).unwrap_or_default());
        let read = match read {
            Err(Errno::INTR | Errno::AGAIN) => return Ok(()),
            // Whatever has become of it, no more will come.
            Ok(0) | Err(_) => {
                self.reads = false;
                ToGuest::End.encode(&mut self.outgoing);
                return Ok(());
            }
            Ok(read) => read,
        };
        self.credit -= read;
        ToGuest::Data(bytes.get(..read).unwrap_or_default()).encode(&mut self.outgoing);
        Ok(())
    }
}
