//! The virtual machine: its memory slots, its interrupt controllers, and the eventfds wired to both.
#![expect(
    unsafe_code,
    reason = "a memory slot hands host addresses to the kernel; the machine's descriptor gets another number"
)]

use std::collections::BTreeSet;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard};

use coracle_storage::backend::Access;
use coracle_storage::threads;
use kvm_bindings::{KVM_PIT_SPEAKER_DUMMY, kvm_pit_config, kvm_userspace_memory_region};
use kvm_ioctls::{IoEventAddress, Kvm, VcpuFd, VmFd};
use vm_memory::{GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use super::state::{StateError, StateShape, VmState};
use super::{KvmError, failed};
use crate::arch::x86_64::layout as addresses;
use crate::memory::mapped::Mapping;
use crate::memory::{self, HotplugRegion, Slot, layout};
use crate::snapshot::memory::PAGE_BYTES;

/// Where KVM keeps what real mode needs on processors that cannot run it directly.
#[expect(clippy::cast_possible_truncation, reason = "the crate builds for x86-64 only")]
const TSS_ADDRESS: usize = addresses::TSS.0 as usize;
/// The first of KVM's slots for memory that comes; a machine has fewer files before, which have the slots from 16 on.
const HOTPLUG_SLOT_FIRST: u32 = 64;
/// KVM_API_VERSION since 2.6.22.
const API_VERSION: i32 = 12;

/// A virtual machine without vCPUs. Dropping it gives its memory slots back.
#[derive(Debug)]
pub struct Vm {
    // The descriptors go before the memory that its slots point into.
    fd: VmFd,
    _last: Option<OwnedFd>,
    memory: Arc<GuestMemoryMmap>,
    _files: Vec<Arc<Mapping>>,
    /// The region of it of which the guest reaches what is shown.
    hotplug: Option<HotplugRegion>,
    shown: Mutex<Shown>,
    state_shape: Arc<StateShape>,
}

/// What KVM was told of memory slots. The thread that serves hot-plugged memory changes what the guest reaches, and the first
/// thread whether writes are recorded.
#[derive(Debug)]
struct Shown {
    dirty_log: DirtyLog,
    /// The slots of the region for memory that comes, by their number there.
    slots: BTreeSet<u64>,
}

/// Opens `/dev/kvm`. What the machine needs of it is checked with the processors ([`crate::arch::x86_64::cpu`]).
///
/// # Errors
///
/// A [`KvmError`] that says what is missing and what to do about it.
pub fn open() -> Result<Kvm, KvmError> {
    let kvm = Kvm::new().map_err(|error| match error.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => KvmError::Missing,
        libc::EACCES | libc::EPERM => KvmError::Permission,
        errno => KvmError::Open(std::io::Error::from_raw_os_error(errno)),
    })?;
    match kvm.get_api_version() {
        API_VERSION => Ok(kvm),
        other => Err(KvmError::Version(other)),
    }
}

/// Refuses more vCPUs than this host's KVM takes.
///
/// # Errors
///
/// [`KvmError::TooManyVcpus`] with the limit.
pub fn check_vcpu_count(kvm: &Kvm, wanted: u8) -> Result<(), KvmError> {
    let limit = kvm.get_max_vcpus();
    if usize::from(wanted) > limit {
        return Err(KvmError::TooManyVcpus { wanted, limit });
    }
    Ok(())
}

/// A vCPU that can be asked what a processor is like, and nothing else. Dropped, it is closed by a thread of its own: the kernel
/// takes longer to take a machine apart than to make one, and nobody has to wait for that.
#[derive(Debug)]
pub struct BlankVcpu(Option<VcpuFd>);

