//! From a [`Plan`] to a paused machine: the only place that knows all parts at once.

use std::io;
use std::sync::{Arc, Mutex};

use coracle_devices::bus::{Bus, BusError, BusRange};
use coracle_devices::hotplug::Hotplug;
use coracle_devices::power::EndSignal;
use coracle_devices::virtio::balloon::{Balloon, BalloonConfig, BalloonControl};
use coracle_devices::virtio::blk::{Blk, HeldDisk};
use coracle_devices::virtio::device::VirtioDevice;
use coracle_devices::virtio::mem::{Geometry, Mem, MemControl};
use coracle_devices::virtio::net::Net;
use coracle_devices::virtio::pmem::{Pmem, Unwritable};
use coracle_devices::virtio::rng::{Entropy, EntropyConfig, EntropyCounts};
use coracle_devices::virtio::vsock::{Vsock, VsockCounts};
use coracle_storage::open::OpenError;
use kvm_ioctls::{Kvm, VcpuFd};
use vm_memory::GuestMemoryMmap;

use super::lineage::Lineage;
use super::memory_slots::MemorySlots;
use super::places::{Places, PlacesState, Reach, VirtioSlot, Wired};
use super::plan::{
    BootOrigin, BootPlan, DiskPlan, MemoryPlan, NetworkPlan, Origin, Plan, RootOn, SavedOrigin, VsockPlan,
};
use super::platform::{Platform, PlatformError, renew_generation};
use super::pmem::{MappedPmem, PmemPlan, PmemSlot, on_cut};
use super::restore::RestoreError;
use super::shell::Shell;
use super::{DriveSlot, Machine, NetworkSlot, Parts, Paused};
use crate::arch::x86_64::boot::cmdline::{Cmdline, Root, RootDevice};
use crate::arch::x86_64::boot::{self, BootError, BootSource, Entry};
use crate::arch::x86_64::cpu::{Cpu, CpuError, Topology};
use crate::arch::x86_64::layout::{self, VirtioWindow};
use crate::arch::x86_64::regs::{self, RegsError};
use crate::arch::x86_64::tables::{self, TablesError};
use crate::end::Ending;
use crate::kvm::KvmError;
use crate::kvm::vcpu::{Outside, Vcpu, VcpuCounters, VcpuError};
use crate::kvm::vm::Vm;
use crate::memory::mapped::Mapping;
use crate::memory::reclaim::Reclaimer;
use crate::memory::{self, HotplugRegion, MemoryError};
use crate::snapshot::memory::{MemoryId, Untouched};

