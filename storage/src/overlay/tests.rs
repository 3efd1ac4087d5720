//! An overlay against a kernel whose answers the test gives.

#![expect(unsafe_code, reason = "segments point into the test's own buffers")]
#![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

mod crash;
mod remote;

use std::ptr::NonNull;

use super::format::{BITMAP_OFFSET_BYTES, BaseIdentity};
use super::*;
use crate::backend::{Access, Discard};
use crate::reactor::{FileSlot, Full, KernelOp, Token};
use crate::request::Space;

const SIZE_BYTES: u64 = 1 << 20;
const BASE: FileSlot = FileSlot(0);
const STORE: FileSlot = FileSlot(1);

/// A kernel that only writes down what it was asked, in order; the test answers.
#[derive(Default)]
struct Asked {
    ops: VecDeque<(KernelOp, Token)>,
    room: Option<usize>,
}

impl Submit for Asked {
    fn submit(&mut self, op: KernelOp, token: Token) -> Result<(), Full> {
        if self.room.is_some_and(|room| self.ops.len() >= room) {
            return Err(Full);
        }
        self.ops.push_back((op, token));
        Ok(())
    }
}

/// An operation without its memory.
#[derive(Debug, PartialEq, Eq)]
enum Seen {
    Read(FileSlot, u64, u64),
    Write(FileSlot, u64, u64, Durability),
    Sync(FileSlot),
    Allocate(FileSlot, u64, u64),
}

fn len_of(segments: *const Segment, segment_count: u32) -> u64 {
    // SAFETY: the request that owns the segments is in flight.
    let segments = unsafe { std::slice::from_raw_parts(segments, segment_count.try_into().unwrap()) };
    segments.iter().map(|segment| segment.len_bytes() as u64).sum()
}

fn seen(op: KernelOp) -> Seen {
    match op {
        KernelOp::Read {
            file,
            segments,
            segment_count,
            offset_bytes,
        } => Seen::Read(file, offset_bytes, len_of(segments, segment_count)),
        KernelOp::Write {
            file,
            segments,
            segment_count,
            offset_bytes,
            durability,
        } => Seen::Write(file, offset_bytes, len_of(segments, segment_count), durability),
        KernelOp::SyncData { file } => Seen::Sync(file),
        KernelOp::Allocate {
            file,
            offset_bytes,
            len_bytes,
            ..
        } => Seen::Allocate(file, offset_bytes, len_bytes),
        KernelOp::Socket { .. } => panic!("a file has no sockets"),
    }
}

impl Asked {
    fn next(&self) -> Option<Seen> {
        self.ops.front().map(|(op, _)| seen(*op))
    }

    /// Answers the oldest operation with success; returns the tags of all that ended.
    fn carry_out(&mut self, overlay: &mut Overlay) -> Vec<u64> {
        let result = match self.next().expect("something was asked") {
            Seen::Read(_, _, len) | Seen::Write(_, _, len, _) => i32::try_from(len).unwrap(),
            Seen::Sync(_) | Seen::Allocate(..) => 0,
        };
        let ended = self.answer(overlay, result);
        ended
            .into_iter()
            .map(|(tag, outcome)| {
                assert_eq!(outcome, Ok(()));
                tag
            })
            .collect()
    }

    fn answer(&mut self, overlay: &mut Overlay, result: i32) -> Vec<(u64, Result<(), Failure>)> {
        let (_, token) = self.ops.pop_front().unwrap();
        let room_before = self.ops.len();
        let step = overlay.resume(Event { token, result }, self);
        assert!(
            self.ops.len() <= room_before + 1,
            "an event may be answered with one operation at most"
        );
        let mut ended = Vec::new();
        if let Step::Done(completion) = step {
            ended.push(completion);
        }
        ended.extend(std::iter::from_fn(|| overlay.next_completion()));
        ended
            .into_iter()
            .map(|completion| (completion.request.tag, completion.outcome))
            .collect()
    }
}

