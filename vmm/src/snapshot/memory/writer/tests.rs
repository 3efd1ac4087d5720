//! Memories as they are found again in their files.
#![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

use std::fs::{File, OpenOptions};

use vm_memory::{Bytes, GuestAddress};

use super::super::scratch::*;
use super::super::{Damage, ReadError, TrailerError, verify};
use super::*;
use crate::memory::{Backing, PageSize, allocate};

const PAGES: [u64; 9] = [0, 1, 2, 15, 16, 31, 300, 301, 2047];

#[test]
fn a_full_file_has_every_page_that_is_not_zeros_and_no_other() {
    for backing in [Backing::Anonymous, Backing::Shared] {
        let memory = allocate(8, backing, PageSize::Base).unwrap();
        PAGES.iter().for_each(|page| fill_page(&memory, *page, 1));
        zero_page(&memory, 500);
        let scratch = Scratch::new(8);
        let table = write_full(&memory, 1, &scratch);
        let found: Vec<u64> = (0..2048).filter(|page| table.pages().contains(*page)).collect();
        assert_eq!(found, PAGES, "{backing:?}");
        assert!(scratch.content() == bytes_of(&memory, 8), "{backing:?}");
        // The pages, and the trailer.
        assert_eq!(scratch.data_bytes(), (PAGES.len() as u64 + 1) * 4096);
        verify(&table, scratch.image(), &Progress::new()).unwrap();
    }
}

#[test]
fn memory_above_the_gap_lies_right_behind_that_below() {
    let memory = memory(4 << 10);
    fill_page(&memory, (3 << 18) - 1, 1);
    fill_page(&memory, 4 << 18, 1);
    let scratch = Scratch::new(4 << 10);
    let table = write_full(&memory, 1, &scratch);
    let found: Vec<u64> = (0..4 << 18)
        .filter(|page| table.pages().contains(*page))
        .collect();
    assert_eq!(found, [(3 << 18) - 1, 3 << 18]);
    let mut page = [0; 4096];
    std::os::unix::fs::FileExt::read_exact_at(&scratch.file, &mut page, 3 << 30).unwrap();
    let mut expected = [0; 4096];
    memory.read_slice(&mut expected, GuestAddress(4 << 30)).unwrap();
    assert!(page == expected);
    verify(&table, scratch.image(), &Progress::new()).unwrap();
}

#[test]
fn memory_that_may_be_anything_is_read_where_nobody_has_touched_it() {
    let memory = memory(2);
    let scratch = Scratch::new(2);
    let progress = Progress::new();
    let content = Content::Full(Untouched::Anything);
    let table = write(&memory, plain(1), content, scratch.image(), &progress).unwrap();
    assert_eq!(table.pages().count(), 0);
    assert_eq!(
        (progress.done_bytes(), progress.total_bytes()),
        (2 * MIB, 2 * MIB)
    );
}

#[test]
fn what_is_none_of_the_guests_pages_is_zeros_whatever_is_in_it() {
    let memory = memory(2);
    [3, 9].iter().for_each(|page| fill_page(&memory, *page, 1));
    let scratch = Scratch::new(2);
    let progress = Progress::new();
    let its = set(2 * MIB, [3, 4]);
    let table = write(
        &memory,
        plain(1),
        Content::Among(&its),
        scratch.image(),
        &progress,
    )
    .unwrap();
    assert_eq!(table.kind(), Kind::Full);
    assert!(table.pages().count() == 1 && table.pages().contains(3));
    let other = set(4 * MIB, [3]);
    let refused = write(
        &memory,
        plain(1),
        Content::Among(&other),
        scratch.image(),
        &progress,
    );
    assert!(matches!(refused, Err(WriteError::PageSet { .. })));
}

#[test]
fn a_diff_has_the_pages_that_were_written_and_takes_no_space_for_zeros() {
    let memory = memory(4);
    PAGES.iter().for_each(|page| fill_page(&memory, *page % 1024, 1));
    let written = set(4 * MIB, [1, 2, 300, 700, 701]);
    fill_page(&memory, 700, 2);
    zero_page(&memory, 300);
    let scratch = Scratch::new(4);
    let parent = id(1);
    let content = Content::Diff {
        parent,
        written: &written,
        there: None,
    };
    let table = write(&memory, plain(2), content, scratch.image(), &Progress::new()).unwrap();
    assert_eq!(table.kind(), Kind::Diff { parent });
    assert_eq!(table.pages(), &written);
    // Pages 1, 2 and 700, and the trailer: 300 was zeroed, and 701 was never anything else.
    assert_eq!(scratch.data_bytes(), 4 * 4096);
    verify(&table, scratch.image(), &Progress::new()).unwrap();
}

