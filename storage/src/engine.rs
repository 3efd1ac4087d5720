//! Which reactor carries a disk's operations out.

use std::error::Error;
use std::io;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::plain::Plain;
use crate::reactor::{Reach, Reactor};
use crate::ring::PreparedRing;
use crate::threads::Kind;

/// Firecracker's `io_engine`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Engine {
    /// io_uring; plain system calls, with a warning, where the host refuses it.
    #[default]
    Async,
    /// Plain system calls.
    Sync,
}

/// A reactor that was chosen and set up, but is not bound to a thread yet.
pub enum PreparedReactor {
    /// io_uring.
    Ring(Box<PreparedRing>),
    /// Plain system calls, with room for so many operations.
    Plain {
        /// Operations in flight at most.
        ops_max: u32,
        /// What they may be on.
        reach: Reach,
    },
}

impl PreparedReactor {
    /// What the thread is for that it is to be bound to.
    pub fn thread_kind(&self) -> Kind {
        match self {
            Self::Ring(ring) => match ring.reach() {
                Reach::Files => Kind::Io,
                Reach::FilesAndSockets => Kind::NetworkIo,
                Reach::SocketsAndRecords => Kind::RecordingIo,
            },
            Self::Plain {
                reach: Reach::Files, ..
            } => Kind::PlainIo,
            Self::Plain { .. } => Kind::PlainNetworkIo,
        }
    }

    /// Sets up what `engine` asks for, with room for `ops_max` operations on what is in `reach`. Never fails:
    /// where io_uring is not to be had, it says why in the log and prepares plain system calls.
    pub fn new(engine: Engine, ops_max: u32, reach: Reach) -> Self {
        match engine {
            Engine::Sync => Self::Plain { ops_max, reach },
            Engine::Async => match PreparedRing::new(ops_max, reach) {
                Ok(ring) => Self::Ring(Box::new(ring)),
                Err(reason) => {
                    let cause = reason
                        .source()
                        .map(|cause| format!(" ({cause})"))
                        .unwrap_or_default();
                    log::warn!("a disk runs on plain system calls, which is slower: {reason}{cause}");
                    Self::Plain { ops_max, reach }
                }
            },
        }
    }

    /// Binds the reactor to the calling thread.
    ///
    /// # Errors
    ///
    /// When the kernel refuses the ring after all.
    pub fn enable(self) -> io::Result<Box<dyn Reactor>> {
        Ok(match self {
            Self::Ring(ring) => Box::new(ring.enable()?),
            Self::Plain { ops_max, .. } => Box::new(Plain::new(ops_max)),
        })
    }
}
