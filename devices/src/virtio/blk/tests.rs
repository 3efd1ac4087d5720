//! The device from a driver's side: a driver that writes rings into memory, a real worker, real files.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test's panic is its failure"
)]

mod changes;
mod network;
mod pace;
mod queues;
mod rig;
mod sim;
mod trace;

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use coracle_storage::backend::{Access, Backend, Discard, Geometry, Step};
use coracle_storage::engine::Engine;
use coracle_storage::lease::Succession;
use coracle_storage::limit::{RateLimiterConfig, TokenBucketConfig};
use coracle_storage::overlay::OverlayConfig;
use coracle_storage::raw::Raw;
use coracle_storage::reactor::{Event, ImageFile, Reach, Submit};
use coracle_storage::request::{Durability, Request};
use proptest::prelude::*;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES,
};
use vmm_sys_util::eventfd::EventFd;

use super::config::{CacheType, Disk, DriveConfig};
use super::control::ControlError;
use super::device::Blk;
use super::space::{FEATURE_CONFIG_WCE, FEATURE_FLUSH, FEATURE_MQ, WRITEBACK};
use crate::virtio::conformance::{BUFFERS, Subject, conforms};
use crate::virtio::device::{StartError, StopError, VirtioDevice};
use crate::virtio::ring::{QueueState, Virtqueue};
use crate::virtio::testing::{DriverRing, Piece};
use rig::*;

fn what_the_guest_writes_is_in_the_image_and_is_read_back(engine: Engine) {
    let mut rig = Rig::new(engine);
    assert_eq!(rig.request(VIRTIO_BLK_T_OUT, 3, &[0x5a; 4096]).0, OK);
    assert_eq!(rig.request(VIRTIO_BLK_T_FLUSH, 0, &[]).0, OK);
    assert_eq!(rig.in_file(3 * 512, 4096), [0x5a; 4096]);
    assert_eq!(
        rig.request(VIRTIO_BLK_T_IN, 3, &[0; 4096]),
        (OK, vec![0x5a; 4096])
    );
    let metrics = rig.metrics();
    assert_eq!(
        (metrics.write_bytes.count(), metrics.read_bytes.count()),
        (4096, 4096)
    );
    assert_eq!((metrics.write_count.count(), metrics.flush_count.count()), (1, 1));
}

fn a_request_may_be_cut_into_descriptors_anywhere(engine: Engine) {
    let mut rig = Rig::new(engine);
    rig.file.as_file().write_all_at(&[7; 1024], 0).unwrap();
    let at = REQUESTS;
    rig.driver.write(at, &header(VIRTIO_BLK_T_IN, 0));
    // The header in two pieces; data and status in one piece.
    rig.driver.offer_indirect(
        0x8000,
        &[
            Piece::Readable(at, 5),
            Piece::Readable(at + 5, 11),
            Piece::Writable(at + DATA, 300),
            Piece::Writable(at + DATA + 300, 725),
        ],
    );
    rig.kick();
    assert_eq!(rig.used().1, 1025);
    let answer = rig.driver.read(at + DATA, 1025);
    assert_eq!((&answer[..1024], answer[1024]), (&[7; 1024][..], OK));
}

fn what_lies_outside_the_disk_or_is_no_whole_sector_is_refused(engine: Engine) {
    let mut rig = Rig::new(engine);
    let sectors = IMAGE_BYTES / 512;
    for (sector, len) in [(sectors, 512), (sectors - 1, 1024), (u64::MAX, 512), (0, 511)] {
        assert_eq!(
            rig.request(VIRTIO_BLK_T_OUT, sector, &vec![1; len]).0,
            IO_ERROR,
            "{sector} {len}"
        );
        assert_eq!(
            rig.request(VIRTIO_BLK_T_IN, sector, &vec![1; len]).0,
            IO_ERROR,
            "{sector} {len}"
        );
    }
    assert!(rig.in_file(0, 1 << 20).iter().all(|byte| *byte == 0));
    assert_eq!(rig.request(VIRTIO_BLK_T_OUT, sectors - 1, &[1; 512]).0, OK);
}

