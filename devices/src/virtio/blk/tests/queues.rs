//! Several queues, a cache that the guest switches, a disk that grows.

use super::*;
use crate::virtio::blk::BlkState;
use crate::virtio::blk::control::BlkControl;
use crate::virtio::device::{ActiveQueue, DeviceKind, Interrupt, Notice, Patience, Session};
use crate::virtio::state::{DeviceState, DeviceStateError};
use crate::virtio::testing::memory;

const QUEUES: u16 = 4;

/// A device with several queues and a driver for each.
struct Quad {
    device: Blk,
    control: BlkControl,
    drivers: Vec<DriverRing>,
    kicks: Vec<Arc<EventFd>>,
    file: tempfile::NamedTempFile,
}

impl Quad {
    fn new(engine: Engine) -> Self {
        let file = image_file();
        let config = DriveConfig {
            num_queues: Some(QUEUES),
            ..drive(&file, engine)
        };
        let (device, control) =
            Blk::with_drain_limit(config.open(&owner(), Succession::Raises).unwrap().disk, 1000).unwrap();
        let memory = memory(8 << 20);
        let eventfd = || Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        Self {
            device,
            control,
            drivers: (0..u64::from(QUEUES))
                .map(|queue| DriverRing::new(&memory, RING + queue * 0x2000, 16))
                .collect(),
            kicks: (0..QUEUES).map(|_| eventfd()).collect(),
            file,
        }
    }

    /// A session in which only some queues are ready.
    fn session(&self, ready: impl Fn(usize) -> bool) -> Session {
        let features = self.device.features() & !(1 << 29);
        let memory = Arc::clone(self.drivers[0].memory());
        let queue = |index: usize| ActiveQueue {
            ring: Virtqueue::new(Arc::clone(&memory), self.drivers[index].layout(), features).unwrap(),
            kick: Arc::clone(&self.kicks[index]),
        };
        Session {
            features,
            queues: (0..usize::from(QUEUES))
                .map(|index| ready(index).then(|| queue(index)))
                .collect(),
            interrupt: Interrupt::new(Arc::default(), Arc::new(EventFd::new(0).unwrap())),
            memory: Arc::clone(&memory),
        }
    }

    fn offer_write(&mut self, queue: usize, sector: u64, byte: u8) -> u64 {
        let at = REQUESTS + u64::try_from(queue).unwrap() * REQUEST_BYTES;
        let driver = &mut self.drivers[queue];
        driver.write(at, &header(VIRTIO_BLK_T_OUT, sector));
        driver.write(at + DATA, &[byte; 512]);
        driver.write(at + STATUS, &[UNANSWERED]);
        driver.offer_chain(&[
            Piece::Readable(at, 16),
            Piece::Readable(at + DATA, 512),
            Piece::Writable(at + STATUS, 1),
        ]);
        self.kicks[queue].write(1).unwrap();
        at + STATUS
    }

    fn wait_used(&mut self, queue: usize) {
        let limit = Instant::now() + Duration::from_secs(10);
        while self.drivers[queue].take_used().is_none() {
            assert!(Instant::now() < limit, "a request of queue {queue} is answered");
            thread::sleep(Duration::from_micros(50));
        }
    }
}

