//! What is answered to a server that calls (RFC 8881, 20): that it may use fewer slots, and that there is nothing else to be had.

use super::rpc::{self, Call, CallError, Record, RpcError};
use super::v4::callback::{
    CALLBACK_VERSION, Callback, CallbackCompound, CbSequence, CbSequenceResult, PROCEDURE_CB_COMPOUND,
    PROCEDURE_CB_NULL,
};
use super::v4::{ReplyWriter, SessionId, Status};
use super::xdr::{Reader, Writer, XdrError};

/// The number of the program that a server calls: any of those that are free for everybody's use.
pub(super) const CALLBACK_PROGRAM: u32 = 0x4000_0000;

/// What is answered.
#[derive(Debug)]
pub(super) struct CallbackAnswer {
    /// The record to be sent.
    pub(super) record: Vec<u8>,
    /// The highest slot that the server wants to be used from now on, if it says one.
    pub(super) target_highest_slot: Option<usize>,
}

/// Answers the call in `record`, which came on a connection of that session.
///
/// # Errors
///
/// When it is no call.
pub(super) fn answer(record: &[u8], session: SessionId) -> Result<CallbackAnswer, XdrError> {
    let mut reader = Reader::new(record);
    let (xid, refused) = match Call::parse(&mut reader) {
        Ok(call) => (call.xid, refusal(&call)),
        Err(CallError::Malformed(error)) => return Err(error),
        Err(CallError::Version { xid, .. }) => (xid, Some(RpcError::RpcMismatch { low: 2, high: 2 })),
    };
    let mut writer = Writer::default();
    let mark = Record::begin(&mut writer);
    let compound = match (refused, reader.rest()) {
        (Some(error), _) => Err(Some(error)),
        (None, []) => Err(None),
        (None, arguments) => CallbackCompound::parse(arguments).map_err(|_| Some(RpcError::GarbageArguments)),
    };
    let outcome = match &compound {
        Err(Some(error)) => Err(*error),
        Ok(_) | Err(None) => Ok(()),
    };
    rpc::Reply { xid, outcome }.put(&mut writer);
    let mut target_highest_slot = None;
    if let Ok(compound) = &compound {
        target_highest_slot = carry_out(compound, session, ReplyWriter::new(&mut writer, compound.tag));
    }
    mark.finish(&mut writer, 0);
    Ok(CallbackAnswer {
        record: writer.into_bytes(),
        target_highest_slot,
    })
}

/// Why a call is not looked at.
fn refusal(call: &Call) -> Option<RpcError> {
    match (call.program, call.version, call.procedure) {
        (CALLBACK_PROGRAM, CALLBACK_VERSION, PROCEDURE_CB_NULL | PROCEDURE_CB_COMPOUND) => None,
        (CALLBACK_PROGRAM, CALLBACK_VERSION, _) => Some(RpcError::ProcedureUnavailable),
        (CALLBACK_PROGRAM, ..) => Some(RpcError::ProgramMismatch {
            low: CALLBACK_VERSION,
            high: CALLBACK_VERSION,
        }),
        _ => Some(RpcError::ProgramUnavailable),
    }
}

/// Does what a compound asks for, and returns the highest slot that it wants to be used.
fn carry_out(
    compound: &CallbackCompound<'_>,
    session: SessionId,
    mut reply: ReplyWriter<'_>,
) -> Option<usize> {
    let mut target = None;
    for (place, callback) in compound.operations.iter().enumerate() {
        match callback {
            Callback::Sequence(sequence) if place == 0 => {
                if sequence.session_id != session {
                    reply.cb_failed(callback, Status::BADSESSION);
                    return None;
                }
                reply.cb_sequence(&taken(sequence));
            }
            _ if place == 0 => {
                reply.cb_failed(callback, Status::OP_NOT_IN_SESSION);
                return None;
            }
            Callback::Sequence(_) => {
                reply.cb_failed(callback, Status::SEQUENCE_POS);
                return target;
            }
            Callback::RecallSlot {
                target_highest_slot_id,
            } => {
                target = usize::try_from(*target_highest_slot_id).ok();
                reply.cb_done(callback);
            }
            // No delegation was asked for, so none can be given back.
            Callback::Recall(_) => {
                reply.cb_failed(callback, Status::BADHANDLE);
                return target;
            }
            Callback::RecallAny(_) => reply.cb_done(callback),
            Callback::Unknown(operation) => {
                reply.cb_unknown(*operation);
                return target;
            }
        }
    }
    reply.finish();
    target
}

/// The back channel has the one slot that was asked for.
fn taken(sequence: &CbSequence) -> CbSequenceResult {
    CbSequenceResult {
        session_id: sequence.session_id,
        sequence_id: sequence.sequence_id,
        slot_id: sequence.slot_id,
        highest_slot_id: 0,
        target_highest_slot_id: 0,
    }
}