impl BlankVcpu {
    /// Makes a machine for it, which goes with it.
    ///
    /// # Errors
    ///
    /// [`KvmError`] naming the ioctl that failed.
    pub fn new(kvm: &Kvm) -> Result<Self, KvmError> {
        let fd = kvm.create_vm().map_err(failed("KVM_CREATE_VM"))?;
        let vcpu = fd.create_vcpu(0).map_err(failed("KVM_CREATE_VCPU"))?;
        Ok(Self(Some(vcpu)))
    }

    /// The vCPU.
    pub fn fd(&self) -> &VcpuFd {
        self.0.as_ref().expect("it is there until it is dropped")
    }
}

impl Drop for BlankVcpu {
    fn drop(&mut self) {
        let fd = self.0.take();
        // Without a thread it is closed here.
        let _ = threads::spawn(threads::Kind::Mover, "close", move || drop(fd));
    }
}

/// The first number for descriptors that are beyond all others.
const LAST_FD_MIN: libc::c_int = 512;

/// Makes room for descriptors of high numbers, while the process has one thread: with more the kernel lets all processors pass by
/// before it uses a larger table, which takes milliseconds.
pub fn make_room_for_descriptors() {
    // SAFETY: this makes a descriptor, and touches no memory. Standard output may be closed: then there is no room yet.
    let last = unsafe { libc::fcntl(libc::STDOUT_FILENO, libc::F_DUPFD_CLOEXEC, LAST_FD_MIN) };
    if last >= 0 {
        // SAFETY: the descriptor was made just now, and nobody else has it.
        drop(unsafe { OwnedFd::from_raw_fd(last) });
    }
}

/// What keeps the machine of `fd` there by a descriptor of a high number, beside `fd` itself, which has a low one. A process that
/// dies, by whatever signal, has its descriptors closed in the order of their numbers, from the lowest to the
/// highest or the other
/// way (Linux 6.18), and KVM waits for its own workers when the last thing is closed that keeps a machine there. A
/// worker may wait
/// for memory that nobody brings any more, until the userfaultfd is closed: that has to come first, or nothing ends the process.
/// So there is something on either side of it. Descriptors of one file count as the highest of them: it has to be another file.
fn kept_beyond(fd: &VmFd) -> Option<OwnedFd> {
    // SAFETY: this request takes nothing, and makes a descriptor for reading counters.
    let counters = unsafe { libc::ioctl(fd.as_raw_fd(), KVM_GET_STATS_FD) };
    // Older kernels have no counters: then the machine itself is to be closed last, as they close from the lowest to the highest.
    let kept = if counters < 0 { fd.as_raw_fd() } else { counters };
    // SAFETY: this makes a descriptor, and touches no memory.
    let last = unsafe { libc::fcntl(kept, libc::F_DUPFD_CLOEXEC, LAST_FD_MIN) };
    if counters >= 0 {
        // SAFETY: the descriptor was made just now, and nobody else has it.
        drop(unsafe { OwnedFd::from_raw_fd(counters) });
    }
    if last < 0 {
        // The limit on descriptors is low.
        log::debug!(
            "nothing keeps the machine but itself: {}",
            std::io::Error::last_os_error()
        );
        return None;
    }
    // SAFETY: the descriptor was made just now, and nobody else has it.
    Some(unsafe { OwnedFd::from_raw_fd(last) })
}

/// `_IO(KVMIO, 0xce)`.
const KVM_GET_STATS_FD: libc::c_ulong = 0xaece;

impl Vm {
    /// A machine with `memory`, interrupt controllers and a timer. Of the region `hotplug` of the memory the guest reaches
    /// nothing before [`Self::show`].
    ///
    /// # Errors
    ///
    /// [`KvmError`] naming the ioctl that failed.
    pub fn new(
        kvm: &Kvm,
        memory: Arc<GuestMemoryMmap>,
        hotplug: Option<HotplugRegion>,
        dirty_log: DirtyLog,
    ) -> Result<Self, KvmError> {
        Self::with_files(kvm, memory, hotplug, Vec::new(), dirty_log)
    }

