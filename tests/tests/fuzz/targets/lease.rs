//! The record of a lease: an input is a file that somebody has put beside an image.

use coracle_storage::lease::Record;

pub(crate) fn run(data: &[u8]) {
    check(data);
    // No search finds a checksum: the same with one that is right.
    let signed = [data, format!("crc32c {:08x}\n", crc32c::crc32c(data)).as_bytes()].concat();
    check(&signed);
}

fn check(bytes: &[u8]) {
    if let Ok(record) = Record::parse(bytes) {
        assert_eq!(
            record.text().as_bytes(),
            bytes,
            "a record has one text, and no other is read"
        );
    }
}
