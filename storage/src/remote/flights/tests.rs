#![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

use super::*;
use crate::request::{Durability, Space};
use crate::segments;

struct Written(Request);

impl Flight for Written {
    fn accepted(&self) -> Instant {
        Instant::now()
    }

    fn request(&self) -> &Request {
        &self.0
    }

    fn into_request(self) -> Request {
        self.0
    }
}

const MIB: u64 = 1 << 20;

fn of(operation: Operation, len_bytes: u64) -> Written {
    Written(Request {
        tag: 0,
        operation,
        offset_bytes: 0,
        len_bytes,
        durability: Durability::Cached,
        segments: vec![],
    })
}

/// Accepts one, and says where it is.
fn accept(flights: &mut Flights<Written>, flight: Written) -> usize {
    flights.accept(flight);
    flights.pop().unwrap()
}

#[test]
fn copies_of_what_is_under_way_have_room_before_it_is_sent() {
    let mut flights = Flights::new(None, Arc::default());
    let mut retained = Retained::new(usize::try_from(2 * MIB).unwrap());
    let first = accept(&mut flights, of(Operation::Write, MIB));
    let second = accept(&mut flights, of(Operation::Write, MIB));
    let third = accept(&mut flights, of(Operation::Write, MIB));
    let read = accept(&mut flights, of(Operation::Read, 64 * MIB));
    assert!(flights.takes_room(first, &retained, false));
    assert!(flights.takes_room(second, &retained, false));
    assert!(!flights.takes_room(third, &retained, false));
    // It has it already, and is sent again.
    assert!(flights.takes_room(first, &retained, false));
    assert!(flights.takes_room(read, &retained, false));
    // Room comes back with the end, however that is.
    flights.end(second, Err(Failure::Host(libc::EIO)), Instant::now());
    assert!(flights.takes_room(third, &retained, false));
    flights.end(third, Ok(()), Instant::now());
    retained.keep(0, &[segments::own(&mut vec![1; 1 << 19])]);
    let fourth = accept(&mut flights, of(Operation::Write, MIB));
    assert!(!flights.takes_room(fourth, &retained, false));
}

#[test]
fn a_write_that_is_longer_than_all_room_goes_alone() {
    let mut flights = Flights::new(None, Arc::default());
    let mut retained = Retained::new(1 << 20);
    let long = accept(&mut flights, of(Operation::Write, 4 * MIB));
    let next = accept(&mut flights, of(Operation::Write, 4 * MIB));
    assert!(flights.takes_room(long, &retained, false));
    assert!(!flights.takes_room(next, &retained, false));
    flights.end(long, Ok(()), Instant::now());
    retained.keep(0, &[segments::own(&mut vec![1; 512])]);
    assert!(!flights.takes_room(next, &retained, false));
    retained.covered(retained.now());
    assert!(flights.takes_room(next, &retained, false));
}

#[test]
fn what_is_zeroed_takes_room_as_well_or_it_would_be_kept_without_end() {
    let mut flights = Flights::new(None, Arc::default());
    let mut retained = Retained::new(1);
    retained.keep_zeroes(0, 512, Space::Stays);
    let mut retained = Retained::new(2 * retained.bytes());
    let zeroes = Operation::WriteZeroes { space: Space::Stays };
    for operation in [Operation::Discard, zeroes] {
        let zeroed = accept(&mut flights, of(operation, MIB));
        assert!(flights.takes_room(zeroed, &retained, false));
        retained.keep_zeroes(0, MIB, Space::Stays);
        flights.end(zeroed, Ok(()), Instant::now());
    }
    let next = accept(&mut flights, of(Operation::Discard, MIB));
    assert!(!flights.takes_room(next, &retained, false));
    // Nor does one write after the other go past the limit because no bytes are kept.
    let write = accept(&mut flights, of(Operation::Write, MIB));
    assert!(!flights.takes_room(write, &retained, false));
    retained.covered(retained.now());
    assert!(flights.takes_room(next, &retained, false));
}

#[test]
fn a_long_write_is_not_overtaken_by_short_ones_for_ever() {
    let mut flights = Flights::new(None, Arc::default());
    let retained = Retained::new(usize::try_from(2 * MIB).unwrap());
    let short = accept(&mut flights, of(Operation::Write, 4096));
    assert!(flights.takes_room(short, &retained, false));
    let long = accept(&mut flights, of(Operation::Write, 2 * MIB));
    let later = accept(&mut flights, of(Operation::Write, 4096));
    let flush = accept(&mut flights, of(Operation::Flush, 0));
    assert!(!flights.takes_room(long, &retained, false));
    assert!(!flights.takes_room(later, &retained, true));
    assert!(flights.takes_room(flush, &retained, true));
    // What has room already is sent again.
    assert!(flights.takes_room(short, &retained, true));
    flights.end(short, Ok(()), Instant::now());
    assert!(flights.takes_room(long, &retained, false));
}
