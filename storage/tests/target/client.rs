//! A small initiator for tests: it speaks bytes to a simulated target, and holds it to RFC 7143.

use std::collections::BTreeMap;

use coracle_storage::iscsi::pdu::{
    BHS_BYTES, Bhs, DataOut, InitiatorPdu, Isid, LoginRequest, LogoutReason, LogoutRequest, Lun, NopOut, R2t,
    RejectReason, Residual, ScsiCommand, Serial, Stage, Tag, TargetPdu, TaskAttribute, TaskFunction,
    TaskManagementRequest, TaskOutcome, TextRequest, Transit, padding_bytes,
};
use coracle_storage::sim::target::{Connection, Target};

/// What bytes go through.
pub(crate) trait Link {
    fn receive(&mut self, bytes: &[u8]);
    fn transmit(&mut self) -> Vec<u8>;
    fn is_busy(&self) -> bool;
    fn closed(&self) -> bool;
    fn close(&mut self);
}

impl Link for Connection {
    fn receive(&mut self, bytes: &[u8]) {
        self.receive(bytes);
    }

    fn transmit(&mut self) -> Vec<u8> {
        self.transmit()
    }

    fn is_busy(&self) -> bool {
        self.is_busy()
    }

    fn closed(&self) -> bool {
        self.closed()
    }

    fn close(&mut self) {
        self.close();
    }
}

/// One session over one connection.
pub(crate) struct Client {
    pub(crate) connection: Box<dyn Link>,
    received: Vec<u8>,
    header_digest: bool,
    data_digest: bool,
    in_full_feature: bool,
    keys: BTreeMap<String, String>,
    cmd_sn: Serial,
    max_cmd_sn: Serial,
    next_stat_sn: Option<Serial>,
    next_tag: u32,
    /// That of the next commands.
    pub(crate) attribute: TaskAttribute,
    tasks: BTreeMap<u32, Task>,
    ended: BTreeMap<u32, Outcome>,
    /// Task management and logout, by tag.
    managed: BTreeMap<u32, u8>,
    pub(crate) texts: BTreeMap<u32, String>,
    pub(crate) echoes: BTreeMap<u32, Vec<u8>>,
    /// What the target did unasked.
    pub(crate) asyncs: Vec<u8>,
    /// Reasons of rejects, and the tags of what was rejected.
    pub(crate) rejects: Vec<(RejectReason, u32)>,
    pub(crate) pings: u32,
    pub(crate) r2ts: u32,
}

struct Task {
    expected: u32,
    out: Vec<u8>,
    data: Vec<u8>,
    data_sn: u32,
    r2t_sn: u32,
    asked_to: usize,
    burst_bytes: usize,
    lun: Lun,
}

/// How a command ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Outcome {
    pub(crate) status: u8,
    /// Key, and additional code with qualifier.
    pub(crate) sense: (u8, u16),
    pub(crate) data: Vec<u8>,
    pub(crate) residual: Residual,
}

/// What goes with a command.
pub(crate) enum Transfer<'a> {
    Nothing,
    In(u32),
    Out(&'a [u8]),
}

/// The answer to a login that began no session: class, detail and text.
pub(crate) type Refused = (u8, u8, String);

/// How often the target may be asked to go on before it has stalled.
const PATIENCE: u32 = 20_000;

impl Client {
    /// Logs in with these further keys.
    pub(crate) fn log_in(target: &Target, initiator: &str, isid: u8, keys: &str) -> Result<Self, Refused> {
        Self::log_in_over(Box::new(target.connect()), initiator, isid, keys)
    }

