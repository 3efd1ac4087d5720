//! The register half of the block device, which deals its queues out to its workers.

use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use coracle_storage::backend::{Backend, Geometry};
use coracle_storage::changes::Changes;
use coracle_storage::engine::PreparedReactor;
use coracle_storage::limit::SharedLimiter;
use coracle_storage::threads;

use super::cache::WriteCache;
use super::config::Disk;
use super::control::{BlkControl, locked};
use super::lane::Drive;
use super::loss::LossSignal;
use super::mailbox::{Command, Gone, Inbox, Mailbox, StopAnswer, StopCall, StopReply, Unanswered};
use super::metrics::BlkMetrics;
use super::request::SERIAL_BYTES;
use super::space::{WRITEBACK, features, space};
use super::state::BlkState;
use super::worker::{DRAIN_MS_MAX, StillBorn, Worker};
use crate::complaints::Complaints;
use crate::virtio::device::{
    DeviceKind, Notice, Patience, Session, StartError, Stop, StopError, VirtioDevice, read_space,
};
use crate::virtio::parts::{parts, whole};
use crate::virtio::state::{DeviceState, DeviceStateError};

/// The size of a queue, in descriptors; what it has in flight at most.
pub(super) const QUEUE_SIZE_MAX: u16 = 256;
/// Queues of one disk.
pub(super) const QUEUES_MAX: u16 = 16;

/// A block device and the workers that serve it: one for each queue, or one for all.
pub struct Blk {
    features: u64,
    queue_sizes: Vec<u16>,
    geometry: Arc<Mutex<Geometry>>,
    cache: Arc<WriteCache>,
    workers: Vec<Thread>,
    serving: bool,
    /// A stop that is not answered yet.
    recall: Option<Recall>,
    drain_ms_max: u64,
}

/// A worker's thread, the way to it, and how one learns that it has ended: its end of the channel is dropped.
struct Thread {
    mailbox: Mailbox,
    /// It leaves the images that it has served.
    handle: threads::Thread<Vec<Box<dyn Backend>>>,
    ended: Receiver<io::Result<()>>,
}

impl Blk {
    /// Makes the device and its workers, which idle until the device is started.
    ///
    /// # Errors
    ///
    /// When the host refuses a thread, an eventfd, or the reactor that it granted before.
    pub fn new(disk: Disk) -> io::Result<(Self, BlkControl)> {
        Self::with_drain_limit(disk, DRAIN_MS_MAX)
    }

    pub(super) fn with_drain_limit(disk: Disk, drain_ms_max: u64) -> io::Result<(Self, BlkControl)> {
        let image = disk.images.first();
        let image = image.ok_or_else(|| io::Error::other("a disk has an image"))?;
        let (geometry, session) = (image.geometry(), image.session());
        let features = features(geometry.access, disk.cache_type, disk.queues);
        let geometry = Arc::new(Mutex::new(geometry));
        let cache = Arc::new(WriteCache::new(disk.cache_type));
        let limiter = Arc::new(SharedLimiter::new(&disk.rate_limiter, Instant::now()));
        let mut device = Self {
            features,
            queue_sizes: vec![QUEUE_SIZE_MAX; usize::from(disk.queues)],
            geometry: Arc::clone(&geometry),
            cache: Arc::clone(&cache),
            workers: Vec::new(),
            serving: false,
            recall: None,
            drain_ms_max,
        };
        let changes = Arc::<Changes>::default();
        let mut metrics = Vec::new();
        for (image, reactor) in disk.images.into_iter().zip(disk.reactors) {
            let plan = WorkerPlan {
                id: disk.id.clone(),
                image,
                reactor,
                limits: [Some(Arc::clone(&limiter)), disk.group.clone()]
                    .into_iter()
                    .flatten()
                    .collect(),
                cache: Arc::clone(&cache),
                metrics: Arc::default(),
                loss: Arc::clone(&disk.loss),
                changes: Arc::clone(&changes),
                drain_ms_max,
            };
            metrics.push(Arc::clone(&plan.metrics));
            let number = device.workers.len();
            device.workers.push(plan.spawn(number)?);
        }
        let control = BlkControl {
            geometry,
            mailboxes: device
                .workers
                .iter()
                .map(|worker| worker.mailbox.clone())
                .collect(),
            metrics,
            limiter,
            loss: disk.loss,
            changes,
            session: Arc::new(Mutex::new(session)),
        };
        Ok((device, control))
    }

