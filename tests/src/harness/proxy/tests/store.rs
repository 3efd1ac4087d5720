//! A block store over TCP, as small as one can be that has everything a proxy can hurt: writes, reads, flushes, a
//! checksum, and sessions of which the newest fences the older ones.
//!
//! A message is its length, a tag, an operation, a block, the payload and a sum over all that; numbers are 32 bits,
//! little-endian.

use std::io::{Error, ErrorKind, Read, Result, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::harness::proxy::{Direction, Kind, Protocol};

pub(super) const BLOCK_BYTES: usize = 4096;

/// The operations; an answer has its request's.
pub(super) const OPEN: u32 = 1;
pub(super) const WRITE: u32 = 2;
pub(super) const READ: u32 = 3;
pub(super) const FLUSH: u32 = 4;

const HEAD_BYTES: usize = 16;
const SUM_BYTES: usize = 4;

/// What the server keeps.
#[derive(Debug)]
pub(super) struct Store {
    pub(super) image: Vec<u8>,
    /// The newest session: requests of older ones are refused.
    session: u32,
}

/// A server; its threads end with the connections.
#[derive(Debug)]
pub(super) struct Server {
    pub(super) address: SocketAddr,
    store: Arc<Mutex<Store>>,
}

/// A client that survives its connections: it opens a new session and writes again what was not flushed.
#[derive(Debug)]
pub(super) struct Client {
    address: SocketAddr,
    stream: Option<TcpStream>,
    sessions: u32,
    next_tag: u32,
    unflushed: Vec<(u32, Vec<u8>)>,
    bugs: Bugs,
}

/// Mistakes to plant.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Bugs {
    /// A flush succeeds without being sent.
    pub(super) drops_flushes: bool,
    /// Every session claims to be the same.
    pub(super) has_no_fence: bool,
}

/// How long a client waits for an answer before it takes the connection for dead.
const ANSWER_WITHIN: Duration = Duration::from_millis(150);
const ATTEMPTS_MAX: u32 = 200;

/// The store's protocol, as the proxy must know it.
#[derive(Debug)]
pub(super) struct Wire;

impl Protocol for Wire {
    fn begin(&self) -> Box<dyn Protocol> {
        Box::new(Self)
    }

    fn message_bytes(&self, _: Direction, stream: &[u8]) -> Option<usize> {
        let length = usize::try_from(word(stream, 0)?).ok()?;
        (stream.len() >= length).then_some(length)
    }

    fn kind(&self, request: &[u8]) -> Kind {
        let is_whole = request
            .split_last_chunk()
            .is_some_and(|(content, sent)| u32::from_le_bytes(*sent) == sum(content));
        match word(request, 8) {
            _ if !is_whole => Kind::Other,
            Some(WRITE) => Kind::Unstable,
            Some(FLUSH) => Kind::Flush,
            _ => Kind::Other,
        }
    }

    fn tag(&self, message: &[u8]) -> u64 {
        word(message, 4).map_or(u64::MAX, u64::from)
    }

    fn acknowledgement(&mut self, request: &[u8]) -> Vec<u8> {
        message(word(request, 4).unwrap_or(0), (WRITE, 0), &[])
    }

    fn depends(&self, request: &[u8], held: &[u8]) -> bool {
        matches!(word(request, 8), Some(READ | WRITE)) && word(request, 12) == word(held, 12)
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

fn message(tag: u32, (operation, block): (u32, u32), payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(HEAD_BYTES + payload.len() + SUM_BYTES).expect("a message is small");
    let mut bytes = Vec::new();
    for number in [length, tag, operation, block] {
        bytes.extend(number.to_le_bytes());
    }
    bytes.extend(payload);
    bytes.extend(sum(&bytes).to_le_bytes());
    bytes
}

/// FNV-1a: any one changed byte changes it.
fn sum(bytes: &[u8]) -> u32 {
    bytes.iter().fold(0x811c_9dc5, |sum, byte| {
        (sum ^ u32::from(*byte)).wrapping_mul(0x0100_0193)
    })
}

/// One message, if it arrives whole: tag, operation, block, payload.
fn receive(stream: &mut TcpStream) -> Result<(u32, u32, u32, Vec<u8>)> {
    let broken = || Error::from(ErrorKind::InvalidData);
    let mut head = [0; HEAD_BYTES];
    stream.read_exact(&mut head)?;
    let length = word(&head, 0).and_then(|length| usize::try_from(length).ok());
    let rest = length
        .filter(|length| (HEAD_BYTES + SUM_BYTES..=HEAD_BYTES + BLOCK_BYTES + SUM_BYTES).contains(length))
        .ok_or_else(broken)?
        - HEAD_BYTES;
    let mut bytes = head.to_vec();
    bytes.resize(HEAD_BYTES + rest, 0);
    stream.read_exact(bytes.get_mut(HEAD_BYTES..).ok_or_else(broken)?)?;
    let (content, sent) = bytes.split_at(bytes.len() - SUM_BYTES);
    if word(sent, 0) != Some(sum(content)) {
        return Err(broken());
    }
    let number = |at| word(content, at).ok_or_else(broken);
    let payload = content.get(HEAD_BYTES..).unwrap_or_default().to_vec();
    Ok((number(4)?, number(8)?, number(12)?, payload))
}

impl Server {
    pub(super) fn start(blocks: usize) -> Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?;
        let address = listener.local_addr()?;
        let store = Arc::new(Mutex::new(Store {
            image: vec![0; blocks * BLOCK_BYTES],
            session: 0,
        }));
        let shared = Arc::clone(&store);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let store = Arc::clone(&shared);
                std::thread::spawn(move || serve(stream, &store));
            }
        });
        Ok(Self { address, store })
    }

    pub(super) fn store(&self) -> MutexGuard<'_, Store> {
        self.store.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Answers until the connection ends, breaks, says something wrong or is fenced.
