//! An image for a thread that waits: many requests at a time, on io_uring where the host has it.

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::error::Error;
use std::io;
use std::os::fd::RawFd;
use std::time::{Duration, Instant};

use crate::backend::{Backend, Geometry, Parting, Step};
use crate::engine::PreparedReactor;
use crate::plain::Plain;
use crate::reactor::{Patience, Reactor, Token, Wake};
use crate::request::{Completion, Request};
use crate::ring::PreparedRing;

/// Kernel workers that one pipeline may start for operations on files.
const FILE_WORKERS_MAX: u32 = 2;

/// Operations that an image may have in flight of its own, beside those of requests.
const OWN_OPS_MAX: u32 = 64;

/// How long an image may take to end what is in flight, to leave for another reactor, and then to break off.
const PARTING_MAX: Duration = Duration::from_secs(5);

/// A pipeline that is not bound to a thread yet: the thread that will use it calls [`PreparedPipeline::bind`].
pub struct PreparedPipeline {
    image: Box<dyn Backend>,
    reactor: PreparedReactor,
    depth: usize,
}

/// An image, and the reactor that serves it, on the thread that has bound it.
///
/// ```text
///   start(request) ──► in flight ──► next() == Completed, once per request and in any order
/// ```
///
/// When it is dropped nothing of the kernel's uses the memory of its requests any more.
pub struct Pipeline {
    /// Dropped first: it waits for the kernel, which may use memory of the image.
    io: Box<dyn Reactor>,
    /// There until it is given back.
    image: Option<Box<dyn Backend>>,
    depth: usize,
    /// Requests that were started and have not been handed out.
    taken: usize,
    /// Of them: those that the image had no room for yet, in order.
    held: VecDeque<Request>,
    /// Of them: those that have ended.
    ended: VecDeque<Completion>,
    watched: usize,
    /// Descriptors that have become readable since they were last handed out.
    signalled: VecDeque<RawFd>,
    wakes: Vec<Wake>,
}

/// What [`Pipeline::next`] has waited for.
#[derive(Debug)]
pub enum Next {
    /// A request has ended.
    Completed(Completion),
    /// A watched descriptor is readable. Whoever is told reads all that is there.
    Signalled(RawFd),
    /// Nothing has happened within the limit.
    TimedOut,
}

/// Why a pipeline is of no use any more. What is in flight then has no end.
#[derive(Debug, thiserror::Error)]
pub enum PipelineError {
    /// The image serves nobody any more.
    #[error("the image is lost: {0}")]
    Lost(String),
    /// The kernel cannot carry the wait out.
    #[error("cannot wait for the storage any more")]
    Wait(#[source] io::Error),
}

impl PreparedPipeline {
    /// Sets up what takes `depth` requests at a time on `image`, in which nothing is in flight. Where io_uring is not to be had
    /// it says why in the log, and prepares plain system calls, which do one after the other.
    pub fn new(image: Box<dyn Backend>, depth: u16) -> Self {
        let (ops_max, reach) = (u32::from(depth) * 2 + OWN_OPS_MAX, image.reach());
        let reactor = match PreparedRing::with_workers(ops_max, reach, FILE_WORKERS_MAX) {
            Ok(ring) => PreparedReactor::Ring(Box::new(ring)),
            Err(reason) => {
                let cause = reason.source().map(|cause| format!(" ({cause})"));
                let cause = cause.unwrap_or_default();
                log::warn!(
                    "an image is read and written by plain system calls, which is slower: {reason}{cause}"
                );
                PreparedReactor::Plain { ops_max, reach }
            }
        };
        Self {
            image,
            reactor,
            depth: usize::from(depth),
        }
    }

    /// Binds the pipeline to the calling thread.
    ///
    /// # Errors
    ///
    /// When the kernel refuses, or the image has more files than a reactor takes.
    pub fn bind(self) -> io::Result<Pipeline> {
        Pipeline::on(self.reactor.enable()?, self.image, self.depth)
    }
}

impl Pipeline {
    /// Takes `image`, in which nothing is in flight, for the calling thread and `depth` requests at a time.
    ///
    /// # Errors
    ///
    /// As [`PreparedPipeline::bind`].
    pub fn new(image: Box<dyn Backend>, depth: u16) -> io::Result<Self> {
        PreparedPipeline::new(image, depth).bind()
    }

