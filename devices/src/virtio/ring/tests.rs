//! A virtqueue between a driver of our own and garbage.
#![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

mod dirty;
mod handshake;

use proptest::prelude::*;
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::*;
use crate::virtio::segments::{gather, len_bytes, scatter};
use crate::virtio::testing::{DriverRing, INDIRECT, NEXT, Piece, WRITE, memory};

const MEMORY_BYTES: usize = 1 << 20;
const BUFFERS: u64 = 0x8_0000;

fn queue(size: u16, features: u64) -> (DriverRing, Virtqueue) {
    let memory = memory(MEMORY_BYTES);
    let driver = DriverRing::new(&memory, 0x1000, size);
    let ring = Virtqueue::new(memory, driver.layout(), features).unwrap();
    (driver, ring)
}

fn pop(ring: &mut Virtqueue) -> Result<Option<Chain>, PopError> {
    let mut chain = Chain::default();
    ring.pop(&mut chain).map(|some| some.then_some(chain))
}

fn fault(ring: &mut Virtqueue) -> ChainFault {
    match pop(ring).unwrap_err() {
        PopError::Malformed { fault, .. } => fault,
        PopError::Broken(fault) => panic!("the ring broke: {fault}"),
    }
}

#[test]
fn a_chain_arrives_as_segments_and_goes_back_with_its_length() {
    let (mut driver, mut ring) = queue(8, 0);
    driver.write(BUFFERS, b"header");
    let head = driver.offer_chain(&[
        Piece::Readable(BUFFERS, 6),
        Piece::Writable(BUFFERS + 0x100, 512),
        Piece::Writable(BUFFERS + 0x400, 1),
    ]);

    let chain = pop(&mut ring).unwrap().unwrap();
    assert_eq!(chain.head, head);
    let mut header = [0; 6];
    assert_eq!(gather(&chain.readable, 0, &mut header), 6);
    assert_eq!(&header, b"header");
    assert_eq!(
        chain.writable.iter().map(Segment::len_bytes).collect::<Vec<_>>(),
        [512, 1]
    );
    assert!(pop(&mut ring).unwrap().is_none());

    assert_eq!(scatter(&chain.writable, 510, b"end"), 3);
    assert_eq!(driver.read(BUFFERS + 0x100 + 510, 2), b"en");
    assert_eq!(driver.read(BUFFERS + 0x400, 2), b"d\0");
    ring.push(head, 513);
    assert_eq!(driver.take_used(), None, "not before it is published");
    ring.publish();
    assert_eq!(driver.take_used(), Some((u32::from(head), 513)));
    assert_eq!(driver.take_used(), None);
}

#[test]
fn the_ring_goes_on_past_the_wrap_of_its_indices() {
    let (mut driver, mut ring) = queue(4, FEATURE_EVENT_IDX);
    for round in 0..70_000_u32 {
        driver.offer_chain(&[Piece::Writable(BUFFERS, 16)]);
        let chain = pop(&mut ring).unwrap().unwrap();
        ring.push(chain.head, round);
        ring.publish();
        assert_eq!(driver.take_used(), Some((u32::from(chain.head), round)));
    }
}

#[test]
fn an_indirect_chain_may_follow_direct_descriptors_and_lie_at_an_odd_address() {
    let (mut driver, mut ring) = queue(8, FEATURE_INDIRECT_DESC);
    for table in [0x2_0000, 0x3_0001] {
        driver.offer_indirect(
            table,
            &[Piece::Readable(BUFFERS, 16), Piece::Writable(BUFFERS + 16, 4096)],
        );
        let chain = pop(&mut ring).unwrap().unwrap();
        assert_eq!(
            (len_bytes(&chain.readable), len_bytes(&chain.writable)),
            (16, 4096)
        );
    }
    driver.descriptor_at(0x2_0000, 0, (BUFFERS, 7, WRITE, 0));
    driver.descriptor(4, (BUFFERS, 5, NEXT, 5));
    driver.descriptor(5, (0x2_0000, 16, INDIRECT | WRITE, 0));
    driver.offer(4);
    let chain = pop(&mut ring).unwrap().unwrap();
    assert_eq!((len_bytes(&chain.readable), len_bytes(&chain.writable)), (5, 7));
}

