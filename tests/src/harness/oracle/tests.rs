use super::*;

const BLOCKS: u64 = 4;
const IMAGE_BYTES: usize = 4 * 4096;

/// An image that writers write to, and the oracle that is told.
struct Scene {
    oracle: Oracle,
    image: Vec<u8>,
}

impl Scene {
    fn new() -> Self {
        Self {
            oracle: Oracle::new(BLOCKS),
            image: vec![0; IMAGE_BYTES],
        }
    }

    fn writes(&mut self, writer: u64, sequences: std::ops::RangeInclusive<u64>) {
        for sequence in sequences {
            stamp(&mut self.image, writer, sequence, BLOCKS);
        }
    }

    fn look(&mut self) -> Result<(), Violation> {
        self.oracle.look(&self.image)
    }
}

/// The first sequence number from `from` on that the writer writes to this block.
fn next_in(block: u64, writer: u64, from: u64) -> u64 {
    (from..)
        .find(|sequence| block_of(writer, *sequence, BLOCKS) == block)
        .expect("every block gets its turn")
}

#[test]
fn writers_that_keep_the_order_of_their_leases_are_fine() {
    let mut scene = Scene::new();
    for writer in 1..5 {
        assert_eq!(scene.oracle.granted(writer), Ok(()));
        scene.writes(writer, 1..=10);
        scene.oracle.acknowledged(writer, 8);
        assert_eq!(scene.look(), Ok(()));
        scene.writes(writer, 11..=20);
        scene.oracle.gone(writer);
        assert_eq!(scene.look(), Ok(()));
    }
}

#[test]
fn a_writer_that_was_never_given_the_lease_is_foreign() {
    let mut scene = Scene::new();
    assert_eq!(scene.oracle.granted(1), Ok(()));
    scene.writes(2, 1..=1);
    assert!(matches!(
        scene.look(),
        Err(Violation::Foreign {
            writer: 2,
            sequence: 1,
            ..
        })
    ));
}

#[test]
fn a_writer_whose_lease_is_gone_is_foreign_and_what_he_wrote_before_is_not() {
    let mut scene = Scene::new();
    assert_eq!(scene.oracle.granted(1), Ok(()));
    scene.writes(1, 1..=10);
    scene.oracle.gone(1);
    assert_eq!(scene.look(), Ok(()));
    assert_eq!(scene.oracle.granted(2), Ok(()));
    assert_eq!(scene.look(), Ok(()), "old stamps stay what they are");
    scene.writes(1, 11..=11);
    assert!(matches!(
        scene.look(),
        Err(Violation::Foreign {
            writer: 1,
            sequence: 11,
            ..
        })
    ));
}

#[test]
fn two_leases_at_a_time_are_refused() {
    let mut scene = Scene::new();
    assert_eq!(scene.oracle.granted(1), Ok(()));
    assert_eq!(
        scene.oracle.granted(2),
        Err(Violation::Shared { first: 1, second: 2 })
    );
}

#[test]
fn an_acknowledged_write_that_is_not_there_is_lost() {
    let mut scene = Scene::new();
    assert_eq!(scene.oracle.granted(1), Ok(()));
    scene.writes(1, 1..=4);
    scene.oracle.acknowledged(1, 5);
    assert!(matches!(
        scene.look(),
        Err(Violation::Lost {
            writer: 1,
            sequence: 5,
            ..
        })
    ));
}

#[test]
fn one_lost_sector_of_a_block_is_noticed() {
    let mut scene = Scene::new();
    assert_eq!(scene.oracle.granted(1), Ok(()));
    scene.writes(1, 1..=1);
    scene.oracle.acknowledged(1, 1);
    let at = usize::try_from(block_of(1, 1, BLOCKS)).expect("below 4") * 4096 + 7 * SECTOR_BYTES;
    scene
        .image
        .get_mut(at..at + SECTOR_BYTES)
        .expect("the block is inside")
        .fill(0);
    assert!(matches!(scene.look(), Err(Violation::Lost { sequence: 1, .. })));
}

#[test]
fn an_old_write_that_comes_late_is_noticed_acknowledged_or_not() {
    for is_acknowledged in [true, false] {
        let mut scene = Scene::new();
        assert_eq!(scene.oracle.granted(1), Ok(()));
        let first = next_in(2, 1, 1);
        let second = next_in(2, 1, first + 1);
        scene.writes(1, 1..=second);
        if is_acknowledged {
            scene.oracle.acknowledged(1, second);
        }
        assert_eq!(scene.look(), Ok(()));
        scene.writes(1, first..=first);
        let found = scene.look();
        let is_noticed = match found {
            Err(Violation::Lost { .. }) => is_acknowledged,
            Err(Violation::WentBack { sequence, .. }) => sequence == first && !is_acknowledged,
            _ => false,
        };
        assert!(is_noticed, "{found:?}");
    }
}

#[test]
fn a_torn_block_is_fine_until_it_was_acknowledged() {
    let mut scene = Scene::new();
    assert_eq!(scene.oracle.granted(1), Ok(()));
    let first = next_in(0, 1, 1);
    let second = next_in(0, 1, first + 1);
    scene.writes(1, 1..=second);
    let old = {
        let mut older = Scene::new();
        older.writes(1, 1..=first);
        older.image
    };
    let half = 0..2048;
    scene
        .image
        .get_mut(half.clone())
        .expect("block 0 is inside")
        .copy_from_slice(old.get(half).expect("block 0 is inside"));
    scene.oracle.acknowledged(1, second - 1);
    assert_eq!(scene.look(), Ok(()));
    scene.oracle.acknowledged(1, second);
    assert!(matches!(scene.look(), Err(Violation::Lost { .. })));
}

#[test]
fn damage_and_misplaced_stamps_have_names() {
    let mut scene = Scene::new();
    assert_eq!(scene.oracle.granted(1), Ok(()));
    scene.writes(1, 1..=1);
    let sector = block_of(1, 1, BLOCKS) * BLOCK_SECTORS;
    let at = usize::try_from(sector).expect("small") * SECTOR_BYTES;
    let whole = scene
        .image
        .get(at..at + SECTOR_BYTES)
        .expect("the block is inside")
        .to_vec();
    *scene.image.get_mut(at + 100).expect("inside") ^= 1;
    assert_eq!(scene.look(), Err(Violation::Damaged { sector }));
    *scene.image.get_mut(at + 100).expect("inside") ^= 1;
    scene
        .image
        .get_mut(at + SECTOR_BYTES..at + 2 * SECTOR_BYTES)
        .expect("inside")
        .copy_from_slice(&whole);
    assert!(matches!(
        scene.look(),
        Err(Violation::Misplaced { writer: 1, .. })
    ));
    assert!(matches!(
        scene.oracle.look(&[]),
        Err(Violation::Short { sectors: 0 })
    ));
}

#[test]
fn a_sector_that_was_caught_half_written_is_read_again() {
    let mut whole = vec![0; IMAGE_BYTES];
    stamp(&mut whole, 1, 1, BLOCKS);
    let mut torn = whole.clone();
    let at = whole.iter().position(|byte| *byte != 0).expect("it has a stamp");
    *torn.get_mut(at).expect("inside") ^= 1;
    let reads = std::cell::Cell::new(0);
    let read = || {
        reads.set(reads.get() + 1);
        Ok(if reads.get() < 3 {
            torn.clone()
        } else {
            whole.clone()
        })
    };
    assert_eq!(reread_damaged(read).expect("it is read"), whole);
    assert_eq!(reread_damaged(|| Ok(torn.clone())).expect("it is read"), torn);
}
