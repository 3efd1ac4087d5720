//! Sections that nobody reads without the key: the first section says how the others are encrypted. Their headers stay as they
//! are, and a body is bound to its header and its place.

use super::StateError;
use super::header::SectionHeader;
use crate::keys::{CIPHER_BYTES, DataKey, EncryptionKey, SnapshotCipher, TAG_BYTES};

/// The name of the first section of an encrypted state.
pub(super) const ENCRYPTION: &str = "encryption";
/// Its version.
pub(super) const VERSION: u32 = 1;

/// Where a section is: the others that there are, and its place among them.
#[derive(Clone, Copy)]
pub(super) struct Place {
    pub(super) number: u32,
    pub(super) count: u32,
}

/// The cipher of a state that says `body` in its first section.
pub(super) fn cipher(body: &[u8], key: Option<&EncryptionKey>) -> Result<SnapshotCipher, StateError> {
    let Ok(saved) = <&[u8; CIPHER_BYTES]>::try_from(body) else {
        return Err(StateError::Damaged {
            section: ENCRYPTION.to_owned(),
        });
    };
    let key = key.ok_or(StateError::NoKey)?;
    SnapshotCipher::of_saved(key.clone(), saved).ok_or(StateError::OtherKey)
}

/// Encrypts a body, behind which its tag comes.
pub(super) fn seal(key: &DataKey, place: Place, name: &str, version: u32, body: &mut Vec<u8>) {
    let bound = bound(place, &SectionHeader::identity(name, version));
    let tag = key.seal(u64::from(place.number), &bound, body);
    body.extend_from_slice(&tag);
}

/// Decrypts what [`seal`] has encrypted.
pub(super) fn open(
    key: &DataKey,
    place: Place,
    header: &SectionHeader,
    body: &[u8],
) -> Result<Vec<u8>, StateError> {
    let forged = || StateError::Forged {
        section: header.shown_name(),
    };
    let (text, tag) = body.split_last_chunk::<TAG_BYTES>().ok_or_else(forged)?;
    let mut text = text.to_vec();
    let bound = bound(place, &header.own_identity());
    key.open(u64::from(place.number), &bound, &mut text, *tag)
        .map_err(|_| forged())?;
    Ok(text)
}

fn bound(place: Place, identity: &[u8]) -> Vec<u8> {
    let numbers = [place.number.to_le_bytes(), place.count.to_le_bytes()];
    [numbers.as_flattened(), identity].concat()
}
