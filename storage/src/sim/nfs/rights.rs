//! What clients have open and locked, and who may do what by that (RFC 8881, 8 and 9).

use std::collections::BTreeSet;

use crate::nfs::v4::{LockDenied, LockType, ShareAccess, StateOwner, Stateid, Status};

/// All opens and locks.
#[derive(Debug, Default)]
pub(super) struct Rights {
    pub(super) opens: Vec<OpenState>,
    pub(super) locks: Vec<LockState>,
    next: u64,
}

/// `share` and `deny` are 1 to read, 2 to write.
#[derive(Clone, Debug)]
pub(super) struct OpenState {
    id: u64,
    seqid: u32,
    pub(super) client: u64,
    owner: Vec<u8>,
    pub(super) file: u64,
    share: u32,
    deny: u32,
    pub(super) is_revoked: bool,
}

#[derive(Clone, Debug)]
pub(super) struct LockState {
    id: u64,
    seqid: u32,
    pub(super) client: u64,
    open: u64,
    owner: Vec<u8>,
    pub(super) file: u64,
    ranges: Vec<(u64, u64)>,
    pub(super) is_revoked: bool,
}

/// By which right something is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Right {
    /// Nobody's.
    Anonymous,
    /// That of an open.
    Open,
    /// That of a lock.
    Lock,
}

/// What an open is asked for with.
#[derive(Debug)]
pub(super) struct Wanted {
    pub(super) client: u64,
    pub(super) owner: Vec<u8>,
    pub(super) file: u64,
    pub(super) share: u32,
    pub(super) deny: u32,
}

/// Who is in the way.
#[derive(Debug)]
pub(super) struct Conflict {
    pub(super) client: u64,
}

const WRITE: u32 = ShareAccess::WRITE.0;

impl Rights {
    /// Whose opens are in the way of one, but for those of the same owner.
    pub(super) fn conflict(&self, wanted: &Wanted) -> Option<Conflict> {
        self.opens
            .iter()
            .find(|open| {
                open.file == wanted.file
                    && !open.is_revoked
                    && !(open.client == wanted.client && open.owner == wanted.owner)
                    && (open.deny & wanted.share != 0 || open.share & wanted.deny != 0)
            })
            .map(|open| Conflict { client: open.client })
    }

    /// Whether the same owner has the file open.
    pub(super) fn is_open(&self, wanted: &Wanted) -> bool {
        self.opens.iter().any(|open| {
            open.file == wanted.file
                && open.client == wanted.client
                && open.owner == wanted.owner
                && !open.is_revoked
        })
    }

    /// Opens a file, or adds to an open of the same owner.
    pub(super) fn open(&mut self, wanted: Wanted, life: u64) -> Stateid {
        let same = self.opens.iter_mut().find(|open| {
            open.file == wanted.file
                && open.client == wanted.client
                && open.owner == wanted.owner
                && !open.is_revoked
        });
        if let Some(open) = same {
            open.seqid += 1;
            open.share |= wanted.share;
            open.deny |= wanted.deny;
            return stateid(open.id, open.seqid, life);
        }
        self.next += 1;
        self.opens.push(OpenState {
            id: self.next,
            seqid: 1,
            client: wanted.client,
            owner: wanted.owner,
            file: wanted.file,
            share: wanted.share,
            deny: wanted.deny,
            is_revoked: false,
        });
        stateid(self.next, 1, life)
    }

