//! The places of virtio devices: windows on the MMIO bus, each with an interrupt line. Some have a device from the beginning, and
//! to others one comes while the guest runs, and goes again.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};

use coracle_devices::bus::{Bus, BusError, BusRange};
use coracle_devices::hotplug::Hotplug;
use coracle_devices::virtio::device::VirtioDevice;
use coracle_devices::virtio::dirty::DirtyPages;
use coracle_devices::virtio::mmio::{self, MmioTransport, TransportError, Window};
use serde::{Deserialize, Serialize};
use vm_memory::GuestMemoryMmap;

use super::plan::Origin;
use super::{BuildError, NO_PANIC, TransitionError};
use crate::arch::x86_64::layout::{self, VirtioWindow};
use crate::kvm::vm::Vm;
use crate::state::Body;

/// Instead of the first vacancy, where the guest's tables have none at all.
const NO_VACANCY: u32 = u32::MAX;

/// The places of one machine.
pub(super) struct Places {
    windows: Vec<Arc<Mutex<Window>>>,
    /// What the guest asks of them.
    pub(super) hotplug: Arc<Hotplug>,
    /// The first to which a device may come: the guest's tables tell of no other. Those before have had one from the beginning.
    first_vacancy: u32,
    /// A bit for each that has had a device since the guest has booted.
    used: u32,
}

/// One virtio device in its place.
pub(super) struct VirtioSlot {
    /// The device's id in the configuration.
    pub(super) id: String,
    place: u32,
    window: Arc<Mutex<Window>>,
}

/// Where the devices of a machine were, as plain data.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct PlacesState {
    /// The place of each device, in the order of their states.
    pub(super) occupied: Vec<u32>,
    first_vacancy: u32,
    used: u32,
    /// The places of which the guest has not heard that a device has come.
    unheard: u32,
}

impl Body for PlacesState {
    const VERSION: u32 = 1;
}

/// A state of places that no machine has.
#[derive(Debug, thiserror::Error)]
#[error("the snapshot has {0}: it was not saved by this program")]
pub struct PlacesError(&'static str);

impl PlacesState {
    /// That of a machine whose tables say nothing of devices that come, as those of older versions: one place after the other.
    pub(super) fn without_vacancies(devices: usize) -> Self {
        let places = (0..layout::VIRTIO_DEVICES_MAX).take(devices);
        Self {
            occupied: places.collect(),
            first_vacancy: NO_VACANCY,
            used: 0,
            unheard: 0,
        }
    }

    /// Checks what somebody else may have written: it is of so many `devices`.
    ///
    /// # Errors
    ///
    /// What cannot be.
    pub(super) fn check(&self, devices: usize) -> Result<(), PlacesError> {
        if self.occupied.len() != devices {
            return Err(PlacesError("not a place for each device"));
        }
        let mut seen = 0_u32;
        for &place in &self.occupied {
            if place >= layout::VIRTIO_DEVICES_MAX {
                return Err(PlacesError("a device in a place that no machine has"));
            }
            if seen & 1 << place != 0 {
                return Err(PlacesError("two devices in one place"));
            }
            seen |= 1 << place;
        }
        Ok(())
    }
}

impl Places {
    /// Empty windows on `bus`, for devices that are to be where `placed` says: to a guest that boots, those behind them are
    /// vacancies; one that goes on has what it had.
    pub(super) fn new(
        bus: &mut Bus,
        hotplug: &Arc<Hotplug>,
        origin: &Origin,
        placed: &PlacesState,
    ) -> Result<Self, BusError> {
        let mut windows = Vec::new();
        for (index, window) in VirtioWindow::all().enumerate() {
            let range = BusRange {
                start: window.address,
                len: mmio::MMIO_LEN,
            };
            let there = Arc::<Mutex<Window>>::default();
            bus.insert(range, &format!("virtio device {index}"), there.clone())?;
            windows.push(there);
        }
        let first_vacancy = match origin {
            Origin::Boot(_) => u32::try_from(placed.occupied.len()).unwrap_or(NO_VACANCY),
            Origin::Saved(_) => placed.first_vacancy,
        };
        hotplug.restore(placed.unheard);
        Ok(Self {
            windows,
            hotplug: Arc::clone(hotplug),
            first_vacancy,
            used: placed.used,
        })
    }

    /// Where the devices in `slots` are.
    pub(super) fn save(&self, slots: &[VirtioSlot]) -> PlacesState {
        PlacesState {
            occupied: slots.iter().map(|slot| slot.place).collect(),
            first_vacancy: self.first_vacancy,
            used: self.used,
            unheard: self.hotplug.unheard(),
        }
    }

    /// A place to which a device may come: one that has had none, if there is one. Linux does not take up by itself what comes to
    /// a place for the second time.
    pub(super) fn vacancy(&self) -> Option<u32> {
        let vacant = |place: &u32| {
            let window = self.window(*place);
            window.is_some_and(|window| locked(window).device().is_none())
        };
        let vacancies = || (self.first_vacancy..layout::VIRTIO_DEVICES_MAX).filter(vacant);
        vacancies()
            .find(|place| self.used & 1 << place == 0)
            .or_else(|| vacancies().next())
    }

    /// Whether the guest's tables were written by a version that told of no place to which a device may come.
    pub(super) fn are_without_vacancies(&self) -> bool {
        self.first_vacancy == NO_VACANCY
    }

    /// Puts `device` in `place`, and connects its interrupt and its queues; what it writes is marked in `dirty`.
    ///
    /// # Errors
    ///
    /// When there is no such place, or the host refuses; then nothing is connected.
    pub(super) fn insert(
        &mut self,
        vm: &Vm,
        memory: &Arc<GuestMemoryMmap>,
        dirty: Arc<DirtyPages>,
        (id, place, device): (&str, u32, Box<dyn VirtioDevice>),
    ) -> Result<VirtioSlot, BuildError> {
        let at = VirtioWindow::of_device(place).ok_or(BuildError::TooManyDevices)?;
        let window = self.window(place).ok_or(BuildError::TooManyDevices)?;
        let failed = |source: io::Error| BuildError::Device {
            id: id.to_owned(),
            source,
        };
        let mut transport = MmioTransport::new(device, Arc::clone(memory)).map_err(failed)?;
        transport
            .track(Some(dirty))
            .expect("no driver has touched a device that was made just now");
        vm.connect_interrupt(transport.line(), at.irq)?;
        for (index, kick) in (0..).zip(transport.kicks()) {
            if let Err(error) = vm.connect_kick(kick, at.address + mmio::QUEUE_NOTIFY, index) {
                disconnect(vm, &transport, at, index);
                return Err(error.into());
            }
        }
        let window = Arc::clone(window);
        locked(&window).put(transport);
        self.used |= 1 << place;
        self.hotplug.is_there(place);
        Ok(VirtioSlot {
            id: id.to_owned(),
            place,
            window,
        })
    }

    /// Takes the device of `slot` out, unless a driver has it, or is just resetting it.
    pub(super) fn remove(&self, vm: &Vm, slot: &VirtioSlot) -> Option<MmioTransport> {
        let mut device = slot.try_lock().filter(|device| device.is_released())?;
        let transport = device.0.take()?;
        let at = VirtioWindow::of_device(slot.place).expect("a device was put there");
        disconnect(vm, &transport, at, u32::MAX);
        self.hotplug.went(slot.place);
        Some(transport)
    }

    fn window(&self, place: u32) -> Option<&Arc<Mutex<Window>>> {
        self.windows.get(usize::try_from(place).ok()?)
    }
}

/// Disconnects the interrupt and the first so many queues.
fn disconnect(vm: &Vm, transport: &MmioTransport, at: VirtioWindow, queues: u32) {
    vm.disconnect_interrupt(transport.line(), at.irq);
    for (index, kick) in (0..queues).zip(transport.kicks()) {
        vm.disconnect_kick(kick, at.address + mmio::QUEUE_NOTIFY, index);
    }
}

fn locked(window: &Mutex<Window>) -> MutexGuard<'_, Window> {
    window.lock().expect(NO_PANIC)
}