/// Why a planned machine could not be built. Nothing of it is left behind.
#[derive(Debug, thiserror::Error)]
pub enum BuildError {
    /// KVM is not there, or refuses.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The memory cannot be had.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The kernel cannot be booted.
    #[error("cannot boot `{kernel}`")]
    Boot {
        /// As configured.
        kernel: String,
        /// Why.
        #[source]
        source: BootError,
    },
    /// The tables do not fit.
    #[error(transparent)]
    Tables(#[from] TablesError),
    /// The processors cannot be had so.
    #[error(transparent)]
    Cpu(#[from] CpuError),
    /// The boot processor does not take its registers.
    #[error(transparent)]
    Registers(#[from] RegsError),
    /// A vCPU thread cannot be started.
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    /// The serial port or another fixed device cannot be made.
    #[error(transparent)]
    Platform(#[from] PlatformError),
    /// Two devices want the same address.
    #[error(transparent)]
    Bus(#[from] BusError),
    /// A virtio device cannot be made.
    #[error("device `{id}` cannot be made")]
    Device {
        /// Which.
        id: String,
        /// What the host answered.
        #[source]
        source: io::Error,
    },
    /// A drive's lease cannot be recorded.
    #[error("drive `{id}` cannot be used")]
    Lease {
        /// The drive.
        id: String,
        /// Why.
        #[source]
        source: OpenError,
    },
    /// A pmem device's lease cannot be recorded.
    #[error("pmem device `{id}` cannot be used")]
    PmemLease {
        /// The device.
        id: String,
        /// Why.
        #[source]
        source: OpenError,
    },
    /// Its file cannot be made as long as what the guest sees of it.
    #[error(
        "the file of pmem device `{id}` cannot be lengthened to a multiple of 2 MiB, which the guest sees of it"
    )]
    PmemFile {
        /// The device.
        id: String,
        /// What the host answered.
        #[source]
        source: io::Error,
    },
    /// More devices than interrupt lines.
    #[error(
        "there are more than {} virtio devices: leave one out",
        layout::VIRTIO_DEVICES_MAX
    )]
    TooManyDevices,
    /// The saved state is not taken.
    #[error(transparent)]
    Restore(#[from] RestoreError),
    /// The host has no random bytes.
    #[error("the host has no random bytes for the guest")]
    Random(#[source] io::Error),
}

/// Builds the machine that `plan` describes; the guest's first instruction waits for
/// [`Machine::resume`]. What ends the machine later is announced to `ending`, or to `guest_end` if
/// the guest ends itself.
///
/// # Errors
///
/// What could not be had; everything that was made by then is gone again.
pub fn build(plan: Plan, ending: &Ending, guest_end: &Arc<EndSignal>) -> Result<Machine<Paused>, BuildError> {
    let mut parts = assemble(plan, ending, guest_end)?;
    // The leases were being recorded all the while; no guest writes before they are.
    for drive in &mut parts.drives {
        drive.settle()?;
    }
    for pmem in &mut parts.pmem {
        pmem.settle()?;
    }
    Ok(Machine::new(parts))
}

/// Where the boot timer is.
const BOOT_TIMER: BusRange = BusRange {
    start: layout::BOOT_TIMER.0,
    len: layout::BOOT_TIMER_BYTES,
};

fn assemble(mut plan: Plan, ending: &Ending, guest_end: &Arc<EndSignal>) -> Result<Parts, BuildError> {
    let placed = placed(&plan)?;
    let (memory, parent) = memory_of(&plan.origin)?;
    // Before KVM's part of the machine, and so dropped after it: as long as that is there, files may be written.
    let (mapped, files) = PmemPlan::map_all(std::mem::take(&mut plan.pmem))?;
    let Shell { kvm, vm, vcpus } = shell_of(&mut plan, &memory, &files)?;
    let vm = Arc::new(vm);
    let lineage = Lineage::new(parent, plan.dirty_log, &memory);

    // Before the devices, and so dropped after them: a lease ends when nobody uses the image any more.
    let mut drives = Vec::new();
    let hotplug = Hotplug::new().map_err(device_failed("places of devices"))?;
    let mut mmio = Bus::new();
    let places = Places::new(&mut mmio, &hotplug, &placed)?;
    let geometry = plan.hotplug.map(|region| region.geometry());
    let blocks = geometry.as_ref().map(|all| Arc::clone(&all.blocks));
    let reach = Reach::new(&memory, lineage.devices(), blocks.clone());
    let mut virtio = VirtioBus::new(&vm, reach, places, placed.occupied);
    virtio.insert_drives(plan.disks, &mut drives)?;
    let networks = virtio.insert_networks(plan.networks)?;
    let vsock_counts = virtio.insert_vsock(plan.vsock)?;
    let balloon = virtio.insert_balloon(plan.balloon)?;
    let entropy_counts = virtio.insert_entropy(plan.entropy)?;
    let pmem = virtio.insert_pmem(mapped, &mut mmio, ending)?;
    let memory_hotplug = virtio.insert_memory(plan.hotplug.zip(geometry), lineage.untouched())?;
    let VirtioBus { places, slots, .. } = virtio;

    if let Some(timer) = plan.boot_timer {
        mmio.insert(BOOT_TIMER, "boot timer", Arc::new(Mutex::new(timer)))?;
    }
    let platform = Platform::new(&vm, &plan.serial, guest_end, &hotplug)?;
    let counters = Arc::<VcpuCounters>::default();
    let outside = Outside {
        ports: Arc::new(platform.ports),
        mmio: Arc::new(mmio),
        memory: Arc::clone(&memory),
        files,
        ending: ending.clone(),
        guest_end: Arc::clone(guest_end),
        counters: Arc::clone(&counters),
        share: Arc::default(),
    };
    let mut parts = Parts {
        vcpus: Vec::new(),
        devices: slots,
        places,
        drives,
        groups: plan.groups,
        networks,
        vsock_counts,
        balloon,
        memory_hotplug,
        blocks,
        entropy_counts,
        serial: platform.serial,
        keyboard: platform.keyboard,
        generation: platform.generation,
        counters,
        share: Arc::clone(&outside.share),
        vm: Some(vm),
        pager: None,
        fetcher: None,
        memory,
        pmem,
        lineage,
        is_remembered: matches!(plan.origin, Origin::Saved(_)),
    };
    let origin = (plan.origin, plan.hotplug);
    begin(&mut parts, (&kvm, &vcpus), origin, plan.topology)?;
    parts.vcpus = spawn(vcpus, &outside)?;
    Ok(parts)
}

/// The machine that KVM has been asked for, or will be now.
fn shell_of(
    plan: &mut Plan,
    memory: &Arc<GuestMemoryMmap>,
    files: &[Arc<Mapping>],
) -> Result<Shell, BuildError> {
    if let Some(shell) = plan.shell.take() {
        return Ok(shell);
    }
    let vcpus = plan.topology.vcpus();
    let shell = Shell::new(memory, plan.hotplug, files.to_vec(), vcpus, plan.dirty_log)?;
    Ok(shell)
}

/// Has the guest begin where `origin` says: its memory is there but for what comes to the region `hotplug` later.
fn begin(
    parts: &mut Parts,
    kvm: (&Kvm, &[VcpuFd]),
    (origin, hotplug): (Origin, Option<HotplugRegion>),
    topology: Topology,
) -> Result<(), BuildError> {
    match origin {
        Origin::Boot(origin) => {
            let memory = memory::layout::at_boot(&parts.memory, hotplug);
            let windows = parts.devices.len();
            boot(kvm, (&memory, windows), &origin, topology)
        }
        Origin::Saved(origin) => parts.go_on(kvm.1, *origin),
    }
}

impl Parts {
    /// Gives the fresh parts what was saved.
    fn go_on(&mut self, vcpus: &[VcpuFd], origin: SavedOrigin) -> Result<(), BuildError> {
        (self.pager, self.fetcher) = (origin.memory.pager, origin.memory.fetcher);
        self.restore(vcpus, &origin.state)?;
        // Another generation, or at least another place.
        self.generation.announce().map_err(RestoreError::from)?;
        for network in &self.networks {
            network.control.announce();
        }
        Ok(())
    }
}

/// The memory that a guest begins with, and its name if a snapshot has given it one.
fn memory_of(origin: &Origin) -> Result<(Arc<GuestMemoryMmap>, Option<MemoryId>), MemoryError> {
    match origin {
        Origin::Boot(origin) => {
            let MemoryPlan {
                layout,
                backing,
                pages,
            } = origin.memory;
            Ok((memory::allocate(layout, backing, pages)?, None))
        }
        Origin::Saved(origin) => Ok((Arc::clone(&origin.memory.memory), origin.memory.id)),
    }
}

/// Puts the kernel and its tables, which tell of so many devices, into memory, and has the processors begin with it.
fn boot(
    (kvm, vcpus): (&Kvm, &[VcpuFd]),
    (memory, devices): (&GuestMemoryMmap, usize),
    origin: &BootOrigin,
    topology: Topology,
) -> Result<(), BuildError> {
    let windows: Vec<_> = VirtioWindow::all().take(devices).collect();
    let cpu = Cpu::new(kvm, topology, origin.template.clone())?;
    renew_generation(memory)?;
    layout::VMCLOCK.write(memory).map_err(PlatformError::from)?;
    let entry = load(memory, &origin.boot, &windows)?;
    tables::write(
        memory,
        &tables::Platform {
            vcpus: topology.vcpus(),
            virtio: &windows,
        },
    )?;
    // All of them are configured before the first thread starts: KVM wants them so (their number is part of the topology).
    for (index, fd) in (0..).zip(vcpus) {
        cpu.configure(fd, index)?;
        if index == 0 {
            regs::enter(fd, memory, &entry)?;
        }
    }
    Ok(())
}

fn spawn(made: Vec<VcpuFd>, outside: &Outside) -> Result<Vec<Vcpu>, BuildError> {
    (0..)
        .zip(made)
        .map(|(index, fd)| Ok(Vcpu::spawn(index, fd, outside.clone())?))
        .collect()
}

fn device_failed(id: &str) -> impl FnOnce(io::Error) -> BuildError + '_ {
    move |source| BuildError::Device {
        id: id.to_owned(),
        source,
    }
}

/// The device of a planned disk, and what controls it.
pub(super) fn drive_of(plan: DiskPlan) -> Result<(DriveSlot, Blk), BuildError> {
    let DiskPlan {
        held,
        group,
        is_taken_over,
    } = plan;
    let HeldDisk { disk, hold } = held;
    let id = disk.id.clone();
    let (blk, control) = Blk::new(disk).map_err(device_failed(&id))?;
    let slot = DriveSlot {
        id,
        group,
        control,
        hold,
        is_taken_over,
    };
    Ok((slot, blk))
}

/// The device of a planned network interface, and what controls it.
pub(super) fn network_of(plan: NetworkPlan) -> Result<(NetworkSlot, Net), BuildError> {
    let NetworkPlan {
        config,
        metadata,
        tap,
    } = plan;
    let id = config.iface_id.clone();
    let (net, control) = Net::new(&config, tap, metadata).map_err(device_failed(&id))?;
    Ok((NetworkSlot { id, control }, net))
}

impl DriveSlot {
    /// Waits until the lease of the image is recorded.
    pub(super) fn settle(&mut self) -> Result<(), BuildError> {
        self.hold.settle().map_err(|source| BuildError::Lease {
            id: self.id.clone(),
            source,
        })
    }
}

/// Where each device of `plan` goes.
fn placed(plan: &Plan) -> Result<PlacesState, BuildError> {
    let single = [
        plan.vsock.is_some(),
        plan.balloon.is_some(),
        plan.entropy.is_some(),
        plan.hotplug.is_some(),
    ];
    let single: usize = single.map(usize::from).iter().sum();
    let devices = plan.disks.len() + plan.networks.len() + single + plan.pmem.len();
    let places = match &plan.origin {
        Origin::Saved(origin) => {
            let saved = origin.state.places.clone();
            saved.unwrap_or_else(|| PlacesState::without_vacancies(devices))
        }
        Origin::Boot(_) if devices > layout::VIRTIO_DEVICES_MAX as usize => {
            return Err(BuildError::TooManyDevices);
        }
        Origin::Boot(_) => PlacesState::at_boot(devices),
    };
    places.check(devices).map_err(RestoreError::from)?;
    Ok(places)
}

/// Puts virtio devices in their places, in the order in which their states are saved.
struct VirtioBus<'a> {
    vm: &'a Arc<Vm>,
    reach: Reach,
    places: Places,
    /// The places of the devices that are still to come.
    next: std::vec::IntoIter<u32>,
    slots: Vec<VirtioSlot>,
}

impl<'a> VirtioBus<'a> {
    /// Puts devices into `places`, one after the other where `occupied` says.
    fn new(vm: &'a Arc<Vm>, reach: Reach, places: Places, occupied: Vec<u32>) -> Self {
        Self {
            vm,
            reach,
            places,
            next: occupied.into_iter(),
            slots: Vec::new(),
        }
    }

