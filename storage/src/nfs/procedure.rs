//! What a conversation with a server is made of: see [`crate::remote::procedure`].

use std::time::Duration;

use crate::remote::procedure;

use super::command::Target;
use super::rpc;
use super::session::{Manner, Terms};
use super::v4::{CompoundReply, MalformedReply, Operation, Operations, ReplyError, Status};
use super::xdr::Reader;

/// What a procedure asks for.
#[derive(Debug)]
pub(super) enum Ask {
    /// A compound outside of any session. The answer is [`Answer::Record`].
    Call(Manner, Operations),
    /// A compound in the session, behind a SEQUENCE. The answer is [`Answer::Record`].
    CallInSession(Operations),
    /// A session was made, and takes the place of any other. The answer is [`Answer::Done`].
    Begin(Box<Terms>),
    /// The session that there is goes on with this connection. The answer is [`Answer::Done`].
    Rejoin,
    /// What was sent on the last connection is sent again. The answer is [`Answer::Done`].
    Replay,
    /// The end of the session. The answer is [`Answer::Done`].
    DestroySession,
    /// How long the server keeps what a client has that gives no sign of life. The answer is [`Answer::Done`].
    SetLease(Duration),
    /// Commands are for this file. The answer is [`Answer::Done`].
    Aim(Target),
    /// Time to pass. The answer is [`Answer::Done`].
    Sleep(Duration),
}

/// What a procedure is told.
#[derive(Debug)]
pub(super) enum Answer {
    Done,
    Record(Vec<u8>, Scope),
}

/// Where a compound was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Scope {
    /// By itself.
    Alone,
    /// Behind a SEQUENCE.
    InSession,
}

/// A conversation that is under way, and ends with a `T`.
pub(super) type Procedure<T> = procedure::Procedure<Ask, Answer, T>;
/// How far one has come.
pub(super) type Progress<T> = procedure::Progress<Ask, T>;
/// The procedure's end of the conversation.
pub(super) type Port = procedure::Port<Ask, Answer>;

/// The answer to a compound.
#[derive(Debug)]
pub(super) struct Reply {
    record: Vec<u8>,
    scope: Scope,
}

/// Why a compound has no results.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum CallError {
    /// It was not carried out at all.
    #[error(transparent)]
    Rpc(#[from] rpc::RpcError),
    /// An operation was not.
    #[error(transparent)]
    Reply(#[from] ReplyError),
}

impl CallError {
    /// That an operation was not done, for this reason.
    pub(super) fn of_status(status: Status) -> Self {
        Self::Reply(ReplyError::Status {
            operation: Operation::SEQUENCE,
            status,
        })
    }

    /// What the server says, if it says something.
    pub(super) fn status(&self) -> Option<Status> {
        match self {
            Self::Rpc(_) => None,
            Self::Reply(error) => error.status(),
        }
    }
}

impl Reply {
    /// What became of the compound as a whole, if that can be read.
    pub(super) fn status(&self) -> Option<Status> {
        let mut reader = Reader::new(&self.record);
        rpc::Reply::parse(&mut reader).ok()?.outcome.ok()?;
        Some(CompoundReply::parse(reader.rest()).ok()?.status())
    }

    /// Its results, but for that of the SEQUENCE.
    pub(super) fn results(&self) -> Result<CompoundReply<'_>, CallError> {
        let malformed = |error| ReplyError::Malformed(MalformedReply::Xdr(error));
        let mut reader = Reader::new(&self.record);
        let reply = rpc::Reply::parse(&mut reader).map_err(malformed)?;
        reply.outcome?;
        let mut results = CompoundReply::parse(reader.rest()).map_err(malformed)?;
        if self.scope == Scope::InSession {
            results.sequence()?;
        }
        Ok(results)
    }
}

impl Port {
    /// Asks for a compound outside of any session.
    pub(super) async fn call(&self, manner: &Manner, operations: Operations) -> Reply {
        self.reply(Ask::Call(manner.clone(), operations)).await
    }

    /// Asks for a compound in the session.
    pub(super) async fn call_in_session(&self, operations: Operations) -> Reply {
        self.reply(Ask::CallInSession(operations)).await
    }

    async fn reply(&self, ask: Ask) -> Reply {
        match self.ask(ask).await {
            Answer::Record(record, scope) => Reply { record, scope },
            other => panic!("a compound was answered by {other:?}"),
        }
    }

    /// Goes on in a session that was just made.
    pub(super) async fn begin(&self, terms: Terms) {
        self.ask(Ask::Begin(Box::new(terms))).await;
    }

    /// Goes on with the session of the last connection.
    pub(super) async fn rejoin(&self) {
        self.ask(Ask::Rejoin).await;
    }

    /// Sends again what was sent on the last connection, and not answered.
    pub(super) async fn replay(&self) {
        self.ask(Ask::Replay).await;
    }

    /// Ends the session.
    pub(super) async fn destroy_session(&self) {
        self.ask(Ask::DestroySession).await;
    }

    /// Says how long the server keeps what a silent client has.
    pub(super) async fn set_lease(&self, lease: Duration) {
        self.ask(Ask::SetLease(lease)).await;
    }

    /// Says which file commands are for.
    pub(super) async fn aim(&self, target: Target) {
        self.ask(Ask::Aim(target)).await;
    }

    /// Lets so much time pass.
    pub(super) async fn sleep(&self, time: Duration) {
        self.ask(Ask::Sleep(time)).await;
    }
}
