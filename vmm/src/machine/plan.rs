//! What will be built: everything that can be opened, opened; everything that can be sized, sized.
//! Nothing after a plan sees a path.

use std::fs::File;
use std::sync::Arc;
use std::time::Instant;

use coracle_devices::boot_timer::BootTimer;
use coracle_devices::mmds::{Mmds, Stack};
use coracle_devices::serial::SerialConfig;
use coracle_devices::virtio::balloon::BalloonConfig;
use coracle_devices::virtio::blk::{DriveConfig, DriveError, HeldDisk};
use coracle_devices::virtio::net::{NetworkInterfaceConfig, Tap, TapError};
use coracle_devices::virtio::pmem::PmemError;
use coracle_devices::virtio::rng::EntropyConfig;
use coracle_devices::virtio::vsock::{ListenError, Listener, VsockConfig};
use coracle_storage::backend::Access;
use coracle_storage::lease::{Owner, Succession};
use coracle_storage::limit::SharedLimiter;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use super::disks::Course;
use super::pmem::{PmemPlaceError, PmemPlan};
use super::shell::Shell;
use super::state::MachineState;
use super::{LimitGroup, cpu_template};
use crate::arch::x86_64::boot::BootProtocol;
use crate::arch::x86_64::boot::cmdline::RootAccess;
use crate::arch::x86_64::cpu::{CpuError, Smt, Topology};
use crate::arch::x86_64::template::CpuTemplate;
use crate::config::{self, Config, Disks, HugePages, MachineConfig, MemoryBacking, MmdsConfig};
use crate::kvm::vm::DirtyLog;
use crate::memory::pager::Pager;
use crate::memory::{Backing, HotplugRegion, Layout, PageSize};
use crate::migration::postcopy::target::Fetcher;
use crate::snapshot::memory::MemoryId;

/// A machine that can be built.
pub struct Plan {
    pub(super) topology: Topology,
    pub(super) dirty_log: DirtyLog,
    pub(super) origin: Origin,
    /// What was made of it already.
    pub(super) shell: Option<Shell>,
    pub(super) disks: Vec<DiskPlan>,
    pub(super) groups: Vec<LimitGroup>,
    pub(super) networks: Vec<NetworkPlan>,
    pub(super) vsock: Option<VsockPlan>,
    pub(super) balloon: Option<BalloonConfig>,
    pub(super) entropy: Option<EntropyConfig>,
    pub(super) pmem: Vec<PmemPlan>,
    /// The region for memory that comes while the guest runs.
    pub(super) hotplug: Option<HotplugRegion>,
    pub(super) serial: SerialConfig,
    /// Runs from the moment at which the plan was begun.
    pub(super) boot_timer: Option<BootTimer>,
}

/// Where the guest begins.
pub(super) enum Origin {
    /// With a kernel, in fresh memory.
    Boot(Box<BootOrigin>),
    /// Where another has stopped.
    Saved(Box<SavedOrigin>),
}

/// A guest that boots.
pub(super) struct BootOrigin {
    pub(super) memory: MemoryPlan,
    pub(super) template: CpuTemplate,
    pub(super) boot: BootPlan,
}

/// A guest that goes on.
pub struct SavedOrigin {
    /// Its memory.
    pub memory: MemorySource,
    /// Everything else.
    pub state: MachineState,
}

/// The memory of a snapshot.
pub struct MemorySource {
    /// What brings in the rest; dropped first, or it would look for memory that is gone.
    pub pager: Option<Pager>,
    /// The same, from another process.
    pub fetcher: Option<Fetcher>,
    /// It, or as much as there is of it.
    pub memory: Arc<GuestMemoryMmap>,
    /// Its name, if a snapshot has given it one; without, it comes from a machine that has stopped just now.
    pub id: Option<MemoryId>,
}

/// One disk.
pub(super) struct DiskPlan {
    pub(super) held: HeldDisk,
    /// The name of the group whose limits it shares.
    pub(super) group: Option<String>,
    /// It is taken over from somebody who may have it back.
    pub(super) is_taken_over: bool,
}

