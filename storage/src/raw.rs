//! An image that is a file or a block device, byte for byte.
#![expect(
    unsafe_code,
    reason = "WRITE ZEROES may have to write a buffer of zeros of its own, and a resize reads into one"
)]

#[cfg(test)]
mod tests;

use std::fs::File;
use std::os::fd::AsRawFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::backend::{Access, Backend, Discard, Geometry, Step};
use crate::reactor::{Event, FileSlot, ImageFile, KernelOp, Medium, Submit, Token};
use crate::request::{Completion, Durability, Failure, Operation, Request, Segment, Space};
use crate::slab::Slab;

/// A raw image.
///
/// Every request is one kernel operation at a time; what it left undone is asked for again:
///
/// ```text
///   Transfer ──short──► Transfer         Deallocate ──EOPNOTSUPP──► ZeroRange ──EOPNOTSUPP──► WriteZeros
///      └── EINTR, EAGAIN: again, a bounded number of times
///   Deallocate, ZeroRange ──durable──► Sync
///   Probe ──nothing there──► Extend
/// ```
#[derive(Debug)]
pub struct Raw {
    file: Arc<File>,
    medium: Medium,
    /// Without the size, which all forks share.
    geometry: Geometry,
    size_bytes: Arc<AtomicU64>,
    flights: Slab<Flight>,
    /// What the file has refused; it is not asked again.
    refused: Refused,
    /// Made when a file can zero a range in no other way.
    zeros: Vec<u8>,
    /// Made when a resize asks whether the file is that long already.
    probe: Vec<u8>,
}

#[derive(Debug, Default)]
struct Refused {
    deallocate: bool,
    zero_range: bool,
}

/// A request in flight.
#[derive(Debug)]
struct Flight {
    request: Request,
    stage: Stage,
    /// Bytes already transferred.
    done_bytes: u64,
    /// The first segment that is not transferred whole.
    segment: usize,
    /// How often the kernel said EINTR or EAGAIN since the last progress.
    retries: u32,
}

/// The kernel operation that a request is at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Stage {
    Transfer,
    Sync,
    Deallocate,
    ZeroRange,
    WriteZeros,
    /// Reads the last sector of the new size: a medium that was grown from outside has it already.
    Probe,
    /// Allocates that sector, which makes a file longer and changes nothing that is there.
    Extend,
}

/// How often an operation that made no progress is tried again.
const RETRIES_MAX: u32 = 16;

/// Segments in one operation (IOV_MAX of Linux).
const SEGMENTS_MAX: usize = 1024;

/// The buffer of zeros, and how often one operation writes it.
const ZEROS_BYTES: usize = 64 * 1024;
const ZEROS_SEGMENTS_MAX: usize = 16;

/// What is read and allocated at the end of a new size.
const SECTOR_BYTES: u64 = 512;
const PROBE_BYTES: usize = 512;

/// The one file of a raw image.
const FILE: FileSlot = FileSlot(0);

/// Requests for which there is room from the start.
const FLIGHTS_TYPICAL: usize = 256;

/// What is to be done about a request.
enum Next {
    Submit,
    End(Result<(), Failure>),
}

impl Raw {
    /// An image on `file`, which is opened for `geometry.access` and is `geometry.size_bytes` long.
    pub fn new(file: impl Into<Arc<File>>, geometry: Geometry) -> Self {
        let size_bytes = Arc::new(AtomicU64::new(geometry.size_bytes));
        let file = file.into();
        let medium = Medium::of(&file);
        Self::sharing(file, medium, size_bytes, geometry)
    }

    fn sharing(file: Arc<File>, medium: Medium, size_bytes: Arc<AtomicU64>, geometry: Geometry) -> Self {
        Self {
            file,
            medium,
            geometry,
            size_bytes,
            flights: Slab::with_capacity(FLIGHTS_TYPICAL),
            refused: Refused::default(),
            zeros: Vec::new(),
            probe: Vec::new(),
        }
    }

