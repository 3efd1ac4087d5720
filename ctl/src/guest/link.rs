//! A connection to the agent of a guest: through the Unix socket of its vsock device, by Firecracker's convention.

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use clap::Args;
use coracle_agent::wire::{self, Decoder, Encode, PORT, ToGuest, ToHost, VERSION, WireError};
use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType};
use thiserror::Error;

use crate::client::{Client, ClientError, REQUEST_WAIT, Request};
use crate::deadline::{Deadline, wait_ready};
use crate::discovery::{FindError, path_of, resolve};
use crate::signals::{Signals, SignalsError};

/// How long a monitor and an agent may take for their greetings.
const GREETING_WAIT: Duration = Duration::from_secs(10);
/// Between two attempts to reach an agent that is waited for.
const ATTEMPT_PAUSE: Duration = Duration::from_millis(20);
/// Between two looks for a machine that is not there yet.
const LOOK_PAUSE: Duration = Duration::from_millis(100);
/// `OK`, a space, ten digits and the end of the line.
const LINE_BYTES_MAX: usize = 14;

/// Where the agent listens, and whether it is waited for.
#[derive(Debug, Args)]
pub(crate) struct LinkArgs {
    /// The vsock port on which the agent listens
    #[arg(long, value_name = "N", default_value_t = PORT)]
    port: u32,
    /// How long to wait for a machine that is not there yet, and for its agent
    #[arg(long, value_name = "SECONDS", default_value_t = 0, value_parser = clap::value_parser!(u64).range(..=86400))]
    wait: u64,
}

