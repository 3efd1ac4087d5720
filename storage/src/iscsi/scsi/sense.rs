//! What became of a command: its status and its sense data, and the one table that says what is to be done.
//!
//! [`verdict`] is the only place that looks at codes. Whoever sent the command knows the kinds.

#[cfg(test)]
mod tests;
mod words;

use std::fmt;

use crate::request::Failure;

/// The status byte of a response (SAM-5, 5.3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Status(pub u8);

impl Status {
    /// Done.
    pub const GOOD: Self = Self(0x00);
    /// The sense data say what is the matter.
    pub const CHECK_CONDITION: Self = Self(0x02);
    /// The unit has too much to do.
    pub const BUSY: Self = Self(0x08);
    /// Another session has the unit, and this command would disturb it.
    pub const RESERVATION_CONFLICT: Self = Self(0x18);
    /// The unit has no room for one more command.
    pub const TASK_SET_FULL: Self = Self(0x28);
    /// Another session's error blocks the unit.
    pub const ACA_ACTIVE: Self = Self(0x30);
    /// Another session has aborted the command.
    pub const TASK_ABORTED: Self = Self(0x40);
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match *self {
            Self::GOOD => "GOOD",
            Self::CHECK_CONDITION => "CHECK CONDITION",
            Self::BUSY => "BUSY",
            Self::RESERVATION_CONFLICT => "RESERVATION CONFLICT",
            Self::TASK_SET_FULL => "TASK SET FULL",
            Self::ACA_ACTIVE => "ACA ACTIVE",
            Self::TASK_ABORTED => "TASK ABORTED",
            Self(other) => return write!(f, "status {other:#04x}"),
        })
    }
}

/// The kind of a condition (SPC-4, 4.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SenseKey(pub u8);

impl SenseKey {
    /// Done, though with an effort.
    pub const RECOVERED_ERROR: Self = Self(0x1);
    /// The unit cannot be used now.
    pub const NOT_READY: Self = Self(0x2);
    /// The unit cannot do this.
    pub const ILLEGAL_REQUEST: Self = Self(0x5);
    /// The unit has something to say first.
    pub const UNIT_ATTENTION: Self = Self(0x6);
    /// The unit may not do this.
    pub const DATA_PROTECT: Self = Self(0x7);
    /// The target has given the command up.
    pub const ABORTED_COMMAND: Self = Self(0xb);
    /// Other bytes were found than were said to be there.
    pub const MISCOMPARE: Self = Self(0xe);
}

impl fmt::Display for SenseKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            0x0 => "NO SENSE",
            0x1 => "RECOVERED ERROR",
            0x2 => "NOT READY",
            0x3 => "MEDIUM ERROR",
            0x4 => "HARDWARE ERROR",
            0x5 => "ILLEGAL REQUEST",
            0x6 => "UNIT ATTENTION",
            0x7 => "DATA PROTECT",
            0x8 => "BLANK CHECK",
            0x9 => "VENDOR SPECIFIC",
            0xa => "COPY ABORTED",
            0xb => "ABORTED COMMAND",
            0xd => "VOLUME OVERFLOW",
            0xe => "MISCOMPARE",
            0xf => "COMPLETED",
            _ => "reserved sense key",
        })
    }
}

/// Which command the sense data speak of (SPC-4, 4.5).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Timing {
    /// The one that they came with.
    Current,
    /// One that was answered as done before.
    Deferred,
}

/// What the unit says about a command that is not simply done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sense {
    /// The kind.
    pub key: SenseKey,
    /// The additional sense code.
    pub asc: u8,
    /// And its qualifier.
    pub ascq: u8,
    /// What it speaks of.
    pub timing: Timing,
}

impl Sense {
    /// Reads sense data of either format (SPC-4, 4.5.2 and 4.5.3); `None` for anything else, and for what is too short
    /// to have a key. Codes that were cut off count as 00/00.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let at = |index: usize| bytes.get(index).copied();
        let response_code = at(0)? & 0x7f;
        let timing = match response_code {
            0x70 | 0x72 => Timing::Current,
            0x71 | 0x73 => Timing::Deferred,
            _ => return None,
        };
        let is_fixed = response_code < 0x72;
        let (key, asc, ascq) = if is_fixed {
            // Bytes that are sent need not count: the additional length, from byte 8 on, says so.
            let counts = |index: usize| index < usize::from(at(7).unwrap_or(0)) + 8;
            let code = |index: usize| at(index).filter(|_| counts(index)).unwrap_or(0);
            (at(2)?, code(12), code(13))
        } else {
            (at(1)?, at(2).unwrap_or(0), at(3).unwrap_or(0))
        };
        Some(Self {
            key: SenseKey(key & 0x0f),
            asc,
            ascq,
            timing,
        })
    }

    /// Reads the data segment of a SCSI Response PDU, where a length precedes the sense data (RFC 7143, 11.4.7).
    pub fn of_response(segment: &[u8]) -> Option<Self> {
        let (len, rest) = segment.split_first_chunk()?;
        let sense = rest.get(..usize::from(u16::from_be_bytes(*len)))?;
        Self::parse(sense)
    }
}

impl fmt::Display for Sense {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.timing == Timing::Deferred {
            f.write_str("of an earlier command: ")?;
        }
        write!(f, "{}", self.key)?;
        if let Some(words) = words::of(self.asc, self.ascq) {
            write!(f, ", {words}")?;
        }
        write!(f, " ({:x}/{:02x}/{:02x})", self.key.0, self.asc, self.ascq)
    }
}

