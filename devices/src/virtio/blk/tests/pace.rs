//! A limited disk keeps its rate, on a clock of the test's own and with timers that ring late.

use std::os::fd::RawFd;

use coracle_storage::limit::SharedLimiter;
use coracle_storage::reactor::{Full, ImageFile, KernelOp, Patience, Reactor, Token, Wake};

use super::*;
use crate::virtio::blk::worker::Life;
use crate::virtio::testing::memory;

/// Plain system calls, under a clock that only a wait moves: to the timer, and beyond it by one of these delays.
struct Late {
    inner: Box<dyn Reactor>,
    clock: Arc<Mutex<Instant>>,
    deadline: Option<Instant>,
    delays: Vec<Duration>,
    waits: usize,
}

impl Submit for Late {
    fn submit(&mut self, op: KernelOp, token: Token) -> Result<(), Full> {
        self.inner.submit(op, token)
    }

    fn now(&self) -> Instant {
        *self.clock.lock().unwrap()
    }
}

impl Reactor for Late {
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
        self.deadline = deadline;
    }

    fn wait(&mut self, patience: Patience, wakes: &mut Vec<Wake>) -> std::io::Result<()> {
        let mut now = self.clock.lock().unwrap();
        if let (Patience::UntilEvent, Some(deadline)) = (patience, self.deadline) {
            self.waits += 1;
            *now = deadline.max(*now) + self.delays[self.waits % self.delays.len()];
            wakes.push(Wake::TimerExpired);
        } else {
            *now += Duration::from_micros(1);
        }
        self.inner.wait(Patience::None, wakes)
    }
}

const BLOCK_BYTES: u32 = 64 << 10;
const SECONDS: u64 = 5;

/// How many blocks a guest that always has some waiting reads at 100 MiB/s in buckets of 10 ms.
fn blocks_read(delays: &[Duration]) -> u64 {
    let start = Instant::now();
    let clock = Arc::new(Mutex::new(start));
    let bandwidth = TokenBucketConfig {
        size: 1 << 20,
        one_time_burst: None,
        refill_time: 10,
    };
    let limits = RateLimiterConfig {
        bandwidth: Some(bandwidth),
        ops: None,
    };
    let memory = memory(8 << 20);
    let mut driver = DriverRing::new(&memory, RING, QUEUE_SIZE);
    driver.write(REQUESTS, &header(VIRTIO_BLK_T_IN, 0));
    for _ in 0..64 {
        driver.offer_chain(&[
            Piece::Readable(REQUESTS, 16),
            Piece::Writable(REQUESTS + DATA, BLOCK_BYTES),
            Piece::Writable(REQUESTS + STATUS, 1),
        ]);
    }
    let limits = vec![Arc::new(SharedLimiter::new(&limits, start))];
    let mut hand = by_hand(Engine::Sync, CacheType::Unsafe, 0, limits, &driver, |inner| {
        Box::new(Late {
            inner,
            clock: Arc::clone(&clock),
            deadline: None,
            delays: delays.to_vec(),
            waits: 0,
        })
    });
    let mut blocks = 0;
    while *clock.lock().unwrap() < start + Duration::from_secs(SECONDS) {
        assert_eq!(hand.worker.round(), Life::GoesOn);
        while let Some((head, _)) = driver.take_used() {
            blocks += 1;
            driver.offer(u16::try_from(head).unwrap());
        }
    }
    blocks
}

#[test]
fn a_rate_is_kept_within_one_per_cent_at_a_refill_of_10_ms_whether_timers_are_late_or_not() {
    // The bucket is full at first.
    let asked = ((100 * SECONDS + 1) << 20) / u64::from(BLOCK_BYTES);
    let us = |us: &[u64]| us.iter().copied().map(Duration::from_micros).collect::<Vec<_>>();
    for delays in [
        us(&[0]),
        us(&[50, 80, 3000]),
        us(&[0, 9_000, 25_000, 100, 60_000]),
    ] {
        let blocks = blocks_read(&delays);
        assert!(
            blocks.abs_diff(asked) * 100 < asked,
            "{blocks} of {asked} with timers late by {delays:?}"
        );
    }
}
