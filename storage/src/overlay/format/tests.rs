//! Headers, right and wrong.

#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test's panic is its failure"
)]

use super::*;

fn header() -> Header {
    let base = BaseIdentity {
        path: "/images/base.img".to_owned(),
        size_bytes: 1 << 30,
        fingerprint: 7,
    };
    Header::new(1 << 30, base).unwrap()
}

fn file_of(headers: &[&Header]) -> [u8; 2 * HEADER_BYTES] {
    let mut file = [0; 2 * HEADER_BYTES];
    for header in headers {
        let at = usize::try_from(header.offset_bytes()).unwrap();
        file[at..at + HEADER_BYTES].copy_from_slice(&header.encode().unwrap());
    }
    file
}

#[test]
fn a_header_is_read_as_it_was_written_and_the_newer_one_counts() {
    let old = header();
    let new = Header {
        sequence: 1,
        size_bytes: 1 << 31,
        ..old.clone()
    };
    assert_eq!(Header::decode(&file_of(&[&old])).unwrap(), old);
    let mut file = file_of(&[&old, &new]);
    assert_eq!(Header::decode(&file).unwrap(), new);
    // A crash in the middle of the rewrite.
    file[HEADER_BYTES + 2000] ^= 1;
    assert_eq!(Header::decode(&file).unwrap(), old);
    file[2000] ^= 1;
    assert_eq!(Header::decode(&file), Err(HeaderError::Checksum));
    assert_eq!(Header::decode(&[0; 2 * HEADER_BYTES]), Err(HeaderError::Magic));
}

#[test]
fn a_header_with_a_right_checksum_and_impossible_numbers_is_refused() {
    let wrong: [fn(&mut Header); 8] = [
        |header| header.cluster_bytes = 6000,
        |header| header.cluster_bytes = 1 << 40,
        |header| header.cluster_bytes = 512,
        |header| header.size_bytes = 513,
        |header| header.size_bytes = u64::MAX - 511,
        |header| header.base.size_bytes = 0,
        |header| header.base_shown_bytes = (1 << 30) + 512,
        |header| header.sequence = u64::MAX,
    ];
    for change in wrong {
        let mut header = header();
        change(&mut header);
        let refusal = Header::decode(&file_of(&[&header]));
        assert!(matches!(refusal, Err(HeaderError::Impossible(_))), "{header:?}");
    }
}

#[test]
fn a_cluster_is_a_page_until_the_image_could_not_double() {
    assert_eq!(cluster_bytes_for(512), Some(4096));
    assert_eq!(cluster_bytes_for(512 << 30), Some(4096));
    assert_eq!(cluster_bytes_for((512 << 30) + 512), Some(8192));
    assert_eq!(cluster_bytes_for(128 << 40), Some(1 << 20));
    assert_eq!(cluster_bytes_for((128 << 40) + 512), None);
    assert_eq!(cluster_bytes_for(u64::MAX - 511), None);
}
