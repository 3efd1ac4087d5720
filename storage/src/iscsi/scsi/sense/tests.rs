#![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

use proptest::prelude::*;

use super::*;

fn fixed(response_code: u8, key: u8, asc: u8, ascq: u8) -> [u8; 18] {
    [
        response_code,
        0,
        key,
        0,
        0,
        0,
        0,
        10,
        0,
        0,
        0,
        0,
        asc,
        ascq,
        0,
        0,
        0,
        0,
    ]
}

fn judged(key: u8, asc: u8, ascq: u8) -> Verdict {
    verdict(
        Status::CHECK_CONDITION,
        Sense::parse(&fixed(0x70, key, asc, ascq)),
    )
}

fn failed(errno: i32) -> Verdict {
    Verdict::Failed(Failure::Host(errno))
}

#[test]
fn each_status_has_its_verdict() {
    for (status, expected) in [
        (0x00, Verdict::Good),
        (0x02, failed(libc::EIO)),
        (0x04, failed(libc::EIO)),
        (0x08, Verdict::BusyLater),
        (0x18, Verdict::Conflict),
        (0x28, Verdict::BusyLater),
        (0x30, Verdict::BusyLater),
        (0x40, Verdict::BusyLater),
        (0x22, failed(libc::EIO)),
        (0xff, failed(libc::EIO)),
    ] {
        assert_eq!(verdict(Status(status), None), expected, "{status:#x}");
    }
}

#[test]
fn each_row_of_the_table_has_its_verdict() {
    let reset = Verdict::Retry(Attention::Reset);
    let parameters = Verdict::Retry(Attention::Parameters);
    let identity = Verdict::Retry(Attention::Identity);
    let other = Verdict::Retry(Attention::Other);
    let unsupported = Verdict::Failed(Failure::Unsupported);
    let read_only = Verdict::Failed(Failure::ReadOnly);
    for (key, asc, ascq, expected) in [
        (0x0, 0x00, 0x00, failed(libc::EIO)),
        (0x1, 0x17, 0x01, Verdict::Good),
        (0x2, 0x04, 0x00, Verdict::BusyLater),
        (0x2, 0x04, 0x01, Verdict::BusyLater),
        (0x2, 0x04, 0x02, failed(libc::EIO)),
        (0x2, 0x04, 0x03, failed(libc::EIO)),
        (0x2, 0x04, 0x04, Verdict::BusyLater),
        (0x2, 0x04, 0x07, Verdict::BusyLater),
        (0x2, 0x04, 0x0c, Verdict::BusyLater),
        (0x2, 0x04, 0x14, Verdict::BusyLater),
        (0x2, 0x04, 0x1b, Verdict::BusyLater),
        (0x2, 0x3a, 0x00, failed(libc::ENOMEDIUM)),
        (0x2, 0x3e, 0x01, failed(libc::EIO)),
        (0x3, 0x11, 0x00, failed(libc::EIO)),
        (0x3, 0x0c, 0x00, failed(libc::EIO)),
        (0x4, 0x44, 0x00, failed(libc::EIO)),
        (0x5, 0x1a, 0x00, unsupported),
        (0x5, 0x20, 0x00, unsupported),
        (0x5, 0x21, 0x00, Verdict::Failed(Failure::OutOfRange)),
        (0x5, 0x24, 0x00, unsupported),
        (0x5, 0x25, 0x00, Verdict::LunMissing),
        (0x5, 0x26, 0x00, unsupported),
        (0x5, 0x26, 0x03, unsupported),
        (0x5, 0x26, 0x04, failed(libc::EIO)),
        (0x5, 0x2c, 0x00, failed(libc::EIO)),
        (0x5, 0x55, 0x03, Verdict::BusyLater),
        (0x5, 0x55, 0x04, failed(libc::ENOLCK)),
        (0x6, 0x28, 0x00, identity),
        (0x6, 0x29, 0x00, reset),
        (0x6, 0x29, 0x01, reset),
        (0x6, 0x29, 0x07, reset),
        (0x6, 0x2a, 0x00, parameters),
        (0x6, 0x2a, 0x01, parameters),
        (0x6, 0x2a, 0x02, other),
        (0x6, 0x2a, 0x03, Verdict::ReservationChanged),
        (0x6, 0x2a, 0x04, Verdict::ReservationChanged),
        (0x6, 0x2a, 0x05, Verdict::ReservationChanged),
        (0x6, 0x2a, 0x06, other),
        (0x6, 0x2a, 0x09, Verdict::CapacityChanged),
        (0x6, 0x2f, 0x00, Verdict::Retry(Attention::Cleared)),
        (0x6, 0x38, 0x07, other),
        (0x6, 0x3f, 0x03, identity),
        (0x6, 0x3f, 0x05, identity),
        (0x6, 0x3f, 0x0e, other),
        (0x7, 0x20, 0x02, failed(libc::EACCES)),
        (0x7, 0x27, 0x00, read_only),
        (0x7, 0x27, 0x01, read_only),
        (0x7, 0x27, 0x07, failed(libc::ENOSPC)),
        (0x7, 0x00, 0x00, failed(libc::EIO)),
        (0x8, 0x00, 0x00, failed(libc::EIO)),
        (0xb, 0x00, 0x00, Verdict::BusyLater),
        (0xb, 0x47, 0x05, Verdict::BusyLater),
        (0xb, 0x10, 0x01, failed(libc::EIO)),
        (0xd, 0x00, 0x00, failed(libc::EIO)),
        (0xe, 0x1d, 0x00, Verdict::Miscompare),
    ] {
        assert_eq!(judged(key, asc, ascq), expected, "{key:x}/{asc:02x}/{ascq:02x}");
    }
}

