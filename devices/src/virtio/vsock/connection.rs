//! One connection: who may send how much to whom, and who has ended what.

use std::collections::VecDeque;
use std::os::fd::AsFd as _;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use coracle_storage::request::{Segment, cut_first_bytes};
use rustix::event::{PollFd, PollFlags};

use super::connections::VsockCounts;
use super::packet::{
    ENDS_ALL, ENDS_RECEIVING, ENDS_SENDING, HEADER_BYTES, HOST_CID, Header, TYPE_STREAM, op,
};
use super::socket::{Stream, is_later};
use crate::virtio::segments;

/// What is kept of what the guest sends and the host does not take, in bytes: the guest is promised as much (5.10.6.3).
pub(super) const BUFFER_BYTES: u32 = 64 << 10;
/// How long a guest has to answer a caller.
const ANSWER_MS_MAX: u64 = 10_000;
/// How long a host has to take what was sent before the guest closed its end.
const LINGER_MS_MAX: u64 = 10_000;
/// How long a guest has to close its end when that of the host is closed.
const CLOSE_MS_MAX: u64 = 10_000;

/// Names a connection: the ports of the host and the guest.
pub(super) type Key = (u32, u32);

/// What becomes of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fate {
    /// It goes on.
    Lives,
    /// It is over, and the guest knows.
    Ends,
    /// It is over, and the guest has to be told (RST).
    Resets,
}

/// What came of an attempt to send something to the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Said {
    /// A packet of so many bytes of data.
    Packet(usize),
    /// There was nothing to say.
    Nothing,
    /// There is data, for which the buffer is too small.
    TooSmall,
    /// The connection is broken.
    Broken,
}

/// ```text
///   a caller ──► Asking ── RESPONSE ──► Open ── SHUTDOWN of both halves, or RST ──► Leaving ──► over
///   REQUEST ────────────────────────────►┘                                           until the host has all
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    /// The guest has been asked, or will be.
    Asking { is_asked: bool },
    /// Both ends are there.
    Open,
    /// The guest has closed its end.
    Leaving,
}

/// What is to be said next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Word {
    Request,
    Response,
    Shutdown,
    Data,
    CreditRequest,
    CreditUpdate,
}

#[derive(Debug)]
pub(super) struct Connection {
    stream: Stream,
    phase: Phase,
    /// Then it is over, whatever it waits for.
    until: Option<Instant>,

    /// What the guest has sent and the host has not taken.
    buffer: VecDeque<u8>,
    /// How much the guest has sent, how much of it was passed on, and how much of that the guest knows; in bytes, modulo 2^32.
    received: u32,
    forwarded: u32,
    told_forwarded: u32,

    /// How much was sent to the guest; and what it has said of its buffer, and of what it has passed on.
    sent: u32,
    guest_buf_alloc: u32,
    guest_fwd_cnt: u32,

    /// Halves that are ended (ENDS_SENDING, ENDS_RECEIVING): by the guest, by the host, and what of the host's the guest knows.
    guest_ended: u32,
    host_ended: u32,
    told_ended: u32,

    /// The host's end has something to read, if only that it is closed.
    is_readable: bool,
    /// The host's end is gone in both directions; it need not be waited for.
    is_hung_up: bool,
    owes_response: bool,
    owes_credit: bool,
    /// The guest was asked for credit, and has not answered.
    has_asked_credit: bool,
    /// The guest has forgotten it already.
    is_forgotten: bool,
    /// It waits for its turn to say something.
    pub(super) is_queued: bool,
}

impl Connection {
    fn new(stream: Stream, phase: Phase) -> Self {
        Self {
            stream,
            phase,
            until: None,
            buffer: VecDeque::new(),
            received: 0,
            forwarded: 0,
            told_forwarded: 0,
            sent: 0,
            guest_buf_alloc: 0,
            guest_fwd_cnt: 0,
            guest_ended: 0,
            host_ended: 0,
            told_ended: 0,
            is_readable: false,
            is_hung_up: false,
            owes_response: false,
            owes_credit: false,
            has_asked_credit: false,
            is_forgotten: false,
            is_queued: false,
        }
    }

    /// One that a program of the host asks for; the guest has to answer.
    pub(super) fn asked_by_host(stream: Stream, now: Instant) -> Self {
        Self {
            until: Some(now + Duration::from_millis(ANSWER_MS_MAX)),
            ..Self::new(stream, Phase::Asking { is_asked: false })
        }
    }

