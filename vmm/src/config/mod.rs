//! What was asked for: the one set of types behind the API, the config file and the command line.
//!
//! [`Config`] only holds what was asked; nothing is opened or built before the machine starts.

mod balloon;
mod boot;
mod cpu;
mod file;
mod groups;
mod id;
mod instance;
mod key;
mod machine;
mod memory_hotplug;
mod metadata;
mod migration;
mod network;
mod observe;
mod overrides;
mod pmem;
mod snapshot;
mod vsock;

use std::collections::BTreeMap;

use coracle_devices::serial::SerialConfig;
pub use coracle_devices::virtio::balloon::BalloonConfig;
use coracle_devices::virtio::blk::{DriveConfig, DriveError, PartialDrive};
pub use coracle_devices::virtio::mem::MemoryHotplugConfig;
pub use coracle_devices::virtio::net::{MacAddress, MacError, NetworkInterfaceConfig};
use coracle_devices::virtio::pmem::PmemConfig;
use coracle_devices::virtio::rng::EntropyConfig;
pub use coracle_devices::virtio::vsock::VsockConfig;
use coracle_storage::open::is_remote;

pub use balloon::BalloonError;
pub use boot::{BOOT_ARGS_BYTES_MAX, BOOT_ARGS_DEFAULT, BootProtocol, BootSource, BootSourceError};
pub use cpu::{
    Bits, CpuConfig, CpuidModifier, CpuidRegister, CpuidRegisterModifier, Hex, KvmCapability, MsrModifier,
};
pub use file::{CONFIG_FILE_BYTES_MAX, ConfigFileError, FullConfig};
pub use groups::RateLimiterGroup;
pub use id::{DEVICE_ID_BYTES_MAX, INSTANCE_ID_BYTES_MAX, IdError, check_device_id, check_instance_id};
pub use instance::{
    Action, FIRECRACKER_API_VERSION, InstanceActionInfo, InstanceInfo, Phase, Version, Vm, VmState,
};
pub use key::KeyPlace;
pub use machine::{
    HugePages, MEM_SIZE_MIB_MAX, MachineConfig, MachineConfigPatch, MachineError, MemoryBacking,
    StaticTemplate, VCPU_COUNT_MAX,
};
pub use memory_hotplug::MemoryHotplugError;
pub use metadata::{ContentsError, MetadataError, MmdsConfig, MmdsContents, read_metadata};
pub use migration::{
    Compression, MigrationMode, MigrationReceive, MigrationRecover, MigrationSend, MigrationStage,
    MigrationStatus, OnTimeout, STREAMS_MAX,
};
pub use network::NetworkError;
pub use observe::{Level, LoggerConfig, MetricsConfig, UnknownLevel};
pub use overrides::{DriveOverride, OverrideError, Overrides};
pub use pmem::PmemConfigError;
pub use snapshot::{
    Disks, MemBackend, MemBackendType, NetworkOverride, SnapshotCreate, SnapshotCreateError, SnapshotLoad,
    SnapshotLoadError, SnapshotPatch, SnapshotProgress, SnapshotStage, SnapshotType, SnapshotWish, Verify,
    VsockOverride,
};
pub use vsock::VsockError;

/// Most drives of a machine: with the entropy device, all interrupt lines that are left for virtio.
pub const DRIVES_MAX: usize = crate::arch::x86_64::layout::VIRTIO_DEVICES_MAX as usize;
/// Most network interfaces, for the same reason.
pub const NETWORKS_MAX: usize = DRIVES_MAX;
/// Most groups of drives: one for each.
pub const GROUPS_MAX: usize = DRIVES_MAX;

/// What was asked for, checked. Every change goes through a method that keeps the rules.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Config {
    machine: MachineConfig,
    cpu: Option<CpuConfig>,
    boot_source: Option<BootSource>,
    drives: Vec<DriveConfig>,
    groups: Vec<RateLimiterGroup>,
    networks: Vec<NetworkInterfaceConfig>,
    mmds: Option<MmdsConfig>,
    vsock: Option<VsockConfig>,
    balloon: Option<BalloonConfig>,
    entropy: Option<EntropyConfig>,
    pmem: Vec<PmemConfig>,
    memory_hotplug: Option<MemoryHotplugConfig>,
    serial: Option<SerialConfig>,
    logger: Option<LoggerConfig>,
    metrics: Option<MetricsConfig>,
    boot_timer: bool,
    /// Keys of leases that may be taken, by drive.
    takes_over: BTreeMap<String, u64>,
}