    /// Lends each part to its worker.
    fn hand_out(&self, parts: impl IntoIterator<Item = (usize, Session)>) -> Result<(), StartError> {
        for (number, part) in parts {
            let worker = self.workers.get(number).ok_or(StartError::WorkerGone)?;
            worker
                .mailbox
                .post(Command::Serve(Box::new(part)))
                .map_err(|_| StartError::WorkerGone)?;
        }
        Ok(())
    }

    /// What the workers have said by now; `None` if one has not, and `recall` goes on.
    fn gathered(recall: &mut Recall, patience: Patience, drain_ms_max: u64) -> Option<Gathered> {
        let mut waiting = false;
        for reply in &mut recall.replies {
            let Reply::Awaited(answer) = reply else { continue };
            match answer.poll(patience, recall.deadline) {
                None => waiting = true,
                Some(Ok(answer)) => *reply = Reply::Given(answer),
                Some(Err(Unanswered::Gone)) => *reply = Reply::Given(Err(StopError::WorkerGone)),
                // Without an answer the worker is inside a system call that does not return. When it does, one day,
                // the disk serves on.
                Some(Err(Unanswered::Late)) => {
                    *reply = Reply::Given(Err(StopError::Drain {
                        in_flight: 1,
                        limit_ms: drain_ms_max,
                    }));
                }
            }
        }
        if waiting {
            return None;
        }
        let mut gathered = Gathered::default();
        for (number, reply) in recall.replies.drain(..).enumerate() {
            match reply {
                Reply::Given(Ok(part)) => gathered.parts.extend(part.map(|part| (number, *part))),
                Reply::Given(Err(error)) => gathered.obstacle = Some(error),
                Reply::Awaited(_) => unreachable!("nobody is waited for any more"),
            }
        }
        Some(gathered)
    }
}

/// All workers were asked for their parts of the session.
struct Recall {
    replies: Vec<Reply>,
    deadline: Instant,
}

/// What one worker has said.
enum Reply {
    Awaited(StopAnswer),
    Given(StopReply),
}

/// The parts of those that gave theirs back, by the number of the worker, and what stands in the way of the others.
#[derive(Default)]
struct Gathered {
    parts: Vec<(usize, Session)>,
    obstacle: Option<StopError>,
}

/// Everything that a worker needs.
struct WorkerPlan {
    id: String,
    image: Box<dyn Backend>,
    reactor: PreparedReactor,
    limits: Vec<Arc<SharedLimiter>>,
    cache: Arc<WriteCache>,
    metrics: Arc<BlkMetrics>,
    loss: Arc<LossSignal>,
    changes: Arc<Changes>,
    drain_ms_max: u64,
}

impl WorkerPlan {
    /// Starts the worker and waits until it is ready.
    fn spawn(self, number: usize) -> io::Result<Thread> {
        let (mailbox, inbox) = Mailbox::new()?;
        let (ready, is_ready) = channel();
        let suffix = if number == 0 {
            String::new()
        } else {
            format!(".{number}")
        };
        // A thread's name holds no NUL; what else is in an id is the configuration's concern.
        let name = format!("io {}{suffix}", self.id).replace('\0', "");
        let kind = self.reactor.thread_kind();
        let handle = threads::spawn(kind, name, move || match self.worker(inbox) {
            Ok(worker) => {
                // The maker of the device waits for this, and does not go away before.
                let _ = ready.send(Ok(()));
                worker.run()
            }
            Err(StillBorn { image, error }) => {
                let _ = ready.send(Err(error));
                vec![image]
            }
        })?;
        match is_ready.recv().map_err(io::Error::other)? {
            Ok(()) => Ok(Thread {
                mailbox,
                handle,
                ended: is_ready,
            }),
            Err(error) => {
                // The image is let go here: see `Worker::run`.
                drop(handle.join());
                Err(error)
            }
        }
    }

