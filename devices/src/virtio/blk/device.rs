//! The register half of the block device, and the handle by which a machine changes a running disk.

use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use coracle_storage::backend::{Access, Backend, Geometry};
use coracle_storage::limit::{RateLimiter, RateLimiterConfig};

use super::config::Disk;
use super::lane::Drive;
use super::metrics::BlkMetrics;
use super::request::SERIAL_BYTES;
use super::space::{features, space};
use super::worker::{Command, DRAIN_MS_MAX, Inbox, Mailbox, StopCall, Worker};
use crate::complaints::Complaints;
use crate::virtio::device::{DeviceKind, Session, StartError, StopError, VirtioDevice};

/// The size of the queue, in descriptors; what is in flight at most.
pub(super) const QUEUE_SIZE_MAX: u16 = 256;

/// A block device with one queue and the worker that serves it.
pub struct Blk {
    features: u64,
    geometry: Arc<Mutex<Geometry>>,
    mailbox: Mailbox,
    serving: bool,
    drain_ms_max: u64,
    thread: Option<Thread>,
}

/// A worker's thread, and how one learns that it has ended: its end of the channel is dropped.
struct Thread {
    handle: JoinHandle<()>,
    ended: Receiver<io::Result<()>>,
}

impl Blk {
    /// Makes the device and its worker thread, which idles until the device is started.
    ///
    /// # Errors
    ///
    /// When the host refuses a thread, an eventfd, or the reactor that it granted before.
    pub fn new(disk: Disk) -> io::Result<(Self, BlkControl)> {
        Self::with_drain_limit(disk, DRAIN_MS_MAX)
    }

    pub(super) fn with_drain_limit(disk: Disk, drain_ms_max: u64) -> io::Result<(Self, BlkControl)> {
        let geometry = disk.image.geometry();
        let features = features(geometry.access, disk.cache_type);
        let geometry = Arc::new(Mutex::new(geometry));
        let metrics = Arc::new(BlkMetrics::default());
        let (mailbox, inbox) = Mailbox::new()?;
        let thread = spawn(disk, inbox, Arc::clone(&metrics), drain_ms_max)?;
        let control = BlkControl {
            geometry: Arc::clone(&geometry),
            mailbox: mailbox.clone(),
            metrics,
        };
        let device = Self {
            features,
            geometry,
            mailbox,
            serving: false,
            drain_ms_max,
            thread: Some(thread),
        };
        Ok((device, control))
    }
}

/// Starts the worker and waits until it is ready.
fn spawn(disk: Disk, inbox: Inbox, metrics: Arc<BlkMetrics>, drain_ms_max: u64) -> io::Result<Thread> {
    let (ready, is_ready) = channel();
    // A thread's name holds no NUL; what else is in an id is the configuration's concern.
    let name: String = format!("io {}", disk.id).replace('\0', "");
    let handle = thread::Builder::new().name(name).spawn(move || {
        let worker = disk.reactor.enable().and_then(|io| {
            let drive = Drive {
                io,
                serial: serial(&disk.id),
                image: disk.image,
                limiter: RateLimiter::new(&disk.rate_limiter, Instant::now()),
                metrics,
                complaints: Complaints::default(),
            };
            Worker::new(drive, inbox, drain_ms_max)
        });
        match worker {
            Ok(worker) => {
                // The maker of the device waits for this, and does not go away before.
                let _ = ready.send(Ok(()));
                worker.run();
            }
            Err(error) => {
                let _ = ready.send(Err(error));
            }
        }
    })?;
    is_ready.recv().map_err(io::Error::other)??;
    Ok(Thread {
        handle,
        ended: is_ready,
    })
}

/// The serial number that a guest sees: the id, cut or filled up with NULs.
fn serial(id: &str) -> [u8; SERIAL_BYTES] {
    let mut serial = [0; SERIAL_BYTES];
    for (to, from) in serial.iter_mut().zip(id.bytes()) {
        *to = from;
    }
    serial
}

impl VirtioDevice for Blk {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Block
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes_max(&self) -> &[u16] {
        &[QUEUE_SIZE_MAX]
    }

    fn read_config(&self, offset_bytes: u64, data: &mut [u8]) {
        let space = space(&locked(&self.geometry));
        let from = usize::try_from(offset_bytes)
            .ok()
            .and_then(|offset| space.get(offset..))
            .unwrap_or_default();
        let bytes = from.iter().copied().chain(std::iter::repeat(0));
        for (to, byte) in data.iter_mut().zip(bytes) {
            *to = byte;
        }
    }

    /// Nothing in the space may be written: `writeback` is not offered.
    fn write_config(&mut self, _offset_bytes: u64, _data: &[u8]) {}

    fn start(&mut self, session: Session) -> Result<(), StartError> {
        if self.serving {
            return Err(StartError::Started);
        }
        if !matches!(session.queues.first(), Some(Some(_))) {
            return Err(StartError::QueueMissing(0));
        }
        self.mailbox
            .post(Command::Serve(Box::new(session)))
            .map_err(|_| StartError::WorkerGone)?;
        self.serving = true;
        Ok(())
    }

