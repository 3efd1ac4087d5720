//! What a client is at, by the operations that it calls.

use super::compound::{Asked, Call, Operation};
use crate::harness::proxy::Step;

/// The step of a call; the answer has its call's.
pub(super) fn of(call: &Call<'_>) -> Option<Step> {
    match &call.asked {
        Asked::Nothing => Some(Step::Idle),
        // READ, WRITE, COMMIT of version 3.
        Asked::Procedure(6) => Some(Step::Read),
        Asked::Procedure(7) => Some(Step::Write),
        Asked::Procedure(21) => Some(Step::Flush),
        Asked::Procedure(_) => None,
        Asked::Compound(operations) => match operations.as_slice() {
            [Operation::Sequence { .. }] => Some(Step::Idle),
            operations => operations.iter().find_map(of_operation),
        },
    }
}

/// The step that an operation says by itself. A write that is to be safe at once is none: with such, records are kept.
fn of_operation(operation: &Operation<'_>) -> Option<Step> {
    match operation {
        Operation::BindConnection => Some(Step::Connect),
        Operation::ExchangeId => Some(Step::ClientId),
        Operation::CreateSession => Some(Step::Login),
        Operation::Open { is_reclaim: true, .. } => Some(Step::Reclaim),
        Operation::Open { .. } => Some(Step::Open),
        Operation::Lock | Operation::Unlock => Some(Step::Reservation),
        Operation::Read => Some(Step::Read),
        Operation::Write {
            is_unstable: true, ..
        } => Some(Step::Write),
        Operation::Commit(_) => Some(Step::Flush),
        Operation::Deallocate => Some(Step::Unmap),
        _ => None,
    }
}
