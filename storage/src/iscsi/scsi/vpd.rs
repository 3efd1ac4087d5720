//! Vital product data (SPC-4, 7.8; SBC-3, 6.5), but for what names the unit: see [`super::designator`].
//!
//! A page of an older unit ends earlier: what is not there counts as not said.

use super::cdb::VpdPage;
use super::parameter::{Parameter, ParameterError, text};

/// Enough for every page: what is read of the long one, the names of the unit, comes early in it.
pub const VPD_BYTES: u16 = 4096;

/// The page, cut to the length that it says.
pub(super) fn page(page: VpdPage, bytes: &[u8]) -> Result<Parameter<'_>, ParameterError> {
    let data = Parameter::new("vital product data", bytes);
    let (expected, found) = (page.code(), data.u8(1)?);
    if found != expected {
        return Err(ParameterError::OtherPage { expected, found });
    }
    Ok(data.cut(usize::from(data.u16(2)?) + 4))
}

/// Which pages there are (SPC-4, 7.8).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SupportedPages(Vec<u8>);

impl SupportedPages {
    /// Reads page 00.
    ///
    /// # Errors
    ///
    /// When it is another one, or none.
    pub fn parse(bytes: &[u8]) -> Result<Self, ParameterError> {
        Ok(Self(page(VpdPage::Supported, bytes)?.rest(4).to_vec()))
    }

    /// Whether the unit has `page`.
    pub fn has(&self, page: VpdPage) -> bool {
        self.0.contains(&page.code())
    }
}

/// The unit's serial number (SPC-4, 7.8); empty if it has none.
///
/// # Errors
///
/// When the bytes are not page 80.
pub fn serial_number(bytes: &[u8]) -> Result<String, ParameterError> {
    Ok(text(page(VpdPage::SerialNumber, bytes)?.rest(4)))
}

/// How much one command can be about (SBC-3, 6.5.3).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BlockLimits {
    /// Whether a WRITE SAME of no blocks is refused; if not, it is one of all blocks.
    pub write_same_nonzero: bool,
    /// COMPARE AND WRITE; 0 if it cannot be used.
    pub compare_and_write_blocks_max: u8,
    /// Transfers of a multiple of it are the best.
    pub transfer_blocks_granularity: Option<u16>,
    /// READ and WRITE.
    pub transfer_blocks_max: Option<u32>,
    /// Longer ones may be slower.
    pub transfer_blocks_optimal: Option<u32>,
    /// All ranges of one UNMAP together: 0 if it cannot be used, `u32::MAX` for no limit.
    pub unmap_blocks_max: u32,
    /// Ranges of one UNMAP: 0 if it cannot be used, `u32::MAX` for no limit.
    pub unmap_descriptors_max: u32,
    /// An UNMAP of less may free nothing.
    pub unmap_blocks_granularity: Option<u32>,
    /// Where the first such piece starts.
    pub unmap_alignment_lba: Option<u32>,
    /// WRITE SAME.
    pub write_same_blocks_max: Option<u64>,
}

impl BlockLimits {
    /// Reads page B0.
    ///
    /// # Errors
    ///
    /// When it is another one, or none.
    pub fn parse(bytes: &[u8]) -> Result<Self, ParameterError> {
        const UGAVALID: u32 = 1 << 31;
        let page = page(VpdPage::BlockLimits, bytes)?;
        let said = |at| page.u32(at).ok().filter(|value| *value != 0);
        Ok(Self {
            write_same_nonzero: page.u8(4).is_ok_and(|flags| flags & 1 != 0),
            compare_and_write_blocks_max: page.u8(5).unwrap_or(0),
            transfer_blocks_granularity: page.u16(6).ok().filter(|value| *value != 0),
            transfer_blocks_max: said(8),
            transfer_blocks_optimal: said(12),
            unmap_blocks_max: page.u32(20).unwrap_or(0),
            unmap_descriptors_max: page.u32(24).unwrap_or(0),
            unmap_blocks_granularity: said(28),
            unmap_alignment_lba: said(32)
                .filter(|value| value & UGAVALID != 0)
                .map(|value| value & !UGAVALID),
            write_same_blocks_max: page.u64(36).ok().filter(|value| *value != 0),
        })
    }
}

/// What turns in the unit (SBC-3, 6.5.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rotation {
    /// It does not say.
    NotReported,
    /// Nothing.
    NonRotating,
    /// A disk, as often in a minute.
    Rpm(u16),
}

impl Rotation {
    /// Reads page B1.
    ///
    /// # Errors
    ///
    /// When it is another one, or none.
    pub fn parse(bytes: &[u8]) -> Result<Self, ParameterError> {
        let rate = page(VpdPage::BlockCharacteristics, bytes)?.u16(4)?;
        Ok(match rate {
            1 => Self::NonRotating,
            0x0401..=0xfffe => Self::Rpm(rate),
            _ => Self::NotReported,
        })
    }
}

