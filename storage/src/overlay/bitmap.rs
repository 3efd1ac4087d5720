//! Which clusters an overlay has, and what of that knowledge its file lacks.

use std::ops::Range;
use std::sync::Arc;

use super::words::Words;

/// The unit in which the bitmap is written, in bytes: a page of the page cache.
pub(super) const BLOCK_BYTES: usize = 4096;

const WORDS_PER_BLOCK: usize = BLOCK_BYTES / 8;
const BITS_PER_BLOCK: u64 = BLOCK_BYTES as u64 * 8;

/// One bit per cluster; set means that the cluster is read from the overlay's own file. Bits are only ever set.
///
/// ```text
///   clear ──set: the data is written──► set, block dirty ──stage──► staged ──written, synced──► in the file
///                                              ▲                      │
///                                              └───────restore────────┘ the write or the sync failed
/// ```
pub(super) struct Bitmap {
    words: Arc<Words>,
    /// What is written to the file: it must not change under the write, as `words` may. Bits that are
    /// set meanwhile belong to data that the sync before did not cover.
    staged: Vec<u64>,
    /// One entry per block.
    dirty: Vec<bool>,
    dirty_count: usize,
    /// Whether a dirty block has bits whose data may still be in a cache.
    needs_sync: bool,
}

/// Neighbouring blocks of the bitmap.
pub(super) type Blocks = Range<usize>;

/// As many blocks as one operation writes.
const RUN_BLOCKS_MAX: usize = 256;

impl Bitmap {
    /// A bitmap for `clusters_max` clusters, the first of which are as `bytes` say (little-endian, as in the file).
    pub(super) fn new(clusters_max: u64, bytes: &[u8]) -> Self {
        let blocks = usize::try_from(clusters_max.div_ceil(BITS_PER_BLOCK)).expect("the format has a limit");
        // Zeroed memory that nobody has touched costs the host nothing.
        let words = Words::zeroed(blocks * WORDS_PER_BLOCK);
        let mut staged = vec![0; blocks * WORDS_PER_BLOCK];
        let (chunks, rest) = bytes.as_chunks::<8>();
        assert!(rest.is_empty(), "a bitmap is read by whole words");
        for ((place, staged), chunk) in (0..words.len()).zip(&mut staged).zip(chunks) {
            let value = u64::from_le_bytes(*chunk);
            if value != 0 {
                words.set(place, value);
                *staged = value.to_le();
            }
        }
        Self {
            words: Arc::new(words),
            staged,
            dirty: vec![false; blocks],
            dirty_count: 0,
            needs_sync: false,
        }
    }

    /// The bits as they are at any time, for whoever looks at them from outside.
    pub(super) fn words(&self) -> Arc<Words> {
        Arc::clone(&self.words)
    }

    /// Whether the cluster at the start of `clusters`, which is not empty, is present, and where the run
    /// of clusters that are like it ends within `clusters`.
    pub(super) fn run(&self, clusters: &Range<u64>) -> (bool, u64) {
        let present = self.word(clusters.start) >> (clusters.start % 64) & 1 == 1;
        let mut at = clusters.start;
        while at < clusters.end {
            let ahead = self.word(at) >> (at % 64);
            let alike = if present {
                ahead.trailing_ones()
            } else {
                ahead.trailing_zeros()
            };
            let left = 64 - at % 64;
            at += u64::from(alike).min(left);
            if u64::from(alike) < left {
                break;
            }
        }
        (present, at.min(clusters.end))
    }

    /// Whether all of `clusters` are present.
    pub(super) fn has_all(&self, clusters: &Range<u64>) -> bool {
        self.run(clusters) == (true, clusters.end)
    }

    /// Whether the cluster is present.
    pub(super) fn has(&self, cluster: u64) -> bool {
        self.word(cluster) >> (cluster % 64) & 1 == 1
    }

    /// Notes that the data of `clusters` is written. `synced` says that it is on the medium too.
    pub(super) fn set(&mut self, clusters: &Range<u64>, is_synced: IsSynced) {
        let mut at = clusters.start;
        while at < clusters.end {
            let first = at % 64;
            let count = (64 - first).min(clusters.end - at);
            let mask = (u64::MAX >> (64 - count)) << first;
            let place = word_place(at);
            let word = self.words.at(place);
            if word & mask != mask {
                self.words.set(place, word | mask);
                self.needs_sync |= is_synced == IsSynced::No;
                self.mark(place / WORDS_PER_BLOCK);
            }
            at += count;
        }
    }

    /// Whether the file may lack a bit of `clusters` that is not staged either.
    pub(super) fn is_dirty(&self, clusters: &Range<u64>) -> bool {
        let blocks = block_of(clusters.start)..block_of(clusters.end - 1) + 1;
        self.dirty
            .get(blocks)
            .is_some_and(|dirty| dirty.iter().any(|dirty| *dirty))
    }

    /// Whether the file lacks a bit that is not staged either.
    pub(super) fn has_dirty(&self) -> bool {
        self.dirty_count > 0
    }

