//! Chunks that come back, and chunks that must not.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    reason = "a test's panic is its failure"
)]

use proptest::prelude::*;

use super::*;
use crate::keys::{EncryptionKey, SnapshotCipher};
use crate::snapshot::memory::scratch::{id, protections};

fn chunk(seed: u64) -> Vec<u8> {
    let words = (0..CHUNK_BYTES as u64 / 8).map(|at| (at << 8 | seed).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    words.flat_map(u64::to_le_bytes).collect()
}

/// The pages that `mask` names, and zeros.
fn masked(mask: u16, bytes: &[u8]) -> Vec<u8> {
    let mut masked = vec![0; CHUNK_BYTES];
    for run in runs(&[mask]) {
        let range = run.start * PAGE_BYTES..run.end * PAGE_BYTES;
        masked[range.clone()].copy_from_slice(&bytes[range]);
    }
    masked
}

struct Closed {
    part: Part,
    bytes: Vec<u8>,
    sum: Vec<u8>,
}

fn closed(seal: &Seal, part: Part, seed: u64) -> Closed {
    let mut bytes = chunk(seed);
    let sum = seal.close(part, &mut bytes);
    let sum = sum.bytes(seal.kind().sum_bytes()).to_vec();
    Closed { part, bytes, sum }
}

fn opens(seal: &Seal, part: Part, bytes: &[u8], sum: &[u8]) -> bool {
    seal.open(part, &mut bytes.to_vec(), sum).is_ok()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_chunk_comes_back_as_it_was_whatever_pages_there_are_of_it(
        mask in prop_oneof![1..=u16::MAX, Just(1), Just(u16::MAX), Just(0x8000)], chunk_number in 0_usize..1 << 24
    ) {
        let part = Part { chunk: chunk_number, mask };
        for protection in protections() {
            let seal = Seal::new(id(1), &protection);
            let Closed { mut bytes, sum, .. } = closed(&seal, part, 3);
            // What the file does not have of a chunk may be anything.
            for absent in runs(&[!mask]) {
                bytes[absent.start * PAGE_BYTES..absent.end * PAGE_BYTES].fill(0x77);
            }
            let is_open = masked(mask, &bytes) == masked(mask, &chunk(3));
            prop_assert_eq!(is_open, !seal.is_encrypted());
            prop_assert!(seal.open(part, &mut bytes, &sum).is_ok());
            prop_assert!(masked(mask, &bytes) == masked(mask, &chunk(3)));
        }
    }
}

#[test]
fn a_flipped_bit_of_a_chunk_or_of_its_sum_is_found() {
    let part = Part {
        chunk: 7,
        mask: 0b0110_0000_0000_0001,
    };
    for protection in protections() {
        let seal = Seal::new(id(1), &protection);
        let Closed { bytes, sum, .. } = closed(&seal, part, 3);
        for at in [0, 1, PAGE_BYTES - 1, 13 * PAGE_BYTES, 15 * PAGE_BYTES - 1] {
            let mut other = bytes.clone();
            other[at] ^= 0x10;
            assert!(!opens(&seal, part, &other, &sum), "{}: byte {at}", seal.kind());
        }
        for bit in 0..sum.len() * 8 {
            let mut other = sum.clone();
            other[bit / 8] ^= 1 << (bit % 8);
            assert!(!opens(&seal, part, &bytes, &other), "{}: bit {bit}", seal.kind());
        }
        for len in 0..sum.len() {
            assert!(!opens(&seal, part, &bytes, &sum[..len]), "{}: {len}", seal.kind());
        }
    }
}

#[test]
fn a_chunk_that_is_not_only_summed_up_is_bound_to_its_place_its_pages_and_its_memory() {
    let part = Part { chunk: 7, mask: 3 };
    for protection in &protections()[1..] {
        let seal = Seal::new(id(1), protection);
        let Closed { part, bytes, sum } = closed(&seal, part, 3);
        assert!(opens(&seal, part, &bytes, &sum));
        for other in [
            Part { chunk: 8, ..part },
            Part { mask: 1, ..part },
            Part { mask: 7, ..part },
        ] {
            assert!(!opens(&seal, other, &bytes, &sum), "{}: {other:?}", seal.kind());
        }
        // The same key, and another memory of it: such as a diff's.
        assert!(!opens(&Seal::new(id(2), protection), part, &bytes, &sum));
    }
}

#[test]
fn equal_chunks_are_encrypted_to_what_has_nothing_in_common() {
    let cipher = || SnapshotCipher::new(EncryptionKey::of(2)).unwrap();
    let protection = |cipher| Protection {
        signing: None,
        cipher: Some(cipher),
    };
    let first = Seal::new(id(1), &protection(cipher()));
    let mut seen = Vec::new();
    // Other places, another memory, and the same memory encrypted once more, as a merge does.
    for (seal, chunk) in [
        (&first, 7),
        (&first, 8),
        (&Seal::new(id(2), &protection(cipher())), 7),
        (&Seal::new(id(1), &protection(cipher())), 7),
    ] {
        let part = Part {
            chunk,
            mask: u16::MAX,
        };
        let closed = closed(seal, part, 3);
        let blocks: Vec<[u8; 16]> = closed.bytes.as_chunks().0.to_vec();
        seen.extend(blocks);
    }
    let count = seen.len();
    seen.sort_unstable();
    seen.dedup();
    assert_eq!(seen.len(), count, "a key stream was used twice");
}
