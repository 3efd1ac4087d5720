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

/// A conversation that is under way: it asks `Q`s, is told `A`s, and ends with a `T`.
pub(crate) struct Procedure<Q, A, T> {
    future: Pin<Box<dyn Future<Output = T> + Send>>,
    desk: Arc<Mutex<Desk<Q, A>>>,
}

/// How far a procedure has come.
#[derive(Debug)]
pub(crate) enum Progress<Q, T> {
    /// It asks for this, and is to be told the answer.
    Asks(Q),
    /// It has ended.
    Ends(T),
}

/// The procedure's end of the conversation.
#[derive(Debug)]
pub(crate) struct Port<Q, A> {
    desk: Arc<Mutex<Desk<Q, A>>>,
}

/// What lies between the two: a question or an answer.
#[derive(Debug)]
struct Desk<Q, A> {
    ask: Option<Q>,
    answer: Option<A>,
}

impl<Q: Send + 'static, A: Send + 'static, T> Procedure<Q, A, T> {
    /// A procedure that has not begun.
    pub(crate) fn new<F>(body: impl FnOnce(Port<Q, A>) -> F) -> Self
    where
        F: Future<Output = T> + Send + 'static,
    {
        let desk = Arc::new(Mutex::new(Desk {
            ask: None,
            answer: None,
        }));
        let port = Port {
            desk: Arc::clone(&desk),
        };
        Self {
            future: Box::pin(body(port)),
            desk,
        }
    }

    /// Goes on until the next question; `answer` is that to the last one.
    pub(crate) fn step(&mut self, answer: Option<A>) -> Progress<Q, T> {
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

impl<Q, A, T> fmt::Debug for Procedure<Q, A, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Procedure").finish_non_exhaustive()
    }
}

impl<Q, A> Clone for Port<Q, A> {
    fn clone(&self) -> Self {
        Self {
            desk: Arc::clone(&self.desk),
        }
    }
}

impl<Q: Unpin, A> Port<Q, A> {
    /// Asks, and waits for the answer.
    pub(crate) fn ask(&self, ask: Q) -> impl Future<Output = A> {
        Question {
            port: self,
            ask: Some(ask),
        }
    }
}

/// A question that waits for its answer.
struct Question<'a, Q, A> {
    port: &'a Port<Q, A>,
    ask: Option<Q>,
}

impl<Q: Unpin, A> Future for Question<'_, Q, A> {
    type Output = A;

    fn poll(mut self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<A> {
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
fn locked<Q, A>(desk: &Mutex<Desk<Q, A>>) -> MutexGuard<'_, Desk<Q, A>> {
    desk.lock().unwrap_or_else(PoisonError::into_inner)
}
