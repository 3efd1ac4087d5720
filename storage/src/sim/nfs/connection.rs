//! One connection of a simulated server: bytes in, bytes out.

use super::Server;
use super::state::State;
use super::task::is_busy_with;
use crate::nfs::rpc::{self, Call, Direction, RECORD_MARK_BYTES, Record, RecordMark, RpcError};
use crate::nfs::v4::{CallCompound, PROCEDURE_COMPOUND, PROCEDURE_NULL, VERSION};
use crate::nfs::xdr::{Reader, Writer};

/// The server's end of a connection. Nothing happens but inside its methods: what was received is answered by a later
/// [`Connection::transmit`].
#[derive(Debug)]
pub(super) struct Connection {
    server: Server,
    life: u64,
    number: u64,
    come: Vec<u8>,
    record: Vec<u8>,
    is_closed: bool,
}

/// No call is longer.
const RECORD_BYTES_MAX: usize = (1 << 20) + (64 << 10);

impl Connection {
    pub(super) fn new(server: &Server) -> Self {
        let mut state = server.state();
        let (life, number) = (state.life, state.connect());
        drop(state);
        Self {
            server: server.clone(),
            life,
            number,
            come: Vec::new(),
            record: Vec::new(),
            is_closed: false,
        }
    }

    pub(super) fn receive(&mut self, bytes: &[u8]) {
        self.come.extend_from_slice(bytes);
        while !self.is_closed
            && let Some(mark) = self.come.first_chunk::<RECORD_MARK_BYTES>()
        {
            let state = &mut *self.server.0.borrow_mut();
            if state.life != self.life {
                self.is_closed = true;
                return;
            }
            let Ok(mark) = RecordMark::parse(*mark, RECORD_BYTES_MAX - self.record.len()) else {
                state.complaints.push("a record that is too long".to_owned());
                self.is_closed = true;
                return;
            };
            let end = RECORD_MARK_BYTES + mark.fragment_bytes;
            let Some(fragment) = self.come.get(RECORD_MARK_BYTES..end) else {
                return;
            };
            self.record.extend_from_slice(fragment);
            self.come.drain(..end);
            if mark.is_last {
                let record = std::mem::take(&mut self.record);
                let closes_one_in = state.options.mishaps.closes_one_in;
                self.is_closed = state.dice.one_in(closes_one_in);
                if !self.is_closed {
                    state.receive(self.number, &record);
                }
            }
        }
    }

    /// What is sent now.
    pub(super) fn transmit(&mut self) -> Vec<u8> {
        let state = &mut *self.server.0.borrow_mut();
        if state.life != self.life {
            self.is_closed = true;
        }
        if self.is_closed {
            return Vec::new();
        }
        state.advance();
        if state.life != self.life {
            self.is_closed = true;
            return Vec::new();
        }
        let sent = state.outgoing.get_mut(&self.number);
        sent.map(std::mem::take).unwrap_or_default()
    }

    /// When something that it waits for is carried out.
    pub(super) fn due(&self) -> Option<std::time::Instant> {
        let state = self.server.state();
        state.due(Some(self.number)).filter(|_| !self.is_closed)
    }

    pub(super) fn close(&mut self) {
        self.is_closed = true;
        let state = &mut *self.server.state();
        if state.life == self.life {
            state.disconnect(self.number);
        }
    }

    pub(super) fn is_closed(&self) -> bool {
        self.is_closed
    }
}

impl State {
    /// Takes a record in.
    fn receive(&mut self, connection: u64, record: &[u8]) {
        match Direction::of(record) {
            Ok(Direction::Call) => self.call(connection, record),
            Ok(Direction::Reply) => self.called(record),
            Err(_) => self
                .complaints
                .push("a record that is no message of RPC".to_owned()),
        }
    }

    fn call(&mut self, connection: u64, record: &[u8]) {
        let mut reader = Reader::new(record);
        let Ok(call) = Call::parse(&mut reader) else {
            return self.complaints.push("a call that makes no sense".to_owned());
        };
        let refused = match (call.program, call.version, call.procedure) {
            (rpc::program::NFS, VERSION, PROCEDURE_NULL) => return self.reply(connection, call.xid, &[]),
            (rpc::program::NFS, VERSION, PROCEDURE_COMPOUND) => None,
            (rpc::program::NFS, VERSION, _) => Some(RpcError::ProcedureUnavailable),
            (rpc::program::NFS, ..) => Some(RpcError::ProgramMismatch {
                low: VERSION,
                high: VERSION,
            }),
            _ => Some(RpcError::ProgramUnavailable),
        };
        if let Some(error) = refused {
            self.complaints.push(format!("a call is refused: {error}"));
            return self.send(connection, call.xid, Err(error), &[]);
        }
        match CallCompound::parse(reader.rest()) {
            Ok(compound) => self.compound(connection, call.xid, reader.rest(), &compound),
            Err(error) => {
                self.complaints
                    .push(format!("a compound that makes no sense: {error}"));
                self.send(connection, call.xid, Err(RpcError::GarbageArguments), &[]);
            }
        }
    }

    /// Answers a call with results.
    pub(super) fn reply(&mut self, connection: u64, xid: u32, results: &[u8]) {
        self.send(connection, xid, Ok(()), results);
    }

    fn send(&mut self, connection: u64, xid: u32, outcome: Result<(), RpcError>, results: &[u8]) {
        let mut writer = Writer::default();
        let record = Record::begin(&mut writer);
        rpc::Reply { xid, outcome }.put(&mut writer);
        writer.append(results);
        record.finish(&mut writer, 0);
        let hostility = self.options.hostility;
        let bytes = self
            .saboteur
            .spoil(writer.into_bytes(), &hostility, &mut self.dice);
        // Whoever has gone is not answered.
        if let Some(outgoing) = self.outgoing.get_mut(&connection) {
            outgoing.extend(bytes);
        }
    }

    /// When the next call is carried out, of this connection or of any.
    pub(super) fn due(&self, connection: Option<u64>) -> Option<std::time::Instant> {
        let tasks = self.tasks.iter();
        let tasks = tasks.filter(|task| connection.is_none_or(|number| is_busy_with(task, number)));
        tasks.map(|task| task.due).min()
    }
}
