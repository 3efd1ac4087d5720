//! A client that is as strict as it is small: one session with one slot, one file that nobody else may write, and it fails
//! on any number that is not as it must be.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::super::super::record::{LAST, Xdr, sealed};

/// A session with an open file.
#[derive(Debug)]
pub(super) struct Client {
    stream: TcpStream,
    owner: Vec<u8>,
    /// Which start of the owner it is; what the starts before it had open, the server closes.
    birth: u64,
    xid: u32,
    pub(super) client_id: u64,
    session: Vec<u8>,
    /// Of the last request in the slot.
    pub(super) sequence: u32,
    handle: Vec<u8>,
    stateid: Vec<u8>,
}

/// What came of a call.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Answer {
    pub(super) status: u32,
    /// The results of the operations after SEQUENCE, with the number and the status of each.
    pub(super) body: Vec<u8>,
}

pub(super) const OK: u32 = 0;
pub(super) const MINOR_VERSION: u32 = 2;
const SOON: Duration = Duration::from_secs(5);
const STATE_BYTES: usize = 16;
static BIRTHS: AtomicU64 = AtomicU64::new(1);

impl Client {
    /// Makes itself known, and opens the image with deny-write once the server lets it.
    pub(super) fn begin(address: SocketAddr, owner: &str) -> Self {
        let mut client = Self::connected(address, owner);
        client.make_session();
        client.call(&[word(58), word(0)].concat(), 1);
        loop {
            let answer = client.open();
            if answer.status == OK {
                break;
            }
            assert_eq!(answer.status, 10_013, "only grace is waited for");
            std::thread::sleep(Duration::from_millis(50));
        }
        client
    }

    fn connected(address: SocketAddr, owner: &str) -> Self {
        let stream = TcpStream::connect(address).expect("the proxy listens");
        stream.set_read_timeout(Some(SOON)).expect("a timeout");
        Self {
            stream,
            owner: owner.as_bytes().to_vec(),
            birth: BIRTHS.fetch_add(1, Ordering::Relaxed),
            xid: 100,
            client_id: 0,
            session: vec![],
            sequence: 0,
            handle: vec![],
            stateid: vec![],
        }
    }

    /// Connects anew, with the session that it has.
    pub(super) fn connect_again(&mut self, address: SocketAddr) {
        self.stream = TcpStream::connect(address).expect("the proxy listens");
        self.stream.set_read_timeout(Some(SOON)).expect("a timeout");
    }

    /// Is known again to a server that was started again, with a new session.
    pub(super) fn make_session(&mut self) {
        let identity = [
            word(42),
            long(self.birth),
            opaque(&self.owner),
            word(0),
            word(0),
            word(0),
        ];
        self.send_plain(&identity.concat(), 1);
        let answer = self.finish_plain();
        let mut rest = Xdr::new(&answer);
        assert_eq!((rest.word(), rest.word()), (Some(42), Some(OK)));
        self.client_id = rest.long().expect("a client id");
        let next = rest.word().expect("a sequence");
        let channel = |bytes: u32| [0, bytes, bytes, bytes, 16, 8, 0].map(word).concat();
        let session = [
            word(43),
            long(self.client_id),
            word(next),
            word(0),
            channel(1 << 20),
            channel(4096),
            word(0x4000_0000),
            word(1),
            word(0),
        ];
        self.send_plain(&session.concat(), 1);
        let answer = self.finish_plain();
        let mut rest = Xdr::new(&answer);
        assert_eq!((rest.word(), rest.word()), (Some(43), Some(OK)));
        self.session = rest.bytes(16).expect("a session").to_vec();
        self.sequence = 0;
    }

    fn open(&mut self) -> Answer {
        let by_name = [word(0), opaque(b"image.raw")].concat();
        let start = [word(24), word(15), opaque(b"export")].concat();
        let answer = self.call(&[start, self.open_by(&by_name), word(10)].concat(), 4);
        if answer.status == OK {
            let mut rest = Xdr::new(&answer.body);
            rest.bytes(16).expect("PUTROOTFH, LOOKUP");
            self.take_state(&mut rest);
            assert_eq!((rest.word(), rest.word()), (Some(10), Some(OK)));
            self.handle = rest.opaque().expect("a handle").to_vec();
        }
        answer
    }

    /// Claims the file that was open before the server's restart.
    pub(super) fn reclaim(&mut self) -> Answer {
        self.send_reclaim();
        let answer = self.finish();
        if answer.status == OK {
            let mut rest = Xdr::new(&answer.body);
            rest.bytes(8).expect("PUTFH");
            self.take_state(&mut rest);
            self.call(&[word(58), word(0)].concat(), 1);
        }
        answer
    }