#[test]
fn an_indirect_table_may_be_longer_than_the_queue() {
    let (mut driver, mut ring) = queue(4, FEATURE_INDIRECT_DESC);
    driver.offer_indirect(0x2_0000, &[Piece::Writable(BUFFERS, 4096); CHAIN_SEGMENTS_MAX]);
    assert_eq!(
        pop(&mut ring).unwrap().unwrap().writable.len(),
        CHAIN_SEGMENTS_MAX
    );
}

#[test]
fn indirect_descriptors_are_refused_where_none_are_allowed() {
    let (mut driver, mut ring) = queue(8, 0);
    driver.offer_indirect(0x2_0000, &[Piece::Readable(BUFFERS, 16)]);
    assert_eq!(fault(&mut ring), ChainFault::IndirectNotAllowed, "not negotiated");

    let (mut driver, mut ring) = queue(8, FEATURE_INDIRECT_DESC);
    driver.descriptor_at(0x2_0000, 0, (0x2_1000, 16, INDIRECT, 0));
    driver.descriptor(0, (0x2_0000, 16, INDIRECT, 0));
    driver.offer(0);
    assert_eq!(fault(&mut ring), ChainFault::IndirectNotAllowed, "nested");
    driver.descriptor(0, (0x2_0000, 16, INDIRECT | NEXT, 1));
    driver.offer(0);
    assert_eq!(fault(&mut ring), ChainFault::IndirectNotAllowed, "with a next");
}

#[test]
fn an_indirect_table_of_a_wrong_length_or_place_is_refused() {
    let (mut driver, mut ring) = queue(8, FEATURE_INDIRECT_DESC);
    let end = MEMORY_BYTES as u64;
    let too_long = 16 * (u32::try_from(INDIRECT_DESCRIPTORS_MAX).unwrap() + 1);
    for (address, len_bytes) in [
        (0x2_0000, 0),
        (0x2_0000, 17),
        (0x2_0000, too_long),
        (end - 16, 32),
    ] {
        driver.descriptor(0, (address, len_bytes, INDIRECT, 0));
        driver.offer(0);
        assert_eq!(fault(&mut ring), ChainFault::IndirectTable { address, len_bytes });
    }
}

#[test]
fn a_loop_ends_as_a_malformed_chain_and_the_next_chain_is_served() {
    let (mut driver, mut ring) = queue(8, 0);
    driver.descriptor(6, (BUFFERS, 16, NEXT, 7));
    driver.descriptor(7, (BUFFERS, 16, NEXT, 6));
    driver.offer(6);
    driver.offer_chain(&[Piece::Writable(BUFFERS, 16)]);
    assert_eq!(
        pop(&mut ring).unwrap_err(),
        PopError::Malformed {
            head: 6,
            fault: ChainFault::TooLong
        }
    );
    ring.push(6, 0);
    assert_eq!(pop(&mut ring).unwrap().unwrap().head, 0);
}

#[test]
fn chains_that_break_the_rules_are_named_by_what_is_wrong() {
    let (mut driver, mut ring) = queue(8, 0);
    driver.descriptor(0, (BUFFERS, 16, NEXT, 8));
    driver.offer(0);
    assert_eq!(fault(&mut ring), ChainFault::NextOutOfRange(8));
    driver.offer_chain(&[Piece::Writable(BUFFERS, 16), Piece::Readable(BUFFERS, 16)]);
    assert_eq!(fault(&mut ring), ChainFault::ReadableAfterWritable);
    driver.offer_chain(&[Piece::Readable(MEMORY_BYTES as u64 - 8, 16)]);
    assert_eq!(fault(&mut ring), ChainFault::NotMemory(MEMORY_BYTES as u64));
    driver.offer_chain(&[Piece::Readable(u64::MAX - 8, u32::MAX)]);
    assert_eq!(fault(&mut ring), ChainFault::NotMemory(u64::MAX - 8));
}

