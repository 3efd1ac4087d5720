//! Tables as they come back, and as they must not.
#![expect(
    clippy::unwrap_used,
    clippy::indexing_slicing,
    clippy::cast_possible_truncation,
    reason = "a test's panic is its failure"
)]

use proptest::prelude::*;

use super::*;

const SIZE: u64 = 2 << 20;
const CHUNKS: usize = 32;

fn table(masks: Vec<u16>) -> MemoryTable {
    let checksums = (1..).zip(&masks).map(|(number, mask)| match mask {
        0 => 0,
        _ => number * 0x0101_0101,
    });
    let checksums = checksums.collect();
    let parent = MemoryId([7; 16]);
    MemoryTable::new(
        MemoryId([9; 16]),
        Kind::Diff { parent },
        PageSet::of_masks(masks),
        checksums,
    )
}

fn masks() -> impl Strategy<Value = Vec<u16>> {
    proptest::collection::vec(prop_oneof![Just(0), Just(u16::MAX), any::<u16>()], CHUNKS)
}

proptest! {
    #[test]
    fn a_table_comes_back_from_its_section_as_it_was(masks in masks()) {
        let table = table(masks);
        let section = postcard::to_allocvec(&table.save()).unwrap();
        let saved: MemoryTableState = postcard::from_bytes(&section).unwrap();
        prop_assert_eq!(MemoryTable::restore(&saved, SIZE).unwrap(), table);
    }

    #[test]
    fn a_section_of_any_bytes_is_a_table_that_holds_together_or_an_error(
        masks in masks(),
        changes in proptest::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut in proptest::option::of(any::<prop::sample::Index>()),
    ) {
        let mut section = postcard::to_allocvec(&table(masks).save()).unwrap();
        for (place, value) in changes {
            let place = place.index(section.len());
            section[place] = value;
        }
        if let Some(cut) = cut {
            section.truncate(cut.index(section.len()));
        }
        if let Ok(saved) = postcard::from_bytes::<MemoryTableState>(&section)
            && let Ok(table) = MemoryTable::restore(&saved, SIZE)
        {
            prop_assert_eq!((table.size_bytes(), table.chunks()), (SIZE, CHUNKS));
            prop_assert_eq!(table.save(), saved);
            let _ = table.check(3, &mut vec![1; CHUNK_BYTES]);
        }
    }
}

#[test]
fn a_table_of_a_memory_of_another_size_is_refused_before_anything_is_made_of_it() {
    let saved = table(vec![u16::MAX; CHUNKS]).save();
    let refused = MemoryTable::restore(&saved, 2 * SIZE);
    assert!(matches!(refused, Err(TableError::Size { .. })));
    let huge = MemoryTableState {
        size_bytes: u64::MAX,
        ..saved
    };
    assert!(matches!(
        MemoryTable::restore(&huge, SIZE),
        Err(TableError::Size { .. })
    ));
}

#[test]
fn counts_that_do_not_agree_are_refused() {
    let saved = table(vec![u16::MAX; CHUNKS]).save();
    for bytes in [0, 1, 63, 65, 128] {
        let pages = vec![0xff; bytes];
        let refused = MemoryTable::restore(
            &MemoryTableState {
                pages,
                ..saved.clone()
            },
            SIZE,
        );
        assert!(matches!(refused, Err(TableError::Pages { .. })), "{bytes}");
    }
    for bytes in [0, 124, 127, 129, 132] {
        let checksums = vec![0; bytes];
        let refused = MemoryTable::restore(
            &MemoryTableState {
                checksums,
                ..saved.clone()
            },
            SIZE,
        );
        assert!(matches!(refused, Err(TableError::Checksums { .. })), "{bytes}");
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
    assert_eq!(checksum(mask, &chunk), crc32c::crc32c(&present));
    let sums = vec![0, checksum(mask, &chunk)];
    let table = MemoryTable::new(
        MemoryId([1; 16]),
        Kind::Full,
        PageSet::of_masks(vec![0, mask]),
        sums,
    );
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
