//! How a lease goes from one living owner to another, so that at every moment one of them can write at most, and in the end one
//! of them can.
//!
//! The old owner has made step e of the chain. Each of the next two steps has one winner, by exclusive create:
//!
//! ```text
//!   e     old owner: has offered the image, stands still, takes its fence down
//!   e+1   new owner: taken       or   old owner: cancelled ──► puts its fence up again and goes on
//!          │ puts its fence up
//!   e+2   new owner: started     or   old owner: reclaimed ──► likewise
//!          │ writes
//! ```
//!
//! Whoever loses a step does nothing more. Of a machine with more than one image the steps of one decide, and only who has won
//! those may have the others: [`Lease::take_back`].

use std::fs::File;
use std::io;
use std::sync::Arc;

use super::fence::ofd::{self, FenceError};
use super::{
    Candidate, Chain, ChainError, Incarnation, Lease, LeaseError, Mark, Phase, Place, Record, Role, Step,
    Terms, freed_soon,
};

/// What whoever takes an image over has to find: the newest step, and whose it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    /// The number of the step.
    pub epoch: u64,
    /// Its owner.
    pub incarnation: Incarnation,
}

/// What the old owner does that hears nothing of the new one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Opposition {
    /// It keeps the image unless it was taken.
    Cancel,
    /// It has the image back even if it was taken, unless the new owner has started.
    Reclaim,
}

/// What has become of a step that two want to make.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Contest {
    /// It is ours, durably.
    Won,
    /// It is the new owner's, who has taken the image and not started.
    Taken(Record),
    /// The image is another's for good.
    Gone(Record),
}

/// What has become of an image that is to be had back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TakenBack {
    /// The fence is up, and the image is ours as it was.
    Done,
    /// The other has not taken its own fence down yet.
    Fenced,
    /// Somebody else has had the image meanwhile.
    Gone(Record),
}

/// How long the new owner waits for the old one's fence to come down, which it does before it says so.
const YIELDED_MS_MAX: u64 = 2_000;

impl Lease {
    /// What a new owner needs to know, once the lease is settled; nothing if there is no record, and so nothing to decide by.
    pub(crate) fn offer(&self) -> Option<Offer> {
        match &self.mark {
            Mark::Made(step) | Mark::Yielded(step) => Some(step.record.offer()),
            Mark::None | Mark::Coming(_) => None,
        }
    }

    /// Takes the fence down, so that whoever has the offer can take the image over. Nothing is in flight, nothing will be
    /// written, and what was written is on its medium. Of a lease that is not recorded nothing changes.
    ///
    /// # Errors
    ///
    /// Why it does not come down; then nothing has changed.
    pub(crate) fn yield_fence(&mut self) -> Result<(), LeaseError> {
        self.settle()?;
        let Mark::Made(step) = &self.mark else {
            return Ok(());
        };
        ofd::release(&self.file).map_err(|source| self.unlockable(source))?;
        self.mark = Mark::Yielded(step.clone());
        Ok(())
    }

    /// Makes the step that opposes the next one of the new owner. To be repeated if it fails.
    ///
    /// # Errors
    ///
    /// When it cannot be told whose the step is.
    pub(crate) fn oppose(&mut self, opposition: Opposition) -> Result<Contest, LeaseError> {
        let Mark::Yielded(step) = &self.mark else {
            return Ok(Contest::Won);
        };
        let mut newest = self.newest(step)?;
        // Each look finds a later step, of which there are two.
        loop {
            let record = match opposing(&step.record, &newest, opposition) {
                Ok(record) => record
                    .ok_or(ChainError::Exhausted)
                    .map_err(|source| self.failed(source))?,
                Err(contest) => return Ok(contest),
            };
            match step.chain.complete(&record) {
                Ok(()) => return Ok(Contest::Won),
                Err(ChainError::Lost { .. }) => newest = self.newest(step)?,
                Err(source) => return Err(self.failed(source)),
            }
        }
    }

    /// Has an image back, and puts the fence up again: for whoever has won the step that decides against the owner `other`. To
    /// be repeated if it fails, or while the other one's fence is up.
    ///
    /// # Errors
    ///
    /// When the record cannot be made, or the host does not lock.
    pub(crate) fn take_back(&mut self, other: Option<Incarnation>) -> Result<TakenBack, LeaseError> {
        let Mark::Yielded(step) = &self.mark else {
            return self.stay().map(|()| TakenBack::Done);
        };
        match ofd::take(&self.file, Role::Writer) {
            Ok(()) => {}
            Err(FenceError::Busy(_)) => return Ok(TakenBack::Fenced),
            Err(FenceError::Host(source)) => return Err(self.unlockable(source)),
        }
        let owner = &step.record.owner;
        let is_ours = |record: &Record| record.owner.incarnation == owner.incarnation;
        // Also one that was given back: its owner has lost the step that decides, and has not written.
        let is_others = |record: &Record| Some(record.owner.incarnation) == other;
        // The other may make steps as long as it has not heard that it lost: two at most.
        let made = loop {
            let newest = self.newest(step)?;
            if is_ours(&newest) && newest.epoch > step.record.epoch {
                let chain = Arc::clone(&step.chain);
                break Step {
                    chain,
                    record: newest,
                };
            }
            if !is_ours(&newest) && !is_others(&newest) {
                ofd::release(&self.file).map_err(|source| self.unlockable(source))?;
                return Ok(TakenBack::Gone(newest));
            }
            let last = Step {
                chain: Arc::clone(&step.chain),
                record: newest,
            };
            // Also after a step of ours: the next one is what was offered.
            match last.next(Phase::Reclaimed, owner) {
                Ok(step) => break step,
                Err(ChainError::Lost { .. }) => {}
                Err(source) => return Err(self.failed(source)),
            }
        };
        self.mark = Mark::Made(made);
        Ok(TakenBack::Done)
    }

