#![expect(unsafe_code, reason = "segments are taken from where they were submitted")]
#![expect(clippy::unwrap_used, clippy::panic, reason = "a test's panic is its failure")]

use std::net::{Ipv4Addr, SocketAddr};
use std::ops::Range;

use super::*;
use crate::iscsi::digest::DigestKind;
use crate::iscsi::pdu::{DataIn, DataInStatus, InitiatorPdu, Isid, ScsiResponse};
use crate::iscsi::scsi::cdb::Blocks;
use crate::reactor::{Event, Full, KernelOp, LowWater, SocketOp, SocketOption, Submit, Token};
use crate::remote::connection::Happening;
use crate::request::{Durability, cut_first_bytes};
use crate::sim::dice::Dice;

/// A host that does what it is told at once, with the incoming half of a socket as Linux has it.
struct Host {
    arrived: VecDeque<u8>,
    mark: LowWater,
    /// Where a receive that waits goes.
    waiting: Option<Vec<Segment>>,
    ended: VecDeque<Event>,
    /// What was sent.
    sent: Vec<u8>,
    /// How many receives were woken, and how often the mark was changed.
    wakes: u32,
    marks: u32,
}

const RECEIVE: Token = Token(1);

impl Host {
    fn receive(&mut self, mut segments: Vec<Segment>) {
        let len = usize::try_from(segments::total(&segments)).unwrap();
        let bytes: Vec<u8> = self.arrived.drain(..len.min(self.arrived.len())).collect();
        segments::fill(&segments, &bytes);
        cut_first_bytes(&mut segments, bytes.len());
        let result = i32::try_from(bytes.len()).unwrap();
        self.ended.push_back(Event {
            token: RECEIVE,
            result,
        });
    }

    fn wake_if_reached(&mut self) {
        if self.arrived.len() >= self.mark.bytes()
            && let Some(segments) = self.waiting.take()
        {
            self.wakes += 1;
            self.receive(segments);
        }
    }
}

impl Submit for Host {
    fn submit(&mut self, op: KernelOp, token: Token) -> Result<(), Full> {
        let KernelOp::Socket { operation, .. } = op else {
            panic!("a connection has no file");
        };
        match operation {
            SocketOp::SetOption(SocketOption::LowWater(mark)) => {
                self.mark = mark;
                self.marks += 1;
                self.ended.push_back(Event { token, result: 0 });
                self.wake_if_reached();
            }
            SocketOp::Receive {
                segments,
                segment_count,
            } => {
                assert_eq!(token, RECEIVE);
                let segments = listed(segments, segment_count);
                if self.arrived.is_empty() {
                    self.waiting = Some(segments);
                } else {
                    self.receive(segments);
                }
            }
            SocketOp::Send {
                segments,
                segment_count,
            } => {
                let before = self.sent.len();
                segments::gather(&listed(segments, segment_count), &mut self.sent);
                let result = i32::try_from(self.sent.len() - before).unwrap();
                self.ended.push_back(Event { token, result });
            }
            _ => panic!("{operation:?} was not to be asked"),
        }
        Ok(())
    }
}

fn listed(segments: *const Segment, segment_count: u32) -> Vec<Segment> {
    let segment_count = usize::try_from(segment_count).unwrap();
    // SAFETY: they stay in place until the operation ends (contract of `SocketOp`).
    unsafe { std::slice::from_raw_parts(segments, segment_count) }.to_vec()
}

/// A session, and what its target knows of it.
struct Talk {
    host: Host,
    connection: Link,
    session: Session,
    now: Instant,
    /// The memory of the commands, by their cookies.
    memory: Vec<Vec<u8>>,
    /// Their tags, too.
    tags: Vec<Tag>,
    ended: Vec<Ended>,
    stat_sn: Serial,
}

