//! The connections of one migration at the source: memory goes by all of them, each on a thread of its own for a round.
//!
//! A page is sent once in a round, by whichever stream takes the piece that it is in. Between streams there is no order but this:
//! each stream but the first has heard that the target has taken in all of its share before a round is over. The first one has
//! its mark, or the state, behind its last page.

use std::io;
use std::num::NonZeroU64;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::pages::{Ordered, PIECE_PAGES, Pieces, Sender, Sent};
use super::progress::Progress;
use super::send::{SendError, cpu_time, expect};
use super::stream::Stream;
use super::wire::{Kind, Wire, WireError};
use crate::config::Compression;
use crate::snapshot::memory::PageSet;

/// All of them.
pub(super) struct Streams {
    first: Lane,
    others: Vec<Lane>,
}

/// One of them.
struct Lane {
    wire: Wire<Stream>,
    pages: Sender,
    /// What threads of its own have had of processors.
    cpu_time: Duration,
}

/// A round that is shared by all streams.
pub(super) struct Share<'a> {
    ordered: &'a Ordered,
    pieces: Pieces<'a>,
    /// How many pieces there may be.
    pieces_max: usize,
    pace: &'a Pace<'a>,
}

impl<'a> Share<'a> {
    /// That of the pages of `set`.
    pub(super) fn new(ordered: &'a Ordered, set: &'a PageSet, pace: &'a Pace<'a>) -> Self {
        let pieces = set.count().div_ceil(PIECE_PAGES);
        Self {
            ordered,
            pieces: Pieces::new(set),
            pieces_max: usize::try_from(pieces).unwrap_or(usize::MAX),
            pace,
        }
    }
}

impl Streams {
    /// `first` and those that have joined it.
    pub(super) fn new(first: Wire<Stream>, others: Vec<Wire<Stream>>, compression: Compression) -> Self {
        let lane = |wire| Lane::new(wire, compression);
        Self {
            first: lane(first),
            others: others.into_iter().map(lane).collect(),
        }
    }

    /// The one that everything but pages goes by.
    pub(super) fn first(&mut self) -> &mut Wire<Stream> {
        &mut self.first.wire
    }

    /// How many bytes of frames were sent.
    pub(super) fn sent_bytes(&self) -> u64 {
        self.all().map(|lane| lane.wire.sent_bytes()).sum()
    }

    /// What threads beside the caller's have had of processors.
    pub(super) fn cpu_time(&self) -> Duration {
        self.all().map(|lane| lane.cpu_time).sum()
    }

    fn all(&self) -> impl Iterator<Item = &Lane> {
        std::iter::once(&self.first).chain(&self.others)
    }

    /// Says that all pages of a memory are zeros but those of `touched`.
    ///
    /// # Errors
    ///
    /// When the connection has ended.
    pub(super) fn send_zeros(&mut self, touched: &PageSet, progress: &Progress) -> Result<(), SendError> {
        let Lane { wire, pages, .. } = &mut self.first;
        let before = wire.sent_bytes();
        let count = pages.send_zeros(wire, touched)?;
        progress.add(count, wire.sent_bytes() - before);
        Ok(())
    }

    /// Sends a round, and says how many pages it had. Then the target has all but what went by the first stream, which is on its
    /// way. A round of few pages goes by few streams.
    ///
    /// # Errors
    ///
    /// When a connection has ended: then all are cut.
    pub(super) fn send(&mut self, share: &Share<'_>) -> Result<u64, SendError> {
        let Self { first, others } = self;
        thread::scope(|scope| {
            let wanted = share.pieces_max.saturating_sub(1);
            let threads: Vec<_> = others
                .iter_mut()
                .take(wanted)
                .map(|lane| {
                    let thread = thread::Builder::new().name("mover".to_owned());
                    thread.spawn_scoped(scope, move || {
                        let sent = share.ended(lane.send(share).and_then(|sent| lane.mark(sent)));
                        lane.cpu_time += cpu_time();
                        sent
                    })
                })
                .collect();
            let mut sent = share.ended(first.send(share));
            for thread in threads {
                let other = match thread {
                    Ok(thread) => thread.join().expect("a thread that panics ends the process"),
                    // The others do its part.
                    Err(error) => {
                        log::debug!("a stream has no thread in this round: {error}");
                        Ok(0)
                    }
                };
                sent = both(sent, other);
            }
            sent
        })
    }
}

