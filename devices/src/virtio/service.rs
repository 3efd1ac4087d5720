//! A worker thread that serves one session after the other, from both of its ends: for devices whose worker is never
//! further from its mailbox than a few requests, because nothing that it does waits for anybody.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use coracle_storage::threads::{self, Thread};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::device::{Notice, Patience, Session, StartError, Stop, StopError};

/// How long a stop waits for the worker, where nobody says otherwise.
const DRAIN_MS_MAX: u64 = 1000;

/// The register half's end. Dropping it ends the worker.
#[derive(Debug)]
pub(super) struct Service {
    mailbox: Arc<Mailbox>,
    is_serving: bool,
    /// Until when the session is waited for, once it was asked for.
    recalled: Option<Instant>,
    drain_ms_max: u64,
    worker: Option<Thread<()>>,
    name: String,
}

impl Service {
    /// A thread of this kind and name, which does `work` from session to session (see [`Mailbox::serve`]).
    ///
    /// # Errors
    ///
    /// When the thread or the eventfd that wakes it cannot be made.
    pub(super) fn new(
        kind: threads::Kind,
        name: &str,
        work: impl FnOnce(&Mailbox) + Send + 'static,
    ) -> io::Result<Self> {
        let mailbox = Arc::new(Mailbox {
            mail: Mutex::new(Mail {
                worker_lives: true,
                ..Mail::default()
            }),
            changed: Condvar::new(),
            wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        });
        let end = EndOfWorker(Arc::clone(&mailbox));
        let worker = threads::spawn(kind, name, move || work(&end.0))?;
        Ok(Self {
            mailbox,
            is_serving: false,
            recalled: None,
            drain_ms_max: DRAIN_MS_MAX,
            worker: Some(worker),
            name: name.to_owned(),
        })
    }

    /// The same for a worker that waits for the host, and is waited for so long.
    pub(super) fn with_drain_limit(mut self, drain_ms_max: u64) -> Self {
        self.drain_ms_max = drain_ms_max;
        self
    }

    /// What makes the worker look up from what it waits for, for news that are not in its mailbox.
    pub(super) fn nudge(&self) -> Nudge {
        Nudge(Arc::clone(&self.mailbox))
    }

    /// As [`super::device::VirtioDevice::start`], for a device that needs the first `queues`.
    ///
    /// # Errors
    ///
    /// As there.
    pub(super) fn start(&mut self, session: Session, queues: usize) -> Result<(), StartError> {
        if self.is_serving {
            return Err(StartError::Started);
        }
        let is_missing = |index: &usize| !matches!(session.queues.get(*index), Some(Some(_)));
        if let Some(missing) = (0..queues).find(is_missing) {
            return Err(StartError::QueueMissing(missing));
        }
        if !self.mailbox.lock().worker_lives {
            return Err(StartError::WorkerGone);
        }
        self.mailbox.tell(|mail| mail.to_serve = Some(session));
        self.is_serving = true;
        Ok(())
    }

    /// Has a worker that is stopped forget what it has kept of its sessions, before it serves the next.
    pub(super) fn forget(&self) {
        self.mailbox.tell(|mail| mail.forget = true);
    }

    /// As [`super::device::VirtioDevice::begin_stop`].
    pub(super) fn begin_stop(&mut self, notice: &Notice) {
        if !self.is_serving || self.recalled.is_some() {
            return;
        }
        self.mailbox.tell(|mail| {
            mail.stop = true;
            mail.notice = notice.clone();
        });
        self.recalled = Some(Instant::now() + Duration::from_millis(self.drain_ms_max));
    }

    /// As [`super::device::VirtioDevice::poll_stop`].
    pub(super) fn poll_stop(&mut self, patience: Patience) -> Stop {
        self.begin_stop(&Notice::default());
        let Some(until) = self.recalled else {
            return Stop::Stopped(None);
        };
        let left = until.saturating_duration_since(Instant::now());
        let limit = match patience {
            Patience::None => Duration::ZERO,
            Patience::WithinLimit => left,
        };
        let mut returned = self.mailbox.returned(limit);
        if returned.is_none() {
            if patience == Patience::None && !left.is_zero() {
                return Stop::Pending { until };
            }
            returned = self.mailbox.withdraw();
        }
        match returned {
            None => {
                self.recalled = None;
                Stop::Refused(StopError::Drain {
                    in_flight: 1,
                    limit_ms: self.drain_ms_max,
                })
            }
            Some(returned) => {
                self.is_serving = false;
                self.recalled = None;
                match returned {
                    Ok(session) => Stop::Stopped(Some(session)),
                    Err(error) => Stop::Refused(error),
                }
            }
        }
    }
}

/// Makes a worker look up.
#[derive(Clone, Debug)]
pub(super) struct Nudge(Arc<Mailbox>);

impl Nudge {
    /// Does it.
    pub(super) fn nudge(&self) {
        self.0.tell(|_| {});
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.mailbox.tell(|mail| mail.end = true);
        if self.worker.take().is_some_and(|worker| worker.join().is_err()) {
            log::error!("the worker `{}` had panicked", self.name);
        }
    }
}

