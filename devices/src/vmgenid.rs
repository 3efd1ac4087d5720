//! The VM generation ID: 16 bytes that differ whenever the same guest may have run before.
//!
//! The DSDT tells the guest the address. A guest mixes the identifier into its random generator, so
//! it must be fresh at every boot and after every restore.

use std::io;

use vm_memory::{Bytes, GuestAddress, GuestMemoryError, GuestMemoryMmap};

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

/// Where a guest looks for its generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct GenerationId {
    address: GuestAddress,
}

impl GenerationId {
    /// A place at `address`.
    ///
    /// # Errors
    ///
    /// When it is not aligned.
    pub fn new(address: GuestAddress) -> Result<Self, GenerationError> {
        if !address.0.is_multiple_of(GENERATION_ID_ALIGN_BYTES) {
            return Err(GenerationError::Alignment(address.0));
        }
        Ok(Self { address })
    }

    /// The guest address, for the DSDT.
    pub fn address(&self) -> GuestAddress {
        self.address
    }

    /// Writes a fresh identifier, before the guest runs.
    ///
    /// # Errors
    ///
    /// When there are no random bytes or the address is not guest memory.
    pub fn renew(&self, memory: &GuestMemoryMmap) -> Result<(), GenerationError> {
        let mut id = [0; GENERATION_ID_BYTES];
        random::fill(&mut id).map_err(GenerationError::Random)?;
        let address = self.address.0;
        memory
            .write_slice(&id, self.address)
            .map_err(|source| GenerationError::Memory { address, source })
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use super::*;
    use crate::virtio::testing::memory;

    #[test]
    fn every_renewal_writes_another_identifier_and_nothing_beside_it() {
        let memory = memory(4096);
        let place = GenerationId::new(GuestAddress(0x108)).unwrap();
        let mut seen = [[0_u8; 32]; 2];
        for bytes in &mut seen {
            place.renew(&memory).unwrap();
            memory.read_slice(bytes, GuestAddress(0x100)).unwrap();
        }
        let [first, second] = seen;
        assert_ne!(first, second);
        assert!(first.starts_with(&[0; 8]) && first.ends_with(&[0; 8]));
        assert_ne!(first, [0; 32]);
    }

    #[test]
    fn an_address_that_is_odd_or_no_memory_is_refused() {
        assert!(matches!(
            GenerationId::new(GuestAddress(4)),
            Err(GenerationError::Alignment(4))
        ));
        let beyond = GenerationId::new(GuestAddress(4096 - 8)).unwrap();
        let error = beyond.renew(&memory(4096)).unwrap_err();
        assert!(matches!(error, GenerationError::Memory { address: 4088, .. }));
    }
}
