#![expect(clippy::indexing_slicing, reason = "a test's panic is its failure")]

use std::collections::BTreeSet;
use std::sync::atomic::AtomicU64;

use proptest::prelude::*;

use super::*;

/// Where they lie: from here to there.
fn pairs(blocks: &Blocks) -> Vec<(u64, u64)> {
    blocks.ranges().map(|range| (range.start, range.end)).collect()
}

#[test]
fn who_does_not_watch_is_told_nothing() {
    let changes = Arc::<Changes>::default();
    changes.mark(0..512);
    let watch = changes.watch(10 * BLOCK_BYTES);
    assert!(watch.take().is_empty());
    changes.mark(BLOCK_BYTES - 1..BLOCK_BYTES + 1);
    let taken = watch.take();
    assert_eq!(pairs(&taken), [(0, 2 * BLOCK_BYTES)]);
    assert!(watch.take().is_empty());
    changes.mark(0..1);
    drop(watch);
    changes.mark(0..512);
    assert_eq!(*changes.lock(), Blocks::default());
}

#[test]
fn the_last_block_ends_with_the_image_and_nothing_lies_behind_it() {
    let mut blocks = Blocks::none(BLOCK_BYTES + 512);
    blocks.insert(0..u64::MAX);
    assert_eq!(pairs(&blocks), [(0, BLOCK_BYTES + 512)]);
    assert_eq!(blocks.bytes(), BLOCK_BYTES + 512);
    blocks.insert(5 * BLOCK_BYTES..6 * BLOCK_BYTES);
    blocks.insert(7..7);
    assert_eq!(blocks.bytes(), BLOCK_BYTES + 512);
}

/// How many blocks the images of these tests have.
const BLOCKS: u64 = 200;

proptest! {
    #[test]
    fn blocks_are_those_that_were_touched(
        size_bytes in 1..BLOCKS * BLOCK_BYTES,
        ranges in prop::collection::vec((0..BLOCKS * BLOCK_BYTES, 0..90 * BLOCK_BYTES), 0..8),
        others in prop::collection::vec((0..BLOCKS * BLOCK_BYTES, 0..3 * BLOCK_BYTES), 0..8),
    ) {
        let (mut blocks, mut other) = (Blocks::none(size_bytes), Blocks::none(size_bytes));
        let mut model = BTreeSet::new();
        for (into, ranges) in [(&mut blocks, ranges), (&mut other, others)] {
            for (start, len) in ranges {
                into.insert(start..start + len);
                let touched = (start..(start + len).min(size_bytes)).step_by(512);
                model.extend(touched.map(|byte| byte / BLOCK_BYTES));
                if start < size_bytes && len > 0 {
                    model.insert(((start + len).min(size_bytes) - 1) / BLOCK_BYTES);
                }
            }
        }
        blocks.insert_all(&other);
        let ranges: Vec<Range<u64>> = blocks.ranges().collect();
        let found: BTreeSet<u64> = ranges
            .iter()
            .flat_map(|range| range.start / BLOCK_BYTES..range.end.div_ceil(BLOCK_BYTES))
            .collect();
        prop_assert_eq!(&found, &model);
        prop_assert!(ranges.iter().all(|range| range.start < range.end && range.end <= size_bytes));
        prop_assert!(ranges.windows(2).all(|pair| pair[0].end < pair[1].start));
        prop_assert_eq!(blocks.is_empty(), model.is_empty());
    }
}

/// What happens to an image that is copied while it is written.
#[derive(Clone, Copy, Debug)]
enum Happens {
    /// A write of this block is started.
    Starts(usize),
    /// The bytes of the write in flight with this number land.
    Lands(usize),
    /// It is complete.
    Completes(usize),
    /// A write that has landed is lost sight of: it fails, and is complete without its bytes, or with some of them.
    Fails(usize),
    /// The marks are taken; what was taken before and not read is not forgotten.
    Taken,
    /// A block that was taken is read.
    Reads(usize),
}

fn happens() -> impl Strategy<Value = Happens> {
    prop_oneof![
        3 => (0..SMALL).prop_map(Happens::Starts),
        3 => any::<usize>().prop_map(Happens::Lands),
        2 => any::<usize>().prop_map(Happens::Completes),
        1 => any::<usize>().prop_map(Happens::Fails),
        2 => Just(Happens::Taken),
        4 => any::<usize>().prop_map(Happens::Reads),
    ]
}

/// Blocks of the small image, and most writes in flight.
const SMALL: usize = 5;
const IN_FLIGHT_MAX: usize = 4;

