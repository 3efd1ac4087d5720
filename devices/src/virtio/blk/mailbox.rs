//! The way to a worker: commands, a nudge that ends its wait, and a stop that may be given up.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use coracle_storage::backend::Backend;
use coracle_storage::request::{Failure, Operation};
use vmm_sys_util::eventfd::EventFd;

use crate::virtio::device::{Notice, Patience, Session, StopError};

/// What may be asked of a worker.
pub(super) enum Command {
    /// Serve the queues of this part of a session from now on.
    Serve(Box<Session>),
    /// Quiesce and give the session back.
    Stop(StopCall),
    /// Use another image, and give the old one back; only while nothing is served.
    Replace(Box<dyn Backend>, Call<ReplaceReply>),
    /// Have the image do an operation that has no data, with a length if that makes it long. It is done even where whoever
    /// asked has given up.
    Ask(Operation, u64, Call<AskReply>),
    /// Let what waits for tokens go: the limits have changed.
    Reconsider,
    /// Quiesce and end the thread.
    Retire,
}

/// The session, `None` if nothing was served; or why it could not be given back.
pub(super) type StopReply = Result<Option<Box<Session>>, StopError>;

/// The image that was in use, or why it is still.
pub(super) type ReplaceReply = io::Result<Box<dyn Backend>>;

/// Whether the image has done it.
pub(super) type AskReply = Result<(), Failure>;

/// The worker's end of a wish that may be given up.
pub(super) struct Call<T> {
    reply: Sender<T>,
    notice: Notice,
    is_awaited: Arc<Mutex<bool>>,
}

/// The other end: where the answer is waited for.
pub(super) struct Answer<T> {
    reply: Receiver<T>,
    is_awaited: Arc<Mutex<bool>>,
}

/// A wish to stop.
pub(super) type StopCall = Call<StopReply>;
/// Where it is answered.
pub(super) type StopAnswer = Answer<StopReply>;

impl<T> Call<T> {
    /// Both ends; `notice` rings when there is an answer.
    pub(super) fn new(notice: &Notice) -> (Self, Answer<T>) {
        let (sender, receiver) = channel();
        let is_awaited = Arc::new(Mutex::new(true));
        let call = Self {
            reply: sender,
            notice: notice.clone(),
            is_awaited: Arc::clone(&is_awaited),
        };
        let answer = Answer {
            reply: receiver,
            is_awaited,
        };
        (call, answer)
    }

    /// Answers, or gives the answer back: whoever asked has given up.
    pub(super) fn answer(&self, answer: T) -> Result<(), T> {
        // Held over the send: an answer is either taken or comes back, what it holds is never lost between.
        let is_awaited = locked(&self.is_awaited);
        if !*is_awaited {
            return Err(answer);
        }
        self.reply.send(answer).map_err(|unsent| unsent.0)?;
        self.notice.ring();
        Ok(())
    }
}

impl<T> Answer<T> {
    /// The answer, if it has come; as `patience` has it, waited for until `deadline`. After that it is given up, and the
    /// second is the answer.
    pub(super) fn poll(&self, patience: Patience, deadline: Instant) -> Option<Result<T, Unanswered>> {
        let left = deadline.saturating_duration_since(Instant::now());
        if patience == Patience::WithinLimit || left.is_zero() {
            return Some(match self.wait(left) {
                Some(Ok(answer)) => Ok(answer),
                Some(Err(Gone)) => Err(Unanswered::Gone),
                None => Err(Unanswered::Late),
            });
        }
        match self.reply.try_recv() {
            Ok(answer) => Some(Ok(answer)),
            Err(TryRecvError::Disconnected) => Some(Err(Unanswered::Gone)),
            Err(TryRecvError::Empty) => None,
        }
    }

    /// The answer, or `None` after `limit`: whenever the worker hears of it, it goes on as it was.
    pub(super) fn wait(&self, limit: Duration) -> Option<Result<T, Gone>> {
        match self.reply.recv_timeout(limit) {
            Ok(answer) => Some(Ok(answer)),
            Err(RecvTimeoutError::Disconnected) => Some(Err(Gone)),
            Err(RecvTimeoutError::Timeout) => {
                let mut is_awaited = locked(&self.is_awaited);
                *is_awaited = false;
                // It may have come just now.
                self.reply.try_recv().ok().map(Ok)
            }
        }
    }
}

/// Why there will be no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Unanswered {
    /// The thread of the worker has ended.
    Gone,
    /// The time was over. Whenever the worker hears of it, it goes on as it was.
    Late,
}

fn locked(flag: &Mutex<bool>) -> MutexGuard<'_, bool> {
    flag.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The sending end.
#[derive(Clone)]
pub(super) struct Mailbox {
    commands: Sender<Command>,
    bell: Arc<EventFd>,
}

/// The worker's end.
pub(super) struct Inbox {
    commands: Receiver<Command>,
    bell: Arc<EventFd>,
}

/// The thread of the worker has ended.
#[derive(Debug)]
pub(super) struct Gone;

impl Mailbox {
    /// Both ends.
    pub(super) fn new() -> io::Result<(Self, Inbox)> {
        let (sender, receiver) = channel();
        let bell = Arc::new(EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)?);
        let inbox = Inbox {
            commands: receiver,
            bell: Arc::clone(&bell),
        };
        Ok((
            Self {
                commands: sender,
                bell,
            },
            inbox,
        ))
    }

    /// Sends a command; the worker will see it, unless it is gone.
    pub(super) fn post(&self, command: Command) -> Result<(), Gone> {
        self.commands.send(command).map_err(|_| Gone)?;
        self.bell.write(1).map_err(|_| Gone)
    }
}

impl Inbox {
    /// The next command, if there is one.
    pub(super) fn take(&self) -> Option<Command> {
        self.commands.try_recv().ok()
    }

    /// The eventfd that is written after each command.
    pub(super) fn bell(&self) -> RawFd {
        self.bell.as_raw_fd()
    }
}
