//! A machine on its way from running to standing still.
//!
//! The order matters: no vCPU runs when the first device stops, so no device gets new work, and what is in flight may
//! still raise its interrupts.

use std::time::{Duration, Instant};

use coracle_devices::virtio::device::{Notice, Patience, StopError};
use coracle_devices::virtio::mmio::{self, TransportError};

use super::{Machine, Parts, Paused, Refused, Running, Stranded, TransitionError};
use crate::kvm::vcpu::{ACKNOWLEDGE_MS_MAX, Vcpu};

/// The phase in which the guest is being stopped.
#[derive(Debug)]
pub struct Pausing {
    notice: Notice,
    stage: Stage,
}

#[derive(Debug)]
enum Stage {
    /// The vCPUs leave KVM_RUN.
    Parking { until: Instant },
    /// What has become of each device, in their order.
    Draining(Vec<Option<Result<(), TransportError>>>),
}

/// What has become of a pause.
pub enum Pause {
    /// It goes on: look again when the notice rings, or then.
    Pending(Machine<Pausing>, Instant),
    /// Nothing is in flight.
    Paused(Machine<Paused>),
    /// A disk is lost, and nothing is in flight but what that one has.
    Stranded(Machine<Stranded>),
    /// The machine runs on.
    Refused(Refused<Running>),
}

/// How long vCPUs are waited for at a time: one that is not in the middle of a reset needs some microseconds.
const PARK_WAIT: Duration = Duration::from_millis(2);
/// How long others are served meanwhile.
const PARK_PERIOD: Duration = Duration::from_millis(5);

impl Machine<Running> {
    /// Begins to stop the guest and to drain its devices; `notice` rings when that has come further.
    pub fn begin_pause(self, notice: &Notice) -> Machine<Pausing> {
        let until = Instant::now() + Duration::from_millis(ACKNOWLEDGE_MS_MAX);
        let notice = notice.clone();
        let stage = Stage::Parking { until };
        self.in_phase(Pausing { notice, stage })
    }

    /// The same, for whoever waits.
    pub fn pause(self) -> Pause {
        self.begin_pause(&Notice::default()).poll(Patience::WithinLimit)
    }
}

impl Machine<Pausing> {
    /// Goes on to pause. Who is patient is never told that it goes on.
    pub fn poll(mut self, patience: Patience) -> Pause {
        if let Stage::Parking { until } = self.phase.stage {
            let now = Instant::now();
            let limit = match patience {
                Patience::None => PARK_WAIT,
                Patience::WithinLimit => until.saturating_duration_since(now),
            };
            match self.parts.park(limit) {
                Ok(None) => {}
                Ok(Some(_)) if patience == Patience::None && now < until => {
                    return Pause::Pending(self, now + PARK_PERIOD);
                }
                Ok(Some(vcpu)) => {
                    let error = vcpu.unresponsive();
                    return self.refuse(error.into());
                }
                Err(error) => return self.refuse(error),
            }
            for slot in &self.parts.devices {
                slot.lock().begin_pause(&self.phase.notice);
            }
            let outcomes = self.parts.devices.iter().map(|_| None).collect();
            self.phase.stage = Stage::Draining(outcomes);
        }
        self.drain(patience)
    }

    fn drain(mut self, patience: Patience) -> Pause {
        let Stage::Draining(outcomes) = &mut self.phase.stage else {
            unreachable!("the vCPUs are parked first");
        };
        let mut pending: Option<Instant> = None;
        for (slot, outcome) in self.parts.devices.iter().zip(outcomes.iter_mut()) {
            if outcome.is_none() {
                match slot.lock().poll_pause(patience) {
                    mmio::Pause::Pending { until } => {
                        pending = Some(pending.map_or(until, |other| other.min(until)));
                    }
                    mmio::Pause::Paused => *outcome = Some(Ok(())),
                    mmio::Pause::Refused(error) => *outcome = Some(Err(error)),
                }
            }
        }
        if let Some(until) = pending {
            return Pause::Pending(self, until);
        }
        let failures: Vec<_> = self
            .parts
            .devices
            .iter()
            .zip(outcomes.drain(..))
            .filter_map(|(slot, outcome)| outcome?.err().map(|error| slot.failed(error)))
            .collect();
        self.arrive(failures)
    }

    fn arrive(self, failures: Vec<TransitionError>) -> Pause {
        if self.losses().next().is_some() {
            let others = failures.iter().filter(|failure| !failure.is_loss());
            others.for_each(|failure| {
                log::error!("a machine with a lost disk does not stand still: {failure}")
            });
            return Pause::Stranded(self.in_phase(Stranded));
        }
        match failures.into_iter().next() {
            Some(error) => self.refuse(error),
            None => Pause::Paused(self.in_phase(Paused)),
        }
    }

    /// Back to where it was: devices that did stop serve again, then the guest runs on.
    fn refuse(self, error: TransitionError) -> Pause {
        if let Err(also) = self.parts.start() {
            log::error!("a machine that could not be paused does not go on: {also}");
        }
        let machine = self.in_phase(Running);
        Pause::Refused(Refused { machine, error })
    }
}

impl TransitionError {
    fn is_loss(&self) -> bool {
        matches!(
            self,
            Self::Device {
                source: TransportError::Stop(StopError::Lost { .. }),
                ..
            }
        )
    }
}

impl Parts {
    /// Sends the vCPUs out of KVM_RUN; returns one that has not left it after `limit`.
    fn park(&self, limit: Duration) -> Result<Option<&Vcpu>, TransitionError> {
        let deadline = Instant::now() + limit;
        self.vcpus.iter().try_for_each(Vcpu::kick)?;
        for vcpu in &self.vcpus {
            if !vcpu.parks_within(deadline.saturating_duration_since(Instant::now()))? {
                return Ok(Some(vcpu));
            }
        }
        Ok(None)
    }
}