    fn insert_drives(&mut self, plans: Vec<DiskPlan>, drives: &mut Vec<DriveSlot>) -> Result<(), BuildError> {
        for plan in plans {
            let (slot, blk) = drive_of(plan)?;
            let id = slot.id.clone();
            drives.push(slot);
            self.insert(&id, Box::new(blk))?;
        }
        Ok(())
    }

    fn insert_networks(&mut self, plans: Vec<NetworkPlan>) -> Result<Vec<NetworkSlot>, BuildError> {
        let networks = plans.into_iter().map(|plan| {
            let (slot, net) = network_of(plan)?;
            self.insert(&slot.id, Box::new(net))?;
            Ok(slot)
        });
        networks.collect()
    }

    fn insert_vsock(&mut self, plan: Option<VsockPlan>) -> Result<Option<Arc<VsockCounts>>, BuildError> {
        let Some(plan) = plan else {
            return Ok(None);
        };
        let (vsock, counts) = Vsock::new(&plan.config, plan.listener).map_err(device_failed("vsock"))?;
        self.insert("vsock", Box::new(vsock))?;
        Ok(Some(counts))
    }

    fn insert_balloon(
        &mut self,
        config: Option<BalloonConfig>,
    ) -> Result<Option<BalloonControl>, BuildError> {
        let Some(config) = config else {
            return Ok(None);
        };
        let reclaimer = Box::new(Reclaimer::of(&self.reach.memory));
        let (balloon, control) = Balloon::new(&config, reclaimer).map_err(device_failed("balloon"))?;
        self.insert("balloon", Box::new(balloon))?;
        Ok(Some(control))
    }

