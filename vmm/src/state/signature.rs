//! The section that a signed state ends with: who has signed it, and the signature of every byte before that section.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::StateError;
use super::header::{SECTION_HEADER_BYTES, SectionHeader};
use crate::keys::{PUBLIC_KEY_BYTES, PublicKey, SIGNATURE_BYTES, SigningKey, TrustedKeys};

/// Its name.
pub(super) const SIGNATURE: &str = "signature";
/// Its length in the state, in bytes.
pub(super) const SIGNATURE_SECTION_BYTES: usize = SECTION_HEADER_BYTES + size_of::<Body>();

const VERSION: u32 = 1;
/// What is signed begins with this, so that it is never taken for anything else that the key signs.
const DOMAIN: &[u8; 32] = b"coracle state of a machine, v1\0\0";

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Body {
    signer: [u8; PUBLIC_KEY_BYTES],
    signature: [u8; SIGNATURE_BYTES],
}

/// Adds the section to `state`, which has all the others.
pub(super) fn sign(state: &mut Vec<u8>, key: &SigningKey) {
    let body = Body {
        signer: key.public().0,
        signature: key.sign(&message(state)),
    };
    let header = SectionHeader::new(SIGNATURE, VERSION, body.as_bytes());
    state.extend_from_slice(header.bytes());
    state.extend_from_slice(body.as_bytes());
}

/// What the last section of a state says: who has signed it. That it is so is to be checked.
pub(super) struct Signature {
    pub(super) signer: PublicKey,
    signature: [u8; SIGNATURE_BYTES],
}

impl Signature {
    /// That of `state`, which has no zeros behind it, if it ends with one. Nothing else in it is looked at.
    pub(super) fn of(state: &[u8]) -> Result<Option<Self>, StateError> {
        let Some(at) = state.len().checked_sub(SIGNATURE_SECTION_BYTES) else {
            return Ok(None);
        };
        let last = state.get(at..).unwrap_or_default();
        if !SectionHeader::is_named(last, SIGNATURE) {
            return Ok(None);
        }
        let (header, body, behind) = SectionHeader::parse(last)?;
        if header.version() != VERSION {
            return Err(StateError::Version {
                section: SIGNATURE.to_owned(),
                version: header.version(),
                known: VERSION,
            });
        }
        match Body::ref_from_bytes(body) {
            Ok(body) if behind.is_empty() => Ok(Some(Self {
                signer: PublicKey(body.signer),
                signature: body.signature,
            })),
            _ => Err(StateError::Trailing),
        }
    }

    /// Whether the signer has signed all of `state` that is before the signature.
    pub(super) fn check(&self, state: &[u8]) -> Result<(), StateError> {
        let before = state.len().checked_sub(SIGNATURE_SECTION_BYTES);
        let before = before.and_then(|length| state.get(..length));
        let before = before.expect("the signature was found behind it");
        if self.signer.has_signed(&message(before), &self.signature) {
            Ok(())
        } else {
            Err(StateError::Signature { signer: self.signer })
        }
    }
}

/// Whether whoever says that he has signed is in each of the `trusted` lists.
pub(super) fn check_trusted(
    signature: Option<&Signature>,
    trusted: &[TrustedKeys],
) -> Result<(), StateError> {
    trusted.iter().try_for_each(|list| {
        let keys = list.path().display().to_string();
        match signature {
            None => Err(StateError::Unsigned { keys }),
            Some(Signature { signer, .. }) if !list.contains(*signer) => Err(StateError::Untrusted {
                signer: *signer,
                keys,
            }),
            Some(_) => Ok(()),
        }
    })
}

fn message(before: &[u8]) -> Vec<u8> {
    let hash = blake3::Hasher::new_derive_key("coracle 2026-11-26 snapshot: signed state")
        .update(before)
        .finalize();
    [DOMAIN.as_slice(), hash.as_bytes()].concat()
}