#[test]
fn what_was_written_and_is_not_there_any_more_is_zeros_that_nobody_looks_at() {
    // A page of such a memory that is looked at is made.
    let memory = allocate(8, Backing::Shared, PageSize::Base).unwrap();
    fill_page(&memory, 3, 1);
    // Not back yet at the host.
    fill_page(&memory, 600, 1);
    let mut written = set(8 * MIB, [3, 4]);
    written.insert(512, 1024);
    let there = {
        let mut there = PageSet::full(8 * MIB);
        there.remove(512, 1024);
        there
    };
    let touched = residence::touched(&memory, None);
    let scratch = Scratch::new(8);
    let content = Content::Diff {
        parent: id(1),
        written: &written,
        there: Some(&there),
    };
    let table = write(&memory, plain(2), content, scratch.image(), &Progress::new()).unwrap();
    assert_eq!(table.pages(), &written);
    // Page 3, and the trailer.
    assert_eq!(scratch.data_bytes(), 2 * 4096);
    verify(&table, scratch.image(), &Progress::new()).unwrap();
    let now = residence::touched(
        &memory,
        Some(&{
            let mut gone = PageSet::empty(8 * MIB);
            gone.insert(512, 1024);
            gone
        }),
    );
    assert_eq!((now.count(), touched.count()), (1, 2));
}

#[test]
fn of_a_memory_that_began_empty_only_what_is_the_guests_is_in_a_full_file() {
    for backing in [Backing::Anonymous, Backing::Shared] {
        let memory = allocate(8, backing, PageSize::Base).unwrap();
        [3, 600].iter().for_each(|page| fill_page(&memory, *page, 1));
        let mut there = PageSet::full(8 * MIB);
        there.remove(512, 1024);
        let scratch = Scratch::new(8);
        let content = Content::Touched(&there);
        let table = write(&memory, plain(1), content, scratch.image(), &Progress::new()).unwrap();
        let found: Vec<_> = table.pages().runs().collect();
        assert!(found.iter().eq([&(3..4)]), "{backing:?}: {found:?}");
    }
}

#[test]
fn every_flipped_bit_of_a_page_that_the_file_has_is_found_with_its_place() {
    let memory = memory(2);
    [17, 18, 40].iter().for_each(|page| fill_page(&memory, *page, 1));
    let scratch = Scratch::new(2);
    let table = write_full(&memory, 1, &scratch);
    for at in [17 * 4096, 19 * 4096 - 1, 40 * 4096 + 77] {
        scratch.flip(at);
        let damaged = verify(&table, scratch.image(), &Progress::new()).unwrap_err();
        let ReadError::Damage(damage) = damaged else {
            panic!("{damaged}");
        };
        assert_eq!(damage.offset_bytes, at / 65536 * 65536);
        scratch.flip(at);
    }
    scratch.flip(2 * MIB + 100);
    let refused = verify(&table, scratch.image(), &Progress::new());
    assert!(matches!(refused, Err(ReadError::Trailer(_))));
}

#[test]
fn bytes_where_the_file_is_to_have_no_page_are_found_and_given_to_nobody() {
    let memory = memory(2);
    [17, 18, 40].iter().for_each(|page| fill_page(&memory, *page, 1));
    let scratch = Scratch::new(2);
    let table = write_full(&memory, 1, &scratch);
    let saved = opened(&table, &scratch).unwrap();
    // Beside pages that it has, between them, and in a chunk of which it has none.
    for at in [19 * 4096, 16 * 4096 + 4095, 30 * 4096 + 7, 511 * 4096] {
        scratch.flip(at);
        let damaged = verify(&table, scratch.image(), &Progress::new()).unwrap_err();
        assert!(
            matches!(damaged, ReadError::Stray { offset_bytes } if offset_bytes == at),
            "{damaged}"
        );
        assert!(opened(&table, &scratch).unwrap() == saved);
        scratch.flip(at);
    }
    verify(&table, scratch.image(), &Progress::new()).unwrap();
}

#[test]
fn a_cancelled_writing_ends_with_that() {
    let memory = memory(8);
    fill_page(&memory, 0, 1);
    let scratch = Scratch::new(8);
    let progress = Progress::new();
    progress.cancel();
    let content = Content::Full(Untouched::Zeros);
    let cancelled = write(&memory, plain(1), content, scratch.image(), &progress);
    assert!(matches!(cancelled, Err(WriteError::Cancelled)));
}

#[test]
fn a_full_medium_is_an_error_that_says_so() {
    let memory = memory(8);
    PAGES.iter().for_each(|page| fill_page(&memory, *page, 1));
    let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
    let image = image_on(full, file_bytes(8 * MIB));
    let content = Content::Full(Untouched::Zeros);
    let refused = write(&memory, plain(1), content, image, &Progress::new()).unwrap_err();
    let WriteError::Storage { source, .. } = refused else {
        panic!("{refused}");
    };
    assert_eq!(source, Failure::Host(libc::ENOSPC));
}

#[test]
fn a_file_or_a_set_of_pages_of_another_size_is_refused() {
    let memory = memory(4);
    let small = Scratch::new(2);
    let content = Content::Full(Untouched::Zeros);
    let refused = write(&memory, plain(1), content, small.image(), &Progress::new());
    assert!(matches!(refused, Err(WriteError::FileSize { .. })));
    let content = Content::Diff {
        parent: id(1),
        written: &PageSet::empty(2 * MIB),
        there: None,
    };
    let refused = write(
        &memory,
        plain(2),
        content,
        Scratch::new(4).image(),
        &Progress::new(),
    );
    assert!(matches!(refused, Err(WriteError::PageSet { .. })));
}