fn every_queue_is_served_and_given_back(engine: Engine) {
    let mut quad = Quad::new(engine);
    assert_ne!(quad.device.features() & FEATURE_MQ, 0);
    let mut num_queues = [0; 2];
    quad.device.read_config(34, &mut num_queues);
    assert_eq!(u16::from_le_bytes(num_queues), QUEUES);
    // Only some of the queues the first time, as a driver with fewer processors does it.
    let session = quad.session(|queue| queue < 2);
    quad.device.start(session).unwrap();
    for round in 0..3_u8 {
        let ready = if round == 0 { 2 } else { usize::from(QUEUES) };
        for queue in 0..ready {
            let sector = u64::try_from(queue).unwrap();
            let status = quad.offer_write(queue, sector, round * 16 + u8::try_from(queue).unwrap() + 1);
            quad.wait_used(queue);
            assert_eq!(quad.drivers[queue].read(status, 1), [OK]);
            let mut written = [0; 512];
            quad.file
                .as_file()
                .read_exact_at(&mut written, sector * 512)
                .unwrap();
            assert_eq!(written, [round * 16 + u8::try_from(queue).unwrap() + 1; 512]);
        }
        let mut session = quad.device.stop().unwrap().unwrap();
        assert_eq!(session.queues.iter().flatten().count(), ready);
        assert!(
            session
                .queues
                .iter()
                .flatten()
                .all(|queue| queue.ring.in_flight() == 0)
        );
        if round == 0 {
            let mut rest = quad.session(|queue| queue >= 2);
            for (place, queue) in session.queues.iter_mut().zip(&mut rest.queues).skip(2) {
                *place = queue.take();
            }
        }
        quad.device.start(session).unwrap();
    }
    let counted: Vec<u64> = quad
        .control
        .metrics()
        .iter()
        .map(|worker| worker.write_count.count())
        .collect();
    assert_eq!(
        counted,
        [3, 3, 2, 2],
        "each queue has a worker and counts of its own"
    );
}

fn a_new_image_replaces_the_old_one_in_every_queue(engine: Engine) {
    let mut quad = Quad::new(engine);
    let other = image_file();
    quad.control
        .replace(drive(&other, engine).open_image(&owner()).unwrap().backend)
        .unwrap();
    let session = quad.session(|_| true);
    quad.device.start(session).unwrap();
    for queue in 0..usize::from(QUEUES) {
        quad.offer_write(queue, 0, 9);
        quad.wait_used(queue);
    }
    let mut first = [0; 512];
    quad.file.as_file().read_exact_at(&mut first, 0).unwrap();
    assert_eq!(first, [0; 512]);
    other.as_file().read_exact_at(&mut first, 0).unwrap();
    assert_eq!(first, [9; 512]);
}

fn a_disk_grows_under_a_running_driver_and_never_shrinks(engine: Engine) {
    let mut rig = Rig::new(engine);
    assert_eq!(
        rig.request(VIRTIO_BLK_T_OUT, IMAGE_BYTES / 512, &[1; 512]).0,
        IO_ERROR
    );
    assert!(rig.control.grow(2 * IMAGE_BYTES).unwrap());
    assert!(
        !rig.control.grow(2 * IMAGE_BYTES).unwrap(),
        "it has that size already"
    );
    assert_eq!(rig.request(VIRTIO_BLK_T_OUT, IMAGE_BYTES / 512, &[1; 512]).0, OK);
    let mut capacity = [0; 8];
    rig.device.read_config(0, &mut capacity);
    assert_eq!(u64::from_le_bytes(capacity), 2 * IMAGE_BYTES / 512);
    assert_eq!(rig.file.as_file().metadata().unwrap().len(), 2 * IMAGE_BYTES);
    // From outside.
    rig.file.as_file().set_len(3 * IMAGE_BYTES).unwrap();
    assert!(rig.control.grow(3 * IMAGE_BYTES).unwrap());
    assert!(matches!(
        rig.control.grow(IMAGE_BYTES),
        Err(ControlError::Shrinks { .. })
    ));
    assert!(matches!(
        rig.control.grow(4 * IMAGE_BYTES + 1),
        Err(ControlError::PartialSector(_))
    ));
    assert_eq!(rig.file.as_file().metadata().unwrap().len(), 3 * IMAGE_BYTES);
}

#[test]
fn the_writeback_field_is_the_drivers_to_switch_until_it_resets() {
    let mut rig = Rig::new(Engine::Sync);
    assert_ne!(rig.device.features() & FEATURE_CONFIG_WCE, 0);
    let read = |device: &Blk| {
        let mut byte = [0xff];
        device.read_config(WRITEBACK, &mut byte);
        byte[0]
    };
    assert_eq!(read(&rig.device), 1);
    rig.device.write_config(WRITEBACK, &[0]);
    assert_eq!(read(&rig.device), 0);
    // Nothing else may be written, nor this with another width.
    rig.device.write_config(WRITEBACK, &[1, 1]);
    rig.device.write_config(0, &[1]);
    assert_eq!(read(&rig.device), 0);
    rig.device.reset_config();
    assert_eq!(read(&rig.device), 1);
}

