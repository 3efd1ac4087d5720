//! An image for a caller that waits: one request at a time, on plain system calls.
//!
//! An image with operations of its own is attached meanwhile, and leaves in good order.
#![expect(
    unsafe_code,
    reason = "segments point into the caller's buffer, which outlives the call"
)]

use std::io;
use std::ptr::NonNull;
use std::time::{Duration, Instant};

use crate::backend::{Backend, Geometry, Parting, Step};
use crate::plain::Plain;
use crate::reactor::{Patience, Reactor, Submit, Wake};
use crate::request::{Completion, Durability, Failure, Operation, Request, Segment, Space};

/// An image, and the reactor that serves it. No request is in flight between two calls.
pub struct Blocking {
    /// Until it is given back.
    image: Option<Box<dyn Backend>>,
    io: Plain,
}

/// How long an image may take to leave before it is broken off.
const LEAVE_MS_MAX: u64 = 2_000;

/// Room for what one request puts in flight.
const OPS_MAX: u32 = 64;

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
        })
    }

    /// Gives the image back, for another reactor.
    pub fn into_image(mut self) -> Box<dyn Backend> {
        self.part(Parting::Moves);
        self.image.take().expect("the image is given back once")
    }

    /// The shape of the image now.
    pub fn geometry(&self) -> Geometry {
        self.attached().geometry()
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
    }

    /// Returns when everything that was written is on the medium.
    ///
    /// # Errors
    ///
    /// What the storage answers.
    pub fn flush(&mut self) -> Result<(), Failure> {
        self.run(request(Operation::Flush, 0, 0))
    }

    /// Makes the image `len_bytes` long.
    ///
    /// # Errors
    ///
    /// What the storage answers.
    pub fn grow(&mut self, len_bytes: u64) -> Result<(), Failure> {
        self.run(request(Operation::Grow, 0, len_bytes))
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
    }

    fn run(&mut self, request: Request) -> Result<(), Failure> {
        let image = self.image.as_mut().expect(WITH_IMAGE);
        let mut offered = match image.start(request, &mut self.io) {
            Step::Done(completion) => return completion.outcome,
            Step::Pending => None,
            Step::Busy(request) => Some(request),
        };
        loop {
            if let Some(completion) = self.turn(None) {
                return completion.outcome;
            }
            let image = self.image.as_mut().expect(WITH_IMAGE);
            if image.loss().is_some() {
                // No operation of the kernel uses the memory of the request any more.
                return Err(Failure::Host(libc::ESTALE));
            }
            offered = match offered.map(|request| image.start(request, &mut self.io)) {
                Some(Step::Done(completion)) => return completion.outcome,
                Some(Step::Busy(request)) => Some(request),
                Some(Step::Pending) | None => None,
            };
        }
    }

    /// Waits once, at most `until` then; returns what ended by it.
    fn turn(&mut self, until: Option<Instant>) -> Option<Completion> {
        let image = self.image.as_mut().expect(WITH_IMAGE);
        self.io
            .set_timer([image.alarm(), until].into_iter().flatten().min());
        let mut wakes = Vec::new();
        // Plain system calls have nothing that could fail here but the wait for events, and an
        // operation that was submitted has ended by then: no memory stays in use.
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
        ended.or_else(|| image.next_completion())
    }

    /// Lets the image leave the reactor: by force, when it takes too long otherwise.
    fn part(&mut self, parting: Parting) {
        for parting in [parting, Parting::Breaks] {
            let image = self.image.as_mut().expect(WITH_IMAGE);
            if !image.is_attached() {
                return;
            }
            image.detach(parting, &mut self.io);
            let until = self.io.now() + Duration::from_millis(LEAVE_MS_MAX);
            while self.attached().is_attached() && self.io.now() < until {
                self.turn(Some(until));
            }
        }
    }

    fn attached(&self) -> &dyn Backend {
        self.image.as_deref().expect(WITH_IMAGE)
    }
}

const WITH_IMAGE: &str = "the image is there until it is given back";

impl Drop for Blocking {
    fn drop(&mut self) {
        if self.image.is_some() {
            self.part(Parting::Ends);
        }
    }
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

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use std::os::fd::RawFd;
    use std::sync::{Arc, Mutex};

    use super::*;
    use crate::backend::{Access, Discard};
    use crate::reactor::Event;

    /// An image whose requests end by its alarm, and which leaves at the second alarm after it was asked to.
    struct Remote {
        seen: Arc<Mutex<Vec<String>>>,
        alarm: Option<Instant>,
        accepted: Vec<Request>,
        ended: Vec<Completion>,
        is_attached: bool,
        is_leaving: bool,
    }

    impl Remote {
        fn soon(&mut self) {
            self.alarm = Some(Instant::now() + Duration::from_millis(2));
        }
    }

    impl Backend for Remote {
        fn geometry(&self) -> Geometry {
            Geometry {
                size_bytes: 4096,
                logical_block_bytes: 512,
                physical_block_bytes: 512,
                access: Access::ReadWrite,
                discard: Discard::Ignored,
            }
        }

        fn files(&self) -> Vec<RawFd> {
            Vec::new()
        }

        fn start(&mut self, request: Request, _: &mut dyn Submit) -> Step {
            self.soon();
            self.accepted.push(request);
            Step::Pending
        }

        fn resume(&mut self, _: Event, _: &mut dyn Submit) -> Step {
            Step::Pending
        }

        fn fork(&self) -> Option<Box<dyn Backend>> {
            None
        }

        fn next_completion(&mut self) -> Option<Completion> {
            self.ended.pop()
        }

        fn in_flight(&self) -> usize {
            self.accepted.len()
        }

        fn attach(&mut self, _: &mut dyn Submit) {
            self.is_attached = true;
        }

        fn detach(&mut self, parting: Parting, _: &mut dyn Submit) {
            self.seen.lock().unwrap().push(format!("{parting:?}"));
            self.is_leaving = true;
            self.soon();
        }

        fn is_attached(&self) -> bool {
            self.is_attached
        }

        fn alarm(&self) -> Option<Instant> {
            self.alarm
        }

        fn wake(&mut self, _: &mut dyn Submit) {
            self.alarm = None;
            let outcome = Ok(());
            let ended = self.accepted.drain(..);
            self.ended
                .extend(ended.map(|request| Completion { request, outcome }));
            self.is_attached = !self.is_leaving;
        }
    }

    #[test]
    fn an_image_with_an_alarm_is_served_and_parts_as_its_user_does() {
        let seen = Arc::<Mutex<Vec<String>>>::default();
        let remote = |seen: &Arc<Mutex<Vec<String>>>| {
            Box::new(Remote {
                seen: Arc::clone(seen),
                alarm: None,
                accepted: Vec::new(),
                ended: Vec::new(),
                is_attached: false,
                is_leaving: false,
            })
        };
        let mut image = Blocking::new(remote(&seen)).unwrap();
        image.flush().unwrap();
        image.read_at(0, &mut [0; 512]).unwrap();
        let image = image.into_image();
        assert_eq!(
            (seen.lock().unwrap().as_slice(), image.is_attached()),
            (&["Moves".to_owned()][..], false)
        );
        drop(Blocking::new(remote(&seen)).unwrap());
        assert_eq!(seen.lock().unwrap().as_slice(), ["Moves", "Ends"]);
    }
}