    fn size_bytes(&self) -> u64 {
        // Only ever grows, and says nothing about other memory.
        self.size_bytes.load(Ordering::Relaxed)
    }

    /// The stage in which `request` starts, or its end.
    fn first_stage(&self, request: &Request) -> Result<Stage, Result<(), Failure>> {
        let (size_bytes, len_bytes) = (self.size_bytes(), request.len_bytes);
        let read_only = self.geometry.access == Access::ReadOnly;
        if request.operation == Operation::Grow {
            return match len_bytes {
                _ if len_bytes < size_bytes || !len_bytes.is_multiple_of(SECTOR_BYTES) => {
                    Err(Err(Failure::OutOfRange))
                }
                _ if len_bytes == size_bytes => Err(Ok(())),
                _ => Ok(Stage::Probe),
            };
        }
        let end = request.offset_bytes.checked_add(len_bytes);
        if end.is_none_or(|end| end > size_bytes) {
            return Err(Err(Failure::OutOfRange));
        }
        match request.operation {
            // Its lease is the host's.
            Operation::Raise | Operation::Yield | Operation::TakeBack => Err(Ok(())),
            Operation::Flush if read_only => Err(Ok(())),
            Operation::Flush => Ok(Stage::Sync),
            Operation::Write | Operation::Discard | Operation::WriteZeroes { .. } if read_only => {
                Err(Err(Failure::ReadOnly))
            }
            _ if request.len_bytes == 0 => Err(Ok(())),
            // No reactor looks for holes.
            Operation::FindData => Err(Ok(())),
            Operation::Read | Operation::Write => Ok(Stage::Transfer),
            Operation::Discard if self.geometry.discard == Discard::Ignored => Err(Ok(())),
            Operation::Discard => Ok(Stage::Deallocate),
            Operation::WriteZeroes {
                space: Space::MayBeFreed,
            } if !self.refused.deallocate => Ok(Stage::Deallocate),
            Operation::WriteZeroes { .. } if !self.refused.zero_range => Ok(Stage::ZeroRange),
            Operation::WriteZeroes { .. } | Operation::Grow => Ok(Stage::WriteZeros),
        }
    }

    /// Takes the kernel's answer to the current operation of a flight.
    fn judge(&mut self, place: usize, result: i32) -> Next {
        let flight = self
            .flights
            .get_mut(place)
            .expect("events name operations in flight");
        match (flight.stage, result) {
            (_, _) if result == -libc::EINTR || result == -libc::EAGAIN => {
                flight.retries += 1;
                if flight.retries > RETRIES_MAX {
                    return Next::End(Err(Failure::Host(-result)));
                }
                Next::Submit
            }
            (Stage::Deallocate, _) if result == -libc::EOPNOTSUPP => {
                self.refused.deallocate = true;
                if flight.request.operation == Operation::Discard {
                    self.geometry.discard = Discard::Ignored;
                    return Next::End(Err(Failure::Unsupported));
                }
                flight.stage = if self.refused.zero_range {
                    Stage::WriteZeros
                } else {
                    Stage::ZeroRange
                };
                Next::Submit
            }
            (Stage::ZeroRange, _) if result == -libc::EOPNOTSUPP => {
                self.refused.zero_range = true;
                flight.stage = Stage::WriteZeros;
                Next::Submit
            }
            (Stage::Extend, _) if result == -libc::EOPNOTSUPP || result == -libc::ENODEV => {
                Next::End(Err(Failure::Unsupported))
            }
            (_, ..0) => Next::End(Err(Failure::Host(-result))),
            (Stage::Deallocate | Stage::ZeroRange, _) if flight.request.durability == Durability::Durable => {
                flight.stage = Stage::Sync;
                Next::Submit
            }
            (Stage::Sync | Stage::Deallocate | Stage::ZeroRange, _) => Next::End(Ok(())),
            (Stage::Probe, _) if u64::from(result.unsigned_abs()) < SECTOR_BYTES => {
                match self.geometry.access {
                    Access::ReadOnly => Next::End(Err(Failure::ReadOnly)),
                    Access::ReadWrite => {
                        flight.stage = Stage::Extend;
                        Next::Submit
                    }
                }
            }
            (Stage::Probe | Stage::Extend, _) => {
                self.size_bytes
                    .fetch_max(flight.request.len_bytes, Ordering::Relaxed);
                Next::End(Ok(()))
            }
            (Stage::Transfer | Stage::WriteZeros, 0) => Next::End(Err(match flight.request.operation {
                Operation::Read => Failure::Truncated,
                _ => Failure::Host(libc::EIO),
            })),
            (Stage::Transfer | Stage::WriteZeros, _) => flight.advance(u64::from(result.unsigned_abs())),
        }
    }

