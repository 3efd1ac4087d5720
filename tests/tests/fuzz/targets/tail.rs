//! The reserved tail of a logical unit: an input is a header that somebody has put there, or what eight slots hold.

use coracle_storage::iscsi::tail::{HEADER_BYTES, Header, SLOTS, Tail};
use coracle_storage::lease::Record;

use super::Input;

const CAPACITY_BYTES: u64 = 64 << 20;

pub(crate) fn run(data: &[u8]) {
    let mut input = Input::new(data);
    match input.u8() {
        0 => run_header(input.rest()),
        _ => run_slots(input),
    }
}

fn run_header(bytes: &[u8]) {
    check_header(bytes);
    // No search finds a checksum: the same with one that is right.
    let Some((header, rest)) = bytes.split_at_checked(HEADER_BYTES) else {
        return;
    };
    let (before, behind) = header.split_at(20);
    let (_, behind) = behind.split_at(4);
    let unsigned = [before, &[0; 4], behind].concat();
    let crc = crc32c::crc32c(&unsigned).to_le_bytes();
    check_header(&[before, &crc, behind, rest].concat());
}

fn check_header(bytes: &[u8]) {
    if let Ok(Some(header)) = Header::parse(bytes) {
        assert_eq!(
            header.encode().get(..HEADER_BYTES),
            bytes.get(..HEADER_BYTES),
            "a header has one form, and no other is read"
        );
        assert!(header.tail().slots().end <= header.tail().capacity_bytes());
    }
}

fn run_slots(mut input: Input<'_>) {
    let tail = Tail::layout(CAPACITY_BYTES, 512).expect("there is room for a guest");
    let slots: Vec<Vec<u8>> = (0..SLOTS).map(|_| slot(&tail, &mut input)).collect();
    let numbered = (0..).zip(&slots);
    let whole: Vec<Record> = numbered
        .filter_map(|(number, slot)| {
            let end = slot.iter().rposition(|byte| *byte != 0)? + 1;
            let record = Record::parse(slot.get(..end)?).ok()?;
            (record.epoch % SLOTS == number).then_some(record)
        })
        .collect();
    let last = whole.iter().max_by_key(|record| record.epoch);
    match tail.newest(&slots.concat()) {
        Ok(newest) => assert_eq!(newest.as_ref(), last, "the newest record is the one"),
        Err(error) => {
            assert!(
                !error.slots.is_empty(),
                "something is damaged where nothing can be read"
            );
            assert_eq!(
                error.newest_possible.is_some(),
                last.is_some(),
                "where a record is left, it is counted from"
            );
        }
    }
}

/// What the input says that one slot holds: nothing, a record or part of one, or anything.
fn slot(tail: &Tail, input: &mut Input<'_>) -> Vec<u8> {
    let mut slot = match input.u8() {
        0 => Vec::new(),
        1 => record_text(u64::from(input.u8())),
        2 => record_text(input.u64()),
        3 => {
            let mut torn = record_text(u64::from(input.u8()));
            torn.truncate(usize::from(input.u8()));
            torn
        }
        _ => {
            let len = usize::from(input.u8());
            input.take(len).to_vec()
        }
    };
    slot.resize(usize::try_from(tail.piece_bytes()).expect("a piece is small"), 0);
    slot
}

fn record_text(epoch: u64) -> Vec<u8> {
    let incarnation = "0b6f".repeat(8);
    let body = format!(
        "coracle lease 1\nepoch {epoch}\ngeneration {}\nphase held\nincarnation {incarnation}\nvm web-1\nhost host-b\n\
         pid 4711\nsince 1795442025\n",
        epoch / 2
    );
    format!("{body}crc32c {:08x}\n", crc32c::crc32c(body.as_bytes())).into_bytes()
}