fn a_read_only_disk_refuses_writes_and_lets_a_flush_pass(engine: Engine) {
    let mut rig = Rig::read_only(engine);
    assert_eq!(rig.request(VIRTIO_BLK_T_OUT, 0, &[1; 512]).0, IO_ERROR);
    assert_eq!(rig.request(VIRTIO_BLK_T_FLUSH, 0, &[]).0, OK);
    assert_eq!(
        rig.request(VIRTIO_BLK_T_DISCARD, 0, &range(0, 8, 0)).0,
        UNSUPPORTED
    );
    assert_eq!(rig.request(VIRTIO_BLK_T_IN, 0, &[1; 512]), (OK, vec![0; 512]));
}

fn unknown_requests_and_flags_are_unsupported(engine: Engine) {
    let mut rig = Rig::new(engine);
    assert_eq!(rig.request(99, 0, &[0; 512]).0, UNSUPPORTED);
    assert_eq!(
        rig.request(VIRTIO_BLK_T_DISCARD, 0, &range(0, 8, 1)).0,
        UNSUPPORTED
    );
    assert_eq!(
        rig.request(VIRTIO_BLK_T_WRITE_ZEROES, 0, &range(0, 8, 2)).0,
        UNSUPPORTED
    );
    assert_eq!(rig.metrics().invalid_reqs_count.count(), 3);
}

fn ranges_are_zeroed_and_discarded(engine: Engine) {
    let mut rig = Rig::new(engine);
    for (kind, flags) in [
        (VIRTIO_BLK_T_DISCARD, 0),
        (VIRTIO_BLK_T_WRITE_ZEROES, 0),
        (VIRTIO_BLK_T_WRITE_ZEROES, 1),
    ] {
        rig.file.as_file().write_all_at(&[9; 16384], 0).unwrap();
        assert_eq!(rig.request(kind, 0, &range(8, 8, flags)).0, OK);
        assert_eq!(
            rig.in_file(0, 16384),
            [vec![9; 4096], vec![0; 4096], vec![9; 8192]].concat()
        );
        assert_eq!(rig.request(kind, 0, &range(2040, 16, flags)).0, IO_ERROR);
        assert_eq!(rig.request(kind, 0, &range(0, 8, flags)[..15]).0, IO_ERROR);
    }
}

fn the_serial_number_is_the_beginning_of_the_drives_id(engine: Engine) {
    let mut rig = Rig::new(engine);
    let (status, serial) = rig.request(VIRTIO_BLK_T_GET_ID, 0, &[0; 20]);
    assert_eq!((status, serial.as_slice()), (OK, &b"root_of_a_test_with_"[..]));
    assert_eq!(rig.request(VIRTIO_BLK_T_GET_ID, 0, &[0; 19]).0, IO_ERROR);
}

fn a_chain_that_is_no_request_comes_back_and_the_next_one_is_served(engine: Engine) {
    let mut rig = Rig::new(engine);
    let at = REQUESTS;
    let no_requests: [&[Piece]; 4] = [
        &[Piece::Readable(at, 15), Piece::Writable(at + STATUS, 1)],
        &[Piece::Readable(at, 16)],
        &[Piece::Writable(at, 16)],
        &[Piece::Readable(at, 16), Piece::Writable(1 << 60, 1)],
    ];
    for pieces in no_requests {
        let head = rig.driver.offer_chain(pieces);
        rig.kick();
        assert_eq!(rig.used(), (u32::from(head), 0));
    }
    assert_eq!(rig.metrics().execute_fails.count(), 4);
    assert_eq!(rig.request(VIRTIO_BLK_T_OUT, 0, &[1; 512]).0, OK);
}

fn a_broken_ring_is_given_up_and_the_device_still_stops(engine: Engine) {
    let mut rig = Rig::new(engine);
    rig.driver.set_avail_index(QUEUE_SIZE + 1);
    rig.kick();
    let limit = Instant::now() + Duration::from_secs(10);
    while rig.metrics().event_fails.count() == 0 {
        assert!(Instant::now() < limit, "the ring is given up");
        thread::sleep(Duration::from_micros(50));
    }
    rig.line.read().unwrap();
    assert!(rig.device.stop().unwrap().is_some());
    assert_eq!(rig.metrics().event_fails.count(), 1);
}

