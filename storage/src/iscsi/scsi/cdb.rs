//! Command descriptor blocks, with the parameter lists that belong to them.
//!
//! A block shorter than 16 bytes is followed by zeros, as iSCSI sends it (RFC 7143, 11.3.5).

#[cfg(test)]
mod tests;

use super::reservation::ReservationKey;
use crate::request::{Durability, Space};

/// A command descriptor block.
pub type Cdb = [u8; 16];

/// A range of a logical unit, in its blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Blocks {
    /// The first one's address.
    pub lba: u64,
    /// How many.
    pub count: u32,
}

impl Blocks {
    /// What SYNCHRONIZE CACHE takes for the whole unit.
    pub const ALL: Self = Self { lba: 0, count: 0 };

    /// The fields of a CDB of ten bytes, if the range fits into them.
    fn narrow(self) -> Option<(u32, u16)> {
        Some((u32::try_from(self.lba).ok()?, u16::try_from(self.count).ok()?))
    }
}

/// As many ranges as the parameter list of one UNMAP can hold: its length has 16 bits.
pub const UNMAP_BLOCKS_MAX: usize = (0xffff - 8) / 16;

/// The length of the parameter list of PERSISTENT RESERVE OUT.
pub const RESERVE_PARAMETER_BYTES: usize = 24;

/// The pages of vital product data that are asked for (SPC-4, 7.8).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum VpdPage {
    /// Which pages there are.
    Supported,
    /// The serial number of the unit.
    SerialNumber,
    /// What names the unit.
    DeviceIdentification,
    /// SBC-3, 6.5.3.
    BlockLimits,
    /// SBC-3, 6.5.2.
    BlockCharacteristics,
    /// SBC-3, 6.5.4.
    Provisioning,
}

impl VpdPage {
    /// Its page code.
    pub const fn code(self) -> u8 {
        match self {
            Self::Supported => 0x00,
            Self::SerialNumber => 0x80,
            Self::DeviceIdentification => 0x83,
            Self::BlockLimits => 0xb0,
            Self::BlockCharacteristics => 0xb1,
            Self::Provisioning => 0xb2,
        }
    }
}

/// The mode pages that are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ModePage {
    /// SBC-3, 6.4.5.
    Caching,
    /// Every page: some units answer it where they refuse a single one.
    All,
}

/// What PERSISTENT RESERVE IN reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReserveIn {
    /// Who is registered.
    ReadKeys,
    /// Who has the reservation.
    ReadReservation,
    /// What the unit can do.
    ReportCapabilities,
}

/// What PERSISTENT RESERVE OUT does. Reservations are of type 1 (Write Exclusive: the holder alone writes).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReserveOut {
    /// Registers `new` in place of `existing`; [`ReservationKey::NONE`] as the one is no registration yet, as the other
    /// gives it up.
    Register {
        /// The key that this session is registered with.
        existing: ReservationKey,
        /// The one that it is registered with afterwards.
        new: ReservationKey,
        /// How long.
        persistence: Persistence,
    },
    /// Registers `new`, whatever this session was registered with.
    RegisterAndIgnoreExistingKey {
        /// The key that this session is registered with afterwards.
        new: ReservationKey,
        /// How long.
        persistence: Persistence,
    },
    /// Takes the reservation, if nobody has it.
    Reserve {
        /// Our key.
        key: ReservationKey,
    },
    /// Gives the reservation up.
    Release {
        /// Our key.
        key: ReservationKey,
    },
    /// Ends the reservation and all registrations.
    Clear {
        /// Our key.
        key: ReservationKey,
    },
    /// Ends the registrations with the key `victim`, and takes the reservation from it if it has it.
    Preempt {
        /// Our key.
        key: ReservationKey,
        /// Theirs.
        victim: ReservationKey,
    },
    /// The same, and aborts the commands of the victim.
    PreemptAndAbort {
        /// Our key.
        key: ReservationKey,
        /// Theirs.
        victim: ReservationKey,
    },
}

/// Whether registrations and reservation outlive a loss of power (APTPL). Where the unit cannot, it refuses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Persistence {
    /// They end with the target.
    UntilPowerLoss,
    /// They do.
    ThroughPowerLoss,
}

/// What the standards call the command, for messages.
pub fn name(cdb: &Cdb) -> &'static str {
    let [opcode, ..] = cdb;
    match opcode {
        0x00 => "TEST UNIT READY",
        0x12 => "INQUIRY",
        0x1a | 0x5a => "MODE SENSE",
        0x28 | 0x88 => "READ",
        0x2a | 0x8a => "WRITE",
        0x35 | 0x91 => "SYNCHRONIZE CACHE",
        0x42 => "UNMAP",
        0x5e => "PERSISTENT RESERVE IN",
        0x5f => "PERSISTENT RESERVE OUT",
        0x89 => "COMPARE AND WRITE",
        0x93 => "WRITE SAME(16)",
        0x9e => "READ CAPACITY(16)",
        0xa0 => "REPORT LUNS",
        _ => "a command",
    }
}

