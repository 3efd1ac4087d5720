//! Standard INQUIRY data (SPC-4, 6.6.2): what a unit is, and whose.

use super::parameter::{Parameter, ParameterError, text};

/// Enough for every field that is read.
pub const INQUIRY_BYTES: u16 = 96;

/// What a unit says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Inquiry {
    /// Whether there is a device behind the number of the unit.
    pub qualifier: Qualifier,
    /// What kind of device.
    pub device_type: DeviceType,
    /// Whether blocks can carry protection information.
    pub protect: bool,
    /// Who made it.
    pub vendor: String,
    /// What they call it.
    pub product: String,
    /// And which of them it is.
    pub revision: String,
}

/// PERIPHERAL QUALIFIER.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Qualifier {
    /// A device is there.
    Connected,
    /// There could be one.
    Absent,
    /// The target has no unit of this number.
    Impossible,
    /// Reserved, or the vendor's own.
    Other(u8),
}

/// PERIPHERAL DEVICE TYPE.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceType(pub u8);

impl DeviceType {
    /// A disk.
    pub const DIRECT_ACCESS: Self = Self(0x00);
}

impl std::fmt::Display for DeviceType {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self.0 {
            0x00 => "disk",
            0x01 => "tape",
            0x05 => "optical drive",
            0x08 => "media changer",
            0x0c => "storage array controller",
            0x0d => "enclosure",
            0x0e => "simplified disk",
            0x14 => "zoned disk",
            0x1e => "well known unit",
            0x1f => "no device",
            other => return write!(f, "device of type {other:#04x}"),
        })
    }
}

impl Inquiry {
    /// Reads the data.
    ///
    /// # Errors
    ///
    /// When there are fewer than 36 bytes, as all units have.
    pub fn parse(bytes: &[u8]) -> Result<Self, ParameterError> {
        let data = Parameter::new("INQUIRY data", bytes);
        let peripheral = data.u8(0)?;
        Ok(Self {
            qualifier: match peripheral >> 5 {
                0b000 => Qualifier::Connected,
                0b001 => Qualifier::Absent,
                0b011 => Qualifier::Impossible,
                other => Qualifier::Other(other),
            },
            device_type: DeviceType(peripheral & 0x1f),
            protect: data.u8(5)? & 1 != 0,
            vendor: text(data.slice(8, 8)?),
            product: text(data.slice(16, 16)?),
            revision: text(data.slice(32, 4)?),
        })
    }

    /// Whether it is a disk that is there.
    pub fn is_disk(&self) -> bool {
        self.qualifier == Qualifier::Connected && self.device_type == DeviceType::DIRECT_ACCESS
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

    use super::super::bytes_of;
    use super::*;

    #[test]
    fn a_disk_of_tgtd_is_read() {
        let bytes =
            bytes_of("000005123d00000249455420202020205649525455414c2d4449534b202020203030303100000000");
        let inquiry = Inquiry::parse(&bytes).unwrap();
        assert!(inquiry.is_disk());
        assert!(!inquiry.protect);
        assert_eq!(
            (&*inquiry.vendor, &*inquiry.product, &*inquiry.revision),
            ("IET", "VIRTUAL-DISK", "0001")
        );
    }

    #[test]
    fn a_unit_that_the_target_does_not_have_is_no_disk() {
        let bytes = bytes_of("7f0005123d0000024945542020202020436f6e74726f6c6c657220202020202030303031");
        let inquiry = Inquiry::parse(&bytes).unwrap();
        assert_eq!(inquiry.qualifier, Qualifier::Impossible);
        assert_eq!(inquiry.device_type.to_string(), "no device");
        assert!(!inquiry.is_disk());
    }

    #[test]
    fn names_are_printable_whatever_they_are() {
        let mut bytes = vec![0; 8];
        bytes.extend(b"\x1b[2J\xff\0x\0\0\0\0\0      ");
        bytes.resize(36, 0);
        let inquiry = Inquiry::parse(&bytes).unwrap();
        assert_eq!(inquiry.vendor, "?[2J??x");
        assert_eq!(inquiry.product, "????");
        assert!(Inquiry::parse(bytes.split_at(35).0).is_err());
    }
}