    /// Binds the reactor to this thread, and makes the worker.
    fn worker(self, inbox: Inbox) -> Result<Worker, StillBorn> {
        let io = match self.reactor.enable() {
            Ok(io) => io,
            Err(error) => {
                return Err(StillBorn {
                    image: self.image,
                    error,
                });
            }
        };
        let drive = Drive {
            io,
            serial: serial(&self.id),
            image: self.image,
            limits: self.limits,
            cache: self.cache,
            metrics: self.metrics,
            loss: self.loss,
            changes: self.changes,
            complaints: Complaints::default(),
        };
        Worker::new(drive, inbox, self.drain_ms_max)
    }
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
        &self.queue_sizes
    }

    fn read_config(&self, offset_bytes: u64, data: &mut [u8]) {
        let queues = u16::try_from(self.queue_sizes.len()).expect("QUEUES_MAX is small");
        let space = space(&locked(&self.geometry), &self.cache, queues);
        read_space(&space, offset_bytes, data);
    }

    /// Only `writeback` may be written, by itself: it is one byte wide (4.2.2.2).
    fn write_config(&mut self, offset_bytes: u64, data: &[u8]) {
        if let (WRITEBACK, [byte]) = (offset_bytes, data) {
            self.cache.set_writeback(*byte & 1 != 0);
        }
    }

    fn reset_config(&mut self) {
        self.cache.reset();
    }

    fn save(&self) -> DeviceState {
        DeviceState::Block(BlkState {
            writeback: self.cache.writeback(),
        })
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceStateError> {
        let DeviceState::Block(BlkState { writeback }) = state else {
            return Err(state.is_not_for(self.kind()));
        };
        self.cache.set_writeback(*writeback);
        Ok(())
    }

    fn start(&mut self, session: Session) -> Result<(), StartError> {
        if self.serving {
            return Err(StartError::Started);
        }
        if !matches!(session.queues.first(), Some(Some(_))) {
            return Err(StartError::QueueMissing(0));
        }
        self.cache.agree(session.features);
        let workers = self.workers.len();
        self.hand_out(parts(session, workers, |index| index % workers))?;
        self.serving = true;
        Ok(())
    }

    fn begin_stop(&mut self, notice: &Notice) {
        if !self.serving || self.recall.is_some() {
            return;
        }
        // All are asked before the first is looked after: they drain at the same time.
        let ask = |worker: &Thread| {
            let (call, answer) = StopCall::new(notice);
            match worker.mailbox.post(Command::Stop(call)) {
                Ok(()) => Reply::Awaited(answer),
                Err(Gone) => Reply::Given(Err(StopError::WorkerGone)),
            }
        };
        self.recall = Some(Recall {
            replies: self.workers.iter().map(ask).collect(),
            deadline: Instant::now() + Duration::from_millis(self.drain_ms_max + GRACE_MS),
        });
    }

    fn poll_stop(&mut self, patience: Patience) -> Stop {
        self.begin_stop(&Notice::default());
        let Some(recall) = &mut self.recall else {
            return Stop::Stopped(None);
        };
        let until = recall.deadline;
        let Some(gathered) = Self::gathered(recall, patience, self.drain_ms_max) else {
            return Stop::Pending { until };
        };
        self.recall = None;
        let Gathered { parts, obstacle } = gathered;
        if let Some(error) = obstacle {
            // Some queues cannot stand still, so the others go on as well.
            return Stop::Refused(match self.hand_out(parts) {
                Ok(()) => error,
                Err(_) => StopError::WorkerGone,
            });
        }
        self.serving = false;
        Stop::Stopped(whole(parts.into_iter().map(|(_, part)| part)))
    }
}

/// What a worker may need beyond its drain limit to be scheduled and to answer.
const GRACE_MS: u64 = 1_000;

impl Drop for Blk {
    fn drop(&mut self) {
        for worker in &self.workers {
            // A worker that has ended already needs no telling.
            let _ = worker.mailbox.post(Command::Retire);
        }
        let deadline = Instant::now() + Duration::from_millis(self.drain_ms_max + GRACE_MS);
        for Thread { handle, ended, .. } in self.workers.drain(..) {
            let limit = deadline.saturating_duration_since(Instant::now());
            if let Err(RecvTimeoutError::Timeout) = ended.recv_timeout(limit) {
                log::error!("the worker of a disk does not end; it is left behind");
                continue;
            }
            // A worker that panicked has ended the process.
            let _ = handle.join();
        }
    }
}