    /// The same with files beside the memory.
    ///
    /// # Errors
    ///
    /// As [`Self::new`].
    pub fn with_files(
        kvm: &Kvm,
        memory: Arc<GuestMemoryMmap>,
        hotplug: Option<HotplugRegion>,
        files: Vec<Arc<Mapping>>,
        dirty_log: DirtyLog,
    ) -> Result<Self, KvmError> {
        let fd = kvm.create_vm().map_err(failed("KVM_CREATE_VM"))?;
        let last = kept_beyond(&fd);
        // Before the interrupt controllers: once these are there, each change of a slot waits for milliseconds.
        for slot in memory::slots(&layout::at_boot(&memory, hotplug)) {
            set_slot(&fd, &slot, dirty_log)?;
        }
        show_files(&fd, &files)?;
        fd.set_identity_map_address(addresses::IDENTITY_MAP.0)
            .map_err(failed("KVM_SET_IDENTITY_MAP_ADDR"))?;
        fd.set_tss_address(TSS_ADDRESS)
            .map_err(failed("KVM_SET_TSS_ADDR"))?;
        fd.create_irq_chip().map_err(failed("KVM_CREATE_IRQCHIP"))?;
        // The guest may drive the PIT's speaker gate (port 0x61); nothing hears it.
        let pit = kvm_pit_config {
            flags: KVM_PIT_SPEAKER_DUMMY,
            ..Default::default()
        };
        fd.create_pit2(pit).map_err(failed("KVM_CREATE_PIT2"))?;
        let state_shape = Arc::new(StateShape::new(kvm, &fd)?);
        Ok(Self {
            fd,
            _last: last,
            memory,
            _files: files,
            hotplug,
            shown: Mutex::new(Shown {
                dirty_log,
                slots: BTreeSet::new(),
            }),
            state_shape,
        })
    }

    /// Makes vCPU `index`; its state is the caller's to set.
    ///
    /// # Errors
    ///
    /// [`KvmError`] naming the ioctl that failed.
    pub fn create_vcpu(&self, index: u8) -> Result<VcpuFd, KvmError> {
        self.fd
            .create_vcpu(u64::from(index))
            .map_err(failed("KVM_CREATE_VCPU"))
    }

    /// Raises interrupt line `gsi` whenever `line` is written.
    ///
    /// # Errors
    ///
    /// [`KvmError`] naming the ioctl that failed.
    pub fn connect_interrupt(&self, line: &EventFd, gsi: u32) -> Result<(), KvmError> {
        self.fd.register_irqfd(line, gsi).map_err(failed("KVM_IRQFD"))
    }

    /// Writes `kick` whenever the guest stores `value` (32 bits) at `address`, without an exit to this process.
    ///
    /// # Errors
    ///
    /// [`KvmError`] naming the ioctl that failed.
    pub fn connect_kick(&self, kick: &EventFd, address: u64, value: u32) -> Result<(), KvmError> {
        self.fd
            .register_ioevent(kick, &IoEventAddress::Mmio(address), value)
            .map_err(failed("KVM_IOEVENTFD"))
    }

    /// Undoes [`Self::connect_interrupt`].
    pub fn disconnect_interrupt(&self, line: &EventFd, gsi: u32) {
        if let Err(error) = self.fd.unregister_irqfd(line, gsi) {
            log::error!("interrupt line {gsi} stays connected: {error}");
        }
    }

    /// Undoes [`Self::connect_kick`].
    pub fn disconnect_kick(&self, kick: &EventFd, address: u64, value: u32) {
        let undone = self
            .fd
            .unregister_ioevent(kick, &IoEventAddress::Mmio(address), value);
        if let Err(error) = undone {
            log::error!("writes of {value} to {address:#x} stay connected: {error}");
        }
    }

    /// What there is to save and to restore of this machine's vCPUs.
    pub fn state_shape(&self) -> &Arc<StateShape> {
        &self.state_shape
    }

