//! An initiator that is as strict as it is small: it fails on any number or sum that is not as it must be.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use super::super::super::pdu::{Digests, HEADER_BYTES, Pdu, field, opcode, seal, set};
use super::super::super::target::NAME;

/// A session after its login.
#[derive(Debug)]
pub(super) struct Initiator {
    stream: TcpStream,
    digests: Digests,
    command_number: u32,
    status_number: Option<u32>,
    /// The tag of the next command; the caller may choose it.
    pub(super) tag: u32,
}

/// What came of a command.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Done {
    pub(super) status: u8,
    pub(super) data: Vec<u8>,
}

pub(super) const GOOD: u8 = 0;
pub(super) const CHECK_CONDITION: u8 = 2;
pub(super) const BLOCK_BYTES: usize = 512;
const SOON: Duration = Duration::from_secs(5);

impl Initiator {
    /// Logs in, and takes the first unit attention.
    pub(super) fn login(address: SocketAddr, digests: Digests) -> Self {
        let stream = TcpStream::connect(address).expect("the proxy listens");
        stream.set_read_timeout(Some(SOON)).expect("a timeout");
        let mut initiator = Self {
            stream,
            digests: Digests::default(),
            command_number: 77,
            status_number: None,
            tag: 0,
        };
        let word = |is_wanted| if is_wanted { "CRC32C" } else { "None" };
        let text = format!(
            "InitiatorName=iqn.2026-01.test:initiator\0SessionType=Normal\0TargetName={NAME}\0\
             HeaderDigest={}\0DataDigest={}\0InitialR2T=No\0ImmediateData=Yes\0FirstBurstLength=262144\0\
             MaxBurstLength=262144\0MaxRecvDataSegmentLength=262144\0",
            word(digests.header),
            word(digests.data)
        );
        let mut text = text.into_bytes();
        loop {
            // Operational negotiation, then the full-feature phase.
            let mut request = initiator.request(&[opcode::LOGIN | 0x40, 0x87], &text);
            request[8..14].copy_from_slice(&[0x80, 0, 0, 1, 0, 1]);
            initiator.stream.write_all(&request).expect("it is connected");
            let answer = initiator.receive();
            assert_eq!(answer[36..38], [0, 0], "login status");
            if Pdu(&answer).ends_login() {
                break;
            }
            text.clear();
        }
        initiator.digests = digests;
        initiator.command(&[0x00], &[], 0);
        initiator
    }

    /// A request with the next tag and the numbers of this session.
    fn request(&mut self, start: &[u8], data: &[u8]) -> Vec<u8> {
        let mut request = vec![0; HEADER_BYTES];
        request[..start.len()].copy_from_slice(start);
        set(&mut request, 4, u32::try_from(data.len()).expect("short"));
        set(&mut request, field::TAG, self.tag);
        set(&mut request, field::COMMAND_NUMBER, self.command_number);
        let expected = self.status_number.unwrap_or(0);
        set(&mut request, field::EXPECTED_STATUS, expected);
        request.resize(Pdu(&request).bytes(self.digests).expect("a header"), 0);
        let start = Pdu(&request).data_start(self.digests);
        request[start..start + data.len()].copy_from_slice(data);
        request
    }

    /// Sends a command with its data, of which so much more is read or written.
    pub(super) fn send(&mut self, cdb: &[u8], data: &[u8], read_bytes: usize) {
        self.tag = self.tag.wrapping_add(1);
        let flags = 0x80 | if data.is_empty() { 0x40 } else { 0x20 };
        let mut request = self.request(&[opcode::SCSI_COMMAND, flags], data);
        request[9] = 1;
        let expected = u32::try_from(data.len().max(read_bytes)).expect("short");
        set(&mut request, field::EXPECTED_BYTES, expected);
        request[32..32 + cdb.len()].copy_from_slice(cdb);
        seal(&mut request, self.digests);
        self.command_number = self.command_number.wrapping_add(1);
        self.stream.write_all(&request).expect("it is connected");
    }

    /// Sends a command and waits for what comes of it.
    pub(super) fn command(&mut self, cdb: &[u8], data: &[u8], read_bytes: usize) -> Done {
        self.send(cdb, data, read_bytes);
        self.finish()
    }

    /// The end of the last command.
    pub(super) fn finish(&mut self) -> Done {
        let mut read = Vec::new();
        loop {
            let answer = self.receive();
            let pdu = Pdu(&answer);
            assert_eq!(pdu.field(field::TAG), self.tag, "whose answer? {answer:x?}");
            if pdu.opcode() == opcode::DATA_IN {
                read.extend(pdu.data(self.digests));
            } else {
                assert_eq!(pdu.opcode(), opcode::SCSI_RESPONSE, "{answer:x?}");
            }
            if pdu.has_status() {
                return Done {
                    status: answer[3],
                    data: read,
                };
            }
        }
    }

    /// The next answer, with everything checked but whose it is.
    fn receive(&mut self) -> Vec<u8> {
        let answer = self.receive_any().expect("an answer comes");
        let mut sealed = answer.clone();
        seal(&mut sealed, self.digests);
        assert!(sealed == answer, "a sum is wrong");
        let pdu = Pdu(&answer);
        if pdu.has_status_number() {
            let number = pdu.field(field::STATUS_NUMBER);
            assert_eq!(number, self.status_number.unwrap_or(number), "StatSN");
            self.status_number = Some(number.wrapping_add(u32::from(pdu.has_status())));
        }
        let expected = pdu.field(field::EXPECTED_COMMAND);
        let unseen = self.command_number.wrapping_sub(expected);
        assert!(unseen < 1 << 16, "a command was counted that was never sent");
        let room = pdu
            .field(field::MAXIMUM_COMMAND)
            .wrapping_sub(expected)
            .wrapping_add(1);
        assert!((1..1 << 16).contains(&room), "room for {room} commands");
        answer
    }

    /// The next answer as it comes.
    pub(super) fn receive_any(&mut self) -> std::io::Result<Vec<u8>> {
        let mut answer = vec![0; HEADER_BYTES];
        self.stream.read_exact(&mut answer)?;
        answer.resize(Pdu(&answer).bytes(self.digests).expect("a header"), 0);
        self.stream.read_exact(&mut answer[HEADER_BYTES..])?;
        Ok(answer)
    }

    pub(super) fn write(&mut self, block: u32, data: &[u8]) -> Done {
        self.command(&write(block, data), data, 0)
    }

    pub(super) fn read(&mut self, block: u32, blocks: u16) -> Done {
        let bytes = usize::from(blocks) * BLOCK_BYTES;
        self.command(&ten(0x28, block, blocks), &[], bytes)
    }

    pub(super) fn flush(&mut self) -> Done {
        self.command(&ten(0x35, 0, 0), &[], 0)
    }
}

/// The CDB of a WRITE (10) of this data.
pub(super) fn write(block: u32, data: &[u8]) -> [u8; 10] {
    let blocks = u16::try_from(data.len() / BLOCK_BYTES).expect("short");
    ten(0x2a, block, blocks)
}

/// A CDB of ten bytes.
pub(super) fn ten(operation: u8, block: u32, blocks: u16) -> [u8; 10] {
    let [b0, b1, b2, b3] = block.to_be_bytes();
    let [n0, n1] = blocks.to_be_bytes();
    [operation, 0, b0, b1, b2, b3, 0, n0, n1, 0]
}