    /// Puts the current operation of a flight in flight. There is room: `start` asked for it, and
    /// an event has freed the room of the operation before.
    fn submit(&mut self, place: usize, io: &mut dyn Submit) -> Result<(), crate::reactor::Full> {
        let flight = self
            .flights
            .get_mut(place)
            .expect("a place is submitted while it is taken");
        if flight.stage == Stage::WriteZeros {
            if self.zeros.is_empty() {
                self.zeros = vec![0; ZEROS_BYTES];
            }
            flight.point_at(&mut self.zeros);
        }
        if flight.stage == Stage::Probe {
            if self.probe.is_empty() {
                self.probe = vec![0; PROBE_BYTES];
            }
            flight.point_at_all(&mut self.probe);
        }
        io.submit(flight.operation(), Token(place as u64))
    }

    /// Takes the request out of its place, as it came.
    fn remove(&mut self, place: usize) -> Request {
        let mut flight = self.flights.remove(place).expect("a place is given up once");
        if matches!(flight.stage, Stage::WriteZeros | Stage::Probe | Stage::Extend) {
            // They point into buffers of the image.
            flight.request.segments.clear();
        }
        flight.request
    }
}

impl Backend for Raw {
    fn geometry(&self) -> Geometry {
        Geometry {
            size_bytes: self.size_bytes(),
            ..self.geometry
        }
    }

    fn files(&self) -> Vec<ImageFile> {
        vec![ImageFile {
            fd: self.file.as_raw_fd(),
            medium: self.medium,
        }]
    }

    fn start(&mut self, request: Request, io: &mut dyn Submit) -> Step {
        let stage = match self.first_stage(&request) {
            Ok(stage) => stage,
            Err(outcome) => return Step::Done(Completion { request, outcome }),
        };
        let place = self.flights.insert(Flight {
            request,
            stage,
            done_bytes: 0,
            segment: 0,
            retries: 0,
        });
        match self.submit(place, io) {
            Ok(()) => Step::Pending,
            Err(_full) => Step::Busy(self.remove(place)),
        }
    }

    fn resume(&mut self, event: Event, io: &mut dyn Submit) -> Step {
        let place = usize::try_from(event.token.0).expect("tokens of a raw image are places");
        match self.judge(place, event.result) {
            Next::End(outcome) => Step::Done(Completion {
                request: self.remove(place),
                outcome,
            }),
            Next::Submit => {
                self.submit(place, io)
                    .expect("an event frees the room that its successor needs");
                Step::Pending
            }
        }
    }

    fn fork(&self) -> Option<Box<dyn Backend>> {
        let (file, size_bytes) = (Arc::clone(&self.file), Arc::clone(&self.size_bytes));
        Some(Box::new(Self::sharing(
            file,
            self.medium,
            size_bytes,
            self.geometry,
        )))
    }

    fn in_flight(&self) -> usize {
        self.flights.len()
    }
}

impl Flight {
    fn remaining_bytes(&self) -> u64 {
        self.request.len_bytes - self.done_bytes
    }

