//! What was asked for, parsed and resolved: all that one session after the other of an image is made from.

use std::error::Error;
use std::fmt;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::backend::Access;
use crate::lease::{Chain, ChainError, Incarnation, LeaseError, Lock, NotTaken, Owner, Record, Succession};

use super::bringup::Stop;
use super::error::IscsiError;
use super::login::LoginPlan;
use super::open::next_isid;
use super::pdu::Lun;
use super::scsi::reservation::ReservationKey;
use super::tail::Tail;
use super::unit::Unit;

/// An image on a target, as it was asked for.
#[derive(Debug)]
pub(super) struct Plan {
    /// Its URL, for messages.
    pub(super) name: String,
    /// Where the target listens, in the order in which that is tried.
    pub(super) portals: Vec<SocketAddr>,
    pub(super) lun: Lun,
    pub(super) login: Arc<LoginPlan>,
    pub(super) access: Access,
    pub(super) lock: Lock,
    pub(super) owner: Owner,
    /// What becomes of the generation when the lease is taken.
    pub(super) succession: Succession,
    /// Keys of this process.
    pub(super) keys: Arc<Keyring>,
    /// The record that an attempt to take the lease has begun to write; nobody may have been told that it was written.
    pub(super) begun: Mutex<Option<Record>>,
    /// Where records are kept, if the user has named a place.
    pub(super) chain: Option<Arc<Chain>>,
    /// Its user vouches for it that nobody writes the unit.
    pub(super) is_immutable: bool,
    /// The key of a process that has ended, and whose heir this one is.
    pub(super) takes_over: Option<ReservationKey>,
    /// The same of processes whose end was seen by whoever has started this one, under whatever keys of theirs.
    pub(super) reaped: Vec<Incarnation>,
    /// How long a request waits for the target before it fails; for ever if nothing is said.
    pub(super) report_after: Option<Duration>,
    /// How much is copied and kept because the target may forget it.
    pub(super) uncommitted_bytes_max: usize,
}

/// Where the records of a lease are.
pub(super) enum Records<'a> {
    /// In files that the user has named.
    Chain(&'a Chain),
    /// In the reserved tail of the unit.
    Tail(&'a Tail),
}

impl fmt::Display for Records<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Chain(chain) => chain.place().display().fmt(f),
            Self::Tail(_) => f.write_str("the reserved tail of the unit"),
        }
    }
}

impl Plan {
    /// Where the records of the unit's lease are, if there is a place for them.
    pub(super) fn records<'a>(&'a self, unit: &'a Unit) -> Option<Records<'a>> {
        match (&self.chain, &unit.tail) {
            (Some(chain), _) => Some(Records::Chain(chain)),
            (None, Some(tail)) => Some(Records::Tail(tail)),
            (None, None) => None,
        }
    }

    /// The plan of another session with the same unit, which has no part in its lease.
    pub(super) fn for_stranger(&self) -> Self {
        self.beside()
    }

    /// The plan of sessions that make records of the lease while the disk has none. They have its keys, from which it takes the
    /// reservation over, and end no session of another disk.
    pub(super) fn for_records(&self) -> Self {
        Self {
            keys: Arc::clone(&self.keys),
            chain: self.chain.clone(),
            ..self.beside()
        }
    }

    /// The same unit by a session for something else, without a lease.
    fn beside(&self) -> Self {
        let login = LoginPlan {
            isid: next_isid(&self.owner),
            ..LoginPlan::clone(&self.login)
        };
        Self {
            name: self.name.clone(),
            portals: self.portals.clone(),
            lun: self.lun,
            login: Arc::new(login),
            access: self.access,
            lock: Lock::None,
            owner: self.owner.clone(),
            succession: Succession::default(),
            keys: Arc::new(Keyring::of(self.owner.incarnation)),
            chain: None,
            is_immutable: self.is_immutable,
            takes_over: None,
            reaped: Vec::new(),
            report_after: self.report_after,
            uncommitted_bytes_max: self.uncommitted_bytes_max,
            begun: Mutex::default(),
        }
    }

