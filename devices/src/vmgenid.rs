//! The VM generation ID: 16 bytes that differ whenever the same guest may have run before.
//!
//! The DSDT tells the guest the address. A guest mixes the identifier into its random generator, so
//! it must be fresh at every boot and after every restore; and since a restored guest does not know that it
//! was one, an interrupt has it look again.

use std::io;

use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::random;

/// Size of the identifier in guest memory.
pub const GENERATION_ID_BYTES: usize = 16;
/// Its address is a multiple of this.
pub const GENERATION_ID_ALIGN_BYTES: u64 = 8;

/// Why a generation could not be announced.
#[derive(Debug, thiserror::Error)]
pub enum GenerationError {
    /// The vmm chose an address that the guest could not use.
    #[error("the generation ID at {0:#x} is not aligned to {GENERATION_ID_ALIGN_BYTES} bytes")]
    Alignment(u64),
    /// The host gave no descriptor for the interrupt line.
    #[error("cannot make the interrupt line of the generation ID")]
    Line(#[source] io::Error),
    /// The guest cannot be told.
    #[error("cannot raise the interrupt line of the generation ID")]
    Raise(#[source] io::Error),
    /// The host gave no random bytes.
    #[error("no random bytes for a generation ID")]
    Random(#[source] io::Error),
    /// The address is not guest memory.
    #[error("the generation ID at {address:#x} cannot be written")]
    Memory {
        /// Where it should go.
        address: u64,
        /// Why not.
        #[source]
        source: GuestMemoryError,
    },
}

/// Where a guest looks for its generation, and what tells it to.
#[derive(Debug)]
pub struct GenerationId {
    address: GuestAddress,
    line: EventFd,
}

impl GenerationId {
    /// A place at `address`.
    ///
    /// # Errors
    ///
    /// When it is not aligned, or the process has no descriptor left.
    pub fn new(address: GuestAddress) -> Result<Self, GenerationError> {
        if !address.0.is_multiple_of(GENERATION_ID_ALIGN_BYTES) {
            return Err(GenerationError::Alignment(address.0));
        }
        let line = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(GenerationError::Line)?;
        Ok(Self { address, line })
    }

    /// The guest address, for the DSDT.
    pub fn address(&self) -> GuestAddress {
        self.address
    }

    /// The interrupt line; written when the generation has changed.
    pub fn line(&self) -> &EventFd {
        &self.line
    }

    /// Has a guest that was restored look at its identifier: once that is renewed, and the interrupt controllers are as they
    /// were, which would forget an interrupt that came earlier.
    ///
    /// # Errors
    ///
    /// When the line cannot be raised.
    pub fn announce(&self) -> Result<(), GenerationError> {
        self.line.write(1).map_err(GenerationError::Raise)
    }
}

/// Writes a fresh identifier at `address`, before the guest runs.
///
/// # Errors
///
/// When there are no random bytes or the address is not guest memory.
pub fn renew(address: GuestAddress, memory: &GuestMemoryMmap) -> Result<(), GenerationError> {
    let mut id = [0; GENERATION_ID_BYTES];
    random::fill(&mut id).map_err(GenerationError::Random)?;
    memory
        .write_slice(&id, address)
        .map_err(|source| GenerationError::Memory {
            address: address.0,
            source,
        })
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use super::*;
    use crate::virtio::testing::memory;

    #[test]
    fn every_renewal_writes_another_identifier_and_nothing_beside_it() {
        let memory = memory(4096);
        let place = GuestAddress(0x108);
        let mut seen = [[0_u8; 32]; 2];
        for bytes in &mut seen {
            renew(place, &memory).unwrap();
            memory.read_slice(bytes, GuestAddress(0x100)).unwrap();
        }
        let [first, second] = seen;
        assert_ne!(first, second);
        assert!(first.starts_with(&[0; 8]) && first.ends_with(&[0; 8]));
        assert_ne!(first, [0; 32]);
    }

    #[test]
    fn only_a_guest_that_was_restored_is_told() {
        let place = GenerationId::new(GuestAddress(0x100)).unwrap();
        assert!(place.line().read().is_err(), "a guest that boots looks by itself");
        place.announce().unwrap();
        assert_eq!(place.line().read().unwrap(), 1);
    }

    #[test]
    fn an_address_that_is_odd_or_no_memory_is_refused() {
        assert!(matches!(
            GenerationId::new(GuestAddress(4)),
            Err(GenerationError::Alignment(4))
        ));
        let beyond = GuestAddress(4096 - 8);
        let error = renew(beyond, &memory(4096)).unwrap_err();
        assert!(matches!(error, GenerationError::Memory { address: 4088, .. }));
    }
}