    /// Reads the interrupt controllers, the timer and the clock, once no vCPU and no device touches them.
    ///
    /// # Errors
    ///
    /// The ioctl that failed.
    pub fn save(&self) -> Result<VmState, StateError> {
        VmState::save(&self.fd)
    }

    /// Gives this fresh machine the state of another, once all its vCPUs are restored: an interrupt that waits in
    /// the IOAPIC goes on to a local controller at once, whose restore would wipe it out.
    ///
    /// # Errors
    ///
    /// What is damaged in the state, or what this host's KVM does not take of it.
    pub fn restore(&self, state: &VmState) -> Result<(), StateError> {
        state.restore(&self.fd)
    }

    /// Has KVM record from now on which pages the guest writes, or not any more.
    ///
    /// # Errors
    ///
    /// [`KvmError`] naming the ioctl that failed.
    pub fn log_dirty_pages(&self, dirty_log: DirtyLog) -> Result<(), KvmError> {
        let mut shown = self.shown();
        for slot in memory::slots(&layout::at_boot(&self.memory, self.hotplug)) {
            set_slot(&self.fd, &slot, dirty_log)?;
        }
        for slot in &shown.slots {
            set_slot(&self.fd, &self.hotplug_slot(*slot), dirty_log)?;
        }
        shown.dirty_log = dirty_log;
        Ok(())
    }

    /// Lets the guest reach slot `number` of the region for memory that comes. KVM waits for vCPUs that are in the kernel, and
    /// one of these may wait for memory: so where it may still be on its way, this is not for the thread that answers the API.
    ///
    /// # Errors
    ///
    /// [`KvmError`] naming the ioctl that failed.
    ///
    /// # Panics
    ///
    /// When there is no such slot.
    pub fn show(&self, number: u64) -> Result<(), KvmError> {
        let mut shown = self.shown();
        set_slot(&self.fd, &self.hotplug_slot(number), shown.dirty_log)?;
        shown.slots.insert(number);
        Ok(())
    }

    /// Has the guest reach that slot no more. What it has written there since [`Self::dirty_pages`] is not told any more.
    ///
    /// # Errors
    ///
    /// [`KvmError`] naming the ioctl that failed.
    ///
    /// # Panics
    ///
    /// When there is no such slot.
    pub fn hide(&self, number: u64) -> Result<(), KvmError> {
        let mut shown = self.shown();
        // KVM takes a slot away that has no length.
        let gone = Slot {
            size_bytes: 0,
            ..self.hotplug_slot(number)
        };
        set_slot(&self.fd, &gone, DirtyLog::Off)?;
        shown.slots.remove(&number);
        Ok(())
    }

    /// Slot `number` of the region for memory that comes: behind those of the other memory.
    fn hotplug_slot(&self, number: u64) -> Slot {
        let hotplug = self
            .hotplug
            .expect("memory comes to a machine that has room for it");
        let region = memory::slots(&self.memory).last();
        let region = region.expect("a guest has memory");
        let offset_bytes = number * hotplug.slot_bytes;
        assert!(
            offset_bytes + hotplug.slot_bytes <= region.size_bytes && region.guest_address.0 == hotplug.start,
            "slot {number} lies in the region, which is the last one"
        );
        Slot {
            index: HOTPLUG_SLOT_FIRST + u32::try_from(number).expect("there are fewer slots than KVM has"),
            guest_address: GuestAddress(region.guest_address.0 + offset_bytes),
            size_bytes: hotplug.slot_bytes,
            host_address: region.host_address + offset_bytes,
        }
    }

