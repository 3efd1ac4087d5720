//! What a conversation with a target is made of: see [`crate::remote::procedure`].

use std::time::Duration;

use crate::remote::procedure;

use super::login::Negotiated;
use super::pdu::{LoginRequest, LoginResponse, TaskOutcome};
use super::scsi::cdb::Cdb;
use super::scsi::sense::{Sense, Status};

/// What a procedure asks for.
#[derive(Debug)]
pub(super) enum Ask {
    /// A login request and its text. The answer is [`Answer::Login`].
    Login(LoginRequest, Vec<u8>),
    /// From now on the connection is in the full-feature phase. The answer is [`Answer::Done`].
    FullFeature(Box<Negotiated>),
    /// A SCSI command. The answer is [`Answer::Command`].
    Command(Cdb, Data),
    /// A LOGICAL UNIT RESET. The answer is [`Answer::Reset`].
    ResetUnit,
    /// The end of the session. The answer is [`Answer::Done`].
    Logout,
    /// Time to pass. The answer is [`Answer::Done`].
    Sleep(Duration),
}

/// What a command of a procedure transfers.
#[derive(Clone, Debug)]
pub(super) enum Data {
    /// Nothing.
    None,
    /// At most so many bytes to us.
    In(usize),
    /// These to the target.
    Out(Vec<u8>),
}

/// What a procedure is told.
#[derive(Debug)]
pub(super) enum Answer {
    Done,
    Login(LoginResponse, Vec<u8>),
    Command(Reply),
    Reset(TaskOutcome),
}

/// How a command of a procedure has ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Reply {
    /// The SCSI status.
    pub(super) status: Status,
    /// Its sense data.
    pub(super) sense: Option<Sense>,
    /// What it has transferred to us.
    pub(super) data: Vec<u8>,
}

/// A conversation that is under way, and ends with a `T`.
pub(super) type Procedure<T> = procedure::Procedure<Ask, Answer, T>;
/// How far one has come.
pub(super) type Progress<T> = procedure::Progress<Ask, T>;
/// The procedure's end of the conversation.
pub(super) type Port = procedure::Port<Ask, Answer>;

impl Port {
    /// Sends a login request, and returns what the target says to it.
    pub(super) async fn login(&self, request: LoginRequest, text: Vec<u8>) -> (LoginResponse, Vec<u8>) {
        match self.ask(Ask::Login(request, text)).await {
            Answer::Login(response, text) => (response, text),
            other => panic!("a login request was answered by {other:?}"),
        }
    }

    /// Goes on in the full-feature phase.
    pub(super) async fn enter_full_feature(&self, terms: Negotiated) {
        self.ask(Ask::FullFeature(Box::new(terms))).await;
    }

    /// Sends a command, and returns how it ends.
    pub(super) async fn command(&self, cdb: Cdb, data: Data) -> Reply {
        match self.ask(Ask::Command(cdb, data)).await {
            Answer::Command(reply) => reply,
            other => panic!("a command was answered by {other:?}"),
        }
    }

    /// Resets the logical unit, and returns what the target says to it.
    pub(super) async fn reset_unit(&self) -> TaskOutcome {
        match self.ask(Ask::ResetUnit).await {
            Answer::Reset(outcome) => outcome,
            other => panic!("a reset was answered by {other:?}"),
        }
    }

    /// Ends the session.
    pub(super) async fn logout(&self) {
        self.ask(Ask::Logout).await;
    }

    /// Lets so much time pass.
    pub(super) async fn sleep(&self, time: Duration) {
        self.ask(Ask::Sleep(time)).await;
    }
}
