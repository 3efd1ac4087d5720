//! A party in the middle, with a certificate that both sides trust: it sees each message, and does to one what networks do.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread::JoinHandle;
use std::time::Duration;

use coracle_tests::{Outcome, ensure};
use coracle_vmm::migration::tls::{Identity, TlsFiles};
use coracle_vmm::migration::wire::{HEADER_BYTES, Kind};

/// What becomes of the first message of a kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Then {
    /// It waits, with all that comes behind it in its direction, until somebody lets go.
    Hold,
    /// The connection is reset on both sides.
    Cut,
    /// A bit of the record that carries it is flipped.
    Corrupt,
    /// Everything waits a while from then on, each time.
    Slow,
}

/// The party. Dropped, it cuts what there is.
pub(super) struct Middle {
    /// Where the source is to go.
    pub(super) address: String,
    sprung: mpsc::Receiver<()>,
    gate: Arc<Gate>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct Gate {
    is_open: AtomicBool,
    is_over: AtomicBool,
}

const LOOK: Duration = Duration::from_millis(1);
const SLOWNESS: Duration = Duration::from_millis(40);

impl Middle {
    /// Stands between a source and the target at `to`.
    pub(super) fn start(files: &TlsFiles, to: &str, kind: Kind, then: Then) -> Outcome<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?.to_string();
        let identity = Identity::read(files)?;
        let (spring, sprung) = mpsc::channel();
        let gate = Arc::<Gate>::default();
        let (watched, to) = (Arc::clone(&gate), to.to_owned());
        let trap = Mutex::new(Some((kind, then, spring)));
        listener.set_nonblocking(true)?;
        let thread = std::thread::spawn(move || {
            std::thread::scope(|scope| {
                while !watched.is_over.load(Ordering::Relaxed) {
                    let Ok((socket, _)) = listener.accept() else {
                        std::thread::sleep(LOOK);
                        continue;
                    };
                    // Both ends notice what this one comes to.
                    scope.spawn(|| drop(stand_between(socket, &to, &identity, &trap, &watched)));
                }
            });
        });
        Ok(Self {
            address,
            sprung,
            gate,
            thread: Some(thread),
        })
    }

    /// Waits for the message.
    pub(super) fn wait_sprung(&self, limit: Duration) -> Outcome {
        let sprung = self.sprung.recv_timeout(limit);
        ensure!(sprung.is_ok(), "no such message came within {limit:?}");
        Ok(())
    }

    /// Lets what was held pass.
    pub(super) fn let_go(&self) {
        self.gate.is_open.store(true, Ordering::Relaxed);
    }
}

impl Drop for Middle {
    fn drop(&mut self) {
        self.gate.is_over.store(true, Ordering::Relaxed);
        drop(self.thread.take().map(JoinHandle::join));
    }
}

/// What waits for the first message of a kind, whichever connection it comes by.
type Waiting = Mutex<Option<(Kind, Then, mpsc::Sender<()>)>>;

/// Passes on what comes by one connection of the source, until that ends.
fn stand_between(socket: TcpStream, to: &str, identity: &Identity, trap: &Waiting, gate: &Gate) -> Outcome {
    socket.set_nonblocking(false)?;
    let target = identity.call(TcpStream::connect(to)?, "127.0.0.1")?;
    let source = identity.accept(socket, None)?;
    source.sock.set_nonblocking(true)?;
    target.sock.set_nonblocking(true)?;
    let mut sides = [
        Side::new(source.conn.into(), source.sock),
        Side::new(target.conn.into(), target.sock),
    ];
    while !gate.is_over.load(Ordering::Relaxed) {
        let [source, target] = &mut sides;
        let moved = source.pass(target, trap, gate)? | target.pass(source, trap, gate)?;
        if !moved {
            std::thread::sleep(LOOK);
        }
    }
    Ok(())
}

/// One of the two sides of a connection.
struct Side {
    tls: rustls::Connection,
    socket: TcpStream,
    /// What has come and not passed.
    inbox: Vec<u8>,
    is_held: bool,
    is_slow: bool,
}

impl Side {
    fn new(tls: rustls::Connection, socket: TcpStream) -> Self {
        Self {
            tls,
            socket,
            inbox: Vec::new(),
            is_held: false,
            is_slow: false,
        }
    }

    /// Passes on what has come from here, message by message. Says whether there was anything.
    fn pass(&mut self, other: &mut Self, trap: &Waiting, gate: &Gate) -> Outcome<bool> {
        self.take_in()?;
        if self.is_held {
            if !gate.is_open.load(Ordering::Relaxed) {
                return Ok(false);
            }
            self.is_held = false;
        }
        let mut moved = false;
        while let Some((kind, len_bytes)) = self.first() {
            moved = true;
            let sprung = trap
                .lock()
                .map_err(|_| "a thread has panicked")?
                .take_if(|(trapped, ..)| *trapped == kind);
            if let Some((_, then, spring)) = sprung {
                // Whoever waits may have given up.
                let _told = spring.send(());
                match then {
                    Then::Cut => return Err("it was to be cut".into()),
                    Then::Slow => (self.is_slow, other.is_slow) = (true, true),
                    Then::Hold => {
                        self.is_held = true;
                        return Ok(true);
                    }
                    Then::Corrupt => {
                        let message: Vec<u8> = self.inbox.drain(..len_bytes).collect();
                        other.tls.writer().write_all(&message)?;
                        let mut record = Vec::new();
                        while other.tls.wants_write() {
                            other.tls.write_tls(&mut record)?;
                        }
                        let middle = record.len() / 2;
                        record.get_mut(middle).into_iter().for_each(|byte| *byte ^= 1);
                        other.socket.set_nonblocking(false)?;
                        other.socket.write_all(&record)?;
                        other.socket.set_nonblocking(true)?;
                        continue;
                    }
                }
            }
            if self.is_slow {
                std::thread::sleep(SLOWNESS);
            }
            let message: Vec<u8> = self.inbox.drain(..len_bytes).collect();
            other.socket.set_nonblocking(false)?;
            for part in message.chunks(16 << 10) {
                other.tls.writer().write_all(part)?;
                while other.tls.wants_write() {
                    other.tls.write_tls(&mut other.socket)?;
                }
            }
            other.socket.set_nonblocking(true)?;
        }
        Ok(moved)
    }

    fn take_in(&mut self) -> Outcome {
        match self.tls.read_tls(&mut self.socket) {
            Ok(0) => return Err("one side has gone".into()),
            Ok(_) => {}
            // What came with the greeting may be there already.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
        let state = self.tls.process_new_packets()?;
        let came = state.plaintext_bytes_to_read() as u64;
        self.tls.reader().take(came).read_to_end(&mut self.inbox)?;
        Ok(())
    }

    /// The first message, if it is whole.
    fn first(&self) -> Option<(Kind, usize)> {
        let header: &[u8; HEADER_BYTES] = self.inbox.first_chunk()?;
        let [code, _, _, _, length @ ..] = *header;
        let len_bytes = HEADER_BYTES + u32::from_le_bytes(length) as usize;
        (self.inbox.len() >= len_bytes).then_some((Kind::of(code)?, len_bytes))
    }
}
