//! The thread of one disk: it waits in its reactor, serves its queue and obeys its commands.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use coracle_storage::backend::Backend;
use coracle_storage::limit::RateLimiterConfig;
use coracle_storage::reactor::{Patience, Token, Wake};
use vmm_sys_util::eventfd::EventFd;

use super::lane::{Drive, Lane};
use crate::virtio::device::{Session, StopError};

/// What may be asked of a worker.
pub(super) enum Command {
    /// Serve the queue of this session from now on.
    Serve(Box<Session>),
    /// Quiesce and give the session back.
    Stop(StopCall),
    /// Use another image; only while nothing is served.
    Replace(Box<dyn Backend>, Sender<io::Result<()>>),
    /// Change the limits.
    Limit(RateLimiterConfig),
    /// Quiesce and end the thread.
    Retire,
}

/// The session, `None` if nothing was served; or why it could not be given back.
pub(super) type StopReply = Result<Option<Box<Session>>, StopError>;

/// The worker's end of a wish to stop.
pub(super) struct StopCall {
    reply: Sender<StopReply>,
    is_awaited: Arc<Mutex<bool>>,
}

/// The other end: where the answer is waited for.
pub(super) struct StopAnswer {
    reply: Receiver<StopReply>,
    is_awaited: Arc<Mutex<bool>>,
}

impl StopCall {
    pub(super) fn new() -> (Self, StopAnswer) {
        let (sender, receiver) = channel();
        let is_awaited = Arc::new(Mutex::new(true));
        let call = Self {
            reply: sender,
            is_awaited: Arc::clone(&is_awaited),
        };
        let answer = StopAnswer {
            reply: receiver,
            is_awaited,
        };
        (call, answer)
    }

    /// Answers, or gives the answer back: whoever asked has given up.
    fn answer(&self, answer: StopReply) -> Result<(), StopReply> {
        // Held over the send: an answer is either taken or comes back, a session is never lost between.
        let is_awaited = locked(&self.is_awaited);
        if !*is_awaited {
            return Err(answer);
        }
        self.reply.send(answer).map_err(|unsent| unsent.0)
    }
}

impl StopAnswer {
    /// The answer, or `None` after `limit`: the worker then goes on serving, whenever it hears of it.
    pub(super) fn wait(&self, limit: Duration) -> Option<StopReply> {
        match self.reply.recv_timeout(limit) {
            Ok(answer) => Some(answer),
            Err(RecvTimeoutError::Disconnected) => Some(Err(StopError::WorkerGone)),
            Err(RecvTimeoutError::Timeout) => {
                let mut is_awaited = locked(&self.is_awaited);
                *is_awaited = false;
                // It may have come just now.
                self.reply.try_recv().ok()
            }
        }
    }
}

fn locked(flag: &Mutex<bool>) -> MutexGuard<'_, bool> {
    flag.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The way to a worker: a command, and a nudge that ends its wait.
#[derive(Clone)]
pub(super) struct Mailbox {
    commands: Sender<Command>,
    bell: Arc<EventFd>,
}

/// The other end of a [`Mailbox`].
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

/// How long a worker waits for its requests in flight before it refuses to stop.
pub(super) const DRAIN_MS_MAX: u64 = 10_000;

/// The watches of a worker.
const BELL: Token = Token(0);
const KICK: Token = Token(1);

/// The state of a worker's thread.
///
/// ```text
///            Serve                     Stop                      drained
///   idle ───────────► serving ──────────────────► stopping ───────────────► idle, session given back
///                        ▲                            │
///                        └── drain_ms_max is over: Drain
/// ```
pub(super) struct Worker {
    drive: Drive,
    inbox: Inbox,
    lane: Option<Lane>,
    stopping: Option<Stopping>,
    wakes: Vec<Wake>,
    drain_ms_max: u64,
}

/// Why nothing is taken from the queue any more.
struct Stopping {
    purpose: Purpose,
    deadline: Instant,
}

enum Purpose {
    GiveBack(StopCall),
    Retire,
}

/// Whether the thread goes on.
enum Life {
    GoesOn,
    Ends,
}

impl Worker {
    /// A worker that watches its inbox. Called on the thread that will run it.
    pub(super) fn new(mut drive: Drive, inbox: Inbox, drain_ms_max: u64) -> io::Result<Self> {
        drive.io.register(&drive.image.files())?;
        drive.io.watch(inbox.bell.as_raw_fd(), BELL)?;
        Ok(Self {
            drive,
            inbox,
            lane: None,
            stopping: None,
            wakes: Vec::new(),
            drain_ms_max,
        })
    }

    /// Serves until it is retired.
    pub(super) fn run(mut self) {
        let mut patience = Patience::UntilEvent;
        loop {
            let mut wakes = std::mem::take(&mut self.wakes);
            self.drive.io.set_timer(self.alarm());
            if let Err(error) = self.drive.io.wait(patience, &mut wakes) {
                log::error!("a disk's worker cannot wait for its requests any more: {error}");
                return self.leave();
            }
            let now = self.drive.io.now();
            let woken = !wakes.is_empty();
            if let (true, Some(lane)) = (woken, &mut self.lane) {
                lane.wake();
            }
            let rung = self.absorb(&mut wakes, now);
            self.wakes = wakes;
            if rung {
                self.obey(now);
            }
            let worked = self.serve(now);
            if let Life::Ends = self.finish_stopping(now) {
                return self.leave();
            }
            patience = self.patience(woken || worked);
        }
    }

