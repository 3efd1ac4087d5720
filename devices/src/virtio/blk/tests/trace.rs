//! What a worker does in which order, seen from its reactor.

use std::os::fd::RawFd;
use std::sync::mpsc::{Receiver, Sender, channel};

use coracle_storage::reactor::{Full, ImageFile, KernelOp, Patience, Reactor, Token, Wake};

use super::*;
use crate::virtio::blk::worker::Life;
use crate::virtio::testing::memory;

/// What the reactor saw, with how many chains the driver had been given back by then.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Seen {
    Submitted { sync: bool, durable: bool, used: u16 },
    Completed { sync: bool, used: u16 },
}

/// A reactor that tells what passes through it.
struct Traced {
    inner: Box<dyn Reactor>,
    seen: Sender<Seen>,
    syncs: Vec<Token>,
    ring: DriverRing,
}

impl Submit for Traced {
    fn submit(&mut self, op: KernelOp, token: Token) -> Result<(), Full> {
        let sync = matches!(op, KernelOp::SyncData { .. });
        let durable = matches!(
            op,
            KernelOp::Write {
                durability: Durability::Durable,
                ..
            }
        );
        if sync {
            self.syncs.push(token);
        }
        let used = self.ring.used_index();
        self.seen.send(Seen::Submitted { sync, durable, used }).unwrap();
        self.inner.submit(op, token)
    }
}

impl Reactor for Traced {
    fn register(&mut self, files: &[ImageFile]) -> std::io::Result<()> {
        self.inner.register(files)
    }

    fn watch(&mut self, eventfd: RawFd, token: Token) -> std::io::Result<()> {
        self.inner.watch(eventfd, token)
    }

    fn unwatch(&mut self, token: Token) -> std::io::Result<()> {
        self.inner.unwatch(token)
    }

    fn set_timer(&mut self, deadline: Option<Instant>) {
        self.inner.set_timer(deadline);
    }

    fn wait(&mut self, patience: Patience, wakes: &mut Vec<Wake>) -> std::io::Result<()> {
        let before = wakes.len();
        self.inner.wait(patience, wakes)?;
        for wake in &wakes[before..] {
            if let Wake::Done(event) = wake {
                let at = self.syncs.iter().position(|token| *token == event.token);
                let sync = at.map(|at| self.syncs.remove(at)).is_some();
                let used = self.ring.used_index();
                self.seen.send(Seen::Completed { sync, used }).unwrap();
            }
        }
        Ok(())
    }
}

/// A worker whose reactor is traced.
struct Bench {
    hand: ByHand,
    driver: DriverRing,
    seen: Receiver<Seen>,
    requests: u64,
}

impl Bench {
    fn new(engine: Engine, cache_type: CacheType, features: u64) -> Self {
        let driver = DriverRing::new(&memory(8 << 20), RING, QUEUE_SIZE);
        let (sender, seen) = channel();
        let hand = by_hand(engine, cache_type, features, Vec::new(), &driver, |inner| {
            Box::new(Traced {
                inner,
                seen: sender,
                syncs: Vec::new(),
                ring: driver.same(),
            })
        });
        Self {
            hand,
            driver,
            seen,
            requests: 0,
        }
    }

    /// Sends requests of these kinds together, turns the worker until all are answered, and says what was seen.
    fn run(&mut self, kinds: &[u32]) -> Vec<Seen> {
        let goal = self.driver.used_index() + u16::try_from(kinds.len()).unwrap();
        for kind in kinds {
            let at = REQUESTS + self.requests * REQUEST_BYTES;
            self.driver.write(at, &header(*kind, 8 * self.requests));
            self.driver.write(at + DATA, &[7; 4096]);
            self.requests += 1;
            let status = Piece::Writable(at + STATUS, 1);
            let data = Piece::Readable(at + DATA, 4096);
            match *kind {
                VIRTIO_BLK_T_FLUSH => self.driver.offer_chain(&[Piece::Readable(at, 16), status]),
                _ => self.driver.offer_chain(&[Piece::Readable(at, 16), data, status]),
            };
        }
        self.hand.kick.write(1).unwrap();
        while self.driver.used_index() != goal {
            assert_eq!(self.hand.worker.round(), Life::GoesOn);
        }
        self.seen.try_iter().collect()
    }
}

fn the_sync_of_a_flush_completes_before_the_driver_sees_the_flush_used(engine: Engine) {
    let mut bench = Bench::new(engine, CacheType::Writeback, FEATURE_FLUSH);
    for _ in 0..20 {
        let before = bench.driver.used_index();
        let seen = bench.run(&[VIRTIO_BLK_T_OUT]);
        assert!(
            !seen.iter().any(|seen| matches!(
                seen,
                Seen::Submitted { sync: true, .. } | Seen::Submitted { durable: true, .. }
            )),
            "{seen:?}"
        );
        let seen = bench.run(&[VIRTIO_BLK_T_FLUSH]);
        let used = before + 1;
        let expected = [
            Seen::Submitted {
                sync: true,
                durable: false,
                used,
            },
            Seen::Completed { sync: true, used },
        ];
        assert_eq!(seen, expected, "and only then is the flush among the used");
        assert_eq!(bench.driver.used_index(), used + 1);
    }
}

fn each_write_of_a_drive_that_is_written_through_is_durable(engine: Engine) {
    let rows = [
        (CacheType::Writethrough, FEATURE_FLUSH, true),
        (CacheType::Writeback, 0, true),
        (CacheType::Writeback, FEATURE_FLUSH, false),
        (CacheType::Unsafe, 0, false),
    ];
    for (cache_type, features, expected) in rows {
        let mut bench = Bench::new(engine, cache_type, features);
        let seen = bench.run(&[VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_OUT]);
        let durable: Vec<bool> = seen
            .iter()
            .filter_map(|seen| match seen {
                Seen::Submitted { durable, .. } => Some(*durable),
                Seen::Completed { .. } => None,
            })
            .collect();
        assert_eq!(durable, [expected; 2], "{cache_type:?} {features:#x}");
        let mut written = [0; 4096];
        bench.hand.file.as_file().read_exact_at(&mut written, 0).unwrap();
        assert_eq!(written, [7; 4096]);
    }
}

#[test]
fn by_io_uring_the_sync_of_a_flush_completes_before_the_driver_sees_the_flush_used() {
    the_sync_of_a_flush_completes_before_the_driver_sees_the_flush_used(Engine::Async);
}

#[test]
fn by_plain_calls_the_sync_of_a_flush_completes_before_the_driver_sees_the_flush_used() {
    the_sync_of_a_flush_completes_before_the_driver_sees_the_flush_used(Engine::Sync);
}

#[test]
fn by_io_uring_each_write_of_a_drive_that_is_written_through_is_durable() {
    each_write_of_a_drive_that_is_written_through_is_durable(Engine::Async);
}

#[test]
fn by_plain_calls_each_write_of_a_drive_that_is_written_through_is_durable() {
    each_write_of_a_drive_that_is_written_through_is_durable(Engine::Sync);
}