    fn shown(&self) -> MutexGuard<'_, Shown> {
        self.shown
            .lock()
            .expect("nobody panics who has told KVM of slots")
    }

    /// What the guest has written of one slot.
    fn dirty_of(&self, slot: &Slot) -> Result<Vec<u64>, KvmError> {
        let size = usize::try_from(slot.size_bytes).expect("a 64-bit host");
        self.fd
            .get_dirty_log(slot.index, size)
            .map_err(failed("KVM_GET_DIRTY_LOG"))
    }

    /// The same of the region for memory that comes; of what the guest does not reach, nothing.
    fn dirty_of_hotplug(&self, hotplug: HotplugRegion) -> Result<Vec<u64>, KvmError> {
        let words = |bytes: u64| usize::try_from(bytes / PAGE_BYTES as u64 / 64).expect("a 64-bit host");
        let per_slot = words(hotplug.slot_bytes);
        let mut bitmap = vec![0; words(hotplug.size_bytes)];
        for number in &self.shown().slots {
            let of_slot = self.dirty_of(&self.hotplug_slot(*number))?;
            let at = words(number * hotplug.slot_bytes);
            let place = bitmap.get_mut(at..at + per_slot);
            place
                .expect("a slot lies in the region")
                .copy_from_slice(of_slot.get(..per_slot).expect("KVM has a bit for each page"));
        }
        Ok(bitmap)
    }

    /// The pages that the guest, or KVM for it, has written since they were asked for last, or since the machine was
    /// made: one bitmap for each of [`memory::slots`], bit `n % 64` of word `n / 64` for the page `n` of 4096 bytes.
    /// From now on they count as not written. What this process writes is not in it.
    ///
    /// # Errors
    ///
    /// [`KvmError`] when the machine was made without [`DirtyLog::On`].
    pub fn dirty_pages(&self) -> Result<Vec<Vec<u64>>, KvmError> {
        memory::slots(&self.memory)
            .map(|slot| match self.hotplug {
                Some(hotplug) if hotplug.start == slot.guest_address.0 => self.dirty_of_hotplug(hotplug),
                _ => self.dirty_of(&slot),
            })
            .collect()
    }
}

/// Gives the machine `slot`, or, where it has it, only says once more what is recorded of it.
fn set_slot(fd: &VmFd, slot: &Slot, dirty_log: DirtyLog) -> Result<(), KvmError> {
    let region = kvm_userspace_memory_region {
        slot: slot.index,
        flags: match dirty_log {
            DirtyLog::Off => 0,
            DirtyLog::On => kvm_bindings::KVM_MEM_LOG_DIRTY_PAGES,
        },
        guest_phys_addr: slot.guest_address.0,
        memory_size: slot.size_bytes,
        userspace_addr: slot.host_address,
    };
    // SAFETY: the slot lies within a region of the memory, which the machine keeps alive for longer than its descriptor; slots
    // do not overlap because regions do not, nor do those of one region.
    unsafe { fd.set_user_memory_region(region) }.map_err(failed("KVM_SET_USER_MEMORY_REGION"))
}

/// Shows the guest files. What it writes there is never recorded: that is in them.
fn show_files(fd: &VmFd, files: &[Arc<Mapping>]) -> Result<(), KvmError> {
    for (number, file) in (0..).zip(files) {
        let slot = file.slot(number);
        let region = kvm_userspace_memory_region {
            slot: slot.index,
            flags: match file.access() {
                Access::ReadOnly => kvm_bindings::KVM_MEM_READONLY,
                Access::ReadWrite => 0,
            },
            guest_phys_addr: slot.guest_address.0,
            memory_size: slot.size_bytes,
            userspace_addr: slot.host_address,
        };
        // SAFETY: the slot lies within a mapping that the machine keeps alive for longer than its descriptor, and overlaps no
        // other: whoever placed the files has seen to that, or KVM refuses.
        unsafe { fd.set_user_memory_region(region) }.map_err(failed("KVM_SET_USER_MEMORY_REGION"))?;
    }
    Ok(())
}

/// Whether KVM records which pages the guest writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DirtyLog {
    /// It does not; the guest runs without the faults that it costs.
    Off,
    /// It does (`track_dirty_pages`).
    On,
}