    pub(crate) fn log_in_over(
        connection: Box<dyn Link>,
        initiator: &str,
        isid: u8,
        keys: &str,
    ) -> Result<Self, Refused> {
        let mut client = Self {
            connection,
            received: Vec::new(),
            header_digest: false,
            data_digest: false,
            in_full_feature: false,
            keys: BTreeMap::new(),
            cmd_sn: Serial(7),
            max_cmd_sn: Serial(7),
            next_stat_sn: None,
            next_tag: 1,
            attribute: TaskAttribute::Simple,
            tasks: BTreeMap::new(),
            ended: BTreeMap::new(),
            managed: BTreeMap::new(),
            texts: BTreeMap::new(),
            echoes: BTreeMap::new(),
            asyncs: Vec::new(),
            rejects: Vec::new(),
            pings: 0,
            r2ts: 0,
        };
        let security =
            format!("InitiatorName={initiator}\0TargetName=iqn.2026-01.test:t1\0AuthMethod=None\0{keys}");
        let mut text = security.into_bytes();
        let mut stage = Stage::SecurityNegotiation;
        loop {
            let next = match stage {
                Stage::SecurityNegotiation => Stage::LoginOperationalNegotiation,
                _ => Stage::FullFeaturePhase,
            };
            let request = LoginRequest {
                transit: Transit::Leave(stage, next),
                version_max: 0,
                version_min: 0,
                isid: Isid([0x80, 0, 0, 0, 0, isid]),
                tsih: 0,
                initiator_task_tag: Tag(0),
                cid: 0,
                cmd_sn: client.cmd_sn,
                exp_stat_sn: client.next_stat_sn.unwrap_or_default(),
            };
            client.send(InitiatorPdu::LoginRequest(request), &std::mem::take(&mut text));
            let answered = (0..PATIENCE).find_map(|_| client.next_pdu());
            let (pdu, data) = answered.expect("a login is answered");
            let TargetPdu::LoginResponse(response) = pdu else {
                panic!("a login is answered by {pdu:?}");
            };
            let answer = String::from_utf8(data).unwrap();
            if response.status_class != 0 {
                assert!(client.next_pdu().is_none() && client.connection.closed());
                return Err((response.status_class, response.status_detail, answer));
            }
            for pair in answer.split_terminator('\0') {
                let (key, value) = pair.split_once('=').unwrap();
                client.keys.insert(key.to_owned(), value.to_owned());
            }
            if let Transit::Leave(_, next) = response.transit {
                stage = next;
            }
            if stage == Stage::FullFeaturePhase {
                assert_ne!(response.tsih, 0);
                break;
            }
        }
        client.in_full_feature = true;
        client.header_digest = client.key("HeaderDigest") == Some("CRC32C");
        client.data_digest = client.key("DataDigest") == Some("CRC32C");
        Ok(client)
    }

    /// Logs in where nothing is in the way, and has read the attentions of the login away.
    pub(crate) fn ready(target: &Target, initiator: &str, isid: u8) -> Self {
        let mut client = Self::log_in(target, initiator, isid, "").unwrap();
        while client.run(1, &[0], Transfer::Nothing).status != 0 {}
        client
    }

    pub(crate) fn key(&self, name: &str) -> Option<&str> {
        self.keys.get(name).map(String::as_str)
    }

    fn bytes_of(&self, name: &str, default: usize) -> usize {
        self.key(name).map_or(default, |value| value.parse().unwrap())
    }

    /// Whether the window lets a command go.
    pub(crate) fn may_start(&self) -> bool {
        !self.max_cmd_sn.is_before(self.cmd_sn)
    }

    /// Sends a command, for which there has to be room; its tag.
    pub(crate) fn start(&mut self, lun: u16, cdb: &[u8], transfer: &Transfer<'_>) -> u32 {
        while !self.may_start() {
            self.go_on();
        }
        let mut padded = [0; 16];
        padded[..cdb.len()].copy_from_slice(cdb);
        let (expected, out) = match transfer {
            Transfer::Nothing => (0, Vec::new()),
            Transfer::In(bytes) => (*bytes, Vec::new()),
            Transfer::Out(bytes) => (u32::try_from(bytes.len()).unwrap(), bytes.to_vec()),
        };
        let tag = self.next_tag;
        self.next_tag += 1;
        let most = self.bytes_of("MaxRecvDataSegmentLength", 8192);
        let first_burst = self.bytes_of("FirstBurstLength", 65536).min(out.len());
        let immediate = if self.key("ImmediateData") == Some("No") {
            0
        } else {
            first_burst.min(most)
        };
        let unsolicited = self.key("InitialR2T") == Some("No") && first_burst > immediate;
        let lun = Lun::new(lun).unwrap();
        let command = ScsiCommand {
            immediate: false,
            is_final: !unsolicited,
            read: matches!(transfer, Transfer::In(_)),
            write: matches!(transfer, Transfer::Out(_)),
            attribute: self.attribute,
            lun,
            initiator_task_tag: Tag(tag),
            expected_data_transfer_length: expected,
            cmd_sn: self.cmd_sn,
            exp_stat_sn: self.next_stat_sn.unwrap_or_default(),
            cdb: padded,
        };
        self.cmd_sn = self.cmd_sn.next();
        self.send(InitiatorPdu::ScsiCommand(command), &out[..immediate]);
        let mut task = Task {
            expected,
            out,
            data: Vec::new(),
            data_sn: 0,
            r2t_sn: 0,
            asked_to: immediate,
            burst_bytes: 0,
            lun,
        };
        if unsolicited {
            self.send_data(&task, tag, Tag::RESERVED, immediate..first_burst);
            task.asked_to = first_burst;
        }
        self.tasks.insert(tag, task);
        tag
    }

