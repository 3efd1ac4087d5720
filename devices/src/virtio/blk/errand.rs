//! What a stopped disk is asked for on behalf of its machine: to have everything on the medium, to raise its generation, to take
//! the fence of its image down and put it up again.

use std::time::{Duration, Instant};

use coracle_storage::request::Operation;

use super::change::answered;
use super::control::{BlkControl, ControlError};
use super::mailbox::{Answer, AskReply, Call, Command};
use crate::virtio::device::{Notice, Patience};

/// An errand under way. Who drops it gives it up: then it may be done or not.
pub struct Errand {
    answer: Answer<AskReply>,
    until: Instant,
    purpose: Purpose,
}

#[derive(Clone, Copy)]
enum Purpose {
    Flush,
    Raise,
    Yield,
    TakeBack,
}

impl BlkControl {
    /// Begins to have everything on the medium that was written, whatever the disk's `cache_type` promises its guest; an
    /// answer is waited for as long as `limit`.
    ///
    /// # Errors
    ///
    /// When the worker is gone.
    pub fn begin_flush(&self, limit: Duration, notice: &Notice) -> Result<Errand, ControlError> {
        self.begin_errand(Purpose::Flush, limit, notice)
    }

    /// Begins to raise the generation of an image of a network; others have none of their own.
    ///
    /// # Errors
    ///
    /// When the worker is gone.
    pub fn begin_raise(&self, limit: Duration, notice: &Notice) -> Result<Errand, ControlError> {
        self.begin_errand(Purpose::Raise, limit, notice)
    }

    /// Begins to take the fence of an image of a network down; others have none of their own. Nothing is to be written until
    /// [`Self::begin_take_back`].
    ///
    /// # Errors
    ///
    /// When the worker is gone.
    pub fn begin_yield(&self, limit: Duration, notice: &Notice) -> Result<Errand, ControlError> {
        self.begin_errand(Purpose::Yield, limit, notice)
    }

    /// Begins to put the fence up again, by the record that [`coracle_storage::open::Hold::take_back`] has made.
    ///
    /// # Errors
    ///
    /// When the worker is gone.
    pub fn begin_take_back(&self, limit: Duration, notice: &Notice) -> Result<Errand, ControlError> {
        self.begin_errand(Purpose::TakeBack, limit, notice)
    }

    fn begin_errand(
        &self,
        purpose: Purpose,
        limit: Duration,
        notice: &Notice,
    ) -> Result<Errand, ControlError> {
        let operation = match purpose {
            Purpose::Flush => Operation::Flush,
            Purpose::Raise => Operation::Raise,
            Purpose::Yield => Operation::Yield,
            Purpose::TakeBack => Operation::TakeBack,
        };
        let (call, answer) = Call::new(notice);
        // One worker asks for all: the forks of an image share its file.
        let mailbox = self.mailboxes.first().ok_or(ControlError::WorkerGone)?;
        mailbox.post(Command::Ask(operation, 0, call))?;
        Ok(Errand {
            answer,
            until: Instant::now() + limit,
            purpose,
        })
    }
}

impl Errand {
    /// When [`Self::poll`] has an answer at the latest.
    pub fn until(&self) -> Instant {
        self.until
    }

    /// What has become of it, once; `None` while it is not known, for who has no `patience`.
    pub fn poll(&self, patience: Patience) -> Option<Result<(), ControlError>> {
        let reply = self.answer.poll(patience, self.until)?;
        Some(answered(reply).and_then(|outcome| {
            outcome.map_err(|source| match self.purpose {
                Purpose::Flush => ControlError::Flush(source),
                Purpose::Raise => ControlError::Raise(source),
                Purpose::Yield => ControlError::Yield(source),
                Purpose::TakeBack => ControlError::TakeBack(source),
            })
        }))
    }
}
