//! A raw image against a kernel whose answers the test gives.

#![expect(unsafe_code, reason = "segments point into the test's own buffers")]
#![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

use super::*;
use crate::reactor::Full;

const GEOMETRY: Geometry = Geometry {
    size_bytes: 1 << 20,
    logical_block_bytes: 512,
    physical_block_bytes: 4096,
    access: Access::ReadWrite,
    discard: Discard::Supported,
};

/// A kernel that only writes down what it was asked; the test answers.
#[derive(Default)]
struct Asked {
    ops: Vec<(KernelOp, Token)>,
    full: bool,
}

impl Submit for Asked {
    fn submit(&mut self, op: KernelOp, token: Token) -> Result<(), Full> {
        if self.full {
            return Err(Full);
        }
        self.ops.push((op, token));
        Ok(())
    }
}

impl Asked {
    fn answer(&mut self, image: &mut Raw, result: i32) -> Step {
        let (_, token) = self.ops.pop().expect("something was asked");
        assert!(self.ops.is_empty(), "one operation at a time");
        image.resume(Event { token, result }, self)
    }

    fn range(&self) -> (u64, u64) {
        match self.ops.last().unwrap().0 {
            KernelOp::Read {
                segments,
                segment_count,
                offset_bytes,
                ..
            }
            | KernelOp::Write {
                segments,
                segment_count,
                offset_bytes,
                ..
            } => {
                // SAFETY: the request that owns the segments is in flight.
                let segments =
                    unsafe { std::slice::from_raw_parts(segments, segment_count.try_into().unwrap()) };
                (
                    offset_bytes,
                    segments.iter().map(|segment| segment.len_bytes() as u64).sum(),
                )
            }
            KernelOp::Allocate {
                offset_bytes,
                len_bytes,
                ..
            } => (offset_bytes, len_bytes),
            KernelOp::SyncData { .. } | KernelOp::Socket { .. } => (0, 0),
        }
    }

    fn mode(&self) -> i32 {
        match self.ops.last().unwrap().0 {
            KernelOp::Allocate { mode, .. } => mode,
            _ => 0,
        }
    }
}

fn image(geometry: Geometry) -> Raw {
    Raw::new(tempfile::tempfile().unwrap(), geometry)
}

fn request(operation: Operation, offset_bytes: u64, len_bytes: u64) -> Request {
    Request {
        tag: 7,
        operation,
        offset_bytes,
        len_bytes,
        durability: Durability::Cached,
        segments: Vec::new(),
    }
}

fn transfer(operation: Operation, buffers: &mut [Vec<u8>]) -> Request {
    let segments: Vec<Segment> = buffers
        .iter_mut()
        // SAFETY: the test keeps the buffers to its end.
        .map(|buffer| unsafe { Segment::new(NonNull::new(buffer.as_mut_ptr()).unwrap(), buffer.len()) })
        .collect();
    let len_bytes = segments.iter().map(|segment| segment.len_bytes() as u64).sum();
    Request {
        segments,
        ..request(operation, 4096, len_bytes)
    }
}

fn outcome(step: Step) -> Result<(), Failure> {
    match step {
        Step::Done(completion) => {
            assert_eq!(completion.request.tag, 7);
            completion.outcome
        }
        other => panic!("not done: {other:?}"),
    }
}

#[test]
fn a_short_transfer_goes_on_where_it_stopped() {
    let mut buffers = [vec![0; 512], vec![0; 1024]];
    let (mut image, mut kernel) = (image(GEOMETRY), Asked::default());
    let step = image.start(transfer(Operation::Read, &mut buffers), &mut kernel);
    assert!(matches!(step, Step::Pending));
    assert!(matches!(kernel.answer(&mut image, 100), Step::Pending));
    assert_eq!(kernel.range(), (4096 + 100, 1436));
    assert!(matches!(kernel.answer(&mut image, 412), Step::Pending));
    assert_eq!(kernel.range(), (4096 + 512, 1024));
    assert_eq!(outcome(kernel.answer(&mut image, 1024)), Ok(()));
    assert_eq!(image.in_flight(), 0);
}

