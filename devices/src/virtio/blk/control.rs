//! The handle by which a machine changes a disk from outside its transport.

use std::io;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use coracle_storage::backend::{Access, Backend, Geometry};
use coracle_storage::blocking::Blocking;
use coracle_storage::limit::{RateLimiterConfig, SharedLimiter};
use coracle_storage::request::Failure;

use super::config::forked;
use super::loss::LossSignal;
use super::mailbox::{Call, Command, Gone, Mailbox};
use super::metrics::BlkMetrics;

/// Changes a disk from outside its transport.
#[derive(Clone)]
pub struct BlkControl {
    pub(super) geometry: Arc<Mutex<Geometry>>,
    pub(super) mailboxes: Vec<Mailbox>,
    pub(super) metrics: Vec<Arc<BlkMetrics>>,
    pub(super) limiter: Arc<SharedLimiter>,
    pub(super) loss: Arc<LossSignal>,
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
    /// The worker is busy.
    #[error("the disk's worker did not answer within {REPLY_MS_MAX} ms")]
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
const REPLY_MS_MAX: u64 = 2_000;

impl BlkControl {
    /// Uses `image` from the next start on; the old one is closed. Only while the device is
    /// stopped. The guest learns of a new capacity by a configuration interrupt, which the caller raises.
    ///
    /// # Errors
    ///
    /// The old image is then still in use. After [`ControlError::Late`] the worker has yet to close the new one.
    pub fn replace(&self, image: Box<dyn Backend>) -> Result<(), ControlError> {
        self.counted(self.try_replace(image))
    }

    fn try_replace(&self, image: Box<dyn Backend>) -> Result<(), ControlError> {
        let geometry = image.geometry();
        if geometry.access != self.access() {
            return Err(ControlError::Access);
        }
        let images = forked(image, self.mailboxes.len());
        if images.len() < self.mailboxes.len() {
            return Err(ControlError::OneThread {
                threads: self.mailboxes.len(),
            });
        }
        let mut old = Vec::new();
        for (mailbox, image) in self.mailboxes.iter().zip(images) {
            match exchange(mailbox, image) {
                Ok(replaced) => old.push(replaced),
                Err(error) => {
                    self.put_back(old);
                    return Err(error);
                }
            }
        }
        *locked(&self.geometry) = geometry;
        Ok(())
    }

    /// Undoes the first part of a replacement.
    fn put_back(&self, old: Vec<Box<dyn Backend>>) {
        for (mailbox, image) in self.mailboxes.iter().zip(old) {
            // Going on would let one queue of a disk write another image than the next.
            exchange(mailbox, image).expect("a worker that had an image a moment ago takes it back");
        }
    }

    /// Makes the image `size_bytes` long, also while the guest runs; says whether it was shorter before. An image
    /// that was grown from outside has that size already. The caller raises the configuration interrupt.
    ///
    /// # Errors
    ///
    /// The image then has the size that it had, except after [`ControlError::Late`], when it may have either.
    pub fn grow(&self, size_bytes: u64) -> Result<bool, ControlError> {
        self.counted(self.try_grow(size_bytes))
    }

    fn try_grow(&self, size_bytes: u64) -> Result<bool, ControlError> {
        if !grows(self.geometry().size_bytes, size_bytes)? {
            return Ok(false);
        }
        let (reply, answer) = channel();
        // One worker asks; the forks of an image share its size.
        let mailbox = self.mailboxes.first().ok_or(ControlError::WorkerGone)?;
        mailbox.post(Command::Grow(size_bytes, reply))?;
        answered(&answer)?.map_err(|source| ControlError::Grow {
            wanted_bytes: size_bytes,
            source,
        })?;
        locked(&self.geometry).size_bytes = size_bytes;
        Ok(true)
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

    /// What tells that the image serves nobody any more.
    pub fn loss(&self) -> &Arc<LossSignal> {
        &self.loss
    }

    fn counted<T>(&self, change: Result<T, ControlError>) -> Result<T, ControlError> {
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
    let mut blocking = Blocking::new(image).map_err(ControlError::Register)?;
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

/// A geometry is replaced in one piece, so one that a panic left behind is whole.
pub(super) fn locked(geometry: &Mutex<Geometry>) -> MutexGuard<'_, Geometry> {
    geometry.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Gives a worker `image`, and returns the one that it had.
fn exchange(mailbox: &Mailbox, image: Box<dyn Backend>) -> Result<Box<dyn Backend>, ControlError> {
    let (call, answer) = Call::new();
    mailbox.post(Command::Replace(image, call))?;
    let reply = answer.wait(Duration::from_millis(REPLY_MS_MAX));
    match reply.ok_or(ControlError::Late)?? {
        Ok(old) => Ok(old),
        Err(error) if error.kind() == io::ErrorKind::ResourceBusy => Err(ControlError::Serving),
        Err(error) => Err(ControlError::Register(error)),
    }
}

fn answered<T>(answer: &Receiver<T>) -> Result<T, ControlError> {
    answer
        .recv_timeout(Duration::from_millis(REPLY_MS_MAX))
        .map_err(|error| match error {
            RecvTimeoutError::Timeout => ControlError::Late,
            RecvTimeoutError::Disconnected => ControlError::WorkerGone,
        })
}
