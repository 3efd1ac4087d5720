//! READ CAPACITY (16) parameter data (SBC-3, 5.16.2): how large a unit is.

use super::parameter::{Parameter, ParameterError};

/// The length of the data.
pub const CAPACITY_BYTES: u32 = 32;

const BLOCK_BYTES_MIN: u32 = 512;
const BLOCK_BYTES_MAX: u32 = 65536;

/// How large a unit is; all sizes fit into an offset of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// How many blocks.
    pub blocks: u64,
    /// The block that addresses count: a power of two from 512 to 65536.
    pub block_bytes: u32,
    /// All of them.
    pub size_bytes: u64,
    /// The block that the medium has, a multiple of the other.
    pub physical_block_bytes: u32,
    /// Whether blocks carry protection information (PROT_EN).
    pub is_protected: bool,
    /// Whether blocks can be freed (LBPME).
    pub is_provisioned: bool,
    /// Whether a freed block reads as zeros (LBPRZ).
    pub reads_zeros: bool,
}

impl Capacity {
    /// Reads the data.
    ///
    /// # Errors
    ///
    /// When they are cut off, or are of a unit that cannot be a disk here.
    pub fn parse(bytes: &[u8]) -> Result<Self, ParameterError> {
        let data = Parameter::new("capacity data", bytes);
        let (last_lba, block_bytes) = (data.u64(0)?, data.u32(8)?);
        let (protection, exponents, provisioning) = (data.u8(12)?, data.u8(13)?, data.u8(14)?);
        if !block_bytes.is_power_of_two() || !(BLOCK_BYTES_MIN..=BLOCK_BYTES_MAX).contains(&block_bytes) {
            return Err(ParameterError::BlockBytes(block_bytes));
        }
        let size_bytes = last_lba
            .checked_add(1)
            .and_then(|blocks| blocks.checked_mul(u64::from(block_bytes)))
            .filter(|bytes| i64::try_from(*bytes).is_ok())
            .ok_or(ParameterError::Size {
                blocks: u128::from(last_lba) + 1,
                block_bytes,
            })?;
        Ok(Self {
            blocks: last_lba + 1,
            block_bytes,
            size_bytes,
            // 2^16 at most, by 2^15 at most.
            physical_block_bytes: block_bytes << (exponents & 0x0f),
            is_protected: protection & 1 != 0,
            is_provisioned: provisioning & 0x80 != 0,
            reads_zeros: provisioning & 0x40 != 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::bytes_of;
    use super::*;

    fn parsed(last_lba: u64, block_bytes: u32, flags: &str) -> Result<Capacity, ParameterError> {
        Capacity::parse(&bytes_of(&format!("{last_lba:016x}{block_bytes:08x}{flags}")))
    }

    #[test]
    fn a_unit_of_tgtd_is_read() {
        let bytes = bytes_of("00000000001fffff000002000003c00000000000000000000000000000000000");
        assert_eq!(
            Capacity::parse(&bytes),
            Ok(Capacity {
                blocks: 0x20_0000,
                block_bytes: 512,
                size_bytes: 1 << 30,
                physical_block_bytes: 4096,
                is_protected: false,
                is_provisioned: true,
                reads_zeros: true,
            })
        );
    }

    #[test]
    fn the_largest_sizes_are_read_and_none_beyond() {
        let largest = parsed((1 << 54) - 2, 512, "000f0000").map(|capacity| capacity.size_bytes);
        assert_eq!(largest, Ok((1 << 63) - 512));
        for (last_lba, block_bytes) in [((1 << 54) - 1, 512), (u64::MAX, 512), (u64::MAX - 1, 65536)] {
            let blocks = u128::from(last_lba) + 1;
            let refused = Err(ParameterError::Size { blocks, block_bytes });
            assert_eq!(parsed(last_lba, block_bytes, "00000000"), refused);
        }
        let physical = parsed(7, 65536, "010f0000").map(|capacity| capacity.physical_block_bytes);
        assert_eq!(physical, Ok(1 << 31));
    }

    #[test]
    fn a_block_that_no_disk_here_has_is_refused() {
        for block_bytes in [0, 1, 256, 520, 4104, 1 << 17, u32::MAX] {
            let refused = Err(ParameterError::BlockBytes(block_bytes));
            assert_eq!(parsed(7, block_bytes, "00000000"), refused);
        }
        assert!(parsed(7, 512, "0000").is_err());
    }
}
