#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test's panic is its failure"
)]

use proptest::prelude::*;
use serde::Deserialize;

use super::*;
use crate::keys::{EncryptionKey, SigningKey, TrustedKeys};

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

fn sections() -> Sections {
    let mut sections = Sections::default();
    sections.add("first", &first());
    sections.add("second.0", &Second(vec![3; 1000]));
    sections
}

fn two_sections() -> Vec<u8> {
    sections().finish()
}

#[test]
fn what_was_written_is_read_back_section_by_section() {
    let bytes = two_sections();
    assert!(bytes.len().is_multiple_of(STATE_ALIGN_BYTES));
    let mut state = State::parse(&bytes, &ReadingKeys::default()).unwrap();
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
    let mut state = State::parse(&bytes, &ReadingKeys::default()).unwrap();
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
    let read: FirstAgain = State::parse(&bytes, &ReadingKeys::default())
        .unwrap()
        .take("first")
        .unwrap();
    assert_eq!(read, first().into());

    let mut sections = Sections::default();
    sections.add("first", &read);
    let bytes = sections.finish();
    assert_eq!(
        State::parse(&bytes, &ReadingKeys::default())
            .unwrap()
            .take::<FirstAgain>("first")
            .unwrap(),
        read
    );
    let refused = State::parse(&bytes, &ReadingKeys::default())
        .unwrap()
        .take::<First>("first")
        .unwrap_err();
    assert_eq!(
        refused.to_string(),
        "section `first` has version 2, and this version reads 1 and the one before it"
    );
}

#[test]
fn one_section_is_replaced_and_the_others_stay() {
    let bytes = two_sections();
    let other = State::parse(&bytes, &ReadingKeys::default())
        .unwrap()
        .with("second.0", &Second(vec![4; 10]))
        .finish();
    let mut state = State::parse(&other, &ReadingKeys::default()).unwrap();
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
            assert!(
                State::parse(&bad, &ReadingKeys::default()).is_err(),
                "bit {bit} of byte {at}"
            );
        }
    }
}

#[test]
fn damage_is_told_by_the_name_of_the_section() {
    let mut bytes = two_sections();
    let at = bytes.windows(8).position(|part| part == b"of a mac").unwrap();
    bytes[at] ^= 1;
    let error = State::parse(&bytes, &ReadingKeys::default())
        .unwrap_err()
        .to_string();
    assert_eq!(error, "section `first` is damaged: the checksum is wrong");
}

