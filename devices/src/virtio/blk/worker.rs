//! The thread of one disk, or of one queue of it: it waits in its reactor, serves its queues and obeys its commands.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use coracle_storage::backend::{Backend, Step};
use coracle_storage::reactor::{Patience, Token, Wake};
use coracle_storage::request::{Completion, Durability, Failure, Operation, Request};

use super::lane::{Drive, Lane, lane_of};
use super::mailbox::{Call, Command, Inbox, ReplaceReply, StopCall};
use super::polling::Polling;
use super::share::Share;
use crate::virtio::device::StopError;

/// How long a worker waits for its requests in flight before it refuses to stop.
pub(super) const DRAIN_MS_MAX: u64 = 10_000;

/// The watch of the inbox.
const BELL: Token = Token(0);
/// The tag of a request of the worker's own; no queue has so high a number.
const OWN: u64 = u64::MAX;

/// The state of a worker's thread.
///
/// ```text
///            Serve                     Stop                      drained
///   idle ───────────► serving ──────────────────► stopping ───────────────► idle, share given back
///                        ▲                            │
///                        └── drain_ms_max is over: Drain
/// ```
pub(super) struct Worker {
    drive: Drive,
    inbox: Inbox,
    service: Option<Service>,
    /// What the worker itself has asked of the image.
    own: Option<OwnRequest>,
    /// The image was flushed for the last time.
    is_flushed: bool,
    stopping: Option<Stopping>,
    wakes: Vec<Wake>,
    polling: Polling,
    patience: Patience,
    drain_ms_max: u64,
}

/// The queues of a share, being served.
struct Service {
    lanes: Vec<Lane>,
    /// The share without its queues.
    share: Share,
}

/// Who waits for a request of the worker's own.
enum OwnRequest {
    /// Whoever wants the image to grow.
    Grow(Sender<Result<(), Failure>>),
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

/// Whether the thread goes on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Life {
    GoesOn,
    Ends,
}

impl Worker {
    /// A worker that watches its inbox. Called on the thread that will run it.
    pub(super) fn new(mut drive: Drive, inbox: Inbox, drain_ms_max: u64) -> io::Result<Self> {
        drive.io.register(&drive.image.files())?;
        drive.io.watch(inbox.bell(), BELL)?;
        Ok(Self {
            drive,
            inbox,
            service: None,
            own: None,
            is_flushed: false,
            stopping: None,
            wakes: Vec::new(),
            polling: Polling::default(),
            patience: Patience::UntilEvent,
            drain_ms_max,
        })
    }

    /// Serves until it is retired.
    pub(super) fn run(mut self) {
        while let Life::GoesOn = self.round() {}
        self.leave();
    }

