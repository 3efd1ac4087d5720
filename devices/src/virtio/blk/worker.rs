//! The thread of one disk, or of one queue of it: it waits in its reactor, serves its queues and obeys its commands.

use std::io;
use std::mem::ManuallyDrop;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use coracle_storage::backend::{Backend, Step};
use coracle_storage::reactor::{Patience, Token, Wake};
use coracle_storage::request::{Completion, Durability, Failure, Operation, Request};
use coracle_storage::threads;

use super::departure::{Departure, Whereabouts};
use super::lane::{Drive, Lane, lane_of};
use super::mailbox::{AskReply, Call, Command, Inbox, ReplaceReply, StopCall};
use super::polling::Polling;
use crate::virtio::device::{ActiveQueue, Session, StopError};

/// How long a worker waits for its requests in flight before it refuses to stop.
pub(super) const DRAIN_MS_MAX: u64 = 10_000;

/// The watch of the inbox.
const BELL: Token = Token(0);
/// The tag of a request of the worker's own; no queue has so high a number.
const OWN: u64 = u64::MAX;

/// How long an image that is replaced may take to leave in good order.
const LEAVE_MS_MAX: u64 = 1_000;

/// The state of a worker's thread.
///
/// ```text
///            Serve                     Stop                      drained
///   idle ───────────► serving ──────────────────► stopping ───────────────► idle, session given back
///    │ Replace           ▲                            │
///    ▼                   └── drain_ms_max is over: Drain; the disk is lost: Lost
///   replacing ── the old image has left, the new one is attached, or the old one again ──► idle
/// ```
///
/// A Retire goes through stopping too, and on: drained, flushed, the image has left, the thread ends. Of a lost disk
/// nothing is waited for but that the image lets its connection go.
pub(super) struct Worker {
    drive: Drive,
    inbox: Inbox,
    service: Option<Service>,
    /// What the worker itself has asked of the image.
    own: Option<OwnRequest>,
    /// The image was flushed for the last time.
    is_flushed: bool,
    stopping: Option<Stopping>,
    replacing: Option<Replacing>,
    /// The image is leaving the reactor: for another, or because the thread ends.
    departure: Option<Departure>,
    wakes: Vec<Wake>,
    polling: Polling,
    patience: Patience,
    drain_ms_max: u64,
}

/// The queues of a session, being served.
struct Service {
    lanes: Vec<Lane>,
    /// The session without its queues.
    session: Session,
}

/// Who waits for a request of the worker's own.
enum OwnRequest {
    /// Whoever asked.
    Asked(Call<AskReply>),
    /// The worker, to end.
    LastFlush,
}

/// Why nothing is taken from the queues any more.
struct Stopping {
    purpose: Purpose,
    deadline: Instant,
}

enum Purpose {
    GiveBack(StopCall),
    Retire,
}

/// What takes the place of the image once that has left, and who asked for it.
struct Replacing {
    image: Box<dyn Backend>,
    call: Call<ReplaceReply>,
}

/// Whether the thread goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Life {
    GoesOn,
    Ends,
}

/// The image of a worker that cannot begin, and why that is. It is for others to let it go.
pub(super) struct StillBorn {
    pub(super) image: Box<dyn Backend>,
    pub(super) error: io::Error,
}

impl Worker {
    /// A worker that watches its inbox. Called on the thread that will run it.
    pub(super) fn new(mut drive: Drive, inbox: Inbox, drain_ms_max: u64) -> Result<Self, StillBorn> {
        let files = drive.image.files();
        let begun = drive.io.register(&files);
        if let Err(error) = begun.and_then(|()| drive.io.watch(inbox.bell(), BELL)) {
            return Err(StillBorn {
                image: drive.image,
                error,
            });
        }
        drive.image.attach(drive.io.as_mut());
        Ok(Self {
            drive,
            inbox,
            service: None,
            own: None,
            is_flushed: false,
            stopping: None,
            replacing: None,
            departure: None,
            wakes: Vec::new(),
            polling: Polling::default(),
            patience: Patience::UntilEvent,
            drain_ms_max,
        })
    }

    /// Serves until it is retired, and leaves its images: to let one go may be to remove the records of its lease, for which this
    /// thread has no leave.
    pub(super) fn run(mut self) -> Vec<Box<dyn Backend>> {
        while let Life::GoesOn = self.round() {}
        self.leave()
    }

