//! A simulated NFS server: it speaks NFSv4.1 and 4.2 in bytes, and does the worst that servers do.
//!
//! Its files are those of a [`Medium`](crate::sim::medium::Medium) behind a write-back cache. What a client may do, it is held
//! to: what it did wrong is told by [`Server::complaints`]. What was written, by whom and by which right, [`Server::events`]
//! tells.

mod alone;
mod callback;
pub mod client;
mod clients;
mod connection;
mod execute;
mod grant;
mod hostile;
mod io;
mod names;
pub mod options;
mod peer;
mod rights;
mod session;
mod state;
mod task;
mod tree;

use std::cell::{RefCell, RefMut};
use std::rc::Rc;
use std::time::Instant;

use self::options::Options;
pub use self::peer::ServerPeer;
pub use self::rights::Right;
use self::state::State;
use self::tree::{EXPORT, Lasts};
use crate::lease::{Owner, Phase, Record};
use crate::nfs::v4::Operation;
use crate::sim::clock::Clock;
use crate::sim::dice::Dice;

/// A server; a clone is the same one.
#[derive(Clone, Debug)]
pub struct Server(Rc<RefCell<State>>);

/// Something that has happened, for judges; in the order in which it did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// Bytes of a file have changed.
    Wrote(Change),
    /// A client has lost what it had: it was silent for too long.
    Expired {
        /// Who.
        client: Vec<u8>,
    },
    /// The server's host lost what was not synced, or its process only was started anew.
    Ended(Ending),
}

/// How a life of a server ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// What was not synced is lost, or some of it.
    Crash,
    /// What was written is there.
    Restart,
}

/// A change of bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// What the client calls itself.
    pub client: Vec<u8>,
    /// Of which file.
    pub name: Vec<u8>,
    /// From where on.
    pub offset_bytes: u64,
    /// How much.
    pub len_bytes: u64,
    /// By which right.
    pub right: Right,
}

impl Server {
    /// A server with an empty export of that name.
    pub fn new(export: &str, options: Options, clock: Clock, dice: Dice) -> Self {
        Self(Rc::new(RefCell::new(State::new(export, options, clock, dice))))
    }

    /// Adds a file to the export.
    ///
    /// # Panics
    ///
    /// When there is one of that name.
    pub fn add(&self, name: &str, content: &[u8]) {
        self.state().tree.make(name.as_bytes(), content, None);
    }

    /// What a reader would find in a file.
    ///
    /// # Panics
    ///
    /// When there is none of that name.
    pub fn content(&self, name: &str) -> Vec<u8> {
        let state = self.state();
        let file = state.named(name.as_bytes());
        state.tree.read(file, 0, u64::MAX)
    }

    /// What a reader would find if all was lost that is not surely on the medium.
    ///
    /// # Panics
    ///
    /// When there is no file of that name.
    pub fn durable(&self, name: &str) -> Vec<u8> {
        let state = self.state();
        let file = state.named(name.as_bytes());
        let mut content = Vec::new();
        state.tree.medium.change(file.slot, |file| {
            content = file.read_synced(file.len_bytes());
        });
        content
    }

    /// The names of what is in the export.
    pub fn names(&self) -> Vec<String> {
        let state = self.state();
        let names = state.tree.directory(EXPORT).expect("the export is there");
        let shown = names
            .keys()
            .map(|name| String::from_utf8_lossy(name).into_owned());
        shown.collect()
    }

    /// The host of the server loses power: what was not synced is lost, or some of it, and so is what clients have.
    pub fn crash(&self) {
        self.state().end(Ending::Crash);
    }

    /// The server's process is killed and started anew: as [`Self::crash`], but what was written is still there.
    pub fn restart(&self) {
        self.state().end(Ending::Restart);
    }

    /// What was not synced is lost, or some of it, and everything else is as it was: the disk below the server has failed. All
    /// that tells clients of it is the verifier.
    pub fn lapse(&self) {
        let state = &mut *self.state();
        let mut dice = state.dice.split();
        state.tree.medium.crash(&mut dice);
        state.lapses += 1;
    }

