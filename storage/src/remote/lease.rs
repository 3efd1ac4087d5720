//! The lease of an image of a network, as whoever holds the image has it beside the disk: what there is to offer, and the contest
//! for it.
//!
//! The disk, on its worker, has the session and the fence. It takes the fence down and puts it up again when it is asked to
//! ([`crate::request::Operation::Yield`], [`crate::request::Operation::TakeBack`]). In between it has no session at all, so the
//! records are made here, on the thread of whoever waits for them, each time in a session of their own.

use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use crate::lease::{Contest, Incarnation, LeaseError, Offer, Opposition, Phase, Record, TakenBack, opposing};
use crate::open::OpenError;

/// The newest record that a disk knows to be its own, told to whoever holds the image.
#[derive(Clone, Debug, Default)]
pub(crate) struct Standing(Arc<Mutex<Option<Record>>>);

impl Standing {
    /// This is the newest from now on; `None` if there is no record.
    pub(crate) fn tell(&self, record: Option<Record>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = record;
    }

    /// The newest.
    pub(crate) fn record(&self) -> Option<Record> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// What stands at the end of the records of an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Newest {
    /// Nothing: there are none.
    None,
    /// A record.
    Record(Record),
    /// A step that was made, and of which nothing was written: whoever has made it may yet write it, and nobody else can.
    Torn(u64),
}

/// The records of an image, while no disk of this process has a session for it.
pub(crate) trait RemoteChain: fmt::Debug + Send {
    /// What the image is called.
    fn name(&self) -> &str;

    /// The newest record.
    ///
    /// # Errors
    ///
    /// When the storage does not say.
    fn newest(&self) -> Result<Newest, OpenError>;

    /// Makes a step; afterwards it is durable. What it says is returned: an attempt that broke off may have said it a moment
    /// earlier. `None`: its number is another's. One that was made already is made.
    ///
    /// # Errors
    ///
    /// When that cannot be told: to be tried again.
    fn append(&self, record: &Record) -> Result<Option<Record>, OpenError>;
}

/// A lease whose records are on a network.
#[derive(Debug)]
pub(crate) struct RemoteLease {
    chain: Box<dyn RemoteChain>,
    standing: Standing,
    /// The step that was offered, from when on somebody else may make the next one until it is ours again.
    yielded: Option<Record>,
}

impl RemoteLease {
    /// That of the disk which tells `standing`.
    pub(crate) fn new(chain: Box<dyn RemoteChain>, standing: Standing) -> Self {
        Self {
            chain,
            standing,
            yielded: None,
        }
    }

    /// What a new owner needs to know; nothing if there is no record.
    pub(crate) fn offer(&self) -> Option<Offer> {
        let yielded = self.yielded.clone();
        yielded
            .or_else(|| self.standing.record())
            .map(|record| record.offer())
    }

    /// From now on somebody else may make the next step. The disk was asked to take its fence down.
    pub(crate) fn yield_fence(&mut self) {
        self.yielded = self.standing.record();
    }

    /// Makes the step that opposes the next one of the new owner. To be repeated if it fails.
    ///
    /// # Errors
    ///
    /// When it cannot be told whose the step is.
    pub(crate) fn oppose(&self, opposition: Opposition) -> Result<Contest, OpenError> {
        let Some(ours) = &self.yielded else {
            return Ok(Contest::Won);
        };
        // Each look finds a later step, of which there are two.
        loop {
            let newest = match self.chain.newest()? {
                Newest::Record(newest) => newest,
                Newest::None => return Err(self.undecided()),
                Newest::Torn(number) => return self.oppose_torn(ours, number, opposition),
            };
            let record = match opposing(ours, &newest, opposition) {
                Ok(record) => record.ok_or_else(|| self.undecided())?,
                Err(contest) => return Ok(contest),
            };
            if self.chain.append(&record)?.is_some() {
                return Ok(Contest::Won);
            }
        }
    }

    /// The same where the newest step says nothing. It may be one of ours, which is written then. Otherwise it counts as what its
    /// number makes it: *taken* can be opposed by the next number, and its maker finds that out before it does anything.
    fn oppose_torn(&self, ours: &Record, number: u64, opposition: Opposition) -> Result<Contest, OpenError> {
        let taken = Record::after(Some(ours), Phase::Taken, &ours.owner);
        let taken = taken.ok_or_else(|| self.undecided())?;
        let reclaimed = Record::after(Some(&taken), Phase::Reclaimed, &ours.owner);
        let reclaimed = reclaimed.ok_or_else(|| self.undecided())?;
        let cancelled = Record {
            phase: Phase::Cancelled,
            ..taken
        };
        let is_won = match number {
            number if number == cancelled.epoch => {
                self.chain.append(&cancelled)?.is_some()
                    || opposition == Opposition::Reclaim && self.chain.append(&reclaimed)?.is_some()
            }
            number if number == reclaimed.epoch => self.chain.append(&reclaimed)?.is_some(),
            _ => false,
        };
        if is_won {
            Ok(Contest::Won)
        } else {
            Err(self.undecided())
        }
    }

    /// Has the records say that the image is ours again: for whoever has won the step that decides against the owner `other`. The
    /// disk can be asked to put its fence up then. To be repeated if it fails.
    ///
    /// # Errors
    ///
    /// When the record cannot be made.
    pub(crate) fn take_back(&self, other: Option<Incarnation>) -> Result<TakenBack, OpenError> {
        let Some(ours) = &self.yielded else {
            return Ok(TakenBack::Done);
        };
        // The other may make steps as long as it has not heard that it lost: two at most.
        loop {
            let newest = match self.chain.newest()? {
                Newest::Record(newest) => newest,
                // Somebody has begun to make a step: whose it is will be said.
                Newest::Torn(_) | Newest::None => return Err(self.undecided()),
            };
            let is_ours = newest.owner.incarnation == ours.owner.incarnation;
            if is_ours && newest.epoch > ours.epoch {
                self.standing.tell(Some(newest));
                return Ok(TakenBack::Done);
            }
            if !is_ours && Some(newest.owner.incarnation) != other {
                return Ok(TakenBack::Gone(newest));
            }
            let record = Record::after(Some(&newest), Phase::Reclaimed, &ours.owner);
            let record = record.ok_or_else(|| self.undecided())?;
            if let Some(made) = self.chain.append(&record)? {
                self.standing.tell(Some(made));
                return Ok(TakenBack::Done);
            }
        }
    }

    /// The disk has its fence again.
    pub(crate) fn is_back(&mut self) {
        self.yielded = None;
    }

    fn undecided(&self) -> OpenError {
        LeaseError::Undecided {
            path: self.chain.name().to_owned(),
        }
        .into()
    }
}

#[cfg(test)]
mod tests;
