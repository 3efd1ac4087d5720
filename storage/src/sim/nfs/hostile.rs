//! What becomes of well-formed answers under the hands of a hostile server.

use super::options::Hostility;
use crate::nfs::rpc::RECORD_MARK_BYTES;
use crate::sim::dice::Dice;

/// Spoils what passes through.
#[derive(Debug, Default)]
pub(super) struct Saboteur {
    /// The last answer.
    last: Vec<u8>,
}

/// Where the number of a call is.
const XID: std::ops::Range<usize> = RECORD_MARK_BYTES..RECORD_MARK_BYTES + 4;
/// An answer that is longer is not kept.
const KEPT_BYTES_MAX: usize = 8192;

impl Saboteur {
    /// What is sent in place of a record.
    pub(super) fn spoil(&mut self, mut record: Vec<u8>, hostility: &Hostility, dice: &mut Dice) -> Vec<u8> {
        let kept = record.get(..record.len().min(KEPT_BYTES_MAX)).map(<[u8]>::to_vec);
        let mut bytes = Vec::new();
        if dice.one_in(hostility.garbage_one_in) {
            let at = dice.index(record.len().min(200));
            flip(&mut record, at, dice);
        }
        if dice.one_in(hostility.wrong_xid_one_in) {
            let at = XID.start + dice.index(XID.len());
            flip(&mut record, at, dice);
        }
        if dice.one_in(hostility.wrong_slot_one_in) {
            // The last answer, as the one to this call.
            let xid = record.get(XID).map(<[u8]>::to_vec).unwrap_or_default();
            let mut other = self.last.clone();
            if let Some(place) = other.get_mut(XID) {
                place.copy_from_slice(&xid);
                record = other;
            }
        }
        if dice.one_in(hostility.stray_data_one_in)
            && let Some(last) = record.get_mut(XID.end - 1)
        {
            // The mark of a READ.
            *last ^= 1;
        }
        if dice.one_in(hostility.oversize_one_in) {
            let mark = dice.pick(&[0x7fff_ffff_u32, 0xffff_ffff, 0x8020_0000, 0, 1]);
            bytes.extend(mark.to_be_bytes());
        }
        bytes.extend(&record);
        if dice.one_in(hostility.doubled_one_in) {
            bytes.extend(&record);
        }
        self.last = kept.unwrap_or_default();
        bytes
    }
}

fn flip(bytes: &mut [u8], at: usize, dice: &mut Dice) {
    if let Some(byte) = bytes.get_mut(at) {
        *byte ^= 1 << dice.below(8);
    }
}
