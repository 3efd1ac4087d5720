//! The worker for a simulated guest, on a simulated host; `SEED=n make sim` repeats a seed.

mod guest;
mod ring;
mod wish;

use std::cell::RefCell;
use std::fs::File;
use std::rc::Rc;
use std::sync::Arc;

use coracle_storage::backend::{Access, Discard, Geometry};
use coracle_storage::limit::{RateLimiterConfig, SharedLimiter, TokenBucketConfig};
use coracle_storage::raw::Raw;
use coracle_storage::reactor::{FileSlot, Reactor};
use coracle_storage::sim::dice::Dice;
use coracle_storage::sim::medium::Medium;
use coracle_storage::sim::reactor::{Faults, SimReactor};
use coracle_storage::sim::seeds;

use super::super::cache::WriteCache;
use super::super::config::CacheType;
use super::super::lane::Drive;
use super::super::mailbox::Mailbox;
use super::super::metrics::BlkMetrics;
use super::super::worker::{DRAIN_MS_MAX, Life, Worker};
use crate::complaints::Complaints;
use guest::{Guest, Terms};

#[test]
fn a_simulated_guest_gets_each_answer_once_and_that_of_a_flush_after_its_sync() {
    seeds::run(3_000, simulate);
}

/// The one file of the image.
const FILE: FileSlot = FileSlot(0);

/// Rounds of the worker in one life at most.
const ROUNDS_MAX: u64 = 600;

fn simulate(seed: u64) {
    let mut dice = Dice::new(seed);
    let medium = Medium::default();
    let content = vec![1; 512 * (8 + dice.index(256))];
    medium.add(&content);
    let faults = Faults::draw(&mut dice);
    let io = SimReactor::new(&medium, dice.pick(&[1, 4, 64, 256]), faults, dice.split());
    let (mailbox, inbox) = Mailbox::new().unwrap();
    let terms = Terms {
        cache_type: dice.pick(&[
            CacheType::Writeback,
            CacheType::Writeback,
            CacheType::Writethrough,
        ]),
        limits: limits(&mut dice),
        faults,
        born: io.now(),
    };
    let drive = drive(&medium, &io, &terms);
    let mut worker = Worker::new(drive, inbox, DRAIN_MS_MAX).unwrap();
    let guest = Rc::new(RefCell::new(Guest::new(
        &content,
        io.clone(),
        mailbox,
        terms,
        dice.split(),
    )));
    // The guest knows the reactor; the reactor must not keep the guest.
    let world = Rc::downgrade(&guest);
    io.on_idle(move || {
        if let Some(guest) = world.upgrade() {
            guest.borrow_mut().worker_sleeps();
        }
    });
    for _ in 0..dice.below(ROUNDS_MAX) {
        assert_eq!(worker.round(), Life::GoesOn);
        guest.borrow_mut().act();
    }
    guest.borrow_mut().check_limits();
    // The power goes: whatever is in flight stays where it is.
    drop(worker);
    medium.crash(&mut dice);
    let left = medium.read(FILE, 0, medium.len_bytes(FILE));
    guest.borrow_mut().power_fails(&left);
}

fn drive(medium: &Medium, io: &SimReactor, terms: &Terms) -> Drive {
    let geometry = Geometry {
        size_bytes: medium.len_bytes(FILE),
        logical_block_bytes: 512,
        physical_block_bytes: 4096,
        access: Access::ReadWrite,
        discard: Discard::Supported,
    };
    Drive {
        io: Box::new(io.clone()),
        // The simulated reactor counts descriptors and looks at none.
        image: Box::new(Raw::new(File::open("/dev/null").unwrap(), geometry)),
        limits: vec![Arc::new(SharedLimiter::new(&terms.limits, terms.born))],
        cache: Arc::new(WriteCache::new(terms.cache_type)),
        metrics: Arc::new(BlkMetrics::default()),
        serial: *b"a simulated disk\0\0\0\0",
        complaints: Complaints::default(),
    }
}

fn limits(dice: &mut Dice) -> RateLimiterConfig {
    let mut bucket = |sizes: &[u64]| {
        let size = dice.pick(sizes);
        (size > 0).then_some(TokenBucketConfig {
            size,
            one_time_burst: None,
            refill_time: 10,
        })
    };
    RateLimiterConfig {
        bandwidth: bucket(&[0, 0, 0, 4096, 65536]),
        ops: bucket(&[0, 0, 0, 4, 50]),
    }
}
