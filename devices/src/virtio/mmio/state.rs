//! A paused transport as plain data, and a fresh one made to go on from it.
//!
//! What is saved is checked as if a stranger had written it: it may be refused, and it may describe a guest that hangs,
//! but it never makes a device touch what is not the guest's. Neither way looks into the guest's memory.

use std::sync::atomic::Ordering;

use serde::{Deserialize, Serialize};

use super::registers::{QueueSetup, Registers, status};
use super::{
    CONFIG_BYTES_MAX, INTERRUPT_CONFIGURATION, INTERRUPT_NEEDS_RESET, INTERRUPT_USED_BUFFER, Life,
    MmioTransport, QueueError,
};
use crate::virtio::device::Session;
use crate::virtio::ring::QueueLayout;
use crate::virtio::state::{DeviceState, DeviceStateError};

/// One virtio device as its driver knows it (virtio 1.2, 4.2.2), with nothing in flight.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportState {
    /// Device status, without DEVICE_NEEDS_RESET.
    pub status: u32,
    /// The device gave up, and shows DEVICE_NEEDS_RESET until it is reset.
    pub needs_reset: bool,
    /// DeviceFeaturesSel.
    pub device_features_sel: u32,
    /// DriverFeaturesSel.
    pub driver_features_sel: u32,
    /// The features that the driver has written; accepted once the status has FEATURES_OK.
    pub driver_features: u64,
    /// QueueSel.
    pub queue_sel: u32,
    /// InterruptStatus: what the driver has not acknowledged.
    pub interrupt_status: u32,
    /// ConfigGeneration as last counted.
    pub config_generation: u32,
    /// The first 256 bytes of the configuration space for which it was counted.
    pub config_seen: Vec<u8>,
    /// Whether the device has a session: the driver said DRIVER_OK, and neither of them gave up.
    pub is_started: bool,
    /// The queues, by index.
    pub queues: Vec<TransportQueueState>,
    /// What is the device's own.
    pub device: DeviceState,
}

/// One queue as its driver set it up, and how far it has come.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TransportQueueState {
    /// QueueNumMax as the driver could read it.
    pub size_max: u16,
    /// QueueNum; 0 if the driver has not written one that is allowed.
    pub size: u16,
    /// QueueReady.
    pub is_ready: bool,
    /// QueueDesc: the descriptor table.
    pub descriptors: u64,
    /// QueueDriver: the available ring.
    pub avail: u64,
    /// QueueDevice: the used ring.
    pub used: u64,
    /// Chains taken, and given back, modulo 2^16; 0 for a queue that is not served.
    pub position: u16,
}

/// Only a paused device stands still.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the virtio device is not paused")]
pub struct NotPaused;

