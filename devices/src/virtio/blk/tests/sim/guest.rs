//! A simulated guest: it offers requests, kicks when it must, and judges every answer.

use std::sync::Arc;
use std::sync::atomic::AtomicU32;
use std::time::{Duration, Instant};

use coracle_storage::limit::{RateLimiterConfig, TokenBucketConfig};
use coracle_storage::reactor::Submit;
use coracle_storage::request::Durability;
use coracle_storage::sim::dice::Dice;
use coracle_storage::sim::oracle::{Effect, Oracle, SECTOR_BYTES};
use coracle_storage::sim::reactor::{Faults, SimReactor};
use vmm_sys_util::eventfd::EventFd;

use super::super::super::config::CacheType;
use super::super::super::mailbox::{Command, Mailbox, StopAnswer, StopCall};
use super::super::super::space::{FEATURE_DISCARD, FEATURE_FLUSH, FEATURE_WRITE_ZEROES};
use super::super::{IO_ERROR, OK, UNANSWERED, UNSUPPORTED, header, range};
use super::ring::{Asked, Offer, Ring};
use super::wish::{SECTORS_MAX, Wish};
use crate::virtio::device::{Interrupt, Notice, Session};
use crate::virtio::ring::{FEATURE_EVENT_IDX, FEATURE_INDIRECT_DESC};
use crate::virtio::testing::{Piece, memory};

/// How a disk was configured, and the host that it is on.
pub(super) struct Terms {
    pub(super) cache_type: CacheType,
    pub(super) limits: RateLimiterConfig,
    pub(super) faults: Faults,
    /// When the buckets of the limits were full.
    pub(super) born: Instant,
}

/// A driver with some queues, and all that it knows.
pub(super) struct Guest {
    rings: Vec<Ring>,
    oracle: Oracle,
    io: SimReactor,
    mailbox: Mailbox,
    terms: Terms,
    dice: Dice,
    line: Arc<EventFd>,
    /// Looks at its used rings only when it was interrupted.
    waits_for_interrupts: bool,
    free_slots: Vec<u64>,
    stop: Option<StopAnswer>,
    /// Given back by the worker, and not yet lent again.
    session: Option<Box<Session>>,
    answered_ops: u64,
    answered_bytes: u64,
}

/// Where things are in the guest's memory.
const RINGS: u64 = 0x1000;
const RING_BYTES: u64 = 0x1000;
const SLOTS: u64 = 0x10000;
/// A slot: header, status, a table of descriptors, data.
const SLOT_BYTES: u64 = 0x3000;
const SLOT_COUNT: u64 = 64;
const STATUS: u64 = 16;
const TABLE: u64 = 0x100;
const DATA: u64 = 0x1000;
const DATA_BYTES_MAX: u64 = SECTORS_MAX * SECTOR_BYTES;

/// Fills memory that no request owns.
const POISON: u8 = 0xd9;
/// Fills memory that is to be read into.
const UNREAD: u8 = 0x5e;