    /// Sends a command and waits for its end.
    pub(crate) fn run(&mut self, lun: u16, cdb: &[u8], transfer: Transfer<'_>) -> Outcome {
        let tag = self.start(lun, cdb, &transfer);
        self.finish(tag)
    }

    /// Waits for the end of a command.
    pub(crate) fn finish(&mut self, tag: u32) -> Outcome {
        for _ in 0..PATIENCE {
            if let Some(outcome) = self.ended.remove(&tag) {
                return outcome;
            }
            assert!(
                !self.rejects.iter().any(|(_, rejected)| *rejected == tag),
                "command {tag} was rejected: {:?}",
                self.rejects
            );
            self.go_on();
        }
        panic!("command {tag} never ends");
    }

    pub(crate) fn has_ended(&self, tag: u32) -> bool {
        self.ended.contains_key(&tag)
    }

    /// Asks for task management and waits for the answer.
    pub(crate) fn manage(&mut self, function: TaskFunction, lun: u16, task: u32) -> TaskOutcome {
        let tag = self.next_tag;
        self.next_tag += 1;
        let request = TaskManagementRequest {
            immediate: true,
            function,
            lun: Lun::new(lun).unwrap(),
            initiator_task_tag: Tag(tag),
            referenced_task_tag: if task == 0 { Tag::RESERVED } else { Tag(task) },
            cmd_sn: self.cmd_sn,
            exp_stat_sn: self.next_stat_sn.unwrap_or_default(),
            ref_cmd_sn: Serial(0),
            exp_data_sn: 0,
        };
        self.send(InitiatorPdu::TaskManagementRequest(request), &[]);
        TaskOutcome(self.managed_as(tag))
    }

    pub(crate) fn log_out(&mut self) -> u8 {
        let tag = self.next_tag;
        self.next_tag += 1;
        let request = LogoutRequest {
            immediate: true,
            reason: LogoutReason::CLOSE_SESSION,
            initiator_task_tag: Tag(tag),
            cid: 0,
            cmd_sn: self.cmd_sn,
            exp_stat_sn: self.next_stat_sn.unwrap_or_default(),
        };
        self.send(InitiatorPdu::LogoutRequest(request), &[]);
        self.managed_as(tag)
    }

    fn managed_as(&mut self, tag: u32) -> u8 {
        for _ in 0..PATIENCE {
            if let Some(response) = self.managed.remove(&tag) {
                return response;
            }
            self.go_on();
        }
        panic!("request {tag} is never answered");
    }

    /// Sends text and waits for the answer.
    pub(crate) fn ask(&mut self, text: &str) -> String {
        let tag = self.next_tag;
        self.next_tag += 1;
        let request = TextRequest {
            immediate: true,
            is_final: true,
            is_continued: false,
            lun: Lun::default(),
            initiator_task_tag: Tag(tag),
            target_transfer_tag: Tag::RESERVED,
            cmd_sn: self.cmd_sn,
            exp_stat_sn: self.next_stat_sn.unwrap_or_default(),
        };
        self.send(InitiatorPdu::TextRequest(request), text.as_bytes());
        for _ in 0..PATIENCE {
            if let Some(answer) = self.texts.remove(&tag) {
                return answer;
            }
            self.go_on();
        }
        panic!("text is never answered");
    }

    /// Sends a ping and waits for its echo.
    pub(crate) fn ping(&mut self, data: &[u8]) -> Vec<u8> {
        let tag = self.next_tag;
        self.next_tag += 1;
        self.send_nop(Tag(tag), Tag::RESERVED, Lun::default(), data);
        for _ in 0..PATIENCE {
            if let Some(echo) = self.echoes.remove(&tag) {
                return echo;
            }
            self.go_on();
        }
        panic!("a ping is never answered");
    }