#[test]
fn more_than_four_gibibytes_in_one_chain_are_refused() {
    let memory = memory(8 << 20);
    let mut driver = DriverRing::new(&memory, 0x1000, 1024);
    let mut ring = Virtqueue::new(memory, driver.layout(), 0).unwrap();
    driver.offer_chain(&[Piece::Writable(0, 8 << 20); 512]);
    assert_eq!(len_bytes(&pop(&mut ring).unwrap().unwrap().writable), 1 << 32);
    driver.offer_chain(&[Piece::Writable(0, 8 << 20); 513]);
    assert_eq!(fault(&mut ring), ChainFault::TooLarge);
}

#[test]
fn a_descriptor_across_two_regions_is_split() {
    let regions = [(GuestAddress(0), 0x1_0000), (GuestAddress(0x1_0000), 0x1_0000)];
    let memory = Arc::new(GuestMemoryMmap::from_ranges(&regions).unwrap());
    let mut driver = DriverRing::new(&memory, 0x1000, 8);
    let mut ring = Virtqueue::new(Arc::clone(&memory), driver.layout(), 0).unwrap();
    driver.write(0xfffe, b"abcd");
    driver.offer_chain(&[Piece::Readable(0xfffe, 4)]);
    let chain = pop(&mut ring).unwrap().unwrap();
    assert_eq!(
        chain.readable.iter().map(Segment::len_bytes).collect::<Vec<_>>(),
        [2, 2]
    );
    let mut bytes = [0; 4];
    gather(&chain.readable, 0, &mut bytes);
    assert_eq!(&bytes, b"abcd");
    let straddling = QueueLayout {
        descriptors: 0xfff0,
        ..driver.layout()
    };
    assert_eq!(
        Virtqueue::new(memory, straddling, 0).unwrap_err(),
        RingError::Area {
            area: "descriptor table",
            address: 0xfff0
        }
    );
}

#[test]
fn layouts_that_the_standard_forbids_are_refused() {
    let memory = memory(MEMORY_BYTES);
    let good = DriverRing::new(&memory, 0x1000, 8).layout();
    let refused = |layout| Virtqueue::new(Arc::clone(&memory), layout, 0).unwrap_err();
    for size in [0, 3, 0x8001] {
        assert_eq!(refused(QueueLayout { size, ..good }), RingError::Size(size));
    }
    for address in [8, MEMORY_BYTES as u64 - 16, !15] {
        let area = RingError::Area {
            area: "descriptor table",
            address,
        };
        assert_eq!(
            refused(QueueLayout {
                descriptors: address,
                ..good
            }),
            area
        );
    }
    for address in [1, MEMORY_BYTES as u64 - 20, u64::MAX - 1] {
        let area = RingError::Area {
            area: "available ring",
            address,
        };
        assert_eq!(
            refused(QueueLayout {
                avail: address,
                ..good
            }),
            area
        );
    }
    for address in [2, MEMORY_BYTES as u64 - 68, u64::MAX - 3] {
        let area = RingError::Area {
            area: "used ring",
            address,
        };
        assert_eq!(
            refused(QueueLayout {
                used: address,
                ..good
            }),
            area
        );
    }
    Virtqueue::new(
        Arc::clone(&memory),
        QueueLayout {
            used: MEMORY_BYTES as u64 - 72,
            ..good
        },
        0,
    )
    .unwrap();
}

#[test]
fn an_index_that_jumps_breaks_the_ring_for_good() {
    let (mut driver, mut ring) = queue(8, 0);
    driver.set_avail_index(9);
    let broken = PopError::Broken(RingFault::AvailIndex {
        from: 0,
        to: 9,
        size: 8,
        in_flight: 0,
    });
    assert_eq!(pop(&mut ring).unwrap_err(), broken);
    assert_eq!(pop(&mut ring).unwrap_err(), broken);
    assert!(ring.enable_kicks(), "and nobody goes to sleep over it");
}

