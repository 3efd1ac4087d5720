//! Who is at the other end of a session.

use super::options::Registrant;

/// An I_T nexus: one session of one initiator port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Nexus {
    /// Counts the sessions of a target, over all its lives.
    pub session: u64,
    /// The initiator's iSCSI name.
    pub initiator: String,
    /// Its part of the session's name.
    pub isid: [u8; 6],
}

/// To whom a registration belongs.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Identity {
    Session(u64),
    Port(String, [u8; 6]),
}

impl Nexus {
    /// Whom the nexus is taken for.
    pub(super) fn identity(&self, registrant: Registrant) -> Identity {
        match registrant {
            Registrant::Session => Identity::Session(self.session),
            Registrant::Port => Identity::Port(self.initiator.clone(), self.isid),
        }
    }
}
