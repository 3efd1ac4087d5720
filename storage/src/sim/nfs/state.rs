//! What all connections of a simulated server share.

use std::collections::BTreeMap;
use std::time::Instant;

use super::clients::Clients;
use super::hostile::Saboteur;
use super::options::Options;
use super::rights::Rights;
use super::session::Session;
use super::task::Task;
use super::tree::{EXPORT, File, Tree};
use super::{Ending, Event};
use crate::nfs::v4::{SequenceResult, SessionId, Verifier};
use crate::sim::clock::Clock;
use crate::sim::dice::Dice;

#[derive(Debug)]
pub(super) struct State {
    pub(super) options: Options,
    pub(super) clock: Clock,
    pub(super) dice: Dice,
    pub(super) tree: Tree,
    pub(super) clients: Clients,
    pub(super) sessions: BTreeMap<u64, Session>,
    next_session: u64,
    pub(super) rights: Rights,
    /// Calls that have taken a slot, in the order in which they came.
    pub(super) tasks: Vec<Task>,
    /// What is to be sent, record by record.
    pub(super) outgoing: BTreeMap<u64, Vec<u8>>,
    next_connection: u64,
    pub(super) next_callback: u32,
    /// Counts the server's processes: a connection belongs to one.
    pub(super) life: u64,
    /// How often it has lost what was not synced, in any of its lives.
    pub(super) lapses: u64,
    pub(super) grace_until: Option<Instant>,
    pub(super) saboteur: Saboteur,
    /// How often each operation was begun in a session, by its number.
    pub(super) asked: BTreeMap<u32, u64>,
    /// How many changes were asked for by clients whose lease was over.
    pub(super) late: u64,
    pub(super) events: Vec<Event>,
    pub(super) complaints: Vec<String>,
}

impl State {
    pub(super) fn new(export: &str, options: Options, clock: Clock, dice: Dice) -> Self {
        Self {
            options,
            clock,
            dice,
            tree: Tree::new(export),
            clients: Clients::default(),
            sessions: BTreeMap::new(),
            next_session: 1,
            rights: Rights::default(),
            tasks: Vec::new(),
            outgoing: BTreeMap::new(),
            next_connection: 1,
            next_callback: 1,
            life: 0,
            lapses: 0,
            grace_until: None,
            saboteur: Saboteur::default(),
            asked: BTreeMap::new(),
            late: 0,
            events: Vec::new(),
            complaints: Vec::new(),
        }
    }

    pub(super) fn now(&self) -> Instant {
        self.clock.now()
    }

    /// What the server says of its life with each write.
    pub(super) fn verifier(&self) -> Verifier {
        Verifier(((self.life + 1) << 32 | self.lapses).to_be_bytes())
    }

    pub(super) fn number(&self, name: &[u8]) -> Option<u64> {
        self.tree.directory(EXPORT)?.get(name).copied()
    }

    pub(super) fn named(&self, name: &[u8]) -> File {
        let number = self.number(name);
        let file = number.and_then(|number| self.tree.file(number));
        file.expect("there is a file of that name")
    }

    /// The name of a file in the export.
    pub(super) fn name_of(&self, file: u64) -> Vec<u8> {
        let mut names = self.tree.directory(EXPORT).into_iter().flatten();
        let name = names.find(|(_, number)| **number == file);
        name.map_or_else(Vec::new, |(name, _)| name.clone())
    }

    pub(super) fn connect(&mut self) -> u64 {
        self.next_connection += 1;
        self.outgoing.insert(self.next_connection, Vec::new());
        self.next_connection
    }

    pub(super) fn disconnect(&mut self, connection: u64) {
        self.outgoing.remove(&connection);
        for session in self.sessions.values_mut() {
            session.bound.remove(&connection);
        }
    }

