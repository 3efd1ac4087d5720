//! A simulated iSCSI target: it speaks RFC 7143 in bytes, and does the worst that targets do.
//!
//! Its logical units are files of a [`Medium`] behind a write-back cache. What an initiator may
//! do, it is held to: what it did wrong is told by [`Target::complaints`]. What was written, by
//! whom, and whether the reservation allowed it, [`Target::events`] tells.

mod cdb;
mod connection;
mod description;
mod frame;
mod hostile;
mod login;
mod lun;
mod negotiation;
mod nexus;
pub mod options;
mod outbox;
mod peer;
mod plan;
mod refusal;
mod reservation;

mod session;
mod task;
mod transfer;

use std::cell::{RefCell, RefMut};
use std::collections::BTreeMap;
use std::rc::Rc;

pub use self::connection::Connection;
pub use self::lun::BLOCK_BYTES;
use self::lun::LogicalUnit;
pub use self::nexus::Nexus;
use self::options::Options;
pub use self::peer::TargetPeer;
use self::refusal::Attention;
use self::task::Task;
use crate::backend::Access;
use crate::reactor::FileSlot;
use crate::sim::dice::Dice;
use crate::sim::medium::Medium;

/// A target; a clone is the same one.
#[derive(Clone, Debug)]
pub struct Target(Rc<RefCell<State>>);

/// What all connections share.
#[derive(Debug)]
struct State {
    options: Options,
    dice: Dice,
    medium: Medium,
    units: BTreeMap<u16, LogicalUnit>,
    sessions: BTreeMap<u64, Rc<Nexus>>,
    next_session: u64,
    /// Commands that have arrived whole, in the order in which they did.
    tasks: BTreeMap<u64, Task>,
    next_arrival: u64,
    /// Counts the target's processes: a connection belongs to one.
    life: u64,
    redirect: Option<Redirect>,
    events: Vec<Event>,
    complaints: Vec<String>,
}

/// What a login is answered with instead of a session (RFC 7143, 11.13.5).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Redirect {
    /// Where to: `address:port[,group]`.
    pub address: String,
    /// For how long.
    pub term: Term,
}

/// For how long a target has moved.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Term {
    /// The next login may come here again.
    Temporarily,
    /// It may not.
    Permanently,
}

/// Something that has happened to a logical unit, for judges; in the order in which it did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// A command, or a part of it, has changed bytes.
    Executed(Execution),
    /// A PERSISTENT RESERVE OUT was obeyed; afterwards it was so.
    Reserved {
        /// Whose it was.
        nexus: Rc<Nexus>,
        /// Where.
        lun: u16,
        /// Who is registered.
        keys: Vec<u64>,
        /// The key of the holder (0 if all registrants are) and the type, if it is reserved.
        held: Option<(u64, u8)>,
    },
    /// A LOGICAL UNIT RESET was carried out: no command that arrived before is, after it.
    Reset {
        /// Whose it was.
        nexus: Rc<Nexus>,
        /// Where.
        lun: u16,
    },
    /// The target's host lost what was not synced, or its process only was started anew.
    Ended(Ending),
}

/// How a life of a target ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// What was not synced is lost, or some of it.
    Crash,
    /// What was written is there.
    Restart,
}

/// A change of bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Execution {
    /// Whose it was. Its session may be over.
    pub nexus: Rc<Nexus>,
    /// The command.
    pub initiator_task_tag: u32,
    /// Where.
    pub lun: u16,
    /// Where there.
    pub offset_bytes: u64,
    /// How much.
    pub len_bytes: u64,
    /// What is there now.
    pub written: Written,
    /// Whether a WRITE by the nexus would have been let in at that moment. If not, it was let in before the reservation
    /// changed, or was one of the commands that the target does not fence.
    pub allowed: bool,
}

/// What a command leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    /// What came with it.
    Bytes,
    /// Zeros.
    Zeros,
}

impl Target {
    /// A target without logical units.
    pub fn new(options: Options, dice: Dice) -> Self {
        Self(Rc::new(RefCell::new(State {
            options,
            dice,
            medium: Medium::default(),
            units: BTreeMap::new(),
            sessions: BTreeMap::new(),
            next_session: 1,
            tasks: BTreeMap::new(),
            next_arrival: 0,
            life: 0,
            redirect: None,
            events: Vec::new(),
            complaints: Vec::new(),
        })))
    }

    /// Adds a logical unit of zeros.
    ///
    /// # Panics
    ///
    /// When the number is taken or above 16383, or the size is no positive number of blocks.
    pub fn add(&self, lun: u16, size_bytes: u64, access: Access) {
        assert!(lun < 1 << 14, "no logical unit can have the number {lun}");
        assert!(
            size_bytes > 0 && size_bytes.is_multiple_of(BLOCK_BYTES),
            "{size_bytes} bytes are no blocks"
        );
        let mut state = self.state();
        let file = FileSlot(u32::try_from(state.units.len()).expect("there are few logical units"));
        state.medium.add(&[]);
        state.medium.extend(file, size_bytes);
        let unit = LogicalUnit::new(lun, file, size_bytes, access, state.options.quirks);
        let taken = state.units.insert(lun, unit);
        assert!(taken.is_none(), "logical unit {lun} is there twice");
    }

    /// Puts bytes on the medium, past all commands and the cache.
    pub fn fill(&self, lun: u16, offset_bytes: u64, bytes: &[u8]) {
        let state = self.state();
        let file = state.unit(lun).file;
        let author = state.medium.begin();
        state
            .medium
            .change(file, |file| file.write(offset_bytes, bytes, author));
        state.medium.end(author);
        let horizon = state.medium.horizon();
        state.medium.sync(file, &horizon);
    }

