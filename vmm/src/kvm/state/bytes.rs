//! The kernel's structures as the bytes of its ABI, and back.

use zerocopy::{FromBytes, Immutable, IntoBytes};

use super::StateError;

/// The bytes of `structure`.
pub(super) fn of<T: IntoBytes + Immutable>(structure: &T) -> Vec<u8> {
    structure.as_bytes().to_vec()
}

/// The structure whose bytes these are; `what` says so in the error.
pub(super) fn to<T: FromBytes>(bytes: &[u8], what: &'static str) -> Result<T, StateError> {
    T::read_from_bytes(bytes).map_err(|_| StateError::Length {
        what,
        len: bytes.len(),
        expected: size_of::<T>(),
    })
}
