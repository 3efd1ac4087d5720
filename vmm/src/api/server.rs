//! The thread `api`: serves every client of the socket without ever waiting for one of them.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::bell::Bell;
use super::connection::{Connection, Interest, Progress};
use super::http::{BODY_BYTES_MAX_DEFAULT, Content, Decoder, Request, Response, Status};
use super::inbox::{Answers, Call, Inbox};
use super::router::route;
pub use super::socket::{BindError, Socket};
use super::verbs::{Answer, Data, Fault, Verb};
use crate::metrics::RequestCounters;
use coracle_storage::threads::{self, Thread};
use rustix::event::epoll::{self, CreateFlags, EventData, EventFlags};
use rustix::time::Timespec;

/// How much a client, and all of them together, may have.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Longest body of a request.
    pub body_bytes_max: usize,
    /// Most clients at once. One more takes the place of the one that is idle longest.
    pub connections_max: usize,
    /// Longest time from the first byte of a request to the last, and for taking an answer.
    pub request_ms_max: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            body_bytes_max: BODY_BYTES_MAX_DEFAULT,
            connections_max: 32,
            request_ms_max: 5_000,
        }
    }
}

/// The running thread. Dropped, it ends the thread, after the answers that are there are written as
/// far as clients take them at once.
#[derive(Debug)]
pub struct Server {
    stop: Bell,
    thread: Option<Thread<()>>,
    counters: Arc<RequestCounters>,
}

impl Server {
    /// Starts to serve `socket`; verbs go to `inbox`.
    ///
    /// # Errors
    ///
    /// The kernel has no descriptor or thread left.
    pub fn start(socket: Socket, limits: Limits, inbox: Inbox) -> io::Result<Self> {
        let stop = Bell::new()?;
        let counters = Arc::<RequestCounters>::default();
        let mut serving = Serving {
            epoll: epoll::create(CreateFlags::CLOEXEC)?,
            stop: stop.try_clone()?,
            answers: Answers::new()?,
            connections: BTreeMap::new(),
            next_token: TOKEN_FIRST,
            accept_again: None,
            socket,
            limits,
            inbox,
            counters: Arc::clone(&counters),
        };
        serving.watch_sources()?;
        let thread = threads::spawn(threads::Kind::Api, "api", move || serving.run())?;
        Ok(Self {
            stop,
            thread: Some(thread),
            counters,
        })
    }

    /// What is counted of the requests, for the metrics.
    pub fn request_counters(&self) -> &Arc<RequestCounters> {
        &self.counters
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.ring();
        if let Some(Err(panic)) = self.thread.take().map(Thread::join) {
            std::panic::resume_unwind(panic);
        }
    }
}

const TOKEN_STOP: u64 = 0;
const TOKEN_LISTENER: u64 = 1;
const TOKEN_ANSWERS: u64 = 2;
const TOKEN_FIRST: u64 = 3;

/// Most events taken from the kernel at once.
const EVENTS_MAX: usize = 32;

/// How long no client is accepted after that has failed.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

struct Serving {
    epoll: OwnedFd,
    stop: Bell,
    answers: Answers,
    connections: BTreeMap<u64, Client>,
    next_token: u64,
    accept_again: Option<Instant>,
    socket: Socket,
    limits: Limits,
    inbox: Inbox,
    counters: Arc<RequestCounters>,
}

struct Client {
    connection: Connection,
    interest: Interest,
    is_deprecated: bool,
}

impl Serving {
    fn watch_sources(&self) -> io::Result<()> {
        epoll::add(
            &self.epoll,
            &self.stop,
            EventData::new_u64(TOKEN_STOP),
            EventFlags::IN,
        )?;
        epoll::add(
            &self.epoll,
            self.answers.wake(),
            EventData::new_u64(TOKEN_ANSWERS),
            EventFlags::IN,
        )?;
        epoll::add(
            &self.epoll,
            &self.socket.listener,
            EventData::new_u64(TOKEN_LISTENER),
            EventFlags::IN,
        )?;
        Ok(())
    }

