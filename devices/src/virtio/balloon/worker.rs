//! The thread of a balloon.

use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU32, AtomicU64};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use coracle_storage::request::Segment;
use vm_memory::GuestMemoryMmap;

use super::Reclaim;
use super::device::{FREE_PAGE_HINT, PAGE_REPORTING, STATS_VQ};
use super::hinting::Hinting;
use super::pages::{Pages, segments_of};
use super::statistics::{BalloonStatistics, ENTRIES_MAX, ENTRY_BYTES};
use crate::complaints::Complaints;
use crate::virtio::device::{ActiveQueue, Session};
use crate::virtio::ring::{Chain, PopError};
use crate::virtio::segments;
use crate::virtio::service::Mailbox;
use crate::wait::wait;

/// Buffers that one queue may have served before the others have their turn.
const BATCH_BUFFERS_MAX: usize = 16;
/// Memory that is given back at a time: so long a stop waits.
const PIECE_BYTES: usize = 16 << 20;

/// What a balloon has done, for metrics.
#[derive(Debug, Default)]
pub struct BalloonCounts {
    /// Buffers with pages that the guest has given up.
    pub inflations: AtomicU64,
    /// Bytes of them that went back to the host.
    pub inflated_bytes: AtomicU64,
    /// Buffers with pages that it uses again.
    pub deflations: AtomicU64,
    /// Buffers with statistics.
    pub statistics: AtomicU64,
    /// Statistics that mean nothing here.
    pub statistics_unknown: AtomicU64,
    /// Ranges that were reported as free.
    pub reports: AtomicU64,
    /// Bytes of them that went back to the host.
    pub reported_bytes: AtomicU64,
    /// Reported ranges that the host did not take.
    pub report_fails: AtomicU64,
    /// Ranges that were hinted at as free.
    pub hints: AtomicU64,
    /// Bytes of them that went back to the host.
    pub hinted_bytes: AtomicU64,
    /// Hinted ranges that the host did not take.
    pub hint_fails: AtomicU64,
    /// Buffers that made no sense, ranges that the host did not take, and rings that broke.
    pub guest_faults: AtomicU64,
}

/// What the register half and the control share with their worker.
#[derive(Debug, Default)]
pub(super) struct Shared {
    pub(super) target_pages: AtomicU32,
    pub(super) actual_pages: AtomicU32,
    pub(super) interval_s: AtomicU16,
    /// The driver is to read the configuration space.
    pub(super) is_news: AtomicBool,
    /// Statistics are due now.
    pub(super) asks_now: AtomicBool,
    pub(super) counts: Arc<BalloonCounts>,
    statistics: Mutex<BalloonStatistics>,
    hinting: Mutex<Hinting>,
}

impl Shared {
    pub(super) fn statistics(&self) -> MutexGuard<'_, BalloonStatistics> {
        self.statistics.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whoever holds this while a page goes back to the host knows that the driver has not been told to take it.
    pub(super) fn hinting(&self) -> MutexGuard<'_, Hinting> {
        self.hinting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a queue is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Role {
    Inflate,
    Deflate,
    Statistics,
    Hinting,
    Reporting,
}

/// What the queues are for, by their numbers. Those of features that are not among these are not numbered (5.5.2, and Linux).
pub(super) fn roles(features: u64) -> impl Iterator<Item = Role> {
    [
        (0, Role::Inflate),
        (0, Role::Deflate),
        (STATS_VQ, Role::Statistics),
        (FREE_PAGE_HINT, Role::Hinting),
        (PAGE_REPORTING, Role::Reporting),
    ]
    .into_iter()
    .filter_map(move |(feature, role)| (features & feature == feature).then_some(role))
}

/// What one queue waits for when it has done what it could.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// Nothing: there is more.
    More,
    /// The guest's kick.
    Kick,
    /// Until its guest is asked for statistics.
    Due(Instant),
}

/// What serves the queues.
pub(super) struct Worker {
    reclaim: Box<dyn Reclaim>,
    shared: Arc<Shared>,
    chain: Chain,
    pages: Pages,
    /// Since when the first buffer in the ring of statistics has been read. It stays there until others are wanted.
    read: Option<Instant>,
    complaints: Complaints,
}

impl Worker {
    pub(super) fn new(reclaim: Box<dyn Reclaim>, shared: Arc<Shared>) -> Self {
        Self {
            reclaim,
            shared,
            chain: Chain::default(),
            pages: Pages::default(),
            read: None,
            complaints: Complaints::default(),
        }
    }