#[test]
fn a_driver_cannot_have_more_chains_in_flight_than_descriptors() {
    let (mut driver, mut ring) = queue(4, 0);
    for _ in 0..4 {
        driver.offer_chain(&[Piece::Writable(BUFFERS, 1)]);
        pop(&mut ring).unwrap().unwrap();
    }
    driver.offer(0);
    let broken = RingFault::AvailIndex {
        from: 4,
        to: 5,
        size: 4,
        in_flight: 4,
    };
    assert_eq!(pop(&mut ring).unwrap_err(), PopError::Broken(broken));
}

#[test]
fn a_head_beyond_the_table_breaks_the_ring() {
    let (mut driver, mut ring) = queue(8, 0);
    driver.offer(8);
    let broken = PopError::Broken(RingFault::Head { head: 8, size: 8 });
    assert_eq!(pop(&mut ring).unwrap_err(), broken);
    assert_eq!(pop(&mut ring).unwrap_err(), broken);
}

#[test]
#[should_panic(expected = "given back once")]
fn giving_a_chain_back_twice_is_our_own_bug() {
    let (_, mut ring) = queue(8, 0);
    ring.push(0, 0);
}

/// Serves `count` chains in one batch and says whether an interrupt is due.
fn serve(driver: &mut DriverRing, ring: &mut Virtqueue, count: usize) -> bool {
    for _ in 0..count {
        driver.offer_chain(&[Piece::Writable(BUFFERS, 1)]);
        let chain = pop(ring).unwrap().unwrap();
        ring.push(chain.head, 1);
    }
    ring.publish();
    ring.needs_interrupt()
}

#[test]
fn without_event_idx_the_flag_decides_about_interrupts() {
    let (mut driver, mut ring) = queue(8, 0);
    assert!(!ring.needs_interrupt(), "nothing was used");
    assert!(serve(&mut driver, &mut ring, 3));
    assert!(!ring.needs_interrupt(), "reported already");
    driver.set_avail_flags(1);
    assert!(!serve(&mut driver, &mut ring, 1));
}

#[test]
fn with_event_idx_an_interrupt_comes_when_the_index_steps_over_the_event() {
    let (mut driver, mut ring) = queue(8, FEATURE_EVENT_IDX);
    driver.set_avail_flags(1);
    assert!(
        serve(&mut driver, &mut ring, 1),
        "the event is 0 and the flag does not count"
    );
    driver.set_used_event(3);
    assert!(
        !serve(&mut driver, &mut ring, 2),
        "used index 3: not beyond the event"
    );
    assert!(serve(&mut driver, &mut ring, 1));
    assert!(!serve(&mut driver, &mut ring, 4), "the event lies behind");
    driver.set_used_event(10);
    assert!(
        serve(&mut driver, &mut ring, 6),
        "stepped over in the middle of a batch"
    );
}

#[test]
fn kicks_are_asked_for_and_declined_without_event_idx() {
    let (mut driver, mut ring) = queue(8, 0);
    ring.disable_kicks();
    assert_eq!(driver.used_flags(), 1);
    driver.offer_chain(&[Piece::Writable(BUFFERS, 1)]);
    assert!(ring.enable_kicks(), "a buffer came while kicks were off");
    assert_eq!(driver.used_flags(), 0);
    pop(&mut ring).unwrap().unwrap();
    assert!(!ring.enable_kicks());
}

#[test]
fn with_event_idx_the_next_kick_is_asked_for_at_our_position() {
    let (mut driver, mut ring) = queue(8, FEATURE_EVENT_IDX);
    serve(&mut driver, &mut ring, 5);
    ring.disable_kicks();
    assert_eq!(driver.used_flags(), 0, "the flag stays out of it (2.7.10)");
    assert!(!ring.enable_kicks());
    assert_eq!(driver.avail_event(), 5);
    driver.offer_chain(&[Piece::Writable(BUFFERS, 1)]);
    assert!(ring.has_available());
    assert!(ring.enable_kicks());
}

