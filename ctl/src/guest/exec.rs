//! `coraclectl exec`: a command in a guest, with its input, its outputs and its status.

use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::time::Duration;

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
use crate::signals::Signals;
use crate::terminal::{RawTerminal, TerminalError};

/// How often it is looked whether the terminal has another size.
const LOOK: Duration = Duration::from_millis(250);

/// Run a command in a guest: its standard input, output and error are ours, and its status too
///
/// The guest has to run coracle-agent, and the machine to have a vsock device (`coraclectl run --vsock PATH`). SIGINT, SIGTERM,
/// SIGHUP and SIGQUIT go to the command; a second one ends coraclectl, and the command with it. What the command has left running
/// in the background stays when it has ended.
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
    let link = Link::open(&args.vm, &args.link, &signals)?;
    converse(link, &signals, request, args.surroundings.no_stdin, format)
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

/// Has the agent run a command, and stays between it and our own standard input, output and error until it has ended; returns its
/// status.
///
/// # Errors
///
/// When the guest's agent is lost.
pub(crate) fn converse(
    mut link: Link,
    signals: &Signals,
    request: Exec,
    is_deaf: bool,
    format: Format,
) -> Result<u8, ExecError> {
    let size = request.terminal;
    link.send(&ToGuest::Request(wire::Request::Exec(request)))?;
    // Only now: until then Ctrl-C is for this program.
    let _raw = size.map(|_| RawTerminal::enter()).transpose()?;
    let mut pump = Pump {
        link,
        signals,
        credit: WINDOW_BYTES,
        outgoing: Vec::new(),
        reads: !is_deaf && Input::of_this_process() != Input::Nothing,
        size,
        asked: None,
    };
    if !pump.reads {
        ToGuest::End.encode(&mut pump.outgoing);
    }
    pump.run(format)
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
    /// The signal that the command was sent.
    asked: Option<i32>,
}

impl Pump<'_> {
    fn run(&mut self, format: Format) -> Result<u8, ExecError> {
        loop {
            while let Some(status) = self.hear(format)? {
                if let Some(status) = status {
                    return Ok(status);
                }
            }
            self.link.send_some(&mut self.outgoing)?;
            let (comes, typed) = self.wait()?;
            if let Some(signal) = self.signals.take() {
                if self.asked.is_some() {
                    return Ok(u8::try_from(128 + signal).unwrap_or(u8::MAX));
                }
                self.asked = Some(signal);
                ToGuest::Signal(u8::try_from(signal).unwrap_or_default()).encode(&mut self.outgoing);
            }
            if comes {
                self.link.fill()?;
            }
            if typed {
                self.read()?;
            }
            let now = size();
            if self.size.is_some_and(|before| before != now) {
                self.size = Some(now);
                ToGuest::Resize(now).encode(&mut self.outgoing);
            }
        }
    }

    /// Does what the next message says: nothing if none has come, the status if it was the last.
    fn hear(&mut self, format: Format) -> Result<Option<Option<u8>>, ExecError> {
        let Some(message) = self.link.take()? else {
            return Ok(None);
        };
        let written = match message {
            ToHost::Output(bytes) => {
                let mut to = io::stdout().lock();
                to.write_all(bytes).and_then(|()| to.flush())
            }
            ToHost::Errors(bytes) => io::stderr().lock().write_all(bytes),
            ToHost::Taken(bytes) => {
                let taken = usize::try_from(bytes).unwrap_or(usize::MAX);
                self.credit = self.credit.saturating_add(taken).min(WINDOW_BYTES);
                Ok(())
            }
            ToHost::Exited(Exit::Code(code)) => return Ok(Some(Some(code))),
            ToHost::Exited(Exit::Signal(number)) => return Ok(Some(Some(number.saturating_add(128)))),
            ToHost::Failed(status, why) => {
                match format {
                    Format::Text => note(format_args!("the guest's agent: {why}")),
                    Format::Json => note_json(&serde_json::json!({ "error": why, "causes": [] })),
                }
                return Ok(Some(Some(status)));
            }
            ToHost::Hello(_) | ToHost::Started | ToHost::Data(_) | ToHost::End => Ok(()),
        };
        match written {
            // Nobody reads it any more: as if the command had written there itself.
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => {
                Ok(Some(Some(u8::try_from(128 + libc::SIGPIPE).unwrap_or(u8::MAX))))
            }
            Err(error) => Err(ExecError::Write(error)),
            Ok(()) => Ok(Some(None)),
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
        wait_ready(&mut watched, self.size.map(|_| Deadline::after(LOOK)))?;
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
