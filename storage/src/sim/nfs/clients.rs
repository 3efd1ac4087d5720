//! The clients of a simulated server, and what it remembers of them when it is started anew (RFC 8881, 8.4.2 and 18.35).

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use crate::nfs::v4::{ClientOwner, CreateSessionResult, Status};

/// All clients of one life of a server.
#[derive(Debug, Default)]
pub(super) struct Clients {
    clients: BTreeMap<u64, Client>,
    next: u64,
    /// On the medium: who may claim after the next restart what it has.
    stable: BTreeSet<Vec<u8>>,
    /// Who may claim what it had before the last one.
    claimants: BTreeSet<Vec<u8>>,
}

#[derive(Debug)]
pub(super) struct Client {
    pub(super) owner: ClientOwner,
    pub(super) is_confirmed: bool,
    /// That of the next CREATE_SESSION, and what the last was answered.
    pub(super) sequence_id: u32,
    pub(super) last: Option<CreateSessionResult>,
    pub(super) renewed: Instant,
    /// It has said that it claims nothing more.
    pub(super) is_complete: bool,
    /// Its lease is over, and it does not know that yet.
    pub(super) is_expired: bool,
}

/// What an EXCHANGE_ID has come to.
#[derive(Debug)]
pub(super) struct Exchanged {
    pub(super) client: u64,
    pub(super) sequence_id: u32,
    pub(super) is_confirmed: bool,
}

impl Clients {
    /// Makes a client known, or finds it.
    pub(super) fn exchange(&mut self, owner: &ClientOwner, life: u64, now: Instant) -> Exchanged {
        let same = |client: &Client| client.owner.owner_id == owner.owner_id;
        let confirmed = self.clients.iter().find(|(_, client)| {
            same(client) && client.is_confirmed && client.owner.verifier == owner.verifier
        });
        if let Some((id, client)) = confirmed {
            return Exchanged {
                client: *id,
                sequence_id: client.sequence_id,
                is_confirmed: true,
            };
        }
        self.clients
            .retain(|_, client| client.is_confirmed || !same(client));
        self.next += 1;
        let id = (life + 1) << 32 | self.next;
        let client = Client {
            owner: owner.clone(),
            is_confirmed: false,
            sequence_id: 1,
            last: None,
            renewed: now,
            is_complete: false,
            is_expired: false,
        };
        self.clients.insert(id, client);
        Exchanged {
            client: id,
            sequence_id: 1,
            is_confirmed: false,
        }
    }

    /// Confirms a client by its first session; an earlier life of it is over by that.
    pub(super) fn confirm(&mut self, id: u64) -> Option<u64> {
        let owner = self.clients.get(&id)?.owner.owner_id.clone();
        let before = self
            .clients
            .iter()
            .find(|(other, client)| **other != id && client.owner.owner_id == owner);
        let before = before.map(|(other, _)| *other);
        if let Some(before) = before {
            self.clients.remove(&before);
            // What an earlier life had is nothing that this one may claim.
            self.stable.remove(&owner);
        }
        let client = self.clients.get_mut(&id)?;
        client.is_confirmed = true;
        before
    }

    pub(super) fn get(&self, id: u64) -> Option<&Client> {
        self.clients.get(&id)
    }

    pub(super) fn get_mut(&mut self, id: u64) -> Option<&mut Client> {
        self.clients.get_mut(&id)
    }

    /// A client gives a sign of life.
    pub(super) fn renew(&mut self, id: u64, now: Instant) {
        if let Some(client) = self.clients.get_mut(&id) {
            client.renewed = now;
        }
    }

    /// Who was silent for too long, but for those who have been told.
    pub(super) fn silent(&self, lease: Duration, now: Instant) -> Vec<u64> {
        let is_silent = |client: &Client| !client.is_expired && now > client.renewed + lease;
        let silent = self.clients.iter().filter(|(_, client)| is_silent(client));
        silent.map(|(id, _)| *id).collect()
    }

    /// Forgets a client.
    pub(super) fn remove(&mut self, id: u64) {
        if let Some(client) = self.clients.remove(&id) {
            self.stable.remove(&client.owner.owner_id);
        }
    }

    /// It has lost what it had.
    pub(super) fn expire(&mut self, id: u64) {
        if let Some(client) = self.clients.get_mut(&id) {
            client.is_expired = true;
            self.stable.remove(&client.owner.owner_id);
        }
    }

    /// It has something that it may claim after a restart.
    pub(super) fn remember(&mut self, id: u64) {
        if let Some(client) = self.clients.get_mut(&id) {
            client.is_expired = false;
            self.stable.insert(client.owner.owner_id.clone());
        }
    }

    /// Whether a client may claim what it had.
    pub(super) fn may_claim(&self, id: u64) -> Result<(), Status> {
        let client = self.clients.get(&id).ok_or(Status::STALE_CLIENTID)?;
        let is_claimant = self.claimants.contains(&client.owner.owner_id) && !client.is_complete;
        is_claimant.then_some(()).ok_or(Status::NO_GRACE)
    }

    /// It claims nothing more.
    pub(super) fn complete(&mut self, id: u64) -> Result<(), Status> {
        let client = self.clients.get_mut(&id).ok_or(Status::STALE_CLIENTID)?;
        if std::mem::replace(&mut client.is_complete, true) {
            return Err(Status::COMPLETE_ALREADY);
        }
        self.claimants.remove(&client.owner.owner_id);
        Ok(())
    }

    /// Whether all have come back.
    pub(super) fn are_complete(&self) -> bool {
        self.claimants.is_empty()
    }

    /// Nobody may claim anything more: who has not come back has lost it.
    pub(super) fn end_grace(&mut self) {
        for claimant in std::mem::take(&mut self.claimants) {
            let is_back = |client: &Client| client.is_confirmed && client.owner.owner_id == claimant;
            if !self.clients.values().any(is_back) {
                self.stable.remove(&claimant);
            }
        }
    }

    /// The server is started anew.
    pub(super) fn restart(&mut self) {
        self.clients.clear();
        self.claimants = self.stable.clone();
    }

    /// Clients whose names begin like that.
    pub(super) fn called(&self, prefix: &[u8]) -> Vec<u64> {
        let called = self.clients.iter();
        let called = called.filter(|(_, client)| client.owner.owner_id.starts_with(prefix));
        called.map(|(id, _)| *id).collect()
    }
}