#[test]
fn what_was_deferred_is_never_taken_for_the_command_at_hand() {
    let deferred = |key, asc, ascq| {
        verdict(
            Status::CHECK_CONDITION,
            Sense::parse(&fixed(0x71, key, asc, ascq)),
        )
    };
    assert_eq!(deferred(0x3, 0x0c, 0x00), Verdict::Deferred(BROKEN));
    assert_eq!(
        deferred(0x7, 0x27, 0x07),
        Verdict::Deferred(Failure::Host(libc::ENOSPC))
    );
    assert_eq!(deferred(0xb, 0x00, 0x00), Verdict::Deferred(BROKEN));
    assert_eq!(deferred(0x1, 0x17, 0x00), Verdict::BusyLater);
}

#[test]
fn both_formats_say_the_same() {
    let descriptor = [0x72, 0x06, 0x2a, 0x03, 0, 0, 0, 0];
    let sense = Sense::parse(&descriptor).unwrap();
    assert_eq!(Sense::parse(&fixed(0x70, 0x06, 0x2a, 0x03)), Some(sense));
    assert_eq!(
        sense.to_string(),
        "UNIT ATTENTION, RESERVATIONS PREEMPTED (6/2a/03)"
    );
}

#[test]
fn a_code_without_words_and_an_earlier_command_are_named_too() {
    let sense = Sense::parse(&fixed(0xf1, 0x03, 0x99, 0x01)).unwrap();
    assert_eq!(sense.to_string(), "of an earlier command: MEDIUM ERROR (3/99/01)");
}

#[test]
fn sense_data_that_were_cut_off_have_the_key_at_least() {
    let whole = fixed(0x70, 0x05, 0x20, 0x00);
    let cut = Sense::parse(whole.split_at(8).0).unwrap();
    assert_eq!((cut.key, cut.asc), (SenseKey::ILLEGAL_REQUEST, 0));
    assert_eq!(Sense::parse(whole.split_at(2).0), None);
    // The bytes are there and do not count.
    let mut short = whole;
    short[7] = 4;
    assert_eq!(Sense::parse(&short).unwrap().asc, 0);
}

#[test]
fn sense_data_are_found_behind_their_length() {
    let segment = [&[0, 18][..], &fixed(0x70, 0x06, 0x29, 0x00), &[0, 0]].concat();
    assert_eq!(Sense::of_response(&segment).unwrap().asc, 0x29);
    assert_eq!(Sense::of_response(segment.split_at(10).0), None);
    assert_eq!(Sense::of_response(&[]), None);
}

proptest! {
    #[test]
    fn no_bytes_are_too_strange_to_be_judged(status in any::<u8>(), bytes in prop::collection::vec(any::<u8>(), 0..40)) {
        let sense = Sense::of_response(&bytes).or(Sense::parse(&bytes));
        // What is said about it must not be `Good` unless the status or a recovered error says so.
        if verdict(Status(status), sense) == Verdict::Good {
            let recovered = sense.is_some_and(|sense| sense.key == SenseKey::RECOVERED_ERROR);
            prop_assert!(status == 0 || (status == 2 && recovered));
        }
        let _ = sense.map(|sense| sense.to_string());
    }
}