impl Talk {
    fn new() -> Self {
        let now = Instant::now();
        let terms = Negotiated {
            isid: Isid([0; 6]),
            tsih: 1,
            portal_group: None,
            header_digest: DigestKind::None,
            data_digest: DigestKind::None,
            initial_r2t: false,
            immediate_data: true,
            max_burst_length: 1 << 20,
            first_burst_length: 1 << 18,
            max_recv_data_segment_length: 1 << 20,
            target_max_recv_data_segment_length: 1 << 20,
            max_outstanding_r2t: 1,
            time2wait: 0,
            cmd_sn: Serial(1),
            exp_stat_sn: Serial(1),
            window: window(),
        };
        let mut talk = Self {
            host: Host {
                arrived: VecDeque::new(),
                mark: LowWater::ANY,
                waiting: None,
                ended: VecDeque::new(),
                sent: Vec::new(),
                wakes: 0,
                marks: 0,
            },
            connection: Link::new(SocketAddr::from((Ipv4Addr::LOCALHOST, 3260))),
            session: Session::new(terms, Lun::default(), Duration::from_secs(5), now),
            now,
            memory: Vec::new(),
            tags: Vec::new(),
            ended: Vec::new(),
            stat_sn: Serial(1),
        };
        talk.connection.adopt(&mut talk.host);
        talk.settle();
        talk
    }

    /// Sends a READ; its tag.
    fn read(&mut self, len: u32) -> Tag {
        let mut memory = vec![0; usize::try_from(len).unwrap()];
        let blocks = Blocks {
            lba: 0,
            count: len / 512,
        };
        let command = Command {
            cdb: cdb::read(blocks, Durability::Cached),
            transfer: Transfer::In,
            segments: vec![segments::own(memory.as_mut_slice())],
            cookie: self.memory.len() as u64,
        };
        self.memory.push(memory);
        let before = self.host.sent.len();
        self.session.start(command, &mut self.connection);
        self.settle();
        let sent = self.host.sent.get(before..).unwrap();
        match InitiatorPdu::parse(&Bhs(*sent.first_chunk().unwrap())).unwrap() {
            InitiatorPdu::ScsiCommand(command) => {
                self.tags.push(command.initiator_task_tag);
                command.initiator_task_tag
            }
            other => panic!("{other:?} is no command"),
        }
    }

    /// Lets happen what is not up to the target or the time.
    fn settle(&mut self) {
        self.connection.pump(&mut self.host);
        while let Some(event) = self.host.ended.pop_front() {
            let happening = self.connection.resume(event, &mut Vec::new(), &mut self.host);
            if let Some(Happening::Received) = happening {
                self.session.receive(&mut self.connection, self.now).unwrap();
            }
            self.connection.pump(&mut self.host);
        }
        while let Some(News::Ended(ended)) = self.session.next_news() {
            if ended.status == Status::GOOD {
                self.assert_read(usize::try_from(ended.command.cookie).unwrap());
            }
            self.ended.push(ended);
        }
    }

    fn assert_read(&self, number: usize) {
        let (memory, tag) = (self.memory.get(number).unwrap(), self.tags.get(number).unwrap());
        assert!((0..).zip(memory).all(|(at, byte)| *byte == pattern(*tag, at)));
    }

    fn arrive(&mut self, bytes: &[u8]) {
        self.host.arrived.extend(bytes);
        self.host.wake_if_reached();
        self.settle();
    }

    /// Data of a task, and the status with the last of them, in one piece as it is sent.
    fn data(&mut self, tag: Tag, range: Range<u32>, len: u32) -> Vec<u8> {
        let status = (range.end == len).then(|| DataInStatus {
            status: 0,
            stat_sn: self.next_stat_sn(),
            residual: Residual::None,
        });
        let data_in = DataIn {
            is_final: status.is_some(),
            acknowledge: false,
            status,
            lun: Lun::default(),
            initiator_task_tag: tag,
            target_transfer_tag: Tag::RESERVED,
            window: window(),
            data_sn: 0,
            buffer_offset: range.start,
        };
        let header = data_in.bhs().with_data_segment(range.end - range.start);
        let data = range.map(|at| pattern(tag, at));
        header.0.into_iter().chain(data).collect()
    }

    /// The answer to a task that came to nothing.
    fn refusal(&mut self, tag: Tag) -> Vec<u8> {
        let response = ScsiResponse {
            response: ServiceResponse::COMMAND_COMPLETED,
            status: Status::BUSY.0,
            residual: Residual::None,
            initiator_task_tag: tag,
            stat_sn: self.next_stat_sn(),
            window: window(),
            exp_data_sn: 0,
        };
        response.bhs().0.to_vec()
    }