/// One network interface.
pub(super) struct NetworkPlan {
    pub(super) config: NetworkInterfaceConfig,
    /// The metadata service, if the guest may ask it by this one.
    pub(super) metadata: Option<Stack>,
    pub(super) tap: Tap,
}

/// The socket device.
pub(super) struct VsockPlan {
    pub(super) config: VsockConfig,
    pub(super) listener: Listener,
}

/// The guest's memory.
pub(super) struct MemoryPlan {
    pub(super) layout: Layout,
    pub(super) backing: Backing,
    pub(super) pages: PageSize,
}

/// What the guest boots.
pub(super) struct BootPlan {
    /// What the user calls the kernel, for messages.
    pub(super) name: String,
    pub(super) kernel: File,
    pub(super) initrd: Option<File>,
    pub(super) arguments: Option<String>,
    pub(super) protocol: BootProtocol,
    pub(super) root: Option<RootPlan>,
}

/// The root that the command line names.
pub(super) struct RootPlan {
    pub(super) on: RootOn,
    pub(super) access: RootAccess,
}

/// What a root is on.
pub(super) enum RootOn {
    /// The first disk, or a partition of it.
    Disk(Option<String>),
    /// Persistent memory of that number.
    Pmem(usize),
}

/// Why a configuration cannot become a machine.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// There is nothing to boot.
    #[error("Cannot start microvm without kernel configuration: PUT /boot-source first.")]
    NoBootSource,
    /// A boot file cannot be opened.
    #[error(transparent)]
    Boot(#[from] config::BootSourceError),
    /// A drive's image cannot be opened.
    #[error(transparent)]
    Drive(#[from] DriveError),
    /// The file of a pmem device cannot be opened.
    #[error(transparent)]
    Pmem(#[from] PmemError),
    /// It cannot be where it should.
    #[error(transparent)]
    PmemPlace(#[from] PmemPlaceError),
    /// Clones would share it.
    #[error(
        "pmem device `{0}` is written in place, so no clone can go on with it: load the snapshot with `disks` `Continue` once, \
         or give the machine a read-only device before it is started"
    )]
    PmemNotCloned(String),
    /// A file of which nobody can tell whether it has been written.
    #[error(
        "the snapshot cannot be gone on with beside pmem device `{0}`: there was no place for records of its lease, so nothing \
         says whether its file has been written since; load the snapshot with `disks` `Detached` if you know"
    )]
    PmemUnrecorded(String),
    /// A tap cannot be opened.
    #[error("network interface `{iface_id}` cannot be had")]
    Network {
        /// The interface.
        iface_id: String,
        /// Why.
        #[source]
        source: TapError,
    },
    /// The socket of the vsock device cannot be made.
    #[error("the vsock device cannot be had")]
    Vsock(#[from] ListenError),
    /// A drive shares limits that are not configured.
    #[error(
        "drive `{drive_id}` is in the rate limiter group `{group_id}`, which does not exist: \
         PUT /rate-limiter-groups/{group_id} first"
    )]
    NoSuchGroup {
        /// The drive.
        drive_id: String,
        /// The group.
        group_id: String,
    },
    /// A lease to be taken over for a drive that is not configured.
    #[error("--takes-over names drive `{0}`, which is not configured: PUT /drives/{0} first")]
    NoSuchHeir(String),
    /// The processors cannot be had so.
    #[error(transparent)]
    Cpu(#[from] CpuError),
    /// A drive that the snapshot says nothing about.
    #[error("the snapshot does not say of drive `{0}` what its image was: it was not saved by this program")]
    NoState(String),
    /// A drive whose content ended with the machine.
    #[error(
        "the snapshot cannot be gone on with: drive `{0}` had a temporary overlay, and what was written to that is gone with \
         the machine; give the overlay `\"keep\": true` before the machine is started, or make the snapshot with `include_disks`"
    )]
    Temporary(String),
    /// A drive of which nobody can tell whether it has been written.
    #[error(
        "the snapshot cannot be gone on with beside drive `{0}`: there was no place for records of its lease, so nothing says \
         whether it has been written since; give the drive a `lease_at` before the machine is started, or load the snapshot with \
         `disks` `Detached` if you know"
    )]
    Unrecorded(String),
}