fn a_full_queue_is_answered_each_request_once(engine: Engine) {
    let mut rig = Rig::new(engine);
    let per_round = QUEUE_SIZE / 3;
    for _ in 0..20 {
        let offered: Vec<u64> = (0..per_round)
            .map(|_| rig.offer(VIRTIO_BLK_T_IN, 8, &[1; 4096]))
            .collect();
        rig.kick();
        for _ in 0..per_round {
            rig.used();
        }
        assert!(rig.driver.take_used().is_none());
        assert!(offered.into_iter().all(|at| rig.status(at) == OK));
    }
    assert_eq!(rig.metrics().read_count.count(), u64::from(per_round) * 20);
}

fn flushes_that_end_by_one_sync_are_all_answered(engine: Engine) {
    let directory = tempfile::tempdir().unwrap();
    let base = image_file();
    let config = DriveConfig {
        path_on_host: None,
        overlay: Some(OverlayConfig {
            base: base.path().to_str().unwrap().to_owned(),
            path: directory.path().join("overlay").to_str().unwrap().to_owned(),
            keep: true,
        }),
        ..drive(&base, engine)
    };
    let mut rig = Rig::of(config.open(&owner(), Succession::Raises).unwrap().disk, base);
    for round in 0..20 {
        // Its bit is lacking, so the first flush writes it, and the others wait for the next.
        assert_eq!(rig.request(VIRTIO_BLK_T_OUT, 8 * round, &[7; 4096]).0, OK);
        let offered: Vec<u64> = (0..8).map(|_| rig.offer(VIRTIO_BLK_T_FLUSH, 0, &[])).collect();
        rig.kick();
        for _ in 0..8 {
            rig.used();
        }
        assert!(offered.into_iter().all(|at| rig.status(at) == OK));
    }
    assert_eq!(rig.request(VIRTIO_BLK_T_IN, 8, &[0; 4096]), (OK, vec![7; 4096]));
    assert_eq!(rig.in_file(0, 20 * 4096), vec![0; 20 * 4096]);
}

fn stop_gives_the_session_back_and_a_restored_ring_is_looked_at_without_a_kick(engine: Engine) {
    let mut rig = Rig::new(engine);
    assert_eq!(rig.request(VIRTIO_BLK_T_OUT, 0, &[3; 512]).0, OK);
    let mut session = rig.device.stop().unwrap().unwrap();
    assert!(rig.device.stop().unwrap().is_none());
    let offered = rig.offer(VIRTIO_BLK_T_IN, 0, &[0; 512]);
    rig.kick();
    thread::sleep(Duration::from_millis(5));
    assert!(rig.driver.take_used().is_none(), "a stopped device takes nothing");
    // Another process would find the kick's counter at zero.
    let queue = session.queues[0].take().unwrap();
    let state: QueueState = queue.ring.state();
    assert_eq!((state.next_avail, state.next_used), (1, 1));
    rig.kick = Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
    let ring = Virtqueue::restore(Arc::clone(rig.driver.memory()), state, session.features).unwrap();
    rig.device.start(rig.session(ring, session.features)).unwrap();
    rig.used();
    assert_eq!(rig.status(offered), OK);
    // And kicks on the new eventfd are heard.
    assert_eq!(rig.request(VIRTIO_BLK_T_IN, 0, &[0; 512]), (OK, vec![3; 512]));
}

fn a_device_starts_once_and_only_with_its_queue(engine: Engine) {
    let mut rig = Rig::new(engine);
    let ring = || Virtqueue::new(Arc::clone(rig.driver.memory()), rig.driver.layout(), 0).unwrap();
    let second = rig.session(ring(), 0);
    let mut without_queue = rig.session(ring(), 0);
    without_queue.queues[0] = None;
    assert!(matches!(rig.device.start(second), Err(StartError::Started)));
    rig.device.stop().unwrap();
    assert!(matches!(
        rig.device.start(without_queue),
        Err(StartError::QueueMissing(0))
    ));
}

