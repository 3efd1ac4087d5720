//! The client of a monitor's API: one request per connection on its Unix socket, every wait bounded.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::Pid;
use serde_json::Value;
use thiserror::Error;

use crate::deadline::{Deadline, wait_ready};
use crate::http::{self, BODY_BYTES_MAX, Body, Head, HeadError};

/// How long a request may take that only reads or writes configuration.
pub(crate) const REQUEST_WAIT: Duration = Duration::from_secs(10);
/// How long a request may take that drains disks, or allocates and loads a machine.
pub(crate) const LONG_REQUEST_WAIT: Duration = Duration::from_secs(60);
/// How often a connection is tried again while the monitor's backlog is full.
const BACKLOG_PAUSE: Duration = Duration::from_millis(5);
const READ_BYTES: usize = 16 * 1024;

/// Why a request got no answer, or one that says no.
#[derive(Debug, Error)]
pub(crate) enum ClientError {
    #[error("no monitor has the socket {}: see `coraclectl ps` for those that run", socket.display())]
    NoSocket {
        socket: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("nobody listens on {}: its monitor has ended; the file can be removed", socket.display())]
    NobodyListens {
        socket: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("cannot connect to {}: check that this user may use the socket", socket.display())]
    Connect {
        socket: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{request}: cannot talk to the monitor at {}", socket.display())]
    Io {
        request: String,
        socket: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error(
        "{request}: the monitor at {} did not answer within {} s: \
         try again, read its log, or end it with `coraclectl stop --force`",
        socket.display(), wait.as_secs_f32()
    )]
    TimedOut {
        request: String,
        socket: PathBuf,
        wait: Duration,
    },
    #[error("{request}: the monitor at {} closed the connection instead of answering: read its log", socket.display())]
    Closed { request: String, socket: PathBuf },
    #[error("{request}: what listens on {} is not a monitor's API", socket.display())]
    NotAnApi {
        request: String,
        socket: PathBuf,
        #[source]
        source: HeadError,
    },
    #[error("{request}: the answer of {} is longer than {BODY_BYTES_MAX} bytes", socket.display())]
    BodyTooLong { request: String, socket: PathBuf },
    #[error("{request}: the answer is not the JSON that was expected")]
    NotJson {
        request: String,
        #[source]
        source: serde_json::Error,
    },
    #[error("{request} was refused with status {status}: {fault}")]
    Refused {
        request: String,
        status: u16,
        fault: String,
    },
    #[error("{request} was interrupted by a signal")]
    Interrupted { request: String },
}

/// One request to the API.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Request<'a> {
    /// The method, in capitals.
    pub(crate) method: &'a str,
    /// The path, from its slash.
    pub(crate) path: &'a str,
    /// The JSON body, if there is one.
    pub(crate) body: Option<&'a str>,
    /// How long connecting and the answer may take together.
    pub(crate) wait: Duration,
}

impl<'a> Request<'a> {
    /// A request that reads `path`.
    pub(crate) fn get(path: &'a str) -> Self {
        Self {
            method: "GET",
            path,
            body: None,
            wait: REQUEST_WAIT,
        }
    }

    /// The same request with another limit on its time.
    pub(crate) fn within(self, wait: Duration) -> Self {
        Self { wait, ..self }
    }

    fn name(&self) -> String {
        format!("{} {}", self.method, self.path)
    }

    fn text(&self) -> String {
        let body = self.body.unwrap_or_default();
        let content = match self.body {
            Some(body) => format!(
                "Content-Type: application/json\r\nContent-Length: {}\r\n",
                body.len()
            ),
            None => String::new(),
        };
        let Self { method, path, .. } = self;
        format!(
            "{method} {path} HTTP/1.1\r\nHost: localhost\r\nAccept: application/json\r\n{content}\r\n{body}"
        )
    }
}

/// An answer, whatever its status.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Response {
    /// The HTTP status.
    pub(crate) status: u16,
    /// The body as it came, [`BODY_BYTES_MAX`] at most.
    pub(crate) body: Vec<u8>,
}

impl Response {
    /// Whether the status says that the request was refused or failed.
    pub(crate) fn is_refusal(&self) -> bool {
        self.status >= 400
    }

    /// The `fault_message` of a refusal, or the body where it has none.
    pub(crate) fn fault(&self) -> String {
        let message = serde_json::from_slice::<Value>(&self.body)
            .ok()
            .and_then(|body| body.get("fault_message")?.as_str().map(str::to_owned));
        message.unwrap_or_else(|| match String::from_utf8_lossy(&self.body).trim() {
            "" => "no reason given".to_owned(),
            body => body.to_owned(),
        })
    }
}

