//! What was asked for, parsed and resolved: all that one session after the other of an image is made from.

use std::collections::BTreeSet;
use std::fmt;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::backend::Access;
use crate::lease::{Chain, Incarnation, Lock, Owner};

use super::login::LoginPlan;
use super::pdu::{Isid, Lun};
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
    /// Keys of this process.
    pub(super) keys: Keyring,
    /// Where records are kept, if the user has named a place.
    pub(super) chain: Option<Chain>,
    /// Its user vouches for it that nobody writes the unit.
    pub(super) is_immutable: bool,
    /// The key of a process that has ended, and whose heir this one is.
    pub(super) takes_over: Option<ReservationKey>,
    /// How long a request waits for the target before it fails; for ever if nothing is said.
    pub(super) report_after: Option<Duration>,
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
        let Isid([kind, a, b, c, d, e]) = self.login.isid;
        let login = LoginPlan {
            isid: Isid([kind, a, b, c, d, !e]),
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
            keys: self.keys.clone(),
            chain: None,
            is_immutable: self.is_immutable,
            takes_over: None,
            report_after: self.report_after,
        }
    }

    /// The keys of another owner.
    pub(super) fn keys_of(&self, owner: &Owner) -> Keyring {
        Keyring::of(owner.incarnation)
    }
}

/// The reservation keys of one incarnation: 48 bits of it, and the number of the session below.
#[derive(Clone, Debug)]
pub(super) struct Keyring {
    prefix: u64,
    /// Keys of sessions that have begun and of which it is not known how far they came.
    tried: Arc<Mutex<BTreeSet<ReservationKey>>>,
}

/// The number of the next key of this process: two images never have the same.
static NEXT: AtomicU16 = AtomicU16::new(1);

impl Keyring {
    pub(super) fn of(incarnation: Incarnation) -> Self {
        let [a, b, c, d, e, f, ..] = incarnation.bytes();
        Self {
            prefix: u64::from_be_bytes([a, b, c, d, e, f, 0, 0]),
            tried: Arc::default(),
        }
    }

    /// A key that was not used for the last 65,535 sessions; never 0, which is no key.
    pub(super) fn next(&self) -> ReservationKey {
        let number = match NEXT.fetch_add(1, Ordering::Relaxed) {
            0 => NEXT.fetch_add(1, Ordering::Relaxed),
            number => number,
        };
        let key = ReservationKey(self.prefix | u64::from(number));
        self.tried().insert(key);
        key
    }

    /// Whether `key` was one of [`Self::next`] since [`Self::settled`]: if it has a reservation, that is of a session of ours which
    /// broke off before it could say so.
    pub(super) fn has_tried(&self, key: ReservationKey) -> bool {
        self.tried().contains(&key)
    }

    /// A session is up, and has ended whatever earlier ones had.
    pub(super) fn settled(&self) {
        self.tried().clear();
    }

    fn tried(&self) -> MutexGuard<'_, BTreeSet<ReservationKey>> {
        self.tried.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether `key` is one of these.
    pub(super) fn contains(&self, key: ReservationKey) -> bool {
        key.0 & !0xffff == self.prefix
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
        let rest: Vec<ReservationKey> = (0..70_000).map(|_| ours.next()).collect();
        assert!(rest.iter().all(|key| ours.contains(*key) && key.0 & 0xffff != 0));
    }

    #[test]
    fn a_key_that_was_tried_is_known_again_until_a_session_is_up_and_only_by_its_image() {
        let (ours, other) = (
            Keyring::of(Incarnation::of_this_process()),
            Keyring::of(Incarnation::of_this_process()),
        );
        let key = ours.next();
        assert!(ours.has_tried(key) && !other.has_tried(key));
        assert_ne!(key, other.next());
        ours.settled();
        assert!(!ours.has_tried(key));
    }
}