    /// Waits once, if there is nothing to do, and does what there is to do then.
    pub(super) fn round(&mut self) -> Life {
        let mut wakes = std::mem::take(&mut self.wakes);
        self.drive.image.before_wait(self.drive.io.as_mut());
        self.drive.io.set_timer(self.alarm(self.drive.io.now()));
        if let Err(error) = self.drive.io.wait(self.patience, &mut wakes) {
            log::error!("a disk's worker cannot wait for its requests any more: {error}");
            return Life::Ends;
        }
        let now = self.drive.io.now();
        self.polling.woke(now);
        let woken = !wakes.is_empty();
        if woken {
            self.lanes().for_each(Lane::wake);
        }
        let rung = self.absorb(&mut wakes, now);
        self.wakes = wakes;
        if woken {
            self.look_after_image(now);
        }
        if rung {
            self.obey(now);
        }
        self.go_on_replacing(now);
        let worked = self.serve(now);
        if let Life::Ends = self.finish_stopping(now) {
            return Life::Ends;
        }
        self.patience = self.next_patience(woken || worked, now);
        Life::GoesOn
    }

    fn lanes(&mut self) -> impl Iterator<Item = &mut Lane> {
        self.service.iter_mut().flat_map(|service| &mut service.lanes)
    }

    /// The next time at which something is due without an event.
    fn alarm(&self, now: Instant) -> Option<Instant> {
        let lanes = self.service.iter().flat_map(|service| &service.lanes);
        let throttled = lanes.filter_map(Lane::throttled_until);
        let departure = match &self.departure {
            Some(departure) => departure.alarm(now),
            None => self.stopping.as_ref().map(|stopping| stopping.deadline),
        };
        throttled.chain(departure).chain(self.drive.image.alarm()).min()
    }

    /// Whether the image serves nobody any more.
    fn is_lost(&self) -> bool {
        self.drive.loss.reason().is_some()
    }

    /// After work there is often more: look for a while before asking for a kick.
    fn next_patience(&mut self, worked: bool, now: Instant) -> Patience {
        if worked {
            self.polling.worked();
            return Patience::None;
        }
        if self.stopping.is_none() && self.service.is_some() && !self.is_lost() {
            if self.polling.looks_on(now) {
                std::hint::spin_loop();
                return Patience::None;
            }
            if !self.lanes().all(Lane::rest) {
                return Patience::None;
            }
        }
        self.polling.sleeps(now);
        Patience::UntilEvent
    }

    /// Takes wake-ups in; says whether the bell rang.
    fn absorb(&mut self, wakes: &mut Vec<Wake>, now: Instant) -> bool {
        let mut rung = false;
        for wake in wakes.drain(..) {
            match wake {
                Wake::Done(event) => {
                    let step = self.drive.image.resume(event, self.drive.io.as_mut());
                    if let Step::Done(completion) = step {
                        self.complete(completion, now);
                    }
                    self.complete_others(now);
                }
                Wake::Signalled(BELL) => rung = true,
                Wake::Signalled(_kick) => self.drive.metrics.queue_event_count.add(1),
                // Whatever was due is looked at in each round.
                Wake::TimerExpired => {}
            }
        }
        rung
    }

    /// Lets the image take the time in when its alarm is due, and tells of its loss.
    fn look_after_image(&mut self, now: Instant) {
        if self.drive.image.alarm().is_some_and(|alarm| alarm <= now) {
            self.drive.image.wake(self.drive.io.as_mut());
            self.complete_others(now);
        }
        if let Some(reason) = self.drive.image.loss() {
            self.drive.loss.signal(reason);
        }
    }

    fn complete(&mut self, completion: Completion, now: Instant) {
        if completion.request.tag == OWN {
            return self.complete_own(completion.outcome);
        }
        let lane = self
            .service
            .as_mut()
            .and_then(|service| service.lanes.get_mut(lane_of(&completion.request)));
        lane.expect("a session is given back when nothing of its queues is in flight")
            .complete(completion, &self.drive, now);
    }

    /// Takes what one event, or one start, has ended besides: any lane's.
    fn complete_others(&mut self, now: Instant) {
        while let Some(completion) = self.drive.image.next_completion() {
            self.complete(completion, now);
        }
    }

    /// Answers what completed, takes what has come, answers what needed no waiting.
    fn serve(&mut self, now: Instant) -> bool {
        let takes_nothing = self.stopping.is_some() || self.is_lost();
        let Some(service) = &mut self.service else {
            return false;
        };
        let mut worked = false;
        for lane in &mut service.lanes {
            lane.settle();
            if takes_nothing {
                lane.put_back_held(&self.drive);
            } else {
                worked |= lane.take(&mut self.drive, now);
            }
        }
        self.complete_others(now);
        self.lanes().for_each(Lane::settle);
        worked
    }

    fn obey(&mut self, now: Instant) {
        // While an image leaves, whatever is asked is asked of the one that comes.
        while self.replacing.is_none()
            && let Some(command) = self.inbox.take()
        {
            match command {
                Command::Serve(session) => self.begin(*session),
                Command::Stop(call) => self.stop_for(Purpose::GiveBack(call), now),
                Command::Retire => self.stop_for(Purpose::Retire, now),
                Command::Reconsider => {
                    for lane in self.service.iter_mut().flat_map(|service| &mut service.lanes) {
                        lane.reconsider(&self.drive, now);
                    }
                }
                Command::Replace(image, call) => self.replace(image, call, now),
                Command::Ask(operation, len_bytes, call) => self.ask(operation, len_bytes, call),
            }
        }
    }

