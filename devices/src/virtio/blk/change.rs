//! A change of a disk's image that was asked for, on its way through the workers.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use coracle_storage::backend::{Backend, Geometry};
use coracle_storage::metrics::SessionMetrics;

use super::control::{BlkControl, ControlError, REPLY_MS_MAX, locked};
use super::mailbox::{Answer, AskReply, Call, Command, Mailbox, ReplaceReply, Unanswered};
use crate::virtio::device::{Notice, Patience};

/// A change under way. Who drops it gives it up: then it may take place or not.
pub struct ImageChange {
    pub(super) control: Box<BlkControl>,
    pub(super) asked: Asked,
    pub(super) until: Instant,
}

/// What was asked of the workers.
pub(super) enum Asked {
    /// Nothing: the image is as it should be.
    Nothing,
    Replace {
        exchanges: Vec<Exchange>,
        geometry: Geometry,
        session: Option<Arc<SessionMetrics>>,
    },
    Grow {
        size_bytes: u64,
        answer: Answer<AskReply>,
    },
}

/// Whether the guest sees a difference.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Changed {
    /// The shape of its disk may be another.
    Geometry,
    /// None.
    Nothing,
}

impl ImageChange {
    /// When [`Self::poll`] has an answer at the latest.
    pub fn until(&self) -> Instant {
        self.until
    }

    /// What has become of it, once; `None` while it is not known, for who has no `patience`.
    pub fn poll(&mut self, patience: Patience) -> Option<Result<Changed, ControlError>> {
        let outcome = match &mut self.asked {
            Asked::Nothing => Ok(Changed::Nothing),
            Asked::Grow { size_bytes, answer } => {
                let size_bytes = *size_bytes;
                let grown = answered(answer.poll(patience, self.until)?);
                let grown = grown.and_then(|grown| {
                    grown.map_err(|source| ControlError::Grow {
                        wanted_bytes: size_bytes,
                        source,
                    })
                });
                grown.map(|()| {
                    locked(&self.control.geometry).size_bytes = size_bytes;
                    Changed::Geometry
                })
            }
            Asked::Replace {
                exchanges,
                geometry,
                session,
            } => {
                let mut waiting = false;
                for exchange in exchanges.iter_mut() {
                    waiting |= !exchange.is_over(patience, self.until);
                }
                if waiting {
                    return None;
                }
                let replaced = settled(exchanges, &self.control.mailboxes);
                replaced.map(|()| {
                    *locked(&self.control.geometry) = *geometry;
                    *locked(&self.control.session) = session.take();
                    Changed::Geometry
                })
            }
        };
        Some(self.control.counted(outcome))
    }
}

/// One worker's image, to be exchanged.
pub(super) struct Exchange {
    answer: Answer<ReplaceReply>,
    /// The image that it had, or why it still has it.
    outcome: Option<Result<Box<dyn Backend>, ControlError>>,
}

impl Exchange {
    /// Gives a worker `image`.
    pub(super) fn new(
        mailbox: &Mailbox,
        image: Box<dyn Backend>,
        notice: &Notice,
    ) -> Result<Self, ControlError> {
        let (call, answer) = Call::new(notice);
        mailbox.post(Command::Replace(image, call))?;
        Ok(Self {
            answer,
            outcome: None,
        })
    }

    fn is_over(&mut self, patience: Patience, until: Instant) -> bool {
        if self.outcome.is_none() {
            let reply = self.answer.poll(patience, until);
            self.outcome = reply.map(|reply| {
                answered(reply)?.map_err(|error| match error.kind() {
                    io::ErrorKind::ResourceBusy => ControlError::Serving,
                    io::ErrorKind::Unsupported => ControlError::Reach,
                    _ => ControlError::Register(error),
                })
            });
        }
        self.outcome.is_some()
    }
}

pub(super) fn answered<T>(reply: Result<T, Unanswered>) -> Result<T, ControlError> {
    reply.map_err(|unanswered| match unanswered {
        Unanswered::Gone => ControlError::WorkerGone,
        Unanswered::Late => ControlError::Late,
    })
}

/// Closes the old images, or, where a worker has not taken its new one, gives the others theirs back.
fn settled(exchanges: &mut Vec<Exchange>, mailboxes: &[Mailbox]) -> Result<(), ControlError> {
    let (mut replaced, mut obstacle) = (Vec::new(), None);
    for (exchange, mailbox) in exchanges.drain(..).zip(mailboxes) {
        match exchange.outcome {
            Some(Ok(old)) => replaced.push((mailbox, old)),
            Some(Err(error)) => obstacle = obstacle.or(Some(error)),
            None => {}
        }
    }
    let Some(error) = obstacle else { return Ok(()) };
    for (mailbox, old) in replaced {
        // Going on would let one queue of a disk write another image than the next.
        let until = Instant::now() + Duration::from_millis(REPLY_MS_MAX);
        let back = Exchange::new(mailbox, old, &Notice::default()).map(|mut exchange| {
            exchange.is_over(Patience::WithinLimit, until);
            exchange.outcome
        });
        let is_back = matches!(back, Ok(Some(Ok(_))));
        assert!(is_back, "a worker that had an image a moment ago takes it back");
    }
    Err(error)
}