impl Config {
    /// vCPUs and memory.
    pub fn machine(&self) -> &MachineConfig {
        &self.machine
    }

    /// The custom CPU template, if there is one.
    pub fn cpu(&self) -> Option<&CpuConfig> {
        self.cpu.as_ref()
    }

    /// What the machine boots, once that is set.
    pub fn boot_source(&self) -> Option<&BootSource> {
        self.boot_source.as_ref()
    }

    /// The drives in the order in which the guest finds them: the root drive first.
    pub fn drives(&self) -> &[DriveConfig] {
        &self.drives
    }

    /// The same, for a machine that goes on from a snapshot with other ones.
    pub(crate) fn drives_mut(&mut self) -> &mut [DriveConfig] {
        &mut self.drives
    }

    /// The groups of drives that share limits.
    pub fn groups(&self) -> &[RateLimiterGroup] {
        &self.groups
    }

    /// The network interfaces in the order in which the guest finds them.
    pub fn networks(&self) -> &[NetworkInterfaceConfig] {
        &self.networks
    }

    /// How many virtio devices the machine has.
    pub fn virtio_devices(&self) -> usize {
        let single = [
            self.vsock.is_some(),
            self.balloon.is_some(),
            self.entropy.is_some(),
            self.memory_hotplug.is_some(),
        ];
        let single: usize = single.into_iter().map(usize::from).sum();
        self.drives.len() + self.networks.len() + self.pmem.len() + single
    }

    /// The entropy device, if there is one.
    pub fn entropy(&self) -> Option<&EntropyConfig> {
        self.entropy.as_ref()
    }

    /// The serial port, as far as it was configured.
    pub fn serial(&self) -> Option<&SerialConfig> {
        self.serial.as_ref()
    }

    /// The logger, as far as it was configured.
    pub fn logger(&self) -> Option<&LoggerConfig> {
        self.logger.as_ref()
    }

    /// Where metrics go, if anywhere.
    pub fn metrics(&self) -> Option<&MetricsConfig> {
        self.metrics.as_ref()
    }

    /// Whether the guest has a boot timer.
    pub fn boot_timer(&self) -> bool {
        self.boot_timer
    }

    /// Gives the guest a boot timer. Only the command line can ask for it: no document mentions it.
    pub fn add_boot_timer(&mut self) {
        self.boot_timer = true;
    }

    /// Lets drives take their leases from processes that have ended for certain, by the keys of those. Only the command
    /// line can ask for it: no document mentions it.
    pub fn take_over(&mut self, keys: BTreeMap<String, u64>) {
        for drive in &mut self.drives {
            drive.takes_over = keys.get(&drive.drive_id).copied();
        }
        self.takes_over = keys;
    }

    /// A drive that a lease may be taken for, and that is not there.
    pub fn missing_heir(&self) -> Option<&str> {
        let is_there = |id: &str| self.drives.iter().any(|drive| drive.drive_id == id);
        self.takes_over
            .keys()
            .map(String::as_str)
            .find(|id| !is_there(id))
    }

    /// Whether an image has to be opened that may take as long as a server does.
    pub fn has_remote_image(&self) -> bool {
        let paths = self.drives.iter().filter_map(|drive| drive.image_path().ok());
        paths.into_iter().any(is_remote)
    }

    /// Replaces vCPUs and memory.
    ///
    /// # Errors
    ///
    /// The rule that `machine` breaks; then nothing has changed.
    pub fn set_machine(&mut self, machine: MachineConfig) -> Result<(), ConfigError> {
        let machine = machine.checked()?;
        self.check_balloon(machine.mem_size_mib)?;
        self.machine = machine;
        Ok(())
    }

    /// Changes what `patch` names of vCPUs and memory.
    ///
    /// # Errors
    ///
    /// The rule that the result would break; then nothing has changed.
    pub fn patch_machine(&mut self, patch: &MachineConfigPatch) -> Result<(), ConfigError> {
        self.set_machine(self.machine.patched(patch))
    }

    /// Replaces the custom CPU template.
    pub fn set_cpu(&mut self, cpu: CpuConfig) {
        self.cpu = Some(cpu);
    }

