//! Why a target does not carry a command out: the status, and the sense data that go with it.

/// Statuses of SAM-5, 5.3.
pub(super) const GOOD: u8 = 0x00;
const CHECK_CONDITION: u8 = 0x02;
const BUSY: u8 = 0x08;
const RESERVATION_CONFLICT: u8 = 0x18;
const TASK_SET_FULL: u8 = 0x28;

/// One way not to carry a command out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    Busy,
    TaskSetFull,
    ReservationConflict,
    /// Something has happened that the nexus is told once.
    Attention(Attention),
    /// CHECK CONDITION with ILLEGAL REQUEST and this additional sense.
    Illegal(Illegal),
    /// The logical unit is write-protected.
    Protected,
    /// COMPARE AND WRITE found other bytes, first at this offset.
    Miscompare {
        offset_bytes: u32,
    },
}

/// UNIT ATTENTIONs: additional sense code and qualifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Attention {
    PowerOn = 0x2900,
    ReservationsPreempted = 0x2a03,
    ReservationsReleased = 0x2a04,
    RegistrationsPreempted = 0x2a05,
    CapacityChanged = 0x2a09,
    ParametersChanged = 0x2a01,
}

/// ILLEGAL REQUESTs: additional sense code and qualifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Illegal {
    ParameterListLength = 0x1a00,
    OperationCode = 0x2000,
    LbaOutOfRange = 0x2100,
    FieldInCdb = 0x2400,
    LogicalUnit = 0x2500,
    FieldInParameterList = 0x2600,
    InvalidRelease = 0x2604,
}

impl Refusal {
    /// The status byte.
    pub(super) fn status(self) -> u8 {
        match self {
            Self::Busy => BUSY,
            Self::TaskSetFull => TASK_SET_FULL,
            Self::ReservationConflict => RESERVATION_CONFLICT,
            Self::Attention(_) | Self::Illegal(_) | Self::Protected | Self::Miscompare { .. } => {
                CHECK_CONDITION
            }
        }
    }

    /// The data segment of the response: sense data in fixed format (SPC-4, 4.5.3) behind their length, or nothing.
    pub(super) fn sense_segment(self) -> Vec<u8> {
        let (key, code, information) = match self {
            Self::Busy | Self::TaskSetFull | Self::ReservationConflict => return Vec::new(),
            Self::Attention(attention) => (6, attention as u16, None),
            Self::Illegal(illegal) => (5, illegal as u16, None),
            Self::Protected => (7, 0x2700, None),
            Self::Miscompare { offset_bytes } => (0xe, 0x1d00, Some(offset_bytes)),
        };
        let mut segment = vec![0, 18];
        segment.extend(sense(key, code, information));
        segment
    }
}

/// Sense data in fixed format.
pub(super) fn sense(key: u8, code: u16, information: Option<u32>) -> [u8; 18] {
    let valid = if information.is_some() { 0x80 } else { 0 };
    let [i0, i1, i2, i3] = information.unwrap_or(0).to_be_bytes();
    let [asc, ascq] = code.to_be_bytes();
    [
        valid | 0x70,
        0,
        key,
        i0,
        i1,
        i2,
        i3,
        10,
        0,
        0,
        0,
        0,
        asc,
        ascq,
        0,
        0,
        0,
        0,
    ]
}
