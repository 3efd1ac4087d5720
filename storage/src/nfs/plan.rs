//! What was asked for, parsed and resolved: all that one session after the other of an image is made from.

use std::error::Error;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::backend::Access;
use crate::lease::{Chain, ChainError, LeaseError, Lock, NotTaken, Owner, Record, Succession};

use super::bringup::Stop;
use super::error::NfsError;
use super::rpc::Credential;
use super::url::{Path, Version};
use super::v4::{ClientId, Name, StateOwner, Verifier};

/// A file on a server, as it was asked for.
#[derive(Debug)]
pub(super) struct Plan {
    /// Its URL, for messages.
    pub(super) name: String,
    /// Where the server listens, in the order in which that is tried.
    pub(super) servers: Vec<SocketAddr>,
    pub(super) path: Path,
    /// Only this version, if one was said.
    pub(super) version: Option<Version>,
    /// As whom.
    pub(super) user: User,
    pub(super) credential: Arc<Credential>,
    /// Which client this is to the server: one for each image of each process.
    pub(super) client: Vec<u8>,
    pub(super) access: Access,
    pub(super) lock: Lock,
    pub(super) owner: Owner,
    /// What becomes of the generation when the lease is taken.
    pub(super) succession: Succession,
    /// Where records are kept, if the user has named a place.
    pub(super) chain: Option<Chain>,
    /// How long a request waits for the server before it fails; for ever if nothing is said.
    pub(super) report_after: Option<Duration>,
    /// How much is copied and kept because the server may forget it.
    pub(super) uncommitted_bytes_max: usize,
}

/// A user by numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct User {
    pub(super) uid: u32,
    pub(super) gid: u32,
}

impl Plan {
    /// Who opens and locks. The name of a client says the incarnation, and which of its images.
    pub(super) fn state_owner(&self, client_id: ClientId) -> StateOwner {
        StateOwner {
            client_id,
            owner: self.client.clone(),
        }
    }

    /// The verifier by which the record of this step is made: the same however often it is tried.
    pub(super) fn verifier_of(&self, record: &Record) -> Verifier {
        let [a, b, c, d, e, f, g, h, ..] = self.owner.incarnation.bytes();
        let life = u64::from_be_bytes([a, b, c, d, e, f, g, h]);
        Verifier((life ^ record.epoch).to_be_bytes())
    }

    /// The name of the record with this number, beside the image.
    pub(super) fn record_name(&self, number: u64) -> Result<Name, Stop> {
        let name = [self.record_prefix().as_slice(), number.to_string().as_bytes()].concat();
        Name::new(name)
            .ok_or_else(|| self.unrecorded("the name of a record would be longer than a name may be"))
    }

    /// What the names of records have before their numbers.
    pub(super) fn record_prefix(&self) -> Vec<u8> {
        let (file, _) = self.path.file_and_directories();
        [file.bytes(), b".lease."].concat()
    }

    /// That this user may not do something.
    pub(super) fn denied(&self, action: &'static str, name: String) -> Stop {
        Stop::Never(NfsError::Denied {
            action,
            name,
            uid: self.user.uid,
            gid: self.user.gid,
        })
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
        Stop::Never(NfsError::Records {
            image: self.name.clone(),
            source: source.into(),
        })
    }
}
