//! Where a source calls: several callers are greeted at a time, and the first who can be trusted comes in.

use std::io;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::progress::Progress;
use super::receive::ReceiveError;
use super::tls::{Identity, ServerStream, TlsError};

/// A listener, and who may come in.
#[derive(Debug)]
pub struct Door {
    /// Where it is.
    pub listener: TcpListener,
    /// Who we are.
    pub identity: Arc<Identity>,
    /// The name that the caller's certificate has to have, if that is said.
    pub from: Option<String>,
}

/// Callers that are greeted at a time; others wait in the kernel's queue.
const CALLERS_MAX: usize = 16;
/// How often it is looked whether somebody has given it up.
const LOOK: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 50_000_000,
};

/// Callers that are being greeted, each on a thread of its own, which ends after `GREETING_MAX` at the latest.
struct Greeting {
    count: usize,
    sender: Sender<Result<ServerStream, TlsError>>,
    ended: Receiver<Result<ServerStream, TlsError>>,
    /// Counts up when one has been greeted.
    bell: Arc<OwnedFd>,
}

impl Door {
    /// Waits for a caller who can be trusted. Others are sent away; whoever is silent keeps nobody out. The caller's connection
    /// is that by which `progress` can be given up.
    ///
    /// # Errors
    ///
    /// When it is given up, or nobody can call any more.
    pub fn wait(&self, progress: &Progress) -> Result<ServerStream, ReceiveError> {
        self.listener
            .set_nonblocking(true)
            .map_err(ReceiveError::Listen)?;
        let mut greeting = Greeting::new().map_err(ReceiveError::Listen)?;
        loop {
            if progress.is_cancelled() {
                return Err(ReceiveError::Cancelled);
            }
            while let Some(caller) = greeting.greeted() {
                match caller {
                    Ok(stream) => {
                        progress.goes_by(&stream.sock).map_err(ReceiveError::Listen)?;
                        return Ok(stream);
                    }
                    Err(error) => log::warn!("a caller was sent away: {}", crate::api::chain(&error)),
                }
            }
            greeting.wait(&self.listener);
            if greeting.has_room()
                && let Some(socket) = self.caller().map_err(ReceiveError::Listen)?
            {
                self.begin(&mut greeting, socket);
            }
        }
    }

    /// Whoever has called, if somebody has.
    fn caller(&self) -> io::Result<Option<TcpStream>> {
        match self.listener.accept() {
            Ok((socket, _)) => Ok(Some(socket)),
            Err(error) => match error.kind() {
                io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted => {
                    Ok(None)
                }
                _ => Err(error),
            },
        }
    }

    fn begin(&self, greeting: &mut Greeting, socket: TcpStream) {
        let (identity, from) = (Arc::clone(&self.identity), self.from.clone());
        let begun = greeting.begin(move || {
            let prepared = socket
                .set_nonblocking(false)
                .and_then(|()| socket.set_nodelay(true));
            prepared.map_err(TlsError::Refused)?;
            identity.accept(socket, from.as_deref())
        });
        if let Err(error) = begun {
            log::warn!("a caller was sent away, as the host has no thread left: {error}");
        }
    }
}

impl Greeting {
    fn new() -> io::Result<Self> {
        let (sender, ended) = channel();
        Ok(Self {
            count: 0,
            sender,
            ended,
            bell: Arc::new(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?),
        })
    }

    fn has_room(&self) -> bool {
        self.count < CALLERS_MAX
    }

    fn begin(
        &mut self,
        greet: impl FnOnce() -> Result<ServerStream, TlsError> + Send + 'static,
    ) -> io::Result<()> {
        let (sender, bell) = (self.sender.clone(), Arc::clone(&self.bell));
        let thread = thread::Builder::new().name("mover".to_owned());
        thread.spawn(move || {
            // If somebody else came in meanwhile nobody listens, and the connection ends here.
            let _ = sender.send(greet());
            let _ = rustix::io::write(&*bell, &1_u64.to_ne_bytes());
        })?;
        self.count += 1;
        Ok(())
    }

    /// What became of a caller, if there is news.
    fn greeted(&mut self) -> Option<Result<ServerStream, TlsError>> {
        let caller = self.ended.try_recv().ok()?;
        self.count -= 1;
        Some(caller)
    }

    /// Waits for somebody who calls, while there is room, or was greeted, and no longer than [`LOOK`].
    fn wait(&self, listener: &TcpListener) {
        let calls = if self.has_room() {
            PollFlags::IN
        } else {
            PollFlags::empty()
        };
        let mut fds = [
            PollFd::from_borrowed_fd(listener.as_fd(), calls),
            PollFd::from_borrowed_fd(self.bell.as_fd(), PollFlags::IN),
        ];
        // Whatever woke it, both are asked.
        let _ = poll(&mut fds, Some(&LOOK));
        let mut count = [0; 8];
        let _ = rustix::io::read(&*self.bell, &mut count);
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use std::time::{Duration, Instant};

    use super::super::tls::testing::Authority;
    use super::*;

    #[test]
    fn whoever_is_silent_or_not_trusted_keeps_nobody_out() {
        let directory = tempfile::tempdir().unwrap();
        let (ours, theirs) = (Authority::new(), Authority::new());
        let at = |authority: &Authority, name: &str| {
            Identity::read(&authority.host(name, &ours, directory.path())).unwrap()
        };
        let door = Door {
            listener: TcpListener::bind("127.0.0.1:0").unwrap(),
            identity: Arc::new(at(&ours, "127.0.0.1")),
            from: Some("host-a.test".to_owned()),
        };
        let address = door.listener.local_addr().unwrap();
        let silent: Vec<_> = (1..CALLERS_MAX)
            .map(|_| TcpStream::connect(address).unwrap())
            .collect();
        let begun = Instant::now();
        let progress = Progress::default();
        thread::scope(|scope| {
            let waiting = scope.spawn(|| door.wait(&progress).unwrap());
            let call = |identity: &Identity| identity.call(TcpStream::connect(address).unwrap(), "127.0.0.1");
            // The handshake of a stranger may end well for it before it hears that it is sent away.
            let _ = call(&at(&theirs, "host-a.test"));
            let _ = call(&at(&ours, "host-b.test"));
            let source = call(&at(&ours, "host-a.test")).unwrap();
            let taken = waiting.join().unwrap();
            assert_eq!(taken.sock.peer_addr().unwrap(), source.sock.local_addr().unwrap());
        });
        // None of the silent had to be waited for.
        assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
        drop(silent);
    }

    #[test]
    fn whoever_says_a_byte_at_a_time_has_no_more_time_than_others() {
        let directory = tempfile::tempdir().unwrap();
        let authority = Authority::new();
        let identity = Identity::read(&authority.host("127.0.0.1", &authority, directory.path())).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut dribbling = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (socket, _) = listener.accept().unwrap();
        let begun = Instant::now();
        thread::scope(|scope| {
            let greeted = scope.spawn(|| identity.accept(socket, None));
            // The header of a long record, and then as little of it as keeps a connection alive.
            let bytes = [22, 3, 1, 0x3f, 0xff].into_iter().chain(std::iter::repeat(1));
            for byte in bytes {
                let said = std::io::Write::write_all(&mut dribbling, &[byte]);
                if said.is_err() || greeted.is_finished() {
                    break;
                }
                thread::sleep(Duration::from_millis(200));
            }
            assert!(greeted.join().unwrap().is_err());
        });
        assert!(begun.elapsed() < 3 * super::super::tls::GREETING_MAX);
    }
}
