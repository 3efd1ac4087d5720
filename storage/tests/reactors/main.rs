//! Both reactors, and a raw image on each, against the real kernel: one set of promises, kept twice.
#![expect(unsafe_code, reason = "segments point into the test's own buffers")]
#![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

mod sockets;

use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::ptr::NonNull;
use std::time::{Duration, Instant};

use coracle_storage::backend::{Access, Backend, Step};
use coracle_storage::engine::{Engine, PreparedReactor};
use coracle_storage::lease::{Lock, Owner, Terms};
use coracle_storage::open::open;
use coracle_storage::reactor::{FileSlot, Full, KernelOp, Patience, Reach, Reactor, Token, Wake};
use coracle_storage::request::{Completion, Durability, Failure, Operation, Request, Segment, Space};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const OPS_MAX: u32 = 8;

fn reactor(engine: Engine) -> Box<dyn Reactor> {
    let prepared = PreparedReactor::new(engine, OPS_MAX, Reach::FilesAndSockets);
    // The fallback to plain system calls would make these tests say nothing about io_uring.
    assert_eq!(
        matches!(prepared, PreparedReactor::Ring(_)),
        engine == Engine::Async,
        "this host refuses io_uring, which these tests need"
    );
    prepared.enable().unwrap()
}

/// An image of a file, its reactor, and the file to look at.
struct Disk {
    image: Box<dyn Backend>,
    io: Box<dyn Reactor>,
    file: tempfile::NamedTempFile,
}

const SIZE_BYTES: u64 = 1 << 20;

impl Disk {
    fn new(engine: Engine) -> Self {
        Self::on(engine, tempfile::NamedTempFile::new().unwrap())
    }

    fn on(engine: Engine, file: tempfile::NamedTempFile) -> Self {
        file.as_file().set_len(SIZE_BYTES).unwrap();
        let owner = Owner::of_this_process("test");
        let terms = Terms::new(Lock::None, &owner);
        let image = open(file.path().to_str().unwrap(), Access::ReadWrite, &terms).unwrap();
        let image = image.backend;
        let mut io = reactor(engine);
        io.register(&image.files()).unwrap();
        Self { image, io, file }
    }

    fn complete(&mut self, request: Request) -> Completion {
        match self.image.start(request, self.io.as_mut()) {
            Step::Done(completion) => return completion,
            Step::Pending => {}
            Step::Busy(_) => panic!("an idle reactor has room"),
        }
        loop {
            let mut wakes = Vec::new();
            self.io.wait(Patience::UntilEvent, &mut wakes).unwrap();
            for wake in wakes {
                let Wake::Done(event) = wake else { continue };
                if let Step::Done(completion) = self.image.resume(event, self.io.as_mut()) {
                    return completion;
                }
            }
        }
    }

    fn run(
        &mut self,
        operation: Operation,
        offset_bytes: u64,
        buffers: &mut [Vec<u8>],
    ) -> Result<(), Failure> {
        let segments: Vec<Segment> = buffers
            .iter_mut()
            // SAFETY: the buffers outlive the request, which `complete` waits for.
            .map(|buffer| unsafe { Segment::new(NonNull::new(buffer.as_mut_ptr()).unwrap(), buffer.len()) })
            .collect();
        let len_bytes = segments.iter().map(|segment| segment.len_bytes() as u64).sum();
        self.complete(Request {
            tag: 1,
            operation,
            offset_bytes,
            len_bytes,
            durability: Durability::Cached,
            segments,
        })
        .outcome
    }

    fn range(&mut self, operation: Operation, offset_bytes: u64, len_bytes: u64) -> Result<(), Failure> {
        self.complete(Request {
            tag: 1,
            operation,
            offset_bytes,
            len_bytes,
            durability: Durability::Cached,
            segments: Vec::new(),
        })
        .outcome
    }
}

fn what_is_written_is_in_the_file_and_is_read_back(engine: Engine) {
    let mut disk = Disk::new(engine);
    let mut written = [vec![1; 512], vec![2; 4096], vec![3; 512]];
    assert_eq!(disk.run(Operation::Write, 1024, &mut written), Ok(()));
    assert_eq!(disk.run(Operation::Flush, 0, &mut []), Ok(()));
    let mut in_file = vec![0; 5120];
    disk.file.as_file().read_exact_at(&mut in_file, 1024).unwrap();
    assert_eq!(in_file, written.concat());
    let mut read = [vec![0; 5120]];
    assert_eq!(disk.run(Operation::Read, 1024, &mut read), Ok(()));
    assert_eq!(read.concat(), in_file);
}

