//! Flushing the file of a pmem device beside its guest's own requests: one flush at a time, however often that is wanted.

use std::io;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use coracle_devices::virtio::device::{Notice, Patience};
use coracle_devices::virtio::pmem::FlushError;
use coracle_storage::threads;

/// Whether the guest can be told that all that it has stored is kept.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "the text of an error is its documentation")]
pub enum PmemFlushError {
    #[error("what the guest has stored is not on the medium")]
    Flush(#[from] FlushError),
    #[error("the host has no thread left to flush it")]
    Thread(#[source] io::Error),
    #[error(
        "what the guest has stored is not on the medium after {} s: look after the storage, and try again when it answers",
        FLUSH_MAX.as_secs()
    )]
    Late,
}

/// How long the flush of one file may take, before a snapshot is given up.
pub(super) const FLUSH_MAX: Duration = Duration::from_secs(30);

/// Who flushes one file.
///
/// ```text
///            begin                       flushed, nobody has asked since
///   idle ───────────► flushing, on a thread ────────────────────────────► idle
///                       ▲ begin: once more afterwards, for all who have asked
///                       └──┘
/// ```
///
/// Storage that hangs keeps its thread for as long as it does. Whoever gives up and asks again gets no second one, but the flush
/// after that which is under way: only that has what was stored since.
#[derive(Debug, Default)]
pub(super) struct Flusher {
    asked: Mutex<Asked>,
    done: Condvar,
}

#[derive(Debug, Default)]
struct Asked {
    /// How often a flush was wanted.
    count: u64,
    /// How many of these are answered.
    answered: u64,
    is_flushing: bool,
    /// What nobody has been told yet of a failure.
    failure: Option<FlushError>,
    /// A flush that has failed is the last that could succeed.
    has_failed: bool,
    notice: Notice,
}

/// A flush that is wanted.
pub(super) struct Flush {
    flusher: Arc<Flusher>,
    number: u64,
    until: Instant,
}

impl Flusher {
    /// Begins to `flush`, or will when the one that is under way has ended; `notice` rings when that is done.
    ///
    /// # Errors
    ///
    /// When the host has no thread to give.
    pub(super) fn begin(
        self: &Arc<Self>,
        flush: impl Fn() -> Result<(), FlushError> + Send + 'static,
        notice: &Notice,
    ) -> Result<Flush, PmemFlushError> {
        let mut asked = self.asked();
        if !asked.is_flushing {
            let flusher = Arc::clone(self);
            // Not joined: it may wait for a disk that never answers.
            let spawned = threads::spawn(threads::Kind::Mover, "flush", move || flusher.run(flush));
            spawned.map_err(PmemFlushError::Thread)?;
            asked.is_flushing = true;
        }
        asked.count += 1;
        asked.notice = notice.clone();
        Ok(Flush {
            flusher: Arc::clone(self),
            number: asked.count,
            until: Instant::now() + FLUSH_MAX,
        })
    }

    fn run(&self, flush: impl Fn() -> Result<(), FlushError>) {
        loop {
            // Before it begins: who asks meanwhile may have stored something that it has not found.
            let count = self.asked().count;
            let flushed = flush();
            let mut asked = self.asked();
            asked.has_failed |= flushed.is_err();
            let untold = asked.failure.take();
            asked.failure = flushed.err().or(untold);
            let is_last = asked.count == count;
            if is_last {
                // The lease of the file ends with the last who has it, and whoever waits may want that.
                drop(flush);
                asked.answered = count;
                asked.is_flushing = false;
                self.tell(&asked);
                return;
            }
            asked.answered = count;
            self.tell(&asked);
        }
    }

    fn tell(&self, asked: &Asked) {
        self.done.notify_all();
        asked.notice.ring();
    }

