//! Whoever copies an image is told of everything that its guest has changed.

use coracle_storage::changes::{BLOCK_BYTES, Blocks};

use super::*;

/// Where they lie: from here to there.
fn pairs(blocks: &Blocks) -> Vec<(u64, u64)> {
    blocks.ranges().map(|range| (range.start, range.end)).collect()
}

fn what_a_guest_was_told_is_done_is_marked(engine: Engine) {
    let mut rig = Rig::new(engine);
    let changes = Arc::clone(rig.control.changes());
    assert_eq!(rig.request(VIRTIO_BLK_T_OUT, 0, &[1; 512]).0, OK);
    let watch = changes.watch(IMAGE_BYTES);
    assert!(watch.take().is_empty(), "nobody watched");
    let block = BLOCK_BYTES / 512;
    let marked = |rig: &mut Rig, kind, sector, data: &[u8]| {
        rig.request(kind, sector, data);
        pairs(&watch.take())
    };
    let two = block - 1;
    assert_eq!(
        marked(&mut rig, VIRTIO_BLK_T_OUT, two, &[1; 1024]),
        [(0, 2 * BLOCK_BYTES)]
    );
    for (kind, flags) in [(VIRTIO_BLK_T_DISCARD, 0), (VIRTIO_BLK_T_WRITE_ZEROES, 1)] {
        assert_eq!(
            marked(&mut rig, kind, 0, &range(3 * block, 8, flags)),
            [(3 * BLOCK_BYTES, 4 * BLOCK_BYTES)]
        );
    }
    for (kind, data) in [(VIRTIO_BLK_T_IN, &[0; 512][..]), (VIRTIO_BLK_T_FLUSH, &[])] {
        assert_eq!(marked(&mut rig, kind, 0, data), []);
    }
    drop(watch);
    let watch = changes.watch(IMAGE_BYTES);
    assert_eq!(rig.request(VIRTIO_BLK_T_OUT, 5 * block, &[1; 512]).0, OK);
    assert_eq!(pairs(&watch.take()), [(5 * BLOCK_BYTES, 6 * BLOCK_BYTES)]);
}

#[test]
fn by_io_uring_what_a_guest_was_told_is_done_is_marked() {
    what_a_guest_was_told_is_done_is_marked(Engine::Async);
}

#[test]
fn by_plain_calls_what_a_guest_was_told_is_done_is_marked() {
    what_a_guest_was_told_is_done_is_marked(Engine::Sync);
}
