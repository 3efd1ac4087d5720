//! Tables as they come back, and as they must not.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test's panic is its failure"
)]

use proptest::prelude::*;

use super::*;
use crate::keys::SigningKey;
use crate::snapshot::memory::scratch::protections;
use crate::snapshot::memory::seal::HashKey;

const SIZE: u64 = 2 << 20;
const CHUNKS: usize = 32;

fn table(seal: Seal, masks: Vec<u16>) -> MemoryTable {
    let sum = |mask: &u16| match mask {
        0 => Sum::default(),
        _ => Seal::Blake3(HashKey::of(MemoryId([1; 16]))).sum(
            Part {
                chunk: 3,
                mask: *mask,
            },
            &[5; CHUNK_BYTES],
        ),
    };
    let sums: Vec<Sum> = masks.iter().map(sum).collect();
    let parent = MemoryId([7; 16]);
    let pages = PageSet::of_masks(masks);
    MemoryTable::new(MemoryId([9; 16]), Kind::Diff { parent }, seal, pages, &sums)
}

fn plain(masks: Vec<u16>) -> MemoryTable {
    table(Seal::Crc32c, masks)
}

fn restored(saved: &MemoryTableState) -> Result<MemoryTable, TableError> {
    MemoryTable::restore(saved, SIZE, None, None)
}

fn masks() -> impl Strategy<Value = Vec<u16>> {
    proptest::collection::vec(prop_oneof![Just(0), Just(u16::MAX), any::<u16>()], CHUNKS)
}

proptest! {
    #[test]
    fn a_table_comes_back_from_its_section_as_it_was(masks in masks()) {
        for protection in protections() {
            let seal = Seal::new(MemoryId([9; 16]), &protection);
            let saved = table(seal, masks.clone()).save();
            let section = postcard::to_allocvec(&saved).unwrap();
            let again: MemoryTableState = postcard::from_bytes(&section).unwrap();
            let signer = protection.signing.as_ref().map(SigningKey::public);
            let table = MemoryTable::restore(&again, SIZE, signer, protection.cipher.as_ref()).unwrap();
            prop_assert_eq!(table.save(), saved);
        }
    }

    #[test]
    fn a_section_of_any_bytes_is_a_table_that_holds_together_or_an_error(
        masks in masks(),
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut in proptest::option::of(any::<prop::sample::Index>()),
    ) {
        let mut section = postcard::to_allocvec(&plain(masks).save()).unwrap();
        for (place, value) in changes {
            let place = place.index(section.len());
            section[place] = value;
        }
        if let Some(cut) = cut {
            section.truncate(cut.index(section.len()));
        }
        if let Ok(saved) = postcard::from_bytes::<MemoryTableState>(&section)
            && let Ok(table) = restored(&saved)
        {
            prop_assert_eq!((table.size_bytes(), table.chunks()), (SIZE, CHUNKS));
            prop_assert_eq!(table.save(), saved);
            let _ = table.check(3, &mut vec![1; CHUNK_BYTES]);
        }
    }
}

#[test]
fn a_table_of_a_memory_of_another_size_is_refused_before_anything_is_made_of_it() {
    let saved = plain(vec![u16::MAX; CHUNKS]).save();
    let refused = MemoryTable::restore(&saved, 2 * SIZE, None, None);
    assert!(matches!(refused, Err(TableError::Size { .. })));
    let huge = MemoryTableState {
        size_bytes: u64::MAX,
        ..saved
    };
    assert!(matches!(restored(&huge), Err(TableError::Size { .. })));
}

#[test]
fn counts_that_do_not_agree_are_refused() {
    let saved = plain(vec![u16::MAX; CHUNKS]).save();
    for bytes in [0, 1, 63, 65, 128] {
        let pages = vec![0xff; bytes];
        let refused = restored(&MemoryTableState {
            pages,
            ..saved.clone()
        });
        assert!(matches!(refused, Err(TableError::Pages { .. })), "{bytes}");
    }
    for bytes in [0, 124, 127, 129, 132] {
        let sums = vec![0; bytes];
        let refused = restored(&MemoryTableState {
            sums,
            ..saved.clone()
        });
        assert!(matches!(refused, Err(TableError::Sums { .. })), "{bytes}");
    }
}

#[test]
fn a_chunk_is_checked_over_the_pages_that_the_file_has_and_the_others_become_zeros() {
    let mask = 0b1000_0000_0110_0001;
    let mut chunk: Vec<u8> = (0..CHUNK_BYTES).map(|at| (at / PAGE_BYTES + 1) as u8).collect();
    let original = chunk.clone();
    let mut present = Vec::new();
    for page in [0, 5, 6, 15] {
        present.extend_from_slice(&original[page * PAGE_BYTES..(page + 1) * PAGE_BYTES]);
    }
    let sum = Seal::Crc32c.sum(Part { chunk: 1, mask }, &chunk);
    assert_eq!(sum.bytes(4), crc32c::crc32c(&present).to_le_bytes());
    let pages = PageSet::of_masks(vec![0, mask]);
    let sums = [Sum::default(), sum];
    let table = MemoryTable::new(MemoryId([1; 16]), Kind::Full, Seal::Crc32c, pages, &sums);
    table.check(1, &mut chunk).unwrap();
    for (page, bytes) in chunk.chunks(PAGE_BYTES).enumerate() {
        let expected = if mask & 1 << page == 0 { 0 } else { page as u8 + 1 };
        assert!(bytes.iter().all(|byte| *byte == expected), "{page}");
    }
    // A chunk of which the file has nothing is zeros, whatever is there.
    let mut absent = original.clone();
    table.check(0, &mut absent).unwrap();
    assert!(absent.iter().all(|byte| *byte == 0));
    let mut damaged = original;
    damaged[5 * PAGE_BYTES] ^= 0x80;
    let offset_bytes = CHUNK_BYTES as u64;
    assert_eq!(table.check(1, &mut damaged), Err(Damage { offset_bytes }));
}

#[test]
fn a_table_of_chunks_that_are_protected_otherwise_than_its_state_is_refused() {
    let kinds = protections().map(|protection| Seal::new(MemoryId([9; 16]), &protection).kind());
    for protection in protections() {
        let seal = Seal::new(MemoryId([9; 16]), &protection);
        let own = seal.kind();
        let saved = table(seal, vec![1; CHUNKS]).save();
        let signer = protection.signing.as_ref().map(SigningKey::public);
        for kind in kinds.into_iter().filter(|kind| *kind != own) {
            let other = MemoryTableState {
                seal: kind,
                ..saved.clone()
            };
            let refused = MemoryTable::restore(&other, SIZE, signer, protection.cipher.as_ref());
            let expected = TableError::Seal {
                found: kind,
                expected: own,
            };
            assert_eq!(refused.err(), Some(expected));
        }
    }
}
