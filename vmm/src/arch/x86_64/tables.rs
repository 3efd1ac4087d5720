//! The tables by which a guest finds its processors and devices: ACPI, and the MP table for
//! kernels without it.

use vm_memory::{GuestMemoryError, GuestMemoryMmap};

use super::layout::VirtioWindow;
use super::{acpi, mptable};

/// What the tables tell.
pub struct Platform<'a> {
    /// The number of virtual processors; the APIC ID of each is its number.
    pub vcpus: u8,
    /// The virtio-mmio devices, which have the first windows; to the others one may come.
    pub virtio: &'a [VirtioWindow],
}

/// Why the tables could not be written.
#[derive(Debug, thiserror::Error)]
#[error("cannot write the {what} to guest memory: a guest needs at least 1 MiB")]
pub struct TablesError {
    what: &'static str,
    #[source]
    source: GuestMemoryError,
}

/// Writes all tables between the end of base memory and 1 MiB.
pub fn write(memory: &GuestMemoryMmap, platform: &Platform<'_>) -> Result<(), TablesError> {
    mptable::write(memory, platform.vcpus).map_err(|source| TablesError {
        what: "MP table",
        source,
    })?;
    acpi::write(memory, platform).map_err(|source| TablesError {
        what: "ACPI tables",
        source,
    })
}
