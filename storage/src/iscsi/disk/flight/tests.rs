use super::super::super::scsi::sense::{Sense, SenseKey, Status, Timing};
use super::super::super::unit::{Limits, UnitMode};
use super::*;

const SIZE_BYTES: u64 = 1 << 20;

fn unit() -> Unit {
    Unit {
        identity: None,
        block_bytes: 512,
        physical_block_bytes: 512,
        capacity_bytes: SIZE_BYTES,
        size_bytes: SIZE_BYTES,
        mode: Some(UnitMode {
            is_write_protected: false,
            cache: Cache::None,
        }),
        limits: Limits {
            transfer_blocks: 2048,
            unmap_blocks: 2048,
            write_same_blocks: 2048,
            write_same_unmaps: false,
        },
        tail: None,
    }
}

fn discard(unit: &Unit) -> Flight {
    let geometry = Geometry {
        size_bytes: SIZE_BYTES,
        logical_block_bytes: 512,
        physical_block_bytes: 512,
        access: Access::ReadWrite,
        discard: Discard::Supported,
    };
    let request = Request {
        tag: 1,
        operation: Operation::Discard,
        offset_bytes: 0,
        len_bytes: 4096,
        durability: Durability::Cached,
        segments: Vec::new(),
    };
    Flight::begin(request, &geometry, unit, Instant::now()).expect("a unit with UNMAP discards")
}

/// What becomes of a discard that is answered like this.
fn answered(status: Status, unit: &mut Unit, retained: &mut Retained, codes: Option<(u8, u8, u8)>) -> Next {
    let mut flight = discard(unit);
    let mut zeros = vec![0; ZEROS_BYTES];
    let command = flight.command(0, unit, retained, &mut zeros, Vec::new());
    let ended = Ended {
        moved_bytes: 0,
        status,
        sense: codes.map(|(key, asc, ascq)| Sense {
            key: SenseKey(key),
            asc,
            ascq,
            timing: Timing::Current,
        }),
        command,
    };
    flight.judge(&ended, unit, retained)
}

#[test]
fn a_unit_that_says_that_it_is_another_is_looked_at_again() {
    let (mut unit, mut retained) = (unit(), Retained::new(1 << 20));
    // Power on; INQUIRY data.
    for codes in [(6, 0x29, 0), (6, 0x3f, 3)] {
        let next = answered(Status::CHECK_CONDITION, &mut unit, &mut retained, Some(codes));
        assert!(matches!(next, Next::Reconnect(_)), "{codes:x?}: {next:?}");
    }
    // Reservations preempted comes before the conflict, which is looked at.
    let next = answered(
        Status::CHECK_CONDITION,
        &mut unit,
        &mut retained,
        Some((6, 0x2a, 3)),
    );
    assert!(matches!(next, Next::Send), "{next:?}");
}

#[test]
fn a_unit_whose_parameters_have_changed_is_taken_to_have_a_cache() {
    let (mut unit, mut retained) = (unit(), Retained::new(1 << 20));
    let next = answered(
        Status::CHECK_CONDITION,
        &mut unit,
        &mut retained,
        Some((6, 0x2a, 1)),
    );
    assert!(matches!(next, Next::Send), "{next:?}");
    assert_eq!(unit.cache(), Cache::Volatile(Fua::Missing));
}

#[test]
fn what_was_discarded_is_not_written_again() {
    let (mut unit, mut retained) = (unit(), Retained::new(1 << 20));
    retained.keep_zeroes(0, 4096, Space::MayBeFreed);
    let next = answered(Status::GOOD, &mut unit, &mut retained, None);
    assert!(matches!(next, Next::End(Ok(()))), "{next:?}");
    assert!(retained.replay().is_empty());
}
