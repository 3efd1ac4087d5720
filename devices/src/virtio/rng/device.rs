//! The register half of the entropy device, and the mailbox between it and its worker.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use coracle_storage::limit::RateLimiter;
use coracle_storage::threads::{self, Thread};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::config::EntropyConfig;
use super::worker::{EntropyCounts, Worker};
use crate::virtio::device::{
    DeviceKind, Notice, Patience, Session, StartError, Stop, StopError, VirtioDevice,
};
use crate::virtio::ring::{FEATURE_EVENT_IDX, FEATURE_INDIRECT_DESC};
use crate::virtio::state::{DeviceState, DeviceStateError};

/// How long a stop waits for the worker, which is never further from its mailbox than a few requests.
pub const DRAIN_MS_MAX: u64 = 1000;
/// One request queue.
const QUEUE_SIZES_MAX: [u16; 1] = [256];

/// The entropy device. Its worker thread waits without cost while there is nothing to do, and ends with the device.
#[derive(Debug)]
pub struct Entropy {
    mailbox: Arc<Mailbox>,
    counts: Arc<EntropyCounts>,
    serving: bool,
    /// Until when the session is waited for, once it was asked for.
    recalled: Option<Instant>,
    worker: Option<Thread<()>>,
}

impl Entropy {
    /// An idle device with its thread.
    ///
    /// # Errors
    ///
    /// When the thread or the eventfd that wakes it cannot be made.
    pub fn new(config: &EntropyConfig) -> io::Result<Self> {
        let mailbox = Arc::new(Mailbox {
            mail: Mutex::new(Mail {
                worker_lives: true,
                ..Mail::default()
            }),
            changed: Condvar::new(),
            wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        });
        let counts = Arc::<EntropyCounts>::default();
        let limiter = RateLimiter::new(&config.rate_limiter.unwrap_or_default(), Instant::now());
        let worker = Worker::new(Arc::clone(&mailbox), Arc::clone(&counts), limiter);
        let worker = threads::spawn(threads::Kind::Entropy, "rng", move || worker.run())?;
        Ok(Self {
            mailbox,
            counts,
            serving: false,
            recalled: None,
            worker: Some(worker),
        })
    }

    /// What the device has done so far.
    pub fn counts(&self) -> &Arc<EntropyCounts> {
        &self.counts
    }
}

impl Drop for Entropy {
    fn drop(&mut self) {
        self.mailbox.tell(|mail| mail.end = true);
        if self.worker.take().is_some_and(|worker| worker.join().is_err()) {
            log::error!("the worker of the entropy device had panicked");
        }
    }
}

impl VirtioDevice for Entropy {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Entropy
    }

    fn features(&self) -> u64 {
        1 << VIRTIO_F_VERSION_1 | FEATURE_EVENT_IDX | FEATURE_INDIRECT_DESC
    }

    fn queue_sizes_max(&self) -> &[u16] {
        &QUEUE_SIZES_MAX
    }

    /// There is no configuration space (5.4.4).
    fn read_config(&self, _offset_bytes: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write_config(&mut self, _offset_bytes: u64, _data: &[u8]) {}

    fn save(&self) -> DeviceState {
        DeviceState::Entropy
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), DeviceStateError> {
        match state {
            DeviceState::Entropy => Ok(()),
            DeviceState::Block(_) => Err(DeviceStateError::Kind {
                saved: state.kind(),
                here: self.kind(),
            }),
        }
    }

    fn start(&mut self, session: Session) -> Result<(), StartError> {
        if self.serving {
            return Err(StartError::Started);
        }
        if !matches!(session.queues.first(), Some(Some(_))) {
            return Err(StartError::QueueMissing(0));
        }
        if !self.mailbox.lock().worker_lives {
            return Err(StartError::WorkerGone);
        }
        self.mailbox.tell(|mail| mail.to_serve = Some(session));
        self.serving = true;
        Ok(())
    }

    fn begin_stop(&mut self, notice: &Notice) {
        if !self.serving || self.recalled.is_some() {
            return;
        }
        self.mailbox.tell(|mail| {
            mail.stop = true;
            mail.notice = notice.clone();
        });
        self.recalled = Some(Instant::now() + Duration::from_millis(DRAIN_MS_MAX));
    }

    fn poll_stop(&mut self, patience: Patience) -> Stop {
        self.begin_stop(&Notice::default());
        let Some(until) = self.recalled else {
            return Stop::Stopped(None);
        };
        let left = until.saturating_duration_since(Instant::now());
        let limit = match patience {
            Patience::None => Duration::ZERO,
            Patience::WithinLimit => left,
        };
        match self.mailbox.returned(limit) {
            None if patience == Patience::None && !left.is_zero() => Stop::Pending { until },
            None => {
                self.mailbox.tell(|mail| mail.stop = false);
                self.recalled = None;
                Stop::Refused(StopError::Drain {
                    in_flight: 1,
                    limit_ms: DRAIN_MS_MAX,
                })
            }
            Some(returned) => {
                self.serving = false;
                self.recalled = None;
                match returned {
                    Ok(session) => Stop::Stopped(Some(session)),
                    Err(error) => Stop::Refused(error),
                }
            }
        }
    }
}

