//! A thread for what may take as long as a server does.

use std::io;
use std::sync::mpsc::{Receiver, TryRecvError, channel};
use std::time::Duration;

use coracle_devices::virtio::device::Notice;
use coracle_storage::threads;

/// Something that is being opened. Who drops it has no use for it any more: then it is closed when it is there.
pub(super) struct Opening<T> {
    opened: Receiver<T>,
}

impl<T: Send + 'static> Opening<T> {
    /// Begins to `open`, on a thread of this `name`; `notice` rings when that is done.
    ///
    /// # Errors
    ///
    /// When the host has no thread to give.
    pub(super) fn begin(
        name: &str,
        notice: &Notice,
        open: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<Self> {
        let (sender, opened) = channel();
        let notice = notice.clone();
        // Not joined: it may be with a server that never answers, and the process does not wait for that.
        threads::spawn(threads::Kind::Mover, name, move || {
            // Whoever wanted it may be gone.
            if sender.send(open()).is_ok() {
                notice.ring();
            }
        })?;
        Ok(Self { opened })
    }

    /// What was opened, once it is there or this time has passed.
    pub(super) fn wait(&self, limit: Duration) -> Option<T> {
        self.opened.recv_timeout(limit).ok()
    }

    /// What was opened, once.
    pub(super) fn poll(&self) -> Option<T> {
        match self.opened.try_recv() {
            Ok(opened) => Some(opened),
            Err(TryRecvError::Empty) => None,
            Err(TryRecvError::Disconnected) => panic!("a thread that panics ends the process"),
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use std::sync::Arc;
    use std::thread;
    use std::time::{Duration, Instant};

    use vmm_sys_util::eventfd::EventFd;

    use super::*;

    #[test]
    fn whoever_waits_is_told_when_it_is_open_and_not_before() {
        let bell = Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        let (let_go, held) = channel::<()>();
        let opening = Opening::begin("open", &Notice::new(Arc::clone(&bell)), move || {
            held.recv().is_ok()
        })
        .unwrap();
        assert_eq!(opening.poll(), None);
        assert!(bell.read().is_err());
        let_go.send(()).unwrap();
        let limit = Instant::now() + Duration::from_secs(10);
        while bell.read().is_err() {
            assert!(Instant::now() < limit, "nobody was told");
            thread::sleep(Duration::from_micros(100));
        }
        assert_eq!(opening.poll(), Some(true));
    }
}
