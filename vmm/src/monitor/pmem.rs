//! Persistent memory: what is configured before the start, and what is changed of it afterwards.

use coracle_devices::virtio::pmem::{PartialPmem, PmemConfig};

use super::{Guest, Monitor};
use crate::api::Fault;
use crate::config::{ConfigError, PmemConfigError};
use crate::end::End;

impl Monitor {
    /// Takes a device into the configuration.
    pub(super) fn put_pmem(&mut self, pmem: PmemConfig) -> Result<(), Fault> {
        let mut config = self.config.clone();
        config.insert_pmem(pmem.clone())?;
        // Opened and leased at the start; a path that is wrong is better heard of now.
        let checked = pmem.check_file(&self.owner);
        checked.map_err(|error| ConfigError::from(PmemConfigError::from(error)))?;
        self.config = config;
        Ok(())
    }

    /// Changes the limits of one.
    pub(super) fn patch_pmem(&mut self, patch: &PartialPmem) -> Result<(), Fault> {
        self.config.patch_pmem(patch)?;
        match &self.guest {
            Guest::Running(machine) => machine.limit_pmem(patch),
            Guest::Pausing(machine) => machine.limit_pmem(patch),
            Guest::Paused(machine) => machine.limit_pmem(patch),
            Guest::Stranded(machine) => machine.limit_pmem(patch),
            Guest::NotStarted | Guest::Yielded(_) => {}
        }
        Ok(())
    }

    /// Why the machine has ended, as far as more is known of that than KVM says: it has no word for a page that the guest touches
    /// and the host does not have.
    pub(super) fn explained(&self, end: &End) -> End {
        let cut = match (&self.guest, end) {
            (Guest::Running(machine), End::RunFailed { .. }) => machine.cut_pmem(),
            (Guest::Pausing(machine), End::RunFailed { .. }) => machine.cut_pmem(),
            _ => None,
        };
        cut.map_or_else(|| end.clone(), |reason| End::MemoryLost { reason })
    }
}