impl Plan {
    /// Opens what `config` names and leases the images to `owner`; otherwise nothing is changed on the host by it.
    ///
    /// # Errors
    ///
    /// The first thing that cannot be opened, and what to do about it.
    pub fn new(config: &Config, owner: &Owner) -> Result<Self, PlanError> {
        let boot_timer = config.boot_timer().then(BootTimer::begin);
        let machine = config.machine();
        let source = config.boot_source().ok_or(PlanError::NoBootSource)?;
        let origin = Origin::Boot(Box::new(BootOrigin {
            memory: MemoryPlan::new(machine, config.memory_layout()),
            template: config.cpu().map(cpu_template::parsed).unwrap_or_default(),
            boot: BootPlan::new(source, config)?,
        }));
        let courses = config.drives().iter().map(|_| Course::Own(Succession::Raises));
        let pmem = PmemPlan::all(config.pmem(), owner, memory_end(config.memory_layout()), None)?;
        let plan = Self::from(config, owner, origin, &courses.collect::<Vec<_>>())?;
        Ok(Self {
            boot_timer,
            pmem,
            ..plan
        })
    }

    /// The same for a machine that goes on where another has stopped, which `saved` is of. The images have to be as `courses`
    /// want each, and files of pmem devices as `disks` does: then they are leased, and keep their generations until the machine
    /// is resumed.
    ///
    /// # Errors
    ///
    /// As [`Self::new`]; or an image that has been written since.
    pub fn restore(
        config: &Config,
        (courses, disks): (&[Course], Disks),
        owner: &Owner,
        saved: SavedOrigin,
    ) -> Result<Self, PlanError> {
        let going_on = Some((&saved.state, disks));
        let pmem = PmemPlan::all(config.pmem(), owner, memory_end(config.memory_layout()), going_on)?;
        let plan = Self::from(config, owner, Origin::Saved(Box::new(saved)), courses)?;
        Ok(Self { pmem, ..plan })
    }

    /// The same, to be built into `shell`, which has the same memory and is as `config` wants it.
    pub fn within(self, shell: Shell) -> Self {
        Self {
            shell: Some(shell),
            ..self
        }
    }

    /// Lets the guest ask `mmds` by the interfaces that `config` names.
    pub fn serve_metadata(&mut self, config: &MmdsConfig, mmds: &Arc<Mmds>) {
        mmds.configure(config.version, config.imds_compat);
        for network in &mut self.networks {
            let serves = config.network_interfaces.contains(&network.config.iface_id);
            network.metadata = serves.then(|| Stack::new(Arc::clone(mmds), config.ipv4_address));
        }
    }

    fn from(config: &Config, owner: &Owner, origin: Origin, courses: &[Course]) -> Result<Self, PlanError> {
        let machine = config.machine();
        if let Some(id) = config.missing_heir() {
            return Err(PlanError::NoSuchHeir(id.to_owned()));
        }
        let groups: Vec<LimitGroup> = config.groups().iter().map(LimitGroup::new).collect();
        let smt = if machine.smt { Smt::On } else { Smt::Off };
        Ok(Self {
            topology: Topology::new(machine.vcpu_count, smt)?,
            dirty_log: dirty_log(machine),
            origin,
            shell: None,
            disks: config
                .drives()
                .iter()
                .zip(courses)
                .map(|(drive, course)| DiskPlan::new(drive, owner, course, &groups))
                .collect::<Result<_, _>>()?,
            groups,
            networks: config
                .networks()
                .iter()
                .map(NetworkPlan::new)
                .collect::<Result<_, _>>()?,
            vsock: config.vsock().map(VsockPlan::new).transpose()?,
            balloon: config.balloon().cloned(),
            entropy: config.entropy().cloned(),
            pmem: Vec::new(),
            hotplug: config.memory_layout().hotplug(),
            serial: config.serial().cloned().unwrap_or_default(),
            boot_timer: None,
        })
    }
}

impl MemoryPlan {
    /// The memory that `machine` asks for, as `layout` has it.
    pub(super) fn new(machine: &MachineConfig, layout: Layout) -> Self {
        Self {
            layout,
            backing: match machine.memory_backing {
                MemoryBacking::Anonymous => Backing::Anonymous,
                MemoryBacking::Memfd => Backing::Shared,
            },
            pages: page_size(machine.huge_pages),
        }
    }
}