    pub(super) fn end(&mut self, ending: Ending) {
        if ending == Ending::Crash {
            let mut dice = self.dice.split();
            self.tree.medium.crash(&mut dice);
        }
        self.life += 1;
        self.tasks.clear();
        self.sessions.clear();
        self.outgoing.clear();
        self.rights = Rights::default();
        self.clients.restart();
        self.begin_grace();
        self.events.push(Event::Ended(ending));
    }

    pub(super) fn begin_grace(&mut self) {
        let grace = self.options.limits.grace;
        self.grace_until = (!grace.is_zero()).then(|| self.now() + grace);
        if self.grace_until.is_none() {
            self.clients.end_grace();
        }
    }

    /// Whether only what was held before a restart is given out.
    pub(super) fn is_in_grace(&mut self) -> bool {
        let is_over = self.grace_until.is_some_and(|until| {
            until <= self.now() || (self.options.quirks.lifts_grace && self.clients.are_complete())
        });
        if is_over {
            self.grace_until = None;
            self.clients.end_grace();
        }
        self.grace_until.is_some()
    }

    pub(super) fn begin_session(
        &mut self,
        client: u64,
        slots: u32,
        program: u32,
        connection: u64,
    ) -> SessionId {
        let number = self.next_session;
        self.next_session += 1;
        self.sessions
            .insert(number, Session::new(client, slots, program, connection));
        session_id(self.life, number)
    }

    /// The number of a session.
    pub(super) fn session(&self, id: SessionId) -> Option<u64> {
        let (life, number) = id.0.split_first_chunk::<8>()?;
        let number = u64::from_be_bytes(number.try_into().ok()?);
        let is_there = u64::from_be_bytes(*life) == self.life && self.sessions.contains_key(&number);
        is_there.then_some(number)
    }

    /// Ends all sessions of a client. What was asked for there is carried out, and answered to nobody.
    pub(super) fn drop_sessions(&mut self, client: u64) {
        self.sessions.retain(|_, session| session.client != client);
    }

    /// Ends leases that are over, unless what they stand for is kept until somebody wants it.
    pub(super) fn expire_silent(&mut self) {
        if self.options.quirks.keeps_expired {
            return;
        }
        for client in self.clients.silent(self.options.limits.lease, self.now()) {
            self.expire(client);
        }
    }

    /// Whether a client's lease is over, whether it has lost anything by that or not.
    pub(super) fn is_late(&self, client: u64) -> bool {
        let lease = self.options.limits.lease;
        self.clients
            .get(client)
            .is_some_and(|client| client.renewed + lease < self.now())
    }

    /// Whether a client's lease is over: then it loses what it has.
    pub(super) fn gives_way(&mut self, client: u64) -> bool {
        let silent = self.clients.silent(self.options.limits.lease, self.now());
        silent.contains(&client) && self.expire(client)
    }

    /// A client loses what it has, unless something of it is being carried out.
    pub(super) fn expire(&mut self, client: u64) -> bool {
        if self.tasks.iter().any(|task| task.client == client) {
            return false;
        }
        if let Some(of) = self.clients.get(client) {
            self.events.push(Event::Expired {
                client: of.owner.owner_id.clone(),
            });
        }
        if self.options.quirks.tells_of_loss {
            self.rights.revoke(client);
            self.clients.expire(client);
        } else {
            self.rights.forget(client);
            self.drop_sessions(client);
            self.clients.remove(client);
        }
        true
    }

    /// What the server says of a client's state with each SEQUENCE.
    pub(super) fn flags(&self, client: u64) -> u32 {
        if self.rights.has_revoked(client) {
            SequenceResult::EXPIRED_ALL_STATE_REVOKED
        } else {
            0
        }
    }
}

/// What a session is called.
pub(super) fn session_id(life: u64, number: u64) -> SessionId {
    let mut id = [0; 16];
    let (of_life, of_session) = id.split_at_mut(8);
    of_life.copy_from_slice(&life.to_be_bytes());
    of_session.copy_from_slice(&number.to_be_bytes());
    SessionId(id)
}