impl Lane {
    fn new(wire: Wire<Stream>, compression: Compression) -> Self {
        Self {
            wire,
            pages: Sender::new(compression),
            cpu_time: Duration::ZERO,
        }
    }

    fn send(&mut self, share: &Share<'_>) -> Result<u64, SendError> {
        let keep = |sent| share.pace.keep(sent);
        let sent = self
            .pages
            .send(&mut self.wire, share.ordered, &share.pieces, keep)?;
        self.wire.flush()?;
        Ok(sent)
    }

    /// Waits until the target has taken in what was `sent`.
    fn mark(&mut self, sent: u64) -> Result<u64, SendError> {
        self.wire.send(Kind::Mark, &[])?;
        expect(&mut self.wire, Kind::Reached)?;
        Ok(sent)
    }
}

impl Share<'_> {
    /// Whoever still sends when a stream has failed is not to go on.
    fn ended(&self, sent: Result<u64, SendError>) -> Result<u64, SendError> {
        if sent.is_err() {
            self.pace.progress.cut();
        }
        sent
    }
}

/// What two streams have come to. A reason says more than that a connection has ended, as all do when one is lost.
fn both(one: Result<u64, SendError>, other: Result<u64, SendError>) -> Result<u64, SendError> {
    match (one, other) {
        (Ok(one), Ok(other)) => Ok(one + other),
        (Err(SendError::Wire(_)), Err(other)) => Err(other),
        (Err(error), _) | (_, Err(error)) => Err(error),
    }
}

/// How fast all streams of a round are together.
pub(super) struct Pace<'a> {
    begun: Instant,
    bytes_per_s: Option<NonZeroU64>,
    sent_bytes: AtomicU64,
    progress: &'a Progress,
}

/// How long a sender that is too fast does not look whether it is still wanted.
const PACE_PIECE: Duration = Duration::from_millis(10);

impl<'a> Pace<'a> {
    /// That of a round that begins now.
    pub(super) fn new(bytes_per_s: Option<NonZeroU64>, progress: &'a Progress) -> Self {
        Self {
            begun: Instant::now(),
            bytes_per_s,
            sent_bytes: AtomicU64::default(),
            progress,
        }
    }

    /// Waits for as long as all that was sent is too much.
    pub(super) fn keep(&self, sent: Sent) -> Result<(), WireError> {
        self.progress.add(sent.pages, sent.bytes);
        let sent_bytes = self.sent_bytes.fetch_add(sent.bytes, Ordering::Relaxed) + sent.bytes;
        let due = self.begun + time_of(sent_bytes, self.bytes_per_s);
        loop {
            if self.progress.is_cancelled() {
                return Err(WireError::Io(io::ErrorKind::ConnectionAborted.into()));
            }
            let left = due.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            // A limit may be so low that nothing is sent for days.
            if self.progress.is_left() {
                return Err(WireError::Io(io::ErrorKind::ConnectionReset.into()));
            }
            thread::sleep(left.min(PACE_PIECE));
        }
    }
}

/// How long it takes to send so much, if that is limited.
fn time_of(bytes: u64, limit: Option<NonZeroU64>) -> Duration {
    let us = limit.map_or(0, |limit| u128::from(bytes) * 1_000_000 / u128::from(limit.get()));
    Duration::from_micros(u64::try_from(us).unwrap_or(u64::MAX))
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "a test's panic is its failure")]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::*;

    #[test]
    fn a_source_that_may_send_hardly_anything_notices_that_its_target_is_gone() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let socket = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (target, _) = listener.accept().unwrap();
        let progress = Progress::default();
        progress.goes_by(&socket).unwrap();
        let pace = Pace::new(NonZeroU64::new(1), &progress);
        let begun = Instant::now();
        thread::scope(|scope| {
            let kept = scope.spawn(|| {
                pace.keep(Sent {
                    pages: 64,
                    bytes: 1 << 18,
                })
            });
            thread::sleep(Duration::from_millis(50));
            assert!(!kept.is_finished());
            drop(target);
            assert!(kept.join().unwrap().is_err());
        });
        assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    }
}
