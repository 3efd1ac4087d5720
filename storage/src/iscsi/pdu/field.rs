//! The fields that several PDUs share.

use std::fmt;

use super::{Bhs, PduError, Serial};

/// `Initiator Task Tag` or `Target Transfer Tag` (RFC 7143, 11.2.1.8 and 11.7.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tag(pub u32);

impl Tag {
    /// The one that names nothing: no task, or no transfer that was asked for.
    pub const RESERVED: Self = Self(0xffff_ffff);
}

/// A logical unit as SAM-5, 4.7 writes it: eight bytes, of which a single level uses the first two.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct Lun([u8; 8]);

impl Lun {
    /// Largest number that a logical unit can have here.
    pub const NUMBER_MAX: u16 = 0x3fff;

    /// The logical unit of that number: by peripheral device addressing below 256, by flat space addressing above.
    /// `None` above [`Lun::NUMBER_MAX`].
    pub fn new(number: u16) -> Option<Self> {
        let [high, low] = number.to_be_bytes();
        let method = if high == 0 { 0 } else { 0x40 };
        (number <= Self::NUMBER_MAX).then_some(Self([method | high, low, 0, 0, 0, 0, 0, 0]))
    }

    /// What stands on the wire.
    pub const fn of_wire(bytes: [u8; 8]) -> Self {
        Self(bytes)
    }

    /// As it stands on the wire.
    pub const fn wire(self) -> [u8; 8] {
        self.0
    }

    /// Its number, if it has one level and either of the two ways of addressing of [`Lun::new`].
    pub fn number(self) -> Option<u16> {
        let [first, low, deeper @ ..] = self.0;
        let number = u16::from_be_bytes([first & 0x3f, low]);
        let is_peripheral = first == 0;
        let is_flat = first & 0xc0 == 0x40;
        (deeper == [0; 6] && (is_peripheral || is_flat)).then_some(number)
    }
}

impl fmt::Debug for Lun {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.number() {
            Some(number) => write!(f, "Lun({number})"),
            None => write!(f, "Lun({:#018x})", u64::from_be_bytes(self.0)),
        }
    }
}

/// The initiator's part of the name of a session (11.12.5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Isid(pub [u8; 6]);

/// Which commands the target takes now (4.2.2.1): those from `exp_cmd_sn` to `max_cmd_sn`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Window {
    /// `ExpCmdSN`: the command that it waits for.
    pub exp_cmd_sn: Serial,
    /// `MaxCmdSN`: the last that it would take. The one before `exp_cmd_sn`: it takes none.
    pub max_cmd_sn: Serial,
}

impl Window {
    pub(super) fn of(bhs: &Bhs) -> Self {
        Self {
            exp_cmd_sn: bhs.serial::<28>(),
            max_cmd_sn: bhs.serial::<32>(),
        }
    }

    pub(super) fn put(self, bhs: Bhs) -> Bhs {
        bhs.put_u32::<28>(self.exp_cmd_sn.0)
            .put_u32::<32>(self.max_cmd_sn.0)
    }
}

/// What was expected and not transferred, or the other way round (11.4.5).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Residual {
    /// It was as expected.
    #[default]
    None,
    /// So many bytes were not transferred, for they were more than expected.
    Overflow(u32),
    /// So many bytes were expected and not transferred.
    Underflow(u32),
}

impl Residual {
    const OVERFLOW: u8 = 0x04;
    const UNDERFLOW: u8 = 0x02;

    /// Reads the bits in the second byte and the count in the last four.
    pub(super) fn of(bhs: &Bhs) -> Result<Self, PduError> {
        let count = bhs.u32::<44>();
        match (bhs.has(Self::OVERFLOW), bhs.has(Self::UNDERFLOW)) {
            (false, false) => Ok(Self::None),
            (true, false) => Ok(Self::Overflow(count)),
            (false, true) => Ok(Self::Underflow(count)),
            (true, true) => Err(PduError::Field {
                opcode: bhs.opcode(),
                field: "O and U",
                value: 3,
            }),
        }
    }