fn discarded_and_zeroed_ranges_read_as_zeros(engine: Engine) {
    let mut disk = Disk::new(engine);
    let zeroing = [
        Operation::Discard,
        Operation::WriteZeroes {
            space: Space::MayBeFreed,
        },
        Operation::WriteZeroes { space: Space::Stays },
    ];
    for operation in zeroing {
        assert_eq!(disk.run(Operation::Write, 0, &mut [vec![9; 64 * 1024]]), Ok(()));
        assert_eq!(disk.range(operation, 4096, 8192), Ok(()));
        let mut read = vec![1; 64 * 1024];
        disk.file.as_file().read_exact_at(&mut read, 0).unwrap();
        let zeros = read
            .iter()
            .enumerate()
            .filter(|(_, byte)| **byte == 0)
            .map(|(at, _)| at);
        assert!(zeros.eq(4096..4096 + 8192), "{operation:?}");
    }
}

fn an_image_that_was_truncated_says_so(engine: Engine) {
    let mut disk = Disk::new(engine);
    disk.file.as_file().set_len(4096).unwrap();
    assert_eq!(
        disk.run(Operation::Read, 2048, &mut [vec![0; 4096]]),
        Err(Failure::Truncated)
    );
}

fn a_request_of_more_segments_than_one_operation_takes_is_carried_out_whole(engine: Engine) {
    let mut disk = Disk::new(engine);
    let mut buffers = vec![vec![7; 512]; 1500];
    assert_eq!(disk.run(Operation::Write, 0, &mut buffers), Ok(()));
    let mut in_file = vec![0; 1500 * 512];
    disk.file.as_file().read_exact_at(&mut in_file, 0).unwrap();
    assert!(in_file.iter().all(|byte| *byte == 7));
}

fn a_full_reactor_refuses_and_takes_more_after_an_event(engine: Engine) {
    let mut disk = Disk::new(engine);
    let flush = KernelOp::SyncData { file: FileSlot(0) };
    for number in 0..u64::from(OPS_MAX) {
        assert_eq!(disk.io.submit(flush, Token(number)), Ok(()));
    }
    assert_eq!(disk.io.submit(flush, Token(99)), Err(Full));
    let mut ended = Vec::new();
    while ended.len() < OPS_MAX as usize {
        let mut wakes = Vec::new();
        disk.io.wait(Patience::UntilEvent, &mut wakes).unwrap();
        for wake in wakes {
            let Wake::Done(event) = wake else {
                panic!("{wake:?}")
            };
            assert_eq!(event.result, 0);
            ended.push(event.token.0);
        }
    }
    ended.sort_unstable();
    assert!(ended.into_iter().eq(0..u64::from(OPS_MAX)));
    assert_eq!(disk.io.submit(flush, Token(99)), Ok(()));
}

/// Files in memory are read at once, but what follows on the read may need the ring.
fn an_image_in_memory_grows_when_the_reactor_has_room_for_it(engine: Engine) {
    let mut disk = Disk::on(engine, tempfile::NamedTempFile::new_in("/dev/shm").unwrap());
    let request = |operation, len_bytes| Request {
        tag: 1,
        operation,
        offset_bytes: 0,
        len_bytes,
        durability: Durability::Cached,
        segments: Vec::new(),
    };
    for _ in 0..OPS_MAX {
        let discard = request(Operation::Discard, SIZE_BYTES);
        assert!(matches!(
            disk.image.start(discard, disk.io.as_mut()),
            Step::Pending
        ));
    }
    let grow = request(Operation::Grow, 2 * SIZE_BYTES);
    assert!(matches!(disk.image.start(grow, disk.io.as_mut()), Step::Busy(_)));
    while disk.image.in_flight() > 0 {
        let mut wakes = Vec::new();
        disk.io.wait(Patience::UntilEvent, &mut wakes).unwrap();
        for wake in wakes {
            let Wake::Done(event) = wake else { continue };
            disk.image.resume(event, disk.io.as_mut());
        }
    }
    let grow = request(Operation::Grow, 2 * SIZE_BYTES);
    assert_eq!(disk.complete(grow).outcome, Ok(()));
    assert_eq!(disk.file.as_file().metadata().unwrap().len(), 2 * SIZE_BYTES);
}

