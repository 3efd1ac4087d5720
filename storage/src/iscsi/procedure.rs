//! What takes several exchanges, one after the other: an async function that asks, and is told.
//!
//! A login, or taking a reservation, is a conversation with branches. As a function that awaits each answer it reads like
//! the standard's own text; its states are the compiler's work. Nothing runs it but [`Procedure::step`]: it
//! has no executor, no I/O and no clock, and dropping it ends it.

use std::fmt;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::Duration;

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
pub(super) struct Procedure<T> {
    future: Pin<Box<dyn Future<Output = T> + Send>>,
    desk: Arc<Mutex<Desk>>,
}

/// How far a procedure has come.
#[derive(Debug)]
pub(super) enum Progress<T> {
    /// It asks for this, and is to be told the answer.
    Asks(Ask),
    /// It has ended.
    Ends(T),
}

/// The procedure's end of the conversation.
#[derive(Clone, Debug)]
pub(super) struct Port {
    desk: Arc<Mutex<Desk>>,
}

/// What lies between the two: a question or an answer.
#[derive(Debug, Default)]
struct Desk {
    ask: Option<Ask>,
    answer: Option<Answer>,
}

impl<T> Procedure<T> {
    /// A procedure that has not begun.
    pub(super) fn new<F>(body: impl FnOnce(Port) -> F) -> Self
    where
        F: Future<Output = T> + Send + 'static,
    {
        let desk = Arc::<Mutex<Desk>>::default();
        let port = Port {
            desk: Arc::clone(&desk),
        };
        Self {
            future: Box::pin(body(port)),
            desk,
        }
    }

    /// Goes on until the next question; `answer` is that to the last one.
    pub(super) fn step(&mut self, answer: Option<Answer>) -> Progress<T> {
        locked(&self.desk).answer = answer;
        let polled = self.future.as_mut().poll(&mut Context::from_waker(Waker::noop()));
        match polled {
            Poll::Ready(end) => Progress::Ends(end),
            Poll::Pending => {
                let ask = locked(&self.desk).ask.take();
                Progress::Asks(ask.expect("a procedure waits for nothing but answers"))
            }
        }
    }
}

impl<T> fmt::Debug for Procedure<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Procedure").finish_non_exhaustive()
    }
}

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

    fn ask(&self, ask: Ask) -> Question<'_> {
        Question {
            port: self,
            ask: Some(ask),
        }
    }
}

/// A question that waits for its answer.
struct Question<'a> {
    port: &'a Port,
    ask: Option<Ask>,
}

impl Future for Question<'_> {
    type Output = Answer;

    fn poll(mut self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<Answer> {
        let port = self.port;
        let mut desk = locked(&port.desk);
        if let Some(ask) = self.ask.take() {
            desk.ask = Some(ask);
            return Poll::Pending;
        }
        let answer = desk.answer.take();
        Poll::Ready(answer.expect("a procedure is stepped when its question is answered"))
    }
}

/// Only one thread at a time has a procedure; the lock is what lets it move between threads.
fn locked(desk: &Mutex<Desk>) -> MutexGuard<'_, Desk> {
    desk.lock().unwrap_or_else(PoisonError::into_inner)
}
