//! What will be built: everything that can be opened, opened; everything that can be sized, sized.
//! Nothing after a plan sees a path.

use std::fs::File;
use std::sync::Arc;
use std::time::Instant;

use coracle_devices::boot_timer::BootTimer;
use coracle_devices::serial::SerialConfig;
use coracle_devices::virtio::blk::{DriveConfig, DriveError, HeldDisk};
use coracle_devices::virtio::rng::EntropyConfig;
use coracle_storage::backend::Access;
use coracle_storage::lease::Owner;
use coracle_storage::limit::SharedLimiter;

use super::{LimitGroup, cpu_template};
use crate::arch::x86_64::boot::BootProtocol;
use crate::arch::x86_64::boot::cmdline::RootAccess;
use crate::arch::x86_64::cpu::{CpuError, Smt, Topology};
use crate::arch::x86_64::template::CpuTemplate;
use crate::config::{self, Config, HugePages, MemoryBacking};
use crate::kvm::vm::DirtyLog;
use crate::memory::{Backing, PageSize};

/// A machine that can be built.
pub struct Plan {
    pub(super) memory: MemoryPlan,
    pub(super) topology: Topology,
    pub(super) template: CpuTemplate,
    pub(super) boot: BootPlan,
    pub(super) disks: Vec<DiskPlan>,
    pub(super) groups: Vec<LimitGroup>,
    pub(super) entropy: Option<EntropyConfig>,
    pub(super) serial: SerialConfig,
    /// Runs from the moment at which the plan was begun.
    pub(super) boot_timer: Option<BootTimer>,
}

/// One disk.
pub(super) struct DiskPlan {
    pub(super) held: HeldDisk,
    /// The name of the group whose limits it shares.
    pub(super) group: Option<String>,
}

/// The guest's memory.
pub(super) struct MemoryPlan {
    pub(super) mib: u64,
    pub(super) backing: Backing,
    pub(super) pages: PageSize,
    pub(super) dirty_log: DirtyLog,
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
    pub(super) partuuid: Option<String>,
    pub(super) access: RootAccess,
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
        if let Some(id) = config.missing_heir() {
            return Err(PlanError::NoSuchHeir(id.to_owned()));
        }
        let groups: Vec<LimitGroup> = config.groups().iter().map(LimitGroup::new).collect();
        let smt = if machine.smt { Smt::On } else { Smt::Off };
        Ok(Self {
            memory: MemoryPlan {
                mib: machine.mem_size_mib,
                backing: match machine.memory_backing {
                    MemoryBacking::Anonymous => Backing::Anonymous,
                    MemoryBacking::Memfd => Backing::Shared,
                },
                pages: match machine.huge_pages {
                    HugePages::None => PageSize::Base,
                    HugePages::Transparent => PageSize::Transparent,
                    HugePages::Hugetlbfs2M => PageSize::Huge2Mib,
                },
                dirty_log: if machine.track_dirty_pages {
                    DirtyLog::On
                } else {
                    DirtyLog::Off
                },
            },
            topology: Topology::new(machine.vcpu_count, smt)?,
            template: config.cpu().map(cpu_template::parsed).unwrap_or_default(),
            boot: BootPlan::new(source, config.drives())?,
            disks: config
                .drives()
                .iter()
                .map(|drive| DiskPlan::new(drive, owner, &groups))
                .collect::<Result<_, _>>()?,
            groups,
            entropy: config.entropy().cloned(),
            serial: config.serial().cloned().unwrap_or_default(),
            boot_timer,
        })
    }
}

impl DiskPlan {
    fn new(drive: &DriveConfig, owner: &Owner, groups: &[LimitGroup]) -> Result<Self, PlanError> {
        let mut held = drive.open(owner)?;
        let group = drive.rate_limiter_group.clone();
        if let Some(id) = &group {
            let shared = groups.iter().find(|group| group.id == *id);
            let shared = shared.ok_or_else(|| PlanError::NoSuchGroup {
                drive_id: drive.drive_id.clone(),
                group_id: id.clone(),
            })?;
            held.disk.group = Some(Arc::clone(&shared.limiter));
        }
        Ok(Self { held, group })
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
    fn new(source: &config::BootSource, drives: &[DriveConfig]) -> Result<Self, PlanError> {
        let root = drives
            .iter()
            .find(|drive| drive.is_root_device)
            .map(|drive| RootPlan {
                partuuid: drive.partuuid.clone(),
                access: match drive.access() {
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
