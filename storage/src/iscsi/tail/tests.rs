#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test's panic is its failure"
)]

use proptest::prelude::*;

use super::*;
use crate::lease::{Owner, Phase};
use crate::utc::UtcSecond;

const MIB: u64 = 1 << 20;
const IDENTITY: &[u8] = b"\x03\x60\x01\x40\x5a";

fn record(epoch: u64, vm: &str) -> Record {
    Record {
        epoch,
        generation: epoch / 2,
        phase: Phase::Held,
        owner: Owner::of_this_process(vm),
        since: UtcSecond(epoch % 1000),
    }
}

fn tail(block_bytes: u32) -> Tail {
    Tail::layout(64 * MIB, block_bytes).unwrap()
}

/// The slots of a unit, written like the unit itself.
struct Slots {
    tail: Tail,
    bytes: Vec<u8>,
}

impl Slots {
    /// As after `epochs` steps, the last of which is `last`.
    fn after(block_bytes: u32, epochs: u64, last: u64) -> Self {
        let tail = tail(block_bytes);
        let bytes = vec![0; tail.piece_len() * 8];
        let mut slots = Self { tail, bytes };
        for epoch in last - epochs + 1..=last {
            let name = "v".repeat(usize::try_from(epoch % 5).unwrap() * 60 + 1);
            slots.write(&record(epoch, &name), tail.piece_len());
        }
        slots
    }

    fn slot(&mut self, epoch: u64) -> &mut [u8] {
        let start = usize::try_from(self.tail.slot_of(epoch).start - self.tail.slots().start).unwrap();
        &mut self.bytes[start..start + self.tail.piece_len()]
    }

    fn write(&mut self, record: &Record, written_bytes: usize) {
        let new = self.tail.encode_record(record);
        self.slot(record.epoch)[..written_bytes].copy_from_slice(&new[..written_bytes]);
    }

    fn damage(&mut self, epoch: u64) {
        self.slot(epoch)[20] ^= 0x40;
    }

    fn newest(&self) -> Result<Option<u64>, UnreadableTail> {
        let newest = self.tail.newest(&self.bytes)?;
        Ok(newest.map(|record| record.epoch))
    }
}

#[test]
fn a_tail_is_aligned_and_ends_within_its_unit() {
    for block_bytes in [512, 4096, 65536] {
        let piece_bytes = u64::from(block_bytes.max(4096));
        for capacity_bytes in [2 * MIB, 64 * MIB + u64::from(block_bytes), 10 << 40] {
            let tail = Tail::layout(capacity_bytes, block_bytes).unwrap();
            assert!(tail.guest_bytes().is_multiple_of(piece_bytes));
            assert!(capacity_bytes - tail.guest_bytes() >= MIB);
            assert!(capacity_bytes - tail.guest_bytes() < MIB + piece_bytes);
            assert_eq!(tail.header().end, tail.slots().start);
            assert_eq!(tail.slot_of(7).end, tail.slots().end);
            assert_eq!(tail.slot_of(9), tail.slot_of(1));
            assert!(tail.slots().end <= capacity_bytes);
        }
    }
}

#[test]
fn a_unit_without_room_for_a_guest_has_no_tail() {
    for (capacity_bytes, block_bytes) in [
        (0, 512),
        (MIB, 512),
        (MIB + 3584, 512),
        (2 * MIB + 1, 512),
        (2 * MIB, 0),
        (2 * MIB, 520),
        (1 << 40, 1 << 17),
    ] {
        assert_eq!(Tail::layout(capacity_bytes, block_bytes), None);
    }
    assert_eq!(Tail::layout(MIB + 4096, 512).unwrap().guest_bytes(), 4096);
}

#[test]
fn a_header_is_found_again_by_the_unit_that_it_was_written_to() {
    let id = FormatId([0xab; 16]);
    for block_bytes in [512, 65536] {
        let header = Header::new(tail(block_bytes), IDENTITY, id).unwrap();
        let bytes = header.encode();
        assert_eq!(bytes.len() as u64, tail(block_bytes).piece_bytes());
        let found = Header::of_unit(tail(block_bytes), IDENTITY, &bytes);
        assert_eq!(found, Ok(Some(header)));
    }
    assert_eq!(Header::of_unit(tail(512), IDENTITY, &[0; 4096]), Ok(None));
    assert_eq!(Header::of_unit(tail(512), IDENTITY, &[]), Ok(None));
}

