//! A simulated target behind a real TCP socket, for initiators that know nothing of simulations.

use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread::JoinHandle;

use rustix::event::{PollFd, PollFlags, Timespec};

use super::{Connection, Target};

/// A target that is served by a thread of its own until this is dropped.
#[derive(Debug)]
pub struct Served {
    address: SocketAddr,
    questions: Option<Sender<Question>>,
    thread: Option<JoinHandle<()>>,
}

/// Something to be done to the target by its thread.
type Question = Box<dyn FnOnce(&Target) + Send>;

/// Serves the target that `make` makes, in a thread of its own, for a target belongs to one thread.
///
/// # Errors
///
/// When the listener has no address or cannot be used without blocking.
pub fn serve(listener: TcpListener, make: impl FnOnce() -> Target + Send + 'static) -> io::Result<Served> {
    let address = listener.local_addr()?;
    listener.set_nonblocking(true)?;
    let (questions, asked) = mpsc::channel();
    let thread = std::thread::spawn(move || {
        let mut house = House {
            target: make(),
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

impl Served {
    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Does something to the target, between two looks at its connections.
    ///
    /// # Panics
    ///
    /// When the target has panicked.
    pub fn with<T: Send + 'static>(&self, act: impl FnOnce(&Target) -> T + Send + 'static) -> T {
        let (answer, answered) = mpsc::channel();
        let question: Question = Box::new(move |target| {
            // Who asked is waiting.
            let _heard = answer.send(act(target));
        });
        let questions = self.questions.as_ref().expect("it is served until it is dropped");
        let asked = questions.send(question);
        assert!(asked.is_ok(), "the thread of the target is gone");
        answered.recv().expect("the target answers, or has panicked")
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        self.questions = None;
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(
                ended.is_ok() || std::thread::panicking(),
                "the target has panicked"
            );
        }
    }
}

struct House {
    target: Target,
    listener: TcpListener,
    guests: Vec<Guest>,
}

struct Guest {
    stream: TcpStream,
    connection: Connection,
    /// What the socket has not taken yet.
    unsent: Vec<u8>,
    is_gone: bool,
}

/// How long a look takes if nothing happens: a question is answered no later.
const LOOK: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 2_000_000,
};

impl House {
    /// Does what is asked; `false` when nobody will ask any more.
    fn answer(&self, asked: &Receiver<Question>) -> bool {
        loop {
            match asked.try_recv() {
                Ok(question) => question(&self.target),
                Err(mpsc::TryRecvError::Empty) => return true,
                Err(mpsc::TryRecvError::Disconnected) => return false,
            }
        }
    }

    /// Waits for something to happen, unless there is work, and does what there is to do.
    fn look(&mut self) {
        let works = self.target.is_working() || self.guests.iter().any(|guest| guest.connection.is_busy());
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
        while let Ok((stream, _)) = self.listener.accept() {
            if stream.set_nonblocking(true).is_ok() && stream.set_nodelay(true).is_ok() {
                self.guests.push(Guest {
                    stream,
                    connection: self.target.connect(),
                    unsent: Vec::new(),
                    is_gone: false,
                });
            }
        }
        for guest in &mut self.guests {
            guest.is_gone |= guest.exchange().is_err();
        }
        self.guests.retain(|guest| !guest.is_gone);
        if self.guests.is_empty() {
            self.target.advance();
        }
    }
}

impl Guest {
    /// Receives and sends what goes. It is an error if the connection is over.
    fn exchange(&mut self) -> io::Result<()> {
        let mut bytes = [0; 64 << 10];
        if let Some(count) = unless_blocked(self.stream.read(&mut bytes))? {
            if count == 0 {
                return Err(ErrorKind::UnexpectedEof.into());
            }
            self.connection.receive(bytes.get(..count).unwrap_or_default());
        }
        // A client that does not read is not answered without end.
        if self.unsent.len() < UNSENT_BYTES_MAX {
            self.unsent.extend(self.connection.transmit());
        }
        if !self.unsent.is_empty()
            && let Some(count) = unless_blocked(self.stream.write(&self.unsent))?
        {
            self.unsent.drain(..count);
        }
        if self.connection.closed() && self.unsent.is_empty() {
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