fn serve(mut stream: TcpStream, store: &Mutex<Store>) -> Result<()> {
    let mut session = 0;
    loop {
        let (tag, operation, block, payload) = receive(&mut stream)?;
        let mut store = store.lock().unwrap_or_else(PoisonError::into_inner);
        if operation == OPEN {
            session = block;
            store.session = store.session.max(session);
        }
        if session < store.session {
            return Err(Error::from(ErrorKind::PermissionDenied));
        }
        let start = usize::try_from(block)
            .unwrap_or(usize::MAX)
            .saturating_mul(BLOCK_BYTES);
        let place = store.image.get_mut(start..start.saturating_add(BLOCK_BYTES));
        let mut found = Vec::new();
        match (operation, place) {
            (WRITE, Some(place)) if payload.len() == BLOCK_BYTES => place.copy_from_slice(&payload),
            (READ, Some(place)) => found.extend_from_slice(place),
            (OPEN | FLUSH, _) => {}
            _ => return Err(Error::from(ErrorKind::InvalidInput)),
        }
        drop(store);
        stream.write_all(&message(tag, (operation, block), &found))?;
    }
}

impl Client {
    pub(super) fn new(address: SocketAddr, bugs: Bugs) -> Self {
        Self {
            address,
            stream: None,
            sessions: 0,
            next_tag: 0,
            unflushed: vec![],
            bugs,
        }
    }

    pub(super) fn write(&mut self, block: u32, content: &[u8]) -> Result<()> {
        self.insist(WRITE, block, content)?;
        self.unflushed.push((block, content.to_vec()));
        Ok(())
    }

    pub(super) fn read(&mut self, block: u32) -> Result<Vec<u8>> {
        self.insist(READ, block, &[])
    }

    pub(super) fn flush(&mut self) -> Result<()> {
        if !self.bugs.drops_flushes {
            self.insist(FLUSH, 0, &[])?;
        }
        self.unflushed.clear();
        Ok(())
    }

    /// Sends a write without waiting for its answer.
    pub(super) fn send_write(&mut self, block: u32, content: &[u8]) -> Result<()> {
        let tag = self.tag();
        let stream = self.stream.as_mut().ok_or(ErrorKind::NotConnected)?;
        stream.write_all(&message(tag, (WRITE, block), content))
    }

    fn insist(&mut self, operation: u32, block: u32, payload: &[u8]) -> Result<Vec<u8>> {
        let mut last = Error::from(ErrorKind::TimedOut);
        for _ in 0..ATTEMPTS_MAX {
            let answer = self.connect().and_then(|()| self.call(operation, block, payload));
            match answer {
                Ok(answer) => return Ok(answer),
                Err(e) => last = e,
            }
            self.stream = None;
            std::thread::sleep(Duration::from_millis(5));
        }
        Err(last)
    }

    fn connect(&mut self) -> Result<()> {
        if self.stream.is_some() {
            return Ok(());
        }
        let stream = TcpStream::connect_timeout(&self.address, ANSWER_WITHIN)?;
        stream.set_read_timeout(Some(ANSWER_WITHIN))?;
        stream.set_nodelay(true)?;
        self.stream = Some(stream);
        self.sessions += 1;
        let session = if self.bugs.has_no_fence { 1 } else { self.sessions };
        self.call(OPEN, session, &[])?;
        for (block, content) in self.unflushed.clone() {
            self.call(WRITE, block, &content)?;
        }
        Ok(())
    }

    fn call(&mut self, operation: u32, block: u32, payload: &[u8]) -> Result<Vec<u8>> {
        let tag = self.tag();
        let stream = self.stream.as_mut().ok_or(ErrorKind::NotConnected)?;
        stream.write_all(&message(tag, (operation, block), payload))?;
        let (found, _, _, payload) = receive(stream)?;
        if found == tag {
            Ok(payload)
        } else {
            Err(ErrorKind::InvalidData.into())
        }
    }

    fn tag(&mut self) -> u32 {
        self.next_tag += 1;
        self.next_tag
    }
}
