//! All connections of a device, by their ports; and what the guest has to be told, in turns.

use std::collections::{BTreeMap, VecDeque};
use std::ffi::OsString;
use std::ops::RangeInclusive;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::time::{Duration, Instant};

use coracle_storage::request::Segment;
use rustix::event::{PollFd, PollFlags};

use super::connection::{Connection, Fate, Key, Said};
use super::packet::{HOST_CID, Header, TYPE_STREAM, op};
use super::socket::Stream;
use crate::virtio::segments;

/// Most connections of a guest.
pub(super) const CONNECTIONS_MAX: usize = 1023;
/// Packets that say to the guest that there is no such connection, before nothing more is taken from it.
const RESETS_MAX: usize = 256;
/// The ports that callers of the host get.
pub(super) const HOST_PORTS: RangeInclusive<u32> = 1 << 30..=(1 << 31) - 1;

/// What a socket device has done, for metrics.
#[derive(Debug, Default)]
pub struct VsockCounts {
    /// Packets that the guest was given.
    pub rx_packets: AtomicU64,
    /// Bytes of data in them.
    pub rx_bytes: AtomicU64,
    /// Times that a socket of the host could not be read.
    pub rx_read_fails: AtomicU64,
    /// Buffers for packets that made no sense.
    pub rx_guest_faults: AtomicU64,
    /// Packets that the guest has sent.
    pub tx_packets: AtomicU64,
    /// Bytes of data in them.
    pub tx_bytes: AtomicU64,
    /// Times that a socket of the host did not take what the guest sent.
    pub tx_write_fails: AtomicU64,
    /// Times that it did not take what was kept for it.
    pub tx_flush_fails: AtomicU64,
    /// Packets that made no sense, and rings that broke.
    pub tx_guest_faults: AtomicU64,
    /// Connections made.
    pub conns_added: AtomicU64,
    /// Connections that are over, in whatever way.
    pub conns_removed: AtomicU64,
    /// Those of them that have waited for too long.
    pub conns_killed: AtomicU64,
}

#[derive(Debug)]
pub(super) struct Connections {
    by_ports: BTreeMap<Key, Connection>,
    /// Those that have something to say; each once.
    speakers: VecDeque<Key>,
    /// What is to be said of connections that are over.
    resets: VecDeque<Header>,
    guest_cid: u64,
    /// The port of the next caller, where whoever saves the device finds it.
    next_port: Arc<AtomicU32>,
    /// From which the paths for ports of the host come.
    path: OsString,
    counts: Arc<VsockCounts>,
}

impl Connections {
    pub(super) fn new(
        guest_cid: u32,
        next_port: Arc<AtomicU32>,
        path: OsString,
        counts: Arc<VsockCounts>,
    ) -> Self {
        Self {
            by_ports: BTreeMap::new(),
            speakers: VecDeque::new(),
            resets: VecDeque::new(),
            guest_cid: guest_cid.into(),
            next_port,
            path,
            counts,
        }
    }

    /// Forgets them all: the guest's driver has begun anew.
    pub(super) fn clear(&mut self) {
        self.counts
            .conns_removed
            .fetch_add(self.by_ports.len() as u64, Relaxed);
        self.by_ports.clear();
        self.speakers.clear();
        self.resets.clear();
    }

    /// Whether another packet of the guest may be taken: what it leads to has to be kept until the guest has room for it.
    pub(super) fn has_room(&self) -> bool {
        self.resets.len() < RESETS_MAX
    }

    /// Whether another connection may be made.
    pub(super) fn is_full(&self) -> bool {
        self.by_ports.len() >= CONNECTIONS_MAX
    }

    /// A program of the host wants to reach this port of the guest.
    pub(super) fn call(&mut self, stream: Stream, guest_port: u32, now: Instant) {
        // There are more ports than connections.
        let host_port = loop {
            let port = self.next_port.load(Relaxed);
            let after = if HOST_PORTS.contains(&(port + 1)) {
                port + 1
            } else {
                *HOST_PORTS.start()
            };
            self.next_port.store(after, Relaxed);
            if self.by_ports.range((port, 0)..=(port, u32::MAX)).next().is_none() {
                break port;
            }
        };
        self.add((host_port, guest_port), Connection::asked_by_host(stream, now));
    }

    /// Takes a packet of the guest's, whose data is in `data`.
    pub(super) fn take(&mut self, header: &Header, data: &mut Vec<Segment>) {
        self.counts.tx_packets.fetch_add(1, Relaxed);
        if header.src_cid != self.guest_cid {
            self.counts.tx_guest_faults.fetch_add(1, Relaxed);
            return;
        }
        if header.dst_cid != HOST_CID || header.kind != TYPE_STREAM {
            self.refuse(header);
            return;
        }
        let key = (header.dst_port, header.src_port);
        let fate = match self.by_ports.get_mut(&key) {
            Some(connection) => connection.take(header, data, &self.counts, key),
            None if header.op == op::REQUEST => return self.connect(key, header),
            None => return self.refuse(header),
        };
        self.settle(key, fate);
    }