    /// The same on plain system calls, one after the other: for what no ring makes faster.
    ///
    /// # Errors
    ///
    /// When the image has more files than a reactor takes.
    pub fn plain(image: Box<dyn Backend>, depth: u16) -> io::Result<Self> {
        let ops_max = u32::from(depth) * 2 + OWN_OPS_MAX;
        Self::on(Box::new(Plain::new(ops_max)), image, usize::from(depth))
    }

    fn on(mut io: Box<dyn Reactor>, mut image: Box<dyn Backend>, depth: usize) -> io::Result<Self> {
        io.register(&image.files())?;
        image.attach(io.as_mut());
        Ok(Self {
            io,
            image: Some(image),
            depth,
            taken: 0,
            held: VecDeque::new(),
            ended: VecDeque::new(),
            watched: 0,
            signalled: VecDeque::new(),
            wakes: Vec::new(),
        })
    }

    /// The shape of the image now.
    pub fn geometry(&self) -> Geometry {
        self.image.as_ref().expect(IMAGE_IS_THERE).geometry()
    }

    /// How many requests were started, and not handed out by [`Self::next`].
    pub fn in_flight(&self) -> usize {
        self.taken
    }

    /// Whether another request may be started.
    pub fn has_room(&self) -> bool {
        self.taken < self.depth
    }

    /// Takes a request on. The kernel hears of it with the next [`Self::submit`] or [`Self::next`].
    ///
    /// # Panics
    ///
    /// When there is no room.
    pub fn start(&mut self, request: Request) {
        assert!(self.has_room(), "whoever starts a request has looked for room");
        self.taken += 1;
        self.held.push_back(request);
        self.offer_held();
    }

    /// Hands what was started to the kernel, and waits for nothing.
    ///
    /// # Errors
    ///
    /// When the pipeline is of no use any more.
    pub fn submit(&mut self) -> Result<(), PipelineError> {
        self.turn(Patience::None, None)
    }

    /// From now on [`Self::next`] tells when `fd` becomes readable, or is already. The caller keeps it open as long as the
    /// pipeline lives.
    ///
    /// # Errors
    ///
    /// When too many are watched, or the kernel refuses the descriptor.
    pub fn watch(&mut self, fd: RawFd) -> io::Result<()> {
        let number = u64::try_from(fd).map_err(|_| io::Error::from_raw_os_error(libc::EBADF))?;
        self.io.watch_readable(fd, Token(number))?;
        self.watched += 1;
        Ok(())
    }

    /// Waits until something happens, but no longer than `limit`, and says what. Descriptors come before requests.
    ///
    /// # Errors
    ///
    /// When the pipeline is of no use any more.
    ///
    /// # Panics
    ///
    /// When nothing could ever end the wait.
    pub fn next(&mut self, limit: Option<Duration>) -> Result<Next, PipelineError> {
        let end = limit.map(|limit| self.io.now() + limit);
        assert!(
            self.taken > 0 || self.watched > 0 || end.is_some(),
            "whoever waits has started a request, watches something or sets a limit"
        );
        loop {
            if let Some(next) = self.ready() {
                return Ok(next);
            }
            self.check_loss()?;
            if end.is_some_and(|end| end <= self.io.now()) {
                // What has happened already is told, however short the limit.
                self.turn(Patience::None, None)?;
                return Ok(self.ready().unwrap_or(Next::TimedOut));
            }
            self.turn(Patience::UntilEvent, end)?;
        }
    }

    /// Gives the image back, which goes on with another reactor as it is.
    ///
    /// # Panics
    ///
    /// When a request was started and not handed out.
    pub fn into_image(mut self) -> Box<dyn Backend> {
        assert!(
            self.taken == 0,
            "an image is given back when nothing is in flight"
        );
        self.part(Parting::Moves);
        if self.image().is_attached() {
            self.part(Parting::Breaks);
        }
        self.image.take().expect(IMAGE_IS_THERE)
    }

    fn ready(&mut self) -> Option<Next> {
        if let Some(fd) = self.signalled.pop_front() {
            return Some(Next::Signalled(fd));
        }
        let completion = self.ended.pop_front()?;
        self.taken -= 1;
        Some(Next::Completed(completion))
    }

