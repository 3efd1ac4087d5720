//! What every virtio device promises its transport (see [`super::device`]), as one test that runs over each of them.
#![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

mod transport;

use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::device::{ActiveQueue, Interrupt, Notice, Patience, Session, StartError, Stop, VirtioDevice};
use super::ring::Virtqueue;
use super::testing::{DriverRing, NEXT, WRITE, memory};

const MEMORY_BYTES: usize = 1 << 20;
/// Where a subject may put the buffers of its requests.
pub(crate) const BUFFERS: u64 = 0x8_0000;
const SERVED_MS_MAX: u64 = 10_000;
/// How long a stopped device is watched for touching memory.
const STILL_MS: u64 = 20;
const VERSION_1: u64 = 1 << 32;

/// A device to be put to the test.
pub(crate) struct Subject {
    /// Makes an idle one.
    pub(crate) make: fn() -> Box<dyn VirtioDevice>,
    /// Offers one request on queue 0 that the device completes, with buffers from [`BUFFERS`] on.
    pub(crate) offer: fn(&mut DriverRing),
    /// Whether that has it write into those buffers, and not only into the used ring.
    pub(crate) writes_buffers: bool,
}

/// A device, its guest's driver, and the eventfds between them.
struct Bench {
    subject: Subject,
    features: u64,
    device: Box<dyn VirtioDevice>,
    driver: DriverRing,
    kick: Arc<EventFd>,
    line: Arc<EventFd>,
    status: Arc<AtomicU32>,
}

impl Bench {
    /// Drops the device: nothing of it touches memory afterwards.
    fn expect_gone(self) {
        drop(self.device);
        let before = self.driver.read(0, MEMORY_BYTES);
        std::thread::sleep(Duration::from_millis(STILL_MS));
        assert!(
            before == self.driver.read(0, MEMORY_BYTES),
            "a device that is gone does not touch memory"
        );
    }

    fn new(subject: &Subject, features: u64) -> Self {
        let memory = memory(MEMORY_BYTES);
        let eventfd = || Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
        let device = (subject.make)();
        let features = (features & device.features()) | VERSION_1;
        Self {
            subject: Subject { ..*subject },
            features,
            device,
            driver: DriverRing::new(&memory, 0x1000, 16),
            kick: eventfd(),
            line: eventfd(),
            status: Arc::default(),
        }
    }

    fn session(&self) -> Session {
        let memory = Arc::clone(self.driver.memory());
        let ring = Virtqueue::new(Arc::clone(&memory), self.driver.layout(), self.features).unwrap();
        let mut queues = vec![Some(ActiveQueue {
            ring,
            kick: Arc::clone(&self.kick),
        })];
        queues.resize_with(self.device.queue_sizes_max().len(), || None);
        let interrupt = Interrupt::new(Arc::clone(&self.status), Arc::clone(&self.line));
        Session {
            memory,
            features: self.features,
            queues,
            interrupt,
        }
    }

    fn start(&mut self) {
        let session = self.session();
        self.device.start(session).unwrap();
    }

    fn offer(&mut self) {
        (self.subject.offer)(&mut self.driver);
    }

    fn kick(&self) {
        self.kick.write(1).unwrap();
    }

    /// Waits until the device has given `count` chains back in all.
    fn wait_used(&self, count: u16, promise: &str) {
        wait_until(|| self.driver.used_index() == count, promise);
    }

    /// Stops the device, which has a session; checks that it is quiet and that the session is whole.
    fn stop(&mut self) -> Session {
        let session = self
            .device
            .stop()
            .unwrap()
            .expect("a device that was started has a session");
        for queue in session.queues.iter().flatten() {
            assert_eq!(queue.ring.in_flight(), 0, "nothing is in flight after a stop");
            assert_eq!(
                queue.ring.state().next_used,
                self.driver.used_index(),
                "used rings are complete after a stop"
            );
            assert!(
                !queue.ring.owes_interrupt(),
                "the driver was interrupted for all that it was given, if it wanted that"
            );
        }
        self.offer();
        self.kick();
        let before = self.driver.read(0, MEMORY_BYTES);
        std::thread::sleep(Duration::from_millis(STILL_MS));
        assert!(
            before == self.driver.read(0, MEMORY_BYTES),
            "a stopped device does not touch memory"
        );
        session
    }
}