/// TEST UNIT READY (SPC-4, 6.47).
pub fn test_unit_ready() -> Cdb {
    Packer::new(0x00).done()
}

/// INQUIRY for the standard data (SPC-4, 6.6).
pub fn inquiry(allocation_bytes: u16) -> Cdb {
    Packer::new(0x12).u16(0).u16(allocation_bytes).done()
}

/// INQUIRY for a page of vital product data (SPC-4, 6.6).
pub fn inquiry_vpd(page: VpdPage, allocation_bytes: u16) -> Cdb {
    const EVPD: u8 = 1;
    Packer::new(0x12)
        .u8(EVPD)
        .u8(page.code())
        .u16(allocation_bytes)
        .done()
}

/// READ CAPACITY (16) (SBC-3, 5.16).
pub fn read_capacity(allocation_bytes: u32) -> Cdb {
    const READ_CAPACITY: u8 = 0x10;
    Packer::new(0x9e)
        .u8(READ_CAPACITY)
        .u64(0)
        .u32(allocation_bytes)
        .done()
}

/// READ (10) or (16) (SBC-3, 5.11 and 5.13): of the medium if it is to be [`Durability::Durable`].
pub fn read(blocks: Blocks, durability: Durability) -> Cdb {
    transfer([0x28, 0x88], blocks, durability)
}

/// Whether this is a READ or a WRITE, which moves as many blocks as it says.
pub fn moves_blocks(cdb: &Cdb) -> bool {
    let [opcode, ..] = cdb;
    matches!(opcode, 0x28 | 0x88 | 0x2a | 0x8a)
}

/// Whether this is a WRITE SAME (16).
pub fn is_write_same(cdb: &Cdb) -> bool {
    let [opcode, ..] = cdb;
    *opcode == 0x93
}

/// WRITE (10) or (16) (SBC-3, 5.33 and 5.35).
pub fn write(blocks: Blocks, durability: Durability) -> Cdb {
    transfer([0x2a, 0x8a], blocks, durability)
}

/// SYNCHRONIZE CACHE (10) or (16) (SBC-3, 5.26 and 5.27): answered when the blocks are on the medium.
pub fn synchronize_cache(blocks: Blocks) -> Cdb {
    transfer([0x35, 0x91], blocks, Durability::Cached)
}

/// UNMAP and its parameter list (SBC-3, 5.28).
///
/// # Panics
///
/// With more than [`UNMAP_BLOCKS_MAX`] ranges.
pub fn unmap(ranges: &[Blocks]) -> (Cdb, Vec<u8>) {
    let descriptors_bytes = u16::try_from(ranges.len() * 16).expect("the caller keeps to the limit");
    let list_bytes = descriptors_bytes
        .checked_add(8)
        .expect("the caller keeps to the limit");
    let mut list = Vec::with_capacity(usize::from(list_bytes));
    list.extend((list_bytes - 2).to_be_bytes());
    list.extend(descriptors_bytes.to_be_bytes());
    list.extend([0; 4]);
    for range in ranges {
        list.extend(range.lba.to_be_bytes());
        list.extend(range.count.to_be_bytes());
        list.extend([0; 4]);
    }
    let cdb = Packer::new(0x42).u8(0).u32(0).u8(0).u16(list_bytes).done();
    (cdb, list)
}

/// WRITE SAME (16) (SBC-3, 5.44), whose data is one block: the bit NDOB, which would leave it out, is newer than
/// many units. With [`Space::MayBeFreed`] it has the bit UNMAP.
pub fn write_same(blocks: Blocks, space: Space) -> Cdb {
    const UNMAP: u8 = 1 << 3;
    let flags = match space {
        Space::MayBeFreed => UNMAP,
        Space::Stays => 0,
    };
    Packer::new(0x93)
        .u8(flags)
        .u64(blocks.lba)
        .u32(blocks.count)
        .done()
}

/// COMPARE AND WRITE (SBC-3, 5.2): its data is what has to be there, and as much again, which is then written.
pub fn compare_and_write(lba: u64, blocks: u8, durability: Durability) -> Cdb {
    Packer::new(0x89)
        .u8(fua(durability))
        .u64(lba)
        .u32(u32::from(blocks))
        .done()
}

/// MODE SENSE (6) (SPC-4, 6.13), current values.
pub fn mode_sense_6(page: ModePage, allocation_bytes: u8) -> Cdb {
    Packer::new(0x1a)
        .u8(0)
        .u8(page.code())
        .u8(0)
        .u8(allocation_bytes)
        .done()
}