    fn next_stat_sn(&mut self) -> Serial {
        let next = self.stat_sn.next();
        std::mem::replace(&mut self.stat_sn, next)
    }

    /// Lets the time of the alarm come.
    fn pass_to_alarm(&mut self) {
        self.now = self.session.alarm(&self.connection);
        self.session.beat(&mut self.connection, self.now).unwrap();
        self.settle();
    }

    /// Two long reads have come, one after the other, and a third and a fourth are under way.
    fn streaming(len: u32) -> (Self, [Tag; 2]) {
        let mut talk = Self::new();
        let mut tags: VecDeque<Tag> = (0..2).map(|_| talk.read(len)).collect();
        for _ in 0..4 {
            let tag = tags.pop_front().unwrap();
            let bytes = talk.data(tag, 0..len, len);
            talk.arrive(&bytes);
            tags.push_back(talk.read(len));
        }
        assert_eq!(talk.ended.len(), 4);
        (talk, [tags.pop_front().unwrap(), tags.pop_front().unwrap()])
    }
}

fn window() -> Window {
    Window {
        exp_cmd_sn: Serial(1),
        max_cmd_sn: Serial(1 << 20),
    }
}

fn pattern(tag: Tag, at: u32) -> u8 {
    let [.., byte] = (tag.0 ^ at.wrapping_mul(2_654_435_761) >> 7).to_be_bytes();
    byte
}

const LEN: u32 = 128 << 10;

#[test]
fn long_reads_that_follow_each_other_wake_once_each_and_leave_the_mark_alone() {
    let (mut talk, tags) = Talk::streaming(LEN);
    assert_eq!(talk.host.mark.bytes(), 128 << 10);
    let (mut tags, marks) = (VecDeque::from(tags), talk.host.marks);
    for _ in 0..100 {
        let wakes = talk.host.wakes;
        let tag = tags.pop_front().unwrap();
        for piece in talk.data(tag, 0..LEN, LEN).chunks(60_000) {
            talk.arrive(piece);
        }
        tags.push_back(talk.read(LEN));
        assert_eq!(talk.host.wakes, wakes + 1);
    }
    assert_eq!(talk.host.marks, marks);
    assert_eq!(talk.ended.len(), 104);
}

#[test]
fn a_lone_long_read_after_the_other_wakes_once_too() {
    let mut talk = Talk::new();
    for number in 0..100 {
        let (wakes, marks) = (talk.host.wakes, talk.host.marks);
        let tag = talk.read(LEN);
        for piece in talk.data(tag, 0..LEN, LEN).chunks(60_000) {
            talk.arrive(piece);
        }
        if number > 2 {
            assert_eq!((talk.host.wakes, talk.host.marks), (wakes + 1, marks));
        }
        talk.now += TRUST_MAX / 4;
    }
    assert_eq!(talk.ended.len(), 100);
}

#[test]
fn an_error_in_place_of_the_data_is_heard_within_a_millisecond() {
    let (mut talk, [tag, _]) = Talk::streaming(LEN);
    let error = talk.refusal(tag);
    talk.arrive(&error);
    assert_eq!(talk.ended.len(), 4);
    let begun = talk.now;
    talk.pass_to_alarm();
    assert!(talk.now - begun <= Duration::from_millis(1));
    assert_eq!(talk.ended.last().unwrap().status, Status::BUSY);
    assert_eq!(talk.host.mark, LowWater::ANY);
}

#[test]
fn what_is_no_long_read_lowers_the_mark_at_once() {
    let (mut talk, tags) = Talk::streaming(LEN);
    let short = talk.read(4096);
    assert_eq!(talk.host.mark, LowWater::ANY);
    let bytes = talk.data(short, 0..4096, 4096);
    talk.arrive(&bytes);
    assert_eq!(talk.ended.len(), 5);
    // And so do a shorter read, and orders.
    for tag in tags {
        let bytes = talk.data(tag, 0..LEN, LEN);
        talk.arrive(&bytes);
    }
    for order in [Session::reset_unit, Session::logout] {
        let (mut talk, _) = Talk::streaming(LEN);
        talk.read(64 << 10);
        assert_eq!(talk.host.mark.bytes(), 64 << 10);
        order(&mut talk.session, &mut talk.connection);
        talk.settle();
        assert_eq!(talk.host.mark, LowWater::ANY);
    }
}