    /// Serves until the session is recalled.
    pub(super) fn serve(&mut self, mailbox: &Mailbox, session: &mut Session) {
        self.read = None;
        let mut is_broken = false;
        while !mailbox.is_recalled() {
            if self.shared.is_news.swap(false, SeqCst) {
                session.interrupt.configuration_changed();
            }
            if is_broken {
                wait(&[mailbox.wake()], None);
                continue;
            }
            match self.turns(mailbox, session) {
                Ok(next) => self.wait_for(mailbox, session, &next),
                Err(fault) => {
                    self.complaints.complain(format_args!(
                        "the guest's balloon driver broke a queue, which needs a reset: {fault}"
                    ));
                    self.shared.counts.guest_faults.fetch_add(1, Relaxed);
                    is_broken = true;
                    session.interrupt.device_needs_reset();
                }
            }
        }
    }

    /// One turn of each queue that the driver has made ready.
    fn turns(&mut self, mailbox: &Mailbox, session: &mut Session) -> Result<Vec<Next>, PopError> {
        let mut next = Vec::with_capacity(session.queues.len());
        for (role, queue) in roles(session.features).zip(&mut session.queues) {
            let Some(queue) = queue else {
                // Waits for nothing, which a kick that nobody listens to is.
                next.push(Next::Kick);
                continue;
            };
            let done = match role {
                Role::Statistics => self.ask(queue),
                _ => self.turn(role, mailbox, queue, &session.memory),
            };
            queue.ring.publish();
            if queue.ring.needs_interrupt() {
                session.interrupt.used_buffer();
            }
            next.push(done?);
        }
        Ok(next)
    }

    fn turn(
        &mut self,
        role: Role,
        mailbox: &Mailbox,
        queue: &mut ActiveQueue,
        memory: &GuestMemoryMmap,
    ) -> Result<Next, PopError> {
        let mut chain = std::mem::take(&mut self.chain);
        let mut next = Ok(Next::More);
        for _ in 0..BATCH_BUFFERS_MAX {
            match queue.ring.pop(&mut chain) {
                Ok(false) => {
                    next = Ok(Next::Kick);
                    break;
                }
                Ok(true) if self.take(role, mailbox, &chain, memory) => queue.ring.push(chain.head, 0),
                Ok(true) => {
                    // The driver has its pages back only when it has the buffer, so they can be given back again.
                    queue.ring.unpop();
                    break;
                }
                Err(PopError::Malformed { head, .. }) => {
                    self.shared.counts.guest_faults.fetch_add(1, Relaxed);
                    queue.ring.push(head, 0);
                }
                Err(broken) => {
                    next = Err(broken);
                    break;
                }
            }
        }
        self.chain = chain;
        next
    }

    /// Does what a buffer says; `false` if the worker was recalled before it had done it all.
    fn take(&mut self, role: Role, mailbox: &Mailbox, chain: &Chain, memory: &GuestMemoryMmap) -> bool {
        let counts = Arc::clone(&self.shared.counts);
        match role {
            Role::Inflate => {
                if !self.inflate(mailbox, &chain.readable, memory) {
                    return false;
                }
                counts.inflations.fetch_add(1, Relaxed);
            }
            Role::Deflate => {
                counts.deflations.fetch_add(1, Relaxed);
            }
            Role::Hinting => return self.take_hints(mailbox, chain),
            Role::Reporting => {
                let fails = &counts.report_fails;
                for range in &chain.writable {
                    if !self.give_back(mailbox, *range, None, [&counts.reported_bytes, fails]) {
                        return false;
                    }
                }
                counts.reports.fetch_add(chain.writable.len() as u64, Relaxed);
            }
            Role::Statistics => unreachable!("they have a turn of their own"),
        }
        true
    }

    fn inflate(&mut self, mailbox: &Mailbox, readable: &[Segment], memory: &GuestMemoryMmap) -> bool {
        let counts = Arc::clone(&self.shared.counts);
        let mut pages = std::mem::take(&mut self.pages);
        if !pages.read(readable) {
            counts.guest_faults.fetch_add(1, Relaxed);
        }
        let is_done = pages.runs().all(|run| {
            segments_of(memory, run).all(|range| {
                self.give_back(
                    mailbox,
                    range,
                    None,
                    [&counts.inflated_bytes, &counts.guest_faults],
                )
            })
        });
        self.pages = pages;
        is_done
    }