/// MODE SENSE (10) (SPC-4, 6.14), current values.
pub fn mode_sense_10(page: ModePage, allocation_bytes: u16) -> Cdb {
    Packer::new(0x5a)
        .u8(0)
        .u8(page.code())
        .u32(0)
        .u16(allocation_bytes)
        .done()
}

/// REPORT LUNS (SPC-4, 6.33), without the well known ones.
pub fn report_luns(allocation_bytes: u32) -> Cdb {
    Packer::new(0xa0).u8(0).u32(0).u32(allocation_bytes).done()
}

/// PERSISTENT RESERVE IN (SPC-4, 6.15).
pub fn persistent_reserve_in(what: ReserveIn, allocation_bytes: u16) -> Cdb {
    let service_action = match what {
        ReserveIn::ReadKeys => 0,
        ReserveIn::ReadReservation => 1,
        ReserveIn::ReportCapabilities => 2,
    };
    Packer::new(0x5e)
        .u8(service_action)
        .u32(0)
        .u8(0)
        .u16(allocation_bytes)
        .done()
}

/// PERSISTENT RESERVE OUT and its parameter list (SPC-4, 6.16).
pub fn persistent_reserve_out(what: ReserveOut) -> (Cdb, [u8; RESERVE_PARAMETER_BYTES]) {
    const APTPL: u8 = 1;
    const WRITE_EXCLUSIVE: u8 = 1;
    let none = ReservationKey::NONE;
    let until = Persistence::UntilPowerLoss;
    let (service_action, kind, key, other, persistence) = match what {
        ReserveOut::Register {
            existing,
            new,
            persistence,
        } => (0, 0, existing, new, persistence),
        ReserveOut::RegisterAndIgnoreExistingKey { new, persistence } => (6, 0, none, new, persistence),
        ReserveOut::Reserve { key } => (1, WRITE_EXCLUSIVE, key, none, until),
        ReserveOut::Release { key } => (2, WRITE_EXCLUSIVE, key, none, until),
        ReserveOut::Clear { key } => (3, 0, key, none, until),
        ReserveOut::Preempt { key, victim } => (4, WRITE_EXCLUSIVE, key, victim, until),
        ReserveOut::PreemptAndAbort { key, victim } => (5, WRITE_EXCLUSIVE, key, victim, until),
    };
    let flags = match persistence {
        Persistence::UntilPowerLoss => 0,
        Persistence::ThroughPowerLoss => APTPL,
    };
    let mut list = [0; RESERVE_PARAMETER_BYTES];
    let bytes = [
        key.0.to_be_bytes(),
        other.0.to_be_bytes(),
        [0, 0, 0, 0, flags, 0, 0, 0],
    ];
    for (to, from) in list.iter_mut().zip(bytes.as_flattened()) {
        *to = *from;
    }
    let cdb = Packer::new(0x5f)
        .u8(service_action)
        .u8(kind)
        .u16(0)
        .u32(24)
        .done();
    (cdb, list)
}

impl ModePage {
    const fn code(self) -> u8 {
        match self {
            Self::Caching => 0x08,
            Self::All => 0x3f,
        }
    }
}

/// A command on a range: the first opcode's block has ten bytes, the second one's 16.
fn transfer([ten, sixteen]: [u8; 2], blocks: Blocks, durability: Durability) -> Cdb {
    let flags = fua(durability);
    match blocks.narrow() {
        Some((lba, count)) => Packer::new(ten).u8(flags).u32(lba).u8(0).u16(count).done(),
        None => Packer::new(sixteen)
            .u8(flags)
            .u64(blocks.lba)
            .u32(blocks.count)
            .done(),
    }
}

/// FUA, where reads and writes have it.
fn fua(durability: Durability) -> u8 {
    match durability {
        Durability::Cached => 0,
        Durability::Durable => 1 << 3,
    }
}

/// Lays fields out one behind the other; what is not said is zero.
struct Packer {
    cdb: Cdb,
    at: usize,
}

impl Packer {
    fn new(opcode: u8) -> Self {
        Self { cdb: [0; 16], at: 0 }.u8(opcode)
    }

    fn u8(self, value: u8) -> Self {
        self.put(&[value])
    }

    fn u16(self, value: u16) -> Self {
        self.put(&value.to_be_bytes())
    }

    fn u32(self, value: u32) -> Self {
        self.put(&value.to_be_bytes())
    }

    fn u64(self, value: u64) -> Self {
        self.put(&value.to_be_bytes())
    }

    fn put(mut self, bytes: &[u8]) -> Self {
        let end = self.at + bytes.len();
        self.cdb
            .get_mut(self.at..end)
            .expect("no command here has more than 16 bytes")
            .copy_from_slice(bytes);
        self.at = end;
        self
    }

    fn done(self) -> Cdb {
        self.cdb
    }
}
