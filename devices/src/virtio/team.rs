//! Workers that serve one device together, each with queues of its own.

use std::time::Instant;

use super::device::{Notice, Patience, Session, StartError, Stop, StopError};
use super::parts::{parts, whole};
use super::service::{Nudge, Service};

/// A [`Service`] for each worker. They stand still together, or none of them does.
#[derive(Debug)]
pub(super) struct Team {
    members: Vec<Service>,
    /// What those have answered that were asked to stop, until all have.
    answers: Vec<Option<Answer>>,
}

type Answer = Result<Option<Session>, StopError>;

impl Team {
    /// A team of at least one.
    pub(super) fn new(members: Vec<Service>) -> Self {
        Self {
            answers: members.iter().map(|_| None).collect(),
            members,
        }
    }

    /// What makes each of them look up.
    pub(super) fn nudges(&self) -> Vec<Nudge> {
        self.members.iter().map(Service::nudge).collect()
    }

    /// As [`super::device::VirtioDevice::start`], for a device that needs the first `needed` queues, all of which are with one
    /// worker; `worker_of` says with which a queue is. One that has none is not bothered.
    ///
    /// # Errors
    ///
    /// As there.
    pub(super) fn start(
        &mut self,
        session: Session,
        needed: usize,
        worker_of: impl Fn(usize) -> usize,
    ) -> Result<(), StartError> {
        let first = worker_of(0);
        for (number, part) in parts(session, self.members.len(), worker_of) {
            let member = self.members.get_mut(number).ok_or(StartError::WorkerGone)?;
            member.start(part, if number == first { needed } else { 0 })?;
        }
        Ok(())
    }

    /// As [`super::device::VirtioDevice::begin_stop`].
    pub(super) fn begin_stop(&mut self, notice: &Notice) {
        // Who has refused already is not asked again before the others have answered.
        if self.answers.iter().any(Option::is_some) {
            return;
        }
        // All are asked before the first is looked after.
        self.members
            .iter_mut()
            .for_each(|member| member.begin_stop(notice));
    }

    /// As [`super::device::VirtioDevice::poll_stop`].
    pub(super) fn poll_stop(&mut self, patience: Patience) -> Stop {
        self.begin_stop(&Notice::default());
        let mut pending: Option<Instant> = None;
        for (member, answer) in self.members.iter_mut().zip(&mut self.answers) {
            if answer.is_some() {
                continue;
            }
            match member.poll_stop(patience) {
                Stop::Pending { until } => pending = pending.max(Some(until)),
                Stop::Stopped(part) => *answer = Some(Ok(part)),
                Stop::Refused(error) => *answer = Some(Err(error)),
            }
        }
        match pending {
            Some(until) => Stop::Pending { until },
            None => self.stopped(),
        }
    }

    /// All have answered.
    fn stopped(&mut self) -> Stop {
        let mut parts = Vec::new();
        let mut obstacle = None;
        for (number, answer) in self.answers.iter_mut().enumerate() {
            match answer.take() {
                Some(Ok(Some(part))) => parts.push((number, part)),
                Some(Err(error)) => obstacle = Some(error),
                Some(Ok(None)) | None => {}
            }
        }
        let Some(error) = obstacle else {
            return Stop::Stopped(whole(parts.into_iter().map(|(_, part)| part)));
        };
        // One does not stand still, so the others go on as well.
        for (number, part) in parts {
            let member = self.members.get_mut(number);
            if member.is_none_or(|member| member.start(part, 0).is_err()) {
                return Stop::Refused(StopError::WorkerGone);
            }
        }
        Stop::Refused(error)
    }
}