#[test]
fn a_file_that_was_cut_off_or_added_to_is_refused() {
    let memory = memory(2);
    fill_page(&memory, 0, 1);
    let scratch = Scratch::new(2);
    let table = write_full(&memory, 1, &scratch);
    for size_bytes in [2 * MIB, file_bytes(2 * MIB) - 4096, file_bytes(2 * MIB) + 512] {
        let file: File = scratch.file.try_clone().unwrap();
        file.set_len(size_bytes).unwrap();
        let refused = verify(&table, image_on(file, size_bytes), &Progress::new());
        assert!(
            matches!(refused, Err(ReadError::FileSize { .. })),
            "{size_bytes}: {refused:?}"
        );
    }
}

#[test]
fn protected_memory_is_read_back_and_any_flipped_bit_of_it_is_found() {
    let memory = memory(4);
    PAGES
        .iter()
        .filter(|page| **page < 1024)
        .for_each(|page| fill_page(&memory, *page, 1));
    for protection in protections() {
        let scratch = Scratch::new(4);
        let (id, seal) = protected(1, &protection);
        let (kind, is_encrypted) = (seal.kind(), seal.is_encrypted());
        let content = Content::Full(Untouched::Zeros);
        let table = write(&memory, (id, seal), content, scratch.image(), &Progress::new()).unwrap();
        verify(&table, scratch.image(), &Progress::new()).unwrap();
        assert!(
            opened(&table, &scratch).unwrap() == bytes_of(&memory, 4),
            "{kind}"
        );
        assert_eq!(scratch.content() == bytes_of(&memory, 4), !is_encrypted, "{kind}");
        // Zeros take no space, encrypted or not: the file says which pages are.
        assert_eq!(
            scratch.data_bytes(),
            (PAGES.len() as u64 - 1 + 1) * 4096,
            "{kind}"
        );
        for page in [0, 15, 300] {
            let at = page * 4096 + 4000;
            scratch.flip(at);
            let damaged = verify(&table, scratch.image(), &Progress::new());
            let Err(ReadError::Damage(damage)) = damaged else {
                panic!("{kind}: {damaged:?}");
            };
            assert_eq!(damage.offset_bytes, at / 65536 * 65536);
            scratch.flip(at);
        }
    }
}

#[test]
fn zeros_of_an_encrypted_diff_are_encrypted_as_everything_else_in_it() {
    let memory = memory(4);
    fill_page(&memory, 1, 1);
    let written = set(4 * MIB, [1, 2, 300]);
    for protection in protections() {
        let scratch = Scratch::new(4);
        let (id, seal) = protected(2, &protection);
        let pages = if seal.is_encrypted() { 3 } else { 1 };
        let content = Content::Diff {
            parent: MemoryId([1; 16]),
            written: &written,
            there: None,
        };
        let table = write(&memory, (id, seal), content, scratch.image(), &Progress::new()).unwrap();
        assert_eq!(table.pages(), &written);
        assert_eq!(scratch.data_bytes(), (pages + 1) * 4096);
        assert!(opened(&table, &scratch).unwrap() == bytes_of(&memory, 4));
    }
}

#[test]
fn chunks_of_one_memory_are_none_of_another_with_the_same_keys() {
    use std::os::unix::fs::FileExt;
    let memory = memory(2);
    (0..32).for_each(|page| fill_page(&memory, page, 1));
    for protection in &protections()[1..] {
        let files = [Scratch::new(2), Scratch::new(2)];
        let tables = [(1, &files[0]), (2, &files[1])].map(|(number, scratch)| {
            let content = Content::Full(Untouched::Zeros);
            write(
                &memory,
                protected(number, protection),
                content,
                scratch.image(),
                &Progress::new(),
            )
            .unwrap()
        });
        let mut chunk = vec![0; CHUNK_BYTES];
        let [first, second] = &files;
        if protection.cipher.is_some() {
            // From the other memory, where the guest had the very same there.
            first.file.read_exact_at(&mut chunk, 0).unwrap();
            second.file.write_all_at(&chunk, 0).unwrap();
        } else {
            // From another place of the same memory.
            second.file.read_exact_at(&mut chunk, CHUNK_BYTES as u64).unwrap();
            second.file.write_all_at(&chunk, 0).unwrap();
        }
        let [_, table] = &tables;
        let damaged = verify(table, second.image(), &Progress::new());
        assert!(
            matches!(damaged, Err(ReadError::Damage(Damage { offset_bytes: 0 }))),
            "{damaged:?}"
        );
        // The whole file of the other one.
        let swapped = verify(table, first.image(), &Progress::new());
        assert!(
            matches!(swapped, Err(ReadError::Trailer(TrailerError::OtherMemory { .. }))),
            "{swapped:?}"
        );
    }
}
