//! An image for a caller that waits: one request at a time, on plain system calls.
#![expect(
    unsafe_code,
    reason = "segments point into the caller's buffer, which outlives the call"
)]

use std::io;
use std::ptr::NonNull;

use crate::backend::{Backend, Geometry, Step};
use crate::plain::Plain;
use crate::reactor::{Patience, Reactor, Wake};
use crate::request::{Completion, Durability, Failure, Operation, Request, Segment, Space};

/// An image, and the reactor that serves it. Nothing is in flight between two calls.
pub struct Blocking {
    image: Box<dyn Backend>,
    io: Plain,
}

/// Room for what one request puts in flight.
const OPS_MAX: u32 = 64;

impl Blocking {
    /// Takes `image`, in which nothing is in flight.
    ///
    /// # Errors
    ///
    /// When the image has more files than a reactor takes.
    pub fn new(image: Box<dyn Backend>) -> io::Result<Self> {
        let mut io = Plain::new(OPS_MAX);
        io.register(&image.files())?;
        Ok(Self { image, io })
    }

    /// Gives the image back.
    pub fn into_image(self) -> Box<dyn Backend> {
        self.image
    }

    /// The shape of the image now.
    pub fn geometry(&self) -> Geometry {
        self.image.geometry()
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
        let mut step = self.image.start(request, &mut self.io);
        let mut wakes = Vec::new();
        loop {
            match step {
                Step::Done(Completion { outcome, .. }) => return outcome,
                Step::Pending => {}
                Step::Busy(_) => unreachable!("there is room for one request"),
            }
            // Plain system calls have nothing that could fail here but the wait for events, and an
            // operation that was submitted has ended by then: no memory stays in use.
            if let Err(error) = self.io.wait(Patience::UntilEvent, &mut wakes) {
                panic!("a reactor without watches cannot fail to wait: {error}");
            }
            step = Step::Pending;
            for wake in wakes.drain(..) {
                let Wake::Done(event) = wake else { continue };
                if let done @ Step::Done(_) = self.image.resume(event, &mut self.io) {
                    step = done;
                }
            }
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
