//! A simulated server behind a real TCP socket, for clients that know nothing of simulations.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec};

use super::net::Peer;

/// What can be served.
pub trait Host {
    /// Its end of a new connection.
    fn accept(&self) -> Box<dyn Peer>;

    /// It is as late as that.
    fn pass_to(&self, now: Instant);

    /// Goes on with what nobody waits for any more.
    fn advance(&self);

    /// Whether there is something to go on with.
    fn is_working(&self) -> bool;
}

/// A server that is served by a thread of its own until this is dropped.
#[derive(Debug)]
pub struct Served<H> {
    address: SocketAddr,
    questions: Option<Sender<Question<H>>>,
    thread: Option<JoinHandle<()>>,
}

/// Something to be done to the server by its thread.
type Question<H> = Box<dyn FnOnce(&H) + Send>;

/// Serves the server that `make` makes, in a thread of its own, for it belongs to one thread.
///
/// # Errors
///
/// When the listener has no address or cannot be used without blocking.
pub fn serve<H: Host + 'static>(
    listener: TcpListener,
    make: impl FnOnce() -> H + Send + 'static,
) -> io::Result<Served<H>> {
    let address = listener.local_addr()?;
    listener.set_nonblocking(true)?;
    let (questions, asked) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        let mut house = House {
            host: make(),
            listener,
            guests: Vec::new(),
        };
        while house.answer(&asked) {
            house.look();
        }
    });
    Ok(Served {
        address,
        questions: Some(questions),
        thread: Some(thread),
    })
}

impl<H: 'static> Served<H> {
    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Does something to the server, between two looks at its connections.
    ///
    /// # Panics
    ///
    /// When the server has panicked.
    pub fn with<T: Send + 'static>(&self, act: impl FnOnce(&H) -> T + Send + 'static) -> T {
        let (answer, answered) = mpsc::channel();
        let question: Question<H> = Box::new(move |host| {
            // Who asked is waiting.
            let _heard = answer.send(act(host));
        });
        let questions = self.questions.as_ref().expect("it is served until it is dropped");
        let asked = questions.send(question);
        assert!(asked.is_ok(), "the thread of the server is gone");
        answered.recv().expect("the server answers, or has panicked")
    }
}

impl<H> Drop for Served<H> {
    fn drop(&mut self) {
        self.questions = None;
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(
                ended.is_ok() || std::thread::panicking(),
                "the server has panicked"
            );
        }
    }
}

struct House<H> {
    host: H,
    listener: TcpListener,
    guests: Vec<Guest>,
}

struct Guest {
    stream: TcpStream,
    peer: Box<dyn Peer>,
    /// What the socket has not taken yet.
    unsent: Vec<u8>,
    is_gone: bool,
}

/// How long a look takes if nothing happens: a question is answered no later.
const LOOK: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 2_000_000,
};

impl<H: Host> House<H> {
    /// Does what is asked; `false` when nobody will ask any more.
    fn answer(&self, asked: &Receiver<Question<H>>) -> bool {
        loop {
            match asked.try_recv() {
                Ok(question) => question(&self.host),
                Err(mpsc::TryRecvError::Empty) => return true,
                Err(mpsc::TryRecvError::Disconnected) => return false,
            }
        }
    }

    /// Waits for something to happen, unless there is work, and does what there is to do.
    fn look(&mut self) {
        let works = self.host.is_working() || self.guests.iter().any(|guest| guest.peer.alarm().is_some());
        let mut polled = vec![PollFd::new(&self.listener, PollFlags::IN)];
        for guest in &self.guests {
            let wanted = if guest.unsent.is_empty() {
                PollFlags::IN
            } else {
                PollFlags::IN | PollFlags::OUT
            };
            polled.push(PollFd::from_borrowed_fd(guest.stream.as_fd(), wanted));
        }
        let patience = if works { Timespec::default() } else { LOOK };
        // A signal only makes the look shorter.
        let _looked = rustix::event::poll(&mut polled, Some(&patience));
        drop(polled);
        let now = Instant::now();
        self.host.pass_to(now);
        while let Ok((stream, _)) = self.listener.accept() {
            if stream.set_nonblocking(true).is_ok() && stream.set_nodelay(true).is_ok() {
                self.guests.push(Guest {
                    stream,
                    peer: self.host.accept(),
                    unsent: Vec::new(),
                    is_gone: false,
                });
            }
        }
        for guest in &mut self.guests {
            if guest.exchange(now).is_err() {
                guest.is_gone = true;
                guest.peer.closed();
            }
        }
        self.guests.retain(|guest| !guest.is_gone);
        if self.guests.is_empty() {
            self.host.advance();
        }
    }
}

impl Guest {
    /// Receives and sends what goes. It is an error if the connection is over.
    fn exchange(&mut self, now: Instant) -> io::Result<()> {
        if self.peer.alarm().is_some_and(|alarm| alarm <= now) {
            self.peer.wake(now);
        }
        let mut bytes = [0; 64 << 10];
        if let Some(count) = unless_blocked(self.stream.read(&mut bytes))? {
            if count == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            self.peer.receive(bytes.get(..count).unwrap_or_default(), now);
        }
        // A client that does not read is not answered without end.
        let room_bytes = UNSENT_BYTES_MAX.saturating_sub(self.unsent.len());
        self.unsent.extend(self.peer.send(room_bytes, now));
        if !self.unsent.is_empty()
            && let Some(count) = unless_blocked(self.stream.write(&self.unsent))?
        {
            self.unsent.drain(..count);
        }
        if self.peer.wants_close() && self.unsent.is_empty() {
            return Err(ErrorKind::ConnectionAborted.into());
        }
        Ok(())
    }
}

/// How much may wait for a client to read.
const UNSENT_BYTES_MAX: usize = 4 << 20;

fn unless_blocked(result: io::Result<usize>) -> io::Result<Option<usize>> {
    match result {
        Ok(count) => Ok(Some(count)),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(None),
        Err(error) => Err(error),
    }
}
