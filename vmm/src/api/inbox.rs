//! The way from the thread `api` to the thread that owns the machine, and back.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};

use super::bell::Bell;
use super::verbs::{Answer, Fault, Verb};

/// One request of a client, on its way to whoever can fulfil it.
#[derive(Debug)]
pub struct Call {
    /// What the client wants.
    pub verb: Verb,
    /// Where the answer goes.
    pub reply: Reply,
}

/// Makes both ends of the way for calls.
///
/// # Errors
///
/// The kernel has no descriptor left.
pub fn mailbox() -> io::Result<(Inbox, Calls)> {
    let (sender, receiver) = mpsc::channel();
    let wake = Bell::new()?;
    let inbox = Inbox {
        sender,
        wake: wake.try_clone()?,
    };
    Ok((inbox, Calls { receiver, wake }))
}

/// The end that calls are posted to. The API posts at most one per connection that has no answer yet.
#[derive(Debug)]
pub struct Inbox {
    sender: Sender<Call>,
    wake: Bell,
}

impl Inbox {
    /// Posts `call`. If nobody takes calls any more its client is told so.
    pub fn post(&self, call: Call) {
        if self.sender.send(call).is_ok() {
            self.wake.ring();
        }
    }
}

/// The end that calls are taken from. Its descriptor is readable when there is a call.
#[derive(Debug)]
pub struct Calls {
    receiver: Receiver<Call>,
    wake: Bell,
}

impl Calls {
    /// The next call, if there is one. Take calls until there is none: the descriptor is readable
    /// again only after the next one is posted.
    pub fn take(&mut self) -> Option<Call> {
        // Quiet the descriptor first: a call that is posted after this is seen now or rings again.
        self.wake.quiet();
        self.receiver.try_recv().ok()
    }
}

impl AsFd for Calls {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

impl AsRawFd for Calls {
    fn as_raw_fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }
}

/// Where the answer to one call goes. Dropped without an answer, it tells the client that the
/// machine has ended.
#[derive(Debug)]
pub struct Reply {
    token: u64,
    sender: Sender<(u64, Answer)>,
    wake: Arc<Bell>,
    is_answered: bool,
}

impl Reply {
    /// Answers the call. A client that has gone meanwhile is no error.
    pub fn send(mut self, answer: Answer) {
        self.deliver(answer);
    }

    fn deliver(&mut self, answer: Answer) {
        self.is_answered = true;
        if self.sender.send((self.token, answer)).is_ok() {
            self.wake.ring();
        }
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if !self.is_answered {
            self.deliver(Err(Fault::bad_request(
                "The microVM ended before it could answer.",
            )));
        }
    }
}

/// The API's end of the way back.
#[derive(Debug)]
pub(super) struct Answers {
    sender: Sender<(u64, Answer)>,
    receiver: Receiver<(u64, Answer)>,
    wake: Arc<Bell>,
}

impl Answers {
    pub(super) fn new() -> io::Result<Self> {
        let (sender, receiver) = mpsc::channel();
        let wake = Arc::new(Bell::new()?);
        Ok(Self {
            sender,
            receiver,
            wake,
        })
    }

    /// A reply whose answer comes out of [`Self::take`] with `token`.
    pub(super) fn reply(&self, token: u64) -> Reply {
        Reply {
            token,
            sender: self.sender.clone(),
            wake: Arc::clone(&self.wake),
            is_answered: false,
        }
    }

    /// The next answer, if there is one; to be called until there is none.
    pub(super) fn take(&self) -> Option<(u64, Answer)> {
        self.wake.quiet();
        self.receiver.try_recv().ok()
    }

    pub(super) fn wake(&self) -> &Bell {
        &self.wake
    }
}