/// Why the agent is not reached, or not any more.
#[derive(Debug, Error)]
pub(crate) enum LinkError {
    #[error(transparent)]
    Find(#[from] FindError),
    #[error(transparent)]
    Client(#[from] ClientError),
    #[error(transparent)]
    Signals(#[from] SignalsError),
    #[error(
        "the machine has no vsock device, by which its agent is reached: start it with `coraclectl run --vsock PATH`, or with \
         PUT /vsock before its start"
    )]
    NoVsock,
    #[error("cannot connect to the vsock device at {}: is the machine running, and may this user use it?", path.display())]
    Connect {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "nobody listens on vsock port {port} of the guest: coracle-agent has to be running there; --wait SECONDS waits for it"
    )]
    NoAgent { port: u32 },
    #[error("the machine has not been started; --wait SECONDS waits for it")]
    NotStarted,
    #[error(
        "nobody answers on vsock port {port} of the guest: coracle-agent has to be running there, and its guest not to be too \
         busy for it; --wait SECONDS waits longer"
    )]
    Slow { port: u32 },
    #[error("the guest's agent has not answered in time")]
    Late,
    #[error("{0} is paused, and nothing in its guest answers: coraclectl resume {0}")]
    Paused(String),
    #[error("what listens on vsock port {port} of the guest is not coracle-agent")]
    Stranger { port: u32 },
    #[error(
        "the guest's agent speaks version {0}, and this coraclectl version {VERSION}: use both of one release"
    )]
    Version(u32),
    #[error("the guest has closed the connection: it has ended, or its agent was")]
    Closed,
    #[error("cannot talk to the guest's agent")]
    Io(#[from] io::Error),
    #[error("the guest's agent says what makes no sense")]
    Wire(#[from] WireError),
    #[error("it was interrupted by a signal")]
    Interrupted(i32),
}

impl LinkError {
    /// Whether it may be so only because the machine has just been started.
    fn may_pass(&self) -> bool {
        let is_absent = |error: &io::Error| {
            matches!(
                error.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused
            )
        };
        if let Self::Connect { source, .. } = self {
            return is_absent(source);
        }
        matches!(
            self,
            Self::NoAgent { .. }
                | Self::Slow { .. }
                | Self::NotStarted
                | Self::Paused(_)
                | Self::Find(FindError::Unknown(_))
                | Self::Client(ClientError::NoSocket { .. } | ClientError::NobodyListens { .. })
        )
    }
}

/// A connection on which the agent has said that it is one.
#[derive(Debug)]
pub(crate) struct Link {
    stream: UnixStream,
    decoder: Decoder,
    /// When nothing is waited for any more.
    until: Option<Deadline>,
}

impl Link {
    /// Reaches the agent of the machine `vm`, a name or the path of an API socket.
    ///
    /// # Errors
    ///
    /// When there is no such machine, no device or no agent, or a signal comes first.
    pub(crate) fn open(vm: &str, args: &LinkArgs, signals: &Signals) -> Result<Self, LinkError> {
        let wait = Duration::from_secs(args.wait);
        let deadline = Deadline::after(wait);
        loop {
            let error = match Self::attempt(vm, args.port, signals) {
                Ok(link) => return Ok(link),
                Err(error) => error,
            };
            if let Some(signal) = signals.take() {
                return Err(LinkError::Interrupted(signal));
            }
            if !error.may_pass() || deadline.passed() {
                return Err(error);
            }
            // Who looks for a machine looks at all of them.
            thread::sleep(match error {
                LinkError::Find(_) => LOOK_PAUSE,
                _ => ATTEMPT_PAUSE,
            });
        }
    }

    fn attempt(vm: &str, port: u32, signals: &Signals) -> Result<Self, LinkError> {
        let socket = resolve(vm)?;
        let client = Client::new(&socket).interrupted_by(signals.as_fd());
        if has_state(&client, "Not started")? {
            return Err(LinkError::NotStarted);
        }
        let path = socket_of(&client)?;
        match Self::reach(&path, port, None, signals) {
            // A machine that is paused for a moment, as for a snapshot, has answered by then.
            Err(LinkError::Slow { .. }) if has_state(&client, "Paused")? => {
                Err(LinkError::Paused(vm.to_owned()))
            }
            reached => reached,
        }
    }

    /// Reaches the agent at `port` by the socket of its machine's vsock device.
    ///
    /// # Errors
    ///
    /// When there is none, or a signal comes first, or `limit`.
    pub(crate) fn reach(
        path: &Path,
        port: u32,
        limit: Option<Deadline>,
        signals: &Signals,
    ) -> Result<Self, LinkError> {
        let greeting = Deadline::after(GREETING_WAIT);
        let deadline = limit.map_or(greeting, |limit| limit.min(greeting));
        let stream = connect(path, port, deadline, signals)?;
        let mut link = Self {
            stream,
            decoder: Decoder::default(),
            until: None,
        };
        link.stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
        let mut line = Vec::new();
        while line.last() != Some(&b'\n') {
            link.await_bytes(signals, deadline, port)?;
            let mut byte = [0];
            match (&link.stream).read(&mut byte) {
                Ok(1) => line.extend(byte),
                // The monitor closes a connection that the guest refuses.
                Ok(_) => return Err(LinkError::NoAgent { port }),
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => {
                    return Err(LinkError::NoAgent { port });
                }
                Err(error) => return Err(error.into()),
            }
            if line.len() > LINE_BYTES_MAX {
                return Err(LinkError::Stranger { port });
            }
        }
        if !line.starts_with(b"OK ") {
            return Err(LinkError::Stranger { port });
        }
        loop {
            if let Some(frame) = link.decoder.take().map_err(|_| LinkError::Stranger { port })? {
                return match ToHost::decode(&frame) {
                    Ok(ToHost::Hello(VERSION)) => Ok(link),
                    Ok(ToHost::Hello(other)) => Err(LinkError::Version(other)),
                    _ => Err(LinkError::Stranger { port }),
                };
            }
            link.await_bytes(signals, deadline, port)?;
            if link.decoder.fill(&mut &link.stream)? == 0 {
                return Err(LinkError::NoAgent { port });
            }
        }
    }

    /// Waits until something has come, until `deadline`.
    fn await_bytes(&self, signals: &Signals, deadline: Deadline, port: u32) -> Result<(), LinkError> {
        match self.is_ready(PollFlags::IN, Some(deadline), signals)? {
            true => Ok(()),
            false => Err(LinkError::Slow { port }),
        }
    }

    /// Waits until the connection is ready for `events`; false when the deadline came first.
    fn is_ready(
        &self,
        events: PollFlags,
        deadline: Option<Deadline>,
        signals: &Signals,
    ) -> Result<bool, LinkError> {
        let mut watched = [
            PollFd::new(&self.stream, events),
            PollFd::new(signals, PollFlags::IN),
        ];
        let limits = [deadline, self.until].into_iter().flatten();
        if !wait_ready(&mut watched, limits.min())? {
            return match self.until.is_some_and(Deadline::passed) {
                true => Err(LinkError::Late),
                false => Ok(false),
            };
        }
        match signals.take() {
            Some(signal) => Err(LinkError::Interrupted(signal)),
            None => Ok(true),
        }
    }

    /// The same connection, for which nothing is waited for after `until`.
    pub(crate) fn limited(mut self, until: Option<Deadline>) -> Self {
        self.until = until;
        self
    }

    /// Sends a message, and waits until it is on its way.
    ///
    /// # Errors
    ///
    /// When the guest is gone, or a signal comes first.
    pub(crate) fn send(&self, message: &ToGuest<'_>, signals: &Signals) -> Result<(), LinkError> {
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        loop {
            self.send_some(&mut bytes)?;
            if bytes.is_empty() {
                return Ok(());
            }
            self.is_ready(PollFlags::OUT, None, signals)?;
        }
    }

    /// Sends what waits in `bytes`, as much as there is room for.
    ///
    /// # Errors
    ///
    /// When the guest is gone.
    pub(crate) fn send_some(&self, bytes: &mut Vec<u8>) -> Result<(), LinkError> {
        let mut sent = 0;
        let outcome = loop {
            let left = bytes.get(sent..).unwrap_or_default();
            if left.is_empty() {
                break Ok(());
            }
            match rustix::net::send(&self.stream, left, SendFlags::DONTWAIT | SendFlags::NOSIGNAL) {
                Ok(more) => sent += more,
                Err(Errno::AGAIN) => break Ok(()),
                Err(Errno::INTR) => {}
                Err(errno) => break Err(gone(errno.into())),
            }
        };
        bytes.drain(..sent);
        outcome
    }

    /// Reads once what has come; the connection is to be readable.
    ///
    /// # Errors
    ///
    /// When there is nothing more to come.
    pub(crate) fn fill(&mut self) -> Result<(), LinkError> {
        match self.decoder.fill(&mut &self.stream) {
            Ok(0) => Err(LinkError::Closed),
            Ok(_) => Ok(()),
            Err(error) => Err(gone(error)),
        }
    }

    /// The next message that has come whole.
    ///
    /// # Errors
    ///
    /// When it is none.
    pub(crate) fn take(&mut self) -> Result<Option<ToHost<'_>>, LinkError> {
        let frame = self.decoder.take()?;
        Ok(frame.map(|frame| ToHost::decode(&frame)).transpose()?)
    }

    /// Asks for something that is either done or not, and waits until it is.
    ///
    /// # Errors
    ///
    /// When the connection or a signal ends that.
    pub(crate) fn settle(&mut self, request: wire::Request, signals: &Signals) -> Result<Done, LinkError> {
        self.send(&ToGuest::Request(request), signals)?;
        loop {
            match self.take()? {
                Some(ToHost::End) => return Ok(Done::Yes),
                Some(ToHost::Failed(_, why)) => return Ok(Done::No(why.to_owned())),
                Some(_) => {}
                None => self.listen(signals)?,
            }
        }
    }

    /// Waits for more, or a signal.
    ///
    /// # Errors
    ///
    /// When a signal or the end of the connection has come.
    pub(crate) fn listen(&mut self, signals: &Signals) -> Result<(), LinkError> {
        self.is_ready(PollFlags::IN, None, signals)?;
        self.fill()
    }

    /// Whether something has come that was not read.
    ///
    /// # Errors
    ///
    /// What `poll` reports.
    pub(crate) fn has_more(&self) -> io::Result<bool> {
        let now = Deadline::after(Duration::ZERO);
        wait_ready(&mut [PollFd::new(&self.stream, PollFlags::IN)], Some(now))
    }
}

