//! The entropy device from a driver's side.
#![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use coracle_storage::limit::{RateLimiterConfig, TokenBucketConfig};

use super::*;
use crate::virtio::conformance::{BUFFERS, Subject, conforms};
use crate::virtio::device::VirtioDevice;
use crate::virtio::testing::{DriverRing, Piece, memory, session};

/// Offers `pieces` to a device of `config`, and waits for the answer.
fn ask(config: &EntropyConfig, chains: &[&[Piece]]) -> (Entropy, DriverRing, Vec<(u32, u32)>) {
    let memory = memory(1 << 20);
    let mut driver = DriverRing::new(&memory, 0x1000, 16);
    for pieces in chains {
        driver.offer_chain(pieces);
    }
    let mut device = Entropy::new(config).unwrap();
    device.start(session(&driver)).unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut used = Vec::new();
    while used.len() < chains.len() {
        assert!(Instant::now() < deadline, "only {used:?} came back");
        used.extend(driver.take_used());
        std::thread::sleep(Duration::from_micros(100));
    }
    (device, driver, used)
}

#[test]
fn the_entropy_device_keeps_the_promises_of_every_device() {
    conforms(&Subject {
        make: || Box::new(Entropy::new(&EntropyConfig::default()).unwrap()),
        offer: |driver| {
            driver.offer_chain(&[Piece::Writable(BUFFERS, 64)]);
        },
        writes_buffers: true,
    });
}

#[test]
fn a_request_is_filled_with_random_bytes_to_its_end_and_not_beyond() {
    let pieces = [
        Piece::Writable(BUFFERS, 1),
        Piece::Writable(BUFFERS + 0x100, 5000),
    ];
    let (device, driver, used) = ask(&EntropyConfig::default(), &[&pieces]);
    assert_eq!(used, [(0, 5001)]);
    let bytes = driver.read(BUFFERS + 0x100, 5001);
    let (filled, beyond) = bytes.split_at(5000);
    assert!(
        filled
            .chunks_exact(50)
            .all(|chunk| chunk.iter().any(|byte| *byte != 0))
    );
    assert_eq!(beyond, [0]);
    assert_eq!(device.counts().bytes.load(Ordering::Relaxed), 5001);
}

#[test]
fn a_large_request_is_answered_in_part() {
    let (_, driver, used) = ask(
        &EntropyConfig::default(),
        &[&[Piece::Writable(BUFFERS, 0x4_0000)]],
    );
    assert_eq!(used, [(0, 0x1_0000)]);
    assert_eq!(driver.read(BUFFERS + REQUEST_BYTES_MAX, 64), [0; 64]);
}

#[test]
fn what_the_device_may_only_read_is_left_alone() {
    let (_, driver, used) = ask(&EntropyConfig::default(), &[&[Piece::Readable(BUFFERS, 64)]]);
    assert_eq!(used, [(0, 0)]);
    assert_eq!(driver.read(BUFFERS, 64), [0; 64]);
}

fn limited(size: u64, refill_time: u64) -> EntropyConfig {
    let bandwidth = Some(TokenBucketConfig {
        size,
        one_time_burst: None,
        refill_time,
    });
    EntropyConfig {
        rate_limiter: Some(RateLimiterConfig { bandwidth, ops: None }),
    }
}

#[test]
fn a_limited_device_makes_the_guest_wait() {
    let started = Instant::now();
    let chains: [&[Piece]; 3] = [&[Piece::Writable(BUFFERS, 100)]; 3];
    let (device, _, _) = ask(&limited(100, 50), &chains);
    assert!(
        started.elapsed() >= Duration::from_millis(100),
        "two refills of 50 ms"
    );
    assert!(
        device.counts().throttled.load(Ordering::Relaxed) >= 2,
        "and counts it"
    );
}

#[test]
fn a_device_that_waits_for_its_limiter_stops_at_once_and_leaves_the_request_in_the_ring() {
    let (mut device, mut driver, _) = ask(&limited(100, 1_000_000), &[&[Piece::Writable(BUFFERS, 100)]]);
    driver.offer_chain(&[Piece::Writable(BUFFERS, 100)]);
    let session = device.stop().unwrap().unwrap();
    device.start(session).unwrap();
    let deadline = Instant::now() + Duration::from_secs(10);
    while device.counts().throttled.load(Ordering::Relaxed) == 0 {
        assert!(Instant::now() < deadline, "the limiter was never asked");
        std::thread::sleep(Duration::from_micros(100));
    }
    let started = Instant::now();
    let session = device.stop().unwrap().unwrap();
    assert!(started.elapsed() < Duration::from_secs(5));
    let ring = &session.queues.first().unwrap().as_ref().unwrap().ring;
    assert_eq!(ring.in_flight(), 0);
    assert!(ring.has_available());
}
