//! Diffs over what they go on from.
#![expect(clippy::unwrap_used, reason = "a test's panic is its failure")]

use proptest::prelude::*;
use vm_memory::GuestMemoryMmap;

use super::super::scratch::*;
use super::super::{Content, Untouched, verify, write};
use super::*;

const MIB_OF_MEMORY: u64 = 2;
const PAGES: u64 = 512;

fn write_diff(
    memory: &GuestMemoryMmap,
    parent: &MemoryTable,
    number: u8,
    pages: &[u64],
) -> (MemoryTable, Scratch) {
    let scratch = Scratch::new(MIB_OF_MEMORY);
    let content = Content::Diff {
        parent: parent.id(),
        written: &set(MIB_OF_MEMORY * MIB, pages.iter().copied()),
        there: None,
    };
    let table = write(memory, plain(number), content, scratch.image(), &Progress::new()).unwrap();
    (table, scratch)
}

fn source<'t>((table, scratch): (&'t MemoryTable, &Scratch)) -> Source<'t> {
    Source {
        table,
        image: scratch.image(),
    }
}

fn merged(
    base: (&MemoryTable, &Scratch),
    diff: (&MemoryTable, &Scratch),
) -> Result<(MemoryTable, Scratch), MergeError> {
    let out = Scratch::new(MIB_OF_MEMORY);
    let table = merge(
        source(base),
        source(diff),
        plain(9),
        out.image(),
        &Progress::new(),
    )?;
    Ok((table, out))
}

/// What a guest does to a page between two snapshots.
fn changes() -> impl Strategy<Value = Vec<(u64, bool)>> {
    let page = prop_oneof![0..PAGES, 0..20_u64, 100..140_u64];
    proptest::collection::vec((page, any::<bool>()), 0..60)
}

fn apply(memory: &GuestMemoryMmap, changes: &[(u64, bool)], seed: u64) -> Vec<u64> {
    for (page, is_zeroed) in changes {
        match is_zeroed {
            true => zero_page(memory, *page),
            false => fill_page(memory, *page, seed),
        }
    }
    changes.iter().map(|(page, _)| *page).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn a_chain_of_diffs_merged_from_either_end_is_the_memory_of_its_last(
        first in changes(), second in changes(), third in changes()
    ) {
        let memory = memory(MIB_OF_MEMORY);
        apply(&memory, &first, 1);
        let full_file = Scratch::new(MIB_OF_MEMORY);
        let full = write_full(&memory, 1, &full_file);
        let pages = apply(&memory, &second, 2);
        let (older, older_file) = write_diff(&memory, &full, 2, &pages);
        let pages = apply(&memory, &third, 3);
        let (newer, newer_file) = write_diff(&memory, &older, 3, &pages);
        let expected = bytes_of(&memory, MIB_OF_MEMORY);

        // One diff after the other into the full one: what the first makes is the parent of the second.
        let step_file = Scratch::new(MIB_OF_MEMORY);
        let step = merge(source((&full, &full_file)), source((&older, &older_file)), plain(2),
            step_file.image(), &Progress::new()).unwrap();
        prop_assert_eq!(step.kind(), Kind::Full);
        let (steps, steps_file) = merged((&step, &step_file), (&newer, &newer_file)).unwrap();
        prop_assert!(steps_file.content() == expected);
        // The two diffs first, and then into the full one.
        let (both, both_file) = merged((&older, &older_file), (&newer, &newer_file)).unwrap();
        prop_assert_eq!(both.kind(), Kind::Diff { parent: full.id() });
        let (table, out) = merged((&full, &full_file), (&both, &both_file)).unwrap();
        prop_assert_eq!(table.save(), steps.save());
        verify(&table, out.image(), &Progress::new()).unwrap();
        prop_assert!(out.content() == expected);
        // It is what a full snapshot would have been.
        let again_file = Scratch::new(MIB_OF_MEMORY);
        let again = write_full(&memory, 9, &again_file);
        prop_assert_eq!(table.save(), again.save());
        prop_assert_eq!(out.data_bytes(), again_file.data_bytes());
    }
}