/// A monitor's API, by its socket.
#[derive(Clone, Debug)]
pub(crate) struct Client<'a> {
    socket: PathBuf,
    interrupt: Option<BorrowedFd<'a>>,
}

impl<'a> Client<'a> {
    /// The API behind `socket`; connects only when something is asked.
    pub(crate) fn new(socket: &Path) -> Self {
        Self {
            socket: socket.to_owned(),
            interrupt: None,
        }
    }

    /// The same API, with waits that end early once `interrupt` is readable.
    pub(crate) fn interrupted_by(self, interrupt: BorrowedFd<'a>) -> Self {
        Self {
            interrupt: Some(interrupt),
            ..self
        }
    }

    /// The socket.
    pub(crate) fn socket(&self) -> &Path {
        &self.socket
    }

    /// The process that listens on the socket.
    ///
    /// # Errors
    ///
    /// When nobody does, or this user may not ask.
    pub(crate) fn peer(&self, wait: Duration) -> Result<Pid, ClientError> {
        let request = Request {
            method: "connect",
            path: "",
            body: None,
            wait,
        };
        let exchange = Exchange::open(self, request)?;
        let peer = rustix::net::sockopt::socket_peercred(&exchange.stream);
        Ok(peer.map_err(|errno| exchange.io(errno))?.pid)
    }

    /// Sends `request` and returns the answer, a refusal too.
    ///
    /// # Errors
    ///
    /// When there is no answer in time, or one that is not HTTP within the limits.
    pub(crate) fn ask(&self, request: Request<'_>) -> Result<Response, ClientError> {
        let mut exchange = Exchange::open(self, request)?;
        exchange.send(request.text().as_bytes())?;
        exchange.receive()
    }

    /// Sends `request` and returns the answer's body; a refusal is an error.
    ///
    /// # Errors
    ///
    /// As [`Client::ask`], and for a refusal.
    pub(crate) fn call(&self, request: Request<'_>) -> Result<Vec<u8>, ClientError> {
        let response = self.ask(request)?;
        if response.is_refusal() {
            let (status, fault) = (response.status, response.fault());
            return Err(ClientError::Refused {
                request: request.name(),
                status,
                fault,
            });
        }
        Ok(response.body)
    }

    /// Sends `request` and returns the answer's body as JSON.
    ///
    /// # Errors
    ///
    /// As [`Client::call`], and when the body is not JSON.
    pub(crate) fn read(&self, request: Request<'_>) -> Result<Value, ClientError> {
        let body = self.call(request)?;
        serde_json::from_slice(&body).map_err(|source| ClientError::NotJson {
            request: request.name(),
            source,
        })
    }

    /// Sends `body` by `method` to `path`.
    ///
    /// # Errors
    ///
    /// As [`Client::call`].
    pub(crate) fn send(&self, method: &str, path: &str, body: &Value) -> Result<(), ClientError> {
        let body = body.to_string();
        let request = Request {
            method,
            path,
            body: Some(&body),
            wait: LONG_REQUEST_WAIT,
        };
        self.call(request).map(drop)
    }
}

/// One connection, and the one request that it serves.
struct Exchange<'a> {
    client: &'a Client<'a>,
    request: Request<'a>,
    deadline: Deadline,
    stream: OwnedFd,
}

