//! One iSCSI message as bytes: where its fields are (RFC 7143, 11.2), and what sums it carries.

/// Which sums follow a header and its data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Digests {
    pub(super) header: bool,
    pub(super) data: bool,
}

/// A message, or what came of one: fields that are not there read as 0.
#[derive(Debug)]
pub(super) struct Pdu<'a>(pub(super) &'a [u8]);

/// Length of a basic header segment.
pub(super) const HEADER_BYTES: usize = 48;
/// A tag that belongs to no task.
pub(super) const NO_TAG: u32 = u32::MAX;

/// Offsets of fields of 32 bits.
pub(super) mod field {
    /// Initiator Task Tag.
    pub(in crate::harness::iscsi) const TAG: usize = 16;
    /// Expected Data Transfer Length of a command; Referenced Task Tag of task management.
    pub(in crate::harness::iscsi) const EXPECTED_BYTES: usize = 20;
    /// CmdSN, towards the target.
    pub(in crate::harness::iscsi) const COMMAND_NUMBER: usize = 24;
    /// StatSN, from the target.
    pub(in crate::harness::iscsi) const STATUS_NUMBER: usize = 24;
    /// ExpStatSN, towards the target.
    pub(in crate::harness::iscsi) const EXPECTED_STATUS: usize = 28;
    /// ExpCmdSN, from the target.
    pub(in crate::harness::iscsi) const EXPECTED_COMMAND: usize = 28;
    /// MaxCmdSN, from the target.
    pub(in crate::harness::iscsi) const MAXIMUM_COMMAND: usize = 32;
}

/// Opcodes.
pub(super) mod opcode {
    pub(in crate::harness::iscsi) const NOP_OUT: u8 = 0x00;
    pub(in crate::harness::iscsi) const SCSI_COMMAND: u8 = 0x01;
    pub(in crate::harness::iscsi) const TASK_MANAGEMENT: u8 = 0x02;
    pub(in crate::harness::iscsi) const LOGIN: u8 = 0x03;
    pub(in crate::harness::iscsi) const DATA_OUT: u8 = 0x05;
    pub(in crate::harness::iscsi) const LOGOUT: u8 = 0x06;
    pub(in crate::harness::iscsi) const NOP_IN: u8 = 0x20;
    pub(in crate::harness::iscsi) const SCSI_RESPONSE: u8 = 0x21;
    pub(in crate::harness::iscsi) const LOGIN_RESPONSE: u8 = 0x23;
    pub(in crate::harness::iscsi) const DATA_IN: u8 = 0x25;
    pub(in crate::harness::iscsi) const R2T: u8 = 0x31;
}

const FINAL: u8 = 0x80;
/// Data-In that carries the status as well.
const STATUS: u8 = 0x01;
const SUM_BYTES: usize = 4;

impl<'a> Pdu<'a> {
    fn byte(&self, at: usize) -> u8 {
        self.0.get(at).copied().unwrap_or(0)
    }

    pub(super) fn is_whole(&self) -> bool {
        self.0.len() >= HEADER_BYTES
    }

    pub(super) fn opcode(&self) -> u8 {
        self.byte(0) & 0x3f
    }

    /// Delivered at once, without a place in the order of commands.
    pub(super) fn is_immediate(&self) -> bool {
        self.byte(0) & 0x40 != 0
    }

    pub(super) fn is_final(&self) -> bool {
        self.byte(1) & FINAL != 0
    }

    /// The Login Response with which the full-feature phase begins: success, T, NSG 3.
    pub(super) fn ends_login(&self) -> bool {
        self.opcode() == opcode::LOGIN_RESPONSE && self.byte(1) & 0x83 == 0x83 && self.byte(36) == 0
    }

    /// Whether an answer takes a number in the order of statuses.
    pub(super) fn has_status(&self) -> bool {
        match self.opcode() {
            opcode::DATA_IN => self.byte(1) & STATUS != 0,
            opcode::NOP_IN => self.field(field::TAG) != NO_TAG,
            opcode::R2T => false,
            _ => true,
        }
    }

    /// Whether StatSN means anything: Data-In without a status has none.
    pub(super) fn has_status_number(&self) -> bool {
        self.opcode() != opcode::DATA_IN || self.has_status()
    }