/// A write in flight.
#[derive(Clone, Copy)]
struct Flight {
    block: usize,
    value: u64,
    has_landed: bool,
}

/// An image, its copy, and who changes it.
struct Model {
    changes: Arc<Changes>,
    image: [u64; SMALL],
    copy: [u64; SMALL],
    flights: Vec<Flight>,
    /// What was taken and not read.
    left: Vec<usize>,
    written: u64,
}

impl Model {
    fn is_done(&mut self, number: usize) {
        if self.flights.is_empty() {
            return;
        }
        let flight = self.flights.swap_remove(number % self.flights.len());
        let start = flight.block as u64 * BLOCK_BYTES;
        self.changes.mark(start..start + 512);
    }

    fn lands(&mut self, number: usize) {
        let count = self.flights.len().max(1);
        if let Some(flight) = self.flights.get_mut(number % count)
            && !flight.has_landed
        {
            flight.has_landed = true;
            self.image[flight.block] = flight.value;
        }
    }

    fn happens(&mut self, what: Happens, watch: &Watch) {
        match what {
            Happens::Starts(block) if self.flights.len() < IN_FLIGHT_MAX => {
                self.written += 1;
                self.flights.push(Flight {
                    block,
                    value: self.written,
                    has_landed: false,
                });
            }
            Happens::Starts(_) => {}
            Happens::Lands(number) => self.lands(number),
            Happens::Completes(number) => {
                self.lands(number);
                self.is_done(number);
            }
            Happens::Fails(number) => self.is_done(number),
            Happens::Taken => self.take(watch),
            Happens::Reads(number) if !self.left.is_empty() => {
                let block = self.left.swap_remove(number % self.left.len());
                self.copy[block] = self.image[block];
            }
            Happens::Reads(_) => {}
        }
    }

    fn take(&mut self, watch: &Watch) {
        for range in watch.take().ranges() {
            let blocks = range.start / BLOCK_BYTES..range.end / BLOCK_BYTES;
            self.left
                .extend(blocks.map(|block| usize::try_from(block).unwrap_or(SMALL)));
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]
    #[test]
    fn whatever_was_in_flight_when_marks_were_taken_the_copy_is_the_image_in_the_end(
        before in prop::collection::vec(happens(), 0..6),
        meanwhile in prop::collection::vec(happens(), 0..60),
    ) {
        let changes = Arc::<Changes>::default();
        let mut model = Model {
            changes: Arc::clone(&changes),
            image: [0; SMALL],
            copy: [0; SMALL],
            flights: Vec::new(),
            left: Vec::new(),
            written: 0,
        };
        // Writes may be in flight when somebody begins to watch.
        let elsewhere = Arc::<Changes>::default().watch(0);
        before.into_iter().for_each(|what| model.happens(what, &elsewhere));
        let watch = changes.watch(SMALL as u64 * BLOCK_BYTES);
        model.left = (0..SMALL).collect();
        meanwhile.into_iter().for_each(|what| model.happens(what, &watch));
        // The guest stands still: nothing is in flight any more.
        while !model.flights.is_empty() {
            model.happens(Happens::Completes(0), &watch);
        }
        model.take(&watch);
        while !model.left.is_empty() {
            model.happens(Happens::Reads(0), &watch);
        }
        prop_assert_eq!(model.copy, model.image);
    }
}

#[test]
fn marks_of_several_threads_are_all_found_however_often_they_are_taken() {
    const THREADS: u64 = 3;
    const ROUNDS: u64 = 2_000;
    let changes = Arc::<Changes>::default();
    let watch = changes.watch(THREADS * BLOCK_BYTES);
    let image: Vec<AtomicU64> = (0..THREADS).map(|_| AtomicU64::default()).collect();
    let mut copy = vec![0; image.len()];
    std::thread::scope(|scope| {
        let writers: Vec<_> = image
            .iter()
            .zip(0..)
            .map(|(place, block)| {
                let changes = &changes;
                scope.spawn(move || {
                    for value in 1..=ROUNDS {
                        place.store(value, Ordering::Relaxed);
                        changes.mark(block * BLOCK_BYTES..block * BLOCK_BYTES + 1);
                    }
                })
            })
            .collect();
        loop {
            let is_last = writers.iter().all(|writer| writer.is_finished());
            for range in watch.take().ranges() {
                for block in range.start / BLOCK_BYTES..range.end / BLOCK_BYTES {
                    let block = usize::try_from(block).unwrap_or(usize::MAX);
                    copy[block] = image[block].load(Ordering::Relaxed);
                }
            }
            if is_last {
                break;
            }
        }
    });
    assert_eq!(copy, [ROUNDS; 3]);
}
