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
pub(super) struct Pair<W = Wire<Stream>> {
    pub(super) wanted: W,
    pub(super) pushed: W,
}

/// Puts connections together that come one by one: each is greeted on a thread of its own, and so the second may come first.
#[derive(Debug)]
pub(super) struct Pairing<W = Wire<Stream>> {
    /// Those whose other half has not come, in the order in which they came.
    halves: Vec<(u32, Lane, W)>,
}

/// How many halves are kept. A source that calls anew has given up what it tried before.
const HALVES_MAX: usize = 4;

impl<W> Default for Pairing<W> {
    fn default() -> Self {
        Self { halves: Vec::new() }
    }
}

impl<W> Pairing<W> {
    /// Another one has come; the pair, if that makes one.
    pub(super) fn add(&mut self, attempt: u32, lane: Lane, wire: W) -> Option<Pair<W>> {
        let is_other = |(of, other, _): &(u32, Lane, W)| *of == attempt && *other != lane;
        let Some(at) = self.halves.iter().position(is_other) else {
            if self.halves.len() == HALVES_MAX {
                self.halves.remove(0);
            }
            self.halves.push((attempt, lane, wire));
            return None;
        };
        let (.., other) = self.halves.remove(at);
        Some(match lane {
            Lane::Wanted => Pair {
                wanted: wire,
                pushed: other,
            },
            Lane::Pushed => Pair {
                wanted: other,
                pushed: wire,
            },
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_connections_of_an_attempt_are_a_pair_whichever_comes_first() {
        let both = |pair: Option<Pair<u32>>| pair.map(|pair| (pair.wanted, pair.pushed));
        let mut pairing = Pairing::default();
        assert_eq!(both(pairing.add(1, Lane::Wanted, 10)), None);
        assert_eq!(both(pairing.add(2, Lane::Pushed, 21)), None);
        assert_eq!(both(pairing.add(3, Lane::Wanted, 30)), None);
        assert_eq!(both(pairing.add(2, Lane::Wanted, 20)), Some((20, 21)));
        assert_eq!(both(pairing.add(3, Lane::Pushed, 31)), Some((30, 31)));
        // The first has been taken: whoever calls anew begins anew.
        assert_eq!(both(pairing.add(3, Lane::Pushed, 32)), None);
        assert_eq!(both(pairing.add(1, Lane::Pushed, 11)), Some((10, 11)));
    }

    #[test]
    fn halves_that_stay_alone_do_not_add_up() {
        let mut pairing = Pairing::default();
        for attempt in 0..100 {
            assert!(pairing.add(attempt, Lane::Wanted, attempt).is_none());
        }
        assert_eq!(pairing.halves.len(), HALVES_MAX);
        assert!(pairing.add(99, Lane::Pushed, 0).is_some());
        assert!(pairing.add(0, Lane::Pushed, 0).is_none());
    }
}