    /// Makes a logical unit longer, and tells all sessions so.
    pub fn grow(&self, lun: u16, size_bytes: u64) {
        let mut state = self.state();
        let sessions: Vec<u64> = state.sessions.keys().copied().collect();
        let file = state.unit(lun).file;
        state.medium.extend(file, size_bytes);
        let unit = state.units.get_mut(&lun).expect("the unit was just there");
        unit.size_bytes = unit.size_bytes.max(size_bytes);
        for session in sessions {
            unit.alarm(session, Attention::CapacityChanged);
        }
    }

    /// A new connection; bytes are all that goes through it.
    pub fn connect(&self) -> Connection {
        let mut state = self.state();
        let dice = state.dice.split();
        Connection::new(self.clone(), state.life, dice)
    }

    /// The host of the target loses power: what was not synced is lost, or some of it, and so are sessions,
    /// registrations and reservations.
    pub fn crash(&self) {
        let mut state = self.state();
        let mut dice = state.dice.split();
        state.medium.crash(&mut dice);
        state.end(Ending::Crash);
    }

    /// The target's process is killed and started anew: as [`Self::crash`], but what was written is still there.
    pub fn restart(&self) {
        self.state().end(Ending::Restart);
    }

    /// Another initiator, of which nothing else is known, resets a logical unit.
    pub fn reset(&self, lun: u16) {
        let stranger = Rc::new(Nexus {
            session: 0,
            initiator: "iqn.2026-01.test:stranger".to_owned(),
            isid: [0; 6],
        });
        self.state().reset(&stranger, Some(lun));
    }

    /// Where logins are sent from now on.
    pub fn redirect(&self, redirect: Option<Redirect>) {
        self.state().redirect = redirect;
    }

    /// Changes the options. What was negotiated stays, and quirks of reservations wait for the next life.
    pub fn adjust(&self, change: impl FnOnce(&mut Options)) {
        change(&mut self.state().options);
    }

    /// Carries commands on, also those of sessions that are over, though nobody looks.
    pub fn advance(&self) {
        self.state().advance();
    }

    /// Whether a command is not carried out yet, or only in part.
    pub fn is_working(&self) -> bool {
        self.state().is_working()
    }

    /// What a reader would find in a logical unit.
    pub fn content(&self, lun: u16) -> Vec<u8> {
        let state = self.state();
        let unit = state.unit(lun);
        state.medium.read(unit.file, 0, unit.size_bytes)
    }

    /// What a reader would find if all was lost that is not surely on the medium.
    pub fn durable(&self, lun: u16) -> Vec<u8> {
        let state = self.state();
        let unit = state.unit(lun);
        let mut content = Vec::new();
        state
            .medium
            .change(unit.file, |file| content = file.read_synced(unit.size_bytes));
        content
    }

    /// The registered keys, in the order of registration.
    pub fn keys(&self, lun: u16) -> Vec<u64> {
        self.state().unit(lun).reservations.keys()
    }

    /// The key of the holder (0 if all registrants are) and the type, if a logical unit is reserved.
    pub fn held(&self, lun: u16) -> Option<(u64, u8)> {
        self.state().unit(lun).reservations.held()
    }

    /// Who has a session.
    pub fn sessions(&self) -> Vec<Rc<Nexus>> {
        self.state().sessions.values().cloned().collect()
    }

    /// What has happened since the last call.
    pub fn events(&self) -> Vec<Event> {
        std::mem::take(&mut self.state().events)
    }

    /// What initiators did against RFC 7143 since the last call, in words.
    pub fn complaints(&self) -> Vec<String> {
        std::mem::take(&mut self.state().complaints)
    }

    fn state(&self) -> RefMut<'_, State> {
        self.0.borrow_mut()
    }
}

impl State {
    fn unit(&self, lun: u16) -> &LogicalUnit {
        self.units.get(&lun).expect("the logical unit was added")
    }

    fn end(&mut self, ending: Ending) {
        self.life += 1;
        self.tasks.clear();
        self.sessions.clear();
        let quirks = self.options.quirks;
        for unit in self.units.values_mut() {
            unit.power_on(quirks);
        }
        self.events.push(Event::Ended(ending));
    }

    /// Begins a session; an old one with the same name may be over by that.
    fn begin_session(&mut self, initiator: &str, isid: [u8; 6]) -> Rc<Nexus> {
        let quirks = self.options.quirks;
        if quirks.reinstates {
            let is_same = |nexus: &Nexus| nexus.initiator == initiator && nexus.isid == isid;
            let same = self.sessions.values().filter(|nexus| is_same(nexus));
            let same: Vec<u64> = same.map(|nexus| nexus.session).collect();
            for session in same {
                // Its commands are terminated, whatever happens to those of a lost connection (RFC 7143, 6.3.5).
                self.tasks.retain(|_, task| task.nexus.session != session);
                self.end_session(session);
            }
        }
        let nexus = Rc::new(Nexus {
            session: self.next_session,
            initiator: initiator.to_owned(),
            isid,
        });
        self.next_session += 1;
        self.sessions.insert(nexus.session, Rc::clone(&nexus));
        if quirks.alarms_login {
            for unit in self.units.values_mut() {
                unit.alarm(nexus.session, Attention::PowerOn);
            }
        }
        nexus
    }

    fn end_session(&mut self, session: u64) {
        self.sessions.remove(&session);
        if !self.options.quirks.tasks_outlive_session {
            self.tasks.retain(|_, task| task.nexus.session != session);
        }
        for unit in self.units.values_mut() {
            unit.forget(session);
        }
    }
}
