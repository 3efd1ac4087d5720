//! What the two sides of a migration say to each other while memory is fetched: the first byte of an input says who
//! hears the rest.

use std::io::Cursor;

use coracle_vmm::memory::{Backing, PageSize, allocate};
use coracle_vmm::migration::postcopy::filling::Filling;
use coracle_vmm::migration::postcopy::frames::{Asked, Heard, hear, hear_absent, take_frame};
use coracle_vmm::migration::wire::Wire;

use super::migration::Said;

const SIZE_BYTES: u64 = 1 << 20;
const PAGES: u64 = 256;

pub(crate) fn run(data: &[u8]) {
    let Some((side, said)) = data.split_first() else {
        return;
    };
    let mut wire = Wire::new(Said(Cursor::new(said)));
    let Ok(absent) = hear_absent(&mut wire, SIZE_BYTES) else {
        return;
    };
    assert!(absent.runs().all(|run| run.end <= PAGES), "{absent:?}");
    if side % 2 == 0 {
        while let Ok(Asked::Want(page)) = hear(&mut wire, PAGES) {
            assert!(page < PAGES, "page {page} is none of the memory");
        }
        return;
    }
    let memory = allocate(1, Backing::Anonymous, PageSize::Base).expect("a MiB is there");
    // A host may not let this process guard memory.
    let Ok(mut filling) = Filling::guard(&memory, absent) else {
        return;
    };
    while let Ok(Heard::Pages) = take_frame(&mut wire, &mut filling) {
        assert_eq!(filling.left(), filling.absent().count());
    }
}