/// What has become of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Done {
    /// It is done.
    Yes,
    /// It is not, for that reason.
    No(String),
}

impl AsFd for Link {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

fn gone(error: io::Error) -> LinkError {
    match error.kind() {
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset => LinkError::Closed,
        _ => LinkError::Io(error),
    }
}

/// Connects to the socket of a vsock device, which may have as many callers as it takes until `deadline`.
fn connect(path: &Path, port: u32, deadline: Deadline, signals: &Signals) -> Result<UnixStream, LinkError> {
    let refused = |source| LinkError::Connect {
        path: path.to_owned(),
        source,
    };
    let address = SocketAddrUnix::new(path).map_err(|errno| refused(errno.into()))?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None);
    let socket = socket.map_err(|errno| refused(errno.into()))?;
    loop {
        match rustix::net::connect(&socket, &address) {
            Ok(()) => break,
            Err(Errno::AGAIN) if deadline.passed() => return Err(LinkError::Slow { port }),
            Err(Errno::AGAIN) => thread::sleep(ATTEMPT_PAUSE),
            Err(errno) => return Err(refused(errno.into())),
        }
        if let Some(signal) = signals.take() {
            return Err(LinkError::Interrupted(signal));
        }
    }
    let stream = UnixStream::from(socket);
    stream.set_nonblocking(false).map_err(refused)?;
    Ok(stream)
}

/// Whether the machine says that it is in this state.
fn has_state(client: &Client<'_>, state: &str) -> Result<bool, ClientError> {
    let info = client.read(Request::get("/"))?;
    Ok(info.get("state").and_then(serde_json::Value::as_str) == Some(state))
}

/// The socket of the machine's vsock device, as this process reaches it.
fn socket_of(client: &Client<'_>) -> Result<PathBuf, LinkError> {
    let config = client.read(Request::get("/vm/config"))?;
    let path = config
        .pointer("/vsock/uds_path")
        .and_then(serde_json::Value::as_str);
    let path = Path::new(path.ok_or(LinkError::NoVsock)?);
    let process = client.peer(REQUEST_WAIT)?.as_raw_nonzero();
    Ok(path_of(Path::new(&format!("/proc/{process}")), path))
}