#[test]
fn an_interrupted_operation_is_tried_again_but_not_for_ever() {
    let (mut image, mut kernel) = (image(GEOMETRY), Asked::default());
    image.start(request(Operation::Flush, 0, 0), &mut kernel);
    for _ in 0..RETRIES_MAX {
        assert!(matches!(kernel.answer(&mut image, -libc::EINTR), Step::Pending));
    }
    let last = kernel.answer(&mut image, -libc::EAGAIN);
    assert_eq!(outcome(last), Err(Failure::Host(libc::EAGAIN)));
}

#[test]
fn a_read_that_finds_the_end_reports_a_truncated_image() {
    let mut buffers = [vec![0; 512]];
    let (mut image, mut kernel) = (image(GEOMETRY), Asked::default());
    image.start(transfer(Operation::Read, &mut buffers), &mut kernel);
    assert_eq!(outcome(kernel.answer(&mut image, 0)), Err(Failure::Truncated));
}

#[test]
fn an_error_of_the_host_reaches_the_caller() {
    let mut buffers = [vec![0; 512]];
    let (mut image, mut kernel) = (image(GEOMETRY), Asked::default());
    image.start(transfer(Operation::Write, &mut buffers), &mut kernel);
    let step = kernel.answer(&mut image, -libc::ENOSPC);
    assert_eq!(outcome(step), Err(Failure::Host(libc::ENOSPC)));
}

#[test]
fn a_range_beyond_the_end_is_refused_before_the_kernel_hears_of_it() {
    let (mut image, mut kernel) = (image(GEOMETRY), Asked::default());
    for (offset, len) in [(GEOMETRY.size_bytes, 512), (u64::MAX - 511, 512), (0, u64::MAX)] {
        let step = image.start(request(Operation::Discard, offset, len), &mut kernel);
        assert_eq!(outcome(step), Err(Failure::OutOfRange));
    }
    assert!(kernel.ops.is_empty());
}

#[test]
fn a_read_only_image_refuses_changes_and_lets_a_flush_pass() {
    let read_only = Geometry {
        access: Access::ReadOnly,
        ..GEOMETRY
    };
    let (mut image, mut kernel) = (image(read_only), Asked::default());
    for operation in [
        Operation::Write,
        Operation::Discard,
        Operation::WriteZeroes { space: Space::Stays },
    ] {
        let step = image.start(request(operation, 0, 512), &mut kernel);
        assert_eq!(outcome(step), Err(Failure::ReadOnly));
    }
    let flush = image.start(request(Operation::Flush, 0, 0), &mut kernel);
    assert_eq!(outcome(flush), Ok(()));
}

#[test]
fn a_discard_that_the_file_cannot_do_is_unsupported_once_and_ignored_from_then_on() {
    let (mut image, mut kernel) = (image(GEOMETRY), Asked::default());
    image.start(request(Operation::Discard, 0, 4096), &mut kernel);
    assert_eq!(
        kernel.mode(),
        libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE
    );
    let step = kernel.answer(&mut image, -libc::EOPNOTSUPP);
    assert_eq!(outcome(step), Err(Failure::Unsupported));
    assert_eq!(image.geometry().discard, Discard::Ignored);
    let again = image.start(request(Operation::Discard, 0, 4096), &mut kernel);
    assert_eq!(outcome(again), Ok(()));
}

#[test]
fn zeros_are_written_by_hand_where_the_file_knows_nothing_better() {
    let (mut image, mut kernel) = (image(GEOMETRY), Asked::default());
    let len = 1 << 20;
    let operation = Operation::WriteZeroes {
        space: Space::MayBeFreed,
    };
    image.start(request(operation, 0, len), &mut kernel);
    assert!(matches!(
        kernel.answer(&mut image, -libc::EOPNOTSUPP),
        Step::Pending
    ));
    assert_eq!(
        kernel.mode(),
        libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE
    );
    assert!(matches!(
        kernel.answer(&mut image, -libc::EOPNOTSUPP),
        Step::Pending
    ));
    assert_eq!(kernel.range(), (0, len));
    assert!(matches!(kernel.answer(&mut image, 1000), Step::Pending));
    assert_eq!(kernel.range(), (1000, len - 1000));
    assert_eq!(outcome(kernel.answer(&mut image, (1 << 20) - 1000)), Ok(()));
    // What was refused is not asked again.
    image.start(request(operation, 512, 512), &mut kernel);
    assert_eq!(kernel.range(), (512, 512));
    assert_eq!(kernel.mode(), 0);
}