    pub(super) fn send_reclaim(&mut self) {
        let previous = [word(1), word(0)].concat();
        let operations = [self.put_handle(), self.open_by(&previous)].concat();
        self.send(&operations, 2);
    }

    /// An OPEN for both, denying writing, without a delegation.
    fn open_by(&self, claim: &[u8]) -> Vec<u8> {
        let head = [0, 3 | 0x400, 2].map(word).concat();
        let owner = [long(self.client_id), opaque(b"owner")].concat();
        [&word(18), &head, &owner, &word(0), claim].concat()
    }

    /// Takes the stateid of an OPEN that succeeded, and passes over the rest.
    fn take_state(&mut self, rest: &mut Xdr<'_>) {
        assert_eq!((rest.word(), rest.word()), (Some(18), Some(OK)));
        self.stateid = rest.bytes(STATE_BYTES).expect("a stateid").to_vec();
        rest.bytes(24).expect("a change, flags");
        rest.words().expect("a bitmap");
        match rest.word().expect("whether there is a delegation") {
            // Two reasons why not say more.
            3 if matches!(rest.word(), Some(1 | 2)) => assert!(rest.word().is_some()),
            3 | 0 => {}
            kind => panic!("a delegation of kind {kind} that nobody wanted"),
        }
    }

    pub(super) fn put_handle(&self) -> Vec<u8> {
        [word(22), opaque(&self.handle)].concat()
    }

    /// An operation on the file.
    pub(super) fn send_on_file(&mut self, operation: &[u8]) {
        let operations = [&self.put_handle(), operation].concat();
        self.send(&operations, 2);
    }

    /// The same, and what comes of it: its own results.
    pub(super) fn on_file(&mut self, operation: &[u8]) -> Answer {
        self.send_on_file(operation);
        self.finish_on_file()
    }

    pub(super) fn finish_on_file(&mut self) -> Answer {
        let mut answer = self.finish();
        answer.body.drain(..8);
        answer
    }

    pub(super) fn write_operation(&self, offset: u64, data: &[u8], stable: u32) -> Vec<u8> {
        let place = [word(38), self.stateid.clone(), long(offset), word(stable)].concat();
        [place, opaque(data)].concat()
    }

    pub(super) fn read_operation(&self, offset: u64, count: u32) -> Vec<u8> {
        [word(25), self.stateid.clone(), long(offset), word(count)].concat()
    }

    pub(super) fn deallocate_operation(&self, offset: u64, count: u64) -> Vec<u8> {
        [word(62), self.stateid.clone(), long(offset), long(count)].concat()
    }

    /// A LOCK of one byte far beyond the end.
    pub(super) fn lock_operation(&self) -> Vec<u8> {
        let range = [word(12), word(2), word(0), long(1 << 62), long(1)].concat();
        let new_owner = [word(1), word(0), self.stateid.clone(), word(0)].concat();
        let owner = [long(self.client_id), opaque(b"locker")].concat();
        [range, new_owner, owner].concat()
    }

    /// Writes without waiting for it to be safe; returns the verifier.
    pub(super) fn write(&mut self, offset: u64, data: &[u8]) -> [u8; 8] {
        let operation = self.write_operation(offset, data, 0);
        let answer = self.on_file(&operation);
        verifier_of_write(&answer, data.len())
    }

    /// Makes everything safe; returns the verifier.
    pub(super) fn commit(&mut self) -> [u8; 8] {
        let answer = self.on_file(&commit_operation());
        assert_eq!(answer.status, OK);
        answer.body[8..16].try_into().expect("8 bytes")
    }

    pub(super) fn read(&mut self, offset: u64, count: u32) -> Vec<u8> {
        let operation = self.read_operation(offset, count);
        let answer = self.on_file(&operation);
        assert_eq!(answer.status, OK);
        Xdr::new(&answer.body[12..]).opaque().expect("data").to_vec()
    }

    /// Calls operations behind a SEQUENCE, and waits for what comes of it.
    pub(super) fn call(&mut self, operations: &[u8], count: u32) -> Answer {
        self.send(operations, count);
        self.finish()
    }

    pub(super) fn send(&mut self, operations: &[u8], count: u32) {
        self.sequence += 1;
        self.send_again(operations, count);
    }

    /// The same in place of the last request of the slot, which the server may have done.
    pub(super) fn send_again(&mut self, operations: &[u8], count: u32) {
        let sequence = self.sequence_operation(self.sequence, 0);
        self.send_plain(&[&sequence, operations].concat(), count + 1);
    }

    /// Sends two operations on the file at once: the first in the slot, the second as the first request of another.
    pub(super) fn send_two(&mut self, operations: [&[u8]; 2]) {
        self.sequence += 1;
        let places = [(self.sequence, 0), (1, 1)];
        let mut records = Vec::new();
        for (operation, (number, slot)) in operations.into_iter().zip(places) {
            let sequence = self.sequence_operation(number, slot);
            let message = self.message(&[&sequence, &self.put_handle(), operation].concat(), 3);
            records.extend(sealed(&message));
        }
        self.stream.write_all(&records).expect("it is connected");
    }