    /// Replaces what the machine boots. Whether the files can be opened is for `BootSource::probe`.
    ///
    /// # Errors
    ///
    /// The rule that `boot_source` breaks; then nothing has changed.
    pub fn set_boot_source(&mut self, boot_source: BootSource) -> Result<(), ConfigError> {
        self.boot_source = Some(boot_source.checked()?);
        Ok(())
    }

    /// Adds a drive, or replaces the one of the same name. The root drive is always the first.
    ///
    /// # Errors
    ///
    /// The rule that `drive` breaks; then nothing has changed.
    pub fn insert_drive(&mut self, mut drive: DriveConfig) -> Result<(), ConfigError> {
        check_device_id(&drive.drive_id)?;
        drive.takes_over = self.takes_over.get(&drive.drive_id).copied();
        if drive.image_path()?.is_empty() {
            return Err(ConfigError::NoImage {
                drive_id: drive.drive_id,
            });
        }
        drive.queues()?;
        drive.lock()?;
        drive.network()?;
        if drive.partuuid.is_some() && !drive.is_root_device {
            return Err(ConfigError::PartuuidWithoutRoot {
                drive_id: drive.drive_id,
            });
        }
        let others = || {
            self.drives
                .iter()
                .filter(|other| other.drive_id != drive.drive_id)
        };
        if let Some(root) = others().find(|other| other.is_root_device && drive.is_root_device) {
            return Err(ConfigError::SecondRoot {
                root_id: root.drive_id.clone(),
            });
        }
        let root_pmem = self.pmem.iter().find(|pmem| pmem.root_device);
        if let Some(root) = root_pmem.filter(|_| drive.is_root_device) {
            return Err(ConfigError::RootPmem {
                root_id: root.id.clone(),
            });
        }
        let shares_records =
            |other: &&DriveConfig| drive.lease_at.is_some() && other.lease_at == drive.lease_at;
        if let Some(other) = others().find(shares_records) {
            return Err(ConfigError::SharedLeaseAt {
                drive_id: drive.drive_id.clone(),
                other_id: other.drive_id.clone(),
            });
        }
        if others().count() == DRIVES_MAX {
            return Err(ConfigError::TooManyDrives);
        }
        match self
            .drives
            .iter_mut()
            .find(|other| other.drive_id == drive.drive_id)
        {
            Some(slot) => *slot = drive,
            None => self.drives.push(drive),
        }
        self.drives.sort_by_key(|drive| !drive.is_root_device);
        Ok(())
    }

    /// Adds a drive to a machine whose guest runs.
    ///
    /// # Errors
    ///
    /// There is one of that name, the machine cannot boot from it any more, or a rule that it breaks; then nothing has changed.
    pub fn plug_drive(&mut self, drive: DriveConfig) -> Result<(), ConfigError> {
        let drive_id = drive.drive_id.clone();
        if self.drives.iter().any(|other| other.drive_id == drive_id) {
            return Err(ConfigError::DriveThere { drive_id });
        }
        if drive.is_root_device {
            return Err(ConfigError::LateRoot { drive_id });
        }
        let has_group = |id: &String| self.groups.iter().any(|group| group.group_id == *id);
        if let Some(group_id) = drive.rate_limiter_group.clone().filter(|id| !has_group(id)) {
            return Err(ConfigError::NoSuchGroup { group_id });
        }
        self.insert_drive(drive)
    }

    /// Removes a drive from a machine whose guest runs.
    ///
    /// # Errors
    ///
    /// There is none of that name, or the guest has its root on it; then nothing has changed.
    pub fn unplug_drive(&mut self, drive_id: &str) -> Result<(), ConfigError> {
        let at = self.drives.iter().position(|drive| drive.drive_id == drive_id);
        let drive_id = drive_id.to_owned();
        match at.and_then(|at| Some((at, self.drives.get(at)?))) {
            None => Err(ConfigError::NoSuchDrive { drive_id }),
            Some((_, drive)) if drive.is_root_device => Err(ConfigError::RootStays { drive_id }),
            Some((at, _)) => {
                self.drives.remove(at);
                // It was a key to the lease of the image that the drive has had.
                self.takes_over.remove(&drive_id);
                Ok(())
            }
        }
    }