    fn insert_entropy(
        &mut self,
        config: Option<EntropyConfig>,
    ) -> Result<Option<Arc<EntropyCounts>>, BuildError> {
        let Some(config) = config else {
            return Ok(None);
        };
        let entropy = Entropy::new(&config).map_err(device_failed("entropy"))?;
        let counts = Arc::clone(entropy.counts());
        self.insert("entropy", Box::new(entropy))?;
        Ok(Some(counts))
    }

    /// Stores to those that are only read end on the bus `mmio`; of one that is cut `ending` hears.
    fn insert_pmem(
        &mut self,
        mapped: Vec<MappedPmem>,
        mmio: &mut Bus,
        ending: &Ending,
    ) -> Result<Vec<PmemSlot>, BuildError> {
        let mut slots = Vec::new();
        for pmem in mapped {
            let (id, range) = (pmem.config.id.clone(), pmem.range);
            if pmem.config.read_only {
                let unwritable = Arc::new(Mutex::new(Unwritable::new(&id)));
                let at = BusRange {
                    start: range.start,
                    len: range.size_bytes,
                };
                mmio.insert(at, &id, unwritable)?;
            }
            let made = Pmem::new(&pmem.config, Arc::clone(&pmem.medium), range, on_cut(&id, ending));
            let (device, control) = made.map_err(device_failed(&id))?;
            slots.push(PmemSlot {
                id: id.clone(),
                control,
                range,
                medium: pmem.medium,
                flusher: Arc::default(),
                hold: pmem.hold,
            });
            self.insert(&id, Box::new(device))?;
        }
        Ok(slots)
    }

