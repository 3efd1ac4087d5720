//! How big the machine is.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Most vCPUs of a machine.
pub const VCPU_COUNT_MAX: u8 = crate::arch::x86_64::layout::VCPUS_MAX;

/// Most memory of a machine, in MiB: 1 TiB.
pub const MEM_SIZE_MIB_MAX: u64 = crate::memory::MEMORY_MIB_MAX;

/// The body of `PUT /machine-config`: vCPUs and memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MachineConfig {
    /// Number of vCPUs: 1, or an even number with `smt`.
    #[schemars(range(min = 1, max = VCPU_COUNT_MAX))]
    pub vcpu_count: u8,
    /// Memory of the guest in MiB; a multiple of 2 with huge pages.
    #[schemars(range(min = 1, max = MEM_SIZE_MIB_MAX))]
    pub mem_size_mib: u64,
    /// Whether two vCPUs each are shown as threads of one core.
    #[serde(default)]
    pub smt: bool,
    /// Deprecated, and only `None` is offered: CPU templates go to `/cpu-config`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_template: Option<StaticTemplate>,
    /// Whether the pages that the guest writes are recorded, for incremental snapshots.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// The host's pages behind the guest's memory.
    #[serde(default)]
    pub huge_pages: HugePages,
    /// What the guest's memory is made of. (Not in Firecracker.)
    #[serde(default, skip_serializing_if = "MemoryBacking::is_default")]
    pub memory_backing: MemoryBacking,
}

/// The body of `PATCH /machine-config`: what is absent stays as it is.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MachineConfigPatch {
    /// Number of vCPUs: 1, or an even number with `smt`.
    #[schemars(range(min = 1, max = VCPU_COUNT_MAX))]
    pub vcpu_count: Option<u8>,
    /// Memory of the guest in MiB; a multiple of 2 with huge pages.
    #[schemars(range(min = 1, max = MEM_SIZE_MIB_MAX))]
    pub mem_size_mib: Option<u64>,
    /// Whether two vCPUs each are shown as threads of one core.
    pub smt: Option<bool>,
    /// Deprecated, and only `None` is offered: CPU templates go to `/cpu-config`.
    pub cpu_template: Option<StaticTemplate>,
    /// Whether the pages that the guest writes are recorded, for incremental snapshots.
    pub track_dirty_pages: Option<bool>,
    /// The host's pages behind the guest's memory.
    pub huge_pages: Option<HugePages>,
    /// What the guest's memory is made of. (Not in Firecracker.)
    pub memory_backing: Option<MemoryBacking>,
}

/// Firecracker's static CPU templates. Only `None` is offered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum StaticTemplate {
    /// Intel Skylake to Cascade Lake as EC2's C3.
    C3,
    /// Intel as EC2's T2.
    T2,
    /// T2, for migration between Skylake and Cascade Lake.
    T2S,
    /// T2 on Cascade Lake, close to T2A.
    T2CL,
    /// AMD Milan, close to T2CL.
    T2A,
    /// The host's CPU, as it is normalised for every guest.
    None,
}

/// The host's pages behind the guest's memory.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum HugePages {
    /// 4 KiB pages, or what else the host does unasked.
    #[default]
    None,
    /// Transparent huge pages, which the host is advised to use where it has them to spare.
    Transparent,
    /// 2 MiB pages from the host's pool of huge pages.
    #[serde(rename = "2M")]
    Hugetlbfs2M,
}

/// What the guest's memory is made of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum MemoryBacking {
    /// Anonymous private memory.
    #[default]
    Anonymous,
    /// A memfd, shared, so that another process can be given it.
    Memfd,
}

impl MemoryBacking {
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

impl Default for MachineConfig {
    fn default() -> Self {
        Self {
            vcpu_count: 1,
            mem_size_mib: 128,
            smt: false,
            cpu_template: None,
            track_dirty_pages: false,
            huge_pages: HugePages::default(),
            memory_backing: MemoryBacking::default(),
        }
    }
}

impl MachineConfig {
    /// This configuration with what `patch` names replaced; not checked yet.
    pub fn patched(&self, patch: &MachineConfigPatch) -> Self {
        Self {
            vcpu_count: patch.vcpu_count.unwrap_or(self.vcpu_count),
            mem_size_mib: patch.mem_size_mib.unwrap_or(self.mem_size_mib),
            smt: patch.smt.unwrap_or(self.smt),
            cpu_template: patch.cpu_template.or(self.cpu_template),
            track_dirty_pages: patch.track_dirty_pages.unwrap_or(self.track_dirty_pages),
            huge_pages: patch.huge_pages.unwrap_or(self.huge_pages),
            memory_backing: patch.memory_backing.unwrap_or(self.memory_backing),
        }
    }

    /// Checks bounds and what fields mean together; gives the configuration as it is kept.
    ///
    /// # Errors
    ///
    /// The first rule that is broken.
    pub fn checked(mut self) -> Result<Self, MachineError> {
        if self.vcpu_count == 0 || self.vcpu_count > VCPU_COUNT_MAX {
            return Err(MachineError::VcpuCount {
                count: self.vcpu_count,
            });
        }
        if self.smt && self.vcpu_count > 1 && !self.vcpu_count.is_multiple_of(2) {
            return Err(MachineError::OddWithSmt {
                count: self.vcpu_count,
            });
        }
        if self.mem_size_mib == 0 || self.mem_size_mib > MEM_SIZE_MIB_MAX {
            return Err(MachineError::MemSize {
                mib: self.mem_size_mib,
            });
        }
        if self.huge_pages != HugePages::None && !self.mem_size_mib.is_multiple_of(2) {
            return Err(MachineError::MemSizeHugePages {
                mib: self.mem_size_mib,
            });
        }
        match self.cpu_template.take() {
            None | Some(StaticTemplate::None) => Ok(self),
            Some(template) => Err(MachineError::StaticTemplate { template }),
        }
    }
}

/// Why a machine configuration is refused.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum MachineError {
    /// No vCPU, or too many.
    #[error("Machine config error: vcpu_count is {count}; choose 1 to {VCPU_COUNT_MAX}")]
    VcpuCount {
        /// As asked.
        count: u8,
    },
    /// Threads that cannot be paired.
    #[error(
        "Machine config error: vcpu_count is {count}; with smt it must be 1 or even, or set smt to false"
    )]
    OddWithSmt {
        /// As asked.
        count: u8,
    },
    /// No memory, or too much.
    #[error("Machine config error: mem_size_mib is {mib}; choose 1 to {MEM_SIZE_MIB_MAX}")]
    MemSize {
        /// As asked.
        mib: u64,
    },
    /// Memory that huge pages cannot fill.
    #[error(
        "Machine config error: mem_size_mib is {mib}; with huge pages it must be a multiple of 2, \
         or set huge_pages to None"
    )]
    MemSizeHugePages {
        /// As asked.
        mib: u64,
    },
    /// A static template.
    #[error(
        "Machine config error: the static CPU template {template:?} is not offered; \
         send a custom template to PUT /cpu-config instead, or set cpu_template to None"
    )]
    StaticTemplate {
        /// As asked.
        template: StaticTemplate,
    },
}