    /// Locks a range under an open.
    pub(super) fn lock(
        &mut self,
        open: &Stateid,
        owner: &StateOwner,
        client: u64,
        (offset, length): (u64, u64),
        life: u64,
    ) -> Result<Stateid, Result<Status, LockDenied>> {
        let id = id_of(open, life).map_err(Ok)?;
        let open = self
            .opens
            .iter()
            .find(|open| open.id == id && open.client == client);
        let open = open.cloned().ok_or(Ok(Status::BAD_STATEID))?;
        if open.is_revoked {
            return Err(Ok(Status::EXPIRED));
        }
        let overlaps = |(from, len): &(u64, u64)| {
            *from < offset.saturating_add(length) && offset < from.saturating_add(*len)
        };
        let in_the_way = self.locks.iter().find(|lock| {
            lock.file == open.file
                && !lock.is_revoked
                && !(lock.client == client && lock.owner == owner.owner)
                && lock.ranges.iter().any(overlaps)
        });
        if let Some(other) = in_the_way {
            return Err(Err(LockDenied {
                offset,
                length,
                lock_type: LockType::Write,
                owner: StateOwner {
                    client_id: crate::nfs::v4::ClientId(other.client),
                    owner: other.owner.clone(),
                },
            }));
        }
        let same = self.locks.iter_mut().find(|lock| {
            lock.file == open.file
                && lock.client == client
                && lock.owner == owner.owner
                && lock.open == open.id
                && !lock.is_revoked
        });
        if let Some(lock) = same {
            lock.seqid += 1;
            lock.ranges.push((offset, length));
            return Ok(stateid(lock.id, lock.seqid, life));
        }
        self.next += 1;
        self.locks.push(LockState {
            id: self.next,
            seqid: 1,
            client,
            open: open.id,
            owner: owner.owner.clone(),
            file: open.file,
            ranges: vec![(offset, length)],
            is_revoked: false,
        });
        Ok(stateid(self.next, 1, life))
    }

    /// Whose lock is in the way of one by `client`.
    pub(super) fn lock_holder(&self, file: u64, client: u64) -> Option<u64> {
        let other = self
            .locks
            .iter()
            .find(|lock| lock.file == file && lock.client != client && !lock.is_revoked);
        other.map(|lock| lock.client)
    }

    /// Gives locks back.
    pub(super) fn unlock(&mut self, lock: &Stateid, client: u64, life: u64) -> Result<Stateid, Status> {
        let id = id_of(lock, life)?;
        let lock = self
            .locks
            .iter_mut()
            .find(|lock| lock.id == id && lock.client == client);
        let lock = lock.ok_or(Status::BAD_STATEID)?;
        if lock.is_revoked {
            return Err(Status::EXPIRED);
        }
        lock.ranges.clear();
        lock.seqid += 1;
        Ok(stateid(lock.id, lock.seqid, life))
    }

    /// Gives an open back, and the locks under it.
    pub(super) fn close(&mut self, open: &Stateid, client: u64, life: u64) -> Result<(), Status> {
        let id = id_of(open, life)?;
        let found = self
            .opens
            .iter()
            .position(|open| open.id == id && open.client == client);
        let place = found.ok_or(Status::BAD_STATEID)?;
        if self.opens.get(place).is_some_and(|open| open.is_revoked) {
            return Err(Status::EXPIRED);
        }
        self.opens.remove(place);
        self.locks.retain(|lock| lock.open != id);
        Ok(())
    }

    /// Forgets a lock without ranges, or whatever was revoked.
    pub(super) fn free(&mut self, state: &Stateid, client: u64, life: u64) -> Result<(), Status> {
        let id = id_of(state, life)?;
        let open = self
            .opens
            .iter()
            .position(|open| open.id == id && open.client == client);
        if let Some(place) = open {
            if !self.opens.get(place).is_some_and(|open| open.is_revoked) {
                return Err(Status::LOCKS_HELD);
            }
            self.opens.remove(place);
            return Ok(());
        }
        let lock = self
            .locks
            .iter()
            .position(|lock| lock.id == id && lock.client == client);
        let place = lock.ok_or(Status::BAD_STATEID)?;
        let is_free = |lock: &LockState| lock.is_revoked || lock.ranges.is_empty();
        if !self.locks.get(place).is_some_and(is_free) {
            return Err(Status::LOCKS_HELD);
        }
        self.locks.remove(place);
        Ok(())
    }

    /// What is the matter with a state.
    pub(super) fn test(&self, state: &Stateid, client: u64, life: u64) -> Status {
        match self.look(state, client, life) {
            Ok(_) => Status::OK,
            Err(status) => status,
        }
    }