/// Where the memory ends that a guest has, or may have.
fn memory_end(layout: Layout) -> GuestAddress {
    let last = layout.ranges().last();
    last.map_or(GuestAddress(0), |(start, bytes)| GuestAddress(start.0 + bytes))
}

/// Whether KVM records what the guest writes from the beginning.
pub(crate) fn dirty_log(machine: &MachineConfig) -> DirtyLog {
    if machine.track_dirty_pages {
        DirtyLog::On
    } else {
        DirtyLog::Off
    }
}

/// The pages of the mapping that `huge_pages` asks for.
pub(crate) fn page_size(huge_pages: HugePages) -> PageSize {
    match huge_pages {
        HugePages::None => PageSize::Base,
        HugePages::Transparent => PageSize::Transparent,
        HugePages::Hugetlbfs2M => PageSize::Huge2Mib,
    }
}

impl DiskPlan {
    pub(super) fn new(
        drive: &DriveConfig,
        owner: &Owner,
        course: &Course,
        groups: &[LimitGroup],
    ) -> Result<Self, PlanError> {
        // Before anything is opened: a lease that is taken for nothing bothers others.
        let group = drive.rate_limiter_group.clone();
        let shared = group.as_ref().map(|id| {
            let shared = groups.iter().find(|group| group.id == *id);
            shared.ok_or_else(|| PlanError::NoSuchGroup {
                drive_id: drive.drive_id.clone(),
                group_id: id.clone(),
            })
        });
        let shared = shared.transpose()?;
        let mut held = course.open(drive, owner)?;
        if let Some(shared) = shared {
            held.disk.group = Some(Arc::clone(&shared.limiter));
        }
        Ok(Self {
            held,
            group,
            is_taken_over: matches!(course, Course::Own(Succession::TakesOver(_))),
        })
    }
}

impl NetworkPlan {
    pub(super) fn new(config: &NetworkInterfaceConfig) -> Result<Self, PlanError> {
        let tap = Tap::open(&config.host_dev_name, config.pairs()).map_err(|source| PlanError::Network {
            iface_id: config.iface_id.clone(),
            source,
        })?;
        Ok(Self {
            config: config.clone(),
            metadata: None,
            tap,
        })
    }
}

impl VsockPlan {
    fn new(config: &VsockConfig) -> Result<Self, PlanError> {
        Ok(Self {
            config: config.clone(),
            listener: Listener::bind(&config.uds_path)?,
        })
    }
}

impl LimitGroup {
    fn new(group: &config::RateLimiterGroup) -> Self {
        Self {
            id: group.group_id.clone(),
            limiter: Arc::new(SharedLimiter::new(&group.limits(), Instant::now())),
        }
    }
}

impl BootPlan {
    fn new(source: &config::BootSource, config: &Config) -> Result<Self, PlanError> {
        let mut drives = config.drives().iter();
        let root = match drives.find(|drive| drive.is_root_device) {
            Some(drive) => Some((RootOn::Disk(drive.partuuid.clone()), drive.access())),
            None => {
                let mut pmem = config.pmem().iter().enumerate();
                let root = pmem.find(|(_, pmem)| pmem.root_device);
                root.map(|(number, pmem)| (RootOn::Pmem(number), pmem.access()))
            }
        };
        let root = root.map(|(on, access)| RootPlan {
            on,
            access: match access {
                Access::ReadOnly => RootAccess::ReadOnly,
                Access::ReadWrite => RootAccess::ReadWrite,
            },
        });
        let (kernel, initrd) = source.open()?;
        Ok(Self {
            name: source.kernel_image_path.clone(),
            kernel,
            initrd,
            arguments: source.boot_args.clone(),
            protocol: match source.boot_protocol {
                config::BootProtocol::Auto => BootProtocol::Auto,
                config::BootProtocol::Pvh => BootProtocol::Pvh,
                config::BootProtocol::Linux64 => BootProtocol::Linux64,
            },
            root,
        })
    }
}
