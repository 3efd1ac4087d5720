//! What a session is at, by its messages: the operation of a command, and the opcode of all else.

use super::pdu::{Pdu, opcode};
use crate::harness::proxy::Step;

/// The step of a message that says it by itself; an answer to a command does not.
pub(super) fn of(pdu: &Pdu<'_>) -> Option<Step> {
    if !pdu.is_whole() {
        return None;
    }
    match pdu.opcode() {
        opcode::LOGIN | opcode::LOGIN_RESPONSE => Some(Step::Login),
        opcode::NOP_OUT | opcode::NOP_IN => Some(Step::Idle),
        opcode::SCSI_COMMAND => of_operation(pdu.cdb()),
        _ => None,
    }
}

fn of_operation([operation, ..]: [u8; 16]) -> Option<Step> {
    match operation {
        // READ (10), (12), (16).
        0x28 | 0xa8 | 0x88 => Some(Step::Read),
        // WRITE (10), (12), (16).
        0x2a | 0xaa | 0x8a => Some(Step::Write),
        // SYNCHRONIZE CACHE (10), (16).
        0x35 | 0x91 => Some(Step::Flush),
        // UNMAP, WRITE SAME (10), (16).
        0x42 | 0x41 | 0x93 => Some(Step::Unmap),
        // PERSISTENT RESERVE OUT.
        0x5f => Some(Step::Reservation),
        _ => None,
    }
}
