//! Where a source calls: several callers are greeted at a time, and who can be trusted comes in.

use std::io::{self, BufRead, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

use coracle_storage::threads::{self, Kind as ThreadKind};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::progress::Progress;
use super::receive::ReceiveError;
use super::stream::Stream;
use super::tls::{GREETING_MAX, Identity, TlsError, within};
use super::wire::{Kind, Wire, WireError};

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

/// Somebody who can be trusted, and what it has said first.
#[derive(Debug)]
pub struct Caller {
    /// Its connection.
    pub wire: Wire<Stream>,
    /// What it has said.
    pub kind: Kind,
    /// All of that.
    pub body: Vec<u8>,
}

/// Why somebody is not even heard.
#[derive(Debug, thiserror::Error)]
enum CallerError {
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("it was to say hello, or what it joins")]
    Wire(#[from] WireError),
}

/// Shuts a door that is kept on another thread.
#[derive(Debug)]
pub struct Latch {
    is_shut: AtomicBool,
    bell: Arc<OwnedFd>,
}

/// Callers that are being greeted, each on a thread of its own, which ends after twice `GREETING_MAX` at the latest.
struct Greeting {
    count: usize,
    sender: Sender<Result<Caller, CallerError>>,
    ended: Receiver<Result<Caller, CallerError>>,
    /// Counts up when one has been greeted.
    bell: Arc<OwnedFd>,
}

impl Door {
    /// Waits for a caller who can be trusted and says hello. Others are sent away; whoever is silent keeps nobody out. The
    /// caller's connection is one of those by which `progress` can be given up.
    ///
    /// # Errors
    ///
    /// When it is given up, or nobody can call any more.
    pub fn wait(&self, progress: &Progress) -> Result<Caller, ReceiveError> {
        let mut greeting = Greeting::new(bell().map_err(ReceiveError::Listen)?);
        self.prepare().map_err(ReceiveError::Listen)?;
        loop {
            if progress.is_cancelled() {
                return Err(ReceiveError::Cancelled);
            }
            match self.next(&mut greeting).map_err(ReceiveError::Listen)? {
                Some(caller) if caller.kind == Kind::Hello => {
                    let socket = caller.wire.stream_ref().socket();
                    progress.goes_by(socket).map_err(ReceiveError::Listen)?;
                    return Ok(caller);
                }
                Some(mut caller) => caller.refuse("no migration is under way here that it could join"),
                None => {}
            }
        }
    }

    /// Has `meet` take in, or send away, each caller who can be trusted, until the door is shut by `latch`.
    pub fn stay(&self, latch: &Latch, mut meet: impl FnMut(Caller)) {
        let mut greeting = Greeting::new(Arc::clone(&latch.bell));
        if let Err(error) = self.prepare() {
            log::warn!("nobody can call any more: {error}");
            return;
        }
        while !latch.is_shut.load(Ordering::Relaxed) {
            match self.next(&mut greeting) {
                Ok(Some(caller)) => meet(caller),
                Ok(None) => {}
                Err(error) => {
                    log::warn!("nobody can call any more: {error}");
                    return;
                }
            }
        }
    }

    fn prepare(&self) -> io::Result<()> {
        self.listener.set_nonblocking(true)
    }

    /// Waits a while for something to happen. Says who was greeted, if somebody was.
    fn next(&self, greeting: &mut Greeting) -> io::Result<Option<Caller>> {
        match greeting.greeted() {
            Some(Ok(caller)) => return Ok(Some(caller)),
            Some(Err(error)) => {
                log::warn!("a caller was sent away: {}", crate::api::chain(&error));
                return Ok(None);
            }
            None => greeting.wait(&self.listener),
        }
        if greeting.has_room()
            && let Some(socket) = self.caller()?
        {
            self.begin(greeting, socket);
        }
        Ok(None)
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
            let mut stream = identity.accept(socket, from.as_deref())?;
            let said = within(GREETING_MAX, &mut stream, |stream| {
                first_of(&mut Wire::new(stream))
            });
            let (kind, body) = said.map_err(TlsError::Refused)??;
            Ok(Caller {
                wire: Wire::new(stream.into()),
                kind,
                body,
            })
        });
        if let Err(error) = begun {
            log::warn!("a caller was sent away, as the host has no thread left: {error}");
        }
    }
}