/// Runs every promise over `subject`, with all of its features and with none.
pub(crate) fn conforms(subject: &Subject) {
    for features in [u64::MAX, 0] {
        let bench = || Bench::new(subject, features);
        it_stops_without_having_been_started(bench());
        its_configuration_ends_in_zeros(bench());
        it_refuses_a_session_without_its_first_queue(bench());
        it_serves_what_was_there_before_the_first_kick(bench());
        it_serves_after_a_kick_and_interrupts(bench());
        it_goes_on_after_a_stop_with_the_same_session(bench());
        it_refuses_a_second_session_and_keeps_the_first(bench());
        it_stops_with_requests_in_flight(bench());
        it_rings_when_a_stop_that_was_asked_for_is_done(bench());
        it_is_asked_once_and_stops_once(bench());
        it_ends_while_it_serves(bench());
        it_ends_while_it_is_asked_to_stop(bench());
        it_survives_chains_that_make_no_sense(bench());
        it_asks_for_a_reset_when_a_ring_is_broken(bench());
        transport::conforms(subject, features);
    }
}

fn it_stops_without_having_been_started(mut bench: Bench) {
    assert!(bench.device.stop().unwrap().is_none());
}

fn its_configuration_ends_in_zeros(bench: Bench) {
    for offset in [4096, u64::from(u32::MAX), u64::MAX - 7, u64::MAX] {
        let mut data = [0xee; 8];
        bench.device.read_config(offset, &mut data);
        assert_eq!(data, [0; 8], "the configuration space at {offset:#x}");
    }
    let mut data = [0xee; 4096];
    bench.device.read_config(2048, &mut data);
    assert!(data.iter().all(|byte| *byte == 0));
}

fn it_refuses_a_session_without_its_first_queue(mut bench: Bench) {
    let mut session = bench.session();
    session.queues.iter_mut().for_each(|queue| *queue = None);
    assert!(matches!(
        bench.device.start(session),
        Err(StartError::QueueMissing(0))
    ));
    assert!(bench.device.stop().unwrap().is_none());
    let mut session = bench.session();
    session.queues.clear();
    assert!(matches!(
        bench.device.start(session),
        Err(StartError::QueueMissing(0))
    ));
}

fn it_serves_what_was_there_before_the_first_kick(mut bench: Bench) {
    bench.offer();
    bench.start();
    bench.wait_used(1, "a ring is looked at once without a kick");
    bench.stop();
}

fn it_serves_after_a_kick_and_interrupts(mut bench: Bench) {
    bench.start();
    bench.offer();
    bench.kick();
    bench.wait_used(1, "a kick is answered");
    wait_until(|| bench.line.read().is_ok(), "the driver is interrupted");
    bench.stop();
}

fn it_goes_on_after_a_stop_with_the_same_session(mut bench: Bench) {
    bench.start();
    for round in 0..8 {
        bench.offer();
        bench.kick();
        bench.wait_used(2 * round + 1, "requests of a restarted session are served");
        // The stop below offers one more, which is served without a kick after the restart.
        let session = bench.stop();
        while bench.kick.read().is_ok() {}
        bench.device.start(session).unwrap();
        bench.wait_used(2 * round + 2, "what came while stopped is served");
    }
}

fn it_refuses_a_second_session_and_keeps_the_first(mut bench: Bench) {
    bench.start();
    let second = bench.session();
    assert!(matches!(bench.device.start(second), Err(StartError::Started)));
    bench.offer();
    bench.kick();
    bench.wait_used(1, "the first session is still served");
    bench.stop();
}

fn it_stops_with_requests_in_flight(mut bench: Bench) {
    for _ in 0..4 {
        bench.offer();
    }
    bench.start();
    bench.kick();
    let session = bench.stop();
    bench.device.start(session).unwrap();
    bench.wait_used(5, "nothing is lost by a stop");
}

fn it_rings_when_a_stop_that_was_asked_for_is_done(mut bench: Bench) {
    let bell = Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
    for _ in 0..4 {
        bench.offer();
    }
    bench.start();
    bench.kick();
    bench.device.begin_stop(&Notice::new(Arc::clone(&bell)));
    wait_until(|| bell.read().is_ok(), "whoever asked is told");
    let Stop::Stopped(Some(session)) = bench.device.poll_stop(Patience::None) else {
        panic!("a device that has rung has an answer");
    };
    assert!(
        session
            .queues
            .iter()
            .flatten()
            .all(|queue| queue.ring.in_flight() == 0)
    );
    bench.device.start(session).unwrap();
    bench.wait_used(4, "nothing is lost by a stop");
    bench.stop();
}