    fn run(&mut self) {
        log::info!("API server started.");
        let mut events = Vec::with_capacity(EVENTS_MAX);
        loop {
            let timeout = self
                .next_deadline()
                .map(|deadline| timespec(deadline, Instant::now()));
            events.clear();
            let buffer = rustix::buffer::spare_capacity(&mut events);
            match epoll::wait(&self.epoll, buffer, timeout.as_ref()) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(error) => unreachable!("waiting on a valid epoll descriptor failed: {error}"),
            }
            let now = Instant::now();
            let mut must_stop = false;
            for event in &events {
                match event.data.u64() {
                    TOKEN_STOP => must_stop = true,
                    TOKEN_LISTENER => self.accept(now),
                    TOKEN_ANSWERS => self.deliver(now),
                    token => self.advance(token, event.flags, now),
                }
            }
            if must_stop {
                self.deliver(now);
                return;
            }
            self.expire(now);
            self.ask_for_lines(now);
        }
    }

    /// Takes in every client that waits.
    fn accept(&mut self, now: Instant) {
        loop {
            let stream = match self.socket.listener.accept() {
                Ok((stream, _)) => stream,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error)
                    if matches!(
                        error.kind(),
                        ErrorKind::Interrupted | ErrorKind::ConnectionAborted
                    ) =>
                {
                    continue;
                }
                Err(error) => {
                    log::error!("API server cannot accept a client, and tries again: {error}");
                    self.pause_accepting(now);
                    return;
                }
            };
            if let Err(error) = self.admit(stream, now) {
                log::error!("API server cannot serve a client: {error}");
            }
        }
    }

    /// Stops listening for a moment: the kernel would report the same failure again at once.
    fn pause_accepting(&mut self, now: Instant) {
        self.watch_listener(EventFlags::empty());
        self.accept_again = Some(now + ACCEPT_PAUSE);
    }

    fn watch_listener(&self, flags: EventFlags) {
        epoll::modify(
            &self.epoll,
            &self.socket.listener,
            EventData::new_u64(TOKEN_LISTENER),
            flags,
        )
        .expect("the listener was added, and changing its flags needs no memory");
    }

    fn admit(&mut self, stream: UnixStream, now: Instant) -> io::Result<()> {
        stream.set_nonblocking(true)?;
        if self.connections.len() == self.limits.connections_max && !self.drop_longest_idle() {
            return refuse_client(stream);
        }
        let token = self.next_token;
        self.next_token += 1;
        epoll::add(&self.epoll, &stream, EventData::new_u64(token), EventFlags::IN)?;
        let decoder = Decoder::new(self.limits.body_bytes_max);
        let client = Client {
            connection: Connection::new(stream, decoder, self.limits.request_ms_max, now),
            interest: Interest::Input,
            is_deprecated: false,
        };
        self.connections.insert(token, client);
        Ok(())
    }

    fn drop_longest_idle(&mut self) -> bool {
        let idle =
            |(token, client): (&u64, &Client)| client.connection.idle_since().map(|since| (since, *token));
        let longest = self.connections.iter().filter_map(idle).min();
        longest.is_some_and(|(_, token)| self.connections.remove(&token).is_some())
    }

    fn advance(&mut self, token: u64, flags: EventFlags, now: Instant) {
        let Some(client) = self.connections.get_mut(&token) else {
            return; // Dropped by an earlier event of the same batch.
        };
        let has_gone = flags.intersects(EventFlags::HUP | EventFlags::ERR);
        if has_gone && client.interest == Interest::Hangup {
            self.connections.remove(&token);
            return;
        }
        let progress = client.connection.advance(now);
        self.settle(token, progress, now);
    }

    /// Brings the answers that there are to their clients.
    fn deliver(&mut self, now: Instant) {
        while let Some((token, answer)) = self.answers.take() {
            // A client that has gone meanwhile gets no answer.
            if let Some(client) = self.connections.get_mut(&token) {
                client.take(answer, now);
                let progress = client.connection.advance(now);
                self.settle(token, progress, now);
            }
        }
    }

    fn expire(&mut self, now: Instant) {
        if self.accept_again.is_some_and(|at| at <= now) {
            self.accept_again = None;
            self.watch_listener(EventFlags::IN);
        }
        let has_expired = |client: &Client| {
            client
                .connection
                .deadline()
                .is_some_and(|deadline| deadline <= now)
        };
        let expired = self.connections.iter().filter(|(_, client)| has_expired(client));
        let tokens: Vec<u64> = expired.map(|(token, _)| *token).collect();
        for token in tokens {
            if let Some(client) = self.connections.get_mut(&token) {
                let progress = client.connection.expire(now);
                self.settle(token, progress, now);
            }
        }
    }

    /// Does what a connection asks for after it advanced: until it waits, is gone, or a verb of its
    /// is on the way.
    fn settle(&mut self, token: u64, mut progress: Progress, now: Instant) {
        let Some(client) = self.connections.get_mut(&token) else {
            return;
        };
        while let Progress::Request(request) = progress {
            log_request(&request);
            match route(&request, &self.counters) {
                Ok(verb) => {
                    client.is_deprecated = verb.is_deprecated();
                    let reply = self.answers.reply(token);
                    self.inbox.post(Call { verb, reply });
                    progress = Progress::Wait;
                }
                Err(fault) => {
                    client.connection.answer(&refused(&fault, false), now);
                    progress = client.connection.advance(now);
                }
            }
        }
        if progress == Progress::Gone || client.watch(&self.epoll, token).is_err() {
            self.connections.remove(&token);
        }
    }

    /// Asks for the next line of those whose client has had the last one for a while.
    fn ask_for_lines(&mut self, now: Instant) {
        for (token, client) in &mut self.connections {
            if client.connection.next_line().is_some_and(|at| at <= now) {
                client.connection.asks_for_line();
                let reply = self.answers.reply(*token);
                self.inbox.post(Call {
                    verb: Verb::WatchMigration,
                    reply,
                });
            }
        }
    }

    fn next_deadline(&self) -> Option<Instant> {
        let clients = self.connections.values().flat_map(|client| {
            let connection = &client.connection;
            connection.deadline().into_iter().chain(connection.next_line())
        });
        clients.chain(self.accept_again).min()
    }
}