/// What begins a conversation.
fn first_of<S: BufRead + Write>(wire: &mut Wire<S>) -> Result<(Kind, Vec<u8>), WireError> {
    match wire.receive_head()? {
        (kind @ (Kind::Hello | Kind::Join | Kind::Rejoin), len_bytes) => {
            Ok((kind, wire.receive_body(len_bytes)?.to_vec()))
        }
        (found, _) => Err(WireError::Unexpected { found }),
    }
}

fn bell() -> io::Result<Arc<OwnedFd>> {
    let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    Ok(Arc::new(bell))
}

fn ring(bell: &OwnedFd) {
    // It can only fail for having rung more often than anybody could count.
    let _ = rustix::io::write(bell, &1_u64.to_ne_bytes());
}

impl Caller {
    /// Tells it why it is sent away. It may be gone.
    pub fn refuse(&mut self, why: &str) {
        log::warn!("a caller was sent away: {why}");
        let socket = self.wire.stream_ref().socket();
        let prepared = socket.set_write_timeout(Some(GREETING_MAX));
        if prepared.is_ok() {
            let _ = self
                .wire
                .send(Kind::Refused, &[why.as_bytes()])
                .and_then(|()| self.wire.flush());
        }
    }
}

impl Latch {
    /// One that is open.
    ///
    /// # Errors
    ///
    /// When the host has no descriptor to give.
    pub fn new() -> io::Result<Self> {
        Ok(Self {
            is_shut: AtomicBool::new(false),
            bell: bell()?,
        })
    }

    /// Whoever keeps the door ends at once.
    pub fn shut(&self) {
        self.is_shut.store(true, Ordering::Relaxed);
        ring(&self.bell);
    }
}

impl Greeting {
    fn new(bell: Arc<OwnedFd>) -> Self {
        let (sender, ended) = channel();
        Self {
            count: 0,
            sender,
            ended,
            bell,
        }
    }

    fn has_room(&self) -> bool {
        self.count < CALLERS_MAX
    }

    fn begin(
        &mut self,
        greet: impl FnOnce() -> Result<Caller, CallerError> + Send + 'static,
    ) -> io::Result<()> {
        let (sender, bell) = (self.sender.clone(), Arc::clone(&self.bell));
        threads::spawn(ThreadKind::Mover, "mover", move || {
            // If somebody else came in meanwhile nobody listens, and the connection ends here.
            let _ = sender.send(greet());
            ring(&bell);
        })?;
        self.count += 1;
        Ok(())
    }

    /// What became of a caller, if there is news.
    fn greeted(&mut self) -> Option<Result<Caller, CallerError>> {
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
    use std::thread;

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
        let silent: Vec<_> = (2..CALLERS_MAX)
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
            // Neither whoever has nothing to say is heard, nor who joins what is not there, nor who begins in the middle.
            let _mute = call(&at(&ours, "host-a.test")).unwrap();
            let said = |kind, body: &[u8]| {
                let stream = call(&at(&ours, "host-a.test")).unwrap();
                let mut wire = Wire::new(Stream::from(stream));
                wire.send(kind, &[body]).and_then(|()| wire.flush()).unwrap();
                wire
            };
            let mut joins = said(Kind::Join, &[7; 33]);
            assert_eq!(joins.receive().unwrap().0, Kind::Refused);
            assert!(said(Kind::Go, &[]).receive().is_err());
            let source = said(Kind::Hello, b"hello");
            let taken = waiting.join().unwrap();
            let peer = taken.wire.stream_ref().socket().peer_addr().unwrap();
            assert_eq!(peer, source.stream_ref().socket().local_addr().unwrap());
            assert_eq!((taken.kind, &taken.body[..]), (Kind::Hello, &b"hello"[..]));
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