fn it_is_asked_once_and_stops_once(mut bench: Bench) {
    let bell = || Arc::new(EventFd::new(EFD_NONBLOCK).unwrap());
    let (first, second) = (bell(), bell());
    bench.start();
    bench.device.begin_stop(&Notice::new(Arc::clone(&first)));
    bench.device.begin_stop(&Notice::new(Arc::clone(&second)));
    // Also who has not asked, and only waits, gets the answer.
    assert!(bench.device.stop().unwrap().is_some());
    wait_until(|| first.read().is_ok(), "the first who asked is told");
    assert!(second.read().is_err());
    assert!(matches!(
        bench.device.poll_stop(Patience::None),
        Stop::Stopped(None)
    ));
}

fn it_ends_while_it_is_asked_to_stop(mut bench: Bench) {
    bench.offer();
    bench.start();
    bench.device.begin_stop(&Notice::default());
    bench.expect_gone();
}

fn it_ends_while_it_serves(mut bench: Bench) {
    bench.start();
    bench.offer();
    bench.kick();
    bench.expect_gone();
}

fn it_survives_chains_that_make_no_sense(mut bench: Bench) {
    let beyond = MEMORY_BYTES as u64;
    bench.driver.descriptor(12, (BUFFERS, 16, NEXT, 13));
    bench.driver.descriptor(13, (BUFFERS, 16, NEXT, 12));
    bench.driver.descriptor(14, (beyond - 8, 16, WRITE, 0));
    bench.driver.descriptor(15, (BUFFERS, 16, NEXT, 999));
    for head in [12, 14, 15] {
        bench.driver.offer(head);
    }
    bench.start();
    bench.kick();
    bench.wait_used(3, "malformed chains are given back");
    bench.offer();
    bench.kick();
    bench.wait_used(4, "and the next request is served");
    bench.stop();
}

fn it_asks_for_a_reset_when_a_ring_is_broken(mut bench: Bench) {
    bench.start();
    bench.driver.set_avail_index(0x7000);
    bench.kick();
    wait_until(|| bench.line.read().is_ok(), "the driver hears of a broken ring");
    assert!(
        bench.device.stop().unwrap().is_some(),
        "and the device can still be stopped"
    );
    // The driver resets: a new ring in the same memory.
    bench.driver = DriverRing::new(&Arc::clone(bench.driver.memory()), 0x1000, 16);
    bench.start();
    bench.offer();
    bench.kick();
    bench.wait_used(1, "after a reset the device serves again");
    bench.stop();
}

/// Waits for what is promised, for a time.
pub(crate) fn wait_until(mut condition: impl FnMut() -> bool, promise: &str) {
    let deadline = Instant::now() + Duration::from_millis(SERVED_MS_MAX);
    while !condition() {
        assert!(
            Instant::now() < deadline,
            "not within {SERVED_MS_MAX} ms: {promise}"
        );
        std::thread::sleep(Duration::from_micros(200));
    }
}

#[cfg(test)]
mod block {
    use coracle_storage::engine::Engine;
    use coracle_storage::lease::{Lock, Owner, Succession};

    use super::*;
    use crate::virtio::blk::{Blk, DriveConfig};
    use crate::virtio::testing::Piece;

    fn disk(engine: Engine, queues: u16) -> Box<dyn VirtioDevice> {
        // The open image outlives its name.
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(1 << 20).unwrap();
        let config = DriveConfig {
            drive_id: "disk".to_owned(),
            path_on_host: Some(file.path().to_str().unwrap().to_owned()),
            io_engine: Some(engine),
            num_queues: Some(queues),
            lock: Some(Lock::None),
            ..DriveConfig::default()
        };
        let held = config
            .open(&Owner::of_this_process("test"), Succession::Raises)
            .unwrap();
        Box::new(Blk::new(held.disk).unwrap().0)
    }

    /// Reads the first sector: type and sector of the header (5.2.6) are zero, as the memory is.
    fn offer(driver: &mut DriverRing) {
        driver.offer_chain(&[
            Piece::Readable(BUFFERS, 16),
            Piece::Writable(BUFFERS + 0x1000, 512),
            Piece::Writable(BUFFERS + 0x2000, 1),
        ]);
    }

    #[test]
    fn the_block_device_keeps_the_promises_of_every_device_by_io_uring() {
        conforms(&Subject {
            make: || disk(Engine::Async, 1),
            offer,
            writes_buffers: true,
        });
    }

    #[test]
    fn the_block_device_keeps_the_promises_of_every_device_by_plain_calls() {
        conforms(&Subject {
            make: || disk(Engine::Sync, 1),
            offer,
            writes_buffers: true,
        });
    }

    #[test]
    fn every_queue_of_a_block_device_goes_on_at_its_own_position() {
        transport::every_queue_goes_on_at_its_own_position(&Subject {
            make: || disk(Engine::Async, 4),
            offer,
            writes_buffers: true,
        });
    }
}