    fn take_hints(&mut self, mailbox: &Mailbox, chain: &Chain) -> bool {
        let counts = Arc::clone(&self.shared.counts);
        let mut command = [0; 4];
        if segments::gather(&chain.readable, 0, &mut command) == command.len() {
            let has_ended = self.shared.hinting().answered(u32::from_le_bytes(command));
            if has_ended {
                self.shared.is_news.store(true, SeqCst);
            }
        }
        let shared = Arc::clone(&self.shared);
        for range in &chain.writable {
            let tally = [&counts.hinted_bytes, &counts.hint_fails];
            if !self.give_back(mailbox, *range, Some(&shared), tally) {
                return false;
            }
        }
        counts.hints.fetch_add(chain.writable.len() as u64, Relaxed);
        true
    }

    /// Gives a range back to the host, or of hints what is wanted of it; `false` if the worker was recalled before it was done.
    fn give_back(
        &mut self,
        mailbox: &Mailbox,
        mut range: Segment,
        hints: Option<&Shared>,
        [bytes, fails]: [&AtomicU64; 2],
    ) -> bool {
        while range.len_bytes() > 0 {
            if mailbox.is_recalled() {
                return false;
            }
            let piece_bytes = PIECE_BYTES - range.address().addr() % PIECE_BYTES;
            let mut piece = range;
            range = piece.split_off(piece_bytes.min(piece.len_bytes()));
            // Held until the piece is gone: afterwards the driver may be told that it has its pages back.
            let hinting = hints.map(Shared::hinting);
            if hinting.as_ref().is_some_and(|hinting| !hinting.wants_pages()) {
                return true;
            }
            match self.reclaim.reclaim(piece) {
                Ok(given_back) => bytes.fetch_add(given_back, Relaxed),
                Err(error) => {
                    self.complaints
                        .complain(format_args!("memory of the guest cannot be given back: {error}"));
                    fails.fetch_add(1, Relaxed)
                }
            };
        }
        true
    }

    /// Reads the buffer of statistics, and gives it back when others are wanted: that is how they are asked for (5.5.6.3).
    fn ask(&mut self, queue: &mut ActiveQueue) -> Result<Next, PopError> {
        let asks_now = self.shared.asks_now.load(SeqCst);
        let interval = Duration::from_secs(self.shared.interval_s.load(SeqCst).max(1).into());
        if let Some(read) = self.read {
            let due = read + interval;
            if !asks_now && Instant::now() < due {
                return Ok(Next::Due(due));
            }
        }
        for _ in 0..BATCH_BUFFERS_MAX {
            match queue.ring.pop(&mut self.chain) {
                Ok(false) => {
                    self.read = None;
                    return Ok(Next::Kick);
                }
                // It was read, and has been waiting for this.
                Ok(true) if self.read.take().is_some() => {
                    self.shared.asks_now.store(false, SeqCst);
                    queue.ring.push(self.chain.head, 0);
                }
                Ok(true) => {
                    self.learn();
                    queue.ring.unpop();
                    let now = Instant::now();
                    self.read = Some(now);
                    return Ok(if asks_now {
                        Next::More
                    } else {
                        Next::Due(now + interval)
                    });
                }
                Err(PopError::Malformed { head, .. }) => {
                    self.read = None;
                    self.shared.counts.guest_faults.fetch_add(1, Relaxed);
                    queue.ring.push(head, 0);
                }
                Err(broken) => return Err(broken),
            }
        }
        Ok(Next::More)
    }

    fn learn(&self) {
        let mut buffer = [0; ENTRIES_MAX * ENTRY_BYTES];
        let read_bytes = segments::gather(&self.chain.readable, 0, &mut buffer);
        let read = buffer.get(..read_bytes).unwrap_or_default();
        let unknown = self.shared.statistics().take(read);
        let counts = &self.shared.counts;
        counts.statistics.fetch_add(1, Relaxed);
        counts.statistics_unknown.fetch_add(unknown as u64, Relaxed);
    }

    /// Waits for what each queue waits for.
    fn wait_for(&self, mailbox: &Mailbox, session: &mut Session, next: &[Next]) {
        let mut kicks = Vec::with_capacity(next.len() + 1);
        kicks.push(mailbox.wake());
        let mut until: Option<Instant> = None;
        let mut is_busy = self.shared.is_news.load(SeqCst);
        for (queue, next) in session.queues.iter_mut().zip(next) {
            let Some(queue) = queue else {
                continue;
            };
            match next {
                Next::More => is_busy = true,
                Next::Kick => {
                    is_busy |= queue.ring.enable_kicks();
                    kicks.push(&queue.kick);
                }
                // The buffer that the ring has is known, and a kick would say nothing else.
                Next::Due(due) => until = Some(until.map_or(*due, |until| until.min(*due))),
            }
        }
        let timeout = if is_busy {
            Some(Duration::ZERO)
        } else {
            until.map(|until| until.saturating_duration_since(Instant::now()))
        };
        wait(&kicks, timeout);
    }
}