    #[cfg(test)]
    #[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
    pub(crate) fn fall(&self) {
        ofd::release(&self.file).unwrap();
    }

    /// Says whether the image at `path`, which `file` has open, is the one that is offered.
    ///
    /// # Errors
    ///
    /// That it is not.
    pub(crate) fn check_offer(
        file: &Arc<File>,
        path: &str,
        terms: &Terms<'_>,
        offer: Offer,
    ) -> Result<(), LeaseError> {
        Candidate { file, path, terms }.offered(offer).map(drop)
    }

    pub(super) fn newest(&self, step: &Step) -> Result<Record, LeaseError> {
        let newest = step.chain.newest().map_err(|source| self.failed(source))?;
        // The newest is never removed, so it is there.
        Ok(newest.unwrap_or_else(|| step.record.clone()))
    }

    pub(super) fn failed(&self, source: ChainError) -> LeaseError {
        LeaseError::Chain {
            path: self.path.clone(),
            source,
        }
    }

    pub(super) fn unlockable(&self, source: io::Error) -> LeaseError {
        LeaseError::Unlockable {
            path: self.path.clone(),
            source,
        }
    }
}

/// The step that the owner of `ours` makes where `newest` is the newest one: it may have been made, and not be known to be
/// durable. Or why there is none; `None` when no number is left.
pub(crate) fn opposing(
    ours: &Record,
    newest: &Record,
    opposition: Opposition,
) -> Result<Option<Record>, Contest> {
    let is_ours = newest.owner.incarnation == ours.owner.incarnation;
    let is_next = ours.epoch.checked_add(1) == Some(newest.epoch);
    match newest.phase {
        Phase::Cancelled | Phase::Reclaimed if is_ours && newest.epoch > ours.epoch => {
            Ok(Some(newest.clone()))
        }
        _ if newest == ours => Ok(Record::after(Some(ours), Phase::Cancelled, &ours.owner)),
        Phase::Taken if is_next => match opposition {
            Opposition::Cancel => Err(Contest::Taken(newest.clone())),
            Opposition::Reclaim => Ok(Record::after(Some(newest), Phase::Reclaimed, &ours.owner)),
        },
        _ => Err(Contest::Gone(newest.clone())),
    }
}

impl Candidate<'_> {
    /// The chain whose newest step is the one that is offered, and that step.
    fn offered(&self, offer: Offer) -> Result<(Chain, Record), LeaseError> {
        let Place::Chain(chain) = self.place()? else {
            return Err(self.forgotten());
        };
        let newest = chain.newest().map_err(|source| LeaseError::Chain {
            path: self.path.to_owned(),
            source,
        })?;
        match newest {
            Some(newest) if newest.offer() == offer && newest.phase.is_owned() => Ok((chain, newest)),
            newest => Err(LeaseError::Withdrawn {
                path: self.path.to_owned(),
                newest: newest.map(Box::new),
            }),
        }
    }

    /// Takes an image over by the step after the one that is offered, and puts the fence up: once the old owner's has come down.
    pub(super) fn take_over(&self, role: Role, offer: Offer) -> Result<Lease, LeaseError> {
        let failed = |source| LeaseError::Chain {
            path: self.path.to_owned(),
            source,
        };
        let (chain, offered) = self.offered(offer)?;
        let record = Record::after(Some(&offered), Phase::Taken, self.terms.owner);
        let record = record.ok_or(ChainError::Exhausted).map_err(failed)?;
        chain.append(&record).map_err(failed)?;
        let yielded = freed_soon(
            YIELDED_MS_MAX,
            || ofd::take(self.file, role),
            |taken| matches!(taken, Err(FenceError::Busy(_))),
        );
        match yielded {
            Ok(()) => Ok(Lease {
                path: self.path.to_owned(),
                file: Arc::clone(self.file),
                mark: Mark::Made(Step {
                    chain: Arc::new(chain),
                    record,
                }),
            }),
            Err(FenceError::Busy(conflict)) => Err(self.refusal(conflict)),
            Err(FenceError::Host(source)) => Err(self.unlockable(source)),
        }
    }
}

#[cfg(test)]
mod tests;