    fn insert_memory(
        &mut self,
        hotplug: Option<(HotplugRegion, Geometry)>,
        untouched: Untouched,
    ) -> Result<Option<MemControl>, BuildError> {
        let Some((hotplug, geometry)) = hotplug else {
            return Ok(None);
        };
        let slots = Box::new(MemorySlots::new(self.vm, &self.reach, hotplug, untouched));
        let (device, control) = Mem::new(geometry, slots).map_err(device_failed("memory"))?;
        self.insert("memory", Box::new(device))?;
        Ok(Some(control))
    }

    /// Puts the next device in the next place.
    fn insert(&mut self, id: &str, device: Box<dyn VirtioDevice>) -> Result<(), BuildError> {
        let place = self.next.next().ok_or(BuildError::TooManyDevices)?;
        let wired = Wired::new(self.vm, place, device, &self.reach).map_err(|error| error.of(id))?;
        self.slots.push(self.places.put(id, wired));
        Ok(())
    }
}

fn load(memory: &GuestMemoryMmap, plan: &BootPlan, windows: &[VirtioWindow]) -> Result<Entry, BuildError> {
    let root = plan.root.as_ref().map(|root| Root {
        device: match &root.on {
            RootOn::Disk(None) => RootDevice::Disk,
            RootOn::Disk(Some(partuuid)) => RootDevice::Partition(partuuid),
            RootOn::Pmem(number) => RootDevice::Pmem(*number),
        },
        access: root.access,
    });
    let failed = |source| BuildError::Boot {
        kernel: plan.name.clone(),
        source,
    };
    let cmdline = Cmdline::compose(plan.arguments.as_deref(), root, windows)
        .map_err(|error| failed(BootError::Cmdline(error)))?;
    let mut rng_seed = [0; 32];
    coracle_devices::random::fill(&mut rng_seed).map_err(BuildError::Random)?;
    let source = BootSource {
        kernel: &plan.kernel,
        initrd: plan.initrd.as_ref(),
        cmdline: &cmdline,
        protocol: plan.protocol,
        rng_seed,
    };
    boot::load(memory, &source).map_err(failed)
}