/// The worker's end: where the register half leaves sessions and wishes, and the worker leaves sessions.
#[derive(Debug)]
pub(super) struct Mailbox {
    mail: Mutex<Mail>,
    changed: Condvar,
    /// Written with every change, for a worker that waits in `poll`.
    wake: EventFd,
}

/// What there is to do for a worker that serves nobody.
enum Errand {
    Forget,
    Serve(Session),
}

#[derive(Debug, Default)]
struct Mail {
    to_serve: Option<Session>,
    /// What is kept from earlier sessions is to be forgotten, before the next one.
    forget: bool,
    stop: bool,
    /// The session was asked for, and is not any more; the worker may not have seen that.
    is_withdrawn: bool,
    /// Rings when the session is given back.
    notice: Notice,
    end: bool,
    given_back: Option<Session>,
    worker_lives: bool,
}

impl Mailbox {
    /// Has `serve` serve each session until [`Self::is_recalled`], and gives it back; until the device is gone.
    pub(super) fn serve(&self, mut serve: impl FnMut(&mut Session)) {
        self.serve_and_forget(&mut serve, |serve, session| serve(session), |_| {});
    }

    /// The same for a worker that keeps something between sessions, which [`Service::forget`] has it `forget`.
    pub(super) fn serve_and_forget<W>(
        &self,
        worker: &mut W,
        mut serve: impl FnMut(&mut W, &mut Session),
        mut forget: impl FnMut(&mut W),
    ) {
        while let Some(errand) = self.next_errand() {
            match errand {
                Errand::Forget => forget(worker),
                Errand::Serve(mut session) => {
                    serve(worker, &mut session);
                    self.give_back(session);
                }
            }
        }
    }

    /// The eventfd that tells a serving worker to look at [`Self::is_recalled`].
    pub(super) fn wake(&self) -> &EventFd {
        &self.wake
    }

    /// Whether the worker should give its session back.
    pub(super) fn is_recalled(&self) -> bool {
        let mail = self.lock();
        mail.stop || mail.end
    }

    /// Waits for something to do; `None` when the device is gone.
    fn next_errand(&self) -> Option<Errand> {
        let idle = |mail: &mut Mail| mail.to_serve.is_none() && !mail.forget && !mail.end;
        let mail = self.changed.wait_while(self.lock(), idle);
        let mut mail = mail.unwrap_or_else(PoisonError::into_inner);
        if std::mem::take(&mut mail.forget) {
            return Some(Errand::Forget);
        }
        mail.to_serve.take().map(Errand::Serve)
    }

    fn give_back(&self, session: Session) {
        let mut notice = Notice::default();
        self.tell(|mail| {
            // Whoever asked for it may have given up meanwhile: then it is served on.
            if mail.is_withdrawn && !mail.stop && !mail.end {
                mail.to_serve = Some(session);
            } else {
                mail.given_back = Some(session);
            }
            mail.stop = false;
            mail.is_withdrawn = false;
            notice = std::mem::take(&mut mail.notice);
        });
        notice.ring();
    }

    /// Does not ask for the session any more, unless it is there at last.
    fn withdraw(&self) -> Option<Result<Session, StopError>> {
        let mut mail = self.lock();
        let given_back = mail.given_back.take();
        mail.stop = false;
        mail.is_withdrawn = given_back.is_none();
        given_back.map(Ok)
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

/// Says that the worker has ended, even if it panics or was never begun.
struct EndOfWorker(Arc<Mailbox>);

impl Drop for EndOfWorker {
    fn drop(&mut self) {
        self.0.tell(|mail| mail.worker_lives = false);
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;
    use crate::virtio::conformance::wait_until;
    use crate::virtio::testing::{DriverRing, memory, session};

    #[test]
    fn a_session_that_comes_too_late_is_served_on_and_stops_when_it_is_asked_again() {
        let served = Arc::new(AtomicUsize::new(0));
        let number = Arc::clone(&served);
        let service = Service::new(threads::Kind::Net, "late", move |mailbox| {
            mailbox.serve(|_| {
                let is_first = number.fetch_add(1, Ordering::SeqCst) == 0;
                while !mailbox.is_recalled() {
                    std::thread::yield_now();
                }
                if is_first {
                    // It has seen that it is recalled, and not that it is not any more.
                    std::thread::sleep(Duration::from_millis(100));
                }
            });
        });
        let mut service = service.unwrap().with_drain_limit(20);
        let memory = memory(1 << 20);
        service
            .start(session(&DriverRing::new(&memory, 0x1000, 16)), 1)
            .unwrap();
        wait_until(|| served.load(Ordering::SeqCst) == 1, "it is served");
        let refused = service.poll_stop(Patience::WithinLimit);
        assert!(
            matches!(refused, Stop::Refused(StopError::Drain { .. })),
            "{refused:?}"
        );
        wait_until(|| served.load(Ordering::SeqCst) == 2, "it is served on");
        for _ in 0..2 {
            let Stop::Stopped(Some(session)) = service.poll_stop(Patience::WithinLimit) else {
                panic!("it does not stop");
            };
            let before = served.load(Ordering::SeqCst);
            service.start(session, 1).unwrap();
            wait_until(
                || served.load(Ordering::SeqCst) == before + 1,
                "it is served again",
            );
            assert!(service.mailbox.returned(Duration::from_millis(20)).is_none());
        }
    }
}