#[test]
fn short_reads_that_come_soon_wake_once_for_several() {
    const SHORT: u32 = 4 << 10;
    let mut talk = Talk::new();
    let mut tags: VecDeque<Tag> = (0..32).map(|_| talk.read(SHORT)).collect();
    let mut wakes_before = 0;
    for number in 0..400 {
        let tag = tags.pop_front().unwrap();
        let bytes = talk.data(tag, 0..SHORT, SHORT);
        talk.arrive(&bytes);
        talk.now += Duration::from_micros(10);
        while tags.len() + (number + 1 - talk.ended.len()) < 32 {
            tags.push_back(talk.read(SHORT));
        }
        if number == 99 {
            wakes_before = talk.host.wakes;
        }
    }
    let wakes = talk.host.wakes - wakes_before;
    assert!((300 / 9..=300 / 7).contains(&wakes), "{wakes}");
    // The last of them are not waited for together with what does not come.
    while let Some(tag) = tags.pop_front() {
        let bytes = talk.data(tag, 0..SHORT, SHORT);
        talk.arrive(&bytes);
    }
    talk.pass_to_alarm();
    assert_eq!(talk.session.tasks.len(), 0);
}

#[test]
fn a_stream_that_pauses_is_no_stream_any_more() {
    let (mut talk, [tag, next]) = Talk::streaming(LEN);
    talk.pass_to_alarm();
    assert_eq!(talk.host.mark, LowWater::ANY);
    // Reads that are further apart than that do not raise it again.
    for tag in [tag, next] {
        talk.now += 2 * TRUST_MAX;
        let bytes = talk.data(tag, 0..LEN, LEN);
        talk.arrive(&bytes);
        talk.read(LEN);
    }
    assert_eq!(talk.host.mark, LowWater::ANY);
}

#[test]
fn nothing_that_has_come_waits_unseen_for_longer_than_a_millisecond() {
    for seed in 0..300 {
        let mut dice = Dice::new(seed);
        let mut talk = Talk::new();
        let lens = [512, 4 << 10, 20 << 10, 64 << 10, 128 << 10, 300 << 10];
        let depth = dice.pick(&[4, 12, 32]);
        let (few, longest) = (dice.one_in(2), 1 + dice.index(lens.len()));
        let mut tasks: Vec<(Tag, u32, u32)> = Vec::new();
        let mut answers = 0;
        for _ in 0..60 {
            while tasks.len() < depth {
                let least = if few { longest - 1 } else { 0 };
                let len = dice.pick(lens.get(least..longest).unwrap());
                tasks.push((talk.read(len), 0, len));
            }
            let number = dice.index(tasks.len());
            let (tag, at, len) = tasks.get_mut(number).unwrap();
            let (tag, start, len, end) = (
                *tag,
                *at,
                *len,
                (*at + (dice.pick(&[8, 64, 512]) << 10)).min(*len),
            );
            *at = end;
            let is_over = dice.one_in(20) || end == len;
            let bytes = if is_over && end < len {
                talk.refusal(tag)
            } else {
                talk.data(tag, start..end, len)
            };
            if is_over {
                tasks.remove(number);
                answers += 1;
            }
            let mut rest = bytes.as_slice();
            while !rest.is_empty() {
                let len = dice.pick(&[1, 48, 16 << 10, 65_483, 1 << 20]).min(rest.len());
                let (piece, more) = rest.split_at(len);
                talk.arrive(piece);
                rest = more;
            }
            // All that the target has begun to say it has said.
            if !talk.host.arrived.is_empty() {
                let heard = talk.now;
                talk.pass_to_alarm();
                assert!(talk.now - heard <= TRUST_MAX, "seed {seed}");
                assert!(talk.host.arrived.is_empty(), "seed {seed}");
            }
            assert_eq!(talk.ended.len(), answers, "seed {seed}");
            talk.now += Duration::from_micros(dice.pick(&[0, 50, 2_000]));
        }
    }
}