    /// The next time at which something is due without an event.
    fn alarm(&self) -> Option<Instant> {
        let throttled = self.lane.as_ref().and_then(Lane::throttled_until);
        let drain = self.stopping.as_ref().map(|stopping| stopping.deadline);
        throttled.into_iter().chain(drain).min()
    }

    /// After work there is often more: look once without waiting before asking for a kick, which
    /// costs the guest an exit.
    fn patience(&mut self, worked: bool) -> Patience {
        if worked {
            return Patience::None;
        }
        let rests = match &mut self.lane {
            Some(lane) if self.stopping.is_none() => lane.rest(),
            _ => true,
        };
        if rests {
            Patience::UntilEvent
        } else {
            Patience::None
        }
    }

    /// Takes wake-ups in; says whether the bell rang.
    fn absorb(&mut self, wakes: &mut Vec<Wake>, now: Instant) -> bool {
        let mut rung = false;
        for wake in wakes.drain(..) {
            match (wake, &mut self.lane) {
                (Wake::Done(event), Some(lane)) => lane.resume(event, &mut self.drive, now),
                (Wake::Done(event), None) => panic!("an operation ended while nothing was served: {event:?}"),
                (Wake::Signalled(KICK), Some(_)) => self.drive.metrics.queue_event_count.add(1),
                (Wake::Signalled(token), _) => rung |= token == BELL,
                // Whatever was due is looked at in each round.
                (Wake::TimerExpired, _) => {}
            }
        }
        rung
    }

    /// Answers what completed, takes what has come, answers what needed no waiting.
    fn serve(&mut self, now: Instant) -> bool {
        let Some(lane) = &mut self.lane else {
            return false;
        };
        lane.settle();
        let worked = if self.stopping.is_some() {
            lane.put_back_held();
            false
        } else {
            lane.take(&mut self.drive, now)
        };
        lane.settle();
        worked
    }

    fn obey(&mut self, now: Instant) {
        while let Ok(command) = self.inbox.commands.try_recv() {
            match command {
                Command::Serve(session) => self.begin(*session),
                Command::Stop(call) => self.stop_for(Purpose::GiveBack(call), now),
                Command::Retire => self.stop_for(Purpose::Retire, now),
                Command::Limit(config) => {
                    self.drive.limiter.update(&config, now);
                    if let Some(lane) = &mut self.lane {
                        lane.reconsider(now);
                    }
                }
                Command::Replace(image, reply) => {
                    let replaced = self.replace(image);
                    // Whoever asked may have given up; the image is in use all the same.
                    let _ = reply.send(replaced);
                }
            }
        }
    }

    fn begin(&mut self, session: Session) {
        assert!(
            self.lane.is_none(),
            "the device starts a worker only when it is stopped"
        );
        let interrupt = session.interrupt.clone();
        let Ok(lane) = Lane::new(session) else {
            panic!("the device checks that the queue is ready before it starts its worker");
        };
        let watched = self.drive.io.watch(lane.queue().kick.as_raw_fd(), KICK);
        self.lane = Some(lane);
        if let Err(error) = watched {
            log::error!("a disk's worker cannot watch its queue's kick: {error}");
            interrupt.device_needs_reset();
        }
    }

    fn stop_for(&mut self, purpose: Purpose, now: Instant) {
        let deadline = now + Duration::from_millis(self.drain_ms_max);
        self.stopping = Some(Stopping { purpose, deadline });
    }

    fn replace(&mut self, image: Box<dyn Backend>) -> io::Result<()> {
        if self.lane.is_some() {
            return Err(io::ErrorKind::ResourceBusy.into());
        }
        // If this fails the old files are still registered, and the old image stays.
        self.drive.io.register(&image.files())?;
        self.drive.image = image;
        Ok(())
    }

    /// Ends a stop that is drained, or that has taken too long.
    fn finish_stopping(&mut self, now: Instant) -> Life {
        let Some(stopping) = self.stopping.take() else {
            return Life::GoesOn;
        };
        let in_flight = self.lane.as_ref().map_or(0, Lane::in_flight);
        if in_flight > 0 && now < stopping.deadline {
            self.stopping = Some(stopping);
            return Life::GoesOn;
        }
        match stopping.purpose {
            Purpose::Retire => return Life::Ends,
            Purpose::GiveBack(call) if in_flight > 0 => {
                let limit_ms = self.drain_ms_max;
                // Whoever asked is told, or has given up; the disk goes on serving either way.
                let _ = call.answer(Err(StopError::Drain { in_flight, limit_ms }));
            }
            Purpose::GiveBack(call) => self.give_back(&call),
        }
        Life::GoesOn
    }

    fn give_back(&mut self, call: &StopCall) {
        let session = self.lane.take().map(|lane| Box::new(lane.into_session()));
        if session.is_some()
            && let Err(error) = self.drive.io.unwatch(KICK)
        {
            log::error!("a disk's worker cannot take its watch back: {error}");
        }
        // Whoever asked has given up: the disk serves on, so that the session is not lost.
        if let Err(Ok(Some(session))) = call.answer(Ok(session)) {
            self.begin(*session);
        }
    }

    /// Ends the thread. Memory that the kernel may still write to outlives it.
    fn leave(self) {
        if self.drive.image.in_flight() > 0 {
            log::error!(
                "{} disk requests are abandoned, with the memory they use",
                self.drive.image.in_flight()
            );
            std::mem::forget(self);
        }
    }
}