#[test]
fn a_header_of_another_unit_or_size_is_refused() {
    let bytes = Header::new(tail(512), IDENTITY, FormatId([1; 16]))
        .unwrap()
        .encode();
    let of_unit = |tail, identity: &[u8]| Header::of_unit(tail, identity, &bytes);
    assert_eq!(of_unit(tail(512), b"\x03other"), Err(HeaderError::OtherUnit));
    let other_size = Err(HeaderError::OtherSize {
        formatted_bytes: 64 * MIB,
        formatted_block_bytes: 512,
    });
    assert_eq!(
        of_unit(Tail::layout(65 * MIB, 512).unwrap(), IDENTITY),
        other_size
    );
    assert_eq!(of_unit(tail(4096), IDENTITY), other_size);
}

#[test]
fn a_checksum_does_not_make_a_header_of_nonsense() {
    let good = Header::new(tail(512), IDENTITY, FormatId([1; 16]))
        .unwrap()
        .encode();
    let with = |at: usize, byte: u8| {
        let mut bytes = good.clone();
        bytes[at] = byte;
        bytes[20..24].fill(0);
        let crc = crc32c::crc32c(&bytes[..HEADER_BYTES]);
        bytes[20..24].copy_from_slice(&crc.to_le_bytes());
        Header::parse(&bytes)
    };
    assert!(with(16, 1).unwrap().is_some());
    assert_eq!(with(16, 2), Err(HeaderError::Version(2)));
    assert_eq!(with(32, 1), Err(HeaderError::Impossible("its sizes")));
    assert_eq!(with(44, 0), Err(HeaderError::Impossible("the name of its unit")));
    assert_eq!(with(45, 2), Err(HeaderError::Impossible("the name of its unit")));
    assert_eq!(with(400, 1), Err(HeaderError::Impossible("what should be zeros")));
    assert_eq!(Header::new(tail(512), &[], FormatId([1; 16])), None);
    assert_eq!(Header::new(tail(512), &[1; 257], FormatId([1; 16])), None);
}

#[test]
fn a_unit_that_was_just_formatted_has_no_record() {
    assert_eq!(Slots::after(512, 0, 0).newest(), Ok(None));
}

#[test]
fn the_newest_record_is_found_wherever_it_is() {
    for last in 1..40 {
        assert_eq!(Slots::after(512, last.min(8), last).newest(), Ok(Some(last)));
    }
    assert_eq!(Slots::after(65536, 8, u64::MAX).newest(), Ok(Some(u64::MAX)));
}

#[test]
fn old_damage_is_passed_over() {
    for old in 93..100 {
        let mut slots = Slots::after(512, 8, 100);
        slots.damage(old);
        assert_eq!(slots.newest(), Ok(Some(100)), "{old}");
    }
    let mut slots = Slots::after(512, 8, 100);
    slots.damage(95);
    slots.damage(96);
    slots.damage(97);
    assert_eq!(slots.newest(), Ok(Some(100)));
}

#[test]
fn damage_that_no_crash_explains_is_not_passed_over() {
    let mut slots = Slots::after(512, 8, 100);
    slots.damage(100);
    assert_eq!(slots.newest(), Ok(Some(99)), "the step was torn");
    slots.damage(99);
    let error = slots.newest().unwrap_err();
    assert_eq!(error.newest_possible, Some(100));
    assert_eq!(
        error.slots.iter().map(|(slot, _)| *slot).collect::<Vec<_>>(),
        [3, 4]
    );
    assert!(
        error.to_string().contains("slot 3: its checksum is wrong"),
        "{error}"
    );
    for epoch in 93..99 {
        slots.damage(epoch);
    }
    assert_eq!(slots.newest().unwrap_err().newest_possible, None);
}

