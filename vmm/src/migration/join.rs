//! Further connections of a migration: who may join it, and what comes by them at the target.

use std::fmt;
use std::io;
use std::net::{Shutdown, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard};

use coracle_storage::threads::{self, Kind as ThreadKind, Thread};
use serde::{Deserialize, Serialize};

use super::door::{Caller, Door, Latch};
use super::receive::{Ended, Intake, ReceiveError, SILENCE_MAX, take_share};
use super::stream::Stream;
use super::wire::{Kind, Wire};
use crate::state::whole;

/// What says that a connection belongs to a migration: only its two sides know it.
#[derive(Clone, Copy, Serialize, Deserialize)]
pub struct Token([u8; TOKEN_BYTES]);

const TOKEN_BYTES: usize = 32;

impl Token {
    /// A new one.
    ///
    /// # Errors
    ///
    /// When the host has no random bytes.
    pub fn random() -> io::Result<Self> {
        let mut token = [0; TOKEN_BYTES];
        coracle_devices::random::fill(&mut token)?;
        Ok(Self(token))
    }
}

impl PartialEq for Token {
    fn eq(&self, other: &Self) -> bool {
        // These are compared in the same time wherever they differ.
        blake3::Hash::from_bytes(self.0) == blake3::Hash::from_bytes(other.0)
    }
}

impl Eq for Token {}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Token")
    }
}

/// What a further connection begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Join {
    /// That of the migration.
    pub token: Token,
    /// Which one it is; the first connection is number 0.
    pub number: u8,
}

/// Why a connection is none of a migration.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the text of an error is its documentation")]
pub enum NotJoined {
    #[error("another machine is being taken in here")]
    Hello,
    #[error("what it joins cannot be read")]
    Unreadable(#[from] postcard::Error),
    #[error("it is no connection of the migration that is under way here")]
    Token,
    #[error("a migration by {streams} streams has no further one with the number {number}")]
    Number { number: u8, streams: u8 },
    #[error("stream {0} is there already")]
    Twice(u8),
    #[error("all of the memory is here")]
    Over,
}

/// Which connections may still join.
#[derive(Debug)]
pub struct Admission {
    token: Token,
    streams: u8,
    /// A bit for each that has.
    joined: u32,
    is_over: bool,
}

impl Admission {
    /// All but the first of so many `streams` may.
    pub fn new(token: Token, streams: u8) -> Self {
        Self {
            token,
            streams,
            joined: 0,
            is_over: false,
        }
    }

    /// Lets a connection in that has begun with such a message, and says its number.
    ///
    /// # Errors
    ///
    /// [`NotJoined`].
    pub fn admit(&mut self, kind: Kind, body: &[u8]) -> Result<u8, NotJoined> {
        if kind != Kind::Join {
            return Err(NotJoined::Hello);
        }
        let Join { token, number } = whole(body)?;
        if token != self.token {
            return Err(NotJoined::Token);
        }
        if number == 0 || number >= self.streams {
            let streams = self.streams;
            return Err(NotJoined::Number { number, streams });
        }
        if self.is_over {
            return Err(NotJoined::Over);
        }
        if self.joined & 1 << number != 0 {
            return Err(NotJoined::Twice(number));
        }
        self.joined |= 1 << number;
        Ok(number)
    }

    /// From now on nobody may.
    pub fn end(&mut self) {
        self.is_over = true;
    }
}

/// The further connections of a migration, and the door that they come in by, which is kept on a thread of its own. Dropped, it
/// closes the door and ends them.
pub(super) struct Joining {
    joined: Arc<Joined>,
    latch: Arc<Latch>,
    keeper: Option<Thread<()>>,
}

struct Joined {
    intake: Arc<Intake>,
    /// The connection that hears that one of the others was lost.
    first: TcpStream,
    state: Mutex<State>,
}

struct State {
    admission: Admission,
    streams: Vec<Landing>,
    /// Why the first that was lost was lost.
    lost: Option<ReceiveError>,
}

/// A connection by which pages come.
struct Landing {
    socket: TcpStream,
    /// Says in the end whether a mark was the last that came.
    thread: Thread<bool>,
}

impl Joining {
    /// Opens `door` for whoever may join the migration that goes by `first`.
    ///
    /// # Errors
    ///
    /// When the host has no thread to give.
    pub(super) fn open(
        door: Arc<Door>,
        admission: Admission,
        first: &TcpStream,
        intake: Arc<Intake>,
    ) -> io::Result<Self> {
        let joined = Arc::new(Joined {
            intake,
            first: first.try_clone()?,
            state: Mutex::new(State {
                admission,
                streams: Vec::new(),
                lost: None,
            }),
        });
        let latch = Arc::new(Latch::new()?);
        let (kept, at) = (Arc::clone(&joined), Arc::clone(&latch));
        let keeper = mover(move || door.stay(&at, |caller| kept.meet(caller)))?;
        Ok(Self {
            joined,
            latch,
            keeper: Some(keeper),
        })
    }