    /// Takes what the target has to say now.
    pub(crate) fn go_on(&mut self) {
        let bytes = self.connection.transmit();
        self.received.extend(bytes);
        while let Some((pdu, data)) = self.parse() {
            self.take(pdu, data);
        }
    }

    fn next_pdu(&mut self) -> Option<(TargetPdu, Vec<u8>)> {
        let bytes = self.connection.transmit();
        self.received.extend(bytes);
        self.parse()
    }

    fn parse(&mut self) -> Option<(TargetPdu, Vec<u8>)> {
        let bhs = Bhs(*self.received.first_chunk::<BHS_BYTES>()?);
        let data_bytes = usize::try_from(bhs.data_segment_bytes()).unwrap();
        let padded = data_bytes + padding_bytes(data_bytes);
        let header_end = if self.header_digest {
            BHS_BYTES + 4
        } else {
            BHS_BYTES
        };
        let digest_bytes = if self.data_digest && data_bytes > 0 { 4 } else { 0 };
        let end = header_end + padded + digest_bytes;
        if self.received.len() < end {
            return None;
        }
        let rest = self.received.split_off(end);
        let pdu = std::mem::replace(&mut self.received, rest);
        if self.header_digest {
            let digest = crc32c::crc32c(&pdu[..BHS_BYTES]).to_le_bytes();
            assert_eq!(pdu[BHS_BYTES..header_end], digest);
        }
        if digest_bytes > 0 {
            let digest = crc32c::crc32c(&pdu[header_end..header_end + padded]).to_le_bytes();
            assert_eq!(pdu[header_end + padded..], digest);
        }
        let data = pdu[header_end..header_end + data_bytes].to_vec();
        let pdu = TargetPdu::parse(&bhs).unwrap();
        if let Some(stat_sn) = pdu.status_number() {
            let due = self.next_stat_sn.unwrap_or(stat_sn);
            assert_eq!(stat_sn, due, "the statuses are numbered one by one");
            self.next_stat_sn = Some(stat_sn.next());
        }
        if self.in_full_feature || matches!(pdu, TargetPdu::LoginResponse(_)) {
            let window = pdu.window();
            let is_login = matches!(pdu, TargetPdu::LoginResponse(_));
            assert!(is_login || !self.cmd_sn.is_before(window.exp_cmd_sn));
            if self.max_cmd_sn.is_before(window.max_cmd_sn) {
                self.max_cmd_sn = window.max_cmd_sn;
            }
        }
        Some((pdu, data))
    }

    fn take(&mut self, pdu: TargetPdu, data: Vec<u8>) {
        match pdu {
            TargetPdu::DataIn(pdu) => {
                // The client has declared nothing.
                let most = 8192;
                let burst_max = self.bytes_of("MaxBurstLength", 262_144);
                let tag = pdu.initiator_task_tag.0;
                let task = self.tasks.get_mut(&tag).expect("data comes for a command");
                assert!(data.len() <= most && !data.is_empty());
                assert_eq!(pdu.data_sn, task.data_sn);
                assert_eq!(usize::try_from(pdu.buffer_offset).unwrap(), task.data.len());
                task.data_sn += 1;
                task.data.extend(&data);
                task.burst_bytes += data.len();
                assert!(task.burst_bytes <= burst_max);
                assert!(task.data.len() <= usize::try_from(task.expected).unwrap());
                if pdu.is_final {
                    task.burst_bytes = 0;
                }
                if let Some(end) = pdu.status {
                    self.end(tag, end.status, &[], end.residual);
                }
            }
            TargetPdu::ScsiResponse(pdu) => {
                let tag = pdu.initiator_task_tag.0;
                let task = self.tasks.get(&tag).expect("an answer is to a command");
                assert_eq!(pdu.exp_data_sn, task.data_sn + task.r2t_sn);
                self.end(tag, pdu.status, &data, pdu.residual);
            }
            TargetPdu::R2t(pdu) => self.obey(&pdu),
            TargetPdu::NopIn(pdu) if pdu.initiator_task_tag != Tag::RESERVED => {
                self.echoes.insert(pdu.initiator_task_tag.0, data);
            }
            TargetPdu::NopIn(pdu) => {
                self.pings += 1;
                if pdu.target_transfer_tag != Tag::RESERVED {
                    self.send_nop(Tag::RESERVED, pdu.target_transfer_tag, pdu.lun, &[]);
                }
            }
            TargetPdu::TextResponse(pdu) => {
                let text = String::from_utf8(data).unwrap();
                self.texts.insert(pdu.initiator_task_tag.0, text);
            }
            TargetPdu::TaskManagementResponse(pdu) => {
                self.managed.insert(pdu.initiator_task_tag.0, pdu.response.0);
            }
            TargetPdu::LogoutResponse(pdu) => {
                self.managed.insert(pdu.initiator_task_tag.0, pdu.response.0);
            }
            TargetPdu::Async(pdu) => self.asyncs.push(pdu.async_event.0),
            TargetPdu::Reject(pdu) => {
                let rejected = Bhs(*data.first_chunk().unwrap());
                self.rejects.push((pdu.reason, rejected.initiator_task_tag().0));
            }
            TargetPdu::LoginResponse(pdu) => panic!("a login response in the full feature phase: {pdu:?}"),
        }
    }