#[test]
fn a_chain_that_was_put_back_is_popped_again() {
    let (mut driver, mut ring) = queue(8, 0);
    driver.offer_chain(&[Piece::Writable(BUFFERS, 1)]);
    driver.offer_chain(&[Piece::Writable(BUFFERS, 2)]);
    assert_eq!(pop(&mut ring).unwrap().unwrap().head, 0);
    assert_eq!(pop(&mut ring).unwrap().unwrap().head, 1);
    ring.unpop();
    assert_eq!(ring.in_flight(), 1);
    assert!(ring.has_available());
    assert_eq!(pop(&mut ring).unwrap().unwrap().head, 1);
    assert!(pop(&mut ring).unwrap().is_none());
}

#[test]
fn a_queue_goes_on_from_its_saved_state() {
    let (mut driver, mut ring) = queue(8, FEATURE_EVENT_IDX);
    serve(&mut driver, &mut ring, 5);
    driver.offer_chain(&[Piece::Writable(BUFFERS, 1)]);
    let state = ring.state();
    let mut ring = Virtqueue::restore(Arc::clone(driver.memory()), state, FEATURE_EVENT_IDX).unwrap();
    assert_eq!(pop(&mut ring).unwrap().unwrap().head, 5);
    ring.push(5, 9);
    ring.publish();
    assert_eq!((0..6).filter_map(|_| driver.take_used()).last(), Some((5, 9)));

    let impossible = QueueState {
        next_avail: 3,
        next_used: 4,
        ..state
    };
    let refused = Virtqueue::restore(Arc::clone(driver.memory()), impossible, 0).unwrap_err();
    assert_eq!(
        refused,
        RingError::Progress {
            size: 8,
            next_avail: 3,
            next_used: 4
        }
    );
}

proptest! {
    /// Whatever the tables hold, a pop ends, and every segment lies inside guest memory.
    #[test]
    fn garbage_in_the_ring_never_reaches_beyond_guest_memory(
        descriptors in prop::collection::vec(
            (prop_oneof![0..MEMORY_BYTES as u64 + 64, any::<u64>()], prop_oneof![0..8192_u32, any::<u32>()], 0..8_u16, 0..18_u16),
            16,
        ),
        heads in prop::collection::vec(0..20_u16, 1..16),
        avail_index in prop_oneof![Just(None), any::<u16>().prop_map(Some)],
        features in prop_oneof![Just(0), Just(FEATURE_INDIRECT_DESC), Just(FEATURE_INDIRECT_DESC | FEATURE_EVENT_IDX)],
    ) {
        let (mut driver, mut ring) = queue(16, features);
        for (index, fields) in (0..).zip(&descriptors) {
            driver.descriptor(index, *fields);
        }
        for head in &heads {
            driver.offer(*head);
        }
        if let Some(index) = avail_index {
            driver.set_avail_index(index);
        }
        let start = driver.memory().iter().next().unwrap().as_ptr() as usize;
        let mut chain = Chain::default();
        for _ in 0..=16 {
            match ring.pop(&mut chain) {
                Ok(true) => {
                    for segment in chain.readable.iter().chain(&chain.writable) {
                        let from = segment.address() as usize;
                        prop_assert!(from >= start && from + segment.len_bytes() <= start + MEMORY_BYTES);
                    }
                    ring.push(chain.head, 0);
                }
                Err(PopError::Malformed { head, .. }) => ring.push(head, 0),
                Ok(false) | Err(PopError::Broken(_)) => break,
            }
            ring.publish();
            ring.needs_interrupt();
            ring.enable_kicks();
        }
        prop_assert_eq!(ring.in_flight(), 0);
    }
}