    /// All memory has come by the first connection, or was marked there: nobody may join any more, and who has is sent away.
    ///
    /// # Errors
    ///
    /// When something has come that is not marked.
    pub(super) fn end(&self) -> Result<(), ReceiveError> {
        let streams = {
            let mut state = self.joined.state();
            state.admission.end();
            std::mem::take(&mut state.streams)
        };
        for stream in &streams {
            // It may have ended by itself.
            let _ = stream.socket.shutdown(Shutdown::Both);
        }
        let marked = streams.into_iter().map(|stream| {
            stream
                .thread
                .join()
                .expect("a thread that panics ends the process")
        });
        // All are waited for, and not only until one is found.
        if marked.fold(true, |all, marked| all & marked) {
            Ok(())
        } else {
            Err(ReceiveError::Unmarked)
        }
    }

    /// Why a further connection was lost, if one was.
    pub(super) fn lost(&self) -> Option<ReceiveError> {
        self.joined.state().lost.take()
    }
}

impl Drop for Joining {
    fn drop(&mut self) {
        self.latch.shut();
        if let Some(keeper) = self.keeper.take() {
            keeper.join().expect("a thread that panics ends the process");
        }
        // Whoever cares has asked before.
        let _ = self.end();
    }
}

impl Joined {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder panics")
    }

    /// Takes in whoever has come, or sends it away.
    fn meet(self: &Arc<Self>, mut caller: Caller) {
        let mut state = self.state();
        let begun = match state.admission.admit(caller.kind, &caller.body) {
            Ok(number) => self
                .begin(caller.wire, number)
                .map(|stream| state.streams.push(stream)),
            Err(why) => {
                drop(state);
                caller.refuse(&why.to_string());
                return;
            }
        };
        if let Err(error) = begun {
            log::warn!("a stream cannot join: {error}");
        }
    }

    fn begin(self: &Arc<Self>, wire: Wire<Stream>, number: u8) -> io::Result<Landing> {
        let socket = wire.stream_ref().socket().try_clone()?;
        socket.set_write_timeout(Some(SILENCE_MAX))?;
        // It has nothing to say for as long as the first one has little.
        socket.set_read_timeout(None)?;
        self.intake.progress().goes_by(&socket)?;
        let joined = Arc::clone(self);
        let thread = mover(move || joined.land(wire, number))?;
        Ok(Landing { socket, thread })
    }

    /// Says in the end whether a mark was the last that came.
    fn land(&self, mut wire: Wire<Stream>, number: u8) -> bool {
        log::info!("migration: stream {number} has joined");
        let told = wire.send(Kind::Joined, &[]).and_then(|()| wire.flush());
        let Ended { why, is_marked } = match told {
            Ok(()) => take_share(&mut wire, &self.intake),
            Err(error) => Ended {
                why: error.into(),
                is_marked: true,
            },
        };
        let mut state = self.state();
        if !state.admission.is_over {
            log::warn!("migration: stream {number} was lost: {}", crate::api::chain(&why));
            state.lost.get_or_insert(why);
            self.intake.give_up();
            // Whoever reads there reads no more, and can still be told why.
            let _ = self.first.shutdown(Shutdown::Read);
        }
        is_marked
    }
}

fn mover<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> io::Result<Thread<T>> {
    threads::spawn(ThreadKind::Mover, "mover", work)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use super::*;

    #[test]
    fn whoever_knows_the_token_joins_once_under_each_number_until_the_memory_is_there() {
        let token = Token::random().unwrap();
        let mut admission = Admission::new(token, 3);
        let join = |admission: &mut Admission, token, number| {
            let body = postcard::to_stdvec(&Join { token, number }).unwrap();
            assert!(body.len() <= Kind::Join.body_bytes_max());
            admission.admit(Kind::Join, &body)
        };
        let mut other = token;
        other.0[31] ^= 1;
        assert!(matches!(join(&mut admission, other, 1), Err(NotJoined::Token)));
        for number in [0, 3, 32, 255] {
            let refused = join(&mut admission, token, number);
            assert!(matches!(refused, Err(NotJoined::Number { streams: 3, .. })));
        }
        assert_eq!(join(&mut admission, token, 2).unwrap(), 2);
        assert!(matches!(join(&mut admission, token, 2), Err(NotJoined::Twice(2))));
        assert!(matches!(admission.admit(Kind::Hello, &[]), Err(NotJoined::Hello)));
        assert!(matches!(
            admission.admit(Kind::Join, &[0; 32]),
            Err(NotJoined::Unreadable(_))
        ));
        admission.end();
        assert!(matches!(join(&mut admission, token, 1), Err(NotJoined::Over)));
    }
}