    /// Adds a group of drives that share limits, or replaces the one of the same name.
    ///
    /// # Errors
    ///
    /// The rule that `group` breaks; then nothing has changed.
    pub fn insert_group(&mut self, group: RateLimiterGroup) -> Result<(), ConfigError> {
        check_device_id(&group.group_id)?;
        let others = || {
            self.groups
                .iter()
                .filter(|other| other.group_id != group.group_id)
        };
        if others().count() == GROUPS_MAX {
            return Err(ConfigError::TooManyGroups);
        }
        self.groups.retain(|other| other.group_id != group.group_id);
        self.groups.push(group);
        Ok(())
    }

    /// Changes the buckets that `patch` names of a group.
    ///
    /// # Errors
    ///
    /// There is no such group; then nothing has changed.
    pub fn patch_group(&mut self, patch: &RateLimiterGroup) -> Result<(), ConfigError> {
        let group = self
            .groups
            .iter_mut()
            .find(|group| group.group_id == patch.group_id);
        let group = group.ok_or_else(|| ConfigError::NoSuchGroup {
            group_id: patch.group_id.clone(),
        })?;
        group.bandwidth = patch.bandwidth.or(group.bandwidth);
        group.ops = patch.ops.or(group.ops);
        Ok(())
    }

    /// Changes what `patch` names of a drive.
    ///
    /// # Errors
    ///
    /// There is no such drive, its image would have no path, or it is an overlay; then nothing has changed.
    pub fn patch_drive(&mut self, patch: &PartialDrive) -> Result<(), ConfigError> {
        let drive_id = &patch.drive_id;
        let drive = self.drives.iter_mut().find(|drive| drive.drive_id == *drive_id);
        let drive = drive.ok_or_else(|| ConfigError::NoSuchDrive {
            drive_id: drive_id.clone(),
        })?;
        if let Some(path) = &patch.path_on_host {
            if path.is_empty() {
                return Err(ConfigError::NoImage {
                    drive_id: drive_id.clone(),
                });
            }
            if drive.overlay.is_some() {
                return Err(ConfigError::OverlayReplaced {
                    drive_id: drive_id.clone(),
                });
            }
            let patched = DriveConfig {
                path_on_host: Some(path.clone()),
                // It was a key to the lease of the image that the drive has had.
                takes_over: None,
                ..drive.clone()
            };
            patched.network()?;
            *drive = patched;
        }
        if let Some(limits) = patch.rate_limiter {
            let kept = drive.rate_limiter.get_or_insert_default();
            kept.bandwidth = limits.bandwidth.or(kept.bandwidth);
            kept.ops = limits.ops.or(kept.ops);
        }
        Ok(())
    }

    /// Replaces the entropy device.
    pub fn set_entropy(&mut self, entropy: EntropyConfig) {
        self.entropy = Some(entropy);
    }

    /// Replaces the serial port's configuration.
    pub fn set_serial(&mut self, serial: SerialConfig) {
        self.serial = Some(serial);
    }

    /// The same without a logger and metrics.
    #[must_use]
    pub fn without_observers(self) -> Self {
        Self {
            logger: None,
            metrics: None,
            ..self
        }
    }

    /// What the process has of its own in a machine that goes on from a snapshot of another, whose configuration this is:
    /// its logger, its metrics, and what its command line allows it to take over.
    #[must_use]
    pub fn continued_by(self, process: &Self) -> Self {
        let mut config = Self {
            logger: process.logger.clone(),
            metrics: process.metrics.clone(),
            ..self
        };
        config.take_over(process.takes_over.clone());
        config
    }

    /// Whether nothing was configured yet that a snapshot would bring along.
    pub fn is_untouched(&self) -> bool {
        let process = Self::default().continued_by(self);
        *self == process
    }

    /// Says whether the pages are recorded that the guest writes.
    pub fn track_dirty_pages(&mut self, track: bool) {
        self.machine.track_dirty_pages = track;
    }

    /// Remembers the logger's configuration, for `GET /vm/config`.
    pub fn set_logger(&mut self, logger: LoggerConfig) {
        self.logger = Some(logger);
    }

    /// Says where metrics go; that can be said once.
    ///
    /// # Errors
    ///
    /// It was said before; then nothing has changed.
    pub fn set_metrics(&mut self, metrics: MetricsConfig) -> Result<(), ConfigError> {
        if self.metrics.is_some() {
            return Err(ConfigError::SecondMetrics);
        }
        self.metrics = Some(metrics);
        Ok(())
    }
}

