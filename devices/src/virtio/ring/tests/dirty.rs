//! What a queue marks in the pages that are tracked.

use super::*;
use crate::virtio::dirty::DirtyPages;

const PAGE: u64 = 4096;
/// Of the rings that [`queue`] lays out.
const USED_PAGE: u64 = 1;

fn tracked(features: u64) -> (DriverRing, Virtqueue, Arc<DirtyPages>) {
    let (driver, mut ring) = queue(8, features);
    let dirty = Arc::new(DirtyPages::new(driver.memory()));
    ring.track(Some(Arc::clone(&dirty)));
    (driver, ring, dirty)
}

/// The numbers of the marked pages.
fn pages(dirty: &DirtyPages) -> Vec<u64> {
    let words = dirty.take().concat();
    let pages = (0..).zip(words).flat_map(|(number, word)| {
        let set = (0..64_u64).filter(move |bit| word >> bit & 1 != 0);
        set.map(move |bit| 64 * number + bit)
    });
    pages.collect()
}

#[test]
fn what_may_be_written_is_marked_when_the_chain_is_given_back() {
    let (mut driver, mut ring, dirty) = tracked(FEATURE_INDIRECT_DESC);
    driver.offer_chain(&[
        Piece::Readable(0x10 * PAGE, 16),
        Piece::Writable(0x21 * PAGE - 1, 2),
        Piece::Writable(0x30 * PAGE, 1),
    ]);
    driver.offer_indirect(0x40 * PAGE, &[Piece::Writable(0x50 * PAGE, 4096)]);
    let first = pop(&mut ring).unwrap().unwrap();
    let second = pop(&mut ring).unwrap().unwrap();
    assert_eq!(pages(&dirty), [0; 0], "nothing was written yet");
    ring.push(second.head, 4096);
    assert_eq!(pages(&dirty), [0x50]);
    ring.push(first.head, 3);
    assert_eq!(pages(&dirty), [0x20, 0x21, 0x30]);
}

#[test]
fn a_chain_that_was_put_back_is_marked_by_what_it_is_when_it_is_taken_again() {
    let (mut driver, mut ring, dirty) = tracked(0);
    let head = driver.offer_chain(&[Piece::Writable(0x20 * PAGE, 16)]);
    pop(&mut ring).unwrap().unwrap();
    ring.unpop();
    driver.descriptor(head, (0x30 * PAGE, 16, WRITE, 0));
    let chain = pop(&mut ring).unwrap().unwrap();
    ring.push(chain.head, 16);
    assert_eq!(pages(&dirty), [0x30]);
}

#[test]
fn a_chain_that_makes_no_sense_is_marked_as_far_as_it_goes() {
    let (mut driver, mut ring, dirty) = tracked(0);
    driver.descriptor(3, (0x20 * PAGE, 16, WRITE | NEXT, 3));
    driver.offer(3);
    fault(&mut ring);
    ring.push(3, 0);
    drop(ring);
    assert_eq!(pages(&dirty), [USED_PAGE, 0x20]);
}

#[test]
fn the_used_ring_is_marked_when_it_is_asked_for_and_at_the_end() {
    let (mut driver, mut ring, dirty) = tracked(0);
    driver.offer_chain(&[Piece::Readable(0x10 * PAGE, 16)]);
    let chain = pop(&mut ring).unwrap().unwrap();
    ring.push(chain.head, 0);
    ring.publish();
    assert_eq!(pages(&dirty), [0; 0]);
    ring.mark_used_ring();
    assert_eq!(pages(&dirty), [USED_PAGE]);
    drop(ring);
    assert_eq!(pages(&dirty), [USED_PAGE]);
}

#[test]
fn a_used_ring_over_several_pages_is_marked_whole() {
    let (_, mut ring) = queue(4096, 0);
    let dirty = Arc::new(DirtyPages::new(&memory(MEMORY_BYTES)));
    ring.track(Some(Arc::clone(&dirty)));
    let layout = ring.state().layout;
    let last = layout.used + 6 + 8 * 4096 - 1;
    ring.mark_used_ring();
    let expected: Vec<u64> = (layout.used / PAGE..=last / PAGE).collect();
    assert!(expected.len() > 8);
    assert_eq!(pages(&dirty), expected);
}

#[test]
fn tracking_ends_when_it_is_told_to() {
    let (mut driver, mut ring, dirty) = tracked(0);
    ring.track(None);
    assert_eq!(pages(&dirty), [USED_PAGE]);
    driver.offer_chain(&[Piece::Writable(0x20 * PAGE, 16)]);
    let chain = pop(&mut ring).unwrap().unwrap();
    ring.push(chain.head, 16);
    ring.mark_used_ring();
    drop(ring);
    assert_eq!(pages(&dirty), [0; 0]);
}
