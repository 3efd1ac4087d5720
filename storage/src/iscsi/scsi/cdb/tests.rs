use super::*;

const FAR: u64 = 0x1_0203_0405;

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn at(lba: u64, count: u32) -> Blocks {
    Blocks { lba, count }
}

#[test]
fn every_command_is_laid_out_as_its_standard_says() {
    let cached = Durability::Cached;
    let durable = Durability::Durable;
    for (cdb, expected) in [
        (test_unit_ready(), "00000000000000000000000000000000"),
        (inquiry(0x1234), "12000012340000000000000000000000"),
        (
            inquiry_vpd(VpdPage::BlockLimits, 0x40),
            "1201b000400000000000000000000000",
        ),
        (read_capacity(32), "9e100000000000000000000000200000"),
        (
            read(at(0x0102_0304, 8), cached),
            "28000102030400000800000000000000",
        ),
        (read(at(FAR, 8), durable), "88080000000102030405000000080000"),
        (write(at(7, 0xffff), durable), "2a080000000700ffff00000000000000"),
        (write(at(7, 0x1_0000), cached), "8a000000000000000007000100000000"),
        (synchronize_cache(Blocks::ALL), "35000000000000000000000000000000"),
        (synchronize_cache(at(FAR, 3)), "91000000000102030405000000030000"),
        (
            write_same(at(2, 0x100), Space::Stays),
            "93000000000000000002000001000000",
        ),
        (
            write_same(at(2, 0x100), Space::MayBeFreed),
            "93080000000000000002000001000000",
        ),
        (
            compare_and_write(FAR, 1, durable),
            "89080000000102030405000000010000",
        ),
        (
            mode_sense_6(ModePage::Caching, 0xc0),
            "1a000800c00000000000000000000000",
        ),
        (
            mode_sense_10(ModePage::All, 0x1c0),
            "5a003f0000000001c000000000000000",
        ),
        (report_luns(0x1010), "a0000000000000001010000000000000"),
        (
            persistent_reserve_in(ReserveIn::ReadReservation, 0x18),
            "5e010000000000001800000000000000",
        ),
    ] {
        assert_eq!(hex(&cdb), expected);
    }
}

#[test]
fn an_unmap_carries_each_of_its_ranges() {
    let (cdb, list) = unmap(&[at(FAR, 0x10), at(1, 2)]);
    assert_eq!(hex(&cdb), "42000000000000002800000000000000");
    assert_eq!(
        hex(&list),
        "0026002000000000\
         00000001020304050000001000000000\
         00000000000000010000000200000000"
    );
}

#[test]
fn the_most_ranges_that_an_unmap_can_hold_fit() {
    let (cdb, list) = unmap(&vec![at(0, 1); UNMAP_BLOCKS_MAX]);
    assert_eq!(hex(&cdb), "42000000000000fff800000000000000");
    assert_eq!(list.len(), 0xfff8);
}

#[test]
fn a_reservation_is_asked_for_with_its_keys_and_type_1() {
    let (key, victim) = (ReservationKey(0xa1), ReservationKey(0xb2));
    let until = Persistence::UntilPowerLoss;
    let through = Persistence::ThroughPowerLoss;
    let register = |existing, new, persistence| ReserveOut::Register {
        existing,
        new,
        persistence,
    };
    let ignore = |new, persistence| ReserveOut::RegisterAndIgnoreExistingKey { new, persistence };
    for (what, action, kind, ours, other, flags) in [
        (register(key, victim, until), 0, 0, 0xa1, 0xb2, 0),
        (register(ReservationKey::NONE, key, through), 0, 0, 0, 0xa1, 1),
        (ignore(key, until), 6, 0, 0, 0xa1, 0),
        (ignore(key, through), 6, 0, 0, 0xa1, 1),
        (ReserveOut::Reserve { key }, 1, 1, 0xa1, 0, 0),
        (ReserveOut::Release { key }, 2, 1, 0xa1, 0, 0),
        (ReserveOut::Clear { key }, 3, 0, 0xa1, 0, 0),
        (ReserveOut::Preempt { key, victim }, 4, 1, 0xa1, 0xb2, 0),
        (ReserveOut::PreemptAndAbort { key, victim }, 5, 1, 0xa1, 0xb2, 0),
    ] {
        let (cdb, list) = persistent_reserve_out(what);
        assert_eq!(
            hex(&cdb),
            format!("5f{action:02x}{kind:02x}00000000001800000000000000"),
            "{what:?}"
        );
        assert_eq!(
            hex(&list),
            format!("{ours:016x}{other:016x}00000000{flags:02x}000000"),
            "{what:?}"
        );
    }
}
