//! An image for a caller that waits: one request at a time, on plain system calls.
#![expect(
    unsafe_code,
    reason = "segments point into the caller's buffer, which outlives the call"
)]

#[cfg(test)]
mod tests;

use std::io;
use std::ops::Range;
use std::ptr::NonNull;
use std::time::{Duration, Instant};

use crate::backend::{Backend, Geometry, Parting, Step};
use crate::plain::Plain;
use crate::reactor::{Patience, Reactor, Submit, Wake};
use crate::request::{Completion, Durability, Failure, Operation, Request, Segment, Space};

/// An image, and the reactor that serves it. No request is in flight between two calls.
pub struct Blocking {
    /// There until it is given back.
    image: Option<Box<dyn Backend>>,
    io: Plain,
    limit: Option<Duration>,
    /// A request ran out of time: it is in the image for ever, and its memory is somebody else's again.
    expired: bool,
}

/// Room for what one request puts in flight, and for what an image has there of its own.
const OPS_MAX: u32 = 64;

/// How long an image may take to leave for another reactor, and then to break off.
const PARTING_MAX: Duration = Duration::from_secs(5);

impl Blocking {
    /// Takes `image`, in which nothing is in flight.
    ///
    /// # Errors
    ///
    /// When the image has more files than a reactor takes.
    pub fn new(mut image: Box<dyn Backend>) -> io::Result<Self> {
        let mut io = Plain::new(OPS_MAX);
        io.register(&image.files())?;
        image.attach(&mut io);
        Ok(Self {
            image: Some(image),
            io,
            limit: None,
            expired: false,
        })
    }

    /// From now on a request that takes longer than `limit` fails with ETIMEDOUT, as does every one after it. What waits for
    /// a server can be broken off; a system call on a local file takes as long as it takes.
    #[must_use]
    pub fn with_limit(mut self, limit: Duration) -> Self {
        self.limit = Some(limit);
        self
    }

    /// Gives the image back, which goes on with another reactor as it is.
    ///
    /// # Panics
    ///
    /// When a request has run out of time: the image is of no more use.
    pub fn into_image(mut self) -> Box<dyn Backend> {
        assert!(!self.expired, "an image that timed out cannot be used any more");
        self.part(Parting::Moves);
        if self.image().is_attached() {
            self.part(Parting::Breaks);
        }
        self.image.take().expect(IMAGE_IS_THERE)
    }

    /// The shape of the image now.
    pub fn geometry(&self) -> Geometry {
        self.image.as_ref().expect(IMAGE_IS_THERE).geometry()
    }

    /// Fills `buffer` from the image.
    ///
    /// # Errors
    ///
    /// What the storage answers.
    pub fn read_at(&mut self, offset_bytes: u64, buffer: &mut [u8]) -> Result<(), Failure> {
        let memory = NonNull::from(&mut *buffer).cast();
        self.transfer(Operation::Read, offset_bytes, memory, buffer.len())
    }

    /// Writes `bytes` to the image.
    ///
    /// # Errors
    ///
    /// What the storage answers.
    pub fn write_at(&mut self, offset_bytes: u64, bytes: &[u8]) -> Result<(), Failure> {
        // Only ever read from.
        let memory = NonNull::from(bytes).cast();
        self.transfer(Operation::Write, offset_bytes, memory, bytes.len())
    }

    /// Makes a range read as zeros, without space of its own where the medium can do that.
    ///
    /// # Errors
    ///
    /// What the storage answers.
    pub fn zero_at(&mut self, offset_bytes: u64, len_bytes: u64) -> Result<(), Failure> {
        let space = Space::MayBeFreed;
        self.run(request(Operation::WriteZeroes { space }, offset_bytes, len_bytes))
            .map(drop)
    }

    /// Returns when everything that was written is on the medium.
    ///
    /// # Errors
    ///
    /// What the storage answers.
    pub fn flush(&mut self) -> Result<(), Failure> {
        self.run(request(Operation::Flush, 0, 0)).map(drop)
    }

    /// Makes the image `len_bytes` long.
    ///
    /// # Errors
    ///
    /// What the storage answers.
    pub fn grow(&mut self, len_bytes: u64) -> Result<(), Failure> {
        self.run(request(Operation::Grow, 0, len_bytes)).map(drop)
    }

    /// The first part of `range` that may hold something else than zeros, as far as the image knows; an empty one if there is
    /// none.
    ///
    /// # Errors
    ///
    /// What the storage answers.
    pub fn find_data(&mut self, range: Range<u64>) -> Result<Range<u64>, Failure> {
        let len_bytes = range.end.saturating_sub(range.start);
        let found = self.run(request(Operation::FindData, range.start, len_bytes))?;
        Ok(found.range())
    }

    /// Raises the generation of the image's lease, if it has one of its own ([`Operation::Raise`]).
    ///
    /// # Errors
    ///
    /// What the storage answers.
    pub fn raise(&mut self) -> Result<(), Failure> {
        self.run(request(Operation::Raise, 0, 0)).map(drop)
    }