    pub(super) fn sequence_operation(&self, number: u32, slot: u32) -> Vec<u8> {
        let place = [number, slot, 1, 1].map(word).concat();
        [word(53), self.session.clone(), place].concat()
    }

    fn send_plain(&mut self, operations: &[u8], count: u32) {
        let record = sealed(&self.message(operations, count));
        self.stream.write_all(&record).expect("it is connected");
    }

    /// One SEQUENCE alone, in two fragments.
    pub(super) fn renew_in_fragments(&mut self) -> Answer {
        self.sequence += 1;
        let sequence = self.sequence_operation(self.sequence, 0);
        let message = self.message(&sequence, 1);
        let (front, back) = message.split_at(32);
        let back_mark = LAST | u32::try_from(back.len()).expect("short");
        let record = [&word(32), front, &word(back_mark), back].concat();
        self.stream.write_all(&record).expect("it is connected");
        self.finish()
    }

    /// The content of a call.
    pub(super) fn message(&mut self, operations: &[u8], count: u32) -> Vec<u8> {
        self.xid += 1;
        let call = [self.xid, 0, 2, 100_003, 4, 1].map(word).concat();
        let user = [word(0), opaque(b"host"), word(0), word(0), word(0)].concat();
        let who = [word(1), opaque(&user), word(0), word(0)].concat();
        let compound = [opaque(b""), word(MINOR_VERSION), word(count)].concat();
        [&call, &who, &compound, operations].concat()
    }

    /// The end of the last call, with its SEQUENCE checked and cut off.
    pub(super) fn finish(&mut self) -> Answer {
        let content = self.receive().expect("an answer comes");
        let (status, body) = self.checked(&content);
        let mut rest = Xdr::new(&body);
        assert_eq!(
            (rest.word(), rest.word()),
            (Some(53), Some(OK)),
            "status {status}"
        );
        assert_eq!(rest.bytes(16), Some(&*self.session));
        assert_eq!((rest.word(), rest.word()), (Some(self.sequence), Some(0)));
        Answer {
            status,
            body: body[36 + 8..].to_vec(),
        }
    }

    fn finish_plain(&mut self) -> Vec<u8> {
        let content = self.receive().expect("an answer comes");
        let (status, body) = self.checked(&content);
        assert_eq!(status, OK);
        body
    }

    /// The status and the results of an answer that is ours.
    fn checked(&self, content: &[u8]) -> (u32, Vec<u8>) {
        let mut rest = Xdr::new(content);
        assert_eq!(
            [0; 6].map(|_| rest.word()),
            [self.xid, 1, 0, 0, 0, 0].map(Some),
            "its xid, a reply, accepted, nobody, success"
        );
        let status = rest.word().expect("a status");
        rest.opaque().expect("a tag");
        rest.word().expect("a count");
        (status, content[rest.at()..].to_vec())
    }

    /// The content of the next record as it comes.
    pub(super) fn receive(&mut self) -> std::io::Result<Vec<u8>> {
        let mut content = Vec::new();
        loop {
            let mut mark = [0; 4];
            self.stream.read_exact(&mut mark)?;
            let mark = u32::from_be_bytes(mark);
            let mut fragment = vec![0; usize::try_from(mark & !LAST).expect("32 bits")];
            self.stream.read_exact(&mut fragment)?;
            content.extend(fragment);
            if mark & LAST != 0 {
                return Ok(content);
            }
        }
    }
}

pub(super) fn verifier_of_write(answer: &Answer, count: usize) -> [u8; 8] {
    assert_eq!(answer.status, OK);
    let mut rest = Xdr::new(&answer.body);
    assert_eq!((rest.word(), rest.word()), (Some(38), Some(OK)));
    assert_eq!(rest.word(), Some(u32::try_from(count).expect("short")));
    rest.word().expect("how safe it is");
    rest.bytes(8)
        .and_then(|bytes| bytes.try_into().ok())
        .expect("a verifier")
}

pub(super) fn commit_operation() -> Vec<u8> {
    [word(5), long(0), word(0)].concat()
}

pub(super) fn word(number: u32) -> Vec<u8> {
    number.to_be_bytes().to_vec()
}

fn long(number: u64) -> Vec<u8> {
    number.to_be_bytes().to_vec()
}

fn opaque(bytes: &[u8]) -> Vec<u8> {
    let mut found = word(u32::try_from(bytes.len()).expect("short"));
    found.extend(bytes);
    found.resize(found.len().next_multiple_of(4), 0);
    found
}
