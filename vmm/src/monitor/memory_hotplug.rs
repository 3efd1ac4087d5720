//! What is asked of memory that comes and goes.

use coracle_devices::virtio::mem::MemControl;

use super::{Guest, Monitor};
use crate::api::{Answer, Data, Fault, Verb};

impl Monitor {
    /// Does what a verb says that is about memory that comes and goes; none of them takes time.
    pub(super) fn attend_memory_hotplug(&mut self, verb: &Verb) -> Answer {
        match verb {
            Verb::PutMemoryHotplug(hotplug) => self.config.set_memory_hotplug(hotplug.clone())?,
            Verb::PatchMemoryHotplug(update) => {
                self.config.check_requested(update)?;
                self.memory_hotplug()?.request(update.requested_size_mib);
            }
            Verb::GetMemoryHotplug => {
                let config = self.config.expect_memory_hotplug()?;
                return Ok(Data::json(&self.memory_hotplug()?.status(config)));
            }
            _ => unreachable!("this is about memory that comes and goes"),
        }
        Ok(Data::Empty)
    }

    fn memory_hotplug(&self) -> Result<&MemControl, Fault> {
        // Whose machine has given everything away can only be told that.
        let gone = || Fault::bad_request("the guest is not here any more: ask the host that it went to");
        self.guest.memory_hotplug().ok_or_else(gone)
    }
}

impl Guest {
    /// What controls the memory of the machine that comes and goes, if there may be any.
    fn memory_hotplug(&self) -> Option<&MemControl> {
        match self {
            Self::Running(machine) => machine.memory_hotplug(),
            Self::Pausing(machine) => machine.memory_hotplug(),
            Self::Paused(machine) => machine.memory_hotplug(),
            Self::Stranded(machine) => machine.memory_hotplug(),
            Self::NotStarted | Self::Yielded(_) => None,
        }
    }
}