    /// The guest wants to reach a program of the host.
    fn connect(&mut self, key: Key, request: &Header) {
        if self.is_full() {
            return self.refuse(request);
        }
        let mut path = self.path.clone();
        path.push(format!("_{}", request.dst_port));
        match Stream::connect(Path::new(&path)) {
            Ok(stream) => self.add(key, Connection::asked_by_guest(stream, request)),
            Err(error) => {
                log::debug!(
                    "nobody takes the guest's call of port {}: {error}",
                    request.dst_port
                );
                self.refuse(request);
            }
        }
    }

    fn refuse(&mut self, header: &Header) {
        // Or two would tell each other for ever.
        if header.op != op::RST {
            self.resets.push_back(header.reset());
        }
    }

    fn add(&mut self, key: Key, connection: Connection) {
        self.counts.conns_added.fetch_add(1, Relaxed);
        self.by_ports.insert(key, connection);
        self.settle(key, Fate::Lives);
    }

    /// Has the connection have its turn if it has something to say, or end.
    fn settle(&mut self, key: Key, fate: Fate) {
        let Some(connection) = self.by_ports.get_mut(&key) else {
            return;
        };
        if fate == Fate::Lives {
            if !connection.is_queued && connection.has_news() {
                connection.is_queued = true;
                self.speakers.push_back(key);
            }
            return;
        }
        if connection.is_queued {
            self.speakers.retain(|speaker| *speaker != key);
        }
        self.by_ports.remove(&key);
        self.counts.conns_removed.fetch_add(1, Relaxed);
        if fate == Fate::Resets {
            let (host_port, guest_port) = key;
            self.resets.push_back(Header {
                src_cid: HOST_CID,
                dst_cid: self.guest_cid,
                src_port: host_port,
                dst_port: guest_port,
                kind: TYPE_STREAM,
                op: op::RST,
                ..Header::default()
            });
        }
    }

    /// Whether there is something to say to the guest.
    pub(super) fn has_news(&self) -> bool {
        !self.resets.is_empty() || !self.speakers.is_empty()
    }

    /// Writes the next packet into `room`, which has room for a header: how many bytes of data it has, or why it is none.
    pub(super) fn say(&mut self, room: &[Segment], scratch: &mut Vec<Segment>) -> Said {
        loop {
            if let Some(reset) = self.resets.pop_front() {
                segments::scatter(room, 0, &reset.bytes());
                return Said::Packet(0);
            }
            let Some(key) = self.speakers.pop_front() else {
                return Said::Nothing;
            };
            let Some(connection) = self.by_ports.get_mut(&key) else {
                continue;
            };
            connection.is_queued = false;
            let said = connection.say(key, self.guest_cid, room, scratch);
            let fate = match said {
                Said::Broken => {
                    self.counts.rx_read_fails.fetch_add(1, Relaxed);
                    Fate::Resets
                }
                _ => Fate::Lives,
            };
            self.settle(key, fate);
            if matches!(said, Said::Packet(_) | Said::TooSmall) {
                return said;
            }
        }
    }

    /// What is waited for, of each that may be waited for.
    pub(super) fn interests(&self) -> impl Iterator<Item = (Key, PollFd<'_>)> {
        self.by_ports
            .iter()
            .filter_map(|(key, connection)| Some((*key, connection.interest()?)))
    }

    /// What was found of one of them.
    pub(super) fn found(&mut self, key: Key, flags: PollFlags) {
        if let Some(connection) = self.by_ports.get_mut(&key) {
            let fate = connection.found(flags, &self.counts);
            self.settle(key, fate);
        }
    }

    /// When [`Self::expire`] is due.
    pub(super) fn until(&self) -> Option<Instant> {
        self.by_ports.values().filter_map(Connection::until).min()
    }

    /// Nothing waits for so much of the time that was.
    pub(super) fn postpone(&mut self, by: Duration) {
        self.by_ports
            .values_mut()
            .for_each(|connection| connection.postpone(by));
    }

    /// Ends what has waited for too long.
    pub(super) fn expire(&mut self, now: Instant) {
        let is_late = |connection: &Connection| connection.until().is_some_and(|until| until <= now);
        let late = self.by_ports.iter().filter(|(_, connection)| is_late(connection));
        let late: Vec<Key> = late.map(|(key, _)| *key).collect();
        for key in late {
            if let Some(connection) = self.by_ports.get_mut(&key) {
                let fate = connection.expire();
                self.counts.conns_killed.fetch_add(1, Relaxed);
                self.settle(key, fate);
            }
        }
    }
}
