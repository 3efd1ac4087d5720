//! The CRC32C digests of headers and of data (RFC 7143, 13.1), as they stand on the wire.

use std::fmt;

use super::pdu::{Bhs, padding_bytes};

/// Size of a digest, in bytes.
pub const DIGEST_BYTES: usize = 4;

/// Whether there are digests.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DigestKind {
    /// There are none.
    #[default]
    None,
    /// Those of this module.
    Crc32c,
}

impl fmt::Display for DigestKind {
    /// As a login spells it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "None",
            Self::Crc32c => "CRC32C",
        })
    }
}

/// The digest of a header and of the additional headers behind it.
pub fn header_digest(bhs: &Bhs, ahs: &[u8]) -> [u8; DIGEST_BYTES] {
    let mut digest = Digest::default();
    digest.add(&bhs.0);
    digest.add(ahs);
    digest.finish()
}

/// A digest of bytes that come in pieces.
#[derive(Clone, Copy, Debug, Default)]
pub struct Digest {
    crc: u32,
    /// Of them no more than the last two bits matter.
    bytes: usize,
}

impl Digest {
    /// Goes on with `piece`. Padding that was received is a piece too: nobody promises that it is zeros.
    pub fn add(&mut self, piece: &[u8]) {
        self.crc = crc32c::crc32c_append(self.crc, piece);
        self.bytes = self.bytes.wrapping_add(piece.len());
    }

    /// The digest of what there was, and of zeros that fill its last word.
    pub fn finish(mut self) -> [u8; DIGEST_BYTES] {
        let (padding, _) = [0; 3].split_at(padding_bytes(self.bytes));
        self.crc = crc32c::crc32c_append(self.crc, padding);
        // The standard numbers a digest's bits from the other end than all else: it is the one field whose first byte is
        // the least significant.
        self.crc.to_le_bytes()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn digest(pieces: &[&[u8]]) -> [u8; DIGEST_BYTES] {
        let mut digest = Digest::default();
        for piece in pieces {
            digest.add(piece);
        }
        digest.finish()
    }

    /// RFC 7143, appendix A; the errata of RFC 3720, B.4 have the same.
    #[test]
    fn the_examples_of_the_standard_have_the_digests_that_it_says() {
        let rising: Vec<u8> = (0..32).collect();
        let falling: Vec<u8> = (0..32).rev().collect();
        assert_eq!(digest(&[&[0; 32]]), [0xaa, 0x36, 0x91, 0x8a]);
        assert_eq!(digest(&[&[0xff; 32]]), [0x43, 0xab, 0xa8, 0x62]);
        assert_eq!(digest(&[&rising]), [0x4e, 0x79, 0xdd, 0x46]);
        assert_eq!(digest(&[&falling]), [0x5c, 0xdb, 0x3f, 0x11]);
    }

    #[test]
    fn the_header_of_the_standard_has_the_digest_that_it_says() {
        // A SCSI Read(10) command.
        let mut bhs = Bhs::default();
        let words = [
            0x01c0_0000,
            0,
            0,
            0,
            0x1400_0000,
            0x0000_0400,
            0x14,
            0x18,
            0x2800_0000,
            0,
            0x0200_0000,
            0_u32,
        ];
        for (place, word) in bhs.0.chunks_exact_mut(4).zip(words) {
            place.copy_from_slice(&word.to_be_bytes());
        }
        assert_eq!(header_digest(&bhs, &[]), [0x56, 0x3a, 0x96, 0xd9]);
    }

    proptest! {
        #[test]
        fn pieces_have_the_digest_of_the_whole(
            bytes in prop::collection::vec(any::<u8>(), 0..200),
            at in any::<prop::sample::Index>(),
        ) {
            let (one, other) = bytes.split_at(at.index(bytes.len() + 1));
            let mut padded = bytes.clone();
            padded.resize(bytes.len().next_multiple_of(4), 0);
            prop_assert_eq!(digest(&[one, other]), digest(&[&bytes]));
            prop_assert_eq!(digest(&[one, other]), digest(&[&padded]));
        }
    }
}