    /// Whether `record` is one that an earlier attempt to take the lease has begun to write.
    pub(super) fn has_begun(&self, record: &Record) -> bool {
        self.begun.lock().unwrap_or_else(PoisonError::into_inner).as_ref() == Some(record)
    }

    /// What is to be written as `record`: the same that was begun for this step before. A connection that broke off may still
    /// deliver that, and then it must be no other.
    pub(super) fn begin(&self, record: Record) -> Record {
        let mut begun = self.begun.lock().unwrap_or_else(PoisonError::into_inner);
        match &*begun {
            Some(before) if before.epoch == record.epoch => before.clone(),
            _ => begun.insert(record).clone(),
        }
    }

    /// That the lease is not taken, and why.
    pub(super) fn not_taken(&self, why: NotTaken) -> Stop {
        match why {
            NotTaken::Overtaken(overtaken) => {
                let path = self.name.clone();
                Stop::Never(LeaseError::Overtaken { path, overtaken }.into())
            }
            NotTaken::Exhausted => self.unrecorded(ChainError::Exhausted),
        }
    }

    /// That who has the lease cannot be told, or not be written down, and why.
    pub(super) fn unrecorded(&self, source: impl Into<Box<dyn Error + Send + Sync>>) -> Stop {
        Stop::Never(IscsiError::Records {
            image: self.name.clone(),
            source: source.into(),
        })
    }
}

/// The reservation keys of one incarnation: 48 bits of it, and the number of the session below.
#[derive(Debug)]
pub(super) struct Keyring {
    prefix: u64,
    /// Those that the reservation may be under: a session that broke off may have got it, and nobody was told.
    tried: Mutex<Vec<ReservationKey>>,
}

/// Two images of one process have no key in common.
static NEXT: AtomicU16 = AtomicU16::new(1);

/// So many sessions may break off, one after the other, until the first of them is forgotten.
const TRIED_MAX: usize = 1 << 12;

impl Keyring {
    pub(super) fn of(incarnation: Incarnation) -> Self {
        let [a, b, c, d, e, f, ..] = incarnation.bytes();
        Self {
            prefix: u64::from_be_bytes([a, b, c, d, e, f, 0, 0]),
            tried: Mutex::default(),
        }
    }

    /// A key that was not used for the last 65,535 sessions of this process; never 0, which is no key.
    pub(super) fn next(&self) -> ReservationKey {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let number = if number == 0 {
            NEXT.fetch_add(1, Ordering::Relaxed)
        } else {
            number
        };
        let key = ReservationKey(self.prefix | u64::from(number));
        let mut tried = self.tried();
        if tried.len() == TRIED_MAX {
            tried.remove(0);
        }
        tried.push(key);
        key
    }

    /// Whether `key` is one of this incarnation.
    pub(super) fn contains(&self, key: ReservationKey) -> bool {
        key.0 & !0xffff == self.prefix
    }

    /// Whether a session of this image that broke off, or the last that did not, may have the reservation under `key`.
    pub(super) fn has_tried(&self, key: ReservationKey) -> bool {
        self.tried().contains(&key)
    }

    /// The reservation is that of `key`, and of no key before.
    pub(super) fn settle(&self, key: ReservationKey) {
        self.tried().retain(|tried| *tried == key);
    }

    fn tried(&self) -> MutexGuard<'_, Vec<ReservationKey>> {
        self.tried.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_session_has_a_key_of_its_own_that_tells_its_incarnation() {
        let ours = Keyring::of(Incarnation::of_this_process());
        let (first, second) = (ours.next(), ours.next());
        assert_ne!(first, second);
        assert!(ours.contains(first) && ours.contains(second));
        assert!(!ours.contains(ReservationKey(first.0 ^ 1 << 16)));
        let others = Keyring::of(Incarnation::of_this_process());
        assert!(ours.has_tried(first) && !others.has_tried(first));
        ours.settle(second);
        assert!(!ours.has_tried(first) && ours.has_tried(second));
        let rest: Vec<ReservationKey> = (0..70_000).map(|_| ours.next()).collect();
        assert!(rest.iter().all(|key| ours.contains(*key) && key.0 & 0xffff != 0));
    }
}
