//! The places of virtio devices: windows on the MMIO bus, each with an interrupt line. Some have a device from the beginning, and
//! to others one comes while the guest runs, and goes again.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};

use coracle_devices::bus::{Bus, BusError, BusRange};
use coracle_devices::hotplug::Hotplug;
use coracle_devices::virtio::device::VirtioDevice;
use coracle_devices::virtio::dirty::DirtyPages;
use coracle_devices::virtio::mem::Blocks;
use coracle_devices::virtio::mmio::{self, MmioTransport, TransportError, Window};
use serde::{Deserialize, Serialize};
use vm_memory::GuestMemoryMmap;

use super::{BuildError, NO_PANIC, TransitionError};
use crate::arch::x86_64::layout::{self, VirtioWindow};
use crate::kvm::KvmError;
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
    /// So many devices, one place after the other; vacancies begin at `first_vacancy`.
    fn in_order(devices: usize, first_vacancy: u32) -> Self {
        Self {
            occupied: (0..).take(devices).collect(),
            first_vacancy,
            used: 0,
            unheard: 0,
        }
    }

    /// That of a machine that boots: where there is no device, one may come.
    pub(super) fn at_boot(devices: usize) -> Self {
        Self::in_order(devices, u32::try_from(devices).unwrap_or(NO_VACANCY))
    }

    /// That of a machine whose tables say nothing of devices that come, as those of older versions.
    pub(super) fn without_vacancies(devices: usize) -> Self {
        Self::in_order(devices, NO_VACANCY)
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
    /// Empty windows on `bus`, for devices that are to be where `placed` says.
    pub(super) fn new(bus: &mut Bus, hotplug: &Arc<Hotplug>, placed: &PlacesState) -> Result<Self, BusError> {
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
        hotplug.restore(placed.unheard);
        Ok(Self {
            windows,
            hotplug: Arc::clone(hotplug),
            first_vacancy: placed.first_vacancy,
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

    /// A place that none of `slots` has: one that has had no device since the guest has booted, if there is one. Linux does not
    /// take up by itself what comes to a place for the second time.
    pub(super) fn vacancy(&self, slots: &[VirtioSlot]) -> Option<u32> {
        let is_vacant = |place: &u32| slots.iter().all(|slot| slot.place != *place);
        let vacant = || (0..layout::VIRTIO_DEVICES_MAX).filter(is_vacant);
        let first = |place: &u32| *place >= self.first_vacancy && self.used & 1 << place == 0;
        vacant().find(first).or_else(|| vacant().next_back())
    }

    /// Whether the guest's tables were written by a version that told of no place to which a device may come.
    pub(super) fn are_without_vacancies(&self) -> bool {
        self.first_vacancy == NO_VACANCY
    }

    /// Puts a device in its place.
    pub(super) fn put(&mut self, id: &str, mut wired: Wired) -> VirtioSlot {
        let place = wired.place;
        let window = Arc::clone(
            self.window(place)
                .expect("a device is wired for a place that there is"),
        );
        let transport = wired.transport.take().expect("it was not put anywhere yet");
        locked(&window).put(transport);
        self.used |= 1 << place;
        self.hotplug.is_there(place);
        VirtioSlot {
            id: id.to_owned(),
            place,
            window,
        }
    }

    /// Takes the device of `slot` out, unless a driver has it, or is just resetting it.
    pub(super) fn take(&self, vm: &Arc<Vm>, slot: &VirtioSlot) -> Option<Wired> {
        let mut device = slot.try_lock().filter(|device| device.is_released())?;
        let transport = device.0.take()?;
        self.hotplug.went(slot.place);
        Some(Wired {
            vm: Arc::clone(vm),
            place: slot.place,
            transport: Some(transport),
        })
    }

    fn window(&self, place: u32) -> Option<&Arc<Mutex<Window>>> {
        self.windows.get(usize::try_from(place).ok()?)
    }
}

const UNTOUCHED: &str = "no driver has touched a device that was made just now";

/// What devices reach of a machine's memory.
#[derive(Clone)]
pub(super) struct Reach {
    pub(super) memory: Arc<GuestMemoryMmap>,
    /// Where they mark what they write.
    pub(super) dirty: Arc<DirtyPages>,
    /// Of memory that comes and goes, what there is.
    pub(super) blocks: Option<Arc<Blocks>>,
}

impl Reach {
    /// All of `memory` but what is not plugged of `blocks`; what is written there is marked in `dirty`.
    pub(super) fn new(
        memory: &Arc<GuestMemoryMmap>,
        dirty: Arc<DirtyPages>,
        blocks: Option<Arc<Blocks>>,
    ) -> Self {
        Self {
            memory: Arc::clone(memory),
            dirty,
            blocks,
        }
    }
}

/// A device that is connected to the interrupt and the addresses of a place, and is not there. Dropped, it is disconnected.
///
/// Any thread may make and drop one, and where the guest's memory may still be on its way that has to be another than the
/// monitor's: KVM then waits for vCPUs that are in the kernel, and one of these may wait for memory.
pub(super) struct Wired {
    vm: Arc<Vm>,
    place: u32,
    /// There until it is put in its place.
    transport: Option<MmioTransport>,
}

impl Wired {
    /// Connects `device` to `place`.
    ///
    /// # Errors
    ///
    /// When there is no such place, or the host refuses.
    pub(super) fn new(
        vm: &Arc<Vm>,
        place: u32,
        device: Box<dyn VirtioDevice>,
        reach: &Reach,
    ) -> Result<Self, WireError> {
        let at = VirtioWindow::of_device(place).ok_or(WireError::NoPlace)?;
        let mut transport = MmioTransport::new(device, Arc::clone(&reach.memory))?;
        transport.track(Some(Arc::clone(&reach.dirty))).expect(UNTOUCHED);
        transport.restrict(reach.blocks.clone()).expect(UNTOUCHED);
        vm.connect_interrupt(transport.line(), at.irq)?;
        for (index, kick) in (0..).zip(transport.kicks()) {
            if let Err(error) = vm.connect_kick(kick, at.address + mmio::QUEUE_NOTIFY, index) {
                disconnect(vm, &transport, at, index);
                return Err(error.into());
            }
        }
        Ok(Self {
            vm: Arc::clone(vm),
            place,
            transport: Some(transport),
        })
    }
}

impl Drop for Wired {
    fn drop(&mut self) {
        if let (Some(transport), Some(at)) = (&self.transport, VirtioWindow::of_device(self.place)) {
            disconnect(&self.vm, transport, at, u32::MAX);
        }
    }
}

/// Why a device cannot be connected to a place.
#[derive(Debug, thiserror::Error)]
pub(super) enum WireError {
    #[error("no machine has such a place")]
    NoPlace,
    #[error(transparent)]
    Host(#[from] io::Error),
    #[error(transparent)]
    Kvm(#[from] KvmError),
}

impl WireError {
    /// The same about device `id`.
    pub(super) fn of(self, id: &str) -> BuildError {
        match self {
            Self::NoPlace => BuildError::TooManyDevices,
            Self::Host(source) => BuildError::Device {
                id: id.to_owned(),
                source,
            },
            Self::Kvm(error) => error.into(),
        }
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

    /// Drops the device, whose threads end with it. Its connections end with the machine.
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
        assert!(PlacesState::at_boot(18).check(18).is_ok());
        assert!(PlacesState::without_vacancies(18).check(18).is_ok());
        for (occupied, devices) in [(&[0][..], 2), (&[0, 18], 2), (&[3, 3], 2), (&[u32::MAX], 1)] {
            assert!(state(occupied).check(devices).is_err(), "{occupied:?}");
        }
        assert!(PlacesState::without_vacancies(19).check(19).is_err());
    }
}