impl Guest {
    pub(super) fn new(
        content: &[u8],
        io: SimReactor,
        mailbox: Mailbox,
        terms: Terms,
        mut dice: Dice,
    ) -> Self {
        let flush = match terms.cache_type {
            CacheType::Writethrough => 0,
            _ => FEATURE_FLUSH,
        };
        let events = dice.pick(&[0, FEATURE_EVENT_IDX]);
        let features = FEATURE_INDIRECT_DESC | FEATURE_DISCARD | FEATURE_WRITE_ZEROES | events | flush;
        let memory = memory(usize::try_from(SLOTS + SLOT_COUNT * SLOT_BYTES).unwrap());
        let rings: Vec<Ring> = (0..1 + dice.below(3))
            .map(|index| {
                Ring::new(
                    &memory,
                    RINGS + index * RING_BYTES,
                    dice.pick(&[4, 16, 64]),
                    features,
                )
            })
            .collect();
        let queues = rings.iter().map(|ring| ring.device_end(features));
        let line = Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap());
        let session = Session {
            memory: Arc::clone(&memory),
            features,
            interrupt: Interrupt::new(Arc::new(AtomicU32::new(0)), Arc::clone(&line)),
            queues: queues.map(Some).collect(),
        };
        let mut guest = Self {
            rings,
            oracle: Oracle::new(content),
            io,
            mailbox,
            terms,
            line,
            waits_for_interrupts: dice.one_in(2),
            free_slots: (0..SLOT_COUNT).map(|slot| SLOTS + slot * SLOT_BYTES).collect(),
            stop: None,
            session: Some(Box::new(session)),
            answered_ops: 0,
            answered_bytes: 0,
            dice,
        };
        for slot in guest.free_slots.clone() {
            guest.poison(slot);
        }
        guest.serve_again();
        guest
    }

    /// Does this and that while the worker runs.
    pub(super) fn act(&mut self) {
        for _ in 0..self.dice.below(4) {
            let ring = self.dice.index(self.rings.len());
            match self.dice.below(12) {
                0..=4 => self.offer(ring),
                5..=7 => drop(self.rings[ring].kick_if_wanted()),
                8..=10 => self.look(),
                _ if self.dice.one_in(8) && self.stop.is_none() && self.session.is_none() => {
                    self.ask_to_stop()
                }
                _ => {}
            }
        }
    }

    /// The worker sleeps, and only the guest could wake it: nobody may be waiting for an answer.
    pub(super) fn worker_sleeps(&mut self) {
        if self.stop.is_some() {
            return self.take_back();
        }
        if self.session.is_some() {
            return self.serve_again();
        }
        let kicks: Vec<bool> = self.rings.iter_mut().map(Ring::kick_if_wanted).collect();
        if kicks.contains(&true) {
            return;
        }
        self.look();
        let (asked, unseen) = (self.asked(), self.rings.iter().any(Ring::has_answers));
        assert!(!unseen, "the driver has answers that no interrupt told it of");
        assert_eq!(
            asked, 0,
            "requests are lost: the worker sleeps and owes answers to them"
        );
        let ring = self.dice.index(self.rings.len());
        self.offer(ring);
        self.rings[ring].kick_if_wanted();
    }

    /// Holds the limits to what they let pass since the buckets were full.
    pub(super) fn check_limits(&self) {
        let elapsed = self.io.now() - self.terms.born;
        let check = |bucket: Option<TokenBucketConfig>, count: u64, largest: u64, what: &str| {
            let Some(TokenBucketConfig {
                size, refill_time, ..
            }) = bucket
            else {
                return;
            };
            let refilled = u128::from(size) * elapsed.as_micros() / (u128::from(refill_time) * 1_000);
            let most = u128::from(size + largest) + refilled;
            assert!(
                u128::from(count) <= most,
                "{count} {what} were answered in {elapsed:?}, and the limit lets no more than {most} pass"
            );
        };
        check(self.terms.limits.ops, self.answered_ops, 1, "operations");
        let bytes = self.answered_bytes;
        check(self.terms.limits.bandwidth, bytes, DATA_BYTES_MAX, "bytes");
    }

    /// The host crashed, and this is what is left of the disk.
    pub(super) fn power_fails(&mut self, left: &[u8]) {
        let verdict = self.oracle.has_crashed(left);
        verdict.unwrap_or_else(|violation| panic!("{violation}"));
    }

    fn asked(&self) -> usize {
        self.rings.iter().map(|ring| ring.asked.len()).sum()
    }

    fn durability(&self) -> Durability {
        match self.terms.cache_type {
            CacheType::Writethrough => Durability::Durable,
            _ => Durability::Cached,
        }
    }

    fn offer(&mut self, ring: usize) {
        if self.rings[ring].room() == 0 {
            return;
        }
        let Some(slot) = self.free_slots.pop() else {
            return;
        };
        self.check_poison(slot);
        let wish = Wish::draw(self.oracle.size_bytes(), &mut self.dice);
        let ticket = self.oracle.begin(wish.effect, wish.offset_bytes, wish.len_bytes);
        let sector = wish.offset_bytes / SECTOR_BYTES;
        let len_bytes = usize::try_from(wish.len_bytes).unwrap();
        let data = match wish.effect {
            Effect::Read => vec![UNREAD; len_bytes],
            Effect::Write => Oracle::bytes_of(ticket, wish.offset_bytes, len_bytes),
            Effect::Zero | Effect::Discard => range(
                sector,
                u32::try_from(wish.len_bytes / SECTOR_BYTES).unwrap(),
                wish.flags,
            ),
            Effect::Flush | Effect::Grow => Vec::new(),
        };
        let driver = &self.rings[ring].driver;
        driver.write(slot, &header(wish.kind, sector));
        driver.write(slot + STATUS, &[UNANSWERED]);
        driver.write(slot + DATA, &data);
        let pieces = self.pieces(&wish, slot);
        let offer = Offer {
            wish,
            ticket,
            slot,
            pieces: &pieces,
            table: slot + TABLE,
        };
        let now = self.io.moment();
        self.rings[ring].offer(&offer, now, &mut self.dice);
    }

    /// The chain of a request, its data cut anywhere.
    fn pieces(&mut self, wish: &Wish, slot: u64) -> Vec<Piece> {
        let data_bytes = wish.data_bytes();
        let mut cuts: Vec<u64> = (0..self.dice.below(4))
            .map(|_| self.dice.below(data_bytes + 1))
            .chain([0, data_bytes])
            .collect();
        cuts.sort_unstable();
        cuts.dedup();
        let piece = |bytes: &[u64]| {
            let (at, len_bytes) = (
                slot + DATA + bytes[0],
                u32::try_from(bytes[1] - bytes[0]).unwrap(),
            );
            match wish.effect {
                Effect::Read => Piece::Writable(at, len_bytes),
                _ => Piece::Readable(at, len_bytes),
            }
        };
        let data = cuts.windows(2).map(piece);
        [Piece::Readable(slot, 16)]
            .into_iter()
            .chain(data)
            .chain([Piece::Writable(slot + STATUS, 1)])
            .collect()
    }

    /// Takes the answers that the guest knows of.
    fn look(&mut self) {
        if self.waits_for_interrupts && self.line.read().is_err() {
            return;
        }
        for ring in 0..self.rings.len() {
            loop {
                while let Some((asked, written)) = self.rings[ring].take_answer() {
                    self.judge(ring, &asked, written);
                }
                // An answer that came before the wish for an interrupt may come without one.
                self.rings[ring].want_interrupt();
                if !self.rings[ring].has_answers() {
                    break;
                }
            }
        }
    }

    fn judge(&mut self, ring: usize, asked: &Asked, written: u32) {
        let Asked {
            wish, ticket, slot, ..
        } = asked;
        let driver = &self.rings[ring].driver;
        let status = driver.read(slot + STATUS, 1)[0];
        let data = driver.read(slot + DATA, usize::try_from(wish.data_bytes()).unwrap());
        match (wish.effect, status) {
            (Effect::Read, OK) => {
                let verdict = self.oracle.has_read(*ticket, &data);
                verdict.unwrap_or_else(|violation| panic!("{wish:?}: {violation}"));
                assert_eq!(u64::from(written), wish.len_bytes + 1, "{wish:?}");
            }
            (_, OK) => {
                let is_flush = wish.effect == Effect::Flush;
                assert!(
                    !is_flush || self.io.has_synced_since(asked.offered),
                    "a flush was answered, and no sync that was submitted after it has ended"
                );
                self.oracle.has_succeeded(*ticket, self.durability());
            }
            (_, IO_ERROR) => {
                let excuses = [libc::EIO, libc::ENOSPC].map(|errno| self.io.has_failed_with(errno));
                assert!(excuses.contains(&true), "{wish:?} failed without a reason");
                self.oracle.has_failed(*ticket);
            }
            (Effect::Discard, UNSUPPORTED) if self.terms.faults.refuses_holes => {
                self.oracle.has_failed(*ticket);
            }
            _ => panic!("{wish:?} was answered with the status {status:#x}"),
        }
        self.answered_ops += 1;
        if matches!(wish.effect, Effect::Read | Effect::Write) {
            self.answered_bytes += wish.len_bytes;
        }
        self.poison(*slot);
        self.free_slots.insert(0, *slot);
    }

    fn poison(&self, slot: u64) {
        let memory = &self.rings[0].driver;
        memory.write(
            slot,
            &vec![POISON; usize::try_from(DATA + DATA_BYTES_MAX).unwrap()],
        );
    }

    fn check_poison(&self, slot: u64) {
        let bytes = self.rings[0]
            .driver
            .read(slot, usize::try_from(DATA + DATA_BYTES_MAX).unwrap());
        assert!(
            bytes.iter().all(|byte| *byte == POISON),
            "the memory of a request was written after its answer"
        );
    }

    fn ask_to_stop(&mut self) {
        let (call, answer) = StopCall::new(&Notice::default());
        self.post(Command::Stop(call));
        self.stop = Some(answer);
    }

    /// The worker was asked to stop, and sleeps: it has given the session back.
    fn take_back(&mut self) {
        let answer = self.stop.take().and_then(|stop| stop.wait(Duration::ZERO));
        let Some(Ok(Ok(Some(session)))) = answer else {
            panic!("a worker that was asked to stop sleeps, and has not given its session back");
        };
        assert_eq!(
            self.io.in_flight(),
            0,
            "something is in flight in a session that was given back"
        );
        self.session = Some(session);
    }

    /// Lends the session out again. Kicks from before may have been lost: the worker looks by itself.
    fn serve_again(&mut self) {
        if let Some(session) = self.session.take() {
            self.rings.iter().for_each(Ring::forget_kick);
            self.post(Command::Serve(session));
        }
    }

    fn post(&self, command: Command) {
        let posted = self.mailbox.post(command);
        assert!(posted.is_ok(), "the worker is there");
    }
}
