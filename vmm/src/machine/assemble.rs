//! From a [`Plan`] to a paused machine: the only place that knows all parts at once.

use std::io;
use std::sync::{Arc, Mutex};

use coracle_devices::bus::{Bus, BusDevice, BusError, BusRange};
use coracle_devices::power::EndSignal;
use coracle_devices::virtio::blk::{Blk, HeldDisk};
use coracle_devices::virtio::device::VirtioDevice;
use coracle_devices::virtio::mmio::{self, MmioTransport};
use coracle_devices::virtio::rng::Entropy;
use vm_memory::GuestMemoryMmap;

use super::plan::{BootPlan, Plan};
use super::platform::{Platform, PlatformError};
use super::{DriveSlot, Machine, Parts, Paused, VirtioSlot};
use crate::arch::x86_64::boot::cmdline::{Cmdline, Root};
use crate::arch::x86_64::boot::{self, BootError, BootSource, Entry};
use crate::arch::x86_64::cpu::{Cpu, CpuError};
use crate::arch::x86_64::layout::{self, VirtioWindow};
use crate::arch::x86_64::regs::{self, RegsError};
use crate::arch::x86_64::tables::{self, TablesError};
use crate::end::Ending;
use crate::kvm::KvmError;
use crate::kvm::vcpu::{Outside, Vcpu, VcpuCounters, VcpuError};
use crate::kvm::vm::{self, Vm};
use crate::memory::{self, MemoryError};

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
    /// More devices than interrupt lines.
    #[error(
        "there are more than {} virtio devices: leave one out",
        layout::VIRTIO_DEVICES_MAX
    )]
    TooManyDevices,
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
    let kvm = vm::open()?;
    vm::check_vcpu_count(&kvm, plan.topology.vcpus())?;
    let cpu = Cpu::new(&kvm, plan.topology, plan.template)?;
    let memory = memory::allocate(plan.memory.mib, plan.memory.backing, plan.memory.pages)?;
    let vm = Vm::new(&kvm, Arc::clone(&memory), plan.memory.dirty_log)?;

    // Before the devices, and so dropped after them: a lease ends when nobody uses the image any more.
    let mut drives = Vec::new();
    let mut virtio = VirtioBus::new(&vm, &memory);
    for HeldDisk { disk, hold } in plan.disks {
        let id = disk.id.clone();
        let (blk, control) = Blk::new(disk).map_err(device_failed(&id))?;
        let at = virtio.insert(&id, Box::new(blk))?;
        drives.push(DriveSlot {
            id,
            control,
            at,
            hold,
        });
    }
    let entropy = plan
        .entropy
        .map(|config| Entropy::new(&config).map_err(device_failed("entropy")))
        .transpose()?;
    let entropy_counts = entropy.as_ref().map(|entropy| Arc::clone(entropy.counts()));
    if let Some(entropy) = entropy {
        virtio.insert("entropy", Box::new(entropy))?;
    }
    let VirtioBus {
        bus: mut mmio,
        windows,
        slots,
        ..
    } = virtio;

    if let Some(timer) = plan.boot_timer {
        let range = BusRange {
            start: layout::BOOT_TIMER.0,
            len: layout::BOOT_TIMER_BYTES,
        };
        mmio.insert(range, "boot timer", Arc::new(Mutex::new(timer)))?;
    }

    let platform = Platform::new(&vm, &memory, &plan.serial, guest_end)?;
    let entry = load(&memory, &plan.boot, &windows)?;
    tables::write(
        &memory,
        &tables::Platform {
            vcpus: cpu.topology().vcpus(),
            virtio: &windows,
        },
    )?;

    let counters = Arc::new(VcpuCounters::default());
    let outside = Outside {
        ports: Arc::new(platform.ports),
        mmio: Arc::new(mmio),
        memory: Arc::clone(&memory),
        ending: ending.clone(),
        counters: Arc::clone(&counters),
    };
    let vcpus = start_vcpus(&vm, &cpu, &memory, &entry, &outside)?;
    Ok(Machine::new(Parts {
        vcpus,
        devices: slots,
        drives,
        entropy_counts,
        serial: platform.serial,
        keyboard: platform.keyboard,
        counters,
        _vm: vm,
    }))
}

fn device_failed(id: &str) -> impl FnOnce(io::Error) -> BuildError + '_ {
    move |source| BuildError::Device {
        id: id.to_owned(),
        source,
    }
}

/// Puts virtio devices on the MMIO bus, one window and one interrupt line each.
struct VirtioBus<'a> {
    vm: &'a Vm,
    memory: &'a Arc<GuestMemoryMmap>,
    bus: Bus,
    windows: Vec<VirtioWindow>,
    slots: Vec<VirtioSlot>,
}

impl<'a> VirtioBus<'a> {
    fn new(vm: &'a Vm, memory: &'a Arc<GuestMemoryMmap>) -> Self {
        Self {
            vm,
            memory,
            bus: Bus::new(),
            windows: Vec::new(),
            slots: Vec::new(),
        }
    }

    /// Returns the device's place among the slots.
    fn insert(&mut self, id: &str, device: Box<dyn VirtioDevice>) -> Result<usize, BuildError> {
        let at = self.slots.len();
        let window = u32::try_from(at)
            .ok()
            .and_then(VirtioWindow::of_device)
            .ok_or(BuildError::TooManyDevices)?;
        let transport = MmioTransport::new(device, Arc::clone(self.memory)).map_err(device_failed(id))?;
        self.vm.connect_interrupt(transport.line(), window.irq)?;
        for (index, kick) in (0..).zip(transport.kicks()) {
            self.vm
                .connect_kick(kick, window.address + mmio::QUEUE_NOTIFY, index)?;
        }
        let transport = Arc::new(Mutex::new(transport));
        let registers: Arc<Mutex<dyn BusDevice>> = transport.clone();
        self.bus.insert(
            BusRange {
                start: window.address,
                len: mmio::MMIO_LEN,
            },
            id,
            registers,
        )?;
        self.windows.push(window);
        self.slots.push(VirtioSlot {
            id: id.to_owned(),
            transport,
        });
        Ok(at)
    }
}

fn load(memory: &GuestMemoryMmap, plan: &BootPlan, windows: &[VirtioWindow]) -> Result<Entry, BuildError> {
    let root = plan.root.as_ref().map(|root| Root {
        partuuid: root.partuuid.as_deref(),
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

/// All vCPUs exist and are configured before the first thread starts: KVM wants them so (their
/// number is part of the topology).
fn start_vcpus(
    vm: &Vm,
    cpu: &Cpu,
    memory: &GuestMemoryMmap,
    entry: &Entry,
    outside: &Outside,
) -> Result<Vec<Vcpu>, BuildError> {
    let mut made = Vec::new();
    for index in 0..cpu.topology().vcpus() {
        let fd = vm.create_vcpu(index)?;
        cpu.configure(&fd, index)?;
        if index == 0 {
            regs::enter(&fd, memory, entry)?;
        }
        made.push((index, fd));
    }
    made.into_iter()
        .map(|(index, fd)| Ok(Vcpu::spawn(index, fd, outside.clone())?))
        .collect()
}