fn overlay(lifetime: Lifetime) -> Overlay {
    overlay_of(SIZE_BYTES, &[], lifetime)
}

/// An overlay of so many bytes on a base that is as long.
fn overlay_of(size_bytes: u64, bits: &[u8], lifetime: Lifetime) -> Overlay {
    let geometry = Geometry {
        size_bytes,
        logical_block_bytes: 512,
        physical_block_bytes: 4096,
        access: Access::ReadOnly,
        discard: Discard::Supported,
    };
    let base = Box::new(Raw::new(tempfile::tempfile().unwrap(), geometry));
    let identity = BaseIdentity {
        path: "base".to_owned(),
        size_bytes,
        fingerprint: 0,
    };
    let header = Header::new(size_bytes, identity).unwrap();
    Overlay::new(
        base,
        Arc::new(tempfile::tempfile().unwrap()),
        header,
        bits,
        lifetime,
    )
}

/// A request in memory that is never freed.
fn request(tag: u64, operation: Operation, offset_bytes: u64, len_bytes: u64) -> Request {
    let mut segments = Vec::new();
    if matches!(operation, Operation::Read | Operation::Write) {
        let memory = vec![0_u8; len_bytes.try_into().unwrap()].leak();
        let address = NonNull::new(memory.as_mut_ptr()).unwrap();
        // SAFETY: it was leaked.
        segments.push(unsafe { Segment::new(address, memory.len()) });
    }
    Request {
        tag,
        operation,
        offset_bytes,
        len_bytes,
        durability: Durability::Cached,
        segments,
    }
}

fn durable(request: Request) -> Request {
    Request {
        durability: Durability::Durable,
        ..request
    }
}

fn start(overlay: &mut Overlay, kernel: &mut Asked, request: Request) {
    let step = overlay.start(request, kernel);
    assert!(matches!(step, Step::Pending), "{step:?}");
}

/// Has cluster `cluster` written, without its bit in the file.
fn write_cluster(overlay: &mut Overlay, kernel: &mut Asked, cluster: u64) {
    start(
        overlay,
        kernel,
        request(0, Operation::Write, cluster * 4096, 4096),
    );
    assert_eq!(kernel.carry_out(overlay), [0]);
    assert_eq!(kernel.next(), None);
}

const NONE: [u64; 0] = [];
const BLOCK: Seen = Seen::Write(STORE, BITMAP_OFFSET_BYTES, 4096, Durability::Cached);

#[test]
fn a_whole_cluster_is_written_without_a_look_at_the_base_and_read_from_the_store() {
    let (mut overlay, mut kernel) = (overlay(Lifetime::Kept), Asked::default());
    start(&mut overlay, &mut kernel, request(1, Operation::Read, 8192, 4096));
    assert_eq!(kernel.next(), Some(Seen::Read(BASE, 8192, 4096)));
    assert_eq!(kernel.carry_out(&mut overlay), [1]);
    start(
        &mut overlay,
        &mut kernel,
        request(2, Operation::Write, 8192, 4096),
    );
    let offset = DATA_OFFSET_BYTES + 8192;
    assert_eq!(
        kernel.next(),
        Some(Seen::Write(STORE, offset, 4096, Durability::Cached))
    );
    // A read that comes before the write has completed is not held up.
    start(&mut overlay, &mut kernel, request(3, Operation::Read, 8192, 4096));
    assert_eq!(kernel.carry_out(&mut overlay), [2]);
    assert_eq!(kernel.next(), Some(Seen::Read(BASE, 8192, 4096)));
    assert_eq!(kernel.carry_out(&mut overlay), [3]);
    start(&mut overlay, &mut kernel, request(4, Operation::Read, 8192, 4096));
    assert_eq!(kernel.next(), Some(Seen::Read(STORE, offset, 4096)));
    assert_eq!(kernel.carry_out(&mut overlay), [4]);
    assert_eq!(overlay.in_flight(), 0);
}

