//! NFS as the proxy must know it: NFSv4.1 and 4.2 with all that a matrix needs, NFSv3 as far as its reads.
//!
//! In volatile mode the proxy plays a server whose unstable writes do not survive a power failure: each passes, and a
//! crash takes back in the server's files what was not committed, and changes the verifier of all that is written after it;
//! `undo` says why. Kill the server before the crash and start it again after it, and that is a power failure; a crash alone
//! is a server that keeps sessions and loses writes, which a verifier is for.

use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::compound::{Call, Operation};
use super::record::{Header, Xdr, content, first_bytes, sealed};
use super::results::{self, Done};
use super::undo::Undo;
use super::{damage, steps};
use crate::harness::proxy::{Damage, Direction, Kind, Protocol, Step};

/// The protocol on one connection.
#[derive(Debug, Default)]
pub struct Nfs {
    /// What all connections can lose, in volatile mode.
    undo: Option<Arc<Mutex<Undo>>>,
    has_begun: bool,
    /// The steps of the calls that are not answered.
    steps: BTreeMap<u32, Step>,
    /// What volatile mode must know of the same, in their order: a call may come twice.
    passed: VecDeque<(u32, Passed)>,
}

/// A call that went to the server.
#[derive(Debug, Default)]
struct Passed {
    verifier_change: u64,
    /// The numbers of its unstable writes, by their operations.
    writes: Vec<(usize, u64)>,
    /// The operation that commits those before it.
    commit: Option<usize>,
    /// The names of files whose handles are asked for, by the operations that ask.
    names: Vec<(usize, Vec<u8>)>,
}

/// In a tag: the call is the server's, by which it calls back.
const CALLBACK: u64 = 1 << 32;

impl Nfs {
    /// For [`crate::harness::proxy::Proxy::volatile`], with the directory on this machine whose files are to lose what was
    /// not committed: [`super::server::Server::path`] of an export. Clients must look them up by name through the proxy.
    pub fn over(directory: &Path) -> Self {
        Self {
            undo: Some(Arc::new(Mutex::new(Undo::new(directory.to_owned())))),
            ..Self::default()
        }
    }
}

impl Protocol for Nfs {
    fn begin(&self) -> Box<dyn Protocol> {
        Box::new(Self {
            undo: self.undo.clone(),
            ..Self::default()
        })
    }

    fn message_bytes(&self, _: Direction, stream: &[u8]) -> Option<usize> {
        first_bytes(stream)
    }

    fn note(&mut self, direction: Direction, message: &[u8]) {
        let content = content(message);
        match direction {
            Direction::ToServer => {
                let call = Call::parse(&content);
                let step = call.and_then(|call| self.step_of(&call).map(|step| (call.xid, step)));
                self.steps.extend(step);
                self.has_begun = true;
            }
            Direction::ToClient => drop(answered(&content).and_then(|xid| self.steps.remove(&xid))),
        }
    }

    fn step(&self, direction: Direction, message: &[u8]) -> Option<Step> {
        let content = content(message);
        match direction {
            Direction::ToServer => self.step_of(&Call::parse(&content)?),
            Direction::ToClient => self.steps.get(&answered(&content)?).copied(),
        }
    }

    fn damaged(&self, _: Direction, message: &[u8], damage: Damage) -> Option<Vec<u8>> {
        damage::damaged(message, damage)
    }

    fn kind(&self, _: &[u8]) -> Kind {
        // Nothing is held.
        Kind::Other
    }

    fn tag(&self, message: &[u8]) -> u64 {
        let content = content(message);
        let xid = Xdr::new(&content).word().map_or(u64::MAX, u64::from);
        let is_ours = answered(&content).is_some() || Call::parse(&content).is_some();
        xid | if is_ours { 0 } else { CALLBACK }
    }

    fn acknowledgement(&mut self, _: &[u8]) -> Vec<u8> {
        unreachable!("no write is of the kind that is held")
    }

    fn depends(&self, _: &[u8], _: &[u8]) -> bool {
        false
    }

    fn to_server(&mut self, request: Vec<u8>) -> Vec<u8> {
        let content = content(&request);
        if let (Some(undo), Some(call)) = (self.undo.as_deref(), Call::parse(&content)) {
            let passed = Passed::note(&call, &mut lock(undo));
            self.passed.push_back((call.xid, passed));
        }
        request
    }