/// Why a configuration is refused.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A bad name.
    #[error(transparent)]
    Id(#[from] IdError),
    /// vCPUs or memory.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// Kernel, initrd or command line.
    #[error(transparent)]
    BootSource(#[from] BootSourceError),
    /// A drive without an image.
    #[error("Drive config error")]
    Drive(#[from] DriveError),
    /// A network interface.
    #[error("Network config error")]
    Network(#[from] NetworkError),
    /// The metadata service.
    #[error("MMDS config error")]
    Metadata(#[from] MetadataError),
    /// The balloon.
    #[error("Balloon config error")]
    Balloon(#[from] BalloonError),
    /// Persistent memory.
    #[error("Pmem config error")]
    Pmem(#[from] PmemConfigError),
    /// Memory that comes and goes.
    #[error("Memory hotplug config error")]
    MemoryHotplug(#[from] MemoryHotplugError),
    /// The socket device.
    #[error("Vsock config error")]
    Vsock(#[from] VsockError),
    /// A drive with an empty path.
    #[error("Drive config error: path_on_host of `{drive_id}` is empty; name a file or a block device")]
    NoImage {
        /// The drive.
        drive_id: String,
    },
    /// Another path for a drive that has none.
    #[error(
        "Drive config error: `{drive_id}` is an overlay, which stays what it is while the machine lives; \
         leave path_on_host out"
    )]
    OverlayReplaced {
        /// The drive.
        drive_id: String,
    },
    /// A partition to boot from on a drive that is not booted from.
    #[error(
        "Drive config error: `{drive_id}` has a partuuid but is not the root device; \
         set is_root_device, or leave partuuid out"
    )]
    PartuuidWithoutRoot {
        /// The drive.
        drive_id: String,
    },
    /// Two drives to boot from.
    #[error(
        "Drive config error: A root block device already exists: `{root_id}`; set is_root_device on one drive only"
    )]
    SecondRoot {
        /// The root drive that there is.
        root_id: String,
    },
    /// A drive to boot from beside a pmem device to boot from.
    #[error(
        "Drive config error: A root device already exists: the pmem device `{root_id}`; set is_root_device, or root_device of a \
         pmem device, for one device only"
    )]
    RootPmem {
        /// The root device that there is.
        root_id: String,
    },
    /// One chain of records for two images.
    #[error(
        "Drive config error: `{drive_id}` and `{other_id}` have the same lease_at; the records of each image need a \
         name of their own"
    )]
    SharedLeaseAt {
        /// The drive.
        drive_id: String,
        /// The drive that has it.
        other_id: String,
    },
    /// No place for another drive.
    #[error("Drive config error: there are {DRIVES_MAX} drives, and no machine can have more")]
    TooManyDrives,
    /// A second drive of one name, while the guest runs.
    #[error(
        "Drive config error: there is a drive `{drive_id}`: PATCH /drives/{drive_id} changes it, and DELETE takes it out"
    )]
    DriveThere {
        /// The drive.
        drive_id: String,
    },
    /// A drive to boot from, once the guest has booted.
    #[error("Drive config error: `{drive_id}` comes too late to be booted from: leave is_root_device out")]
    LateRoot {
        /// The drive.
        drive_id: String,
    },
    /// The drive that was booted from is to go.
    #[error(
        "Drive config error: `{drive_id}` is the root device, which stays as long as the machine is there"
    )]
    RootStays {
        /// The drive.
        drive_id: String,
    },
    /// A change of something that is not there.
    #[error("Drive config error: there is no drive `{drive_id}`; GET /vm/config lists them")]
    NoSuchDrive {
        /// The drive that was asked for.
        drive_id: String,
    },
    /// No place for another group.
    #[error("Rate limiter group error: there are {GROUPS_MAX} groups, as many as there can be drives")]
    TooManyGroups,
    /// A change of a group that is not there.
    #[error("Rate limiter group error: there is no group `{group_id}`; GET /vm/config lists them")]
    NoSuchGroup {
        /// The group that was asked for.
        group_id: String,
    },
    /// Metrics that would change their destination.
    #[error("Metrics error: the metrics already have a destination, and it cannot be changed")]
    SecondMetrics,
}

#[cfg(test)]
mod tests;
