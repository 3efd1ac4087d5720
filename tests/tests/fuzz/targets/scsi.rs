//! What a logical unit answers: the first byte of an input says to what, the rest is the target's.

use coracle_storage::iscsi::scsi::capacity::Capacity;
use coracle_storage::iscsi::scsi::designator::{DESIGNATOR_BYTES_MAX, Designator};
use coracle_storage::iscsi::scsi::inquiry::Inquiry;
use coracle_storage::iscsi::scsi::luns::{Lun, LunList};
use coracle_storage::iscsi::scsi::mode::Mode;
use coracle_storage::iscsi::scsi::parameter::ParameterError;
use coracle_storage::iscsi::scsi::reservation::{Capabilities, KEYS_MAX, Keys, Reservation};
use coracle_storage::iscsi::scsi::sense::{Sense, SenseKey, Status, Verdict, verdict};
use coracle_storage::iscsi::scsi::vpd::{BlockLimits, Provisioning, Rotation, SupportedPages, serial_number};

pub(crate) fn run(data: &[u8]) {
    let Some((choice, bytes)) = data.split_first() else {
        return;
    };
    match choice {
        0 => run_sense(bytes),
        1 => run_inquiry(bytes),
        2 => read(SupportedPages::parse(bytes)),
        3 => run_serial_number(bytes),
        4 => run_designator(bytes),
        5 => read(BlockLimits::parse(bytes)),
        6 => read(Rotation::parse(bytes)),
        7 => read(Provisioning::parse(bytes)),
        8 => run_capacity(bytes),
        9 => read(Mode::parse_6(bytes)),
        10 => read(Mode::parse_10(bytes)),
        11 => run_luns(bytes),
        12 => run_keys(bytes),
        13 => read(Reservation::parse(bytes)),
        14 => read(Capabilities::parse(bytes)),
        _ => {}
    }
}

/// Nothing is promised but that it is read or not.
fn read<T>(_: Result<T, ParameterError>) {}

fn run_sense(bytes: &[u8]) {
    let sense = Sense::of_response(bytes);
    if let Some(sense) = sense {
        assert!(is_printable(&sense.to_string()));
    }
    let judged = verdict(Status::CHECK_CONDITION, sense);
    assert!(
        judged != Verdict::Good || sense.is_some_and(|sense| sense.key == SenseKey::RECOVERED_ERROR),
        "a command counts as done that its unit did not do"
    );
}

fn run_inquiry(bytes: &[u8]) {
    if let Ok(inquiry) = Inquiry::parse(bytes) {
        for name in [inquiry.vendor, inquiry.product, inquiry.revision] {
            assert!(is_printable(&name), "{name:?}");
        }
    }
}

fn run_serial_number(bytes: &[u8]) {
    if let Ok(serial) = serial_number(bytes) {
        assert!(is_printable(&serial), "{serial:?}");
    }
}

fn run_designator(bytes: &[u8]) {
    if let Ok(Some(best)) = Designator::best(bytes) {
        assert!(is_printable(&best.to_string()), "{best}");
        assert!((2..=DESIGNATOR_BYTES_MAX + 1).contains(&best.identity().len()));
    }
}

fn run_capacity(bytes: &[u8]) {
    if let Ok(capacity) = Capacity::parse(bytes) {
        assert_eq!(
            capacity.size_bytes,
            capacity.blocks * u64::from(capacity.block_bytes)
        );
        assert!(i64::try_from(capacity.size_bytes).is_ok());
        assert!(capacity.physical_block_bytes.is_multiple_of(capacity.block_bytes));
    }
}

fn run_luns(bytes: &[u8]) {
    if let Ok(list) = LunList::parse(bytes) {
        assert!(list.luns.len() <= bytes.len() / 8);
        for lun in list.luns {
            let number = lun.number().and_then(Lun::new).and_then(Lun::number);
            assert_eq!(number, lun.number(), "a number is the same there and back");
        }
    }
}

fn run_keys(bytes: &[u8]) {
    if let Ok(keys) = Keys::parse(bytes) {
        assert!(keys.keys.len() <= KEYS_MAX.min(bytes.len() / 8));
    }
}

fn is_printable(text: &str) -> bool {
    text.bytes().all(|byte| matches!(byte, b' '..=b'~'))
}