    /// Waits once, if there is nothing to do, and does what there is to do then.
    pub(super) fn round(&mut self) -> Life {
        let mut wakes = std::mem::take(&mut self.wakes);
        self.drive.io.set_timer(self.alarm());
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
        if rung {
            self.obey(now);
        }
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
    fn alarm(&self) -> Option<Instant> {
        let lanes = self.service.iter().flat_map(|service| &service.lanes);
        let throttled = lanes.filter_map(Lane::throttled_until);
        let drain = self.stopping.as_ref().map(|stopping| stopping.deadline);
        throttled.chain(drain).min()
    }

    /// After work there is often more: look for a while before asking for a kick.
    fn next_patience(&mut self, worked: bool, now: Instant) -> Patience {
        if worked {
            self.polling.worked();
            return Patience::None;
        }
        if self.stopping.is_none() && self.service.is_some() {
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

    fn complete(&mut self, completion: Completion, now: Instant) {
        if completion.request.tag == OWN {
            return self.complete_own(completion.outcome);
        }
        let lane = self
            .service
            .as_mut()
            .and_then(|service| service.lanes.get_mut(lane_of(&completion.request)));
        lane.expect("a share is given back when nothing of its queues is in flight")
            .complete(completion, &self.drive.metrics, now);
    }

    /// Takes what one event, or one start, has ended besides: any lane's.
    fn complete_others(&mut self, now: Instant) {
        while let Some(completion) = self.drive.image.next_completion() {
            self.complete(completion, now);
        }
    }

    /// Answers what completed, takes what has come, answers what needed no waiting.
    fn serve(&mut self, now: Instant) -> bool {
        let Some(service) = &mut self.service else {
            return false;
        };
        let mut worked = false;
        for lane in &mut service.lanes {
            lane.settle();
            if self.stopping.is_some() {
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
        while let Some(command) = self.inbox.take() {
            match command {
                Command::Serve(share) => self.begin(*share),
                Command::Stop(call) => self.stop_for(Purpose::GiveBack(call), now),
                Command::Retire => self.stop_for(Purpose::Retire, now),
                Command::Reconsider => {
                    for lane in self.service.iter_mut().flat_map(|service| &mut service.lanes) {
                        lane.reconsider(&self.drive, now);
                    }
                }
                Command::Replace(image, call) => self.replace_for(image, &call),
                Command::Grow(size_bytes, reply) => self.grow(size_bytes, reply),
            }
        }
    }

    fn begin(&mut self, mut share: Share) {
        assert!(
            self.service.is_none(),
            "the device starts a worker only when it is stopped"
        );
        let queues = std::mem::take(&mut share.queues).into_iter();
        let lanes: Vec<Lane> = queues
            .enumerate()
            .map(|(number, (index, queue))| Lane::new(number, index, queue, &share))
            .collect();
        for lane in &lanes {
            if let Err(error) = self.drive.io.watch(lane.queue().kick.as_raw_fd(), kick_of(lane)) {
                log::error!("a disk's worker cannot watch its queue's kick: {error}");
                share.interrupt.device_needs_reset();
            }
        }
        self.service = Some(Service { lanes, share });
    }

    fn stop_for(&mut self, purpose: Purpose, now: Instant) {
        let deadline = now + Duration::from_millis(self.drain_ms_max);
        self.stopping = Some(Stopping { purpose, deadline });
    }

    fn replace_for(&mut self, image: Box<dyn Backend>, call: &Call<ReplaceReply>) {
        let replaced = self.replace(image);
        // Whoever asked has given up, and the other workers of the disk have the old image.
        if let Err(Ok(old)) = call.answer(replaced) {
            let put_back = self.replace(old);
            put_back.expect("files that were registered a moment ago can be registered again");
        }
    }

    fn replace(&mut self, image: Box<dyn Backend>) -> io::Result<Box<dyn Backend>> {
        if self.service.is_some() || self.drive.image.in_flight() > 0 {
            return Err(io::ErrorKind::ResourceBusy.into());
        }
        // If this fails the old files are still registered, and the old image stays.
        self.drive.io.register(&image.files())?;
        Ok(std::mem::replace(&mut self.drive.image, image))
    }

    fn grow(&mut self, size_bytes: u64, reply: Sender<Result<(), Failure>>) {
        if self.own.is_some() {
            // Whoever asked may have given up. One at a time is enough: the caller asks again.
            let _ = reply.send(Err(Failure::Host(libc::EBUSY)));
            return;
        }
        self.start_own(Operation::Grow, size_bytes, OwnRequest::Grow(reply));
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
            OwnRequest::Grow(reply) => {
                // Whoever asked may have given up; the image is larger all the same.
                let _ = reply.send(outcome);
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

    /// Ends a stop that is drained, or that has taken too long.
    fn finish_stopping(&mut self, now: Instant) -> Life {
        let Some(stopping) = self.stopping.take() else {
            return Life::GoesOn;
        };
        let queued: usize = self.lanes().map(|lane| lane.in_flight()).sum();
        let in_flight = queued.max(self.drive.image.in_flight());
        if in_flight > 0 && now < stopping.deadline {
            self.stopping = Some(stopping);
            return Life::GoesOn;
        }
        match stopping.purpose {
            Purpose::Retire if in_flight == 0 && !self.is_flushed && self.drive.image.flushes_at_end() => {
                self.is_flushed = true;
                self.stopping = Some(stopping);
                self.start_own(Operation::Flush, 0, OwnRequest::LastFlush);
                if self.drive.image.in_flight() == 0 {
                    return Life::Ends;
                }
            }
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
        let share = self.service.take().map(|Service { lanes, mut share }| {
            for lane in lanes {
                if let Err(error) = self.drive.io.unwatch(kick_of(&lane)) {
                    log::error!("a disk's worker cannot take its watch back: {error}");
                }
                share.queues.push(lane.into_queue());
            }
            Box::new(share)
        });
        // Whoever asked has given up: the disk serves on, so that the share is not lost.
        if let Err(Ok(Some(share))) = call.answer(Ok(share)) {
            self.begin(*share);
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

/// The watch of a lane's kick.
fn kick_of(lane: &Lane) -> Token {
    Token(1 + lane.number() as u64)
}