#[test]
fn a_bit_is_written_after_a_sync_of_its_data_and_the_flush_ends_after_a_sync_of_the_bit() {
    let (mut overlay, mut kernel) = (overlay(Lifetime::Kept), Asked::default());
    write_cluster(&mut overlay, &mut kernel, 0);
    start(&mut overlay, &mut kernel, request(1, Operation::Flush, 0, 0));
    for expected in [Seen::Sync(STORE), BLOCK] {
        assert_eq!(kernel.next(), Some(expected));
        assert_eq!(kernel.carry_out(&mut overlay), NONE);
    }
    assert_eq!(kernel.next(), Some(Seen::Sync(STORE)));
    assert_eq!(kernel.carry_out(&mut overlay), [1]);
    // Nothing is lacking now: one sync does.
    start(&mut overlay, &mut kernel, request(2, Operation::Flush, 0, 0));
    assert_eq!(kernel.next(), Some(Seen::Sync(STORE)));
    assert_eq!(kernel.carry_out(&mut overlay), [2]);
    assert_eq!(kernel.next(), None);
}

#[test]
fn a_bit_that_is_set_while_a_flush_runs_waits_for_the_next() {
    let (mut overlay, mut kernel) = (overlay(Lifetime::Kept), Asked::default());
    write_cluster(&mut overlay, &mut kernel, 0);
    start(&mut overlay, &mut kernel, request(1, Operation::Flush, 0, 0));
    start(
        &mut overlay,
        &mut kernel,
        request(2, Operation::Write, 4096, 4096),
    );
    // The sync began before the write had ended, so it says nothing about it.
    kernel.ops.swap(0, 1);
    assert_eq!(kernel.carry_out(&mut overlay), [2]);
    assert_eq!(kernel.carry_out(&mut overlay), NONE);
    assert_eq!(kernel.next(), Some(BLOCK));
    let Some((KernelOp::Write { segments, .. }, _)) = kernel.ops.front() else {
        panic!("a block is written");
    };
    // SAFETY: the write is in flight.
    let segment = unsafe { **segments };
    // SAFETY: the overlay keeps what its operations point at.
    let first_byte = unsafe { *segment.address() };
    assert_eq!(first_byte, 0b01);
    // Both come while the first runs, and share the next cycle.
    start(&mut overlay, &mut kernel, request(3, Operation::Flush, 0, 0));
    start(&mut overlay, &mut kernel, request(4, Operation::Flush, 0, 0));
    assert_eq!(kernel.carry_out(&mut overlay), NONE);
    assert_eq!(kernel.carry_out(&mut overlay), [1]);
    for expected in [Seen::Sync(STORE), BLOCK] {
        assert_eq!(kernel.next(), Some(expected));
        assert_eq!(kernel.carry_out(&mut overlay), NONE);
    }
    assert_eq!(kernel.carry_out(&mut overlay), [3, 4]);
    assert_eq!((kernel.next(), overlay.in_flight()), (None, 0));
}

#[test]
fn a_durable_write_ends_when_its_bit_is_on_the_medium_too() {
    let (mut overlay, mut kernel) = (overlay(Lifetime::Kept), Asked::default());
    let write = || durable(request(1, Operation::Write, 0, 4096));
    start(&mut overlay, &mut kernel, write());
    let data = || Some(Seen::Write(STORE, DATA_OFFSET_BYTES, 4096, Durability::Durable));
    assert_eq!(kernel.next(), data());
    assert_eq!(kernel.carry_out(&mut overlay), NONE);
    let block = Seen::Write(STORE, BITMAP_OFFSET_BYTES, 4096, Durability::Durable);
    assert_eq!(kernel.next(), Some(block));
    assert_eq!(kernel.carry_out(&mut overlay), [1]);
    // In place from now on.
    start(&mut overlay, &mut kernel, write());
    assert_eq!(kernel.next(), data());
    assert_eq!(kernel.carry_out(&mut overlay), [1]);
    assert_eq!(kernel.next(), None);
}