    pub(super) fn bits(self) -> u8 {
        match self {
            Self::None => 0,
            Self::Overflow(_) => Self::OVERFLOW,
            Self::Underflow(_) => Self::UNDERFLOW,
        }
    }

    pub(super) fn count(self) -> u32 {
        match self {
            Self::None => 0,
            Self::Overflow(count) | Self::Underflow(count) => count,
        }
    }
}

/// How a command stands to the others (11.3.1.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "SAM-5, 8.6 says what each is")]
pub enum TaskAttribute {
    Untagged,
    #[default]
    Simple,
    Ordered,
    HeadOfQueue,
    Aca,
}

impl TaskAttribute {
    const BITS: u8 = 0x07;

    pub(super) fn of(bhs: &Bhs) -> Result<Self, PduError> {
        match bhs.byte::<1>() & Self::BITS {
            0 => Ok(Self::Untagged),
            1 => Ok(Self::Simple),
            2 => Ok(Self::Ordered),
            3 => Ok(Self::HeadOfQueue),
            4 => Ok(Self::Aca),
            value => Err(PduError::Field {
                opcode: bhs.opcode(),
                field: "ATTR",
                value,
            }),
        }
    }

    pub(super) fn bits(self) -> u8 {
        match self {
            Self::Untagged => 0,
            Self::Simple => 1,
            Self::Ordered => 2,
            Self::HeadOfQueue => 3,
            Self::Aca => 4,
        }
    }
}

/// A stage of the login (11.12.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "RFC 7143, 6.3 says what each is")]
pub enum Stage {
    SecurityNegotiation,
    LoginOperationalNegotiation,
    FullFeaturePhase,
}

impl Stage {
    fn of(bits: u8) -> Option<Self> {
        match bits & 3 {
            0 => Some(Self::SecurityNegotiation),
            1 => Some(Self::LoginOperationalNegotiation),
            3 => Some(Self::FullFeaturePhase),
            _ => None,
        }
    }

    fn bits(self) -> u8 {
        match self {
            Self::SecurityNegotiation => 0,
            Self::LoginOperationalNegotiation => 1,
            Self::FullFeaturePhase => 3,
        }
    }
}

/// Where a login is and where it goes: the T, C, CSG and NSG fields of its PDUs (11.12.1 to 11.12.3).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transit {
    /// C: the text is not whole yet.
    Unfinished(Stage),
    /// It stays in the stage.
    Stay(Stage),
    /// T: it is ready to leave the stage for a later one.
    Leave(Stage, Stage),
}

impl Transit {
    const LEAVE: u8 = 0x80;
    const UNFINISHED: u8 = 0x40;

    /// The stage that the PDU belongs to.
    pub fn stage(self) -> Stage {
        match self {
            Self::Unfinished(stage) | Self::Stay(stage) | Self::Leave(stage, _) => stage,
        }
    }

    pub(super) fn of(bhs: &Bhs) -> Result<Self, PduError> {
        let bits = bhs.byte::<1>();
        let wrong = |field, value| PduError::Field {
            opcode: bhs.opcode(),
            field,
            value,
        };
        let stage = Stage::of(bits >> 2).ok_or(wrong("CSG", bits >> 2 & 3))?;
        match (bhs.has(Self::LEAVE), bhs.has(Self::UNFINISHED)) {
            (false, false) => Ok(Self::Stay(stage)),
            (false, true) => Ok(Self::Unfinished(stage)),
            (true, true) => Err(wrong("T and C", 3)),
            (true, false) => match Stage::of(bits) {
                Some(next) if next.bits() > stage.bits() => Ok(Self::Leave(stage, next)),
                _ => Err(wrong("NSG", bits & 3)),
            },
        }
    }

    pub(super) fn bits(self) -> u8 {
        let stage = self.stage().bits() << 2;
        match self {
            Self::Unfinished(_) => stage | Self::UNFINISHED,
            Self::Stay(_) => stage,
            Self::Leave(_, next) => stage | Self::LEAVE | next.bits(),
        }
    }
}
