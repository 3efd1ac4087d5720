//! A driver, a device with its worker, and the file behind it.

use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::thread;
use std::time::{Duration, Instant};

use coracle_storage::engine::Engine;
use coracle_storage::lease::{Lock, Owner, Succession};
use coracle_storage::limit::{RateLimiterConfig, SharedLimiter};
use coracle_storage::reactor::Reactor;
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN};
use vmm_sys_util::eventfd::EventFd;

use super::super::cache::WriteCache;
use super::super::config::{CacheType, Disk, DriveConfig};
use super::super::control::BlkControl;
use super::super::device::Blk;
use super::super::lane::Drive;
use super::super::mailbox::{Command, Mailbox};
use super::super::metrics::BlkMetrics;
use super::super::request::Status;
use super::super::worker::Worker;
use crate::complaints::Complaints;
use crate::virtio::device::{ActiveQueue, Interrupt, Session, VirtioDevice};
use crate::virtio::ring::{FEATURE_EVENT_IDX, Virtqueue};
use crate::virtio::testing::{DriverRing, Piece, memory};

pub(super) const IMAGE_BYTES: u64 = 1 << 20;
pub(super) const QUEUE_SIZE: u16 = 256;
pub(super) const RING: u64 = 0x1000;
/// Requests lie behind one another: header, status, and a page of data.
pub(super) const REQUESTS: u64 = 0x10000;
pub(super) const REQUEST_BYTES: u64 = 0x2000;
pub(super) const STATUS: u64 = 16;
pub(super) const DATA: u64 = 0x1000;
/// What no device writes.
pub(super) const UNANSWERED: u8 = 0xff;

/// A device, its driver, and the file behind it.
pub(super) struct Rig {
    pub(super) driver: DriverRing,
    pub(super) device: Blk,
    pub(super) control: BlkControl,
    pub(super) kick: Arc<EventFd>,
    pub(super) line: Arc<EventFd>,
    pub(super) reasons: Arc<AtomicU32>,
    pub(super) requests: u64,
    pub(super) file: tempfile::NamedTempFile,
}

pub(super) fn image_file() -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(IMAGE_BYTES).unwrap();
    file
}

pub(super) fn drive(file: &tempfile::NamedTempFile, engine: Engine) -> DriveConfig {
    DriveConfig {
        drive_id: "root_of_a_test_with_a_long_name".to_owned(),
        cache_type: CacheType::Writeback,
        path_on_host: Some(file.path().to_str().unwrap().to_owned()),
        io_engine: Some(engine),
        // The tests look at the file themselves.
        lock: Some(Lock::None),
        ..DriveConfig::default()
    }
}

pub(super) fn owner() -> Owner {
    Owner::of_this_process("test")
}

impl Rig {
    pub(super) fn new(engine: Engine) -> Self {
        let file = image_file();
        let disk = drive(&file, engine)
            .open(&owner(), Succession::Raises)
            .unwrap()
            .disk;
        Self::of(disk, file)
    }

    pub(super) fn read_only(engine: Engine) -> Self {
        let file = image_file();
        let config = DriveConfig {
            is_read_only: Some(true),
            ..drive(&file, engine)
        };
        Self::of(config.open(&owner(), Succession::Raises).unwrap().disk, file)
    }

    pub(super) fn limited(engine: Engine, drive_id: &str, rate_limiter: RateLimiterConfig) -> Self {
        let file = image_file();
        let config = DriveConfig {
            drive_id: drive_id.to_owned(),
            rate_limiter: Some(rate_limiter),
            ..drive(&file, engine)
        };
        Self::of(config.open(&owner(), Succession::Raises).unwrap().disk, file)
    }