    /// The time in which only what was held before is given out begins now: the server was down until now.
    pub fn begin_grace(&self) {
        self.state().begin_grace();
    }

    /// Until when only what was held before a restart is given out, if it is so.
    pub fn grace(&self) -> Option<Instant> {
        self.state().grace_until
    }

    /// A client whose name begins like that loses what it has, as if it had been silent.
    pub fn expire(&self, client: &str) {
        let state = &mut *self.state();
        for id in state.clients.called(client.as_bytes()) {
            state.expire(id);
        }
    }

    /// All sessions of such a client are gone, and nothing else, unless something of it is half done: that holds its session.
    /// What was not begun is carried out all the same.
    pub fn forget_sessions(&self, client: &str) {
        let state = &mut *self.state();
        for id in state.clients.called(client.as_bytes()) {
            if !state.is_at_work_for(id) {
                state.drop_sessions(id);
            }
        }
    }

    /// Takes the lock of the client whose name begins with `client` away, as another process with a session on the same client
    /// does it in a hand-over, and records that `owner` has taken the image; the open of the first stays what it was.
    ///
    /// # Panics
    ///
    /// When there is no record to follow.
    pub fn hand_over(&self, client: &str, image: &str, owner: &Owner) {
        let state = &mut *self.state();
        let prefix = format!("{image}.lease.");
        let names = state.tree.directory(EXPORT).expect("the export is there");
        let records = names
            .keys()
            .filter_map(|name| str::from_utf8(name).ok()?.strip_prefix(&prefix));
        let newest: u64 = records
            .filter_map(|number| number.parse().ok())
            .max()
            .expect("there is a record to follow");
        let last = state.named(format!("{prefix}{newest}").as_bytes());
        let last = Record::parse(&state.tree.read(last, 0, u64::MAX)).expect("a record is whole");
        let next = Record::after(Some(&last), Phase::Held, owner).expect("there are numbers enough");
        let name = format!("{prefix}{}", next.epoch);
        state.tree.make(name.as_bytes(), b"", None);
        let file = state.named(name.as_bytes());
        state.tree.write(file, 0, next.text().as_bytes(), Lasts::AtOnce);
        for id in state.clients.called(client.as_bytes()) {
            state.rights.hand_over(id, owner.vm.as_bytes());
        }
    }

    /// Who has a file locked, by the names of the clients.
    ///
    /// # Panics
    ///
    /// When there is no file of that name.
    pub fn lockers(&self, name: &str) -> Vec<String> {
        let state = self.state();
        let file = state.number(name.as_bytes());
        let lockers = state.rights.lockers(file.expect("there is such a file"));
        let shown = lockers.into_iter().map(|id| {
            let client = state.clients.get(id);
            client.map_or_else(String::new, |client| {
                String::from_utf8_lossy(&client.owner.owner_id).into_owned()
            })
        });
        shown.collect()
    }

    /// Changes the options. What was negotiated stays.
    pub fn adjust(&self, change: impl FnOnce(&mut Options)) {
        change(&mut self.state().options);
    }

    /// Carries calls on, also those of connections that are over, though nobody looks.
    pub fn advance(&self) {
        self.state().advance();
    }

    /// Whether a call is not carried out yet, or only in part.
    pub fn is_working(&self) -> bool {
        self.state().is_working()
    }

    /// When it is.
    pub fn due(&self) -> Option<Instant> {
        self.state().due(None)
    }

    /// How often an operation was begun in a session.
    pub fn asked(&self, operation: Operation) -> u64 {
        self.state().asked.get(&operation.0).copied().unwrap_or(0)
    }

    /// How many changes clients have asked for after their leases were over. That they did so before nobody can tell who looks at
    /// a network on which calls take their time.
    pub fn late(&self) -> u64 {
        self.state().late
    }

    /// What has happened since the last call.
    pub fn events(&self) -> Vec<Event> {
        std::mem::take(&mut self.state().events)
    }

    /// What clients did against RFC 8881 since the last call, in words.
    pub fn complaints(&self) -> Vec<String> {
        std::mem::take(&mut self.state().complaints)
    }

    fn state(&self) -> RefMut<'_, State> {
        self.0.borrow_mut()
    }
}
