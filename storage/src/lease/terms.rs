//! On what terms an image is opened.

use std::time::Duration;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{NotTaken, Offer, Overtaken, Owner, Record, Role};

/// How an image is kept from being changed by two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Lock {
    /// Nobody else may use the image: for a drive that writes, and its default.
    Exclusive,
    /// Others may read the image too, and nobody may write it: for a read-only drive, and its default.
    Shared,
    /// Nothing is locked and nothing is checked: whoever asks for this answers for the image.
    None,
}

/// What a guest sees of a server that does not answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OnError {
    /// Nothing but time: its requests wait until the server is back.
    #[default]
    Wait,
    /// An error, for each request that has waited too long.
    Report,
}

/// What is asked of an image of a network, beyond its URL. Nothing of it is looked at for a file or a block device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct NetworkTerms {
    /// What becomes of requests while the server does not answer.
    pub on_error: OnError,
    /// How long a request waits before it is reported; there is a limit under [`OnError::Report`] only.
    pub timeout: Option<Duration>,
    /// The key by which a process held the lease that has ended for certain: the lease may be taken from it.
    pub takes_over: Option<u64>,
}

/// How an owner goes on with the generation of an image, which tells whether it has been written since it was looked at.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Succession {
    /// The generation is raised when the lease is taken: the owner may write at once.
    #[default]
    Raises,
    /// The image is taken only if it is still of this generation, which it keeps for now. Nothing may be written before the
    /// generation is raised ([`crate::open::Hold::begin_raise`], [`crate::request::Operation::Raise`]). Whoever only reads makes
    /// no record of it: the image keeps its generation for as long as readers have it.
    Keeps(u64),
    /// The image is taken over from an owner who is still there, has offered it, and stands still. The generation is kept and
    /// raised likewise; by the raise its new owner *starts*, and the old one cannot have it back.
    TakesOver(Offer),
}

impl Succession {
    /// Says whether an owner may go on with an image whose newest record is `last`.
    pub(crate) fn check(self, last: Option<&Record>) -> Result<(), NotTaken> {
        match self {
            Self::Keeps(expected) if last.is_none_or(|last| last.generation != expected) => {
                Err(NotTaken::Overtaken(Box::new(Overtaken {
                    expected,
                    newest: last.cloned(),
                })))
            }
            // What is offered is checked where it is taken.
            Self::Keeps(_) | Self::TakesOver(_) | Self::Raises => Ok(()),
        }
    }
}

/// On what terms an image is opened.
#[derive(Clone, Copy, Debug)]
pub struct Terms<'a> {
    /// What is locked.
    pub lock: Lock,
    /// What the records are named after, if not after the image.
    pub at: Option<&'a str>,
    /// Who asks.
    pub owner: &'a Owner,
    /// What becomes of the generation.
    pub succession: Succession,
    /// What is asked of an image of a network.
    pub network: NetworkTerms,
}

impl<'a> Terms<'a> {
    /// The terms of `owner`, with the records beside the image, and a server waited for.
    pub fn new(lock: Lock, owner: &'a Owner) -> Self {
        Self {
            lock,
            at: None,
            owner,
            succession: Succession::default(),
            network: NetworkTerms::default(),
        }
    }

    /// The part that the owner wants to play, or `None` if it wants no lease.
    pub(crate) fn role(&self) -> Option<Role> {
        match self.lock {
            Lock::Exclusive => Some(Role::Writer),
            Lock::Shared => Some(Role::Reader),
            Lock::None => None,
        }
    }
}