#[test]
fn memories_that_do_not_follow_each_other_are_refused() {
    let memory = memory(MIB_OF_MEMORY);
    fill_page(&memory, 3, 1);
    let (base_file, other_file) = (Scratch::new(MIB_OF_MEMORY), Scratch::new(MIB_OF_MEMORY));
    let base = write_full(&memory, 1, &base_file);
    let other = write_full(&memory, 2, &other_file);
    let (diff, diff_file) = write_diff(&memory, &other, 3, &[3]);
    let refused = merged((&base, &base_file), (&diff, &diff_file)).err();
    assert!(
        matches!(refused, Some(MergeError::OtherParent { .. })),
        "{refused:?}"
    );
    let refused = merged((&base, &base_file), (&other, &other_file)).err();
    assert!(matches!(refused, Some(MergeError::NotADiff)), "{refused:?}");
}

#[test]
fn damage_of_either_is_found_and_nothing_is_sealed() {
    let memory = memory(MIB_OF_MEMORY);
    fill_page(&memory, 3, 1);
    let base_file = Scratch::new(MIB_OF_MEMORY);
    let base = write_full(&memory, 1, &base_file);
    let (diff, diff_file) = write_diff(&memory, &base, 3, &[100]);
    base_file.flip(3 * 4096);
    let refused = merged((&base, &base_file), (&diff, &diff_file)).err();
    assert!(
        matches!(refused, Some(MergeError::Base(ReadError::Damage(_)))),
        "{refused:?}"
    );
    base_file.flip(3 * 4096);
    // A page of zeros that the diff has as a hole.
    diff_file.flip(100 * 4096);
    let refused = merged((&base, &base_file), (&diff, &diff_file)).err();
    assert!(
        matches!(refused, Some(MergeError::Diff(ReadError::Damage(_)))),
        "{refused:?}"
    );
}

#[test]
fn what_is_merged_is_protected_as_it_is_to_be_however_both_were() {
    let memory = memory(MIB_OF_MEMORY);
    (0..20).for_each(|page| fill_page(&memory, page, 1));
    for from in protections() {
        let full_file = Scratch::new(MIB_OF_MEMORY);
        let content = Content::Full(Untouched::Anything);
        let image = full_file.image();
        let full = write(&memory, protected(1, &from), content, image, &Progress::new()).unwrap();
        fill_page(&memory, 3, 2);
        fill_page(&memory, 100, 2);
        zero_page(&memory, 5);
        let diff_file = Scratch::new(MIB_OF_MEMORY);
        let content = Content::Diff {
            parent: full.id(),
            written: &set(MIB_OF_MEMORY * MIB, [3, 5, 100]),
            there: None,
        };
        let image = diff_file.image();
        let diff = write(&memory, protected(2, &from), content, image, &Progress::new()).unwrap();
        for to in protections() {
            let out = Scratch::new(MIB_OF_MEMORY);
            let (base, next) = (source((&full, &full_file)), source((&diff, &diff_file)));
            let (id, seal) = protected(2, &to);
            let kind = seal.kind();
            let merged = merge(base, next, (id, seal), out.image(), &Progress::new()).unwrap();
            assert_eq!(merged.seal().kind(), kind);
            assert!(
                opened(&merged, &out).unwrap() == bytes_of(&memory, MIB_OF_MEMORY),
                "{kind}"
            );
            assert!(
                !merged.pages().contains(5),
                "{kind}: zeros of a full one are a hole"
            );
            if from.cipher.is_some() {
                // The page of the base that nothing has changed: not one block of it is encrypted as it was.
                let (new, old) = (out.content(), full_file.content());
                let pairs = new.iter().zip(&old).take(4096);
                assert!(pairs.filter(|(new, old)| new == old).count() < 200, "{kind}");
            }
        }
        zero_page(&memory, 100);
        (0..20).for_each(|page| fill_page(&memory, page, 1));
    }
}