/// Why a device did not take up what was saved; it is as fresh as before.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RestoreError {
    /// The driver was given features that this device does not have.
    #[error(
        "the guest's driver uses features {missing:#x}, which this virtio device does not offer: it is configured otherwise"
    )]
    Features {
        /// Those that are missing, as bits of the feature word.
        missing: u64,
    },
    /// The device has another number of queues.
    #[error("a virtio device of {saved} queues was saved, and this one has {here}")]
    QueueCount {
        /// Queues of the saved one.
        saved: usize,
        /// Queues of this one.
        here: usize,
    },
    /// A queue was offered larger than it is here.
    #[error("queue {index} had room for {saved} descriptors, and has room for {here} in this device")]
    QueueSize {
        /// Which one.
        index: usize,
        /// The largest size when it was saved.
        saved: u16,
        /// The largest size here.
        here: u16,
    },
    /// A queue that was served cannot be.
    #[error(transparent)]
    Queue(#[from] QueueError),
    /// No device can be in such a state: it was not saved by this program, or damaged.
    #[error("no virtio device can be in the saved state: {0}")]
    Impossible(&'static str),
    /// What is the device's own was refused.
    #[error(transparent)]
    Device(#[from] DeviceStateError),
}

impl MmioTransport {
    /// Everything that it takes to go on elsewhere, with the guest's memory as it is now. Where pages are tracked they are
    /// all marked then.
    ///
    /// # Errors
    ///
    /// When the device is not paused.
    pub fn save(&self) -> Result<TransportState, NotPaused> {
        let session = match &self.life {
            Life::Idle if self.is_paused => None,
            Life::Paused(session) => Some(session),
            Life::Idle | Life::Serving | Life::Resetting => return Err(NotPaused),
        };
        for queue in session.iter().flat_map(|session| &session.queues).flatten() {
            queue.ring.mark_used_ring();
        }
        let interrupt_status = self.interrupt_status.load(Ordering::SeqCst);
        let owed = match session {
            // One interrupt too many is better than one too few.
            Some(session) if owes_interrupt(session) => INTERRUPT_USED_BUFFER,
            _ => 0,
        };
        let Registers {
            status,
            device_features_sel,
            driver_features_sel,
            driver_features,
            queue_sel,
            ref queues,
        } = self.registers;
        let save_queue =
            |(index, setup)| save_queue(setup, session.map_or(0, |session| position(session, index)));
        Ok(TransportState {
            status,
            needs_reset: interrupt_status & INTERRUPT_NEEDS_RESET != 0,
            device_features_sel,
            driver_features_sel,
            driver_features,
            queue_sel,
            interrupt_status: interrupt_status & VISIBLE_INTERRUPTS | owed,
            config_generation: self.generation,
            config_seen: self.config_seen.to_vec(),
            is_started: session.is_some(),
            queues: queues.iter().enumerate().map(save_queue).collect(),
            device: self.device.save(),
        })
    }

    /// Takes up what was saved elsewhere. The device is paused then; [`Self::resume`] lets it go on, which looks at each
    /// ring once without a kick and raises the line if the driver has a reason left to acknowledge: so resume it when
    /// the interrupt controllers have their state.
    ///
    /// A driver whose configuration space has changed on the way is told.
    ///
    /// # Errors
    ///
    /// When the state is not one that this device can be in.
    ///
    /// # Panics
    ///
    /// When a driver has touched the device already.
    pub fn restore(&mut self, state: &TransportState) -> Result<(), RestoreError> {
        assert!(
            self.registers.status == 0 && matches!(self.life, Life::Idle),
            "only a fresh device is restored"
        );
        let (saved, here) = (state.device.kind(), self.device.kind());
        if saved != here {
            return Err(DeviceStateError::Kind { saved, here }.into());
        }
        let registers = self.restored_registers(state)?;
        check_start(state)?;
        let config_seen = <[u8; CONFIG_BYTES_MAX]>::try_from(state.config_seen.as_slice())
            .map_err(|_| RestoreError::Impossible("its configuration space has another length"))?;
        // Before its rings are looked for: those of memory that comes may lie in what has come.
        self.device.restore(&state.device)?;
        let session = if state.is_started {
            let positions = state.queues.iter().map(|queue| queue.position);
            Some(self.session(&registers, positions)?)
        } else {
            None
        };
        self.registers = registers;
        self.generation = state.config_generation;
        self.config_seen = config_seen;
        self.is_paused = true;
        let mut reasons = state.interrupt_status;
        if let Some(session) = session {
            if self.config_differs() {
                reasons |= INTERRUPT_CONFIGURATION;
            }
            self.life = Life::Paused(session);
        }
        self.owes_interrupt = reasons != 0;
        if state.needs_reset {
            reasons |= INTERRUPT_NEEDS_RESET;
        }
        self.interrupt_status.store(reasons, Ordering::SeqCst);
        Ok(())
    }

    /// The registers of `state`, as far as this device can have them.
    fn restored_registers(&self, state: &TransportState) -> Result<Registers, RestoreError> {
        let mut registers = Registers::new(self.device.queue_sizes_max());
        let (saved, here) = (state.queues.len(), registers.queues.len());
        if saved != here {
            return Err(RestoreError::QueueCount { saved, here });
        }
        for (index, (setup, queue)) in registers.queues.iter_mut().zip(&state.queues).enumerate() {
            if queue.size_max > setup.size_max {
                return Err(RestoreError::QueueSize {
                    index,
                    saved: queue.size_max,
                    here: setup.size_max,
                });
            }
            if queue.size > queue.size_max {
                return Err(RestoreError::Impossible("a queue is larger than it may be"));
            }
            *setup = restored_queue(queue);
        }
        if !status::is_in_order(state.status) {
            return Err(RestoreError::Impossible(
                "its status has bits that come after others that it lacks",
            ));
        }
        let features = state.driver_features;
        registers.status = state.status;
        registers.device_features_sel = state.device_features_sel;
        registers.driver_features_sel = state.driver_features_sel;
        registers.driver_features = features;
        registers.queue_sel = state.queue_sel;
        let (offered, needed) = (self.device.features(), self.device.features_needed());
        // What comes before FEATURES_OK is only a wish.
        if state.status & status::FEATURES_OK != 0 && !registers.features_are_within(offered, needed) {
            return Err(match features & !offered {
                0 => RestoreError::Impossible("its driver does not know what the device needs it to know"),
                missing => RestoreError::Features { missing },
            });
        }
        Ok(registers)
    }

    fn config_differs(&self) -> bool {
        let mut config = [0; CONFIG_BYTES_MAX];
        self.device.read_config(0, &mut config);
        config != self.config_seen
    }
}

/// The bits of InterruptStatus that the driver sees.
const VISIBLE_INTERRUPTS: u32 = INTERRUPT_USED_BUFFER | INTERRUPT_CONFIGURATION;

/// Whether a device may be served, or not, in this state.
fn check_start(state: &TransportState) -> Result<(), RestoreError> {
    let wrong = |what| Err(RestoreError::Impossible(what));
    let is_driven = state.status & status::DRIVER_OK != 0;
    if state.is_started && !is_driven {
        return wrong("it is served before its driver said so");
    }
    if is_driven && !state.is_started && !state.needs_reset {
        return wrong("it is not served, and needs no reset");
    }
    if state.interrupt_status & !VISIBLE_INTERRUPTS != 0 {
        return wrong("its interrupt has a reason that does not exist");
    }
    let is_served = |queue: &TransportQueueState| state.is_started && queue.is_ready;
    if state
        .queues
        .iter()
        .any(|queue| queue.position != 0 && !is_served(queue))
    {
        return wrong("a queue has come on without being served");
    }
    Ok(())
}

fn owes_interrupt(session: &Session) -> bool {
    session
        .queues
        .iter()
        .flatten()
        .any(|queue| queue.ring.owes_interrupt())
}

/// How far the queue of this `index` has come; 0 if it is not served.
fn position(session: &Session, index: usize) -> u16 {
    let Some(Some(queue)) = session.queues.get(index) else {
        return 0;
    };
    assert_eq!(queue.ring.in_flight(), 0, "a paused device has nothing in flight");
    queue.ring.state().next_avail
}

fn save_queue(setup: &QueueSetup, position: u16) -> TransportQueueState {
    let QueueSetup {
        layout:
            QueueLayout {
                size,
                descriptors,
                avail,
                used,
            },
        ready,
        size_max,
    } = *setup;
    TransportQueueState {
        size_max,
        size,
        is_ready: ready,
        descriptors,
        avail,
        used,
        position,
    }
}

/// As the driver set it up; the largest size stays the one that it was told.
fn restored_queue(queue: &TransportQueueState) -> QueueSetup {
    QueueSetup {
        layout: QueueLayout {
            size: queue.size,
            descriptors: queue.descriptors,
            avail: queue.avail,
            used: queue.used,
        },
        ready: queue.is_ready,
        size_max: queue.size_max,
    }
}
