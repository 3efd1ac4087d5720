#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test's panic is its failure"
)]

use proptest::prelude::*;
use serde::Deserialize;

use super::*;

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct First {
    number: u64,
    text: String,
}

impl Body for First {
    const VERSION: u32 = 1;
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Second(Vec<u8>);

impl Body for Second {
    const VERSION: u32 = 7;
}

fn first() -> First {
    First {
        number: 1 << 40,
        text: "of a machine".to_owned(),
    }
}

fn two_sections() -> Vec<u8> {
    let mut sections = Sections::default();
    sections.add("first", &first());
    sections.add("second.0", &Second(vec![3; 1000]));
    sections.finish()
}

#[test]
fn what_was_written_is_read_back_section_by_section() {
    let bytes = two_sections();
    assert!(bytes.len().is_multiple_of(STATE_ALIGN_BYTES));
    let mut state = State::parse(&bytes).unwrap();
    let names: Vec<_> = state
        .sections()
        .map(|(name, version, _)| (name.to_owned(), version))
        .collect();
    assert_eq!(names, [("first".to_owned(), 1), ("second.0".to_owned(), 7)]);
    assert_eq!(state.take::<Second>("second.0").unwrap(), Second(vec![3; 1000]));
    assert_eq!(state.take::<First>("first").unwrap(), first());
    state.finish().unwrap();
}

#[test]
fn a_section_that_is_missing_left_over_or_of_another_version_is_an_error_with_its_name() {
    let bytes = two_sections();
    let mut state = State::parse(&bytes).unwrap();
    let missing = state.take::<First>("third").unwrap_err().to_string();
    assert_eq!(missing, "section `third` is missing");
    assert!(state.take_if_there::<First>("third").unwrap().is_none());
    let other = state.take::<First>("second.0").unwrap_err();
    assert!(
        matches!(
            other,
            StateError::Version {
                version: 7,
                known: 1,
                ..
            }
        ),
        "{other}"
    );
    let left = state.finish().unwrap_err().to_string();
    assert!(left.starts_with("section `first` is not known"), "{left}");
}

/// What [`First`] became.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct FirstAgain {
    number: u64,
    texts: Vec<String>,
}

impl From<First> for FirstAgain {
    fn from(first: First) -> Self {
        Self {
            number: first.number,
            texts: vec![first.text],
        }
    }
}

impl Body for FirstAgain {
    const VERSION: u32 = 2;

    fn read(version: u32, bytes: &[u8]) -> Result<Option<Self>, postcard::Error> {
        match version {
            First::VERSION => Ok(First::read(version, bytes)?.map(Self::from)),
            Self::VERSION => whole(bytes).map(Some),
            _ => Ok(None),
        }
    }
}

#[test]
fn a_section_of_the_version_before_is_read_and_one_of_the_version_after_is_not() {
    let bytes = two_sections();
    let read: FirstAgain = State::parse(&bytes).unwrap().take("first").unwrap();
    assert_eq!(read, first().into());

    let mut sections = Sections::default();
    sections.add("first", &read);
    let bytes = sections.finish();
    assert_eq!(
        State::parse(&bytes).unwrap().take::<FirstAgain>("first").unwrap(),
        read
    );
    let refused = State::parse(&bytes).unwrap().take::<First>("first").unwrap_err();
    assert_eq!(
        refused.to_string(),
        "section `first` has version 2, and this version reads 1 and the one before it"
    );
}

#[test]
fn one_section_is_replaced_and_the_others_stay() {
    let bytes = two_sections();
    let other = State::parse(&bytes)
        .unwrap()
        .with("second.0", &Second(vec![4; 10]));
    let mut state = State::parse(&other).unwrap();
    assert_eq!(state.take::<First>("first").unwrap(), first());
    assert_eq!(state.take::<Second>("second.0").unwrap(), Second(vec![4; 10]));
    state.finish().unwrap();
}

#[test]
fn a_body_with_something_behind_it_is_an_error() {
    let longer = postcard::to_stdvec(&(first(), 1_u8)).unwrap();
    assert!(whole::<First>(&longer).is_err());
}

#[test]
fn every_flipped_bit_is_an_error() {
    let good = two_sections();
    for at in 0..good.len() {
        for bit in 0..8 {
            let mut bad = good.clone();
            bad[at] ^= 1 << bit;
            assert!(State::parse(&bad).is_err(), "bit {bit} of byte {at}");
        }
    }
}

#[test]
fn damage_is_told_by_the_name_of_the_section() {
    let mut bytes = two_sections();
    let at = bytes.windows(8).position(|part| part == b"of a mac").unwrap();
    bytes[at] ^= 1;
    let error = State::parse(&bytes).unwrap_err().to_string();
    assert_eq!(error, "section `first` is damaged: the checksum is wrong");
}

#[test]
fn another_format_or_architecture_is_refused_before_anything_else_is_read() {
    let header = |change: fn(&mut Header)| {
        let mut header = Header::new(0, HEADER_BYTES);
        change(&mut header);
        let mut bytes = header.bytes();
        bytes.resize(STATE_ALIGN_BYTES, 0);
        State::parse(&bytes).map(drop)
    };
    header(|_| ()).unwrap();
    assert!(matches!(
        header(|h| h.format = 2),
        Err(StateError::Format { found: 2, .. })
    ));
    assert!(matches!(
        header(|h| h.architecture = 183),
        Err(StateError::Architecture { found: 183, .. })
    ));
    assert!(matches!(
        header(|h| h.section_count = 257),
        Err(StateError::Sections { .. })
    ));
    assert!(matches!(
        header(|h| h.length_bytes = u64::MAX),
        Err(StateError::Long)
    ));
    assert!(matches!(
        header(|h| h.length_bytes = 513),
        Err(StateError::Short { .. })
    ));
    assert!(matches!(
        header(|h| h.section_count = 1),
        Err(StateError::Short { .. })
    ));
}

proptest! {
    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
        let _ = State::parse(&bytes);
    }

    #[test]
    fn a_state_that_is_cut_or_lengthened_is_none(len in 0_usize..4096) {
        let good = two_sections();
        let mut other = good.clone();
        other.resize(len, 0);
        prop_assert_eq!(State::parse(&other).is_ok(), len == good.len());
    }
}