/// Where the register half leaves sessions and wishes, and the worker leaves sessions.
#[derive(Debug)]
pub(super) struct Mailbox {
    mail: Mutex<Mail>,
    changed: Condvar,
    /// Written with every change, for a worker that waits in `poll`.
    wake: EventFd,
}

#[derive(Debug, Default)]
struct Mail {
    to_serve: Option<Session>,
    stop: bool,
    /// Rings when the session is given back.
    notice: Notice,
    end: bool,
    given_back: Option<Session>,
    worker_lives: bool,
}

impl Mailbox {
    /// The eventfd that tells a serving worker to look at [`Self::is_recalled`].
    pub(super) fn wake(&self) -> &EventFd {
        &self.wake
    }

    /// Whether the worker should give its session back.
    pub(super) fn is_recalled(&self) -> bool {
        let mail = self.lock();
        mail.stop || mail.end
    }

    /// Waits for a session; `None` when the device is gone.
    pub(super) fn next_session(&self) -> Option<Session> {
        let idle = |mail: &mut Mail| mail.to_serve.is_none() && !mail.end;
        let mail = self.changed.wait_while(self.lock(), idle);
        mail.unwrap_or_else(PoisonError::into_inner).to_serve.take()
    }

    /// The worker gives its session back.
    pub(super) fn give_back(&self, session: Session) {
        let mut notice = Notice::default();
        self.tell(|mail| {
            mail.given_back = Some(session);
            mail.stop = false;
            notice = std::mem::take(&mut mail.notice);
        });
        notice.ring();
    }

    /// The worker says that it is no more.
    pub(super) fn worker_ends(&self) {
        self.tell(|mail| mail.worker_lives = false);
    }

    /// The session that was asked for, or why it does not come; `None` if it has not come after `limit`.
    fn returned(&self, limit: Duration) -> Option<Result<Session, StopError>> {
        let waiting = |mail: &mut Mail| mail.given_back.is_none() && mail.worker_lives;
        let waited = self.changed.wait_timeout_while(self.lock(), limit, waiting);
        let (mut mail, _) = waited.unwrap_or_else(PoisonError::into_inner);
        match mail.given_back.take() {
            Some(session) => Some(Ok(session)),
            None if mail.worker_lives => None,
            None => Some(Err(StopError::WorkerGone)),
        }
    }

    fn tell(&self, change: impl FnOnce(&mut Mail)) {
        change(&mut self.lock());
        self.changed.notify_all();
        // Refused only by a full counter, which wakes as well.
        let _ = self.wake.write(1);
    }

    fn lock(&self) -> MutexGuard<'_, Mail> {
        // A panic ends the process; where a test unwinds instead, the mail is still whole.
        self.mail.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