    fn begin(&mut self, mut session: Session) {
        assert!(
            self.service.is_none(),
            "the device starts a worker only when it is stopped"
        );
        let places = session.queues.iter_mut().enumerate();
        let queues: Vec<(usize, ActiveQueue)> = places
            .filter_map(|(index, place)| Some((index, place.take()?)))
            .collect();
        let lanes: Vec<Lane> = queues
            .into_iter()
            .enumerate()
            .map(|(number, (index, queue))| Lane::new(number, index, queue, &session))
            .collect();
        for lane in &lanes {
            if let Err(error) = self.drive.io.watch(lane.queue().kick.as_raw_fd(), kick_of(lane)) {
                log::error!("a disk's worker cannot watch its queue's kick: {error}");
                session.interrupt.device_needs_reset();
            }
        }
        self.service = Some(Service { lanes, session });
    }

    fn stop_for(&mut self, purpose: Purpose, now: Instant) {
        let deadline = now + Duration::from_millis(self.drain_ms_max);
        self.stopping = Some(Stopping { purpose, deadline });
    }

    fn replace(&mut self, image: Box<dyn Backend>, call: Call<ReplaceReply>, now: Instant) {
        if self.service.is_some() || self.drive.image.in_flight() > 0 || self.is_lost() {
            // Whoever asked is told, or has given up; nothing has changed either way.
            let _ = call.answer(Err(io::ErrorKind::ResourceBusy.into()));
            let_go(image);
            return;
        }
        if image.reach() > self.drive.io.reach() {
            // It would try for ever to connect, or ask for what its thread may not.
            let _ = call.answer(Err(io::ErrorKind::Unsupported.into()));
            let_go(image);
            return;
        }
        let until = now + Duration::from_millis(LEAVE_MS_MAX);
        // Its lease is released in good order, as far as that takes no longer.
        self.departure = Some(Departure::in_good_order(&mut self.drive, until));
        self.replacing = Some(Replacing { image, call });
        self.go_on_replacing(now);
    }

    /// Puts the next image into the place of one that has left.
    fn go_on_replacing(&mut self, now: Instant) {
        let (Some(departure), Some(_)) = (&mut self.departure, &self.replacing) else {
            return;
        };
        // Whoever asked gives up on one that is stuck. Without an end of what is in flight there is no other image.
        if departure.whereabouts(&mut self.drive, now) != Whereabouts::Left {
            return;
        }
        self.departure = None;
        if let Some(Replacing { image, call }) = self.replacing.take() {
            let replaced = self.exchange(image);
            // Whoever asked has given up, and the other workers of the disk have the old image.
            if let Err(Ok(old)) = call.answer(replaced) {
                let put_back = self.exchange(old);
                let_go(put_back.expect("files that were registered a moment ago can be registered again"));
            }
            self.drive.image.attach(self.drive.io.as_mut());
        }
        self.obey(now);
    }

    /// Uses the files of `image`; neither it nor the old one is attached.
    fn exchange(&mut self, image: Box<dyn Backend>) -> io::Result<Box<dyn Backend>> {
        // If this fails the old files are still registered, and the old image stays.
        if let Err(error) = self.drive.io.register(&image.files()) {
            let_go(image);
            return Err(error);
        }
        Ok(std::mem::replace(&mut self.drive.image, image))
    }

    fn ask(&mut self, operation: Operation, len_bytes: u64, call: Call<AskReply>) {
        if self.own.is_some() {
            // Whoever asked may have given up. One at a time is enough: the caller asks again.
            let _ = call.answer(Err(Failure::Host(libc::EBUSY)));
            return;
        }
        self.start_own(operation, len_bytes, OwnRequest::Asked(call));
    }

    /// Asks the image for something on the worker's own account.
    fn start_own(&mut self, operation: Operation, len_bytes: u64, own: OwnRequest) {
        let request = Request {
            tag: OWN,
            operation,
            offset_bytes: 0,
            len_bytes,
            durability: Durability::Durable,
            segments: Vec::new(),
        };
        self.own = Some(own);
        match self.drive.image.start(request, self.drive.io.as_mut()) {
            Step::Pending => {}
            Step::Done(completion) => self.complete_own(completion.outcome),
            Step::Busy(_) => self.complete_own(Err(Failure::Host(libc::EBUSY))),
        }
        self.complete_others(self.drive.io.now());
    }