#[test]
fn a_durable_write_into_a_cluster_whose_bit_is_only_cached_brings_the_bit_along() {
    let (mut overlay, mut kernel) = (overlay(Lifetime::Kept), Asked::default());
    write_cluster(&mut overlay, &mut kernel, 0);
    start(
        &mut overlay,
        &mut kernel,
        durable(request(1, Operation::Write, 512, 512)),
    );
    assert_eq!(kernel.carry_out(&mut overlay), NONE);
    for expected in [Seen::Sync(STORE), BLOCK] {
        assert_eq!(kernel.next(), Some(expected));
        assert_eq!(kernel.carry_out(&mut overlay), NONE);
    }
    assert_eq!(kernel.next(), Some(Seen::Sync(STORE)));
    assert_eq!(kernel.carry_out(&mut overlay), [1]);
}

#[test]
fn a_flush_that_failed_says_so_and_the_next_one_writes_what_it_did_not() {
    let (mut overlay, mut kernel) = (overlay(Lifetime::Kept), Asked::default());
    write_cluster(&mut overlay, &mut kernel, 0);
    for failing in 0..3 {
        start(&mut overlay, &mut kernel, request(1, Operation::Flush, 0, 0));
        for _ in 0..failing {
            assert_eq!(kernel.carry_out(&mut overlay), NONE);
        }
        let ended = kernel.answer(&mut overlay, -libc::EIO);
        assert_eq!(ended, [(1, Err(Failure::Host(libc::EIO)))]);
        assert_eq!(kernel.next(), None);
    }
    start(&mut overlay, &mut kernel, request(2, Operation::Flush, 0, 0));
    for expected in [Seen::Sync(STORE), BLOCK] {
        assert_eq!(kernel.next(), Some(expected));
        kernel.carry_out(&mut overlay);
    }
    assert_eq!(kernel.carry_out(&mut overlay), [2]);
}

#[test]
fn changes_of_one_cluster_that_is_not_there_wait_for_the_first_and_go_on_if_it_fails() {
    let (mut overlay, mut kernel) = (overlay(Lifetime::Kept), Asked::default());
    for (tag, offset) in [(1, 512), (2, 1024), (3, 2048)] {
        start(
            &mut overlay,
            &mut kernel,
            request(tag, Operation::Write, offset, 512),
        );
    }
    assert_eq!(kernel.ops.len(), 1, "the others wait");
    assert_eq!(kernel.next(), Some(Seen::Read(BASE, 0, 4096)));
    kernel.carry_out(&mut overlay);
    let whole = || Seen::Write(STORE, DATA_OFFSET_BYTES, 4096, Durability::Cached);
    assert_eq!(kernel.next(), Some(whole()));
    let ended = kernel.answer(&mut overlay, -libc::ENOSPC);
    assert_eq!(ended, [(1, Err(Failure::Host(libc::ENOSPC)))]);
    // The second one has the cluster now; the third one waits for it.
    assert_eq!(kernel.ops.len(), 1);
    assert_eq!(kernel.next(), Some(Seen::Read(BASE, 0, 4096)));
    kernel.carry_out(&mut overlay);
    assert_eq!(kernel.next(), Some(whole()));
    assert_eq!(kernel.carry_out(&mut overlay), [2]);
    let in_place = Seen::Write(STORE, DATA_OFFSET_BYTES + 2048, 512, Durability::Cached);
    assert_eq!(kernel.next(), Some(in_place));
    assert_eq!(kernel.carry_out(&mut overlay), [3]);
    assert_eq!(overlay.in_flight(), 0);
}