/// What is to be done about a command that was answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It is done.
    Good,
    /// It was not done and may be sent again at once: the unit had something to say first.
    Retry(Attention),
    /// The same; the unit has another size than it had.
    CapacityChanged,
    /// The same, and reservation or registrations are not what they were: look before anything is sent again.
    /// It comes before the [`Verdict::Conflict`].
    ReservationChanged,
    /// It was not done, and another session has the unit.
    Conflict,
    /// It was not done and may be sent again after a while, a limited number of times.
    BusyLater,
    /// COMPARE AND WRITE has found other bytes, and written none.
    Miscompare,
    /// The target has no such unit, or not for us.
    LunMissing,
    /// It was not done, and an earlier one, which was answered as done, is lost: something that the unit had cached.
    Deferred(Failure),
    /// It was not done, and a second time would not help.
    Failed(Failure),
}

/// What a unit had to say that changes nothing about the command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Attention {
    /// The unit, or this session's nexus with it, was reset. Commands under way at that time are never answered, what
    /// was only cached may be gone, and with the power so are reservations that do not persist.
    Reset,
    /// Commands of this session were aborted by another one, and are never answered.
    Cleared,
    /// Mode parameters are not what they were: write protection or the cache may be another.
    Parameters,
    /// The unit, or what it says of itself, is not what it was.
    Identity,
    /// Anything else.
    Other,
}

/// What is to be done about a command that was answered with `status` and `sense`. This is the one table of codes
/// (SPC-4, 4.5 and annex F; SAM-5, 5.3).
pub fn verdict(status: Status, sense: Option<Sense>) -> Verdict {
    match status {
        Status::GOOD => Verdict::Good,
        Status::CHECK_CONDITION => sense.map_or(Verdict::Failed(BROKEN), of_sense),
        Status::RESERVATION_CONFLICT => Verdict::Conflict,
        Status::BUSY | Status::TASK_SET_FULL | Status::ACA_ACTIVE | Status::TASK_ABORTED => {
            Verdict::BusyLater
        }
        _ => Verdict::Failed(BROKEN),
    }
}

const BROKEN: Failure = Failure::Host(libc::EIO);

fn of_sense(sense: Sense) -> Verdict {
    // A command that is answered with another one's error was not processed (SPC-4, 4.5, of deferred errors).
    match (sense.timing, of_current(sense)) {
        (Timing::Current, verdict) => verdict,
        // That one arrived, though with an effort.
        (Timing::Deferred, Verdict::Good) => Verdict::BusyLater,
        (Timing::Deferred, Verdict::Failed(failure)) => Verdict::Deferred(failure),
        (Timing::Deferred, _) => Verdict::Deferred(BROKEN),
    }
}

fn of_current(sense: Sense) -> Verdict {
    let code = (sense.asc, sense.ascq);
    match sense.key {
        SenseKey::RECOVERED_ERROR => Verdict::Good,
        SenseKey::UNIT_ATTENTION => of_attention(code),
        SenseKey::MISCOMPARE => Verdict::Miscompare,
        SenseKey::NOT_READY => of_not_ready(code),
        // A protection information check found bytes that are wrong, and would find them again.
        SenseKey::ABORTED_COMMAND if sense.asc == 0x10 => Verdict::Failed(BROKEN),
        SenseKey::ABORTED_COMMAND => Verdict::BusyLater,
        SenseKey::ILLEGAL_REQUEST => of_illegal_request(code),
        SenseKey::DATA_PROTECT => Verdict::Failed(of_data_protect(code)),
        _ => Verdict::Failed(BROKEN),
    }
}

fn of_attention(code: (u8, u8)) -> Verdict {
    match code {
        (0x2a, 0x03..=0x05) => Verdict::ReservationChanged,
        (0x2a, 0x09) => Verdict::CapacityChanged,
        (0x29, _) => Verdict::Retry(Attention::Reset),
        (0x2f, _) => Verdict::Retry(Attention::Cleared),
        (0x2a, 0x00 | 0x01) => Verdict::Retry(Attention::Parameters),
        (0x28, _) | (0x3f, 0x03 | 0x05) => Verdict::Retry(Attention::Identity),
        _ => Verdict::Retry(Attention::Other),
    }
}

fn of_not_ready(code: (u8, u8)) -> Verdict {
    match code {
        // In the course of something that ends by itself, or for no reason that the unit would name; a port that is
        // in standby or cannot be used becomes active, or its session ends.
        (0x04, 0x00 | 0x01 | 0x04..=0x0c | 0x14 | 0x1b) => Verdict::BusyLater,
        (0x3a, _) => Verdict::Failed(Failure::Host(libc::ENOMEDIUM)),
        _ => Verdict::Failed(BROKEN),
    }
}

fn of_illegal_request(code: (u8, u8)) -> Verdict {
    match code {
        (0x25, _) => Verdict::LunMissing,
        (0x21, 0x00) => Verdict::Failed(Failure::OutOfRange),
        (0x20, 0x00) | (0x24, 0x00) | (0x26, 0x00..=0x03) | (0x1a, 0x00) => {
            Verdict::Failed(Failure::Unsupported)
        }
        // No room for one more registration.
        (0x55, 0x04) => Verdict::Failed(Failure::Host(libc::ENOLCK)),
        (0x55, 0x03) => Verdict::BusyLater,
        _ => Verdict::Failed(BROKEN),
    }
}

fn of_data_protect(code: (u8, u8)) -> Failure {
    match code {
        (0x27, 0x07) => Failure::Host(libc::ENOSPC),
        (0x27, _) => Failure::ReadOnly,
        // Access controls.
        (0x20, _) => Failure::Host(libc::EACCES),
        _ => BROKEN,
    }
}