    /// Lets the kernel and the image go on; waits for one event, or until `end`, if `patience` says so.
    fn turn(&mut self, patience: Patience, end: Option<Instant>) -> Result<(), PipelineError> {
        let image = self.image.as_mut().expect(IMAGE_IS_THERE);
        image.before_wait(self.io.as_mut());
        let alarm = image.alarm();
        self.io.set_timer(alarm.into_iter().chain(end).min());
        let mut wakes = std::mem::take(&mut self.wakes);
        let waited = self.io.wait(patience, &mut wakes);
        for wake in wakes.drain(..) {
            self.absorb(wake);
        }
        self.wakes = wakes;
        let now = self.io.now();
        let image = self.image.as_mut().expect(IMAGE_IS_THERE);
        if image.alarm().is_some_and(|alarm| alarm <= now) {
            image.wake(self.io.as_mut());
            self.take_others();
        }
        self.offer_held();
        waited.map_err(PipelineError::Wait)?;
        self.check_loss()
    }

    fn check_loss(&mut self) -> Result<(), PipelineError> {
        match self.image().loss() {
            Some(reason) => Err(PipelineError::Lost(reason.to_owned())),
            None => Ok(()),
        }
    }

    fn absorb(&mut self, wake: Wake) {
        match wake {
            Wake::Done(event) => {
                let image = self.image.as_mut().expect(IMAGE_IS_THERE);
                if let Step::Done(completion) = image.resume(event, self.io.as_mut()) {
                    self.ended.push_back(completion);
                }
                self.take_others();
            }
            Wake::Signalled(Token(number)) => {
                let fd = RawFd::try_from(number).expect("the number was made of a descriptor");
                if !self.signalled.contains(&fd) {
                    self.signalled.push_back(fd);
                }
            }
            // Whatever was due is looked at in each turn.
            Wake::TimerExpired => {}
        }
    }

    /// Offers the image what is held, in order, until it has no room.
    fn offer_held(&mut self) {
        while let Some(request) = self.held.pop_front() {
            let image = self.image.as_mut().expect(IMAGE_IS_THERE);
            match image.start(request, self.io.as_mut()) {
                Step::Pending => {}
                Step::Done(completion) => self.ended.push_back(completion),
                Step::Busy(request) => {
                    self.held.push_front(request);
                    break;
                }
            }
            self.take_others();
        }
    }

    /// Takes what one event, or one start, has ended besides.
    fn take_others(&mut self) {
        while let Some(completion) = self.image().next_completion() {
            self.ended.push_back(completion);
        }
    }

    fn image(&mut self) -> &mut dyn Backend {
        self.image.as_mut().expect(IMAGE_IS_THERE).as_mut()
    }

    /// Waits for what is in flight, unless that has no end; for a time, not for ever.
    fn drain(&mut self) {
        self.held.clear();
        let end = self.io.now() + PARTING_MAX;
        while self.image().in_flight() > 0 && self.io.now() < end {
            let can_end = self.check_loss();
            if can_end
                .and_then(|()| self.turn(Patience::UntilEvent, Some(end)))
                .is_err()
            {
                return;
            }
        }
    }

    /// Lets the image leave the reactor; for a time, not for ever.
    fn part(&mut self, parting: Parting) {
        let image = self.image.as_mut().expect(IMAGE_IS_THERE);
        if !image.is_attached() {
            return;
        }
        image.detach(parting, self.io.as_mut());
        let end = self.io.now() + PARTING_MAX;
        while self.image().is_attached() && self.io.now() < end {
            // One that is lost lets its connection go all the same.
            if let Err(PipelineError::Wait(error)) = self.turn(Patience::UntilEvent, Some(end)) {
                log::error!("cannot wait for an image to leave: {error}");
                return;
            }
        }
    }
}

const IMAGE_IS_THERE: &str = "an image is given back only by what consumes its owner";

impl Drop for Pipeline {
    fn drop(&mut self) {
        if self.image.is_none() {
            return;
        }
        self.drain();
        if self.image().in_flight() == 0 {
            self.part(Parting::Ends);
        }
        self.part(Parting::Breaks);
    }
}