    fn asked(&self) -> MutexGuard<'_, Asked> {
        self.asked.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Flush {
    /// What it has come to, once.
    pub(super) fn poll(&self, patience: Patience) -> Option<Result<(), PmemFlushError>> {
        let left = match patience {
            Patience::WithinLimit => self.until.saturating_duration_since(Instant::now()),
            Patience::None => Duration::ZERO,
        };
        let is_open = |asked: &mut Asked| asked.answered < self.number;
        let waited = self
            .flusher
            .done
            .wait_timeout_while(self.flusher.asked(), left, is_open);
        let (mut asked, _) = waited.unwrap_or_else(PoisonError::into_inner);
        if is_open(&mut asked) {
            return (Instant::now() >= self.until).then_some(Err(PmemFlushError::Late));
        }
        Some(match asked.failure.take() {
            Some(error) => Err(error.into()),
            None if asked.has_failed => Err(FlushError::Earlier.into()),
            None => Ok(()),
        })
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::sync::mpsc::{Receiver, Sender, channel};

    use super::*;

    /// Storage that hangs until it is told what to answer.
    struct Storage {
        flushes: Arc<AtomicU32>,
        answers: Arc<Mutex<Receiver<Result<(), FlushError>>>>,
        answer: Sender<Result<(), FlushError>>,
        flusher: Arc<Flusher>,
    }

    impl Storage {
        fn new() -> Self {
            let (answer, answers) = channel();
            Self {
                flushes: Arc::default(),
                answers: Arc::new(Mutex::new(answers)),
                answer,
                flusher: Arc::default(),
            }
        }

        fn begin(&self) -> Flush {
            let (flushes, answers) = (Arc::clone(&self.flushes), Arc::clone(&self.answers));
            let flush = move || {
                flushes.fetch_add(1, Ordering::SeqCst);
                answers.lock().unwrap().recv().unwrap()
            };
            self.flusher.begin(flush, &Notice::default()).unwrap()
        }

        fn flushes_are(&self, count: u32) -> bool {
            let until = Instant::now() + Duration::from_secs(10);
            while self.flushes.load(Ordering::SeqCst) < count && Instant::now() < until {
                std::thread::sleep(Duration::from_millis(1));
            }
            // Time for one too many.
            std::thread::sleep(Duration::from_millis(50));
            self.flushes.load(Ordering::SeqCst) == count
        }
    }

    #[test]
    fn however_often_a_flush_is_wanted_of_storage_that_hangs_one_is_under_way() {
        let storage = Storage::new();
        let first = storage.begin();
        assert!(storage.flushes_are(1));
        let others: Vec<Flush> = (0..100).map(|_| storage.begin()).collect();
        assert!(storage.flushes_are(1));
        assert!(others.iter().all(|other| other.poll(Patience::None).is_none()));
        storage.answer.send(Ok(())).unwrap();
        assert!(matches!(first.poll(Patience::WithinLimit), Some(Ok(()))));
        // What was stored since the first began is in the next one only, which is for all of them.
        assert!(storage.flushes_are(2));
        assert!(others.iter().all(|other| other.poll(Patience::None).is_none()));
        storage.answer.send(Ok(())).unwrap();
        for other in &others {
            assert!(matches!(other.poll(Patience::WithinLimit), Some(Ok(()))));
        }
        let again = storage.begin();
        assert!(storage.flushes_are(3));
        storage.answer.send(Ok(())).unwrap();
        assert!(matches!(again.poll(Patience::WithinLimit), Some(Ok(()))));
    }

    #[test]
    fn after_a_failure_nobody_is_told_that_all_is_well() {
        let storage = Storage::new();
        let first = storage.begin();
        let second = storage.begin();
        let host = FlushError::Host(io::ErrorKind::StorageFull.into());
        storage.answer.send(Err(host)).unwrap();
        let _ = storage.answer.send(Err(FlushError::Earlier));
        let told = first.poll(Patience::WithinLimit).unwrap();
        assert!(matches!(told, Err(PmemFlushError::Flush(_))), "{told:?}");
        let told = second.poll(Patience::WithinLimit).unwrap();
        assert!(matches!(told, Err(PmemFlushError::Flush(_))), "{told:?}");
    }

    #[test]
    fn who_waits_too_long_is_told_so_and_the_thread_stays_for_whoever_asks_next() {
        let storage = Storage::new();
        let late = Flush {
            until: Instant::now(),
            ..storage.begin()
        };
        assert!(storage.flushes_are(1));
        let told = late.poll(Patience::WithinLimit);
        assert!(matches!(told, Some(Err(PmemFlushError::Late))));
        let next = storage.begin();
        storage.answer.send(Ok(())).unwrap();
        storage.answer.send(Ok(())).unwrap();
        assert!(matches!(next.poll(Patience::WithinLimit), Some(Ok(()))));
        assert!(storage.flushes_are(2));
    }
}
