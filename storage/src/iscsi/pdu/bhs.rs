//! The basic header segment (RFC 7143, 11.2.1): what all PDUs have in the same place.

use std::fmt;

use super::{Lun, Serial, Tag};

/// Size of a header, in bytes.
pub const BHS_BYTES: usize = 48;
/// Longest data segment that a header can tell of, in bytes.
pub const DATA_SEGMENT_BYTES_MAX: u32 = (1 << 24) - 1;

/// How many zeros stand behind `data_bytes` of a data segment: it fills words of four bytes.
pub const fn padding_bytes(data_bytes: usize) -> usize {
    data_bytes.wrapping_neg() % 4
}

/// The header of a PDU, in the order of the wire.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Bhs(pub [u8; BHS_BYTES]);

impl Bhs {
    /// The I bit in the first byte: the command does not wait for its turn.
    pub(super) const IMMEDIATE: u8 = 0x40;

    /// A header of zeros but for its operation.
    pub(super) fn of(opcode: u8) -> Self {
        Self([0; BHS_BYTES]).put::<0, 1>([opcode])
    }

    /// The operation (11.2.1.2).
    pub fn opcode(&self) -> u8 {
        self.byte::<0>() & 0x3f
    }

    /// Whether the I bit is set (11.2.1.1).
    pub fn is_immediate(&self) -> bool {
        self.byte::<0>() & Self::IMMEDIATE != 0
    }

    /// `TotalAHSLength` (11.2.1.5), in bytes: what stands between the header and its digest.
    pub fn ahs_bytes(&self) -> usize {
        usize::from(self.byte::<4>()) * 4
    }

    /// `DataSegmentLength` (11.2.1.6), in bytes and without the padding.
    pub fn data_segment_bytes(&self) -> u32 {
        let [high, middle, low] = self.at::<5, 3>();
        u32::from_be_bytes([0, high, middle, low])
    }

    /// The header of a PDU with a data segment of so many bytes.
    ///
    /// # Panics
    ///
    /// With more than [`DATA_SEGMENT_BYTES_MAX`], which no peer can have asked for.
    #[must_use]
    pub fn with_data_segment(self, data_bytes: u32) -> Self {
        let [over, length @ ..] = data_bytes.to_be_bytes();
        assert_eq!(over, 0, "{data_bytes} bytes do not fit into one data segment");
        self.put::<5, 3>(length)
    }

    /// `Initiator Task Tag` (11.2.1.8).
    pub fn initiator_task_tag(&self) -> Tag {
        self.tag::<16>()
    }

    pub(super) fn lun(&self) -> Lun {
        Lun::of_wire(self.at::<8, 8>())
    }

    pub(super) fn tag<const AT: usize>(&self) -> Tag {
        Tag(self.u32::<AT>())
    }

    pub(super) fn serial<const AT: usize>(&self) -> Serial {
        Serial(self.u32::<AT>())
    }

    pub(super) fn u32<const AT: usize>(&self) -> u32 {
        u32::from_be_bytes(self.at::<AT, 4>())
    }

    pub(super) fn u16<const AT: usize>(&self) -> u16 {
        u16::from_be_bytes(self.at::<AT, 2>())
    }

    pub(super) fn byte<const AT: usize>(&self) -> u8 {
        let [byte] = self.at::<AT, 1>();
        byte
    }

    /// Whether one of `bits` is set in the second byte, where the flags are.
    pub(super) fn has(&self, bits: u8) -> bool {
        self.byte::<1>() & bits != 0
    }

    /// The `N` bytes from `AT` on. An offset behind the header does not compile.
    pub(super) fn at<const AT: usize, const N: usize>(&self) -> [u8; N] {
        const { assert!(AT + N <= BHS_BYTES) };
        *self
            .0
            .split_at(AT)
            .1
            .first_chunk()
            .expect("the field was seen to be in the header when this was compiled")
    }

    #[must_use]
    pub(super) fn put<const AT: usize, const N: usize>(mut self, bytes: [u8; N]) -> Self {
        const { assert!(AT + N <= BHS_BYTES) };
        *self
            .0
            .split_at_mut(AT)
            .1
            .first_chunk_mut()
            .expect("the field was seen to be in the header when this was compiled") = bytes;
        self
    }

    #[must_use]
    pub(super) fn put_u32<const AT: usize>(self, value: u32) -> Self {
        self.put::<AT, 4>(value.to_be_bytes())
    }

    #[must_use]
    pub(super) fn put_lun(self, lun: Lun) -> Self {
        self.put::<8, 8>(lun.wire())
    }
}

impl Default for Bhs {
    /// Zeros, for somebody to receive into.
    fn default() -> Self {
        Self([0; BHS_BYTES])
    }
}

impl fmt::Debug for Bhs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Bhs(")?;
        for byte in self.0 {
            write!(f, "{byte:02x}")?;
        }
        f.write_str(")")
    }
}