    /// Freezes what the file lacks. What is returned has to be written (see [`Self::staged`]) and synced,
    /// or restored; if it `needs_sync`, then after a sync that starts after this call.
    pub(super) fn stage(&mut self) -> Staged {
        let mut runs: Vec<Blocks> = Vec::new();
        if self.dirty_count > 0 {
            for block in 0..self.dirty.len() {
                if self.unmark(block) {
                    self.freeze(block);
                    match runs.last_mut() {
                        Some(run) if run.end == block && run.len() < RUN_BLOCKS_MAX => run.end += 1,
                        _ => runs.push(block..block + 1),
                    }
                }
            }
        }
        Staged {
            runs,
            needs_sync: std::mem::take(&mut self.needs_sync),
        }
    }

    /// Takes back that `staged` would reach the file.
    pub(super) fn restore(&mut self, staged: &Staged) {
        self.needs_sync |= staged.needs_sync;
        for block in staged.runs.iter().cloned().flatten() {
            self.mark(block);
        }
    }

    /// The bytes of frozen blocks. They stay where they are and as they are until the next [`Self::stage`].
    pub(super) fn staged(&mut self, blocks: &Blocks) -> &mut [u64] {
        self.staged
            .get_mut(blocks.start * WORDS_PER_BLOCK..blocks.end * WORDS_PER_BLOCK)
            .expect("runs come from the bitmap itself")
    }

    fn freeze(&mut self, block: usize) {
        let words = block * WORDS_PER_BLOCK..(block + 1) * WORDS_PER_BLOCK;
        let to = self.staged.get_mut(words.clone());
        let to = to.expect("dirty blocks lie within the bitmap");
        for (to, place) in to.iter_mut().zip(words) {
            *to = self.words.at(place).to_le();
        }
    }

    fn mark(&mut self, block: usize) {
        let dirty = self
            .dirty
            .get_mut(block)
            .expect("each word of the bitmap has a block");
        self.dirty_count += usize::from(!std::mem::replace(dirty, true));
    }

    fn unmark(&mut self, block: usize) -> bool {
        let was_dirty = self.dirty.get_mut(block).is_some_and(std::mem::take);
        self.dirty_count -= usize::from(was_dirty);
        was_dirty
    }

    fn word(&self, cluster: u64) -> u64 {
        self.words.at(word_place(cluster))
    }
}

/// Whether data that was written is on the medium.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum IsSynced {
    Yes,
    No,
}

/// What was frozen at one time.
#[derive(Debug, Default)]
pub(super) struct Staged {
    /// The blocks, in order.
    pub(super) runs: Vec<Blocks>,
    /// Whether their data may still be in a cache.
    pub(super) needs_sync: bool,
}

fn word_place(cluster: u64) -> usize {
    usize::try_from(cluster / 64).expect("this is a 64-bit monitor")
}

fn block_of(cluster: u64) -> usize {
    word_place(cluster) / WORDS_PER_BLOCK
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_ends_where_the_clusters_change_or_the_range_ends() {
        let mut bitmap = Bitmap::new(1 << 20, &[]);
        bitmap.set(&(60..200), IsSynced::No);
        assert_eq!(bitmap.run(&(0..1000)), (false, 60));
        assert_eq!(bitmap.run(&(60..1000)), (true, 200));
        assert_eq!(bitmap.run(&(60..64)), (true, 64));
        assert_eq!(bitmap.run(&(128..150)), (true, 150));
        assert_eq!(bitmap.run(&(200..1 << 20)), (false, 1 << 20));
        assert!(bitmap.has_all(&(64..200)) && !bitmap.has_all(&(64..201)));
    }

    #[test]
    fn what_is_set_after_the_freeze_is_not_written_and_is_still_lacking() {
        let mut bitmap = Bitmap::new(1 << 20, &[]);
        bitmap.set(&(0..1), IsSynced::No);
        let staged = bitmap.stage();
        assert!(staged.needs_sync);
        assert_eq!(staged.runs.first(), Some(&(0..1)));
        bitmap.set(&(1..2), IsSynced::Yes);
        assert_eq!(bitmap.staged(&(0..1)).first(), Some(&1_u64.to_le()));
        assert!(bitmap.is_dirty(&(0..1)) && bitmap.has_dirty());
        assert!(!bitmap.stage().needs_sync);
        assert!(!bitmap.has_dirty());
        bitmap.restore(&staged);
        assert!(bitmap.stage().needs_sync);
    }

    #[test]
    fn neighbouring_dirty_blocks_are_one_run() {
        let mut bitmap = Bitmap::new(1 << 20, &[]);
        bitmap.set(&(0..2 * BITS_PER_BLOCK), IsSynced::No);
        bitmap.set(&(5 * BITS_PER_BLOCK..5 * BITS_PER_BLOCK + 1), IsSynced::No);
        assert_eq!(bitmap.stage().runs, [0..2, 5..6]);
        assert!(!bitmap.is_dirty(&(0..1)));
        // What is set already changes nothing.
        bitmap.set(&(7..9), IsSynced::No);
        assert!(!bitmap.has_dirty());
    }
}