    /// Takes the fence of the image's lease down, if it has one of its own ([`Operation::Yield`]).
    ///
    /// # Errors
    ///
    /// What the storage answers.
    pub fn yield_fence(&mut self) -> Result<(), Failure> {
        self.run(request(Operation::Yield, 0, 0)).map(drop)
    }

    /// Puts the fence up again ([`Operation::TakeBack`]), however long that takes.
    ///
    /// # Errors
    ///
    /// What the storage answers.
    pub fn take_back(&mut self) -> Result<(), Failure> {
        self.run(request(Operation::TakeBack, 0, 0)).map(drop)
    }

    fn transfer(
        &mut self,
        operation: Operation,
        offset_bytes: u64,
        memory: NonNull<u8>,
        len: usize,
    ) -> Result<(), Failure> {
        // SAFETY: the caller's buffer is borrowed until `run` has seen the request complete.
        let segment = unsafe { Segment::new(memory, len) };
        self.run(Request {
            segments: vec![segment],
            ..request(operation, offset_bytes, len as u64)
        })
        .map(drop)
    }

    /// Carries a request out, and gives it back.
    fn run(&mut self, request: Request) -> Result<Request, Failure> {
        if self.expired {
            return Err(EXPIRED);
        }
        let end = self.limit.map(|limit| self.io.now() + limit);
        let mut offered = Some(request);
        loop {
            if let Some(request) = offered.take() {
                let io = &mut self.io;
                match self.image.as_mut().expect(IMAGE_IS_THERE).start(request, io) {
                    Step::Done(completion) => return ended(completion),
                    Step::Pending => {}
                    Step::Busy(request) => offered = Some(request),
                }
            }
            if let Some(completion) = self.next_completion() {
                return ended(completion);
            }
            if end.is_some_and(|end| end <= self.io.now()) {
                self.expire();
                return Err(EXPIRED);
            }
            assert!(
                offered.is_none() || self.image().is_attached(),
                "there is room for one request in an image that waits for nothing"
            );
            if let Some(completion) = self.turn(end) {
                return ended(completion);
            }
            if self.image().loss().is_some() {
                // The request stays in the image for good; nothing of the kernel's uses its memory.
                self.expired = true;
                return Err(Failure::Host(libc::ESTALE));
            }
        }
    }

    /// Waits for one event or the time of `end`, and lets the image go on.
    fn turn(&mut self, end: Option<Instant>) -> Option<Completion> {
        let image = self.image.as_mut().expect(IMAGE_IS_THERE);
        image.before_wait(&mut self.io);
        let alarm = image.alarm();
        self.io.set_timer(alarm.into_iter().chain(end).min());
        let mut wakes = Vec::new();
        // Plain system calls have nothing that could fail here but the poll, of sockets and with no watches.
        if let Err(error) = self.io.wait(Patience::UntilEvent, &mut wakes) {
            panic!("a reactor without watches cannot fail to wait: {error}");
        }
        let mut ended = None;
        for wake in wakes {
            let Wake::Done(event) = wake else { continue };
            if let Step::Done(completion) = image.resume(event, &mut self.io) {
                ended = Some(completion);
            }
        }
        if image.alarm().is_some_and(|alarm| alarm <= self.io.now()) {
            image.wake(&mut self.io);
        }
        ended.or_else(|| self.next_completion())
    }

    fn next_completion(&mut self) -> Option<Completion> {
        self.image().next_completion()
    }

    fn image(&mut self) -> &mut dyn Backend {
        self.image.as_mut().expect(IMAGE_IS_THERE).as_mut()
    }

    /// Gives a request up. Its memory is the caller's again when this returns: nothing in flight may still name it.
    fn expire(&mut self) {
        self.expired = true;
        self.part(Parting::Breaks);
        // Operations that wait are only records of the reactor.
        self.io = Plain::new(OPS_MAX);
    }

    /// Lets the image leave the reactor; for a time, not for ever.
    fn part(&mut self, parting: Parting) {
        let image = self.image.as_mut().expect(IMAGE_IS_THERE);
        if !image.is_attached() {
            return;
        }
        image.detach(parting, &mut self.io);
        let end = self.io.now() + PARTING_MAX;
        while self.image().is_attached() && self.io.now() < end {
            // A request that ends now ends too late.
            drop(self.turn(Some(end)));
        }
    }
}

const IMAGE_IS_THERE: &str = "an image is given back only by what consumes its owner";
const EXPIRED: Failure = Failure::Host(libc::ETIMEDOUT);

impl Drop for Blocking {
    fn drop(&mut self) {
        if self.image.is_some() && !self.expired {
            self.part(Parting::Ends);
            self.part(Parting::Breaks);
        }
    }
}

fn ended(completion: Completion) -> Result<Request, Failure> {
    completion.outcome.map(|()| completion.request)
}

fn request(operation: Operation, offset_bytes: u64, len_bytes: u64) -> Request {
    Request {
        tag: 0,
        operation,
        offset_bytes,
        len_bytes,
        durability: Durability::Cached,
        segments: Vec::new(),
    }
}