fn an_unregistered_file_is_refused_by_the_operation(engine: Engine) {
    let mut disk = Disk::new(engine);
    disk.io
        .submit(KernelOp::SyncData { file: FileSlot(3) }, Token(5))
        .unwrap();
    let mut wakes = Vec::new();
    disk.io.wait(Patience::UntilEvent, &mut wakes).unwrap();
    assert!(
        matches!(wakes.as_slice(), [Wake::Done(event)] if event.token == Token(5) && event.result == -libc::EBADF),
        "{wakes:?}"
    );
}

/// The wake-ups of one wait that must not take for ever.
fn woken(io: &mut dyn Reactor) -> Vec<Wake> {
    let mut wakes = Vec::new();
    io.set_timer(Some(Instant::now() + Duration::from_secs(10)));
    io.wait(Patience::UntilEvent, &mut wakes).unwrap();
    io.set_timer(None);
    wakes
}

fn is_signal(wakes: &[Wake], token: Token) -> bool {
    matches!(wakes, [Wake::Signalled(signalled)] if *signalled == token)
}

fn every_write_to_a_watched_eventfd_is_reported(engine: Engine) {
    let mut io = reactor(engine);
    let (first, second) = (
        EventFd::new(EFD_NONBLOCK).unwrap(),
        EventFd::new(EFD_NONBLOCK).unwrap(),
    );
    io.watch(first.as_raw_fd(), Token(1)).unwrap();
    io.watch(second.as_raw_fd(), Token(2)).unwrap();
    for _ in 0..100 {
        first.write(1).unwrap();
        assert!(is_signal(&woken(io.as_mut()), Token(1)));
        second.write(1).unwrap();
        assert!(is_signal(&woken(io.as_mut()), Token(2)));
    }
}

fn a_write_from_another_thread_ends_the_wait(engine: Engine) {
    let mut io = reactor(engine);
    let eventfd = EventFd::new(EFD_NONBLOCK).unwrap();
    io.watch(eventfd.as_raw_fd(), Token(1)).unwrap();
    let writer = eventfd.try_clone().unwrap();
    let thread = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(20));
        writer.write(1).unwrap();
    });
    assert!(is_signal(&woken(io.as_mut()), Token(1)));
    thread.join().unwrap();
}

fn a_write_before_the_watch_is_reported(engine: Engine) {
    let mut io = reactor(engine);
    let eventfd = EventFd::new(EFD_NONBLOCK).unwrap();
    eventfd.write(1).unwrap();
    io.watch(eventfd.as_raw_fd(), Token(1)).unwrap();
    assert!(is_signal(&woken(io.as_mut()), Token(1)));
}

fn an_eventfd_that_is_no_longer_watched_is_not_reported(engine: Engine) {
    let mut io = reactor(engine);
    let (gone, kept) = (
        EventFd::new(EFD_NONBLOCK).unwrap(),
        EventFd::new(EFD_NONBLOCK).unwrap(),
    );
    io.watch(gone.as_raw_fd(), Token(1)).unwrap();
    io.watch(kept.as_raw_fd(), Token(2)).unwrap();
    // A signal that is already on its way when the watch is taken back does not surface either.
    gone.write(1).unwrap();
    io.unwatch(Token(1)).unwrap();
    gone.write(1).unwrap();
    kept.write(1).unwrap();
    let mut wakes = Vec::new();
    while wakes.is_empty() {
        wakes = woken(io.as_mut());
    }
    assert!(is_signal(&wakes, Token(2)), "{wakes:?}");
    // The place serves the next watch.
    io.watch(gone.as_raw_fd(), Token(3)).unwrap();
    gone.write(1).unwrap();
    assert!(is_signal(&woken(io.as_mut()), Token(3)));
}

fn a_timer_expires_once_at_its_time_and_the_last_deadline_counts(engine: Engine) {
    let mut io = reactor(engine);
    let start = Instant::now();
    io.set_timer(Some(start + Duration::from_secs(3600)));
    io.set_timer(Some(start + Duration::from_millis(30)));
    let mut wakes = Vec::new();
    while wakes.is_empty() {
        io.wait(Patience::UntilEvent, &mut wakes).unwrap();
    }
    assert!(matches!(wakes.as_slice(), [Wake::TimerExpired]), "{wakes:?}");
    assert!(start.elapsed() >= Duration::from_millis(30));
    wakes.clear();
    io.wait(Patience::None, &mut wakes).unwrap();
    assert!(wakes.is_empty());
}

