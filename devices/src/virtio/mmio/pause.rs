//! A transport whose device stands still, keeps its session, and goes on with it.

use std::time::Instant;

use super::{Life, MmioTransport};
use crate::virtio::device::{Notice, Patience, StartError, Stop, StopError};

/// Why a device could not be paused or resumed.
#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    /// The device did not give its session back.
    #[error("the virtio device cannot be paused")]
    Stop(#[source] StopError),
    /// The device did not start again; the driver was told to reset it.
    #[error("the virtio device cannot be resumed")]
    Start(#[source] StartError),
}

/// What has become of the wish to pause a device.
#[derive(Debug)]
pub enum Pause {
    /// It is not answered yet: look again when the notice rings, or then.
    Pending {
        /// Then at the latest there is an answer.
        until: Instant,
    },
    /// Nothing is in flight, and the session waits here, if there is one.
    Paused,
    /// It was not paused.
    Refused(TransportError),
}

impl MmioTransport {
    /// Stops the device and keeps its session; when it returns nothing is in flight.
    ///
    /// # Errors
    ///
    /// When the device did not drain in time, and goes on serving; when its storage is lost, or its worker has ended.
    pub fn pause(&mut self) -> Result<(), TransportError> {
        self.begin_pause(&Notice::default());
        match self.poll_pause(Patience::WithinLimit) {
            Pause::Paused => Ok(()),
            Pause::Refused(error) => Err(error),
            Pause::Pending { .. } => unreachable!("who is patient gets an answer"),
        }
    }

    /// Begins to stop the device; `notice` rings when [`Self::poll_pause`] has something to say. The driver may go on:
    /// a reset is obeyed, and what it starts then waits for [`Self::resume`].
    pub fn begin_pause(&mut self, notice: &Notice) {
        self.is_paused = true;
        if matches!(self.life, Life::Serving | Life::Resetting) {
            self.device.begin_stop(notice);
        }
    }

    /// What has become of [`Self::begin_pause`]; at once, without `patience`.
    pub fn poll_pause(&mut self, patience: Patience) -> Pause {
        let stopped = match self.life {
            Life::Idle | Life::Paused(_) => return Pause::Paused,
            Life::Serving | Life::Resetting => self.device.poll_stop(patience),
        };
        match (stopped, &self.life) {
            (Stop::Pending { until }, _) => return Pause::Pending { until },
            (Stop::Refused(error), _) => {
                self.is_paused = false;
                return Pause::Refused(TransportError::Stop(error));
            }
            (Stop::Stopped(_session_dropped), Life::Resetting) => self.clear(),
            (Stop::Stopped(Some(session)), _) => self.life = Life::Paused(session),
            (Stop::Stopped(None), _) => {
                self.give_up("a device that was started had no session to give back");
            }
        }
        Pause::Paused
    }

    /// Starts the device again where [`Self::pause`] stopped it, or where [`Self::restore`] has put it.
    ///
    /// # Errors
    ///
    /// When the device does not start; its driver is told that it needs a reset.
    pub fn resume(&mut self) -> Result<(), TransportError> {
        self.is_paused = false;
        if std::mem::take(&mut self.owes_interrupt) {
            self.interrupt().again();
        }
        match std::mem::replace(&mut self.life, Life::Idle) {
            Life::Paused(session) => match self.device.start(session) {
                Ok(()) => self.life = Life::Serving,
                Err(error) => {
                    self.give_up("it did not start again");
                    return Err(TransportError::Start(error));
                }
            },
            other => self.life = other,
        }
        Ok(())
    }
}
