//! Pipelines on files, with both reactors.
#![expect(
    unsafe_code,
    reason = "segments point into a test's buffers, which outlive their requests"
)]
#![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

use std::fs::File;
use std::io::Write;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;

use super::*;
use crate::backend::{Access, Discard};
use crate::engine::Engine;
use crate::raw::Raw;
use crate::reactor::{Event, ImageFile, Submit};
use crate::request::{Durability, Failure, Operation, Segment};

const BLOCK_BYTES: usize = 4096;

fn file(blocks: usize) -> (File, Box<Raw>) {
    let file = tempfile::tempfile().unwrap();
    let size_bytes = (blocks * BLOCK_BYTES) as u64;
    file.set_len(size_bytes).unwrap();
    let image = Raw::new(file.try_clone().unwrap(), geometry(size_bytes));
    (file, Box::new(image))
}

fn geometry(size_bytes: u64) -> Geometry {
    Geometry {
        size_bytes,
        logical_block_bytes: 512,
        physical_block_bytes: 4096,
        access: Access::ReadWrite,
        discard: Discard::Supported,
    }
}

fn transfer(operation: Operation, block: usize, memory: &mut [u8]) -> Request {
    // SAFETY: a test keeps its buffers until its requests have ended, or its pipeline has been dropped.
    let segment = unsafe { Segment::new(NonNull::from(&mut *memory).cast(), memory.len()) };
    Request {
        tag: block as u64,
        operation,
        offset_bytes: (block * BLOCK_BYTES) as u64,
        len_bytes: memory.len() as u64,
        durability: Durability::Cached,
        segments: vec![segment],
    }
}

fn block(number: usize) -> Vec<u8> {
    vec![u8::try_from(number % 251).unwrap() + 1; BLOCK_BYTES]
}

fn completion(pipeline: &mut Pipeline) -> Completion {
    let Next::Completed(completion) = pipeline.next(None).unwrap() else {
        panic!("nothing else is waited for");
    };
    completion
}

/// The image that `make` has made, on io_uring if the host has it, and on plain system calls.
fn on_both<'a>(make: impl Fn() -> Box<dyn Backend> + 'a) -> impl Iterator<Item = Pipeline> + 'a {
    [Engine::Async, Engine::Sync].into_iter().map(move |engine| {
        let pipeline = match engine {
            Engine::Async => Pipeline::new(make(), 8),
            Engine::Sync => Pipeline::plain(make(), 8),
        };
        pipeline.unwrap()
    })
}

#[test]
fn each_request_ends_once_and_with_its_own_memory() {
    const BLOCKS: usize = 100;
    let (file, image) = file(BLOCKS);
    for mut pipeline in on_both(|| image.fork().unwrap()) {
        file.set_len(0).unwrap();
        file.set_len((BLOCKS * BLOCK_BYTES) as u64).unwrap();
        let mut blocks: Vec<_> = (0..BLOCKS).map(block).collect();
        let mut ended = Vec::new();
        let mut most = 0;
        for (number, memory) in blocks.iter_mut().enumerate() {
            if !pipeline.has_room() {
                let completion = completion(&mut pipeline);
                assert_eq!(completion.outcome, Ok(()));
                ended.push(usize::try_from(completion.request.tag).unwrap());
            }
            pipeline.start(transfer(Operation::Write, number, memory));
            most = most.max(pipeline.in_flight());
        }
        while pipeline.in_flight() > 0 {
            let completion = completion(&mut pipeline);
            ended.push(usize::try_from(completion.request.tag).unwrap());
        }
        ended.sort_unstable();
        assert_eq!((most, ended), (8, (0..BLOCKS).collect()));
        let mut read = vec![0; BLOCKS * BLOCK_BYTES];
        file.read_exact_at(&mut read, 0).unwrap();
        assert!(read == blocks.concat());
    }
}

#[test]
fn what_was_started_reaches_the_file_without_a_wait() {
    let (file, image) = file(1);
    for mut pipeline in on_both(|| image.fork().unwrap()) {
        file.write_all_at(&[0; BLOCK_BYTES], 0).unwrap();
        let mut memory = block(7);
        pipeline.start(transfer(Operation::Write, 0, &mut memory));
        pipeline.submit().unwrap();
        let until = Instant::now() + Duration::from_secs(20);
        let mut read = vec![0; BLOCK_BYTES];
        while read != memory {
            assert!(Instant::now() < until, "the kernel has not heard of it");
            file.read_exact_at(&mut read, 0).unwrap();
        }
        assert_eq!(completion(&mut pipeline).outcome, Ok(()));
    }
}

#[test]
fn a_watched_descriptor_is_told_and_nothing_is_read_of_it() {
    let (_file, image) = file(1);
    for mut pipeline in on_both(|| image.fork().unwrap()) {
        let (reader, mut writer) = io::pipe().unwrap();
        pipeline.watch(reader.as_raw_fd()).unwrap();
        let short = Duration::from_millis(5);
        assert!(matches!(pipeline.next(Some(short)).unwrap(), Next::TimedOut));
        for byte in [b"a", b"b"] {
            writer.write_all(byte).unwrap();
            let Next::Signalled(fd) = pipeline.next(Some(Duration::from_secs(20))).unwrap() else {
                panic!("the pipe is readable");
            };
            assert_eq!(fd, reader.as_raw_fd());
            let mut read = [0; 1];
            io::Read::read_exact(&mut &reader, &mut read).unwrap();
            assert_eq!(&read, byte);
        }
        assert!(matches!(
            pipeline.next(Some(Duration::ZERO)).unwrap(),
            Next::TimedOut
        ));
    }
}