/// The device of a slot, for as long as nobody else touches it.
pub(super) struct Held<'a>(MutexGuard<'a, Window>);

const STAYS: &str = "a device stays in its slot until that is dropped";

impl std::ops::Deref for Held<'_> {
    type Target = MmioTransport;

    fn deref(&self) -> &MmioTransport {
        self.0.seen().expect(STAYS)
    }
}

impl std::ops::DerefMut for Held<'_> {
    fn deref_mut(&mut self) -> &mut MmioTransport {
        self.0.device().expect(STAYS)
    }
}

impl VirtioSlot {
    /// The number of its place.
    pub(super) fn place(&self) -> u32 {
        self.place
    }

    /// Drops the device, whose threads end with it.
    pub(super) fn clear(&self) {
        drop(locked(&self.window).take());
    }

    pub(super) fn start(&self) -> Result<(), TransitionError> {
        self.lock().resume().map_err(|source| self.failed(source))
    }

    pub(super) fn stop(&self) -> Result<(), TransitionError> {
        self.lock().pause().map_err(|source| self.failed(source))
    }

    pub(super) fn failed(&self, source: TransportError) -> TransitionError {
        TransitionError::Device {
            id: self.id.clone(),
            source,
        }
    }

    pub(super) fn lock(&self) -> Held<'_> {
        Held(locked(&self.window))
    }

    /// The same, unless a vCPU has it: one that resets the device may keep it as long as that takes to drain.
    pub(super) fn try_lock(&self) -> Option<Held<'_>> {
        match self.window.try_lock() {
            Ok(window) => Some(Held(window)),
            Err(TryLockError::WouldBlock) => None,
            Err(TryLockError::Poisoned(_)) => panic!("{NO_PANIC}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_that_no_machine_has_is_refused() {
        let state = |occupied: &[u32]| PlacesState {
            occupied: occupied.to_vec(),
            ..PlacesState::without_vacancies(0)
        };
        assert!(state(&[0, 17, 3]).check(3).is_ok());
        assert!(PlacesState::without_vacancies(18).check(18).is_ok());
        for (occupied, devices) in [(&[0][..], 2), (&[0, 18], 2), (&[3, 3], 2), (&[u32::MAX], 1)] {
            assert!(state(occupied).check(devices).is_err(), "{occupied:?}");
        }
        assert!(PlacesState::without_vacancies(19).check(19).is_err());
    }
}