    fn complete_own(&mut self, outcome: Result<(), Failure>) {
        let own = self.own.take();
        match own.expect("an image ends each request once, and there is one of our own at most") {
            OwnRequest::Asked(call) => {
                // Whoever asked may have given up; it is done all the same.
                let _ = call.answer(outcome);
            }
            OwnRequest::LastFlush => {
                if let Err(error) = outcome {
                    log::error!(
                        "a disk's last flush failed, and with it what was not flushed before: {error}"
                    );
                }
            }
        }
    }

    /// Ends a stop that is drained, that has taken too long, or that nobody need wait for.
    fn finish_stopping(&mut self, now: Instant) -> Life {
        let Some(stopping) = self.stopping.take() else {
            return Life::GoesOn;
        };
        let queued: usize = self.lanes().map(|lane| lane.in_flight()).sum();
        let in_flight = queued.max(self.drive.image.in_flight());
        if in_flight > 0 && now < stopping.deadline && !self.is_lost() {
            self.stopping = Some(stopping);
            return Life::GoesOn;
        }
        let Purpose::GiveBack(call) = stopping.purpose else {
            return self.finish_retiring(stopping, in_flight, now);
        };
        let obstacle = match self.drive.loss.reason() {
            Some(reason) => Some(StopError::Lost {
                reason: reason.to_owned(),
            }),
            None if in_flight > 0 => Some(StopError::Drain {
                in_flight,
                limit_ms: self.drain_ms_max,
            }),
            None => None,
        };
        match obstacle {
            Some(error) => {
                // Whoever asked is told, or has given up; the disk goes on as it was either way.
                let _ = call.answer(Err(error));
            }
            None => self.give_back(&call),
        }
        Life::GoesOn
    }

    /// Goes on to end the thread: nothing is in flight, or it is not waited for.
    fn finish_retiring(&mut self, stopping: Stopping, in_flight: usize, now: Instant) -> Life {
        if self.departure.is_none() {
            if self.is_lost() {
                self.departure = Some(Departure::by_force(&mut self.drive, now));
            } else if in_flight > 0 {
                return Life::Ends;
            } else if !self.is_flushed && self.drive.image.flushes_at_end() {
                self.is_flushed = true;
                self.start_own(Operation::Flush, 0, OwnRequest::LastFlush);
            }
        }
        // The last flush may have ended at once, or have been refused.
        if self.departure.is_none() && self.drive.image.in_flight() == 0 {
            self.departure = Some(Departure::in_good_order(&mut self.drive, stopping.deadline));
        }
        self.stopping = Some(stopping);
        let whereabouts = self
            .departure
            .as_mut()
            .map(|departure| departure.whereabouts(&mut self.drive, now));
        match whereabouts {
            None | Some(Whereabouts::Leaving) => Life::GoesOn,
            Some(Whereabouts::Left | Whereabouts::Stuck) => Life::Ends,
        }
    }

    fn give_back(&mut self, call: &StopCall) {
        let session = self.service.take().map(|Service { lanes, mut session }| {
            for lane in lanes {
                if let Err(error) = self.drive.io.unwatch(kick_of(&lane)) {
                    log::error!("a disk's worker cannot take its watch back: {error}");
                }
                let (index, queue) = lane.into_queue();
                if let Some(place) = session.queues.get_mut(index) {
                    *place = Some(queue);
                }
            }
            Box::new(session)
        });
        // Whoever asked has given up: the disk serves on, so that the session is not lost.
        if let Err(Ok(Some(session))) = call.answer(Ok(session)) {
            self.begin(*session);
        }
    }

    /// Memory that the kernel may still write to outlives the worker.
    fn leave(mut self) -> Vec<Box<dyn Backend>> {
        // What a lost image still has will never be the kernel's.
        let requests = match self.is_lost() {
            true => 0,
            false => self.drive.image.in_flight(),
        };
        if requests > 0 || self.drive.image.is_attached() {
            log::error!("{requests} disk requests are abandoned, with the memory they use");
            std::mem::forget(self);
            return Vec::new();
        }
        let mut images: Vec<_> = self.replacing.take().map(|next| next.image).into_iter().collect();
        while let Some(command) = self.inbox.take() {
            if let Command::Replace(image, _) = command {
                images.push(image);
            }
        }
        images.push(self.drive.image);
        images
    }
}

/// Lets an image go that nobody waits for, on a thread that may do what its lease asks for.
fn let_go(image: Box<dyn Backend>) {
    // Where there is no thread to be had, its records stay, and its lease is one of a process that has ended.
    let image = ManuallyDrop::new(image);
    let dropped = threads::spawn(threads::Kind::Mover, "close", move || {
        drop(ManuallyDrop::into_inner(image));
    });
    if let Err(error) = dropped {
        log::warn!("no thread is to be had to close an image that has been replaced: {error}");
    }
}

/// The watch of a lane's kick.
fn kick_of(lane: &Lane) -> Token {
    Token(1 + lane.number() as u64)
}