#[test]
fn the_writeback_field_goes_on_elsewhere_unless_the_drive_is_written_through_there() {
    let writeback = |device: &Blk| device.save() == DeviceState::Block(BlkState { writeback: true });
    let mut before = Rig::new(Engine::Sync);
    before.device.write_config(WRITEBACK, &[0]);
    let off = before.device.save();
    let mut after = Rig::new(Engine::Sync);
    let on = after.device.save();
    assert!(writeback(&after.device));
    after.device.restore(&off).unwrap();
    assert_eq!(after.device.save(), off);
    let file = image_file();
    let through = DriveConfig {
        cache_type: CacheType::Writethrough,
        ..drive(&file, Engine::Sync)
    };
    let mut through = Rig::of(through.open(&owner(), Succession::Raises).unwrap().disk, file);
    through.device.restore(&on).unwrap();
    assert!(!writeback(&through.device));
    let error = after.device.restore(&DeviceState::Entropy).unwrap_err();
    let (saved, here) = (DeviceKind::Entropy, DeviceKind::Block);
    assert_eq!(error, DeviceStateError::Kind { saved, here });
    assert_eq!(after.device.save(), off);
}

#[test]
fn by_io_uring_every_queue_is_served_and_given_back() {
    every_queue_is_served_and_given_back(Engine::Async);
}

#[test]
fn by_plain_calls_every_queue_is_served_and_given_back() {
    every_queue_is_served_and_given_back(Engine::Sync);
}

#[test]
fn by_io_uring_a_new_image_replaces_the_old_one_in_every_queue() {
    a_new_image_replaces_the_old_one_in_every_queue(Engine::Async);
}

#[test]
fn by_plain_calls_a_new_image_replaces_the_old_one_in_every_queue() {
    a_new_image_replaces_the_old_one_in_every_queue(Engine::Sync);
}

#[test]
fn by_io_uring_a_disk_grows_under_a_running_driver_and_never_shrinks() {
    a_disk_grows_under_a_running_driver_and_never_shrinks(Engine::Async);
}

#[test]
fn by_plain_calls_a_disk_grows_under_a_running_driver_and_never_shrinks() {
    a_disk_grows_under_a_running_driver_and_never_shrinks(Engine::Sync);
}

fn a_stopped_disk_is_flushed_and_raised_on_behalf_of_its_machine(engine: Engine) {
    let mut rig = Rig::new(engine);
    assert_eq!(rig.request(VIRTIO_BLK_T_OUT, 0, &[1; 512]).0, OK);
    let session = rig.device.stop().unwrap().unwrap();
    let limit = Duration::from_secs(10);
    let notice = Notice::default();
    let flush = rig.control.begin_flush(limit, &notice).unwrap();
    flush.poll(Patience::WithinLimit).unwrap().unwrap();
    let raise = rig.control.begin_raise(limit, &notice).unwrap();
    raise.poll(Patience::WithinLimit).unwrap().unwrap();
    rig.device.start(session).unwrap();
    assert_eq!(rig.request(VIRTIO_BLK_T_OUT, 1, &[2; 512]).0, OK);
}

#[test]
fn by_io_uring_a_stopped_disk_is_flushed_and_raised_on_behalf_of_its_machine() {
    a_stopped_disk_is_flushed_and_raised_on_behalf_of_its_machine(Engine::Async);
}

#[test]
fn by_plain_calls_a_stopped_disk_is_flushed_and_raised_on_behalf_of_its_machine() {
    a_stopped_disk_is_flushed_and_raised_on_behalf_of_its_machine(Engine::Sync);
}