fn an_image_is_replaced_only_while_the_device_is_stopped(engine: Engine) {
    let mut rig = Rig::new(engine);
    let other = image_file();
    other.as_file().set_len(2 * IMAGE_BYTES).unwrap();
    other.as_file().write_all_at(&[0xcc; 512], 0).unwrap();
    let config = drive(&other, engine);
    assert!(matches!(
        rig.control.replace(config.open_image(&owner()).unwrap().backend),
        Err(ControlError::Serving)
    ));
    let session = rig.device.stop().unwrap().unwrap();
    let read_only = DriveConfig {
        is_read_only: Some(true),
        ..config.clone()
    };
    assert!(matches!(
        rig.control
            .replace(read_only.open_image(&owner()).unwrap().backend),
        Err(ControlError::Access)
    ));
    rig.control
        .replace(config.open_image(&owner()).unwrap().backend)
        .unwrap();
    rig.device.start(session).unwrap();
    assert_eq!(rig.request(VIRTIO_BLK_T_IN, 0, &[0; 512]), (OK, vec![0xcc; 512]));
    let mut capacity = [0; 8];
    rig.device.read_config(0, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), 2 * IMAGE_BYTES / 512);
    let metrics = rig.metrics();
    assert_eq!(
        (metrics.update_count.count(), metrics.update_fails.count()),
        (1, 2)
    );
}

fn ops(size: u64, refill_time: u64) -> RateLimiterConfig {
    RateLimiterConfig {
        bandwidth: None,
        ops: Some(TokenBucketConfig {
            size,
            one_time_burst: None,
            refill_time,
        }),
    }
}

fn a_limited_disk_keeps_its_rate_and_costs_no_cpu_while_it_waits(engine: Engine) {
    let id = format!("waits {engine:?}");
    let mut rig = Rig::limited(engine, &id, ops(1, 100));
    let start = Instant::now();
    for _ in 0..4 {
        rig.offer(VIRTIO_BLK_T_IN, 0, &[0; 512]);
    }
    rig.kick();
    for _ in 0..4 {
        rig.used();
    }
    // One token to begin with, and three to wait for.
    assert!(start.elapsed() >= Duration::from_millis(300));
    assert_eq!(rig.metrics().rate_limiter_throttled_events.count(), 3);
    let on_cpu = cpu_time(&format!("io {id}"));
    assert!(
        on_cpu < Duration::from_millis(30),
        "the worker ran for {on_cpu:?}"
    );
}

/// How long the thread of this name has run; the kernel keeps 15 bytes of a name.
fn cpu_time(name: &str) -> Duration {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap();
    let of_task = |file: &str, task: &std::fs::DirEntry| std::fs::read_to_string(task.path().join(file));
    let task = tasks
        .map(Result::unwrap)
        .find(|task| of_task("comm", task).is_ok_and(|comm| comm.trim_end() == name))
        .expect("the worker's thread runs");
    // The first figure is the time on a processor, in nanoseconds.
    let times = of_task("schedstat", &task).unwrap();
    Duration::from_nanos(times.split_whitespace().next().unwrap().parse().unwrap())
}

fn new_limits_count_at_once_and_a_stop_leaves_what_waits_for_tokens_in_the_ring(engine: Engine) {
    let mut rig = Rig::limited(engine, "relimited", ops(1, 3_600_000));
    rig.request(VIRTIO_BLK_T_IN, 0, &[0; 512]);
    rig.offer(VIRTIO_BLK_T_IN, 0, &[0; 512]);
    rig.kick();
    while rig.metrics().rate_limiter_throttled_events.count() == 0 {
        thread::sleep(Duration::from_micros(50));
    }
    rig.control.set_limiter(&ops(1, 3_600_000)).unwrap();
    rig.used();
    let held = rig.offer(VIRTIO_BLK_T_IN, 0, &[0; 512]);
    rig.kick();
    while rig.metrics().rate_limiter_throttled_events.count() == 1 {
        thread::sleep(Duration::from_micros(50));
    }
    let session = rig.device.stop().unwrap().unwrap();
    assert_eq!(session.queues[0].as_ref().unwrap().ring.in_flight(), 0);
    rig.control.set_limiter(&ops(0, 0)).unwrap();
    rig.device.start(session).unwrap();
    rig.used();
    assert_eq!(rig.status(held), OK);
}

