//! The two connections by which the rest of a memory is fetched, and what each begins with.

use serde::{Deserialize, Serialize};

use super::super::join::Token;
use super::super::stream::Stream;
use super::super::wire::Wire;

/// What such a connection begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rejoin {
    /// That of the migration.
    pub token: Token,
    /// Which attempt it is part of: two connections of one are a pair.
    pub attempt: u32,
    /// What it is for.
    pub lane: Lane,
}

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Lane {
    /// Pages that somebody waits for, which never stand in line behind others.
    Wanted,
    /// All others, one after the other.
    Pushed,
}

/// Both of them.
#[derive(Debug)]
pub(super) struct Pair {
    pub(super) wanted: Wire<Stream>,
    pub(super) pushed: Wire<Stream>,
}

/// Puts connections together that come one by one.
#[derive(Debug, Default)]
pub(super) struct Pairing {
    first: Option<(u32, Wire<Stream>)>,
}

impl Pairing {
    /// Another one has come; the pair, if that makes one.
    pub(super) fn add(&mut self, attempt: u32, lane: Lane, wire: Wire<Stream>) -> Option<Pair> {
        match lane {
            // Whoever calls anew has given up what it tried before.
            Lane::Wanted => {
                self.first = Some((attempt, wire));
                None
            }
            Lane::Pushed => {
                let (_, wanted) = self.first.take_if(|(first, _)| *first == attempt)?;
                Some(Pair { wanted, pushed: wire })
            }
        }
    }
}