/// How blocks come and go (SBC-3, 6.5.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Provisioning {
    /// Whether UNMAP frees blocks (LBPU).
    pub unmap: bool,
    /// Whether WRITE SAME (16) does (LBPWS).
    pub write_same: bool,
    /// Whether a freed block reads as zeros (LBPRZ).
    pub reads_zeros: bool,
    /// What a block is that was never written.
    pub kind: ProvisioningType,
    /// A threshold is a multiple of two to this power of blocks; `None` if there are none.
    pub threshold_exponent: Option<u8>,
}

/// PROVISIONING TYPE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProvisioningType {
    /// Not said, or fully there.
    Full,
    /// There is room for it, but it has none yet.
    Resource,
    /// There may be no room for it.
    Thin,
    /// Reserved.
    Other(u8),
}

impl Provisioning {
    /// Reads page B2.
    ///
    /// # Errors
    ///
    /// When it is another one, or none.
    pub fn parse(bytes: &[u8]) -> Result<Self, ParameterError> {
        let page = page(VpdPage::Provisioning, bytes)?;
        let (flags, kind) = (page.u8(5)?, page.u8(6)?);
        Ok(Self {
            unmap: flags & 0x80 != 0,
            write_same: flags & 0x40 != 0,
            reads_zeros: flags & 0x04 != 0,
            kind: match kind & 0x07 {
                0 => ProvisioningType::Full,
                1 => ProvisioningType::Resource,
                2 => ProvisioningType::Thin,
                other => ProvisioningType::Other(other),
            },
            threshold_exponent: Some(page.u8(4)?).filter(|exponent| *exponent != 0),
        })
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

    use super::super::bytes_of;
    use super::*;

    #[test]
    fn the_pages_of_tgtd_are_read() {
        let pages = SupportedPages::parse(&bytes_of("00000006008083b0b1b2")).unwrap();
        assert!(pages.has(VpdPage::BlockLimits) && pages.has(VpdPage::DeviceIdentification));
        let serial = bytes_of(&format!("00800024{}626561663131", "20".repeat(30)));
        assert_eq!(serial_number(&serial).unwrap(), "beaf11");
        let limits = bytes_of(&format!(
            "00b0003c00800000{}ffffffffffffffff{}",
            "00".repeat(12),
            "00".repeat(36)
        ));
        assert_eq!(
            BlockLimits::parse(&limits).unwrap(),
            BlockLimits {
                compare_and_write_blocks_max: 128,
                unmap_blocks_max: u32::MAX,
                unmap_descriptors_max: u32::MAX,
                ..BlockLimits::default()
            }
        );
        // Its length says four bytes more than there are.
        let characteristics = bytes_of(&format!("00b10040{}", "00".repeat(60)));
        assert_eq!(Rotation::parse(&characteristics).unwrap(), Rotation::NotReported);
        assert_eq!(
            Provisioning::parse(&bytes_of("00b2000400e40200")).unwrap(),
            Provisioning {
                unmap: true,
                write_same: true,
                reads_zeros: true,
                kind: ProvisioningType::Thin,
                threshold_exponent: None,
            }
        );
    }

    #[test]
    fn limits_are_read_from_where_they_stand() {
        let limits = "00b0003c 01 04 0008 00010000 00002000 00000000 00400000 00000020 00000800 80000007 0000000000010000";
        assert_eq!(
            BlockLimits::parse(&bytes_of(limits)).unwrap(),
            BlockLimits {
                write_same_nonzero: true,
                compare_and_write_blocks_max: 4,
                transfer_blocks_granularity: Some(8),
                transfer_blocks_max: Some(0x1_0000),
                transfer_blocks_optimal: Some(0x2000),
                unmap_blocks_max: 0x40_0000,
                unmap_descriptors_max: 0x20,
                unmap_blocks_granularity: Some(0x800),
                unmap_alignment_lba: Some(7),
                write_same_blocks_max: Some(0x1_0000),
            }
        );
    }

    #[test]
    fn a_page_ends_where_it_says_and_what_is_behind_it_is_not_said() {
        let old = bytes_of("00b0000c 00 00 0008 00010000 00000000 00000000 ffffffff ffffffff");
        let limits = BlockLimits::parse(&old).unwrap();
        assert_eq!(
            (limits.transfer_blocks_max, limits.unmap_blocks_max),
            (Some(0x1_0000), 0)
        );
    }

    #[test]
    fn another_page_is_told_from_the_one_that_was_asked_for() {
        assert_eq!(
            Rotation::parse(&bytes_of("00b0003c00000000")),
            Err(ParameterError::OtherPage {
                expected: 0xb1,
                found: 0xb0
            })
        );
        assert!(Provisioning::parse(&bytes_of("00b2000400e4")).is_err());
    }

    #[test]
    fn what_turns_is_told_from_what_does_not() {
        let rotation = |rate: &str| Rotation::parse(&bytes_of(&format!("00b1003c{rate}"))).unwrap();
        assert_eq!(rotation("0001"), Rotation::NonRotating);
        assert_eq!(rotation("1c20"), Rotation::Rpm(7200));
        assert_eq!(rotation("0400"), Rotation::NotReported);
        assert_eq!(rotation("ffff"), Rotation::NotReported);
    }
}