    fn end(&mut self, tag: u32, status: u8, segment: &[u8], residual: Residual) {
        let task = self.tasks.remove(&tag).expect("a command ends once");
        let sense = match segment {
            [] => (0, 0),
            [_, 18, sense @ ..] => (sense[2] & 0x0f, u16::from_be_bytes([sense[12], sense[13]])),
            other => panic!("no sense data: {other:?}"),
        };
        let outcome = Outcome {
            status,
            sense,
            data: task.data,
            residual,
        };
        self.ended.insert(tag, outcome);
    }

    /// Sends the data that is asked for.
    fn obey(&mut self, r2t: &R2t) {
        self.r2ts += 1;
        let tag = r2t.initiator_task_tag.0;
        let burst = self.bytes_of("MaxBurstLength", 262_144);
        let mut task = self.tasks.remove(&tag).expect("data is asked for a command");
        let at = usize::try_from(r2t.buffer_offset).unwrap();
        let len = usize::try_from(r2t.desired_data_transfer_length).unwrap();
        assert_eq!(r2t.r2t_sn, task.r2t_sn);
        assert_eq!(at, task.asked_to);
        assert!(len > 0 && len <= burst && at + len <= task.out.len());
        task.r2t_sn += 1;
        task.asked_to = at + len;
        self.send_data(&task, tag, r2t.target_transfer_tag, at..at + len);
        self.tasks.insert(tag, task);
    }

    fn send_data(&mut self, task: &Task, tag: u32, transfer: Tag, range: std::ops::Range<usize>) {
        let most = self.bytes_of("MaxRecvDataSegmentLength", 8192);
        let bytes = &task.out[range.clone()];
        let last = bytes.len().div_ceil(most) - 1;
        for (number, piece) in bytes.chunks(most).enumerate() {
            let pdu = DataOut {
                is_final: number == last,
                lun: task.lun,
                initiator_task_tag: Tag(tag),
                target_transfer_tag: transfer,
                exp_stat_sn: self.next_stat_sn.unwrap_or_default(),
                data_sn: u32::try_from(number).unwrap(),
                buffer_offset: u32::try_from(range.start + number * most).unwrap(),
            };
            self.send(InitiatorPdu::DataOut(pdu), piece);
        }
    }

    fn send_nop(&mut self, tag: Tag, transfer: Tag, lun: Lun, data: &[u8]) {
        let pdu = NopOut {
            immediate: true,
            lun,
            initiator_task_tag: tag,
            target_transfer_tag: transfer,
            cmd_sn: self.cmd_sn,
            exp_stat_sn: self.next_stat_sn.unwrap_or_default(),
        };
        self.send(InitiatorPdu::NopOut(pdu), data);
    }

    /// Sends a PDU as it is.
    pub(crate) fn send(&mut self, pdu: InitiatorPdu, data: &[u8]) {
        let bhs = pdu.bhs().with_data_segment(u32::try_from(data.len()).unwrap());
        let mut bytes = bhs.0.to_vec();
        if self.header_digest {
            bytes.extend(crc32c::crc32c(&bhs.0).to_le_bytes());
        }
        if !data.is_empty() {
            let mut padded = data.to_vec();
            padded.resize(data.len() + padding_bytes(data.len()), 0);
            bytes.extend(&padded);
            if self.data_digest {
                bytes.extend(crc32c::crc32c(&padded).to_le_bytes());
            }
        }
        // The stream knows no PDUs.
        for piece in bytes.chunks(1000) {
            self.connection.receive(piece);
        }
    }
}