#[test]
fn another_format_or_architecture_is_refused_before_anything_else_is_read() {
    let header = |change: fn(&mut Header)| {
        let mut header = Header::new(0, HEADER_BYTES);
        change(&mut header);
        let mut bytes = header.bytes();
        bytes.resize(STATE_ALIGN_BYTES, 0);
        State::parse(&bytes, &ReadingKeys::default()).map(drop)
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

fn cipher(byte: u8) -> SnapshotCipher {
    SnapshotCipher::new(EncryptionKey::of(byte)).unwrap()
}

fn protected(signer: Option<u8>, key: Option<u8>) -> Vec<u8> {
    sections().finish_with(&Protection {
        signing: signer.map(SigningKey::of),
        cipher: key.map(cipher),
    })
}

fn keys(trusted: &[u8], key: Option<u8>) -> ReadingKeys {
    let trusted: Vec<SigningKey> = trusted.iter().copied().map(SigningKey::of).collect();
    let list = TrustedKeys::of(&trusted.iter().collect::<Vec<_>>());
    ReadingKeys {
        trusted: if trusted.is_empty() {
            Vec::new()
        } else {
            vec![list]
        },
        encryption: key.map(EncryptionKey::of),
    }
}

fn refusal(state: &[u8], keys: &ReadingKeys) -> String {
    State::parse(state, keys).unwrap_err().to_string()
}

#[test]
fn what_was_signed_and_encrypted_is_read_back_with_its_signer() {
    for (signer, key) in [(None, None), (Some(1), None), (None, Some(2)), (Some(1), Some(2))] {
        let bytes = protected(signer, key);
        assert!(bytes.len().is_multiple_of(STATE_ALIGN_BYTES));
        assert_eq!(bytes.windows(8).any(|part| part == b"of a mac"), key.is_none());
        let trusted: Vec<u8> = signer.into_iter().collect();
        let mut state = State::parse(&bytes, &keys(&trusted, key)).unwrap();
        assert_eq!(
            state.signer(),
            signer.map(|signer| SigningKey::of(signer).public())
        );
        assert_eq!(state.cipher().is_some(), key.is_some());
        assert_eq!(state.take::<First>("first").unwrap(), first());
        assert_eq!(state.take::<Second>("second.0").unwrap(), Second(vec![3; 1000]));
        state.finish().unwrap();
    }
}

#[test]
fn only_who_is_trusted_is_believed() {
    let (signed, unsigned) = (protected(Some(1), None), protected(None, None));
    State::parse(&signed, &keys(&[3, 1], None)).unwrap();
    let text = refusal(&unsigned, &keys(&[1], None));
    assert!(
        text.contains("it is not signed") && text.contains("trusted.pem"),
        "{text}"
    );
    let text = refusal(&signed, &keys(&[3], None));
    let signer = SigningKey::of(1).public().to_string();
    assert!(
        text.contains(&signer) && text.contains("no key in `trusted.pem`"),
        "{text}"
    );
    // One key of each list: what the process was told, and what the request says.
    let mut both = keys(&[1], None);
    both.trusted.extend(keys(&[3], None).trusted);
    assert!(refusal(&signed, &both).contains("no key in"));
    // Nobody has asked for a signature, and there is one: it has to be right.
    State::parse(&signed, &keys(&[], None)).unwrap();
}

#[test]
fn a_signature_is_checked_before_anything_is_read_of_what_it_is_of() {
    let mut bytes = protected(Some(1), None);
    // The name of a section: without trust this is damage of that section, with it nobody looks there.
    bytes[HEADER_BYTES] ^= 1;
    assert!(refusal(&bytes, &keys(&[], None)).contains("section `girst` is damaged"));
    assert!(refusal(&bytes, &keys(&[1], None)).contains("it was changed since"));
}

#[test]
fn what_is_changed_with_right_sums_is_known_by_the_signature() {
    let other = {
        let mut sections = Sections::default();
        sections.add("first", &First { number: 7, ..first() });
        sections.add("second.0", &Second(vec![3; 1000]));
        sections.finish_with(&Protection {
            signing: Some(SigningKey::of(1)),
            cipher: None,
        })
    };
    let mut spliced = protected(Some(1), None);
    assert_ne!(spliced, other);
    // The other state's beginning with this one's signature.
    let length = usize::try_from(Header::parse(&other).unwrap().length_bytes).unwrap();
    let before = length - SIGNATURE_SECTION_BYTES;
    let own = usize::try_from(Header::parse(&spliced).unwrap().length_bytes).unwrap();
    let signature = spliced[own - SIGNATURE_SECTION_BYTES..own].to_vec();
    spliced = other;
    spliced[before..length].copy_from_slice(&signature);
    for trusted in [&[1][..], &[]] {
        let text = refusal(&spliced, &keys(trusted, None));
        assert!(text.contains("it was changed since"), "{text}");
    }
}

#[test]
fn a_key_is_asked_for_where_there_is_one_and_refused_where_there_is_none() {
    let (encrypted, plain) = (protected(None, Some(2)), protected(None, None));
    assert!(refusal(&encrypted, &keys(&[], None)).contains("say where its key is"));
    assert!(refusal(&encrypted, &keys(&[], Some(3))).contains("encrypted with another key"));
    assert!(refusal(&plain, &keys(&[], Some(2))).contains("it is not encrypted"));
}

#[test]
fn every_flipped_bit_of_what_is_signed_and_encrypted_is_an_error() {
    for (signer, key) in [(Some(1), None), (None, Some(2)), (Some(1), Some(2))] {
        let good = protected(signer, key);
        let trusted: Vec<u8> = signer.into_iter().collect();
        for keys in [keys(&trusted, key), keys(&[], key)] {
            for at in 0..good.len() {
                let mut bad = good.clone();
                bad[at] ^= 1 << (at % 8);
                assert!(State::parse(&bad, &keys).is_err(), "byte {at}");
            }
            for len in 0..good.len() {
                assert!(State::parse(&good[..len], &keys).is_err(), "{len} bytes");
            }
        }
    }
}

#[test]
fn encrypted_sections_are_bound_to_their_places_and_their_state() {
    let header = |bytes: &[u8]| Header::parse(bytes).unwrap();
    let states = [protected(None, Some(2)), protected(None, Some(2))];
    let [first, second] = &states;
    assert_eq!(header(first), header(second));
    // The first section of one state in the other: every checksum is right, and the key is the same.
    let start = HEADER_BYTES + SECTION_HEADER_BYTES + CIPHER_BYTES;
    let (section, body, behind) = SectionHeader::parse(&first[start..]).unwrap();
    let end = first.len() - behind.len();
    let mut mixed = second.clone();
    mixed[start..end].copy_from_slice(&first[start..end]);
    let text = refusal(&mixed, &keys(&[], Some(2)));
    assert!(
        text.contains("section `first` is not the one that was encrypted here"),
        "{text}"
    );
    // Two sections that have changed places.
    let length = usize::try_from(header(first).length_bytes).unwrap();
    assert_eq!(section.name().unwrap(), "first");
    assert!(!body.is_empty());
    let swapped = [
        &first[..start],
        &first[end..length],
        &first[start..end],
        &first[length..],
    ]
    .concat();
    let text = refusal(&swapped, &keys(&[], Some(2)));
    assert!(text.contains("section `second.0` is not the one"), "{text}");
    // A section that is left out, and a header that does not count it.
    let shorter = [&first[..start], &first[end..length]].concat();
    let mut cut = Header::new(2, shorter.len()).bytes();
    cut.extend_from_slice(&shorter[HEADER_BYTES..]);
    cut.resize(shorter.len().next_multiple_of(STATE_ALIGN_BYTES), 0);
    assert!(refusal(&cut, &keys(&[], Some(2))).contains("is not the one that was encrypted here"));
}

proptest! {
    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
        let _ = State::parse(&bytes, &ReadingKeys::default());
    }

    #[test]
    fn a_state_that_is_cut_or_lengthened_is_none(len in 0_usize..4096) {
        let good = two_sections();
        let mut other = good.clone();
        other.resize(len, 0);
        prop_assert_eq!(State::parse(&other, &ReadingKeys::default()).is_ok(), len == good.len());
    }
}
