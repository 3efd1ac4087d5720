//! The thread that brings guest memory in while the guest runs: what is asked for first, then all the rest.
//!
//! ```text
//!   absent ──► wanted ──► being read ──► checked ──► there
//!      └── in its turn ──────┘   └── damaged, or not to be read: lost, and the machine ends
//! ```
//!
//! Whoever touches memory that is not there waits: a vCPU in KVM_RUN, a worker of io_uring, any thread. What is lost they wait
//! for until the process ends, so that nobody ever sees a byte that was not saved. The thread itself never touches guest memory
//! by its address: it hands whole pages to the kernel, which puts them where there are none.

mod loading;
mod orders;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use coracle_storage::pipeline::PreparedPipeline;
use coracle_storage::threads;
use vm_memory::{GuestAddress, GuestMemoryMmap};

use self::loading::{Loading, record_working_set};
use self::orders::{Order, Orders, orders};
use super::chunk::Pages;
use super::places::Places;
use super::reading::{Saved, saved_chunks};
use super::userfault::{Userfault, UserfaultError};
use crate::end::Ending;

/// How long a pager may take to end once it was told to: what it reads is waited for no longer than half of that.
const END_MS_MAX: u64 = 2_000;

/// The control end of the thread. Dropped, it ends the thread, within a limit.
///
/// It is to be dropped after the vCPUs and the devices of its machine, which may need memory until they stand still. Memory
/// that is not all there by then stays guarded for as long as the process lives: its absent pages never read as zeros.
#[derive(Debug)]
pub struct Pager {
    progress: Arc<Progress>,
    places: Places,
    orders: Orders,
    ended: Receiver<Remains>,
    has_ended: bool,
}

/// How much of the memory that was saved is there.
#[derive(Debug)]
pub struct Progress {
    loaded_bytes: AtomicU64,
    total_bytes: u64,
}

/// What a pager leaves behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Remains {
    /// Nobody waits for memory.
    Nothing,
    /// Somebody waits for memory that will never come: a thread that was given up, or a worker of the kernel's on behalf of a
    /// vCPU. KVM waits for the latter when its descriptors are closed, so these are to be left (`std::mem::forget`) to the end
    /// of the process, at which the kernel first gives up what waits.
    Waiters,
}

/// Why memory is not there that was to be brought in.
#[derive(Debug, thiserror::Error)]
pub enum BringError {
    /// Not yet.
    #[error(
        "the memory file did not give what is needed of the guest's memory within {} ms: is its server there?",
        .limit.as_millis()
    )]
    Late {
        /// How long it was waited for.
        limit: Duration,
    },
    /// Nor ever.
    #[error("what is needed of the guest's memory cannot be loaded from the memory file")]
    Lost,
}

/// Memory of which no page is there, and what tells when one is touched.
pub(super) struct Guarded {
    userfault: Userfault,
    places: Places,
}

impl Guarded {
    /// Guards all of `memory`, which nobody has touched yet.
    pub(super) fn new(memory: &GuestMemoryMmap) -> Result<Self, UserfaultError> {
        let userfault = Userfault::new()?;
        let places = Places::of(memory);
        places.ranges().try_for_each(|range| userfault.guard(range))?;
        Ok(Self { userfault, places })
    }
}

impl Progress {
    /// How many bytes of memory have been loaded; holes are not counted.
    pub fn loaded_bytes(&self) -> u64 {
        self.loaded_bytes.load(Ordering::Relaxed)
    }

    /// How many there are to be loaded.
    pub fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    fn add(&self, bytes: usize) {
        self.loaded_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }
}

impl Pager {
    /// Starts to load what `guarded` guards from the file at the other end of `pipeline`. `first` are chunks that will be asked
    /// for soon. Memory that cannot be loaded is announced to `ending`.
    pub(super) fn start(
        guarded: Guarded,
        saved: Arc<Saved>,
        pipeline: PreparedPipeline,
        first: Vec<usize>,
        ending: Ending,
    ) -> io::Result<Self> {
        let table = &saved.table;
        let bytes_of = |chunk| Pages(table.mask(chunk)).bytes() as u64;
        let progress = Arc::new(Progress {
            loaded_bytes: AtomicU64::new(0),
            total_bytes: saved_chunks(table).map(bytes_of).sum(),
        });
        let (orders, inbox) = orders()?;
        let (ended_outbox, ended) = channel();
        let places = guarded.places.clone();
        let loading = Loading::new(Arc::clone(&saved), guarded, first);
        let counted = Arc::clone(&progress);
        let serve = move || {
            let (remains, recorder) = loading.run(pipeline, &inbox, &counted, &ending);
            // Whoever would like to know may have given up.
            let _ = ended_outbox.send(remains);
            if let Some(recorder) = recorder {
                record_working_set(&saved, &recorder);
            }
        };
        drop(threads::spawn(threads::Kind::Pager, "pager", serve)?);
        Ok(Self {
            progress,
            places,
            orders,
            ended,
            has_ended: false,
        })
    }

    /// How far it has come; it goes on counting for as long as the pager lives.
    pub fn progress(&self) -> &Arc<Progress> {
        &self.progress
    }

    /// Brings in what was saved of `ranges` before anything else, and returns when it is there: for a thread that must not wait
    /// in a fault for as long as a server takes. Ranges that are not memory are left out.
    ///
    /// # Errors
    ///
    /// When it takes longer than `limit`, or will never be there.
    pub fn bring(&self, ranges: &[(GuestAddress, u64)], limit: Duration) -> Result<(), BringError> {
        let chunks = ranges
            .iter()
            .flat_map(|(start, len)| self.places.chunks_of(*start, *len));
        let (brought, answer) = channel();
        let order = Order::Bring {
            chunks: chunks.collect(),
            brought,
        };
        if self.orders.tell(order) {
            match answer.recv_timeout(limit) {
                Ok(()) => return Ok(()),
                Err(RecvTimeoutError::Timeout) => return Err(BringError::Late { limit }),
                Err(RecvTimeoutError::Disconnected) => {}
            }
        }
        // Nobody answers who has brought everything.
        if self.progress.loaded_bytes() < self.progress.total_bytes {
            return Err(BringError::Lost);
        }
        Ok(())
    }

    /// Ends the thread, and says what it leaves behind. The vCPUs and the devices of the machine are gone.
    pub fn end(mut self) -> Remains {
        self.stop()
    }

    fn stop(&mut self) -> Remains {
        if std::mem::replace(&mut self.has_ended, true) {
            return Remains::Nothing;
        }
        // One that has ended by itself has told so.
        self.orders.tell(Order::Stop);
        match self.ended.recv_timeout(Duration::from_millis(END_MS_MAX)) {
            // All that it may still have is a record to write, which nobody waits for.
            Ok(remains) => remains,
            Err(RecvTimeoutError::Disconnected) => panic!("a pager tells its end"),
            Err(RecvTimeoutError::Timeout) => {
                // It keeps what it uses, and the memory guarded.
                log::error!("the thread `pager` does not end; it is left behind");
                Remains::Waiters
            }
        }
    }
}

impl Drop for Pager {
    fn drop(&mut self) {
        self.stop();
    }
}

#[cfg(test)]
mod tests;