    /// The file of a state, whether it may be written by that, and what kind of right it is.
    fn look(&self, state: &Stateid, client: u64, life: u64) -> Result<(u64, u32, Right), Status> {
        let id = id_of(state, life)?;
        let of_open = |id: u64| {
            self.opens
                .iter()
                .find(|open| open.id == id && open.client == client)
        };
        let (found, seqid, is_revoked) = if let Some(open) = of_open(id) {
            ((open.file, open.share, Right::Open), open.seqid, open.is_revoked)
        } else {
            let lock = self
                .locks
                .iter()
                .find(|lock| lock.id == id && lock.client == client);
            let lock = lock.ok_or(Status::BAD_STATEID)?;
            let share = of_open(lock.open).map_or(0, |open| open.share);
            ((lock.file, share, Right::Lock), lock.seqid, lock.is_revoked)
        };
        match state.seqid {
            _ if is_revoked => Err(Status::EXPIRED),
            given if given != 0 && given < seqid => Err(Status::OLD_STATEID),
            given if given > seqid => Err(Status::BAD_STATEID),
            _ => Ok(found),
        }
    }

    /// By which right `client` reads or writes `file`.
    pub(super) fn admit(
        &self,
        state: &Stateid,
        client: u64,
        file: u64,
        share: u32,
        life: u64,
    ) -> Result<Right, Status> {
        if [Stateid::ANONYMOUS, Stateid::READ_BYPASS].contains(state) {
            let is_denied =
                |open: &&OpenState| open.file == file && !open.is_revoked && open.deny & share != 0;
            return match self.opens.iter().find(is_denied) {
                Some(_) => Err(Status::LOCKED),
                None => Ok(Right::Anonymous),
            };
        }
        let (of, granted, right) = self.look(state, client, life)?;
        if of != file {
            return Err(Status::BAD_STATEID);
        }
        // Whoever may write may read.
        if granted & share == 0 && granted & WRITE == 0 {
            return Err(Status::OPENMODE);
        }
        Ok(right)
    }

    /// Takes everything from a client.
    pub(super) fn forget(&mut self, client: u64) {
        self.opens.retain(|open| open.client != client);
        self.locks.retain(|lock| lock.client != client);
    }

    /// The same, but the states are kept as what they are now.
    pub(super) fn revoke(&mut self, client: u64) {
        for open in self.opens.iter_mut().filter(|open| open.client == client) {
            open.is_revoked = true;
        }
        for lock in self.locks.iter_mut().filter(|lock| lock.client == client) {
            lock.is_revoked = true;
        }
    }

    /// Whether a client has something that was revoked.
    pub(super) fn has_revoked(&self, client: u64) -> bool {
        let opens = self
            .opens
            .iter()
            .any(|open| open.client == client && open.is_revoked);
        opens
            || self
                .locks
                .iter()
                .any(|lock| lock.client == client && lock.is_revoked)
    }

    /// Whether a client has anything.
    pub(super) fn has_any(&self, client: u64) -> bool {
        self.opens.iter().any(|open| open.client == client)
            || self.locks.iter().any(|lock| lock.client == client)
    }

    /// Gives the locks of `client` to another owner of the same client: the hand-over.
    pub(super) fn hand_over(&mut self, client: u64, owner: &[u8]) {
        for lock in self.locks.iter_mut().filter(|lock| lock.client == client) {
            self.next += 1;
            (lock.id, lock.seqid) = (self.next, 1);
            lock.owner = owner.to_vec();
        }
    }

    /// Who has a file locked.
    pub(super) fn lockers(&self, file: u64) -> BTreeSet<u64> {
        let locks = self
            .locks
            .iter()
            .filter(|lock| lock.file == file && !lock.is_revoked);
        locks.map(|lock| lock.client).collect()
    }
}

fn stateid(id: u64, seqid: u32, life: u64) -> Stateid {
    let mut other = [0; 12];
    let (of_life, of_id) = other.split_at_mut(4);
    of_life.copy_from_slice(&low(life + 1).to_be_bytes());
    of_id.copy_from_slice(&id.to_be_bytes());
    Stateid { seqid, other }
}

fn id_of(stateid: &Stateid, life: u64) -> Result<u64, Status> {
    let [a, b, c, d, id @ ..] = stateid.other;
    if u32::from_be_bytes([a, b, c, d]) != low(life + 1) {
        return Err(Status::STALE_STATEID);
    }
    Ok(u64::from_be_bytes(id))
}

fn low(life: u64) -> u32 {
    u32::try_from(life).expect("a server does not live so often")
}