    /// The kernel operation of the current stage, on what remains of the range.
    fn operation(&self) -> KernelOp {
        let offset_bytes = self.request.offset_bytes + self.done_bytes;
        let segments = self.request.segments.get(self.segment..).unwrap_or_default();
        let segment_count = u32::try_from(segments.len().min(SEGMENTS_MAX)).expect("SEGMENTS_MAX is small");
        let segments = segments.as_ptr();
        match self.stage {
            Stage::Transfer if self.request.operation == Operation::Read => KernelOp::Read {
                file: FILE,
                segments,
                segment_count,
                offset_bytes,
            },
            Stage::Transfer | Stage::WriteZeros => KernelOp::Write {
                file: FILE,
                segments,
                segment_count,
                offset_bytes,
                durability: self.request.durability,
            },
            Stage::Sync => KernelOp::SyncData { file: FILE },
            Stage::Deallocate => self.allocate(libc::FALLOC_FL_PUNCH_HOLE),
            Stage::ZeroRange => self.allocate(libc::FALLOC_FL_ZERO_RANGE),
            Stage::Probe => KernelOp::Read {
                file: FILE,
                segments,
                segment_count,
                offset_bytes: self.request.len_bytes - SECTOR_BYTES,
            },
            Stage::Extend => KernelOp::Allocate {
                file: FILE,
                mode: 0,
                offset_bytes: self.request.len_bytes - SECTOR_BYTES,
                len_bytes: SECTOR_BYTES,
            },
        }
    }

    fn allocate(&self, mode: i32) -> KernelOp {
        KernelOp::Allocate {
            file: FILE,
            mode: mode | libc::FALLOC_FL_KEEP_SIZE,
            offset_bytes: self.request.offset_bytes,
            len_bytes: self.request.len_bytes,
        }
    }

    /// Counts `bytes` as transferred, and steps over the segments that are through.
    fn advance(&mut self, bytes: u64) -> Next {
        self.retries = 0;
        self.done_bytes += bytes;
        assert!(
            self.done_bytes <= self.request.len_bytes,
            "the segments of a request are as long as the request"
        );
        if self.remaining_bytes() == 0 {
            return Next::End(Ok(()));
        }
        let mut left = usize::try_from(bytes).expect("this is a 64-bit monitor");
        while let Some(segment) = self.request.segments.get_mut(self.segment) {
            let step = left.min(segment.len_bytes());
            segment.advance(step);
            left -= step;
            if segment.len_bytes() > 0 {
                break;
            }
            self.segment += 1;
        }
        Next::Submit
    }

    /// Makes the segments of a WRITE ZEROES, which came without any, cover what remains with `zeros`.
    fn point_at(&mut self, zeros: &mut [u8]) {
        self.request.segments.clear();
        self.segment = 0;
        let mut remaining = self.remaining_bytes();
        while remaining > 0 && self.request.segments.len() < ZEROS_SEGMENTS_MAX {
            let len_bytes = zeros.len().min(usize::try_from(remaining).unwrap_or(usize::MAX));
            self.request.segments.push(own_segment(zeros, len_bytes));
            remaining -= len_bytes as u64;
        }
    }

    /// Makes the segments of a resize, which came without any, cover `probe`.
    fn point_at_all(&mut self, probe: &mut [u8]) {
        self.request.segments.clear();
        let len_bytes = probe.len();
        self.request.segments.push(own_segment(probe, len_bytes));
    }
}

/// The first `len_bytes` of a buffer of the image's own.
fn own_segment(buffer: &mut [u8], len_bytes: usize) -> Segment {
    // SAFETY: the buffer is never resized again and lives as long as the image, which is not dropped
    // while a request is in flight. The zeros are only ever written from; nobody looks at what a probe read.
    unsafe { Segment::new(NonNull::from(&mut *buffer).cast(), len_bytes) }
}