impl<'a> Exchange<'a> {
    fn open(client: &'a Client<'a>, request: Request<'a>) -> Result<Self, ClientError> {
        let deadline = Deadline::after(request.wait);
        let refused = |errno: Errno| connect_error(&client.socket, errno);
        let address = SocketAddrUnix::new(&client.socket).map_err(refused)?;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let stream = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)
            .map_err(refused)?;
        let exchange = Self {
            client,
            request,
            deadline,
            stream,
        };
        loop {
            match rustix::net::connect(&exchange.stream, &address) {
                Ok(()) => return Ok(exchange),
                Err(Errno::INTR) => {}
                // The backlog is full; no event tells when it no longer is.
                Err(Errno::AGAIN) if !deadline.passed() => thread::sleep(BACKLOG_PAUSE),
                Err(Errno::AGAIN) => return Err(exchange.timed_out()),
                Err(errno) => return Err(refused(errno)),
            }
        }
    }

    /// Sends all of `bytes`, or as many as the server takes: one that refuses a body early answers and
    /// closes, and its answer is worth more than the broken pipe.
    fn send(&self, mut bytes: &[u8]) -> Result<(), ClientError> {
        while !bytes.is_empty() {
            match rustix::io::write(&self.stream, bytes) {
                Ok(sent) => bytes = bytes.split_at(sent).1,
                Err(Errno::AGAIN) => self.wait(PollFlags::OUT)?,
                Err(Errno::INTR) => {}
                Err(Errno::PIPE | Errno::CONNRESET) => return Ok(()),
                Err(errno) => return Err(self.io(errno)),
            }
        }
        Ok(())
    }

    fn receive(&mut self) -> Result<Response, ClientError> {
        let mut bytes = Vec::new();
        let head = self.receive_head(&mut bytes)?;
        let mut body = bytes.split_off(head.head_bytes);
        match head.body {
            Body::Bytes(length) => {
                while body.len() < length {
                    if self.read_some(&mut body)? == 0 {
                        return Err(self.closed());
                    }
                }
                body.truncate(length);
            }
            Body::UntilClose => {
                while self.read_some(&mut body)? > 0 {
                    if body.len() > BODY_BYTES_MAX {
                        let (request, socket) = self.names();
                        return Err(ClientError::BodyTooLong { request, socket });
                    }
                }
            }
        }
        Ok(Response {
            status: head.status,
            body,
        })
    }

    fn receive_head(&self, bytes: &mut Vec<u8>) -> Result<Head, ClientError> {
        loop {
            if self.read_some(bytes)? == 0 {
                return Err(self.closed());
            }
            let parsed = http::parse_head(bytes).map_err(|source| {
                let (request, socket) = self.names();
                ClientError::NotAnApi {
                    request,
                    socket,
                    source,
                }
            })?;
            if let Some(head) = parsed {
                return Ok(head);
            }
        }
    }

    /// Appends what has arrived, waiting for it; 0 at the end of the stream.
    fn read_some(&self, bytes: &mut Vec<u8>) -> Result<usize, ClientError> {
        let mut chunk = [0; READ_BYTES];
        loop {
            match rustix::io::read(&self.stream, &mut chunk) {
                Ok(count) => {
                    bytes.extend(chunk.iter().take(count));
                    return Ok(count);
                }
                Err(Errno::AGAIN) => self.wait(PollFlags::IN)?,
                Err(Errno::INTR) => {}
                Err(Errno::CONNRESET) => return Ok(0),
                Err(errno) => return Err(self.io(errno)),
            }
        }
    }

    fn wait(&self, ready: PollFlags) -> Result<(), ClientError> {
        let stream = PollFd::new(&self.stream, ready);
        let io_error = |source| {
            let (request, socket) = self.names();
            ClientError::Io {
                request,
                socket,
                source,
            }
        };
        let Some(interrupt) = self.client.interrupt else {
            let in_time = wait_ready(&mut [stream], Some(self.deadline)).map_err(io_error)?;
            return if in_time { Ok(()) } else { Err(self.timed_out()) };
        };
        let mut both = [stream, PollFd::from_borrowed_fd(interrupt.as_fd(), PollFlags::IN)];
        if !wait_ready(&mut both, Some(self.deadline)).map_err(io_error)? {
            return Err(self.timed_out());
        }
        let [stream, _] = both;
        // An answer that is there counts, whatever else has happened.
        if stream.revents().is_empty() {
            return Err(ClientError::Interrupted {
                request: self.request.name(),
            });
        }
        Ok(())
    }

    fn names(&self) -> (String, PathBuf) {
        (self.request.name(), self.client.socket.clone())
    }

    fn timed_out(&self) -> ClientError {
        let (request, socket) = self.names();
        ClientError::TimedOut {
            request,
            socket,
            wait: self.request.wait,
        }
    }

    fn closed(&self) -> ClientError {
        let (request, socket) = self.names();
        ClientError::Closed { request, socket }
    }

    fn io(&self, errno: Errno) -> ClientError {
        let (request, socket) = self.names();
        ClientError::Io {
            request,
            socket,
            source: errno.into(),
        }
    }
}

fn connect_error(socket: &Path, errno: Errno) -> ClientError {
    let (socket, source) = (socket.to_owned(), errno.into());
    match errno {
        Errno::NOENT | Errno::NOTDIR => ClientError::NoSocket { socket, source },
        Errno::CONNREFUSED => ClientError::NobodyListens { socket, source },
        _ => ClientError::Connect { socket, source },
    }
}

#[cfg(test)]
#[path = "client_tests.rs"]
mod tests;