impl Client {
    fn take(&mut self, answer: Answer, now: Instant) {
        let is_deprecated = self.is_deprecated;
        let response = match answer {
            Ok(Data::Line { text, is_last }) => {
                self.connection.tell(&text, is_last, now);
                return;
            }
            Err(_) if self.connection.is_telling() => {
                // The machine has ended, and with it all that there was to tell.
                self.connection.end_telling();
                return;
            }
            Ok(Data::Empty) => done(None, is_deprecated),
            Ok(Data::Body(content, text)) => done(Some((content, text)), is_deprecated),
            Err(fault) => refused(&fault, is_deprecated),
        };
        self.connection.answer(&response, now);
    }

    /// Tells the kernel what the connection wants to be woken for, if that has changed.
    fn watch(&mut self, epoll: &OwnedFd, token: u64) -> io::Result<()> {
        let interest = self.connection.interest();
        if interest != self.interest {
            let flags = match interest {
                Interest::Input => EventFlags::IN,
                Interest::Output => EventFlags::OUT,
                Interest::Hangup => EventFlags::empty(),
            };
            epoll::modify(epoll, self.connection.stream(), EventData::new_u64(token), flags)?;
            self.interest = interest;
        }
        Ok(())
    }
}

fn done(body: Option<(Content, String)>, is_deprecated: bool) -> Response {
    let status = match body {
        None => Status::NoContent,
        Some(_) => Status::Ok,
    };
    log::info!(
        "The request was executed successfully. Status code: {}.",
        status.code()
    );
    Response {
        status,
        body,
        deprecated: is_deprecated,
    }
}

fn refused(fault: &Fault, is_deprecated: bool) -> Response {
    log::error!(
        "Received Error. Status code: {}. Message: {}",
        fault.status.code(),
        fault.message
    );
    let mut response = fault.response();
    response.deprecated = is_deprecated;
    response
}

/// The body is not logged: it may hold what only the client should know.
fn log_request(request: &Request) {
    log::info!(
        "The API server received a {} request on {:?}.",
        request.method.name(),
        request.path
    );
}

fn refuse_client(mut stream: UnixStream) -> io::Result<()> {
    let fault = Fault {
        status: Status::ServiceUnavailable,
        message: "Too many open connections; close one, or try again later.".to_owned(),
    };
    stream.write_all(&fault.response().encode(false))
}

fn timespec(deadline: Instant, now: Instant) -> Timespec {
    // The remaining time is at most that of a request, so it fits.
    Timespec::try_from(deadline.saturating_duration_since(now))
        .expect("a request's time in seconds fits an i64")
}

#[cfg(test)]
mod tests;
