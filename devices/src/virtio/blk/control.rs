//! The handle by which a machine changes a disk from outside its transport.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use coracle_storage::backend::{Access, Backend, Geometry};
use coracle_storage::blocking::Blocking;
use coracle_storage::changes::Changes;
use coracle_storage::limit::{RateLimiterConfig, SharedLimiter};
use coracle_storage::metrics::SessionMetrics;
use coracle_storage::request::{Failure, Operation};

use super::change::{Asked, Changed, Exchange, ImageChange};
use super::config::forked;
use super::loss::LossSignal;
use super::mailbox::{Call, Command, Gone, Mailbox};
use super::metrics::BlkMetrics;
use crate::virtio::device::{Notice, Patience};

/// Changes a disk from outside its transport.
#[derive(Clone)]
pub struct BlkControl {
    pub(super) geometry: Arc<Mutex<Geometry>>,
    pub(super) mailboxes: Vec<Mailbox>,
    pub(super) metrics: Vec<Arc<BlkMetrics>>,
    pub(super) limiter: Arc<SharedLimiter>,
    pub(super) loss: Arc<LossSignal>,
    pub(super) changes: Arc<Changes>,
    /// Of the image that the workers have.
    pub(super) session: Arc<Mutex<Option<Arc<SessionMetrics>>>>,
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
    /// The image is on a network, or has the records of its lease in a directory, and the disk was started without a way there.
    #[error(
        "the new image is on a network, or its lease has its records in a directory, and the disk's ring and thread were \
         restricted to less when the machine was started: start one that has the new image from the beginning, or whose drive \
         has `io_engine` Sync"
    )]
    Reach,
    /// The disk is served by several threads, and the image cannot be.
    #[error(
        "the disk has {threads} queues with a thread each, and the new image takes one thread only: \
         configure the drive with `num_queues` 1"
    )]
    OneThread {
        /// Threads of the disk.
        threads: usize,
    },
    /// A disk never loses sectors under a guest.
    #[error("the disk has {now_bytes} bytes and cannot shrink to {wanted_bytes}: ask for a larger size")]
    Shrinks {
        /// The size now.
        now_bytes: u64,
        /// The size asked for.
        wanted_bytes: u64,
    },
    /// A size that is no size of a disk.
    #[error("a disk's size is a multiple of 512: round {0} up")]
    PartialSector(u64),
    /// The image does not become that large.
    #[error("the image does not grow to {wanted_bytes} bytes")]
    Grow {
        /// The size asked for.
        wanted_bytes: u64,
        /// What the storage said.
        #[source]
        source: Failure,
    },
    /// What was written is not all on the medium.
    #[error("what was written to the image cannot be made durable")]
    Flush(#[source] Failure),
    /// The lease is not raised.
    #[error("the generation of the image cannot be raised")]
    Raise(#[source] Failure),
    /// The fence may still be up.
    #[error("the image is not given out of hand")]
    Yield(#[source] Failure),
    /// The fence is not up.
    #[error("the image is not had back")]
    TakeBack(#[source] Failure),
    /// The worker is busy.
    #[error("the disk's worker did not answer in time")]
    Late,
    /// The worker thread is gone.
    #[error("the disk's worker thread has ended")]
    WorkerGone,
}

impl From<Gone> for ControlError {
    fn from(_: Gone) -> Self {
        Self::WorkerGone
    }
}

/// How long a command may take until it is answered.
pub(super) const REPLY_MS_MAX: u64 = 2_000;

/// How long an image that no disk uses yet may take to grow: its server may fall silent once it was opened.
const GROW_MS_MAX: u64 = 10_000;

const ANSWERED: &str = "who is patient gets an answer";

impl BlkControl {
    /// Uses `image` from the next start on; the old one is closed. Only while the device is
    /// stopped. The guest learns of a new capacity by a configuration interrupt, which the caller raises.
    ///
    /// # Errors
    ///
    /// The old image is then still in use. After [`ControlError::Late`] the worker has yet to close the new one.
    pub fn replace(&self, image: Box<dyn Backend>) -> Result<(), ControlError> {
        let mut change = self.begin_replace(image, &Notice::default())?;
        change.poll(Patience::WithinLimit).expect(ANSWERED).map(drop)
    }

    /// The same, to be looked after; `notice` rings when that is worth it.
    ///
    /// # Errors
    ///
    /// As [`Self::replace`].
    pub fn begin_replace(
        &self,
        image: Box<dyn Backend>,
        notice: &Notice,
    ) -> Result<ImageChange, ControlError> {
        self.begun(self.try_replace(image, notice))
    }

    fn try_replace(&self, image: Box<dyn Backend>, notice: &Notice) -> Result<Asked, ControlError> {
        let (geometry, session) = (image.geometry(), image.session());
        if geometry.access != self.access() {
            return Err(ControlError::Access);
        }
        let images = forked(image, self.mailboxes.len());
        if images.len() < self.mailboxes.len() {
            return Err(ControlError::OneThread {
                threads: self.mailboxes.len(),
            });
        }
        let mut exchanges = Vec::new();
        for (mailbox, image) in self.mailboxes.iter().zip(images) {
            exchanges.push(Exchange::new(mailbox, image, notice)?);
        }
        Ok(Asked::Replace {
            exchanges,
            geometry,
            session,
        })
    }

    /// Makes the image `size_bytes` long, also while the guest runs; says whether it was shorter before. An image
    /// that was grown from outside has that size already. The caller raises the configuration interrupt.
    ///
    /// # Errors
    ///
    /// The image then has the size that it had, except after [`ControlError::Late`], when it may have either.
    pub fn grow(&self, size_bytes: u64) -> Result<bool, ControlError> {
        let mut change = self.begin_grow(size_bytes, &Notice::default())?;
        let changed = change.poll(Patience::WithinLimit).expect(ANSWERED)?;
        Ok(changed == Changed::Geometry)
    }

    /// The same, to be looked after; `notice` rings when that is worth it.
    ///
    /// # Errors
    ///
    /// As [`Self::grow`].
    pub fn begin_grow(&self, size_bytes: u64, notice: &Notice) -> Result<ImageChange, ControlError> {
        self.begun(self.try_grow(size_bytes, notice))
    }

    fn try_grow(&self, size_bytes: u64, notice: &Notice) -> Result<Asked, ControlError> {
        if !grows(self.geometry().size_bytes, size_bytes)? {
            return Ok(Asked::Nothing);
        }
        let (call, answer) = Call::new(notice);
        // One worker asks; the forks of an image share its size.
        let mailbox = self.mailboxes.first().ok_or(ControlError::WorkerGone)?;
        mailbox.post(Command::Ask(Operation::Grow, size_bytes, call))?;
        Ok(Asked::Grow { size_bytes, answer })
    }

    fn begun(&self, asked: Result<Asked, ControlError>) -> Result<ImageChange, ControlError> {
        match asked {
            Ok(asked) => Ok(ImageChange {
                control: Box::new(self.clone()),
                asked,
                until: Instant::now() + Duration::from_millis(REPLY_MS_MAX),
            }),
            Err(error) => self.counted(Err(error)),
        }
    }

    /// Changes the buckets that `config` names, also while the guest runs.
    ///
    /// # Errors
    ///
    /// When a worker is gone.
    pub fn set_limiter(&self, config: &RateLimiterConfig) -> Result<(), ControlError> {
        self.limiter.update(config, Instant::now());
        self.counted(self.reconsider())
    }

    /// Lets what waits for tokens go: the limits of the disk's group have changed.
    ///
    /// # Errors
    ///
    /// When a worker is gone.
    pub fn reconsider(&self) -> Result<(), ControlError> {
        for mailbox in &self.mailboxes {
            mailbox.post(Command::Reconsider)?;
        }
        Ok(())
    }

    /// The access for which the disk was opened.
    pub fn access(&self) -> Access {
        self.geometry().access
    }

    /// The shape of the image.
    pub fn geometry(&self) -> Geometry {
        *locked(&self.geometry)
    }

    /// What each worker of the disk counts; changes of the disk are counted by the first.
    pub fn metrics(&self) -> &[Arc<BlkMetrics>] {
        &self.metrics
    }

    /// What the session of the image with its server counts, if it has one; the disk's worker is not asked.
    pub fn session(&self) -> Option<Arc<SessionMetrics>> {
        locked(&self.session).clone()
    }

    /// Where the workers of the disk mark what its guest has changed, as long as somebody watches.
    pub fn changes(&self) -> &Arc<Changes> {
        &self.changes
    }

    /// What tells that the image serves nobody any more.
    pub fn loss(&self) -> &Arc<LossSignal> {
        &self.loss
    }

    pub(super) fn counted<T>(&self, change: Result<T, ControlError>) -> Result<T, ControlError> {
        if let Some(metrics) = self.metrics.first() {
            match change {
                Ok(_) => metrics.update_count.add(1),
                Err(_) => metrics.update_fails.add(1),
            }
        }
        change
    }
}

/// Makes `image`, which no disk uses yet, `size_bytes` long: what cannot be had is heard of before it replaces another.
///
/// # Errors
///
/// The image then has the size that it had.
pub fn grown(image: Box<dyn Backend>, size_bytes: u64) -> Result<Box<dyn Backend>, ControlError> {
    let grows = grows(image.geometry().size_bytes, size_bytes)?;
    let blocking = Blocking::new(image).map_err(ControlError::Register)?;
    let mut blocking = blocking.with_limit(Duration::from_millis(GROW_MS_MAX));
    if grows {
        let grown = blocking.grow(size_bytes);
        grown.map_err(|source| ControlError::Grow {
            wanted_bytes: size_bytes,
            source,
        })?;
    }
    Ok(blocking.into_image())
}

/// Whether `wanted_bytes` is another size than `now_bytes`, and one that a disk can have after it.
fn grows(now_bytes: u64, wanted_bytes: u64) -> Result<bool, ControlError> {
    if wanted_bytes < now_bytes {
        return Err(ControlError::Shrinks {
            now_bytes,
            wanted_bytes,
        });
    }
    if !wanted_bytes.is_multiple_of(512) {
        return Err(ControlError::PartialSector(wanted_bytes));
    }
    Ok(wanted_bytes > now_bytes)
}

/// What is replaced in one piece is whole, also where a panic left it behind.
pub(super) fn locked<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}