#[test]
fn damage_in_a_tail_without_records_is_the_first_step_or_unreadable() {
    let mut slots = Slots::after(512, 1, 1);
    slots.damage(1);
    assert_eq!(slots.newest(), Ok(None));
    let mut slots = Slots::after(512, 2, 2);
    slots.damage(1);
    slots.damage(2);
    assert_eq!(slots.newest().unwrap_err().newest_possible, None);
    let mut slots = Slots::after(512, 1, 5);
    slots.damage(5);
    assert_eq!(slots.newest().unwrap_err().newest_possible, None);
}

#[test]
fn a_record_in_the_slot_of_another_is_damage() {
    let mut slots = Slots::after(512, 8, 100);
    let copied = slots.slot(100).to_vec();
    slots.slot(98).copy_from_slice(&copied);
    assert_eq!(slots.newest(), Ok(Some(100)));
    slots.damage(100);
    slots.slot(99).copy_from_slice(&copied);
    let error = slots.newest().unwrap_err();
    assert_eq!(error.slots.first(), Some(&(2, SlotError::Number(100))));
}

#[test]
fn a_broken_lease_can_be_told_again() {
    let mut slots = Slots::after(512, 8, 100);
    slots.damage(100);
    slots.damage(99);
    let error = slots.newest().unwrap_err();
    let next = error.newest_possible.unwrap() + 1;
    let whole = slots.tail.piece_len();
    slots.write(&record(next, "breaker"), whole);
    for (slot, _) in error.slots {
        slots.slot(slot).fill(0);
    }
    assert_eq!(slots.newest(), Ok(Some(101)));
}

proptest! {
    #[test]
    fn a_torn_step_was_made_or_was_not(
        kept in 0..=8u64, last in 8..10_000u64, block in prop::sample::select(vec![512, 4096, 65536]),
        cut in prop_oneof![0..1200usize, 0..=65536usize], vm in "[a-z]{1,250}",
    ) {
        let mut slots = Slots::after(block, kept, last);
        let before = slots.tail.newest(&slots.bytes).unwrap();
        let next = if kept == 0 { 1 } else { last + 1 };
        let new = record(next, &vm);
        slots.write(&new, cut.min(slots.tail.piece_len()));
        let after = slots.tail.newest(&slots.bytes);
        prop_assert!(after == Ok(before) || after == Ok(Some(new.clone())), "{after:?}");
        // Made again over what was torn, it is there.
        let whole = slots.tail.piece_len();
        slots.write(&new, whole);
        prop_assert_eq!(slots.tail.newest(&slots.bytes), Ok(Some(new)));
    }

    #[test]
    fn blocks_of_a_step_may_arrive_in_any_order(last in 8..10_000u64, arrived in any::<u8>(), vm in "[a-z]{1,250}") {
        let mut slots = Slots::after(512, 8, last);
        let before = slots.tail.newest(&slots.bytes).unwrap();
        let new = record(last + 1, &vm);
        let bytes = slots.tail.encode_record(&new);
        for block in (0..8).filter(|block| arrived & (1 << block) != 0) {
            let range = block * 512..(block + 1) * 512;
            slots.slot(last + 1)[range.clone()].copy_from_slice(&bytes[range]);
        }
        let after = slots.tail.newest(&slots.bytes);
        prop_assert!(after == Ok(before) || after == Ok(Some(new)), "{after:?}");
    }

    #[test]
    fn no_header_survives_a_flipped_bit_or_a_cut(
        at in 0..HEADER_BYTES, bit in 0..8u8, identity in prop::collection::vec(any::<u8>(), 1..=256),
    ) {
        let header = Header::new(tail(512), &identity, FormatId([7; 16])).unwrap();
        let mut bytes = header.encode();
        prop_assert_eq!(Header::parse(&bytes), Ok(Some(header)));
        prop_assert!(!matches!(Header::parse(&bytes[..at]), Ok(Some(_))));
        bytes[at] ^= 1 << bit;
        prop_assert!(!matches!(Header::parse(&bytes), Ok(Some(_))));
    }
}