    fn stop(&mut self) -> Result<Option<Session>, StopError> {
        if !self.serving {
            return Ok(None);
        }
        let (call, answer) = StopCall::new();
        self.mailbox
            .post(Command::Stop(call))
            .map_err(|_| StopError::WorkerGone)?;
        match answer.wait(Duration::from_millis(self.drain_ms_max + GRACE_MS)) {
            Some(Ok(session)) => {
                self.serving = false;
                Ok(session.map(|session| *session))
            }
            Some(Err(error)) => Err(error),
            // The worker is inside a system call that does not return. When it does, one day, the disk serves on.
            None => Err(StopError::Drain {
                in_flight: 1,
                limit_ms: self.drain_ms_max,
            }),
        }
    }
}

/// What a worker may need beyond its drain limit to be scheduled and to answer.
const GRACE_MS: u64 = 1_000;

impl Drop for Blk {
    fn drop(&mut self) {
        let Some(Thread { handle, ended }) = self.thread.take() else {
            return;
        };
        // A worker that has ended already needs no telling.
        let _ = self.mailbox.post(Command::Retire);
        let limit = Duration::from_millis(self.drain_ms_max + GRACE_MS);
        if let Err(RecvTimeoutError::Timeout) = ended.recv_timeout(limit) {
            log::error!("the worker of a disk does not end; it is left behind");
            return;
        }
        // A worker that panicked has ended the process.
        let _ = handle.join();
    }
}

/// Changes a disk from outside its transport.
#[derive(Clone)]
pub struct BlkControl {
    geometry: Arc<Mutex<Geometry>>,
    mailbox: Mailbox,
    metrics: Arc<BlkMetrics>,
}

/// Why a disk was not changed; it is as it was.
#[derive(Debug, thiserror::Error)]
pub enum ControlError {
    /// The device is not stopped.
    #[error("the disk is being served: stop the device before its image is replaced")]
    Serving,
    /// What the guest was told about access cannot change.
    #[error("the new image must be opened for the same access as the old one")]
    Access,
    /// The reactor does not take the new image's files.
    #[error("the new image cannot be used by the disk's worker")]
    Register(#[source] io::Error),
    /// The worker is busy.
    #[error("the disk's worker did not answer within {REPLY_MS_MAX} ms")]
    Late,
    /// The worker thread is gone.
    #[error("the disk's worker thread has ended")]
    WorkerGone,
}

/// How long a command may take until it is answered.
const REPLY_MS_MAX: u64 = 2_000;

impl BlkControl {
    /// Uses `image` from the next start on; the old one is closed. Only while the device is
    /// stopped. The guest learns of a new capacity by a configuration interrupt, which the caller raises.
    ///
    /// # Errors
    ///
    /// The old image is then still in use, except after [`ControlError::Late`], when it may be either.
    pub fn replace(&self, image: Box<dyn Backend>) -> Result<(), ControlError> {
        let replaced = self.try_replace(image);
        match &replaced {
            Ok(()) => self.metrics.update_count.add(1),
            Err(_) => self.metrics.update_fails.add(1),
        }
        replaced
    }

    fn try_replace(&self, image: Box<dyn Backend>) -> Result<(), ControlError> {
        let geometry = image.geometry();
        if geometry.access != self.access() {
            return Err(ControlError::Access);
        }
        let (reply, answer) = channel();
        self.mailbox
            .post(Command::Replace(image, reply))
            .map_err(|_| ControlError::WorkerGone)?;
        match answer.recv_timeout(Duration::from_millis(REPLY_MS_MAX)) {
            Ok(Ok(())) => {
                *locked(&self.geometry) = geometry;
                Ok(())
            }
            Ok(Err(error)) if error.kind() == io::ErrorKind::ResourceBusy => Err(ControlError::Serving),
            Ok(Err(error)) => Err(ControlError::Register(error)),
            Err(RecvTimeoutError::Timeout) => Err(ControlError::Late),
            Err(RecvTimeoutError::Disconnected) => Err(ControlError::WorkerGone),
        }
    }

    /// Changes the buckets that `config` names, also while the guest runs.
    ///
    /// # Errors
    ///
    /// When the worker is gone.
    pub fn set_limiter(&self, config: RateLimiterConfig) -> Result<(), ControlError> {
        self.mailbox
            .post(Command::Limit(config))
            .map_err(|_| ControlError::WorkerGone)?;
        self.metrics.update_count.add(1);
        Ok(())
    }

    /// The access for which the disk was opened.
    pub fn access(&self) -> Access {
        locked(&self.geometry).access
    }

    /// The shape of the image.
    pub fn geometry(&self) -> Geometry {
        *locked(&self.geometry)
    }

    /// What the disk counts.
    pub fn metrics(&self) -> &Arc<BlkMetrics> {
        &self.metrics
    }
}

/// A geometry is replaced in one piece, so one that a panic left behind is whole.
fn locked(geometry: &Mutex<Geometry>) -> MutexGuard<'_, Geometry> {
    geometry.lock().unwrap_or_else(PoisonError::into_inner)
}
