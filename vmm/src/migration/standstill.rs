//! A guest that stands still for its migration does so for a limited time, whatever the connection or the target make of it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;

use coracle_storage::threads;

use super::progress::Progress;

/// Looks at the clock on a thread of its own, as every other may be waiting for the target. Dropped, it does not any more.
///
/// ```text
///   watching ──end──► over
///       └──the time is over──► overdue: every connection is cut
/// ```
#[derive(Debug)]
pub(super) struct Standstill {
    limit: Duration,
    state: Arc<AtomicU8>,
    _watched: Sender<()>,
}

/// It has lasted too long.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the guest has stood still for {} s, and the target did not have the rest of it: the connection has become slow, or the \
     target holds it up; if the guest is to stand still for as long as it takes, say so (on_timeout)", .limit.as_secs()
)]
pub struct Overdue {
    limit: Duration,
}

const WATCHING: u8 = 0;
const OVER: u8 = 1;
const OVERDUE: u8 = 2;

impl Standstill {
    /// From now on it is limited to `limit`, if there is one: then everything that `progress` goes by is cut.
    ///
    /// # Errors
    ///
    /// When the host has no thread to give.
    pub(super) fn begin(progress: &Arc<Progress>, limit: Option<Duration>) -> io::Result<Self> {
        let limit = limit.unwrap_or(Duration::MAX);
        let state = Arc::new(AtomicU8::new(WATCHING));
        let (watched, end) = channel();
        let (seen, progress) = (Arc::clone(&state), Arc::clone(progress));
        threads::spawn(threads::Kind::Mover, "mover", move || {
            if end.recv_timeout(limit) == Err(RecvTimeoutError::Timeout) && step(&seen, OVERDUE) {
                progress.cut();
            }
        })?;
        Ok(Self {
            limit,
            state,
            _watched: watched,
        })
    }

    /// Ends the watch: nothing is cut any more.
    ///
    /// # Errors
    ///
    /// When the time was over before.
    pub(super) fn end(&self) -> Result<(), Overdue> {
        step(&self.state, OVER);
        self.overdue().map_or(Ok(()), Err)
    }

    /// That it has lasted too long, if so.
    pub(super) fn overdue(&self) -> Option<Overdue> {
        let limit = self.limit;
        (self.state.load(Ordering::Acquire) == OVERDUE).then_some(Overdue { limit })
    }
}

/// Only the first step is taken.
fn step(state: &AtomicU8, to: u8) -> bool {
    state
        .compare_exchange(WATCHING, to, Ordering::AcqRel, Ordering::Acquire)
        .is_ok()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use std::io::Read;
    use std::net::{TcpListener, TcpStream};
    use std::thread;

    use super::*;

    #[test]
    fn a_connection_is_cut_when_the_time_is_over_and_not_after_the_end() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        for is_ended in [true, false] {
            let progress = Arc::<Progress>::default();
            let mut socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let _other = listener.accept().unwrap();
            socket.set_read_timeout(Some(Duration::from_millis(300))).unwrap();
            progress.goes_by(&socket).unwrap();
            let standstill = Standstill::begin(&progress, Some(Duration::from_millis(100))).unwrap();
            if is_ended {
                standstill.end().unwrap();
            }
            let read = socket.read(&mut [0]);
            // Nothing comes, or nothing can come any more.
            assert_eq!(read.is_err(), is_ended, "{read:?}");
            assert_eq!(standstill.overdue().is_some(), !is_ended);
            assert_eq!(standstill.end().is_err(), !is_ended);
        }
    }

    #[test]
    fn a_limit_that_no_clock_counts_is_none() {
        let standstill = Standstill::begin(&Arc::default(), None).unwrap();
        thread::sleep(Duration::from_millis(20));
        assert_eq!((standstill.overdue(), standstill.end()), (None, Ok(())));
    }
}
