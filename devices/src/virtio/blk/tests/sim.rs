//! The worker for a simulated guest, on a simulated host; `SEED=n make sim` repeats a seed.

mod guest;
mod ring;
mod wish;

use std::cell::RefCell;
use std::rc::Rc;
use std::sync::Arc;

use coracle_storage::backend::Backend;
use coracle_storage::limit::{RateLimiterConfig, SharedLimiter, TokenBucketConfig};
use coracle_storage::reactor::Submit;
use coracle_storage::sim::dice::Dice;
use coracle_storage::sim::image::{self, KINDS};
use coracle_storage::sim::medium::Medium;
use coracle_storage::sim::reactor::{Faults, SimReactor};
use coracle_storage::sim::seeds;

use super::super::cache::WriteCache;
use super::super::config::CacheType;
use super::super::lane::Drive;
use super::super::loss::LossSignal;
use super::super::mailbox::Mailbox;
use super::super::metrics::BlkMetrics;
use super::super::worker::{DRAIN_MS_MAX, Life, Worker};
use crate::complaints::Complaints;
use guest::{Guest, Terms};

#[test]
fn a_simulated_guest_gets_each_answer_once_and_that_of_a_flush_after_its_sync() {
    seeds::run(3_000, simulate);
}

/// Rounds of the worker in one life at most.
const ROUNDS_MAX: u64 = 600;

fn simulate(seed: u64) {
    let mut dice = Dice::new(seed);
    let medium = Medium::default();
    let kind = &KINDS[dice.index(KINDS.len())];
    let content = (kind.create)(&medium, &mut dice);
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
    let drive = drive((kind.open)(&medium), &io, &terms);
    let mut worker = Worker::new(drive, inbox, DRAIN_MS_MAX)
        .map_err(|born| born.error)
        .unwrap();
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
    let sound = SimReactor::new(&medium, 8, Faults::default(), dice.split());
    let left = image::content((kind.open)(&medium).as_mut(), sound);
    guest.borrow_mut().power_fails(&left);
}

fn drive(image: Box<dyn Backend>, io: &SimReactor, terms: &Terms) -> Drive {
    Drive {
        io: Box::new(io.clone()),
        image,
        limits: vec![Arc::new(SharedLimiter::new(&terms.limits, terms.born))],
        cache: Arc::new(WriteCache::new(terms.cache_type)),
        metrics: Arc::new(BlkMetrics::default()),
        loss: LossSignal::new("simulated").unwrap(),
        changes: Arc::default(),
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
