//! What is wrong with one message, and all else right: sums that need not be wrong fit.

use super::pdu::{Digests, Pdu, field, seal, set};
use crate::harness::proxy::{Damage, Direction};

/// Promised data of the most that three bytes can say.
const DATA_BYTES_MAX: u32 = 0xff_ffff;

/// The message with the damage, if it has a place for it.
pub(super) fn damaged(
    direction: Direction,
    message: &[u8],
    digests: Digests,
    damage: Damage,
) -> Option<Vec<u8>> {
    let pdu = Pdu(message);
    let (headers, start) = (pdu.headers_bytes(), pdu.data_start(digests));
    let has_data = pdu.data_bytes() > 0;
    let mut damaged = message.to_vec();
    match damage {
        Damage::Data => {
            *damaged.get_mut(start).filter(|_| has_data)? ^= 0x10;
            return Some(damaged);
        }
        Damage::HeaderSum => {
            *damaged.get_mut(headers).filter(|_| digests.header)? ^= 0x10;
            return Some(damaged);
        }
        Damage::DataSum => {
            let sum = start + pdu.padded_bytes();
            *damaged.get_mut(sum).filter(|_| digests.data && has_data)? ^= 0x10;
            return Some(damaged);
        }
        Damage::Truncated => {
            // Half of it, without padding.
            let left = pdu.data_bytes() / 8 * 4;
            (has_data && left < pdu.data_bytes()).then_some(())?;
            damaged.drain(start + left..start + pdu.padded_bytes());
            if digests.data && left == 0 {
                damaged.truncate(start);
            }
            promise(&mut damaged, u32::try_from(left).ok()?);
        }
        Damage::Oversized => promise(&mut damaged, DATA_BYTES_MAX),
        // The status is not in the header alone.
        Damage::Verdict => return None,
        Damage::Tag => set(&mut damaged, field::TAG, pdu.field(field::TAG) ^ 0x5a5a_5a5a),
        Damage::Number => {
            (direction == Direction::ToClient && pdu.has_status()).then_some(())?;
            let number = pdu.field(field::STATUS_NUMBER).wrapping_add(17);
            set(&mut damaged, field::STATUS_NUMBER, number);
        }
    }
    seal(&mut damaged, digests);
    Some(damaged)
}

/// Sets DataSegmentLength, and leaves TotalAHSLength before it.
fn promise(message: &mut [u8], bytes: u32) {
    let extra = Pdu(message).field(4) & 0xff00_0000;
    set(message, 4, extra | bytes);
}