fn an_impatient_wait_returns_with_nothing(engine: Engine) {
    let mut io = reactor(engine);
    let mut wakes = Vec::new();
    io.set_timer(Some(Instant::now() + Duration::from_secs(3600)));
    io.wait(Patience::None, &mut wakes).unwrap();
    assert!(wakes.is_empty());
}

/// Makes a test of each promise for each reactor.
macro_rules! kept_by_both {
    ($ring:ident $plain:ident of $place:path: $($promise:ident)*) => {
        mod $ring {
            use $place as place;
            $(#[test] fn $promise() { place::$promise(super::Engine::Async); })*
        }
        mod $plain {
            use $place as place;
            $(#[test] fn $promise() { place::$promise(super::Engine::Sync); })*
        }
    };
}

kept_by_both! { ring plain of crate:
    what_is_written_is_in_the_file_and_is_read_back
    discarded_and_zeroed_ranges_read_as_zeros
    an_image_that_was_truncated_says_so
    a_request_of_more_segments_than_one_operation_takes_is_carried_out_whole
    a_full_reactor_refuses_and_takes_more_after_an_event
    an_image_in_memory_grows_when_the_reactor_has_room_for_it
    an_unregistered_file_is_refused_by_the_operation
    every_write_to_a_watched_eventfd_is_reported
    a_write_from_another_thread_ends_the_wait
    a_write_before_the_watch_is_reported
    an_eventfd_that_is_no_longer_watched_is_not_reported
    a_timer_expires_once_at_its_time_and_the_last_deadline_counts
    an_impatient_wait_returns_with_nothing
}

kept_by_both! { ring_sockets plain_sockets of crate::sockets:
    segments_are_sent_and_received_in_order
    several_messages_go_out_with_one_wait
    a_send_into_full_buffers_is_short_or_waits_and_nothing_is_lost
    a_receive_ends_with_the_first_bytes_that_come_or_are_there
    a_receive_that_waits_does_so_until_the_mark_is_reached
    a_mark_that_is_changed_holds_for_what_waits_already
    the_end_of_the_stream_ends_a_receive
    a_waiting_receive_is_cancelled
    a_cancel_finds_what_was_submitted_just_before_it
    a_waiting_send_is_cancelled
    a_waiting_connect_is_cancelled_and_its_place_serves_another
    a_refused_connect_says_so
    a_socket_of_the_newer_family_connects_too
    an_empty_place_is_refused
    an_option_is_set_on_the_socket
    a_taken_socket_goes_on_in_another_reactor_of_either_kind
    a_descriptor_that_was_registered_stays_its_owners
    a_new_socket_closes_the_old_one
    a_closed_socket_is_seen_by_its_peer_as_reset_if_it_was_asked_for
    a_connection_that_its_peer_resets_ends_what_waits
    a_watch_and_a_timer_are_served_while_a_receive_waits
    an_operation_that_waits_keeps_its_room
    a_reactor_is_dropped_although_operations_wait_for_ever
}

#[test]
fn the_kernel_starts_no_more_workers_for_a_ring_than_it_may() {
    const OPS: u32 = 64;
    let file = tempfile::tempfile().unwrap();
    // Set up on one thread and used on another, as a device does it.
    let prepared = PreparedReactor::new(Engine::Async, OPS, Reach::Files);
    let most = std::thread::spawn(move || {
        let mut io = prepared.enable().unwrap();
        io.register(&[file.as_raw_fd().into()]).unwrap();
        let mut most = 0;
        for round in 0..20 {
            file.write_all_at(&vec![round; 1 << 20], 0).unwrap();
            for number in 0..u64::from(OPS) {
                io.submit(KernelOp::SyncData { file: FileSlot(0) }, Token(number))
                    .unwrap();
            }
            let mut wakes = Vec::new();
            while wakes.len() < OPS as usize {
                io.wait(Patience::UntilEvent, &mut wakes).unwrap();
                most = most.max(kernel_workers_of_this_thread());
            }
        }
        most
    });
    let most = most.join().unwrap();
    assert!((1..=5).contains(&most), "{most} workers");
}

/// How many threads the kernel runs for rings of the calling thread: it names them after it.
fn kernel_workers_of_this_thread() -> usize {
    let name = format!("iou-wrk-{}", rustix::thread::gettid().as_raw_nonzero());
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let comm =
        |task: std::fs::DirEntry| std::fs::read_to_string(task.path().join("comm")).unwrap_or_default();
    tasks
        .flatten()
        .map(comm)
        .filter(|comm| comm.trim_end() == name)
        .count()
}