    pub(super) fn of(disk: Disk, file: tempfile::NamedTempFile) -> Self {
        let (device, control) = Blk::with_drain_limit(disk, 100).unwrap();
        let memory = memory(8 << 20);
        let mut rig = Self {
            driver: DriverRing::new(&memory, RING, QUEUE_SIZE),
            device,
            control,
            kick: Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap()),
            line: Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap()),
            reasons: Arc::new(AtomicU32::new(0)),
            requests: 0,
            file,
        };
        rig.start_fresh();
        rig
    }

    pub(super) fn start_fresh(&mut self) {
        let features = self.device.features() & !FEATURE_EVENT_IDX;
        let ring = Virtqueue::new(Arc::clone(self.driver.memory()), self.driver.layout(), features).unwrap();
        self.device.start(self.session(ring, features)).unwrap();
    }

    pub(super) fn session(&self, ring: Virtqueue, features: u64) -> Session {
        Session {
            memory: Arc::clone(self.driver.memory()),
            features,
            queues: vec![Some(ActiveQueue {
                ring,
                kick: Arc::clone(&self.kick),
            })],
            interrupt: Interrupt::new(Arc::clone(&self.reasons), Arc::clone(&self.line)),
        }
    }

    /// Puts a request into the ring: its header, `data` (written for the device, or room for it), a status.
    pub(super) fn offer(&mut self, kind: u32, sector: u64, data: &[u8]) -> u64 {
        let at = REQUESTS + self.requests % 512 * REQUEST_BYTES;
        self.requests += 1;
        self.driver.write(at, &header(kind, sector));
        self.driver.write(at + STATUS, &[UNANSWERED]);
        self.driver.write(at + DATA, data);
        let len = u32::try_from(data.len()).unwrap();
        let data = match kind {
            VIRTIO_BLK_T_IN | VIRTIO_BLK_T_GET_ID => Piece::Writable(at + DATA, len),
            _ => Piece::Readable(at + DATA, len),
        };
        let pieces = [Piece::Readable(at, 16), data, Piece::Writable(at + STATUS, 1)];
        let pieces = if len == 0 {
            vec![pieces[0], pieces[2]]
        } else {
            pieces.to_vec()
        };
        self.driver.offer_chain(&pieces);
        at
    }

    /// What the first worker counts.
    pub(super) fn metrics(&self) -> &BlkMetrics {
        &self.control.metrics()[0]
    }

    pub(super) fn kick(&self) {
        self.kick.write(1).unwrap();
    }

    pub(super) fn used(&mut self) -> (u32, u32) {
        let limit = Instant::now() + Duration::from_secs(10);
        loop {
            if let Some(used) = self.driver.take_used() {
                return used;
            }
            assert!(Instant::now() < limit, "the request is answered");
            thread::sleep(Duration::from_micros(50));
        }
    }

    pub(super) fn status(&self, at: u64) -> u8 {
        self.driver.read(at + STATUS, 1)[0]
    }

    /// One request, from the offer to its status and data.
    pub(super) fn request(&mut self, kind: u32, sector: u64, data: &[u8]) -> (u8, Vec<u8>) {
        let at = self.offer(kind, sector, data);
        self.kick();
        self.used();
        (self.status(at), self.driver.read(at + DATA, data.len()))
    }

    pub(super) fn in_file(&self, offset: u64, len_bytes: usize) -> Vec<u8> {
        let mut bytes = vec![0; len_bytes];
        self.file.as_file().read_exact_at(&mut bytes, offset).unwrap();
        bytes
    }
}

pub(super) fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

pub(super) fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [
        &sector.to_le_bytes()[..],
        &sectors.to_le_bytes(),
        &flags.to_le_bytes(),
    ]
    .concat()
}

pub(super) const OK: u8 = Status::Ok as u8;
pub(super) const IO_ERROR: u8 = Status::IoError as u8;
pub(super) const UNSUPPORTED: u8 = Status::Unsupported as u8;

/// A worker that the test turns by hand, its queue's kick, and the file behind it.
pub(super) struct ByHand {
    pub(super) worker: Worker,
    pub(super) kick: Arc<EventFd>,
    pub(super) file: tempfile::NamedTempFile,
    _mailbox: Mailbox,
}

/// Lets a worker serve the queue of `driver` on plain calls or io_uring, by way of what `around` makes of its reactor.
pub(super) fn by_hand(
    engine: Engine,
    cache_type: CacheType,
    features: u64,
    limits: Vec<Arc<SharedLimiter>>,
    driver: &DriverRing,
    around: impl FnOnce(Box<dyn Reactor>) -> Box<dyn Reactor>,
) -> ByHand {
    let file = image_file();
    let mut disk = drive(&file, engine)
        .open(&owner(), Succession::Raises)
        .unwrap()
        .disk;
    let drive = Drive {
        io: around(disk.reactors.remove(0).enable().unwrap()),
        image: disk.images.remove(0),
        limits,
        cache: Arc::new(WriteCache::new(cache_type)),
        metrics: Arc::default(),
        loss: disk.loss,
        changes: Arc::default(),
        serial: [0; 20],
        complaints: Complaints::default(),
    };
    let eventfd = || Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
    let (memory, kick) = (Arc::clone(driver.memory()), eventfd());
    let queue = ActiveQueue {
        ring: Virtqueue::new(Arc::clone(&memory), driver.layout(), features).unwrap(),
        kick: Arc::clone(&kick),
    };
    let session = Session {
        memory,
        features,
        interrupt: Interrupt::new(Arc::default(), eventfd()),
        queues: vec![Some(queue)],
    };
    let (mailbox, inbox) = Mailbox::new().unwrap();
    mailbox.post(Command::Serve(Box::new(session))).unwrap();
    ByHand {
        worker: Worker::new(drive, inbox, 1000)
            .map_err(|born| born.error)
            .unwrap(),
        kick,
        file,
        _mailbox: mailbox,
    }
}