    fn to_client(&mut self, answer: Vec<u8>) -> Vec<u8> {
        let mut content = content(&answer);
        let index = answered(&content).and_then(|xid| self.passed.iter().position(|(of, _)| *of == xid));
        let passed = index.and_then(|index| self.passed.remove(index));
        let (Some(undo), Some((_, passed))) = (self.undo.as_deref(), passed) else {
            return answer;
        };
        let verifiers = passed.answered(&content, &mut lock(undo));
        for at in verifiers {
            if let Some(place) = content.get_mut(at..at + 8) {
                let change = passed.verifier_change.to_be_bytes();
                place
                    .iter_mut()
                    .zip(change)
                    .for_each(|(byte, change)| *byte ^= change);
            }
        }
        sealed(&content)
    }

    fn crash(&mut self) -> usize {
        self.undo.as_deref().map_or(0, |undo| lock(undo).crash())
    }
}

impl Nfs {
    /// What begins a connection is its own step, unless a client or a session begins by it.
    fn step_of(&self, call: &Call<'_>) -> Option<Step> {
        match steps::of(call) {
            Some(step @ (Step::ClientId | Step::Login)) => Some(step),
            _ if !self.has_begun => Some(Step::Connect),
            step => step,
        }
    }
}

impl Passed {
    fn note(call: &Call<'_>, undo: &mut Undo) -> Self {
        let mut passed = Self::default();
        let operations = call.operations();
        let place = operations.iter().find_map(|operation| match operation {
            Operation::Sequence { slot, sequence } => Some((*slot, *sequence)),
            _ => None,
        });
        passed.verifier_change = undo.verifier_change(place);
        let (mut handle, mut name): (Option<&[u8]>, Option<&[u8]>) = (None, None);
        for (index, operation) in operations.iter().enumerate() {
            match operation {
                Operation::PutHandle(put) => (handle, name) = (Some(*put), None),
                Operation::Lookup(found) => (handle, name) = (None, Some(*found)),
                Operation::Open {
                    name: Some(found), ..
                } => (handle, name) = (None, Some(*found)),
                Operation::PutRoot | Operation::RestoreHandle | Operation::ParentLookup => {
                    (handle, name) = (None, None);
                }
                Operation::GetHandle => {
                    passed.names.extend(name.map(|name| (index, name.to_vec())));
                }
                Operation::Write {
                    offset,
                    is_unstable,
                    data,
                } => {
                    let Some(handle) = handle else {
                        continue;
                    };
                    if *is_unstable {
                        let number = undo.note(handle, *offset, data);
                        passed.writes.extend(number.map(|number| (index, number)));
                    } else {
                        let end = offset.saturating_add(data.len() as u64);
                        undo.commit(handle, &(*offset..end));
                    }
                }
                Operation::Commit(range) => {
                    passed.commit = Some(index);
                    if let Some(handle) = handle {
                        undo.commit(handle, range);
                    }
                }
                _ => {}
            }
        }
        passed
    }

    /// Takes in the answer; says where it has verifiers.
    fn answered(&self, content: &[u8], undo: &mut Undo) -> Vec<usize> {
        let done = results::parse(content).unwrap_or_default();
        let is_committed = |index: &usize| {
            self.commit
                .is_some_and(|at| at > *index && done.get(at).is_some())
        };
        for (index, number) in &self.writes {
            if done.get(*index).is_none() || is_committed(index) {
                undo.forget(*number);
            } else {
                undo.done(*number);
            }
        }
        for session in done.iter() {
            if let Done::CreateSession(session) = session {
                undo.begin(session);
            }
        }
        for (index, name) in &self.names {
            if let Some(Done::GetHandle(handle)) = done.get(*index) {
                undo.learn(handle, name);
            }
        }
        let verifier = |done: &Done<'_>| match done {
            Done::Write(at) | Done::Commit(at) => Some(*at),
            _ => None,
        };
        done.iter().filter_map(verifier).collect()
    }
}

/// The transaction that an answer ends; nothing for a call.
fn answered(content: &[u8]) -> Option<u32> {
    let (xid, header) = Xdr::new(content).header()?;
    (!matches!(header, Header::Call { .. })).then_some(xid)
}

fn lock(undo: &Mutex<Undo>) -> MutexGuard<'_, Undo> {
    undo.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