fn interrupts_come_as_event_idx_asks(engine: Engine) {
    let mut rig = Rig::new(engine);
    rig.device.stop().unwrap();
    let features = rig.device.features();
    let ring = Virtqueue::new(Arc::clone(rig.driver.memory()), rig.driver.layout(), features).unwrap();
    rig.driver.set_used_event(2);
    rig.device.start(rig.session(ring, features)).unwrap();
    for expected in [0, 0, 1] {
        rig.request(VIRTIO_BLK_T_IN, 0, &[0; 512]);
        // The interrupt follows the used index; the stop waits for both.
        let session = rig.device.stop().unwrap().unwrap();
        assert_eq!(rig.line.read().unwrap_or(0), expected);
        rig.device.start(session).unwrap();
    }
    assert_eq!(rig.reasons.load(Ordering::SeqCst), 1);
}

fn a_driver_that_kicks_only_when_asked_never_waits_for_ever(engine: Engine) {
    let mut rig = Rig::new(engine);
    rig.device.stop().unwrap();
    let features = rig.device.features();
    let ring = Virtqueue::new(Arc::clone(rig.driver.memory()), rig.driver.layout(), features).unwrap();
    rig.device.start(rig.session(ring, features)).unwrap();
    let mut available = 0_u16;
    for round in 0_u16..1000 {
        let burst = 1 + round % 7;
        for _ in 0..burst {
            rig.offer(VIRTIO_BLK_T_IN, 0, &[0; 512]);
            std::sync::atomic::fence(Ordering::SeqCst);
            // 2.7.10: kick if the index passed what the device asked for.
            if rig.driver.avail_event() == available {
                rig.kick();
            }
            available = available.wrapping_add(1);
            if round % 3 == 0 {
                rig.used();
            }
        }
        if round % 3 != 0 {
            for _ in 0..burst {
                rig.used();
            }
        }
    }
    let kicks = rig.metrics().queue_event_count.count();
    assert!(
        kicks < u64::from(available),
        "{kicks} kicks for {available} requests"
    );
}

