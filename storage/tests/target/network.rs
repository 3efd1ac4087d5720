//! A target as the peer of a simulated network, which has little room and asks after everything that happens.

use std::time::Instant;

use coracle_storage::sim::dice::Dice;
use coracle_storage::sim::net::Peer;
use coracle_storage::sim::target::options::{Mishaps, Options, Pace};
use coracle_storage::sim::target::{Target, TargetPeer};

use super::client::{Client, Link, Transfer};
use super::{pattern, target, with_seed};

/// What a network does with a peer.
struct Line {
    peer: TargetPeer,
    now: Instant,
    room_bytes: usize,
}

impl Line {
    fn new(target: &Target) -> Self {
        Self {
            peer: TargetPeer::new(target),
            now: Instant::now(),
            room_bytes: 700,
        }
    }
}

impl Link for Line {
    fn receive(&mut self, bytes: &[u8]) {
        self.peer.receive(bytes, self.now);
    }

    fn transmit(&mut self) -> Vec<u8> {
        if let Some(alarm) = self.peer.alarm() {
            self.now = self.now.max(alarm);
            self.peer.wake(self.now);
            assert!(self.peer.alarm().is_none_or(|alarm| alarm > self.now));
        }
        let bytes = self.peer.send(self.room_bytes, self.now);
        assert!(bytes.len() <= self.room_bytes);
        bytes
    }

    fn is_busy(&self) -> bool {
        self.peer.alarm().is_some()
    }

    fn closed(&self) -> bool {
        self.peer.wants_close()
    }

    fn close(&mut self) {
        self.peer.closed();
    }
}

#[test]
fn everything_comes_through_little_room_and_then_the_target_sleeps() {
    for seed in 0..20 {
        let mut options = Options::draw(&mut Dice::new(seed));
        options.mishaps = Mishaps::default();
        let target = with_seed(options, seed);
        let line = Box::new(Line::new(&target));
        let mut client = Client::log_in_over(line, "iqn.x:a", 1, "").unwrap();
        while client.run(1, &[0], Transfer::Nothing).status != 0 {}
        let bytes = pattern(3, 60 * 512);
        assert_eq!(client.write(9, &bytes).status, 0);
        assert_eq!(client.read(9, 60).data, bytes);
        for _ in 0..100 {
            client.go_on();
        }
        assert!(!client.connection.is_busy(), "seed {seed}: nothing is left to do");
    }
}

#[test]
fn a_target_with_work_left_asks_to_be_woken() {
    let target = target(Options {
        pace: Pace::Dice,
        ..Options::default()
    });
    let mut line = Line::new(&target);
    assert_eq!((line.transmit(), line.is_busy()), (vec![], false));
    let mut client = Client::log_in_over(Box::new(line), "iqn.x:a", 1, "").unwrap();
    let mut wakes = 0;
    for _ in 0..20 {
        let tag = client.start(1, &[0], &Transfer::Nothing);
        while !client.has_ended(tag) {
            client.go_on();
            wakes += 1;
            assert!(client.has_ended(tag) || client.connection.is_busy());
        }
    }
    assert!(wakes > 30, "only {wakes}, though the dice take their time");
}

#[test]
fn a_peer_whose_target_has_crashed_closes() {
    let target = target(Options::default());
    let mut client = Client::log_in_over(Box::new(Line::new(&target)), "iqn.x:a", 1, "").unwrap();
    assert!(!client.connection.closed());
    target.crash();
    assert!(client.connection.transmit().is_empty());
    assert!(client.connection.closed());
}

#[test]
fn a_connection_that_is_gone_ends_its_session() {
    let target = target(Options::default());
    let mut client = Client::log_in_over(Box::new(Line::new(&target)), "iqn.x:a", 1, "").unwrap();
    assert_eq!(target.sessions().len(), 1);
    client.connection.close();
    assert!(target.sessions().is_empty());
}