#[test]
fn a_full_reactor_gives_the_request_back() {
    let (mut image, mut kernel) = (image(GEOMETRY), Asked::default());
    kernel.full = true;
    let step = image.start(request(Operation::Flush, 0, 0), &mut kernel);
    assert!(matches!(step, Step::Busy(Request { tag: 7, .. })));
    // A resize reads into a buffer of the image, which the caller does not get to see.
    let step = image.start(request(Operation::Grow, 0, 2 * GEOMETRY.size_bytes), &mut kernel);
    assert!(matches!(step, Step::Busy(request) if request.segments.is_empty()));
    assert_eq!(image.in_flight(), 0);
}

#[test]
fn a_durable_write_says_so_and_a_durable_discard_is_synced() {
    let mut image = image(GEOMETRY);
    let mut asked = Asked::default();
    let mut buffers = [vec![0; 512]];
    let mut write = transfer(Operation::Write, &mut buffers);
    write.durability = Durability::Durable;
    assert!(matches!(image.start(write, &mut asked), Step::Pending));
    assert!(matches!(
        asked.ops.last(),
        Some((
            KernelOp::Write {
                durability: Durability::Durable,
                ..
            },
            _
        ))
    ));
    assert!(matches!(asked.answer(&mut image, 512), Step::Done(_)));
    let mut discard = request(Operation::Discard, 0, 4096);
    discard.durability = Durability::Durable;
    assert!(matches!(image.start(discard, &mut asked), Step::Pending));
    assert!(matches!(asked.answer(&mut image, 0), Step::Pending));
    assert!(matches!(asked.ops.last(), Some((KernelOp::SyncData { .. }, _))));
    assert!(matches!(
        asked.answer(&mut image, 0),
        Step::Done(Completion { outcome: Ok(()), .. })
    ));
}

#[test]
fn a_resize_looks_before_it_allocates_and_every_fork_sees_it() {
    let old_bytes = GEOMETRY.size_bytes;
    let mut image = image(GEOMETRY);
    let fork = image
        .fork()
        .expect("a raw image can be served by several threads");
    let mut asked = Asked::default();
    assert!(matches!(
        image.start(request(Operation::Grow, 0, 2 * old_bytes), &mut asked),
        Step::Pending
    ));
    assert!(matches!(asked.ops.last(), Some((KernelOp::Read { .. }, _))));
    assert_eq!(asked.range(), (2 * old_bytes - 512, 512));
    assert!(matches!(asked.answer(&mut image, 0), Step::Pending));
    assert_eq!(asked.mode(), 0, "what is there is not changed");
    assert_eq!(asked.range(), (2 * old_bytes - 512, 512));
    assert_eq!(fork.geometry().size_bytes, old_bytes);
    let done = asked.answer(&mut image, 0);
    assert!(
        matches!(done, Step::Done(Completion { outcome: Ok(()), request }) if request.segments.is_empty())
    );
    assert_eq!(fork.geometry().size_bytes, 2 * old_bytes);

    // A file that is that long already needs no more than the look.
    assert!(matches!(
        image.start(request(Operation::Grow, 0, 3 * old_bytes), &mut asked),
        Step::Pending
    ));
    assert!(matches!(
        asked.answer(&mut image, 512),
        Step::Done(Completion { outcome: Ok(()), .. })
    ));
    assert_eq!(image.geometry().size_bytes, 3 * old_bytes);
}

#[test]
fn a_resize_that_would_shrink_or_cannot_be_had_changes_nothing() {
    let mut image = image(GEOMETRY);
    let mut asked = Asked::default();
    for len_bytes in [0, 512, GEOMETRY.size_bytes - 512, GEOMETRY.size_bytes + 1] {
        let step = image.start(request(Operation::Grow, 0, len_bytes), &mut asked);
        assert!(matches!(
            step,
            Step::Done(Completion {
                outcome: Err(Failure::OutOfRange),
                ..
            })
        ));
    }
    for (answer, failure) in [
        (-libc::EOPNOTSUPP, Failure::Unsupported),
        (-libc::ENOSPC, Failure::Host(libc::ENOSPC)),
    ] {
        image.start(request(Operation::Grow, 0, 1 << 30), &mut asked);
        asked.answer(&mut image, 0);
        let step = asked.answer(&mut image, answer);
        assert!(matches!(step, Step::Done(Completion { outcome: Err(said), .. }) if said == failure));
        assert_eq!(image.geometry().size_bytes, GEOMETRY.size_bytes);
    }
}