#[test]
fn a_discard_makes_holes_of_whole_clusters_and_a_smaller_one_does_nothing() {
    let (mut overlay, mut kernel) = (overlay(Lifetime::Kept), Asked::default());
    let nothing = overlay.start(request(1, Operation::Discard, 512, 4096), &mut kernel);
    assert!(matches!(nothing, Step::Done(Completion { outcome: Ok(()), .. })));
    start(
        &mut overlay,
        &mut kernel,
        request(2, Operation::Discard, 512, 3 * 4096),
    );
    assert_eq!(
        kernel.next(),
        Some(Seen::Allocate(STORE, DATA_OFFSET_BYTES + 4096, 2 * 4096))
    );
    assert_eq!(kernel.carry_out(&mut overlay), [2]);
    start(&mut overlay, &mut kernel, request(3, Operation::Read, 4096, 8192));
    assert!(matches!(kernel.next(), Some(Seen::Read(STORE, ..))));
    assert_eq!(kernel.carry_out(&mut overlay), [3]);
}

#[test]
fn a_temporary_overlay_has_nothing_to_flush() {
    let (mut overlay, mut kernel) = (overlay(Lifetime::Temporary), Asked::default());
    start(
        &mut overlay,
        &mut kernel,
        durable(request(1, Operation::Write, 0, 4096)),
    );
    let cached = Seen::Write(STORE, DATA_OFFSET_BYTES, 4096, Durability::Cached);
    assert_eq!(kernel.next(), Some(cached));
    assert_eq!(kernel.carry_out(&mut overlay), [1]);
    let flush = overlay.start(request(2, Operation::Flush, 0, 0), &mut kernel);
    assert!(matches!(flush, Step::Done(Completion { outcome: Ok(()), .. })));
    assert!(!overlay.flushes_at_end());
    assert!(super::tests::overlay(Lifetime::Kept).flushes_at_end());
}

#[test]
fn a_full_reactor_gives_every_kind_of_request_back_untouched() {
    let (mut overlay, mut kernel) = (overlay(Lifetime::Kept), Asked::default());
    let space = Space::Stays;
    kernel.room = Some(0);
    for (operation, offset, len) in [
        (Operation::Read, 0, 512),
        (Operation::Write, 0, 4096),
        (Operation::Write, 512, 512),
        (Operation::WriteZeroes { space }, 512, 8192),
        (Operation::Discard, 0, 8192),
        (Operation::Grow, 0, 2 * SIZE_BYTES),
        (Operation::Flush, 0, 0),
    ] {
        let step = overlay.start(request(7, operation, offset, len), &mut kernel);
        let Step::Busy(back) = step else {
            panic!("{operation:?}: {step:?}");
        };
        assert_eq!(
            (back.tag, back.operation, back.offset_bytes, back.len_bytes),
            (7, operation, offset, len)
        );
        let bytes: usize = back.segments.iter().map(Segment::len_bytes).sum();
        assert_eq!(bytes as u64, if back.segments.is_empty() { 0 } else { len });
        assert_eq!(overlay.in_flight(), 0);
    }
    // Nothing of them is left in the way.
    kernel.room = None;
    start(&mut overlay, &mut kernel, request(8, Operation::Write, 512, 8192));
    start(
        &mut overlay,
        &mut kernel,
        request(9, Operation::Grow, 0, 2 * SIZE_BYTES),
    );
    assert_eq!(kernel.ops.len(), 2);
}

#[test]
fn a_reactor_with_room_for_one_operation_is_enough() {
    let (mut overlay, mut kernel) = (overlay(Lifetime::Kept), Asked::default());
    kernel.room = Some(1);
    write_cluster(&mut overlay, &mut kernel, 1);
    write_cluster(&mut overlay, &mut kernel, 3);
    for (operation, len) in [
        (Operation::Read, 5 * 4096),
        (Operation::Write, 4 * 4096 + 512),
        (Operation::Read, 5 * 4096),
        (Operation::Flush, 0),
    ] {
        start(&mut overlay, &mut kernel, request(5, operation, 0, len));
        let mut ended = Vec::new();
        while kernel.next().is_some() {
            ended.extend(kernel.carry_out(&mut overlay));
        }
        assert_eq!(ended, [5], "{operation:?}");
    }
}
