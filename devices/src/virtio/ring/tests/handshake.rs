//! Both ends of a queue on threads of their own, each asleep whenever it may be: a lost kick or interrupt hangs them.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::super::{Chain, FEATURE_EVENT_IDX, Virtqueue};
use crate::virtio::testing::{DriverRing, Piece, memory};
use crate::wait::wait;

const QUEUE_SIZE: u16 = 8;
const REQUESTS: u32 = 10_000;
/// How often the driver looks before it asks for an interrupt.
const LOOKS: u32 = 200;
/// Nobody sleeps this long unless a wake-up was lost.
const SLEEP_MS_MAX: u64 = 10_000;

/// Sleeps until `eventfd` is written.
fn sleep(eventfd: &EventFd, who: &str) {
    let started = Instant::now();
    wait(&[eventfd], Some(Duration::from_millis(SLEEP_MS_MAX)));
    assert!(
        started.elapsed() < Duration::from_millis(SLEEP_MS_MAX),
        "{who} was never woken"
    );
}

fn serve(mut ring: Virtqueue, kick: &EventFd, line: &EventFd) {
    let mut chain = Chain::default();
    let mut served = 0;
    while served < REQUESTS {
        while ring.pop(&mut chain).unwrap() {
            ring.push(chain.head, 1);
            served += 1;
        }
        ring.publish();
        if ring.needs_interrupt() {
            line.write(1).unwrap();
        }
        if served < REQUESTS && !ring.enable_kicks() {
            sleep(kick, "the device");
            ring.disable_kicks();
        }
    }
}

/// Keeps the queue as full as `depth` allows; sleeps only when there is nothing to take.
fn drive(mut driver: DriverRing, features: u64, depth: u32, (kick, line): (&EventFd, &EventFd)) {
    let (mut offered, mut taken) = (0, 0);
    while taken < REQUESTS {
        let before = u16::try_from(offered & 0xffff).unwrap();
        while offered < REQUESTS && offered - taken < depth {
            driver.offer_chain(&[Piece::Writable(0x8000, 1)]);
            offered += 1;
        }
        let after = u16::try_from(offered & 0xffff).unwrap();
        fence(Ordering::SeqCst);
        let wanted = if features & FEATURE_EVENT_IDX == 0 {
            driver.used_flags() & 1 == 0
        } else {
            after.wrapping_sub(driver.avail_event()).wrapping_sub(1) < after.wrapping_sub(before)
        };
        if after != before && wanted {
            kick.write(1).unwrap();
        }
        // Looking for a while puts the next offer close to the moment at which the device falls asleep.
        for _ in 0..LOOKS {
            while driver.take_used().is_some() {
                taken += 1;
            }
            if taken == offered {
                break;
            }
        }
        let position = u16::try_from(taken & 0xffff).unwrap();
        driver.set_used_event(position);
        fence(Ordering::SeqCst);
        if taken < offered && driver.used_index() == position {
            sleep(line, "the driver");
        }
    }
}

#[test]
fn no_kick_and_no_interrupt_is_lost_between_two_threads() {
    for (features, depth) in [(0, 1), (0, 8), (FEATURE_EVENT_IDX, 1), (FEATURE_EVENT_IDX, 8)] {
        let memory = memory(1 << 20);
        let driver = DriverRing::new(&memory, 0x1000, QUEUE_SIZE);
        let ring = Virtqueue::new(Arc::clone(&memory), driver.layout(), features).unwrap();
        let (kick, line) = (
            EventFd::new(EFD_NONBLOCK).unwrap(),
            EventFd::new(EFD_NONBLOCK).unwrap(),
        );
        std::thread::scope(|scope| {
            scope.spawn(|| serve(ring, &kick, &line));
            scope.spawn(|| drive(driver, features, depth, (&kick, &line)));
        });
    }
}
