//! Command descriptor blocks (SPC-4, SBC-3) as a target reads them.

use super::refusal::Illegal;

/// What a command asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    TestUnitReady,
    RequestSense {
        allocation_bytes: u32,
    },
    Inquiry {
        page: Option<u8>,
        allocation_bytes: u32,
    },
    ReportLuns {
        allocation_bytes: u32,
    },
    ModeSense {
        form: ModeForm,
        page: u8,
        allocation_bytes: u32,
    },
    ReadCapacity10,
    ReadCapacity16 {
        allocation_bytes: u32,
    },
    Read(Blocks),
    Write {
        blocks: Blocks,
        durability: Durability,
    },
    SynchronizeCache,
    Unmap {
        list_bytes: u32,
    },
    WriteSame {
        blocks: Blocks,
        unmap: bool,
    },
    CompareAndWrite {
        blocks: Blocks,
    },
    ReservationIn {
        action: u8,
        allocation_bytes: u32,
    },
    ReservationOut {
        action: u8,
        kind: u8,
        list_bytes: u32,
    },
}

/// A range of logical blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Blocks {
    pub(super) first: u64,
    pub(super) count: u32,
}

/// Where written bytes are when the command ends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Durability {
    Cached,
    /// FUA.
    OnMedium,
}

/// Which of the MODE SENSE commands it is: they differ in their header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ModeForm {
    Six,
    Ten,
}

impl Command {
    /// Reads a CDB.
    pub(super) fn parse(cdb: &[u8; 16]) -> Result<Self, Illegal> {
        let cdb = Cdb(cdb);
        Ok(match cdb.byte(0) {
            0x00 => Self::TestUnitReady,
            0x03 => Self::RequestSense {
                allocation_bytes: cdb.byte(4).into(),
            },
            0x12 => inquiry(cdb)?,
            0x1a => Self::ModeSense {
                form: ModeForm::Six,
                page: cdb.byte(2) & 0x3f,
                allocation_bytes: cdb.byte(4).into(),
            },
            0x5a => Self::ModeSense {
                form: ModeForm::Ten,
                page: cdb.byte(2) & 0x3f,
                allocation_bytes: cdb.u16(7),
            },
            0x25 => Self::ReadCapacity10,
            0x28 | 0x88 => Self::Read(cdb.blocks()),
            0x2a | 0x8a => Self::Write {
                blocks: cdb.blocks(),
                durability: cdb.durability(),
            },
            0x35 | 0x91 => Self::SynchronizeCache,
            0x41 | 0x93 => Self::WriteSame {
                blocks: cdb.blocks(),
                unmap: cdb.byte(1) & 0x08 != 0,
            },
            0x42 => Self::Unmap {
                list_bytes: cdb.u16(7),
            },
            0x5e => Self::ReservationIn {
                action: cdb.byte(1) & 0x1f,
                allocation_bytes: cdb.u16(7),
            },
            0x5f => reservation_out(cdb)?,
            0x89 => Self::CompareAndWrite {
                blocks: Blocks {
                    first: cdb.u64(2),
                    count: cdb.byte(13).into(),
                },
            },
            0x9e if cdb.byte(1) & 0x1f == 0x10 => Self::ReadCapacity16 {
                allocation_bytes: cdb.u32(10),
            },
            0xa0 => Self::ReportLuns {
                allocation_bytes: cdb.u32(6),
            },
            0x9e => return Err(Illegal::FieldInCdb),
            _ => return Err(Illegal::OperationCode),
        })
    }

    /// Whether a UNIT ATTENTION waits for another command (SAM-5, 5.14).
    pub(super) fn ignores_attention(self) -> bool {
        matches!(
            self,
            Self::Inquiry { .. } | Self::ReportLuns { .. } | Self::RequestSense { .. }
        )
    }

    /// Whether a write-protected logical unit refuses it.
    pub(super) fn writes(self) -> bool {
        matches!(
            self,
            Self::Write { .. } | Self::Unmap { .. } | Self::WriteSame { .. } | Self::CompareAndWrite { .. }
        )
    }
}

fn inquiry(cdb: Cdb<'_>) -> Result<Command, Illegal> {
    let page = match (cdb.byte(1) & 1, cdb.byte(2)) {
        (0, 0) => None,
        (0, _) => return Err(Illegal::FieldInCdb),
        (_, page) => Some(page),
    };
    Ok(Command::Inquiry {
        page,
        allocation_bytes: cdb.u16(3),
    })
}

fn reservation_out(cdb: Cdb<'_>) -> Result<Command, Illegal> {
    // Only whole logical units are reserved: another scope is no scope.
    if cdb.byte(2) >> 4 != 0 {
        return Err(Illegal::FieldInCdb);
    }
    Ok(Command::ReservationOut {
        action: cdb.byte(1) & 0x1f,
        kind: cdb.byte(2) & 0x0f,
        list_bytes: cdb.u32(5),
    })
}

/// A CDB, to read fields from.
#[derive(Clone, Copy)]
struct Cdb<'a>(&'a [u8; 16]);

impl Cdb<'_> {
    fn byte(self, at: usize) -> u8 {
        self.0.get(at).copied().expect("fields lie within the CDB")
    }

    fn number(self, at: usize, len: usize) -> u64 {
        (at..at + len).fold(0, |number, at| number << 8 | u64::from(self.byte(at)))
    }

    fn u16(self, at: usize) -> u32 {
        u32::try_from(self.number(at, 2)).expect("two bytes are fewer than four")
    }

    fn u32(self, at: usize) -> u32 {
        u32::try_from(self.number(at, 4)).expect("four bytes are a number of four bytes")
    }

    fn u64(self, at: usize) -> u64 {
        self.number(at, 8)
    }

    /// The range of a command of ten or sixteen bytes.
    fn blocks(self) -> Blocks {
        if self.byte(0) >= 0x80 {
            return Blocks {
                first: self.u64(2),
                count: self.u32(10),
            };
        }
        Blocks {
            first: self.u32(2).into(),
            count: self.u16(7),
        }
    }

    fn durability(self) -> Durability {
        if self.byte(1) & 0x08 == 0 {
            Durability::Cached
        } else {
            Durability::OnMedium
        }
    }
}