/// Makes a test of each promise for each engine.
macro_rules! kept_by_both {
    ($($promise:ident)*) => {
        mod ring {
            $(#[test] fn $promise() { super::$promise(super::Engine::Async); })*
        }
        mod plain {
            $(#[test] fn $promise() { super::$promise(super::Engine::Sync); })*
        }
    };
}

kept_by_both! {
    what_the_guest_writes_is_in_the_image_and_is_read_back
    a_request_may_be_cut_into_descriptors_anywhere
    what_lies_outside_the_disk_or_is_no_whole_sector_is_refused
    a_read_only_disk_refuses_writes_and_lets_a_flush_pass
    unknown_requests_and_flags_are_unsupported
    ranges_are_zeroed_and_discarded
    the_serial_number_is_the_beginning_of_the_drives_id
    a_chain_that_is_no_request_comes_back_and_the_next_one_is_served
    a_broken_ring_is_given_up_and_the_device_still_stops
    a_full_queue_is_answered_each_request_once
    flushes_that_end_by_one_sync_are_all_answered
    stop_gives_the_session_back_and_a_restored_ring_is_looked_at_without_a_kick
    a_device_starts_once_and_only_with_its_queue
    an_image_is_replaced_only_while_the_device_is_stopped
    an_image_on_a_network_takes_no_place_from_where_there_is_no_way_to_it
    a_limited_disk_keeps_its_rate_and_costs_no_cpu_while_it_waits
    new_limits_count_at_once_and_a_stop_leaves_what_waits_for_tokens_in_the_ring
    interrupts_come_as_event_idx_asks
    a_driver_that_kicks_only_when_asked_never_waits_for_ever
}

#[test]
fn the_device_keeps_the_contract_of_virtio_devices() {
    fn make(engine: Engine) -> Box<dyn VirtioDevice> {
        let file = image_file();
        // The open image keeps the file when its name is gone.
        Box::new(
            Blk::new(
                drive(&file, engine)
                    .open(&owner(), Succession::Raises)
                    .unwrap()
                    .disk,
            )
            .unwrap()
            .0,
        )
    }
    let offer = |driver: &mut DriverRing| {
        driver.write(BUFFERS, &header(VIRTIO_BLK_T_IN, 0));
        driver.offer_chain(&[Piece::Readable(BUFFERS, 16), Piece::Writable(BUFFERS + DATA, 513)]);
    };
    let makes: [fn() -> Box<dyn VirtioDevice>; 2] = [|| make(Engine::Async), || make(Engine::Sync)];
    for make in makes {
        conforms(&Subject {
            make,
            offer,
            writes_buffers: true,
        });
    }
}

#[test]
fn a_stop_that_cannot_drain_says_so_and_the_disk_goes_on_serving() {
    // Reads from a pipe do not end before somebody writes: storage that hangs.
    let (reader, mut writer) = std::io::pipe().unwrap();
    let geometry = Geometry {
        size_bytes: IMAGE_BYTES,
        logical_block_bytes: 512,
        physical_block_bytes: 512,
        access: Access::ReadOnly,
        discard: Discard::Ignored,
    };
    let pipe = File::from(std::os::fd::OwnedFd::from(reader));
    let disk = Disk::new("pipe", Box::new(Raw::new(pipe, geometry)), 1, Engine::Async).unwrap();
    let mut rig = Rig::of(disk, image_file());
    let slow = rig.offer(VIRTIO_BLK_T_IN, 0, &[0; 512]);
    rig.kick();
    thread::sleep(Duration::from_millis(5));
    let refused = rig.device.stop();
    assert!(
        matches!(
            refused,
            Err(StopError::Drain {
                in_flight: 1,
                limit_ms: 100
            })
        ),
        "{refused:?}"
    );
    let next = rig.offer(VIRTIO_BLK_T_IN, 0, &[0; 512]);
    rig.kick();
    writer.write_all(&[8; 1024]).unwrap();
    rig.used();
    rig.used();
    assert_eq!((rig.status(slow), rig.status(next)), (OK, OK));
    assert!(rig.device.stop().unwrap().is_some());
}

/// An image whose requests stay in a system call until somebody lets them go.
struct Stuck {
    image: Raw,
    let_go: Receiver<()>,
}

impl Backend for Stuck {
    fn geometry(&self) -> Geometry {
        self.image.geometry()
    }

    fn files(&self) -> Vec<ImageFile> {
        self.image.files()
    }

    fn start(&mut self, request: Request, io: &mut dyn Submit) -> Step {
        self.let_go.recv().unwrap();
        self.image.start(request, io)
    }

    fn resume(&mut self, event: Event, io: &mut dyn Submit) -> Step {
        self.image.resume(event, io)
    }

    fn fork(&self) -> Option<Box<dyn Backend>> {
        None
    }

    fn in_flight(&self) -> usize {
        self.image.in_flight()
    }
}

#[test]
fn a_disk_serves_on_when_a_system_call_returns_after_its_stop_was_given_up() {
    let file = image_file();
    let mut disk = drive(&file, Engine::Sync)
        .open(&owner(), Succession::Raises)
        .unwrap()
        .disk;
    let (let_go, held) = channel();
    let geometry = disk.images[0].geometry();
    disk.images[0] = Box::new(Stuck {
        image: Raw::new(file.reopen().unwrap(), geometry),
        let_go: held,
    });
    let mut rig = Rig::of(disk, file);
    let slow = rig.offer(VIRTIO_BLK_T_OUT, 0, &[7; 512]);
    rig.kick();
    thread::sleep(Duration::from_millis(5));
    let refused = rig.device.stop();
    assert!(matches!(refused, Err(StopError::Drain { .. })), "{refused:?}");
    let_go.send(()).unwrap();
    rig.used();
    let_go.send(()).unwrap();
    let next = rig.request(VIRTIO_BLK_T_OUT, 1, &[8; 512]);
    assert_eq!((rig.status(slow), next.0), (OK, OK));
    assert!(rig.device.stop().unwrap().is_some());
}

/// A file that makes itself out to be something else.
struct Posing {
    image: Raw,
    /// How long it takes to name its files.
    names_after: Duration,
    reach: Reach,
}

impl Posing {
    fn new(image: Raw) -> Self {
        Self {
            image,
            names_after: Duration::ZERO,
            reach: Reach::Files,
        }
    }
}

impl Backend for Posing {
    fn geometry(&self) -> Geometry {
        self.image.geometry()
    }

    fn files(&self) -> Vec<ImageFile> {
        thread::sleep(self.names_after);
        self.image.files()
    }

    fn start(&mut self, request: Request, io: &mut dyn Submit) -> Step {
        self.image.start(request, io)
    }

    fn resume(&mut self, event: Event, io: &mut dyn Submit) -> Step {
        self.image.resume(event, io)
    }

    fn fork(&self) -> Option<Box<dyn Backend>> {
        None
    }

    fn in_flight(&self) -> usize {
        self.image.in_flight()
    }

    fn reach(&self) -> Reach {
        self.reach
    }
}

#[test]
fn an_image_that_comes_too_late_is_not_used_after_all() {
    let mut rig = Rig::new(Engine::Async);
    let other = image_file();
    other.as_file().write_all_at(&[0xcc; 512], 0).unwrap();
    let session = rig.device.stop().unwrap().unwrap();
    let geometry = rig.control.geometry();
    let late = Posing {
        names_after: Duration::from_millis(2_500),
        ..Posing::new(Raw::new(other.reopen().unwrap(), geometry))
    };
    let refused = rig.control.replace(Box::new(late));
    assert!(matches!(refused, Err(ControlError::Late)), "{refused:?}");
    rig.device.start(session).unwrap();
    assert_eq!(rig.request(VIRTIO_BLK_T_IN, 0, &[0; 512]), (OK, vec![0; 512]));
}

fn an_image_on_a_network_takes_no_place_from_where_there_is_no_way_to_it(engine: Engine) {
    let mut rig = Rig::new(engine);
    let other = image_file();
    other.as_file().write_all_at(&[0xcc; 512], 0).unwrap();
    let session = rig.device.stop().unwrap().unwrap();
    let remote = Posing {
        reach: Reach::FilesAndSockets,
        ..Posing::new(Raw::new(other.reopen().unwrap(), rig.control.geometry()))
    };
    let replaced = rig.control.replace(Box::new(remote));
    rig.device.start(session).unwrap();
    let first = rig.request(VIRTIO_BLK_T_IN, 0, &[0; 512]);
    match engine {
        Engine::Async => {
            assert!(matches!(replaced, Err(ControlError::Reach)), "{replaced:?}");
            assert_eq!(first, (OK, vec![0; 512]));
        }
        Engine::Sync => {
            assert!(replaced.is_ok(), "{replaced:?}");
            assert_eq!(first, (OK, vec![0xcc; 512]));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn garbage_in_rings_and_requests_never_keeps_the_worker_from_stopping(
        garbage in proptest::collection::vec(any::<u8>(), 8192),
        heads in proptest::collection::vec(0..QUEUE_SIZE, 1..64),
    ) {
        let mut rig = Rig::new(Engine::Async);
        // Addresses that are small, so that many chains lead into memory.
        for index in 0..QUEUE_SIZE {
            let at = usize::from(index) * 16;
            let word = |from: usize| u16::from_le_bytes([garbage[at + from], garbage[at + from + 1]]);
            let address = u64::from(word(0)) + REQUESTS;
            rig.driver.descriptor(index, (address, u32::from(word(2)), word(4) % 8, word(6) % QUEUE_SIZE));
        }
        rig.driver.write(REQUESTS, &garbage);
        for head in heads {
            rig.driver.offer(head);
        }
        rig.kick();
        prop_assert!(rig.device.stop().unwrap().is_some());
    }
}