#[test]
fn a_completion_is_told_however_short_the_limit() {
    let (_file, image) = file(1);
    let mut pipeline = Pipeline::plain(image, 8).unwrap();
    let mut memory = block(0);
    pipeline.start(transfer(Operation::Read, 0, &mut memory));
    assert!(matches!(
        pipeline.next(Some(Duration::ZERO)).unwrap(),
        Next::Completed(_)
    ));
}

#[test]
fn a_failure_of_the_storage_ends_its_request_only() {
    let (_file, image) = file(2);
    for mut pipeline in on_both(|| image.fork().unwrap()) {
        let (mut first, mut second) = (block(1), block(2));
        pipeline.start(transfer(Operation::Write, 2, &mut first));
        pipeline.start(transfer(Operation::Write, 1, &mut second));
        let mut outcomes = [completion(&mut pipeline), completion(&mut pipeline)]
            .map(|completion| (completion.request.tag, completion.outcome));
        outcomes.sort_by_key(|(tag, _)| *tag);
        assert_eq!(outcomes, [(1, Ok(())), (2, Err(Failure::OutOfRange))]);
        drop(pipeline.into_image());
    }
}

#[test]
fn a_pipeline_is_dropped_when_the_kernel_has_let_its_memory_go() {
    let (file, image) = file(64);
    for mut pipeline in on_both(|| image.fork().unwrap()) {
        let mut memory = block(3).repeat(64);
        for (number, part) in (0..8).zip(memory.chunks_mut(8 * BLOCK_BYTES)) {
            pipeline.start(transfer(Operation::Write, number * 8, part));
        }
        drop(pipeline);
        // What was taken on is carried out, with the bytes of then.
        memory.fill(0xff);
        let mut read = vec![0; 64 * BLOCK_BYTES];
        file.read_exact_at(&mut read, 0).unwrap();
        assert!(read == block(3).repeat(64));
    }
}

/// An image that has no room at first, and is lost at some time.
struct Fickle {
    busy: usize,
    requests: Vec<Request>,
    loss: Option<String>,
    alarm: Option<Instant>,
}

impl Backend for Fickle {
    fn geometry(&self) -> Geometry {
        geometry(4096)
    }

    fn files(&self) -> Vec<ImageFile> {
        Vec::new()
    }

    fn start(&mut self, request: Request, io: &mut dyn Submit) -> Step {
        self.alarm = Some(io.now() + Duration::from_millis(5));
        if self.busy > 0 {
            self.busy -= 1;
            return Step::Busy(request);
        }
        self.requests.push(request);
        Step::Pending
    }

    fn resume(&mut self, _event: Event, _io: &mut dyn Submit) -> Step {
        unreachable!("it submits nothing")
    }

    fn fork(&self) -> Option<Box<dyn Backend>> {
        None
    }

    fn next_completion(&mut self) -> Option<Completion> {
        let is_over = self.alarm.is_none() && self.loss.is_none();
        let request = if is_over { self.requests.pop() } else { None };
        request.map(|request| Completion {
            request,
            outcome: Ok(()),
        })
    }

    fn in_flight(&self) -> usize {
        self.requests.len()
    }

    fn alarm(&self) -> Option<Instant> {
        self.alarm
    }

    fn wake(&mut self, _io: &mut dyn Submit) {
        self.alarm = None;
    }

    fn loss(&self) -> Option<&str> {
        self.loss.as_deref()
    }
}

fn fickle(busy: usize) -> Box<Fickle> {
    Box::new(Fickle {
        busy,
        requests: Vec::new(),
        loss: None,
        alarm: None,
    })
}

#[test]
fn a_request_that_found_no_room_is_offered_until_it_is_taken() {
    for mut pipeline in on_both(|| fickle(3)) {
        let mut memory = block(0);
        pipeline.start(transfer(Operation::Read, 0, &mut memory));
        assert_eq!(completion(&mut pipeline).request.tag, 0);
    }
}

#[test]
fn the_loss_of_an_image_ends_the_wait_with_its_reason() {
    let make = || -> Box<dyn Backend> {
        let mut image = fickle(0);
        image.loss = Some("its lease is another's".to_owned());
        image
    };
    for mut pipeline in on_both(make) {
        let mut memory = block(0);
        pipeline.start(transfer(Operation::Read, 0, &mut memory));
        let lost = pipeline.next(None).unwrap_err();
        assert_eq!(lost.to_string(), "the image is lost: its lease is another's");
        let begun = Instant::now();
        drop(pipeline);
        assert!(begun.elapsed() < PARTING_MAX, "there is nothing to wait for");
    }
}