    /// One that the guest asks for by `request`, whose program of the host has been reached.
    pub(super) fn asked_by_guest(stream: Stream, request: &Header) -> Self {
        Self {
            owes_response: true,
            guest_buf_alloc: request.buf_alloc,
            guest_fwd_cnt: request.fwd_cnt,
            ..Self::new(stream, Phase::Open)
        }
    }

    /// When it has to be looked at again, at the latest.
    pub(super) fn until(&self) -> Option<Instant> {
        self.until
    }

    /// It does not wait for so much of the time that was.
    pub(super) fn postpone(&mut self, by: Duration) {
        self.until = self.until.map(|until| until + by);
    }

    /// What of the host's end is waited for, or `None` if nothing more can come of it.
    pub(super) fn interest(&self) -> Option<PollFd<'_>> {
        if self.is_hung_up {
            return None;
        }
        let mut flags = PollFlags::empty();
        if self.phase == Phase::Open && !self.is_readable && self.may_send() && self.credit() > 0 {
            flags |= PollFlags::IN;
        }
        if !self.buffer.is_empty() {
            flags |= PollFlags::OUT;
        }
        // Also without any of these the kernel says when the other end is gone.
        Some(PollFd::from_borrowed_fd(self.stream.as_fd(), flags))
    }

    /// The host's end is so.
    pub(super) fn found(&mut self, flags: PollFlags, counts: &VsockCounts) -> Fate {
        if flags.contains(PollFlags::IN) {
            self.is_readable = true;
        }
        if flags.contains(PollFlags::OUT) && self.flush(counts) {
            return self.over();
        }
        if flags.intersects(PollFlags::HUP | PollFlags::ERR) {
            return self.hang_up();
        }
        Fate::Lives
    }

    /// Nobody is at the host's end any more; what it has sent can still be read.
    fn hang_up(&mut self) -> Fate {
        if let Phase::Asking { is_asked } = self.phase {
            return if is_asked { Fate::Resets } else { Fate::Ends };
        }
        self.is_hung_up = true;
        self.is_readable = true;
        self.discard();
        if self.phase == Phase::Leaving {
            return self.over();
        }
        Fate::Lives
    }

    /// The host takes no more.
    fn discard(&mut self) {
        self.host_ended |= ENDS_RECEIVING;
        self.buffer = VecDeque::new();
        self.forwarded = self.received;
    }

    /// What becomes of it when `now` is later than it waits.
    pub(super) fn expire(&mut self) -> Fate {
        match self.phase {
            Phase::Asking { is_asked: false } => Fate::Ends,
            Phase::Asking { is_asked: true } | Phase::Open => Fate::Resets,
            Phase::Leaving => self.over(),
        }
    }

    /// The guest has closed its end, and nothing of what it has sent is left.
    fn over(&self) -> Fate {
        if self.is_forgotten {
            Fate::Ends
        } else {
            Fate::Resets
        }
    }

    /// Takes a packet of the guest's, whose data is in `data`.
    pub(super) fn take(
        &mut self,
        header: &Header,
        data: &mut Vec<Segment>,
        counts: &VsockCounts,
        key: Key,
    ) -> Fate {
        self.guest_buf_alloc = header.buf_alloc;
        self.guest_fwd_cnt = header.fwd_cnt;
        self.has_asked_credit = false;
        match (self.phase, header.op) {
            (Phase::Leaving, op::RST) => {
                self.is_forgotten = true;
                Fate::Lives
            }
            (Phase::Leaving, op::SHUTDOWN) => Fate::Lives,
            (_, op::RST) => Fate::Ends,
            (Phase::Asking { is_asked: true }, op::RESPONSE) => self.answered(key),
            (Phase::Asking { .. }, _) => Fate::Resets,
            (_, op::CREDIT_UPDATE) => Fate::Lives,
            (_, op::CREDIT_REQUEST) => {
                self.owes_credit = true;
                Fate::Lives
            }
            (Phase::Open, op::RW) => self.pass_on(header.len_bytes, data, counts),
            (Phase::Open, op::SHUTDOWN) => self.end(header.flags & ENDS_ALL),
            _ => Fate::Resets,
        }
    }

    fn answered(&mut self, (host_port, _): Key) -> Fate {
        self.phase = Phase::Open;
        self.until = None;
        let line = format!("OK {host_port}\n");
        // The first bytes that are sent by it: so there is room for all of them, or nobody there.
        match self.stream.send_bytes([line.as_bytes(), &[]]) {
            Ok(sent) if sent == line.len() => Fate::Lives,
            _ => Fate::Resets,
        }
    }

    /// Gives the host what the guest has sent, and keeps what it does not take.
    fn pass_on(&mut self, len_bytes: u32, data: &mut Vec<Segment>, counts: &VsockCounts) -> Fate {
        let room_bytes = BUFFER_BYTES - self.received.wrapping_sub(self.forwarded);
        if self.guest_ended & ENDS_SENDING != 0 || len_bytes > room_bytes {
            return Fate::Resets;
        }
        self.received = self.received.wrapping_add(len_bytes);
        counts.tx_bytes.fetch_add(len_bytes.into(), Relaxed);
        if self.host_ended & ENDS_RECEIVING != 0 {
            self.forwarded = self.received;
            return Fate::Lives;
        }
        if self.buffer.is_empty() && len_bytes > 0 {
            match self.stream.send(data) {
                Ok(sent) => {
                    self.count_forwarded(sent);
                    cut_first_bytes(data, sent);
                }
                Err(error) if is_later(&error) => {}
                Err(_) => {
                    counts.tx_write_fails.fetch_add(1, Relaxed);
                    self.discard();
                    return Fate::Lives;
                }
            }
        }
        let mut rest = vec![0; usize::try_from(segments::len_bytes(data)).unwrap_or_default()];
        segments::gather(data, 0, &mut rest);
        self.buffer.reserve_exact(rest.len());
        self.buffer.extend(rest);
        Fate::Lives
    }

    fn count_forwarded(&mut self, bytes: usize) {
        self.forwarded = self
            .forwarded
            .wrapping_add(u32::try_from(bytes).expect("no more than was received"));
        // As much of the buffer as the guest knows to be free. It may have sent more than it knew of.
        let known_bytes = BUFFER_BYTES.saturating_sub(self.received.wrapping_sub(self.told_forwarded));
        self.owes_credit |= known_bytes < BUFFER_BYTES / 2;
    }

    /// Gives the host what was kept for it; true if the guest has closed its end and this was the last of it.
    fn flush(&mut self, counts: &VsockCounts) -> bool {
        while !self.buffer.is_empty() {
            let (first, second) = self.buffer.as_slices();
            match self.stream.send_bytes([first, second]) {
                Ok(sent) => {
                    self.buffer.drain(..sent);
                    self.count_forwarded(sent);
                }
                Err(error) if is_later(&error) => return false,
                Err(_) => {
                    counts.tx_flush_fails.fetch_add(1, Relaxed);
                    self.discard();
                }
            }
        }
        if self.guest_ended & ENDS_SENDING != 0 {
            self.stream.end_sending();
        }
        self.phase == Phase::Leaving
    }

    /// The guest ends these halves.
    fn end(&mut self, halves: u32) -> Fate {
        self.guest_ended |= halves;
        if halves & ENDS_RECEIVING != 0 {
            self.stream.end_receiving();
        }
        if halves & ENDS_SENDING != 0 && self.buffer.is_empty() {
            self.stream.end_sending();
        }
        if self.guest_ended != ENDS_ALL {
            return Fate::Lives;
        }
        self.phase = Phase::Leaving;
        self.until = Some(Instant::now() + Duration::from_millis(LINGER_MS_MAX));
        if self.buffer.is_empty() {
            self.over()
        } else {
            Fate::Lives
        }
    }

    /// Whether the host may send, and the guest receives.
    fn may_send(&self) -> bool {
        self.host_ended & ENDS_SENDING == 0 && self.guest_ended & ENDS_RECEIVING == 0
    }

    /// How much the guest has room for, in bytes (5.10.6.3).
    fn credit(&self) -> u32 {
        let on_its_way = self.sent.wrapping_sub(self.guest_fwd_cnt);
        self.guest_buf_alloc.saturating_sub(on_its_way)
    }

    /// Whether there is something to say to the guest.
    pub(super) fn has_news(&self) -> bool {
        self.word().is_some()
    }

    fn word(&self) -> Option<Word> {
        match self.phase {
            Phase::Asking { is_asked } => return (!is_asked).then_some(Word::Request),
            // It asks for nothing, and hears of the end.
            Phase::Leaving => return None,
            Phase::Open => {}
        }
        let has_data = self.is_readable && self.may_send();
        match () {
            () if self.owes_response => Some(Word::Response),
            () if self.news_of_the_end() != 0 => Some(Word::Shutdown),
            () if has_data && self.credit() > 0 => Some(Word::Data),
            () if has_data && !self.has_asked_credit => Some(Word::CreditRequest),
            () if self.owes_credit => Some(Word::CreditUpdate),
            () => None,
        }
    }

    /// Halves that the host has ended, and the guest does not know it and has use for it.
    fn news_of_the_end(&self) -> u32 {
        let of_use = match self.guest_ended {
            0 => ENDS_ALL,
            ENDS_SENDING => ENDS_SENDING,
            _ => ENDS_RECEIVING,
        };
        self.host_ended & !self.told_ended & of_use
    }

    /// Writes the next packet into `room`, if there is one to be written. What `scratch` holds is of no meaning.
    pub(super) fn say(
        &mut self,
        (host_port, guest_port): Key,
        guest_cid: u64,
        room: &[Segment],
        scratch: &mut Vec<Segment>,
    ) -> Said {
        let Some(mut word) = self.word() else {
            return Said::Nothing;
        };
        let mut data_bytes = 0;
        if word == Word::Data {
            scratch.clear();
            scratch.extend_from_slice(room);
            match self.receive(scratch) {
                Ok(Some(0)) => {
                    self.host_ended |= ENDS_SENDING;
                    match self.word() {
                        Some(next) => word = next,
                        None => return Said::Nothing,
                    }
                }
                Ok(Some(bytes)) => data_bytes = bytes,
                Ok(None) => return Said::TooSmall,
                Err(error) if is_later(&error) => {
                    self.is_readable = false;
                    return Said::Nothing;
                }
                Err(_) => return Said::Broken,
            }
        }
        let header = Header {
            src_cid: HOST_CID,
            dst_cid: guest_cid,
            src_port: host_port,
            dst_port: guest_port,
            len_bytes: u32::try_from(data_bytes).expect("no more than the guest has room for"),
            kind: TYPE_STREAM,
            op: self.spoken(word),
            flags: if word == Word::Shutdown {
                self.told_ended
            } else {
                0
            },
            buf_alloc: BUFFER_BYTES,
            fwd_cnt: self.forwarded,
        };
        segments::scatter(room, 0, &header.bytes());
        self.told_forwarded = self.forwarded;
        self.owes_credit = false;
        Said::Packet(data_bytes)
    }

    /// Reads from the host's end behind the place of a header, as much as the guest has room for; `None` if there is no place
    /// for a byte.
    fn receive(&mut self, room: &mut Vec<Segment>) -> std::io::Result<Option<usize>> {
        cut_first_bytes(room, HEADER_BYTES);
        segments::keep_first_bytes(room, usize::try_from(self.credit()).unwrap_or(usize::MAX));
        let room_bytes = segments::len_bytes(room);
        if room_bytes == 0 {
            return Ok(None);
        }
        let bytes = self.stream.receive(room)?;
        self.sent = self
            .sent
            .wrapping_add(u32::try_from(bytes).expect("no more than the credit"));
        // The end has to be read as well.
        if bytes > 0 && (bytes as u64) < room_bytes && !self.is_hung_up {
            self.is_readable = false;
        }
        Ok(Some(bytes))
    }

    /// The number of `word`, which is said now.
    fn spoken(&mut self, word: Word) -> u16 {
        match word {
            Word::Request => {
                self.phase = Phase::Asking { is_asked: true };
                op::REQUEST
            }
            Word::Response => {
                self.owes_response = false;
                op::RESPONSE
            }
            Word::Shutdown => {
                self.told_ended |= self.news_of_the_end();
                if self.told_ended == ENDS_ALL {
                    self.until = Some(Instant::now() + Duration::from_millis(CLOSE_MS_MAX));
                }
                op::SHUTDOWN
            }
            Word::Data => op::RW,
            Word::CreditRequest => {
                self.has_asked_credit = true;
                op::CREDIT_REQUEST
            }
            Word::CreditUpdate => op::CREDIT_UPDATE,
        }
    }
}
