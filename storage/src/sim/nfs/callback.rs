//! What a simulated server asks of its clients (RFC 8881, 20).

use super::state::{State, session_id};
use crate::nfs::rpc::{self, Call, Credential, Record};
use crate::nfs::v4::callback::{
    CALLBACK_VERSION, Callback, CallbackCompound, CbSequence, PROCEDURE_CB_COMPOUND, PROCEDURE_CB_NULL,
    callback_reply,
};
use crate::nfs::v4::{SessionId, Status};
use crate::nfs::xdr::{Reader, Writer};

/// Numbers of calls of the server are above; what is in it says the session.
const XIDS: u32 = 0x8000_0000;
/// So many calls a hostile server makes at once.
const FLOOD: usize = 5_000;

impl State {
    /// Perhaps calls the client of a session.
    pub(super) fn perhaps_call(&mut self, connection: u64, id: SessionId) {
        let mut count = usize::from(self.dice.one_in(self.options.mishaps.callback_one_in));
        if self.dice.one_in(self.options.hostility.calls_one_in) {
            count = FLOOD;
        }
        for _ in 0..count {
            self.call_client(connection, id);
        }
    }

    fn call_client(&mut self, connection: u64, id: SessionId) {
        let Some(number) = self.session(id) else { return };
        let xid = XIDS | self.next_callback;
        let Some(session) = self.sessions.get_mut(&number) else {
            return;
        };
        let (highest, program) = (session.highest(), session.callback_program);
        let is_proper = self.options.hostility.calls_one_in == 0;
        let sequence_id = match session.call(xid) {
            Some(sequence_id) => sequence_id,
            None if is_proper => return,
            None => 7,
        };
        self.next_callback += 1;
        let sequence = Callback::Sequence(CbSequence {
            session_id: id,
            sequence_id,
            slot_id: 0,
            highest_slot_id: 0,
            cache_this: false,
        });
        let target_highest_slot_id = u32::try_from(self.dice.below(u64::from(highest) + 1)).unwrap_or(0);
        let rest = match self.dice.below(4) {
            0 => vec![],
            1 => vec![Callback::Unknown(self.dice.pick(&[5, 14, 99]))],
            _ => {
                if let Some(session) = self.sessions.get_mut(&number) {
                    session.target = target_highest_slot_id;
                }
                vec![Callback::RecallSlot {
                    target_highest_slot_id,
                }]
            }
        };
        let compound = CallbackCompound {
            tag: b"",
            minor_version: 1,
            operations: [sequence].into_iter().chain(rest).collect(),
        };
        let mut writer = Writer::default();
        let record = Record::begin(&mut writer);
        let procedure = match is_proper || self.dice.one_in(2) {
            true => PROCEDURE_CB_COMPOUND,
            false => PROCEDURE_CB_NULL,
        };
        let call = Call {
            xid,
            program,
            version: CALLBACK_VERSION,
            procedure,
            credential: &Credential::None,
        };
        call.put(&mut writer);
        if procedure == PROCEDURE_CB_COMPOUND {
            compound.put(&mut writer);
        }
        record.finish(&mut writer, 0);
        if let Some(outgoing) = self.outgoing.get_mut(&connection) {
            outgoing.extend(writer.bytes());
        }
    }

    /// A client answers.
    pub(super) fn called(&mut self, record: &[u8]) {
        let mut reader = Reader::new(record);
        let Ok(reply) = rpc::Reply::parse(&mut reader) else {
            return self
                .complaints
                .push("an answer to a call that makes no sense".to_owned());
        };
        let answer = match (reply.outcome, reader.rest()) {
            (Ok(()), []) => Ok((Status::OK, None)),
            (Ok(()), results) => callback_reply(results).map_err(|error| error.to_string()),
            (Err(error), _) => Err(error.to_string()),
        };
        let (status, result) = match answer {
            Ok(answer) => answer,
            Err(error) => return self.complaints.push(format!("a call is answered by: {error}")),
        };
        let life = self.life;
        let called = self
            .sessions
            .iter_mut()
            .find(|(_, session)| session.is_called_by(reply.xid));
        // A session that is over may be answered for.
        let Some((number, session)) = called else { return };
        if !session.called(session_id(life, *number), status, result.as_ref()) {
            self.complaints
                .push(format!("a call is answered with {status}, {result:?}"));
        }
    }
}