    /// Whether it says that a command has done what it was to do.
    pub(super) fn is_good(&self) -> bool {
        let is_response = matches!(self.opcode(), opcode::SCSI_RESPONSE | opcode::DATA_IN);
        let response = if self.opcode() == opcode::SCSI_RESPONSE {
            self.byte(2)
        } else {
            0
        };
        is_response && self.has_status() && response == 0 && self.byte(3) == 0
    }

    pub(super) fn field(&self, at: usize) -> u32 {
        let bytes = self.0.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
        bytes.map_or(0, u32::from_be_bytes)
    }

    pub(super) fn logical_unit(&self) -> &'a [u8] {
        self.0.get(8..16).unwrap_or_default()
    }

    /// The command descriptor block, and zeros where it is shorter.
    pub(super) fn cdb(&self) -> [u8; 16] {
        let found = self
            .0
            .get(32..HEADER_BYTES)
            .and_then(|bytes| bytes.try_into().ok());
        found.unwrap_or_default()
    }

    pub(super) fn data_bytes(&self) -> usize {
        let [_, length @ ..] = self.field(4).to_be_bytes();
        let [high, middle, low] = length.map(usize::from);
        high << 16 | middle << 8 | low
    }

    /// Where the sum over the headers is, if there is one.
    pub(super) fn headers_bytes(&self) -> usize {
        HEADER_BYTES + usize::from(self.byte(4)) * 4
    }

    pub(super) fn data_start(&self, digests: Digests) -> usize {
        self.headers_bytes() + if digests.header { SUM_BYTES } else { 0 }
    }

    /// The data with its padding, which the sum covers as well.
    pub(super) fn padded_bytes(&self) -> usize {
        self.data_bytes().next_multiple_of(4)
    }

    pub(super) fn data(&self, digests: Digests) -> &'a [u8] {
        let start = self.data_start(digests);
        self.0.get(start..start + self.data_bytes()).unwrap_or_default()
    }

    /// The whole message's length, when its first bytes are there.
    pub(super) fn bytes(&self, digests: Digests) -> Option<usize> {
        let has_sum = digests.data && self.data_bytes() > 0;
        let sum = if has_sum { SUM_BYTES } else { 0 };
        self.is_whole()
            .then(|| self.data_start(digests) + self.padded_bytes() + sum)
    }

    /// The range of blocks that a READ or WRITE names.
    pub(super) fn blocks(&self) -> Option<std::ops::Range<u64>> {
        let [operation, _, cdb @ ..] = self.cdb();
        let word = |at: usize| {
            let bytes = cdb.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
            u64::from(bytes.map_or(0, u32::from_be_bytes))
        };
        // Offsets are those of the standard, less the two bytes that are gone.
        let (start, count) = match operation {
            0x28 | 0x2a => (word(0), word(4) >> 8 & 0xffff),
            0xa8 | 0xaa => (word(0), word(4)),
            0x88 | 0x8a => (word(0) << 32 | word(4), word(8)),
            _ => return None,
        };
        Some(start..start.saturating_add(count))
    }
}

/// Sets a field; nothing happens where a message ends before it.
pub(super) fn set(message: &mut [u8], at: usize, value: u32) {
    if let Some(place) = message.get_mut(at..at + 4) {
        place.copy_from_slice(&value.to_be_bytes());
    }
}

/// Puts the sums in order after a change.
pub(super) fn seal(message: &mut [u8], digests: Digests) {
    let pdu = Pdu(message);
    let (headers, start, padded) = (pdu.headers_bytes(), pdu.data_start(digests), pdu.padded_bytes());
    let sum = |message: &[u8], range: std::ops::Range<usize>| message.get(range).map(crc32c::crc32c);
    if digests.header
        && let Some(sum) = sum(message, 0..headers)
    {
        // The digest is the one field that is little-endian (RFC 7143, 13.1).
        set(message, headers, sum.swap_bytes());
    }
    if digests.data
        && padded > 0
        && let Some(sum) = sum(message, start..start + padded)
    {
        set(message, start + padded, sum.swap_bytes());
    }
}
